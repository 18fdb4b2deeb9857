"""One gate for every spacing of the steps: a noise level beside a fixed fraction of the steps, judged by the demo model's captions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from tgate_trt import demo
from tgate_trt.analysis.prompts import held_out, in_turn
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.demo.dataset import OBJECT_COLOURS, Captioned
from tgate_trt.demo.dataset import draw as draw_true
from tgate_trt.demo.evaluate import score
from tgate_trt.errors import InputError
from tgate_trt.gate.denoiser import GatedDenoiser
from tgate_trt.gate.schedule import NONE, GateStep
from tgate_trt.running.drawing import SCHEDULERS, Drawing, draw, prepare, scheduler_of
from tgate_trt.running.pipeline import load

_BATCH_SIZE = 16
"""Pictures in one call."""


@dataclass(frozen=True)
class Spacing:
    """Where the steps of a run lie."""

    name: str
    steps: int = 25
    scheduler: str | None = None
    """A key of `tgate_trt.running.drawing.SCHEDULERS`; the model's own if None."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the scheduler, beside its own."""
    strength: float | None = None
    """Of image to image, which begins with less noise; None for text to image."""
    start: str | None = None
    """The pictures that image to image begins from, a key of `STARTS`."""

    @property
    def label(self) -> str:
        """The name in tables."""
        return self.name if self.strength is None else f"{self.name}, strength {self.strength:g}, from {self.start}"


def recoloured(captioned: Captioned) -> Image.Image:
    """The picture of a caption with its shape in the next colour, so that the text has to change the picture."""
    combination = captioned.combination
    colours = [colour for colour in OBJECT_COLOURS if colour != combination.background]
    other = colours[(colours.index(combination.colour) + 1) % len(colours)]
    return draw_true(replace(combination, colour=other))


STARTS: Mapping[str, Callable[[Captioned], Image.Image]] = {
    "the caption's picture": lambda captioned: draw_true(captioned.combination),
    "another colour": recoloured,
}
"""The picture of each caption that image to image begins from."""

SPACINGS = (
    Spacing("trailing"),
    Spacing("leading", settings={"timestep_spacing": "leading"}),
    Spacing("Karras", scheduler="euler", settings={"use_karras_sigmas": True}),
    Spacing("trailing", 8),
    Spacing("trailing", 12),
    Spacing("trailing", 50),
    *(Spacing("image to image", strength=strength, start=start) for start in STARTS for strength in (0.4, 0.7)),
    *(Spacing(name, scheduler=name) for name in SCHEDULERS),
)


def gates_of(bundle: Bundle) -> tuple[GateStep, ...]:
    """No gate, the model's default, which is a noise level, and its published step as a fraction.

    Raises:
        InputError: if the bundle is of another model, whose pictures no program can read.
    """
    manifest = bundle.manifest
    if manifest.model.name != demo.NAME or manifest.gate_step is None:
        raise InputError(f"spacings are judged by the captions of the model {demo.NAME!r}, got {manifest.model.name!r}; choose its bundle")
    return NONE, manifest.default_gate_step, manifest.gate_step


def measure(bundle: Bundle, samples: int, seed: int, backend: str | None) -> Iterator[list[dict[str, Any]]]:
    """Draw the same captions in every spacing with each gate of `gates_of`.

    Args:
        bundle: of the demo model.
        samples: pictures of each; held-out captions are taken in turn.
        seed: seed of the captions, of their wordings and of the noise.
        backend: see `tgate_trt.load`.

    Yields:
        The rows so far, after each spacing.
    """
    gates = gates_of(bundle)
    captioned = in_turn(held_out(bundle.manifest.model.name, samples, seed), samples)
    pipeline = prepare(load(bundle, backend=backend), None)
    own, rows = pipeline.scheduler, []
    for spacing in SPACINGS:
        pipeline.scheduler = own
        made = scheduler_of(pipeline, spacing.scheduler)
        pipeline.scheduler = type(made).from_config(made.config, **spacing.settings)
        row = dataclasses.asdict(spacing) | {"label": spacing.label, "gates": []}
        for gate in gates:
            row["gates"].append(_judged(pipeline, bundle, spacing, captioned, gate, seed))
        rows.append(row)
        yield list(rows)


def _judged(pipeline: Any, bundle: Bundle, spacing: Spacing, captioned: Sequence[Captioned], gate: GateStep, seed: int) -> dict[str, Any]:
    """Draw all captions with one gate, and count the pictures that are right."""
    denoiser: GatedDenoiser = pipeline.unet
    denoiser.gate_step = gate
    drawing = Drawing(tuple(each.caption for each in captioned), steps=spacing.steps, seed=seed).of(bundle)
    if spacing.start is None:
        pictures = [picture for batch in drawing.batches(_BATCH_SIZE) for picture in draw(pipeline, batch)]
    else:
        pictures = _from_pictures(pipeline, replace(drawing, height=None, width=None), spacing, list(map(STARTS[spacing.start], captioned)))
    schedule = denoiser.latest_run.schedule
    return {
        "gate_step": gate,
        "steps": schedule.steps,
        "planning_steps": schedule.gate_step,
        "right": score(pictures, captioned).overall.to_json(),
    }


def _from_pictures(pipeline: Any, drawing: Drawing, spacing: Spacing, begun: Sequence[Image.Image]) -> list[Image.Image]:
    """Draw from pictures, one for each prompt, with the image-to-image pipeline of the same parts."""
    from diffusers import StableDiffusionImg2ImgPipeline

    made = prepare(StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False), None)
    drawn: list[Image.Image] = []
    for batch in drawing.batches(_BATCH_SIZE):
        drawn += draw(made, batch, image=begun[len(drawn) : len(drawn) + len(batch.prompts)], strength=spacing.strength)
    return drawn

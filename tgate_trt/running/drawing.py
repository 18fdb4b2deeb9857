"""Pictures from a bundle, for one or several gates, and the files that show them."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgate_trt.bundle.bundle import Bundle
from tgate_trt.errors import InputError
from tgate_trt.files import replacing
from tgate_trt.gate.after_gate import DEFAULT_AFTER_GATE, after_gate_of
from tgate_trt.gate.schedule import GateStep, check_gate_step, parse_gate_step, planning_steps

if TYPE_CHECKING:
    from PIL.Image import Image

SCHEDULERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "sde-dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
"""diffusers' class and settings of each scheduler, by the name that the commands take."""

_CELL = 192
"""Smallest side of a picture on a sheet, in pixels."""
_MARGIN, _LABEL = 12, 22


@dataclass(frozen=True)
class Settings:
    """What to draw, and how."""

    prompts: tuple[str, ...]
    negative_prompt: str | None = None
    steps: int | None = None
    gate_steps: tuple[str, ...] = ()
    """As the commands take them; the bundle's own if empty."""
    after_gate: tuple[str, ...] = (DEFAULT_AFTER_GATE,)
    """Of `tgate_trt.gate.after_gate.AFTER_GATE`, each with every gate step."""
    guidance_scale: float | None = None
    seed: int = 0
    scheduler: str | None = None
    images: int = 1
    """Pictures for each prompt."""


@dataclass(frozen=True)
class Column:
    """The pictures of one gate."""

    label: str
    pictures: tuple[Image, ...]
    """Prompt by prompt, ``images`` of each."""
    seconds: float
    """For all of them, without loading and after one warm-up."""


def generate(bundle: str | os.PathLike[str], settings: Settings, *, backend: str | None = None, threads: int | None = None) -> list[Column]:
    """Draw every prompt with every gate, from the same noise.

    Raises:
        InputError: if a setting is impossible; nothing has been drawn then.
        BundleError: if the bundle cannot be used.
    """
    from tgate_trt.running.pipeline import load

    opened = Bundle.open(bundle)
    steps = opened.manifest.steps if settings.steps is None else settings.steps
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    gate_steps = [check_gate_step(parse_gate_step(text)) for text in settings.gate_steps] or [opened.manifest.gate_step or "none"]
    for gate_step in gate_steps:
        planning_steps(gate_step, steps)
    for after_gate in settings.after_gate:
        after_gate_of(after_gate)
    pipeline = load(opened, backend=backend, threads=threads)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = scheduler_of(pipeline, settings.scheduler)
    arguments = _arguments(opened, settings, steps)
    return [
        _column(pipeline, opened, settings, arguments, gate_step, after_gate)
        for gate_step in gate_steps
        for after_gate in (settings.after_gate if gate_step != "none" else settings.after_gate[:1])
    ]


def scheduler_of(pipeline: Any, name: str | None) -> Any:
    """A scheduler by name, with the betas and prediction type of the pipeline's own.

    Raises:
        InputError: if there is no scheduler of that name.
    """
    import diffusers

    if name is None:
        return pipeline.scheduler
    if name not in SCHEDULERS:
        raise InputError(f"there is no scheduler {name!r}; choose from {', '.join(SCHEDULERS)}")
    kind, settings = SCHEDULERS[name]
    return getattr(diffusers, kind).from_config(pipeline.scheduler.config, **settings)


def save(columns: Sequence[Column], settings: Settings, output: Path | None) -> list[Path]:
    """Write the pictures: one sheet or picture to a ``.png``, or a file a picture into a folder.

    Args:
        columns: from `generate`.
        settings: that `generate` was given.
        output: a ``.png`` file or a folder; ``pictures/<prompt>.png`` if None.

    Raises:
        InputError: if nothing can be written there.
    """
    output = output or Path("pictures") / f"{_slug(settings.prompts[0])}.png"
    try:
        if output.suffix.lower() == ".png":
            output.parent.mkdir(parents=True, exist_ok=True)
            single = columns[0].pictures[0] if len(columns) == 1 and len(columns[0].pictures) == 1 else None
            _save(single or sheet(columns, settings), output)
            return [output]
        if output.suffix and not output.is_dir():
            raise InputError(f"--output takes a .png file or a folder, got {output}")
        output.mkdir(parents=True, exist_ok=True)
        paths = []
        for column in columns:
            for index, picture in enumerate(column.pictures):
                paths.append(output / f"{index:03d}-{_slug(column.label)}.png")
                _save(picture, paths[-1])
        return paths
    except OSError as error:
        raise InputError(f"cannot write to {output}: {error.strerror or error}; choose another --output") from error


def sheet(columns: Sequence[Column], settings: Settings) -> Image:
    """All pictures in one: a row a picture under its prompt, a column a gate step."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = columns[0].pictures[0].size
    scale = max(1, -(-_CELL // min(width, height)))
    cell_width, cell_height = width * scale + _MARGIN, height * scale + _LABEL + _MARGIN
    rows = len(columns[0].pictures)
    font = ImageFont.load_default(size=13)
    captions = [prompt for prompt in settings.prompts for _ in range(settings.images)]
    widest = max(int(font.getlength(caption)) for caption in captions)
    page = Image.new("RGB", (max(len(columns) * cell_width, widest) + _MARGIN, _LABEL + _MARGIN + rows * cell_height), "white")
    draw = ImageDraw.Draw(page)
    for x, column in enumerate(columns):
        draw.text((_MARGIN + x * cell_width, _MARGIN), f"{column.label}: {column.seconds:.2f} s", "black", font)
        for y, picture in enumerate(column.pictures):
            top = _LABEL + _MARGIN + y * cell_height
            page.paste(picture.resize((width * scale, height * scale), Image.Resampling.NEAREST), (_MARGIN + x * cell_width, top + _LABEL))
    for y, caption in enumerate(captions):
        draw.text((_MARGIN, _LABEL + _MARGIN + y * cell_height + 2), caption, "dimgray", font)
    return page


def label_of(gate_step: GateStep, after_gate: str) -> str:
    """How a gate step, and what comes after it unless it is the default, are shown to people."""
    if gate_step == "none":
        return "vanilla"
    return f"gate step {gate_step}" + ("" if after_gate == DEFAULT_AFTER_GATE else f", {after_gate}")


def _arguments(bundle: Bundle, settings: Settings, steps: int) -> dict[str, Any]:
    """The pipeline's arguments but for prompt and generator."""
    built_for = bundle.manifest.built_for
    arguments = {
        "negative_prompt": settings.negative_prompt,
        "num_inference_steps": steps,
        "guidance_scale": settings.guidance_scale if settings.guidance_scale is not None else bundle.manifest.guidance_scale,
        "num_images_per_prompt": settings.images,
        "height": built_for.height,
        "width": built_for.width,
    }
    return {name: value for name, value in arguments.items() if value is not None}


def _column(
    pipeline: Any, bundle: Bundle, settings: Settings, arguments: Mapping[str, Any], gate_step: GateStep, after_gate: str
) -> Column:
    """Draw every prompt with one gate; a run of two steps before the clock starts warms the engines up."""
    import torch

    denoiser = getattr(pipeline, bundle.manifest.model.attribute)
    pictures: list[Image] = []
    denoiser.after_gate = after_gate
    denoiser.gate_step = gate_step if gate_step == "none" else 1
    pipeline(settings.prompts[0], **{**arguments, "num_inference_steps": 2})
    denoiser.gate_step = gate_step
    start = time.perf_counter()
    for index, prompt in enumerate(settings.prompts):
        first = settings.seed + index * settings.images
        generators = [torch.Generator().manual_seed(first + image) for image in range(settings.images)]
        pictures += pipeline(prompt, **arguments, generator=generators).images
    return Column(label_of(gate_step, after_gate), tuple(pictures), time.perf_counter() - start)


def _save(picture: Image, path: Path) -> None:
    """Write a picture, whole or not at all."""
    with replacing(path) as partial:
        picture.save(partial, format="PNG")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")[:60] or "picture"

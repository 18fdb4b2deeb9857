"""What is analysed: a bundle's pipeline, the prompts of its pictures, and how they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tgate_trt.analysis.outcomes import Outcome, compare
from tgate_trt.bundle.backends import UNCOMPILED
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.bundle.loras import BundleLoras
from tgate_trt.demo.dataset import Captioned, examples, parse
from tgate_trt.errors import InputError, StaleBundleError
from tgate_trt.export.weights import WEIGHTS_FILE
from tgate_trt.gate.denoiser import GatedDenoiser
from tgate_trt.gate.schedule import NONE, GateStep
from tgate_trt.running.drawing import scheduler_of
from tgate_trt.running.pipeline import load
from tgate_trt.specs import MAXIMUM_ROWS

DEMO_MODEL = "shapes"
"""The model whose pictures can be read back."""

DEMO_SAMPLES = 100
"""Held-out captions that are drawn where no number is given."""

PROMPTS = (
    "a photograph of an astronaut riding a horse",
    "a red bus parked beside a yellow house",
    "two cats sleeping on a blue sofa",
    "an oil painting of a lighthouse in a storm",
)
"""For models of any kind, where no prompt is given."""

_PIXELS = 256 * 256
"""Of the pictures in one call where the backend takes any number of them: enough to keep a CPU's cores busy with small ones."""


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn; None is the model's own."""

    prompts: tuple[str, ...] = ()
    """Captions held out of training for the demo model, and `PROMPTS` for any other, if empty."""
    samples: int | None = None
    """Pictures; prompts are taken in turn. One a prompt if None, and `DEMO_SAMPLES` of the demo model's own captions."""
    steps: int | None = None
    seed: int = 0
    """Picture i starts from the noise of ``seed + i``; also draws the demo model's captions."""
    guidance_scale: float | None = None
    scheduler: str | None = None
    """One of `tgate_trt.running.drawing.SCHEDULERS`."""

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise InputError(f"samples must be at least 1, got {self.samples}")
        if self.steps is not None and self.steps < 2:
            raise InputError(f"an analysis compares steps and needs at least 2, got {self.steps}")


class Subject:
    """A bundle's pipeline that draws the same prompts from the same noise in several ways."""

    def __init__(self, bundle: Bundle, sampling: Sampling, backend: str | None = None) -> None:
        """Load a bundle.

        Raises:
            BundleError: if it cannot be used.
            InputError: if there is no such backend or scheduler.
        """
        self.bundle = bundle
        self.sampling = sampling
        self.steps = sampling.steps or bundle.manifest.steps
        self.prompts, self.captioned = prompts_of(sampling, is_demo=bundle.manifest.model.name == DEMO_MODEL)
        self.pipeline: Any = load(bundle, backend=backend)
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.scheduler = scheduler_of(self.pipeline, sampling.scheduler)
        self.backend: str = self.denoiser.origin.backend
        self.batch_size = _batch_size(bundle, self.backend)

    @property
    def denoiser(self) -> Any:
        """What stands in the pipeline: a `GatedDenoiser`, or after `use_eager` the model itself."""
        return getattr(self.pipeline, self._attribute)

    @property
    def gated(self) -> GatedDenoiser:
        """The engines and their gate."""
        assert isinstance(self.denoiser, GatedDenoiser)
        return self.denoiser

    @property
    def guidance_scale(self) -> float | None:
        """Of the pictures; None for the pipeline's own."""
        asked = self.sampling.guidance_scale
        return self.bundle.manifest.guidance_scale if asked is None else asked

    @cached_property
    def vanilla(self) -> Tensor:
        """The pictures of the planning graph at every step, ``[pictures, 3, height, width]``, uint8."""
        return self.draw(NONE)

    def draw(self, gate_step: GateStep) -> Tensor:
        """Draw every picture with a gate, ``[pictures, 3, height, width]``, uint8 on the CPU."""
        self.gated.gate_step = gate_step
        pictures = []
        for batch in self.batches():
            drawn = self._run([self.prompts[index] for index in batch], batch, steps=self.steps, output_type="pt")
            pictures.append((drawn.float() * 255).round().to(torch.uint8).cpu())
        return torch.cat(pictures)

    def compare(self, pictures: Tensor) -> Outcome:
        """What became of pictures."""
        return compare(pictures, self.vanilla, self.captioned)

    def batches(self) -> Iterator[range]:
        """The pictures of each run."""
        for start in range(0, len(self.prompts), self.batch_size):
            yield range(start, min(start + self.batch_size, len(self.prompts)))

    def warm_up(self, prompt: str) -> None:
        """Run the denoiser for two steps, vanilla and with the guidance of the pictures."""
        self.gated.gate_step = NONE
        self._run([prompt], range(1), steps=2, output_type="latent")

    def run(self, progress: Callable[[], None]) -> None:
        """Run the denoiser for every picture, as it stands in the pipeline, and decode none.

        Args:
            progress: called for each picture.
        """
        for batch in self.batches():
            self._run([self.prompts[index] for index in batch], batch, steps=self.steps, output_type="latent")
            for _ in batch:
                progress()

    def use_eager(self) -> nn.Module:
        """Put the model itself, from the bundle's weights, in the place of the engines, which are freed."""
        gated = self.gated
        gated.close()
        eager = eager_denoiser(self.bundle, gated.dtype).to(self.pipeline.device)
        setattr(self.pipeline, self._attribute, eager)
        return eager

    @property
    def _attribute(self) -> str:
        return self.bundle.manifest.model.attribute

    def _run(self, prompts: Sequence[str], numbers: Iterable[int], *, steps: int, output_type: str) -> Tensor:
        """Call the pipeline once, from the noise of pictures by their numbers."""
        built_for = self.bundle.manifest.built_for
        arguments: dict[str, Any] = {"height": built_for.height, "width": built_for.width}
        if self.guidance_scale is not None:
            arguments["guidance_scale"] = self.guidance_scale
        if "use_resolution_binning" in signature(self.pipeline.__call__).parameters:
            arguments["use_resolution_binning"] = False  # the graphs are of one size
        generators = [torch.Generator().manual_seed(self.sampling.seed + number) for number in numbers]
        images: Tensor = self.pipeline(
            list(prompts), num_inference_steps=steps, generator=generators, output_type=output_type, **arguments
        ).images
        return images


def read_prompts(file: Path) -> tuple[str, ...]:
    """The prompts of a text file, one a line; empty lines are left out.

    Raises:
        InputError: if the file cannot be read, or holds none.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read prompts from {file}: {getattr(error, 'strerror', None) or error}") from error
    prompts = tuple(line for line in lines if line)
    if not prompts:
        raise InputError(f"{file} holds no prompts; write one a line")
    return prompts


def check_weights(bundle: Bundle) -> None:
    """See that a bundle holds what eager PyTorch needs.

    Raises:
        StaleBundleError: if its weights were discarded.
    """
    if WEIGHTS_FILE not in bundle.manifest.files:
        raise StaleBundleError(f"{bundle.folder} holds no weights to look into; build it again without --discard-graphs")


def eager_denoiser(bundle: Bundle, dtype: torch.dtype) -> nn.Module:
    """The denoiser in eager PyTorch, with the bundle's weights and the LoRAs that were put into it; see `check_weights`."""
    denoiser = bundle.denoiser_on_meta(dtype)
    denoiser.load_state_dict({name: tensor.to(dtype) for name, tensor in load_file(bundle.folder / WEIGHTS_FILE).items()}, assign=True)
    denoiser.load_state_dict(BundleLoras.read(bundle).weights(bundle.manifest.model.attribute), strict=False)
    return denoiser.eval().requires_grad_(False)


def prompts_of(sampling: Sampling, *, is_demo: bool) -> tuple[tuple[str, ...], tuple[Captioned, ...] | None]:
    """The prompt of each picture, and what each must show where a scorer can tell.

    Args:
        sampling: what was asked for.
        is_demo: whether the model is the demo model, whose pictures the scorer can read.
    """
    captioned: list[Captioned] | None = None
    if is_demo:
        captioned = _captioned(sampling)
    prompts = sampling.prompts or (tuple(each.caption for each in captioned) if captioned else PROMPTS)
    count = sampling.samples or len(prompts)
    in_turn = [index % len(prompts) for index in range(count)]
    return tuple(prompts[index] for index in in_turn), None if captioned is None else tuple(captioned[index] for index in in_turn)


def _captioned(sampling: Sampling) -> list[Captioned] | None:
    """The demo model's captions with what they name; None if a prompt is none of them."""
    if not sampling.prompts:
        return examples(sampling.samples or DEMO_SAMPLES, held_out=True, seed=sampling.seed)
    try:
        return [Captioned(prompt, parse(prompt)) for prompt in sampling.prompts]
    except ValueError:
        return None


def _batch_size(bundle: Bundle, backend: str) -> int:
    """Pictures in one call of the pipeline: as many as the engines take, or of small pictures more where they take any number."""
    built_for = bundle.manifest.built_for
    most = built_for.batch_size.maximum
    if backend not in UNCOMPILED:
        return most
    pixels = built_for.height * built_for.width
    return min(max(most, _PIXELS // pixels), MAXIMUM_ROWS // 2)

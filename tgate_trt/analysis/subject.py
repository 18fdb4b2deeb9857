"""The subject of an analysis: a bundle's pipeline that draws the same pictures in several ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tgate_trt.analysis.outcomes import Outcome, compare
from tgate_trt.analysis.prompts import prompts_of
from tgate_trt.bundle.backends import UNCOMPILED
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.bundle.loras import BundleLoras
from tgate_trt.errors import GateError, StaleBundleError
from tgate_trt.export.weights import WEIGHTS_FILE
from tgate_trt.gate.denoiser import GatedDenoiser
from tgate_trt.gate.gate import Gate
from tgate_trt.gate.schedule import NONE, GateStep
from tgate_trt.gate.scheduler import levels_of_run
from tgate_trt.running.drawing import Drawing, draw, prepare, to_bytes
from tgate_trt.running.loading import eager_denoiser
from tgate_trt.running.pipeline import load
from tgate_trt.specs import MAXIMUM_ROWS

_PIXELS = 256 * 256
"""Pixels of one call if the backend takes any number of pictures; enough small pictures to keep the cores of a CPU busy."""


class Subject:
    """A bundle's pipeline that draws the same pictures, from the same noise, in several ways."""

    def __init__(self, bundle: Bundle, drawing: Drawing, backend: str | None = None, samples: int | None = None) -> None:
        """Load a bundle.

        Args:
            bundle: the bundle.
            drawing: the pictures; see `tgate_trt.analysis.prompts.prompts_of` for their prompts.
            backend: see `tgate_trt.load`.
            samples: number of pictures; see `prompts_of`.

        Raises:
            BundleError: if the bundle cannot be used.
            InputError: if there is no such backend or scheduler, or ``samples`` is below 1.
        """
        prompts, self.captioned = prompts_of(bundle.manifest.model.name, drawing.prompts, samples, drawing.seed)
        self.bundle = bundle
        self.drawing = replace(drawing, prompts=prompts).of(bundle)
        self.steps = drawing.steps or bundle.manifest.steps
        self.pipeline: Any = prepare(load(bundle, backend=backend), drawing.scheduler)
        self.backend: str = self.denoiser.origin.backend
        self.batch_size = _batch_size(bundle, self.backend)

    @property
    def denoiser(self) -> Any:
        """The pipeline's denoiser: a `GatedDenoiser`, or the eager model after `use_eager`."""
        return getattr(self.pipeline, self._attribute)

    @property
    def gated(self) -> GatedDenoiser:
        """The engines and their gate."""
        assert isinstance(self.denoiser, GatedDenoiser)
        return self.denoiser

    @cached_property
    def levels(self) -> tuple[float, ...] | None:
        """The noise level at the beginning of each step; None if the scheduler shows none."""
        try:
            return levels_of_run(self.pipeline.scheduler, self.steps)
        except GateError:
            return None

    @cached_property
    def vanilla(self) -> Tensor:
        """The pictures with the planning graph at every step, ``[pictures, 3, height, width]``, uint8."""
        return self.draw(NONE)

    def draw(self, gate: Gate | GateStep) -> Tensor:
        """Draw every picture with a gate, ``[pictures, 3, height, width]``, uint8 on the CPU."""
        self.gated.gate = gate
        batches = self.drawing.batches(self.batch_size)
        return torch.cat([to_bytes(draw(self.pipeline, batch, output_type="pt")) for batch in batches])

    def compare(self, pictures: Tensor) -> Outcome:
        """Compare pictures with the vanilla ones, and with their captions."""
        return compare(pictures, self.vanilla, self.captioned)

    def warm_up(self, prompt: str) -> None:
        """Run the denoiser for two steps, vanilla, with the guidance of the pictures."""
        self.gated.gate = NONE
        draw(self.pipeline, replace(self.drawing, prompts=(prompt,), steps=2), output_type="latent")

    def run(self, progress: Callable[[], None]) -> None:
        """Run the pipeline's present denoiser for every picture, and decode none.

        Args:
            progress: called for each picture.
        """
        for batch in self.drawing.batches(self.batch_size):
            draw(self.pipeline, batch, output_type="latent")
            for _ in batch.prompts:
                progress()

    def use_eager(self) -> nn.Module:
        """Free the engines, and put the eager model with the bundle's weights in their place."""
        gated = self.gated
        gated.close()
        eager = eager_denoiser(BundleLoras.read(self.bundle), gated.dtype).to(self.pipeline.device)
        setattr(self.pipeline, self._attribute, eager)
        return eager

    @property
    def _attribute(self) -> str:
        return self.bundle.manifest.model.attribute


def check_weights(bundle: Bundle) -> None:
    """Check that a bundle holds the weights that eager PyTorch needs.

    Raises:
        StaleBundleError: if they were discarded.
    """
    if WEIGHTS_FILE not in bundle.manifest.files:
        raise StaleBundleError(f"{bundle.folder} holds no weights for eager PyTorch; build it again without --discard-graphs")


def _batch_size(bundle: Bundle, backend: str) -> int:
    """Pictures in one call of the pipeline: the bundle's maximum, or more small ones if the backend takes any number."""
    built_for = bundle.manifest.built_for
    most = built_for.batch_size.maximum
    if backend not in UNCOMPILED:
        return most
    pixels = built_for.height.optimum * built_for.width.optimum
    return min(max(most, _PIXELS // pixels), MAXIMUM_ROWS // 2)

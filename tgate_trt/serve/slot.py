"""A slot of a service: one diffusers pipeline that draws one picture after the other, on engines that all slots share."""

from __future__ import annotations

import contextlib
import copy
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache
from inspect import signature
from typing import Any

import torch
from PIL import Image
from torch import nn

from tgate_trt.engines.batching import Member
from tgate_trt.errors import InputError, UnsupportedError
from tgate_trt.gate.denoiser import FIDELITY, FORECAST, HAND_OFF, PLANNING, GatedDenoiser
from tgate_trt.gate.gate import Gate
from tgate_trt.gate.stand_in import StandIn
from tgate_trt.running.components import Compiled
from tgate_trt.running.pipeline import LoadOptions, gate_from, load_by
from tgate_trt.serve.picture import Picture, Preview, Request, Times
from tgate_trt.serve.previews import Watched, decoded, steps_to_show
from tgate_trt.serve.shared import SharedEngines

GENERATION, EDIT, INPAINTING = "generation", "edit", "inpainting"
"""What a pipeline can do: draw from a prompt, from a picture, and within a mask."""


def kind_of(request: Request) -> str:
    """What a request asks for."""
    return GENERATION if request.image is None else EDIT if request.mask is None else INPAINTING


_NAMES = {PLANNING: "planning", FIDELITY: "fidelity", FORECAST: "forecast"}


class Clock:
    """Measures the parts of one run; it is the denoiser's observer meanwhile."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.steps: Counter[str] = Counter()
        self.first: float | None = None
        """When the denoiser ran first."""
        self.last = self.start
        """When it had run last."""

    def __call__(self, part: str) -> AbstractContextManager[None]:
        """See `tgate_trt.gate.denoiser.Observer`."""
        return self._part(part)

    @contextlib.contextmanager
    def _part(self, part: str) -> Iterator[None]:
        begin = time.monotonic()
        self.first = begin if self.first is None else self.first
        try:
            yield
        finally:
            self.last = time.monotonic()
            self.seconds[part] += self.last - begin
            if part in _NAMES:
                self.steps[_NAMES[part]] += 1

    @contextlib.contextmanager
    def previewing(self) -> Iterator[None]:
        """Measure the making of a preview."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.last = time.monotonic()
            self.seconds["previews"] += self.last - begin

    def times(self, queue: float, waiting: float) -> Times:
        """What was measured until now."""
        end = time.monotonic()
        return Times(
            queue=queue,
            encode=(self.start if self.first is None else self.first) - self.start,
            planning=self.seconds[PLANNING],
            fidelity=self.seconds[FIDELITY],
            hand_off=self.seconds[HAND_OFF],
            forecast=self.seconds[FORECAST],
            decode=end - self.last,
            previews=self.seconds["previews"],
            waiting=waiting,
            total=queue + end - self.start,
        )


class Slot:
    """A pipeline with a scheduler, a tokenizer and a denoiser of its own. One thread uses it at a time."""

    def __init__(self, engines: SharedEngines, options: LoadOptions, first: Slot | None = None) -> None:
        """Load a pipeline.

        Args:
            engines: of the bundle.
            options: of `tgate_trt.load`.
            first: another slot of the same bundle, whose eager components this one shares.
        """
        self.bundle = engines.bundle
        self.pipeline = load_by(engines, options, {} if first is None else first.eager_components())
        self.pipeline.set_progress_bar_config(disable=True)
        self.denoiser: GatedDenoiser = getattr(self.pipeline, self.bundle.manifest.model.attribute)
        self._default = gate_from(self.bundle.manifest, options)
        if first is not None:
            for name, part in self.pipeline.components.items():
                if isinstance(part, Compiled):
                    part.share_eager(getattr(first.pipeline, name))
                elif "tokenizer" in name and part is not None:
                    setattr(self.pipeline, name, copy.deepcopy(part))  # its truncation settings are not safe for several threads
        self.of = cache(self._of)

    def eager_components(self) -> dict[str, nn.Module]:
        """The parts that run in eager PyTorch and hold no state of a run."""
        return {
            name: part for name, part in self.pipeline.components.items() if isinstance(part, nn.Module) and not isinstance(part, StandIn)
        }

    def _of(self, kind: str) -> Any:
        """The pipeline for one kind of work; they share all components.

        Raises:
            UnsupportedError: if diffusers has none for this model.
        """
        from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

        takes_image = "image" in signature(self.pipeline.__call__).parameters
        if kind == GENERATION and not takes_image:
            return self.pipeline
        makers = {EDIT: AutoPipelineForImage2Image, INPAINTING: AutoPipelineForInpainting}
        try:
            made = makers[kind].from_pipe(self.pipeline)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise UnsupportedError(f"this bundle's {type(self.pipeline).__name__} cannot do {kind}") from error
        made.set_progress_bar_config(disable=True)
        return made

    def can(self, kind: str) -> bool:
        """Whether the bundle can do one kind of work."""
        try:
            return self.of(kind) is not None
        except UnsupportedError:
            return False

    def gate_of(self, request: Request) -> Gate:
        """The gate of a request.

        Raises:
            InputError: if it is none.
        """
        if request.gate is None and request.after_gate is None:
            return self._default
        if request.after_gate is None:
            assert request.gate is not None
            return self.bundle.manifest.gate(request.gate)
        gate = self._default if request.gate is None else self.bundle.manifest.gate(request.gate)
        return Gate(**{**vars(gate), "after": request.after_gate})

    def draw(self, request: Request, member: Member, queued: float, show: Callable[[Preview], None] | None = None) -> Picture:
        """Draw one picture in this thread, whose engine calls are a member's.

        Args:
            request: what to draw.
            member: of the engines' batcher.
            queued: seconds that the request waited for this slot.
            show: takes the previews.

        Raises:
            TGateError: if the request is impossible, or was ended.
        """
        clock, pipeline = Clock(), self.of(kind_of(request))
        self.denoiser.gate = self.gate_of(request)
        self.denoiser.observer = clock
        watched = Watched()
        arguments = self._arguments(pipeline, request)
        if show is not None and request.previews:
            arguments |= self._previews(pipeline, request, watched, clock, show)
        try:
            with watched.steps_of(pipeline.scheduler) if show is not None and request.previews else contextlib.nullcontext():
                image: Image.Image = pipeline(**arguments).images[0]
        finally:
            self.denoiser.observer = None
        times, tokens = clock.times(queued, member.waited), self.tokens_of(request.prompt)
        return Picture(image=image, seed=request.seed, times=times, steps=dict(clock.steps), tokens=tokens)

    def tokens_of(self, prompt: str) -> int:
        """Tokens of a prompt, none cut off."""
        tokenizer = getattr(self.pipeline, "tokenizer", None)
        return 0 if tokenizer is None else len(tokenizer(prompt, truncation=False, padding=False, verbose=False).input_ids)

    def _arguments(self, pipeline: Any, request: Request) -> dict[str, Any]:
        manifest, built_for = self.bundle.manifest, self.bundle.manifest.built_for
        size = width, height = request.width or built_for.width.optimum, request.height or built_for.height.optimum
        arguments: dict[str, Any] = {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "num_inference_steps": manifest.steps if request.steps is None else request.steps,
            "guidance_scale": manifest.guidance_scale if request.guidance_scale is None else request.guidance_scale,
            "generator": torch.Generator().manual_seed(request.seed),
            "strength": request.strength,
            "height": height,
            "width": width,
            "use_resolution_binning": False,
        }
        if request.image is not None:
            with _decoding("picture to start from"):
                arguments["image"] = request.image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        if request.mask is not None:
            with _decoding("mask"):
                arguments["mask_image"] = drawn_anew(request.mask).resize(size, Image.Resampling.NEAREST)
        taken = signature(pipeline.__call__).parameters
        return {name: value for name, value in arguments.items() if value is not None and name in taken}

    def _previews(
        self, pipeline: Any, request: Request, watched: Watched, clock: Clock, show: Callable[[Preview], None]
    ) -> dict[str, Callable[..., Any]]:
        """The pipeline's argument that makes previews; none where it takes no callback."""
        if "callback_on_step_end" not in signature(pipeline.__call__).parameters:
            return {}

        def after_step(pipeline: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            steps = pipeline.num_timesteps
            index = steps_to_show(request.previews, steps).get(step + 1)
            if index is not None:
                with clock.previewing():
                    latents = watched.believed(pipeline.scheduler, tensors["latents"])
                    show(Preview(decoded(pipeline, latents), index, step + 1, steps))
            return {}

        return {"callback_on_step_end": after_step}


@contextlib.contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turn what Pillow raises for a damaged file into one sentence."""
    try:
        yield
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"the {name} is damaged; send it again") from error


def drawn_anew(mask: Image.Image) -> Image.Image:
    """A mask as diffusers takes it, white where to draw anew: where it is transparent, as in OpenAI's API, else where it is white."""
    has_alpha = "A" in mask.getbands() or "transparency" in mask.info
    if has_alpha:
        alpha = mask.convert("RGBA").getchannel("A")
        if alpha.getextrema() != (255, 255):
            return alpha.point(lambda value: 255 if value < 128 else 0)
    return mask.convert("L").point(lambda value: 255 if value >= 128 else 0)

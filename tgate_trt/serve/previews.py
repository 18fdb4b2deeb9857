"""Pictures of a run that is not finished: what the denoiser believes the picture is, decoded."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tgate_trt.errors import GateError
from tgate_trt.gate.scheduler import noise_levels


class Watched:
    """A scheduler's latest step: the prediction, and the latents that it was made of."""

    def __init__(self) -> None:
        self.prediction: Tensor | None = None
        self.latents: Tensor | None = None
        self.timestep: Any = None

    @contextmanager
    def steps_of(self, scheduler: Any) -> Iterator[None]:
        """While this lasts, keep what each step of a scheduler is given; its signature stays."""
        step = scheduler.step

        @functools.wraps(step)
        def watched(model_output: Tensor, timestep: Any, sample: Tensor, *arguments: Any, **options: Any) -> Any:
            self.prediction, self.timestep, self.latents = model_output, timestep, sample
            return step(model_output, timestep, sample, *arguments, **options)

        scheduler.step = watched
        try:
            yield
        finally:
            del scheduler.step
            self.prediction = self.latents = self.timestep = None

    def believed(self, scheduler: Any, latents: Tensor) -> Tensor:
        """The picture that the denoiser last saw in the noise, as latents, or those given where the scheduler shows no noise level.

        With noise level σ and signal α = 1/√(1 + σ²), a sample is α·x + α·σ·ε; Karras' schedulers keep x + σ·ε.
        """
        if self.prediction is None or self.latents is None:
            return latents
        try:
            levels = noise_levels(scheduler)
        except GateError:
            return latents
        place = (torch.as_tensor(scheduler.timesteps).float().cpu() - float(self.timestep)).abs().argmin()
        sigma, kind = levels[int(place)], scheduler.config.get("prediction_type")
        if not sigma < 1e6 or kind not in ("epsilon", "v_prediction", "sample"):
            return latents
        signal = 1 / (1 + sigma**2) ** 0.5
        sample, prediction = self.latents.float(), self.prediction.float()
        if float(scheduler.init_noise_sigma) > 1.5:  # the sample of Karras' schedulers grows with the noise
            sample = sample * signal
        if kind == "sample":
            return prediction
        believed: Tensor = signal * sample - sigma * signal * prediction if kind == "v_prediction" else sample / signal - sigma * prediction
        return believed


def decoded(pipeline: Any, latents: Tensor) -> Image.Image:
    """The picture of one image's latents, ``[1, channels, height, width]``."""
    vae = pipeline.vae
    with torch.no_grad():
        scaled = latents.to(vae.dtype) / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
        pixels = vae.decode(scaled, return_dict=False)[0]
        image: Image.Image = pipeline.image_processor.postprocess(pixels, output_type="pil")[0]
    return image


def steps_to_show(previews: int, steps: int) -> dict[int, int]:
    """After which step, from 1, each preview is made, spread evenly: ``{step: index}``, none after the last step."""
    places = [round((index + 1) * steps / (previews + 1)) for index in range(previews)]
    shown = sorted({place for place in places if 1 <= place < steps})
    return {step: index for index, step in enumerate(shown)}

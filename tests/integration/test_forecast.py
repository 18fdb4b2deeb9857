"""Forecasts in whole runs equal eager PyTorch whose calls are forecast by hand, for schedulers of every kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from .conftest import Pipelines
from .test_official import TOLERANCE, difference

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "kdpm2": "KDPM2DiscreteScheduler",
    "pndm": "PNDMScheduler",
}
STEPS = 7


class ByHand:
    """The forward of an eager denoiser; calls of some steps are on the line through the last two predictions."""

    def __init__(self, forward: Any, step_of: Any, forecast: set[int]) -> None:
        self._forward, self._step_of, self._forecast = forward, step_of, forecast
        self.calls = self.forecasts = 0
        self._known: dict[float, Tensor] = {}

    def __call__(self, sample: Tensor, timestep: Tensor, **keywords: Any) -> tuple[Tensor]:
        step, time = self._step_of(self.calls), float(timestep)
        self.calls += 1
        if step in self._forecast:
            self.forecasts += 1
            (before, first), (last, second) = list(self._known.items())[-2:]
            return (second + (second - first) * ((time - last) / (last - before)),)
        predicted = self._forward(sample, timestep, **keywords)[0]
        self._known.pop(time, None)
        self._known[time] = predicted
        return (predicted,)


def latents(pipeline: Any) -> Tensor:
    found: Tensor = pipeline(
        ["a red circle", "two birds"], num_inference_steps=STEPS, generator=torch.Generator().manual_seed(3), output_type="latent"
    ).images
    return found


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_run_without_a_gate_equals_eager_by_hand(
    scheduler: str, gated_pipelines: Pipelines, eager_pipelines: Pipelines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 3 and 5 of 7, from the second on; the last one runs."""
    import diffusers

    ours, theirs = gated_pipelines("sd"), eager_pipelines("sd")
    settings = {"skip_prk_steps": True} if scheduler == "pndm" else {}
    for pipeline in (ours, theirs):
        pipeline.scheduler = getattr(diffusers, SCHEDULERS[scheduler]).from_config(pipeline.scheduler.config, **settings)
    ours.unet.gate = "none,forecast=2,start=2"
    drawn = latents(ours)
    schedule = ours.unet.latest_run.schedule
    assert [action.graph is None for action in ours.unet.latest_run.actions] == [
        schedule.step(call) in (3, 5) for call in range(schedule.calls)
    ]
    by_hand = ByHand(theirs.unet.forward, schedule.step, {3, 5})
    monkeypatch.setattr(theirs.unet, "forward", by_hand)
    expected = latents(theirs)
    assert by_hand.calls == schedule.calls and by_hand.forecasts == 2 * schedule.order
    assert difference(drawn, expected) < TOLERANCE
    ours.unet.gate = "none"
    assert difference(latents(ours), expected) > 10 * TOLERANCE, "the forecasts show"


@pytest.mark.parametrize("mode", ["negative", "positive", "fading"])
def test_after_the_gate_history_starts_anew(mode: str, gated_pipelines: Pipelines) -> None:
    """A forecast by the last prediction alone, of the first step after the gate, equals that step's prediction passed on."""
    pipeline = gated_pipelines("sd")
    pipeline.unet.gate = f"3,after={mode},forecast=2,rule=repeat"
    seen: list[Tensor] = []
    step = pipeline.scheduler.step

    def watched(prediction: Tensor, *arguments: Any, **keywords: Any) -> Any:
        seen.append(prediction.clone())
        return step(prediction, *arguments, **keywords)

    pipeline.scheduler.step = watched
    latents(pipeline)
    graphs = [action.graph for action in pipeline.unet.latest_run.actions]
    assert graphs[3:] == ["fidelity", None, "fidelity", "fidelity"]
    same = torch.equal(seen[4], seen[3])
    assert same == (mode != "fading"), "what fades differs from step to step"
    assert not torch.equal(seen[3], seen[2])

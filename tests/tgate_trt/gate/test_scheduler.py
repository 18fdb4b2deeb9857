"""Noise levels, against the shares of signal and noise that schedulers themselves mix for training."""

from __future__ import annotations

import math
from inspect import signature
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from tgate_trt.errors import GateError, InputError
from tgate_trt.gate.schedule import planning_steps
from tgate_trt.gate.scheduler import begin_at, level_of_gate, levels_of_run, noise_levels, read_scheduler, schedule_of
from tgate_trt.models.architectures import ARCHITECTURES, Architecture
from tgate_trt.running.drawing import SCHEDULERS

BETAS = ({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, {"beta_schedule": "squaredcos_cap_v2"})
SPACINGS: dict[str, dict[str, Any]] = {
    "trailing": {"timestep_spacing": "trailing"},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "Karras": {"use_karras_sigmas": True},
}


def made(name: str, **settings: Any) -> Any:
    kind, own = SCHEDULERS[name]
    return getattr(diffusers, kind)(**{**own, **settings})


def mixed(scheduler: Any, at: int) -> float:
    """Noise over signal at one of the scheduler's timesteps, from its `add_noise`."""
    one, timestep = torch.ones(1, dtype=torch.float64), scheduler.timesteps[at : at + 1]
    signal, noise = scheduler.add_noise(one, 0 * one, timestep), scheduler.add_noise(0 * one, one, timestep)
    return float(noise / signal)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("betas", BETAS, ids=lambda betas: betas["beta_schedule"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_levels_are_those_of_add_noise(name: str, betas: dict[str, Any], spacing: str) -> None:
    try:
        scheduler = made(name, **betas, **SPACINGS[spacing])
    except TypeError:
        pytest.skip("this scheduler has no such spacing")
    if spacing == "Karras" and betas["beta_schedule"] != "scaled_linear":
        pytest.skip("diffusers rounds these steps to timesteps of the cosine schedule, whose levels are far apart")
    scheduler.set_timesteps(8)
    levels = noise_levels(scheduler)
    assert len(levels) == len(scheduler.timesteps)
    calls = range(0, len(levels), getattr(scheduler, "order", 1))  # the second call of a step of second order is between two levels
    assert [levels[call] for call in calls] == pytest.approx([mixed(scheduler, call) for call in calls], rel=2e-3)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"])
def test_flow_matching_divides_by_what_is_left_of_the_signal(name: str) -> None:
    scheduler = getattr(diffusers, name)(shift=3.0)
    scheduler.set_timesteps(6)
    one = torch.ones(1)
    for call in range(len(scheduler.timesteps)):
        timestep = scheduler.timesteps[call : call + 1]
        signal, noise = (float(scheduler.scale_noise(own, timestep, other)) for own, other in ((one, 0 * one), (0 * one, one)))
        assert noise_levels(scheduler)[call] == pytest.approx(math.inf if signal == 0 else noise / signal, rel=1e-4)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_flow_in_schedulers_of_both_kinds(name: str) -> None:
    scheduler = getattr(diffusers, name)(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.set_timesteps(6)
    assert noise_levels(scheduler)[3] == pytest.approx(float(scheduler.sigmas[3] / (1 - scheduler.sigmas[3])))


def test_edm_counts_in_the_signals_own_deviation() -> None:
    scheduler = diffusers.EDMEulerScheduler(sigma_data=0.5)
    scheduler.set_timesteps(6)
    assert noise_levels(scheduler) == pytest.approx((2 * scheduler.sigmas[:-1]).tolist())


def test_no_signal_is_an_infinite_level() -> None:
    scheduler = made("ddim", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler.set_timesteps(4)
    assert noise_levels(scheduler)[0] == math.inf


def test_a_scheduler_that_shows_no_levels_is_refused() -> None:
    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(4)
    with pytest.raises(GateError, match="does not show how much noise a step has") as refused:
        noise_levels(scheduler)
    assert "\n" not in str(refused.value)
    assert level_of_gate(scheduler, 4, 2) is None


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_step_has_one_level(name: str) -> None:
    scheduler = made(name)
    scheduler.set_timesteps(7)
    before = list(scheduler.timesteps)
    for steps in (1, 4, 9):
        levels = levels_of_run(scheduler, steps)
        assert len(levels) == steps and list(levels) == sorted(levels, reverse=True) and len(set(levels)) == steps
    assert list(scheduler.timesteps) == before, "the scheduler itself is not changed"


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("betas", BETAS, ids=lambda betas: betas["beta_schedule"])
def test_the_level_of_a_gate_is_that_gate(name: str, betas: dict[str, Any]) -> None:
    scheduler = made(name, **betas)
    levels = {gate_step: level_of_gate(scheduler, 10, gate_step) for gate_step in (1, 4, 9)}
    scheduler.set_timesteps(10)
    run = SimpleNamespace(scheduler=scheduler)
    for gate_step, level in levels.items():
        assert schedule_of(run, scheduler.timesteps[0], f"noise:{level}").gate_step == gate_step


@pytest.mark.parametrize("row", ARCHITECTURES.values(), ids=lambda row: row.name)
def test_every_named_model_has_a_level_that_is_its_published_step(row: Architecture) -> None:
    try:
        scheduler = read_scheduler(row.shared["scheduler"].parent if "scheduler" in row.shared else row.folder)
    except InputError as error:
        assert row.name == "stable-audio" and "torchsde" in str(error)
        return
    level = level_of_gate(scheduler, row.steps, row.gate_step)
    assert level is not None and (0.1 < level < 10 or not row.is_official or row.name == "svd")
    levels = levels_of_run(scheduler, row.steps)
    assert planning_steps(f"noise:{level:g}", row.steps, levels) == planning_steps(row.gate_step, row.steps)


def test_a_gate_after_the_last_step_has_no_level() -> None:
    assert level_of_gate(made("ddim"), 10, 10) is None


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "kdpm2", "dpm++"])
@pytest.mark.parametrize("copied", [False, True])
def test_a_run_from_the_middle_keeps_the_level(name: str, copied: bool) -> None:
    """Image-to-image begins at a later timestep; its gate comes after one step at least."""
    scheduler = made(name)
    levels = levels_of_run(scheduler, 10)
    scheduler.set_timesteps(10)
    for begun in range(10):
        timestep = scheduler.timesteps[max(0, begun * scheduler.order)]
        schedule = schedule_of(SimpleNamespace(scheduler=scheduler), timestep.clone() if copied else timestep, f"noise:{levels[5] * 1.001}")
        assert (schedule.steps, schedule.gate_step) == (10 - begun, max(1, 5 - begun))


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_begins_where_it_would_itself(name: str, place: int) -> None:
    sample, found = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), []
    for told in (False, True):
        scheduler = made(name)
        scheduler.set_timesteps(6)
        first = scheduler.timesteps[place]
        if told:
            begin_at(scheduler, scheduler.timesteps, place)
        scaled = scheduler.scale_model_input(sample, first)
        generator = {"generator": torch.Generator().manual_seed(0)} if "generator" in signature(scheduler.step).parameters else {}
        found.append(scheduler.step(0.5 * scaled, first, sample, **generator).prev_sample)
    assert torch.equal(*found)


def test_where_a_pipeline_begins_stays() -> None:
    scheduler = made("dpm++")
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(3)
    begin_at(scheduler, scheduler.timesteps, 0)
    assert scheduler.begin_index == 3

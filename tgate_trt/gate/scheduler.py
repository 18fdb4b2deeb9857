"""What a diffusers scheduler shows of a run: which call of the denoiser belongs to which step, and how much noise each step has.

The noise level σ is the standard deviation of the noise over that of the signal: ``sqrt((1 − ᾱ) / ᾱ)`` where the noise keeps the
variance (``alphas_cumprod``), which k-diffusion's ``sigmas`` are too; ``σ / (1 − σ)`` for the ``sigmas`` of flow matching; and
``σ / sigma_data`` for those of EDM (Karras et al., 2022).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tgate_trt.errors import GateError, InputError
from tgate_trt.files import read_json
from tgate_trt.gate.schedule import GateSchedule, GateStep, noise_of, planning_steps, rounded_up
from tgate_trt.models.source import SCHEDULER


def schedule_of(pipeline: Any, timestep: Tensor | float | int, gate_step: GateStep) -> GateSchedule:
    """The schedule of the run that a pipeline has just begun.

    Args:
        pipeline: after its scheduler's ``set_timesteps``.
        timestep: of the run's first call: where image-to-image begins, unless the pipeline has ``num_timesteps``.
        gate_step: as the user gave it.

    Raises:
        GateError: if calls and steps do not match, as with PNDM's Runge-Kutta start; or if the gate is a noise level and the
            scheduler shows none.
        InputError: if ``gate_step`` is above the number of steps.
    """
    scheduler = pipeline.scheduler
    order, extra = _calls_a_step(scheduler)
    listed = len(scheduler.timesteps)
    calls = getattr(pipeline, "num_timesteps", None) or 0
    first = place_of(scheduler.timesteps, timestep)
    if first is None and (noise_of(gate_step) is not None or not 1 <= calls <= listed):
        first = _find(scheduler.timesteps, timestep)
    if not 1 <= calls <= listed - (first or 0):
        calls = listed - (first or 0)
    steps = _steps_of(calls, order, extra)
    levels = None if noise_of(gate_step) is None else _levels_of_steps(noise_levels(scheduler)[first:], steps, order, calls)
    return GateSchedule(steps, planning_steps(gate_step, steps, levels), order, calls)


def levels_of_run(scheduler: Any, steps: int) -> tuple[float, ...]:
    """The noise level at the beginning of each step of a whole run.

    Args:
        scheduler: a diffusers scheduler, which is not changed.
        steps: of the run.

    Raises:
        GateError: if calls and steps do not match, or the scheduler shows no noise levels.
    """
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    order, extra = _calls_a_step(scheduler)
    calls = len(scheduler.timesteps)
    return _levels_of_steps(noise_levels(scheduler), _steps_of(calls, order, extra), order, calls)


def level_of_gate(scheduler: Any, steps: int, gate_step: GateStep) -> float | None:
    """The noise level of a gate that is a step: a gate at this level comes before the same step of a whole run.

    Args:
        scheduler: a diffusers scheduler, which is not changed.
        steps: of the run.
        gate_step: a count or a fraction of the steps.

    Returns:
        The level, rounded up to three digits; None if the run has no step after the gate, or the scheduler shows no noise levels.
    """
    try:
        levels = levels_of_run(scheduler, steps)
    except (GateError, ValueError):  # a ValueError from a scheduler whose steps depend on the picture's size
        return None
    planning = planning_steps(gate_step, len(levels))
    return rounded_up(levels[planning]) if planning < len(levels) else None


def read_scheduler(pipeline: Path) -> Any:
    """The scheduler of the diffusers pipeline in a folder.

    Raises:
        InputError: if it needs a package that is not installed.
    """
    import diffusers

    config = read_json(pipeline / "scheduler" / SCHEDULER)
    try:
        return getattr(diffusers, config["_class_name"]).from_config(config)
    except ImportError as error:
        raise InputError(str(error).strip().partition("\n")[0]) from error


def noise_levels(scheduler: Any) -> tuple[float, ...]:
    """The noise level at each of a scheduler's ``timesteps``; infinite where there is no signal.

    Raises:
        GateError: if the scheduler shows none.
    """
    config, sigmas, cumulative = scheduler.config, getattr(scheduler, "sigmas", None), getattr(scheduler, "alphas_cumprod", None)
    timesteps = scheduler.timesteps
    if sigmas is not None and len(sigmas) >= len(timesteps):
        sigma = torch.as_tensor(sigmas)[: len(timesteps)].double()
        if _matches_flow(scheduler):
            sigma = sigma / (1 - sigma)
        elif cumulative is None and "sigma_data" in config:
            sigma = sigma / config["sigma_data"]
        elif cumulative is None:
            raise _no_levels(scheduler)
    elif cumulative is not None:
        share = cumulative[timesteps.to(cumulative.device).long().clamp(0, len(cumulative) - 1)].double()
        sigma = ((1 - share) / share).sqrt()
    else:
        raise _no_levels(scheduler)
    return tuple(sigma.tolist())


def place_of(timesteps: Tensor, timestep: Tensor | float | int) -> int | None:
    """Index of a timestep in the scheduler's tensor, from its address, so that no GPU has to be waited for; None for a copy."""
    if not isinstance(timestep, Tensor):
        return None
    offset = timestep.data_ptr() - timesteps.data_ptr()
    return offset // timesteps.element_size() if 0 <= offset < timesteps.nbytes else None


def begin_at(scheduler: Any, timesteps: Tensor, place: int) -> None:
    """Set where a scheduler begins, as it would find it itself at its first step, unless it knows already.

    Args:
        scheduler: a diffusers scheduler, after ``set_timesteps``.
        timesteps: its ``timesteps`` on the host.
        place: index of the run's first timestep.
    """
    if hasattr(scheduler, "set_begin_index") and scheduler.begin_index is None and scheduler.step_index is None:
        scheduler.set_begin_index(scheduler.index_for_timestep(timesteps[place], timesteps))


def _calls_a_step(scheduler: Any) -> tuple[int, int]:
    """The order of a scheduler, which is its calls a step, and the calls that it makes besides, before its second step.

    Raises:
        GateError: if calls and steps do not match.
    """
    listed = len(scheduler.timesteps)
    order = int(getattr(scheduler, "order", 1))
    stated = None if getattr(scheduler, "custom_timesteps", False) else getattr(scheduler, "num_inference_steps", None)
    whole = stated or (listed + order - 1) // order
    extra = listed - whole if order == 1 else 0
    if order not in (1, 2) or extra not in (0, 1) or (order == 2 and listed != 2 * whole - 1):
        raise GateError(
            f"{type(scheduler).__name__} calls the model {listed} times for {whole} steps, which the gate cannot follow"
            + ("; set skip_prk_steps=True" if hasattr(scheduler, "step_prk") else "; use another scheduler")
        )
    return order, extra


def _steps_of(calls: int, order: int, extra: int) -> int:
    """Steps that so many calls make, by what `_calls_a_step` gives."""
    return (calls + 1) // 2 if order == 2 else max(calls - extra, 1)


def _levels_of_steps(levels: Sequence[float], steps: int, order: int, calls: int) -> tuple[float, ...]:
    """The noise level at the first call of each step, from those of all calls."""
    schedule = GateSchedule(steps, steps, order, calls)
    first = {schedule.step(call): call for call in reversed(range(calls))}
    return tuple(levels[first[step]] for step in range(steps))


def _matches_flow(scheduler: Any) -> bool:
    """Whether the scheduler's ``sigmas`` are shares of noise in 0…1, beside shares ``1 − σ`` of signal."""
    config = scheduler.config
    return bool(
        type(scheduler).__name__.startswith("FlowMatch")
        or config.get("use_flow_sigmas")
        or config.get("prediction_type") == "flow_prediction"
    )


def _no_levels(scheduler: Any) -> GateError:
    return GateError(
        f"{type(scheduler).__name__} does not show how much noise a step has, so a gate cannot be a noise level; "
        "give gate_step as a number or a fraction of the steps"
    )


def _find(timesteps: Tensor, timestep: Tensor | float | int) -> int:
    """Index of the scheduler's first timestep of this value."""
    found = (timesteps == torch.as_tensor(timestep).flatten()[0].to(timesteps)).nonzero()
    if not len(found):
        raise GateError(f"timestep {timestep} is none of the scheduler's; a run starts with scheduler.set_timesteps")
    return int(found[0])

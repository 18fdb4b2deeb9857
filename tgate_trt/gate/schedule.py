"""The gate's arithmetic: which graph serves which call of the denoiser. Pure, without PyTorch.

A *call* is one call of the denoiser by a pipeline; a *step* is one step of sampling. They differ where a scheduler
evaluates the model twice a step (Heun, KDPM2) or once more than there are steps (PNDM).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tgate_trt.errors import GateError, InputError

NONE = "none"
"""The gate step for no gate: planning at every step, which draws the vanilla picture."""

NOISE = "noise:"
"""How a gate step begins that is a noise level."""

DEFAULT_GATE_STEP = 0.4
"""Gate step of models without one of their own: 10 of 25 steps, as in the official code's tables."""

GateStep = int | float | str
"""A number of planning steps, a fraction of the steps, a noise level such as ``"noise:1.35"``, or ``"none"``."""


def parse_gate_step(text: str) -> GateStep:
    """Read a gate step as the commands take it: ``10``, ``0.4``, ``noise:1.35`` or ``none``.

    Raises:
        InputError: if the text is none of them.
    """
    if text == NONE or text.startswith(NOISE):
        return check_gate_step(text)
    try:
        return int(text) if text.lstrip("+-").isdecimal() else float(text)
    except ValueError:
        raise InputError(
            f"a gate step is a number of steps such as 10, a fraction such as 0.4, a noise level such as noise:1.35, or none; got {text!r}"
        ) from None


def check_gate_step(gate_step: GateStep) -> GateStep:
    """Return the gate step, if some number of steps can have it.

    Raises:
        InputError: for a count below 1, a fraction outside (0, 1), a noise level that is no positive number, or another type or text.
    """
    if gate_step == NONE or noise_of(gate_step) is not None:
        return gate_step
    if isinstance(gate_step, bool) or not isinstance(gate_step, int | float):
        raise InputError(
            f'gate_step must be a count, a fraction between 0 and 1, a noise level as in "noise:1.35", or "none"; got {gate_step!r}'
        )
    if isinstance(gate_step, int):
        if gate_step < 1:
            raise InputError(f"gate_step must be at least 1, got {gate_step}: the cache is taken at the last planning step")
    elif not 0 < gate_step < 1:
        raise InputError(f"a fractional gate_step must lie between 0 and 1, got {gate_step}; a count is written without a point")
    return gate_step


def noise_of(gate_step: GateStep) -> float | None:
    """The noise level σ of a gate step that is one, else None; see `tgate_trt.gate.scheduler`.

    Raises:
        InputError: if σ is no positive number.
    """
    if not isinstance(gate_step, str) or not gate_step.startswith(NOISE):
        return None
    try:
        sigma = float(gate_step.removeprefix(NOISE))
    except ValueError:
        sigma = math.nan
    if not 0 < sigma < math.inf:
        raise InputError(f"a gate at a noise level names a positive number, as in noise:1.35; got {gate_step!r}")
    return sigma


def rounded_up(level: float) -> float:
    """A noise level in three digits, rounded up, so that a gate there comes before a step of exactly this level."""
    exponent = math.floor(math.log10(level)) - 2
    return float(f"{math.ceil(level / 10**exponent - 1e-9)}e{exponent}")


def planning_steps(gate_step: GateStep, steps: int, levels: Sequence[float] | None = None) -> int:
    """Number of planning steps in a run.

    The count itself; ``max(1, floor(fraction × steps + 1/2))``; or, at a noise level, the steps before the first that has at most
    this noise, at least 1, and all if none has.

    Args:
        gate_step: as the user gave it.
        steps: of the run.
        levels: the noise level at the beginning of each step; needed if the gate is a noise level.

    Raises:
        InputError: if the gate step is impossible, or a count above the steps of this run.
    """
    gate_step = check_gate_step(gate_step)
    sigma = noise_of(gate_step)
    if sigma is not None:
        assert levels is not None and len(levels) == steps
        return max(1, next((step for step, level in enumerate(levels) if level <= sigma), steps))
    if gate_step == NONE:
        return steps
    if isinstance(gate_step, float):
        return max(1, math.floor(gate_step * steps + 0.5))
    assert isinstance(gate_step, int)
    if gate_step > steps:
        raise InputError(
            f'gate_step={gate_step} is more than the {steps} steps of this run; use 1 to {steps}, a fraction, a noise level, or "none"'
        )
    return gate_step


@dataclass(frozen=True)
class GateSchedule:
    """Which graph serves each call of one run.

    Steps ``0 … gate_step - 1`` are planning, steps ``gate_step … steps - 1`` are fidelity.
    """

    steps: int
    """Steps of the run, T."""
    gate_step: int
    """Planning steps, g, from `planning_steps`."""
    order: int = 1
    """Calls a step: 2 for Heun and KDPM2."""
    calls: int = 0
    """Calls of the run; ``steps`` for most schedulers, and if 0."""

    def __post_init__(self) -> None:
        if self.calls == 0:
            object.__setattr__(self, "calls", self.steps * self.order)
        if self.steps < 1 or not 1 <= self.gate_step <= self.steps or self.order not in (1, 2):
            raise InputError(f"a schedule needs 1 <= gate_step <= steps and order 1 or 2, got {self}")
        if self.step(self.calls - 1) != self.steps - 1:
            raise GateError(f"{self.calls} calls do not make {self.steps} steps of order {self.order}")

    def step(self, call: int) -> int:
        """The step to which a call belongs, both counted from 0.

        Order 1: ``max(call - (calls - steps), 0)``, which gives PNDM's one call more to step 0. Order 2: ``call // 2``;
        the last step of a second-order scheduler is one call.
        """
        return call // 2 if self.order == 2 else max(call - (self.calls - self.steps), 0)

    def is_planning(self, call: int) -> bool:
        """Whether cross-attention is computed at this call."""
        return self.step(call) < self.gate_step

    def hands_off(self, call: int) -> bool:
        """Whether the fidelity phase reuses this call's cross-attention: true for the last call of step g - 1."""
        return self.is_planning(call) and call + 1 < self.calls and not self.is_planning(call + 1)

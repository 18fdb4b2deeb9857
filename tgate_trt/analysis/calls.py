"""The calls of a run: each call of the denoiser, its step, and its conditions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tgate_trt.gate.denoiser import differing_halves
from tgate_trt.gate.schedule import NONE, GateSchedule
from tgate_trt.gate.scheduler import schedule_of


@dataclass(frozen=True)
class Call:
    """One call of the denoiser within a run."""

    number: int
    """Number of the call in its run, from 0."""
    schedule: GateSchedule
    guided: bool
    """Whether the rows are ``[negative, positive]``."""

    @property
    def step(self) -> int:
        """Number of the step to which the call belongs, from 0."""
        return self.schedule.step(self.number)

    @property
    def ends_step(self) -> bool:
        """Whether the next call belongs to another step; T-GATE takes its cache at such a call."""
        return self.number + 1 == self.schedule.calls or self.schedule.step(self.number + 1) != self.step


OnCall = Callable[[Call, dict[str, Any]], dict[str, Any] | None]
"""Takes a call and its keywords; returns other keywords for the call, or None to keep them."""


@contextlib.contextmanager
def watching(pipeline: Any, denoiser: nn.Module, on_call: OnCall) -> Iterator[None]:
    """Within this context, call ``on_call`` before every call of the pipeline's denoiser."""
    counter = _Counter(pipeline)

    def hook(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, Any] | None:
        timestep = keywords["timestep"] if "timestep" in keywords else arguments[1]
        replaced = on_call(counter.count(arguments[0], timestep), keywords)
        return None if replaced is None else (arguments, replaced)

    handle = denoiser.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class _Counter:
    """Counts the calls of each run; a new ``timesteps`` tensor of the scheduler begins a new run."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._timesteps: Tensor | None = None
        self._last: Call | None = None

    def count(self, sample: Tensor, timestep: Tensor | float | int) -> Call:
        timesteps = self._pipeline.scheduler.timesteps
        if self._last is None or self._timesteps is not timesteps:
            self._timesteps = timesteps
            self._last = Call(0, schedule_of(self._pipeline, timestep, NONE), not bool(differing_halves(sample)))
        else:
            self._last = Call(self._last.number + 1, self._last.schedule, self._last.guided)
        return self._last

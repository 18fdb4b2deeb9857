"""What an analysis sees of a run: each call of the denoiser, the step to which it belongs, and its conditions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tgate_trt.gate.denoiser import schedule_of
from tgate_trt.gate.schedule import NONE, GateSchedule


@dataclass(frozen=True)
class Call:
    """One call of the denoiser within a run."""

    number: int
    """Of the run, from 0."""
    schedule: GateSchedule
    guided: bool
    """Whether the rows are ``[negative, positive]``."""

    @property
    def step(self) -> int:
        """The step to which it belongs, from 0."""
        return self.schedule.step(self.number)

    @property
    def ends_step(self) -> bool:
        """Whether the next call is of another step; the cache of T-GATE is taken at such a call."""
        return self.number + 1 == self.schedule.calls or self.schedule.step(self.number + 1) != self.step


OnCall = Callable[[Call, dict[str, Any]], dict[str, Any] | None]
"""Is given a call and its keywords, and returns the keywords that take their place, or None."""


@contextlib.contextmanager
def watching(pipeline: Any, denoiser: nn.Module, on_call: OnCall) -> Iterator[None]:
    """While this lasts, ``on_call`` sees every call of the pipeline's denoiser before it is made."""
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
    """Counts the calls of each run; a new ``timesteps`` tensor of the scheduler means a new run."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._timesteps: Tensor | None = None
        self._last: Call | None = None

    def count(self, sample: Tensor, timestep: Tensor | float | int) -> Call:
        timesteps = self._pipeline.scheduler.timesteps
        if self._last is None or self._timesteps is not timesteps:
            self._timesteps = timesteps
            self._last = Call(0, schedule_of(self._pipeline, timestep, NONE), _is_guided(sample))
        else:
            self._last = Call(self._last.number + 1, self._last.schedule, self._last.guided)
        return self._last


def _is_guided(sample: Tensor) -> bool:
    """Whether a run's first latents are the same twice: pipelines double them for guidance, and no two pictures here share noise."""
    rows = sample.shape[0]
    return rows % 2 == 0 and torch.equal(sample[: rows // 2], sample[rows // 2 :])

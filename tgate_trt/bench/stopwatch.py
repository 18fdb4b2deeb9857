"""The time of each part of a run, by the clock of the host or of a GPU."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch

_QUEUED = 20
"""Runs between two readings of a GPU's clock."""


class Stopwatch:
    """Clocks of named parts, one of which runs at a time: a part's clock stops while another part runs inside it.

    So the parts of a run add up to its whole time. On a GPU a moment is a CUDA event, so the host waits for the GPU only when
    the times are read.
    """

    def __init__(self, device: torch.device | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        """Make a stopwatch.

        Args:
            device: device whose time is measured; the host if None or a CPU.
            clock: returns the host's time in seconds.
        """
        self._on_gpu = device is not None and device.type == "cuda"
        self._clock = clock
        self._moments: list[tuple[Any, str | None]] = []
        """Moments, each with the part that ran until then."""
        self._running: list[str] = []
        self.calls: Counter[str] = Counter()
        """Number of times that each part was started."""

    def start(self, part: str) -> None:
        """Start the clock of a part, and stop the one that runs."""
        self._mark()
        self._running.append(part)
        self.calls[part] += 1

    def stop(self) -> None:
        """Stop the clock that runs, and restart the one before it."""
        self._mark()
        self._running.pop()

    @contextlib.contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Within this context, run the clock of a part."""
        self.start(part)
        try:
            yield
        finally:
            self.stop()

    @contextlib.contextmanager
    def watching(self, owner: Any, method: str, part: str) -> Iterator[None]:
        """Within this context, calls of ``owner.method`` run the clock of a part."""
        watched = getattr(owner, method)

        def timed(*arguments: Any, **keywords: Any) -> Any:
            with self.time(part):
                return watched(*arguments, **keywords)

        setattr(owner, method, timed)
        try:
            yield
        finally:
            delattr(owner, method)

    def seconds(self) -> dict[str, float]:
        """Time of each part in seconds, without the parts that ran inside it."""
        if self._on_gpu:
            torch.cuda.synchronize()
        spent: dict[str, float] = defaultdict(float)
        for (before, _), (after, part) in zip(self._moments, self._moments[1:], strict=False):
            if part is not None:
                spent[part] += before.elapsed_time(after) / 1e3 if self._on_gpu else after - before
        return dict(spent)

    def _mark(self) -> None:
        if self._on_gpu:
            moment: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            moment.record()
        else:
            moment = self._clock()
        self._moments.append((moment, self._running[-1] if self._running else None))


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run; on a GPU of one of `_QUEUED`, so that it does not wait for the host between two."""
    watch, runs = Stopwatch(device), _QUEUED if device.type == "cuda" else 1
    with watch.time("runs"):
        for _ in range(runs):
            run()
    return watch.seconds()["runs"] / runs

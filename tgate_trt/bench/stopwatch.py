"""Where the time of a run goes, part by part, on the host's clock or on a GPU's."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tgate_trt.engines.base import Engine


class Stopwatch:
    """Clocks of named parts, of which one runs at a time: a part stands still while another runs inside it.

    So the parts of a run add up to its whole time. On a GPU a moment is a CUDA event, so that nothing is waited for until
    the times are read.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._on_gpu = device is not None and device.type == "cuda"
        self._moments: list[tuple[Any, str | None]] = []
        """Moments, and the part that ran up to each."""
        self._running: list[str] = []
        self.calls: Counter[str] = Counter()
        """How often each part was begun."""

    def start(self, part: str) -> None:
        """Run the clock of a part, and stop the one that runs."""
        self._mark()
        self._running.append(part)
        self.calls[part] += 1

    def stop(self) -> None:
        """Stop the clock that runs, and go on with the one before it."""
        self._mark()
        self._running.pop()

    @contextlib.contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Run the clock of a part."""
        self.start(part)
        try:
            yield
        finally:
            self.stop()

    @contextlib.contextmanager
    def watching(self, owner: Any, method: str, part: str) -> Iterator[None]:
        """While this lasts, calls of ``owner.method`` run the clock of a part."""
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
        """Time of each part, without what ran inside it."""
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
            moment = time.perf_counter()
        self._moments.append((moment, self._running[-1] if self._running else None))


@dataclass
class Watched:
    """An engine whose runs are timed under a name; without a watch it is the engine and nothing else."""

    engine: Engine
    part: str
    watch: Stopwatch | None = field(default=None)

    @property
    def spec(self) -> Any:
        """The engine's own."""
        return self.engine.spec

    @property
    def device(self) -> torch.device:
        """The engine's own."""
        return self.engine.device

    def run(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        """Run the engine, and the clock."""
        if self.watch is None:
            return self.engine.run(inputs, outputs)
        with self.watch.time(self.part):
            return self.engine.run(inputs, outputs)

    def replace_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """As the engine does."""
        self.engine.replace_weights(weights)

    def unload(self) -> None:
        """As the engine does."""
        self.engine.unload()

    def close(self) -> None:
        """As the engine does."""
        self.engine.close()

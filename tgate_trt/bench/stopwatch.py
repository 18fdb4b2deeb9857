"""Where the time of a run goes, part by part."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any


class Stopwatch:
    """Clocks of named parts, of which one runs at a time: a part stands still while another runs inside it.

    So the parts of a run add up to its whole time.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        """Time of each part, without what ran inside it."""
        self._running: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Run the clock of a part."""
        self._account()
        self._running.append(part)
        try:
            yield
        finally:
            self._account()
            self._running.pop()

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

    def _account(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

"""Progress of a long command: a bar on a terminal, else a plain line every so often."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 15.0


class StageProgress(Protocol):
    """What a stage tells after each of its steps."""

    def advance(self, loss: torch.Tensor | None = None, count: int = 1) -> None:
        """`count` more steps are done, with this loss, a scalar, if they have one."""


@dataclass
class _Smoothed:
    """A running mean of the last hundred losses or so."""

    value: float | None = None

    def update(self, loss: torch.Tensor | None) -> str:
        if loss is not None:
            latest = float(loss.detach())
            self.value = latest if self.value is None else 0.98 * self.value + 0.02 * latest
        return "" if self.value is None else f"loss {self.value:.4f}"


@dataclass
class _Lines:
    console: Console
    name: str
    total: int
    done: int
    loss: _Smoothed = field(default_factory=_Smoothed)
    started: float = field(default_factory=time.monotonic)
    printed: float = float("-inf")

    def advance(self, loss: torch.Tensor | None = None, count: int = 1) -> None:
        self.done += count
        text, now = self.loss.update(loss), time.monotonic()
        if now - self.printed >= SECONDS_BETWEEN_LINES or self.done == self.total:
            self.printed = now
            self.console.print(f"{self.name}: {self.done}/{self.total} {text} {now - self.started:.0f} s", highlight=False)


@dataclass
class _Bar:
    bar: Progress
    name: str
    total: int
    done: int
    loss: _Smoothed = field(default_factory=_Smoothed)

    def __post_init__(self) -> None:
        self.task = self.bar.add_task(self.name, total=self.total, completed=self.done, loss="")

    def advance(self, loss: torch.Tensor | None = None, count: int = 1) -> None:
        self.bar.update(self.task, advance=count, loss=self.loss.update(loss))


@dataclass(frozen=True)
class Reporter:
    """Where a command's progress goes."""

    console: Console = field(default_factory=lambda: Console(stderr=True))

    def say(self, text: str) -> None:
        """One line of text."""
        self.console.print(text, highlight=False)

    @contextmanager
    def stage(self, name: str, *, total: int, done: int = 0) -> Iterator[StageProgress]:
        """Progress of a stage of `total` steps, `done` of which lie behind it."""
        if not self.console.is_terminal:
            yield _Lines(self.console, name, total, done)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as bar:
            yield _Bar(bar, name, total, done)

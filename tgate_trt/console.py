"""The terminal of a command: its progress, and its one-sentence errors. The library itself only logs."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from safetensors import SafetensorError

from tgate_trt.errors import TGateError

console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)

FAILED = 1
"""Exit code of an error in the user's input or machine; 2 is wrong usage."""

SECONDS_BETWEEN_LINES = 15.0
"""Seconds between lines of progress if there is no terminal for a bar."""


class _Progress(logging.Handler):
    """Shows the library's log: on a terminal with a spinner or a bar for work that is under way, elsewhere as plain lines.

    A record that ends with an ellipsis announces work; one with the attribute ``progress``, from 0 to 1, moves the bar.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.status = console.status("")
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), console=console, transient=True
        )
        self.task = self.bar.add_task("", total=1.0)
        self.printed = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        fraction = getattr(record, "progress", None)
        if fraction is not None:
            if console.is_terminal:
                self._show_bar(message, fraction)
            elif time.monotonic() - self.printed >= SECONDS_BETWEEN_LINES:
                self._print(f"{message}: {fraction:.0%}")
            return
        self._hide_bar()
        if message.endswith("…"):
            if console.is_terminal:
                self.status.update(escape(message))
                self.status.start()
            return
        self._print(message, style="yellow" if record.levelno >= logging.WARNING else None)

    def close(self) -> None:
        self.status.stop()
        self._hide_bar()
        super().close()

    def _print(self, message: str, style: str | None = None) -> None:
        self.printed = time.monotonic()
        console.print(escape(message), style=style)

    def _show_bar(self, message: str, fraction: float) -> None:
        self.status.stop()
        if not self.bar.live.is_started:
            self.bar.reset(self.task)
            self.bar.start()
        self.bar.update(self.task, description=escape(message), completed=fraction)

    def _hide_bar(self) -> None:
        if self.bar.live.is_started:  # `stop` prints an empty line even if nothing was shown
            self.bar.stop()


@contextlib.contextmanager
def reporting(verbose: bool, interrupted: str = "stopped; unfinished files are removed") -> Iterator[None]:
    """Show the library's progress, and turn an error of the user's input or machine into one sentence and exit code 1.

    A request to terminate (SIGTERM) ends the command as Ctrl-C does, so that unfinished files are removed and child processes end.

    Args:
        verbose: show the log of every library, and the traceback of an error.
        interrupted: the sentence to print if the user interrupts the command.
    """
    progress = _Progress()
    try:
        logs = _everything_shown() if verbose else _quiet_libraries()
        with _terminated_as_interrupted(), _logged_by(progress, "tgate_trt", logging.INFO), logs:
            yield
    except (TGateError, OSError, SafetensorError, MemoryError) as error:
        progress.close()
        if verbose:
            errors.print_exception()
        errors.print(f"[bold red]error:[/] {escape(_sentence(error))}")
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        progress.close()
        errors.print(interrupted)
        raise typer.Exit(FAILED) from None
    finally:
        progress.close()


def _sentence(error: Exception) -> str:
    """An error in one line; those that are not ours lack what to do, so that is added."""
    if isinstance(error, TGateError):
        return str(error)
    if isinstance(error, MemoryError):
        return "the memory of this machine ran out; free some, or use a smaller model, size or batch"
    where, reason = getattr(error, "filename", None), getattr(error, "strerror", None) or " ".join(str(error).split())
    return f"cannot read or write {where or 'a file'}: {reason}; check its place, its permissions and the space on its disk"


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM raise `KeyboardInterrupt` for a while, in the main thread, which alone may receive signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _logged_by(handler: logging.Handler, name: str, level: int) -> Iterator[None]:
    """Give a logger a handler and a level for a while; the empty name is the root logger."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _everything_shown() -> contextlib.AbstractContextManager[None]:
    """Write the log of every library to standard error for a while."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    return _logged_by(handler, "", logging.DEBUG)


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep the progress bars and warnings of other libraries out of the output for a while."""
    import warnings

    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, (verbosity, has_bars) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if has_bars:
                library.enable_progress_bar()

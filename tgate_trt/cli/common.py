"""What the commands share: how they report progress, and how they fail."""

from __future__ import annotations

import contextlib
import logging
import shlex
import sys
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from tgate_trt.errors import TGateError

console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)

Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show logs, and tracebacks of errors.")]

FAILED = 1
"""Exit code where the user's input or machine is the reason; 2 is wrong usage."""


class _Progress(logging.Handler):
    """Shows the library's log: on a terminal a spinner or a bar for what is under way, elsewhere plain lines.

    A record that ends with an ellipsis is under way; one with the attribute ``progress``, from 0 to 1, has a bar.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.status = console.status("")
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), console=console, transient=True
        )
        self.task = self.bar.add_task("", total=1.0)

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        fraction = getattr(record, "progress", None)
        if fraction is not None:
            if console.is_terminal:
                self._show_bar(message, fraction)
            return
        self._hide_bar()
        if message.endswith("…"):
            if console.is_terminal:
                self.status.update(escape(message))
                self.status.start()
            return
        console.print(escape(message), style="yellow" if record.levelno >= logging.WARNING else None)

    def close(self) -> None:
        self.status.stop()
        self._hide_bar()
        super().close()

    def _show_bar(self, message: str, fraction: float) -> None:
        self.status.stop()
        if not self.bar.live.is_started:
            self.bar.reset(self.task)
            self.bar.start()
        self.bar.update(self.task, description=escape(message), completed=fraction)

    def _hide_bar(self) -> None:
        if self.bar.live.is_started:  # `stop` prints an empty line even where nothing was shown
            self.bar.stop()


@contextlib.contextmanager
def reporting(verbose: bool) -> Iterator[None]:
    """Show progress, and turn errors of ours into one sentence and exit code 1.

    Args:
        verbose: show the log of every library, and the traceback of an error.
    """
    progress = _Progress()
    library = logging.getLogger("tgate_trt")
    library.addHandler(progress)
    library.setLevel(logging.INFO)
    if verbose:
        logging.basicConfig(level=logging.DEBUG, format="%(name)s: %(message)s")
    else:
        _quieten_libraries()
    try:
        yield
    except TGateError as error:
        progress.close()
        if verbose:
            errors.print_exception()
        errors.print(f"[bold red]error:[/] {escape(str(error))}")
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        progress.close()
        errors.print("stopped; nothing was left behind")
        raise typer.Exit(FAILED) from None
    finally:
        progress.close()
        library.removeHandler(progress)


def _quieten_libraries() -> None:
    """Keep the libraries' own bars and remarks out of the commands' output."""
    import warnings

    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    warnings.simplefilter("ignore")
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def application() -> typer.Typer:
    """A command with the options that all of them have."""
    return typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)


def command_line(program: str) -> str:
    """The command line of this process, ready to be typed again."""
    return shlex.join([program, *sys.argv[1:]])

"""What the commands share: progress, errors, exit codes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from tgate_trt.errors import TGateError

console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)

FAILED = 1
"""Exit code for a fault of the user's input or machine; 2 is wrong usage."""


class _Progress(logging.Handler):
    """Shows the library's log: on a terminal a spinner or a bar for work in progress, elsewhere plain lines.

    A record that ends with an ellipsis opens a spinner; one with the attribute ``progress``, from 0 to 1, moves a bar.
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
        errors.print("stopped; unfinished files are removed")
        raise typer.Exit(FAILED) from None
    finally:
        progress.close()
        library.removeHandler(progress)


def _quieten_libraries() -> None:
    """Keep the libraries' own bars and warnings out of the commands' output."""
    import warnings

    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    warnings.simplefilter("ignore")
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def application() -> typer.Typer:
    """A command with the settings that all of them share."""
    return typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)

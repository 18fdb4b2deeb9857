"""What the commands share."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated

import typer

from tgate_trt.console import FAILED, console, errors, reporting

__all__ = ["FAILED", "Verbose", "application", "command_line", "console", "errors", "reporting"]

Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show logs, and tracebacks of errors.")]


def application() -> typer.Typer:
    """A command with the settings that all of them share."""
    return typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)


def command_line(program: str) -> str:
    """The command line of this process, ready to be typed again."""
    return shlex.join([program, *sys.argv[1:]])

"""What the commands share."""

from __future__ import annotations

import typer

from tgate_trt.console import FAILED, console, errors, reporting

__all__ = ["FAILED", "application", "console", "errors", "reporting"]


def application() -> typer.Typer:
    """A command with the settings that all of them share."""
    return typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)

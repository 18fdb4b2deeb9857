"""A row of actions in a terminal: a strip with one cell for each call, a legend, and the work."""

from __future__ import annotations

import string
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from tgate_trt.gate.actions import Action
    from tgate_trt.running.row import Row

_PLANNING, _FIDELITY, _REUSES, _FORECAST = "reverse green", "reverse blue", "reverse yellow", "dim"
"""Colours of cells."""


def strip_of(row: Row) -> Iterator[Text | str]:
    """The lines of a row."""
    yield f"{row.gate}: {row.schedule.steps} steps" + ("" if row.guided else ", without guidance")
    kinds = dict.fromkeys(map(_kind, row.actions))
    letters = iter(string.ascii_uppercase * 2)
    cells = {kind: "·" if kind[0] == "forecast" else next(letters) for kind in kinds}
    yield Text.assemble(*((f" {cells[_kind(action)]} ", _style(action)) for action in row.actions))
    for kind, letter in cells.items():
        found = [macs for action, macs in zip(row.actions, row.macs, strict=True) if _kind(action) == kind]
        halves = "" if kind[0] == "forecast" or not row.guided else " on both halves" if kind[1] is None else " on one half"
        share = f"{found[0] / 1e9:,.2f} GMACs, {found[0] / row.vanilla:.1%} of vanilla's"
        yield f" {letter}  {kind[0]}{halves}: {len(found)} of {len(row.actions)} calls, each {share}"
    whole = row.vanilla * len(row.actions)
    yield f"in all {sum(row.macs) / 1e9:,.2f} of vanilla's {whole / 1e9:,.2f} GMACs: {row.share:.1%}, {1 / row.share:.2f}× less"


def _kind(action: Action) -> tuple[str, int | None]:
    return action.graph or "forecast", action.half


def _style(action: Action) -> str:
    if action.graph is None:
        return _FORECAST
    if "reuse" in action.graph:
        return _REUSES
    return _PLANNING if action.is_planning else _FIDELITY

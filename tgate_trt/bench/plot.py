"""A measurement as a figure: a bar a setting, stacked by phase; and latency against quality, where quality was measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tgate_trt.analysis.plotting import check_available
from tgate_trt.bench import growth
from tgate_trt.errors import InputError
from tgate_trt.files import replacing
from tgate_trt.gate.schedule import NONE

_PHASES = {
    "planning step": ("planning steps", "#4c72b0"),
    "fidelity step": ("fidelity steps", "#55a868"),
    "hand-off": ("hand-off", "#c44e52"),
    "text encoding": ("text encoding", "#8172b3"),
    "VAE": ("VAE", "#ccb974"),
    "outside": ("outside the models", "#8c8c8c"),
}
"""Label and colour of each."""


def check(what: str, path: Path) -> None:
    """Refuse early what cannot be drawn.

    Args:
        what: a record will be of.
        path: of the picture.

    Raises:
        InputError: if there is no figure of such a record, or of such a file.
        UnsupportedError: if matplotlib is not installed.
    """
    if what not in ("pictures", "growth"):
        raise InputError(f"--plot is for bundles and --growth: there is no figure of --{what}")
    check_available(path)


def save(record: Mapping[str, Any], path: Path) -> None:
    """Draw a record, and write the figure whole or not at all.

    Raises:
        InputError: see `check`; or if nothing can be written there.
    """
    check(record["what"], path)
    if record["what"] == "growth":
        growth.plot(record["results"], path)
        return
    from matplotlib.figure import Figure

    has_quality = bool(record["results"].get("quality"))
    settings: Mapping[str, Any] = record["results"]["settings"]
    figure = Figure(figsize=(13 if has_quality else 8, 1.6 + 0.42 * len(settings)), layout="constrained")
    panels = figure.subplots(1, 2, width_ratios=(3, 2)) if has_quality else [figure.subplots()]
    _bars(panels[0], record)
    if has_quality:
        _against_quality(panels[1], record)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            figure.savefig(partial, dpi=150, format=path.suffix.removeprefix("."))
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror or error}; choose another --plot") from error


def _bars(axes: Any, record: Mapping[str, Any]) -> None:
    settings: Mapping[str, Any] = record["results"]["settings"]
    names = list(settings)
    left = [0.0] * len(names)
    for phase, (label, colour) in _PHASES.items():
        seconds = [(row["outside"] if phase == "outside" else row["parts"][phase])["median"] for row in settings.values()]
        if max(seconds) > 0:
            axes.barh(names, seconds, left=left, label=label, color=colour, height=0.65)
        left = [start + more for start, more in zip(left, seconds, strict=True)]
    for place, (row, end) in enumerate(zip(settings.values(), left, strict=True)):
        axes.text(end, place, f"  {row['ratio']['median']:.2f}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("seconds, medians; at the bar's end the ratio to vanilla by the same engine")
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.4, 1.0))
    axes.spines[["top", "right"]].set_visible(False)


def _against_quality(axes: Any, record: Mapping[str, Any]) -> None:
    """Seconds of a picture, and what share of pictures is right, or how far they are from vanilla's: a line a way, a point a gate."""
    quality: Mapping[str, Any] = record["results"]["quality"]
    semantic = all(row["semantics"] for row in quality.values())
    ways: dict[str, list[tuple[float, tuple[float, float, float], str]]] = defaultdict(list)
    for name, row in quality.items():
        measured = record["results"]["settings"][name]
        gate = "" if measured["setting"]["gate_step"] == NONE else str(measured["planning_steps"])
        way = name.replace(f" g={gate}", "")
        ways[way].append((measured["seconds"]["median"], _of_semantics(row) if semantic else _of_distance(row), gate))
    for way, points in ways.items():
        seconds, values, gates = zip(*sorted(points), strict=True)
        middle, low, high = zip(*values, strict=True)
        below = [value - least for value, least in zip(middle, low, strict=True)]
        above = [most - value for value, most in zip(middle, high, strict=True)]
        axes.errorbar(seconds, middle, yerr=[below, above], fmt="o-", capsize=2, linewidth=1, markersize=4, label=way)
        for x, y, gate in zip(seconds, middle, gates, strict=True):
            axes.annotate(gate, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set_xlabel("seconds, median; beside each point its gate step")
    axes.set_ylabel("pictures with every attribute right" if semantic else "perceptual distance to vanilla")
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes.spines[["top", "right"]].set_visible(False)


def _of_semantics(row: Mapping[str, Any]) -> tuple[float, float, float]:
    overall = row["semantics"]["overall"]
    return overall["fraction"], *overall["interval"]


def _of_distance(row: Mapping[str, Any]) -> tuple[float, float, float]:
    distance = row["likeness"] and row["likeness"]["perceptual_distance"]
    return (distance["value"], distance["low"], distance["high"]) if distance else (0.0, 0.0, 0.0)

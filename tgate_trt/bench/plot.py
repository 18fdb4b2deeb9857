"""Records as figures: the settings of a bundle as bars by phase, beside their quality; and the cost of growth over parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tgate_trt.analysis.plotting import BLUE, GRAY, GREEN, ORANGE, PURPLE, VERMILION, drawing
from tgate_trt.bench import growth
from tgate_trt.errors import InputError
from tgate_trt.gate.schedule import NONE

Record = Mapping[str, Any]
"""See `tgate_trt.analysis.record.record_of`."""

_PHASES = {
    "planning step": ("planning steps", BLUE),
    "fidelity step": ("fidelity steps", GREEN),
    "hand-off": ("hand-off", VERMILION),
    "forecast": ("forecasts", "0.3"),
    "text encoding": ("text encoding", PURPLE),
    "VAE": ("VAE", ORANGE),
    "outside": ("outside the models", GRAY),
}
"""Label and colour of each."""


def save(record: Record, path: Path) -> None:
    """Draw a record of ``pictures`` or ``growth``, and write the figure whole or not at all.

    Raises:
        InputError: if there is nothing to draw, the file's suffix is none of `tgate_trt.analysis.plotting.FORMATS`, or nothing can be
            written there.
        UnsupportedError: if matplotlib is not installed.
    """
    (_growth if record["what"] == "growth" else _pictures)(record, path)


def _pictures(record: Record, path: Path) -> None:
    settings, quality = record["results"]["settings"], record["results"].get("quality")
    with drawing(path, 13 if quality else 8, 1.6 + 0.42 * len(settings)) as figure:
        panels = figure.subplots(1, 2, squeeze=False, width_ratios=(3, 2))[0] if quality else [figure.subplots()]
        _bars(panels[0], settings)
        if quality and any(row["setting"].get("text") for row in settings.values()):
            _against_distance(panels[1], settings, quality)
        elif quality:
            _against_quality(panels[1], settings, quality)


def _bars(axes: Any, settings: Mapping[str, Any]) -> None:
    """A bar a setting, stacked by phase."""
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
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("seconds, medians; at the end of a bar, the ratio to vanilla by the same engine")
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.4, 1.0))


def _against_quality(axes: Any, settings: Mapping[str, Any], quality: Mapping[str, Any]) -> None:
    """Seconds of a picture against the share of right pictures, or the distance to vanilla's: a line a method, a point a gate."""
    semantic = all(row["semantics"] for row in quality.values())
    methods: dict[str, list[tuple[float, tuple[float, float, float], str]]] = defaultdict(list)
    for name, row in quality.items():
        measured = settings[name]
        gate = "" if measured["setting"]["gate_step"] == NONE else str(measured["planning_steps"])
        method = name.replace(f" g={gate}", "")
        methods[method].append((measured["seconds"]["median"], _of_semantics(row) if semantic else _of_distance(row), gate))
    for method, points in methods.items():
        seconds, values, gates = zip(*sorted(points, key=lambda point: int(point[2] or 0)), strict=True)
        middle, low, high = zip(*values, strict=True)
        below = [value - least for value, least in zip(middle, low, strict=True)]
        above = [most - value for value, most in zip(middle, high, strict=True)]
        axes.errorbar(seconds, middle, yerr=[below, above], fmt="o-", capsize=2, linewidth=1, markersize=4, label=method)
        for x, y, gate in zip(seconds, middle, gates, strict=True):
            axes.annotate(gate, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set_xlabel("seconds, median; beside each point, its gate step")
    axes.set_ylabel("pictures with every attribute right" if semantic else "perceptual distance to vanilla")
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _against_distance(axes: Any, settings: Mapping[str, Any], quality: Mapping[str, Any]) -> None:
    """The share of vanilla's time against the distance to its pictures: a point a setting, and the curve of the best."""
    points = []
    for name, row in quality.items():
        if row["likeness"] is None:
            continue
        share, (middle, low, high) = settings[name]["denoising_ratio"]["median"], _of_distance(row)
        colour = ORANGE if settings[name]["setting"]["steps"] else BLUE if settings[name]["setting"]["text"] else GRAY
        axes.errorbar(share, middle, yerr=[[middle - low], [high - middle]], fmt="o", capsize=2, markersize=4, color=colour)
        axes.annotate(f" {name}", (share, middle), fontsize=6, rotation=25)
        points.append((share, middle))
    best, least = [], float("inf")
    for share, distance in sorted(points):
        if distance < least:
            best.append((share, distance))
            least = distance
    axes.step(*zip(*best, strict=True), where="post", color=VERMILION, linewidth=1, label="nearest in that time")
    axes.set_xlabel("time of the denoising loop over vanilla's")
    axes.set_ylabel("perceptual distance to vanilla")
    axes.set_xlim(right=1.15)
    axes.legend(loc="upper right")


def _of_semantics(row: Mapping[str, Any]) -> tuple[float, float, float]:
    overall = row["semantics"]["overall"]
    return overall["fraction"], *overall["interval"]


def _of_distance(row: Mapping[str, Any]) -> tuple[float, float, float]:
    distance = row["likeness"] and row["likeness"]["perceptual_distance"]
    return (distance["value"], distance["low"], distance["high"]) if distance else (0.0, 0.0, 0.0)


_COLOURS = {"vanilla": BLUE, "planning": ORANGE, "fidelity": GREEN, "weights": GRAY}
"""Of lines that begin with the name; all others are of a build."""


def _growth(record: Record, path: Path) -> None:
    """Build time, memory and step time over parameters, all logarithmic, a panel each."""
    models = growth.by_parameters(record["results"])
    if not models:
        raise InputError("nothing was measured, so there is nothing to draw; name a model")
    panels = [_panels(one) for _, one in models]
    millions = [one["parameters"] / 1e6 for _, one in models]
    with drawing(path, 12, 4.2) as figure:
        for axes, (title, lines) in zip(figure.subplots(1, len(panels[0])), panels[0].items(), strict=True):
            axes.set_title(title)
            _over_parameters(axes, millions, {label: [each[title][label] for each in panels] for label in lines})
        sizes = ", ".join(f"{name} {one['size']}²" for name, one in models)
        figure.supxlabel(f"parameters of the denoiser, in millions (pictures: {sizes})", fontsize=10)


def _panels(one: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The values of a model, by title of the panel and label of the line."""
    build, steps = one["build"], one["steps"]
    return {
        "Build time, s": {"elapsed": build["seconds"], "processor time": build["cpu_seconds"]},
        "Peak anonymous memory, GB": {
            "build": build["memory"]["peak_anonymous"] / 1e9,
            **{f"{graph} step": steps[graph]["memory"]["peak_anonymous"] / 1e9 for graph in ("vanilla", "fidelity")},
            "weights of the denoiser": build["disk"]["denoiser_weights"] / 1e9,
        },
        "Time of a step, s": {
            **{graph: steps[graph]["seconds"]["median"] for graph in growth.GRAPHS},
            **{f"{graph}, processor time": steps[graph]["cpu_seconds"]["median"] for graph in ("vanilla", "fidelity")},
        },
    }


def _over_parameters(axes: Any, millions: Sequence[float], lines: Mapping[str, Sequence[float]]) -> None:
    """One panel, with plain numbers on its axes; processor time is dotted."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for label, values in lines.items():
        colour = next((colour for name, colour in _COLOURS.items() if label.startswith(name)), VERMILION)
        axes.loglog(millions, values, "o:" if "processor" in label else "o-", color=colour, label=label, markersize=4, linewidth=1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.legend()

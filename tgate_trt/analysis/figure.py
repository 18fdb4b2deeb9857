"""The figure of an analysis, drawn from its record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tgate_trt.analysis.convergence import ALL_LAYERS
from tgate_trt.analysis.null_text import TEXT_FIRST, TEXT_LAST
from tgate_trt.analysis.plotting import BLUE, GRAY, GREEN, ORANGE, VERMILION, drawing
from tgate_trt.taps import CROSS_ATTENTION, SELF_ATTENTION

Record = Mapping[str, Any]
"""See `tgate_trt.analysis.record.record_of`."""
Curve = Mapping[str, Sequence[float]]
"""``mean``, and the 95 % interval from ``low`` to ``high``, point by point."""
Panel = Callable[[Any, Record], None]
"""Draws on one pair of axes."""
Draw = Callable[[Any, Mapping[str, Any], str, str], str]
"""Draws one measure of a series of pictures, with a label and a colour, and gives the measure's name."""

_KINDS = {CROSS_ATTENTION: ("cross-attention", BLUE), SELF_ATTENTION: ("self-attention", ORANGE)}
_ORDERS = {TEXT_FIRST: ("$S^F$: text, then null prompt", BLUE), TEXT_LAST: ("$S^L$: null prompt, then text", VERMILION)}
_SIDES = {"down": "-", "mid": "-.", "up": "--"}
"""Line style of a UNet's layers, by the side that they are on."""
_COLUMNS = 12
"""Columns of the grid: a row divides them among its 1 to 4 plots."""
_GATE = "gate"
"""Group id of the lines that mark a gate."""
_RELATIVE = r"$D_t\,/\,\Vert C_t\Vert_2$"


def save(record: Record, path: Path) -> None:
    """Draw the record of an analysis and write the figure, whole or not at all: attention in the first row, pictures in the second.

    Raises:
        UnsupportedError: if matplotlib is not installed.
        InputError: if the file is of another kind than `tgate_trt.analysis.plotting.FORMATS`, or nothing can be written there.
    """
    rows = [row for row in (_attention(record), _pictures(record)) if row]
    width = max(4.2 * max(map(len, rows)), 8.4)
    with drawing(path, width, 3.4 * len(rows) + 1.3) as figure:
        figure.suptitle(_title(record), x=0.008, ha="left", fontsize=11)
        grid = figure.add_gridspec(len(rows), _COLUMNS)
        for number, row in enumerate(rows):
            span = _COLUMNS // len(row)
            for place, (title, panel) in enumerate(row):
                axes = figure.add_subplot(grid[number, place * span : (place + 1) * span])
                axes.set_title(title)
                panel(axes, record)
        gates = [line for line in figure.axes[0].get_lines() if line.get_gid() == _GATE]
        figure.legend(handles=gates, loc="outside lower left", fontsize=9, handlelength=3)


def _attention(record: Record) -> list[tuple[str, Panel]]:
    """Title and content of each plot of attention, if it was measured."""
    if not record["results"]["convergence"]:
        return []
    return [
        ("Change of attention from step to step", partial(_all_layers, measure="absolute", up=r"$D_t=\Vert C_t-C_{t+1}\Vert_2$")),
        ("Relative to attention itself", partial(_all_layers, measure="relative", up=_RELATIVE)),
        ("Cross-attention by layers", _groups),
    ]


def _pictures(record: Record) -> list[tuple[str, Panel]]:
    """Title and content of each plot of pictures, if they were measured: meaning, where it can be read, and distance to vanilla."""
    null_text, gate = record["results"]["null_text"], record["results"]["gate"]
    panels: list[tuple[str, Panel]] = []
    if null_text:
        if null_text[TEXT_FIRST]["accuracy"]:
            panels.append(("Null-text swap: meaning", partial(_null_text, draw=_accuracy)))
        panels.append(("Null-text swap: distance to vanilla", partial(_null_text, draw=_distance)))
    if gate:
        if gate["accuracy"]:
            panels.append(("T-GATE: meaning", partial(_gate, draw=_accuracy)))
        panels.append(("T-GATE: distance to vanilla", partial(_gate, draw=_distance)))
    return panels


def _all_layers(axes: Any, record: Record, measure: str, up: str) -> None:
    for kind, groups in record["results"]["convergence"].items():
        curve = groups[ALL_LAYERS][measure]
        _curve(axes, _from_one(curve["mean"]), curve, *_KINDS[kind])
    _finish(axes, record, "step $t$", up)


def _groups(axes: Any, record: Record) -> None:
    groups: Mapping[str, Any] = record["results"]["convergence"].get(CROSS_ATTENTION, {})
    for name, (colour, line) in _looks([name for name in groups if name != ALL_LAYERS]).items():
        mean = groups[name]["relative"]["mean"]
        axes.plot(_from_one(mean), mean, color=colour, linestyle=line, label=name, linewidth=1.4)
    _finish(axes, record, "step $t$", _RELATIVE, ncols=3, room=True)


def _from_one(values: Sequence[float]) -> range:
    return range(1, len(values) + 1)


def _looks(names: Sequence[str]) -> dict[str, tuple[Any, str]]:
    """Colour and line of each group: a UNet's by resolution and side, others by their order."""
    from matplotlib import colormaps

    split = {name: name.partition(" ")[::2] if name.partition(" ")[0] in _SIDES else ("", name) for name in names}
    hues = list(dict.fromkeys(hue for _, hue in split.values()))
    colours = {hue: colormaps["viridis"](0.88 * index / max(1, len(hues) - 1)) for index, hue in enumerate(hues)}
    return {name: (colours[hue], _SIDES.get(side, "-")) for name, (side, hue) in split.items()}


def _null_text(axes: Any, record: Record, draw: Draw) -> None:
    for order, series in record["results"]["null_text"].items():
        up = draw(axes, series, *_ORDERS[order])
    _finish(axes, record, "$m$, steps", up, room=True)


def _gate(axes: Any, record: Record, draw: Draw) -> None:
    gate = record["results"]["gate"]
    up = draw(axes, gate, "T-GATE", GREEN)
    if draw is _accuracy:
        axes.axhline(gate["accuracy"][-1]["fraction"], color=GRAY, linewidth=0.8, linestyle=(0, (1, 2)), label="vanilla")
    _finish(axes, record, "gate step $g$", up)


def _accuracy(axes: Any, series: Mapping[str, Any], label: str, colour: str) -> str:
    """Draw the share of right pictures, and name it."""
    from matplotlib.ticker import PercentFormatter

    shares = series["accuracy"]
    low, high = zip(*(share["interval"] for share in shares), strict=True)
    _curve(axes, series["at"], {"mean": [share["fraction"] for share in shares], "low": low, "high": high}, label, colour)
    axes.set_ylim(top=1.04)
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return "pictures with every attribute right"


def _distance(axes: Any, series: Mapping[str, Any], label: str, colour: str) -> str:
    """Draw the distance to vanilla, and name it."""
    _curve(axes, series["at"], series["distance"], label, colour)
    return "perceptual distance to vanilla"


def _curve(axes: Any, at: Sequence[int], curve: Curve, label: str, colour: Any) -> None:
    axes.plot(at, curve["mean"], color=colour, label=label, linewidth=1.6, clip_on=False)
    axes.fill_between(at, curve["low"], curve["high"], color=colour, alpha=0.18, linewidth=0)


def _finish(axes: Any, record: Record, across: str, up: str, *, ncols: int = 1, room: bool = False) -> None:
    """Name the axes and the curves, and mark the gates; with ``room``, the names stand above the curves."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.set_xlim(0, record["settings"]["steps"])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_ylim(0, (1.35 if room else 1) * axes.get_ylim()[1])
    handles = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    if len(handles) > 1:
        axes.legend(handles=handles, ncols=ncols, loc="upper left" if room else "best")
    for gate_step, style, label in _gates(record):
        axes.axvline(gate_step, label=label, gid=_GATE, zorder=1.5, **style)


def _gates(record: Record) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Each marked gate: the step, the style of its line, and its label."""
    default, suggestion, levels = (record["results"][name] for name in ("default_gate_step", "suggestion", "noise_levels"))

    def name_of(step: int) -> str:
        at = (levels or [])[step : step + 1]
        return f"g = {step}, $\\sigma$ = {at[0]:.3g}" if at and at[0] is not None else f"g = {step}"

    yield default, {"color": "black", "linewidth": 1.1, "linestyle": "--"}, f"{name_of(default)}: the model's default gate"
    for name, line in (("by_convergence", "-."), ("by_accuracy", ":")):
        answer = suggestion[name]["gate_step"]
        if answer is not None:
            suggested = "suggested, " if suggestion["rule"] == name else ""
            label = f"{name_of(answer)}: {suggested}{suggestion[name]['rule']}".replace("D_t", "$D_t$")
            yield answer, {"color": GRAY, "linewidth": 1.3, "linestyle": line}, label


def _title(record: Record) -> str:
    settings = record["settings"]
    scale = settings["guidance_scale"]
    guidance = "" if scale is None else f", guidance {scale:g}"
    drawn = f"{settings['pictures']} pictures of {settings['steps']} steps, {settings['scheduler']}{guidance}"
    return f"{record['subject']['model']}: {drawn}. Shaded: 95 % intervals over pictures."

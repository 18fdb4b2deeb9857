"""One figure of an analysis. matplotlib is imported when a figure is drawn, and not before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgate_trt.analysis.convergence import ALL_LAYERS, Convergence
from tgate_trt.analysis.intervals import Band
from tgate_trt.analysis.null_text import TEXT_FIRST, TEXT_LAST
from tgate_trt.analysis.outcomes import Series
from tgate_trt.analysis.plotting import check_available
from tgate_trt.analysis.suggestion import ACCURACY_RULE, CONVERGENCE_RULE
from tgate_trt.files import replacing
from tgate_trt.taps import CROSS_ATTENTION, SELF_ATTENTION

if TYPE_CHECKING:
    from tgate_trt.analysis.results import Study

Panel = Callable[[Any, "Study"], None]
"""Draws on one pair of axes."""

# Okabe and Ito's colours, told apart by colour-blind readers too.
_BLUE, _ORANGE, _GREEN, _VERMILION, _GRAY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "0.45"
_KINDS = {CROSS_ATTENTION: ("cross-attention", _BLUE), SELF_ATTENTION: ("self-attention", _ORANGE)}
_ORDERS = {TEXT_FIRST: ("$S^F$: text, then null prompt", _BLUE), TEXT_LAST: ("$S^L$: null prompt, then text", _VERMILION)}
_SIDES = {"down": "-", "mid": "-.", "up": "--"}
"""Line of a UNet's layers, by their side of it."""
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.92",
    "legend.framealpha": 0.85,
    "legend.edgecolor": "white",
    "legend.fontsize": 8,
}
_COLUMNS = 12
"""Of the grid: each row shares them out among its plots, of which there are 1 to 4."""
_GATE = "gate"
"""Marks the lines that stand for a gate."""

_DISTANCE = "perceptual distance to vanilla"
_RIGHT = "pictures with every attribute right"


def save(study: Study, path: Path) -> None:
    """Draw what a study found and write it, whole or not at all: attention in the first row, pictures in the second.

    Raises:
        UnsupportedError: if matplotlib is not installed.
        InputError: if the file is of another kind than `FORMATS`.
        OSError: if the file cannot be written.
    """
    check_available(path)
    import matplotlib
    from matplotlib.figure import Figure

    rows = [row for row in (_attention(study), _pictures(study)) if row]
    width = max(4.2 * max(map(len, rows)), 8.4)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, 3.4 * len(rows) + 1.3), layout="constrained")
        figure.suptitle(_title(study), x=0.008, ha="left", fontsize=11)
        grid = figure.add_gridspec(len(rows), _COLUMNS)
        for number, row in enumerate(rows):
            span = _COLUMNS // len(row)
            for place, (title, panel) in enumerate(row):
                axes = figure.add_subplot(grid[number, place * span : (place + 1) * span])
                axes.set_title(title)
                panel(axes, study)
        gates = [line for line in figure.axes[0].get_lines() if line.get_gid() == _GATE]
        figure.legend(handles=gates, loc="outside lower left", fontsize=9, handlelength=3)
        with replacing(path) as partial:
            figure.savefig(partial, dpi=130, format=path.suffix.removeprefix(".").lower())


def _attention(study: Study) -> list[tuple[str, Panel]]:
    """Title and content of each plot of attention, if it was measured."""
    if not study.curves:
        return []
    return [
        ("Change of attention from step to step", _absolute),
        ("Relative to attention itself", _relative),
        ("Cross-attention by layers", _groups),
    ]


def _pictures(study: Study) -> list[tuple[str, Panel]]:
    """Title and content of each plot of pictures, of what was measured."""
    panels: list[tuple[str, Panel]] = []
    if study.null_text:
        if study.null_text[TEXT_FIRST].accuracy:
            panels.append(("Null-text swap: meaning", _null_text_accuracy))
        panels.append(("Null-text swap: distance to vanilla", _null_text_distance))
    if study.gates:
        if study.gates.accuracy:
            panels.append(("T-GATE: meaning", _gate_accuracy))
        panels.append(("T-GATE: distance to vanilla", _gate_distance))
    return panels


def _absolute(axes: Any, study: Study) -> None:
    for kind, groups in (study.curves or {}).items():
        _curve(axes, range(1, study.steps), groups[ALL_LAYERS].absolute, *_KINDS[kind])
    _finish(axes, study, "step $t$", r"$D_t=\Vert C_t-C_{t+1}\Vert_2$")


def _relative(axes: Any, study: Study) -> None:
    for kind, groups in (study.curves or {}).items():
        _curve(axes, range(1, study.steps), groups[ALL_LAYERS].relative, *_KINDS[kind])
    _finish(axes, study, "step $t$", r"$D_t\,/\,\Vert C_t\Vert_2$")


def _groups(axes: Any, study: Study) -> None:
    groups: Mapping[str, Convergence] = (study.curves or {}).get(CROSS_ATTENTION, {})
    names = [name for name in groups if name != ALL_LAYERS]
    for name, (colour, line) in _looks(names).items():
        axes.plot(range(1, study.steps), groups[name].relative.mean, color=colour, linestyle=line, label=name, linewidth=1.4)
    _finish(axes, study, "step $t$", r"$D_t\,/\,\Vert C_t\Vert_2$", ncols=3, room=True)


def _looks(names: Sequence[str]) -> dict[str, tuple[Any, str]]:
    """Colour and line of each group: a UNet's by resolution and side, others by their order."""
    from matplotlib import colormaps

    split = {name: name.partition(" ")[::2] if name.partition(" ")[0] in _SIDES else ("", name) for name in names}
    hues = list(dict.fromkeys(hue for _, hue in split.values()))
    colours = {hue: colormaps["viridis"](0.88 * index / max(1, len(hues) - 1)) for index, hue in enumerate(hues)}
    return {name: (colours[hue], _SIDES.get(side, "-")) for name, (side, hue) in split.items()}


def _null_text_accuracy(axes: Any, study: Study) -> None:
    for order, series in (study.null_text or {}).items():
        _accuracy(axes, series, *_ORDERS[order])
    _finish(axes, study, "$m$, steps", _RIGHT, room=True)


def _null_text_distance(axes: Any, study: Study) -> None:
    for order, series in (study.null_text or {}).items():
        _curve(axes, series.at, series.distance, *_ORDERS[order])
    _finish(axes, study, "$m$, steps", _DISTANCE, room=True)


def _gate_accuracy(axes: Any, study: Study) -> None:
    assert study.gates is not None
    _accuracy(axes, study.gates, "T-GATE", _GREEN)
    assert study.gates.accuracy is not None
    axes.axhline(study.gates.accuracy[-1].fraction, color=_GRAY, linewidth=0.8, linestyle=(0, (1, 2)), label="vanilla")
    _finish(axes, study, "gate step $g$", _RIGHT)


def _gate_distance(axes: Any, study: Study) -> None:
    assert study.gates is not None
    _curve(axes, study.gates.at, study.gates.distance, "T-GATE", _GREEN)
    _finish(axes, study, "gate step $g$", _DISTANCE)


def _accuracy(axes: Any, series: Series, label: str, colour: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    shares = series.accuracy or ()
    mean, (low, high) = [share.fraction for share in shares], zip(*(share.interval for share in shares), strict=True)
    _curve(axes, series.at, Band(tuple(mean), low, high), label, colour)
    axes.set_ylim(top=1.04)
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _curve(axes: Any, at: Sequence[int], values: Band, label: str, colour: Any) -> None:
    axes.plot(at, values.mean, color=colour, label=label, linewidth=1.6, clip_on=False)
    axes.fill_between(at, values.low, values.high, color=colour, alpha=0.18, linewidth=0)


def _finish(axes: Any, study: Study, across: str, up: str, *, ncols: int = 1, room: bool = False) -> None:
    """Name the axes and the curves, and mark the gates; with ``room``, the names stand above the curves."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.set_xlim(0, study.steps)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_ylim(0, (1.35 if room else 1) * axes.get_ylim()[1])
    handles = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    if len(handles) > 1:
        axes.legend(handles=handles, ncols=ncols, loc="upper left" if room else "best")
    for gate_step, style, label in _gates(study):
        axes.axvline(gate_step, label=label, gid=_GATE, zorder=1.5, **style)


def _gates(study: Study) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Each gate that is marked: the step, its line, and what it is."""
    yield (
        study.own_gate_step,
        {"color": "black", "linewidth": 1.1, "linestyle": "--"},
        f"g = {study.own_gate_step}: the model's default gate",
    )
    suggestion = study.suggestion
    answers = (
        ("by_convergence", suggestion.by_convergence, CONVERGENCE_RULE, "-."),
        ("by_accuracy", suggestion.by_accuracy, ACCURACY_RULE, ":"),
    )
    for name, answer, rule, line in answers:
        if answer is not None:
            suggested = "suggested, " if suggestion.rule == name else ""
            yield answer, {"color": _GRAY, "linewidth": 1.3, "linestyle": line}, f"g = {answer}: {suggested}{rule}".replace("D_t", "$D_t$")


def _title(study: Study) -> str:
    settings = study.settings
    scale = settings["guidance_scale"]
    guidance = "" if scale is None else f", guidance {scale:g}"
    drawn = f"{settings['pictures']} pictures of {study.steps} steps, {settings['scheduler']}{guidance}"
    return f"{study.name}: {drawn}. Shaded: 95 % intervals over pictures."

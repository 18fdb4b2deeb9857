"""One figure of an analysis. matplotlib is imported when a figure is drawn, and not before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgate_trt.analysis.convergence import Convergence
from tgate_trt.analysis.intervals import Band
from tgate_trt.analysis.null_text import TEXT_FIRST, TEXT_LAST
from tgate_trt.analysis.outcomes import Series
from tgate_trt.analysis.suggestion import ACCURACY_RULE, CONVERGENCE_RULE
from tgate_trt.bundle import replacing
from tgate_trt.errors import InputError, UnsupportedError
from tgate_trt.taps import CROSS_ATTENTION, SELF_ATTENTION

if TYPE_CHECKING:
    from tgate_trt.analysis.study import Study

Panel = Callable[[Any, "Study"], None]
"""Draws on one pair of axes."""

# Okabe and Ito's colours, told apart by colour-blind readers too.
_BLUE, _ORANGE, _GREEN, _VERMILION, _GRAY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "0.45"
_KINDS = {CROSS_ATTENTION: ("cross-attention", _BLUE), SELF_ATTENTION: ("self-attention", _ORANGE)}
_ORDERS = {
    TEXT_FIRST: (r"$S^F$: text in the first $m$ steps, null prompt after", _BLUE),
    TEXT_LAST: (r"$S^L$: null prompt in the first $m$ steps, text after", _VERMILION),
}
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.92",
    "legend.frameon": False,
    "legend.fontsize": 8,
}
_DISTANCE = "perceptual distance to vanilla"
_RIGHT = "pictures with every attribute right"


FORMATS = (".png", ".svg", ".pdf")


def check_available(path: Path | None = None) -> None:
    """See that figures can be drawn here, and written to a file if one is named.

    Raises:
        UnsupportedError: if matplotlib is not installed.
        InputError: if the file is of another kind than `FORMATS`.
    """
    if path is not None and path.suffix.lower() not in FORMATS:
        raise InputError(f"a figure is a file of {', '.join(FORMATS)}; got {path}")
    try:
        import matplotlib.figure  # noqa: F401 - whether it can be imported is the question
    except ImportError:
        raise UnsupportedError('a figure takes matplotlib, which is not installed; pip install "tgate-trt[bench]"') from None


def save(study: Study, path: Path) -> None:
    """Draw what a study found and write it, whole or not at all.

    Raises:
        UnsupportedError: if matplotlib is not installed.
        InputError: if the file is of another kind than `FORMATS`.
        OSError: if the file cannot be written.
    """
    check_available(path)
    import matplotlib
    from matplotlib.figure import Figure

    panels = _panels(study)
    columns = min(3, len(panels)) if len(panels) != 4 else 2
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.9 * columns, 3.5 * rows + 0.9), layout="constrained")
        figure.suptitle(_title(study), x=0.01, ha="left", fontsize=11)
        for index, (title, panel) in enumerate(panels):
            axes = figure.add_subplot(rows, columns, index + 1)
            axes.set_title(title)
            panel(axes, study)
        figure.supxlabel(_foot(study), x=0.01, ha="left", fontsize=8, color=_GRAY)
        with replacing(path) as partial:
            figure.savefig(partial, dpi=130, format=path.suffix.removeprefix(".").lower())


def _panels(study: Study) -> list[tuple[str, Panel]]:
    """Title and content of each plot, of what was measured."""
    panels: list[tuple[str, Panel]] = []
    if study.curves:
        panels.append(("Change of attention from step to step", _absolute))
        panels.append(("The same, relative to attention itself", _relative))
        panels.append(("Cross-attention by layers", _groups))
    if study.null_text:
        if study.null_text[TEXT_FIRST].accuracy:
            panels.append(("Null-text swap: meaning", _null_text_accuracy))
        panels.append(("Null-text swap: difference to vanilla", _null_text_distance))
    if study.gates:
        if study.gates.accuracy:
            panels.append(("T-GATE: meaning against the gate", _gate_accuracy))
        panels.append(("T-GATE: difference to vanilla against the gate", _gate_distance))
    return panels


def _absolute(axes: Any, study: Study) -> None:
    for kind, groups in (study.curves or {}).items():
        _curve(axes, range(1, study.steps), groups["all layers"].absolute, *_KINDS[kind])
    _finish(axes, study, "step $t$", r"$D_t=\Vert C_t-C_{t+1}\Vert_2$")


def _relative(axes: Any, study: Study) -> None:
    for kind, groups in (study.curves or {}).items():
        _curve(axes, range(1, study.steps), groups["all layers"].relative, *_KINDS[kind])
    _finish(axes, study, "step $t$", r"$D_t\,/\,\Vert C_t\Vert_2$")


def _groups(axes: Any, study: Study) -> None:
    from matplotlib import colormaps

    groups: Mapping[str, Convergence] = (study.curves or {}).get(CROSS_ATTENTION, {})
    names = [name for name in groups if name != "all layers"]
    for index, name in enumerate(names):
        colour = colormaps["viridis"](0.92 * index / max(1, len(names) - 1))
        _curve(axes, range(1, study.steps), groups[name].relative, name, colour, shaded=False)
    _finish(axes, study, "step $t$", r"$D_t\,/\,\Vert C_t\Vert_2$", columns=2)


def _null_text_accuracy(axes: Any, study: Study) -> None:
    for order, series in (study.null_text or {}).items():
        _accuracy(axes, series, *_ORDERS[order])
    _finish(axes, study, "$m$, steps", _RIGHT)


def _null_text_distance(axes: Any, study: Study) -> None:
    for order, series in (study.null_text or {}).items():
        _curve(axes, series.at, series.distance, *_ORDERS[order])
    _finish(axes, study, "$m$, steps", _DISTANCE)


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
    axes.set_ylim(-0.02, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _curve(axes: Any, at: Sequence[int], values: Band, label: str, colour: Any, *, shaded: bool = True) -> None:
    axes.plot(at, values.mean, color=colour, label=label, linewidth=1.6)
    if shaded:
        axes.fill_between(at, values.low, values.high, color=colour, alpha=0.18, linewidth=0)


def _finish(axes: Any, study: Study, across: str, up: str, *, columns: int = 1) -> None:
    """Mark the gates, and name the axes."""
    from matplotlib.ticker import MaxNLocator

    axes.axvline(study.own_gate_step, color="black", linewidth=1.0, linestyle="--", label=f"default gate, {study.own_gate_step}")
    suggested = study.suggestion.gate_step
    if suggested is not None:
        axes.axvline(suggested, color="black", linewidth=1.0, linestyle=":", label=f"suggested gate, {suggested}")
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.set_xlim(0, study.steps)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if axes.get_ylim()[0] > -0.02:
        axes.set_ylim(bottom=0)
    axes.legend(ncols=columns)


def _title(study: Study) -> str:
    settings = study.settings
    scale = settings["guidance_scale"]
    guidance = "" if scale is None else f", guidance {scale:g}"
    return f"{study.name}: {settings['pictures']} pictures of {study.steps} steps, {settings['scheduler']}{guidance}"


def _foot(study: Study) -> str:
    """The rules with their answers, and what is shaded."""
    lines = []
    for answer, rule in ((study.suggestion.by_convergence, CONVERGENCE_RULE), (study.suggestion.by_accuracy, ACCURACY_RULE)):
        if answer is not None:
            chosen = ", the suggestion" if rule is _rule_of(study) else ""
            lines.append(f"g = {answer}{chosen}: the smallest where {rule}")
    lines.append("Shaded: 95 % intervals over pictures. C: what enters an attention module's output projection.")
    return "\n".join(lines)


def _rule_of(study: Study) -> str:
    return ACCURACY_RULE if study.suggestion.rule == "by_accuracy" else CONVERGENCE_RULE

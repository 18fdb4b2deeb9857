"""What every figure shares: formats, colours, style, and how a figure is written. matplotlib is imported when one is drawn."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgate_trt.analysis.record import writing
from tgate_trt.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
"""Suffixes of the files that a figure can be written to."""

BLUE, ORANGE, GREEN, VERMILION, PURPLE, GRAY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "0.45"
"""The colours of Okabe and Ito, which colour-blind readers can distinguish, and a gray."""

_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.prop_cycle": f"cycler(color={[BLUE, ORANGE, GREEN, VERMILION, PURPLE]})",
    "axes.grid": True,
    "grid.color": "0.92",
    "legend.framealpha": 0.85,
    "legend.edgecolor": "white",
    "legend.fontsize": 8,
    "savefig.dpi": 130,
}


def check_available(path: Path | None = None) -> None:
    """Check that figures can be drawn here, and be written to a file if one is given.

    Raises:
        UnsupportedError: if matplotlib is not installed.
        InputError: if the file's suffix is none of `FORMATS`.
    """
    if path is not None and path.suffix.lower() not in FORMATS:
        raise InputError(f"a figure is a file of {', '.join(FORMATS)}; got {path}")
    try:
        import matplotlib.figure  # noqa: F401 - whether it can be imported is the question
    except ImportError:
        raise UnsupportedError('figures need matplotlib, which is not installed; pip install "tgate-trt[bench]"') from None


@contextlib.contextmanager
def drawing(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure to draw on, which is written when the block ends well, whole or not at all.

    Args:
        path: file of the figure.
        width: inches.
        height: inches.

    Raises:
        UnsupportedError: if matplotlib is not installed.
        InputError: if the file's suffix is none of `FORMATS`, or nothing can be written there.
    """
    check_available(path)
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        with writing(path) as partial:
            figure.savefig(partial, format=path.suffix.removeprefix(".").lower())

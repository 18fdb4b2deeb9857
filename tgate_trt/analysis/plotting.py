"""What every figure needs."""

from __future__ import annotations

from pathlib import Path

from tgate_trt.errors import InputError, UnsupportedError

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

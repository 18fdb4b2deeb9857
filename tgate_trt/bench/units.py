"""Quantities as people read them."""

from __future__ import annotations


def seconds(value: float) -> str:
    """Three digits or so, in the unit that suits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            scaled = value / size
            return f"{scaled:.{max(0, 3 - len(str(int(scaled))))}f} {unit}"
    return f"{value / 1e-6:.0f} µs"


def gigabytes(held: int) -> str:
    """Of 10⁹ bytes."""
    return f"{held / 1e9:,.2f} GB"

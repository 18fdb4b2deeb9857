"""Curves of means over pictures, with their intervals."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from tgate_trt.analysis.metrics import Estimate, mean_estimate


@dataclass(frozen=True)
class Band:
    """A curve with the 95 % interval of each point."""

    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """The three curves."""
        return {name: list(curve) for name, curve in asdict(self).items()}


def band(values: Tensor) -> Band:
    """The mean over pictures with its interval, see `tgate_trt.analysis.metrics.mean_estimate`; the value itself for one picture.

    Args:
        values: ``[points, pictures]``.
    """
    estimates = [mean_estimate(point) if len(point) > 1 else Estimate(*3 * (float(point),)) for point in values]
    return Band(*(tuple(getattr(each, name) for each in estimates) for name in ("value", "low", "high")))

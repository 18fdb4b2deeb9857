"""Samples that were taken in rounds, summed up and set against a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """Median, 10th and 90th percentile of samples, and the samples, one a round."""
    low, median, high = (float(value) for value in numpy.percentile(samples, (10, 50, 90)))
    return {"median": median, "p10": low, "p90": high, "samples": list(samples)}


def ratios(samples: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """The spread of the ratio to the baseline's sample of the same round.

    Machines speed up and slow down over minutes: a ratio within a round sees less of that than one of medians.
    """
    return spread([own / other for own, other in zip(samples, baseline, strict=True)])

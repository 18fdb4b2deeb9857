"""Samples that were taken in rounds, summed up and set against a baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """Median, 10th and 90th percentile of samples, and the samples, one a round."""
    low, median, high = (float(value) for value in numpy.percentile(samples, (10, 50, 90)))
    return {"median": median, "p10": low, "p90": high, "samples": list(samples)}


def against(samples: Mapping[str, Sequence[float]], baseline: str) -> dict[str, dict[str, Any]]:
    """The spread of each row, with that of its ratio to the baseline's sample of the same round.

    Machines speed up and slow down over minutes: a ratio within a round sees less of that than one of medians.
    """
    base = samples[baseline]
    return {
        name: {"seconds": spread(row), "ratio": spread([own / other for own, other in zip(row, base, strict=True)])}
        for name, row in samples.items()
    }

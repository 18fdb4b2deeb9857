"""Samples in rounds: how they are taken, summarised, and compared with a baseline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy


def in_rounds(ways: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Take a sample of every way in each round, forwards and backwards in turn, so that a drift of the machine meets all alike.

    Args:
        ways: by name, a function that gives one sample.
        rounds: number of rounds.
    """
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in ways if number % 2 == 0 else reversed(list(ways)):
            samples[name].append(ways[name]())
    return samples


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """Median, 10th and 90th percentile of samples, and the samples."""
    low, median, high = (float(value) for value in numpy.percentile(samples, (10, 50, 90)))
    return {"median": median, "p10": low, "p90": high, "samples": list(samples)}


def ratios(samples: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """The spread of the ratio to the baseline's sample of the same round.

    Machines speed up and slow down over minutes, which affects a ratio within a round less than a ratio of medians.
    """
    return spread([own / other for own, other in zip(samples, baseline, strict=True)])

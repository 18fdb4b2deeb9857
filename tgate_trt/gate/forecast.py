"""Forecast a denoiser's prediction from earlier ones: each rule is a weighted sum of them. Pure arithmetic, without PyTorch.

Time is the scheduler's: the timesteps at which the denoiser was called. The published relatives are TaylorSeer (arXiv 2503.06923),
whose orders ``repeat``, ``linear`` and ``quadratic`` are, and Spectrum, which fits Chebyshev polynomials to a window by ridge regression.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy

RULES: Mapping[str, int] = {"repeat": 1, "linear": 2, "quadratic": 3, "chebyshev": 6}
"""The rules, and how many of the last predictions each reads; with fewer it reads what there is."""

_DEGREE = 3
"""Highest Chebyshev polynomial of the fit."""
_RIDGE = 1e-2
"""Penalty on all of its coefficients but the constant one, so that the weights have the sum 1."""


def weights(rule: str, times: Sequence[float], time: float) -> tuple[float, ...]:
    """The weight of each earlier prediction; their sum is 1.

    Args:
        rule: of `RULES`.
        times: of the predictions, the oldest first, all different; at least one.
        time: of the forecast.

    Returns:
        One for each of ``times``, 0 for those that the rule does not read.
    """
    read = min(RULES[rule], len(times))
    window = numpy.asarray(times[-read:], dtype=numpy.float64)
    found = _ridge(window, time) if rule == "chebyshev" and read > 2 else _lagrange(window, time)
    return (*(0.0 for _ in range(len(times) - read)), *(float(weight) for weight in found))


def _lagrange(window: numpy.ndarray, time: float) -> list[float]:
    """Weights of the polynomial through all of the window."""
    others = [numpy.delete(window, index) for index in range(len(window))]
    return [float(numpy.prod((time - rest) / (own - rest))) for own, rest in zip(window, others, strict=True)]


def _ridge(window: numpy.ndarray, time: float) -> numpy.ndarray:
    """Weights of a ridge regression on Chebyshev polynomials over the window and the time of the forecast, scaled to -1…1."""
    lowest, highest = min(window.min(), time), max(window.max(), time)

    def basis(at: numpy.ndarray) -> numpy.ndarray:
        scaled = 2 * (at - lowest) / (highest - lowest) - 1
        return numpy.polynomial.chebyshev.chebvander(scaled, min(_DEGREE, len(window) - 1))

    matrix = basis(window)
    penalty = _RIDGE * numpy.eye(matrix.shape[1])
    penalty[0, 0] = 0
    solved: numpy.ndarray = basis(numpy.asarray([time]))[0] @ numpy.linalg.solve(matrix.T @ matrix + penalty, matrix.T)
    return solved

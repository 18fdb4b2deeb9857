"""Two rules that suggest a gate, as a step and as the noise level at that step.

1. *By convergence*: the smallest g at which the relative D_t of cross-attention, averaged over three steps, has fallen to
   half of its highest value so far. D_g is the first change that a gate at g omits. This is a rule of thumb that uses no
   pictures.
2. *By accuracy*, if a scorer can read the pictures: the smallest g such that neither g nor a later gate step draws significantly
   fewer correct pictures than vanilla, by the exact one-sided sign test at 5 % on the pictures that are correct in only one of the
   two (McNemar, 1947). It needs at least 20 pictures, because few pictures show no difference; five lost and none won are significant.

The second rule makes the suggestion if it has an answer, because it measures pictures; otherwise the first rule does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tgate_trt.analysis.outcomes import Outcome, Series
from tgate_trt.gate.schedule import rounded_up

FRACTION = 0.5
SMOOTHING = 3
"""Number of steps in a mean, odd."""
SIGNIFICANCE = 0.05
LEAST_PICTURES = 20

CONVERGENCE_RULE = (
    f"the smallest g where the relative D_t of cross-attention, mean of {SMOOTHING} steps, "
    f"has fallen to {FRACTION:g} of its highest value so far"
)
ACCURACY_RULE = f"the smallest g from which on accuracy is not significantly below vanilla's (one-sided sign test, {SIGNIFICANCE:.0%})"
"""The rules as the command, the figure and the file of results state them."""


@dataclass(frozen=True)
class Difference:
    """The pictures that are correct with only one of vanilla and a gate."""

    lost: int
    """Number of pictures that are correct in vanilla alone."""
    won: int
    """Number of pictures that are correct with the gate alone."""

    @property
    def p(self) -> float:
        """Probability of at most so many won pictures if the gate made no difference."""
        pairs = self.lost + self.won
        return float(sum(math.comb(pairs, count) for count in range(self.won + 1)) / 2**pairs)

    @property
    def is_significant(self) -> bool:
        """Whether the gate lowers accuracy significantly."""
        return self.p < SIGNIFICANCE


@dataclass(frozen=True)
class Suggestion:
    """The answers of both rules; None if the data of a rule were not measured."""

    by_convergence: int | None = None
    by_accuracy: int | None = None
    differences: tuple[Difference, ...] = field(default=(), repr=False)
    """The difference of every gate step, from 1."""

    @property
    def gate_step(self) -> int | None:
        """The suggested gate step."""
        return self.by_convergence if self.by_accuracy is None else self.by_accuracy

    @property
    def rule(self) -> str | None:
        """The rule that made the suggestion."""
        if self.gate_step is None:
            return None
        return "by_convergence" if self.by_accuracy is None else "by_accuracy"

    def to_json(self, levels: Sequence[float] | None = None) -> dict[str, Any]:
        """Both answers with their rules, and the counts of the test.

        Args:
            levels: the noise level at the beginning of each step, by which each answer is given as a noise level too.
        """

        def gate(step: int | None) -> dict[str, Any]:
            at = [] if step is None or levels is None else levels[step : step + 1]
            return {"gate_step": step, "noise": rounded_up(at[0]) if at else None}

        return {
            **gate(self.gate_step),
            "rule": self.rule,
            "by_convergence": {**gate(self.by_convergence), "rule": CONVERGENCE_RULE},
            "by_accuracy": {
                **gate(self.by_accuracy),
                "rule": ACCURACY_RULE,
                "lost": [each.lost for each in self.differences],
                "won": [each.won for each in self.differences],
                "p": [each.p for each in self.differences],
            },
        }


def suggest(relative: Sequence[float] | None, gates: Series | None) -> Suggestion:
    """Apply both rules to the measurements.

    Args:
        relative: ``D_t / ‖C_t‖`` of cross-attention, from step 1.
        gates: outcomes of every gate step from 1 to T, the last of which is vanilla.
    """
    differences = () if gates is None else differences_of(gates.outcomes)
    return Suggestion(
        None if not relative else by_convergence(relative),
        by_accuracy(differences) if gates is not None and differences and len(gates.outcomes[-1].distance) >= LEAST_PICTURES else None,
        differences,
    )


def by_convergence(relative: Sequence[float]) -> int:
    """The first rule; T if the curve never falls so far.

    Args:
        relative: ``D_t / ‖C_t‖``, T - 1 values.
    """
    highest = 0.0
    for gate_step, value in enumerate(smoothed(relative), start=1):
        highest = max(highest, value)
        if value <= FRACTION * highest:
            return gate_step
    return len(relative) + 1


def by_accuracy(differences: Sequence[Difference]) -> int:
    """The second rule.

    Args:
        differences: the difference of every gate step from 1 to T; that of T is none.
    """
    costly = [gate_step for gate_step, each in enumerate(differences, start=1) if each.is_significant]
    return max(costly, default=0) + 1


def differences_of(outcomes: Sequence[Outcome]) -> tuple[Difference, ...]:
    """The differences to the last outcome, which is vanilla; empty if no scorer can read the pictures."""
    vanilla = outcomes[-1].correct
    if vanilla is None:
        return ()
    differences = []
    for outcome in outcomes:
        pairs = list(zip(vanilla, outcome.correct or (), strict=True))
        differences.append(Difference(pairs.count((True, False)), pairs.count((False, True))))
    return tuple(differences)


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of each value and its neighbours; the first and the last value have fewer neighbours."""
    reach = SMOOTHING // 2
    windows = [values[max(0, index - reach) : index + reach + 1] for index in range(len(values))]
    return [sum(window) / len(window) for window in windows]

"""Earlier predictions of a run, from which others are forecast."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from tgate_trt.errors import GateError
from tgate_trt.gate.forecast import RULES, weights


class History:
    """The last predictions of one phase, each with its time."""

    def __init__(self, rule: str) -> None:
        """Begin without any.

        Args:
            rule: of `tgate_trt.gate.forecast.RULES`.
        """
        self._rule = rule
        self._phase: Hashable = None
        self._entries: list[tuple[float, Tensor]] = []

    def add(self, phase: Hashable, time: float, prediction: Tensor) -> None:
        """Keep a copy of a prediction; of those at one time the last, and none of another phase."""
        if phase != self._phase:
            self._phase, self._entries = phase, []
        self._entries = [entry for entry in self._entries if entry[0] != time][-RULES[self._rule] + 1 :] if RULES[self._rule] > 1 else []
        self._entries.append((time, prediction.clone()))

    def forecast(self, phase: Hashable, time: float) -> Tensor:
        """The prediction at a time: a weighted sum of those of this phase.

        Raises:
            GateError: if there is none.
        """
        if phase != self._phase or not self._entries:
            raise GateError("there is no prediction to forecast from, because the step before was not carried out; start a new run")
        (first, *others) = zip(weights(self._rule, [at for at, _ in self._entries], time), self._entries, strict=True)
        total = first[1][1] * first[0]
        for weight, (_, prediction) in others:
            torch.add(total, prediction, alpha=weight, out=total)
        return total

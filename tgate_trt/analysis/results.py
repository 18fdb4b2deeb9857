"""The results of an analysis, as they are written to JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tgate_trt.analysis.convergence import Convergence
from tgate_trt.analysis.outcomes import DISTANCE, Series
from tgate_trt.analysis.suggestion import Suggestion

SCHEMA = 1
"""Version of the results' form."""


@dataclass(frozen=True)
class Study:
    """What was found out about one model; None is what was not asked for."""

    subject: Mapping[str, Any]
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    steps: int
    own_gate_step: int
    """Where the bundle's gate stands by default."""
    curves: Mapping[str, Mapping[str, Convergence]] | None
    """By kind of attention and group of layers."""
    null_text: Mapping[str, Series] | None
    """By order."""
    gates: Series | None
    suggestion: Suggestion

    @property
    def name(self) -> str:
        """Of the model."""
        name: str = self.subject["model"]
        return name

    def to_json(self) -> dict[str, Any]:
        """Everything, for a file of results."""
        return {
            "schema": SCHEMA,
            "what": "analysis",
            **self.environment,
            "subject": dict(self.subject),
            "settings": dict(self.settings),
            "definitions": {
                "convergence": "D_t = ‖C_t − C_{t+1}‖₂ for t = 1 … T − 1; absolute, and relative to ‖C_t‖₂",
                "text first": "text in the first m steps, the null prompt after; m in 'at'",
                "text last": "the null prompt in the first m steps, text after; m in 'at'",
                "gate": "planning steps g in 'at'",
                "distance": DISTANCE,
                "accuracy": "share of pictures that show every attribute of their caption, with Wilson's 95 % interval",
                "low, high": "95 % interval of the mean over pictures",
            },
            "suggestion": self.suggestion.to_json(),
            "convergence": self.curves and {kind: {n: c.to_json() for n, c in groups.items()} for kind, groups in self.curves.items()},
            "null_text": self.null_text and {order: series.to_json() for order, series in self.null_text.items()},
            "gate": self.gates and self.gates.to_json(),
        }

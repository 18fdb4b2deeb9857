"""Pictures against the gate step: what T-GATE costs at each g, drawn by the bundle's own engines."""

from __future__ import annotations

from collections.abc import Callable

from tgate_trt.analysis.outcomes import Outcome, Series
from tgate_trt.analysis.subject import Subject


def measure(subject: Subject, progress: Callable[[], None]) -> Series:
    """Draw with the gate after every number of steps; ``g = T`` is vanilla.

    Args:
        subject: with its engines.
        progress: called after each gate step.
    """
    gate_steps = tuple(range(1, subject.steps + 1))

    def outcome(gate_step: int) -> Outcome:
        found = subject.compare(subject.draw(gate_step))
        progress()
        return found

    return Series(gate_steps, tuple(outcome(gate_step) for gate_step in gate_steps))

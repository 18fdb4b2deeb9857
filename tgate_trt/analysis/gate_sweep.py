"""Pictures against the gate step: the cost of T-GATE at each g, drawn by the bundle's engines."""

from __future__ import annotations

from collections.abc import Callable

from tgate_trt.analysis.outcomes import Outcome, Series
from tgate_trt.analysis.subject import Subject


def measure(subject: Subject, progress: Callable[[], None]) -> Series:
    """Draw all pictures with every gate step from 1 to T; ``g = T`` is vanilla.

    Args:
        subject: the subject, with its engines.
        progress: called after each gate step.
    """
    gate_steps = tuple(range(1, subject.steps + 1))

    def outcome(gate_step: int) -> Outcome:
        found = subject.compare(subject.draw(gate_step))
        progress()
        return found

    return Series(gate_steps, tuple(outcome(gate_step) for gate_step in gate_steps))

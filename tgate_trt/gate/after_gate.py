"""Modes of a guided run from the gate on, as data, one line each. Each runs one row an image.

The last guided step has two predictions, the negative's ``n`` and the positive's ``p``, and two of every cache.

- ``negative`` is T-GATE (arXiv 2404.02747): the caches' mean, the negative half's conditions, and guidance ends.
- ``positive`` keeps the positive half: its own caches and its own conditions, and guidance ends (Adaptive Guidance,
  arXiv 2312.12487; Step AG, arXiv 2506.08351).
- ``positive-mean`` is ``positive`` with the caches' mean: the official code's way for image to video (``SVD.py`` of ``tgate``).
- ``fading`` is ``positive`` with guidance that fades out instead of ending: it keeps the difference ``p − n`` of the last
  guided step, and the pipeline's scale acts on that, with a weight that falls step by step (FasterCache, arXiv 2410.19355,
  keeps such a difference too).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tgate_trt.errors import InputError
from tgate_trt.gate.schedule import GateSchedule


@dataclass(frozen=True)
class AfterGate:
    """Which of the two guidance halves a mode keeps, and how."""

    half: int
    """Index in the guidance batch, ``[negative, positive]``, of the conditions that are kept."""
    averages: bool
    """Whether a cache is the mean of both halves; else it is the kept half's own."""
    fades: bool = False
    """Whether guidance continues along the direction of the last guided step."""

    def weight(self, schedule: GateSchedule, call: int) -> float:
        """Weight of the kept direction at a call of step i after the gate: ``((T − i) / (T − g + 1))³``, which is 1 at step g − 1.

        On the demo model, for gates up to 10 of 25, the true ``p − n`` falls about as the cube along the kept one. Slower fades draw
        as well at guidance 2, and worse than no fade at guidance 5 with the gate at 5, where the true direction has turned furthest.
        """
        remaining = (schedule.steps - schedule.step(call)) / (schedule.steps - schedule.gate_step + 1)
        return remaining**3


DEFAULT_AFTER_GATE = "negative"

AFTER_GATE: Mapping[str, AfterGate] = {
    "negative": AfterGate(half=0, averages=True),
    "positive": AfterGate(half=1, averages=False),
    "positive-mean": AfterGate(half=1, averages=True),
    "fading": AfterGate(half=1, averages=False, fades=True),
}
"""Every mode, by the name that `tgate_trt.load` and the commands take."""


def after_gate_of(name: str) -> AfterGate:
    """A mode by its name.

    Raises:
        InputError: if there is no mode of that name.
    """
    if name not in AFTER_GATE:
        raise InputError(f"after_gate must be one of {', '.join(AFTER_GATE)}; got {name!r}")
    return AFTER_GATE[name]

"""Room for pictures that are drawn and for those that wait, in one process or in several."""

from __future__ import annotations

from dataclasses import dataclass

from tgate_trt.engines.batching import running_mean
from tgate_trt.errors import BusyError

_WEIGHT = 0.2
"""Of the newest picture in the mean of their times."""


@dataclass
class Places:
    """Places for pictures that are drawn and for those that wait, with how long a picture usually takes."""

    running: int
    """Pictures that are drawn at a time."""
    queue: int
    """Pictures that may wait beside them."""
    seconds: float | None = None
    """Usual seconds of a picture; None before the first."""

    def took(self, seconds: float) -> None:
        """Note how long a picture took."""
        self.seconds = running_mean(self.seconds, seconds, _WEIGHT)

    def refuse_without_room(self, count: int, drawn: int, waiting: int) -> None:
        """Refuse pictures for which there is no place.

        Args:
            count: of pictures that are asked for.
            drawn: pictures that are drawn now.
            waiting: pictures that wait.

        Raises:
            BusyError: with how many there is room for, and when to try again.
        """
        room = self.running + self.queue - drawn - waiting
        if count > room:
            raise BusyError(
                f"{drawn} pictures are drawn and {waiting} wait, so there is room for {max(room, 0)} more; try again later",
                retry_after=(self.seconds or 0.0) * (waiting + 1) / self.running,
            )

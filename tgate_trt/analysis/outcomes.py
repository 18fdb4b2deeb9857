"""Outcomes of drawing: the distance of pictures to vanilla ones, and whether they match their captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tgate_trt.analysis.intervals import Band, band
from tgate_trt.analysis.metrics import perceptual_distance
from tgate_trt.demo.dataset import Captioned
from tgate_trt.demo.evaluate import Proportion
from tgate_trt.demo.scorer import read

DISTANCE = "normalized Laplacian pyramid distance to vanilla: no unit, 0 for equal pictures"
"""Description of `Outcome.distance` in results."""

_AT_ONCE = 16
"""Pictures that are converted to floating point together."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of drawing a subject's pictures in one way."""

    distance: Tensor
    """Distance of each picture, ``[pictures]``, float64; see `DISTANCE`."""
    correct: tuple[bool, ...] | None
    """Whether each picture shows every attribute that its caption names; None if no scorer can read it."""


@dataclass(frozen=True)
class Series:
    """Outcomes against a number of steps."""

    at: tuple[int, ...]
    outcomes: tuple[Outcome, ...]

    @property
    def distance(self) -> Band:
        """The mean over pictures, with its 95 % interval."""
        return band(torch.stack([outcome.distance for outcome in self.outcomes]))

    @property
    def accuracy(self) -> tuple[Proportion, ...] | None:
        """The share of correct pictures at each number of steps; None if no scorer can read them."""
        correct = [outcome.correct for outcome in self.outcomes if outcome.correct is not None]
        return tuple(Proportion(sum(each), len(each)) for each in correct) or None

    def to_json(self) -> dict[str, Any]:
        """The curves, for a file of results."""
        accuracy = None if self.accuracy is None else [share.to_json() for share in self.accuracy]
        return {"at": list(self.at), "distance": self.distance.to_json(), "accuracy": accuracy}


def compare(pictures: Tensor, vanilla: Tensor, captioned: Sequence[Captioned] | None) -> Outcome:
    """Compare pictures with vanilla ones, and with their captions if a scorer can read them.

    Args:
        pictures: ``[pictures, 3, height, width]``, uint8.
        vanilla: pictures of the same prompts from the same noise, in the same form.
        captioned: what each picture of the demo model must show, or None.
    """
    pairs = zip(torch.split(pictures, _AT_ONCE), torch.split(vanilla, _AT_ONCE), strict=True)
    distance = torch.cat([perceptual_distance(some.float() / 255, others.float() / 255) for some, others in pairs])
    if captioned is None:
        return Outcome(distance, None)
    read_back = (read(picture.permute(1, 2, 0).numpy()) for picture in pictures)
    return Outcome(distance, tuple(found.matches(each.combination) for found, each in zip(read_back, captioned, strict=True)))

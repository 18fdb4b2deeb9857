"""Reads the attributes of a picture by program, so that a picture's meaning is measured and not judged by eye.

1. The background's colour is the median of the border.
2. The shape's colour is the median of the pixels that differ from the background the most.
3. Each pixel's coverage is where it lies on the line from the one colour to the other.
4. Position and size are the coverage's centre of mass and its sum.
5. The shape is the one whose drawing, there and of that area, overlaps the coverage the most.

What cannot be told (no shape, a colour far from every known one, a form that fits none) reads as None and so counts as wrong.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from tgate_trt.demo.dataset import (
    ATTRIBUTES,
    BACKGROUND_COLOURS,
    OBJECT_COLOURS,
    PICTURE_SIZE,
    POSITIONS,
    SHAPES,
    SIZES,
    Combination,
    Floats,
    coverage,
)

COLOUR_TOLERANCE = 60.0
"""The farthest, in sRGB units of 0…255, that a colour may lie from the one it is read as."""

LEAST_CONTRAST = 40.0
"""The least sRGB distance from the background of a pixel that belongs to a shape."""

LEAST_AREA = 30.0
"""The fewest pixels that make a shape; the smallest drawn shape covers about 150."""

LEAST_OVERLAP = 0.75
"""The least intersection over union of a shape with its drawing."""


@dataclass(frozen=True)
class Reading:
    """The attributes read off a picture; None where one could not be told."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    position: str | None = None
    background: str | None = None

    def agreement(self, expected: Combination) -> dict[str, bool]:
        """For each attribute, whether it was read as expected."""
        return {attribute: getattr(self, attribute) == getattr(expected, attribute) for attribute in ATTRIBUTES}

    def matches(self, expected: Combination) -> bool:
        """Whether every attribute was read as expected."""
        return all(self.agreement(expected).values())


def read(picture: Image.Image | npt.NDArray[np.uint8]) -> Reading:
    """The attributes of a picture.

    Args:
        picture: RGB, as an image or as `[height, width, 3]` of 0…255; scaled to `PICTURE_SIZE` if it has another size.
    """
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    if image.size != (PICTURE_SIZE, PICTURE_SIZE):
        image = image.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BOX)
    pixels = np.asarray(image.convert("RGB"), np.float32)
    back = _border_colour(pixels)
    background = _nearest_colour(back, BACKGROUND_COLOURS)
    front = _shape_colour(pixels, back)
    if front is None:
        return Reading(background=background)
    covered = _coverage(pixels, back, front)
    area = float(covered.sum())
    centre = _centre_of_mass(covered)
    shape = _nearest_shape(covered, area, centre)
    return Reading(
        shape=shape,
        colour=_nearest_colour(front, OBJECT_COLOURS),
        size=_nearest_size(area),
        position=_nearest_position(centre),
        background=background,
    )


def _border_colour(pixels: Floats) -> Floats:
    border = np.concatenate(
        [pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)]
    )
    median: Floats = np.median(border, axis=0)
    return median


def _shape_colour(pixels: Floats, back: Floats) -> Floats | None:
    contrast = np.linalg.norm(pixels - back, axis=-1)
    candidates = contrast[contrast > LEAST_CONTRAST]
    if candidates.size < LEAST_AREA:
        return None
    inside = contrast >= 0.8 * np.percentile(candidates, 75)  # leaves out the blended pixels of the edge
    median: Floats = np.median(pixels[inside], axis=0)
    return median


def _coverage(pixels: Floats, back: Floats, front: Floats) -> Floats:
    line = front - back
    return _without_noise(np.clip((pixels - back) @ line / (line @ line), 0, 1))


def _without_noise(covered: Floats) -> Floats:
    """The coverage with its lowest third set to 0: noise on a background of little contrast reaches that high."""
    return np.where(covered < 0.35, 0, covered).astype(np.float32)


def _centre_of_mass(covered: Floats) -> tuple[float, float]:
    grid = np.arange(PICTURE_SIZE) + 0.5
    total = covered.sum()
    return float(covered.sum(0) @ grid / total), float(covered.sum(1) @ grid / total)


def _nearest_colour(colour: Floats, palette: Mapping[str, tuple[int, int, int]]) -> str | None:
    distances = {name: float(np.linalg.norm(colour - np.array(known, np.float32))) for name, known in palette.items()}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] <= COLOUR_TOLERANCE else None


def _nearest_shape(covered: Floats, area: float, centre: tuple[float, float]) -> str | None:
    overlaps = {}
    for shape in SHAPES:
        drawn = _without_noise(coverage(shape, float(np.sqrt(area / _unit_area(shape))), centre))
        overlaps[shape] = float(np.minimum(drawn, covered).sum() / np.maximum(drawn, covered).sum())
    best = max(overlaps, key=overlaps.__getitem__)
    return best if overlaps[best] >= LEAST_OVERLAP else None


@cache
def _unit_area(shape: str) -> float:
    """Pixels that a shape covers, for each square pixel of its squared radius."""
    radius = SIZES["large"]
    return float(coverage(shape, radius, (PICTURE_SIZE / 2, PICTURE_SIZE / 2)).sum()) / radius**2


def _nearest_size(area: float) -> str:
    """The size nearest in logarithm, taking an area as a circle's: the shapes of a size differ less than the sizes do."""
    radius = np.sqrt(area / _unit_area("circle"))
    return min(SIZES, key=lambda size: abs(np.log(radius / SIZES[size])))


def _nearest_position(centre: tuple[float, float]) -> str:
    return min(POSITIONS, key=lambda position: np.hypot(POSITIONS[position][0] - centre[0], POSITIONS[position][1] - centre[1]))

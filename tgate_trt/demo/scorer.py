"""Reads the attributes of a picture by program, so that a picture's meaning is measured and not judged by eye.

1. The background's colour is the median of the border.
2. The shape's colour is the median of the pixels that differ most from the background.
3. A pixel's coverage is its position on the line from the background's colour to the shape's.
4. Position and size are the centre of mass and the sum of the coverage.
5. The shape is the one whose drawing, at that position and with that area, overlaps the coverage most.

An attribute that cannot be read (no shape, a colour far from every known one, a form that fits no shape) is None, and counts as wrong.
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
"""The largest distance, in sRGB units of 0…255, between a colour and the known colour that it is read as."""

LEAST_CONTRAST = 40.0
"""The smallest sRGB distance between the background and a pixel of a shape."""

LEAST_AREA = 30.0
"""The smallest number of pixels of a shape; the smallest drawn shape covers about 150."""

LEAST_OVERLAP = 0.75
"""The smallest intersection over union of a shape with its drawing."""


@dataclass(frozen=True)
class Reading:
    """The attributes of a picture; None for one that could not be read."""

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
    """Reads the attributes of a picture.

    Args:
        picture: RGB, an image or `[height, width, 3]` in 0…255; it is scaled to `PICTURE_SIZE`.
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
    inside = contrast >= 0.8 * np.percentile(candidates, 75)  # excludes the blended pixels of the edge
    median: Floats = np.median(pixels[inside], axis=0)
    return median


def _coverage(pixels: Floats, back: Floats, front: Floats) -> Floats:
    line = front - back
    return _without_noise(np.clip((pixels - back) @ line / (line @ line), 0, 1))


def _without_noise(covered: Floats) -> Floats:
    """The coverage with its lowest third set to 0, which noise reaches on a background of low contrast."""
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
    """The area of a shape divided by its squared radius."""
    radius = SIZES["large"]
    return float(coverage(shape, radius, (PICTURE_SIZE / 2, PICTURE_SIZE / 2)).sum()) / radius**2


def _nearest_size(area: float) -> str:
    """The size whose radius is nearest, in logarithm, to that of a circle of this area; shapes of one size have similar areas."""
    radius = np.sqrt(area / _unit_area("circle"))
    return min(SIZES, key=lambda size: abs(np.log(radius / SIZES[size])))


def _nearest_position(centre: tuple[float, float]) -> str:
    return min(POSITIONS, key=lambda position: np.hypot(POSITIONS[position][0] - centre[0], POSITIONS[position][1] - centre[1]))

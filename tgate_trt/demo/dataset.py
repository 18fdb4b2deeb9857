"""Captioned pictures, drawn by program: one flat shape on a flat background.

A `Combination` names the five attributes of a picture. About a tenth of all combinations, chosen by a hash of their
names, is held out of training, so that accuracy on them measures composition and not memory.
"""

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

Floats: TypeAlias = npt.NDArray[np.floating[Any]]

PICTURE_SIZE = 64
"""Width and height of a picture in pixels."""

JITTER = 1.5
"""The largest distance in pixels, on each axis, of a drawn shape from its position."""

OBJECT_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (250, 225, 50),
    "green": (40, 165, 70),
    "blue": (40, 90, 220),
    "purple": (150, 50, 190),
}
"""sRGB of the shapes."""

BACKGROUND_COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "black": (15, 15, 15),
    "gray": (130, 130, 130),
    "green": OBJECT_COLOURS["green"],
    "blue": OBJECT_COLOURS["blue"],
}
"""sRGB of the backgrounds; two of them are also colours of shapes, so a model must distinguish a caption's two colours."""

SIZES: dict[str, float] = {"small": 8.0, "large": 12.5}
"""Radius in pixels of a circle of that size; the other shapes have about the same area."""

POSITIONS: dict[str, tuple[float, float]] = {
    "top left": (17.0, 17.0),
    "top right": (47.0, 17.0),
    "center": (32.0, 32.0),
    "bottom left": (17.0, 47.0),
    "bottom right": (47.0, 47.0),
}
"""(x, y) in pixels of a shape's centre of mass."""

SHAPES = ("circle", "square", "triangle", "cross")

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(OBJECT_COLOURS),
    "size": tuple(SIZES),
    "position": tuple(POSITIONS),
    "background": tuple(BACKGROUND_COLOURS),
}
"""The values of every attribute, in the order of the fields of `Combination`."""

SYNONYMS: dict[str, tuple[str, ...]] = {
    "small": ("small", "little"),
    "large": ("large", "big"),
    "purple": ("purple", "violet"),
    "gray": ("gray", "grey"),
    "center": ("center", "middle"),
    "top left": ("top left", "upper left"),
    "top right": ("top right", "upper right"),
    "bottom left": ("bottom left", "lower left"),
    "bottom right": ("bottom right", "lower right"),
}
"""The words that a caption may use for a value; any other value has only its own name."""

TEMPLATES = (
    "a {size} {colour} {shape} at the {position} on a {background} background",
    "a {background} background with a {size} {colour} {shape} at the {position}",
    "{size} {colour} {shape}, {position}, {background} background",
    "at the {position} of a {background} picture there is a {size} {colour} {shape}",
    "a {size} {shape} in {colour} at the {position} on {background}",
)
"""Wordings that name all five attributes; the first is the canonical one."""

SHORT_TEMPLATES = (
    "a {size} {colour} {shape} on a {background} background",
    "a {colour} {shape} at the {position}",
    "a {size} {colour} {shape}",
    "a {colour} {shape}",
)
"""Wordings that do not name every attribute; some training captions use them, so that a short prompt also gives a picture."""


@dataclass(frozen=True)
class Combination:
    """The attributes of one picture.

    Raises:
        ValueError: if a value is unknown, or shape and background would have the same colour.
    """

    shape: str
    colour: str
    size: str
    position: str
    background: str

    def __post_init__(self) -> None:
        for attribute, values in ATTRIBUTES.items():
            if getattr(self, attribute) not in values:
                raise ValueError(f"{attribute} must be one of {', '.join(values)}; got {getattr(self, attribute)!r}")
        if self.colour == self.background:
            raise ValueError(f"a {self.colour} shape cannot be seen on a {self.background} background")

    @property
    def held_out(self) -> bool:
        """Whether training never uses this combination: true for about one in ten, by a hash of its names."""
        return hashlib.sha256("/".join(astuple(self)).encode()).digest()[0] % 10 == 0

    @property
    def labels(self) -> tuple[int, ...]:
        """The index of each attribute's value in `ATTRIBUTES`."""
        return tuple(values.index(getattr(self, attribute)) for attribute, values in ATTRIBUTES.items())


@dataclass(frozen=True)
class Captioned:
    """A caption, and the combination that its picture must show."""

    caption: str
    combination: Combination


def all_combinations() -> list[Combination]:
    """Every combination whose shape is visible, in a fixed order."""
    return [
        Combination(shape, colour, size, position, background)
        for shape, colour, size, position, background in itertools.product(*ATTRIBUTES.values())
        if colour != background
    ]


def combinations(*, held_out: bool) -> list[Combination]:
    """The combinations that training never uses, or those that it uses."""
    return [combination for combination in all_combinations() if combination.held_out is held_out]


def caption(combination: Combination, rng: np.random.Generator | None = None, template: str | None = None) -> str:
    """A caption of a combination: the canonical one, or with `rng` a random wording with random synonyms."""
    if rng is None:
        return (template or TEMPLATES[0]).format_map(vars(combination))
    chosen = template or TEMPLATES[rng.integers(len(TEMPLATES))]
    return chosen.format_map({attribute: _word(value, rng) for attribute, value in vars(combination).items()})


def _word(value: str, rng: np.random.Generator) -> str:
    words = SYNONYMS.get(value, (value,))
    return words[rng.integers(len(words))]


def parse(text: str) -> Combination:
    """The combination that a full caption names, in any of the `TEMPLATES` and with any of the `SYNONYMS`.

    Raises:
        ValueError: if the text is not such a caption.
    """
    for pattern in _PATTERNS:
        if match := pattern.fullmatch(text):
            return Combination(**{attribute: _CANONICAL.get(word, word) for attribute, word in match.groupdict().items()})
    raise ValueError(f"not a caption of this data set: {text!r}; one is {TEMPLATES[0]!r}")


def _pattern(template: str) -> re.Pattern[str]:
    groups = {}
    for attribute, values in ATTRIBUTES.items():
        words = [word for value in values for word in SYNONYMS.get(value, (value,))]
        groups[attribute] = f"(?P<{attribute}>{'|'.join(sorted(words, key=len, reverse=True))})"
    return re.compile(template.format_map(groups))


_PATTERNS = [_pattern(template) for template in TEMPLATES]
_CANONICAL = {word: value for value, words in SYNONYMS.items() for word in words}


def examples(count: int | None = None, *, held_out: bool, seed: int = 0) -> list[Captioned]:
    """Captions for scoring a model, drawn without replacement from one side of the split, in random wordings.

    Args:
        count: number of captions; all captions of that side if None or if there are fewer.
        held_out: whether to take combinations that training never uses, or those that it uses.
        seed: seed of the choice and of the wordings.
    """
    rng = np.random.default_rng(seed)
    pool = combinations(held_out=held_out)
    order = rng.permutation(len(pool))[:count]
    return [Captioned(caption(pool[index], rng), pool[index]) for index in order]


def coverage(shape: str, radius: float, centre: tuple[float, float]) -> Floats:
    """The covered share of each pixel, 0…1, `[PICTURE_SIZE, PICTURE_SIZE]`, anti-aliased by the distance to the shape's edge.

    Args:
        shape: one of `SHAPES`.
        radius: radius in pixels of a circle of that size.
        centre: (x, y) of the centre of mass in pixels; the middle of pixel (0, 0) is at (0.5, 0.5).
    """
    grid = np.arange(PICTURE_SIZE, dtype=np.float32) + 0.5
    x, y = np.meshgrid(grid - np.float32(centre[0]), grid - np.float32(centre[1]))
    clipped: Floats = np.clip(0.5 - _edge_distance(shape, x, y, radius), 0, 1).astype(np.float32)
    return clipped


def _edge_distance(shape: str, x: Floats, y: Floats, radius: float) -> Floats:
    """Signed distance in pixels to the shape's edge, negative inside; the factors make the areas of the shapes about equal."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.89 * radius
    if shape == "cross":
        long, short = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
        return np.maximum(long - 1.1 * radius, short - 0.37 * radius)
    return _triangle_distance(x, y, 1.4 * radius)


def _triangle_distance(x: Floats, y: Floats, outer: float) -> Floats:
    """Distance to an equilateral triangle that points up, its tip `outer` from its centre: the maximum over its three sides."""
    slanted = np.abs(x) * np.float32(np.sqrt(3) / 2) - y / 2
    distance: Floats = np.maximum(slanted, y) - outer / 2
    return distance


def draw_array(combination: Combination, offset: tuple[float, float] = (0.0, 0.0)) -> Floats:
    """The picture as `[PICTURE_SIZE, PICTURE_SIZE, 3]` in 0…1, with its shape moved by `offset` (x, y) pixels."""
    x, y = POSITIONS[combination.position]
    covered = coverage(combination.shape, SIZES[combination.size], (x + offset[0], y + offset[1]))[..., None]
    front = np.array(OBJECT_COLOURS[combination.colour], np.float32) / 255
    back = np.array(BACKGROUND_COLOURS[combination.background], np.float32) / 255
    return covered * front + (1 - covered) * back


def draw(combination: Combination, offset: tuple[float, float] = (0.0, 0.0)) -> Image.Image:
    """The picture of a combination, RGB, with its shape moved by `offset` (x, y) pixels."""
    return Image.fromarray((draw_array(combination, offset) * 255).round().astype(np.uint8))


def draw_jittered(chosen: Sequence[Combination], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Pictures `[len(chosen), PICTURE_SIZE, PICTURE_SIZE, 3]`, each with its own random offset."""
    offsets = rng.uniform(-JITTER, JITTER, (len(chosen), 2))
    pictures = [np.asarray(draw(combination, (x, y))) for combination, (x, y) in zip(chosen, offsets, strict=True)]
    return np.stack(pictures)

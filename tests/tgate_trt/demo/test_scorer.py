"""The scorer reads what was drawn, through noise and blur, and does not read what was not."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tgate_trt.demo.dataset import ATTRIBUTES, JITTER, PICTURE_SIZE, Combination, all_combinations, draw
from tgate_trt.demo.scorer import Reading, read

Spoil = Callable[[Image.Image, np.random.Generator], Image.Image]


def as_drawn(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return picture


def noisy(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    noise = rng.normal(0, 8, (PICTURE_SIZE, PICTURE_SIZE, 3))
    return Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))


def blurred(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(0.8))


def enlarged(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return picture.resize((4 * PICTURE_SIZE, 4 * PICTURE_SIZE), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("spoil", [as_drawn, noisy, blurred, enlarged])
def test_every_combination_is_read_back(spoil: Spoil) -> None:
    rng = np.random.default_rng(0)
    misread = []
    for combination in all_combinations():
        x, y = rng.uniform(-JITTER, JITTER, 2)
        reading = read(spoil(draw(combination, (x, y)), rng))
        if not reading.matches(combination):
            misread.append((combination, reading))
    assert not misread


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_a_picture_with_one_attribute_wrong_is_wrong_in_that_one_alone(attribute: str) -> None:
    expected = Combination("square", "red", "large", "bottom right", "white")
    for value in ATTRIBUTES[attribute]:
        if value == getattr(expected, attribute):
            continue
        agreement = read(draw(replace(expected, **{attribute: value}))).agreement(expected)
        assert [name for name, agrees in agreement.items() if not agrees] == [attribute]


def test_an_empty_picture_has_a_background_and_nothing_else() -> None:
    assert read(Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), (245, 245, 245))) == Reading(background="white")


def test_noise_is_no_picture() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (PICTURE_SIZE, PICTURE_SIZE, 3), dtype=np.uint8)
    assert read(pixels).shape is None


def test_two_shapes_are_no_shape() -> None:
    one = np.asarray(draw(Combination("circle", "red", "small", "top left", "white")))
    other = np.asarray(draw(Combination("circle", "red", "small", "bottom right", "white")))
    assert read(np.minimum(one, other)).shape is None


def test_an_unknown_colour_is_not_read_as_the_nearest() -> None:
    pixels = np.asarray(draw(Combination("square", "red", "large", "center", "white"))).copy()
    red = (pixels == (215, 40, 40)).all(-1)
    pixels[red] = (40, 225, 225)
    assert read(pixels).colour is None

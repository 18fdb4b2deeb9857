"""The data set: its pictures, its captions, and its split."""

import itertools

import numpy as np
import pytest

from tgate_trt.demo.dataset import (
    ATTRIBUTES,
    JITTER,
    PICTURE_SIZE,
    POSITIONS,
    SIZES,
    TEMPLATES,
    Combination,
    all_combinations,
    caption,
    combinations,
    coverage,
    draw,
    draw_jittered,
    examples,
    parse,
)

RED_CIRCLE = Combination("circle", "red", "small", "top left", "blue")


def test_the_split_is_whole_disjoint_and_about_a_tenth() -> None:
    held_out, training = set(combinations(held_out=True)), set(combinations(held_out=False))
    assert held_out | training == set(all_combinations())
    assert not held_out & training
    assert 0.05 < len(held_out) / (len(held_out) + len(training)) < 0.15


def test_both_sides_of_the_split_hold_every_value() -> None:
    for held_out, (attribute, values) in itertools.product((True, False), ATTRIBUTES.items()):
        assert {getattr(combination, attribute) for combination in combinations(held_out=held_out)} == set(values)


def test_no_combination_hides_its_shape() -> None:
    assert all(combination.colour != combination.background for combination in all_combinations())
    with pytest.raises(ValueError, match="cannot be seen"):
        Combination("circle", "blue", "small", "top left", "blue")


def test_an_unknown_value_is_named() -> None:
    with pytest.raises(ValueError, match=r"shape must be one of circle, .*got 'blob'"):
        Combination("blob", "red", "small", "top left", "blue")


def test_the_canonical_caption_reads_as_english() -> None:
    assert caption(RED_CIRCLE) == "a small red circle at the top left on a blue background"


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_wording_parses_back(template: str) -> None:
    rng = np.random.default_rng(0)
    for combination in all_combinations():
        assert parse(caption(combination, rng, template)) == combination


def test_other_text_is_no_caption() -> None:
    with pytest.raises(ValueError, match="not a caption"):
        parse("an astronaut in a jungle")


def test_examples_are_the_same_for_the_same_seed_only() -> None:
    assert examples(20, held_out=True, seed=1) == examples(20, held_out=True, seed=1)
    assert examples(20, held_out=True, seed=1) != examples(20, held_out=True, seed=2)


def test_examples_come_from_their_side_of_the_split_each_once() -> None:
    drawn = [example.combination for example in examples(held_out=True)]
    assert sorted(drawn, key=str) == sorted(combinations(held_out=True), key=str)
    assert len(examples(7, held_out=False)) == 7


def test_drawing_is_deterministic_and_jitters() -> None:
    once, again = (draw_jittered([RED_CIRCLE] * 3, np.random.default_rng(0)) for _ in range(2))
    assert np.array_equal(once, again)
    assert not np.array_equal(once[0], once[1])


@pytest.mark.parametrize("shape", ATTRIBUTES["shape"])
def test_a_shape_lies_about_its_centre_of_mass_within_the_picture(shape: str) -> None:
    for position, offset in itertools.product(POSITIONS.values(), (-JITTER, JITTER)):
        x, y = position[0] + offset, position[1] + offset
        covered = coverage(shape, SIZES["large"], (x, y))
        grid = np.arange(PICTURE_SIZE) + 0.5
        assert covered.sum(0) @ grid / covered.sum() == pytest.approx(x, abs=0.2)
        assert covered.sum(1) @ grid / covered.sum() == pytest.approx(y, abs=0.2)


@pytest.mark.parametrize("size", SIZES)
def test_shapes_of_one_size_cover_about_as_much(size: str) -> None:
    areas = [coverage(shape, SIZES[size], (32, 32)).sum() for shape in ATTRIBUTES["shape"]]
    assert max(areas) < 1.35 * min(areas)


def test_edges_are_smooth() -> None:
    covered = coverage("circle", 10, (32, 32))
    assert ((covered > 0.1) & (covered < 0.9)).sum() > 20
    assert covered.sum() == pytest.approx(np.pi * 10**2, rel=0.01)


def test_a_picture_is_rgb_of_the_stated_size() -> None:
    assert draw(RED_CIRCLE).size == (PICTURE_SIZE, PICTURE_SIZE)
    assert draw(RED_CIRCLE).mode == "RGB"

"""The rules on made curves and made pictures, and what is counted of pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tgate_trt.analysis.outcomes import Outcome, Series, compare
from tgate_trt.analysis.suggestion import Difference, by_accuracy, by_convergence, differences_of, smoothed, suggest
from tgate_trt.demo.dataset import draw, examples

FALLING = [1.0, 0.9, 0.8, 0.6, 0.3, 0.2, 0.1, 0.1, 0.1]
"""Means of three: 0.95, 0.9, 0.77, 0.57, 0.37 …"""


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        (FALLING, 5),
        ([0.1, 0.2, *FALLING], 7),
        ([*FALLING, 0.9, 1.0, 1.0], 5),
        ([1.0, 1.0, 0.1, 1.0, 1.0], 6),
        ([0.1, 0.2, 0.3, 0.4], 5),
        ([1.0, 1.0, 1.0, 0.0, 0.0], 4),
        ([0.0, 0.0], 1),
    ],
    ids=["falls", "rises first", "rises again", "one low step", "only rises", "a third is below half", "never moves"],
)
def test_the_gate_stands_where_change_has_halved(curve: list[float], expected: int) -> None:
    assert by_convergence(curve) == expected
    assert by_convergence([7 * value for value in curve]) == expected


def test_smoothing_takes_the_neighbours_that_are_there() -> None:
    assert smoothed([3.0, 6.0, 0.0, 3.0]) == [4.5, 3.0, 3.0, 1.5]
    assert smoothed([2.0]) == [2.0]


@pytest.mark.parametrize(("lost", "won", "p"), [(0, 0, 1.0), (4, 0, 1 / 16), (5, 0, 1 / 32), (7, 1, 9 / 256), (6, 1, 8 / 128), (0, 5, 1.0)])
def test_the_sign_test_is_exact(lost: int, won: int, p: float) -> None:
    difference = Difference(lost, won)
    assert difference.p == pytest.approx(p)
    assert difference.is_significant == (p < 0.05)


def test_every_later_gate_must_be_as_good() -> None:
    bad, good = Difference(5, 0), Difference(4, 0)
    assert by_accuracy([bad, bad, good, good, Difference(0, 0)]) == 3
    assert by_accuracy([bad, good, bad, good, Difference(0, 0)]) == 4
    assert by_accuracy([good, Difference(0, 0)]) == 1


def series(*wrong: int, pictures: int) -> Series:
    """For each gate step so many wrong pictures."""
    outcomes = [Outcome(torch.zeros(pictures), (False,) * count + (True,) * (pictures - count)) for count in wrong]
    return Series(tuple(range(1, len(wrong) + 1)), tuple(outcomes))


def test_accuracy_decides_where_it_is_known() -> None:
    found = suggest(FALLING, series(20, 10, 3, 0, pictures=30))
    assert (found.gate_step, found.rule, found.by_convergence, found.by_accuracy) == (3, "by_accuracy", 5, 3)
    assert [difference.lost for difference in found.differences] == [20, 10, 3, 0]
    assert found.to_json()["by_accuracy"]["p"][2] == pytest.approx(1 / 8)


def test_a_suggestion_is_a_noise_level_too() -> None:
    levels = (30.0, 8.0, 3.0, 1.384, 0.5, 0.1)
    data = suggest(FALLING, series(20, 10, 3, 0, pictures=30)).to_json(levels)
    assert (data["gate_step"], data["noise"], data["by_convergence"]["noise"]) == (3, 1.39, 0.1)
    at_the_end = suggest(None, series(*[30] * 5, 0, pictures=30)).to_json(levels)
    assert (at_the_end["gate_step"], at_the_end["noise"]) == (6, None), "no step comes after this gate"
    assert suggest(FALLING, None).to_json()["noise"] is None


def test_convergence_decides_elsewhere() -> None:
    unscored = Series((1, 2), (Outcome(torch.ones(30), None), Outcome(torch.zeros(30), None)))
    for gates in (None, unscored, series(9, 0, pictures=19)):
        found = suggest(FALLING, gates)
        assert (found.gate_step, found.rule, found.by_accuracy) == (5, "by_convergence", None)
    assert suggest(None, None).to_json()["gate_step"] is None


def test_a_picture_that_is_right_again_is_counted_apart() -> None:
    outcomes = [Outcome(torch.zeros(3), correct) for correct in ((False, True, True), (True, False, True))]
    assert differences_of(outcomes) == (Difference(1, 1), Difference(0, 0))


def test_pictures_are_read_back_and_compared() -> None:
    captioned = examples(3, held_out=True)
    pictures = torch.stack([torch.from_numpy(np.array(draw(each.combination))) for each in captioned]).permute(0, 3, 1, 2)
    assert compare(pictures, pictures, captioned).correct == (True, True, True)
    swapped = compare(pictures[[1, 0, 2]], pictures, captioned)
    assert swapped.correct == (False, False, True)
    assert swapped.distance[0] > 0 and swapped.distance[2] == 0
    assert compare(pictures, pictures, None).correct is None

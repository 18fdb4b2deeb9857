"""The spacings in which the demo model's default gate is judged; see `test_command` for the measurement."""

from __future__ import annotations

import itertools

from tgate_trt.bench.spacings import SPACINGS, STARTS, recoloured
from tgate_trt.demo.dataset import examples
from tgate_trt.demo.scorer import read
from tgate_trt.running.drawing import SCHEDULERS


def test_spacings_are_all_that_the_page_shows() -> None:
    assert {spacing.scheduler for spacing in SPACINGS} == {None, *SCHEDULERS}
    assert {spacing.steps for spacing in SPACINGS} == {8, 12, 25, 50}
    assert {(spacing.strength, spacing.start) for spacing in SPACINGS} == {(None, None), *itertools.product((0.4, 0.7), STARTS)}


def test_image_to_image_starts_from_another_colour() -> None:
    for example in examples(20, held_out=True):
        agreement = read(recoloured(example)).agreement(example.combination)
        assert [name for name, same in agreement.items() if not same] == ["colour"]

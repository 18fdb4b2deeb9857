"""The prompts of pictures, and when a scorer can read the pictures."""

from __future__ import annotations

import pytest

from tgate_trt.analysis.prompts import DEMO_SAMPLES, PROMPTS, held_out, in_turn, prompts_of
from tgate_trt.errors import InputError


def test_the_demo_models_captions_are_held_out_and_can_be_read() -> None:
    captions, captioned = prompts_of("shapes", (), seed=3)
    assert captioned is not None and [each.caption for each in captioned] == list(captions)
    assert len(captions) == DEMO_SAMPLES and all(each.combination.held_out for each in captioned)
    assert prompts_of("shapes", (captions[0], "a cat"))[1] is None
    assert prompts_of("shapes", (captions[0],), samples=2)[1] == (captioned[0], captioned[0])


def test_other_models_have_prompts_alone() -> None:
    assert prompts_of("sd15", ()) == (PROMPTS, None)
    assert prompts_of("sd15", ("a", "b"), samples=3) == (("a", "b", "a"), None)
    assert held_out("sd15", 3) == []


def test_prompts_are_taken_in_turn() -> None:
    assert in_turn("abc", 5) == ("a", "b", "c", "a", "b")
    assert in_turn("abc", 2) == ("a", "b")
    assert in_turn((), 2) == ()


def test_no_pictures_are_refused() -> None:
    with pytest.raises(InputError, match="samples must be at least 1, got 0"):
        prompts_of("sd15", (), samples=0)

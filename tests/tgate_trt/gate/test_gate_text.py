"""A gate's text form, and the settings that contradict each other."""

from __future__ import annotations

import dataclasses

import pytest

from tgate_trt.errors import InputError
from tgate_trt.gate.gate import Gate, gate_of


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("none", Gate()),
        ("10", Gate(10)),
        ("0.4", Gate(0.4)),
        ("noise:1.35", Gate("noise:1.35")),
        ("10,sp=5,warm=2", Gate(10, sp=5, warm=2)),
        ("10,after=positive,forecast=2", Gate(10, "positive", forecast=2)),
        ("10,deep=3", Gate(10, deep=3)),
        ("none,deep=3,branch=2", Gate(deep=3, branch=2)),
        ("drop=10", Gate(drop=10)),
        ("drop=noise:1.35,after=fading", Gate(drop="noise:1.35", after="fading")),
        ("none,forecast=3,rule=chebyshev,start=0.25", Gate(forecast=3, rule="chebyshev", start=0.25)),
        ("10,fi=2,unguided=3", Gate(10, fi=2, unguided=3)),
    ],
)
def test_text_and_settings_are_one(text: str, gate: Gate) -> None:
    assert Gate.parse(text) == gate_of(text) == gate
    assert str(gate) == text
    assert Gate.parse(str(gate)) == gate


def test_keys_in_any_order_and_steps_of_any_kind() -> None:
    assert Gate.parse("10,warm=2,sp=5") == Gate.parse("10,sp=5,warm=2")
    assert gate_of(10) == gate_of("10") == gate_of(Gate(10))
    assert Gate.parse("none,drop=10") == Gate(drop=10)
    assert {field.name for field in dataclasses.fields(Gate)} == {"step", "after", *_all_keys()}


def _all_keys() -> set[str]:
    return {"drop", "sp", "warm", "fi", "deep", "branch", "forecast", "rule", "start", "unguided"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "a gate step is a number of steps"),
        ("ten", "a gate step is a number of steps"),
        ("10,sp", "settings such as sp=5, of drop, after, sp,.*; got 'sp' in '10,sp'"),
        ("10,speed=5", "got 'speed=5'"),
        ("10,sp=5,sp=4", "sp stands twice"),
        ("10,sp=five", "sp is a whole number, got 'five'"),
        ("10,sp=0", "sp=0 is impossible: it is a whole number, at least 1"),
        ("10,forecast=1", "forecast=1 is impossible: .* at least 2; forecast=2 runs the denoiser in every other step"),
        ("10,deep=1", "deep=1 is impossible: .* at least 2"),
        ("10,after=mean", "after_gate must be one of negative, positive, positive-mean, fading; got 'mean'"),
        ("10,forecast=2,rule=cubic", "rule=cubic is impossible: it is one of repeat, linear, quadratic, chebyshev"),
        ("10,rule=repeat", "rule and start need forecast"),
        ("10,drop=5", "a gate has a step or drop, not both"),
        ("drop=none", "leave them out for none"),
        ("none,fi=2", "fi=2 is about the steps after the gate, and there is none"),
        ("10,warm=2", "warm=2 needs sp"),
        ("5,sp=2,warm=4", "warm=4 leaves nothing to reuse before the gate at step 5"),
        ("5,unguided=5", "unguided=5 leaves no guided step before the gate at step 5"),
        ("10,sp=2,deep=3", "do not combine"),
        ("10,branch=3", "branch=3 needs deep"),
        ("0", "gate_step must be at least 1"),
    ],
)
def test_what_is_impossible_is_one_sentence(text: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        Gate.parse(text)
    assert "\n" not in str(caught.value)

"""The gate's arithmetic, over all small cases and by property."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tgate_trt.errors import GateError, InputError
from tgate_trt.gate.schedule import GateSchedule, check_gate_step, parse_gate_step, planning_steps, rounded_up


def calls_of(steps: int, order: int, repeats_first: bool = False) -> int:
    """Calls that diffusers' schedulers make: one a step, PNDM one more, Heun and KDPM2 two but for the last step."""
    return 2 * steps - 1 if order == 2 else steps + repeats_first


@pytest.mark.parametrize("steps", range(1, 13))
@pytest.mark.parametrize(("order", "repeats_first"), [(1, False), (1, True), (2, False)])
def test_every_small_schedule(steps: int, order: int, repeats_first: bool) -> None:
    calls = calls_of(steps, order, repeats_first)
    for gate_step in range(1, steps + 1):
        schedule = GateSchedule(steps, gate_step, order, calls)
        visited = [schedule.step(call) for call in range(calls)]
        planning = [schedule.is_planning(call) for call in range(calls)]
        hand_offs = [call for call in range(calls) if schedule.hands_off(call)]
        assert sorted(set(visited)) == list(range(steps))
        assert visited == sorted(visited)
        assert planning == sorted(planning, reverse=True), "once in fidelity, never back"
        assert {step for step, plans in zip(visited, planning, strict=True) if plans} == set(range(gate_step))
        if gate_step == steps:
            assert hand_offs == [] and all(planning)
        else:
            assert hand_offs == [planning.count(True) - 1]
            assert visited[hand_offs[0]] == gate_step - 1


@pytest.mark.parametrize(
    ("fraction", "steps", "expected"),
    [(0.4, 25, 10), (0.5, 5, 3), (0.01, 10, 1), (0.99, 10, 10), (0.25, 2, 1), (0.1, 25, 3)],
)
def test_fraction_rounds_half_up_and_is_at_least_one(fraction: float, steps: int, expected: int) -> None:
    assert planning_steps(fraction, steps) == expected


@given(st.floats(0, 1, exclude_min=True, exclude_max=True), st.integers(1, 1000))
def test_fraction_is_always_possible(fraction: float, steps: int) -> None:
    gate_step = planning_steps(fraction, steps)
    assert 1 <= gate_step <= steps
    assert abs(gate_step - fraction * steps) <= 1


LEVELS = (20.0, 5.0, 2.0, 1.0, 0.5)


@pytest.mark.parametrize(
    ("gate_step", "expected"), [("noise:3", 2), ("noise:2", 2), ("noise:1.99", 3), ("noise:30", 1), ("noise:20", 1), ("noise:0.1", 5)]
)
def test_a_noise_level_is_the_first_step_with_at_most_this_noise(gate_step: str, expected: int) -> None:
    assert planning_steps(gate_step, 5, LEVELS) == expected


@given(st.floats(1e-4, 1e5))
def test_a_level_rounded_up_is_near_and_not_below(level: float) -> None:
    assert level * (1 - 1e-8) <= rounded_up(level) <= level * 1.01
    assert len(f"{rounded_up(level):e}".partition("e")[0].rstrip("0")) <= len("1.23")


@pytest.mark.parametrize("text", ["noise:", "noise:ten", "noise:0", "noise:-1", "noise:nan", "noise:inf"])
def test_a_noise_level_is_a_positive_number(text: str) -> None:
    with pytest.raises(InputError, match=r"names a positive number, as in noise:1\.35") as refused:
        parse_gate_step(text)
    assert "\n" not in str(refused.value)


@given(st.integers(1, 200), st.data())
def test_schedules_by_property(steps: int, data: st.DataObject) -> None:
    gate_step = data.draw(st.integers(1, steps))
    order = data.draw(st.sampled_from([1, 2]))
    calls = calls_of(steps, order, order == 1 and data.draw(st.booleans()))
    schedule = GateSchedule(steps, gate_step, order, calls)
    planned = sum(schedule.is_planning(call) for call in range(calls))
    assert sum(schedule.hands_off(call) for call in range(calls)) == (gate_step < steps)
    assert planned == (min(2 * gate_step, calls) if order == 2 else gate_step + calls - steps)


def test_none_plans_at_every_step() -> None:
    assert planning_steps("none", 7) == 7


@pytest.mark.parametrize("gate_step", [0, -1, 26, 1.0, 0.0, 1.5, -0.4, "all", True, None])
def test_impossible_gate_steps_are_refused(gate_step: object) -> None:
    with pytest.raises(InputError, match="gate_step"):
        planning_steps(gate_step, 25)  # type: ignore[arg-type]


def test_a_count_above_the_steps_says_what_to_use() -> None:
    with pytest.raises(InputError, match=r"gate_step=11 is more than the 10 steps of this run; use 1 to 10"):
        planning_steps(11, 10)
    assert check_gate_step(11) == 11


@pytest.mark.parametrize(
    ("text", "expected"), [("10", 10), ("0.4", 0.4), ("none", "none"), ("noise:1.35", "noise:1.35"), ("1.0", 1.0), ("-3", -3)]
)
def test_parse(text: str, expected: object) -> None:
    parsed = parse_gate_step(text)
    assert parsed == expected and type(parsed) is type(expected)


@pytest.mark.parametrize("text", ["", "ten", "None", "1/2"])
def test_parse_refuses_other_text(text: str) -> None:
    with pytest.raises(InputError, match="a gate step is"):
        parse_gate_step(text)


@pytest.mark.parametrize(("steps", "gate_step", "order", "calls"), [(5, 6, 1, 5), (5, 0, 1, 5), (0, 1, 1, 1), (5, 2, 3, 15)])
def test_a_schedule_checks_itself(steps: int, gate_step: int, order: int, calls: int) -> None:
    with pytest.raises(InputError):
        GateSchedule(steps, gate_step, order, calls)


@pytest.mark.parametrize("calls", [7, 8, 20])
def test_second_order_calls_must_make_the_steps(calls: int) -> None:
    with pytest.raises(GateError):
        GateSchedule(5, 2, 2, calls)

"""The row of actions, over all small cases."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tgate_trt.errors import InputError
from tgate_trt.gate.actions import Action, actions_of, graphs_of, substitute, work_of
from tgate_trt.gate.gate import Gate
from tgate_trt.gate.schedule import NONE, GateSchedule
from tgate_trt.taps import CROSS_ATTENTION, DEEP_FEATURES, Recipe, graph_name, recipe

SHORT = {
    "vanilla": "v",
    "planning": "p",
    "fidelity": "f",
    "keep-self": "K",
    "reuse-self": "r",
    "keep-deep0": "D",
    "reuse-deep0": "d",
    "fidelity-keep-deep0": "E",
    "fidelity-reuse-deep0": "e",
    "fidelity-keep-self": "S",
    "fidelity-reuse-self": "s",
    "planning-keep-self": "P",
    None: "~",
}


def strip(text: str, steps: int, *, order: int = 1, guided: bool = True) -> str:
    """The row of a gate, a letter a call; where the positive half alone runs before the gate, in parentheses."""
    gate = Gate.parse(text)
    boundary = steps if gate.boundary == NONE else int(gate.boundary)
    calls = steps if order == 1 else 2 * steps - 1
    start = None if gate.start is None else int(gate.start)
    row = actions_of(gate, GateSchedule(steps, boundary, order, calls), guided=guided, start=start)
    return "".join(f"({SHORT[one.graph]})" if one.is_planning and one.half is not None else SHORT[one.graph] for one in row)


@pytest.mark.parametrize(
    ("text", "steps", "row"),
    [
        ("none", 5, "vvvvv"),
        ("5", 5, "vvvvv"),
        ("3", 6, "vvpfff"),
        ("1", 3, "pff"),
        ("drop=3", 6, "vvvvvv"),
        # (g=10, sp=5, warm_up=2) reuses at 3, 4, 6, 7, 8 (TGATE.md, the official code's own scheduler)
        ("10,sp=5,warm=2", 12, "vvKrrKrrrpff"),
        ("4,sp=5,warm=1", 6, "vKrpff"),
        ("3,fi=2", 8, "vvPsSsSs"),
        ("4,fi=2", 8, "vvvpSsSs"),
        ("none,deep=3", 7, "DddDddv"),
        ("5,deep=3", 10, "DddvpEeeEe"),
        ("4,forecast=2", 10, "vvvpf~f~ff"),
        ("4,forecast=3", 11, "vvvpf~~f~~f"),
        ("none,forecast=2,start=4", 10, "vvvvv~v~vv"),
        ("4,unguided=2", 6, "(v)(v)vpff"),
        ("none,deep=2,unguided=1", 6, "(v)vDdDd"),
        ("drop=3,forecast=2", 8, "vvvv~v~v"),
    ],
)
def test_rows_read_as_the_papers_say(text: str, steps: int, row: str) -> None:
    assert strip(text, steps) == row


def test_a_second_order_scheduler_counts_steps() -> None:
    assert strip("2", 4, order=2) == "vvvpfff"
    assert strip("2,forecast=2", 6, order=2) == "vvvpff~~fff"


def cases() -> Iterator[tuple[Gate, GateSchedule, bool]]:
    """Gates of every kind in runs of up to nine steps."""
    for steps, boundary, order in itertools.product(range(1, 10), range(1, 10), (1, 2)):
        if boundary > steps:
            continue
        schedule = GateSchedule(steps, boundary, order, steps if order == 1 else 2 * steps - 1)
        for sp, fi, deep, forecast, unguided, dropped in itertools.product((1, 3), (1, 2), (None, 2), (None, 2, 3), (0, 1), (False, True)):
            if (deep and (sp > 1 or fi > 1)) or (dropped and fi > 1):
                continue
            for guided in (True, False):
                try:
                    gate = Gate(
                        NONE if dropped else boundary,
                        drop=boundary if dropped else None,
                        sp=sp,
                        fi=fi,
                        deep=deep,
                        forecast=forecast,
                        unguided=unguided,
                    )
                    actions_of(gate, schedule, guided=guided)
                except InputError:
                    continue
                yield gate, schedule, guided


def test_every_row_can_be_carried_out() -> None:
    """What an action reuses was kept for its rows, a forecast has what it is made from, and nothing is kept in vain."""
    found = 0
    for gate, schedule, guided in cases():
        row = actions_of(gate, schedule, guided=guided)
        assert len(row) == schedule.calls
        kept: dict[str, int | None] = {}
        used: set[tuple[int, str]] = set()
        origin: dict[str, int] = {}
        real: tuple[object, ...] | None = None
        for call, action in enumerate(row):
            phase = (action.is_planning, action.half)
            assert guided or action.half is None
            if action.graph is None:
                assert phase == real, (str(gate), schedule)
                assert schedule.step(call) < schedule.steps - 1
                continue
            real = phase
            for kind in recipe(action.graph).takes_in:
                assert kept[kind] == action.half, (str(gate), schedule, call)
                used.add((origin[kind], kind))
            for kind in recipe(action.graph).gives_out:
                origin[kind] = call
                kept[kind] = gate.after_gate.half if kind in action.hands_off else action.half
                assert not (kind in action.hands_off and kind.startswith(DEEP_FEATURES))
        made = {(call, kind) for call, action in enumerate(row) if action.graph for kind in recipe(action.graph).gives_out}
        assert made == used, (str(gate), schedule)
        needed = set(graphs_of(gate))
        assert all({action.graph, substitute(action.graph)} & needed for action in row if action.graph), (str(gate), schedule)
        found += 1
    assert found > 2000


def test_a_run_that_loses_its_guidance_reuses_nothing_of_both_halves() -> None:
    gate, schedule = Gate(8, sp=3, fi=3), GateSchedule(12, 8)
    row = actions_of(gate, schedule, guided=False, begins=4)
    assert [one.graph for one in row[4:6]] == ["keep-self", "reuse-self"], "it was kept for both halves, so it is computed anew"
    after = actions_of(gate, schedule, guided=False, begins=10)
    assert [one.graph for one in after[10:]] == ["fidelity-keep-self", "fidelity-reuse-self"]
    assert all(action.half is None for action in (*row, *after))


def test_work_is_that_of_graphs_and_rows() -> None:
    row = actions_of(Gate(2, forecast=2), GateSchedule(5, 2), guided=True)
    assert [action.graph for action in row] == ["vanilla", "planning", "fidelity", None, "fidelity"]
    assert work_of(row, 3, guided=True, count=lambda graph, rows: rows * (10 if graph == "fidelity" else 100)) == 2 * 6 * 100 + 2 * 3 * 10
    assert work_of([Action("vanilla")], 1, guided=False, count=lambda _, rows: rows) == 1


@pytest.mark.parametrize(
    "cut",
    [
        Recipe(),
        Recipe((), (CROSS_ATTENTION,)),
        Recipe((CROSS_ATTENTION, "self_attention"), ()),
        Recipe(("deep_features_12",), ("self_attention",)),
    ],
)
def test_a_graphs_name_is_its_recipe(cut: Recipe) -> None:
    found = recipe(graph_name(cut))
    assert (set(found.takes_in), set(found.gives_out)) == (set(cut.takes_in), set(cut.gives_out))


@pytest.mark.parametrize("name", ["", "keep", "keep-deep", "reuse-self-", "fidelity-planning-keep", "text_encoder", "keep-self-planning"])
def test_other_names_are_no_graphs(name: str) -> None:
    with pytest.raises(InputError, match="there is no graph"):
        recipe(name)


@pytest.mark.parametrize(
    ("gate", "steps", "reason"),
    [
        (Gate(0.2, sp=3, warm=4), 10, "warm=4 leaves nothing to reuse in a run of 10 steps before the gate at step 2"),
        (Gate(0.2, unguided=4), 10, "unguided=4 leaves no guided step in a run of 10 steps before the gate at step 2"),
        (Gate(sp=3, warm=9), 10, "warm=9 leaves nothing to reuse in a run of 10 steps before its end"),
    ],
)
def test_a_run_that_is_too_short_is_refused(gate: Gate, steps: int, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        actions_of(gate, GateSchedule(steps, 2 if gate.step != NONE else steps), guided=True)

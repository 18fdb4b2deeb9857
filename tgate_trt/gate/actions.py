"""A run as a row of actions: what each call of the denoiser does. Pure arithmetic, without PyTorch.

Each method of the papers is a rule here that says, for one step, which kinds of tap are reused and which are kept. What is common to all
follows from the row: a tap that no later action reuses is not kept, and one that was not kept for these rows is computed.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from tgate_trt.errors import GateError, InputError
from tgate_trt.gate.gate import Gate
from tgate_trt.gate.schedule import NONE, GateSchedule
from tgate_trt.taps import CROSS_ATTENTION, DEEP_FEATURES, SELF_ATTENTION, Recipe, deep_features, graph_name, recipe

POSITIVE = 1
"""Index of the positive half in a guidance batch, ``[negative, positive]``."""


@dataclass(frozen=True)
class Action:
    """What one call of the denoiser does."""

    graph: str | None
    """That runs, by its name in `tgate_trt.taps.recipe`; None to forecast the prediction."""
    half: int | None = None
    """The half of the guidance batch on which it runs; None for all rows of the call."""
    hands_off: tuple[str, ...] = ()
    """Kinds of tap that are kept from all rows and reused on one half: the mean of the halves, or that half."""
    is_planning: bool = True
    """Whether the call lies before the gate."""


@dataclass(frozen=True)
class _Step:
    """An action that is being found: its taps as kinds."""

    half: int | None
    is_planning: bool
    takes: frozenset[str] = frozenset()
    keeps: frozenset[str] = frozenset()
    hands_off: frozenset[str] = frozenset()
    is_forecast: bool = False

    @property
    def action(self) -> Action:
        recipe = Recipe(tuple(sorted(self.takes)), tuple(sorted(self.keeps)))
        graph = None if self.is_forecast else graph_name(recipe)
        return Action(graph, self.half, tuple(sorted(self.hands_off)), self.is_planning)


def actions_of(gate: Gate, schedule: GateSchedule, *, guided: bool, start: int | None = None, begins: int = 0) -> tuple[Action, ...]:
    """The action of each call of a run.

    Args:
        gate: its settings.
        schedule: of the run, with the gate's boundary as its ``gate_step``.
        guided: whether calls have both halves.
        start: the step of ``gate.start``, if it names one.
        begins: the first call that is planned anew, because the run lost its guidance there: only cross-attention that was handed off
            is still kept. The actions before it are those of an unguided run, and were not carried out.

    Raises:
        InputError: if the gate contradicts the length of the run.
    """
    _check(gate, schedule)
    steps: list[_Step] = []
    kept: dict[str, int | None] = {}
    for call in range(schedule.calls):
        if call == begins and begins:
            kept = {CROSS_ATTENTION: None} if not schedule.is_planning(call) else {}
        step = _forecast_or(gate, schedule, call, guided, start, steps[begins:]) or _nominal(gate, schedule, call, guided)
        step = _with_what_is_kept(step, kept)
        steps.append(step)
        kept.update(dict.fromkeys(step.keeps, step.half))
    return tuple(step.action for step in _without_what_is_unused(steps))


def work_of(actions: Iterable[Action], images: int, *, guided: bool, count: Callable[[str, int], int]) -> int:
    """The work of a row of actions, by what one call of a graph takes on a number of rows; a forecast takes none.

    Args:
        actions: of a run.
        images: of the run.
        guided: whether a call on all rows has two for each image.
        count: the work of a graph on a number of rows, for example its multiply-accumulates.
    """
    return sum(count(one.graph, images * (2 if guided and one.half is None else 1)) for one in actions if one.graph is not None)


@functools.cache
def graphs_of(gate: Gate) -> tuple[str, ...]:
    """Names of the graphs that runs by a gate may run, whatever their lengths and whether they are guided."""
    found: dict[str, None] = {}
    for steps, guided in itertools.product(_LENGTHS, (True, False)):
        for boundary in _boundaries(gate, steps):
            start = None if gate.start is None else min(boundary, steps - 1)
            with contextlib.suppress(InputError):  # this run is too short
                row = actions_of(gate, GateSchedule(steps, boundary), guided=guided, start=start)
                found |= {action.graph: None for action in row if action.graph is not None}
    return tuple(found)


_LENGTHS = (4, 9, 25, 50)
"""Lengths of runs in which every action of a gate comes up."""


def substitute(graph: str) -> str | None:
    """The graph that can run in the place of another: it gives out cross-attention besides; None where there can be none."""
    cut = recipe(graph)
    if CROSS_ATTENTION in (*cut.takes_in, *cut.gives_out):
        return None
    return graph_name(Recipe(cut.takes_in, (*cut.gives_out, CROSS_ATTENTION)))


def _boundaries(gate: Gate, steps: int) -> Iterable[int]:
    if gate.boundary == NONE:
        return (steps,)
    if isinstance(gate.boundary, int):
        return (min(gate.boundary, steps - 1), steps)
    return range(1, steps + 1)


def _check(gate: Gate, schedule: GateSchedule) -> None:
    """Refuse settings that the length of a run contradicts."""
    boundary, ends = schedule.gate_step, "its end" if schedule.gate_step == schedule.steps else f"the gate at step {schedule.gate_step}"
    if gate.sp > 1 and gate.warm >= boundary - 1:
        raise InputError(f"warm={gate.warm} leaves nothing to reuse in a run of {schedule.steps} steps before {ends}; take a smaller one")
    if gate.unguided >= boundary:
        raise InputError(
            f"unguided={gate.unguided} leaves no guided step in a run of {schedule.steps} steps before {ends}; take a smaller one"
        )


def _nominal(gate: Gate, schedule: GateSchedule, call: int, guided: bool) -> _Step:
    """The taps by each method's own rule."""
    step, boundary = schedule.step(call), schedule.gate_step
    is_planning, has_gate = step < boundary, gate.step != NONE and boundary < schedule.steps
    half = None if not guided else gate.after_gate.half if not is_planning else POSITIVE if step < gate.unguided else None
    takes, keeps = set(), set()
    if is_planning:
        keeps |= {CROSS_ATTENTION} if has_gate else set()
        if gate.sp > 1 and step > gate.warm and step < boundary - 1 and step % gate.sp:
            takes.add(SELF_ATTENTION)
        elif (gate.sp > 1 and gate.warm <= step) or (gate.fi > 1 and step == boundary - 1):
            keeps.add(SELF_ATTENTION)
    elif gate.drop is None:
        takes.add(CROSS_ATTENTION)
        if gate.fi > 1:
            (keeps if step % gate.fi == 0 else takes).add(SELF_ATTENTION)
    if gate.deep is not None:
        since = step if is_planning else step - boundary
        is_full = since % gate.deep == 0 or (is_planning and step == boundary - 1 and boundary < schedule.steps)
        (keeps if is_full else takes).add(deep_features(gate.branch))
    return _Step(half, is_planning, frozenset(takes), frozenset(keeps))


def _forecast_or(gate: Gate, schedule: GateSchedule, call: int, guided: bool, start: int | None, before: list[_Step]) -> _Step | None:
    """A forecast, where the gate has one at this call: never at the first step of a phase, at the last planning step, or at the end."""
    step, boundary = schedule.step(call), schedule.gate_step
    if gate.forecast is None or step == schedule.steps - 1 or (step == boundary - 1 and gate.boundary != NONE):
        return None
    has_boundary = boundary < schedule.steps
    first = start if start is not None else boundary if has_boundary else max(schedule.steps // 4, 1)
    begin = boundary if step >= boundary else gate.unguided if guided and step >= gate.unguided else 0
    anchor = max(first, begin)
    nominal = _nominal(gate, schedule, call, guided)
    last = next((one for one in reversed(before) if not one.is_forecast), None)
    is_of_this_phase = last is not None and (last.half, last.is_planning) == (nominal.half, nominal.is_planning)
    if step <= anchor or (step - anchor) % gate.forecast == 0 or not is_of_this_phase:
        return None
    return _Step(nominal.half, nominal.is_planning, is_forecast=True)


def _with_what_is_kept(step: _Step, kept: Mapping[str, int | None]) -> _Step:
    """The step, computing and keeping what it would reuse if that was not kept for its rows.

    Raises:
        GateError: for cross-attention, which no step after the gate computes.
    """
    for kind in step.takes:
        is_handed_off = step.half is not None and not kind.startswith(DEEP_FEATURES)
        if kind in kept and (kept[kind] == step.half or (kept[kind] is None and is_handed_off)):
            continue
        if kind == CROSS_ATTENTION:
            raise GateError("a run has no cross-attention to reuse, because its last planning step was not carried out; start a new run")
        step = replace(step, takes=step.takes - {kind}, keeps=step.keeps | {kind})
    return step


def _without_what_is_unused(steps: list[_Step]) -> list[_Step]:
    """The steps without taps that no later step reuses; with those that are handed off to one half."""
    wanted: dict[str, int | None] = {}
    result = []
    for step in reversed(steps):
        used = step.keeps & wanted.keys()
        narrowed = frozenset(kind for kind in used if wanted[kind] != step.half)
        for kind in used:
            del wanted[kind]
        wanted.update(dict.fromkeys(step.takes, step.half))
        result.append(replace(step, keeps=used, hands_off=narrowed))
    return result[::-1]

"""Find the gate whose pictures are nearest to vanilla's within a budget of time, on this machine and this model.

The time of a row of actions is the sum of measured times: of each graph on its number of rows, and of what the pipeline does around a
call. The distance is the perceptual distance of pictures to vanilla's, of the same prompts from the same noise, averaged.

The search is a coordinate descent. Of all gates that differ in their step alone, the nearest is taken to be the latest that the budget
allows, since more planning never costs likeness; so the step is computed, and the other settings are tried one after the other, each
value of one setting with the best values of the others, until no change of any one gives a nearer picture. It has no randomness but the
pictures' seeds, and what was evaluated is kept in the record, from which a search that was cut off goes on. Of what is found, the
nearest is taken whose whole pictures, timed beside vanilla's, are within the budget too.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tgate_trt import demo
from tgate_trt.analysis.action_times import Times, measured_share
from tgate_trt.analysis.metrics import mean_estimate
from tgate_trt.analysis.record import describe, environment, record_of
from tgate_trt.analysis.subject import Subject
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.bundle.folder import locked
from tgate_trt.demo.dataset import examples
from tgate_trt.demo.evaluate import Proportion
from tgate_trt.errors import InputError, TGateError
from tgate_trt.gate.actions import Action, actions_of
from tgate_trt.gate.gate import Gate
from tgate_trt.gate.schedule import NONE, GateSchedule
from tgate_trt.gate.scheduler import schedule_of
from tgate_trt.running.drawing import Drawing

logger = logging.getLogger(__name__)

NAME = "tuned"
"""Of the gate in the bundle."""
SAMPLES = 24
"""Pictures of each gate."""
_BUDGETS, _KINDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), 4
"""Shares of vanilla's time at which the curve is drawn, and how many of the nearest kinds of row are tried at each."""
_ROUNDS = 7
"""Rounds in which the gate that was found and vanilla are timed in turn."""

SETTINGS: Mapping[str, tuple[Any, ...]] = {
    "after": ("positive", "fading", "negative"),
    "forecast": (None, 2, 3, 4),
    "rule": ("linear", "chebyshev", "repeat", "quadratic"),
    "deep": (None, 2, 3),
    "sp": (1, 2, 3, 5),
    "unguided": (0, 1, 2),
}
"""The settings that are tried, in this order, each from its first value on."""


@dataclass(frozen=True)
class Candidate:
    """A gate that was tried."""

    gate: str
    share: float
    """Of vanilla's time, by the measured times of its actions."""
    distance: float
    """Mean perceptual distance to vanilla's pictures."""


def prompts_for(model: str, prompts: Sequence[str], samples: int, seed: int) -> tuple[str, ...]:
    """Prompts to tune on; captions of the demo model's training, so that those held out of it can judge what was found."""
    if prompts or model != demo.NAME:
        return tuple(prompts)
    return tuple(each.caption for each in examples(samples, held_out=False, seed=seed))


@dataclass
class Search:
    """A search on one bundle."""

    subject: Subject
    budget: float
    """Share of vanilla's time."""
    known: Mapping[str, float]
    """Distances that an earlier search found, by the gate's text."""
    found: dict[str, Candidate] = field(default_factory=dict)
    """What was evaluated, by the gate's text."""

    def run(self) -> Iterator[Candidate]:
        """Evaluate gates until no change of one setting is nearer to vanilla, then the best kinds at other budgets; yields each."""
        best = yield from self._first()
        yield from self._descend(best)
        yield from self._at_other_budgets()

    def _descend(self, best: Candidate) -> Iterator[Candidate]:
        """Change one setting after the other while that is nearer to vanilla."""
        improves = True
        while improves:
            improves = False
            for name, values in SETTINGS.items():
                for gate in [other for value in values for other in _with(_without_step(best.gate), name, value)]:
                    candidate = self._evaluated(self._latest(gate))
                    if candidate is None:
                        continue
                    yield candidate
                    if candidate.distance < best.distance:
                        best, improves = candidate, True

    def _at_other_budgets(self) -> Iterator[Candidate]:
        """The settings that were nearest, at their latest steps within other budgets: the rest of the curve."""
        nearest = sorted(self.found.values(), key=lambda one: one.distance)
        kinds = list(dict.fromkeys(_without_step(one.gate) for one in nearest))[:_KINDS]
        own = self.budget
        try:
            for self.budget in _BUDGETS:
                for gate in kinds:
                    candidate = self._evaluated(self._latest(gate))
                    if candidate is not None:
                        yield candidate
        finally:
            self.budget = own

    @property
    def within(self) -> list[Candidate]:
        """Those within the budget, the nearest first.

        Raises:
            InputError: if none is.
        """
        found = sorted((one for one in self.found.values() if one.share <= self.budget), key=lambda one: one.distance)
        if not found:
            raise self._none_is_fast_enough()
        return found

    def chosen(self) -> tuple[Candidate, dict[str, float]]:
        """The nearest whose pictures take no more than the budget when they are timed beside vanilla's, and those times.

        Raises:
            InputError: if none does.
        """
        for one in self.within:
            measured = measured_share(self.subject, Gate.parse(one.gate), _ROUNDS)
            logger.info("%s: %.1f %% of vanilla's time as measured", one.gate, 100 * measured["median"])
            if measured["median"] <= self.budget:
                return one, measured
        raise self._none_is_fast_enough()

    def _none_is_fast_enough(self) -> InputError:
        return InputError(
            f"no gate of this bundle takes {self.budget:.0%} of vanilla's time or less; allow more, or build it with --gate none,deep=3 too"
        )

    def front(self) -> list[Candidate]:
        """The curve of budget against distance: candidates to which no faster one is as near."""
        front: list[Candidate] = []
        for one in sorted(self.found.values(), key=lambda one: (one.share, one.distance)):
            if not front or one.distance < front[-1].distance:
                front.append(one)
        return front

    def _first(self) -> Generator[Candidate, None, Candidate]:
        """Each kind of row once; returns the nearest."""
        starts = [Gate(NONE, "positive", forecast=forecast) for forecast in (None, 2, 3)]
        starts += [Gate(NONE, deep=deep) for deep in (2, 3)]
        for start in starts:
            candidate = self._evaluated(self._latest(start))
            if candidate is not None:
                yield candidate
        return self.within[0]

    def _latest(self, gate: Gate) -> Gate | None:
        """The gate at the latest step that the budget allows, or without one if that is within it; None if none is."""
        for step in (NONE, *range(self.subject.steps - 1, 0, -1)):
            try:
                latest = replace(gate, step=step, after=None if step == NONE else gate.after)
                if self._runs(latest) and self._share(latest) <= self.budget:
                    return latest
            except InputError:  # the settings contradict such a step
                continue
        return None

    def _runs(self, gate: Gate) -> bool:
        """Whether the bundle has the engines of a gate."""
        try:
            self.subject.gated.gate = gate
        except TGateError:
            return False
        return True

    def _evaluated(self, gate: Gate | None) -> Candidate | None:
        """The candidate of a gate; drawn unless it was before."""
        if gate is None:
            return None
        if str(gate) not in self.found:
            distance = self.known.get(str(gate))
            if distance is None:
                distance = float(self.subject.compare(self.subject.draw(gate)).distance.mean())
            self.found[str(gate)] = Candidate(str(gate), self._share(gate), distance)
            logger.info("%s: %.1f %% of vanilla's time, distance %.4f", gate, 100 * self._share(gate), distance)
        return self.found[str(gate)]

    @cached_property
    def vanilla_seconds(self) -> float:
        """Seconds of a vanilla picture, by the measured times of its actions."""
        return self.times.of(self._actions(Gate()))

    def _share(self, gate: Gate) -> float:
        return self.times.of(self._actions(gate)) / self.vanilla_seconds

    def _actions(self, gate: Gate) -> tuple[Action, ...]:
        boundary = self.subject.steps if gate.boundary == NONE else int(gate.boundary)
        schedule = replace(self._schedule, gate_step=boundary)
        return actions_of(gate, schedule, guided=self._guided)

    @cached_property
    def _schedule(self) -> GateSchedule:
        pipeline = self.subject.pipeline
        pipeline.scheduler.set_timesteps(self.subject.steps)
        return schedule_of(pipeline, pipeline.scheduler.timesteps[0], NONE)

    @cached_property
    def _guided(self) -> bool:
        self.subject.warm_up(self.subject.drawing.prompts[0])
        return self.subject.gated.latest_run.guided

    @cached_property
    def times(self) -> Times:
        """Measured times on this machine."""
        return Times(self.subject, len(self._actions(Gate())), self._guided)


def _with(gate: Gate, name: str, value: Any) -> list[Gate]:
    """The gate with one setting, where that contradicts nothing."""
    try:
        return [replace(gate, **_change(name, value))]
    except InputError:
        return []


def _change(name: str, value: Any) -> dict[str, Any]:
    """The settings that change when one does: those that another needs are set beside it."""
    if name == "forecast" and value is None:
        return {"forecast": None, "rule": "linear"}
    if name == "sp":
        return {"sp": value, "warm": 0 if value == 1 else 2}
    return {name: value}


def _without_step(text: str) -> Gate:
    return replace(Gate.parse(text), step=NONE)


def keep(bundle: Bundle, gate: Gate) -> Bundle:
    """Write a gate into a bundle as `NAME`, in the place of an earlier one.

    Raises:
        InputError: if the bundle's folder cannot be written.
    """
    with locked(bundle.folder):
        return bundle.with_manifest(replace(bundle.manifest, gates={**bundle.manifest.gates, NAME: str(gate)}))


def tune(
    folder: Path,
    drawing: Drawing,
    budget: str,
    *,
    samples: int = SAMPLES,
    backend: str | None = None,
    command: str,
    earlier: Mapping[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Search, and judge what was found on other prompts or other noise than it was found on.

    Args:
        folder: of the bundle.
        drawing: the pictures; see `prompts_for` for their prompts.
        budget: a share of vanilla's time such as ``"0.5"``, or a time of a picture such as ``"120ms"``.
        samples: pictures of each gate.
        backend: see `tgate_trt.load`.
        command: the command line, for the record.
        earlier: the record of a search that was cut off, whose candidates are not drawn again.

    Yields:
        The record so far, after each candidate; the last one has what was found.

    Raises:
        InputError: if a setting is impossible, or no gate is within the budget.
    """
    before, bundle = environment(), Bundle.open(folder)
    prompts = prompts_for(bundle.manifest.model.name, drawing.prompts, samples, drawing.seed)
    subject = Subject(bundle, replace(drawing, prompts=prompts), backend, samples)
    settings = {
        "samples": samples,
        "steps": subject.steps,
        "seed": drawing.seed,
        "guidance_scale": drawing.guidance_scale,
        "scheduler": type(subject.pipeline.scheduler).__name__,
        "backend": subject.backend,
        "prompts": list(dict.fromkeys(subject.drawing.prompts)),
    }
    known: dict[str, float] = {}
    if earlier is not None:
        if earlier["what"] != "tuning" or earlier["settings"] | {"budget": 0} != settings | {"budget": 0}:
            raise InputError("the file holds a search with other settings; choose another --json, or remove it")
        known = {row["gate"]: row["distance"] for row in earlier["results"]["candidates"]}
    search = Search(subject, 1.0, known)
    search.budget = _share_of(budget, search)
    settings["budget"] = search.budget

    def record(**more: Any) -> dict[str, Any]:
        rows = [dataclasses.asdict(one) for one in search.found.values()]
        front = [dataclasses.asdict(one) for one in search.front()]
        return record_of("tuning", command, before, settings, {"candidates": rows, "front": front, **more}, describe(bundle))

    for _ in search.run():
        yield record()
    chosen, measured = search.chosen()
    best = Gate.parse(chosen.gate)
    judge = Subject(bundle, replace(drawing, seed=drawing.seed + samples), backend, samples if drawing.prompts else None)
    outcome = judge.compare(judge.draw(best))
    keep(bundle, best)
    yield record(
        found=dataclasses.asdict(chosen),
        measured=measured,
        held_out={
            "pictures": len(outcome.distance),
            "distance": mean_estimate(outcome.distance).to_json(),
            "right": None if outcome.correct is None else Proportion(sum(outcome.correct), len(outcome.correct)).to_json(),
        },
    )


def _share_of(budget: str, search: Search) -> float:
    """A budget as a share of vanilla's time.

    Raises:
        InputError: if it is none.
    """
    try:
        share = float(budget.removesuffix("ms")) / (1000 * search.vanilla_seconds if budget.endswith("ms") else 1)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise InputError(
            f"a budget is a share of vanilla's time such as 0.5, or a time of a picture within it such as 120ms; got {budget!r}"
        )
    return share

"""What each action of a row takes on this machine."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from tgate_trt.analysis.subject import Subject
from tgate_trt.export.verify import random_inputs
from tgate_trt.gate.actions import Action
from tgate_trt.gate.gate import Gate
from tgate_trt.running.drawing import draw

_REPEATS = 5
"""Samples of which the median counts."""
_WARM_UP = 3
"""Runs before the clock: on a GPU a plain one, a capture and a replay."""


class Times:
    """Seconds of one image's actions, each measured when it is first asked for."""

    def __init__(self, subject: Subject, calls: int, guided: bool) -> None:
        """Measure vanilla pictures, and what is around their calls.

        Args:
            subject: whose pipeline has the engines.
            calls: of the denoiser in a picture.
            guided: whether calls have both halves.
        """
        self._subject, self._guided = subject, guided
        self._calls: dict[tuple[str, int], float] = {}
        whole = statistics.median(_seconds_of_a_picture(subject, Gate()) for _ in range(_REPEATS))
        self.outside = max(whole / calls - self.call("vanilla", 2 if guided else 1), 0.0)
        """Of the pipeline, the scheduler and the denoiser around each call, with the text's encoding shared among them."""

    def call(self, graph: str, rows: int) -> float:
        """Seconds of a graph on so many rows."""
        key = (graph, rows)
        if key not in self._calls:
            self._calls[key] = _seconds_of_call(self._subject, graph, rows)
        return self._calls[key]

    def of(self, actions: Sequence[Action]) -> float:
        """Seconds of a row of actions."""
        rows = [(action.graph, 2 if self._guided and action.half is None else 1) for action in actions if action.graph is not None]
        return len(actions) * self.outside + sum(self.call(graph, count) for graph, count in rows)


def measured_share(subject: Subject, gate: Gate, rounds: int) -> dict[str, float]:
    """The time of pictures by a gate over that of vanilla ones, drawn in turn and not decoded: median, smallest and largest."""
    ratios = []
    for _ in range(rounds + 1):
        vanilla, gated = (_seconds_of_a_picture(subject, each) for each in (Gate(), gate))
        ratios.append(gated / vanilla)
    kept = ratios[1:]  # the first warmed up
    return {"median": statistics.median(kept), "lowest": min(kept), "highest": max(kept)}


def _seconds_of_call(subject: Subject, graph: str, rows: int) -> float:
    """Median seconds of a graph's engine on random inputs of so many rows."""
    engine = subject.gated.engine_of(graph)
    generator = torch.Generator().manual_seed(0)
    given, written = (
        {name: tensor.to(engine.device) for name, tensor in random_inputs(specs, engine.spec.sizes(rows), generator).items()}
        for specs in (engine.spec.inputs, engine.spec.outputs)
    )
    samples = [_seconds(lambda: engine.run(given, written), engine.device) for _ in range(_WARM_UP + 2 * _REPEATS)]
    return statistics.median(samples[_WARM_UP:])


def _seconds_of_a_picture(subject: Subject, gate: Gate) -> float:
    """Seconds of one picture, not decoded."""
    subject.gated.gate = gate
    one = dataclasses.replace(subject.drawing, prompts=subject.drawing.prompts[:1])
    return _seconds(lambda: draw(subject.pipeline, one, output_type="latent"), subject.gated.device)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start

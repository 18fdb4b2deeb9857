"""Single steps of the denoiser, engine by engine, without a pipeline around them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tgate_trt.bench.spread import against
from tgate_trt.bench.stopwatch import Stopwatch
from tgate_trt.bench.studio import TGATE, Studio
from tgate_trt.denoiser import GatedDenoiser
from tgate_trt.export.verify import random_inputs
from tgate_trt.specs import ROWS, GraphSpec, TensorSpec

LEAST_SECONDS = 0.25
"""A sample is the mean of as many calls as take this long, and of one at least."""


@dataclass(frozen=True)
class Step:
    """One kind of step, for one picture."""

    name: str
    graph: str
    rows: int
    """Two with guidance, one without."""


BASELINE = Step("vanilla step", "vanilla", 2)
STEPS = (BASELINE, Step("full step at batch 1", "vanilla", 1), Step("planning step", "planning", 2), Step("fidelity step", "fidelity", 1))
"""Those of one graph stand together: where memory is short an engine is loaded for them and closed after them."""

HAND_OFF = "hand-off"


def measure(studio: Studio, rounds: int) -> Iterator[dict[str, Any]]:
    """Time every kind of step in each round, forwards and backwards in turn.

    Args:
        studio: of the bundle.
        rounds: how often.

    Yields:
        After each round, the results of all rounds so far: for each step its ``seconds`` and their ``ratio`` to the
        vanilla step's, its multiply-accumulates ``macs`` and their ratio ``bound``.
    """
    samples: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds):
        for step in STEPS if number % 2 == 0 else reversed(STEPS):
            samples[step.name].append(sample(_call(studio, step)))
        samples[HAND_OFF].append(_hand_off(studio))
        yield _results(studio, samples)


def sample(call: Callable[[], None]) -> float:
    """Mean seconds of a call, after one that is not timed."""
    call()
    calls, elapsed, start = 0, 0.0, time.perf_counter()
    while calls == 0 or elapsed < LEAST_SECONDS:
        call()
        calls += 1
        elapsed = time.perf_counter() - start
    return elapsed / calls


def _results(studio: Studio, samples: Mapping[str, list[float]]) -> dict[str, Any]:
    results: dict[str, Any] = against(samples, BASELINE.name)
    work = studio.macs(BASELINE.graph, BASELINE.rows)
    for step in STEPS:
        macs = studio.macs(step.graph, step.rows)
        results[step.name] |= {"graph": step.graph, "rows": step.rows, "macs": macs, "bound": macs / work}
    results[HAND_OFF] |= {"graph": None, "rows": 2, "macs": 0, "bound": None}
    return results


def _call(studio: Studio, step: Step) -> Callable[[], None]:
    """One call of an engine on random inputs, in memory that stays where it is."""
    (engine,) = studio.engines(step.graph)
    inputs = random_inputs(engine.spec.inputs, step.rows, torch.Generator().manual_seed(0))
    outputs = _random(engine.spec.outputs, step.rows)
    return lambda: engine.run(inputs, outputs)


def _hand_off(studio: Studio) -> float:
    """Seconds of the denoiser's own hand-off of one guided picture, between engines that need not be loaded."""
    pipeline = studio.pipeline
    planning, fidelity = (_Noise(studio.spec(graph)) for graph in (TGATE.planning, TGATE.fidelity))
    denoiser = GatedDenoiser(pipeline, studio.architecture, planning, fidelity, gate_step=1)
    setattr(pipeline, studio.bundle.manifest.model["attribute"], denoiser)
    watch = Stopwatch()
    with watch.watching(denoiser, "_hand_off", HAND_OFF):
        draw = partial(pipeline, "", num_inference_steps=2, output_type="latent", **studio.picture_size)
        draw()
        watch.seconds.clear()
        calls, start = 0, time.perf_counter()
        while calls == 0 or time.perf_counter() - start < LEAST_SECONDS:
            draw()
            calls += 1
    return watch.seconds[HAND_OFF] / calls


def _random(tensors: tuple[TensorSpec, ...], rows: int) -> dict[str, Tensor]:
    """Values of unit scale: memory as it comes may hold denormal numbers, which take longer."""
    return {tensor.name: torch.randn(tensor.concrete(**{ROWS: rows})).to(getattr(torch, tensor.dtype)) for tensor in tensors}


@dataclass(frozen=True)
class _Noise:
    """An engine that writes random numbers."""

    spec: GraphSpec

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], stream: int | None = None) -> None:
        for tensor in outputs.values():
            tensor.normal_()

    def replace_weights(self, weights: Mapping[str, Tensor]) -> None:
        """There are none."""

    def unload(self) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is held."""

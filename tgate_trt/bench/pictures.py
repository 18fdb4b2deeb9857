"""Whole pictures through the pipeline, and where their time goes outside the engines."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from tgate_trt.bench.spread import against, spread
from tgate_trt.bench.stopwatch import Stopwatch
from tgate_trt.bench.studio import METHODS, VANILLA, Method, Studio
from tgate_trt.denoiser import GatedDenoiser

PROMPT = "a small red circle at the top left on a blue background"

GUIDANCE_SCALE = 7.5
"""Any scale above 1 takes the same time."""

ENGINES = "engines"
PARTS = (ENGINES, "denoiser", "text encoding", "VAE decoding", "scheduler", "rest")
"""What a picture's time is split into; ``denoiser`` is what `GatedDenoiser` does around the engines, the hand-off included."""

_WARM_UP_STEPS = 2
"""One step before the gate and one after it, so that every engine has run."""


def measure(studio: Studio, rounds: int, *, gate: float, steps: int) -> Iterator[dict[str, Any]]:
    """Draw one picture by each method in each round, forwards and backwards in turn.

    Args:
        studio: of the bundle.
        rounds: how often.
        gate: where the gate stands, as a fraction of the steps.
        steps: of a picture.

    Yields:
        After each round, the results of all rounds so far: for each method its ``seconds`` and their ``ratio`` to vanilla,
        the seconds of its ``parts`` and those ``outside_engines``, its multiply-accumulates ``macs`` and their ratio ``bound``.
    """
    samples: dict[str, list[dict[str, float]]] = defaultdict(list)
    for number in range(rounds):
        for method in METHODS if number % 2 == 0 else reversed(METHODS):
            samples[method.name].append(_draw(studio, method, gate, steps))
        yield _results(studio, samples, gate, steps)


def _draw(studio: Studio, method: Method, gate: float, steps: int) -> dict[str, float]:
    """Seconds of each part of one picture, after a short one that is not timed."""
    denoiser = studio.put(method, gate)
    _picture(studio, denoiser, _WARM_UP_STEPS)
    return _picture(studio, denoiser, steps)


def _picture(studio: Studio, denoiser: GatedDenoiser, steps: int) -> dict[str, float]:
    pipeline, watch = studio.pipeline, Stopwatch()
    generator = torch.Generator().manual_seed(0)
    with _watching(watch, pipeline, denoiser), watch.time("rest"):
        pipeline(PROMPT, num_inference_steps=steps, guidance_scale=GUIDANCE_SCALE, generator=generator, **studio.picture_size)
    return {part: watch.seconds.get(part, 0.0) for part in PARTS}


@contextlib.contextmanager
def _watching(watch: Stopwatch, pipeline: Any, denoiser: GatedDenoiser) -> Iterator[None]:
    """While this lasts, the watch tells the parts of the pipeline's calls."""
    with contextlib.ExitStack() as stack:
        for engine in {id(engine): engine for engine in (denoiser.planning, denoiser.fidelity)}.values():
            stack.enter_context(watch.watching(engine, "run", ENGINES))
        stack.enter_context(watch.watching(denoiser, "forward", "denoiser"))
        stack.enter_context(watch.watching(pipeline, "encode_prompt", "text encoding"))
        stack.enter_context(watch.watching(pipeline.vae, "decode", "VAE decoding"))
        stack.enter_context(watch.watching(pipeline.scheduler, "step", "scheduler"))
        yield


def _results(studio: Studio, samples: Mapping[str, list[dict[str, float]]], gate: float, steps: int) -> dict[str, Any]:
    results: dict[str, Any] = against({name: [sum(parts.values()) for parts in row] for name, row in samples.items()}, VANILLA.name)
    work = studio.macs_of(VANILLA, gate, steps)
    for method in METHODS:
        row, macs, planning = samples[method.name], studio.macs_of(method, gate, steps), method.planning_steps(gate, steps)
        results[method.name] |= {
            "label": method.label(planning),
            "planning_steps": planning,
            "macs": macs,
            "bound": macs / work,
            "parts": {part: spread([parts[part] for parts in row]) for part in PARTS},
            "outside_engines": spread([sum(parts.values()) - parts[ENGINES] for parts in row]),
        }
    return results

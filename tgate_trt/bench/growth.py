"""The cost of growth: build time, memory and step time of models from the demo model to SDXL, with random weights on the CPU.

Each model is built by ``tgate-build`` (see `tgate_trt.bench.build_cost`), and each kind of step is timed in a process of its own
that holds one engine, so that SDXL in fp32 fits a machine of 24 GiB.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tgate_trt import children
from tgate_trt.analysis.record import environment
from tgate_trt.bench import build_cost
from tgate_trt.bench.macs import rows_of_step
from tgate_trt.bench.memory import INTERVAL, watching
from tgate_trt.bench.spread import spread
from tgate_trt.bundle.backends import ONNXRUNTIME
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.export.macs import macs_of_graph
from tgate_trt.export.verify import random_inputs
from tgate_trt.models.resolve import resolve
from tgate_trt.models.source import ModelSource
from tgate_trt.running.loading import load_engine

logger = logging.getLogger(__name__)

MODELS = ("shapes", "sd15", "sd21", "sdxl")
"""Models that are measured by default."""

GRAPHS = ("vanilla", "planning", "fidelity")
"""Graphs of which a step is timed."""

PRECISION = "fp32"

LEAST_CALLS, LEAST_SECONDS = 5, 2.0
"""A step is called until both are reached, after one call that is not timed."""

_LARGEST_SIZE = 256
"""Largest side of the pictures in pixels, unless the caller gives one: a step of SDXL at its own size takes minutes on a CPU."""


@dataclass(frozen=True)
class Task:
    """One kind of step, which a process of its own measures."""

    bundle: str
    graph: str
    rows: int
    threads: int | None
    """CPU threads; one a core if None."""


def measure(
    names: Sequence[str] = MODELS,
    *,
    known: Mapping[str, Any] | None = None,
    size: int | None = None,
    threads: int | None = None,
    folder: Path = Path("bundles"),
) -> Iterator[dict[str, Any]]:
    """Measure models, except those that the same commit and packages measured before in the same way.

    Args:
        names: names of `tgate_trt.models.architectures.ARCHITECTURES`, or diffusers folders.
        known: results of an earlier run, which this one continues; its other models are kept.
        size: side of the pictures in pixels; if None, the model's own, 256 at most.
        threads: CPU threads of a step; one a core if None.
        folder: where bundles are built, one at a time; each is deleted.

    Yields:
        After each model, all results so far, as JSON data: ``models``, by name, each with ``parameters``, ``size``, ``build``
        (see `build_cost.measure`), ``steps``, date, machine, versions and commit.

    Raises:
        InputError: if there is no such model.
        BuildError: if a model cannot be built or stepped.
    """
    sources = [resolve(name, random_weights=True) for name in names]
    record: dict[str, Any] = {"models": dict((known or {}).get("models", {}))}
    for source in sources:
        side = size or min(source.height, source.width, _LARGEST_SIZE)
        before, now = record["models"].get(source.name), environment() | {"size": side, "threads": threads}
        if before is not None and is_same(before, now):
            logger.info("%s was measured before, at %s", source.name, before["date"])
        else:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="growth-", dir=folder) as temporary:
                record["models"][source.name] = now | _measure(source, side, threads, Path(temporary) / source.name)
        yield copy.deepcopy(record)


def is_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two measurements are of the same code, machine and settings."""
    return (
        all(before[key] == now[key] for key in ("commit", "versions", "size", "threads"))
        and before["machine"]["cpu"] == now["machine"]["cpu"]
    )


def _measure(source: ModelSource, side: int, threads: int | None, folder: Path) -> dict[str, Any]:
    logger.info("%s: building …", source.name)
    build = build_cost.measure(source.reference.model, PRECISION, folder, build_cost.Engines(), size=side, graphs=GRAPHS, keep=True)
    logger.info("%s: built in %.0f s", source.name, build["seconds"])
    return {
        "parameters": sum(map(math.prod, source.tensor_shapes().values())),
        "precision": PRECISION,
        "build": build,
        "steps": {graph: _steps(Task(str(folder), graph, 1 if graph == "fidelity" else rows_of_step(source), threads)) for graph in GRAPHS},
    }


def _steps(task: Task) -> dict[str, Any]:
    logger.info("%s step …", task.graph)
    load = os.getloadavg()[0]
    found = children.run(_step, task, f"a {task.graph} step", "if memory ran out, free some, or measure at a smaller size")
    sizes = Bundle.open(task.bundle).graph(task.graph).sizes(task.rows)
    macs = macs_of_graph(Path(task.bundle) / f"{task.graph}.onnx", sizes)
    result = {"rows": task.rows, "macs": asdict(macs), "load_average_before": load, **found}
    logger.info("%s step: %.3g s", task.graph, result["seconds"]["median"])
    return result


def _step(task: Task) -> dict[str, Any]:
    """Load an engine and call it, in the process that was started for it; memory is measured until the timed calls begin."""
    generator = torch.Generator().manual_seed(0)
    with watching(os.getpid(), INTERVAL) as memory:
        bundle, start = Bundle.open(task.bundle), time.perf_counter()
        engine = load_engine(bundle, task.graph, backend=ONNXRUNTIME, device=torch.device("cpu"), threads=task.threads)
        loading = time.perf_counter() - start
        inputs, outputs = (
            random_inputs(tensors, engine.spec.sizes(task.rows), generator) for tensors in (engine.spec.inputs, engine.spec.outputs)
        )
        engine.run(inputs, outputs)
    wall, cpu = _samples(lambda: engine.run(inputs, outputs))
    return {"load_seconds": loading, "seconds": spread(wall), "cpu_seconds": spread(cpu), "memory": memory.to_json()}


def _samples(call: Callable[[], None]) -> tuple[list[float], list[float]]:
    """Seconds of each call by the clock, and of processor time that it took."""
    wall: list[float] = []
    cpu: list[float] = []
    while len(wall) < LEAST_CALLS or sum(wall) < LEAST_SECONDS:
        start, worked = time.perf_counter(), time.process_time()
        call()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - worked)
    return wall, cpu


def by_parameters(results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The models of `measure` with their measurements, from few parameters to many."""
    return sorted(results["models"].items(), key=lambda item: int(item[1]["parameters"]))

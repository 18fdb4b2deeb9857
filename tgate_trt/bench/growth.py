"""What growth costs: build time, memory and step time of models from the demo model to SDXL, in random weights on the CPU.

Each model is built by ``tgate-build`` as anyone would, and each kind of step is timed in a process of its own that holds one
engine: so SDXL in fp32 fits a machine of 24 GiB.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tgate_trt import children
from tgate_trt.analysis.record import environment
from tgate_trt.bench import build_cost
from tgate_trt.bench.macs import macs_of_graph, rows_of_step
from tgate_trt.bench.memory import anonymous
from tgate_trt.bench.spread import spread
from tgate_trt.bench.units import gigabytes, seconds
from tgate_trt.bundle.backends import ONNXRUNTIME
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.errors import InputError
from tgate_trt.export.verify import random_inputs
from tgate_trt.files import replacing
from tgate_trt.models.resolve import resolve
from tgate_trt.models.source import ModelSource
from tgate_trt.running.loading import load_engine

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

MODELS = ("shapes", "sd15", "sd21", "sdxl")
"""What is measured unless the caller says otherwise."""

GRAPHS = ("vanilla", "planning", "fidelity")
"""Of which a step is timed."""

PRECISION = "fp32"

LEAST_CALLS, LEAST_SECONDS = 5, 2.0
"""A step is called until both have passed, after one call that is not timed."""

_LARGEST_SIZE = 256
"""Side of the pictures, in pixels, of models whose own are larger: a step of SDXL at its own size takes minutes on a CPU."""


@dataclass(frozen=True)
class Task:
    """What a process steps."""

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
    """Measure models, those apart that were measured before by the same commit and packages in the same way.

    Args:
        names: of `tgate_trt.models.architectures.ARCHITECTURES`, or diffusers folders.
        known: what an earlier run gave, which this one goes on from; what it holds of other models stays.
        size: side of the pictures in pixels; the model's own, or 256 if that is less, if None.
        threads: CPU threads of a step; one a core if None.
        folder: where bundles are built, one at a time; they are deleted.

    Yields:
        After each model, all that there is, as JSON data: ``models``, by name, each with ``parameters``, ``size``, ``build``
        (see `build_cost.measure`) and ``steps``, and with date, machine, versions and commit.

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
    """Whether the same code on the same machine, asked the same, has measured."""
    return (
        all(before[key] == now[key] for key in ("commit", "versions", "size", "threads"))
        and before["machine"]["cpu"] == now["machine"]["cpu"]
    )


def _measure(source: ModelSource, side: int, threads: int | None, folder: Path) -> dict[str, Any]:
    logger.info("%s: building …", source.name)
    engines, worked = build_cost.Engines(ONNXRUNTIME), _cpu_of_children()
    build = build_cost.measure(source.reference.model, PRECISION, folder, engines, size=side, graphs=GRAPHS, keep=True)
    build["cpu_seconds"] = _cpu_of_children() - worked
    build["arguments"] = [source.name if argument == str(folder) else argument for argument in build["arguments"]]
    logger.info("%s: built in %.0f s", source.name, build["seconds"])
    return {
        "parameters": sum(map(math.prod, source.tensor_shapes().values())),
        "precision": PRECISION,
        "build": build,
        "steps": {graph: _steps(Task(str(folder), graph, 1 if graph == "fidelity" else rows_of_step(source), threads)) for graph in GRAPHS},
    }


def _cpu_of_children() -> float:
    """Seconds that processors have worked for processes of ours, and for theirs, that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _steps(task: Task) -> dict[str, Any]:
    logger.info("%s step …", task.graph)
    load = os.getloadavg()[0]
    found = children.run(_step, task, f"a {task.graph} step", "if memory ran out, free some, or measure at a smaller size")
    macs = macs_of_graph(Path(task.bundle) / f"{task.graph}.onnx", task.rows)
    result = {"rows": task.rows, "macs": asdict(macs), "load_average_before": load, **found}
    logger.info("%s step: %.3g s", task.graph, result["seconds"]["median"])
    return result


def _step(task: Task) -> dict[str, Any]:
    """Load an engine and call it, in the process that was started for it."""
    bundle, start = Bundle.open(task.bundle), time.perf_counter()
    engine = load_engine(bundle, task.graph, backend=ONNXRUNTIME, device=torch.device("cpu"), threads=task.threads)
    loading = time.perf_counter() - start
    generator = torch.Generator().manual_seed(0)
    inputs, outputs = (random_inputs(tensors, task.rows, generator) for tensors in (engine.spec.inputs, engine.spec.outputs))
    engine.run(inputs, outputs)
    wall, cpu = _samples(lambda: engine.run(inputs, outputs))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "load_seconds": loading,
        "seconds": spread(wall),
        "cpu_seconds": spread(cpu),
        "memory": {"peak_anonymous": anonymous(), "peak_total": peak},
    }


def _samples(call: Callable[[], None]) -> tuple[list[float], list[float]]:
    """Seconds of each call by the clock, and those that the processors worked for this process meanwhile."""
    wall: list[float] = []
    cpu: list[float] = []
    while len(wall) < LEAST_CALLS or sum(wall) < LEAST_SECONDS:
        start, worked = time.perf_counter(), time.process_time()
        call()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - worked)
    return wall, cpu


HEADER = ("model", "parameters", "pictures", "build", "its memory", "on disk", *(f"{graph} step" for graph in GRAPHS), "memory of a step")
"""Of the table of `rows`."""


def rows(record: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """The measurements as a table under `HEADER`, a model a row, from few parameters to many."""
    return tuple(_row(name, found) for name, found in _by_parameters(record))


def _row(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    build, steps = found["build"], [found["steps"][graph] for graph in GRAPHS]
    return (
        name,
        f"{found['parameters'] / 1e6:,.1f} M",
        f"{found['size']}²",
        f"{build['seconds']:,.0f} s, {build['cpu_seconds']:,.0f} s",
        gigabytes(build["memory"]["peak_anonymous"]),
        gigabytes(build["disk"]["bundle"]),
        *(_seconds(step["seconds"], step["cpu_seconds"]["median"]) for step in steps),
        gigabytes(max(step["memory"]["peak_anonymous"] for step in steps)),
    )


def notes(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Sentences to go with the table: on what it was measured, and how."""
    found = dict(_by_parameters(record))
    machines = dict.fromkeys(f"{one['machine']['cpu']}, {one['machine']['cores']} cores" for one in found.values())
    loads = (f"{name} {one['machine']['load_average_before']:.1f}, {_load_of_steps(one):.1f}" for name, one in found.items())
    return (
        f"{'; '.join(machines)}; ONNX Runtime, {PRECISION}, random weights, builds without verification.",
        "A step's time is a median, in brackets the 10th to 90th percentile; after the comma is the time that processors worked, which"
        " others' work on the machine stretches less.",
        "Vanilla and planning steps have two rows under guidance, fidelity steps have one.",
        "Memory is anonymous, at its peak: of a build's whole process tree, and of a step's process.",
        f"Load average before the build, and before the steps at the most: {'; '.join(loads)}.",
    )


def _load_of_steps(found: Mapping[str, Any]) -> float:
    return max(float(step["load_average_before"]) for step in found["steps"].values())


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Draw build time, memory and step time over parameters, all logarithmic, a panel each.

    Args:
        record: from `measure`.
        path: of the picture; its suffix says of what kind.

    Raises:
        InputError: if nothing was measured.
    """
    from matplotlib.figure import Figure

    found = _by_parameters(record)
    if not found:
        raise InputError("nothing was measured, so there is nothing to draw")
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(_PANELS)), _PANELS.items(), strict=True):
        _draw(axes, title, found, lines)
    sizes = ", ".join(f"{name} {one['size']}²" for name, one in found)
    figure.supxlabel(f"parameters of the denoiser, in millions (pictures: {sizes})", fontsize=10)
    with replacing(path) as partial:
        figure.savefig(partial, format=path.suffix.removeprefix(".") or "png", dpi=150)


@dataclass(frozen=True)
class _Line:
    label: str
    value: Callable[[Mapping[str, Any]], float]
    """What it shows of a model's measurements."""
    colour: str
    """One for one thing, in every panel."""
    style: str = "o-"


def _time_of(graph: str, clock: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda one: float(one["steps"][graph][clock]["median"])


def _memory_of(graph: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda one: float(one["steps"][graph]["memory"]["peak_anonymous"] / 1e9)


_COLOURS = {"build": "C3", "vanilla": "C0", "planning": "C1", "fidelity": "C2", "weights": "0.6"}

_PANELS: Mapping[str, tuple[_Line, ...]] = {
    "Build time, s": (
        _Line("elapsed", lambda one: float(one["build"]["seconds"]), _COLOURS["build"]),
        _Line("processor time", lambda one: float(one["build"]["cpu_seconds"]), _COLOURS["build"], "o:"),
    ),
    "Peak anonymous memory, GB": (
        _Line("build", lambda one: float(one["build"]["memory"]["peak_anonymous"] / 1e9), _COLOURS["build"]),
        _Line("vanilla step", _memory_of("vanilla"), _COLOURS["vanilla"]),
        _Line("fidelity step", _memory_of("fidelity"), _COLOURS["fidelity"]),
        _Line("denoiser's weights", lambda one: float(one["build"]["disk"]["denoiser_weights"] / 1e9), _COLOURS["weights"], "-"),
    ),
    "Time of a step, s": (
        *(_Line(graph, _time_of(graph, "seconds"), _COLOURS[graph]) for graph in GRAPHS),
        *(_Line(f"{graph}, processor time", _time_of(graph, "cpu_seconds"), _COLOURS[graph], "o:") for graph in ("vanilla", "fidelity")),
    ),
}


def _draw(axes: Axes, title: str, found: Sequence[tuple[str, Mapping[str, Any]]], lines: Sequence[_Line]) -> None:
    """One panel, with plain numbers on its axes."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    millions = [one["parameters"] / 1e6 for _, one in found]
    for line in lines:
        values = [line.value(one) for _, one in found]
        axes.loglog(millions, values, line.style, color=line.colour, label=line.label, markersize=4, linewidth=1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.92", linewidth=0.6)
    axes.legend(frameon=False, fontsize=9)


def _by_parameters(record: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return sorted(record["models"].items(), key=lambda item: int(item[1]["parameters"]))


def _seconds(elapsed: Mapping[str, Any], worked: float) -> str:
    median, low, high = (seconds(elapsed[key]) for key in ("median", "p10", "p90"))
    return f"{median} ({low} … {high}), {seconds(worked)}"

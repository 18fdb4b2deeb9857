"""What growth costs: build time, memory and step time of models from the demo model to SDXL, in random weights on the CPU.

Each model is built by ``tgate-build`` as anyone would, and each kind of step is timed in a process of its own that holds one
engine: so SDXL in fp32 fits a machine of 24 GiB. The results are one JSON file, written after each model.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tgate_trt import children, models
from tgate_trt.backends import ONNXRUNTIME, load_engine
from tgate_trt.bench import build_cost
from tgate_trt.bench.macs import macs_of_graph, rows_of_step
from tgate_trt.bench.spread import spread
from tgate_trt.bundle import Bundle, replace_file, replacing
from tgate_trt.errors import InputError
from tgate_trt.export.verify import random_inputs
from tgate_trt.models import ModelSource
from tgate_trt.record import environment

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

SCHEMA = 1
"""Version of the file's form."""

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
    output: Path,
    size: int | None = None,
    threads: int | None = None,
    again: bool = False,
    folder: Path = Path("bundles"),
) -> dict[str, Any]:
    """Measure models, those apart that were measured before by the same commit and packages in the same way.

    Args:
        names: of `tgate_trt.models.ARCHITECTURES`, or diffusers folders.
        output: JSON file; what it holds of other models stays.
        size: side of the pictures in pixels; the model's own, or 256 if that is less, if None.
        threads: CPU threads of a step; one a core if None.
        again: whether to measure even so.
        folder: where bundles are built, one at a time; they are deleted.

    Returns:
        JSON data: ``models``, by name, each with ``parameters``, ``size``, ``build`` (see `build_cost.measure`) and ``steps``,
        and with date, machine, versions and commit.

    Raises:
        InputError: if there is no such model, or the file is something else.
        BuildError: if a model cannot be built or stepped.
    """
    sources = [models.resolve(name, random_weights=True) for name in names]
    record: dict[str, Any] = read(output) if output.exists() else {"schema": SCHEMA, "models": {}}
    for source in sources:
        side = size or min(source.height, source.width, _LARGEST_SIZE)
        before, now = record["models"].get(source.name), environment() | {"size": side, "threads": threads}
        if before is not None and not again and is_same(before, now):
            logger.info("%s was measured before, at %s", source.name, before["date"])
            continue
        output.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="growth-", dir=folder) as temporary:
            record["models"][source.name] = now | _measure(source, side, threads, Path(temporary) / source.name)
        replace_file(output, json.dumps(record, indent=2) + "\n")
    return record


def read(path: Path) -> dict[str, Any]:
    """What `measure` wrote.

    Raises:
        InputError: if the file is something else.
    """
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        is_ours = record["schema"] == SCHEMA and isinstance(record["models"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        is_ours = False
    if not is_ours:
        raise InputError(f"{path} holds no measurements of growth that this version reads; move it away and measure again")
    return record


def is_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether the same code on the same machine, asked the same, has measured."""
    return (
        all(before[key] == now[key] for key in ("commit", "versions", "size", "threads"))
        and before["machine"]["cpu"] == now["machine"]["cpu"]
    )


def _measure(source: ModelSource, side: int, threads: int | None, folder: Path) -> dict[str, Any]:
    logger.info("%s: building …", source.name)
    engines, worked = build_cost.Engines(ONNXRUNTIME), _cpu_of_children()
    build = build_cost.measure(source.reference, PRECISION, folder, engines, size=side, graphs=GRAPHS, keep=True)
    build["cpu_seconds"] = _cpu_of_children() - worked
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
    found = children.run(__name__, task, f"a {task.graph} step", "if memory ran out, free some, or measure at a smaller size")
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
        "memory": {"peak_anonymous": _anonymous(), "peak_total": peak},
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


def _anonymous() -> int:
    """Bytes of this process's memory without pages of files, which the system can drop; an engine keeps what its calls took."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


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
        f"{build['seconds']:,.0f} s ({build['cpu_seconds']:,.0f} s)",
        f"{build['memory']['peak_anonymous'] / 1e9:,.2f} GB",
        f"{build['disk']['bundle'] / 1e9:,.2f} GB",
        *(_seconds(step["seconds"]) for step in steps),
        f"{max(step['memory']['peak_anonymous'] for step in steps) / 1e9:,.2f} GB",
    )


def notes(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Sentences to go with the table: on what it was measured, and how."""
    found = dict(_by_parameters(record))
    machines = dict.fromkeys(f"{one['machine']['cpu']}, {one['machine']['cores']} cores" for one in found.values())
    loads = (f"{name} {one['machine']['load_average_before']:.1f}, {_load_of_steps(one):.1f}" for name, one in found.items())
    return (
        f"{'; '.join(machines)}; ONNX Runtime, {PRECISION}, random weights, builds without verification.",
        "In brackets: beside a build's time that for which processors worked, beside a step's median the 10th to 90th percentile.",
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


_Value = Callable[[Mapping[str, Any]], float]
"""What a line shows of a model's measurements."""


def _time_of(graph: str) -> _Value:
    return lambda one: float(one["steps"][graph]["seconds"]["median"])


def _memory_of(graph: str) -> _Value:
    return lambda one: float(one["steps"][graph]["memory"]["peak_anonymous"] / 1e9)


_PANELS: Mapping[str, Mapping[str, _Value]] = {
    "Build time, s": {
        "elapsed": lambda one: float(one["build"]["seconds"]),
        "of processors": lambda one: float(one["build"]["cpu_seconds"]),
    },
    "Peak anonymous memory, GB": {
        "build": lambda one: float(one["build"]["memory"]["peak_anonymous"] / 1e9),
        "vanilla step": _memory_of("vanilla"),
        "fidelity step": _memory_of("fidelity"),
        "denoiser's weights": lambda one: float(one["build"]["disk"]["denoiser_weights"] / 1e9),
    },
    "Time of a step, s": {graph: _time_of(graph) for graph in GRAPHS},
}


def _draw(axes: Axes, title: str, found: Sequence[tuple[str, Mapping[str, Any]]], lines: Mapping[str, _Value]) -> None:
    """One panel, with plain numbers on its axes."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    millions = [one["parameters"] / 1e6 for _, one in found]
    for label, value in lines.items():
        axes.loglog(millions, [value(one) for _, one in found], marker="o", markersize=4, linewidth=1.2, label=label)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.set_minor_locator(LogLocator(subs=(1,)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.92", linewidth=0.6)
    axes.legend(frameon=False, fontsize=9)


def _by_parameters(record: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return sorted(record["models"].items(), key=lambda item: int(item[1]["parameters"]))


def _seconds(spread: Mapping[str, Any]) -> str:
    """Three digits, in the unit that suits the median, with the spread in brackets."""
    unit, scale = ("s", 1.0) if spread["median"] >= 1 else ("ms", 1e3)
    median, low, high = (f"{spread[key] * scale:#.3g}".rstrip(".") for key in ("median", "p10", "p90"))
    return f"{median} {unit} ({low}–{high})"


if __name__ == "__main__":
    children.answer(_step, Task)

"""The measurements of ``tgate-bench``: each function yields records, of which each holds the results so far and the last holds all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tgate_trt.analysis.record import describe, environment, read, record_of
from tgate_trt.bench import build_cost, growth, kernels, load, macs, probe, spacings, steps
from tgate_trt.bench.measure import Plan, conditions_of, device_of, prepare
from tgate_trt.building.builder import add_graph
from tgate_trt.bundle.backends import choose_backend
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.errors import InputError
from tgate_trt.models.resolve import resolve

MACS_OF = ("sd15", "sd21", "sdxl")
"""Models that are counted by default."""

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class QualityPlan:
    """How many pictures are judged, and by which networks."""

    samples: int = 100
    clip: Path | None = None
    """Folder of a CLIP for CLIP scores, if any."""
    inception: Path | None = None
    """TorchScript file of an Inception for FID, if any."""


def pictures(plan: Plan, quality: QualityPlan | None, command: str) -> Iterator[Record]:
    """Measure a bundle; see `tgate_trt.bench.measure`.

    Yields:
        A record after every round, after quality, and after memory.
    """
    before = environment()
    measurement = prepare(plan)

    def record(results: Any, judged: Any = None) -> Record:
        found = {"settings": results, "quality": judged}
        return record_of("pictures", command, before, conditions_of(measurement), found, describe(measurement.studio.bundle))

    with measurement.studio:
        for results in measurement.run():
            yield record(results)
        judged = None
        if quality is not None:
            judged = measurement.quality(quality.samples, quality.clip, quality.inception)
            yield record(measurement.results(), judged)
    if plan.memory:  # in processes of their own, when this one has freed its engines
        measurement.measure_memory()
        yield record(measurement.results(), judged)


def judge_spacings(bundle: Path, samples: int, seed: int, backend: str | None, command: str) -> Iterator[Record]:
    """Judge the demo model's default gate on every spacing of the steps; see `tgate_trt.bench.spacings`."""
    before, opened = environment(), Bundle.open(bundle)
    settings = {"samples": samples, "seed": seed, "backend": backend, "gates": list(spacings.gates_of(opened))}
    for rows in spacings.measure(opened, samples, seed, backend):
        yield record_of("spacings", command, before, settings, rows, describe(opened))


def count_macs(names: Sequence[str], command: str) -> Iterator[Record]:
    """Count multiply-accumulates and parameters of models on their cut graphs; of `MACS_OF` if there are no names."""
    before, found = environment(), []
    for name in names or MACS_OF:
        cost = macs.cost_of(name)
        rows = [dataclasses.asdict(row) | {"deviation": row.deviation} for row in cost.pictures()]
        parameters = dataclasses.asdict(cost.parameters) | {"without_cross_attention": cost.parameters.without_cross_attention}
        found.append(dataclasses.asdict(cost) | {"parameters": parameters, "pictures": rows})
        yield record_of("macs", command, before, {}, list(found))


def measure_growth(names: Sequence[str], size: int | None, threads: int | None, command: str, earlier: Path | None) -> Iterator[Record]:
    """Measure builds and steps from small models to large ones.

    Args:
        names: names of models; `tgate_trt.bench.growth.MODELS` if empty.
        size: side of the pictures in pixels; see `tgate_trt.bench.growth.measure`.
        threads: CPU threads of an engine; one a core if None.
        command: the command line, for the record.
        earlier: file of an earlier run, which this one continues if it is there; what that one measured is not measured again.

    Raises:
        InputError: if the file holds something else, or a record of another version.
    """
    before, known = environment(), None
    if earlier is not None and earlier.exists():
        found = read(earlier)
        if found["what"] != "growth":
            raise InputError(f"{earlier} holds results of {found['what']}; choose another --json")
        known = found["results"]
    for results in growth.measure(tuple(names) or growth.MODELS, known=known, size=size, threads=threads):
        yield record_of("growth", command, before, {"size": size, "threads": threads}, results)


def measure_build(model: str, precision: str, engines: build_cost.Engines, size: int | None, command: str) -> Iterator[Record]:
    """Measure one build with random weights: time by stage, memory, and bytes on disk. The bundle is deleted."""
    name, before = resolve(model, random_weights=True).name, environment()
    folder = Path("bundles") / f"build-{name}-{precision}-{engines.name}"
    results = build_cost.measure(model, precision, folder, engines, size=size)
    subject = {"model": name, "precision": precision, "random_weights": True, "variant": engines.name}
    yield record_of("build", command, before, {}, results, subject)


def measure_steps(bundle: Path, backends: Sequence[str], images: int, rounds: int, threads: int | None, command: str) -> Iterator[Record]:
    """Time a step of each graph of a bundle; see `tgate_trt.bench.steps`. Graphs that it lacks are added."""
    before, opened = environment(), Bundle.open(bundle)
    chosen = tuple(choose_backend(opened, backend) for backend in (backends or (None,)))
    for graph in steps.GRAPHS:
        opened = add_graph(opened, graph)
    device = device_of(chosen)
    settings = {"images": images, "rounds": rounds, "threads": threads, "device": str(device)}
    for results in steps.measure(opened, chosen, images, rounds, device, threads):
        yield record_of("steps", command, before, settings, results, describe(opened))


def measure_load(bundle: Path, seconds: float, rounds: int, places: tuple[int, int], backend: str | None, command: str) -> Iterator[Record]:
    """Measure a server of a bundle under load, with places for pictures that run and wait; see `tgate_trt.bench.load.measure`."""
    before, opened = environment(), Bundle.open(bundle)
    running, queue = places
    settings = {"seconds": seconds, "rounds": rounds, "running": running, "queue": queue, "backend": choose_backend(opened, backend)}
    for results in load.measure(bundle, seconds, rounds, running=running, queue=queue, backend=backend):
        yield record_of("load", command, before, settings, results, describe(opened))


def measure_kernels(bundle: Path | None, rounds: int, command: str) -> Iterator[Record]:
    """Compile the kernels, time them where there is a GPU, and time a bundle's fidelity step with and without fusion.

    Args:
        bundle: folder of the bundle whose fidelity step is timed in PyTorch; no step if None.
        rounds: number of rounds.
        command: the command line, for the record.
    """
    before, device = environment(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    opened = Bundle.open(bundle) if bundle else None
    results: dict[str, Any] = {"cases": [], "fusion": None, "resources": kernels.resources()}
    subject = describe(opened) if opened else {}

    def record() -> Record:
        return record_of("kernels", command, before, {"rounds": rounds, "device": str(device)}, dict(results), subject)

    if opened:
        results["fusion"] = kernels.fusion(opened, rounds, device)
    yield record()
    if device.type == "cuda":
        for cases in kernels.measure(rounds):
            results["cases"] = list(cases)
            yield record()


def probe_tensorrt(command: str) -> Iterator[Record]:
    """Try each TensorRT, for this machine's GPU and for each compute capability that it supports."""
    before = environment()
    yield record_of("probe", command, before, {}, probe.probe())

"""What `tgate-bench` can measure, each as one call that gives a record; see `tgate_trt.bench.report` for their tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tgate_trt.analysis.record import describe, environment, read, record_of
from tgate_trt.bench import build_cost, growth, kernels, macs, probe
from tgate_trt.bench.measure import Plan, conditions_of, prepare
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.errors import InputError
from tgate_trt.models.resolve import resolve

MACS_OF = ("sd15", "sd21", "sdxl")
"""Models of the paper's table."""

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class QualityPlan:
    """Pictures that are judged, beside those that are timed."""

    samples: int = 100
    clip: Path | None = None
    """Folder of the CLIP that scores, if any."""
    inception: Path | None = None
    """TorchScript file of the Inception that FID is of, if any."""


def pictures(plan: Plan, quality: QualityPlan | None, command: str) -> Iterator[Record]:
    """Measure a bundle; see `tgate_trt.bench.measure`.

    Yields:
        A record after every round, and after what follows them: each holds all that the one before it did.
    """
    before = environment()
    measurement = prepare(plan)

    def record(results: Any, judged: Any = None) -> Record:
        found = {"settings": results, "quality": judged}
        return record_of("pictures", command, before, conditions_of(measurement), found, describe(measurement.studio.bundle))

    with measurement.studio:
        for results in measurement.run():
            yield record(results)
        if quality is not None:
            judged = measurement.quality(quality.samples, quality.clip, quality.inception)
            yield record(measurement.results(), judged)
        else:
            judged = None
    if plan.memory:  # in processes of their own, when this one has freed its engines
        measurement.measure_memory()
        yield record(measurement.results(), judged)


def count_macs(names: Sequence[str], command: str) -> Iterator[Record]:
    """Count multiply-accumulates and parameters of models, from their cut graphs."""
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
        names: of models; `tgate_trt.bench.growth.MODELS` if empty.
        size: side of the pictures in pixels.
        threads: of an engine.
        command: as it can be typed again.
        earlier: file of an earlier run; this one goes on from it, so that one that was cut off need not begin anew.

    Raises:
        InputError: if the file is something else.
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


def measure_kernels(bundle: Path | None, rounds: int, command: str) -> Iterator[Record]:
    """Time the kernels where there is a GPU, what fusion saves of a bundle's fidelity step, and what the compiler says.

    Args:
        bundle: whose fidelity step is timed in PyTorch; none if None.
        rounds: how often times are taken.
        command: as it can be typed again.
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
    """Try each TensorRT, for this GPU and for each that it knows."""
    before = environment()
    yield record_of("probe", command, before, {}, probe.probe())


_ARGUMENTS = {
    "pictures": (1, 1, "the folder of a bundle"),
    "macs": (0, None, "models"),
    "growth": (0, None, "models"),
    "build": (1, 1, "one model"),
    "kernels": (0, 1, "the folder of a bundle, or nothing"),
    "probe": (0, 0, "nothing"),
}
"""How many arguments each mode takes, at least and at most, and what they are."""


def mode_of(modes: Sequence[str], targets: Sequence[str]) -> str:
    """The one measurement that is asked for: a bundle's pictures if none is named.

    Raises:
        InputError: if several are, or the arguments are not such as it takes.
    """
    if len(modes) > 1:
        raise InputError(f"one measurement at a time, got {' '.join(f'--{mode}' for mode in modes)}")
    mode = modes[0] if modes else "pictures"
    least, most, what = _ARGUMENTS[mode]
    if len(targets) < least or (most is not None and len(targets) > most):
        command = "tgate-bench" if mode == "pictures" else f"tgate-bench --{mode}"
        raise InputError(f"{command} takes {what}, got {' '.join(targets) or 'nothing'}; see tgate-bench --help")
    return mode

"""Verify one graph of a bundle in a process of its own, which gives all its memory back.

The process is this module, run with one JSON argument; it prints one JSON line.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgate_trt import errors
from tgate_trt.errors import BuildError, TGateError
from tgate_trt.specs import MAXIMUM_ROWS, ROWS, Bounds, GraphSpec, TensorSpec
from tgate_trt.taps import GRAPHS, recipe

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from tgate_trt.export.verify import RunEager

_LARGE_PICTURE = 512 * 512
"""Pixels from which decoding takes minutes and gigabytes on a CPU."""

_LARGE = 500_000_000
"""Parameters above which a check takes minutes on a CPU, so that there are fewer rows."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What is to be verified."""

    model: str
    """What `tgate_trt.models.resolve` takes."""
    random_seed: int | None
    """Seed of random weights, or None for the model's own."""
    lora: list[tuple[str, float]]
    """Path and scale of each LoRA that is fused into the weights."""
    folder: str
    """Folder of the graph and its weights."""
    graph: str
    precision: str
    spec: dict[str, Any]
    """`GraphSpec.to_json` of the graph."""
    height: int
    width: int


def verify_in_child(task: Task) -> dict[str, Any]:
    """Verify in a child process.

    Returns:
        The report as JSON data: ``tolerance``, ``compared_with`` and ``checks``.

    Raises:
        VerificationError: if the graph differs from the eager model.
        BuildError: if the child did not come to an end.
    """
    command = [sys.executable, "-m", __spec__.name, json.dumps(dataclasses.asdict(task))]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        report: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = child.stderr.strip().splitlines()[-1:] or ["no message"]
        raise BuildError(
            f"verifying the {task.graph} graph stopped with exit code {child.returncode} ({last[0]}); "
            "if memory ran out, build with --no-verify"
        ) from None
    if "error" in report:
        raise getattr(errors, report["kind"])(report["error"])
    return report


def verify(task: Task) -> dict[str, Any]:
    """Verify in this process; see `verify_in_child`."""
    import torch

    from tgate_trt.engines.onnxruntime import OnnxRuntimeEngine
    from tgate_trt.export.verify import verify as compare

    spec = GraphSpec.from_json(task.graph, task.spec)
    reference = _denoiser(task) if task.graph in GRAPHS else _component(task, spec)
    every_row = dataclasses.replace(spec, dimensions={ROWS: Bounds(1, 1, MAXIMUM_ROWS)})
    report = compare(
        reference.load,
        lambda: OnnxRuntimeEngine(Path(task.folder) / f"{task.graph}.onnx", every_row, device=torch.device("cpu")).run,
        spec,
        reference.run,
        reference.signature,
        rows=reference.rows,
        precision=reference.precision,
        vocabulary=reference.vocabulary,
    )
    report.raise_if_wrong()
    return {
        "compared_with": "eager PyTorch, fp32",
        "tolerance": report.tolerance,
        "checks": [dataclasses.asdict(check) for check in report.checks],
    }


@dataclasses.dataclass(frozen=True)
class _Reference:
    """The eager model that a graph is compared with."""

    load: Callable[[], nn.Module]
    run: RunEager
    signature: tuple[TensorSpec, ...]
    rows: tuple[int, ...]
    """Batch sizes to compare at; fewer where each takes minutes on a CPU."""
    precision: str
    vocabulary: int = 1
    """Token ids are below it."""


def _denoiser(task: Task) -> _Reference:
    """The denoiser, from the model's own files."""
    import torch

    from tgate_trt import models
    from tgate_trt.export.eager import run_recipe
    from tgate_trt.lora import LoraFile

    loras = [LoraFile(Path(path), scale) for path, scale in task.lora]
    source = models.resolve(task.model, random_weights=task.random_seed is not None, seed=task.random_seed or 0, lora=loras)
    is_large = sum(torch.Size(shape).numel() for shape in source.tensor_shapes().values()) > _LARGE
    return _Reference(
        lambda: source.load_denoiser(torch.float32),
        lambda denoiser, inputs: run_recipe(denoiser, recipe(task.graph), inputs),
        source.signature(task.height, task.width, task.precision),
        (1, 2) if is_large else (1, 2, 3),
        task.precision,
    )


def _component(task: Task, spec: GraphSpec) -> _Reference:
    """A text encoder or VAE, from the bundle's own files, which hold its weights in the bundle's precision."""
    import torch

    from tgate_trt.bundle import PIPELINE
    from tgate_trt.components import components_of
    from tgate_trt.export.components import run_component

    pipeline = Path(task.folder) / PIPELINE
    component = components_of(pipeline)[task.graph]
    return _Reference(
        lambda: component.load(pipeline, torch.float32),
        lambda model, inputs: run_component(component.wrap(model), inputs),
        spec.inputs,
        (1,) if task.height * task.width >= _LARGE_PICTURE else (1, 2),
        component.precision(task.precision),
        component.config.get("vocab_size", 1),
    )


def main(argument: str) -> None:
    """Print the report, or a sentence that says what went wrong, as one JSON line."""
    try:
        report = verify(Task(**json.loads(argument)))
    except TGateError as error:
        report = {"error": str(error), "kind": type(error).__name__}
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

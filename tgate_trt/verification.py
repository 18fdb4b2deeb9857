"""Verify one graph of a bundle in a process of its own, which gives all its memory back.

The process is this module, run with one JSON argument; it prints one JSON line.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgate_trt import children
from tgate_trt.specs import MAXIMUM_ROWS, ROWS, Bounds, GraphSpec, TensorSpec
from tgate_trt.taps import GRAPHS, recipe

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from tgate_trt.export.verify import RunEager

_LARGE_PICTURE = 512 * 512
"""Pixels from which decoding takes minutes and gigabytes on a CPU."""


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
    return children.run(__name__, task, f"verifying the {task.graph} graph", "if memory ran out, build with --no-verify")


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
    from tgate_trt.eager import run_recipe

    source = models.resolve_again(task.model, task.random_seed, task.lora)
    return _Reference(
        lambda: source.load_denoiser(torch.float32),
        lambda denoiser, inputs: run_recipe(denoiser, recipe(task.graph), inputs),
        source.signature(task.height, task.width, task.precision),
        (1, 2) if source.is_large else (1, 2, 3),
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


if __name__ == "__main__":
    children.answer(verify, Task)

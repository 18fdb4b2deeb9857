"""Verify one graph of a bundle in a process of its own, which gives all its memory back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tgate_trt import children
from tgate_trt.bundle.components import components_of
from tgate_trt.bundle.manifest import PIPELINE, BuiltFor, graph_file
from tgate_trt.eager import run_recipe
from tgate_trt.export.components import run_component
from tgate_trt.export.verify import RunEager
from tgate_trt.export.verify import verify as compare
from tgate_trt.models.resolve import resolve_again
from tgate_trt.models.source import ModelReference
from tgate_trt.specs import MAXIMUM_ROWS, ROWS, Bounds, GraphSpec, TensorSpec
from tgate_trt.taps import GRAPHS, recipe

_LARGE_PICTURE = 512 * 512
"""Pixels from which decoding takes minutes and gigabytes on a CPU."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What to verify."""

    model: ModelReference
    folder: Path
    """Folder of the graph and its weights."""
    spec: GraphSpec
    """Of the graph."""
    built_for: BuiltFor


def verify_in_child(task: Task) -> dict[str, Any]:
    """Verify in a child process.

    Returns:
        The report as JSON data: ``tolerance``, ``compared_with`` and ``checks``.

    Raises:
        VerificationError: if the graph differs from the eager model.
        BuildError: if the child did not come to an end.
    """
    return children.run(verify, task, f"verifying the {task.spec.name} graph", "if memory ran out, build with --no-verify")


def verify(task: Task) -> dict[str, Any]:
    """Verify in this process; see `verify_in_child`."""
    from tgate_trt.engines.onnxruntime import OnnxRuntimeEngine  # the parent process needs no ONNX Runtime

    spec = task.spec
    reference = _denoiser(task) if spec.name in GRAPHS else _component(task)
    every_row = dataclasses.replace(spec, dimensions={ROWS: Bounds(1, 1, MAXIMUM_ROWS)})
    report = compare(
        reference.load,
        lambda: OnnxRuntimeEngine(task.folder / graph_file(spec.name), every_row, device=torch.device("cpu")).run,
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
    source, built_for = resolve_again(task.model), task.built_for
    return _Reference(
        lambda: source.load_denoiser(torch.float32),
        lambda denoiser, inputs: run_recipe(denoiser, recipe(task.spec.name), inputs),
        source.signature(built_for.height, built_for.width, built_for.precision),
        (1, 2) if source.is_large else (1, 2, 3),
        built_for.precision,
    )


def _component(task: Task) -> _Reference:
    """A text encoder or VAE, from the bundle's own files, which hold its weights in the bundle's precision."""
    pipeline, built_for = task.folder / PIPELINE, task.built_for
    component = components_of(pipeline)[task.spec.name]
    return _Reference(
        lambda: component.load(pipeline, torch.float32),
        lambda model, inputs: run_component(component.wrap(model), inputs),
        task.spec.inputs,
        (1,) if built_for.height * built_for.width >= _LARGE_PICTURE else (1, 2),
        component.precision(built_for.precision),
        component.config.get("vocab_size", 1),
    )

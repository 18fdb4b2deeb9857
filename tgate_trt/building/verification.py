"""Verify one graph of a bundle in a process of its own, which gives all its memory back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tgate_trt import children
from tgate_trt.building.graphs import signature_of
from tgate_trt.bundle.components import components_of
from tgate_trt.bundle.manifest import PIPELINE, BuiltFor, Check, Report, graph_file
from tgate_trt.eager import run_recipe
from tgate_trt.export.components import run_component
from tgate_trt.export.verify import Report as Comparisons
from tgate_trt.export.verify import RunEager
from tgate_trt.export.verify import verify as compare
from tgate_trt.models.resolve import resolve_again
from tgate_trt.models.source import ModelReference
from tgate_trt.specs import MAXIMUM_ROWS, ROWS, Bounds, GraphSpec
from tgate_trt.taps import is_of_denoiser, recipe

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


def verify_in_child(task: Task) -> Report:
    """Verify in a child process.

    Raises:
        VerificationError: if the graph differs from the eager model.
        BuildError: if the child did not come to an end.
    """
    return children.run(verify, task, f"verifying the {task.spec.name} graph", "if memory ran out, build with --no-verify")


def verify(task: Task) -> Report:
    """Verify in this process; see `verify_in_child`."""
    from tgate_trt.engines.onnxruntime import OnnxRuntimeEngine  # the parent process needs no ONNX Runtime

    spec = task.spec
    reference = _denoiser(task) if is_of_denoiser(spec.name) else _component(task)
    every_row = dataclasses.replace(spec, dimensions={**spec.dimensions, ROWS: Bounds(1, 1, MAXIMUM_ROWS)})
    report = compare(
        reference.load,
        lambda: OnnxRuntimeEngine(task.folder / graph_file(spec.name), every_row, device=torch.device("cpu")).run,
        spec,
        reference.run,
        reference.signature.inputs,
        rows=sizes_to_compare(reference.signature, reference.rows),
        precision=reference.precision,
        vocabulary=reference.vocabulary,
    )
    report.raise_if_wrong()
    return kept(report)


def sizes_to_compare(spec: GraphSpec, rows: Sequence[int]) -> list[dict[str, int]]:
    """Sizes at which a graph is compared: its optimum at each number of rows, and the ends of all other ranges at the first one."""
    sizes = [spec.sizes(each) for each in rows]
    if len(spec.dimensions) > 1:
        ends = [{name: getattr(bounds, end) for name, bounds in spec.dimensions.items()} for end in ("minimum", "maximum")]
        sizes += [{**end, ROWS: rows[0]} for end in ends]
    return sizes


def kept(report: Comparisons) -> Report:
    """What the manifest keeps of comparisons with the eager model."""
    checks = [Check(rows=check.rows, error=check.error, output=check.output) for check in report.checks]
    return Report(compared_with="eager PyTorch, fp32", tolerance=report.tolerance, checks=checks)


@dataclasses.dataclass(frozen=True)
class Reference:
    """The eager model that a graph is compared with."""

    load: Callable[[], nn.Module]
    run: RunEager
    signature: GraphSpec
    """All inputs of the model, and the bounds of what may vary."""
    rows: tuple[int, ...]
    """Batch sizes to compare at; fewer where each takes minutes on a CPU."""
    precision: str
    vocabulary: int = 1
    """Token ids are below it."""


def _denoiser(task: Task) -> Reference:
    """The denoiser, from the model's own files."""
    source, built_for = resolve_again(task.model), task.built_for
    return Reference(
        lambda: source.load_denoiser(torch.float32),
        lambda denoiser, inputs: run_recipe(denoiser, recipe(task.spec.name), inputs),
        signature_of(source, built_for),
        (1, 2) if source.is_large else (1, 2, 3),
        built_for.precision,
    )


def _component(task: Task) -> Reference:
    """A text encoder or VAE, from the bundle's own files."""
    return component_reference(task.folder / PIPELINE, task.spec, task.built_for)


def component_reference(pipeline: Path, spec: GraphSpec, built_for: BuiltFor, changed: Mapping[str, Tensor] | None = None) -> Reference:
    """A text encoder or VAE from a bundle's files, which hold its weights in the bundle's precision.

    Args:
        pipeline: the bundle's folder of the rest of the pipeline.
        spec: of the component's graph.
        built_for: of the bundle.
        changed: weights to put in the places of the files', by name.
    """
    component = components_of(pipeline)[spec.name]

    def load() -> nn.Module:
        model = component.load(pipeline, torch.float32)
        model.load_state_dict({name: tensor.float() for name, tensor in (changed or {}).items()}, strict=False)
        return model

    return Reference(
        load,
        lambda model, inputs: run_component(component.wrap(model), inputs),
        spec,
        (1,) if built_for.height.optimum * built_for.width.optimum >= _LARGE_PICTURE else (1, 2),
        component.precision(built_for.precision),
        component.config.get("vocab_size", 1),
    )

"""Write a bundle's graphs: the denoiser's trace, the graphs cut from it, and those of text encoders and VAE."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import onnx_ir as ir
from torch import nn

from tgate_trt import children
from tgate_trt.bundle.components import Component
from tgate_trt.bundle.manifest import TRACE, BuiltFor, graph_file
from tgate_trt.eager import torch_dtype
from tgate_trt.export import weights
from tgate_trt.export.components import names_in_files, trace_component
from tgate_trt.export.cut import cut, spec_of
from tgate_trt.export.fuse import fuse_cache_reuse
from tgate_trt.export.trace import trace
from tgate_trt.models.resolve import resolve_again
from tgate_trt.models.source import ModelReference, ModelSource
from tgate_trt.specs import LONGEST_TEXT, ROWS, TOKENS, GraphSpec
from tgate_trt.taps import recipe

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Task:
    """What to trace."""

    model: ModelReference
    folder: Path
    """Of the weights; the trace is written there."""
    built_for: BuiltFor


def write_trace(source: ModelSource, folder: Path, built_for: BuiltFor) -> None:
    """Write ``trace.onnx``, its parameters in the weights file beside it.

    PyTorch's exporter keeps a third of a gigabyte after SDXL, which would stay for the rest of a build, so large models are
    traced in a process of their own. That costs seconds, so small ones are traced in this one.

    Raises:
        BuildError: if PyTorch cannot trace or translate the model.
    """
    if source.is_large:
        children.run(trace_again, Task(source.reference, folder, built_for), "tracing the model", "if memory ran out, free some")
    else:
        _trace(source, folder, built_for)


def trace_again(task: Task) -> None:
    """Find the model and trace it: what a child process does."""
    _trace(resolve_again(task.model), task.folder, task.built_for)


def _trace(source: ModelSource, folder: Path, built_for: BuiltFor) -> None:
    denoiser = nn.Module.to(source.denoiser_on_meta(), torch_dtype(built_for.precision))
    spec = signature_of(source, built_for)
    others = {name: LONGEST_TEXT if name == TOKENS else bounds for name, bounds in spec.dimensions.items() if name != ROWS}
    _save(trace(denoiser, spec.inputs, others, spec.dimensions[ROWS].maximum), folder, TRACE)


def signature_of(source: ModelSource, built_for: BuiltFor) -> GraphSpec:
    """The inputs of the whole denoiser in a bundle.

    Raises:
        InputError: if the model cannot make pictures of these sizes.
        UnsupportedError: if it takes conditions that the graphs lack.
    """
    return source.spec(built_for.height, built_for.width, built_for.precision, built_for.text_tokens, built_for.controls)


def write_graph(folder: Path, traced: ir.Model, name: str, built_for: BuiltFor, signature: GraphSpec) -> GraphSpec:
    """Cut a graph from the trace and save it, its parameters in the weights file beside it.

    Args:
        folder: of the bundle.
        traced: the trace.
        name: of the graph.
        built_for: what the bundle is for.
        signature: inputs of the whole denoiser, with the bounds of every dimension.

    Returns:
        What the graph takes and gives.
    """
    model = cut(traced, recipe(name))
    spec = spec_of(model, name, built_for.rows(name), signature.dimensions)
    if spec.cache_inputs and built_for.fuse_cache_reuse:
        places = fuse_cache_reuse(model)
        logger.info("%s: the reuse of the cache is one op at %d of %d places", name, places, len(spec.cache_inputs))
    _save(model, folder, graph_file(name))
    return spec


def _save(model: ir.Model, folder: Path, name: str) -> None:
    weights.attach(model, folder, [folder / weights.WEIGHTS_FILE])
    ir.save(model, folder / name)


def write_component_graph(component: Component, folder: Path, spec: GraphSpec) -> None:
    """Trace a component without its weights, and save its graph in the bundle's folder."""
    architecture = component.on_meta(torch_dtype(spec.outputs[0].dtype))
    others = {name: bounds for name, bounds in spec.dimensions.items() if name != ROWS}
    model = trace_component(component.wrap(architecture), spec.inputs, spec.dimensions[ROWS].maximum, others)
    weights.attach(model, folder, component.weight_files(folder), names_in_files, "build with --no-components")
    ir.save(model, folder / graph_file(component.graph))

"""Write a bundle's graphs: the denoiser's trace, the graphs cut from it, and those of text encoders and VAE."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import onnx_ir as ir
from torch import nn

from tgate_trt import children
from tgate_trt.building import traces
from tgate_trt.building.traces import Traced
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


def write_trace(source: ModelSource, folder: Path, built_for: BuiltFor, *, anew: bool = False) -> None:
    """Write ``trace.onnx``, its parameters in the weights file beside it.

    PyTorch's exporter keeps a third of a gigabyte after SDXL, which would stay for the rest of a build, so large models are
    traced in a process of their own. That costs seconds, so small ones are traced in this one.

    Args:
        source: of the model.
        folder: of the bundle.
        built_for: what the bundle is for.
        anew: whether to trace a model whose trace the cache holds.

    Raises:
        BuildError: if PyTorch cannot trace or translate the model.
    """
    kept = None if anew else traces.find(_traced_from(source, built_for))
    if kept is not None:
        _save(kept, folder, TRACE)
    elif source.is_large:
        children.run(trace_again, Task(source.reference, folder, built_for), "tracing the model", "if memory ran out, free some")
    else:
        _trace(source, folder, built_for)


def trace_again(task: Task) -> None:
    """Find the model and trace it: what a child process does."""
    _trace(resolve_again(task.model), task.folder, task.built_for)


def _trace(source: ModelSource, folder: Path, built_for: BuiltFor) -> None:
    made_from = _traced_from(source, built_for)
    denoiser, spec = nn.Module.to(source.denoiser_on_meta(), torch_dtype(built_for.precision)), made_from.spec
    others = {name: bounds for name, bounds in spec.dimensions.items() if name != ROWS}
    _save(traces.keep(made_from, trace(denoiser, spec.inputs, others, spec.dimensions[ROWS].maximum)), folder, TRACE)


def _traced_from(source: ModelSource, built_for: BuiltFor) -> Traced:
    """What decides the trace of a denoiser, which is to hold for prompts of every length."""
    config, spec = source.denoiser_config(), signature_of(source, built_for)
    dimensions = {name: LONGEST_TEXT if name == TOKENS else bounds for name, bounds in spec.dimensions.items()}
    return Traced(config["_class_name"], config, built_for.precision, dataclasses.replace(spec, dimensions=dimensions))


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


def write_component_graph(component: Component, folder: Path, spec: GraphSpec, *, anew: bool = False) -> None:
    """Trace a component without its weights, unless the cache holds its trace, and save its graph in the bundle's folder."""
    precision = spec.outputs[0].dtype
    made_from = Traced(component.kind, component.config, precision, spec)
    model = None if anew else traces.find(made_from)
    if model is None:
        architecture = component.on_meta(torch_dtype(precision))
        others = {name: bounds for name, bounds in spec.dimensions.items() if name != ROWS}
        model = trace_component(component.wrap(architecture), spec.inputs, spec.dimensions[ROWS].maximum, others)
        model = traces.keep(made_from, model)
    weights.attach(model, folder, component.weight_files(folder), names_in_files, "build with --no-components")
    ir.save(model, folder / graph_file(component.graph))

"""Cut a traced graph at its taps.

A cut follows a `Recipe`. For each tap of the trace it

1. makes the tap's value an input, if its kind is taken in;
2. makes it an output, if its kind is given out;
3. removes the marker.

Then it removes what no output needs: nodes, weights, and inputs such as the text of a fidelity graph.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes import common as passes

from tgate_trt.errors import BuildError
from tgate_trt.export.trace import TAP_DOMAIN, TAP_OP
from tgate_trt.specs import CACHE_PREFIX, ROWS, Bounds, GraphSpec, TensorSpec, names_in
from tgate_trt.taps import Recipe, kind_of


def cut(trace: ir.Model, recipe: Recipe) -> ir.Model:
    """Cut one graph from a trace, which is not changed.

    Raises:
        BuildError: if the trace has no tap of a kind that the recipe names.
    """
    model = trace.clone()
    graph = model.graph
    taps = {_name(node): node for node in graph if (node.domain, node.op_type) == (TAP_DOMAIN, TAP_OP)}
    for kind in {*recipe.takes_in, *recipe.gives_out} - {kind_of(tap) for tap in taps}:
        raise BuildError(f"the model has no {kind.replace('_', '-')} to cut at; build graphs that do not need it")
    for tap, node in taps.items():
        (value,) = node.inputs
        (marked,) = node.outputs
        assert value is not None
        if kind_of(tap) in recipe.takes_in:
            value = ir.Value(name=CACHE_PREFIX + tap, shape=marked.shape, type=marked.type)
            graph.inputs.append(value)
        marked.replace_all_uses_with(value)
        if kind_of(tap) in recipe.gives_out:
            graph.outputs.append(_as_output(graph, value, CACHE_PREFIX + tap))
        graph.remove(node, safe=True)
    _remove_unused(model)
    return model


def spec_of(model: ir.Model, name: str, rows: Bounds, others: Mapping[str, Bounds] | None = None) -> GraphSpec:
    """The inputs and outputs of a graph.

    Args:
        model: the graph.
        name: its name.
        rows: of a batch.
        others: bounds of further dimensions that the graph may have.
    """
    inputs, outputs = (tuple(map(_spec_of, values)) for values in (model.graph.inputs, model.graph.outputs))
    found = {name for tensor in (*inputs, *outputs) for size in tensor.shape for name in names_in(size)}
    return GraphSpec(name, inputs, outputs, {each: bounds for each, bounds in (others or {}).items() if each in found} | {ROWS: rows})


def _spec_of(value: ir.Value) -> TensorSpec:
    assert value.dtype is not None and value.shape is not None
    return TensorSpec(
        str(value.name), str(value.dtype.numpy()), tuple(size if isinstance(size, int) else str(size) for size in value.shape)
    )


def _name(tap: ir.Node) -> str:
    return tap.attributes["name"].as_string()


def _as_output(graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    """The value under an output's name. An input keeps its own name, so an Identity follows it."""
    if value.producer() is None:
        identity = ir.Node("", "Identity", [value])
        identity.outputs[0].shape, identity.outputs[0].type = value.shape, value.type
        graph.append(identity)
        value = identity.outputs[0]
    value.name = name
    return value


def _remove_unused(model: ir.Model) -> None:
    """Remove nodes, initializers and inputs that no output needs."""
    passes.RemoveUnusedNodesPass()(model)
    graph = model.graph
    for value in list(graph.inputs):
        if not value.uses():
            graph.inputs.remove(value)
    model.opset_imports.pop(TAP_DOMAIN, None)

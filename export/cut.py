"""Cut a traced graph at its taps.

A cut follows a `Recipe`. For each tap of the trace it

1. makes the tap's value an input, if its kind is taken in;
2. makes it an output, if its kind is given out;
3. and takes the marker away.

What is then without a use falls away: nodes, weights, and inputs such as the text of a fidelity graph.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common as passes

from tgate_trt.errors import BuildError
from tgate_trt.export.trace import TAP_DOMAIN, TAP_OP
from tgate_trt.specs import CACHE_PREFIX, ROWS, Bounds, GraphSpec, TensorSpec
from tgate_trt.taps import Recipe, kind_of


def cut(trace: ir.Model, recipe: Recipe) -> ir.Model:
    """Cut one graph from a trace, which stays as it is.

    Raises:
        BuildError: if the trace has no tap of a kind that the recipe names.
    """
    model = trace.clone()
    graph = model.graph
    taps = {_name(node): node for node in graph if (node.domain, node.op_type) == (TAP_DOMAIN, TAP_OP)}
    for kind in {*recipe.takes_in, *recipe.gives_out} - {kind_of(tap) for tap in taps}:
        raise BuildError(f"the model has no {kind.replace('_', '-')} to cut at")
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


def spec_of(model: ir.Model, name: str, rows: Bounds) -> GraphSpec:
    """The signature of a graph."""

    def tensors(values: list[ir.Value]) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                str(v.name), str(v.dtype.numpy()) if v.dtype else "", tuple(s if isinstance(s, int) else ROWS for s in v.shape or ())
            )
            for v in values
        )

    return GraphSpec(name, tensors(list(model.graph.inputs)), tensors(list(model.graph.outputs)), {ROWS: rows})


def _name(tap: ir.Node) -> str:
    return tap.attributes["name"].as_string()


def _as_output(graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    """The value under an output's name, through an Identity where it is an input and so has a name of its own."""
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

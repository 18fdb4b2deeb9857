"""Multiply-accumulates (MACs), counted on the nodes of the graphs that are run.

The T-GATE paper (arXiv 2404.02747, table 1) counts convolutions and linear layers, and not the two products of attention:
`Macs` keeps the two apart. Graphs are counted as they were cut; no formula of an architecture is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common as passes

from tgate_trt.errors import BuildError
from tgate_trt.specs import ROWS


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates."""

    linear: int = 0
    """In convolutions and in products with a parameter, which the paper counts."""
    sdpa: int = 0
    """In products of two activations, which are those of scaled dot-product attention."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.linear + self.sdpa

    def __add__(self, other: Macs) -> Macs:
        return Macs(self.linear + other.linear, self.sdpa + other.sdpa)

    def __rmul__(self, times: int) -> Macs:
        return Macs(times * self.linear, times * self.sdpa)


def macs_of_graph(path: Path, sizes: int | Mapping[str, int]) -> Macs:
    """Multiply-accumulates of one call of a graph in a file; its weights are not read. See `macs_of`."""
    return macs_of(ir.load(path), sizes)


def macs_of(model: ir.Model, sizes: int | Mapping[str, int]) -> Macs:
    """Multiply-accumulates of one call of a graph.

    ``Conv``, ``Gemm``, ``MatMul`` and ``Attention`` are counted. A product is linear if an operand is a parameter or computed from
    parameters alone. Calls of local functions contain none of these (`tgate_trt.export.fuse`).

    Args:
        model: a graph, which is not changed; its parameters need no data.
        sizes: rows of the batch, two an image under guidance; or the size of each dimension, by name.

    Raises:
        BuildError: if the graph lacks the shape of an operand.
    """
    model = _at(model, {ROWS: sizes} if isinstance(sizes, int) else sizes)
    fixed = set(model.graph.initializers.values())
    counted = Macs()
    for node in model.graph:
        operands = [value for value in node.inputs if value is not None]
        if fixed.issuperset(operands):
            fixed.update(node.outputs)
        if not node.domain and node.op_type in _COUNTS:
            macs = _COUNTS[node.op_type](node)
            counted += Macs(sdpa=macs) if fixed.isdisjoint(operands[:2]) else Macs(linear=macs)
    return counted


def _at(model: ir.Model, sizes: Mapping[str, int]) -> ir.Model:
    """A copy with numbers for all sizes: those of the trace, and those of ONNX's inference where passes left a value without a shape.

    Dimensions have our names; one that an input does not name is the exporter's own, for rows.
    """
    model = model.clone()
    for value in (*model.graph.inputs, *(output for node in model.graph for output in node.outputs)):
        if value.shape is not None and not value.shape.is_static():
            symbols = {name for size in value.shape if isinstance(size, ir.SymbolicDim) for name in size.free_symbols()}
            value.shape = value.shape.evaluate({name: sizes.get(name, sizes[ROWS]) for name in symbols})
    passes.ShapeInferencePass(data_prop=True)(model)
    return model


def _shape(value: ir.Value | None) -> tuple[int, ...]:
    if value is None or value.shape is None or not value.shape.is_static():
        raise BuildError(
            f"the graph lacks the shape of {value.name if value else 'an input'!r}, so its MACs cannot be counted; build the bundle again"
        )
    return tuple(value.shape.numpy())


def size_of(value: ir.Value | None) -> int:
    """Number of elements of a value.

    Raises:
        BuildError: if the graph lacks its shape.
    """
    return math.prod(_shape(value))


def _conv(node: ir.Node) -> int:
    """A weight of [out, in / groups, *kernel] at every element of the output."""
    return size_of(node.outputs[0]) * math.prod(_shape(node.inputs[1])[1:])


def _matmul(node: ir.Node) -> int:
    return size_of(node.outputs[0]) * _shape(node.inputs[0])[-1]


def _gemm(node: ir.Node) -> int:
    return size_of(node.outputs[0]) * _shape(node.inputs[0])[0 if node.attributes.get_int("transA", 0) else 1]


def _attention(node: ir.Node) -> int:
    """Every query with every key, then every row of weights with every column of the values: 3-D and 4-D alike."""
    query, key, *_ = node.inputs
    return (size_of(query) + size_of(node.outputs[0])) * _shape(key)[-2]


_COUNTS: Mapping[str, Callable[[ir.Node], int]] = {"Conv": _conv, "MatMul": _matmul, "Gemm": _gemm, "Attention": _attention}

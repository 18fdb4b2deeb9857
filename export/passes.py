"""Rewrites of a trace that the exporter makes necessary, one concern a pass.

They act on the nodes of the main graph: a trace has no subgraphs, and local functions come later.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from tgate_trt.specs import ROWS


class RowsFromSamplePass(ir.passes.InPlacePass):
    """Reads the number of rows from the first input, ``sample``, which every graph cut from the trace has.

    The exporter reads it from any input. Read from the text, it would keep the text alive in a graph that does not use it otherwise.

    1. ``Shape(x, start=0, end=1)``, with ``x`` an input whose first dimension is ``batch``, becomes ``Shape(sample, start=0, end=1)``.
    2. Any other range of dimensions stays: only the first dimension is the same in all inputs.
    3. A ``Shape`` of an input without rows, or of a value within the graph, stays.
    """

    def requires(self, model: ir.Model) -> None:
        """Check that the first input has rows.

        Raises:
            PreconditionError: if it has none.
        """
        if not model.graph.inputs or not _has_rows(model.graph.inputs[0]):
            raise ir.passes.PreconditionError(f"the first input must have a first dimension named {ROWS!r}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply the rules."""
        sample, *others = model.graph.inputs
        with_rows = {value for value in others if _has_rows(value)}
        found = [node for node in model.graph if _is(node, "Shape") and node.inputs[0] in with_rows and _is_of_first_dimension(node)]
        for node in found:
            node.replace_input_with(0, sample)
        return ir.passes.PassResult(model, modified=bool(found))


class NoSqueezePass(ir.passes.InPlacePass):
    """Makes each squeeze that PyTorch would ignore an ``Identity``.

    PyTorch leaves a dimension alone that is not 1, and ONNX refuses to squeeze it. PixArt has one such squeeze.

    1. ``Squeeze(x, axes)`` with constant axes, none of which has size 1 in ``x``, becomes ``Identity(x)``. A named dimension counts
       as one that is not 1, as it does in the trace.
    2. A ``Squeeze`` stays if one of its axes has size 1, if its axes are computed or absent, or if the shape of ``x`` is unknown.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply the rules."""
        found = [node for node in model.graph if _is(node, "Squeeze") and _squeezes_nothing(node)]
        for node in found:
            node.op_type = "Identity"
            node.resize_inputs(1)
        return ir.passes.PassResult(model, modified=bool(found))


class PromoteConcatPass(ir.passes.InPlacePass):
    """Casts what a concatenation joins to the dtype of its result.

    `torch.cat` promotes mixed dtypes, and ONNX does not. SDXL concatenates pooled text in fp16 with a sinusoid in fp32.

    1. Each input of a ``Concat`` whose dtype differs from that of the floating output goes through a ``Cast`` to it.
    2. A ``Concat`` whose output has an unknown dtype, or integers, stays.
    3. An input of unknown dtype stays.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply the rules."""
        found = list(_mixed(model))
        for concat, index, value, target in found:
            cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(target))])
            cast.outputs[0].dtype, cast.outputs[0].shape = target, value.shape
            concat.prepend(cast)
            concat.replace_input_with(index, cast.outputs[0])
        return ir.passes.PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        """Check that no concatenation with a floating result mixes dtypes.

        Raises:
            PostconditionError: if one does.
        """
        for concat, _, value, target in _mixed(model):
            raise ir.passes.PostconditionError(f"{concat.name!r} joins {value.dtype} to {target}")


def _mixed(model: ir.Model) -> Iterator[tuple[ir.Node, int, ir.Value, ir.DataType]]:
    """Each ``Concat`` with a floating output, the place and value of an input of another dtype, and the output's dtype."""
    for node in model.graph:
        target = node.outputs[0].dtype
        if _is(node, "Concat") and target is not None and target.is_floating_point():
            for index, value in enumerate(node.inputs):
                if value is not None and value.dtype not in (target, None):
                    yield node, index, value, target


def _is(node: ir.Node, op_type: str) -> bool:
    return (node.domain, node.op_type) == ("", op_type)


def _has_rows(value: ir.Value) -> bool:
    return bool(value.shape) and value.shape[0] == ROWS  # type: ignore[index]  # a shape that is true is not None


def _is_of_first_dimension(shape: ir.Node) -> bool:
    return (shape.attributes.get_int("start", 0), shape.attributes.get_int("end", None)) == (0, 1)


def _squeezes_nothing(squeeze: ir.Node) -> bool:
    value, axes = (*squeeze.inputs, None)[:2]
    if value is None or value.shape is None or axes is None or axes.const_value is None:
        return False
    shape = value.shape
    return all(shape[axis] != 1 for axis in axes.const_value.numpy())

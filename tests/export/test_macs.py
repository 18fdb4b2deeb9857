"""Multiply-accumulates: of graphs small enough to count by hand, and beside what PyTorch computes."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from tgate_trt.eager import run_recipe
from tgate_trt.errors import BuildError
from tgate_trt.export.cut import cut, spec_of
from tgate_trt.export.fuse import fuse_cache_reuse
from tgate_trt.export.macs import Macs, macs_of, macs_of_graph
from tgate_trt.export.trace import trace
from tgate_trt.models.resolve import resolve
from tgate_trt.models.source import ModelSource
from tgate_trt.specs import ROWS, Bounds
from tgate_trt.taps import recipe

LAYERS = """
<ir_version: 10, opset_import: ["" : 20]>
layers (float[batch,4,6,6] sample, float[batch,5,8] text, float[6,2,3,3] kernel, float[7,4] matrix, float[9,8] projection)
  => (float[batch,6,3,3] convolved, float[batch,7] transformed, float[batch,5,5] scores)
{
  convolved = Conv <group: int = 2, pads: ints = [1, 1, 1, 1], strides: ints = [2, 2]> (sample, kernel)
  pooled = GlobalAveragePool (sample)
  flat = Flatten (pooled)
  transformed = Gemm <transB: int = 1> (flat, matrix)
  turned = Transpose <perm: ints = [1, 0]> (projection)
  projected = MatMul (text, turned)
  columns = Transpose <perm: ints = [0, 2, 1]> (projected)
  scores = MatMul (projected, columns)
}
"""
LINEAR = (6 * 3 * 3) * (2 * 3 * 3) + 7 * 4 + (5 * 9) * 8
PRODUCT = (5 * 5) * 9
"""Of `LAYERS`, for one row: elements of an output times what is summed for each."""

ATTENTION = """
<ir_version: 11, opset_import: ["" : 23]>
attention (float[batch,2,5,8] query, float[batch,2,7,8] key, float[batch,2,7,6] value) => (float[batch,2,5,6] mixed)
{
  mixed = Attention (query, key, value)
}
"""

FOLDED = """
<ir_version: 10, opset_import: ["" : 20]>
folded (float[batch,2] sample, int64[2] sizes, float[1,3] matrix) => (float[a,3] product)
{
  flat = Reshape (sample, sizes)
  product = MatMul (flat, matrix)
}
"""

SHAPELESS = """
<ir_version: 10, opset_import: ["" : 20]>
shapeless (float[batch,8] sample, int64[2] sizes) => (float[a,b] product)
{
  folded = Reshape (sample, sizes)
  product = MatMul (folded, folded)
}
"""


def graph(text: str, *parameters: str) -> ir.Model:
    """A graph with some of its inputs made parameters without data, as a trace has them."""
    model = ir.from_onnx_text(text)
    for value in [value for value in model.graph.inputs if value.name in parameters]:
        model.graph.inputs.remove(value)
        assert value.shape is not None and value.dtype is not None
        value.const_value = ir.ExternalTensor("", 0, 0, value.dtype, shape=value.shape, name=str(value.name))
        model.graph.register_initializer(value)
    return model


@pytest.mark.parametrize("rows", [1, 3])
def test_layers_are_counted_as_by_hand(rows: int) -> None:
    model = graph(LAYERS, "kernel", "matrix", "projection")
    before = ir.to_proto(model.clone()).SerializeToString(deterministic=True)
    assert macs_of(model, rows) == Macs(linear=rows * LINEAR, sdpa=rows * PRODUCT)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_a_product_with_what_is_no_parameter_is_not_linear() -> None:
    counted = macs_of(graph(LAYERS, "kernel", "matrix"), 1)
    assert counted == Macs(linear=LINEAR - (5 * 9) * 8, sdpa=PRODUCT + (5 * 9) * 8)
    assert counted.total == LINEAR + PRODUCT


def test_attention_is_two_products() -> None:
    assert macs_of(graph(ATTENTION), 3) == Macs(sdpa=3 * 2 * (5 * 7 * 8 + 5 * 6 * 7))


def test_rows_under_the_exporters_name_are_rows() -> None:
    """PixArt folds its resolutions into rows; the exporter writes the size as an expression."""
    model = graph(FOLDED, "matrix")
    for node, width in zip(model.graph, (1, 3), strict=True):
        node.outputs[0].shape, node.outputs[0].dtype = ir.Shape([2 * ir.SymbolicDim("s14"), width]), ir.DataType.FLOAT
    assert macs_of(model, 4) == Macs(linear=2 * 4 * 1 * 3)


def test_a_layer_of_unknown_shape_is_told() -> None:
    model = graph(SHAPELESS)
    with pytest.raises(BuildError, match="lacks the shape of 'folded'"):
        macs_of(model, 1)


@pytest.fixture(scope="module")
def shapes() -> ModelSource:
    return resolve("shapes", random_weights=True)


@pytest.fixture(scope="module")
def traced(shapes: ModelSource) -> ir.Model:
    return trace(shapes.denoiser_on_meta(), shapes.signature(64, 64, "fp32"))


@pytest.mark.parametrize(("name", "rows"), [("vanilla", 2), ("planning", 2), ("fidelity", 1)])
def test_a_graph_takes_what_the_layers_of_its_eager_model_take(
    name: str, rows: int, shapes: ModelSource, traced: ir.Model, tmp_path: Path
) -> None:
    model = cut(traced, recipe(name))
    expected = _by_hooks(shapes.denoiser_on_meta(), model, name, rows)
    if name == "fidelity":
        assert fuse_cache_reuse(model) > 0
    ir.save(model, tmp_path / "graph.onnx")
    assert macs_of_graph(tmp_path / "graph.onnx", rows).linear == expected


def _by_hooks(denoiser: nn.Module, model: ir.Model, name: str, rows: int) -> int:
    """MACs of the linear and convolution layers that eager PyTorch runs; those in a cached cross-attention it runs for nothing."""
    spec, total = spec_of(model, name, Bounds(1, 2, 4)), 0

    def count(layer: nn.Module, _inputs: object, output: Tensor) -> None:
        nonlocal total
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        total += output.numel() * layer.weight[0].numel()

    for path, layer in denoiser.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and not (spec.cache_inputs and ".attn2." in path):
            layer.register_forward_hook(count)
    inputs = {tensor.name: torch.empty(tensor.concrete(**{ROWS: rows}), device="meta") for tensor in spec.inputs}
    text = denoiser.config["cross_attention_dim"]
    run_recipe(denoiser, recipe(name), {"encoder_hidden_states": torch.empty((rows, 24, text), device="meta"), **inputs})
    return total

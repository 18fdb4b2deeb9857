"""The reuse of the cache as one op: where it is found, where it is not, and that it computes the same."""

from __future__ import annotations

import numpy
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from tgate_trt.eager import on_meta, run_recipe
from tgate_trt.export.cut import cut
from tgate_trt.export.fuse import DOMAIN, OP, fuse_cache_reuse, name_plugin
from tgate_trt.export.trace import trace
from tgate_trt.models.resolve import resolve
from tgate_trt.specs import ROWS, TensorSpec
from tgate_trt.taps import recipe

GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
fidelity (float[batch,3,8] sample, float[batch,3,8] "cache.cross_attention.block") => (float[batch,3,8] noise_pred)
<float[8] weight = {1, 2, 3, 4, 5, 6, 7, 8}, float[8] bias = {8, 7, 6, 5, 4, 3, 2, 1}>
{
  hidden = Tanh (sample)
  residual = Add (%s)
  normed%s = LayerNormalization <axis: int = %d, epsilon: float = 0.01> (residual, %s)
  %s
}
"""
BOTH = 'hidden, "cache.cross_attention.block"'


def graph(
    added: str = BOTH, more: str = "", axis: int = -1, parameters: str = "weight, bias", end: str = "noise_pred = Add (normed, residual)"
) -> ir.Model:
    model = ir.from_onnx_text(GRAPH % (added, more, axis, parameters, end))
    for node in model.graph:
        for value in node.outputs:
            value.shape, value.dtype = ir.Shape(["batch", 3, 8]), ir.DataType.FLOAT
    return model


def run(model: ir.Model) -> list[numpy.ndarray]:
    generator = numpy.random.default_rng(0)
    feed = {str(value.name): generator.standard_normal((2, 3, 8)).astype(numpy.float32) for value in model.graph.inputs}
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feed)


@pytest.mark.parametrize(
    "model",
    [
        graph(),
        graph(added='"cache.cross_attention.block", hidden'),
        graph(axis=2),
        graph(parameters="weight"),
        graph(end="noise_pred = Identity (normed)"),
    ],
    ids=["hidden + cache", "cache + hidden", "last axis by its place", "no bias", "residual without a use"],
)
def test_the_pair_becomes_one_op(model: ir.Model) -> None:
    expected = run(model)
    assert fuse_cache_reuse(model) == 1
    assert [node.op_type for node in model.graph][:2] == ["Tanh", OP]
    (node,) = [node for node in model.graph if node.op_type == OP]
    assert [value.name for value in node.inputs if value is not None][:3] == ["hidden", "cache.cross_attention.block", "weight"]
    assert [value.name for value in node.outputs] == ["residual", "normed"]
    assert node.attributes.get_float("epsilon") == pytest.approx(0.01)
    for got, wanted in zip(run(model), expected, strict=True):
        numpy.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_the_body_is_standard() -> None:
    model = graph()
    fuse_cache_reuse(model)
    (function,) = model.functions.values()
    assert [(node.domain, node.op_type) for node in function] == [("", "Add"), ("", "LayerNormalization")]
    assert fuse_cache_reuse(model) == 0


@pytest.mark.parametrize(
    "model",
    [
        graph(added="hidden, hidden"),
        graph(added='hidden, "cache.cross_attention.block"', end='noise_pred = Add (normed, "cache.cross_attention.block")'),
        graph(axis=1, parameters="residual"),
        graph(more=", mean", end="noise_pred = Add (normed, mean)"),
        graph(end="again = LayerNormalization (residual, weight, bias)\n  noise_pred = Add (normed, again)"),
    ],
    ids=["no cache", "a cache with another use", "two axes", "the mean is used", "two norms"],
)
def test_anything_else_is_left_alone(model: ir.Model) -> None:
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert fuse_cache_reuse(model) == 0
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_the_plugin_takes_the_place_of_the_function() -> None:
    model = graph()
    fuse_cache_reuse(model)
    assert name_plugin(model, {8}) == 1
    assert not model.functions
    (node,) = [node for node in model.graph if node.op_type == OP]
    assert (node.domain, node.attributes.get_string("plugin_namespace"), node.attributes.get_int("aot")) == (DOMAIN, "tgate", 1)
    assert node.attributes.get_float("epsilon") == pytest.approx(0.01)


def test_a_width_that_the_plugin_does_not_take_is_left_to_standard_ops() -> None:
    model = graph()
    before = run(model)
    fuse_cache_reuse(model)
    assert name_plugin(model, {16}) == 0
    assert not model.functions
    assert not [node for node in model.graph if node.op_type == OP]
    for got, expected in zip(run(model), before, strict=True):
        numpy.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "depths", "places"), [("sd15", {}, 16), ("sdxl", {"transformer_layers_per_block": [1, 2, 3]}, 28)])
def test_real_architectures_have_a_place_a_cross_attention(name: str, depths: dict[str, list[int]], places: int) -> None:
    """SDXL has ten alike, one after the other, where three are enough here."""
    source = resolve(name, random_weights=True)
    denoiser = torch.nn.Module.to(on_meta("UNet2DConditionModel", source.denoiser_config() | depths), torch.float16)
    traced = trace(denoiser, source.signature(128, 128, "fp16"))
    fidelity = cut(traced, recipe("fidelity"))
    assert fuse_cache_reuse(fidelity) == places
    assert sum(str(value.name).startswith("cache.") for value in fidelity.graph.inputs) == places
    assert fuse_cache_reuse(cut(traced, recipe("planning"))) == 0


def test_transformer_blocks_have_it_too() -> None:
    """PixArt's norm has neither weight nor bias of its own, and its scale and shift come after it."""
    from diffusers import PixArtTransformer2DModel

    def make() -> torch.nn.Module:
        return PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=32,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=64,
            caption_channels=16,
            sample_size=8,
            patch_size=2,
            interpolation_scale=1,
            use_additional_conditions=False,
        ).eval()

    torch.manual_seed(0)
    eager = make()
    with torch.device("meta"):
        architecture = make()
    signature = (
        TensorSpec("sample", "float32", (ROWS, 4, 8, 8)),
        TensorSpec("timestep", "float32", (ROWS,)),
        TensorSpec("encoder_hidden_states", "float32", (ROWS, 5, 16)),
    )
    fidelity = cut(trace(architecture, signature), recipe("fidelity"))
    assert fuse_cache_reuse(fidelity) == 2
    parameters = eager.state_dict() | dict(eager.named_buffers())  # the positions are no part of the state
    for name, value in fidelity.graph.initializers.items():
        if name in parameters:
            value.const_value = ir.tensor(parameters[name].numpy(), name=name)
    session = onnxruntime.InferenceSession(ir.to_proto(fidelity).SerializeToString(), providers=["CPUExecutionProvider"])
    sizes = {value.name: [2, *value.shape[1:]] for value in session.get_inputs()}
    inputs = {name: torch.randn(*size) for name, size in sizes.items()} | {"timestep": torch.tensor([3.0, 500.0])}
    (got,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items() if name in sizes})
    expected = run_recipe(eager, recipe("fidelity"), {**inputs, "encoder_hidden_states": torch.randn(2, 5, 16)})["noise_pred"]
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-3, atol=1e-4)

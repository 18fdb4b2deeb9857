"""Cuts of a graph small enough to read: what is taken in, what is given out, and what falls away."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from tgate_trt.errors import BuildError
from tgate_trt.export.cut import cut, spec_of
from tgate_trt.specs import Bounds
from tgate_trt.taps import GRAPHS, Recipe

TAPPED = """
<ir_version: 10, opset_import: ["" : 20, "tgate" : 1]>
tapped (float[batch,4] sample, float[batch,2] encoder_hidden_states) => (float[batch,4] noise_pred)
<float[2,4] to_out = {1, 2, 3, 4, 5, 6, 7, 8}, float[4] bias = {1, 1, 1, 1}>
{
  hidden = Add (sample, bias)
  text = MatMul (encoder_hidden_states, to_out)
  crossed = tgate.Tap <name = "cross_attention.block"> (text)
  attended = Relu (hidden)
  looked = tgate.Tap <name = "self_attention.block"> (attended)
  sum = Add (looked, crossed)
  noise_pred = Tanh (sum)
}
"""


@pytest.fixture
def tapped() -> ir.Model:
    """A trace with one tap of each kind."""
    model = ir.from_onnx_text(TAPPED)
    for node in model.graph:
        for value in node.outputs:
            value.shape, value.dtype = ir.Shape(["batch", 4]), ir.DataType.FLOAT
    return model


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_vanilla_is_the_trace_without_markers(tapped: ir.Model) -> None:
    vanilla = cut(tapped, GRAPHS["vanilla"])
    assert operators(vanilla) == ["Add", "MatMul", "Relu", "Add", "Tanh"]
    assert "tgate" not in vanilla.opset_imports
    assert [value.name for value in vanilla.graph.outputs] == ["noise_pred"]


def test_planning_gives_the_cross_attention_out(tapped: ir.Model) -> None:
    planning = cut(tapped, GRAPHS["planning"])
    assert [value.name for value in planning.graph.outputs] == ["noise_pred", "cache.cross_attention.block"]
    assert operators(planning) == operators(cut(tapped, GRAPHS["vanilla"]))


def test_fidelity_takes_it_in_and_drops_text_and_weights(tapped: ir.Model) -> None:
    fidelity = cut(tapped, GRAPHS["fidelity"])
    assert [value.name for value in fidelity.graph.inputs] == ["sample", "cache.cross_attention.block"]
    assert list(fidelity.graph.initializers) == ["bias"]
    assert operators(fidelity) == ["Add", "Relu", "Add", "Tanh"]


def test_a_tap_may_be_taken_in_and_given_out(tapped: ir.Model) -> None:
    both = cut(tapped, Recipe(takes_in=("self_attention",), gives_out=("self_attention", "cross_attention")))
    assert [value.name for value in both.graph.inputs] == ["encoder_hidden_states", "cache.self_attention.block"]
    assert len({value.name for value in both.graph.outputs}) == 3


def test_the_trace_stays_as_it_is(tapped: ir.Model) -> None:
    before = ir.to_onnx_text(tapped)
    for recipe in GRAPHS.values():
        cut(tapped, recipe)
    assert ir.to_onnx_text(tapped) == before


def test_a_kind_without_taps_is_an_error(tapped: ir.Model) -> None:
    with pytest.raises(BuildError, match="no deep-features to cut at"):
        cut(tapped, Recipe(takes_in=("deep_features",)))


def test_spec_says_names_dtypes_and_shapes(tapped: ir.Model) -> None:
    spec = spec_of(cut(tapped, GRAPHS["fidelity"]), "fidelity", Bounds(1, 1, 2))
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in spec.inputs] == [
        ("sample", "float32", ("batch", 4)),
        ("cache.cross_attention.block", "float32", ("batch", 4)),
    ]
    assert [tensor.name for tensor in spec.cache_inputs] == ["cache.cross_attention.block"]

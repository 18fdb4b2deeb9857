"""Each pass on graphs small enough to read: what every rule does, what stays, and that a second time changes nothing."""

from __future__ import annotations

import numpy
import onnx_ir as ir
import onnxruntime
import pytest

from tgate_trt.export.passes import NoSqueezePass, PromoteConcatPass, RowsFromSamplePass

HEADER = '<ir_version: 10, opset_import: ["" : 20]>\n'


def model_of(text: str) -> ir.Model:
    return ir.from_onnx_text(HEADER + text)


def assert_becomes(rewrite: ir.passes.InPlacePass, before: str, after: str) -> None:
    """A pass makes one text the other, reports whether it changed anything, and finds nothing more to do."""
    model = model_of(before)
    assert rewrite(model).modified == (before != after)
    assert ir.to_onnx_text(model) == ir.to_onnx_text(model_of(after))
    assert not rewrite(model).modified
    assert ir.to_onnx_text(model) == ir.to_onnx_text(model_of(after))


ROWS = """
g (float[batch,4] sample, float[batch,7,32] text, float[2] sizes, float scalar) => (%s) {
  inner = Relu (text)
  rows = Shape <%s> (%s)
}
"""


@pytest.mark.parametrize("range_of_dimensions", ["start: int = 0, end: int = 1", "end: int = 1"])
def test_rows_are_read_from_the_sample(range_of_dimensions: str) -> None:
    before, after = (ROWS % ("int64[1] rows", range_of_dimensions, value) for value in ("text", "sample"))
    assert_becomes(RowsFromSamplePass(), before, after)


@pytest.mark.parametrize(
    ("range_of_dimensions", "value"),
    [
        ("start: int = 0, end: int = 1", "sample"),
        ("start: int = 0, end: int = 1", "sizes"),
        ("start: int = 0, end: int = 1", "scalar"),
        ("start: int = 0, end: int = 1", "inner"),
        ("start: int = 1, end: int = 2", "text"),
        ("start: int = 1, end: int = 1", "text"),
        ("start: int = 0, end: int = 2", "text"),
        ("start: int = 0", "text"),
    ],
    ids=["already", "no rows", "a scalar", "within the graph", "another dimension", "no dimension", "two dimensions", "all dimensions"],
)
def test_other_shapes_are_read_where_they_were(range_of_dimensions: str, value: str) -> None:
    text = ROWS % ("int64[n] rows", range_of_dimensions, value)
    assert_becomes(RowsFromSamplePass(), text, text)


@pytest.mark.parametrize("inputs", ["", "float scalar", "float[2,4] fixed"])
def test_rows_are_not_read_from_an_input_without_rows(inputs: str) -> None:
    model = model_of(f"g ({inputs}) => (float y) {{ y = Constant <value_float: float = 1.0> () }}")
    with pytest.raises(ir.passes.PreconditionError, match="a first dimension named 'batch'"):
        RowsFromSamplePass()(model)


def squeeze(shape: str, axes: str, op: str = "Squeeze (x, axes)") -> str:
    return f"g (float{shape} x) => (float[a,b] y)\n<int64[n] axes = {{{axes}}}>\n{{ y = {op} }}".replace(
        "int64[n]", f"int64[{len(axes.split(','))}]"
    )


@pytest.mark.parametrize(("shape", "axes"), [("[batch,4,8]", "1"), ("[batch,4,8]", "-1"), ("[batch,1,8]", "0"), ("[batch,4,1]", "0, 1")])
def test_a_squeeze_that_pytorch_ignores_is_an_identity(shape: str, axes: str) -> None:
    assert_becomes(NoSqueezePass(), squeeze(shape, axes), squeeze(shape, axes, "Identity (x)"))


@pytest.mark.parametrize(("shape", "axes"), [("[batch,1,8]", "1"), ("[batch,4,1]", "-1"), ("[batch,4,1]", "1, 2")])
def test_a_squeeze_of_one_stays(shape: str, axes: str) -> None:
    assert_becomes(NoSqueezePass(), squeeze(shape, axes), squeeze(shape, axes))


@pytest.mark.parametrize(
    "text",
    [
        "g (float[batch,4] x) => (float[a,b] y) { y = Squeeze (x) }",
        "g (float[batch,4] x, int64[1] axes) => (float[a,b] y) { y = Squeeze (x, axes) }",
        "g (float[batch,4] x)  => (float[a,b] y)\n<int64[1] axes = {1}>\n{ hidden = Relu (x)\n y = Squeeze (hidden, axes) }",
    ],
    ids=["no axes", "computed axes", "unknown shape"],
)
def test_a_squeeze_that_cannot_be_judged_stays(text: str) -> None:
    assert_becomes(NoSqueezePass(), text, text)


def test_an_output_keeps_its_name() -> None:
    model = model_of(squeeze("[batch,4,8]", "1"))
    NoSqueezePass()(model)
    assert [value.name for value in model.graph.outputs] == ["y"]


CONCAT = "g (%s text, float[batch,3] sinusoid) => (%s[batch,n] joined) { %sjoined = Concat <axis: int = 1> (%s, sinusoid) }"


def test_what_is_joined_is_cast_to_the_result() -> None:
    model = model_of(CONCAT % ("float16[batch,2]", "float", "", "text"))
    assert PromoteConcatPass()(model).modified
    cast, concat = model.graph
    assert (cast.op_type, cast.inputs[0], cast.outputs[0].dtype) == ("Cast", model.graph.inputs[0], ir.DataType.FLOAT)
    assert list(concat.inputs) == [cast.outputs[0], model.graph.inputs[1]]
    assert not PromoteConcatPass()(model).modified
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (joined,) = session.run(None, {"text": numpy.ones((1, 2), numpy.float16), "sinusoid": numpy.zeros((1, 3), numpy.float32)})
    assert joined.tolist() == [[1, 1, 0, 0, 0]]


@pytest.mark.parametrize(
    "text",
    [
        CONCAT % ("float[batch,2]", "float", "", "text"),
        CONCAT % ("int32[batch,2]", "int64", "", "text"),
        CONCAT % ("float16[batch,2]", "float", "hidden = Relu (text)\n ", "hidden"),
    ],
    ids=["one dtype", "integers", "unknown dtype"],
)
def test_other_concatenations_stay(text: str) -> None:
    assert_becomes(PromoteConcatPass(), text, text)

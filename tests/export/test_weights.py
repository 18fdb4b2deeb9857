"""The weights file is plain safetensors, and nothing unfit is written or read."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from tgate_trt.errors import BuildError, InputError
from tgate_trt.export import weights
from tgate_trt.files import places_of

TENSORS = {"conv.weight": torch.randn(3, 2, 3, 3), "conv.bias": torch.randn(3), "scale": torch.randn(())}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_safetensors_reads_what_was_written(tmp_path: Path, precision: str, dtype: torch.dtype) -> None:
    path = tmp_path / weights.WEIGHTS_FILE
    weights.write(path, SHAPES, ((name, tensor.to(dtype)) for name, tensor in TENSORS.items()), precision)
    read = load_file(path)
    assert list(read) == sorted(TENSORS) or set(read) == set(TENSORS)
    assert all(torch.equal(read[name], TENSORS[name].to(dtype)) for name in TENSORS)


def test_places_point_at_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / weights.WEIGHTS_FILE
    weights.write(path, SHAPES, TENSORS.items(), "fp32")
    content = path.read_bytes()
    for name, place in places_of(path).items():
        raw = content[place.offset : place.offset + place.length]
        assert torch.equal(torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(place.shape), TENSORS[name])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("conv.weight", TENSORS["conv.weight"])], "lack 'conv.bias'"),
        ([("conv.bias", TENSORS["conv.bias"])], "'conv.bias'"),
        ([("conv.weight", TENSORS["conv.weight"].half())], "float16"),
        ([("conv.weight", TENSORS["conv.weight"][:2])], r"\(2, 2, 3, 3\)"),
        ([*TENSORS.items(), ("more", torch.zeros(1))], "'more'"),
    ],
)
def test_other_tensors_than_expected_are_refused(tmp_path: Path, tensors: list[tuple[str, torch.Tensor]], message: str) -> None:
    with pytest.raises(BuildError, match=message):
        weights.write(tmp_path / weights.WEIGHTS_FILE, SHAPES, tensors, "fp32")


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]", b"\x10\0\0\0\0\0\0\0" + b"not json at all!"])
def test_a_file_that_is_not_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / weights.WEIGHTS_FILE
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a whole safetensors file"):
        places_of(path)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (torch.zeros(1), r"do not hold 'bias' with shape \[2\]"),
        (torch.zeros(2).half(), "hold 'bias' in another dtype than FLOAT"),
        (None, r"do not hold 'bias' with shape \[2\]"),
    ],
    ids=["shape", "dtype", "absent"],
)
def test_attach_refuses_what_does_not_fit(tmp_path: Path, stored: torch.Tensor | None, message: str) -> None:
    save_file({"other": torch.zeros(2)} if stored is None else {"bias": stored}, tmp_path / weights.WEIGHTS_FILE)
    with pytest.raises(BuildError, match=f"{message}.*; build without it"):
        weights.attach(adds_bias(), tmp_path, [tmp_path / weights.WEIGHTS_FILE], hint="build without it")


def test_attach_finds_a_parameter_under_another_name_in_a_file_below(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    save_file({"old.bias": torch.tensor([3.0, 4.0])}, tmp_path / "below" / "model.safetensors")
    model = adds_bias()
    weights.attach(model, tmp_path, [tmp_path / "below" / "model.safetensors"], lambda name: (name, f"old.{name}"))
    ir.save(model, tmp_path / "graph.onnx")
    read = ir.load(tmp_path / "graph.onnx").graph.initializers["old.bias"].const_value
    assert isinstance(read, ir.ExternalTensor)
    assert (read.location, read.numpy().tolist()) == (str(Path("below", "model.safetensors")), [3, 4])


def adds_bias() -> ir.Model:
    """A graph with one parameter that has no data yet."""
    model = ir.from_onnx_text('<ir_version: 10, opset_import: ["" : 20]>\ng (float[2] x) => (float[2] y) { y = Add (x, bias) }')
    value = model.graph.node(0).inputs[1]
    assert value is not None
    value.shape, value.type = ir.Shape([2]), ir.TensorType(ir.DataType.FLOAT)
    value.const_value = ir.ExternalTensor("", 0, 0, ir.DataType.FLOAT, shape=ir.Shape([2]), name="bias")
    model.graph.register_initializer(value)
    return model

"""The ONNX Runtime engine on graphs small enough to read: caller-owned memory, and one sentence for what does not fit."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from tgate_trt.engines.onnxruntime import OnnxRuntimeEngine, cuda_is_available
from tgate_trt.errors import BundleError, GateError, UnsupportedError
from tgate_trt.specs import Bounds, GraphSpec, TensorSpec

GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[batch,3] sample, float[batch,3] cache) => (float[batch,3] noise_pred, float[batch,3] twice) {
  noise_pred = Sub (sample, cache)
  twice = Add (sample, sample)
}
"""
SPEC = GraphSpec(
    "small",
    (TensorSpec("sample", "float32", ("batch", 3)), TensorSpec("cache", "float32", ("batch", 3))),
    (TensorSpec("noise_pred", "float32", ("batch", 3)), TensorSpec("twice", "float32", ("batch", 3))),
    {"batch": Bounds(1, 2, 4)},
)
CPU = torch.device("cpu")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The graph in a file."""
    ir.save(ir.from_onnx_text(GRAPH), tmp_path / "small.onnx")
    return tmp_path / "small.onnx"


@pytest.fixture
def engine(path: Path) -> OnnxRuntimeEngine:
    """The graph in an engine of one thread."""
    return OnnxRuntimeEngine(path, SPEC, device=CPU, threads=1)


def outputs(rows: int) -> dict[str, torch.Tensor]:
    """Outputs full of not-a-number, so that what is not written shows."""
    return {name: torch.full((rows, 3), torch.nan) for name in ("noise_pred", "twice")}


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_it_writes_the_callers_memory(engine: OnnxRuntimeEngine, rows: int) -> None:
    inputs = {"sample": torch.randn(rows, 3), "cache": torch.randn(rows, 3)}
    written = outputs(rows)
    addresses = {name: tensor.data_ptr() for name, tensor in written.items()}
    engine.run(inputs, written)
    assert torch.equal(written["noise_pred"], inputs["sample"] - inputs["cache"])
    assert torch.equal(written["twice"], 2 * inputs["sample"])
    assert {name: tensor.data_ptr() for name, tensor in written.items()} == addresses


def test_changed_contents_at_one_address_are_read(engine: OnnxRuntimeEngine) -> None:
    inputs, written = {"sample": torch.ones(2, 3), "cache": torch.zeros(2, 3)}, outputs(2)
    engine.run(inputs, written)
    inputs["cache"].fill_(5)
    engine.run(inputs, written)
    assert torch.equal(written["noise_pred"], torch.full((2, 3), -4.0))


def test_memory_that_moves_and_batches_that_change_are_followed(engine: OnnxRuntimeEngine) -> None:
    for rows in (2, 1, 3, 2):
        inputs, written = {"sample": torch.randn(rows, 3), "cache": torch.randn(rows, 3)}, outputs(rows)
        engine.run(inputs, written)
        assert torch.equal(written["noise_pred"], inputs["sample"] - inputs["cache"])


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (torch.zeros(5, 3), r"'sample' must have shape \['batch', 3\] with batch 1:2:4, got \[5, 3\]"),
        (torch.zeros(2, 4), r"got \[2, 4\]"),
        (torch.zeros(2, 3, dtype=torch.float64), "float32 tensor on cpu, got torch.float64"),
        (torch.zeros(3, 2).T, "contiguous"),
        (None, "was not given 'sample'"),
    ],
)
def test_unfit_tensors_are_refused(engine: OnnxRuntimeEngine, sample: torch.Tensor | None, message: str) -> None:
    given = {} if sample is None else {"sample": sample}
    with pytest.raises(GateError, match=message):
        engine.run({**given, "cache": torch.zeros(2, 3)}, outputs(2))


def test_a_closed_engine_says_so(engine: OnnxRuntimeEngine) -> None:
    engine.close()
    with pytest.raises(GateError, match="has been closed"):
        engine.run({"sample": torch.zeros(1, 3), "cache": torch.zeros(1, 3)}, outputs(1))


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "small.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError, match=r"cannot load small\.onnx"):
        OnnxRuntimeEngine(tmp_path / "small.onnx", SPEC, device=CPU)


def test_bf16_is_refused_before_the_file_is_read() -> None:
    spec = GraphSpec("small", (TensorSpec("sample", "bfloat16", ("batch", 3)),), (), {"batch": Bounds(1, 1, 1)})
    with pytest.raises(UnsupportedError, match="bfloat16 kernels for 'sample'"):
        OnnxRuntimeEngine(Path("nowhere.onnx"), spec, device=CPU)


@pytest.mark.skipif(cuda_is_available(), reason="CUDA can be used here")
def test_cuda_is_refused_where_there_is_none(path: Path) -> None:
    with pytest.raises(UnsupportedError, match="ONNX Runtime cannot use CUDA here"):
        OnnxRuntimeEngine(path, SPEC, device=torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not cuda_is_available(), reason="needs CUDA and onnxruntime-gpu")
def test_it_runs_on_cuda(path: Path) -> None:
    device = torch.device("cuda", 0)
    inputs = {"sample": torch.randn(2, 3, device=device), "cache": torch.randn(2, 3, device=device)}
    written = {name: tensor.to(device) for name, tensor in outputs(2).items()}
    OnnxRuntimeEngine(path, SPEC, device=device).run(inputs, written)
    assert torch.equal(written["noise_pred"], inputs["sample"] - inputs["cache"])

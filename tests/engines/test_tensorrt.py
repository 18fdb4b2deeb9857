"""The runtime half of TensorRT: on a GPU against ONNX Runtime and polygraphy; here what needs none, such as shared weights."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tgate_trt import children
from tgate_trt.bench.probe import Try, attempt
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.bundle.manifest import BuiltFor, BuiltFrom, EngineSet, Manifest
from tgate_trt.engines.onnxruntime import OnnxRuntimeEngine
from tgate_trt.engines.shared_weights import SharedWeights
from tgate_trt.engines.tensorrt import Arena, RuntimeOptions, TensorRTEngine
from tgate_trt.engines.tensorrt_builder import PlanOptions, build_plan
from tgate_trt.engines.tensorrt_flavours import FLAVOURS, Flavour
from tgate_trt.errors import BundleError, InputError, TGateError, UnsupportedError
from tgate_trt.models.source import ModelReference
from tgate_trt.running.loading import EngineLoader
from tgate_trt.specs import Bounds, GraphSpec, TensorSpec

CPU = torch.device("cpu")

GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[batch,8,16,16] sample, float[batch,8,16,16] cache_one, float[8,8,3,3] weight) => (float[batch,8,16,16] noise_pred)
{
  filtered = Conv <pads = [1, 1, 1, 1]> (sample, weight)
  noise_pred = Sub (filtered, cache_one)
}
"""
SHAPE = ("batch", 8, 16, 16)
SPEC = GraphSpec(
    "small",
    (TensorSpec("sample", "float32", SHAPE), TensorSpec("cache.one", "float32", SHAPE)),
    (TensorSpec("noise_pred", "float32", SHAPE),),
    {"batch": Bounds(1, 2, 4)},
)
WEIGHT = TensorSpec("weight", "float32", (8, 8, 3, 3))


# What needs no GPU.


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file of two weights."""
    save_file({"weight": torch.randn(8, 8, 3, 3), "bias": torch.randn(8)}, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def test_shared_weights_are_exchanged_in_place(weights: Path) -> None:
    shared = SharedWeights([weights], CPU)
    original, address = shared["weight"].clone(), shared["weight"].data_ptr()
    a, b = torch.randn(8, 8, 3, 3), torch.randn(8)
    shared.replace({"weight": a})
    assert torch.equal(shared["weight"], a)
    shared.replace({"bias": b})
    assert torch.equal(shared["weight"], original), "what is not named is as it was"
    assert torch.equal(shared["bias"], b)
    shared.replace({})
    assert shared["weight"].data_ptr() == address
    assert torch.equal(SharedWeights([weights], CPU)["bias"], shared["bias"])


@pytest.mark.parametrize("wrong", [torch.randn(8), torch.randn(8, 8, 3, 3).half()])
def test_shared_weights_refuse_what_does_not_fit(weights: Path, wrong: Tensor) -> None:
    shared = SharedWeights([weights], CPU)
    before = shared["weight"].clone()
    with pytest.raises(BundleError, match="cannot become"):
        shared.replace({"weight": wrong})
    assert torch.equal(shared["weight"], before)
    with pytest.raises(BundleError, match="hold no 'scale'"):
        shared["scale"]


def test_weights_that_cannot_be_read_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match="is not a whole safetensors file"):
        SharedWeights([tmp_path / "weights.safetensors"], CPU)


def test_a_specialisation_that_there_is_not() -> None:
    with pytest.raises(InputError, match="one of lazy, eager, none, got 'now'"):
        RuntimeOptions(specialisation="now")


def test_a_plan_takes_a_gpu(sd_like_bundle: Bundle) -> None:
    with pytest.raises(UnsupportedError, match="runs on an NVIDIA GPU, not on cpu"):
        EngineLoader(sd_like_bundle, "tensorrt-rtx", CPU).load("fidelity")


@pytest.fixture
def sd_like_bundle(tmp_path: Path) -> Bundle:
    """A manifest that names a plan, which is not read."""
    manifest = Manifest(
        model=BuiltFrom("tiny", ModelReference("tiny"), "unet", 77, (), {"content": "c", "files": {}, "seed": None, "revision": None}),
        built_for=BuiltFor("fp32", Bounds(64, 64, 64), Bounds(64, 64, 64), Bounds(1, 1, 1), True, Bounds(1, 77, 231)),
        built_with={},
        signature=SPEC,
        graphs={"fidelity": SPEC},
        engines={"tensorrt-rtx": EngineSet({"fidelity": "fidelity.plan"})},
        verification={},
        gate_step=None,
        gate_noise=None,
        steps=1,
        guidance_scale=None,
    )
    return Bundle(tmp_path, manifest)


# What needs one.


@functools.cache
def why_not(backend: str) -> str | None:
    """Why a flavour cannot run here, as `tgate-bench probe` finds it; None if it can."""
    if not FLAVOURS[backend].is_installed():
        return f"{FLAVOURS[backend].requirement} is not installed here"
    if not torch.cuda.is_available():
        return "there is no CUDA device here"
    try:
        return children.run(attempt, Try(backend, None), f"the try of {backend}", "").get("error")
    except TGateError as error:
        return str(error)


@pytest.fixture(params=list(FLAVOURS.values()), ids=lambda flavour: flavour.backend)
def flavour(request: pytest.FixtureRequest) -> Flavour:
    """Each flavour that runs here. TensorRT-RTX builds for, and then refuses, GPUs that it does not support."""
    found: Flavour = request.param
    if reason := why_not(found.backend):
        pytest.skip(reason)
    return found


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """The graph in a file."""
    model = ir.from_onnx_text(GRAPH)
    next(value for value in model.graph.inputs if value.name == "cache_one").name = "cache.one"  # no name in ONNX's text
    ir.save(model, tmp_path / "small.onnx")
    return tmp_path / "small.onnx"


@pytest.fixture
def arena() -> Arena:
    """Stream and memory on the GPU."""
    return Arena(torch.device("cuda", torch.cuda.current_device()))


@pytest.fixture
def engine(flavour: Flavour, graph: Path, weights: Path, arena: Arena, tmp_path: Path) -> Iterator[TensorRTEngine]:
    """The graph as a plan that takes its weight as an input."""
    plan = tmp_path / "small.plan"
    build_plan(flavour, graph, plan, SPEC, PlanOptions(), parameters={"weight": WEIGHT})
    shared = SharedWeights([weights], arena.device)
    loaded = TensorRTEngine(plan, SPEC, flavour, arena, weights=shared, options=RuntimeOptions(runtime_cache=tmp_path / "compiled"))
    yield loaded
    loaded.close()


def inputs(rows: int) -> dict[str, Tensor]:
    return {tensor.name: torch.randn(tensor.concrete(batch=rows), device="cuda") for tensor in SPEC.inputs}


def expected(given: dict[str, Tensor], weight: Tensor) -> Tensor:
    return torch.nn.functional.conv2d(given["sample"], weight.cuda(), padding=1) - given["cache.one"]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_plain_runs_captures_and_replays_agree(engine: TensorRTEngine, weights: Path, rows: int) -> None:
    weight = SharedWeights([weights], CPU)["weight"]
    cache, written = (
        torch.empty(SPEC.inputs[1].concrete(batch=rows), device="cuda"),
        torch.empty(SPEC.outputs[0].concrete(batch=rows), device="cuda"),
    )
    for _ in range(5):  # the first is plain, the second is captured, the others are replayed
        given = inputs(rows)
        cache.copy_(given["cache.one"])
        written.fill_(torch.nan)
        engine.run({**given, "cache.one": cache}, {"noise_pred": written})
        assert torch.allclose(written, expected(given, weight), atol=1e-2)  # TF32


@pytest.mark.gpu
def test_shapes_change_and_engines_come_back(engine: TensorRTEngine, weights: Path, tmp_path: Path) -> None:
    weight = SharedWeights([weights], CPU)["weight"]
    for rows in (1, 4, 1, 2, 2, 2, 1):
        given, written = inputs(rows), torch.empty(SPEC.outputs[0].concrete(batch=rows), device="cuda")
        engine.run(given, {"noise_pred": written})
        assert torch.allclose(written, expected(given, weight), atol=1e-2)
        if rows == 4:
            engine.unload()
    engine.unload()
    if engine._flavour.has_runtime_cache:
        assert list((tmp_path / "compiled").glob("*.cache"))


@pytest.mark.gpu
def test_weights_are_exchanged_under_a_captured_graph(engine: TensorRTEngine) -> None:
    given, written = inputs(2), torch.empty(SPEC.outputs[0].concrete(batch=2), device="cuda")
    for _ in range(3):
        engine.run(given, {"noise_pred": written})
    other = torch.randn(8, 8, 3, 3)
    engine.replace_weights({"weight": other})
    engine.run(given, {"noise_pred": written})
    assert torch.allclose(written, expected(given, other), atol=1e-2)


@pytest.mark.gpu
def test_a_run_does_not_wait_for_the_gpu(engine: TensorRTEngine) -> None:
    given, written = inputs(2), torch.empty(SPEC.outputs[0].concrete(batch=2), device="cuda")
    for _ in range(3):
        engine.run(given, {"noise_pred": written})
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            engine.run(given, {"noise_pred": written})
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_two_engines_share_activation_memory(engine: TensorRTEngine, flavour: Flavour, weights: Path, arena: Arena, tmp_path: Path) -> None:
    other = TensorRTEngine(tmp_path / "small.plan", SPEC, flavour, arena, weights=SharedWeights([weights], arena.device))
    given, results = inputs(2), []
    for one in (engine, other, engine, other):
        written = torch.empty(SPEC.outputs[0].concrete(batch=2), device="cuda")
        one.run(given, {"noise_pred": written})
        results.append(written)
    assert all(torch.equal(results[0], result) for result in results)
    assert arena.memory(1).data_ptr() == arena.memory(1).data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize("weights_mode", ["baked", "shared", "shared-linear"])
def test_pictures_are_those_of_onnx_runtime(flavour: Flavour, weights_mode: str, tiny_sd: Path, tmp_path: Path) -> None:
    import tgate_trt

    bundle = tgate_trt.build(
        tiny_sd, tmp_path / "bundle", backend=["onnxruntime", flavour.backend], precision="fp32", weights=weights_mode, verify=False
    )
    pictures = []
    for backend, device in (("onnxruntime", "cpu"), (flavour.backend, "cuda")):
        pipeline: Any = tgate_trt.load(bundle, backend=backend, device=device, gate_step=2)
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        for _ in range(3):
            picture = pipeline("a cat", num_inference_steps=4, latents=noise.to(device), output_type="pt").images
        pictures.append(picture.float().cpu())
    assert (pictures[0] - pictures[1]).abs().max() < 2e-2


@pytest.mark.gpu
def test_polygraphy_agrees(graph: Path, tmp_path: Path) -> None:
    """A second tool builds and compares the same graph: ONNX Runtime against TensorRT-RTX."""
    pytest.importorskip("polygraphy")
    if reason := why_not("tensorrt-rtx"):
        pytest.skip(reason)
    shapes = [f"{tensor.name}:{list(tensor.concrete(batch=2))}".replace(" ", "") for tensor in (*SPEC.inputs, WEIGHT)]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "polygraphy",
            "run",
            str(graph),
            "--onnxrt",
            "--trt",
            "--strongly-typed",
            "--atol",
            "1e-2",
            "--input-shapes",
            *shapes,
        ],
        env={**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_polygraphy_reads_what_onnx_runtime_runs(graph: Path) -> None:
    """Without a GPU, the second tool can still load our graph, and agrees with our engine on ONNX Runtime's results."""
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx

    spec = SPEC
    given = {tensor.name: torch.randn(tensor.concrete(batch=2)) for tensor in (*spec.inputs, WEIGHT)}
    with OnnxrtRunner(SessionFromOnnx(str(graph))) as runner:
        theirs = runner.infer({name: tensor.numpy() for name, tensor in given.items()})
    written = {"noise_pred": torch.empty(2, 8, 16, 16)}
    whole = GraphSpec("small", (*spec.inputs, WEIGHT), spec.outputs, spec.dimensions)
    OnnxRuntimeEngine(graph, whole, device=CPU, threads=1).run(given, written)
    assert torch.allclose(torch.as_tensor(theirs["noise_pred"]), written["noise_pred"], atol=1e-5)

"""`TensorRTEngine` on a strict stand-in for TensorRT's runtime, for both flavours: no GPU has run it."""

from __future__ import annotations

import dataclasses
import gc
import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tgate_trt.engines import graphs
from tgate_trt.engines.graphs import GraphCache
from tgate_trt.engines.shared_weights import SharedWeights
from tgate_trt.engines.tensorrt import Arena, RuntimeOptions, TensorRTEngine
from tgate_trt.errors import BundleError, GateError, UnsupportedError
from tgate_trt.specs import Bounds, GraphSpec, TensorSpec

from .conftest import StandIn
from .stand_in.cuda import Cuda
from .stand_in.tensorrt import write_plan

CPU = torch.device("cpu")
GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[batch,8,16,16] sample, float[batch,8,16,16] cache_one) => (float[batch,8,16,16] noise_pred)
<float[8,8,3,3] weight = {WEIGHT}, float[8,1,1] shift = {0, 0, 0, 0, 0, 0, 0, 0}>
{
  filtered = Conv <pads = [1, 1, 1, 1]> (sample, weight)
  half = Constant <value = float {0.5}> ()
  halved = Mul (filtered, half)
  shifted = Add (halved, shift)
  noise_pred = Sub (shifted, cache_one)
}
"""
SHAPE = ("batch", 8, 16, 16)
SPEC = GraphSpec(
    "small",
    (TensorSpec("sample", "float32", SHAPE), TensorSpec("cache.one", "float32", SHAPE)),
    (TensorSpec("noise_pred", "float32", SHAPE),),
    {"batch": Bounds(1, 2, 4)},
)

Make = Callable[..., TensorRTEngine]


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(8, 8, 3, 3)


@pytest.fixture
def graph(tmp_path: Path, weight: Tensor) -> Path:
    """The graph with its weight in it, and a constant."""
    numbers = ", ".join(map(repr, weight.flatten().tolist()))
    model = ir.from_onnx_text(GRAPH.replace("WEIGHT", numbers))
    next(value for value in model.graph.inputs if value.name == "cache_one").name = "cache.one"  # no name in ONNX's text
    ir.save(model, tmp_path / "small.onnx")
    return tmp_path / "small.onnx"


@pytest.fixture
def make(stand_in: StandIn, graph: Path, tmp_path: Path) -> Make:
    """Makes an engine of the graph, of which the keywords are options of the plan."""

    def make(name: str = "small", options: RuntimeOptions | None = None, arena: Arena | None = None, **plan: Any) -> TensorRTEngine:
        write_plan(tmp_path / f"{name}.plan", graph, SPEC, **{"user_allocation": True, **plan})
        return TensorRTEngine(
            tmp_path / f"{name}.plan", SPEC, stand_in.flavour, arena or stand_in.arena, graph=graph, options=options or RuntimeOptions()
        )

    return make


def inputs(rows: int) -> dict[str, Tensor]:
    return {tensor.name: torch.randn(tensor.concrete(batch=rows)) for tensor in SPEC.inputs}


def expected(given: dict[str, Tensor], weight: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    return torch.nn.functional.conv2d(given["sample"], weight, padding=1) / 2 + shift - given["cache.one"]


def buffers(rows: int) -> tuple[dict[str, Tensor], Tensor]:
    """Memory of the inputs and of the output."""
    return inputs(rows), torch.empty(SPEC.outputs[0].concrete(batch=rows))


def check(
    engine: TensorRTEngine,
    weight: Tensor,
    rows: int = 2,
    times: int = 1,
    shift: Tensor | float = 0.0,
    memory: tuple[dict[str, Tensor], Tensor] | None = None,
) -> None:
    """Run with new inputs in the same memory: plainly, captured, replayed."""
    given, written = memory or buffers(rows)
    for _ in range(times):
        for tensor in given.values():
            tensor.normal_()
        written.fill_(torch.nan)
        engine.run(given, {"noise_pred": written})
        torch.testing.assert_close(written, expected(given, weight, shift), rtol=1e-4, atol=1e-4)


def test_rows_in_turn_and_graphs_that_are_replayed(make: Make, weight: Tensor, stand_in: StandIn) -> None:
    engine = make()
    for rows in (1, 2, 4, 1, 2, 4):
        check(engine, weight, rows, times=4)
    captures = not stand_in.flavour.captures_graphs
    assert (stand_in.cuda.captured > 2) == (stand_in.cuda.replayed > 2) == captures


def test_rtx_captures_by_itself(make: Make, weight: Tensor, stand_in: StandIn) -> None:
    """A6 and A7: by its own strategy, which takes plans that were built for the caller's memory."""
    if not stand_in.flavour.captures_graphs:
        pytest.skip("TensorRT is captured by the caller")
    engine = make()
    check(engine, weight, times=4)
    (context,) = stand_in.contexts
    assert context._config.cuda_graph_strategy.name == "WHOLE_GRAPH_CAPTURE"
    assert context._config.dynamic_shapes_kernel_specialization_strategy.name == "LAZY"
    assert len(context.own_graphs) == 1
    assert stand_in.cuda.captured == 0, "graphs by hand would keep the kernels from before the specialisation"
    plain = make("plain", RuntimeOptions(cuda_graphs=False))
    check(plain, weight, times=4)
    assert stand_in.contexts[-1]._config.cuda_graph_strategy.name == "DISABLED"


def test_arena_growth_voids_graphs(make: Make, weight: Tensor, stand_in: StandIn) -> None:
    small, memory = make("small", memory=1024), buffers(2)
    check(small, weight, times=3, memory=memory)
    large = make("large", memory=1 << 20)
    for engine in (small, large, small, large):
        check(engine, weight, times=3, memory=memory)
    assert stand_in.arena.memory(0).numel() == 1 << 20


def test_unloaded_and_closed(make: Make, weight: Tensor, stand_in: StandIn) -> None:
    engine = make()
    for _ in range(2):
        check(engine, weight, times=3)
        engine.unload()
        gc.collect()
        assert not stand_in.contexts
    engine.close()
    with pytest.raises(GateError, match="the small engine has been closed; load the bundle again"):
        check(engine, weight)


def test_a_capture_that_fails_is_a_warning_and_plain_runs(
    make: Make, weight: Tensor, stand_in: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    """A10: the key is not poisoned, and the stream of the capture does not stay current."""
    engine = make(capturable=False)
    check(engine, weight, times=5)
    assert torch.cuda.current_stream() is torch.cuda.default_stream()
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING and record.name == graphs.__name__]
    assert len(warnings) == (0 if stand_in.flavour.captures_graphs else 1)
    assert stand_in.cuda.replayed == 0


def test_graphs_that_ran_least_lately_go(make: Make, weight: Tensor, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "LIMIT", 2)
    engine = make()
    buffers = [torch.empty(SPEC.outputs[0].concrete(batch=2)) for _ in range(4)]
    given = inputs(2)
    for written in buffers * 3:
        for _ in range(3):
            engine.run(given, {"noise_pred": written})
        torch.testing.assert_close(written, expected(given, weight), rtol=1e-4, atol=1e-4)
    if not stand_in.flavour.captures_graphs:
        assert engine._loaded is not None and len(engine._loaded.graphs) <= 2
        assert stand_in.cuda.captured == 12, "each came back after it was dropped"


def test_a_part_of_a_tensor_that_does_not_fit_is_refused(make: Make, weight: Tensor, stand_in: StandIn) -> None:
    """A11: TensorRT refuses the address, and the one from before must not be written to."""
    engine = make()
    check(engine, weight)
    block = torch.zeros(SPEC.outputs[0].concrete(batch=2)[0] * 8 * 256 + 1)
    odd = block[1:].view(SPEC.outputs[0].concrete(batch=2))
    with pytest.raises(GateError, match=r"refuses the memory of 'noise_pred' at address .*, which must be a multiple of 256"):
        engine.run(inputs(2), {"noise_pred": odd})
    check(engine, weight, times=3)


def test_a_batch_outside_the_profile_is_refused(make: Make, weight: Tensor) -> None:
    """A11: and what comes after is right."""
    engine = make()
    with pytest.raises(GateError, match=r"must have shape .* with batch 1:2:4, got"):
        check(engine, weight, rows=5)
    check(engine, weight, times=3)


def test_a_shape_that_tensorrt_refuses_is_an_error(make: Make, weight: Tensor) -> None:
    """A11: where the spec allows it and the plan does not."""
    engine = make()
    engine.spec = dataclasses.replace(SPEC, dimensions={"batch": Bounds(1, 2, 8)})
    with pytest.raises(GateError, match=r"does not take 'sample' of shape \[5, 8, 16, 16\]: setInputShape"):
        check(engine, weight, rows=5)


def test_no_context_is_one_sentence(make: Make) -> None:
    """A11."""
    with pytest.raises(
        BundleError, match=r"cannot make a context of small.plan: IExecutionContext: out of memory; build it on this machine"
    ):
        make(contexts=False)


@pytest.mark.parametrize("content", [b"short", b"stand-in plan\n{"])
def test_a_damaged_plan_is_one_sentence(content: bytes, stand_in: StandIn, tmp_path: Path) -> None:
    (tmp_path / "bad.plan").write_bytes(content)
    with pytest.raises(BundleError, match=r"cannot load bad.plan: IRuntime::deserializeCudaEngine: .*; build it on this machine"):
        TensorRTEngine(tmp_path / "bad.plan", SPEC, stand_in.flavour, stand_in.arena)


def test_errors_of_a_second_engine_are_its_own(make: Make, stand_in: StandIn, tmp_path: Path) -> None:
    """A14: TensorRT keeps one logger a process, so all engines of a module share one."""
    make()
    with pytest.raises(BundleError, match="the plan was built for another GPU"):
        make("other", gpu="another GPU")
    assert type(stand_in.trt.product.logger).__name__ != "type"


def test_a_stripped_plan_takes_the_graphs_constants_too(make: Make, weight: Tensor, stand_in: StandIn, tmp_path: Path) -> None:
    """A13: constants of the graph are in no safetensors file."""
    engine = make(stripped=True)
    check(engine, weight, times=3)
    other = torch.randn(8, 8, 3, 3)
    engine.replace_weights({"weight": other})
    check(engine, other, times=3)
    engine.replace_weights({})
    check(engine, weight, times=3)
    (tmp_path / "small.onnx").unlink()
    with pytest.raises(BundleError, match="holds no weights, and its graph is not in the bundle"):
        TensorRTEngine(tmp_path / "small.plan", SPEC, stand_in.flavour, stand_in.arena, graph=tmp_path / "small.onnx")


def test_loras_come_and_go_in_a_refittable_plan(make: Make, weight: Tensor) -> None:
    """Two of them at once, which TensorRT reads from the host's memory when it refits: they are copied there, and must live so long."""
    engine = make(refittable=True)
    a, b, shift = torch.randn(3, 8, 3, 8).permute(3, 1, 0, 2), torch.randn(8, 8, 3, 3), torch.randn(1, 1, 8).permute(2, 0, 1)
    for given, meant, added in (
        ({"weight": a, "shift": shift}, a, shift),
        ({"weight": b}, b, 0.0),
        ({"weight": a}, a, 0.0),
        ({}, weight, 0.0),
    ):
        engine.replace_weights(given)
        check(engine, meant, times=3, shift=added)
        engine.unload()
        check(engine, meant, shift=added)


def test_a_plan_that_holds_its_weights_refuses_others(make: Make, weight: Tensor) -> None:
    engine = make()
    with pytest.raises(UnsupportedError, match="the small engine holds its weights; build it with --weights shared"):
        engine.replace_weights({"weight": weight})
    check(engine, weight)


@pytest.fixture
def shared(stand_in: StandIn, tmp_path: Path, weight: Tensor) -> Callable[[str], TensorRTEngine]:
    """Makes engines that take the weight as an input, all from one copy."""
    model = ir.from_onnx_text(
        GRAPH.replace("float[8,8,3,3] weight = {WEIGHT}, ", "").replace("cache_one)", "cache_one, float[8,8,3,3] weight)", 1)
    )
    next(value for value in model.graph.inputs if value.name == "cache_one").name = "cache.one"
    ir.save(model, tmp_path / "shared.onnx")
    save_file({"weight": weight}, tmp_path / "weights.safetensors")
    weights = SharedWeights([tmp_path / "weights.safetensors"], CPU)

    def make(name: str) -> TensorRTEngine:
        write_plan(tmp_path / f"{name}.plan", tmp_path / "shared.onnx", SPEC, user_allocation=True)
        return TensorRTEngine(tmp_path / f"{name}.plan", SPEC, stand_in.flavour, stand_in.arena, weights=weights)

    return make


def test_loras_come_and_go_in_shared_weights(shared: Callable[[str], TensorRTEngine], weight: Tensor) -> None:
    """A → B → A, under graphs that were captured before, and after an unload."""
    first, second = shared("first"), shared("second")
    a, b = torch.randn(8, 8, 3, 3), torch.randn(8, 8, 3, 3)
    check(first, weight, times=3)
    for given, meant in (({"weight": a}, a), ({"weight": b}, b), ({"weight": a}, a), ({}, weight)):
        first.replace_weights(given)
        for engine in (first, second):
            check(engine, meant, times=3)
    first.unload()
    check(first, weight, times=3)


def test_an_error_within_a_run_leaves_the_streams_in_order(make: Make, weight: Tensor, stand_in: StandIn) -> None:
    """The caller's stream waits for the engine's whatever happens: its inputs were copied there."""
    engine = make()
    given = inputs(2)
    check(engine, weight)
    with pytest.raises(GateError, match="'noise_pred'"):
        engine.run(given, {})
    given["sample"].zero_()
    assert float(given["sample"].sum()) == 0


def test_two_engines_and_two_threads_take_turns(make: Make, weight: Tensor, stand_in: StandIn) -> None:
    engines = [make("first", memory=1 << 12), make("second", memory=1 << 13)]
    failures: list[BaseException] = []

    def work(engine: TensorRTEngine) -> None:
        try:
            with stand_in.cuda.watched():
                for rows in (1, 2, 4) * 3:
                    check(engine, weight, rows, times=3)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(engine,)) for engine in engines * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_another_thread_may_use_the_gpu_during_a_capture(cuda: Cuda) -> None:
    """B1: a capture of mode ``global`` would fail."""
    stream = torch.cuda.Stream()

    def elsewhere() -> None:
        with cuda.watched():
            torch.zeros(4)

    def launch() -> None:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    cache = GraphCache("small")
    with torch.cuda.stream(stream):
        for _ in range(3):
            cache.run("key", launch)
    assert len(cache) == 1


def test_after_a_failed_capture_the_callers_stream_is_current(cuda: Cuda) -> None:
    """A10: the default stream cannot be captured, so a stream of the capture's own is used, which PyTorch then leaves current."""

    def launch() -> None:
        if cuda.is_capturing():
            torch.zeros(4)

    cache = GraphCache("small")
    for _ in range(3):
        cache.run("key", launch)
        assert torch.cuda.current_stream() is torch.cuda.default_stream()
    assert len(cache) == 0


def test_kernels_are_kept_while_the_engine_lives(make: Make, weight: Tensor, stand_in: StandIn, tmp_path: Path) -> None:
    """A9: after the first run of a shape, not only when it is unloaded; and none of another GPU are taken."""
    if not stand_in.flavour.has_runtime_cache:
        pytest.skip("TensorRT compiles when it builds")
    options = RuntimeOptions(runtime_cache=tmp_path / "compiled")
    engine, sizes = make("small", options), []
    assert not (tmp_path / "compiled").exists()
    for rows in (1, 2, 2, 4):
        check(engine, weight, rows)
        (kept,) = (tmp_path / "compiled").iterdir()
        sizes.append(kept.stat().st_size)
    assert sizes[0] < sizes[1] == sizes[2] < sizes[3]
    again = make("small", options)
    assert stand_in.contexts[-1]._config._cache._kernels, "the next process begins with them"
    kept.write_bytes(b"of another driver")
    check(make("small", options), weight)
    del again


ORDINARY = """
import sys, dataclasses, pytest, torch
from pathlib import Path
sys.path[:0] = [{root!r}]
from tests.engines.stand_in.cuda import Cuda
from tests.engines.stand_in.tensorrt import module
from tests.engines.test_tensorrt_on_stand_in import SPEC, inputs
from tgate_trt.engines.tensorrt import Arena, RuntimeOptions, TensorRTEngine
from tgate_trt.engines.tensorrt_flavours import RTX
cuda, folder = Cuda(), Path({folder!r})
cuda.install(pytest.MonkeyPatch())
sys.modules["stand_in"] = module("stand_in", cuda, is_rtx=True)
with cuda.watched():
    flavour, options = dataclasses.replace(RTX, modules=("stand_in",)), RuntimeOptions(runtime_cache=folder / "compiled")
    engine = TensorRTEngine(folder / "small.plan", SPEC, flavour, Arena(torch.device("cpu")), options=options)
    engine.run(inputs(2), {{"noise_pred": torch.empty(2, 8, 16, 16)}})
    sys.modules["stand_in"].product.contexts[0]()._config._cache._kernels.add("compiled in the background")
"""


def test_an_ordinary_process_keeps_its_kernels(make: Make, stand_in: StandIn, tmp_path: Path) -> None:
    """A9: it just ends, and what was compiled after its last run is kept too."""
    if not stand_in.flavour.has_runtime_cache:
        pytest.skip("TensorRT compiles when it builds")
    make()
    code = ORDINARY.format(root=str(Path(__file__).parents[2]), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (kept,) = (tmp_path / "compiled").iterdir()
    assert b"compiled in the background" in kept.read_bytes()

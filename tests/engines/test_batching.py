"""Continuous batching: each thread gets its own rows whatever it is merged with, none starves, and an error reaches its own batch alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tgate_trt.bundle.bundle import Bundle
from tgate_trt.engines.base import Engine
from tgate_trt.engines.batching import Batch, Batcher, BatchingEngine, Member
from tgate_trt.engines.onnxruntime import OnnxRuntimeEngine
from tgate_trt.errors import DeadlineError, GateError, InputError
from tgate_trt.running.loading import load_engine
from tgate_trt.specs import CACHE_PREFIX, ROWS, Bounds, GraphSpec, TensorSpec

CPU = torch.device("cpu")
MOST = 4
"""Rows of the largest batch of `Doubling`."""


def spec_of(name: str) -> GraphSpec:
    sample = TensorSpec("sample", "float32", (ROWS, 3))
    return GraphSpec(
        name, (sample, TensorSpec("timestep", "float32", (ROWS,))), (TensorSpec("noise_pred", "float32", (ROWS, 3)),), bounds()
    )


def bounds() -> dict[str, Bounds]:
    return {ROWS: Bounds(1, 2, MOST)}


class Doubling:
    """An engine that doubles its sample and adds the timestep, and that a test can hold in the middle of a run."""

    device = CPU

    def __init__(self, name: str = "planning") -> None:
        self.spec = spec_of(name)
        self.rows: list[int] = []
        """Of each run."""
        self.addresses: set[int] = set()
        self.may_end = threading.Event()
        self.may_end.set()
        self.began = threading.Event()
        self.error: Exception | None = None
        self.calls: list[str] = []

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        self.rows.append(inputs["sample"].shape[0])
        self.addresses.add(inputs["sample"].data_ptr())
        self.began.set()
        assert self.may_end.wait(20)
        if self.error is not None:
            raise self.error
        torch.add(inputs["timestep"][:, None], inputs["sample"], alpha=2, out=outputs["noise_pred"])

    def replace_weights(self, weights: Mapping[str, Tensor]) -> None:
        self.calls.append("replace_weights")

    def unload(self) -> None:
        self.calls.append("unload")

    def close(self) -> None:
        self.calls.append("close")


class Slow(Doubling):
    """Takes a random moment, so that calls meet in every way."""

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        time.sleep(0.0005)
        super().run(inputs, outputs)


class Callers:
    """Threads that call engines at once; their results are futures."""

    def __init__(self, batcher: Batcher, pool: ThreadPoolExecutor) -> None:
        self.batcher, self.pool = batcher, pool
        self.members: list[Member] = []

    def call(self, engine: BatchingEngine, sample: Tensor, timestep: float = 0.0, *, deadline: float | None = None) -> Future[Tensor]:
        """Call an engine from a new thread, and return once it waits or runs."""
        before = len(self.batcher._waiting)
        future = self.pool.submit(self._run, engine, sample, timestep, deadline)
        until = time.monotonic() + 20
        while len(self.batcher._waiting) == before and self.batcher._leader is None and not future.done():
            assert time.monotonic() < until
            time.sleep(0.001)
        return future

    def _run(self, engine: BatchingEngine, sample: Tensor, timestep: float, deadline: float | None) -> Tensor:
        output = torch.full_like(sample, torch.nan)
        with self.batcher.member(deadline) as member:
            self.members.append(member)
            engine.run({"sample": sample, "timestep": torch.full((sample.shape[0],), timestep)}, {"noise_pred": output})
        return output


@pytest.fixture
def callers() -> Any:
    batcher = Batcher(patience=0)
    with ThreadPoolExecutor(12) as pool:
        yield Callers(batcher, pool)


def held(callers: Callers, name: str = "planning") -> tuple[Doubling, BatchingEngine, Future[Tensor]]:
    """An engine in the middle of a run of one row, so that further calls wait."""
    inner = Doubling(name)
    engine = BatchingEngine(inner, callers.batcher)
    inner.may_end.clear()
    first = callers.call(engine, torch.ones(1, 3))
    assert inner.began.wait(20)
    return inner, engine, first


def waits(callers: Callers, engine: BatchingEngine, sample: Tensor, timestep: float = 0.0, **more: Any) -> Future[Tensor]:
    """A call that waits behind the one that is held."""
    before = len(callers.batcher._waiting)
    future = callers.call(engine, sample, timestep, **more)
    until = time.monotonic() + 20
    while len(callers.batcher._waiting) == before:
        assert time.monotonic() < until
        time.sleep(0.001)
    return future


def test_it_has_the_protocol_of_an_engine() -> None:
    engine: Engine = BatchingEngine(Doubling(), Batcher())
    assert engine.spec == spec_of("planning") and engine.device == CPU


def test_calls_that_wait_are_one_run_and_each_gets_its_rows(callers: Callers) -> None:
    inner, engine, first = held(callers)
    samples = [torch.randn(rows, 3) for rows in (1, 2, 1)]
    futures = [waits(callers, engine, sample, float(step)) for step, sample in enumerate(samples)]
    inner.may_end.set()
    assert torch.equal(first.result(20), torch.full((1, 3), 2.0))
    for step, (sample, future) in enumerate(zip(samples, futures, strict=True)):
        assert torch.equal(future.result(20), 2 * sample + step)
    assert inner.rows == [1, 4]


def test_a_batch_has_at_most_the_engines_rows_and_no_call_is_passed_over(callers: Callers) -> None:
    inner, engine, _ = held(callers)
    futures = [waits(callers, engine, torch.randn(rows, 3)) for rows in (3, 2, 1, 4)]
    inner.may_end.set()
    for future in futures:
        future.result(20)
    assert inner.rows == [1, 3 + 1, 2, 4]


def test_merged_calls_use_buffers_at_fixed_addresses() -> None:
    inner, batcher = Doubling(), Batcher(patience=0, rows=MOST)
    engine = BatchingEngine(inner, batcher)
    calls = [engine.call_of({"sample": torch.randn(1, 3), "timestep": torch.zeros(1)}, {"noise_pred": torch.empty(1, 3)}, None)] * 2
    for batch in (calls, [*calls, calls[0]], calls):
        engine.run_merged(batch)
    assert len(inner.addresses) == 1
    assert engine.memory == MOST * 4 * (3 + 1 + 3)


def test_only_calls_of_one_size_and_with_equal_constants_are_merged() -> None:
    spec = GraphSpec(
        "positions",
        (TensorSpec("sample", "float32", (ROWS, "width")), TensorSpec("positions", "float32", ("width",))),
        (TensorSpec("noise_pred", "float32", (ROWS, "width")),),
        {ROWS: Bounds(1, 2, MOST), "width": Bounds(1, 3, 8)},
    )

    class Adding(Doubling):
        def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
            torch.add(inputs["sample"], inputs["positions"], out=outputs["noise_pred"])

    inner = Adding()
    inner.spec = spec
    engine = BatchingEngine(inner, Batcher())

    def call(width: int, start: float) -> Any:
        inputs = {"sample": torch.randn(1, width), "positions": torch.arange(width) + start}
        return engine.call_of(inputs, {"noise_pred": torch.empty(1, width)}, None)

    first, alike, wider, other = call(3, 0.0), call(3, 0.0), call(4, 0.0), call(3, 1.0)
    assert first.is_like(alike) and not first.is_like(wider) and not first.is_like(other)
    engine.run_merged([first, alike])
    for one in (first, alike):
        assert torch.equal(one.outputs["noise_pred"], one.inputs["sample"] + one.inputs["positions"])


def test_another_graph_waits_for_one_batch_and_not_for_a_stream_of_them(callers: Callers) -> None:
    """Planning threads that come again at once do not pass the fidelity call that waits."""
    planning, engine, _ = held(callers)
    fidelity = Doubling("fidelity")
    other = BatchingEngine(fidelity, callers.batcher)
    planned = [waits(callers, engine, torch.randn(2, 3)) for _ in range(2)]
    waiting = waits(callers, other, torch.randn(1, 3))
    later = [waits(callers, engine, torch.randn(4, 3)) for _ in range(3)]
    order: list[str] = []
    callers.batcher.observer = lambda batch: order.append(batch.graph)
    planning.may_end.set()
    for future in (*planned, waiting, *later):
        future.result(20)
    assert order == ["planning", "planning", "fidelity", "planning", "planning", "planning"]


def test_an_error_reaches_every_call_of_its_batch_and_no_other(callers: Callers) -> None:
    inner, engine, first = held(callers)
    inner.error = ValueError("out of memory")
    futures = [waits(callers, engine, torch.randn(2, 3)) for _ in range(2)]
    other = waits(callers, BatchingEngine(Doubling("fidelity"), callers.batcher), torch.ones(1, 3))
    inner.may_end.set()
    with pytest.raises(ValueError, match="out of memory"):
        first.result(20)
    raised = []
    for future in futures:
        with pytest.raises(GateError, match="the planning engine failed on a batch of 2 calls: out of memory") as caught:
            future.result(20)
        raised.append(caught.value)
    assert raised[0] is not raised[1]
    assert torch.equal(other.result(20), torch.full((1, 3), 2.0))
    inner.error = None
    assert torch.equal(callers.call(engine, torch.ones(1, 3)).result(20), torch.full((1, 3), 2.0))


def test_a_call_that_does_not_fit_disturbs_no_other(callers: Callers) -> None:
    inner, engine, _ = held(callers)
    good = waits(callers, engine, torch.ones(1, 3))
    with pytest.raises(GateError, match="'sample' must have shape"):
        callers.call(engine, torch.ones(1, 4)).result(20)
    with pytest.raises(GateError, match="rows"):
        engine.run({"sample": torch.ones(1, 3), "timestep": torch.zeros(2)}, {"noise_pred": torch.ones(1, 3)})
    inner.may_end.set()
    assert torch.equal(good.result(20), torch.full((1, 3), 2.0))


def test_a_call_that_waits_can_be_cancelled_and_the_next_one_too(callers: Callers) -> None:
    inner, engine, first = held(callers)
    cancelled = waits(callers, engine, torch.ones(1, 3))
    callers.members[1].cancel(InputError("the client has gone"))
    with pytest.raises(InputError, match="gone"):
        cancelled.result(20)  # while the batch before it still runs
    assert not first.done()
    callers.members[0].cancel(InputError("too late for the call that runs"))
    inner.may_end.set()
    first.result(20)
    with callers.batcher.member() as member:
        member.cancel(InputError("before its first call"))
        with pytest.raises(InputError, match="before its first call"):
            engine.run({"sample": torch.ones(1, 3), "timestep": torch.zeros(1)}, {"noise_pred": torch.ones(1, 3)})
    assert inner.rows == [1]


def test_a_call_after_its_deadline_is_refused(callers: Callers) -> None:
    engine = BatchingEngine(Doubling(), callers.batcher)
    with pytest.raises(DeadlineError, match="deadline"):
        callers.call(engine, torch.ones(1, 3), deadline=time.monotonic() - 1).result(20)


def test_closing_lets_the_batch_end_and_refuses_what_waits(callers: Callers) -> None:
    inner, engine, first = held(callers)
    waiting = waits(callers, engine, torch.ones(1, 3))
    closing = callers.pool.submit(callers.batcher.close)
    with pytest.raises(GateError, match="closed while a call waited"):
        waiting.result(20)
    assert not closing.done()
    inner.may_end.set()
    closing.result(20)
    first.result(20)
    with pytest.raises(GateError, match="closed"):
        engine.run({"sample": torch.ones(1, 3), "timestep": torch.zeros(1)}, {"noise_pred": torch.ones(1, 3)})


@pytest.mark.parametrize("change", [BatchingEngine.unload, BatchingEngine.close, lambda engine: engine.replace_weights({})])
def test_an_engine_is_changed_between_two_batches(callers: Callers, change: Callable[[BatchingEngine], None]) -> None:
    inner, engine, first = held(callers)
    changing = callers.pool.submit(change, engine)
    time.sleep(0.02)
    assert not changing.done() and not inner.calls
    inner.may_end.set()
    changing.result(20)
    first.result(20)
    assert len(inner.calls) == 1


def test_a_batch_waits_for_members_that_are_about_to_come_and_not_longer_than_its_patience() -> None:
    batcher, inner = Batcher(patience=50), Slow()
    engine = BatchingEngine(inner, batcher)
    barrier, steps = threading.Barrier(2), 10

    def run() -> None:
        with batcher.member():
            barrier.wait(20)
            for _ in range(steps):
                engine.run({"sample": torch.ones(1, 3), "timestep": torch.zeros(1)}, {"noise_pred": torch.ones(1, 3)})
                time.sleep(0.005)

    threads = [threading.Thread(target=run) for _ in range(2)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sum(inner.rows) == 2 * steps
    assert inner.rows.count(2) >= steps // 2
    assert time.monotonic() - start < 10


@given(
    st.lists(st.lists(st.tuples(st.booleans(), st.integers(1, MOST), st.booleans()), min_size=1, max_size=5), min_size=2, max_size=5),
    st.sampled_from([0.0, 0.5]),
)
@settings(max_examples=25, deadline=None)
def test_any_interleaving_of_threads_gives_each_its_own_rows(runs: list[list[tuple[bool, int, bool]]], patience: float) -> None:
    """Each thread makes calls of either graph with any rows, some after a pause."""
    seen: list[Batch] = []
    batcher = Batcher(patience=patience, observer=seen.append)
    engines = [BatchingEngine(Slow(name), batcher) for name in ("planning", "fidelity")]

    def run(number: int) -> None:
        with batcher.member() as member:
            for step, (is_fidelity, rows, pauses) in enumerate(runs[number]):
                sample = torch.full((rows, 3), float(100 * number + step))
                output = torch.full_like(sample, torch.nan)
                engines[is_fidelity].run({"sample": sample, "timestep": torch.full((rows,), float(step))}, {"noise_pred": output})
                assert torch.equal(output, 2 * sample + step)
                if pauses:
                    time.sleep(0.001)
            assert member.calls == len(runs[number])

    with ThreadPoolExecutor(len(runs)) as pool:
        for future in [pool.submit(run, number) for number in range(len(runs))]:
            future.result(30)
    assert sum(batch.rows for batch in seen) == sum(rows for calls in runs for _, rows, _ in calls)
    assert all(batch.rows <= MOST for batch in seen)
    assert not batcher._waiting and batcher._leader is None and not batcher._members


def test_onnxruntime_gives_each_of_several_threads_its_rows(tmp_path: Path) -> None:
    text = '<ir_version: 10, opset_import: ["" : 20]>\ng (float[batch,3] sample, float[batch] timestep) => (float[batch,3] noise_pred) {\n'
    text += "axes = Constant <value = int64[1] {1}> ()\ncolumn = Unsqueeze (timestep, axes)\ntwice = Add (sample, sample)\n"
    ir.save(ir.from_onnx_text(text + "noise_pred = Add (twice, column)\n}"), tmp_path / "small.onnx")
    batcher = Batcher()
    engine = BatchingEngine(OnnxRuntimeEngine(tmp_path / "small.onnx", spec_of("small"), device=CPU, threads=1), batcher)

    def run(number: int) -> None:
        with batcher.member():
            for step in range(20):
                sample, output = torch.randn(1 + number % 2, 3), torch.full((1 + number % 2, 3), torch.nan)
                engine.run({"sample": sample, "timestep": torch.full((sample.shape[0],), float(step))}, {"noise_pred": output})
                torch.testing.assert_close(output, 2 * sample + step)

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(run, number) for number in range(4)]:
            future.result(30)


BATCH_TOLERANCE = {"onnxruntime": 0.0, "pytorch": 1e-5}
"""Largest difference, as a share of the largest value, between an output in a batch and alone, on the CPU: ONNX Runtime's kernels for
the demo model give a row the same bits in every batch; the products of PyTorch's BLAS are split by the number of rows."""


@pytest.mark.parametrize("backend", BATCH_TOLERANCE)
@pytest.mark.parametrize("graph", ["planning", "fidelity"])
def test_a_row_is_the_same_in_a_batch_as_alone(shapes_bundle: Bundle, backend: str, graph: str) -> None:
    """Calls of the demo model at other steps, merged in batches of 2 to 6 rows."""
    inner = load_engine(shapes_bundle, graph, backend=backend, device=CPU, threads=1)
    rows = 1 if graph == "fidelity" else 2
    calls = [tensors_of(inner.spec, rows, step) for step in (20.0, 500.0, 981.0)]
    alone = []
    for inputs, outputs in calls:
        inner.run(inputs, outputs)
        alone.append({name: tensor.clone() for name, tensor in outputs.items()})
        for tensor in outputs.values():
            tensor.fill_(torch.nan)
    engine = BatchingEngine(inner, Batcher())
    for count in (2, 3):
        engine.run_merged([engine.call_of(inputs, outputs, None) for inputs, outputs in calls[:count]])
        for (_, outputs), expected in zip(calls[:count], alone, strict=False):
            for name, value in expected.items():
                error = (outputs[name] - value).abs().max() / value.abs().max()
                assert error <= BATCH_TOLERANCE[backend], f"{name} differs by {error:.1e} of its largest value"
    engine.close()


def tensors_of(spec: GraphSpec, rows: int, step: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random inputs of a graph at one timestep, and memory for its outputs."""
    inputs = {tensor.name: torch.randn(tensor.concrete(**spec.sizes(rows))) for tensor in spec.inputs}
    inputs["timestep"] = torch.full((rows,), step)
    assert any(name.startswith(CACHE_PREFIX) for name in inputs) == (spec.name == "fidelity")
    return inputs, {tensor.name: torch.empty(tensor.concrete(**spec.sizes(rows))) for tensor in spec.outputs}

"""TensorRT-RTX plans of graphs small enough to read, built without a GPU: what is built, and one sentence for what cannot be."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import onnx_ir as ir
import psutil
import pytest

from tgate_trt.engines import tensorrt_flavours
from tgate_trt.engines.tensorrt_builder import PlanOptions, build_plan, configure
from tgate_trt.engines.tensorrt_callbacks import python_logger
from tgate_trt.engines.tensorrt_flavours import RTX, TENSORRT, Api, Flavour, gpu_is_present
from tgate_trt.engines.tensorrt_network import add_profile, check_network, parse
from tgate_trt.errors import BuildError, InputError, UnsupportedError
from tgate_trt.specs import Bounds, GraphSpec, TensorSpec

pytestmark = pytest.mark.skipif(not RTX.is_installed(), reason="tensorrt-rtx is not installed here")
without_gpu = pytest.mark.skipif(gpu_is_present(), reason="there is a GPU here")

GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
g (float16[batch,4,size,8] sample, float16[4,4,3,3] weight, float[batch] timestep)
  => (float16[batch,4,size,8] noise_pred, float[batch] half_step)
{
  noise_pred = Conv <pads = [1, 1, 1, 1]> (sample, weight)
  two = Constant <value = float {2.0}> ()
  half_step = Div (timestep, two)
}
"""
SAMPLE = TensorSpec("sample", "float16", ("batch", 4, "size", 8))
WEIGHT = TensorSpec("weight", "float16", (4, 4, 3, 3))
TIMESTEP = TensorSpec("timestep", "float32", ("batch",))
SPEC = GraphSpec(
    "small",
    (SAMPLE, TIMESTEP),
    (TensorSpec("noise_pred", "float16", ("batch", 4, "size", 8)), TensorSpec("half_step", "float32", ("batch",))),
    {"batch": Bounds(1, 2, 6), "size": Bounds(8, 16, 24)},
)
EVERY_INPUT = dataclasses.replace(SPEC, inputs=(SAMPLE, WEIGHT, TIMESTEP))
ADA = PlanOptions(capabilities=("SM89",))


@pytest.fixture(scope="module")
def trt() -> Api:
    """The module of TensorRT-RTX."""
    return RTX.load()


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """The graph in a file."""
    ir.save(ir.from_onnx_text(GRAPH), tmp_path / "small.onnx")
    return tmp_path / "small.onnx"


@pytest.mark.parametrize(
    ("capabilities", "has_gpu", "targets"),
    [(("SM89",), False, ["SM89"]), (("SM86", "SM89"), True, ["SM86", "SM89"]), ((), True, ["CURRENT"])],
)
def test_a_plan_works_in_the_callers_memory_and_is_for_the_gpu_that_is_here(
    capabilities: tuple[str, ...], has_gpu: bool, targets: list[str], trt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the flag the runtime cannot capture; without a capability TensorRT-RTX builds for every GPU from Ampere on."""
    monkeypatch.setattr(tensorrt_flavours, "gpu_is_present", lambda: has_gpu)
    config = trt.Builder(trt.Logger(trt.Logger.ERROR)).create_builder_config()
    RTX.set_target(trt, config, capabilities)
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    found = [config.get_compute_capability(index) for index in range(config.num_compute_capabilities)]
    assert found == [getattr(trt.ComputeCapability, name) for name in targets]


@pytest.mark.parametrize(
    ("version", "python", "reason"),
    [
        ("11.1.0", (3, 13), "TensorRT 11.1.0 cannot register plugins with Python 3.13 or later; TensorRT 11.2 can"),
        ("11.1.0", (3, 12), None),
        ("11.2.0", (3, 13), None),
        ("10.14.1", (3, 12), "need TensorRT 10.9 or later, but not 10.14; 10.14.1 is installed"),
        (None, (3, 12), "tensorrt-cu13 is not installed"),
    ],
)
def test_plugins_are_refused_where_tensorrt_cannot_register_them(
    version: str | None, python: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Flavour, "version", lambda self: version)
    monkeypatch.setattr(tensorrt_flavours.sys, "version_info", python)  # type: ignore[attr-defined]
    found = TENSORRT.why_no_plugins()
    assert found is None if reason is None else reason in str(found)


def test_a_network_has_the_specs_tensors_and_profile(trt: Api, graph: Path) -> None:
    logger = trt.Logger(trt.Logger.ERROR)  # type: ignore[attr-defined]
    builder = trt.Builder(logger)
    network, _parser = parse(trt, builder, graph, logger)
    check_network(network, EVERY_INPUT)
    assert network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    config = configure(trt, RTX, builder, EVERY_INPUT, dataclasses.replace(ADA, workspace=1 << 20, optimization_level=1))
    assert config.num_optimization_profiles == 1
    assert config.builder_optimization_level == 1
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 1 << 20


def test_a_profile_holds_every_named_dimension(trt: Api, graph: Path) -> None:
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))  # type: ignore[attr-defined]
    profile = add_profile(builder, builder.create_builder_config(), EVERY_INPUT)
    assert [tuple(shape) for shape in profile.get_shape("sample")] == [(1, 4, 8, 8), (2, 4, 16, 8), (6, 4, 24, 8)]
    assert [tuple(shape) for shape in profile.get_shape("timestep")] == [(1,), (2,), (6,)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (SPEC, "the input 'weight' is not expected"),
        (
            dataclasses.replace(EVERY_INPUT, inputs=(*EVERY_INPUT.inputs, TensorSpec("text", "float16", (1,)))),
            "the input 'text' is missing",
        ),
        (
            dataclasses.replace(EVERY_INPUT, inputs=(SAMPLE, WEIGHT, dataclasses.replace(TIMESTEP, dtype="float16"))),
            r"the input 'timestep' is FLOAT \[-1\] instead of HALF \[-1\]",
        ),
        (
            dataclasses.replace(EVERY_INPUT, outputs=(SPEC.outputs[1], TensorSpec("noise_pred", "float16", ("batch", 4, 8, 8)))),
            r"the output 'noise_pred' is HALF \[-1, 4, -1, 8\] instead of HALF \[-1, 4, 8, 8\]",
        ),
    ],
)
def test_a_network_that_is_not_the_specs_is_refused(trt: Api, graph: Path, spec: GraphSpec, message: str) -> None:
    logger = trt.Logger(trt.Logger.ERROR)  # type: ignore[attr-defined]
    network, _parser = parse(trt, trt.Builder(logger), graph, logger)
    with pytest.raises(BuildError, match=message):
        check_network(network, spec)


def test_messages_go_to_logging_and_the_last_error_stays(trt: Api, caplog: pytest.LogCaptureFixture) -> None:
    messages, severities = python_logger(trt), trt.ILogger.Severity
    with caplog.at_level("DEBUG", "tensorrt"):
        messages.log(severities.ERROR, "no\n memory")
        messages.log(severities.WARNING, "slow")
        messages.log(severities.VERBOSE, "a word")
    assert messages.last == "no memory"
    assert caplog.messages == ["no\n memory", "slow"]
    assert python_logger(trt) is messages, "TensorRT keeps one logger for all objects of a process"


def test_a_plan_is_built_for_several_gpus_with_weights_as_inputs(graph: Path, tmp_path: Path) -> None:
    plan, fractions = tmp_path / "small.plan", list[float]()
    report = build_plan(
        RTX,
        graph,
        plan,
        SPEC,
        PlanOptions(capabilities=("SM86", "SM120")),
        parameters={"weight": WEIGHT},
        on_progress=lambda fraction, phase: fractions.append(fraction),
    )
    assert report["bytes"] == plan.stat().st_size > 1000
    assert fractions
    assert all(0 <= fraction <= 1 for fraction in fractions)
    assert (tmp_path / "small.log").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"small.onnx", "small.plan", "small.log"}


MIXED = GRAPH.replace("float[batch] timestep", "float[batch,4,size,8] timestep").replace(
    "noise_pred = Conv <pads = [1, 1, 1, 1]> (sample, weight)", "noise_pred = Add (sample, timestep)"
)
FOREIGN = GRAPH.replace('["" : 20]', '["" : 20, "odd" : 1]').replace("= Conv <pads = [1, 1, 1, 1]>", "= odd.Operator")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MIXED, "cannot build the small engine: node .*noise_pred.*Half and Float.*two dtypes meet there.*the whole log is in"),
        (FOREIGN, "cannot build the small engine: node .*Operator.*TensorRT has no such operator.*the whole log is in"),
        ("nonsense", "cannot build the small engine: .*the whole log is in"),
    ],
)
def test_a_graph_that_cannot_be_built_is_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    graph, plan = tmp_path / "small.onnx", tmp_path / "small.plan"
    if text == "nonsense":
        graph.write_text(text)
    else:
        ir.save(ir.from_onnx_text(text), graph)
    with pytest.raises(BuildError, match=message) as caught:
        build_plan(RTX, graph, plan, EVERY_INPUT, ADA)
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"small.onnx", "small.log"}


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (PlanOptions(capabilities=("SM90",)), InputError, "does not build for 'SM90'; it builds for SM75"),
        (dataclasses.replace(ADA, optimization_level=6), InputError, "a number from 0 to 5, got 6"),
        (dataclasses.replace(ADA, workspace=0), InputError, "--workspace must be above 0"),
        (dataclasses.replace(ADA, hardware_compatible=True), UnsupportedError, "several --compute-capability"),
        pytest.param(dataclasses.replace(ADA, refittable=True), UnsupportedError, "only where there is a GPU", marks=without_gpu),
        pytest.param(dataclasses.replace(ADA, stripped=True), UnsupportedError, "only where there is a GPU", marks=without_gpu),
    ],
)
def test_what_cannot_be_built_is_refused_before_it_starts(
    options: PlanOptions, kind: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        build_plan(RTX, tmp_path / "absent.onnx", tmp_path / "small.plan", SPEC, options)
    assert not list(tmp_path.iterdir())


@without_gpu
def test_tensorrt_itself_takes_a_gpu() -> None:
    with pytest.raises(UnsupportedError, match="there is none here; tensorrt-rtx builds without"):
        PlanOptions().check(TENSORRT, has_gpu=False)
    with pytest.raises(InputError, match="tensorrt builds for the GPU of this machine"):
        ADA.check(TENSORRT, has_gpu=True)


def test_a_module_that_is_not_installed_is_one_sentence() -> None:
    absent = dataclasses.replace(RTX, modules=("no_such_module",), requirement="no-such-package")
    assert not absent.is_installed()
    assert absent.version() is None
    with pytest.raises(UnsupportedError, match="pip install no-such-package"):
        absent.load()


def test_a_cancelled_build_leaves_nothing(graph: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches the whole process group: both the command and its builder."""
    code = f"""
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started with it ignored
from pathlib import Path
from tests_spec import SPEC, WEIGHT
from tgate_trt.engines import tensorrt_flavours
from tgate_trt.engines.tensorrt_builder import PlanOptions, build_plan
from tgate_trt.engines.tensorrt_flavours import RTX
def tell(fraction, phase):
    print("under way", flush=True)
build_plan(RTX, Path({str(graph)!r}), Path({str(tmp_path / "small.plan")!r}), SPEC, PlanOptions(("SM89",)),
           parameters={{"weight": WEIGHT}}, on_progress=tell)
"""
    helper = tmp_path / "tests_spec.py"
    helper.write_text(f"from tgate_trt.specs import Bounds, GraphSpec, TensorSpec\nSPEC, WEIGHT = {SPEC!r}, {WEIGHT!r}\n")
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "under way\n"
    os.killpg(process.pid, signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=30)[1]
    time.sleep(0.1)
    assert not list(tmp_path.glob("*.plan*")) + list(tmp_path.glob(".*"))


def test_a_builder_that_the_system_kills_leaves_nothing_but_its_log(graph: Path, tmp_path: Path) -> None:
    def kill(_fraction: float, _phase: str) -> None:
        for child in psutil.Process().children():
            child.kill()

    with pytest.raises(BuildError, match=r"killed by the system, most likely because memory ran out; .*--weights shared.*small\.log"):
        build_plan(RTX, graph, tmp_path / "small.plan", SPEC, ADA, parameters={"weight": WEIGHT}, on_progress=kill)
    assert {path.name for path in tmp_path.iterdir()} == {"small.onnx", "small.log"}


def test_an_old_plan_stays_until_the_new_one_is_whole(graph: Path, tmp_path: Path) -> None:
    plan = tmp_path / "small.plan"
    plan.write_text("old")
    with pytest.raises(BuildError):
        build_plan(RTX, graph, plan, SPEC, ADA)  # the weight is an input that the spec lacks
    assert plan.read_text() == "old"

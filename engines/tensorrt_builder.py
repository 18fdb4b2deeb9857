"""TensorRT plans from ONNX graphs, for every flavour, each in a child process.

    build_plan(RTX, Path("fidelity.onnx"), Path("fidelity.plan"), spec, PlanOptions(capabilities=("SM89",)))

The child parses the graph, compares the network with the spec, builds, streams the plan to disk, and writes the builder's whole
log to a file.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import resource
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from tgate_trt import children
from tgate_trt.engines.tensorrt_callbacks import Phases, file_logger, plan_writer, progress_monitor
from tgate_trt.engines.tensorrt_flavours import FLAVOURS, Api, Flavour, compute_capability, gpu_is_present
from tgate_trt.engines.tensorrt_network import add_profile, check_network, one_line, parse
from tgate_trt.errors import BuildError, InputError, UnsupportedError
from tgate_trt.files import replacing
from tgate_trt.specs import GraphSpec, TensorSpec

if TYPE_CHECKING:
    import tensorrt

OPTIMIZATION_LEVELS = range(6)
"""From the fastest build to the fastest engine; TensorRT's own default is 3."""


@dataclass(frozen=True)
class PlanOptions:
    """How plans are built. TensorRT decides where a value is None."""

    capabilities: tuple[str, ...] = ()
    """Compute capabilities to build for, such as ``SM89``; that of this machine's GPU if empty."""
    optimization_level: int | None = None
    """Of `OPTIMIZATION_LEVELS`."""
    workspace: int | None = None
    """Limit in bytes of the scratch memory on the GPU that a kernel may use."""
    version_compatible: bool = False
    """Whether later versions of TensorRT can run the plan too."""
    hardware_compatible: bool = False
    """Whether other GPUs, of Ampere and later, can run the plan too."""
    refittable: bool = False
    """Whether the weights in the plan can be replaced."""
    stripped: bool = False
    """Whether the plan omits its weights, which are then added when it is loaded. Such a plan is refittable."""

    def check(self, flavour: Flavour, *, has_gpu: bool) -> None:
        """Check before a build starts that this product can build so on this machine.

        Raises:
            InputError: if a value is impossible.
            UnsupportedError: if the options need another product, or a GPU.
        """
        flavour.check_capabilities(self.capabilities)
        if self.optimization_level is not None and self.optimization_level not in OPTIMIZATION_LEVELS:
            raise InputError(f"--optimization-level is a number from 0 to {OPTIMIZATION_LEVELS[-1]}, got {self.optimization_level}")
        if self.workspace is not None and self.workspace <= 0:
            raise InputError(f"--workspace must be above 0, got {self.workspace}")
        if self.hardware_compatible and flavour.builds_ahead_of_time:
            raise UnsupportedError(
                f"--hardware-compatible is for tensorrt; {flavour.backend} builds one plan for several GPUs by several --compute-capability"
            )
        if has_gpu:
            return
        if not flavour.builds_ahead_of_time:
            raise UnsupportedError(
                f"{flavour.backend} builds on a machine with an NVIDIA GPU, and there is none here; tensorrt-rtx builds without one"
            )
        if self.refittable or self.stripped:
            raise UnsupportedError(
                f"{flavour.backend} builds refittable and stripped plans only where there is a GPU; "
                "--weights shared keeps the weights out of the plan and builds without one"
            )


@dataclass(frozen=True)
class PlanTask:
    """What a child process builds."""

    backend: str
    graph: Path
    """ONNX file."""
    plan: Path
    """File to write."""
    spec: GraphSpec
    """Of the graph, with weights that are inputs."""
    options: PlanOptions
    plugins: bool
    """Whether the graph names the plugin of `tgate_trt.kernels.tensorrt_plugin`."""
    log: Path
    timing_cache: Path | None


def build_plan(
    flavour: Flavour,
    graph: Path,
    plan: Path,
    spec: GraphSpec,
    options: PlanOptions,
    *,
    parameters: Mapping[str, TensorSpec] | None = None,
    plugins: bool = False,
    log: Path | None = None,
    timing_cache: Path | None = None,
    on_progress: children.OnProgress | None = None,
) -> dict[str, Any]:
    """Build one plan in a child process. The file is written whole or not at all.

    Args:
        flavour: TensorRT or TensorRT-RTX.
        graph: ONNX file, its weights where it refers to them.
        plan: file to write.
        spec: the graph's inputs and outputs. The bounds of its named dimensions become the optimisation profile.
        options: how to build.
        parameters: weights that are inputs of the graph, by name.
        plugins: whether the graph names the plugin of `tgate_trt.kernels.tensorrt_plugin`.
        log: file for the builder's whole log; beside the plan if None.
        timing_cache: file of kernel timings that builds with TensorRT share; is made if it does not exist.
        on_progress: receives the fraction done, from 0 to 1, and the name of the phase.

    Returns:
        ``seconds``, ``bytes`` of the plan, its ``layers``, and the child's peak memory in bytes as ``peak_rss``.

    Raises:
        InputError: if an option is impossible.
        BuildError: if the graph cannot be parsed or built, in one sentence with the node's name and a hint.
        UnsupportedError: if the flavour is not installed, or cannot build this here.
    """
    options.check(flavour, has_gpu=gpu_is_present())
    flavour.load()
    log = log or plan.with_suffix(".log")
    every_input = (*spec.inputs, *(parameters or {}).values())
    timings = timing_cache if flavour.has_timing_cache else None
    with replacing(plan) as partial:
        task = PlanTask(flavour.backend, graph, partial, replace(spec, inputs=every_input), options, plugins, log, timings)
        what = f"building the {spec.name} engine with {flavour.backend}"
        hint = f"if memory ran out, build with --weights shared, which takes a tenth of it; the whole log is in {log}"
        return children.run(build, task, what, hint, on_progress)


def build(task: PlanTask) -> dict[str, Any]:
    """Build a plan in this process; see `build_plan`. Needs neither torch nor onnx, except for a plugin, which needs torch.

    Raises:
        BuildError: if the graph cannot be parsed or built, in one sentence with the node's name and a hint.
        UnsupportedError: if the plugin cannot be built here.
    """
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with task.log.open("w", encoding="utf-8") as log:
        try:
            return _build(task, log) | {"peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        except UnsupportedError as error:
            raise UnsupportedError(_sentence(task, str(error))) from error
        except (BuildError, OSError, MemoryError) as error:
            raise BuildError(_sentence(task, str(error) or type(error).__name__)) from error


def _build(task: PlanTask, log: TextIO) -> dict[str, Any]:
    flavour = FLAVOURS[task.backend]
    trt = flavour.load()
    phases, errors = Phases(), list[str]()
    signal.signal(signal.SIGINT, lambda *_: setattr(phases, "cancelled", True))
    start = time.perf_counter()
    trt_logger = file_logger(trt, log, errors)
    builder = trt.Builder(trt_logger)
    if task.plugins:
        _register_plugin(trt, task.options)
    network, parser = parse(trt, builder, task.graph, trt_logger)
    check_network(network, task.spec)
    layers = network.num_layers
    config = configure(trt, flavour, builder, task.spec, task.options)
    config.progress_monitor = monitor = progress_monitor(trt, phases)
    with _timing_cache(config, task.timing_cache):
        done = _serialize(trt, builder, network, config, task.plan)
    del parser, monitor  # TensorRT used them until here
    if not done:
        reason = one_line(errors[0]) if errors else "the builder gave no reason"
        raise BuildError("it was cancelled" if phases.cancelled else reason)
    return {"seconds": round(time.perf_counter() - start, 1), "bytes": task.plan.stat().st_size, "layers": layers}


def configure(trt: Api, flavour: Flavour, builder: tensorrt.Builder, spec: GraphSpec, options: PlanOptions) -> tensorrt.IBuilderConfig:
    """The builder's configuration for a spec and options."""
    config = builder.create_builder_config()
    add_profile(builder, config, spec)
    flavour.set_target(trt, config, options.capabilities)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    flags = {
        trt.BuilderFlag.VERSION_COMPATIBLE: options.version_compatible,
        trt.BuilderFlag.REFIT: options.refittable and not options.stripped,
        trt.BuilderFlag.STRIP_PLAN: options.stripped,
    }
    for flag, wanted in flags.items():
        if wanted:
            config.set_flag(flag)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    return config


@contextlib.contextmanager
def _timing_cache(config: tensorrt.IBuilderConfig, path: Path | None) -> Iterator[None]:
    """Let a build read a file of kernel timings and add its own."""
    if path is None:
        yield
        return
    known = path.read_bytes() if path.is_file() else b""
    config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
    yield
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_bytes(memoryview(cast(Any, config.get_timing_cache().serialize())))


def _serialize(
    trt: Api, builder: tensorrt.Builder, network: tensorrt.INetworkDefinition, config: tensorrt.IBuilderConfig, plan: Path
) -> bool:
    """Build, and write the plan block by block; TensorRT before 10.12 returns it in one piece.

    Returns:
        Whether there is a plan.
    """
    with plan.open("wb") as file:
        if hasattr(builder, "build_serialized_network_to_stream"):
            done = bool(builder.build_serialized_network_to_stream(network, config, plan_writer(trt, file)))
        else:
            blob = builder.build_serialized_network(network, config)
            done = blob is not None
            if done:
                file.write(memoryview(cast(Any, blob)))
    return done and plan.stat().st_size > 0


def _register_plugin(trt: Api, options: PlanOptions) -> None:
    """Register the plugin with TensorRT, for the GPU here, or for the oldest GPU that must run the plan."""
    from tgate_trt.kernels import tensorrt_plugin

    plugin = importlib.import_module(f"{trt.__name__}.plugin")
    capability = "SM80" if options.hardware_compatible else str(compute_capability())
    tensorrt_plugin.register(plugin, int(capability.removeprefix("SM")))


_HINTS = (
    (r"(Half|Float|BFloat16) and (Half|Float|BFloat16)|of type (Half|Float)", "two dtypes meet there; please report it"),
    (r"No importer registered|Plugin not found", "TensorRT has no such operator; use --backend onnxruntime, and please report it"),
    (r"\(SM75\)", "leave SM75 out of --compute-capability, or build with --precision fp16"),
    (r"(?i)out of memory|bad_alloc|MemoryError", "free some memory, or build with --weights shared"),
    (r"No space left", "free some disk space, or choose another --output"),
    (r"(?i)cuda (initialization|runtime|driver)", "this takes an NVIDIA GPU and its driver"),
)
"""What to do about a message that matches a pattern."""


def _sentence(task: PlanTask, reason: str) -> str:
    hint = next((f"; {hint}" for pattern, hint in _HINTS if re.search(pattern, reason)), "")
    return f"{task.backend} cannot build the {task.spec.name} engine: {reason[:400]}{hint}; the whole log is in {task.log}"

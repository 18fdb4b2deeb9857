"""The process that builds one TensorRT plan, and gives all its memory back.

It reads a task from the standard input as JSON, parses the graph, compares the network with the spec, builds, and streams
the plan to disk. It prints a JSON line for each step of progress and one for its end, and writes the builder's whole log
to a file. It imports neither torch nor onnx, but for a graph with a plugin, which needs torch.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tgate_trt.engines.tensorrt_builder import PlanOptions, partial_of
from tgate_trt.engines.tensorrt_flavours import FLAVOURS, Api, Flavour, compute_capability
from tgate_trt.errors import BuildError, UnsupportedError
from tgate_trt.specs import GraphSpec

if TYPE_CHECKING:
    import tensorrt

_DTYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64", "int32": "INT32", "bool": "BOOL"}
"""TensorRT's names of the dtypes."""


@dataclass
class _Phases:
    """The phases under way, from the outermost inwards, and how far each is."""

    stack: list[list[Any]] = field(default_factory=list)
    cancelled: bool = False
    _told: tuple[int, str] = (-1, "")

    def start(self, name: str, steps: int) -> None:
        self.stack.append([name, max(steps, 1), 0])
        self.tell()

    def step(self, name: str, step: int) -> bool:
        for phase in self.stack:
            if phase[0] == name:
                phase[2] = step + 1
        self.tell()
        return not self.cancelled

    def finish(self, name: str) -> None:
        names = [phase[0] for phase in self.stack]
        if name in names:
            del self.stack[len(names) - 1 - names[::-1].index(name) :]

    def tell(self) -> None:
        """Print how far the build is, when it is another percent or another outer phase."""
        fraction, share = 0.0, 1.0
        for _, steps, done in self.stack:
            fraction += share * done / steps
            share /= steps
        percent, phase = int(100 * fraction), str(self.stack[min(len(self.stack), 3) - 1][0])
        if (percent, phase) != self._told:
            self._told = (percent, phase)
            print(json.dumps({"fraction": fraction, "phase": phase}), flush=True)


def _progress_monitor(trt: Api, phases: _Phases) -> tensorrt.IProgressMonitor:
    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined, misc]  # a class of the module that was passed in
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
            phases.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return phases.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return Monitor()


def _log_to(trt: Api, file: Any, errors: list[str]) -> tensorrt.ILogger:
    """A logger that writes everything but the least to a file, and keeps the errors."""
    severities = trt.ILogger.Severity

    class FileLogger(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity != severities.VERBOSE:
                file.write(f"{severity.name}: {msg}\n")
            if severity in (severities.ERROR, severities.INTERNAL_ERROR):
                file.flush()
                errors.append(msg)

    return FileLogger()


def _plan_writer(trt: Api, file: Any) -> tensorrt.IStreamWriter:
    class Writer(trt.IStreamWriter):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            written: int = file.write(data)
            return written

    return Writer()


def parse(trt: Api, builder: tensorrt.Builder, graph: Path, trt_logger: tensorrt.ILogger) -> tuple[tensorrt.INetworkDefinition, object]:
    """Parse an ONNX file into a strongly typed network.

    Returns:
        The network, and the parser, which owns the weights that the network refers to.

    Raises:
        BuildError: naming the node that cannot be parsed.
    """
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, trt_logger)
    if not parser.parse_from_file(str(graph)):
        raise BuildError("; ".join(_parser_error(parser.get_error(i)) for i in range(parser.num_errors)) or "the parser gave no reason")
    return network, parser


def _parser_error(error: tensorrt.ParserError) -> str:
    """What the parser says of a node."""
    operator, name = error.node_operator(), error.node_name() or f"number {error.node()}"
    return (f"node {name!r} ({operator}): " if operator else "") + _tidy(error.desc())


def check_network(network: tensorrt.INetworkDefinition, spec: GraphSpec) -> None:
    """Compare a network's inputs and outputs with the spec: names, dtypes and shapes, -1 where a dimension is named.

    Raises:
        BuildError: naming the first tensor that differs.
    """
    for what, tensors, count, get in (
        ("input", spec.inputs, network.num_inputs, network.get_input),
        ("output", spec.outputs, network.num_outputs, network.get_output),
    ):
        found = {tensor.name: tensor for tensor in map(get, range(count))}
        for name in found.keys() ^ {tensor.name for tensor in tensors}:
            raise BuildError(f"the {what} {name!r} is {'not expected' if name in found else 'missing'}")
        for tensor in tensors:
            expected = (_DTYPES[tensor.dtype], tuple(-1 if isinstance(size, str) else size for size in tensor.shape))
            actual = (found[tensor.name].dtype.name, tuple(cast(Any, found[tensor.name].shape)))
            if actual != expected:
                raise BuildError(
                    f"the {what} {tensor.name!r} is {actual[0]} {list(actual[1])} instead of {expected[0]} {list(expected[1])}"
                )


def add_profile(builder: tensorrt.Builder, config: tensorrt.IBuilderConfig, spec: GraphSpec) -> tensorrt.IOptimizationProfile:
    """Add one optimisation profile: the smallest, the likeliest and the largest shape of every input with a named dimension."""
    profile = builder.create_optimization_profile()
    for tensor in spec.inputs:
        if any(isinstance(size, str) for size in tensor.shape):
            shapes = (
                cast(Any, tensor.concrete(**{name: getattr(bounds, which) for name, bounds in spec.dimensions.items()}))
                for which in ("minimum", "optimum", "maximum")
            )
            profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
    return profile


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
    for flag in (flag for flag, wanted in flags.items() if wanted):
        config.set_flag(flag)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    return config


@contextlib.contextmanager
def _timing_cache(config: tensorrt.IBuilderConfig, path: Path | None) -> Iterator[None]:
    """Let a build use and add to a file of kernel times."""
    if path is None:
        yield
        return
    known = path.read_bytes() if path.is_file() else b""
    config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
    yield
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    partial.write_bytes(memoryview(cast(Any, config.get_timing_cache().serialize())))
    partial.replace(path)


def _serialize(
    trt: Api, builder: tensorrt.Builder, network: tensorrt.INetworkDefinition, config: tensorrt.IBuilderConfig, plan: Path
) -> bool:
    """Build, and write the plan in blocks as it comes; before TensorRT 10.12 it comes in one piece."""
    partial = partial_of(plan)
    try:
        with partial.open("wb") as file:
            if hasattr(builder, "build_serialized_network_to_stream"):
                done = bool(builder.build_serialized_network_to_stream(network, config, _plan_writer(trt, file)))
            else:
                blob = builder.build_serialized_network(network, config)
                done = blob is not None
                if done:
                    file.write(memoryview(cast(Any, blob)))
        if done and partial.stat().st_size:
            partial.replace(plan)
            return True
        return False
    finally:
        partial.unlink(missing_ok=True)


def _build(task: Mapping[str, Any], log: Any) -> dict[str, Any]:
    """Build what a task says, and describe it."""
    flavour = FLAVOURS[task["backend"]]
    trt = flavour.load()
    options, spec = PlanOptions.from_json(task["options"]), GraphSpec.from_json(task["spec"])
    phases, errors = _Phases(), list[str]()
    signal.signal(signal.SIGINT, lambda *_: setattr(phases, "cancelled", True))
    start = time.perf_counter()
    trt_logger = _log_to(trt, log, errors)
    builder = trt.Builder(trt_logger)
    if task["plugins"]:
        _register_plugin(flavour, options)
    network, parser = parse(trt, builder, Path(task["graph"]), trt_logger)
    check_network(network, spec)
    layers = network.num_layers
    config = configure(trt, flavour, builder, spec, options)
    config.progress_monitor = monitor = _progress_monitor(trt, phases)
    plan = Path(task["plan"])
    with _timing_cache(config, None if task["timing_cache"] is None else Path(task["timing_cache"])):
        done = _serialize(trt, builder, network, config, plan)
    del parser, monitor
    if not done:
        raise BuildError("it was cancelled" if phases.cancelled else _first_reason(errors))
    return {"seconds": round(time.perf_counter() - start, 1), "bytes": plan.stat().st_size, "layers": layers}


def _register_plugin(flavour: Flavour, options: PlanOptions) -> None:
    """Make the plugin known to TensorRT, for the GPU here, or for the oldest of all that shall run the plan."""
    from tgate_trt.kernels import tensorrt_plugin

    plugin = importlib.import_module(f"{flavour.load().__name__}.plugin")
    capability = "SM80" if options.hardware_compatible else str(compute_capability())
    tensorrt_plugin.register(plugin, int(capability.removeprefix("SM")))


_HINTS = (
    (
        r"(Half|Float|BFloat16) and (Half|Float|BFloat16)|of type (Half|Float)",
        "two dtypes meet there; please report it",
    ),
    (r"No importer registered|Plugin not found", "TensorRT has no such operator; use --backend onnxruntime, and please report it"),
    (r"\(SM75\)", "leave SM75 out of --compute-capability, or build with --precision fp16"),
    (r"(?i)out of memory|bad_alloc|MemoryError", "free some memory, or build with --weights shared"),
    (r"No space left", "free some disk space, or choose another --output"),
    (r"(?i)cuda (initialization|runtime|driver)", "this takes an NVIDIA GPU and its driver"),
)
"""What to do about a message, by a pattern that it holds."""

_SOURCES = re.compile(r"\[\w+\.(cpp|h)::.*|\s*In \w+ at /_src/[^)]*")
"""Places in TensorRT's own source files, and what it says after the first of them."""


def _first_reason(errors: Sequence[str]) -> str:
    return _tidy(errors[0]) if errors else "the builder gave no reason"


def _tidy(message: str) -> str:
    """A message of TensorRT in one line, without places in its source files."""
    return _SOURCES.sub("", " ".join(message.split())).strip(" .") or "no reason given"


def _sentence(task: Mapping[str, Any], reason: str) -> str:
    hint = next((f"; {hint}" for pattern, hint in _HINTS if re.search(pattern, reason)), "")
    return f"{task['backend']} cannot build the {task['name']} engine: {reason[:400]}{hint}; the whole log is in {task['log']}"


def main() -> None:
    """Read a task from the standard input, build, and print the end as a JSON line."""
    task = json.loads(sys.stdin.read())
    Path(task["log"]).parent.mkdir(parents=True, exist_ok=True)
    with Path(task["log"]).open("w", encoding="utf-8") as log:
        try:
            end = _build(task, log)
            end["peak_rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        except (BuildError, UnsupportedError, OSError, MemoryError) as error:
            end = {"error": _sentence(task, str(error) or type(error).__name__), "unsupported": isinstance(error, UnsupportedError)}
    print(json.dumps(end), flush=True)
    os._exit(0)  # taking a builder of gigabytes apart would take seconds


if __name__ == "__main__":
    main()

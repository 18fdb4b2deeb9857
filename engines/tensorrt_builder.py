"""TensorRT plans from ONNX graphs, for every flavour, in a child process that gives all its memory back.

    build_plan(RTX, Path("fidelity.onnx"), Path("fidelity.plan"), spec, PlanOptions(capabilities=("SM89",)))

runs `tgate_trt.engines.tensorrt_build_process`, and passes on its progress.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tgate_trt.engines.tensorrt_flavours import Flavour, gpu_is_present
from tgate_trt.errors import BuildError, InputError, UnsupportedError
from tgate_trt.specs import GraphSpec, TensorSpec

OPTIMIZATION_LEVELS = range(6)
"""From the fastest build to the fastest engine; TensorRT's own default is 3."""

_CHILD = "tgate_trt.engines.tensorrt_build_process"
_SECONDS_TO_STOP = 10
"""How long a child that was asked to stop may take to remove what it wrote."""


@dataclass(frozen=True)
class PlanOptions:
    """How plans are built; what is None is left to TensorRT."""

    capabilities: tuple[str, ...] = ()
    """GPUs to build for, such as ``SM89``; the one of this machine if empty."""
    optimization_level: int | None = None
    """Of `OPTIMIZATION_LEVELS`."""
    workspace: int | None = None
    """Most bytes of scratch memory on the GPU that a kernel may use."""
    version_compatible: bool = False
    """Whether later versions of TensorRT shall run the plan too."""
    hardware_compatible: bool = False
    """Whether other GPUs of Ampere and later shall run the plan too."""
    refittable: bool = False
    """Whether the weights in the plan can be exchanged."""
    stripped: bool = False
    """Whether the plan leaves its weights out; they are put in when it is loaded. Such a plan is refittable."""

    def check(self, flavour: Flavour, *, has_gpu: bool) -> None:
        """Refuse before anything is started what this product or this machine cannot build.

        Raises:
            InputError: if a value is impossible.
            UnsupportedError: if it takes another product, or a GPU.
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
                f"{flavour.backend} builds on a machine with an NVIDIA GPU, and there is none here; tensorrt-rtx builds without"
            )
        if self.refittable or self.stripped:
            raise UnsupportedError(
                f"{flavour.backend} builds refittable and stripped plans only where there is a GPU; "
                "--weights shared keeps the weights out of the plan and builds without one"
            )

    def to_json(self) -> dict[str, Any]:
        """The options as plain JSON data."""
        return dataclasses.asdict(self) | {"capabilities": list(self.capabilities)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PlanOptions:
        """Read what `to_json` wrote."""
        return cls(**{**data, "capabilities": tuple(data["capabilities"])})


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
    on_progress: Callable[[float, str], None] | None = None,
) -> dict[str, Any]:
    """Build one plan in a child process; the plan's file is there whole at the end, or not at all.

    Args:
        flavour: TensorRT or TensorRT-RTX.
        graph: ONNX file, its weights where it says.
        plan: file to write.
        spec: what the graph takes and gives, with the bounds of every named dimension: the optimisation profile.
        options: how to build.
        parameters: weights that are inputs of the graph, by name.
        plugins: whether the graph names the plugin of `tgate_trt.kernels.tensorrt_plugin`.
        log: file for the builder's whole log; beside the plan if None.
        timing_cache: file of kernel times that builds share, for TensorRT; is made if it does not exist.
        on_progress: is told the fraction done, from 0 to 1, and the name of the phase.

    Returns:
        ``seconds``, ``bytes`` of the plan, its ``layers`` and the peak memory of the child in ``peak_rss`` bytes.

    Raises:
        BuildError: if the graph cannot be parsed or built, in one sentence with the node's name and a hint.
        UnsupportedError: if the flavour is not installed, or cannot build so here.
    """
    options.check(flavour, has_gpu=gpu_is_present())
    flavour.load()
    inputs = [*spec.inputs, *(parameters or {}).values()]
    task = {
        "backend": flavour.backend,
        "graph": str(graph),
        "plan": str(plan),
        "name": spec.name,
        "spec": dataclasses.replace(spec, inputs=tuple(inputs)).to_json(),
        "options": options.to_json(),
        "plugins": plugins,
        "log": str(log or plan.with_suffix(".log")),
        "timing_cache": None if timing_cache is None or not flavour.has_timing_cache else str(timing_cache),
    }
    end = _run_child(task, on_progress or (lambda fraction, phase: None))
    if "error" in end:
        raise (UnsupportedError if end.get("unsupported") else BuildError)(end["error"])
    return end


def _run_child(task: Mapping[str, Any], on_progress: Callable[[float, str], None]) -> dict[str, Any]:
    """Run the child, pass on its progress, and give its last line."""
    command = [sys.executable, "-P", "-m", _CHILD]
    end: dict[str, Any] = {}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write(json.dumps(task))
            child.stdin.close()
            for line in child.stdout:
                message = json.loads(line)
                if "phase" in message:
                    on_progress(message["fraction"], message["phase"])
                else:
                    end = message
        except BaseException:
            _stop(child)
            raise
    if not end:
        partial_of(Path(task["plan"])).unlink(missing_ok=True)
        end = {"error": _death(task, child.returncode)}
    return end


def _stop(child: subprocess.Popen[str]) -> None:
    """Ask the child to cancel, and end it if it does not."""
    child.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(_SECONDS_TO_STOP)
    if child.poll() is None:
        child.kill()


def _death(task: Mapping[str, Any], status: int) -> str:
    if status == -signal.SIGKILL:
        reason = "the system ended the builder, mostly for want of memory; build with --weights shared, which takes a tenth"
    else:
        reason = f"the builder ended with exit code {status}"
    return f"{task['backend']} did not build the {task['name']} engine: {reason}; the whole log is in {task['log']}"


def partial_of(path: Path) -> Path:
    """Where a file is while it is being written."""
    return path.with_name(f".{path.name}.partial")

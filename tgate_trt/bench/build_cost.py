"""The cost of a build: time of each stage, peak memory, and bytes on disk."""

from __future__ import annotations

import logging
import math
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tgate_trt.bench.memory import watching
from tgate_trt.bundle.backends import ONNXRUNTIME
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.bundle.manifest import MANIFEST
from tgate_trt.errors import BuildError, InputError
from tgate_trt.files import places_of
from tgate_trt.models.resolve import resolve
from tgate_trt.specs import DTYPES, PRECISIONS

logger = logging.getLogger(__name__)

_INTERVAL = 0.05
"""Seconds between two looks at a build's memory, which take a share of the machine that builds."""

_ERROR = "error: "
"""Begins the sentence of a command that fails on its user's input."""
_DONE = re.compile(r"(?P<stage>.+) done in (?P<seconds>[\d.]+) s")


@dataclass(frozen=True)
class Engines:
    """The engines that a measured build makes."""

    backend: str = ONNXRUNTIME
    weights: str = "baked"
    compute_capability: str | None = None

    @property
    def name(self) -> str:
        """Distinguishes the results of such a build from others."""
        return self.backend if self.backend == ONNXRUNTIME else f"{self.backend}-{self.weights}"

    def arguments(self) -> list[str]:
        """The options of ``tgate-build`` for them."""
        options = ["--backend", self.backend]
        if self.backend != ONNXRUNTIME:
            options += ["--weights", self.weights]
        if self.compute_capability:
            options += ["--compute-capability", self.compute_capability]
        return options


def measure(
    model: str,
    precision: str,
    folder: Path,
    engines: Engines,
    *,
    size: int | None = None,
    graphs: Sequence[str] = ("planning", "fidelity"),
    keep: bool = False,
) -> dict[str, Any]:
    """Build an architecture with random weights in a process of its own, and measure its time and memory.

    Args:
        model: a name of `tgate_trt.models.architectures.ARCHITECTURES`, or a diffusers folder.
        precision: of `tgate_trt.specs.PRECISIONS`.
        folder: of the bundle; must not exist.
        engines: engines to build.
        size: side of the pictures in pixels; the model's own if None.
        graphs: graphs to cut.
        keep: whether the bundle stays; it is deleted if not.

    Returns:
        JSON data: ``seconds`` by the clock, ``cpu_seconds`` of processor time, ``stages`` in seconds by name, ``memory`` (see
        `tgate_trt.bench.memory.Memory`) and ``disk`` in bytes.

    Raises:
        InputError: if there is no such model or precision, or the folder exists.
        BuildError: if the build fails.
    """
    if precision not in PRECISIONS:
        raise InputError(f"--precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if folder.exists():
        raise InputError(f"{folder} is there already, and a measured build must be a new one; move it away and measure again")
    source = resolve(model, random_weights=True)
    arguments = ["--model", model, "--random-weights", "--precision", precision, *engines.arguments(), "--no-verify"]
    arguments += ["--graphs", ",".join(graphs)]
    if size is not None:
        arguments += ["--height", str(size), "--width", str(size)]
    parameters = sum(map(math.prod, source.tensor_shapes().values()))
    results = _build(arguments, folder)
    results["disk"] = disk_of(folder, parameters * int(getattr(torch, DTYPES[precision]).itemsize))
    if not keep:
        shutil.rmtree(folder)
    return results


def _build(arguments: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run ``tgate-build``, and read its stages from its log while its memory is measured."""
    lines: list[str] = []
    peaks: dict[str, int] = {}
    # With --force, for a trace of the user's cache would hide what one costs.
    command = (sys.executable, "-P", "-c", "from tgate_trt.cli.build import main; main()", *arguments, "--output", str(folder), "--force")
    start, worked = time.perf_counter(), _cpu_of_children()
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
        watching(process.pid, _INTERVAL) as memory,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line.strip())
                if not lines[-1].startswith(_ERROR):  # which is raised below
                    logger.info("%s", lines[-1])
                if stage := _DONE.fullmatch(lines[-1]):
                    peaks[stage["stage"]] = memory.end_stage()
        except BaseException:
            process.terminate()
            raise
    seconds = time.perf_counter() - start
    if process.returncode != 0:
        last = lines[-1] if lines else "no message"
        ended = f"tgate-build {' '.join(arguments)} ended with exit code {process.returncode}: {last}; run it alone to see more"
        raise BuildError(last.removeprefix(_ERROR) if last.startswith(_ERROR) else ended)
    return {
        "arguments": ["tgate-build", *arguments],
        "seconds": seconds,
        "cpu_seconds": _cpu_of_children() - worked,
        "stages": stages_of(lines),
        "memory": memory.to_json() | {"peak_anonymous_of_stages": peaks},
    }


def _cpu_of_children() -> float:
    """Seconds that processors have worked for child processes that have ended, and for theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def stages_of(lines: list[str]) -> dict[str, float]:
    """Seconds of each stage, from the log of a build."""
    matches = filter(None, (_DONE.fullmatch(line.strip()) for line in lines))
    return {match["stage"]: float(match["seconds"]) for match in matches}


def disk_of(folder: Path, denoiser: int) -> dict[str, int]:
    """Bytes of a bundle on disk, and of the weights that it holds at least.

    Args:
        folder: of the bundle.
        denoiser: bytes of the denoiser's weights.
    """
    bundle = Bundle.open(folder)
    rest = sum(place.length for path in bundle.pipeline.rglob("*.safetensors") for place in places_of(path).values())
    sizes = {name: file.size for name, file in bundle.manifest.files.items()}
    held = sum(sizes.values()) + (folder / MANIFEST).stat().st_size
    plans = {name: size for name, size in sizes.items() if name.endswith(".plan")}
    return {"bundle": held, "plans": sum(plans.values()), "denoiser_weights": denoiser, "pipeline_weights": denoiser + rest}

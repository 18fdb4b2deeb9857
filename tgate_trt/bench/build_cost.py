"""What a build takes: time stage by stage, peak memory, and bytes on disk."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from tgate_trt.bundle.backends import ONNXRUNTIME
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.bundle.manifest import MANIFEST
from tgate_trt.errors import BuildError, InputError
from tgate_trt.models.resolve import resolve
from tgate_trt.specs import DTYPES, PRECISIONS

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 0.05

_DONE = re.compile(r"(?P<stage>.+) done in (?P<seconds>[\d.]+) s")


@dataclass
class Memory:
    """The most memory, in bytes, that a process and its descendants were seen to hold together."""

    anonymous: int = 0
    """Without pages of files, which the system can drop."""
    total: int = 0
    """Resident, a page that two processes share counted twice."""
    looks: int = 0
    of_stage: int = 0
    """Anonymous, since the last stage ended."""

    def look(self, root: int) -> None:
        """Take in what they hold now."""
        held = [status for status in _tree(root) if "RssAnon" in status]
        anonymous = sum(status["RssAnon"] for status in held)
        self.anonymous, self.of_stage = max(self.anonymous, anonymous), max(self.of_stage, anonymous)
        self.total = max(self.total, sum(status["VmRSS"] for status in held))
        self.looks += 1


@dataclass
class _Child:
    """A process whose lines are read while its memory is looked at."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)
    peaks: dict[str, int] = field(default_factory=dict)
    """Anonymous memory of each stage."""

    def watch(self) -> int:
        """Look on until the process ends, and return its exit status."""
        assert self.process.stdout is not None
        reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        reader.start()
        try:
            while self.process.poll() is None:
                self.memory.look(self.process.pid)
                time.sleep(SECONDS_BETWEEN_LOOKS)
        finally:
            if self.process.poll() is None:
                self.process.terminate()
                self.process.wait()
        reader.join()
        return self.process.returncode

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self.lines.append(line.rstrip())
            if stage := _DONE.fullmatch(line.strip()):
                self.peaks[stage["stage"]], self.memory.of_stage = self.memory.of_stage, 0
            logger.info("%s", self.lines[-1])


@dataclass(frozen=True)
class Engines:
    """Which engines a measured build makes."""

    backend: str = ONNXRUNTIME
    weights: str = "baked"
    compute_capability: str | None = None

    @property
    def name(self) -> str:
        """How results of such a build are told from others."""
        return self.backend if self.backend == ONNXRUNTIME else f"{self.backend}-{self.weights}"

    def arguments(self) -> list[str]:
        """Options of ``tgate-build``."""
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
    """Build an architecture with random weights in a process of its own, and watch it.

    Args:
        model: a name of `tgate_trt.models.architectures.ARCHITECTURES`, or a diffusers folder.
        precision: of `tgate_trt.specs.PRECISIONS`.
        folder: of the bundle; must not exist.
        engines: to build.
        size: side of the pictures in pixels; the model's own if None.
        graphs: to cut.
        keep: whether the bundle stays.

    Returns:
        JSON data: ``seconds``, ``stages`` in seconds by name, ``memory`` and ``disk`` in bytes.

    Raises:
        InputError: if there is no such model or precision, or the folder is there already.
        BuildError: if the build fails.
    """
    if precision not in PRECISIONS:
        raise InputError(f"--precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if folder.exists():
        raise InputError(f"{folder} is there already; a measured build must be a new one, so move it away or choose another --bundle")
    source = resolve(model, random_weights=True)
    arguments = ["--model", model, "--random-weights", "--precision", precision, *engines.arguments(), "--no-verify"]
    arguments += ["--graphs", ",".join(graphs), "--output", str(folder)]
    if size is not None:
        arguments += ["--height", str(size), "--width", str(size)]
    command = (sys.executable, "-P", "-c", "from tgate_trt.cli.build import main; main()", *arguments)
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        child = _Child(process)
        status = child.watch()
    seconds = time.perf_counter() - start
    if status != 0:
        raise BuildError(f"tgate-build {' '.join(arguments)} ended with exit code {status}: {(child.lines or ['no message'])[-1]}")
    element = int(getattr(torch, DTYPES[precision]).itemsize)
    results = {
        "arguments": ["tgate-build", *arguments],
        "seconds": seconds,
        "stages": stages_of(child.lines),
        "memory": {
            "peak_anonymous": child.memory.anonymous,
            "peak_anonymous_of_stages": child.peaks,
            "peak_total": child.memory.total,
            "looks": child.memory.looks,
        },
        "disk": disk_of(folder, element * sum(map(math.prod, source.tensor_shapes().values()))),
    }
    if not keep:
        shutil.rmtree(folder)
    return results


def stages_of(lines: list[str]) -> dict[str, float]:
    """Seconds of each stage that a build's log tells."""
    matches = filter(None, (_DONE.fullmatch(line.strip()) for line in lines))
    return {match["stage"]: float(match["seconds"]) for match in matches}


def disk_of(folder: Path, denoiser: int) -> dict[str, int]:
    """Bytes of a bundle on disk, beside those of the weights that it must hold at least.

    Args:
        folder: of the bundle.
        denoiser: bytes of the denoiser's weights.
    """
    bundle = Bundle.open(folder)
    rest = sum(_tensor_bytes(path) for path in bundle.pipeline.rglob("*.safetensors"))
    sizes = {name: file.size for name, file in bundle.manifest.files.items()}
    held = sum(sizes.values()) + (folder / MANIFEST).stat().st_size
    plans = {name: size for name, size in sizes.items() if name.endswith(".plan")}
    return {"bundle": held, "plans": sum(plans.values()), "denoiser_weights": denoiser, "pipeline_weights": denoiser + rest}


def _tensor_bytes(path: Path) -> int:
    """Bytes of a ``.safetensors`` file's tensors, without its header."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: Mapping[str, Any] = json.loads(file.read(length))
    return sum(entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__")


def _tree(root: int) -> list[dict[str, int]]:
    """The status of a process and of its descendants; numbers only, memory in bytes."""
    statuses = {int(path.name): status for path in Path("/proc").glob("[0-9]*") if (status := _status(path))}
    tree = {root}
    while found := {pid for pid, status in statuses.items() if status["PPid"] in tree} - tree:
        tree |= found
    return [statuses[pid] for pid in tree if pid in statuses]


def _status(process: Path) -> dict[str, int]:
    """Memory and parent of a process; empty if it has ended."""
    status = {}
    with suppress(OSError):
        for line in (process / "status").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name in ("PPid", "VmRSS", "RssAnon"):
                status[name] = int(value.split()[0]) * (1 if name == "PPid" else 1024)
    return status

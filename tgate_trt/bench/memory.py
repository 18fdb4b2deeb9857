"""Peak memory of a process tree, on the host and on a GPU; and that of one setting, measured in a process of its own."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from tgate_trt import children
from tgate_trt.bench.settings import Setting
from tgate_trt.running.drawing import Drawing

INTERVAL = 0.01
"""Seconds between two looks at a process that loads an engine and runs it."""


@dataclass(frozen=True)
class Task:
    """What the process draws."""

    bundle: str
    setting: dict[str, Any]
    drawing: Drawing
    threads: int | None
    device: str
    components: bool


def peak_memory(studio: Any, setting: Setting, drawing: Drawing) -> dict[str, int]:
    """Measure the peak memory of a process that loads what a setting needs and draws one picture in two steps.

    Args:
        studio: `tgate_trt.bench.contenders.Studio` of the bundle.
        setting: what draws.
        drawing: the picture.

    Returns:
        Bytes: ``host``, anonymous memory of the process and those it starts; ``gpu``, by which the use of the whole GPU grew after
        the process had begun to use it, 0 without one.

    Raises:
        BuildError: if the process did not come to its end.
    """
    import dataclasses

    task = Task(
        str(studio.bundle.folder),
        dataclasses.asdict(setting),
        drawing,
        studio.threads,
        str(studio.device),
        studio.components,
    )
    return children.run(measure, task, "measuring memory", "if memory ran out, measure with --no-memory")


def available() -> int:
    """Bytes of memory that processes of this machine can still take without swapping."""
    return int(psutil.virtual_memory().available)


@dataclass
class Memory:
    """The most memory, in bytes, that a process and its descendants were seen to hold together."""

    anonymous: int = 0
    """Without pages of files, which the system can drop: resident less shared pages, Linux's ``RssAnon``. A system that does not
    count shared pages gives all resident memory."""
    total: int = 0
    """Resident; a page that two processes share counts twice."""
    gpu: int = 0
    """Of the whole GPU, whichever process holds it; 0 without one."""
    looks: int = 0
    """How often it was measured."""
    _of_stage: int = 0
    """``anonymous`` since the last stage ended."""

    def look(self, root: int) -> None:
        """Measure what the process with this id and its descendants hold now."""
        held = list(_memory_of_tree(root))
        anonymous = sum(info.rss - getattr(info, "shared", 0) for info in held)
        self.anonymous, self._of_stage = max(self.anonymous, anonymous), max(self._of_stage, anonymous)
        self.total = max(self.total, sum(info.rss for info in held))
        self.gpu = max(self.gpu, _gpu_bytes())
        self.looks += 1

    def end_stage(self) -> int:
        """Give the highest ``anonymous`` since the last call, and begin the next stage."""
        peak, self._of_stage = self._of_stage, 0
        return peak

    def to_json(self) -> dict[str, int]:
        """The peaks, as records hold them."""
        return {"peak_anonymous": self.anonymous, "peak_total": self.total, "peak_gpu": self.gpu, "looks": self.looks}


@contextlib.contextmanager
def watching(root: int, interval: float) -> Iterator[Memory]:
    """Measure the memory of a process and its descendants from a thread, until the block ends.

    Args:
        root: id of the process.
        interval: seconds between two looks.
    """
    memory, ended = Memory(), threading.Event()

    def look() -> None:
        memory.look(root)
        while not ended.wait(interval):
            memory.look(root)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield memory
    finally:
        ended.set()
        watcher.join()


def _memory_of_tree(root: int) -> Iterator[Any]:
    """`psutil.Process.memory_info` of a process and of each descendant; nothing of those that end meanwhile."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(root)
        for each in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                yield each.memory_info()


_has_gpu = functools.cache(torch.cuda.is_available)


def _gpu_bytes() -> int:
    """Bytes of GPU memory in use, TensorRT's too, which PyTorch's own count leaves out."""
    if not _has_gpu():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def measure(task: Task) -> dict[str, int]:
    """Load and draw in this process, and give its peak memory; see `peak_memory`."""
    from tgate_trt.bench.contenders import Studio
    from tgate_trt.bundle.bundle import Bundle

    others = _gpu_bytes()  # of other processes, and of this one's CUDA context
    with watching(os.getpid(), INTERVAL) as memory:
        bundle, device = Bundle.open(task.bundle), torch.device(task.device)
        with Studio(bundle, device, task.drawing.scheduler, task.threads, components=task.components) as studio:
            studio.contender(Setting(**task.setting)).warm_up(task.drawing)
    return {"host": memory.anonymous, "gpu": max(0, memory.gpu - others)}

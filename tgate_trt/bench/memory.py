"""The most memory that one setting takes, measured in a process of its own: this module, run with one JSON argument."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tgate_trt import children
from tgate_trt.bench.settings import Setting
from tgate_trt.running.drawing import Drawing

_SECONDS_BETWEEN_LOOKS = 0.005


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
    """Bytes at the most while a setting loads and draws one picture in two steps.

    Args:
        studio: `tgate_trt.bench.contenders.Studio` of the bundle.
        setting: what draws.
        drawing: the picture.

    Returns:
        ``host``, anonymous memory without pages of files; ``gpu``, of the whole device, 0 without one.

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
    """Bytes that this machine can still give, those that hold files included; all of its memory where it does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class _Look(threading.Thread):
    """Looks at this process's memory until it is told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.host = self.gpu = 0
        self._done = threading.Event()

    def run(self) -> None:
        import torch

        on_gpu = torch.cuda.is_available()
        while True:
            self.host = max(self.host, anonymous())
            if on_gpu:
                free, total = torch.cuda.mem_get_info()  # TensorRT's own allocations are not PyTorch's
                self.gpu = max(self.gpu, total - free)
            if self._done.wait(_SECONDS_BETWEEN_LOOKS):
                return

    def stop(self) -> dict[str, int]:
        self._done.set()
        self.join()
        return {"host": self.host, "gpu": self.gpu}


def anonymous() -> int:
    """Bytes of this process's memory without pages of files, which the system can drop."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def measure(task: Task) -> dict[str, int]:
    """Load and draw in this process, and tell the most memory that was held."""
    import torch

    from tgate_trt.bench.contenders import Studio
    from tgate_trt.bundle.bundle import Bundle

    look = _Look()
    look.start()
    bundle, device = Bundle.open(task.bundle), torch.device(task.device)
    with Studio(bundle, device, task.drawing.scheduler, task.threads, components=task.components) as studio:
        studio.contender(Setting(**task.setting)).warm_up(task.drawing)
    return look.stop()

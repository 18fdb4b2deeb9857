"""Objects that TensorRT calls while it builds and loads plans: progress, logs, and plans written in blocks.

Their base classes come from the module that is passed in, TensorRT's or TensorRT-RTX's, so each is made within a function.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

from tgate_trt import children
from tgate_trt.engines.tensorrt_flavours import Api

if TYPE_CHECKING:
    import tensorrt


@dataclass
class Phases:
    """The active phases of a build, the outermost first. Each is its name, its number of steps, and the steps done."""

    stack: list[list[Any]] = field(default_factory=list)
    cancelled: bool = False
    """Whether TensorRT must stop at its next step."""
    _reported: tuple[int, str] = (-1, "")

    def start(self, name: str, steps: int) -> None:
        self.stack.append([name, max(steps, 1), 0])
        self._report()

    def step(self, name: str, step: int) -> bool:
        for phase in self.stack:
            if phase[0] == name:
                phase[2] = step + 1
        self._report()
        return not self.cancelled

    def finish(self, name: str) -> None:
        names = [phase[0] for phase in self.stack]
        if name in names:
            del self.stack[len(names) - 1 - names[::-1].index(name) :]

    def _report(self) -> None:
        """Report progress whenever the percentage or one of the outer phases changes."""
        fraction, share = 0.0, 1.0
        for _, steps, done in self.stack:
            fraction += share * done / steps
            share /= steps
        percent, phase = int(100 * fraction), str(self.stack[min(len(self.stack), 3) - 1][0])
        if (percent, phase) != self._reported:
            self._reported = (percent, phase)
            children.report(fraction, phase)


def progress_monitor(trt: Api, phases: Phases) -> tensorrt.IProgressMonitor:
    """Record the builder's progress in ``phases``."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined, misc]  # a class of the module that was passed in
        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
            phases.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return phases.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return Monitor()


def file_logger(trt: Api, file: TextIO, errors: list[str]) -> tensorrt.ILogger:
    """Write all but verbose messages to a file, and append errors to a list."""
    severities = trt.ILogger.Severity

    class FileLogger(trt.ILogger):  # type: ignore[name-defined, misc]
        def log(self, severity: Any, msg: str) -> None:
            if severity != severities.VERBOSE:
                file.write(f"{severity.name}: {msg}\n")
            if severity in (severities.ERROR, severities.INTERNAL_ERROR):
                file.flush()
                errors.append(msg)

    return FileLogger()


@functools.cache
def python_logger(trt: Api) -> Any:
    """Pass TensorRT's messages to `logging`; the attribute ``last`` is the last error.

    One for each module, because TensorRT keeps a single logger for all objects of a process.
    """
    levels = {
        trt.ILogger.Severity.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.Severity.ERROR: logging.ERROR,
        trt.ILogger.Severity.WARNING: logging.WARNING,
        trt.ILogger.Severity.INFO: logging.DEBUG,
        trt.ILogger.Severity.VERBOSE: logging.NOTSET,
    }

    class PythonLogger(trt.ILogger):  # type: ignore[name-defined, misc]
        last = "no reason given"

        def log(self, severity: Any, msg: str) -> None:
            level = levels[severity]
            if level == logging.ERROR:
                self.last = " ".join(msg.split())
            if level:
                logging.getLogger("tensorrt").log(min(level, logging.WARNING), "%s", msg)

    return PythonLogger()


def plan_writer(trt: Api, file: BinaryIO) -> tensorrt.IStreamWriter:
    """Write a plan to a file block by block."""

    class Writer(trt.IStreamWriter):  # type: ignore[name-defined, misc]
        def write(self, data: bytes) -> int:
            return file.write(data)

    return Writer()

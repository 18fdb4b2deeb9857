"""Run a function in a process of its own, which returns all its memory to the system when it ends.

The child imports the function, reads its argument as JSON from standard input, and writes JSON lines: progress, then the answer
or an error. The function's annotations define the form of argument and answer. What the work and its libraries print goes to
standard error.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter

from tgate_trt import errors
from tgate_trt.errors import BuildError, TGateError

_T = TypeVar("_T")
_R = TypeVar("_R")

OnProgress = Callable[[float, str], None]
"""Receives the fraction done, from 0 to 1, and the name of the phase."""

_PR_SET_PDEATHSIG = 1

_SECONDS_TO_STOP = 10
"""Time that an interrupted child has to clean up before it is killed."""


def run(work: Callable[[_T], _R], task: _T, what: str, hint: str, on_progress: OnProgress | None = None) -> _R:
    """Call a function in a child process and return its answer. An exception here, such as Ctrl-C, stops the child first.

    Args:
        work: function of one argument at the top level of a module. Argument and answer are plain data or dataclasses of plain data.
        task: its argument.
        what: the work as the subject of a sentence, for the error if the child dies.
        hint: what to do if the child dies.
        on_progress: receives each `report` of the child.

    Raises:
        TGateError: that the work raised, of the same class.
        BuildError: if the child died: the work raised another exception, or the system killed it.
    """
    _trim()
    command = [sys.executable, "-P", "-m", __name__, str(os.getpid()), work.__module__, work.__qualname__]
    end: dict[str, Any] = {}
    with (
        tempfile.TemporaryFile("w+") as stderr,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True) as child,
    ):
        assert child.stdin is not None and child.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError), child.stdin:  # a child that dies early leaves its reason on stderr
                child.stdin.write(_adapter(work, 0).dump_json(task).decode())
            for line in child.stdout:
                end = json.loads(line)
                if "progress" in end and on_progress:
                    on_progress(*end["progress"])
        except BaseException:
            _stop(child)
            raise
        child.wait()
        stderr.seek(0)
        last = stderr.read().strip().splitlines()[-1:] or ["no message"]
    if "answer" in end:
        return _adapter(work, 1).validate_python(end["answer"])  # type: ignore[no-any-return]
    if "error" in end:
        raise getattr(errors, end["kind"])(end["error"])
    if child.returncode == -signal.SIGKILL:
        raise BuildError(f"{what} was killed by the system, most likely because memory ran out; {hint}")
    raise BuildError(f"{what} stopped with exit code {child.returncode} ({last[0]}); {hint}")


def report(fraction: float, phase: str) -> None:
    """Send the fraction done, from 0 to 1, and the name of the phase to the parent; does nothing outside a child."""
    if _parent is not None:
        _send({"progress": (fraction, phase)})


_parent: Any = None
"""The pipe to the parent process, in a child."""


def _send(message: dict[str, Any]) -> None:
    print(json.dumps(message), file=_parent, flush=True)


def _adapter(work: Callable[[Any], Any], which: int) -> TypeAdapter[Any]:
    """The form of a function's argument (0) or answer (1)."""
    hints = get_type_hints(work)
    answer = hints.pop("return")
    (argument,) = hints.values()
    return TypeAdapter((argument, answer)[which])


def _stop(child: subprocess.Popen[str]) -> None:
    """Interrupt the child, and kill it if it does not end in time."""
    child.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(_SECONDS_TO_STOP)
    if child.poll() is None:
        child.kill()


def _trim() -> None:
    """Return memory that the allocator keeps to the system, before another process needs as much."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)


def _die_with_the_parent(parent: int) -> None:
    """Let the system kill this process when its parent dies, however that comes about (Linux alone has it); end now if it is dead."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call above, which then has no effect
            os._exit(1)


def _answer(parent: str, module: str, name: str) -> None:
    """Do the work that this process was started for."""
    global _parent  # noqa: PLW0603 - a process has one parent
    _die_with_the_parent(int(parent))
    children = importlib.import_module("tgate_trt.children")  # this file runs as `__main__`
    children._parent = _parent = os.fdopen(os.dup(1), "w")  # type: ignore[attr-defined]
    os.dup2(2, 1)
    work = getattr(importlib.import_module(module), name)
    task = _adapter(work, 0).validate_json(sys.stdin.read())
    try:
        _send({"answer": _adapter(work, 1).dump_python(work(task), mode="json")})
    except TGateError as error:
        _send({"error": str(error), "kind": type(error).__name__})
    os._exit(0)  # an orderly exit would spend seconds on freeing gigabytes


if __name__ == "__main__":
    _answer(*sys.argv[1:])

"""Work in a process of its own, which gives all its memory back.

The process imports one function, reads its argument as JSON from standard input, and writes JSON lines: progress, then the
answer. The function's annotations are the form of both.
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
"""Is called with the fraction done, from 0 to 1, and the name of the phase."""

_SECONDS_TO_STOP = 10
"""A child that is interrupted has this long to end by itself."""


def run(work: Callable[[_T], _R], task: _T, what: str, hint: str, on_progress: OnProgress | None = None) -> _R:
    """Call a function of this package in a child process, and give its answer.

    Args:
        work: a module's function of one argument; both its argument and its answer are plain data or dataclasses of it.
        task: its argument.
        what: is done, for a sentence on a process that did not come to its end.
        hint: what to do then.
        on_progress: is called for each `report` of the child.

    Raises:
        TGateError: that the work raised.
        BuildError: if the process did not come to its end.
    """
    _trim()
    command = [sys.executable, "-P", "-m", __name__, work.__module__, work.__qualname__]
    end: dict[str, Any] = {}
    with (
        tempfile.TemporaryFile("w+") as stderr,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True) as child,
    ):
        assert child.stdin is not None and child.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it died early; its last words are read below
                child.stdin.write(_adapter(work, 0).dump_json(task).decode())
                child.stdin.close()
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
    raise BuildError(f"{what} stopped with exit code {child.returncode} ({last[0]}); {hint}")


def report(fraction: float, phase: str) -> None:
    """Send how far the work is, from 0 to 1, to the parent; does nothing outside a child."""
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
    """Ask the child to cancel, and end it if it does not."""
    child.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(_SECONDS_TO_STOP)
    if child.poll() is None:
        child.kill()


def _trim() -> None:
    """Give the system back what the allocator keeps of weights that went by, before another process asks for as much."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)


def _answer(module: str, name: str) -> None:
    """Do the work that this process was started for; what libraries print goes to standard error."""
    global _parent  # noqa: PLW0603 - a process has one parent
    children = importlib.import_module("tgate_trt.children")  # this file runs as `__main__`
    children._parent = _parent = os.fdopen(os.dup(1), "w")  # type: ignore[attr-defined]
    os.dup2(2, 1)
    work = getattr(importlib.import_module(module), name)
    task = _adapter(work, 0).validate_json(sys.stdin.read())
    try:
        _send({"answer": _adapter(work, 1).dump_python(work(task), mode="json")})
    except TGateError as error:
        _send({"error": str(error), "kind": type(error).__name__})
    os._exit(0)  # taking gigabytes apart would take seconds


if __name__ == "__main__":
    _answer(*sys.argv[1:])

"""Work in a process of its own, which gives all its memory back: one JSON argument, one JSON line as the answer."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from tgate_trt import errors
from tgate_trt.errors import BuildError, TGateError


def run(module: str, task: Any, what: str, hint: str) -> dict[str, Any]:
    """Run a module of this package as a process, and give its answer.

    Args:
        module: that calls `answer` when it is run.
        task: dataclass of plain data, its argument.
        what: is done, for a sentence on a process that did not come to its end.
        hint: what to do then.

    Raises:
        TGateError: that the work raised.
        BuildError: if the process did not come to its end.
    """
    _trim()
    command = [sys.executable, "-P", "-m", module, json.dumps(dataclasses.asdict(task))]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = child.stderr.strip().splitlines()[-1:] or ["no message"]
        raise BuildError(f"{what} stopped with exit code {child.returncode} ({last[0]}); {hint}") from None
    if "error" in found:
        raise getattr(errors, found["kind"])(found["error"])
    return found


def _trim() -> None:
    """Give the system back what the allocator keeps of weights that went by, before another process asks for as much."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)


def answer(work: Callable[..., dict[str, Any]], task: type[Any]) -> None:
    """Do the work that the process was started for, and print the answer, or what went wrong."""
    try:
        found = work(task(**json.loads(sys.argv[1])))
    except TGateError as error:
        found = {"error": str(error), "kind": type(error).__name__}
    print(json.dumps(found), flush=True)

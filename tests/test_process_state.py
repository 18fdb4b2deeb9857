"""A test that leaves the process changed is found, and a run writes neither into the home folder nor where it was started."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import tgate_trt.errors

from .process_state import ProcessState, restored

TESTS = Path(__file__).parent


@contextlib.contextmanager
def patch(method: str, *arguments: Any) -> Iterator[None]:
    """One call of pytest's ``monkeypatch``."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        getattr(monkeypatch, method)(*arguments)
        yield


@contextlib.contextmanager
def other_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def other_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def thread() -> Iterator[None]:
    ended = threading.Event()
    started = threading.Thread(target=ended.wait, name="lasting")
    started.start()
    yield
    ended.set()
    started.join()


@contextlib.contextmanager
def child() -> Iterator[None]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield
        process.kill()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (patch("setenv", "TGATE_TRT_LASTING", "1"), "os.environ['TGATE_TRT_LASTING'] was 'absent', is '1'"),
        (patch("chdir", "/"), "working directory was "),
        (patch("syspath_prepend", "/lasting"), "sys.path was "),
        (patch("setattr", tgate_trt.errors, "TGateError", Exception), "tgate_trt.errors.TGateError was "),
        (patch("setattr", tgate_trt.errors.TGateError, "__doc__", "Another."), "tgate_trt.errors.TGateError.__doc__ was "),
        (patch("setitem", sys.modules, "json", ModuleType("json")), "module json was exchanged or removed"),
        (patch("setattr", logging.getLogger("tgate_trt"), "level", logging.DEBUG), "logger 'tgate_trt' was "),
        (torch.no_grad(), "torch gradients was True, is False"),
        (other_dtype(), "torch default dtype was torch.float32, is torch.float64"),
        (other_handler(), "handler of SIGTERM was "),
        (thread(), "thread lasting was 'absent', is "),
        (child(), "child process "),
    ],
    ids=lambda value: value.rstrip() if isinstance(value, str) else "",
)
def test_a_change_is_named(change: AbstractContextManager[Any], named: str) -> None:
    logging.getLogger("tgate_trt")
    before = ProcessState.now()
    with change:
        (found,) = ProcessState.now().changes_since(before)
    assert found.startswith(named)
    assert ProcessState.now().changes_since(before) == []


def test_attributes_are_put_back() -> None:
    before = dict(vars(tgate_trt.errors)), dict(vars(tgate_trt.errors.TGateError))
    with pytest.raises(ZeroDivisionError), restored("tgate_trt.errors"):
        tgate_trt.errors.more = 1  # type: ignore[attr-defined]
        tgate_trt.errors.TGateError = Exception  # type: ignore[misc]
        del tgate_trt.errors.BuildError
        _ = 1 / 0
    assert (dict(vars(tgate_trt.errors)), dict(vars(tgate_trt.errors.TGateError))) == before


def test_a_run_writes_into_its_own_folders_alone(tmp_path: Path) -> None:
    """In a home folder of its own, for others may write into the real one meanwhile."""
    home, start, temporary = tmp_path / "home", tmp_path / "start", tmp_path / "temporary"
    for folder in (home, start, temporary):
        folder.mkdir()
    own = {"HOME": str(home), "TMPDIR": str(temporary), "PYTHONSAFEPATH": "1"}
    run = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_") and "CACHE" not in name} | own
    files = [
        "engines/test_onnxruntime.py",
        "kernels/test_hand_off.py",
        "kernels/test_tensorrt_plugin.py",
        "tgate_trt/bench/test_settings.py",
    ]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *(str(TESTS / file) for file in files)]
    done = subprocess.run(command, cwd=start, env=run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--randomly-seed=" in done.stdout
    assert list(home.rglob("*")) == list(start.rglob("*")) == []
    assert not list(temporary.glob("tgate-trt-tests-*"))

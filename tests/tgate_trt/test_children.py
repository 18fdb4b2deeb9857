"""A function in a process of its own: what comes back, and what a process that does not come to its end leaves."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tgate_trt import children
from tgate_trt.errors import BuildError, InputError, UnsupportedError

WORK = """
from __future__ import annotations
import os, signal, sys, time
from dataclasses import dataclass
from pathlib import Path
from tgate_trt import children
from tgate_trt.errors import UnsupportedError
from tgate_trt.specs import Bounds

@dataclass(frozen=True)
class Task:
    text: str
    path: Path
    bounds: Bounds
    more: tuple[int | str, ...] = ()

@dataclass(frozen=True)
class Answer:
    task: Task
    process: int

def echo(task: Task) -> Answer:
    return Answer(task, os.getpid())

def prints(text: str) -> str:
    print(text)
    os.write(1, b"a library's word")
    return text.upper()

def refuses(text: str) -> None:
    raise UnsupportedError(text)

def crashes(text: str) -> None:
    print("many words before", file=sys.stderr)
    raise ZeroDivisionError(text)

def is_killed(text: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)

def reports(count: int) -> int:
    for step in range(count):
        children.report(step / count, f"step {step}")
    return count

def waits(path: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started with it ignored
    try:
        children.report(0, str(os.getpid()))
        time.sleep(600)
    finally:
        path.write_text("cleaned up")

def ignores(text: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    children.report(0, str(os.getpid()))
    time.sleep(600)
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module above, for this process and its children."""
    return module_of(WORK, tmp_path, monkeypatch)


def module_of(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    name = f"work_{folder.name}"  # a name of its own, for modules stay imported
    (folder / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(folder)
    return importlib.import_module(name)


def run(work: Callable[[Any], Any], task: Any, **more: Any) -> Any:
    return children.run(work, task, "the work", "try again", **more)


def test_an_answer_keeps_its_types(work: Any) -> None:
    task = work.Task("grün", Path("a/b"), work.Bounds(1, 2, 3), (4, "batch"))
    answer = run(work.echo, task)
    assert answer == work.Answer(task, answer.process)
    assert answer.process != os.getpid()


def test_a_task_may_be_larger_than_a_command_line(work: Any) -> None:
    task = work.Task("x" * (1 << 20), Path(), work.Bounds(1, 1, 1))
    assert run(work.echo, task).task == task


def test_what_is_printed_is_no_answer(work: Any) -> None:
    assert run(work.prints, '{"answer": "printed"}') == '{"ANSWER": "PRINTED"}'


def test_an_error_of_ours_keeps_its_class(work: Any) -> None:
    with pytest.raises(InputError, match=r"^not here; go there$") as caught:
        run(work.refuses, "not here; go there")
    assert type(caught.value) is UnsupportedError


def test_a_crash_is_one_sentence_with_its_reason(work: Any) -> None:
    with pytest.raises(BuildError, match=r"^the work stopped with exit code 1 \(ZeroDivisionError: one word\); try again$"):
        run(work.crashes, "one word")


def test_a_crash_before_a_large_task_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"import os\nif os.getpid() != {os.getpid()}: raise RuntimeError('no such device')\ndef never(text: str) -> None: ..."
    with pytest.raises(BuildError, match=r"exit code 1 \(RuntimeError: no such device\)"):
        run(module_of(text, tmp_path, monkeypatch).never, "x" * (1 << 20))


def test_a_killed_child_most_likely_ran_out_of_memory(work: Any) -> None:
    with pytest.raises(BuildError, match=r"^the work was killed by the system, most likely because memory ran out; try again$"):
        run(work.is_killed, "")


def test_progress_arrives_in_order(work: Any) -> None:
    seen: list[tuple[float, str]] = []
    assert run(work.reports, 4, on_progress=lambda fraction, phase: seen.append((fraction, phase))) == 4
    assert seen == [(0, "step 0"), (0.25, "step 1"), (0.5, "step 2"), (0.75, "step 3")]
    assert run(work.reports, 4) == 4


def test_a_report_outside_a_child_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    children.report(0.5, "half")
    assert capsys.readouterr().out == ""


def interrupted(work: Callable[[Any], Any], task: Any) -> int:
    """Interrupt a child at its first report, which is its process, and give that."""
    processes = []

    def interrupt(_fraction: float, phase: str) -> None:
        processes.append(int(phase))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(work, task, on_progress=interrupt)
    return processes[0]


def test_an_interrupted_child_cleans_up_and_ends(work: Any, tmp_path: Path) -> None:
    process = interrupted(work.waits, tmp_path / "left")
    assert (tmp_path / "left").read_text() == "cleaned up"
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_a_child_that_ignores_an_interrupt_is_killed(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "_SECONDS_TO_STOP", 0.1)
    process = interrupted(work.ignores, "")
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_a_child_whose_parent_died_before_it_began_does_nothing(work: Any, tmp_path: Path) -> None:
    parent = subprocess.Popen(["true"])
    parent.wait()
    command = [sys.executable, "-P", "-m", "tgate_trt.children", str(parent.pid), work.__name__, "waits"]
    done = subprocess.run(command, input=json.dumps(str(tmp_path / "left")), capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, (tmp_path / "left").exists()) == (1, "", False)

"""How a command shows the library's log where there is no terminal."""

from __future__ import annotations

import errno
import logging
import os
import signal
import time

import pytest
import typer
from safetensors import SafetensorError

from tgate_trt import console
from tgate_trt.errors import InputError

logger = logging.getLogger("tgate_trt.test")


def show(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Log the progress of some work, with so many seconds between lines."""
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", seconds)
    with console.reporting(verbose=False):
        logger.info("counting …")
        for number in (1, 2):
            logger.info("counting", extra={"progress": number / 2})
        logger.info("counting: done")


def test_progress_is_a_line_every_so_often(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    show(monkeypatch, 1000)
    assert capsys.readouterr().out == "counting: done\n"
    show(monkeypatch, 0)
    assert capsys.readouterr().out == "counting: 50%\ncounting: 100%\ncounting: done\n"


def test_an_error_is_one_sentence_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, console.reporting(verbose=False):
        raise InputError("a number is expected, got [x]; choose another")
    assert caught.value.exit_code == console.FAILED == 1
    assert capsys.readouterr().err == "error: a number is expected, got [x]; choose another\n"


def test_an_interrupted_command_names_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), console.reporting(verbose=False, interrupted="stopped; run it again"):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "stopped; run it again\n"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/data/a.json"), "cannot read or write /data/a.json: No space left on device; "),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "cannot read or write a file: I/O error: No space left"),
        (MemoryError(), "the memory of this machine ran out; free some"),
    ],
)
def test_errors_of_the_machine_are_one_sentence(error: Exception, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, console.reporting(verbose=False):
        raise error
    assert caught.value.exit_code == 1
    assert capsys.readouterr().err.startswith(f"error: {sentence}")


def test_a_terminated_command_ends_as_an_interrupted_one(capsys: pytest.CaptureFixture[str]) -> None:
    cleaned = []
    with pytest.raises(typer.Exit) as caught, console.reporting(verbose=False):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            cleaned.append(True)
    assert caught.value.exit_code == 1 and cleaned
    assert capsys.readouterr().err == "stopped; unfinished files are removed\n"

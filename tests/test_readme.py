"""The README's commands exist and run, and so does its Python."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.partition("  #")[0].strip() for line in README.splitlines() if line.startswith("tgate-")]


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def application(command: str) -> tuple[typer.Typer, list[str]]:
    """A command's application and its arguments."""
    name, *arguments = shlex.split(command)
    return importlib.import_module(f"tgate_trt.cli.{name.removeprefix('tgate-')}").app, arguments


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_used_as_it_can_be(command: str) -> None:
    app, arguments = application(command)
    parser = typer.main.get_command(app)
    assert parser.make_context("command", arguments) is not None


def test_every_option_is_shown_by_help() -> None:
    for command in COMMANDS:
        app, arguments = application(command)
        known = {option for parameter in typer.main.get_command(app).params for option in parameter.opts}
        assert {argument for argument in arguments if argument.startswith("--")} <= known


def test_the_first_build_generation_inspection_and_python_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    monkeypatch.chdir(tmp_path)
    for prefix in ("tgate-build --model shapes", "tgate-generate", "tgate-inspect"):
        (command, *_) = [command for command in COMMANDS if command.startswith(prefix)]
        app, arguments = application(command)
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    assert list((tmp_path / "pictures").glob("*.png"))
    (code, _, *_) = blocks("python")
    namespace: dict[str, object] = {}
    Path("bundles/shapes-64x64-fp32").rename("bundles/shapes")  # so that the build of the example finds it up to date
    exec(code, namespace)
    assert (tmp_path / "circle.png").exists()


def test_make_has_the_targets_that_are_named() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)", README)) <= targets
    done = subprocess.run(["make", "-n", "demo", "test", "check", "bench"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_files_that_are_named_are_there() -> None:
    for name in re.findall(r"\((docs/[^)]+)\)|`(docs/[\w./-]+)`", README):
        path = next(filter(None, name))
        assert (ROOT / path).exists(), path

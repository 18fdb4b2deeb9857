"""The README is short, and what README and docs name exists: commands, options, Python, links, files, make targets, packages."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md")
"""Every page that people write; those in docs/results are written by commands."""

LONGEST_LINE = 140
LONGEST_README = 100
INSTALLED_BY_NAME = {"build"}
"""Packages that a command may install by name, because they are published."""


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)


def prose_of(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


def shell_lines(page: Path) -> list[str]:
    """The commands of a page's bash blocks, one by one, without their comments."""
    lines = [line.partition("  #")[0].strip() for block in blocks(page, "bash") for line in block.splitlines()]
    return [command.strip() for line in lines for command in line.split("&&") if command.strip()]


SHELL = [line for page in PAGES for line in shell_lines(page)]
COMMANDS = [line for line in dict.fromkeys(SHELL) if line.startswith("tgate-")]
MODULES = [line for line in dict.fromkeys(SHELL) if line.startswith("python -m tgate_trt")]


def parser_of(app: typer.Typer, arguments: list[str]) -> tuple[Any, list[str]]:
    """The command that arguments select, of those that an application has, and the arguments that remain for it."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        name, *arguments = arguments
        assert name in command.commands, f"{name!r} is none of the subcommands {sorted(command.commands)}"
        command = command.commands[name]
    return command, arguments


def application(line: str) -> tuple[typer.Typer, list[str]]:
    """The application of a line such as ``tgate-build …`` or ``python -m tgate_trt.…``, and its arguments."""
    name, *arguments = shlex.split(line)
    if name == "python":
        module = importlib.import_module(arguments[1])
        app = typer.Typer()
        app.command()(module.main)
        return app, arguments[2:]
    if (name, arguments[:1]) == ("tgate-analyze", ["tune"]):
        return importlib.import_module("tgate_trt.cli.tune").app, arguments[1:]
    return importlib.import_module(f"tgate_trt.cli.{name.removeprefix('tgate-')}").app, arguments


def test_the_readme_is_short() -> None:
    assert len(text_of(README).splitlines()) <= LONGEST_README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_not_too_long(page: Path) -> None:
    """Rows of tables cannot be wrapped."""
    too_long = [line for line in text_of(page).splitlines() if len(line) > LONGEST_LINE and not line.startswith(("|", "   |"))]
    assert not too_long


@pytest.mark.parametrize("line", [*COMMANDS, *MODULES])
def test_every_command_is_used_as_it_can_be(line: str) -> None:
    command, arguments = parser_of(*application(line))
    assert command.make_context("command", arguments) is not None


@pytest.mark.parametrize("line", [*COMMANDS, *MODULES])
def test_every_option_is_shown_by_help(line: str) -> None:
    command, arguments = parser_of(*application(line))
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {argument for argument in arguments if argument.startswith("--")} <= known


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("tgate-bench")])
def test_a_benchmark_is_a_subcommand(line: str) -> None:
    app, _ = application(line)
    assert hasattr(typer.main.get_command(app), "commands")


def test_commands_are_found() -> None:
    """So that the tests above run on something."""
    assert {line.split()[0] for line in COMMANDS} == set(PYPROJECT["project"]["scripts"])
    assert len(MODULES) > 1


def _write_lora(file: Path) -> None:
    """Write a LoRA of the demo model."""
    from diffusers import DiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    from tgate_trt.demo import MODEL_DIR

    pipeline = DiffusionPipeline.from_pretrained(MODEL_DIR, local_files_only=True)
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipeline.save_lora_weights(file.parent, weight_name=file.name, unet_lora_layers=get_peft_model_state_dict(pipeline.unet))


def test_the_first_build_generation_inspection_and_all_python_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    monkeypatch.chdir(tmp_path)
    for prefix in ("tgate-build --model shapes", "tgate-generate", "tgate-inspect"):
        line = next(line for line in shell_lines(README) if line.startswith(prefix))
        app, arguments = application(line)
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    assert list((tmp_path / "pictures").glob("*.png"))
    Path("bundles/shapes-64x64-fp32").rename("bundles/shapes")  # so that the build of the example finds it up to date
    _write_lora(tmp_path / "style.safetensors")
    for page in PAGES:  # the README first; the blocks of a page go on from one another
        namespace: dict[str, object] = {}
        for code in blocks(page, "python"):
            exec(compile(code, str(page), "exec"), namespace)
    assert (tmp_path / "circle.png").exists()


def test_make_has_the_targets_that_are_named() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"\bmake ([a-z0-9-]+)`", text_of(page))}
    named |= {line.split()[1] for line in SHELL if line.startswith("make ")}
    assert {"demo", "test", "bench-gpu"} <= named <= targets
    done = subprocess.run(["make", "-n", "demo", "test", "check", "bench"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_command_names_an_unpublished_package() -> None:
    """A name that nobody has published could be published by anyone."""
    extras = set(PYPROJECT["project"]["optional-dependencies"])
    found = 0
    for line in SHELL:
        if not line.startswith("pip install"):
            continue
        _, _, *arguments = shlex.split(line)
        names = [
            argument for before, argument in zip(["", *arguments], arguments, strict=False) if before not in ("-c", "--extra-index-url")
        ]
        for name in names:
            if name.startswith("-"):
                continue
            place, bracket, wanted = name.partition("[")
            assert place in (".", *INSTALLED_BY_NAME) or re.fullmatch(r"dist/[\w.-]+\.whl", place), line
            assert not bracket or set(wanted.rstrip("]").split(",")) <= extras, line
            found += 1
    assert found > 4
    for page in PAGES:
        assert not re.search(r"pip install\s+[\"']?tgate[-_]trt", text_of(page)), page


def _anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in _anchors(target), f"{page.name} links to {link}"


def test_every_page_is_linked_from_the_readme() -> None:
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= set(re.findall(r"\]\(([^)#]+)", text_of(README)))


def test_files_that_are_named_are_there() -> None:
    for page in PAGES:
        for name in re.findall(r"`((?:docs|tests|tgate_trt|export|engines|kernels)/[\w./-]+)`", text_of(page)):
            assert (ROOT / name).exists(), f"{page.name} names {name}"

"""The search for the nearest gate within a budget, on a tiny model. Which gate wins is never asserted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

import tgate_trt
from tgate_trt.analysis import record
from tgate_trt.analysis.subject import Subject
from tgate_trt.analysis.tuning import NAME, Search, prompts_for
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.cli.tune import app
from tgate_trt.demo.dataset import combinations, parse
from tgate_trt.gate.gate import Gate
from tgate_trt.running.drawing import Drawing

Run = Callable[..., Result]
PROMPTS = ("a fox", "two birds")


@pytest.fixture(scope="module")
def bundle(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the graphs of DeepCache. Read only, but for the gate that a search keeps in it."""
    folder = tmp_path_factory.mktemp("bundles") / "tiny-sd"
    tgate_trt.build(tiny_sd, folder, gates=["none,deep=2"], verify=False, components=False)
    return folder


@pytest.fixture(scope="module")
def tuned(run: Run, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """One search: its record, the output, and the folder of its files."""
    folder = tmp_path_factory.mktemp("tuning")
    arguments = ("--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--samples", 2, "--steps", 5, "--budget", "0.95")
    done = run(app, bundle, *arguments, "--json", folder / "a.json", "--plot", folder / "a.png")
    assert done.exit_code == 0, done.output
    return record.read(folder / "a.json"), done.output, folder


def test_what_is_found_is_the_nearest_that_was_timed_within_the_budget(tuned: tuple[dict[str, Any], str, Path]) -> None:
    results = tuned[0]["results"]
    assert results["measured"]["median"] <= 0.95
    assert results["found"] in results["candidates"]
    assert results["found"]["share"] <= 0.95
    shares, distances = ([row[name] for row in results["front"]] for name in ("share", "distance"))
    assert shares == sorted(shares) and distances == sorted(distances, reverse=True)
    assert results["held_out"]["pictures"] == 2
    assert len({row["gate"] for row in results["candidates"]}) == len(results["candidates"]) > 5
    assert any(key in row["gate"] for row in results["candidates"] for key in ("deep=", "sp=", "forecast="))
    assert not any("sp=" in row["gate"] for row in results["candidates"]), "the bundle has no graph of self-attention reuse"


def test_the_bundle_keeps_it_under_its_name(tuned: tuple[dict[str, Any], str, Path], bundle: Path) -> None:
    gate = tuned[0]["results"]["found"]["gate"]
    opened = Bundle.open(bundle)
    assert opened.manifest.gates == {NAME: gate}
    assert tgate_trt.load(opened, gate=NAME, threads=1).unet.gate == Gate.parse(gate)
    assert f"{NAME} is {gate}: " in " ".join(tuned[1].split())
    assert (tuned[2] / "a.png").stat().st_size > 10_000


def test_a_search_that_goes_on_draws_nothing_twice(
    tuned: tuple[dict[str, Any], str, Path], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {row["gate"]: row["distance"] for row in tuned[0]["results"]["candidates"]}
    subject = Subject(Bundle.open(bundle), Drawing(PROMPTS, steps=5), None, 2)
    drawn: list[str] = []
    draw = subject.draw
    monkeypatch.setattr(subject, "draw", lambda gate: drawn.append(str(gate)) or draw(gate))
    list(Search(subject, 0.95, known).run())
    assert not set(drawn) & known.keys()


def test_a_file_of_another_search_is_refused(tuned: tuple[dict[str, Any], str, Path], bundle: Path, error_of: Callable[..., str]) -> None:
    message = error_of(app, bundle, "--samples", 2, "--steps", 4, "--json", tuned[2] / "a.json")
    assert "the file holds a search with other settings; choose another --json, or remove it" in message


@pytest.mark.parametrize("budget", ["0", "1.5", "half", "-3ms", "nan"])
def test_a_budget_that_is_none_is_one_sentence(budget: str, bundle: Path, error_of: Callable[..., str]) -> None:
    assert f"such as 120ms; got '{budget}'" in error_of(app, bundle, "--samples", 2, "--steps", 4, "--budget", budget)


def test_the_demo_model_is_tuned_on_captions_of_its_training() -> None:
    prompts = prompts_for("shapes", (), 12, 0)
    held_out = set(combinations(held_out=True))
    assert len(prompts) == 12 and not held_out & {parse(prompt) for prompt in prompts}
    assert prompts_for("sd15", (), 12, 0) == () and prompts_for("shapes", PROMPTS, 12, 0) == PROMPTS

"""``tgate-analyze`` from a model to its files, and the errors that a user would make."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import Result

from tgate_trt.analysis import study
from tgate_trt.analysis.convergence import ALL_LAYERS
from tgate_trt.analysis.record import SCHEMA, commit_of, read
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.cli import analyze

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 4

Run = Callable[..., Result]
ErrorOf = Callable[..., str]


@pytest.fixture(scope="module")
def record(run: Run, one_thread: None, sd_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command writes for the tiny model."""
    folder = tmp_path_factory.mktemp("analysis")
    prompts = folder / "prompts.txt"
    prompts.write_text("a red fox\n\ntwo birds in a tree\n", encoding="utf-8")
    result = run(analyze.app, sd_bundle.folder, "--prompts", prompts, "--steps", STEPS, "--samples", 3, "--output", folder / "out")
    assert result.exit_code == 0, result.output
    files = sorted((folder / "out").iterdir())
    assert [file.name for file in files] == ["analysis-tiny-sd.json", "analysis-tiny-sd.png"]
    with Image.open(files[1]) as figure:
        assert figure.format == "PNG" and min(figure.size) > 500
    data = read(files[0])
    gate_step = data["results"]["suggestion"]["gate_step"]
    assert f"{gate_step} of {STEPS}, suggested" in result.output and str(files[0].name) in result.output.replace("\n", "")
    return data


def test_results_say_what_they_are_of(record: dict[str, Any]) -> None:
    assert record["subject"]["model"] == "tiny-sd"
    assert record["settings"]["prompts"] == ["a red fox", "two birds in a tree"]
    assert (record["settings"]["steps"], record["settings"]["pictures"], record["settings"]["backend"]) == (STEPS, 3, "onnxruntime")
    assert {"versions", "commit", "machine", "date"} <= record.keys()
    assert (record["schema"], record["what"]) == (SCHEMA, "analysis")
    assert record["command"].startswith("tgate-analyze")
    assert re.search(r"0\.5 of its highest", record["results"]["suggestion"]["by_convergence"]["rule"])


def test_results_are_whole(record: dict[str, Any]) -> None:
    results = record["results"]
    for kind in ("cross_attention", "self_attention"):
        groups = results["convergence"][kind]
        assert list(groups) == [ALL_LAYERS, "down 8×8", "mid 4×4", "up 8×8"]
        assert [len(groups[ALL_LAYERS]["relative"][end]) for end in ("low", "mean", "high")] == [STEPS - 1] * 3
    gate, null_text = results["gate"], results["null_text"]
    assert gate["at"] == [1, 2, 3, 4] and gate["accuracy"] is None
    distances = gate["distance"]["mean"]
    assert distances[-1] == 0 < min(distances[:-1])
    assert null_text["text first"]["at"] == [0, 1, 2, 3, 4]
    assert null_text["text first"]["distance"]["mean"][-1] == null_text["text last"]["distance"]["mean"][0] == 0
    assert results["suggestion"]["rule"] == "by_convergence"
    levels = results["noise_levels"]
    assert len(levels) == STEPS and levels == sorted(levels, reverse=True)
    suggested = results["suggestion"]["gate_step"]
    assert results["suggestion"]["noise"] == (None if suggested == STEPS else pytest.approx(levels[suggested], rel=0.01))


def test_a_model_becomes_a_bundle_first(run: Run, tiny_sd_configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "build", partial(study.build, verify=False, components=False))  # takes a minute less
    result = run(
        analyze.app, tiny_sd_configs, "--random-weights", "--prompt", "a fox", "--steps", 2, "--only", "gate", "--json", "found.json"
    )
    assert result.exit_code == 0, result.output
    Bundle.open(next((tmp_path / "bundles").glob("[!.]*")))
    data = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert data["subject"]["random_weights"]
    results = data["results"]
    assert results["convergence"] is results["null_text"] is results["suggestion"]["gate_step"] is None
    assert results["gate"]["distance"]["low"] == results["gate"]["distance"]["mean"]
    assert not (tmp_path / "analysis").exists()


def test_a_commit_is_marked_where_its_source_was_changed(tmp_path: Path) -> None:
    assert commit_of(tmp_path) is None
    for name in ("source/a.py", "docs/results/a.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("1")
    git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b")
    for arguments in (("init", "--quiet"), ("add", "."), ("commit", "--quiet", "-m", "first")):
        subprocess.run((*git, *arguments), check=True)
    clean = commit_of(tmp_path / "source")
    assert clean is not None and re.fullmatch(r"[0-9a-f]{40}", clean)
    (tmp_path / "docs/results/a.json").write_text("2")
    assert commit_of(tmp_path / "source") == clean, "results of an earlier measurement are no changes"
    (tmp_path / "source/a.py").write_text("2")
    assert commit_of(tmp_path / "source") == f"{clean} with changes"


@pytest.mark.parametrize("suffix", [".png", ".svg"])
@pytest.mark.parametrize("part", ["convergence", "null-text"])
def test_one_part_makes_a_figure_too(run: Run, sd_bundle: Bundle, part: str, suffix: str, tmp_path: Path) -> None:
    plot = tmp_path / f"figure{suffix}"
    result = run(analyze.app, sd_bundle.folder, "--prompt", "a fox", "--steps", 2, "--only", part, "--plot", plot)
    assert result.exit_code == 0, result.output
    assert list(tmp_path.iterdir()) == [plot] and plot.stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "convergence,gates"], "--only takes one or more of convergence, null-text, gate, got 'gates'"),
        (["--only", ","], "got 'none'"),
        (["--prompts", "nowhere.txt"], "cannot read prompts from nowhere.txt"),
        (["--prompts", "empty.txt"], "empty.txt holds no prompts"),
        (["--steps", "1"], "needs at least 2, got 1"),
        (["--scheduler", "dpm"], "there is no scheduler 'dpm'"),
        (["--backend", "openvino"], "there is no backend 'openvino'"),
        (["--plot", "figure.jpeg"], "a figure is a file of .png, .svg, .pdf; got figure.jpeg"),
        (["--output", "/proc/nowhere"], "cannot write to /proc/nowhere"),
        (["--output", "empty.txt"], "cannot write to empty.txt"),
    ],
)
def test_bad_input_is_one_sentence(
    error_of: ErrorOf, sd_bundle: Bundle, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n \n", encoding="utf-8")
    assert message in error_of(analyze.app, sd_bundle.folder, *arguments)


@pytest.mark.parametrize("model", ["sdxxl", "/nowhere/at/all"])
def test_a_model_that_is_not_there(error_of: ErrorOf, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert model in error_of(analyze.app, model, "--json", "found.json")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_a_figure_names_the_extra(
    run: Run, error_of: ErrorOf, sd_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert 'pip install "tgate-trt[bench]"' in error_of(analyze.app, sd_bundle.folder, "--output", tmp_path / "out")
    result = run(
        analyze.app, sd_bundle.folder, "--prompt", "a fox", "--steps", 2, "--only", "convergence", "--json", tmp_path / "found.json"
    )
    assert result.exit_code == 0, result.output

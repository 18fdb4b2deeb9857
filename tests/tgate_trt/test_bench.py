"""The benchmarks' arithmetic and files. That a figure is good is never asserted."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tgate_trt.bench import build_cost, record, scores, steps, stopwatch, tables
from tgate_trt.bench.__main__ import app
from tgate_trt.bench.pictures import PARTS
from tgate_trt.bench.spread import against, spread
from tgate_trt.bench.studio import CFG_DROP, METHODS, TGATE, VANILLA, Studio
from tgate_trt.bench.subjects import open_bundle
from tgate_trt.bundle import STAMPS, Bundle
from tgate_trt.demo.dataset import ATTRIBUTES
from tgate_trt.errors import InputError


def test_a_part_stands_still_while_another_runs_inside_it() -> None:
    watch = stopwatch.Stopwatch()
    with watch.time("outer"):
        time.sleep(0.01)
        with watch.time("inner"):
            time.sleep(0.05)
    assert watch.seconds["inner"] >= 0.05
    assert 0.01 <= watch.seconds["outer"] < watch.seconds["inner"]


def test_watching_ends_with_its_block() -> None:
    class Clerk:
        def add(self, a: int, b: int) -> int:
            return a + b

    clerk, watch = Clerk(), stopwatch.Stopwatch()
    with watch.watching(clerk, "add", "sums"):
        assert clerk.add(1, b=2) == 3
    before = dict(watch.seconds)
    assert clerk.add(2, 2) == 4
    assert before.keys() == {"sums"}
    assert dict(watch.seconds) == before
    assert vars(clerk) == {}


def test_a_ratio_is_taken_within_a_round() -> None:
    compared = against({"base": [1.0, 10.0, 2.0], "half": [0.5, 5.0, 1.0]}, "base")
    assert compared["half"]["ratio"] == {"median": 0.5, "p10": 0.5, "p90": 0.5, "samples": [0.5, 0.5, 0.5]}
    assert compared["base"]["seconds"]["median"] == 2.0
    assert spread([3.0]) == {"median": 3.0, "p10": 3.0, "p90": 3.0, "samples": [3.0]}


def test_methods_place_their_gate() -> None:
    assert [method.planning_steps(0.4, 25) for method in METHODS] == [25, 10, 10]
    assert [method.label(10) for method in (VANILLA, CFG_DROP, TGATE)] == ["vanilla", "cfg-drop, g = 10", "T-GATE, g = 10"]


def test_stages_are_read_from_the_log() -> None:
    lines = ["weights done in 12.5 s", "building again: x", "text encoders and VAE done in 3.0 s", "planning graph done in 0.4 s"]
    assert build_cost.stages_of(lines) == {"weights": 12.5, "text encoders and VAE": 3.0, "planning graph": 0.4}


RECORD: dict[str, Any] = {
    "schema": record.SCHEMA,
    "what": "steps",
    "command": "python -m tgate_trt.bench",
    "date": "2026-01-02T03:04:05+00:00",
    "machine": {"cpu": "A processor", "cores": 2, "memory_bytes": 24 << 30, "system": "Linux x86_64", "load_average_before": 0.1},
    "versions": {"torch": "2.13.0", "onnxruntime": "1.23.0"},
    "commit": None,
    "subject": {"model": "sd15", "random_weights": True, "precision": "fp32", "width": 256, "height": 256},
    "settings": {"rounds": 3, "threads": 2},
    "complete": False,
    "results": {
        "vanilla step": {"rows": 2, "seconds": spread([5.0]), "ratio": spread([1.0]), "macs": 2 * 10**9, "bound": 1.0},
        "fidelity step": {"rows": 1, "seconds": spread([0.0123]), "ratio": spread([0.478]), "macs": 10**9, "bound": 0.479},
        "hand-off": {"rows": 2, "seconds": spread([42e-6]), "ratio": spread([0.0001]), "macs": 0, "bound": None},
    },
}


def test_a_page_shows_every_record(tmp_path: Path) -> None:
    (tmp_path / "cpu-steps-sd15.json").write_text(json.dumps(RECORD), encoding="utf-8")
    page = tables.write_page(tmp_path).read_text(encoding="utf-8")
    assert "## One step: sd15, 256×256, fp32, random weights" in page
    assert "| vanilla step | 2 | 5.00 s | 5.00 s … 5.00 s | 1.000 | 1.000 | 2.000 |" in page
    assert "| fidelity step | 1 | 12.3 ms | 12.3 ms … 12.3 ms | 0.478 | 0.479 | 1.000 |" in page
    assert "| hand-off | 2 | 42 µs | 42 µs … 42 µs | 0.000 | – | – |" in page
    assert "A processor, 2 cores, 24 GiB" in page
    assert "Rounds: 3." in page
    assert "weights are random" in page
    assert "Cut off" in page


def test_a_build_is_set_against_its_weights() -> None:
    results = {
        "seconds": 100.0,
        "stages": {"weights": 12.5},
        "memory": {"peak_anonymous": 6 * 10**9, "peak_total": 7 * 10**9, "looks": 9},
        "disk": {"bundle": 7 * 10**9, "denoiser_weights": 5 * 10**9, "pipeline_weights": 7 * 10**9},
    }
    subject = {"model": "sdxl", "precision": "fp16", "random_weights": True}
    (table,) = tables.tables_of(RECORD | {"what": "build", "subject": subject, "settings": {}, "results": results})
    text = table.markdown()
    assert "| weights | 12.5 s |" in text
    assert "6.00 GB, 1.20 × the denoiser's weights" in text
    assert "7.00 GB, 1.00 × the pipeline's weights" in text


def test_a_foreign_file_among_the_records_is_told(tmp_path: Path) -> None:
    (tmp_path / "cpu-steps-x.json").write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match=r"cpu-steps-x\.json is no record"):
        record.read_records(tmp_path)


@pytest.fixture(scope="module")
def built(tiny_sd_configs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Path]:
    """A bundle whose build was measured, and the folder of the record."""
    folder, output = tmp_path_factory.mktemp("bundles") / "tiny-sd", tmp_path_factory.mktemp("results")
    arguments = ["build", "--model", str(tiny_sd_configs), "--precision", "fp32", "--bundle", str(folder), "--keep"]
    done = CliRunner().invoke(app, [*arguments, "--output", str(output)])
    assert done.exit_code == 0, done.output
    return Bundle.open(folder), output


def test_a_build_is_measured(built: tuple[Bundle, Path]) -> None:
    bundle, output = built
    (found,) = record.read_records(output)
    subject = {"model": "tiny-sd", "precision": "fp32", "random_weights": True, "variant": "onnxruntime"}
    assert (found["what"], found["subject"]) == ("build", subject)
    results = found["results"]
    assert {"weights", "trace", "planning graph", "fidelity graph"} <= results["stages"].keys()
    assert 0 < sum(results["stages"].values()) < results["seconds"]
    assert 0 < results["memory"]["peak_anonymous"] <= results["memory"]["peak_total"]
    disk = results["disk"]
    assert 0 < disk["denoiser_weights"] < disk["pipeline_weights"] < disk["bundle"]
    assert disk["denoiser_weights"] <= bundle.manifest.files["weights.safetensors"]["size"]
    assert disk["bundle"] == sum(path.stat().st_size for path in bundle.folder.rglob("*") if path.is_file() and path.name != STAMPS)
    with pytest.raises(InputError, match="is there already"):
        build_cost.measure(str(bundle.folder), "fp32", bundle.folder, build_cost.Engines())


def test_the_memory_of_descendants_counts() -> None:
    size, memory = 50 << 20, build_cost.Memory()
    grandchild = f"held = bytearray(b'x' * {size}); print(len(held), flush=True); input()"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    with subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        memory.look(process.pid)
        process.communicate(b"\n")
    assert size < memory.anonymous < memory.total
    assert memory.anonymous < 2 * size


@pytest.fixture
def brisk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Samples of one call each."""
    monkeypatch.setattr(steps, "LEAST_SECONDS", 0.0)
    return


@pytest.mark.usefixtures("brisk")
def test_steps_and_pictures_are_measured_and_written(built: tuple[Bundle, Path], tmp_path: Path) -> None:
    arguments = ["--model", str(built[0].folder), "--only", "steps,pictures", "--rounds", "1", "--steps", "3", "--output", str(tmp_path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    records = {found["what"]: found for found in record.read_records(tmp_path)}
    assert records.keys() == {"steps", "pictures"}
    for found in records.values():
        assert found["complete"]
        assert found["subject"]["model"] == "tiny-sd"
        assert found["subject"]["random_weights"]
        assert found["settings"]["rounds"] == 1
        assert found["machine"].keys() == {"cpu", "cores", "memory_bytes", "system", "load_average_before"}
        assert {"python", "torch", "onnxruntime", "tgate-trt"} <= found["versions"].keys()
        assert {"command", "date", "commit"} <= found.keys()
        assert all(table.title in done.output for table in tables.tables_of(found))
    _check_steps(records["steps"]["results"])
    _check_pictures(records["pictures"]["results"])
    assert (tmp_path / tables.PAGE).read_text(encoding="utf-8").count("## ") == 3


def _check_steps(results: dict[str, Any]) -> None:
    assert results.keys() == {*(step.name for step in steps.STEPS), steps.HAND_OFF}
    assert results["vanilla step"]["ratio"]["samples"] == [1.0]
    assert results["planning step"]["bound"] == 1.0
    assert results["full step at batch 1"]["bound"] == 0.5
    assert 0.4 < results["fidelity step"]["bound"] < 0.5
    assert results["fidelity step"]["graph"] == "fidelity"
    for row in results.values():
        assert row.keys() == {"seconds", "ratio", "graph", "rows", "macs", "bound"}
        assert len(row["seconds"]["samples"]) == 1
        assert row["seconds"]["median"] > 0


def _check_pictures(results: dict[str, Any]) -> None:
    assert [row["label"] for row in results.values()] == ["vanilla", "cfg-drop, g = 1", "T-GATE, g = 1"]
    assert results["vanilla"]["bound"] == 1.0
    assert results["cfg-drop"]["bound"] == pytest.approx((1 + 2 / 2) / 3)
    assert results["T-GATE"]["bound"] < results["cfg-drop"]["bound"]
    for row in results.values():
        assert row["parts"].keys() == set(PARTS)
        assert all(part["median"] > 0 for part in row["parts"].values())
        assert sum(part["median"] for part in row["parts"].values()) == pytest.approx(row["seconds"]["median"])
        outside = row["seconds"]["median"] - row["parts"]["engines"]["median"]
        assert row["outside_engines"]["median"] == pytest.approx(outside)


def test_scores_are_counted_for_every_setting(built: tuple[Bundle, Path]) -> None:
    with Studio(open_bundle(str(built[0].folder))) as studio:
        *_, results = scores.measure(studio, samples=2, steps=2)
    assert len(results) == len(scores.GATES)
    assert results["vanilla 25/25"]["label"] == "vanilla"
    for row in results.values():
        assert row["overall"]["total"] == 2
        assert len(row["overall"]["interval"]) == 2
        assert row["attributes"].keys() == ATTRIBUTES.keys()
    (table,) = tables.tables_of(RECORD | {"what": "scores", "settings": {"steps": 2}, "results": results})
    assert table.rows[0][:3] == ("vanilla", "0 of 2", "0.0%")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nothing"], "--model takes shapes or sd15, or the folder of a bundle; got 'nothing'"),
        (["--only", "steps,stairs"], "--only takes steps, pictures, scores, got 'stairs'"),
        (["--only", "scores", "--model", "sd15"], "scores are read from pictures of shapes, got --model sd15"),
        (["--only", ","], "nothing is left to measure"),
        (["build", "--model", "nothing"], "nothing"),
        (["build", "--precision", "fp3"], "--precision must be one of fp32, fp16, bf16, got 'fp3'"),
    ],
)
def test_bad_options_are_told_in_one_sentence(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path)])
    assert done.exit_code == 1
    assert done.output.startswith("error: ")
    assert message in done.output
    assert len(done.output.splitlines()) == 1

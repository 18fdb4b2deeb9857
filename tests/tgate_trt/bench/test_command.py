"""`tgate-bench` from end to end on tiny models. That a figure is good is never asserted."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import Result

import tgate_trt
from tgate_trt.analysis import record as files
from tgate_trt.bench import report, spacings
from tgate_trt.bench.contenders import PARTS, Studio
from tgate_trt.bench.measure import Plan, conditions_of, gates_of, prepare, refuse_unfair, scheduler_for
from tgate_trt.bench.memory import peak_memory
from tgate_trt.bench.settings import EAGER, TGATE, Setting
from tgate_trt.bench.spacings import Spacing
from tgate_trt.bench.stopwatch import Stopwatch
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.bundle.manifest import MANIFEST, TRACE, EngineSet
from tgate_trt.cli.bench import app
from tgate_trt.errors import InputError, StaleBundleError
from tgate_trt.gate.scheduler import level_of_gate, read_scheduler
from tgate_trt.running.drawing import Drawing, draw
from tgate_trt.running.drawing import prepare as prepare_pipeline

Run = Callable[..., Result]
ErrorOf = Callable[..., str]


@pytest.fixture(scope="module")
def bundle(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle without the vanilla graph, which a measurement adds."""
    folder = tmp_path_factory.mktemp("bundles") / "tiny-sd"
    tgate_trt.build(tiny_sd, folder, backend=["onnxruntime", "pytorch"], verify=False)
    return folder


@pytest.fixture(scope="module")
def measured(run: Run, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """One run over two backends and PyTorch without engines: the record, the folder of its files, and the output."""
    folder = tmp_path_factory.mktemp("results")
    done = run(
        *(app, "run", bundle, "--gate-step", "0.25", "--after-gate", "negative,positive", "--backend", "onnxruntime,pytorch"),
        *("--beside", "official", "--steps", "4", "--rounds", "2", "--quality", "--samples", "2", "--scheduler", "ddim", "--no-memory"),
        *("--json", folder / "a.json", "--markdown", folder / "a.md", "--plot", folder / "a.png"),
    )
    assert done.exit_code == 0, done.output
    return files.read(folder / "a.json"), folder, done.output


OURS = ("vanilla", "cfg-drop g=1", "T-GATE g=1", "T-GATE g=1 positive")


def test_every_setting_is_measured(measured: tuple[dict[str, Any], Path, str]) -> None:
    settings = measured[0]["results"]["settings"]
    expected = [f"{name}, {backend}" for backend in ("onnxruntime", "pytorch") for name in OURS]
    assert list(settings) == [*expected, "diffusers", "official tgate g=1"]
    for name, row in settings.items():
        assert len(row["seconds"]["samples"]) == 2, name
        assert sum(row["parts"][part]["samples"][0] for part in PARTS) == pytest.approx(row["seconds"]["samples"][0])
        assert 0 < row["outside"]["median"] < row["seconds"]["median"]
        assert row["images_per_second"] == pytest.approx(1 / row["seconds"]["median"])
        assert row["memory"] is None


def test_the_gate_is_where_it_was_put(measured: tuple[dict[str, Any], Path, str]) -> None:
    settings = measured[0]["results"]["settings"]

    def calls(name: str) -> tuple[int, int]:
        found = settings[name]["calls"]
        return found.get("planning step", 0), found.get("fidelity step", 0)

    for backend in ("onnxruntime", "pytorch"):
        assert calls(f"vanilla, {backend}") == (4, 0)
        for name in OURS[1:]:
            assert calls(f"{name}, {backend}") == (1, 3)
    assert calls("diffusers") == (4, 0)
    assert calls("official tgate g=1") == (1, 3)


def test_ratios_are_to_the_own_vanilla_and_bounds_are_of_work(measured: tuple[dict[str, Any], Path, str]) -> None:
    settings = measured[0]["results"]["settings"]
    for name in ("vanilla, onnxruntime", "vanilla, pytorch", "diffusers"):
        assert settings[name]["baseline"] == name
        assert settings[name]["ratio"]["samples"] == [1.0, 1.0]
        assert settings[name]["bound"] == {"linear": 1.0, "with_sdpa": 1.0}
    assert settings["cfg-drop g=1, pytorch"]["bound"]["linear"] == pytest.approx((1 + 3 / 2) / 4)
    bounds = [settings[name]["bound"] for name in ("T-GATE g=1, onnxruntime", "T-GATE g=1 positive, pytorch", "official tgate g=1")]
    assert bounds[0] == bounds[1] == bounds[2]
    assert bounds[0]["linear"] < (1 + 3 / 2) / 4
    ours = settings["T-GATE g=1, pytorch"]
    vanilla = settings["vanilla, pytorch"]["seconds"]["samples"]
    assert ours["ratio"]["samples"] == pytest.approx([a / b for a, b in zip(ours["seconds"]["samples"], vanilla, strict=True)])


def test_the_backends_draw_the_same_pictures_and_settings_do_not(measured: tuple[dict[str, Any], Path, str]) -> None:
    quality = measured[0]["results"]["quality"]
    assert list(quality) == [f"{name}, {backend}" for backend in ("onnxruntime", "pytorch") for name in OURS]
    assert quality["vanilla, onnxruntime"]["likeness"] is None
    assert quality["vanilla, pytorch"]["likeness"]["ssim"]["value"] > 0.999
    gated = [quality[f"T-GATE g=1{mode}, onnxruntime"]["likeness"] for mode in ("", " positive")]
    assert all(likeness["identical"] == 0 for likeness in gated)
    assert gated[0] != gated[1]


def test_what_is_written_is_what_is_shown(measured: tuple[dict[str, Any], Path, str]) -> None:
    record, folder, output = measured
    page = (folder / "a.md").read_text(encoding="utf-8")
    tables = report.tables_of(record)
    assert [table.title.partition(":")[0] for table in tables] == ["One picture, 4 steps", "Where the time goes, medians", "Quality"]
    for table in tables:
        assert table.title in output
        assert table.markdown() in page
    assert "**Not the same engine**: onnxruntime fp32, pytorch fp32, PyTorch float32" in page
    assert (folder / "a.png").read_bytes().startswith(b"\x89PNG")
    assert record["settings"]["scheduler"] == "ddim"
    assert record["subject"]["model"] == "tiny-sd"
    assert {"cpu", "cores", "gpu", "memory_bytes", "load_average_before"} <= record["machine"].keys()
    assert {"commit", "command", "date", "versions"} <= record.keys()


def test_the_vanilla_graph_is_kept(measured: tuple[dict[str, Any], Path, str], bundle: Path) -> None:
    assert set(Bundle.open(bundle).manifest.graphs) >= {"vanilla", "planning", "fidelity"}


def test_engines_of_other_versions_are_not_compared(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    engines = {"tensorrt-rtx": EngineSet(files={"planning": "planning.tensorrt-rtx.plan"}, built_with={"tensorrt-rtx": "0.1"})}
    refuse_unfair(opened, ["onnxruntime", "pytorch"])
    with pytest.raises(StaleBundleError, match=r"the comparison would not be fair: tensorrt-rtx was 0\.1 and is"):
        refuse_unfair(dataclasses.replace(opened, manifest=dataclasses.replace(opened.manifest, engines=engines)), ["tensorrt-rtx"])


def test_a_bundle_without_graphs_is_refused(bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "discarded"))
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    manifest["files"] = {name: file for name, file in manifest["files"].items() if name != TRACE}
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    (folder / TRACE).unlink()
    with pytest.raises(StaleBundleError, match="holds no graphs to count and extend; build it again without --discard-graphs"):
        prepare(Plan(folder))


@pytest.mark.parametrize("setting", [Setting(TGATE, "onnxruntime", 1), Setting(EAGER)], ids=["engines", "diffusers"])
def test_memory_is_that_of_a_process_of_its_own(bundle: Path, setting: Setting) -> None:
    opened = Bundle.open(bundle)
    found = peak_memory(Studio(opened, torch.device("cpu")), setting, Drawing(("a red circle",), steps=4).of(opened))
    assert found.keys() == {"host", "gpu"}
    assert 50e6 < found["host"] < 5e9, "PyTorch and a tiny model"
    assert (found["gpu"] > 0) == torch.cuda.is_available()


def test_pictures_are_those_of_a_loaded_pipeline_whatever_is_timed_and_kept(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    drawing = Drawing(("a red fox", "two birds"), steps=4, scheduler="ddim", seed=5).of(opened)
    expected = draw(prepare_pipeline(tgate_trt.load(opened, backend="pytorch", gate_step=2), "ddim"), drawing, output_type="pt")
    settings = [Setting(TGATE, "pytorch", 0.5), Setting(TGATE, "pytorch", 0.5, "positive"), Setting(EAGER)]
    for keeps_engines in (True, False):
        with Studio(opened, torch.device("cpu"), "ddim", keeps_engines=keeps_engines) as studio:
            drawn = []
            for setting in [*settings, settings[0]]:
                contender, watch = studio.contender(setting), Stopwatch()
                contender.warm_up(drawing)
                drawn.append(contender.draw(drawing, watch, output_type="pt"))
                assert watch.calls["planning step"] + watch.calls["fidelity step"] == 4
                assert watch.calls["hand-off"] == (1 if setting.backend else 0)
            assert torch.equal(drawn[0], expected) and torch.equal(drawn[3], expected)
            assert not torch.equal(drawn[1], expected) and not torch.equal(drawn[2], expected)


def test_whole_gates_stand_beside_vanilla_in_fewer_steps(run: Run, bundle: Path, tmp_path: Path) -> None:
    """Graphs that a gate needs are added; work is that of the row, and the figure has a point for each."""
    gates = ("2,after=positive,forecast=2", "none,deep=2", "drop=0.5")
    done = run(
        *(app, "run", bundle, *(part for gate in gates for part in ("--gate", gate)), "--fewer-steps", "3", "--steps", "5"),
        *("--rounds", "1", "--backend", "onnxruntime", "--quality", "--samples", "2", "--scheduler", "ddim", "--no-memory"),
        *("--json", tmp_path / "a.json", "--plot", tmp_path / "a.png", "--markdown", tmp_path / "a.md"),
    )
    assert done.exit_code == 0, done.output
    results = files.read(tmp_path / "a.json")["results"]
    settings = results["settings"]
    assert list(settings) == ["vanilla", gates[0], gates[1], "drop=0.5", "vanilla in 3 steps"]
    assert settings["vanilla in 3 steps"]["bound"]["linear"] == pytest.approx(3 / 5)
    assert settings["drop=0.5"]["bound"]["linear"] == pytest.approx((3 + 2 / 2) / 5)
    assert {name: settings[gates[0]]["calls"][name] for name in ("planning step", "fidelity step", "forecast", "hand-off")} == {
        "planning step": 2,
        "fidelity step": 2,
        "forecast": 1,
        "hand-off": 1,
    }
    assert 0.4 < settings[gates[1]]["bound"]["linear"] < 0.8
    assert results["quality"][gates[1]]["likeness"]["identical"] == 0
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert set(Bundle.open(bundle).manifest.graphs) >= {"keep-deep0", "reuse-deep0"}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--fewer-steps", "a"), "--fewer-steps takes numbers of steps with commas, such as 12,15; got 'a'"),
        (("--fewer-steps", "8,0"), "such as 12,15; got '0'"),
        (("--gate", "2,forecast=1"), "forecast=1 is impossible"),
        (("--gate", "30"), "gate_step=30 is more than the 25 steps of this run"),
    ],
)
def test_rows_that_cannot_be_are_one_sentence(arguments: tuple[str, ...], reason: str, error_of: ErrorOf, bundle: Path) -> None:
    assert reason in error_of(app, "run", bundle, *arguments, "--no-memory")


def test_what_compilers_say_needs_no_gpu(run: Run, bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = run(app, "kernels", bundle, "--rounds", "1", "--json", tmp_path / "kernels.json")
    assert done.exit_code == 0, done.output
    results = files.read(tmp_path / "kernels.json")["results"]
    assert {row["spilled_bytes"] for row in results["resources"]} == {0}
    assert results["fusion"]["ratio"]["median"] > 0


def test_steps_are_timed_beside_the_vanilla_one(run: Run, bundle: Path, tmp_path: Path) -> None:
    done = run(
        *(app, "steps", bundle, "--backend", "onnxruntime,pytorch", "--rounds", "2"),
        *("--json", tmp_path / "a.json", "--markdown", tmp_path / "a.md"),
    )
    assert done.exit_code == 0, done.output
    results = files.read(tmp_path / "a.json")["results"]
    assert list(results) == ["onnxruntime", "pytorch"]
    for found in results.values():
        assert {graph: row["rows"] for graph, row in found.items()} == {"vanilla": 2, "planning": 2, "fidelity": 1}
        assert found["vanilla"]["ratio"]["samples"] == [1, 1]
        assert found["fidelity"]["bound"] < 0.5 < found["planning"]["bound"] == 1
    assert "| pytorch | fidelity | 1 |" in (tmp_path / "a.md").read_text(encoding="utf-8")


def test_mistakes_are_one_sentence(error_of: ErrorOf, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "there is no such folder" in error_of(app, "run", "nothing")
    assert "a figure is a file of .png, .svg, .pdf" in error_of(app, "run", bundle, "--plot", "a.gif")
    assert f"{tmp_path} is a folder" in error_of(app, "run", bundle, "--json", tmp_path)
    assert "cannot write to /proc/nowhere" in error_of(app, "growth", "--plot", "/proc/nowhere/a.png")
    assert "gate_step=9 is more than the 4 steps" in error_of(app, "run", bundle, "--gate-step", "9", "--steps", "4")
    assert "--after-gate takes negative, positive, positive-mean, fading, got 'x'" in error_of(app, "run", bundle, "--after-gate", "x")
    assert "--rounds must be at least 1, got 0" in error_of(app, "run", bundle, "--rounds", "0")
    assert "there is no backend 'abacus'" in error_of(app, "run", bundle, "--backend", "abacus")
    assert "there is no scheduler 'x'" in error_of(app, "run", bundle, "--scheduler", "x")
    assert "got 'nothing'" in error_of(app, "macs", "nothing")
    assert "got 'nothing'" in error_of(app, "build", "nothing")
    assert "there is no such folder" in error_of(app, "kernels", "nothing")


def test_spacings_follow_a_noise_level(run: Run, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model, under the name of the one whose pictures are read."""
    folder = Path(shutil.copytree(bundle, tmp_path / "shapes"))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["model"]["name"], manifest["gate_step"] = "shapes", 0.4
    manifest["gate_noise"] = level_of_gate(read_scheduler(folder / "pipeline"), 10, 0.4)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    short = (
        Spacing("leading", 10),
        Spacing("Karras", 10, "euler", {"use_karras_sigmas": True}),
        Spacing("image to image", 10, strength=0.5, start="another colour"),
    )
    monkeypatch.setattr(spacings, "SPACINGS", short)
    done = run(app, "spacings", folder, "--samples", 3, "--json", tmp_path / "a.json", "--markdown", tmp_path / "a.md")
    assert done.exit_code == 0, done.output
    record = files.read(tmp_path / "a.json")
    noise = f"noise:{manifest['gate_noise']:g}"
    assert record["settings"]["gates"] == ["none", noise, 0.4]
    steps = [[(gate["steps"], gate["planning_steps"]) for gate in row["gates"]] for row in record["results"]]
    assert steps[0] == [(10, 10), (10, 4), (10, 4)]
    assert steps[1][1][1] != 4 == steps[1][2][1], "Karras spacing reaches the level at another step"
    assert steps[2] == [(5, 5), (5, 1), (5, 2)], "image to image begins with less noise"
    assert all(gate["right"]["total"] == 3 for row in record["results"] for gate in row["gates"])
    assert f"| g of {noise} | right with {noise} |" in (tmp_path / "a.md").read_text(encoding="utf-8")


def test_only_the_demo_models_pictures_can_be_read(error_of: ErrorOf, bundle: Path) -> None:
    assert "spacings are judged by the captions of the model 'shapes', got 'tiny-sd'" in error_of(app, "spacings", bundle)


@pytest.mark.parametrize(
    "arguments",
    [(), ("sd15",), ("run",), ("build", "sd15", "sd21"), ("macs", "--plot", "a.png"), ("probe", "shapes"), ("kernels", "--rounds", "0")],
)
def test_wrong_usage_ends_with_2(run: Run, arguments: tuple[str, ...]) -> None:
    assert run(app, *arguments).exit_code == 2


@pytest.mark.parametrize("command", ["run", "spacings", "macs", "growth", "build", "kernels", "probe"])
def test_each_command_has_a_help_of_its_own(run: Run, command: str) -> None:
    done = run(app, command, "--help")
    assert done.exit_code == 0
    assert f"For example: tgate-bench {command}" in done.output
    assert ("--gate-step" in done.output) == (command == "run")
    assert ("--compute-capability" in done.output) == (command == "build")
    assert ("--plot" in done.output) == (command in ("run", "growth"))


def test_a_foreign_file_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.json is no record"):
        files.read(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"schema": 1}', encoding="utf-8")
    with pytest.raises(InputError, match="has schema 1, this version reads 3"):
        files.read(tmp_path / "a.json")


def test_growth_goes_on_from_its_own_file_alone(error_of: ErrorOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps({"schema": 2, "what": "growth"}), encoding="utf-8")
    assert "a.json has schema 2, this version reads 3" in error_of(app, "growth", "--json", "a.json")
    (tmp_path / "a.json").write_text(json.dumps({"schema": files.SCHEMA, "what": "macs"}), encoding="utf-8")
    assert "a.json holds results of macs; choose another --json" in error_of(app, "growth", "--json", "a.json")


@pytest.mark.parametrize(
    ("own", "wanted", "used"), [("PNDM", None, "dpm++"), ("LCM", None, None), ("LCM", "ddim", "ddim"), ("PNDM", "own", None)]
)
def test_all_settings_have_one_scheduler(own: str, wanted: str | None, used: str | None) -> None:
    assert scheduler_for(f"{own}Scheduler", wanted) == used


def test_a_noise_level_is_measured_as_its_number_of_steps(bundle: Path) -> None:
    opened, drawing = Bundle.open(bundle), Drawing(("a",), steps=10, scheduler="ddim")
    level = level_of_gate(read_scheduler(opened.pipeline), 10, 3)
    assert gates_of(opened, drawing, (f"noise:{level}", "0.4", "noise:1e9")) == (3, 0.4, 1)
    assert gates_of(opened, drawing, ()) == (0.4,)


def test_a_measurement_draws_the_plans_pictures(bundle: Path) -> None:
    measurement = prepare(Plan(bundle, Drawing(("a", "b"), steps=4, seed=7), images=2, rounds=2))
    drawing = Drawing(("a", "b", "a", "b"), steps=4, seed=7, scheduler="dpm++")
    assert measurement.drawing == drawing.of(measurement.studio.bundle)
    assert [batch.seed for batch in measurement.drawing.batches(2)] == [7, 9]
    assert conditions_of(measurement)["prompts"] == ["a", "b"]

"""Each claim of the README has a command and a test in docs/claims.md, and each figure of README and docs is that of its record."""

from __future__ import annotations

import ast
import functools
import itertools
import json
import re
import shlex
import statistics
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest

from tgate_trt.gate.after_gate import DEFAULT_AFTER_GATE

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
NO_CLAIMS = "## More"
"""The README's part that holds links alone."""

UNITS = {"ms": 1e3, "s": 1.0, "%": 100.0, "GB": 1e-9, "MB": 1e-6, "M": 1e-6, "": 1.0}
"""What a value of a record, in seconds, bytes or shares, is multiplied by to be shown."""

WITH_UNIT = re.compile(r"\d[\d,]*(?:\.\d+)?\s(?:ms|s|%|GB|MB)(?!\w)")
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?!\w)")


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@functools.cache
def record(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def at(name: str, place: str) -> float:
    """The number at a place of a record, such as ``results / settings / vanilla / seconds / median``."""
    value = record(name)
    for key in place.split(" / "):
        value = value[int(key) if isinstance(value, list) else key]
    return float(value)


def shown_as(figure: str, value: float) -> str:
    """A value as a figure shows one: with its unit and its number of decimals."""
    number, _, unit = figure.partition(" ")
    decimals = len(number.partition(".")[2])
    return f"{value * UNITS[unit]:,.{decimals}f} {unit}".strip()


def rows_of(text: str, first_column: str) -> list[list[str]]:
    """The rows of the table whose first column has a title; its heading first."""
    rows: list[list[str]] = []
    for line in text.splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if rows or cells[0] == first_column:
                rows.append(cells)
        elif rows:
            break
    assert rows, f"there is no table {first_column!r}"
    return [rows[0], *rows[2:]]


def plain(text: str) -> str:
    """Markdown without links, emphasis, code marks and line breaks."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return " ".join(re.sub(r"[*`]", "", text).split())


def sentences_of_readme() -> list[str]:
    """Every sentence of the README's prose, in order."""
    text = re.sub(r"^```.*?^```", "", page("README.md"), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^!\[.*$|^\|.*$|^#+ .*$", "", text.partition(NO_CLAIMS)[0], flags=re.MULTILINE)
    text = re.sub(r"^> ?(- )?", lambda quote: "\n\n" if quote.group(1) else "", text, flags=re.MULTILINE)
    paragraphs = filter(None, (plain(paragraph) for paragraph in re.split(r"\n\s*\n", text)))
    return [sentence for paragraph in paragraphs for sentence in re.split(r"(?<=[.!?:])\s+(?=[A-Z])", paragraph)]


class Claim(NamedTuple):
    """A row of the first table of docs/claims.md."""

    sentence: str
    command: str
    tests: str


class Figure(NamedTuple):
    """A row of the second."""

    where: str
    column: str
    shown: str
    record: str
    place: str


CLAIMS = [Claim(plain(sentence), command.strip("`"), tests) for sentence, command, tests in rows_of(page("docs/claims.md"), "claim")[1:]]
FIGURES = [Figure(*cells[:4], cells[4].strip("`")) for cells in rows_of(page("docs/claims.md"), "row or sentence")[1:]]


def test_sentences_are_found() -> None:
    assert len(sentences_of_readme()) > 15
    assert "Status: the PyTorch engine has run on a GPU, and no TensorRT engine has." in sentences_of_readme()


def test_every_sentence_is_a_claim_and_every_claim_a_sentence() -> None:
    assert [claim.sentence for claim in CLAIMS] == sentences_of_readme()


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.sentence[:40])
def test_every_claim_has_a_test_that_exists(claim: Claim) -> None:
    names = re.findall(r"`([^`]+)`", claim.tests)
    assert names
    for name in names:
        path, _, function = name.partition("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.sentence[:40])
def test_every_claim_has_a_command_that_exists(claim: Claim) -> None:
    name, *arguments = shlex.split(claim.command)
    if name == "make":
        assert re.search(rf"^{arguments[0]}:", page("Makefile"), re.MULTILINE)
    else:
        assert any(line.strip().startswith(claim.command.partition(" ")[0]) for line in page("README.md").splitlines())


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: f"{figure.where[:30]}, {figure.column}, {figure.shown}")
def test_every_figure_is_that_of_its_record(figure: Figure) -> None:
    assert shown_as(figure.shown, at(figure.record, figure.place)) == figure.shown


def readme_cells() -> Iterator[tuple[str, str, str]]:
    """Row, column and text of every cell with a figure in the README's table."""
    heading, *rows = rows_of(page("README.md"), "25 steps, 2 CPU cores")
    for label, *cells in rows:
        yield from ((label, column, cell) for column, cell in zip(heading[1:-1], cells[:-1], strict=True) if NUMBER.search(cell))


def test_every_figure_of_the_readme_has_a_row() -> None:
    known: dict[tuple[str, str], list[str]] = {}
    for figure in FIGURES:
        known.setdefault((figure.where, figure.column), []).append(figure.shown)
    cells = {(label, column): cell for label, column, cell in readme_cells()}
    sentences = {(sentence, "–"): sentence for sentence in sentences_of_readme() if WITH_UNIT.search(sentence)}
    for (label, column), cell in cells.items():
        assert [re.sub(r"[^\d.,]", "", shown) for shown in known.pop((label, column))] == NUMBER.findall(cell)
    for sentence, _ in sentences:
        (where,) = [key for key in known if key[1] == "–" and sentence.startswith(key[0])]
        assert known.pop(where) == WITH_UNIT.findall(sentence)
    assert not known, "each row is of a figure that the README shows"


def test_the_table_is_short() -> None:
    heading, *rows = rows_of(page("README.md"), "25 steps, 2 CPU cores")
    assert len(rows) <= 5
    assert all(row[-1].startswith("`make bench") for row in rows)
    assert heading[-1] == "command"


def test_the_demo_draws_what_its_caption_names() -> None:
    from tgate_trt.models.architectures import ARCHITECTURES

    done = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--gate-step none --gate-step 10 --gate-step 5 " in done.stdout
    assert "--steps" not in done.stdout
    assert ARCHITECTURES["shapes"].steps == 25


def test_the_only_engine_that_a_gpu_ran_is_pytorchs() -> None:
    """A record of another engine on a GPU makes the status in the README untrue: mend that with the record."""
    on_gpu = [path.name for path in RESULTS.glob("*.json") if record(path.name).get("machine", {}).get("gpu") is not None]
    assert sorted(on_gpu) == ["gpu-sd15-batch4.json", "gpu-sd15.json", "gpu-sdxl.json", "gpu-steps-sd15.json"]
    for found in map(record, on_gpu):
        assert "H100" in found["machine"]["gpu"]
        if "settings" in found["results"]:
            assert {setting["setting"]["backend"] for setting in found["results"]["settings"].values()} <= {"pytorch", None}


@pytest.mark.parametrize(("column", "name"), [(1, "gpu-sdxl.json"), (3, "gpu-sd15.json")])
def test_the_table_of_a_gpu_is_that_of_its_records(column: int, name: str) -> None:
    settings = record(name)["results"]["settings"]
    shown = {row[0].strip("`"): row[column : column + 2] for row in rows_of(page("docs/performance.md"), "way")[1:]}
    for label, setting in settings.items():
        time, share = shown[label.removesuffix(", pytorch")]
        assert shown_as(time, setting["seconds"]["median"]) == time
        assert share == f"{setting['denoising_ratio']['median']:.3f}"


def test_ratios_of_records_are_medians_within_a_round() -> None:
    settings = record("bench-shapes.json")["results"]["settings"]
    for setting in settings.values():
        times, vanilla = setting["seconds"]["samples"], settings[setting["baseline"]]["seconds"]["samples"]
        ratios = [one / other for one, other in zip(times, vanilla, strict=True)]
        assert statistics.median(ratios) == pytest.approx(setting["ratio"]["median"])
    gated = settings["T-GATE g=10, onnxruntime"]
    assert abs(gated["ratio"]["median"] - gated["seconds"]["median"] / settings[gated["baseline"]]["seconds"]["median"]) > 0.01


def test_compiled_diffusers_is_faster_than_our_gated_pytorch_engine() -> None:
    place = "results / settings / {} / seconds / median"
    compiled, ours = (at("bench-shapes.json", place.format(name)) for name in ("torch.compile", "T-GATE g=10, pytorch"))
    assert compiled < ours


def test_records_with_uncommitted_changes_are_named() -> None:
    named = {}
    for records, commit, changed in rows_of(page("docs/performance.md"), "record")[1:]:
        for name in re.findall(r"results/([\w-]+\.json)", records):
            named[name] = (commit.strip("`"), "yes" in changed)
    for path in RESULTS.glob("*.json"):
        commit = record(path.name).get("commit")
        if commit is not None:
            assert named.pop(path.name) == (commit[:7], commit.endswith("with changes")), path.name
    assert not named
    for figure in FIGURES:
        changed = record(figure.record)["commit"].endswith("with changes")
        assert changed == (figure.record == SD15), "docs/performance.md has it so of the record of SD 1.5"


def test_only_forecasts_without_a_gate_beat_vanilla_in_fewer_steps() -> None:
    """Beyond the intervals of the distances, at the same share of vanilla's time, between whose points lines are drawn."""
    settings, quality = (record("rows-shapes.json")["results"][name] for name in ("settings", "quality"))
    points = {
        name: (row["denoising_ratio"]["median"], quality[name]["likeness"]["perceptual_distance"])
        for name, row in settings.items()
        if name != "vanilla"
    }
    fewer = sorted((share, distance["low"]) for name, (share, distance) in points.items() if settings[name]["setting"]["steps"])

    def of_fewer_steps(share: float) -> float:
        """The distance of vanilla in so much of its time."""
        return float(numpy.interp(share, [at for at, _ in fewer], [low for _, low in fewer]))

    rows = {name: point for name, point in points.items() if settings[name]["setting"]["text"]}
    assert len(rows) > 15
    assert [name for name, (share, distance) in rows.items() if distance["high"] < of_fewer_steps(share)] == ["none,forecast=2"]


def test_the_table_of_rows_is_that_of_its_record() -> None:
    settings, quality = (record("rows-shapes.json")["results"][name] for name in ("settings", "quality"))
    shown = {cells[0].strip("`"): cells[1:] for cells in rows_of(page("docs/rows.md"), "row")[1:]}
    assert list(shown) == list(settings)
    for name, (time, work, right, distance) in shown.items():
        overall, likeness = quality[name]["semantics"]["overall"], quality[name]["likeness"]
        low, high = (f"{100 * end:.0f}" for end in overall["interval"])
        assert time == f"{settings[name]['denoising_ratio']['median']:.2f}" and work == f"{settings[name]['bound']['linear']:.2f}"
        assert right == f"{100 * overall['fraction']:.0f} % ({low}–{high})"
        assert distance == ("–" if likeness is None else f"{likeness['perceptual_distance']['value']:.3f}")


def _denoising(name: str, setting: str) -> float:
    ratio: float = record(name)["results"]["settings"][setting]["denoising_ratio"]["median"]
    return ratio


def test_the_papers_finding_is_in_the_record() -> None:
    """What the README and the page on it have of the temporal analysis, which is more than its figures."""
    results = record("analysis-shapes.json")["results"]
    assert _right("text first", 10) >= 0.9 and _right("text last", 10) <= 0.1
    change = results["convergence"]["cross_attention"]["all layers"]["absolute"]["mean"]  # from step 1 on
    thirds = _thirds(change)
    assert thirds[0] > 2 * thirds[1] > 4 * thirds[2]
    assert change[6] == max(change[2:]) > 1.3 * change[2], "the second peak"
    assert max(change[13:]) < 0.2 * max(change) < min(change[:12]), "flat from step 14 on"
    distance = results["gate"]["distance"]["mean"]
    assert distance == sorted(distance, reverse=True)
    assert max(one - other for one, other in itertools.pairwise(distance[2:])) < 0.03, "without a jump"


def test_the_pictures_of_the_performance_page_are_those_of_the_readme() -> None:
    heading = "one picture, p50 (median ratio to vanilla)"
    theirs = [[NUMBER.findall(cell) for cell in cells[1:]] for cells in rows_of(page("docs/performance.md"), heading)[1:]]
    ours = [[NUMBER.findall(cell) for cell in cells[1:-1]] for cells in rows_of(page("README.md"), "25 steps, 2 CPU cores")[1:5]]
    assert theirs == ours


@pytest.mark.parametrize(
    ("first_column", "name"),
    [
        ("demo model, 102 held-out captions, every attribute right", "after-gate-shapes.json"),
        ("the same at guidance 5", "after-gate-shapes-guidance-5.json"),
    ],
)
def test_the_tables_of_modes_are_those_of_their_records(first_column: str, name: str) -> None:
    quality = record(name)["results"]["quality"]
    heading, *rows = rows_of(page("docs/after-the-gate.md"), first_column)
    assert len(rows) == 4 and len(heading) == 6
    for label, *cells in rows:
        mode = label.strip("`")
        kind = {"cfg-drop": "cfg-drop {}", "negative": "T-GATE {}"}.get(mode, f"T-GATE {{}} {mode}")
        for gate, cell in zip(heading[1:], cells, strict=True):
            overall = quality[kind.format(gate.replace(" ", ""))]["semantics"]["overall"]
            assert cell == _with_interval(overall)
            assert overall["total"] == 102


def _with_interval(share: Any) -> str:
    low, high = share["interval"]
    return f"{100 * share['fraction']:.0f} % ({100 * low:.0f}–{100 * high:.0f})"


def test_no_mode_is_better_than_the_published_one_beyond_its_interval() -> None:
    """And fading is nearest to vanilla, as the page on the modes has it; so the default stays."""
    assert DEFAULT_AFTER_GATE == "negative"
    for name in ("after-gate-shapes.json", "after-gate-shapes-guidance-5.json"):
        quality = record(name)["results"]["quality"]
        for gate in (3, 5, 7, 10, 15):
            published, *others = (quality[f"T-GATE g={gate}{mode}"] for mode in ("", " positive", " fading"))
            for other in others:
                assert other["semantics"]["overall"]["interval"][0] <= published["semantics"]["overall"]["interval"][1]
            if gate > 3 or name == "after-gate-shapes.json":
                for measure in ("psnr", "ssim"):
                    values = [one["likeness"][measure]["value"] for one in (published, *others)]
                    assert values.index(max(values)) == 2


def test_the_table_of_spacings_is_that_of_its_record() -> None:
    rows = record("spacings.json")["results"]
    _, *shown = rows_of(page("docs/where-meaning-settles.md"), "spacing")
    assert len(shown) == len(rows)
    for cells, row in zip(shown, rows, strict=True):
        vanilla, noise, fraction = row["gates"]
        assert cells[0] == row["label"] and cells[1] == str(vanilla["steps"])
        assert cells[2:] == [
            _with_interval(vanilla["right"]),
            *(text for gate in (noise, fraction) for text in (str(gate["planning_steps"]), _with_interval(gate["right"]))),
        ]


def test_the_table_of_growth_is_that_of_its_record() -> None:
    models = record("growth.json")["results"]["models"]
    heading, *rows = rows_of(page("docs/performance.md"), "")
    assert heading[3:6] == ["build", "its peak memory", "bundle on disk"]
    for model, row in zip(models.values(), rows, strict=True):
        build, steps = model["build"], model["steps"]
        vanilla, planning, fidelity = (steps[name]["seconds"]["median"] for name in ("vanilla", "planning", "fidelity"))
        values = [[model["parameters"]], [], [build["seconds"]], [build["memory"]["peak_anonymous"]], [build["disk"]["bundle"]]]
        values += [[vanilla], [planning, planning / vanilla], [fidelity, fidelity / vanilla]]
        values += [[max(step["memory"]["peak_anonymous"] for step in steps.values())]]
        for cell, expected in zip(row[1:], values, strict=True):
            shown = re.findall(r"\d[\d,]*(?:\.\d+)?(?: (?:ms|s|GB|M)\b)?", cell)
            if expected:
                assert shown == [shown_as(one, value) for one, value in zip(shown, expected, strict=True)], row[0]


def test_the_table_of_verification_is_that_of_its_record() -> None:
    for model, graphs in record("verification.json").items():
        errors = [max(check["error"] for check in graphs["verification"][graph]["checks"]) for graph in ("planning", "fidelity")]
        assert f"| `{model}` | {errors[0]:.1e} | {errors[1]:.1e} |" in page("docs/performance.md")


SECONDS = "results / settings / {} / seconds / median"
SHAPES, SD15, MODES = "bench-shapes.json", "bench-sd15.json", "after-gate-shapes.json"


def _seconds(name: str, setting: str) -> float:
    return at(name, SECONDS.format(setting))


def _quotient(name: str, one: str, other: str) -> float:
    return _seconds(name, one) / _seconds(name, other)


def _of_bound(setting: str) -> float:
    """How much of what the bound allows SD 1.5's denoising loop reaches."""
    place = f"results / settings / {setting} / "
    return at(SD15, f"{place}bound / linear") / at(SD15, f"{place}denoising_ratio / median")


def _right(part: str, index: int) -> float:
    """Share of the pictures that are right in a part of the temporal analysis, after so many steps of text or planning."""
    found = record("analysis-shapes.json")["results"]
    curve = found["gate"] if part == "gate" else found["null_text"][part]
    return float(curve["accuracy"][curve["at"].index(index)]["fraction"])


def _thirds(change: list[float]) -> list[float]:
    """The means of 24 changes over steps 1 to 8, 9 to 16 and 17 to 24."""
    return [statistics.mean(change[start : start + 8]) for start in (0, 8, 16)]


def _falls() -> tuple[float, float]:
    """The mean change of cross-attention over steps 1 to 8, over that of the two thirds after it."""
    change = record("analysis-shapes.json")["results"]["convergence"]["cross_attention"]["all layers"]["absolute"]["mean"]
    first, *later = _thirds(change)
    return first / later[0], first / later[1]


def _suggested(rule: str) -> tuple[float, float]:
    """The gate that a rule suggests, as a step and as a noise level."""
    found = record("analysis-shapes.json")["results"]["suggestion"][rule]
    return found["gate_step"], found["noise"]


def _modes(setting: str) -> float:
    return at(MODES, f"results / quality / {setting} / semantics / overall / fraction")


def _fusion() -> tuple[float, float, float]:
    ratio = record("kernels.json")["results"]["fusion"]["ratio"]
    return ratio["median"], ratio["p10"], ratio["p90"]


def _build(name: str) -> tuple[float, float, float]:
    results = record(f"build-sdxl-{name}.json")["results"]
    return results["seconds"], results["memory"]["peak_anonymous"] / 1e9, results["disk"].get("plans", 0) / 1e9


def _host_memory(setting: str) -> float:
    return at(SD15, f"results / settings / {setting} / memory / host") / 1e9


PROSE: list[tuple[str, str, Callable[[], tuple[float, ...]]]] = [
    (
        "performance",
        "our PyTorch engine with T-GATE is {:.2f} times",
        lambda: (_quotient(SHAPES, "official tgate g=10", "T-GATE g=10, pytorch"),),
    ),
    ("performance", "ONNX Runtime is {:.2f} times as fast", lambda: (_quotient(SD15, "official tgate g=10", "T-GATE g=10"),)),
    ("performance", "at g = 10, and {:.2f} times at g = 5", lambda: (_quotient(SD15, "official tgate g=5", "T-GATE g=5"),)),
    ("performance", "The VAE takes {:.1f} s", lambda: (at(SD15, "results / settings / T-GATE g=10 / parts / VAE / median"),)),
    ("performance", "reaches {:.1f} % of its bound at g = 10", lambda: (100 * _of_bound("T-GATE g=10"),)),
    ("performance", "and {:.1f} % at g = 5", lambda: (100 * _of_bound("T-GATE g=5"),)),
    ("performance", "{:.2f} GB against {:.2f} GB", lambda: (_host_memory("T-GATE g=10"), _host_memory("vanilla"))),
    ("performance", "ratio at g = 10 was {:.3f}", lambda: (at(MODES, "results / settings / T-GATE g=10 / ratio / median"),)),
    (
        "performance",
        "median time is {:.2f} of vanilla's, and the median of the ratios is {:.2f}",
        lambda: (
            _quotient(SHAPES, "T-GATE g=10, onnxruntime", "vanilla, onnxruntime"),
            at(SHAPES, "results / settings / T-GATE g=10, onnxruntime / ratio / median"),
        ),
    ),
    ("performance", "| {0:.0f} s | {1:.2f} GB | none", lambda: _build("onnxruntime")),
    ("performance", "--weights baked | {0:.0f} s | {1:.2f} GB | {2:.2f} GB", lambda: _build("tensorrt-rtx-baked")),
    ("performance", "--weights shared | {0:.0f} s | {1:.2f} GB |", lambda: _build("tensorrt-rtx-shared")),
    ("where-meaning-settles", "the first 10 of 25 steps alone: {:.0f} % right", lambda: (100 * _right("text first", 10),)),
    ("where-meaning-settles", "the last 15 alone: {:.0f} %", lambda: (100 * _right("text last", 10),)),
    ("where-meaning-settles", "nothing significant is {} (noise:{:g})", lambda: _suggested("by_accuracy")),
    ("where-meaning-settles", "halved at step {} (noise:{:g})", lambda: _suggested("by_convergence")),
    (
        "where-meaning-settles",
        "draws {:.0f} % right at g = 5 and {:.0f} % at g = 10, vanilla {:.0f} %",
        lambda: tuple(100 * _right("gate", gate) for gate in (5, 10, 25)),
    ),
    ("where-meaning-settles", "is {:.1f} times that over steps 9 to 16, and {:.1f} times that over steps 17 to 24", _falls),
    ("limits", "fall from {:.0f} % to {:.0f} % at gate step 3", lambda: (100 * _modes("vanilla"), 100 * _modes("T-GATE g=3"))),
    (
        "performance",
        "| {:.1f} s | not measured | {:.1f} s | {:.1f} s |",
        lambda: tuple(_seconds(SD15, name) for name in ("diffusers", "official tgate g=10", "official tgate g=5")),
    ),
    (
        "performance",
        "| {0:.2f} s | {1:.0f} ms | {2:.2f} s | – |",
        lambda: (_seconds(SHAPES, "diffusers"), 1000.0 * _seconds(SHAPES, "torch.compile"), _seconds(SHAPES, "official tgate g=10")),
    ),
    (
        "limits",
        "({:.0f} ms against {:.0f} ms",
        lambda: tuple(1000.0 * _seconds(SHAPES, name) for name in ("torch.compile", "T-GATE g=10, pytorch")),
    ),
    (
        "rows",
        "the loop takes {:.2f} of vanilla's with 7,after=positive,forecast=2, {:.2f} with 5,after=positive,forecast=2 and {:.2f} with",
        lambda: tuple(
            _denoising("rows-times-shapes.json", row)
            for row in ("7,after=positive,forecast=2", "5,after=positive,forecast=2", "none,deep=3,forecast=3,unguided=1")
        ),
    ),
    (
        "rows",
        "its work: {:.2f} ({:.2f}) with 7,after=positive,forecast=2, {:.2f} ({:.2f}) with 5,after=positive,forecast=2, {:.2f} ({:.2f})",
        lambda: tuple(
            value
            for row in ("7,after=positive,forecast=2", "5,after=positive,forecast=2", "none,deep=3,forecast=3,unguided=1")
            for value in (_denoising("rows-sd15.json", row), record("rows-sd15.json")["results"]["settings"][row]["bound"]["linear"])
        ),
    ),
    (
        "rows",
        "{:.0f} % of the time, {:.0f} of {:.0f} held-out captions right",
        lambda: (
            100 * record("tuning-shapes.json")["results"]["measured"]["median"],
            record("tuning-shapes.json")["results"]["held_out"]["right"]["correct"],
            record("tuning-shapes.json")["results"]["held_out"]["right"]["total"],
        ),
    ),
    ("limits", "faster than both ({:.0f} ms)", lambda: (1000.0 * _seconds(SHAPES, "T-GATE g=10, onnxruntime"),)),
    ("limits", "{:.2f} GB against {:.2f} GB", lambda: (_host_memory("T-GATE g=10"), _host_memory("vanilla"))),
    ("limits", "a ratio of {:.2f}, {:.2f} to {:.2f}", _fusion),
]
"""Page, text and values of further figures in docs."""


@pytest.mark.parametrize(("name", "text", "values"), PROSE, ids=lambda value: value if isinstance(value, str) else "")
def test_figures_in_the_text_are_those_of_their_records(name: str, text: str, values: Callable[[], tuple[float, ...]]) -> None:
    assert text.format(*values()) in plain(page(f"docs/{name}.md"))


def test_counts_are_within_what_is_said_of_the_papers() -> None:
    rows = [row for model in record("macs.json")["results"] for row in model["pictures"] if row["published"] and row.get("is_met", True)]
    assert {model["model"] for model in record("macs.json")["results"]} == {"sd15", "sd21", "sdxl", "lcm-sdxl"}
    assert max(abs(row["deviation"]) for row in rows) < 0.0005
    assert "within 0.05 % of every figure" in plain(page("docs/performance.md"))


def test_files_and_functions_of_the_architecture_exist() -> None:
    found = 0
    for path, names in re.findall(r"`([\w/]+\.py): ([\w, ]+)`", page("docs/architecture.md").replace("\n", " ")):
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        targets = [target for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign) for target in _targets(node)]
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)} | set(targets)
        assert set(names.split(", ")) <= defined, f"{path}: {names}"
        found += 1
    assert found > 30


def _targets(node: ast.Assign | ast.AnnAssign) -> list[str]:
    """Names that an assignment gives values."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def test_the_costs_of_builds_are_those_of_their_records() -> None:
    records = record("build-models.json")["records"]
    for label, trace, cuts, whole, memory, bundle, weights in rows_of(
        page("docs/models.md").partition("## What a build costs")[2], "model"
    )[1:]:
        results = records[label.strip("`")]["results"]
        stages, disk = results["stages"], results["disk"]
        values = (
            (trace, stages["trace"]),
            (cuts, stages["planning graph"] + stages["fidelity graph"]),
            (whole, results["seconds"]),
            (memory, results["memory"]["peak_anonymous"]),
            (bundle, disk["bundle"]),
            (weights, disk["denoiser_weights"]),
        )
        for shown, value in values:
            assert shown_as(shown, value) == shown

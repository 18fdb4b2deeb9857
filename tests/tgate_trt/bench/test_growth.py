"""The cost of growth: what is measured, kept, skipped and shown. That a figure is good is never asserted."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tgate_trt import models
from tgate_trt.bench import growth
from tgate_trt.errors import InputError
from tgate_trt.record import environment


@pytest.fixture(scope="module")
def measured(tiny_sd_configs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[Path]]:
    """The file of a measurement of SD in small beside another model's, what it gave, and what it left of its bundles."""
    folder = tmp_path_factory.mktemp("growth")
    output = folder / "results" / "growth.json"
    output.parent.mkdir()
    output.write_text(json.dumps({"schema": growth.SCHEMA, "models": {"other": {"date": "kept"}}}), encoding="utf-8")
    (record,) = growth.measure([str(tiny_sd_configs)], output=output, folder=folder / "bundles")
    return output, record, list((folder / "bundles").iterdir())


@pytest.fixture
def record(measured: tuple[Path, dict[str, Any], list[Path]]) -> dict[str, Any]:
    """The measurement under two names, of a model and of one ten times as large."""
    small = measured[1]["models"]["tiny-sd"]
    return {"schema": growth.SCHEMA, "models": {"large": small | {"parameters": 10 * small["parameters"]}, "small": copy.deepcopy(small)}}


def test_build_steps_memory_and_disk_are_measured(measured: tuple[Path, dict[str, Any], list[Path]], tiny_sd_configs: Path) -> None:
    output, given, left = measured
    assert growth.read(output) == given
    assert given["models"]["other"] == {"date": "kept"}
    assert left == []
    found = given["models"]["tiny-sd"]
    source = models.resolve(tiny_sd_configs, random_weights=True)
    assert found["parameters"] == sum(parameter.numel() for parameter in source.denoiser_on_meta().parameters())
    assert 4 * found["parameters"] == found["build"]["disk"]["denoiser_weights"] < found["build"]["disk"]["bundle"]
    assert found["size"] == source.height == 64
    assert found["build"]["cpu_seconds"] > 0
    assert str(output.parent.parent / "bundles") not in output.read_text(encoding="utf-8")
    assert {"date", "machine", "versions", "commit"} <= found.keys()
    assert found["steps"].keys() == set(growth.GRAPHS)
    for graph, step in found["steps"].items():
        assert step["rows"] == (1 if graph == "fidelity" else 2)
        for clock in ("seconds", "cpu_seconds"):
            assert len(step[clock]["samples"]) >= growth.LEAST_CALLS
            assert min(step[clock]["samples"]) > 0
        assert sum(step["seconds"]["samples"]) >= growth.LEAST_SECONDS
        assert 0 < step["memory"]["peak_anonymous"] <= step["memory"]["peak_total"]
        assert step["load_average_before"] >= 0
    macs = {graph: step["macs"]["linear"] for graph, step in found["steps"].items()}
    assert 0 < 2 * macs["fidelity"] < macs["vanilla"] == macs["planning"]


def test_what_is_there_is_not_measured_again(
    measured: tuple[Path, dict[str, Any], list[Path]], tiny_sd_configs: Path, tmp_path: Path
) -> None:
    given = copy.deepcopy(measured[1])
    given["models"]["tiny-sd"]["commit"] = environment()["commit"]  # which may have changed since it was measured
    output = tmp_path / "growth.json"
    output.write_text(json.dumps(given), encoding="utf-8")
    assert list(growth.measure([str(tiny_sd_configs)], output=output, folder=tmp_path / "bundles")) == [given]
    assert not (tmp_path / "bundles").exists()


@pytest.mark.parametrize(
    "change", [{"commit": "another"}, {"versions": {"torch": "1.0"}}, {"size": 128}, {"threads": 1}, {"machine": {"cpu": "another"}}]
)
def test_other_code_machine_or_question_is_another_measurement(
    measured: tuple[Path, dict[str, Any], list[Path]], change: dict[str, Any]
) -> None:
    found = measured[1]["models"]["tiny-sd"]
    assert growth.is_same(found, copy.deepcopy(found))
    assert not growth.is_same(found, found | change)


def test_models_are_shown_from_small_to_large(record: dict[str, Any], tmp_path: Path) -> None:
    rows = growth.rows(record)
    assert [row[0] for row in rows] == ["small", "large"]
    assert all(len(row) == len(growth.HEADER) for row in rows)
    found = record["models"]["small"]
    median = found["steps"]["vanilla"]["seconds"]["median"]
    shown = rows[0][growth.HEADER.index("vanilla step")]
    unit = {"ms": 1e-3, "s": 1.0}[shown.split()[1]]
    assert float(shown.split()[0]) * unit == pytest.approx(median, rel=6e-3)
    assert f"{record['models']['large']['parameters'] / 1e6:,.1f} M" == rows[1][1]
    assert any(found["machine"]["cpu"] in note for note in growth.notes(record))
    growth.plot(record, tmp_path / "growth.png")
    with Image.open(tmp_path / "growth.png") as picture:
        assert picture.width > 2 * picture.height
        assert len(set(picture.convert("L").resize((600, 200)).getdata())) > 10


def test_nothing_is_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to draw"):
        growth.plot({"schema": growth.SCHEMA, "models": {}}, tmp_path / "growth.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["[]", "not JSON", '{"schema": 0, "models": {}}', '{"schema": 1}'])
def test_a_foreign_file_is_left_alone(text: str, tmp_path: Path) -> None:
    output = tmp_path / "growth.json"
    output.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"growth\.json holds no measurements of growth"):
        next(growth.measure(["shapes"], output=output, folder=tmp_path / "bundles"))
    assert output.read_text(encoding="utf-8") == text

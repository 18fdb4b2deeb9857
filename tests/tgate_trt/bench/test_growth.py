"""The cost of growth: what is measured, kept, skipped and shown. That a figure is good is never asserted."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tgate_trt.analysis.record import environment, record_of
from tgate_trt.bench import growth, plot, report
from tgate_trt.errors import InputError
from tgate_trt.models.resolve import resolve


@pytest.fixture(scope="module")
def measured(tiny_sd_configs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of the bundles of a measurement of SD in small beside another model's, and what it gave."""
    folder = tmp_path_factory.mktemp("growth") / "bundles"
    (record,) = growth.measure([str(tiny_sd_configs)], known={"models": {"other": {"date": "kept"}}}, folder=folder)
    return folder, record


@pytest.fixture
def record(measured: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    """The record of the measurement under two names, of a model and of one ten times as large."""
    small = measured[1]["models"]["tiny-sd"]
    models = {"large": small | {"parameters": 10 * small["parameters"]}, "small": copy.deepcopy(small)}
    return record_of("growth", "tgate-bench growth", environment(), {}, {"models": models})


def test_build_steps_memory_and_disk_are_measured(measured: tuple[Path, dict[str, Any]], tiny_sd_configs: Path) -> None:
    folder, given = measured
    assert given["models"]["other"] == {"date": "kept"}
    assert list(folder.iterdir()) == []
    found = given["models"]["tiny-sd"]
    source = resolve(tiny_sd_configs, random_weights=True)
    assert found["parameters"] == sum(parameter.numel() for parameter in source.denoiser_on_meta().parameters())
    assert 4 * found["parameters"] == found["build"]["disk"]["denoiser_weights"] < found["build"]["disk"]["bundle"]
    assert found["size"] == source.height == 64
    assert found["build"]["cpu_seconds"] > 0
    assert str(folder) not in json.dumps(given)
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


def test_what_is_there_is_not_measured_again(measured: tuple[Path, dict[str, Any]], tiny_sd_configs: Path, tmp_path: Path) -> None:
    given = copy.deepcopy(measured[1])
    given["models"]["tiny-sd"]["commit"] = environment()["commit"]  # which may have changed since it was measured
    assert list(growth.measure([str(tiny_sd_configs)], known=given, folder=tmp_path / "bundles")) == [given]
    assert not (tmp_path / "bundles").exists()


@pytest.mark.parametrize(
    "change", [{"commit": "another"}, {"versions": {"torch": "1.0"}}, {"size": 128}, {"threads": 1}, {"machine": {"cpu": "another"}}]
)
def test_other_code_machine_or_question_is_another_measurement(measured: tuple[Path, dict[str, Any]], change: dict[str, Any]) -> None:
    found = measured[1]["models"]["tiny-sd"]
    assert growth.is_same(found, copy.deepcopy(found))
    assert not growth.is_same(found, found | change)


def test_models_are_shown_from_small_to_large(record: dict[str, Any], tmp_path: Path) -> None:
    (table,) = report.tables_of(record)
    assert [row[0] for row in table.rows] == ["small", "large"]
    assert all(len(row) == len(table.header) for row in table.rows)
    found = record["results"]["models"]
    median = found["small"]["steps"]["vanilla"]["seconds"]["median"]
    shown = table.rows[0][table.header.index("vanilla step")]
    unit = {"ms": 1e-3, "s": 1.0}[shown.split()[1]]
    assert float(shown.split()[0]) * unit == pytest.approx(median, rel=6e-3)
    assert f"{found['large']['parameters'] / 1e6:,.1f} M" == table.rows[1][1]
    assert any(found["small"]["machine"]["cpu"] in note for note in table.notes)
    plot.save(record, tmp_path / "growth.png")
    with Image.open(tmp_path / "growth.png") as picture:
        assert picture.width > 2 * picture.height
        assert len(set(picture.convert("L").resize((600, 200)).getdata())) > 10


def test_nothing_is_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to draw"):
        plot.save(record_of("growth", "tgate-bench growth", environment(), {}, {"models": {}}), tmp_path / "growth.png")
    assert list(tmp_path.iterdir()) == []

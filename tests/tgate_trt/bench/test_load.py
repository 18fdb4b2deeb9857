"""`tgate-bench load` from end to end, as short as it can be. That a figure is good is never asserted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from tgate_trt.bench.load import POLICIES, SHARES, Sample, _percentiles
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.cli.bench import app


@pytest.mark.slow
def test_a_server_is_measured_under_load(run: Callable[..., Result], shapes_bundle: Bundle, tmp_path: Path) -> None:
    files = ("--json", tmp_path / "load.json", "--markdown", tmp_path / "load.md")
    options = ("--seconds", 1, "--rounds", 1, "--running", 2, "--queue", 2, "--backend", "onnxruntime")
    done = run(app, "load", shapes_bundle.folder, *options, *files)
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "load.json").read_text(encoding="utf-8"))
    points = record["results"]["points"]
    assert {point["policy"] for point in points} == set(POLICIES)
    assert {point["level"] for point in points if point["kind"] == "open"} == set(SHARES)
    for point in points:
        latency = point["latency"]
        assert latency is None or latency["count"] + point["refused"] + point["errors"] == point["requests"]
        assert (point["first_partial"] is not None) <= (point["kind"] == "streams")
        assert point["errors"] == 0
    assert set(record["results"]["goals"]) == {"p99_at_half", "errors_at_four", "goodput_at_four", "memory_growth"}
    assert "| open, 4 × capacity" in (tmp_path / "load.md").read_text(encoding="utf-8")


def test_percentiles() -> None:
    samples = [Sample(200, value / 100, 0.0) for value in range(101)]
    assert _percentiles([sample.seconds for sample in samples]) == {"p50": 0.5, "p90": 0.9, "p99": 0.99, "count": 101}
    assert _percentiles([]) is None

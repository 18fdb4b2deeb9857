"""A build that is watched: stages from its log, memory of its whole process tree, bytes on disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tgate_trt.analysis.record import environment, record_of
from tgate_trt.bench import build_cost, report
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.bundle.manifest import STAMPS
from tgate_trt.errors import InputError


def test_stages_are_read_from_the_log() -> None:
    lines = ["weights done in 12.5 s", "building again: x", "text encoders and VAE done in 3.0 s", "planning graph done in 0.4 s"]
    assert build_cost.stages_of(lines) == {"weights": 12.5, "text encoders and VAE": 3.0, "planning graph": 0.4}


def test_a_build_is_measured(tiny_sd_configs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    results = build_cost.measure(str(tiny_sd_configs), "fp32", folder, build_cost.Engines(), keep=True)
    bundle = Bundle.open(folder)
    assert {"weights", "trace", "planning graph", "fidelity graph"} <= results["stages"].keys()
    assert 0 < sum(results["stages"].values()) < results["seconds"]
    assert 0 < results["memory"]["peak_anonymous"] <= results["memory"]["peak_total"]
    disk = results["disk"]
    assert 0 < disk["denoiser_weights"] < disk["pipeline_weights"] < disk["bundle"]
    assert disk["denoiser_weights"] <= bundle.manifest.files["weights.safetensors"].size
    assert disk["bundle"] == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != STAMPS)
    with pytest.raises(InputError, match="is there already"):
        build_cost.measure(str(folder), "fp32", folder, build_cost.Engines())
    subject = {"model": "tiny-sd", "precision": "fp32", "random_weights": True, "variant": "onnxruntime"}
    (table,) = report.tables_of(record_of("build", "tgate-bench --build", environment(), {}, results, subject))
    assert table.title == "A build: tiny-sd, fp32, random weights, onnxruntime"
    assert {"weights", "trace", "planning graph", "whole command", "bundle on disk"} <= {row[0] for row in table.rows}


def test_a_precision_that_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--precision must be one of fp32, fp16, bf16, got 'fp3'"):
        build_cost.measure("sdxl", "fp3", tmp_path / "bundle", build_cost.Engines())


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

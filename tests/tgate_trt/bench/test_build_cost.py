"""A build that is watched: stages from its log, memory of its whole process tree, bytes on disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tgate_trt.analysis.record import environment, record_of
from tgate_trt.bench import build_cost, report
from tgate_trt.bench.memory import Memory
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.bundle.manifest import STAMPS
from tgate_trt.errors import BuildError, InputError


def test_stages_are_read_from_the_log() -> None:
    lines = ["weights done in 12.5 s", "building again: x", "text encoders and VAE done in 3.0 s", "planning graph done in 0.4 s"]
    assert build_cost.stages_of(lines) == {"weights": 12.5, "text encoders and VAE": 3.0, "planning graph": 0.4}


def test_a_build_is_measured(tiny_sd_configs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    results = build_cost.measure(str(tiny_sd_configs), "fp32", folder, build_cost.Engines(), keep=True)
    bundle = Bundle.open(folder)
    assert {"weights", "trace", "planning graph", "fidelity graph"} <= results["stages"].keys()
    assert 0 < sum(results["stages"].values()) < results["seconds"]
    assert results["cpu_seconds"] > 0
    memory = results["memory"]
    assert 0 < memory["peak_anonymous"] <= memory["peak_total"]
    assert memory["peak_anonymous_of_stages"].keys() == results["stages"].keys()
    assert 0 < max(memory["peak_anonymous_of_stages"].values()) <= memory["peak_anonymous"]
    assert (memory["peak_gpu"] > 0) == torch.cuda.is_available()
    disk = results["disk"]
    assert 0 < disk["denoiser_weights"] < disk["pipeline_weights"] < disk["bundle"]
    assert disk["denoiser_weights"] <= bundle.manifest.files["weights.safetensors"].size
    assert disk["bundle"] == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != STAMPS)
    with pytest.raises(InputError, match="is there already"):
        build_cost.measure(str(folder), "fp32", folder, build_cost.Engines())
    subject = {"model": "tiny-sd", "precision": "fp32", "random_weights": True, "variant": "onnxruntime"}
    (table,) = report.tables_of(record_of("build", "tgate-bench build", environment(), {}, results, subject))
    assert table.title == "A build: tiny-sd, fp32, random weights, onnxruntime"
    assert {"weights", "trace", "planning graph", "whole command", "bundle on disk"} <= {row[0] for row in table.rows}


def test_a_precision_that_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--precision must be one of fp32, fp16, bf16, got 'fp3'"):
        build_cost.measure("sdxl", "fp3", tmp_path / "bundle", build_cost.Engines())


def test_a_build_that_fails_gives_its_own_sentence_once(tiny_sd_configs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with pytest.raises(BuildError, match=r"^the height must be a multiple of 8"):
        build_cost.measure(str(tiny_sd_configs), "fp32", tmp_path / "bundle", build_cost.Engines(), size=100)
    assert "multiple of 8" not in caplog.text


def test_the_memory_of_descendants_counts() -> None:
    size, memory = 50 << 20, Memory()
    grandchild = f"held = bytearray(b'x' * {size}); print(len(held), flush=True); input()"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    with subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        memory.look(process.pid)
        process.communicate(b"\n")
    assert size < memory.anonymous < memory.total
    assert memory.anonymous < 2 * size
    assert memory.end_stage() == memory.anonymous
    assert memory.end_stage() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone counts anonymous memory by itself")
def test_anonymous_memory_is_what_the_system_counts() -> None:
    """Pages of a mapped file are resident and not anonymous."""
    held = "import mmap, sys; file = open(sys.executable, 'rb'); m = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ); len(bytes(m))"
    code = f"{held}; print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        memory = Memory()
        memory.look(process.pid)
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        process.communicate(b"\n")
    counted = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("Rss")}
    assert memory.anonymous == pytest.approx(counted["RssAnon"], abs=1 << 20)
    assert memory.total - memory.anonymous == pytest.approx(counted["RssFile"] + counted["RssShmem"], abs=1 << 20)
    assert counted["RssFile"] > 2 << 20


def test_a_process_that_has_ended_holds_nothing() -> None:
    memory = Memory()
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    memory.look(process.pid)
    assert (memory.anonymous, memory.total, memory.looks) == (0, 0, 1)

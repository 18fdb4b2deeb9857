"""Two builds of one input are one bundle twice: every byte of graphs and weights, and every pixel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

import tgate_trt
from tgate_trt.bundle.manifest import STAMPS

BUILD = "import sys, tgate_trt; tgate_trt.build(sys.argv[1], 'bundle', graphs=['vanilla', 'planning', 'fidelity'], verify=False)"


def test_two_builds_differ_in_no_byte_and_no_pixel(tiny_sd: Path, tmp_path: Path) -> None:
    """In processes that hash differently, in other folders and time zones, one of them with one thread."""
    places = [tmp_path / name for name in ("here", "there")]
    for place, settings in zip(
        places, ({"PYTHONHASHSEED": "1", "TZ": "Asia/Tokyo"}, {"PYTHONHASHSEED": "2", "OMP_NUM_THREADS": "1"}), strict=True
    ):
        place.mkdir()
        environment = {**os.environ, **settings, "XDG_CACHE_HOME": str(place / "cache")}  # each traces
        subprocess.run([sys.executable, "-P", "-c", BUILD, tiny_sd], cwd=place, env=environment, check=True)
    here, there = ({str(path.relative_to(place)): path.read_bytes() for path in files_of(place)} for place in places)
    assert here.keys() == there.keys()
    assert [name for name in here if here[name] != there[name]] == []
    assert {"bundle/planning.onnx", "bundle/weights.safetensors", "bundle/manifest.json"} <= here.keys()
    first, second = (draw(place / "bundle") for place in places)
    assert torch.equal(first, second)


def files_of(place: Path) -> list[Path]:
    return [path for path in (place / "bundle").rglob("*") if path.is_file() and path.name != STAMPS]


def draw(bundle: Path) -> torch.Tensor:
    pipeline = tgate_trt.load(bundle, gate_step=2, threads=1)
    pipeline.set_progress_bar_config(disable=True)
    pixels: torch.Tensor = pipeline("a fox", num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="pt").images
    return pixels

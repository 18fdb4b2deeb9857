"""Bundles of the tiny pipelines, each built once, and the pipelines that are compared: gated on the one side, eager on the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tgate_trt
from tgate_trt.bundle.bundle import Bundle

GRAPHS = ("vanilla", "planning", "fidelity")


Pipelines = Callable[[str], Any]
"""Gives a pipeline of a model by name, ``"sd"`` or ``"sdxl"``; the same one at each call."""


@pytest.fixture(scope="session")
def sd_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_sd: Path) -> Bundle:
    """Bundle of `tiny_sd`. Read only."""
    return tgate_trt.build(tiny_sd, tmp_path_factory.mktemp("bundles") / "tiny-sd", verify=False, graphs=GRAPHS)


@pytest.fixture(scope="session")
def sdxl_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_sdxl: Path) -> Bundle:
    """Bundle of `tiny_sdxl`. Read only."""
    return tgate_trt.build(tiny_sdxl, tmp_path_factory.mktemp("bundles") / "tiny-sdxl", verify=False, graphs=GRAPHS)


@pytest.fixture(scope="session")
def gated_pipelines(request: pytest.FixtureRequest) -> Pipelines:
    """Pipelines loaded from the bundles; a test sets their scheduler and their denoiser's ``gate_step``."""
    pipelines: dict[str, Any] = {}

    def pipeline(model: str) -> Any:
        if model not in pipelines:
            pipelines[model] = quiet(tgate_trt.load(request.getfixturevalue(f"{model}_bundle"), threads=1))
        return pipelines[model]

    return pipeline


@pytest.fixture(scope="session")
def eager_pipelines(request: pytest.FixtureRequest) -> Pipelines:
    """The same pipelines in eager PyTorch."""
    pipelines: dict[str, Any] = {}

    def pipeline(model: str) -> Any:
        if model not in pipelines:
            pipelines[model] = eager_pipeline(request.getfixturevalue(f"tiny_{model}"))
        return pipelines[model]

    return pipeline


def eager_pipeline(folder: Path) -> Any:
    """A pipeline as diffusers loads it, in fp32."""
    from diffusers import DiffusionPipeline

    return quiet(DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True))


def quiet(pipeline: Any) -> Any:
    """The same pipeline, without progress bars."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

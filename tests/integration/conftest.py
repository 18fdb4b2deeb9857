"""Bundles of the tiny pipelines, each built once, and the pipelines that are compared: gated on the one side, eager on the other."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tgate_trt
from tgate_trt.bundle.bundle import Bundle

GRAPHS = ("vanilla", "planning", "fidelity")


Pipelines = Callable[[str], Any]
"""Gives a pipeline of a model by name, ``"sd"`` or ``"sdxl"``; the same one at each call of a test."""


@pytest.fixture(scope="session")
def sd_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_sd: Path) -> Bundle:
    """Bundle of `tiny_sd`. Read only."""
    return tgate_trt.build(tiny_sd, tmp_path_factory.mktemp("bundles") / "tiny-sd", verify=False, graphs=GRAPHS)


@pytest.fixture(scope="session")
def sdxl_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_sdxl: Path) -> Bundle:
    """Bundle of `tiny_sdxl`. Read only."""
    return tgate_trt.build(tiny_sdxl, tmp_path_factory.mktemp("bundles") / "tiny-sdxl", verify=False, graphs=GRAPHS)


class Lender:
    """Pipelines that are made once, and lent to each test as they were made, whatever other tests did to them."""

    def __init__(self, make: Pipelines) -> None:
        self._make = make
        self._made: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {}
        """Pipeline, its scheduler, its denoiser and the denoiser's settings, by model."""

    def lend(self, model: str) -> Any:
        """A model's pipeline with the scheduler, the denoiser and the gate that it was made with."""
        if model not in self._made:
            pipeline = self._make(model)
            gate = {name: getattr(pipeline.unet, name) for name in ("gate_step", "after_gate") if hasattr(pipeline.unet, name)}
            self._made[model] = pipeline, pipeline.scheduler, pipeline.unet, gate
        pipeline, scheduler, pipeline.unet, gate = self._made[model]
        pipeline.scheduler = copy.deepcopy(scheduler)
        for name, value in gate.items():
            setattr(pipeline.unet, name, value)
        return pipeline


@pytest.fixture(scope="session")
def gated_lender(request: pytest.FixtureRequest) -> Lender:
    """Lends pipelines loaded from the bundles."""
    return Lender(lambda model: quiet(tgate_trt.load(request.getfixturevalue(f"{model}_bundle"), threads=1)))


@pytest.fixture(scope="session")
def eager_lender(request: pytest.FixtureRequest) -> Lender:
    """Lends the same pipelines in eager PyTorch."""
    return Lender(lambda model: eager_pipeline(request.getfixturevalue(f"tiny_{model}")))


@pytest.fixture
def gated_pipelines(gated_lender: Lender) -> Pipelines:
    """Pipelines loaded from the bundles; a test sets their scheduler and their denoiser's ``gate_step``."""
    return functools.cache(gated_lender.lend)


@pytest.fixture
def eager_pipelines(eager_lender: Lender) -> Pipelines:
    """The same pipelines in eager PyTorch; a test sets their scheduler."""
    return functools.cache(eager_lender.lend)


def eager_pipeline(folder: Path) -> Any:
    """A pipeline as diffusers loads it, in fp32."""
    from diffusers import DiffusionPipeline

    return quiet(DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True))


def quiet(pipeline: Any) -> Any:
    """The same pipeline, without progress bars."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

"""Bundles of the tiny pipelines to analyse."""

from __future__ import annotations

from pathlib import Path

import pytest

import tgate_trt
from tgate_trt.bundle import Bundle


@pytest.fixture(scope="session")
def sd_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_sd: Path) -> Bundle:
    """Bundle of `tiny_sd`. Read only."""
    return tgate_trt.build(tiny_sd, tmp_path_factory.mktemp("bundles") / "tiny-sd", verify=False, components=False)


@pytest.fixture(scope="session")
def sdxl_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_sdxl: Path) -> Bundle:
    """Bundle of `tiny_sdxl`. Read only."""
    return tgate_trt.build(tiny_sdxl, tmp_path_factory.mktemp("bundles") / "tiny-sdxl", verify=False, components=False)

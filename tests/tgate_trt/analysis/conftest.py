"""Bundles of the tiny pipelines to analyse."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tgate_trt
from tgate_trt.bundle.bundle import Bundle


@pytest.fixture(scope="session")
def sd_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_sd: Path) -> Bundle:
    """Bundle of `tiny_sd`. Read only."""
    return tgate_trt.build(tiny_sd, tmp_path_factory.mktemp("bundles") / "tiny-sd", verify=False, components=False)


@pytest.fixture(scope="session")
def sdxl_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_sdxl: Path) -> Bundle:
    """Bundle of `tiny_sdxl`. Read only."""
    return tgate_trt.build(tiny_sdxl, tmp_path_factory.mktemp("bundles") / "tiny-sdxl", verify=False, components=False)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """PyTorch with one thread: on tiny tensors and busy cores, several wait for each other ten times as long as they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

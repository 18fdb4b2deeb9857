"""The stand-in for TensorRT in the place of each flavour's module, on a stand-in for CUDA."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tgate_trt.engines.tensorrt import Arena
from tgate_trt.engines.tensorrt_flavours import FLAVOURS, Flavour

from .stand_in.cuda import Cuda
from .stand_in.tensorrt import module


@dataclass
class StandIn:
    """A flavour whose module is the stand-in."""

    flavour: Flavour
    cuda: Cuda
    trt: Any
    arena: Arena

    @property
    def contexts(self) -> list[Any]:
        """The execution contexts that live."""
        return [context for reference in self.trt.product.contexts if (context := reference()) is not None]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    """Stands for `torch.cuda`, and watches this thread."""
    found = Cuda()
    found.install(monkeypatch)
    with found.watched():
        yield found


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def stand_in(request: pytest.FixtureRequest, cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Each flavour on the stand-in."""
    name = f"stand_in_{request.param.replace('-', '_')}"
    trt = module(name, cuda, is_rtx=request.param == "tensorrt-rtx")
    monkeypatch.setitem(sys.modules, name, trt)
    return StandIn(dataclasses.replace(FLAVOURS[request.param], modules=(name,)), cuda, trt, Arena(torch.device("cpu")))

"""Kernels run here by Triton's interpreter on the CPU, and under ``-m gpu`` on a GPU: the same tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch


@dataclass(frozen=True)
class Machine:
    """What runs a kernel: a device, and how a kernel is made ready for it."""

    device: str

    def ready(self, kernel: Any) -> Any:
        """The kernel itself for a GPU, Triton's interpreter of it for the CPU."""
        return kernel if self.device == "cuda" else Interpreted(kernel)


@dataclass(frozen=True)
class Interpreted:
    """A kernel in Triton's interpreter, which has to be told of functions of Triton that are kernels themselves."""

    kernel: Any

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        import triton.language as tl
        from triton.runtime.interpreter import InterpretedFunction

        def run(*arguments: Any, **constants: Any) -> None:
            with mock.patch.object(tl, "sum", InterpretedFunction(tl.sum.fn)):
                InterpretedFunction(self.kernel.fn)[grid](*arguments, **constants)

        return run


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest) -> Machine:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no NVIDIA GPU here")
    pytest.importorskip("triton")
    return Machine(request.param)

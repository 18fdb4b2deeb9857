"""Kernels run here by Triton's interpreter on the CPU, and under ``-m gpu`` on a GPU: the same tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch


@dataclass(frozen=True)
class Machine:
    """What runs a kernel: a device, and how a kernel is made ready for it."""

    device: str

    def ready(self, kernel: Any) -> Any:
        """The kernel itself for a GPU, Triton's interpreter of it for the CPU."""
        if self.device == "cuda":
            return kernel
        from triton.runtime.interpreter import InterpretedFunction

        return InterpretedFunction(kernel.fn)


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest) -> Machine:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no NVIDIA GPU here")
    return Machine(request.param)


@pytest.fixture(scope="session", autouse=True)
def library_functions_are_interpreted() -> Any:
    """Triton's own functions in Triton, such as ``tl.sum``, are interpreted only if it is imported so: done here for one more."""
    tl = pytest.importorskip("triton.language")
    from triton.runtime.interpreter import InterpretedFunction

    if torch.cuda.is_available():  # a kernel compiled later would find the interpreted function
        yield
        return
    whole = tl.sum
    tl.sum = InterpretedFunction(whole.fn)
    yield
    tl.sum = whole

"""Kernels run here by Triton's interpreter on the CPU, and under ``-m gpu`` on a GPU: the same tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from ..process_state import restored


@dataclass(frozen=True)
class Machine:
    """What runs a kernel: a device, and how a kernel is made ready for it."""

    device: str

    def ready(self, kernel: Any) -> Any:
        """The kernel itself for a GPU, Triton's interpreter of it for the CPU."""
        return kernel if self.device == "cuda" else Interpreted(kernel)


@dataclass(frozen=True)
class Interpreted:
    """A kernel in Triton's interpreter, which needs Triton's own functions in the form that it interprets.

    The interpreter exchanges parts of `triton.language` and adds names to the kernel's module. It puts back some of them; after
    a call of `tl.sum`, for one, the compiler no longer works in this process. So all of them are put back here.
    """

    kernel: Any

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        import triton.language as tl
        import triton.language.extra.libdevice  # noqa: F401 - the interpreter does, and what is new after it is removed again
        from triton.runtime.interpreter import InterpretedFunction

        def run(*arguments: Any, **constants: Any) -> None:
            with restored("triton.language", "tgate_trt.kernels"):
                tl.sum = InterpretedFunction(tl.sum.fn)
                try:
                    InterpretedFunction(self.kernel.fn)[grid](*arguments, **constants)
                finally:
                    InterpretedFunction.rewritten_fn.clear()  # rewritten functions need the names that are removed now

        return run


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest) -> Machine:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no NVIDIA GPU here")
    pytest.importorskip("triton")
    return Machine(request.param)

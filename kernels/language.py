"""Triton, which PyTorch for CUDA installs. Without it, kernels are defined and never launched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

HAS_TRITON: bool = triton is not None


def jit(fn: Callable[..., None]) -> Any:
    """``triton.jit``, or the function itself without Triton."""
    return triton.jit(fn) if HAS_TRITON else fn


DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
"""Dtypes that the kernels read and write, by Triton's names."""


def triton_dtype(dtype: torch.dtype) -> Any:
    """Triton's own dtype for one of PyTorch."""
    return getattr(tl, str(dtype).removeprefix("torch."))


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least a size, because Triton's blocks have such sizes only."""
    return 1 << (size - 1).bit_length()


__all__ = ["DTYPES", "HAS_TRITON", "jit", "power_of_two", "tl", "triton_dtype"]

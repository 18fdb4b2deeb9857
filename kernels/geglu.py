"""GEGLU in one pass: ``hidden · gelu(gate)`` of a tensor that holds both halves in its last axis, as diffusion's feed-forwards have it.

PyTorch takes two passes over strided halves: gelu, then the product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tgate_trt.errors import GateError
from tgate_trt.kernels.language import DTYPES, HAS_TRITON, jit, tl

BLOCK, WARPS = 1024, 4
"""Elements that a program writes, and its warps."""


@jit
def geglu_kernel(
    projected,  # [rows, 2 · WIDTH]
    hidden,  # [rows, WIDTH]: written
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program owns BLOCK elements of a row."""
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    value = tl.load(projected + row * 2 * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(projected + row * 2 * WIDTH + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    # gelu(x) = x · Φ(x). Of a gate far below 0, Φ is a small difference 1 + erf, so it comes from erfc: Chebyshev's fit of Numerical
    # Recipes, 6.2, whose relative error is below 1.2e-7 everywhere.
    z = tl.abs(gate) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.5 * z)
    fit = -0.18628806 + t * (0.27886807 + t * (-1.13520398 + t * (1.48851587 + t * (-0.82215223 + t * 0.17087277))))
    fit = -1.26551223 + t * (1.00002368 + t * (0.37409196 + t * (0.09678418 + t * fit)))
    tail = 0.5 * t * tl.exp(fit - z * z)
    gelu = gate * tl.where(gate < 0, tail, 1.0 - tail)
    tl.store(hidden + row * WIDTH + column, (value * gelu).to(hidden.dtype.element_ty), mask=inside)


def reference(projected: Tensor) -> Tensor:
    """Compute in PyTorch what the kernel computes, with fp32 inside."""
    hidden, gate = projected.float().chunk(2, dim=-1)
    return (hidden * torch.nn.functional.gelu(gate)).to(projected.dtype).contiguous()


def launch(projected: Tensor, hidden: Tensor, kernel: Any = geglu_kernel) -> None:
    """Launch the kernel on PyTorch's current stream.

    Args:
        projected: ``[rows, 2 · width]`` in fp16, bf16 or fp32, contiguous.
        hidden: written; ``[rows, width]``, contiguous.
        kernel: the kernel to launch; tests pass Triton's interpreter of it.
    """
    rows, width = hidden.shape
    if hidden.numel():
        kernel[(-(-width // BLOCK), rows)](projected, hidden, WIDTH=width, BLOCK=BLOCK, num_warps=WARPS)


@torch.library.custom_op("tgate::geglu", mutates_args=())
def geglu(projected: Tensor) -> Tensor:
    """``hidden · gelu(gate)``, with Triton on a GPU, else with PyTorch.

    Args:
        projected: ``[..., 2 · width]`` in fp16, bf16 or fp32: ``hidden``, then ``gate``.

    Returns:
        ``[..., width]``, contiguous.

    Raises:
        GateError: if the last axis cannot be halved.
    """
    hidden = _like_half(projected)
    if projected.device.type != "cuda" or not HAS_TRITON or projected.dtype not in DTYPES:
        return reference(projected)
    launch(projected.reshape(-1, projected.shape[-1]).contiguous(), hidden.view(-1, hidden.shape[-1]))
    return hidden


@geglu.register_fake
def _(projected: Tensor) -> Tensor:
    return _like_half(projected)


def _like_half(projected: Tensor) -> Tensor:
    if projected.shape[-1] % 2:
        raise GateError(f"the last axis must hold two halves, got {list(projected.shape)}")
    return projected.new_empty((*projected.shape[:-1], projected.shape[-1] // 2))

"""Reuse of a cached cross-attention: add it to the hidden states and normalise the sum in one pass over memory.

``residual = hidden + cache; normed = LayerNorm(residual) · weight + bias``. The op is ``tgate::CachedResidualLayerNorm`` in an ONNX
graph and ``torch.ops.tgate.cached_residual_layer_norm`` in PyTorch. It reads two tensors and writes two; an addition followed by a
norm reads three and writes two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tgate_trt.errors import GateError, UnsupportedError
from tgate_trt.kernels.language import DTYPES, HAS_TRITON, jit, power_of_two, tl

WIDTHS = range(16, 4097)
"""Widths that the kernel supports; the reference supports all."""


@dataclass(frozen=True)
class Tile:
    """The share of one program of the kernel."""

    rows: int
    """Rows that it normalises."""
    warps: int
    """Warps that it runs on."""


TUNED = {320: Tile(2, 2), 640: Tile(1, 2), 1152: Tile(1, 4), 1280: Tile(1, 2)}
"""For SD 1.5 (320, 640, 1280), SDXL (640, 1280) and PixArt (1152): the fastest of a sweep on an H100, see docs/performance.md."""


def tile_of(width: int) -> Tile:
    """The tile for rows of a width, with about 16 elements a thread."""
    block = power_of_two(width)
    return TUNED.get(width) or Tile(max(1, 512 // block), min(8, max(1, block // 512)))


def takes(width: int, dtype: torch.dtype) -> bool:
    """Whether the kernel supports rows of a width and dtype."""
    return dtype in DTYPES and width in WIDTHS


def check_takes(width: int, dtype: torch.dtype) -> None:
    """Check that the kernel supports rows of a width and dtype.

    Raises:
        UnsupportedError: if it does not.
    """
    if not takes(width, dtype):
        raise UnsupportedError(
            f"the kernel takes rows of {WIDTHS.start} to {WIDTHS.stop - 1} in fp16, bf16 or fp32, got rows of {width} in {dtype}; "
            "use --fuse-cache-reuse off"
        )


@jit
def cached_residual_layer_norm_kernel(
    hidden,  # [rows, WIDTH], hidden_stride elements from row to row
    cache,  # [rows, WIDTH], cache_stride elements from row to row
    weight,  # [WIDTH]
    bias,  # [WIDTH]
    rows,
    hidden_stride,
    cache_stride,
    residual,  # [rows, WIDTH], contiguous
    normed,  # [rows, WIDTH], contiguous
    WIDTH: tl.constexpr,
    EPSILON: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,  # the power of two that holds WIDTH
):
    """A program owns BLOCK_ROWS whole rows. The arguments have TensorRT's order: inputs, integers, outputs."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.arange(0, BLOCK_WIDTH)[None, :]
    in_row = column < WIDTH
    inside = (row < rows) & in_row

    total = tl.load(hidden + row * hidden_stride + column, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(cache + row * cache_stride + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=1, keep_dims=True) / WIDTH
    centred = tl.where(in_row, total - mean, 0.0)
    variance = tl.sum(centred * centred, axis=1, keep_dims=True) / WIDTH
    scale = tl.load(weight + column, mask=in_row, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=in_row, other=0.0).to(tl.float32)

    tl.store(residual + row * WIDTH + column, total.to(residual.dtype.element_ty), mask=inside)
    tl.store(
        normed + row * WIDTH + column, (centred * tl.rsqrt(variance + EPSILON) * scale + shift).to(normed.dtype.element_ty), mask=inside
    )


def reference(hidden: Tensor, cache: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Compute in PyTorch what the kernel computes, with fp32 inside.

    Args:
        hidden: ``[..., width]``, of any floating dtype.
        cache: the same shape and dtype.
        weight: ``[width]``.
        bias: ``[width]``.
        epsilon: added to the variance.

    Returns:
        ``hidden + cache`` and its layer norm, both contiguous and of ``hidden``'s dtype.
    """
    residual = hidden.float() + cache.float()
    normed = torch.nn.functional.layer_norm(residual, residual.shape[-1:], weight.float(), bias.float(), epsilon)
    return residual.to(hidden.dtype).contiguous(), normed.to(hidden.dtype).contiguous()


def launch(
    hidden: Tensor,
    cache: Tensor,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    residual: Tensor,
    normed: Tensor,
    kernel: Any = cached_residual_layer_norm_kernel,
) -> None:
    """Launch the kernel on tensors of one device.

    Args:
        hidden: ``[..., width]``. Rows that are not dense, or have no common stride, are copied first.
        cache: the same shape and dtype, with strides of its own.
        weight: ``[width]``, contiguous.
        bias: ``[width]``, contiguous.
        epsilon: added to the variance.
        residual: written; contiguous, of ``hidden``'s shape and dtype.
        normed: written; contiguous, of ``hidden``'s shape and dtype.
        kernel: the kernel to launch; tests pass Triton's interpreter of it.

    Raises:
        GateError: if shapes or dtypes do not match.
        UnsupportedError: if the kernel does not support the dtype or the width.
    """
    _check(hidden, cache, weight, bias)
    width = hidden.shape[-1]
    check_takes(width, hidden.dtype)
    hidden, cache = _rows(hidden), _rows(cache)
    if not hidden.shape[0]:
        return
    tile = tile_of(width)
    rows, strides = hidden.shape[0], (hidden.stride(0), cache.stride(0))
    constants = {"WIDTH": width, "EPSILON": epsilon, "BLOCK_ROWS": tile.rows, "BLOCK_WIDTH": power_of_two(width)}
    programs = -(-rows // tile.rows)
    kernel[(programs,)](hidden, cache, weight, bias, rows, *strides, residual, normed, **constants, num_warps=tile.warps)


def _check(hidden: Tensor, cache: Tensor, weight: Tensor, bias: Tensor) -> None:
    if cache.shape != hidden.shape or cache.dtype != hidden.dtype:
        raise GateError(
            f"hidden is {list(hidden.shape)} in {hidden.dtype}, and its cache must be the same, got {list(cache.shape)} in {cache.dtype}"
        )
    if not weight.shape == bias.shape == hidden.shape[-1:]:
        raise GateError(f"weight and bias must be [{hidden.shape[-1]}], got {list(weight.shape)} and {list(bias.shape)}")


def _rows(tensor: Tensor) -> Tensor:
    """The tensor as ``[rows, width]`` with dense rows; a copy where its strides do not allow a view."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


@torch.library.custom_op("tgate::cached_residual_layer_norm", mutates_args=())
def cached_residual_layer_norm(hidden: Tensor, cache: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """``residual = hidden + cache`` and ``normed = LayerNorm(residual) · weight + bias``, with Triton on a GPU, else with PyTorch.

    Args:
        hidden: ``[..., width]`` in fp16, bf16 or fp32, on any device, with any strides.
        cache: the same shape, dtype and device.
        weight: ``[width]``.
        bias: ``[width]``.
        epsilon: added to the variance.

    Returns:
        ``residual`` and ``normed``, contiguous, of ``hidden``'s shape and dtype.

    Raises:
        GateError: if shapes or dtypes do not match.
        UnsupportedError: if on a GPU the kernel does not support the dtype or the width.
    """
    _check(hidden, cache, weight, bias)
    if hidden.device.type != "cuda" or not HAS_TRITON:
        return reference(hidden, cache, weight, bias, epsilon)
    residual, normed = _like(hidden), _like(hidden)
    launch(hidden, cache, weight.contiguous(), bias.contiguous(), epsilon, residual, normed)
    return residual, normed


@cached_residual_layer_norm.register_fake
def _(hidden: Tensor, cache: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    _check(hidden, cache, weight, bias)
    return _like(hidden), _like(hidden)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)

"""GroupNorm of pictures with channels last, with the addition before it and the SiLU after it, as diffusion's residual blocks have them.

``normed = GroupNorm(x + shift) · weight + bias``, then ``normed · sigmoid(normed)`` if asked for. PyTorch's own norm on a GPU works
with channels first, so with channels last every norm would copy the picture before and after.

Three launches: moments of each channel in chunks of pixels, moments of each group from those, and the norm itself. The picture is read
twice and written once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tgate_trt.errors import GateError
from tgate_trt.kernels.language import DTYPES, HAS_TRITON, jit, power_of_two, tl

PIXELS, CHANNELS, WARPS = 64, 64, 4
"""Pixels and channels of a program's tile, and its warps: 32 elements a thread, in loads of 16 bytes in fp16."""

_CHUNKS = 512
"""Most chunks of pixels: their moments are read again once."""
_MERGED = 64
"""Chunks whose moments are merged at once."""


@jit
def moments_kernel(
    x,  # [rows, pixels, C]
    partial,  # [rows, chunks, 2, C] fp32: mean of each channel in a chunk, and the sum of squared deviations from it
    pixels,
    tiles,  # of PIXELS pixels in a chunk
    C: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A program owns the channels of one tile in one chunk of a row's pixels."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    in_row = channel < C
    first = chunk * tiles * PIXELS
    count = tl.full((), 0.0, tl.float32)
    mean = tl.full((CHANNELS,), 0.0, tl.float32)
    deviations = tl.full((CHANNELS,), 0.0, tl.float32)
    for tile in range(tiles):
        pixel = first + tile * PIXELS + tl.arange(0, PIXELS)
        inside = (pixel < pixels)[:, None] & in_row[None, :]
        value = tl.load(x + (row * pixels + pixel)[:, None] * C + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        more = tl.minimum(tl.maximum(pixels - first - tile * PIXELS, 0), PIXELS).to(tl.float32)
        own = tl.sum(value, axis=0) / tl.maximum(more, 1.0)
        centred = tl.where(inside, value - own[None, :], 0.0)
        share = more / tl.maximum(count + more, 1.0)
        step = own - mean
        deviations += tl.sum(centred * centred, axis=0) + step * step * count * share
        mean += step * share
        count += more
    out = partial + (row * tl.num_programs(0) + chunk) * 2 * C + channel
    tl.store(out, mean, mask=in_row)
    tl.store(out + C, deviations, mask=in_row)


@jit
def groups_kernel(
    partial,  # [rows, chunks, 2, C] fp32
    shift,  # [rows, C], or anything without HAS_SHIFT
    groups,  # [rows, G, 2] fp32: written; mean, and one over the standard deviation
    pixels,
    chunks,
    chunk_pixels,
    EPSILON: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    C: tl.constexpr,
    G: tl.constexpr,
    WIDTH: tl.constexpr,  # the power of two that holds C // G
    MERGED: tl.constexpr,
):
    """A program owns one group of a row: the mean of its channels' means, and its variance from their deviations."""
    group, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    own = tl.arange(0, WIDTH)
    in_group = own < C // G
    channel = group * (C // G) + own
    added = tl.full((WIDTH,), 0.0, tl.float32)
    if HAS_SHIFT:
        added = tl.load(shift + row * C + channel, mask=in_group, other=0.0).to(tl.float32)
    total = tl.full((WIDTH,), 0.0, tl.float32)
    for start in range(0, chunks, MERGED):
        chunk = start + tl.arange(0, MERGED)
        inside = (chunk < chunks)[:, None] & in_group[None, :]
        count = tl.minimum(tl.maximum(pixels - chunk * chunk_pixels, 0), chunk_pixels).to(tl.float32)
        mean = tl.load(partial + (row * chunks + chunk)[:, None] * 2 * C + channel[None, :], mask=inside, other=0.0)
        total += tl.sum(mean * count[:, None], axis=0)
    group_mean = tl.sum(tl.where(in_group, total / pixels + added, 0.0)) / (C // G)
    squares = tl.full((WIDTH,), 0.0, tl.float32)
    for start in range(0, chunks, MERGED):
        chunk = start + tl.arange(0, MERGED)
        inside = (chunk < chunks)[:, None] & in_group[None, :]
        count = tl.minimum(tl.maximum(pixels - chunk * chunk_pixels, 0), chunk_pixels).to(tl.float32)
        place = partial + (row * chunks + chunk)[:, None] * 2 * C + channel[None, :]
        away = tl.where(inside, tl.load(place, mask=inside, other=0.0) + added[None, :] - group_mean, 0.0)
        squares += tl.sum(tl.load(place + C, mask=inside, other=0.0) + away * away * count[:, None], axis=0)
    variance = tl.sum(squares) / (pixels * (C // G)).to(tl.float32)
    tl.store(groups + (row * G + group) * 2, group_mean)
    tl.store(groups + (row * G + group) * 2 + 1, tl.rsqrt(variance + EPSILON))


@jit
def normalise_kernel(
    x,  # [rows, pixels, C]
    shift,  # [rows, C], or anything without HAS_SHIFT
    groups,  # [rows, G, 2] fp32
    weight,  # [C]
    bias,  # [C]
    normed,  # [rows, pixels, C]: written
    pixels,
    SILU: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    C: tl.constexpr,
    G: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A program owns one tile of pixels and channels."""
    row = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    in_row = channel < C
    moments = groups + (row * G + channel // (C // G)) * 2
    mean = tl.load(moments, mask=in_row, other=0.0)
    scale = tl.load(moments + 1, mask=in_row, other=0.0) * tl.load(weight + channel, mask=in_row, other=0.0).to(tl.float32)
    if HAS_SHIFT:
        mean -= tl.load(shift + row * C + channel, mask=in_row, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=in_row, other=0.0).to(tl.float32)
    inside = (pixel < pixels)[:, None] & in_row[None, :]
    place = (row * pixels + pixel)[:, None] * C + channel[None, :]
    value = (tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - mean[None, :]) * scale[None, :] + offset[None, :]
    if SILU:
        value = value / (1.0 + tl.exp(-value))
    tl.store(normed + place, value.to(normed.dtype.element_ty), mask=inside)


def reference(x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float, silu: bool, shift: Tensor | None) -> Tensor:
    """Compute in PyTorch what the kernels compute, with fp32 inside; see `group_norm`."""
    total = x.float() if shift is None else x.float() + shift.float()[:, :, None, None]
    normed = torch.nn.functional.group_norm(total, groups, weight.float(), bias.float(), epsilon)
    normed = torch.nn.functional.silu(normed) if silu else normed
    return normed.to(x.dtype).contiguous(memory_format=torch.channels_last)


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    epsilon: float,
    silu: bool,
    shift: Tensor | None,
    normed: Tensor,
    kernels: tuple[Any, Any, Any] = (moments_kernel, groups_kernel, normalise_kernel),
) -> None:
    """Launch the kernels on PyTorch's current stream.

    Args:
        x: ``[rows, C, height, width]`` in fp16, bf16 or fp32, with channels last.
        weight: ``[C]``.
        bias: ``[C]``.
        groups: number of groups, which divides C.
        epsilon: added to the variance.
        silu: whether to apply SiLU.
        shift: ``[rows, C]``, added to every pixel before the norm; contiguous.
        normed: written; like ``x``, with channels last.
        kernels: those to launch; tests pass Triton's interpreter of them.
    """
    rows, width, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    if not x.numel():
        return
    moments, merge, normalise = kernels
    tiles = -(-pixels // (PIXELS * _CHUNKS))
    chunks, blocks = -(-pixels // (PIXELS * tiles)), -(-width // CHANNELS)
    partial = torch.empty(rows, chunks, 2, width, dtype=torch.float32, device=x.device)
    found = torch.empty(rows, groups, 2, dtype=torch.float32, device=x.device)
    size: dict[str, Any] = {"C": width, "PIXELS": PIXELS, "CHANNELS": CHANNELS, "num_warps": WARPS}
    added = {"HAS_SHIFT": shift is not None, "G": groups}
    moments[(chunks, rows, blocks)](x, partial, pixels, tiles, **size)
    merge[(groups, rows)](
        *(partial, weight if shift is None else shift, found, pixels, chunks, tiles * PIXELS),
        **{**added, "C": width, "EPSILON": epsilon, "WIDTH": power_of_two(width // groups), "MERGED": _MERGED, "num_warps": 1},
    )
    normalise[(-(-pixels // PIXELS), rows, blocks)](
        *(x, weight if shift is None else shift, found, weight, bias, normed, pixels), **added, **size, SILU=silu
    )


@torch.library.custom_op("tgate::group_norm", mutates_args=())
def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float, silu: bool, shift: Tensor | None = None) -> Tensor:
    """GroupNorm with an addition before it and a SiLU after it, with Triton on a GPU, else with PyTorch.

    Args:
        x: ``[rows, C, height, width]`` in fp16, bf16 or fp32; copied if its channels do not come last in memory.
        weight: ``[C]``.
        bias: ``[C]``.
        groups: number of groups, which divides C.
        epsilon: added to the variance.
        silu: whether to apply SiLU.
        shift: ``[rows, C]``, added to every pixel before the norm.

    Returns:
        A tensor like ``x``, its channels last in memory.

    Raises:
        GateError: if shapes do not match.
    """
    _check(x, weight, bias, groups, shift)
    if x.device.type != "cuda" or not HAS_TRITON or x.dtype not in DTYPES:
        return reference(x, weight, bias, groups, epsilon, silu, shift)
    x = x.contiguous(memory_format=torch.channels_last)
    normed = torch.empty_like(x, memory_format=torch.channels_last)
    launch(x, weight.contiguous(), bias.contiguous(), groups, epsilon, silu, None if shift is None else shift.contiguous(), normed)
    return normed


@group_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float, silu: bool, shift: Tensor | None = None) -> Tensor:
    _check(x, weight, bias, groups, shift)
    return torch.empty_like(x, memory_format=torch.channels_last)


def _check(x: Tensor, weight: Tensor, bias: Tensor, groups: int, shift: Tensor | None) -> None:
    width = x.shape[1]
    if width % groups or weight.shape != (width,) or bias.shape != (width,):
        raise GateError(f"{width} channels do not fit {groups} groups, weights {list(weight.shape)} and biases {list(bias.shape)}")
    if shift is not None and shift.shape != x.shape[:2]:
        raise GateError(f"the addition must be {list(x.shape[:2])}, got {list(shift.shape)}")

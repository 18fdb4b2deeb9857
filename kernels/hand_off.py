"""The hand-off at the gate: one launch writes all caches from the attention outputs of the last planning step.

Under guidance a cache is the mean of its tap's two halves ``[negative, positive]``, else a copy (T-GATE, arXiv 2404.02747,
section 4.2). SDXL has 70 taps of two shapes; with a launch for each, launching would take longer than the memory traffic.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

from tgate_trt.errors import GateError, UnsupportedError
from tgate_trt.kernels.language import DTYPES, HAS_TRITON, jit, tl, triton_dtype

BLOCK = 4096
"""Elements that one program writes: for each thread two loads of 16 bytes from each half in fp16."""
WARPS = 8
ALIGNMENT = 16
"""Bytes that a thread loads at once if all addresses and sizes are multiples of it, as they are except in views with odd offsets."""


@jit
def hand_off_kernel(
    table,  # [programs, 4] int64: addresses of the first half, of the second half and of the cache, and the number of bytes
    DTYPE: tl.constexpr,
    MEAN: tl.constexpr,  # whether to write the mean of both halves, or a copy of the first
    ALIGNED: tl.constexpr,  # bytes; every number in the table is a multiple
    BLOCK: tl.constexpr,
):
    """A program owns up to BLOCK elements of one cache, which its row of the table addresses."""
    entry = table + tl.program_id(0) * 4
    # The hint follows the cast, because Triton drops a number's divisibility when it casts it to a pointer.
    first = tl.multiple_of(tl.load(entry).to(tl.pointer_type(DTYPE)), ALIGNED)
    cache = tl.multiple_of(tl.load(entry + 2).to(tl.pointer_type(DTYPE)), ALIGNED)
    size: tl.constexpr = DTYPE.primitive_bitwidth // 8
    place = tl.arange(0, BLOCK)
    inside = place < tl.multiple_of((tl.load(entry + 3) // size).to(tl.int32), ALIGNED // size)

    value = tl.load(first + place, mask=inside)
    if MEAN:
        second = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(DTYPE)), ALIGNED)
        value = 0.5 * value.to(tl.float32) + 0.5 * tl.load(second + place, mask=inside).to(tl.float32)
    tl.store(cache + place, value.to(DTYPE), mask=inside)


def reference(outputs: Mapping[str, Tensor], caches: Mapping[str, Tensor]) -> None:
    """Do in PyTorch what the kernel does, one tap after the other.

    Args:
        outputs: attention outputs by tap, ``[rows, tokens, width]``, or with twice the rows, ``[negative, positive]``.
        caches: written; by tap, ``[rows, tokens, width]``, of the outputs' dtypes.
    """
    for name, cache in caches.items():
        output = outputs[name]
        if output.shape == cache.shape:
            cache.copy_(output)
        else:
            negative, positive = output.chunk(2)
            torch.lerp(negative, positive, 0.5, out=cache)


class HandOff:
    """Writes caches from attention outputs, both at addresses that stay the same from run to run."""

    def __init__(self, outputs: Mapping[str, Tensor], caches: Mapping[str, Tensor], kernel: Any = hand_off_kernel) -> None:
        """Write the kernel's table of addresses.

        Args:
            outputs: contiguous attention outputs by tap, ``[rows, tokens, width]``, or with twice the rows, ``[negative, positive]``.
                Taps that ``caches`` does not name are ignored.
            caches: contiguous, by tap, ``[rows, tokens, width]``, all of one dtype.
            kernel: the kernel to launch; tests pass Triton's interpreter of it.

        Raises:
            GateError: if an output is missing or does not fit its cache.
            UnsupportedError: if the kernel does not support the dtypes, or a mixture of means and copies.
        """
        self._outputs = {name: _checked(name, outputs.get(name), cache) for name, cache in caches.items()}
        self._caches = dict(caches)
        self._kernel = kernel
        self._runs_kernel = kernel is not hand_off_kernel or (HAS_TRITON and any(cache.is_cuda for cache in caches.values()))
        if not self._caches or not self._runs_kernel:
            return
        dtypes = {tensor.dtype for tensor in caches.values()}
        means = {len(self._outputs[name]) != len(cache) for name, cache in caches.items()}
        if len(dtypes) > 1 or not dtypes <= DTYPES.keys() or len(means) > 1:
            raise UnsupportedError(
                f"one hand-off is all means or all copies in one of fp16, bf16 and fp32, got {dtypes}; use a hand-off for each kind"
            )
        (self._dtype,), (self._mean,) = dtypes, means
        table = numpy.concatenate([_entries(self._outputs[name], cache) for name, cache in caches.items()])
        self._aligned = int(numpy.gcd.reduce(table, axis=None, initial=ALIGNMENT))
        self._table = torch.from_numpy(table).to(next(iter(caches.values())).device)

    def run(self) -> None:
        """Write every cache, on a GPU in one launch on PyTorch's current stream, elsewhere with PyTorch."""
        if not self._runs_kernel:
            reference(self._outputs, self._caches)
        elif self._caches:
            self._kernel[(len(self._table),)](
                self._table,
                DTYPE=triton_dtype(self._dtype),
                MEAN=self._mean,
                ALIGNED=self._aligned,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )


def _checked(name: str, output: Tensor | None, cache: Tensor) -> Tensor:
    """The attention output from which a cache is written, if it fits.

    Raises:
        GateError: if it is missing or does not fit.
    """
    if output is None:
        raise GateError(f"there is no attention output for {name!r}, from which its cache is written; build the bundle again")
    fits = output.shape[1:] == cache.shape[1:] and len(output) in (len(cache), 2 * len(cache)) and output.dtype == cache.dtype
    if not fits or output.device != cache.device or not output.is_contiguous() or not cache.is_contiguous():
        raise GateError(
            f"the cache {name!r} {list(cache.shape)} in {cache.dtype} cannot be written from {list(output.shape)} in {output.dtype}; "
            "it takes as many rows or twice as many, contiguous and on the same device"
        )
    return output


def _entries(output: Tensor, cache: Tensor) -> numpy.ndarray[Any, numpy.dtype[numpy.int64]]:
    """Rows of the kernel's table for one tap."""
    start = numpy.arange(0, cache.nbytes, BLOCK * cache.itemsize, dtype=numpy.int64)
    first = output.data_ptr() + start
    count = numpy.minimum(cache.nbytes - start, BLOCK * cache.itemsize)
    return numpy.stack([first, first + output.nbytes - cache.nbytes, cache.data_ptr() + start, count], axis=1)

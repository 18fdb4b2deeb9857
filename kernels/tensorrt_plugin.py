"""The fused reuse of the cache as a TensorRT plugin: a *quickly deployable plugin*, ahead-of-time form (TensorRT 10.9 and later).

TensorRT receives PTX, the name of its entry, a grid as an expression of shapes, and the scalars between inputs and outputs. It then
launches ``entry(inputs…, scalars…, outputs…)`` itself, without Python. In an ONNX graph the plugin is a node whose op has the
plugin's name, with the attributes ``plugin_namespace = "tgate"`` and ``aot = 1``.

We have not run it inside TensorRT. ``tests/kernels`` checks the PTX and its parameters for every GPU, and ``pytest -m gpu`` loads the
same PTX with the CUDA driver and launches it as TensorRT would.
"""
# mypy: disable-error-code="valid-type, attr-defined, untyped-decorator"
# No `from __future__ import annotations` here: TensorRT reads the annotations of these functions as objects.

from pathlib import Path
from typing import Any

import numpy
import numpy.typing
import torch

from tgate_trt.errors import UnsupportedError
from tgate_trt.kernels import ahead_of_time
from tgate_trt.kernels.ahead_of_time import CompiledKernel

PLUGIN = "tgate::CachedResidualLayerNorm"

_DTYPES = {"HALF": torch.float16, "BF16": torch.bfloat16, "FLOAT": torch.float32}
"""By TensorRT's names."""
_registered: set[str] = set()


def kernel_of(width: int, dtype: str, epsilon: float, capability: int, folder: Path | None = None) -> CompiledKernel:
    """The kernel that TensorRT receives for rows of a width.

    Args:
        width: of a row.
        dtype: TensorRT's name of the dtype of inputs and outputs: ``HALF``, ``BF16`` or ``FLOAT``.
        epsilon: added to the variance.
        capability: of the GPU, times ten.
        folder: see `tgate_trt.kernels.ahead_of_time.compile_kernel`.

    Raises:
        UnsupportedError: if the kernel does not support the dtype or the width, or Triton is not installed.
        BuildError: if the kernel cannot be compiled.
    """
    if dtype not in _DTYPES:
        raise UnsupportedError(f"the plugin takes {', '.join(_DTYPES)}, got {dtype}; use --fuse-cache-reuse function")
    return ahead_of_time.compile_kernel(ahead_of_time.cached_residual_layer_norm(width, _DTYPES[dtype], epsilon), capability, folder)


def register(plugin: Any, capability: int) -> None:
    """Register the plugin with TensorRT in this process, once.

    Without an ``autotune`` function TensorRT uses the network's dtypes in linear formats, as the kernel does.

    Args:
        plugin: the module `tensorrt.plugin`.
        capability: of the GPU that engines are built for, times ten.
    """
    if PLUGIN in _registered:
        return
    tensor = plugin.TensorDesc

    @plugin.register(PLUGIN)
    def describe(
        hidden: tensor,  # [..., width]
        cache: tensor,  # like hidden
        weight: tensor,  # [width]
        bias: tensor,  # [width]
        epsilon: numpy.typing.NDArray[numpy.float32],  # [1]: an ONNX float arrives so
    ) -> tuple[tensor, tensor]:
        return hidden.like(), hidden.like()

    @plugin.aot_impl(PLUGIN)
    def implement(
        hidden: tensor,
        cache: tensor,
        weight: tensor,
        bias: tensor,
        epsilon: numpy.typing.NDArray[numpy.float32],
        outputs: tuple[tensor],
        tactic: int,
    ) -> tuple[str, str, plugin.KernelLaunchParams, plugin.SymIntExprs]:
        width = weight.shape_expr[0].constant_value()
        compiled = kernel_of(width, hidden.dtype.name, float(numpy.ravel(epsilon)[0]), capability)
        rows = hidden.shape_expr.numel() // width
        launch = plugin.KernelLaunchParams()
        launch.grid_x = plugin.cdiv(rows, compiled.owned)
        launch.block_x = 32 * compiled.warps
        launch.shared_mem = compiled.shared_bytes
        scalars = plugin.SymIntExprs(1)
        scalars[0] = plugin.SymInt32(rows)
        return compiled.entry, compiled.ptx, launch, scalars

    _registered.add(PLUGIN)

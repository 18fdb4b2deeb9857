"""The fused reuse of the cache as a TensorRT plugin: a *quickly deployable plugin*, ahead-of-time form (TensorRT 10.9 and later).

TensorRT is handed PTX, the name of its entry, a grid that is an expression of shapes, and the scalars between inputs and
outputs; it then launches ``entry(inputs…, scalars…, outputs…)`` by itself, without Python. `PLUGIN` is a node of an ONNX
graph whose op is the plugin's name, with the attributes ``plugin_namespace = "tgate"`` and ``aot = 1``.

Never run by us inside TensorRT. What was: the PTX and its parameters are tested for every GPU (``tests/kernels``), and
``pytest -m gpu`` loads the same PTX with the CUDA driver and launches it as TensorRT would.
"""
# mypy: disable-error-code="valid-type, attr-defined, untyped-decorator"
# No `from __future__ import annotations` here: TensorRT reads the annotations of what it is handed, as objects.

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
    """What TensorRT is handed for rows of a width.

    Args:
        width: of a row.
        dtype: of inputs and outputs, by TensorRT's name: ``HALF``, ``BF16`` or ``FLOAT``.
        epsilon: added to the variance.
        capability: of the GPU, times ten.
        folder: see `tgate_trt.kernels.ahead_of_time.compile_kernel`.

    Raises:
        UnsupportedError: if the kernel does not take the dtype or the width.
        BuildError: if the kernel cannot be compiled.
    """
    if dtype not in _DTYPES:
        raise UnsupportedError(f"the plugin takes {', '.join(_DTYPES)}, got {dtype}")
    return ahead_of_time.compile_kernel(ahead_of_time.cached_residual_layer_norm(width, _DTYPES[dtype], epsilon), capability, folder)


def register(plugin: Any, capability: int) -> None:
    """Make the plugin known to TensorRT in this process; a second time does nothing.

    Without an ``autotune`` function TensorRT takes the types of the network, in linear formats: the kernel's own.

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

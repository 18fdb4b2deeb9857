"""The plugin as TensorRT would use it: what it is told at a build, and on a GPU that very PTX launched by the CUDA driver.

TensorRT itself cannot be installed where these tests run. So `Trtp` stands in for ``tensorrt.plugin``: it keeps what is
registered and hands the functions shapes as TensorRT does. Under test is what they answer.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from tgate_trt.errors import UnsupportedError
from tgate_trt.kernels import tensorrt_plugin
from tgate_trt.kernels.ahead_of_time import CompiledKernel, hand_off_of, parameters_of
from tgate_trt.kernels.ahead_of_time import compile_kernel as compile_ahead
from tgate_trt.kernels.cached_residual_layer_norm import TUNED, reference
from tgate_trt.kernels.hand_off import HandOff
from tgate_trt.kernels.hand_off import reference as hand_off_reference

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
EPSILON = 1e-5
DTYPES = {"HALF": torch.float16, "BF16": torch.bfloat16, "FLOAT": torch.float32}


class Size(int):
    """One size of a shape, with the arithmetic of ``SymInt32``."""

    def constant_value(self) -> int:
        return int(self)


class Shape(tuple[Size, ...]):
    """A ``ShapeExprs``."""

    def numel(self) -> Size:
        return Size(numpy.prod(self))


@dataclass
class TensorDesc:
    """A ``TensorDesc`` of concrete shape."""

    shape: tuple[int, ...]
    dtype: SimpleNamespace

    @property
    def shape_expr(self) -> Shape:
        return Shape(map(Size, self.shape))

    def like(self) -> TensorDesc:
        return TensorDesc(self.shape, self.dtype)


class Trtp:
    """What `tgate_trt.kernels.tensorrt_plugin` takes of ``tensorrt.plugin``."""

    TensorDesc = TensorDesc
    SymInt32 = int

    class KernelLaunchParams(SimpleNamespace):
        """Attributes that are set."""

    class SymIntExprs(list[Any]):
        """A list of a fixed length."""

        def __init__(self, length: int) -> None:
            super().__init__([None] * length)

    def __init__(self) -> None:
        self.described: dict[str, Any] = {}
        self.implemented: dict[str, Any] = {}

    def register(self, name: str) -> Any:
        assert name not in self.described, "TensorRT refuses to register a plugin twice"
        return lambda function: self.described.setdefault(name, function)

    def aot_impl(self, name: str) -> Any:
        return lambda function: self.implemented.setdefault(name, function)

    @staticmethod
    def cdiv(dividend: int, divisor: int) -> int:
        return -(-dividend // divisor)


@dataclass(frozen=True)
class Launch:
    """What TensorRT would launch."""

    entry: str
    ptx: str
    grid: int
    block: int
    shared_bytes: int
    scalars: tuple[int, ...]


def launch_of(shape: tuple[int, ...], dtype: str, capability: int, monkeypatch: pytest.MonkeyPatch) -> Launch:
    """Register the plugin afresh, and ask it for the kernel of hidden states of a shape."""
    monkeypatch.setattr(tensorrt_plugin, "_registered", set())
    trtp = Trtp()
    tensorrt_plugin.register(trtp, capability)
    tensorrt_plugin.register(trtp, capability)  # a second time does nothing
    kind = SimpleNamespace(name=dtype)
    inputs = [TensorDesc(shape, kind), TensorDesc(shape, kind), TensorDesc(shape[-1:], kind), TensorDesc(shape[-1:], kind)]
    epsilon = numpy.array([EPSILON], numpy.float32)
    outputs = trtp.described[tensorrt_plugin.PLUGIN](*inputs, epsilon)
    assert [output.shape for output in outputs] == [shape, shape]
    entry, ptx, parameters, scalars = trtp.implemented[tensorrt_plugin.PLUGIN](*inputs, epsilon, outputs, 0)
    return Launch(entry, ptx, parameters.grid_x, parameters.block_x, parameters.shared_mem, tuple(scalars))


@pytest.mark.parametrize("width", TUNED)
def test_what_tensorrt_is_told(width: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    launch = launch_of((2, 77, width), "HALF", 89, monkeypatch)
    assert parameters_of(launch.ptx, launch.entry) == ["u64"] * 4 + ["u32"] * len(launch.scalars) + ["u64"] * 2
    assert launch.scalars == (2 * 77,)
    assert launch.grid == -(-2 * 77 // TUNED[width].rows)
    assert f".reqntid {launch.block}" in launch.ptx


def test_a_dtype_that_the_plugin_does_not_take() -> None:
    with pytest.raises(UnsupportedError, match="the plugin takes HALF, BF16, FLOAT, got INT8"):
        tensorrt_plugin.kernel_of(320, "INT8", EPSILON, 89)


class Driver:
    """The CUDA driver's own interface, by which TensorRT launches: module, function, launch with a list of pointers to arguments."""

    def __init__(self) -> None:
        torch.cuda.init()
        torch.empty(1, device="cuda")  # makes the context current
        self._library = ctypes.CDLL("libcuda.so.1")

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        assert status == 0, f"{name} failed with CUDA error {status}"

    def launch(self, image: bytes, entry: str, grid: int, block: int, shared_bytes: int, arguments: list[Any]) -> None:
        """Load PTX or a cubin, launch an entry on the current stream, and wait.

        Args:
            image: PTX as text that ends in a zero byte, or a cubin.
            entry: name of the kernel.
            grid: programs.
            block: threads of each.
            shared_bytes: dynamic shared memory.
            arguments: as ctypes values, in the kernel's order.
        """
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), image)
        self._call("cuModuleGetFunction", ctypes.byref(function), module, entry.encode())
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.cast(ctypes.byref(value), ctypes.c_void_p) for value in arguments))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self._call("cuLaunchKernel", function, grid, 1, 1, block, 1, 1, shared_bytes, stream, pointers, None)
        torch.cuda.synchronize()
        self._call("cuModuleUnload", module)


@pytest.fixture(scope="module")
def driver() -> Driver:
    if not torch.cuda.is_available():
        pytest.skip("there is no NVIDIA GPU here")
    return Driver()


def capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def pointer(tensor: Tensor) -> Any:
    return ctypes.c_void_p(tensor.data_ptr())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 100, *TUNED])
def test_the_plugins_ptx_is_launched_as_tensorrt_would(
    driver: Driver, width: int, dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Inputs, the scalars between, outputs, and no scratch parameters."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shape = (2, 77, width)
    launch = launch_of(shape, dtype, capability(), monkeypatch)
    hidden, cache = torch.randn(2, *shape, device="cuda").to(DTYPES[dtype])
    weight, bias = torch.randn(2, width, device="cuda").to(DTYPES[dtype])
    outputs = torch.full((2, *shape), torch.nan, device="cuda", dtype=DTYPES[dtype])
    scalars = [ctypes.c_int32(scalar) for scalar in launch.scalars]
    arguments = [*map(pointer, (hidden, cache, weight, bias)), *scalars, *map(pointer, outputs)]
    driver.launch(launch.ptx.encode() + b"\0", launch.entry, launch.grid, launch.block, launch.shared_bytes, arguments)
    for got, expected in zip(outputs, reference(hidden, cache, weight, bias, EPSILON), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2 if dtype == "BF16" else 2e-3, atol=2e-2 if dtype == "BF16" else 2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("mean", [True, False], ids=["mean", "copy"])
def test_the_hand_offs_cubin_is_launched_by_the_driver(driver: Driver, mean: bool, tmp_path: Path) -> None:
    compiled: CompiledKernel = compile_ahead(hand_off_of(torch.float16, mean), capability(), tmp_path)
    rows = 4 if mean else 2
    outputs = {f"tap {place}": torch.randn(rows, 1024 >> place, 640, device="cuda").half() for place in range(3)}
    caches = {name: torch.full_like(output[:2], torch.nan) for name, output in outputs.items()}
    table = HandOff(outputs, caches)._table
    driver.launch(compiled.cubin, compiled.entry, len(table), 32 * compiled.warps, compiled.shared_bytes, [pointer(table)])
    expected = {name: torch.empty_like(cache) for name, cache in caches.items()}
    hand_off_reference(outputs, expected)
    for name, cache in caches.items():
        torch.testing.assert_close(cache, expected[name], rtol=1e-3, atol=1e-3)

"""All differences between TensorRT 10, TensorRT 11 and TensorRT-RTX 1, each with its reason.

The three share one Python API. All other modules here take TensorRT's module as an argument ``trt`` of type `Api`, and name enum
members, never their numbers, which changed between versions.

We have run the builder of TensorRT-RTX 1.7, on machines without a GPU. TensorRT 10 and 11, and the runtime of TensorRT-RTX, which
needs a GPU, are type-checked, and their runtimes tested on a stand-in; none of them has been run.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, Protocol, cast

from tgate_trt.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    import tensorrt

DTYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64", "int32": "INT32", "bool": "BOOL"}
"""TensorRT's names of the dtypes."""


class Api(Protocol):
    """The part of the modules `tensorrt` and `tensorrt_rtx` that we use, which is the same in both."""

    __name__: str
    __version__: str

    def __hash__(self) -> int: ...

    Builder: type[tensorrt.Builder]
    BuilderFlag: type[tensorrt.BuilderFlag]
    DataType: type[tensorrt.DataType]
    ExecutionContextAllocationStrategy: type[tensorrt.ExecutionContextAllocationStrategy]
    HardwareCompatibilityLevel: type[tensorrt.HardwareCompatibilityLevel]
    ILogger: type[tensorrt.ILogger]
    IProgressMonitor: type[tensorrt.IProgressMonitor]
    IStreamWriter: type[tensorrt.IStreamWriter]
    MemoryPoolType: type[tensorrt.MemoryPoolType]
    NetworkDefinitionCreationFlag: type[tensorrt.NetworkDefinitionCreationFlag]
    OnnxParser: type[tensorrt.OnnxParser]
    OnnxParserRefitter: type[tensorrt.OnnxParserRefitter]
    Refitter: type[tensorrt.Refitter]
    Runtime: type[tensorrt.Runtime]
    Weights: type[tensorrt.Weights]


@dataclass(frozen=True)
class Flavour:
    """One of the two products."""

    backend: str
    """Name of the backend in the commands."""
    modules: tuple[str, ...]
    """Python modules to try; the first that imports is used."""
    requirement: str
    """Package to install."""
    capabilities: tuple[str, ...]
    """Compute capabilities for which any machine can build plans. TensorRT builds only for the GPU on which it times kernels."""
    capabilities_by_default: tuple[str, ...]
    """Those to build for if none is named and no GPU is present. SM75 is not among them: there TensorRT-RTX refuses fp32 GEMMs."""
    has_timing_cache: bool
    """Whether builds time kernels, and can keep the timings. TensorRT-RTX times none; it completes a plan when it loads it."""
    has_runtime_cache: bool
    """Whether kernels are compiled for this GPU when a plan is loaded, and can be kept. TensorRT compiles them in the build."""
    captures_graphs: bool
    """Whether the runtime captures CUDA graphs itself. TensorRT-RTX does, for it compiles kernels in the background and captures anew
    when they are ready: a graph that a caller captures keeps the slower kernels from before."""
    takes_plugins: bool
    """Whether a graph may hold plugins."""

    @property
    def builds_ahead_of_time(self) -> bool:
        """Whether plans can be built without a GPU."""
        return bool(self.capabilities)

    def is_installed(self) -> bool:
        """Whether its module imports."""
        return self._import() is not None

    def load(self) -> Api:
        """Its Python module.

        Raises:
            UnsupportedError: if the module is not installed.
        """
        module = self._import()
        if module is None:
            raise UnsupportedError(
                f"the {self.backend} backend needs {self.requirement}, which is not installed here: pip install {self.requirement}"
            )
        return cast(Api, module)

    def version(self) -> str | None:
        """Version of the installed module, without loading it; None if it is not installed."""
        for name in self.modules:
            for distribution in metadata.packages_distributions().get(name, ()):
                return metadata.version(distribution)
        return None

    def _import(self) -> Any:
        for name in self.modules:
            if importlib.util.find_spec(name) is None:
                continue
            try:
                module = importlib.import_module(name)
            except (ImportError, OSError):  # its shared libraries cannot be loaded
                continue
            if hasattr(module, "Builder"):  # a folder of type stubs imports as an empty namespace
                return module
        return None

    def why_no_plugins(self) -> str | None:
        """Why an engine cannot hold the plugin of `tgate_trt.kernels.tensorrt_plugin`; None if it can."""
        if not self.takes_plugins:
            return f"{self.backend} takes no plugins"
        version = self.version()
        if version is None:
            return f"{self.requirement} is not installed"
        release = tuple(int(part) for part in version.split(".")[:2])
        # torch-tensorrt does not use such plugins on 10.14.
        if release < (10, 9) or release == (10, 14):
            return f"plugins that are compiled ahead of time need TensorRT 10.9 or later, but not 10.14; {version} is installed"
        if release < (11, 2) and sys.version_info >= (3, 13):  # it passes a generic alias to `issubclass`
            return f"TensorRT {version} cannot register plugins with Python 3.13 or later; TensorRT 11.2 can"
        if importlib.util.find_spec("triton") is None:
            return "compiling the plugin needs Triton, which is not installed"
        return None

    def check_capabilities(self, capabilities: Sequence[str]) -> None:
        """Check the compute capabilities to build for.

        Raises:
            InputError: if this product does not build for one of them, or builds only for the GPU of this machine.
        """
        for name in capabilities:
            if not self.builds_ahead_of_time:
                raise InputError(f"--compute-capability is for tensorrt-rtx; {self.backend} builds for the GPU of this machine")
            if name not in self.capabilities:
                raise InputError(f"{self.backend} does not build for {name!r}; it builds for {', '.join(self.capabilities)}")

    def set_target(self, trt: Api, config: tensorrt.IBuilderConfig, capabilities: Sequence[str]) -> None:
        """Set the compute capabilities to build for, and that engines work in the caller's memory alone, which graphs need.

        Without capabilities, plans are for the GPU of this machine if there is one: TensorRT-RTX's own default is every GPU from
        Ampere on.
        """
        if not self.builds_ahead_of_time:
            return
        rtx, rtx_config = cast(Any, trt), cast(Any, config)
        config.set_flag(rtx.BuilderFlag.REQUIRE_USER_ALLOCATION)
        capabilities = capabilities or (("CURRENT",) if gpu_is_present() else ())
        if not capabilities:
            return
        rtx_config.num_compute_capabilities = len(capabilities)
        for index, name in enumerate(capabilities):
            rtx_config.set_compute_capability(getattr(rtx.ComputeCapability, name), index)

    def create_context(
        self, trt: Api, engine: tensorrt.ICudaEngine, *, cache: bytes | None, specialisation: str, cuda_graphs: bool
    ) -> tuple[tensorrt.IExecutionContext | None, Callable[[], bytes | None] | None]:
        """Make an execution context that works in the caller's activation memory.

        Args:
            trt: the module.
            engine: the plan on the GPU.
            cache: compiled kernels that an earlier context of TensorRT-RTX returned.
            specialisation: when TensorRT-RTX compiles kernels for a new shape: one of `SPECIALISATIONS`.
            cuda_graphs: whether TensorRT-RTX captures CUDA graphs.

        Returns:
            The context, None if TensorRT cannot make one; and for TensorRT-RTX a function that returns its compiled kernels, None if
            it cannot, to be kept for the next context.
        """
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self.has_runtime_cache:
            return engine.create_execution_context(strategy), None
        config = cast(Any, engine.create_runtime_config())
        config.set_execution_context_allocation_strategy(strategy)
        strategies = cast(Any, trt).DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = getattr(strategies, specialisation.upper())
        graphs = cast(Any, trt).CudaGraphStrategy
        config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if cuda_graphs else graphs.DISABLED
        kept = config.create_runtime_cache()
        if cache:
            kept.deserialize(cache)  # the cache stays empty if this one comes from another GPU, driver or version
        config.set_runtime_cache(kept)

        def serialize() -> bytes | None:
            blob = kept.serialize()
            return None if blob is None else bytes(blob)

        return engine.create_execution_context(config), serialize


SPECIALISATIONS = ("lazy", "eager", "none")
"""When TensorRT-RTX compiles kernels for a new shape: in the background, at once, or never."""

RTX = Flavour(
    backend="tensorrt-rtx",
    modules=("tensorrt_rtx", "tensorrt_rtx_bindings"),
    requirement="tensorrt-rtx",
    capabilities=("SM75", "SM80", "SM86", "SM89", "SM120", "SM121"),
    capabilities_by_default=("SM80", "SM86", "SM89", "SM120", "SM121"),
    has_timing_cache=False,
    has_runtime_cache=True,
    captures_graphs=True,
    takes_plugins=False,
)
TENSORRT = Flavour(
    backend="tensorrt",
    modules=("tensorrt",),
    requirement="tensorrt-cu13",
    capabilities=(),
    capabilities_by_default=(),
    has_timing_cache=True,
    has_runtime_cache=False,
    captures_graphs=False,
    takes_plugins=True,
)
FLAVOURS = {flavour.backend: flavour for flavour in (TENSORRT, RTX)}


def gpu_is_present() -> bool:
    """Whether the NVIDIA driver finds a device."""
    return compute_capability() is not None


def compute_capability() -> str | None:
    """The first GPU's compute capability, such as ``"SM89"``; None without a GPU. Read from the driver, without loading torch."""
    found = _first_gpu()
    return None if found is None else found[1]


def gpu_name() -> str | None:
    """The first GPU's name; None without a GPU."""
    found = _first_gpu()
    return None if found is None else found[0]


@functools.lru_cache(maxsize=1)
def _first_gpu() -> tuple[str, str] | None:
    """Name and compute capability of the first GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, numbers, name = ctypes.c_int(), (ctypes.c_int(), ctypes.c_int()), ctypes.create_string_buffer(128)
    if driver.cuInit(0) != 0 or driver.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None
    for number, attribute in zip(numbers, (_CAPABILITY_MAJOR, _CAPABILITY_MINOR), strict=True):
        driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
    driver.cuDeviceGetName(name, len(name), device)
    return name.value.decode(), "SM" + "".join(str(number.value) for number in numbers)


_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
"""``CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR`` and ``…_MINOR`` in ``cuda.h``."""

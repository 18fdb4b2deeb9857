"""What differs between TensorRT 10, TensorRT 11 and TensorRT-RTX 1: all of it is here, each difference with its reason.

The three share one Python API. Everything else in this room takes the module as its argument, named ``trt`` and typed
`Api`, and names enum members, never their numbers, which moved between versions.

Run by us: TensorRT-RTX 1.7, the builder on machines without a GPU. Type-checked only, never run: TensorRT 10 and 11, and
the whole runtime half of TensorRT-RTX, which needs a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, Protocol, cast

from tgate_trt.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    import tensorrt


class Api(Protocol):
    """The part of the modules `tensorrt` and `tensorrt_rtx` that is used here: the same in both."""

    __name__: str
    __version__: str
    Builder: type[tensorrt.Builder]
    BuilderFlag: type[tensorrt.BuilderFlag]
    DataType: type[tensorrt.DataType]
    EngineValidity: Any
    ExecutionContextAllocationStrategy: type[tensorrt.ExecutionContextAllocationStrategy]
    HardwareCompatibilityLevel: type[tensorrt.HardwareCompatibilityLevel]
    ILogger: type[tensorrt.ILogger]
    IProgressMonitor: type[tensorrt.IProgressMonitor]
    IStreamReaderV2: type[tensorrt.IStreamReaderV2]
    IStreamWriter: type[tensorrt.IStreamWriter]
    MemoryPoolType: type[tensorrt.MemoryPoolType]
    NetworkDefinitionCreationFlag: type[tensorrt.NetworkDefinitionCreationFlag]
    OnnxParser: type[tensorrt.OnnxParser]
    Refitter: type[tensorrt.Refitter]
    Runtime: type[tensorrt.Runtime]
    SeekPosition: type[tensorrt.SeekPosition]
    TensorIOMode: type[tensorrt.TensorIOMode]
    TensorLocation: type[tensorrt.TensorLocation]
    Weights: type[tensorrt.Weights]


@dataclass(frozen=True)
class Flavour:
    """One of the two products."""

    backend: str
    """Name of the backend, as the commands take it."""
    modules: tuple[str, ...]
    """Python modules to try, the first that imports wins."""
    requirement: str
    """What to install."""
    capabilities: tuple[str, ...]
    """GPUs for which plans can be built on another machine. TensorRT builds only for the GPU that it measures on."""
    capabilities_by_default: tuple[str, ...]
    """Those for which to build where neither a GPU is at hand nor one named: on Turing (SM75) TensorRT-RTX refuses fp32 GEMMs."""
    has_timing_cache: bool
    """TensorRT times kernels while it builds. TensorRT-RTX times none: it ends the work when it loads a plan."""
    has_runtime_cache: bool
    """TensorRT-RTX compiles kernels for the GPU at hand when a plan is loaded, and can keep them."""
    takes_plugins: bool
    """TensorRT-RTX has no plugins."""

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
            UnsupportedError: if it is not installed here.
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
            except (ImportError, OSError):  # its shared libraries do not load
                continue
            if hasattr(module, "Builder"):  # a folder of type stubs imports too, as an empty namespace
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
        # torch-tensorrt leaves such plugins alone on 10.14.
        if release < (10, 9) or release == (10, 14):
            return f"plugins that are compiled ahead of time take TensorRT 10.9 or later, but not 10.14; {version} is installed"
        if importlib.util.find_spec("triton") is None:
            return "compiling the plugin takes Triton, which is not installed"
        return None

    def check_capabilities(self, capabilities: Sequence[str]) -> None:
        """Check the names of the GPUs to build for.

        Raises:
            InputError: if this product does not know one, or builds for the GPU at hand alone.
        """
        for name in capabilities:
            if not self.builds_ahead_of_time:
                raise InputError(f"--compute-capability is for tensorrt-rtx; {self.backend} builds for the GPU of this machine")
            if name not in self.capabilities:
                raise InputError(f"{self.backend} does not build for {name!r}; it builds for {', '.join(self.capabilities)}")

    def set_target(self, trt: Api, config: tensorrt.IBuilderConfig, capabilities: Sequence[str]) -> None:
        """Say for which GPUs to build; for the one of this machine if none is named."""
        if not capabilities:
            return
        rtx, rtx_config = cast(Any, trt), cast(Any, config)
        rtx_config.num_compute_capabilities = len(capabilities)
        for index, name in enumerate(capabilities):
            rtx_config.set_compute_capability(getattr(rtx.ComputeCapability, name), index)

    def create_context(
        self, trt: Api, engine: tensorrt.ICudaEngine, *, cache: bytes | None, specialisation: str
    ) -> tuple[tensorrt.IExecutionContext, Callable[[], bytes] | None]:
        """Make an execution context whose activation memory is the caller's.

        Args:
            trt: the module.
            engine: of the context.
            cache: what an earlier context's kernels were kept as, for TensorRT-RTX.
            specialisation: of `SPECIALISATIONS`: when TensorRT-RTX compiles kernels for a shape that it has not seen.

        Returns:
            The context, and a function that gives what is to be kept for the next time, where there is something.
        """
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self.has_runtime_cache:
            return engine.create_execution_context(strategy), None
        config = cast(Any, engine.create_runtime_config())
        config.set_execution_context_allocation_strategy(strategy)
        strategies = cast(Any, trt).DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = getattr(strategies, specialisation.upper())
        kept = config.create_runtime_cache()
        if cache:
            kept.deserialize(cache)  # False where it is of another GPU, driver or version: then it starts empty
        config.set_runtime_cache(kept)
        return engine.create_execution_context(config), lambda: bytes(kept.serialize())


SPECIALISATIONS = ("lazy", "eager", "none")
"""When TensorRT-RTX compiles kernels for a shape: in the background, at once, never."""

RTX = Flavour(
    backend="tensorrt-rtx",
    modules=("tensorrt_rtx", "tensorrt_rtx_bindings"),
    requirement="tensorrt-rtx",
    capabilities=("SM75", "SM80", "SM86", "SM89", "SM120", "SM121"),
    capabilities_by_default=("SM80", "SM86", "SM89", "SM120", "SM121"),
    has_timing_cache=False,
    has_runtime_cache=True,
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
    takes_plugins=True,
)
FLAVOURS = {flavour.backend: flavour for flavour in (TENSORRT, RTX)}


def gpu_is_present() -> bool:
    """Whether the NVIDIA driver has a device here."""
    return compute_capability() is not None


def compute_capability() -> str | None:
    """The first GPU's compute capability, such as ``"SM89"``; None without one. Asked of the driver, so that torch need not be loaded."""
    found = _first_gpu()
    return None if found is None else found[1]


def gpu_name() -> str | None:
    """What the first GPU is called; None without one."""
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
"""``CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR`` and ``…_MINOR`` of cuda.h."""

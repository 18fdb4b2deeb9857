"""A strict stand-in for the modules `tensorrt` and `tensorrt_rtx`: their runtime, computed by ONNX Runtime on the CPU.

It refuses what TensorRT refuses and returns False where TensorRT does, so that a mistake in how the API is used shows without a GPU.
It stands for somebody else's API, and for nothing of ours. What it offers is compared with the real modules by
`tests/engines/test_tensorrt_stand_in.py`. A plan is JSON that names an ONNX file; see `write_plan`.
"""

from __future__ import annotations

import ctypes
import enum
import gc
import hashlib
import json
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from tgate_trt.specs import GraphSpec

from .cuda import Cuda, Race

ALIGNMENT = 256
"""TensorRT refuses addresses that this does not divide. Allocations on a GPU begin at multiples of 512; those on the CPU do not, so the
offset within the allocation stands for the address."""

_MAGIC = b"stand-in plan\n"
_NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64, "INT32": np.int32}


def write_plan(plan: Path, graph: Path, spec: GraphSpec, *, stripped: bool = False, **options: Any) -> None:
    """Write a plan.

    Args:
        plan: the file.
        graph: ONNX file that it computes; every input that the spec lacks is a weight.
        spec: with the profile.
        stripped: whether the plan lacks the values of its weights, so that they must be refitted.
        **options: ``refittable``, ``capturable``, ``memory`` in bytes, ``user_allocation`` (RTX's builder flag), ``contexts`` (False if
            none can be made), ``gpu``.
    """
    model = ir.load(graph)
    ir.external_data.load_to_model(model)
    if stripped:
        model = _lifted(model)
        for value in model.graph.initializers.values():
            array = value.const_value.numpy()  # type: ignore[union-attr]
            if array.dtype == np.float32:
                value.const_value = ir.tensor(np.full_like(array, np.nan), name=value.name)
    network = plan.with_suffix(".network.onnx")
    ir.save(model, network)
    bounds = {name: [one.minimum, one.optimum, one.maximum] for name, one in spec.dimensions.items()}
    held = {"network": str(network), "bounds": bounds, "stripped": stripped, "refittable": stripped, **options}
    plan.write_bytes(_MAGIC + json.dumps(held).encode())


def _lifted(model: ir.Model) -> ir.Model:
    """The model with its constants as initializers: both are weights to TensorRT."""
    return LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model).model


class Severity(enum.IntEnum):
    """Of a message."""

    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    """Base class of loggers."""

    Severity = Severity

    def __init__(self) -> None:
        pass

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class DataType(enum.Enum):
    FLOAT = "FLOAT"
    HALF = "HALF"
    BF16 = "BF16"
    INT64 = "INT64"
    INT32 = "INT32"
    BOOL = "BOOL"


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC = "STATIC"
    ON_PROFILE_CHANGE = "ON_PROFILE_CHANGE"
    USER_MANAGED = "USER_MANAGED"


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    LAZY = "LAZY"
    EAGER = "EAGER"
    NONE = "NONE"


class CudaGraphStrategy(enum.Enum):
    DISABLED = "DISABLED"
    WHOLE_GRAPH_CAPTURE = "WHOLE_GRAPH_CAPTURE"


class HostMemory(bytes):
    """What `serialize` returns: it has the buffer protocol."""


@dataclass
class Product:
    """One module's state."""

    cuda: Cuda
    is_rtx: bool
    logger: Any = None
    """The first logger: TensorRT keeps one pointer for the process."""
    contexts: list[Any] = field(default_factory=list)
    """Weak references to every context that was made."""

    def use_logger(self, logger: Any) -> None:
        if self.logger is None:
            self.logger = logger
        elif self.logger is not logger:
            self.error("the logger passed in differs from the one that is registered; it is not used")

    def error(self, message: str) -> bool:
        """Log an error, and return False: what most functions then return."""
        self.logger.log(Severity.ERROR, message)
        return False

    def check_guard(self, what: str) -> None:
        """TensorRT works on the thread's current device, so its callers set that."""
        assert self.cuda.guarded is not None, f"{what} without a device guard: it would run on whatever device is current"


class Builder:
    """Only its name is used at runtime."""


class Weights:
    """Host memory by address, read when the engine is refitted."""

    def __init__(self, type: DataType, ptr: int, count: int) -> None:
        self._type, self._address, self._count = type, ptr, count


class Runtime:
    product: Product

    def __init__(self, logger: Any) -> None:
        self.product.use_logger(logger)

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
        self.product.check_guard("deserialize_cuda_engine")
        blob = bytes(memoryview(serialized_engine))
        if not blob.startswith(_MAGIC):
            self.product.error("IRuntime::deserializeCudaEngine: Error Code 1: Serialization (magic tag does not match)")
            return None
        try:
            plan = json.loads(blob.removeprefix(_MAGIC))
        except ValueError:
            self.product.error("IRuntime::deserializeCudaEngine: Error Code 1: Serialization (the plan is cut off)")
            return None
        if plan.get("gpu", "this") != "this":
            self.product.error(f"the plan was built for {plan['gpu']}")
            return None
        kind = RTXCudaEngine if self.product.is_rtx else ICudaEngine
        return kind(self.product, self, plan)


class ICudaEngine:
    def __init__(self, product: Product, runtime: Runtime, plan: Mapping[str, Any]) -> None:
        self._product, self._plan, self._runtime = product, plan, weakref.ref(runtime)
        self._model = ir.load(plan["network"])
        if plan["refittable"]:
            self._model = _lifted(self._model)
        self._missing = set(self._float_weights()) if plan["stripped"] else set()
        self._values = [*self._model.graph.inputs, *self._model.graph.outputs]
        self._session: Any = None

    @property
    def num_io_tensors(self) -> int:
        return len(self._values)

    @property
    def refittable(self) -> bool:
        return bool(self._plan["refittable"])

    @property
    def device_memory_size_v2(self) -> int:
        return int(self._plan.get("memory", 1024))

    def get_tensor_name(self, index: int) -> str:
        return str(self._values[index].name)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self._dims(name))

    def create_execution_context(self, strategy: Any = ExecutionContextAllocationStrategy.STATIC) -> Any:
        if not self._plan.get("contexts", True):
            self._product.error("IExecutionContext: out of memory")
            return None
        if isinstance(strategy, IRuntimeConfig):
            assert self._product.is_rtx
            context: IExecutionContext = RTXExecutionContext(self, strategy)
        else:
            assert isinstance(strategy, ExecutionContextAllocationStrategy)
            context = IExecutionContext(self, IRuntimeConfig(self._product, strategy))
        self._product.contexts.append(weakref.ref(context))
        return context

    def _dims(self, name: str) -> tuple[Any, ...]:
        (value,) = (value for value in self._values if value.name == name)
        return tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)

    def _dtype(self, name: str) -> Any:
        (value,) = (value for value in self._values if value.name == name)
        return value.dtype.numpy()

    def _float_weights(self) -> list[str]:
        return [name for name, value in self._model.graph.initializers.items() if value.dtype == ir.DataType.FLOAT]

    def _refit(self, values: Mapping[str, Any]) -> None:
        for name, array in values.items():
            self._model.graph.initializers[name].const_value = ir.tensor(array, name=name)
        self._missing -= set(values)
        self._session = None

    def _compute(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        if self._session is None:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, options.log_severity_level = 1, 3
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            self._session = onnxruntime.InferenceSession(ir.to_proto(self._model).SerializeToString(), options)
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, dict(inputs)), strict=True))


class RTXCudaEngine(ICudaEngine):
    """What TensorRT-RTX has besides."""

    def create_runtime_config(self) -> Any:
        return IRuntimeConfig(self._product)


class IRuntimeCache:
    """Compiled kernels: a line for each shape that has run."""

    def __init__(self, product: Product) -> None:
        self._product = product
        self._kernels: set[str] = set()

    def serialize(self) -> HostMemory | None:
        if not self._kernels:
            return None
        return HostMemory(b"kernels\n" + "\n".join(sorted(self._kernels)).encode())

    def deserialize(self, blob: Any) -> bool:
        content = bytes(memoryview(blob))
        if not content.startswith(b"kernels\n"):
            return self._product.error("IRuntimeCache::deserialize: the blob is of another GPU, driver or version")
        self._kernels |= set(content.decode().splitlines()[1:])
        return True


class IRuntimeConfig:
    def __init__(self, product: Product, strategy: Any = ExecutionContextAllocationStrategy.STATIC) -> None:
        self._product, self._strategy = product, strategy
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self._cache: IRuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self._strategy = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache(self._product)

    def set_runtime_cache(self, cache: IRuntimeCache | None = None) -> bool:
        self._cache = cache
        return True


@dataclass(frozen=True)
class Bound:
    """A tensor as a launch uses it, which is what a captured graph keeps."""

    address: int
    shape: tuple[int, ...]
    memory: Any


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, config: IRuntimeConfig) -> None:
        self._engine, self._runtime = weakref.ref(engine), engine._runtime
        self._product, self._config = engine._product, config
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._block = (0, 0)
        self.runs = 0
        self.specialised: set[str] = set()
        """Shapes for which kernels are compiled."""
        self.own_graphs: set[str] = set()
        """Shapes that the runtime has captured itself."""

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        engine = self._alive()
        inputs = {value.name for value in engine._model.graph.inputs}
        if self._product.cuda.is_capturing():
            raise RuntimeError("a shape changes within a capture")
        if name not in inputs or len(shape) != len(engine._dims(name)):
            return self._product.error(f"setInputShape: {name!r} is no input of {len(shape)} dimensions")
        for size, dimension in zip(shape, engine._dims(name), strict=True):
            lowest, _, highest = engine._plan["bounds"].get(dimension, (dimension, dimension, dimension))
            if not lowest <= size <= highest:
                return self._product.error(f"setInputShape: {name!r} has {size} where the profile has {lowest} to {highest}")
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        engine = self._alive()
        if name not in {value.name for value in engine._values}:
            return self._product.error(f"setTensorAddress: there is no tensor {name!r}")
        if not self._is_aligned(memory):
            return self._product.error(f"setTensorAddress: {ALIGNMENT} does not divide the address of {name!r}")
        self._addresses[name] = memory
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        if not self._is_aligned(memory) or size < self._alive().device_memory_size_v2:
            self._product.error("setDeviceMemoryV2: the block is too small or not aligned")
            return
        self._block = (memory, size)

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine, cuda = self._alive(), self._product.cuda
        self._product.check_guard("execute_async_v3")
        self._complete_static_shapes(engine)
        reason = self._why_not(engine, stream_handle)
        if reason is not None:
            return self._product.error(f"enqueueV3: {reason}")
        bound = {value.name: self._bound(engine, value.name) for value in engine._values}
        block = cuda.find(self._block[0])
        if cuda.is_capturing():
            assert self._config.cuda_graph_strategy is CudaGraphStrategy.DISABLED, "the runtime captures itself: two captures would nest"
            assert not self._product.is_rtx, "a capture by hand keeps the kernels that TensorRT-RTX would replace"
            assert cuda.capture is not None
            if not self._is_capturable():
                cuda.capture.is_invalid = True
                return self._product.error("enqueueV3: the launches cannot be captured")
            context = weakref.ref(self)
            cuda.capture.graph.launches.append(lambda: _replay(context, bound, block, cuda))
            return True
        self._run(engine, bound, block, cuda.of_handle(stream_handle))
        self._specialise(bound)
        return True

    def _specialise(self, bound: Mapping[str, Bound]) -> None:
        """TensorRT-RTX compiles kernels for a shape in the background, and then captures its own graph."""
        if not self._product.is_rtx:
            return
        shape = " ".join(f"{name}{list(one.shape)}" for name, one in sorted(bound.items()))
        self.specialised.add(shape)
        if self._config._cache is not None:
            self._config._cache._kernels.add(hashlib.sha256(shape.encode()).hexdigest())
        if self._config.cuda_graph_strategy is CudaGraphStrategy.WHOLE_GRAPH_CAPTURE and self._is_capturable():
            self.own_graphs.add(shape)

    def _run(self, engine: ICudaEngine, bound: Mapping[str, Bound], block: Any, stream: Any) -> None:
        """Compute from addresses to addresses, on a stream."""
        cuda = self._product.cuda
        outputs = {value.name for value in engine._model.graph.outputs}
        for name, one in bound.items():
            if one.memory is None or one.memory.is_freed:
                raise Race(f"{name} reads or writes memory that was freed")
            cuda.access(one.memory, stream, writes=name in outputs)
        if block is None or block.is_freed:
            raise Race("the activation memory was freed")
        cuda.access(block, stream, writes=True)
        views = {name: _view(one, engine._dtype(name)) for name, one in bound.items()}
        for name, array in engine._compute({name: array for name, array in views.items() if name not in outputs}).items():
            views[name][...] = array
        ctypes.memset(self._block[0], 0xFF, self._block[1])  # nothing in it outlives a run
        self.runs += 1

    def _why_not(self, engine: ICudaEngine, stream_handle: int) -> str | None:
        if stream_handle == 0:
            return "the default stream would be synchronised with the host"
        if engine._missing:
            return f"{len(engine._missing)} weights are missing"
        unset = [value.name for value in engine._model.graph.inputs if value.name not in self._shapes]
        if unset:
            return f"the shape of {unset[0]!r} is not set"
        unset = [value.name for value in engine._values if value.name not in self._addresses]
        if unset:
            return f"the address of {unset[0]!r} is not set"
        if self._config._strategy is not ExecutionContextAllocationStrategy.USER_MANAGED:
            return None
        block = self._product.cuda.find(self._block[0])
        if block is None or self._block[1] < engine.device_memory_size_v2:
            return "there is no activation memory, or it is too small"
        return None

    def _complete_static_shapes(self, engine: ICudaEngine) -> None:
        """Inputs without a dynamic dimension need no shape."""
        for value in engine._model.graph.inputs:
            dims = engine._dims(str(value.name))
            if all(isinstance(size, int) for size in dims):
                self._shapes.setdefault(str(value.name), dims)

    def _bound(self, engine: ICudaEngine, name: str) -> Bound:
        shape = self._shapes.get(name)
        if shape is None:  # an output: its named dimensions are those of the inputs
            sizes = {}
            for value in engine._model.graph.inputs:
                sizes |= dict(zip(engine._dims(str(value.name)), self._shapes[str(value.name)], strict=True))
            shape = tuple(size if isinstance(size, int) else sizes[size] for size in engine._dims(name))
        return Bound(self._addresses[name], shape, self._product.cuda.find(self._addresses[name]))

    def _is_capturable(self) -> bool:
        """Whether launches can be captured; TensorRT-RTX must have built the plan for that."""
        plan = self._alive()._plan
        return bool(plan.get("capturable", True) and (not self._product.is_rtx or plan.get("user_allocation", False)))

    def _is_aligned(self, address: int) -> bool:
        memory = self._product.cuda.find(address)
        return memory is not None and (address - memory.base) % ALIGNMENT == 0

    def _alive(self) -> ICudaEngine:
        """The engine, which must outlive its context, as the runtime must outlive the engine."""
        engine = self._engine()
        assert engine is not None and self._runtime() is not None, "a context is used after its engine or runtime was freed"
        return engine


class RTXExecutionContext(IExecutionContext):
    """What TensorRT-RTX has besides."""

    def is_stream_capturable(self, stream: int) -> bool:
        return self._is_capturable()


def _replay(context: Any, bound: Mapping[str, Bound], block: Any, cuda: Cuda) -> None:
    """Launch on the addresses that were captured, whatever tensors are there now; an address that is in none is an error."""
    alive = context()
    if alive is None:
        raise Race("a graph of a context that was freed is replayed")
    now = {name: replace(one, memory=cuda.find(one.address)) for name, one in bound.items()}
    alive._run(alive._alive(), now, None if block is None else cuda.find(block.base), cuda.current())


def _view(bound: Bound, dtype: Any) -> Any:
    dtype = np.dtype(dtype)
    count = int(np.prod(bound.shape, dtype=np.int64))
    buffer = (ctypes.c_char * (count * dtype.itemsize)).from_address(bound.address)
    return np.frombuffer(buffer, dtype, count).reshape(bound.shape)


class Refitter:
    product: Product

    def __init__(self, engine: ICudaEngine, logger: Any) -> None:
        assert engine.refittable, "only a refittable engine has a refitter"
        self.product.use_logger(logger)
        self._engine = engine
        self._given: dict[str, Any] = {}
        self._by_address: dict[str, tuple[Weights, Any]] = {}

    def get_all_weights(self) -> list[str]:
        return self._engine._float_weights()

    def get_missing_weights(self) -> list[str]:
        return sorted(self._engine._missing - set(self._given) - set(self._by_address))

    def set_named_weights(self, name: str, weights: Weights) -> bool:
        if name not in self.get_all_weights():
            return self.product.error(f"setNamedWeights: there are no weights {name!r}")
        held = self._engine._model.graph.initializers[name]
        if weights._type.name != held.dtype.name or weights._count != int(np.prod(held.shape.numpy(), dtype=np.int64)):  # type: ignore[union-attr]
            return self.product.error(f"setNamedWeights: {name!r} has another type or count")
        self._by_address[name] = (weights, self.product.cuda.find(weights._address))
        return True

    def refit_cuda_engine(self) -> bool:
        if missing := self.get_missing_weights():
            return self.product.error(f"refitCudaEngine: {missing[0]!r} is missing")
        gc.collect()
        values = dict(self._given)
        for name, (weights, memory) in self._by_address.items():
            assert memory is not None and not memory.is_freed, "host memory must live until the engine is refitted"
            held = self._engine._model.graph.initializers[name]
            shape = tuple(int(size) for size in held.shape.numpy())  # type: ignore[union-attr]
            values[name] = _view(Bound(weights._address, shape, memory), _NUMPY[weights._type.name]).copy()
        self._engine._refit(values)
        return True


class OnnxParserRefitter:
    product: Product

    def __init__(self, refitter: Refitter, logger: Any) -> None:
        self.product.use_logger(logger)
        self._refitter = refitter

    def refit_from_file(self, model: str) -> bool:
        loaded = ir.load(model)
        ir.external_data.load_to_model(loaded)
        held = _lifted(loaded).graph.initializers
        for name in self._refitter.get_all_weights():
            if name not in held:
                return self.product.error(f"refitFromFile: {name!r} is not in {model}")
            self._refitter._given[name] = held[name].const_value.numpy()  # type: ignore[union-attr]
        return True


_OF_BOTH = (DataType, ExecutionContextAllocationStrategy, ILogger, Builder, Weights)
_OF_RTX = (IRuntimeConfig, IRuntimeCache, DynamicShapesKernelSpecializationStrategy, CudaGraphStrategy)
_WITH_STATE = (Runtime, Refitter, OnnxParserRefitter)


def module(name: str, cuda: Cuda, *, is_rtx: bool) -> ModuleType:
    """The stand-in as a module, with a state of its own; to be put into `sys.modules`."""
    made: Any = ModuleType(name)
    made.__spec__, made.__version__ = ModuleSpec(name, None), "1.0.0"
    made.product = product = Product(cuda, is_rtx)
    for offered in (*_OF_BOTH, *(_OF_RTX if is_rtx else ())):
        setattr(made, offered.__name__, offered)
    made.ICudaEngine = RTXCudaEngine if is_rtx else ICudaEngine
    made.IExecutionContext = RTXExecutionContext if is_rtx else IExecutionContext
    for offered in _WITH_STATE:
        setattr(made, offered.__name__, type(offered.__name__, (offered,), {"product": product}))
    return made  # type: ignore[no-any-return]

"""Runs TensorRT plans of every flavour on one CUDA stream, without a synchronisation with the host.

No GPU has run this file, because that takes one that the installed TensorRT supports: `make bench-gpu` runs it there. It is
type-checked against TensorRT 10 and TensorRT-RTX, and every test run puts it on a strict stand-in for their modules.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor

from tgate_trt.engines.base import check, given
from tgate_trt.engines.graphs import GraphCache, Staging
from tgate_trt.engines.shared_weights import SharedWeights
from tgate_trt.engines.tensorrt_callbacks import python_logger
from tgate_trt.engines.tensorrt_flavours import DTYPES, SPECIALISATIONS, Api, Flavour
from tgate_trt.errors import BundleError, GateError, InputError, UnsupportedError
from tgate_trt.files import replacing
from tgate_trt.specs import CACHE_PREFIX, GraphSpec, TensorSpec

if TYPE_CHECKING:
    import tensorrt


class Arena:
    """A stream and activation memory on a GPU, which the engines of one pipeline share because they run one after the other.

    Whoever runs, loads or unloads an engine holds ``lock``: so several threads may use engines of one arena, one at a time.
    """

    def __init__(self, device: torch.device) -> None:
        """Make a stream on a CUDA device; memory is allocated for the first engine."""
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.lock = threading.RLock()
        self._memory: Tensor | None = None

    def memory(self, size: int) -> Tensor:
        """Activation memory of at least ``size`` bytes; a new block if the old one was too small."""
        if self._memory is None or self._memory.numel() < size:
            self.stream.synchronize()
            self._memory = None  # frees the old block before the new one is allocated
            self._memory = torch.empty(max(size, 256), dtype=torch.uint8, device=self.device)
        return self._memory


@dataclass(frozen=True)
class RuntimeOptions:
    """How plans are run."""

    cuda_graphs: bool = True
    """Whether to capture each shape's launches once and replay them."""
    specialisation: str = "lazy"
    """When TensorRT-RTX compiles kernels for a new shape: one of `SPECIALISATIONS`."""
    runtime_cache: Path | None = None
    """Folder in which TensorRT-RTX's compiled kernels are kept from one process to the next."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: if ``specialisation`` is none of `SPECIALISATIONS`.
        """
        if self.specialisation not in SPECIALISATIONS:
            raise InputError(f"specialisation is one of {', '.join(SPECIALISATIONS)}, got {self.specialisation!r}")


@dataclass
class _CompiledKernels:
    """Kernels that TensorRT-RTX compiled for this GPU, and the file that keeps them."""

    path: Path
    serialize: Callable[[], bytes | None]
    _kept: bytes | None = None
    """Hash of what the file holds."""

    def keep(self) -> None:
        """Write the kernels if there are new ones; without the file, the next load compiles again."""
        blob = self.serialize()
        if not blob or (held := hashlib.sha256(blob).digest()) == self._kept:
            return
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as partial:
                partial.write_bytes(blob)
            self._kept = held


@dataclass
class _Loaded:
    """A plan that is loaded on the GPU."""

    runtime: tensorrt.Runtime
    engine: tensorrt.ICudaEngine
    context: tensorrt.IExecutionContext
    graphs: GraphCache
    compiled: _CompiledKernels | None
    staging: Staging = field(default_factory=Staging)
    addresses: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    met: set[tuple[torch.Size, ...]] = field(default_factory=set)
    """Shapes of all inputs that have run together."""


class TensorRTEngine:
    """A plan of TensorRT or TensorRT-RTX that reads caches from, and writes outputs to, the caller's memory."""

    spec: GraphSpec
    """The graph's inputs and outputs."""
    device: torch.device
    """The GPU that must hold the tensors that `run` receives."""

    def __init__(
        self,
        plan: Path,
        spec: GraphSpec,
        flavour: Flavour,
        arena: Arena,
        *,
        weights: SharedWeights | None = None,
        graph: Path | None = None,
        options: RuntimeOptions | None = None,
        changed: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Load a plan.

        Args:
            plan: file that `tgate_trt.engines.tensorrt_builder.build_plan` wrote.
            spec: inputs and outputs of its graph.
            flavour: with which it was built.
            arena: stream and activation memory, shared by all engines of a pipeline.
            weights: for a plan that takes weights as inputs.
            graph: ONNX file of the graph, for a plan that was built without its weights.
            options: how to run it.
            changed: weights that differ from the graph's, by name.

        Raises:
            UnsupportedError: if the flavour is not installed, or ``changed`` is for a plan that holds its weights.
            BundleError: if the plan cannot be loaded, or was built from another graph.
        """
        self.spec, self.device = spec, arena.device
        self._plan, self._flavour, self._arena = plan, flavour, arena
        self._weights, self._graph, self._options = weights, graph, options or RuntimeOptions()
        self._trt: Api = flavour.load()
        self._logger = python_logger(self._trt)
        self._closed = False
        self._keep_at_end: weakref.finalize[Any, Any] | None = None
        self._refit: Mapping[str, Tensor] = changed or {}
        self._loaded: _Loaded | None = None
        with self._on_the_gpu():
            if changed and weights is not None:
                weights.replace(changed)
            loaded = self._loaded = self._load()
            if changed and weights is None and not loaded.engine.refittable:
                raise UnsupportedError(self._holds_its_weights())

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Run once; see `tgate_trt.engines.base.Engine.run`.

        The engine runs on the arena's stream, because TensorRT would synchronise with the host on the default stream. The arena's
        stream waits for the caller's first, and the caller's for the arena's afterwards. Inputs other than caches are copied to the
        engine's own buffers. Threads may call it, and take turns.

        Raises:
            GateError: if the engine was closed, a tensor does not fit, or TensorRT cannot run.
        """
        with self._on_the_gpu():
            if self._closed:
                raise GateError(f"the {self.spec.name} engine has been closed; load the bundle again")
            loaded = self._loaded = self._loaded or self._load()
            caller = torch.cuda.current_stream(self.device)
            self._arena.stream.wait_stream(caller)
            try:
                with torch.cuda.stream(self._arena.stream):
                    self._launch(loaded, self._bind(loaded, inputs, outputs))
            finally:
                caller.wait_stream(self._arena.stream)

    def replace_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace some weights; see `tgate_trt.engines.base.Engine.replace_weights`.

        Shared weights are overwritten in place, so captured CUDA graphs stay valid. A refittable plan is refitted.

        Raises:
            BundleError: if a shared weight is unknown, or has another shape or dtype.
            UnsupportedError: if the plan holds its weights and cannot be refitted.
        """
        with self._on_the_gpu():
            if self._weights is not None:
                self._arena.stream.synchronize()
                self._weights.replace(weights)
                return
            loaded = self._loaded = self._loaded or self._load()
            if not loaded.engine.refittable:
                raise UnsupportedError(self._holds_its_weights())
            self._refit = dict(weights)
            del loaded
            self.unload()  # the plan brings back the weights that were replaced before
            self._loaded = self._load()

    def _holds_its_weights(self) -> str:
        return f"the {self.spec.name} engine holds its weights; build it with --weights shared to replace them"

    def unload(self) -> None:
        """Free the plan, its weights and its CUDA graphs until the engine runs again; keeps TensorRT-RTX's compiled kernels."""
        with self._on_the_gpu():
            if self._loaded is None:
                return
            self._arena.stream.synchronize()
            if self._keep_at_end is not None:
                self._keep_at_end()
            self._loaded = None

    def close(self) -> None:
        """Free everything; the engine cannot run again."""
        with self._on_the_gpu():
            self.unload()
            self._closed = True

    @contextlib.contextmanager
    def _on_the_gpu(self) -> Iterator[None]:
        """Hold the arena, with its GPU as the current device: TensorRT loads and runs on the current one."""
        with self._arena.lock, torch.cuda.device(self.device):
            yield

    def _load(self) -> _Loaded:
        torch.cuda.empty_cache()  # PyTorch keeps freed memory, which TensorRT cannot take
        runtime = self._trt.Runtime(self._logger)
        with self._plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as blob:
            engine = runtime.deserialize_cuda_engine(cast(Any, blob))
        if engine is None:
            self._fail("load")
        weight_inputs = self._weight_inputs(engine)
        if engine.refittable:
            self._refit_engine(engine)
        self._arena.memory(engine.device_memory_size_v2)  # before anything is captured: a new block makes graphs invalid
        cache = self._cache_file()
        kept = cache.read_bytes() if cache is not None and cache.is_file() else None
        context, serialize = self._flavour.create_context(
            self._trt, engine, cache=kept, specialisation=self._options.specialisation, cuda_graphs=self._options.cuda_graphs
        )
        if context is None:
            self._fail("make a context of")
        compiled = None if cache is None or serialize is None else _CompiledKernels(cache, serialize)
        self._keep_at_end = None if compiled is None else weakref.finalize(self, compiled.keep)
        loaded = _Loaded(runtime, engine, context, GraphCache(self.spec.name), compiled)
        for name, weight in weight_inputs.items():
            self._set_address(loaded, name, weight)
        return loaded

    def _fail(self, what: str) -> NoReturn:
        raise BundleError(
            f"{self._flavour.backend} cannot {what} {self._plan.name}: {self._logger.last}; build it on this machine with tgate-build"
        )

    def _weight_inputs(self, engine: tensorrt.ICudaEngine) -> dict[str, Tensor]:
        """The shared weights that a plan takes as inputs, by name: all its tensors but the spec's.

        Raises:
            BundleError: if the plan's other tensors differ from the spec's, or a weight has another shape.
        """
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        expected = {tensor.name for tensor in (*self.spec.inputs, *self.spec.outputs)}
        missing = sorted(expected - set(names))
        if missing or (self._weights is None and set(names) != expected):
            other = missing or sorted(set(names) - expected)
            raise BundleError(
                f"{self._plan.name} was not built from the {self.spec.name} graph: {other[0]!r} differs; "
                "build the bundle again with --force"
            )
        if self._weights is None:
            return {}
        weights = {name: self._weights[name] for name in names if name not in expected}
        for name, weight in weights.items():
            taken = tuple(cast(Any, engine.get_tensor_shape(name)))
            if tuple(weight.shape) != taken:
                raise BundleError(
                    f"{self._plan.name} takes {name!r} as {list(taken)}, and the weights hold {list(weight.shape)}; build the bundle again"
                )
        return weights

    def _refit_engine(self, engine: tensorrt.ICudaEngine) -> None:
        """Set the weights that a stripped plan lacks, the graph's constants among them, and those that were replaced."""
        refitter = self._trt.Refitter(engine, self._logger)
        known, is_stripped = set(refitter.get_all_weights()), bool(refitter.get_missing_weights())
        changed = {name: tensor for name, tensor in self._refit.items() if name in known}
        if not is_stripped and not changed:
            return
        if is_stripped:
            if self._graph is None or not self._graph.is_file():
                raise BundleError(f"{self._plan.name} holds no weights, and its graph is not in the bundle; build the bundle again")
            if not self._trt.OnnxParserRefitter(refitter, self._logger).refit_from_file(str(self._graph)):
                raise BundleError(f"{self._plan.name} cannot take the weights of {self._graph.name}: {self._logger.last}; build it again")
        kept_alive = []  # TensorRT reads host memory only when it refits
        for name, tensor in changed.items():
            on_host = tensor.cpu().contiguous()
            kept_alive.append(on_host)
            kind = getattr(self._trt.DataType, DTYPES[str(on_host.dtype).removeprefix("torch.")])
            if not refitter.set_named_weights(name, self._trt.Weights(kind, on_host.data_ptr(), on_host.numel())):
                raise UnsupportedError(f"{self._plan.name} does not allow {name!r} to be replaced; build it with --weights shared")
        if not refitter.refit_cuda_engine():
            raise BundleError(f"{self._plan.name} cannot be refitted: {self._logger.last}; build the bundle again")

    def _bind(self, loaded: _Loaded, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> tuple[Any, ...]:
        """Set the shapes and addresses that changed, and return all of them: the key of a captured graph."""
        self._use_memory(loaded)
        key = []
        for tensor in self.spec.inputs:
            value = given(self.spec, inputs, tensor)
            if not tensor.name.startswith(CACHE_PREFIX):
                check(self.spec, tensor, value, self.device)
                value = loaded.staging.copied(tensor.name, value)
            key.append(self._set_shape_and_address(loaded, tensor, value))
        for tensor in self.spec.outputs:
            key.append(self._set_shape_and_address(loaded, tensor, given(self.spec, outputs, tensor), is_input=False))
        return tuple(key)

    def _set_shape_and_address(self, loaded: _Loaded, tensor: TensorSpec, value: Tensor, *, is_input: bool = True) -> tuple[Any, ...]:
        name, address = tensor.name, value.data_ptr()
        if (loaded.shapes.get(name), loaded.addresses.get(name)) != (value.shape, address):
            check(self.spec, tensor, value, self.device)
            if is_input and not loaded.context.set_input_shape(name, cast(Any, tuple(value.shape))):
                raise GateError(f"the {self.spec.name} engine does not take {name!r} of shape {list(value.shape)}: {self._logger.last}")
            loaded.shapes[name] = value.shape
            self._set_address(loaded, name, value)
        return address, value.shape

    def _set_address(self, loaded: _Loaded, name: str, value: Tensor) -> None:
        """Bind a tensor. TensorRT refuses an address that 256 does not divide, and would go on with the old one.

        Raises:
            GateError: if it refuses.
        """
        loaded.addresses.pop(name, None)
        if not loaded.context.set_tensor_address(name, value.data_ptr()):
            raise GateError(
                f"{self._flavour.backend} refuses the memory of {name!r} at address {value.data_ptr()}, which must be a multiple of 256; "
                "give a whole tensor, not a part of one"
            )
        loaded.addresses[name] = value.data_ptr()

    def _use_memory(self, loaded: _Loaded) -> None:
        """Give the context the arena's activation memory; graphs that were captured with another block are invalid."""
        memory = self._arena.memory(loaded.engine.device_memory_size_v2)
        if loaded.addresses.get("") != memory.data_ptr():
            loaded.context.set_device_memory(memory.data_ptr(), memory.numel())
            loaded.addresses[""] = memory.data_ptr()
            loaded.graphs.clear()

    def _launch(self, loaded: _Loaded, key: tuple[Any, ...]) -> None:
        """Run plainly, or by a CUDA graph of ours where the runtime does not capture graphs itself."""
        if self._options.cuda_graphs and not self._flavour.captures_graphs:
            loaded.graphs.run(key, lambda: self._execute(loaded))
        else:
            self._execute(loaded)
        shapes = tuple(loaded.shapes.values())
        if shapes not in loaded.met:
            loaded.met.add(shapes)
            if loaded.compiled is not None:
                loaded.compiled.keep()

    def _execute(self, loaded: _Loaded) -> None:
        if not loaded.context.execute_async_v3(torch.cuda.current_stream(self.device).cuda_stream):
            raise GateError(
                f"{self._flavour.backend} could not run the {self.spec.name} engine: {self._logger.last}; load the bundle again"
            )

    def _cache_file(self) -> Path | None:
        folder = self._options.runtime_cache
        if folder is None or not self._flavour.has_runtime_cache:
            return None
        return folder / f"{self._plan.parent.name}.{self._plan.name}.cache"

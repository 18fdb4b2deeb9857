"""Runs TensorRT plans, of every flavour, on one CUDA stream and without a word to the host.

Type-checked against TensorRT 10 and TensorRT-RTX, and not run by us yet, which takes a GPU: `make bench-gpu` runs it there.
"""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import torch
from torch import Tensor

from tgate_trt.engines.base import check, given
from tgate_trt.engines.shared_weights import SharedWeights
from tgate_trt.engines.tensorrt_flavours import SPECIALISATIONS, Api, Flavour
from tgate_trt.errors import BundleError, GateError, InputError, UnsupportedError
from tgate_trt.files import read_named
from tgate_trt.specs import CACHE_PREFIX, GraphSpec, TensorSpec

if TYPE_CHECKING:
    import tensorrt

logger = logging.getLogger(__name__)

_BLOCK = 64 << 20
"""Bytes of a plan that are in host memory at once while it is loaded."""

_GRAPHS = 4
"""CUDA graphs that an engine keeps: one for each shape and each set of the caller's addresses that it met last."""


class Arena:
    """What the engines of one pipeline share on a GPU, since they run one after the other: a stream and activation memory."""

    def __init__(self, device: torch.device) -> None:
        """Make a stream on a CUDA device; memory comes with the first engine."""
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._memory: Tensor | None = None

    def memory(self, size: int) -> Tensor:
        """Activation memory of at least ``size`` bytes; another block than before if that was too small."""
        if self._memory is None or self._memory.numel() < size:
            self.stream.synchronize()
            self._memory = None  # the old one first, so that the two are not there together
            self._memory = torch.empty(max(size, 256), dtype=torch.uint8, device=self.device)
        return self._memory


@dataclass(frozen=True)
class RuntimeOptions:
    """How plans are run."""

    cuda_graphs: bool = True
    """Whether to capture each shape's launches once and replay them."""
    specialisation: str = "lazy"
    """Of `SPECIALISATIONS`: when TensorRT-RTX compiles kernels for a shape that it has not seen."""
    runtime_cache: Path | None = None
    """Folder where TensorRT-RTX's compiled kernels are kept from one process to the next."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: if there is no such specialisation.
        """
        if self.specialisation not in SPECIALISATIONS:
            raise InputError(f"specialisation is one of {', '.join(SPECIALISATIONS)}, got {self.specialisation!r}")


@dataclass
class _Loaded:
    """What a plan is while it is on the GPU."""

    runtime: tensorrt.Runtime
    engine: tensorrt.ICudaEngine
    context: tensorrt.IExecutionContext
    serialized_cache: Callable[[], bytes] | None
    addresses: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    buffers: dict[tuple[str, torch.Size], Tensor] = field(default_factory=dict)
    """The engine's own inputs: the caller's small tensors are copied to where a CUDA graph reads them."""
    graphs: OrderedDict[tuple[Any, ...], torch.cuda.CUDAGraph | None] = field(default_factory=OrderedDict)
    """By shapes and addresses; None after the one plain run that comes before the capture."""


class TensorRTEngine:
    """A plan of TensorRT or TensorRT-RTX, its caches and outputs where the caller has them."""

    def __init__(
        self,
        plan: Path,
        spec: GraphSpec,
        flavour: Flavour,
        arena: Arena,
        *,
        weights: SharedWeights | None = None,
        weight_files: Sequence[Path] = (),
        options: RuntimeOptions | None = None,
        changed: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Load a plan.

        Args:
            plan: file that `tgate_trt.engines.tensorrt_builder.build_plan` wrote.
            spec: what its graph takes and gives.
            flavour: that it was built with.
            arena: stream and activation memory, the same for all engines of a pipeline.
            weights: for a plan that takes weights as inputs.
            weight_files: safetensors files of the graph's weights, for a plan that was built without them.
            options: how to run it.
            changed: weights that differ from those of the files, by name.

        Raises:
            UnsupportedError: if the flavour is not installed.
            BundleError: if the plan cannot be loaded, or is of another graph.
        """
        self._plan, self._spec, self._flavour, self._arena = plan, spec, flavour, arena
        self._weights, self._weight_files, self._options = weights, weight_files, options or RuntimeOptions()
        self._trt: Api = flavour.load()
        self._logger = _python_logger(self._trt)
        self._closed = False
        self._refit: Mapping[str, Tensor] = changed or {}
        if changed and weights is not None:
            weights.replace(changed)
        self._loaded: _Loaded | None = self._load()
        if changed and weights is None and not self._loaded.engine.refittable:
            raise UnsupportedError(self._holds_its_weights())

    @property
    def spec(self) -> GraphSpec:
        """The graph's inputs and outputs."""
        return self._spec

    @property
    def device(self) -> torch.device:
        """The GPU where the tensors that `run` is given must lie."""
        return self._arena.device

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], stream: int | None = None) -> None:
        """Run once; see `tgate_trt.engines.base.Engine.run`.

        Inputs that are not caches are copied to where the engine reads them, in order on the caller's stream. The engine
        runs on the arena's stream, between what the caller's stream holds before and after: TensorRT would wait for the
        host on the default one.
        """
        if self._closed:
            raise GateError(f"the {self._spec.name} engine has been closed; load the bundle again")
        loaded = self._loaded = self._loaded or self._load()
        caller = torch.cuda.current_stream(self.device)
        if stream is not None:
            caller = torch.cuda.ExternalStream(stream, self.device)  # type: ignore[no-untyped-call]
        self._arena.stream.wait_stream(caller)
        with torch.cuda.stream(self._arena.stream):
            bound = self._bind(loaded, inputs, outputs)
            self._launch(loaded, bound)
        caller.wait_stream(self._arena.stream)

    def replace_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Run with other values of some weights; see `tgate_trt.engines.base.Engine.replace_weights`.

        Shared weights are written over where they lie, so captured CUDA graphs stay right. A refittable plan is refitted.
        """
        if self._weights is not None:
            self._arena.stream.synchronize()
            self._weights.replace(weights)
            return
        loaded = self._loaded = self._loaded or self._load()
        if not loaded.engine.refittable:
            raise UnsupportedError(self._holds_its_weights())
        self._refit = dict(weights)
        self.unload()  # what was replaced before comes back with the plan
        self._loaded = self._load()

    def _holds_its_weights(self) -> str:
        return f"the {self._spec.name} engine holds its weights; build it with --weights shared to exchange them"

    def unload(self) -> None:
        """Free the plan, its weights and its CUDA graphs until the engine runs again; keeps TensorRT-RTX's compiled kernels."""
        if self._loaded is not None:
            self._arena.stream.synchronize()
            self._keep_compiled(self._loaded)
            self._loaded = None

    def close(self) -> None:
        """Free all; the engine cannot run again."""
        self.unload()
        self._closed = True

    def _load(self) -> _Loaded:
        runtime = self._trt.Runtime(self._logger)
        with self._plan.open("rb") as file:
            engine = runtime.deserialize_cuda_engine(cast(Any, _reader(self._trt, file)))
        if engine is None:
            raise BundleError(
                f"{self._flavour.backend} cannot load {self._plan.name}: {self._logger.last}; build it on this machine with tgate-build"
            )
        self._check(engine)
        if engine.refittable:
            self._refit_engine(engine)
        cache = self._cache_file()
        kept = cache.read_bytes() if cache is not None and cache.is_file() else None
        context, serialized = self._flavour.create_context(self._trt, engine, cache=kept, specialisation=self._options.specialisation)
        loaded = _Loaded(runtime, engine, context, serialized)
        for name in self._weight_inputs(engine):
            assert self._weights is not None
            context.set_tensor_address(name, self._weights[name].data_ptr())
        return loaded

    def _check(self, engine: tensorrt.ICudaEngine) -> None:
        """Compare the plan's tensors with the spec's; what it takes beside them must be weights."""
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        expected = {tensor.name for tensor in (*self._spec.inputs, *self._spec.outputs)}
        missing = sorted(expected - set(names))
        if missing or (self._weights is None and set(names) != expected):
            other = missing or sorted(set(names) - expected)
            raise BundleError(
                f"{self._plan.name} is not of the {self._spec.name} graph: {other[0]!r} differs; build the bundle again with --force"
            )
        for name in set(names) - expected:
            assert self._weights is not None
            held, taken = self._weights[name].shape, tuple(cast(Any, engine.get_tensor_shape(name)))
            if tuple(held) != taken:
                raise BundleError(
                    f"{self._plan.name} takes {name!r} as {list(taken)}, and the weights hold {list(held)}; build the bundle again"
                )

    def _weight_inputs(self, engine: tensorrt.ICudaEngine) -> list[str]:
        own = {tensor.name for tensor in (*self._spec.inputs, *self._spec.outputs)}
        return [name for name in map(engine.get_tensor_name, range(engine.num_io_tensors)) if name not in own]

    def _refit_engine(self, engine: tensorrt.ICudaEngine) -> None:
        """Put in the weights that a stripped plan lacks, and those that are to differ."""
        refitter = self._trt.Refitter(engine, self._logger)
        refit = {name: tensor for name, tensor in self._refit.items() if name in refitter.get_all_weights()}
        missing = set(refitter.get_missing_weights()) - set(refit)
        if not missing and not refit:
            return
        kept_alive = []  # TensorRT reads the host's memory when it refits, not before
        for name, tensor in (*read_named(self._weight_files, missing), *refit.items()):
            on_host = tensor.cpu().contiguous()
            kept_alive.append(on_host)
            kind = getattr(self._trt.DataType, _KINDS[on_host.dtype])
            if not refitter.set_named_weights(name, self._trt.Weights(kind, on_host.data_ptr(), on_host.numel())):
                raise UnsupportedError(f"{self._plan.name} does not let {name!r} be exchanged")
        if not refitter.refit_cuda_engine():
            raise BundleError(f"{self._plan.name} could not be given its weights: {self._logger.last}")

    def _bind(self, loaded: _Loaded, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> tuple[Any, ...]:
        """Set shapes and addresses that changed, and give what a captured graph depends on."""
        self._use_memory(loaded)
        key = []
        for tensor in self._spec.inputs:
            value = given(self._spec, inputs, tensor)
            if not tensor.name.startswith(CACHE_PREFIX):
                value = self._staged(loaded, tensor, value)
            if loaded.shapes.get(tensor.name) != value.shape:
                check(self._spec, tensor, value, self.device)
                loaded.context.set_input_shape(tensor.name, cast(Any, tuple(value.shape)))
                loaded.shapes[tensor.name] = value.shape
            key.append(self._set_address(loaded, tensor, value))
        for tensor in self._spec.outputs:
            key.append(self._set_address(loaded, tensor, given(self._spec, outputs, tensor)))
        return tuple(key)

    def _staged(self, loaded: _Loaded, tensor: TensorSpec, value: Tensor) -> Tensor:
        """The caller's input, copied to the buffer that the engine has for its shape."""
        check(self._spec, tensor, value, self.device)
        key = (tensor.name, value.shape)
        if key not in loaded.buffers:
            loaded.buffers[key] = torch.empty_like(value)
        return loaded.buffers[key].copy_(value)

    def _set_address(self, loaded: _Loaded, tensor: TensorSpec, value: Tensor) -> tuple[int, torch.Size]:
        address = value.data_ptr()
        if loaded.addresses.get(tensor.name) != address:
            check(self._spec, tensor, value, self.device)
            loaded.context.set_tensor_address(tensor.name, address)
            loaded.addresses[tensor.name] = address
        return address, value.shape

    def _use_memory(self, loaded: _Loaded) -> None:
        """Let the context work in the arena's activation memory; graphs that were captured in another block are void."""
        memory = self._arena.memory(loaded.engine.device_memory_size_v2)
        if loaded.addresses.get("") != memory.data_ptr():
            loaded.context.set_device_memory(memory.data_ptr(), memory.numel())
            loaded.addresses[""] = memory.data_ptr()
            loaded.graphs.clear()

    def _launch(self, loaded: _Loaded, key: tuple[Any, ...]) -> None:
        """Run plainly the first time, capture the second, replay from then on."""
        if not self._options.cuda_graphs:
            self._execute(loaded)
            return
        if key not in loaded.graphs:
            self._execute(loaded)
            loaded.graphs[key] = None
            while len(loaded.graphs) > _GRAPHS:
                loaded.graphs.popitem(last=False)
            return
        loaded.graphs.move_to_end(key)
        graph = loaded.graphs[key]
        if graph is None:
            if not self._is_capturable(loaded):
                self._execute(loaded)
                return
            graph = loaded.graphs[key] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._arena.stream):
                self._execute(loaded)
        graph.replay()

    def _is_capturable(self, loaded: _Loaded) -> bool:
        """TensorRT-RTX says no while it compiles for a shape; TensorRT has no such question."""
        ask = getattr(loaded.context, "is_stream_capturable", None)
        return True if ask is None else bool(ask(self._arena.stream.cuda_stream))

    def _execute(self, loaded: _Loaded) -> None:
        if not loaded.context.execute_async_v3(torch.cuda.current_stream(self.device).cuda_stream):
            raise GateError(f"{self._flavour.backend} could not run the {self._spec.name} engine: {self._logger.last}")

    def _cache_file(self) -> Path | None:
        folder = self._options.runtime_cache
        if folder is None or not self._flavour.has_runtime_cache:
            return None
        return folder / f"{self._plan.parent.name}.{self._plan.name}.cache"

    def _keep_compiled(self, loaded: _Loaded) -> None:
        path = self._cache_file()
        if path is None or loaded.serialized_cache is None:
            return
        with contextlib.suppress(OSError):  # a place that cannot be written costs time at the next load and nothing else
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial")
            partial.write_bytes(loaded.serialized_cache())
            partial.replace(path)


_KINDS = {torch.float32: "FLOAT", torch.float16: "HALF", torch.bfloat16: "BF16"}
"""TensorRT's names of the dtypes of weights."""


def _reader(trt: Api, file: BinaryIO) -> tensorrt.IStreamReaderV2:
    """Lets TensorRT read a plan block by block, so that it is never whole in host memory."""

    class Reader(trt.IStreamReaderV2):  # type: ignore[name-defined, misc]  # a class of the module that was passed in
        def __init__(self) -> None:
            trt.IStreamReaderV2.__init__(self)

        def read(self, num_bytes: int, stream: int) -> bytes:
            return file.read(min(num_bytes, _BLOCK))

        def seek(self, offset: int, where: Any) -> bool:
            whence = {trt.SeekPosition.SET: 0, trt.SeekPosition.CUR: 1, trt.SeekPosition.END: 2}[where]
            file.seek(offset, whence)
            return True

    return Reader()


def _python_logger(trt: Api) -> Any:
    """Passes TensorRT's messages on to `logging`, and remembers the last error."""
    levels = {
        trt.ILogger.Severity.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.Severity.ERROR: logging.ERROR,
        trt.ILogger.Severity.WARNING: logging.WARNING,
        trt.ILogger.Severity.INFO: logging.DEBUG,
        trt.ILogger.Severity.VERBOSE: logging.NOTSET,
    }

    class PythonLogger(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = "no reason given"

        def log(self, severity: Any, msg: str) -> None:
            level = levels[severity]
            if level == logging.ERROR:
                self.last = " ".join(msg.split())
            if level:
                logging.getLogger("tensorrt").log(min(level, logging.WARNING), "%s", msg)

    return PythonLogger()

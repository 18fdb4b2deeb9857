"""Runs TensorRT plans of every flavour on one CUDA stream, without a synchronisation with the host.

This file is type-checked against TensorRT 10 and TensorRT-RTX, and has not been run yet, because that takes a GPU: `make bench-gpu`
runs it there.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from tgate_trt.engines.base import check, given
from tgate_trt.engines.shared_weights import SharedWeights
from tgate_trt.engines.tensorrt_callbacks import plan_reader, python_logger
from tgate_trt.engines.tensorrt_flavours import DTYPES, SPECIALISATIONS, Api, Flavour
from tgate_trt.errors import BundleError, GateError, InputError, UnsupportedError
from tgate_trt.files import read_named, replacing
from tgate_trt.specs import CACHE_PREFIX, GraphSpec, TensorSpec

if TYPE_CHECKING:
    import tensorrt

_GRAPHS = 4
"""CUDA graphs that an engine keeps: those of the shapes and caller's addresses that were used last."""


class Arena:
    """A stream and activation memory on a GPU, which the engines of one pipeline share because they run one after the other."""

    def __init__(self, device: torch.device) -> None:
        """Make a stream on a CUDA device; memory is allocated for the first engine."""
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
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
class _Loaded:
    """A plan that is loaded on the GPU."""

    runtime: tensorrt.Runtime
    engine: tensorrt.ICudaEngine
    context: tensorrt.IExecutionContext
    serialized_cache: Callable[[], bytes] | None
    addresses: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    buffers: dict[tuple[str, torch.Size], Tensor] = field(default_factory=dict)
    """The engine's own inputs, by name and shape: the caller's small tensors are copied here, where a CUDA graph reads them."""
    graphs: OrderedDict[tuple[Any, ...], torch.cuda.CUDAGraph | None] = field(default_factory=OrderedDict)
    """By shapes and addresses; None after the plain run that precedes a capture."""


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
        weight_files: Sequence[Path] = (),
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
            weight_files: safetensors files of the graph's weights, for a plan that was built without them.
            options: how to run it.
            changed: weights that differ from those of the files, by name.

        Raises:
            UnsupportedError: if the flavour is not installed, or ``changed`` is for a plan that holds its weights.
            BundleError: if the plan cannot be loaded, or was built from another graph.
        """
        self.spec, self.device = spec, arena.device
        self._plan, self._flavour, self._arena = plan, flavour, arena
        self._weights, self._weight_files, self._options = weights, weight_files, options or RuntimeOptions()
        self._trt: Api = flavour.load()
        self._logger = python_logger(self._trt)
        self._closed = False
        self._refit: Mapping[str, Tensor] = changed or {}
        if changed and weights is not None:
            weights.replace(changed)
        self._loaded: _Loaded | None = self._load()
        if changed and weights is None and not self._loaded.engine.refittable:
            raise UnsupportedError(self._holds_its_weights())

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Run once; see `tgate_trt.engines.base.Engine.run`.

        The engine runs on the arena's stream, because TensorRT would synchronise with the host on the default stream. The arena's
        stream waits for the caller's first, and the caller's for the arena's afterwards. Inputs other than caches are copied to the
        engine's own buffers.

        Raises:
            GateError: if the engine was closed, a tensor does not fit, or TensorRT cannot run.
        """
        if self._closed:
            raise GateError(f"the {self.spec.name} engine has been closed; load the bundle again")
        loaded = self._loaded = self._loaded or self._load()
        caller = torch.cuda.current_stream(self.device)
        self._arena.stream.wait_stream(caller)
        with torch.cuda.stream(self._arena.stream):
            bound = self._bind(loaded, inputs, outputs)
            self._launch(loaded, bound)
        caller.wait_stream(self._arena.stream)

    def replace_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace some weights; see `tgate_trt.engines.base.Engine.replace_weights`.

        Shared weights are overwritten in place, so captured CUDA graphs stay valid. A refittable plan is refitted.

        Raises:
            BundleError: if a shared weight is unknown, or has another shape or dtype.
            UnsupportedError: if the plan holds its weights and cannot be refitted.
        """
        if self._weights is not None:
            self._arena.stream.synchronize()
            self._weights.replace(weights)
            return
        loaded = self._loaded = self._loaded or self._load()
        if not loaded.engine.refittable:
            raise UnsupportedError(self._holds_its_weights())
        self._refit = dict(weights)
        self.unload()  # the plan brings back the weights that were replaced before
        self._loaded = self._load()

    def _holds_its_weights(self) -> str:
        return f"the {self.spec.name} engine holds its weights; build it with --weights shared to replace them"

    def unload(self) -> None:
        """Free the plan, its weights and its CUDA graphs until the engine runs again; keeps TensorRT-RTX's compiled kernels."""
        if self._loaded is not None:
            self._arena.stream.synchronize()
            self._keep_compiled(self._loaded)
            self._loaded = None

    def close(self) -> None:
        """Free everything; the engine cannot run again."""
        self.unload()
        self._closed = True

    def _load(self) -> _Loaded:
        runtime = self._trt.Runtime(self._logger)
        with self._plan.open("rb") as file:
            engine = runtime.deserialize_cuda_engine(cast(Any, plan_reader(self._trt, file)))
        if engine is None:
            raise BundleError(
                f"{self._flavour.backend} cannot load {self._plan.name}: {self._logger.last}; build it on this machine with tgate-build"
            )
        weight_inputs = self._weight_inputs(engine)
        if engine.refittable:
            self._refit_engine(engine)
        cache = self._cache_file()
        kept = cache.read_bytes() if cache is not None and cache.is_file() else None
        context, serialized = self._flavour.create_context(self._trt, engine, cache=kept, specialisation=self._options.specialisation)
        loaded = _Loaded(runtime, engine, context, serialized)
        for name, weight in weight_inputs.items():
            context.set_tensor_address(name, weight.data_ptr())
        return loaded

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
        """Set the weights that a stripped plan lacks, and those that were replaced."""
        refitter = self._trt.Refitter(engine, self._logger)
        known = set(refitter.get_all_weights())
        refit = {name: tensor for name, tensor in self._refit.items() if name in known}
        missing = set(refitter.get_missing_weights()) - set(refit)
        if not missing and not refit:
            return
        kept_alive = []  # TensorRT reads host memory only when it refits
        for name, tensor in (*read_named(self._weight_files, missing), *refit.items()):
            on_host = tensor.cpu().contiguous()
            kept_alive.append(on_host)
            kind = getattr(self._trt.DataType, DTYPES[str(on_host.dtype).removeprefix("torch.")])
            if not refitter.set_named_weights(name, self._trt.Weights(kind, on_host.data_ptr(), on_host.numel())):
                raise UnsupportedError(f"{self._plan.name} does not allow {name!r} to be replaced; build it with --weights shared")
        if not refitter.refit_cuda_engine():
            raise BundleError(f"{self._plan.name} cannot be refitted: {self._logger.last}; build the bundle again")

    def _bind(self, loaded: _Loaded, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> tuple[Any, ...]:
        """Set the shapes and addresses that changed, and return the key of a captured graph: all addresses and shapes."""
        self._use_memory(loaded)
        key = []
        for tensor in self.spec.inputs:
            value = given(self.spec, inputs, tensor)
            if not tensor.name.startswith(CACHE_PREFIX):
                value = self._staged(loaded, tensor, value)
            if loaded.shapes.get(tensor.name) != value.shape:
                check(self.spec, tensor, value, self.device)
                loaded.context.set_input_shape(tensor.name, cast(Any, tuple(value.shape)))
                loaded.shapes[tensor.name] = value.shape
            key.append(self._set_address(loaded, tensor, value))
        for tensor in self.spec.outputs:
            key.append(self._set_address(loaded, tensor, given(self.spec, outputs, tensor)))
        return tuple(key)

    def _staged(self, loaded: _Loaded, tensor: TensorSpec, value: Tensor) -> Tensor:
        """Copy the caller's input to the engine's buffer for its shape."""
        check(self.spec, tensor, value, self.device)
        key = (tensor.name, value.shape)
        if key not in loaded.buffers:
            loaded.buffers[key] = torch.empty_like(value)
        return loaded.buffers[key].copy_(value)

    def _set_address(self, loaded: _Loaded, tensor: TensorSpec, value: Tensor) -> tuple[int, torch.Size]:
        address = value.data_ptr()
        if loaded.addresses.get(tensor.name) != address:
            check(self.spec, tensor, value, self.device)
            loaded.context.set_tensor_address(tensor.name, address)
            loaded.addresses[tensor.name] = address
        return address, value.shape

    def _use_memory(self, loaded: _Loaded) -> None:
        """Give the context the arena's activation memory; graphs that were captured with another block are invalid."""
        memory = self._arena.memory(loaded.engine.device_memory_size_v2)
        if loaded.addresses.get("") != memory.data_ptr():
            loaded.context.set_device_memory(memory.data_ptr(), memory.numel())
            loaded.addresses[""] = memory.data_ptr()
            loaded.graphs.clear()

    def _launch(self, loaded: _Loaded, key: tuple[Any, ...]) -> None:
        """Run plainly the first time, capture the second time, and replay from then on."""
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
        """Whether launches can be captured: with TensorRT-RTX not while it compiles for a shape, with TensorRT always."""
        ask = getattr(loaded.context, "is_stream_capturable", None)
        return True if ask is None else bool(ask(self._arena.stream.cuda_stream))

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

    def _keep_compiled(self, loaded: _Loaded) -> None:
        path = self._cache_file()
        if path is None or loaded.serialized_cache is None:
            return
        with contextlib.suppress(OSError):  # without the file, the next load compiles again
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial:
                partial.write_bytes(loaded.serialized_cache())

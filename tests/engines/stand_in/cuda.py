"""A stand-in for the streams, graphs and guards of `torch.cuda`, on the CPU, that finds what a GPU would leave to chance.

Work runs at once; what is checked is its order. Each stream has a vector clock. An access to a tensor's memory on one stream that
does not follow an earlier access on another stream, by ``wait_stream`` or a synchronisation, raises `Race`. A captured graph keeps
addresses and shapes alone: a replay on memory that was freed raises, and so does work within a capture that CUDA does not allow.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NOT_PERMITTED = "CUDA error: operation not permitted when stream is capturing"


class Race(AssertionError):
    """Two streams use the same memory in no order."""


@dataclass
class Memory:
    """One allocation, and who used it last."""

    base: int
    size: int
    lives: StorageWeakRef
    written: tuple[int, int] | None = None
    """Stream and tick of the last write."""
    read: dict[int, int] = field(default_factory=dict)
    """Tick of each stream's last read since."""

    @property
    def is_freed(self) -> bool:
        return bool(self.lives.expired())


@dataclass
class Capture:
    """A graph that is being captured."""

    graph: Any
    thread: int
    mode: str
    is_invalid: bool = False


class Cuda:
    """The state of the device; `installed` puts it in the place of `torch.cuda`'s."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.memories: dict[int, Memory] = {}
        self.streams: list[Any] = []
        self.host: dict[int, int] = {}
        """What the host has waited for."""
        self.capture: Capture | None = None
        self.captured = self.replayed = self.emptied = 0
        self.local = threading.local()
        self.default = self.stream_class()()

    # Streams.

    def stream_class(self) -> Any:
        cuda = self

        class Stream:
            def __init__(self, device: object = None, priority: int = 0, **_: object) -> None:
                self.id = len(cuda.streams)
                self.cuda_stream = 0x1000 * self.id
                """Handle; that of the default stream is 0."""
                self.clock: dict[int, int] = {}
                cuda.streams.append(self)

            def wait_stream(self, other: Any) -> None:
                cuda.refuse_in_a_capture()
                with cuda.lock:
                    for stream, tick in other.clock.items():
                        self.clock[stream] = max(self.clock.get(stream, 0), tick)

            def synchronize(self) -> None:
                cuda.refuse_in_a_capture()
                with cuda.lock:
                    for stream, tick in self.clock.items():
                        cuda.host[stream] = max(cuda.host.get(stream, 0), tick)

        return Stream

    def current(self) -> Any:
        return getattr(self.local, "stream", self.default)

    def set_current(self, stream: Any) -> None:
        self.local.stream = stream

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before = self.current()
        self.set_current(stream)
        try:
            yield
        finally:
            self.set_current(before)

    def of_handle(self, handle: int) -> Any:
        (found,) = (stream for stream in self.streams if stream.cuda_stream == handle)
        return found

    @contextlib.contextmanager
    def guard(self, device: object) -> Iterator[None]:
        before, self.local.guarded = getattr(self.local, "guarded", None), device
        try:
            yield
        finally:
            self.local.guarded = before

    @property
    def guarded(self) -> object:
        """The device that a guard of this thread has made the current one."""
        return getattr(self.local, "guarded", None)

    def synchronize(self, device: object = None) -> None:
        for stream in list(self.streams):
            stream.synchronize()

    def empty_cache(self) -> None:
        self.refuse_in_a_capture()
        self.emptied += 1

    # Memory.

    def find(self, address: int) -> Memory | None:
        """The allocation that holds an address, if it lives."""
        exact = self.memories.get(address)
        near = (
            [exact]
            if exact is not None
            else [memory for memory in self.memories.values() if memory.base <= address < memory.base + memory.size]
        )
        return next((memory for memory in near if not memory.is_freed), None)

    def know(self, tensor: Tensor, *, fresh: bool = False) -> Memory | None:
        """The allocation of a tensor; a new record if it is new."""
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return None
        storage = tensor.untyped_storage()
        base = storage.data_ptr()
        if base == 0:
            return None
        memory = self.memories.get(base)
        if memory is None or memory.is_freed or fresh:
            memory = self.memories[base] = Memory(base, max(storage.nbytes(), 1), StorageWeakRef(storage))
        return memory

    def access(self, memory: Memory, stream: Any, *, writes: bool) -> None:
        """Record one access.

        Raises:
            Race: if it does not follow an earlier one.
        """
        with self.lock:
            for other, tick in self.host.items():
                stream.clock[other] = max(stream.clock.get(other, 0), tick)
            before = list(memory.read.items()) if writes else []
            before += [memory.written] if memory.written else []
            for other, tick in before:
                if stream.clock.get(other, 0) < tick:
                    verb = "writes" if writes else "reads"
                    raise Race(f"stream {stream.id} {verb} memory that stream {other} uses, and has not waited for it")
            tick = stream.clock[stream.id] = stream.clock.get(stream.id, 0) + 1
            if writes:
                memory.written, memory.read = (stream.id, tick), {}
            else:
                memory.read[stream.id] = tick

    # Captures.

    def is_capturing(self) -> bool:
        """Whether this thread captures."""
        return self.capture is not None and self.capture.thread == threading.get_ident()

    def refuse_in_a_capture(self) -> None:
        """Refuse what no thread may do during a capture of mode ``global``, and what the capturing thread may not in any.

        Raises:
            RuntimeError: as PyTorch does.
        """
        if self.capture is not None and (self.is_capturing() or self.capture.mode == "global"):
            self.capture.is_invalid = True
            raise RuntimeError(NOT_PERMITTED)

    def graph_classes(self) -> tuple[Any, Any]:
        cuda = self

        class CUDAGraph:
            def __init__(self, keep_graph: bool = False) -> None:
                self.launches: list[Callable[[], None]] = []
                self.is_ready = False

            def replay(self) -> None:
                if not self.is_ready:
                    raise RuntimeError("a graph was replayed whose capture did not end well")
                cuda.refuse_in_a_capture()
                cuda.replayed += 1
                for launch in self.launches:
                    launch()

        class graph:
            def __init__(self, cuda_graph: Any, pool: object = None, stream: Any = None, capture_error_mode: str = "global") -> None:
                self.graph, self.mode, self.stream = cuda_graph, capture_error_mode, stream or cuda.stream_class()()

            def __enter__(self) -> None:
                if self.stream is cuda.default:
                    raise RuntimeError("the default stream cannot be captured")
                cuda.synchronize()
                self.before = cuda.current()
                cuda.set_current(self.stream)
                cuda.capture = Capture(self.graph, threading.get_ident(), self.mode)

            def __exit__(self, *raised: object) -> None:
                capture, cuda.capture = cuda.capture, None
                assert capture is not None
                if capture.is_invalid:  # as in PyTorch, the stream of the capture stays current
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
                cuda.set_current(self.before)
                if not raised[0]:
                    cuda.captured += 1
                    self.graph.is_ready = True

        return CUDAGraph, graph

    # Installing.

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Watch the operations of this thread."""
        with _Addresses(self), _Operations(self):
            yield

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Take the place of the names of `torch.cuda` that engines use."""
        graph, capture = self.graph_classes()
        names = {
            "Stream": self.stream_class(),
            "current_stream": lambda device=None: self.current(),
            "default_stream": lambda device=None: self.default,
            "set_stream": self.set_current,
            "stream": self.on,
            "device": self.guard,
            "synchronize": self.synchronize,
            "empty_cache": self.empty_cache,
            "CUDAGraph": graph,
            "graph": capture,
            "graph_pool_handle": object,
        }
        for name, value in names.items():
            monkeypatch.setattr(torch.cuda, name, value)


class _Addresses(TorchFunctionMode):
    """Sees whose address is asked for, so that an address belongs to an allocation."""

    def __init__(self, cuda: Cuda) -> None:
        super().__init__()
        self._cuda = cuda

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.data_ptr:
            self._cuda.know(args[0])
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    """Sees every operation of PyTorch, which runs on the current stream."""

    def __init__(self, cuda: Cuda) -> None:
        super().__init__()
        self._cuda = cuda

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        returns = func._schema.returns
        if returns and all(one.alias_info is not None and not one.alias_info.is_write for one in returns):
            return func(*args, **kwargs)  # a view
        cuda = self._cuda
        cuda.refuse_in_a_capture()
        known = set()
        for parameter, value in [
            *zip(func._schema.arguments, args, strict=False),
            *((_named(func, name), kwargs[name]) for name in kwargs),
        ]:
            for tensor in tree_leaves(value):
                if isinstance(tensor, Tensor) and (memory := cuda.know(tensor)) is not None:
                    known.add(memory.base)
                    writes = parameter.alias_info is not None and parameter.alias_info.is_write
                    cuda.access(memory, cuda.current(), writes=writes)
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() not in known:
                memory = cuda.know(tensor, fresh=True)
                if memory is not None:
                    cuda.access(memory, cuda.current(), writes=True)
        return result


def _named(func: Any, name: str) -> Any:
    return next(parameter for parameter in func._schema.arguments if parameter.name == name)

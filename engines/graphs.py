"""CUDA graphs of an engine's launches, and the buffers that they read: one cache for all engines that capture by themselves.

A graph stores shapes and addresses. So its key holds those of every tensor that the caller owns, and the caller's other inputs are
first copied to buffers of the engine's own.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

LIMIT = 16
"""Graphs that an engine keeps: those that ran last. Each combination of batch size and caller's buffers takes one."""


class GraphCache:
    """Launches by key: they run plainly the first time, are captured the second time, and are replayed from then on.

    The first run sets up what a capture does not allow, such as a library's workspace. A key whose capture fails runs plainly from
    then on. The owner runs one key after the other: a cache is not safe for several threads at once.
    """

    def __init__(self, name: str) -> None:
        """Make an empty cache.

        Args:
            name: of the engine, for warnings.
        """
        self._name = name
        self._graphs: OrderedDict[Hashable, torch.cuda.CUDAGraph | None] = OrderedDict()
        """None after the plain run that precedes a capture."""
        self._plain: set[Hashable] = set()
        """Keys that cannot be captured."""
        self._pool: Any = None

    def __len__(self) -> int:
        """Number of captured graphs."""
        return sum(graph is not None for graph in self._graphs.values())

    def run(self, key: Hashable, launch: Callable[[], object]) -> None:
        """Launch, or replay what was launched for the same key, on PyTorch's current stream.

        Args:
            key: everything that a capture stores: shapes and addresses.
            launch: puts the work on the current stream; allocates and synchronises only in the first run of a key.
        """
        if key in self._plain:
            launch()
            return
        if key not in self._graphs:
            launch()
            self._graphs[key] = None
            while len(self._graphs) > LIMIT:
                self._graphs.popitem(last=False)
            return
        self._graphs.move_to_end(key)
        graph = self._graphs[key]
        if graph is None:
            graph = self._captured(launch)
            if graph is None:
                del self._graphs[key]
                self._plain.add(key)
                launch()
                return
            self._graphs[key] = graph
        graph.replay()

    def clear(self) -> None:
        """Free all graphs, for example because an address that they store is no longer valid."""
        self._graphs.clear()
        self._plain.clear()

    def _captured(self, launch: Callable[[], object]) -> torch.cuda.CUDAGraph | None:
        """The launches as a graph; None, with a warning, if they cannot be captured.

        Other threads may use CUDA meanwhile: ``thread_local`` refuses unsafe calls of this thread alone.
        """
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        capturing = stream if stream != torch.cuda.default_stream() else None
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=capturing, capture_error_mode="thread_local"):
                launch()
        except Exception as error:
            torch.cuda.set_stream(stream)  # a capture that fails leaves its own stream current
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            logger.warning("the %s engine runs without CUDA graphs, because its launches cannot be captured: %s", self._name, reason)
            return None
        return graph


class Staging:
    """Buffers at fixed addresses, into which a caller's small inputs are copied."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.Size], Tensor] = {}

    def copied(self, name: str, value: Tensor) -> Tensor:
        """The buffer of a name and a shape, with the value in it."""
        key = (name, value.shape)
        if key not in self._buffers:
            self._buffers[key] = torch.empty_like(value)
        return self._buffers[key].copy_(value)

    def clear(self) -> None:
        """Free the buffers."""
        self._buffers.clear()

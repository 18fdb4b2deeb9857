"""Engines that the pipelines of a service share: each is loaded once, and merges the calls of all."""

from __future__ import annotations

import dataclasses

from tgate_trt.eager import LOADING
from tgate_trt.engines.base import Engine
from tgate_trt.engines.batching import Batcher, BatchingEngine
from tgate_trt.running.loading import EngineLoader


@dataclasses.dataclass
class SharedEngines(EngineLoader):
    """Loads each engine of a bundle once, whichever pipeline asks for it first, in whichever thread."""

    batcher: Batcher = dataclasses.field(default_factory=Batcher)
    """Where the calls meet."""

    def __post_init__(self) -> None:
        """Begin without engines."""
        super().__post_init__()
        self._engines: dict[str, BatchingEngine | None] = {}

    @classmethod
    def of(cls, loader: EngineLoader, batcher: Batcher) -> SharedEngines:
        """Share what a loader loads."""
        return cls(**{field.name: getattr(loader, field.name) for field in dataclasses.fields(loader)}, batcher=batcher)

    def load(self, graph: str) -> Engine:
        """The engine of a graph; see `EngineLoader.load`."""
        with LOADING:
            engine = self._engines.get(graph)
            if engine is None:
                engine = self._engines[graph] = BatchingEngine(super().load(graph), self.batcher)
            return engine

    def load_vanilla(self) -> Engine | None:
        """See `EngineLoader.load_vanilla`."""
        with LOADING:
            if "vanilla" not in self._engines:
                engine = super().load_vanilla()
                is_ready = engine is None or isinstance(engine, BatchingEngine)
                self._engines["vanilla"] = engine if is_ready else BatchingEngine(engine, self.batcher)  # type: ignore[assignment, arg-type]
            return self._engines["vanilla"]

    @property
    def engines(self) -> tuple[BatchingEngine, ...]:
        """Those that were loaded."""
        return tuple(engine for engine in self._engines.values() if engine is not None)

    def close(self) -> None:
        """Refuse further calls, and free all engines."""
        self.batcher.close()
        for engine in self.engines:
            engine.close()

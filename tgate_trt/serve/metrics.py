"""What a server counts, in Prometheus' form. No label holds anything that a client sent."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Protocol

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tgate_trt.engines.batching import Batch
from tgate_trt.serve.picture import Record

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

OUTCOMES = ("ok", "invalid", "unauthorized", "too_large", "slow", "busy", "client_gone", "deadline", "closed", "error")
"""How a request can end."""

PHASES = ("encode", "planning", "fidelity", "hand_off", "forecast", "decode", "previews")

_SECONDS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 15, 20, 30, 60, 120, 300)
_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class Watched(Protocol):
    """What the gauges are read from: a service."""

    @property
    def queued(self) -> int:
        """Pictures that wait."""

    @property
    def running(self) -> int:
        """Pictures that are drawn."""

    @property
    def merging_memory(self) -> int:
        """Bytes of the buffers in which calls are merged."""


class Metrics:
    """Counters, gauges and histograms of one process."""

    def __init__(self) -> None:
        """Begin at zero, in a registry of its own."""
        self.registry = CollectorRegistry()
        registry = self.registry
        self._requests = Counter("tgate_requests", "Requests for pictures by how they ended.", ["model", "outcome"], registry=registry)
        self._pictures = Counter("tgate_pictures", "Pictures that were drawn.", ["model"], registry=registry)
        self._latency = Histogram(
            "tgate_request_seconds",
            "Seconds of requests that were answered with pictures.",
            ["model"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._queue = Histogram(
            "tgate_queue_seconds", "Seconds that a picture waited until it was begun.", ["model"], buckets=_SECONDS, registry=registry
        )
        self._phases = Counter("tgate_phase_seconds", "Seconds of pictures by phase.", ["model", "phase"], registry=registry)
        self._steps = Counter("tgate_steps", "Calls of the denoiser by action.", ["model", "action"], registry=registry)
        self._batches = Histogram(
            "tgate_batch_rows", "Rows of each run of an engine.", ["model", "graph"], buckets=_ROWS, registry=registry
        )
        self._calls = Counter("tgate_batch_calls", "Calls that were merged into runs of an engine.", ["model", "graph"], registry=registry)
        self._rows = Counter("tgate_rows", "Rows that an engine ran.", ["model", "graph"], registry=registry)
        self._engine = Counter("tgate_engine_seconds", "Seconds in which an engine ran.", ["model", "graph"], registry=registry)
        self._running = Gauge("tgate_running", "Pictures that are drawn now.", ["model"], registry=registry)
        self._queued = Gauge("tgate_queued", "Pictures that wait now.", ["model"], registry=registry)
        self._memory = Gauge("tgate_memory_bytes", "Memory: resident, merging, cuda.", ["kind"], registry=registry)
        self._memory.labels("resident").set_function(lambda: psutil.Process(os.getpid()).memory_info().rss)
        self._memory.labels("cuda").set_function(_cuda_bytes)
        self._services: list[Watched] = []
        self._memory.labels("merging").set_function(lambda: sum(service.merging_memory for service in self._services))

    def watch(self, model: str, service: Watched) -> None:
        """Read the gauges of a model from its service."""
        self._services.append(service)
        self._running.labels(model).set_function(lambda: service.running)
        self._queued.labels(model).set_function(lambda: service.queued)
        for outcome in OUTCOMES:
            self._requests.labels(model, outcome)
        for phase in PHASES:
            self._phases.labels(model, phase)

    def ended(self, model: str, outcome: str, seconds: float | None = None) -> None:
        """Count a request; ``model`` is empty where it named none that is served."""
        self._requests.labels(model, outcome).inc()
        if outcome == "ok" and seconds is not None:
            self._latency.labels(model).observe(seconds)

    def drew(self, model: str, record: Record) -> None:
        """Count a picture."""
        self._pictures.labels(model).inc()
        self._queue.labels(model).observe(record.times.queue)
        for phase in PHASES:
            self._phases.labels(model, phase).inc(getattr(record.times, phase))
        for action, count in record.steps.items():
            self._steps.labels(model, action).inc(count)

    def ran(self, model: str, batch: Batch) -> None:
        """Count a run of an engine."""
        self._batches.labels(model, batch.graph).observe(batch.rows)
        self._calls.labels(model, batch.graph).inc(batch.members)
        self._rows.labels(model, batch.graph).inc(batch.rows)
        self._engine.labels(model, batch.graph).inc(batch.seconds)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)

    def outcomes(self) -> Mapping[str, float]:
        """Requests by outcome, over all models."""
        found: dict[str, float] = {}
        for sample in next(iter(self._requests.collect())).samples:
            if sample.name.endswith("_total"):
                found[sample.labels["outcome"]] = found.get(sample.labels["outcome"], 0) + sample.value
        return found


def _cuda_bytes() -> float:
    import torch

    return float(torch.cuda.memory_allocated()) if torch.cuda.is_available() else 0.0

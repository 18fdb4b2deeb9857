"""A server of the demo model on a free loopback port, in this process and as users reach it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

import tgate_trt.serve.cluster  # noqa: F401 - Ray changes the process when it is imported, which no test should
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.serve.metrics import Metrics
from tgate_trt.serve.server import Settings, application_of, listening, server_of, services_of
from tgate_trt.serve.service import Service

Serve = Callable[..., contextlib.AbstractContextManager["Running"]]


@dataclass
class Running:
    """A server that runs."""

    address: str
    service: Service
    metrics: Metrics
    server: Any

    def client(self, **more: Any) -> httpx.Client:
        return httpx.Client(base_url=self.address, timeout=60, trust_env=False, **more)

    def connection(self) -> socket.socket:
        """A bare connection, for clients that do not behave."""
        host, _, port = self.address.removeprefix("http://").partition(":")
        return socket.create_connection((host, int(port)), timeout=60)

    def outcomes(self) -> dict[str, float]:
        """Requests that ended until now, by outcome."""
        return {outcome: count for outcome, count in self.metrics.outcomes().items() if count}


@contextlib.contextmanager
def serving(settings: Settings) -> Iterator[Running]:
    """Serve in a thread of this process until the block ends."""
    metrics = Metrics()
    with contextlib.closing(listening(settings)) as listener, services_of(settings, metrics) as services:
        server = server_of(application_of(settings, services, metrics), settings, [*services.values()])
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="server")
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", next(iter(services.values())), metrics, server)
        finally:
            server.should_exit = True
            thread.join(60)


@pytest.fixture(scope="session")
def settings(shapes_bundle: Bundle) -> Settings:
    """Two pictures at a time, and two that wait."""
    options: Any = {"backend": "onnxruntime", "threads": 1}
    return Settings((Path(shapes_bundle.folder),), port=0, running=2, queue=2, grace=20, options=options)


@pytest.fixture
def serve(settings: Settings) -> Serve:
    """Serves with other settings than usual."""
    return lambda **more: serving(replace(settings, **more))


@pytest.fixture(scope="module")
def running(settings: Settings) -> Iterator[Running]:
    """A server that the tests of a file share."""
    with serving(settings) as running:
        yield running

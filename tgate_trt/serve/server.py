"""One process: services for bundles, the application, and uvicorn, from start to a clean end."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from tgate_trt.bundle.bundle import Bundle
from tgate_trt.errors import InputError
from tgate_trt.running.pipeline import LoadOptions
from tgate_trt.serve.app import create_app
from tgate_trt.serve.drawers import LocalDrawer
from tgate_trt.serve.guard import LOOPBACK, read_keys
from tgate_trt.serve.limits import Limits
from tgate_trt.serve.metrics import Metrics
from tgate_trt.serve.service import QUEUE, RUNNING, Service

logger = logging.getLogger(__name__)

_CONNECTIONS_PER_PICTURE = 8
"""Connections at a time for each picture that may run or wait; more get 503 from uvicorn before they take memory."""
_LEAST_CONNECTIONS = 256


@dataclass(frozen=True)
class Settings:
    """How bundles are served.

    Raises:
        InputError: if the settings contradict each other.
    """

    bundles: tuple[Path, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    running: int | None = None
    """Pictures of a bundle at a time; `RUNNING`, or 1 where several bundles share a machine."""
    queue: int = QUEUE
    """Pictures of a bundle that wait."""
    api_key_file: Path | None = None
    grace: float = 60.0
    """Seconds that pictures have to end after SIGTERM."""
    log_prompts: bool = False
    limits: Limits = field(default_factory=Limits)
    options: LoadOptions = field(default_factory=LoadOptions)

    def __post_init__(self) -> None:
        """Check what belongs together."""
        names = self.names
        if not names or len(set(names)) < len(names):
            raise InputError(f"bundles are served by the names of their folders, which must differ; got {', '.join(names) or 'none'}")

    @property
    def names(self) -> tuple[str, ...]:
        """Of the models, by bundle."""
        return tuple(path.resolve().name for path in self.bundles)

    @property
    def shares_memory(self) -> bool:
        """Whether several bundles share a machine: then each holds one engine at a time and draws one picture at a time."""
        return len(self.bundles) > 1

    @property
    def running_limit(self) -> int:
        """Pictures of a bundle at a time."""
        return (1 if self.shares_memory else RUNNING) if self.running is None else self.running

    @property
    def load_options(self) -> LoadOptions:
        """Of each bundle."""
        return {**self.options, "low_memory": self.options.get("low_memory", self.shares_memory)}

    @property
    def hosts(self) -> tuple[str, ...] | None:
        """Names under which the server may be called; any unless it listens to this machine alone."""
        return LOOPBACK if self.host in LOOPBACK else None


@contextlib.contextmanager
def services_of(settings: Settings, metrics: Metrics) -> Iterator[dict[str, Service]]:
    """The services of all bundles, counted by metrics, and closed at the end.

    Raises:
        BundleError: if a bundle cannot be used.
    """
    opened = {name: Bundle.open(path) for name, path in zip(settings.names, settings.bundles, strict=True)}
    services: dict[str, Service] = {}
    try:
        for name, bundle in opened.items():
            services[name] = Service(
                bundle,
                running=settings.running_limit,
                queue=settings.queue,
                deadline=settings.limits.seconds,
                on_batch=partial(metrics.ran, name),
                **settings.load_options,
            )
            metrics.watch(name, services[name])
            services[name].draw("a picture", steps=2)  # the engines' first run, which takes longest
        yield services
    finally:
        for service in services.values():
            service.close(settings.grace)


def application_of(settings: Settings, services: Mapping[str, Service], metrics: Metrics) -> FastAPI:
    """The application over services of this process."""
    keys = () if settings.api_key_file is None else read_keys(settings.api_key_file)
    return create_app(
        LocalDrawer(services), metrics, limits=settings.limits, keys=keys, hosts=settings.hosts, log_prompts=settings.log_prompts
    )


class Server(uvicorn.Server):
    """A uvicorn that tells when it is asked to end."""

    def __init__(self, config: uvicorn.Config, ends: Callable[[], None]) -> None:
        super().__init__(config)
        self._ends = ends

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse what waits, so that its connections end too, then wait for the rest."""
        self._ends()
        await super().shutdown(sockets)


def listening(settings: Settings) -> socket.socket:
    """A socket that listens where the settings say.

    Raises:
        InputError: if the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise InputError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}; choose another --port") from error
    listener.set_inheritable(True)
    return listener


def server_of(app: FastAPI, settings: Settings, services: Sequence[Service]) -> Server:
    """The server of an application over services of this process."""
    pictures = sum(service.running_limit + service.queue_limit for service in services)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=int(settings.grace) + 1,
        limit_concurrency=max(_LEAST_CONNECTIONS, _CONNECTIONS_PER_PICTURE * pictures),
        server_header=False,
        lifespan="off",
    )

    def ends() -> None:
        for service in services:
            service.refuse()

    return Server(config, ends)


def serve(settings: Settings, started: Callable[[str], None]) -> None:
    """Serve bundles until SIGTERM or SIGINT.

    Args:
        settings: how.
        started: is told the address, once requests are taken.

    Raises:
        InputError: if the address cannot be had.
        BundleError: if a bundle cannot be used.
    """
    if settings.hosts is None and settings.api_key_file is None:
        logger.warning("anyone who reaches %s may draw; choose an --api-key-file, or the host 127.0.0.1", settings.host)
    metrics = Metrics()
    with contextlib.closing(listening(settings)) as listener, services_of(settings, metrics) as services:
        app = application_of(settings, services, metrics)
        server = server_of(app, settings, [*services.values()])
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        started(f"http://{host}:{listener.getsockname()[1]}")
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again, once it has ended
            server.run(sockets=[listener])

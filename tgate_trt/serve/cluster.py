"""The same application on Ray Serve: replicas of bundles on one machine or a cluster, and one application in front of them.

Ray starts, places, watches and restarts the processes. What it lacks is done in `tgate_trt.serve.remote`: a bound on all that waits, and
a second try for what a replica had begun when it died.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from typing import Any

import ray
import torch
from fastapi import FastAPI
from ray import serve
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.serve.exceptions import DeploymentUnavailableError

from tgate_trt.engines.batching import Batch
from tgate_trt.errors import InputError, TGateError
from tgate_trt.serve.app import create_app
from tgate_trt.serve.drawers import Event, LocalDrawer
from tgate_trt.serve.guard import read_keys
from tgate_trt.serve.limits import Limits
from tgate_trt.serve.metrics import Metrics
from tgate_trt.serve.picture import Request
from tgate_trt.serve.places import Places
from tgate_trt.serve.remote import LostError, Pool, RemoteDrawer
from tgate_trt.serve.schema import Model
from tgate_trt.serve.server import Settings, listening
from tgate_trt.serve.service import Service

NAME = "tgate"
"""Of the application."""
FRONT = "front"
"""Of the deployment that has the HTTP application."""

_CONNECTIONS = 4096
"""Requests at a time that Ray lets through to the application, which bounds them itself and says 429."""


class Replica:
    """A process with a bundle. Ray calls its methods."""

    def __init__(self, settings: Mapping[str, Any], bundle: str) -> None:
        """Load the bundle.

        Args:
            settings: as `plain` gives them.
            bundle: its folder, on this machine.
        """
        read = settings_from(settings)
        self._batches: deque[Batch] = deque(maxlen=100_000)
        self._name = Path(bundle).resolve().name
        self._service = Service(
            bundle,
            running=read.running_limit,
            queue=read.running_limit,  # for what comes while a picture that was cancelled ends
            deadline=read.limits.seconds,
            on_batch=self._batches.append,
            **read.load_options,
        )
        self._service.draw("a picture", steps=2)
        self._drawer = LocalDrawer({self._name: self._service})

    async def describe(self) -> Model:
        """How the bundle is described."""
        return (await self._drawer.models())[0]

    async def draw(self, request: Request, kind: str, seconds: float) -> AsyncGenerator[Event, None]:
        """Draw one picture; errors that are no failures come as events, for exceptions change on their way."""
        try:
            async with contextlib.aclosing(self._drawer.draw(self._name, [request], kind, seconds)) as events:
                async for event in events:
                    yield dataclasses.replace(event, batches=self._taken()) if event.record is not None else event
        except TGateError as error:
            yield Event()
            yield Event(error=error, batches=self._taken())

    async def process(self) -> int:
        """Of this replica, for tests and operators."""
        return os.getpid()

    def check_health(self) -> None:
        """Tell Ray that this replica is of no more use, once its threads have ended."""
        if self._service.is_closed or not self._service.is_alive:
            raise RuntimeError("the service has ended")

    def __del__(self) -> None:
        """End with what is drawn; Ray waits for it."""
        if hasattr(self, "_service"):
            self._service.close(5.0)

    def _taken(self) -> tuple[Batch, ...]:
        taken = []
        with contextlib.suppress(IndexError):
            while True:
                taken.append(self._batches.popleft())
        return tuple(taken)


class Handle:
    """Replicas behind a handle of Ray; see `tgate_trt.serve.remote.Replicas`."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def describe(self) -> Model:
        """How one of them describes its bundle."""
        with _lost():
            model: Model = await self._handle.describe.remote()
        return model

    async def draw(self, request: Request, kind: str, seconds: float) -> AsyncGenerator[Event, None]:
        """Draw one picture with one of them."""
        events = self._handle.options(stream=True).draw.remote(request, kind, seconds)
        is_done = False
        try:
            with _lost():
                async for event in events:
                    yield event
            is_done = True
        finally:
            if not is_done:
                events.cancel()


@contextlib.contextmanager
def _lost() -> Any:
    try:
        yield
    except (RayActorError, ActorUnavailableError, DeploymentUnavailableError) as error:
        raise LostError("the process that drew a picture is gone") from error


@serve.ingress()
class Front:
    """The HTTP application, in a process that draws nothing."""

    def __init__(self, settings: Mapping[str, Any], replicas: int, handles: Mapping[str, Any]) -> None:
        """Stand in front of replicas.

        Args:
            settings: as `plain` gives them.
            replicas: of each bundle.
            handles: of the bundles' deployments, by model.
        """
        self._settings, self._replicas, self._handles = settings_from(settings), replicas, handles

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """The application; Ray calls it."""
        settings, metrics = self._settings, Metrics()
        running = self._replicas * settings.running_limit
        pools = {name: Pool(Handle(handle), Places(running, settings.queue)) for name, handle in self._handles.items()}
        for name, pool in pools.items():
            metrics.watch(name, pool)
        keys = () if settings.api_key_file is None else read_keys(settings.api_key_file)
        drawer = RemoteDrawer(pools, metrics)
        return create_app(drawer, metrics, limits=settings.limits, keys=keys, hosts=settings.hosts, log_prompts=settings.log_prompts)


def plain(settings: Settings) -> dict[str, Any]:
    """Settings as JSON data, for Ray's configuration."""
    return {
        **dataclasses.asdict(settings),
        "bundles": [str(path.resolve()) for path in settings.bundles],
        "api_key_file": None if settings.api_key_file is None else str(settings.api_key_file.resolve()),
        "options": {name: value for name, value in settings.options.items() if value is not None},
    }


def settings_from(data: Mapping[str, Any]) -> Settings:
    """What `plain` gave."""
    file = data["api_key_file"]
    return Settings(
        **{
            **data,
            "bundles": tuple(Path(path) for path in data["bundles"]),
            "api_key_file": None if file is None else Path(file),
            "limits": Limits(**data["limits"]),
        }
    )


def application(args: Mapping[str, Any]) -> Any:
    """The application, as Ray Serve's configuration names it.

    Args:
        args: ``settings``, as `plain` gives them, and ``replicas``, of each bundle.
    """
    settings, replicas = args["settings"], int(args["replicas"])
    read = settings_from(settings)
    check_replicas(read, replicas)
    resources = {"num_gpus": 1, "num_cpus": 0} if torch.cuda.is_available() else {"num_cpus": 1}
    handles = {}
    for name, bundle in zip(read.names, settings["bundles"], strict=True):
        deployment: Any = serve.deployment(
            Replica,
            name=name,
            num_replicas=replicas,
            max_ongoing_requests=read.running_limit,
            graceful_shutdown_timeout_s=read.grace,
            health_check_period_s=2.0,
            ray_actor_options=resources,
        )
        handles[name] = deployment.bind(settings, bundle)
    front: Any = serve.deployment(
        Front,
        name=FRONT,
        num_replicas=1,
        max_ongoing_requests=_CONNECTIONS,
        graceful_shutdown_timeout_s=read.grace,
        ray_actor_options={"num_cpus": 0},
    )
    return front.bind(settings, replicas, handles)


def check_replicas(settings: Settings, replicas: int) -> None:
    """Refuse what does not go together.

    Raises:
        InputError: if several bundles, which share a machine's memory, shall have several replicas each.
    """
    if settings.shares_memory and replicas > 1:
        raise InputError("several bundles share a machine with one replica each; serve one bundle, or take --replicas 1")
    if FRONT in settings.names:
        raise InputError(f"a bundle cannot be served under the name {FRONT!r}; rename its folder")


def config_of(settings: Settings, replicas: int) -> str:
    """A configuration for ``serve deploy`` and ``serve run``, as JSON, which is YAML too.

    Raises:
        InputError: if the settings do not go together.
    """
    check_replicas(settings, replicas)
    arguments = {"settings": plain(settings), "replicas": replicas}
    names = {"name": NAME, "route_prefix": "/", "import_path": f"{__name__}:application", "args": arguments}
    options = {"proxy_location": "EveryNode", "http_options": {"host": settings.host, "port": settings.port}, "applications": [names]}
    return json.dumps(options, indent=2) + "\n"


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def serve_cluster(settings: Settings, replicas: int, started: Callable[[str], None]) -> None:
    """Serve bundles by replicas, on the cluster of ``RAY_ADDRESS`` or else on this machine alone, until SIGTERM or SIGINT.

    Args:
        settings: how.
        replicas: of each bundle.
        started: is told the address, once requests are taken.

    Raises:
        InputError: if the settings do not go together, or the address cannot be had.
    """
    check_replicas(settings, replicas)
    with contextlib.closing(listening(settings)) as listener:  # Ray would try again and again
        settings = dataclasses.replace(settings, port=listener.getsockname()[1])
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address=os.environ.get("RAY_ADDRESS"), include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": settings.host, "port": settings.port})
        serve.run(application({"settings": plain(settings), "replicas": replicas}), name=NAME, route_prefix="/")
        signal.signal(signal.SIGTERM, _interrupt)  # Ray's own handler aborts the process, and its workers stay
        started(f"http://{settings.host}:{settings.port}")
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()

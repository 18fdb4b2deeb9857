"""What stands behind the HTTP application: something that draws for models by name, here or in replicas elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from tgate_trt.engines.batching import Batch
from tgate_trt.errors import InputError
from tgate_trt.serve.picture import Picture, Preview, Record, Request
from tgate_trt.serve.schema import Model
from tgate_trt.serve.service import Service
from tgate_trt.serve.uploads import encoded_image


class UnknownModelError(InputError):
    """There is no model of a name."""


@dataclass(frozen=True)
class Event:
    """What comes of a request: first that it was taken, then previews and pictures."""

    image: int = 0
    """Which of the request's pictures."""
    data: bytes = b""
    """A file of the picture or preview."""
    preview: int | None = None
    """Which preview of the picture."""
    record: Record | None = None
    """What the picture took; it is drawn."""
    error: Exception | None = None
    """Why it is not drawn, from another process."""
    batches: tuple[Batch, ...] = ()
    """Runs of engines in another process since the last event that had some."""


class Drawer(Protocol):
    """Draws for the application."""

    async def models(self) -> list[Model]:
        """What is served; the first is the default."""

    def draw(self, model: str, requests: Sequence[Request], kind: str, seconds: float) -> AsyncGenerator[Event, None]:
        """Draw pictures; closing the generator ends them.

        Args:
            model: its name.
            requests: one for each picture.
            kind: of the files that are made: ``"png"``, ``"jpeg"`` or ``"webp"``.
            seconds: until they must be drawn.

        Yields:
            An event without anything once all were taken, then one for each preview and each picture.

        Raises:
            TGateError: why they were not taken, or not drawn.
        """

    async def is_ready(self) -> bool:
        """Whether requests are taken."""


class LocalDrawer:
    """Draws with services of this process, by model."""

    def __init__(self, services: Mapping[str, Service]) -> None:
        self.services = dict(services)

    async def models(self) -> list[Model]:
        """What is served."""
        return [model_of(name, service) for name, service in self.services.items()]

    async def is_ready(self) -> bool:
        """Whether requests are taken."""
        return not any(service.is_closed for service in self.services.values())

    async def draw(self, model: str, requests: Sequence[Request], kind: str, seconds: float) -> AsyncGenerator[Event, None]:
        """Draw pictures; see `Drawer.draw`."""
        if model not in self.services:
            raise UnknownModelError(f"there is no model {model!r}; see GET /v1/models")
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Event | BaseException]()

        def put(image: int, item: Preview | Future[Picture]) -> None:  # in the thread that draws, which makes the file too
            event = _event_of(image, item, kind)
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(queue.put_nowait, event)

        shows = [partial(put, image) for image in range(len(requests))]
        jobs = self.services[model].submit(requests, deadline=seconds, show=shows)
        for image, job in enumerate(jobs):
            job.future.add_done_callback(partial(put, image))
        try:
            yield Event()
            left = len(jobs)
            while left:
                event = await queue.get()
                if isinstance(event, BaseException):
                    raise event
                left -= event.record is not None
                yield event
        finally:
            for job in jobs:
                job.cancel("the client has gone, or another picture of its request failed")


def _event_of(image: int, item: Preview | Future[Picture], kind: str) -> Event | BaseException:
    """What a job gives, as an event, or why it gives nothing."""
    try:
        if isinstance(item, Preview):
            return Event(image, encoded_image(item.image, kind), preview=item.index)
        picture = item.result()
        return Event(image, encoded_image(picture.image, kind), record=picture.record)
    except BaseException as error:
        return error


def model_of(name: str, service: Service) -> Model:
    """How a service's bundle is described."""
    manifest, width, height = service.bundle.manifest, service.bundle.manifest.built_for.width, service.bundle.manifest.built_for.height
    return Model(
        id=name,
        created=int(time.time()),
        size=f"{width.optimum}x{height.optimum}",
        widths=width.short,
        heights=height.short,
        abilities=list(service.abilities),
        backend=service.backend,
        steps=manifest.steps,
        guidance_scale=manifest.guidance_scale,
        gate=str(manifest.default_gate_step),
        gates=sorted(manifest.gates),
    )

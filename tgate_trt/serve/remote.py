"""Draws with replicas in other processes: one application in front of them bounds what they are asked, and outlives them.

A replica takes as many pictures as it draws at a time; the others wait here or in Ray's router, so a replica that dies loses those that
it had begun and no others. Those are asked for once more, for a picture follows from its request: a second try draws the same one.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tgate_trt.errors import DeadlineError, ServiceError
from tgate_trt.serve.drawers import Event, UnknownModelError
from tgate_trt.serve.metrics import Metrics
from tgate_trt.serve.picture import Request
from tgate_trt.serve.places import Places
from tgate_trt.serve.schema import Model

TRIES = 2
"""Replicas that a picture is asked of, if they die."""


class Replicas(Protocol):
    """The replicas of one bundle."""

    async def describe(self) -> Model:
        """How one of them describes its bundle."""

    def draw(self, request: Request, kind: str, seconds: float) -> AsyncGenerator[Event, None]:
        """Draw one picture with one of them, as `tgate_trt.serve.drawers.LocalDrawer.draw` does; an error comes as an event.

        Raises:
            LostError: if the replica died.
        """


class LostError(ServiceError):
    """The process that drew a picture is gone."""


@dataclass
class Pool:
    """The replicas of one bundle, and what they are asked for now. It has the properties that gauges are read from."""

    replicas: Replicas
    places: Places
    """Of all of them together."""
    outstanding: int = 0
    """Pictures that were taken and are not drawn yet."""
    running: int = 0
    model: Model | None = None
    merging_memory: int = 0

    @property
    def queued(self) -> int:
        """Pictures that wait."""
        return self.outstanding - self.running


@dataclass
class RemoteDrawer:
    """Draws for the application; see `tgate_trt.serve.drawers.Drawer`."""

    pools: Mapping[str, Pool]
    """By model."""
    metrics: Metrics
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def models(self) -> list[Model]:
        """What is served; each bundle is asked once."""
        found = []
        for name, pool in self.pools.items():
            if pool.model is None:
                pool.model = (await pool.replicas.describe()).model_copy(update={"id": name})
            found.append(pool.model)
        return found

    async def is_ready(self) -> bool:
        """Whether requests are taken."""
        with contextlib.suppress(ServiceError):
            return bool(await self.models())
        return False

    async def draw(self, model: str, requests: Sequence[Request], kind: str, seconds: float) -> AsyncGenerator[Event, None]:
        """Draw pictures, each with a replica of its own; see `tgate_trt.serve.drawers.Drawer.draw`."""
        if model not in self.pools:
            raise UnknownModelError(f"there is no model {model!r}; see GET /v1/models")
        pool = self.pools[model]
        pool.places.refuse_without_room(len(requests), pool.running, pool.queued)
        pool.outstanding += len(requests)
        events, until = asyncio.Queue[Event](), time.monotonic() + seconds
        tasks = [asyncio.ensure_future(self._picture(pool, image, request, kind, until, events)) for image, request in enumerate(requests)]
        self._tasks.update(tasks)
        for task in tasks:
            task.add_done_callback(self._tasks.discard)
        try:
            yield Event()
            left = len(requests)
            while left:
                event = await events.get()
                for batch in event.batches:
                    self.metrics.ran(model, batch)
                if event.error is not None:
                    raise event.error
                left -= event.record is not None
                yield event
        finally:
            for task in tasks:
                task.cancel()

    async def _picture(self, pool: Pool, image: int, request: Request, kind: str, until: float, events: asyncio.Queue[Event]) -> None:
        """Ask for one picture until it is drawn, and put what comes of it among the events."""
        begin = time.monotonic()
        try:
            async with asyncio.timeout(until - begin):
                async for event in self._tried(pool, request, kind, until):
                    if event.record is not None:
                        total = time.monotonic() - begin
                        pool.places.took(total)
                        event = _with_wait(event, total)  # noqa: PLW2901 - with the time that it waited here
                    events.put_nowait(dataclasses.replace(event, image=image))
        except TimeoutError:
            events.put_nowait(Event(image, error=DeadlineError("the request's time is over")))
        except Exception as error:
            events.put_nowait(Event(image, error=error))
        finally:
            pool.outstanding -= 1

    @staticmethod
    async def _tried(pool: Pool, request: Request, kind: str, until: float) -> AsyncIterator[Event]:
        """The events of one picture, from its first replica or, if that dies, from another."""
        for left in reversed(range(TRIES)):
            is_running = False
            try:
                async with contextlib.aclosing(pool.replicas.draw(request, kind, until - time.monotonic())) as events:
                    async for event in events:
                        if not is_running:
                            is_running, pool.running = True, pool.running + 1
                            continue  # it was begun
                        yield event
                return
            except LostError:
                if not left:
                    raise
            finally:
                pool.running -= is_running


def _with_wait(event: Event, total: float) -> Event:
    """An event of a picture with all of its wait, here and there."""
    assert event.record is not None
    times = event.record.times
    waited = max(0.0, total - times.total)
    record = dataclasses.replace(event.record, times=dataclasses.replace(times, queue=times.queue + waited, total=total))
    return dataclasses.replace(event, record=record)

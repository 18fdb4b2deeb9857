"""The application in front of replicas: its bounds, its second try, and its gauges, on replicas that a test can hold and kill."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tgate_trt.engines.batching import Batch
from tgate_trt.errors import BusyError, DeadlineError, InputError
from tgate_trt.serve.cluster import check_replicas, config_of, plain, settings_from
from tgate_trt.serve.drawers import Event, UnknownModelError
from tgate_trt.serve.limits import Limits
from tgate_trt.serve.metrics import Metrics
from tgate_trt.serve.picture import Record, Request, Times
from tgate_trt.serve.places import Places
from tgate_trt.serve.remote import LostError, Pool, RemoteDrawer
from tgate_trt.serve.schema import Model
from tgate_trt.serve.server import Settings

REQUEST = Request("a red circle")


class Held:
    """Replicas of one place, as a router of Ray has them: a request that waits has not begun."""

    def __init__(self, places: int = 1) -> None:
        self.places = asyncio.Semaphore(places)
        self.may_end = asyncio.Event()
        self.deaths = 0
        """How many of the next requests die after they have begun."""
        self.error: Exception | None = None
        self.begun: list[int] = []

    async def describe(self) -> Model:
        more: dict[str, Any] = {
            "abilities": [],
            "backend": "onnxruntime",
            "steps": 25,
            "guidance_scale": None,
            "gate": "10",
            "gates": [],
            "widths": "64",
            "heights": "64",
        }
        return Model(id="bundle", created=0, size="64x64", **more)

    async def draw(self, request: Request, kind: str, seconds: float) -> AsyncGenerator[Event, None]:
        async with self.places:
            self.begun.append(request.seed)
            yield Event()
            if self.deaths:
                self.deaths -= 1
                raise LostError("the process that drew a picture is gone")
            if self.error is not None:
                yield Event(error=self.error)
            await self.may_end.wait()
            record = Record(seed=request.seed, times=Times(total=0.001), steps={"planning": 1})
            yield Event(data=b"picture", record=record, batches=(Batch("planning", 1, 2, 0.1),))


async def drawn(drawer: RemoteDrawer, *requests: Request, seconds: float = 20) -> list[Event]:
    return [event async for event in drawer.draw("bundle", requests, "png", seconds)]


def drawer_of(held: Held, running: int = 1, queue: int = 1) -> tuple[RemoteDrawer, Pool, Metrics]:
    pool, metrics = Pool(held, Places(running, queue)), Metrics()
    metrics.watch("bundle", pool)
    return RemoteDrawer({"bundle": pool}, metrics), pool, metrics


def run(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(body())


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def test_all_that_waits_is_bounded_and_the_gauges_are_right() -> None:
    async def body() -> None:
        held = Held()
        drawer, pool, metrics = drawer_of(held)
        tasks = [asyncio.ensure_future(drawn(drawer, Request("", seed=seed))) for seed in range(2)]
        await until(lambda: held.begun)
        assert (pool.running, pool.queued) == (1, 1)
        assert b'tgate_running{model="bundle"} 1.0' in metrics.text() and b'tgate_queued{model="bundle"} 1.0' in metrics.text()
        with pytest.raises(BusyError, match="1 pictures are drawn and 1 wait"):
            await drawn(drawer, REQUEST)
        held.may_end.set()
        for task in tasks:
            taken, picture = await task
            assert taken == Event() and picture.record is not None
        assert picture.record is not None and picture.record.times.total > 0.001  # with its wait in front
        assert (pool.outstanding, pool.running) == (0, 0)
        assert b'tgate_batch_rows_count{graph="planning",model="bundle"} 2.0' in metrics.text()

    run(body)


def test_a_picture_is_asked_for_once_more_when_its_replica_dies() -> None:
    async def body() -> None:
        held = Held()
        drawer, pool, _ = drawer_of(held, running=2, queue=2)
        held.may_end.set()
        held.deaths = 1
        events = await drawn(drawer, Request("", seed=7))
        assert events[-1].record is not None and events[-1].record.seed == 7
        assert held.begun == [7, 7]
        held.deaths = 2
        with pytest.raises(LostError):
            await drawn(drawer, Request("", seed=8))
        await until(lambda: pool.outstanding == 0)
        assert held.begun == [7, 7, 8, 8] and pool.running == 0

    run(body)


def test_an_error_of_a_replica_is_raised_and_ends_the_other_pictures() -> None:
    async def body() -> None:
        held = Held(places=2)
        drawer, pool, _ = drawer_of(held, running=2, queue=2)
        held.error = InputError("impossible")
        with pytest.raises(InputError, match="impossible"):
            await drawn(drawer, REQUEST, REQUEST)
        await until(lambda: (pool.outstanding, pool.running) == (0, 0))

    run(body)


def test_a_deadline_and_a_client_that_goes_free_the_place() -> None:
    async def body() -> None:
        held = Held()
        drawer, pool, _ = drawer_of(held)
        with pytest.raises(DeadlineError):
            await drawn(drawer, REQUEST, seconds=0.05)
        events = drawer.draw("bundle", [REQUEST], "png", 20)
        await anext(events)
        await until(lambda: pool.running)
        await events.aclose()
        await until(lambda: (pool.outstanding, pool.running) == (0, 0))
        with pytest.raises(UnknownModelError):
            await anext(drawer.draw("other", [REQUEST], "png", 20))

    run(body)


def test_the_configuration_is_rays_and_says_all(tmp_path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    settings = Settings((tmp_path / "bundle",), port=8123, running=3, limits=Limits(seconds=7), options={"backend": "onnxruntime"})
    config = json.loads(config_of(settings, 2))
    schema = ServeDeploySchema.parse_obj(config)
    (application,) = schema.applications
    assert application.import_path == "tgate_trt.serve.cluster:application"
    assert settings_from(application.args["settings"]) == settings_from(json.loads(json.dumps(plain(settings))))
    assert settings_from(plain(settings)) == Settings(
        ((tmp_path / "bundle").resolve(),), port=8123, running=3, limits=Limits(seconds=7), options={"backend": "onnxruntime"}
    )


def test_several_bundles_have_one_replica_each(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one replica each"):
        check_replicas(Settings((tmp_path / "a", tmp_path / "b")), 2)
    check_replicas(Settings((tmp_path / "a", tmp_path / "b")), 1)

"""The usual way to batch pictures, to compare with: a batch of requests is drawn by one call of a pipeline, and the next waits for it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from tgate_trt.bundle.bundle import Bundle
from tgate_trt.errors import BusyError, ClosedError
from tgate_trt.running.drawing import Drawing, prepare
from tgate_trt.running.pipeline import LoadOptions, load
from tgate_trt.serve.picture import Picture, Preview, Request, Times
from tgate_trt.serve.service import Job
from tgate_trt.serve.slot import GENERATION


class _Job(Job):
    """A request that cannot be ended."""

    def cancel(self, why: str = "") -> None:
        """Do nothing: a batch ends as a whole."""


class BatchAndWait:
    """In the place of a `tgate_trt.serve.service.Service`, for requests that differ in prompt and seed alone."""

    merging_memory = 0
    abilities = (GENERATION,)

    def __init__(self, bundle: Bundle, *, running: int, queue: int, options: LoadOptions) -> None:
        """Load a pipeline and start the thread that draws.

        Args:
            bundle: that is open.
            running: most requests of a batch.
            queue: requests that may wait.
            options: of `tgate_trt.load`.
        """
        self.bundle, self.running_limit, self.queue_limit = bundle, running, queue
        self._pipeline = prepare(load(bundle, **options), None)
        self.backend = getattr(self._pipeline, bundle.manifest.model.attribute).origin.backend
        self._condition = threading.Condition()
        self._queue: deque[Job] = deque()
        self.running, self.is_closed = 0, False
        self._thread = threading.Thread(target=self._work, name="batch-and-wait")
        self._thread.start()

    @property
    def queued(self) -> int:
        """Pictures that wait."""
        return len(self._queue)

    def submit(
        self, requests: Sequence[Request], *, deadline: float | None = None, show: Sequence[Callable[[Preview], None] | None] = ()
    ) -> list[Job]:
        """Take requests; neither deadlines nor previews are kept."""
        jobs: list[Job] = [_Job(request, None, None, time.monotonic()) for request in requests]
        with self._condition:
            if self.is_closed:
                raise ClosedError("the service ends")
            if self.running + len(self._queue) + len(jobs) > self.running_limit + self.queue_limit:
                raise BusyError("the queue is full")
            self._queue.extend(jobs)
            self._condition.notify_all()
        return jobs

    def refuse(self) -> None:
        """Take no more, and refuse those that wait."""
        with self._condition:
            self.is_closed = True
            waiting = [*self._queue]
            self._queue.clear()
            self._condition.notify_all()
        for job in waiting:
            job.future.set_exception(ClosedError("the service ends"))

    def close(self, seconds: float | None = None) -> None:
        """Finish the batch that is drawn."""
        self.refuse()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._queue or self.is_closed)
                batch = [self._queue.popleft() for _ in range(min(self.running_limit, len(self._queue)))]
                self.running = len(batch)
            if not batch:
                return
            self._draw(batch)
            with self._condition:
                self.running = 0

    def _draw(self, batch: Sequence[Job]) -> None:
        start, settings = time.monotonic(), Drawing().of(self.bundle)
        images = self._pipeline(
            prompt=[job.request.prompt for job in batch],
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            generator=[torch.Generator().manual_seed(job.request.seed) for job in batch],
        ).images
        for job, image in zip(batch, images, strict=True):
            times = Times(queue=start - job.submitted, total=time.monotonic() - job.submitted)
            job.future.set_result(Picture(image=image, seed=job.request.seed, times=times, steps={}))

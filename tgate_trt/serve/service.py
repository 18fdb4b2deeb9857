"""`Service`: serves many threads over one bundle, with a bounded queue and a fixed number of runs at a time; no HTTP."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, replace
from typing import Any, Unpack

from tgate_trt.bundle.bundle import Bundle
from tgate_trt.engines.batching import PATIENCE, Batch, Batcher, Member
from tgate_trt.errors import CancelledError, ClosedError, DeadlineError, InputError, UnsupportedError
from tgate_trt.gate.actions import graphs_of, substitute
from tgate_trt.gate.gate import Gate
from tgate_trt.running.pipeline import LoadOptions, loader_of
from tgate_trt.serve.picture import Picture, Preview, Request
from tgate_trt.serve.places import Places
from tgate_trt.serve.shared import SharedEngines
from tgate_trt.serve.slot import EDIT, GENERATION, INPAINTING, Slot, kind_of
from tgate_trt.specs import HEIGHT, WIDTH

logger = logging.getLogger(__name__)

RUNNING, QUEUE = 4, 16
"""Pictures that are drawn at a time, and that wait beside them, by default."""


@dataclass(eq=False)
class Job:
    """A request that a service has taken."""

    request: Request
    show: Callable[[Preview], None] | None
    deadline: float | None
    """Of `time.monotonic`."""
    submitted: float
    future: Future[Picture] = field(default_factory=Future, repr=False)
    """Its picture, or why there is none."""
    member: Member | None = None
    """While it is drawn."""
    ending: CancelledError | ClosedError | None = None
    _service: Service | None = field(default=None, repr=False)

    def result(self, timeout: float | None = None) -> Picture:
        """The picture, once it is drawn.

        Raises:
            TGateError: why it was not drawn.
            TimeoutError: after so many seconds.
        """
        return self.future.result(timeout)

    def cancel(self, why: str = "the request was cancelled") -> None:
        """Take it out of the queue, or end its run at the next call of an engine."""
        assert self._service is not None
        self._service._end(self, CancelledError(why))


class Service:
    """Draws pictures for many threads, each as if it were alone, on one set of engines.

    >>> with Service("bundles/shapes", running=4) as service:
    ...     picture = service.draw("a small red circle at the top left on a blue background", seed=7)
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str] | Bundle,
        *,
        running: int = RUNNING,
        queue: int = QUEUE,
        deadline: float | None = None,
        patience: float = PATIENCE,
        on_batch: Callable[[Batch], None] | None = None,
        **options: Unpack[LoadOptions],
    ) -> None:
        """Load a bundle, and start its threads.

        Args:
            bundle: folder of a bundle, or a bundle that is open.
            running: pictures that are drawn at a time; the memory for each is taken once.
            queue: pictures that may wait beside them.
            deadline: seconds that a picture may take from its submission, unless the request says; no limit if None.
            patience: see `tgate_trt.engines.batching.PATIENCE`.
            on_batch: is called after each run of an engine, by the thread that ran it.
            **options: see `tgate_trt.load`.

        Raises:
            BundleError: if the bundle cannot be used.
            InputError: if an option is impossible.
        """
        if running < 1 or queue < 0:
            raise InputError(f"running is at least 1 and queue at least 0, got {running} and {queue}")
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        self.running_limit, self.queue_limit, self._deadline = running, queue, deadline
        self._engines = SharedEngines.of(loader_of(self.bundle, options), Batcher(patience=patience, rows=2 * running, observer=on_batch))
        self._condition = threading.Condition()
        self._queue: deque[Job] = deque()
        self._drawn: set[Job] = set()
        self._places = Places(running, queue)
        self._is_closed = False
        first = Slot(self._engines, options)
        slots = [first, *(Slot(self._engines, options, first) for _ in range(running - 1))]
        self._prompts = Slot(self._engines, options, first)
        """Counts tokens and reads gates for the threads that submit, one at a time."""
        self._prompts_lock = threading.Lock()
        self.abilities = tuple(kind for kind in (GENERATION, EDIT, INPAINTING) if first.can(kind))
        """What the bundle can do, of `tgate_trt.serve.slot`."""
        self._threads = [threading.Thread(target=self._work, args=(slot,), name=f"tgate-slot-{at}") for at, slot in enumerate(slots)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def draw(self, prompt: str | Request, *, deadline: float | None = None, **settings: Any) -> Picture:
        """Draw a picture, and wait for it.

        Args:
            prompt: what to draw, or a whole request.
            deadline: seconds that it may take; the service's own if None.
            **settings: further fields of a `Request`.

        Raises:
            BusyError: if the queue is full.
            InputError: if the request is impossible.
            DeadlineError: if it took too long.
        """
        (job,) = self.submit([prompt if isinstance(prompt, Request) else Request(prompt, **settings)], deadline=deadline)
        return job.result()

    def submit(
        self, requests: Sequence[Request], *, deadline: float | None = None, show: Sequence[Callable[[Preview], None] | None] = ()
    ) -> list[Job]:
        """Take requests, all or none of them.

        Args:
            requests: one for each picture.
            deadline: seconds that each may take from now; the service's own if None.
            show: for each request, takes its previews, in the thread that draws it.

        Raises:
            BusyError: if the queue has no room for all of them.
            ClosedError: if the service ends.
            InputError: if a request is impossible.
        """
        for request in requests:
            self.check(request)
        seconds, now = self._deadline if deadline is None else deadline, time.monotonic()
        until = None if seconds is None else now + seconds
        shows = show or [None] * len(requests)
        jobs = [Job(request, each, until, now, _service=self) for request, each in zip(requests, shows, strict=True)]
        with self._condition:
            if self._is_closed:
                raise ClosedError("the service ends and takes no more requests")
            self._places.refuse_without_room(len(jobs), len(self._drawn), len(self._queue))
            self._queue.extend(jobs)
            self._condition.notify_all()
        return jobs

    def check(self, request: Request) -> None:
        """Refuse what this bundle cannot draw, before it waits.

        Raises:
            InputError: if the request is impossible, with what is possible.
        """
        kind = kind_of(request)
        if kind not in self.abilities:
            raise UnsupportedError(f"this bundle cannot do {kind}; it can do {', '.join(self.abilities)}")
        self._check_size(request)
        most = self.bundle.manifest.model.text_tokens
        with self._prompts_lock:
            gate = self._prompts.gate_of(request)
            for text in filter(None, (request.prompt, request.negative_prompt)):
                tokens = self._prompts.tokens_of(text)
                if tokens > most:
                    raise InputError(f"a prompt has at most {most} tokens with this model, got {tokens}; shorten it")
        self._check_gate(gate, self.bundle.manifest.steps if request.steps is None else request.steps)

    def _check_size(self, request: Request) -> None:
        """Refuse sizes that the bundle does not draw."""
        built_for, dimensions = self.bundle.manifest.built_for, self.bundle.manifest.signature.dimensions
        for name, side, asked in ((WIDTH, built_for.width, request.width), (HEIGHT, built_for.height, request.height)):
            step = side.optimum // dimensions[name].optimum if name in dimensions else 1
            if asked is not None and (asked not in side or asked % step):
                raise InputError(f"this bundle draws a {name} of {side.short} pixels, in steps of {step}, and the request asks for {asked}")

    def _check_gate(self, gate: Gate, steps: int) -> None:
        """Refuse a gate that needs an engine that there is not, or more steps than the run has."""
        if isinstance(gate.boundary, int) and gate.boundary > steps:
            raise InputError(f"a gate at step {gate.boundary} needs as many steps, and this run has {steps}; choose an earlier gate")
        engines = self.bundle.manifest.engines[self._engines.backend].files
        for graph in graphs_of(gate):
            if not {graph, substitute(graph)} & engines.keys():
                raise UnsupportedError(
                    f"this bundle holds no engine of the {graph} graph, which the gate {gate} needs; choose another gate"
                )

    @property
    def queued(self) -> int:
        """Pictures that wait."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Pictures that are drawn now."""
        return len(self._drawn)

    @property
    def is_closed(self) -> bool:
        """Whether the service takes no more requests."""
        return self._is_closed

    @property
    def is_alive(self) -> bool:
        """Whether all threads that draw are there."""
        return all(thread.is_alive() for thread in self._threads)

    @property
    def merging_memory(self) -> int:
        """Bytes of the buffers in which calls are merged."""
        return sum(engine.memory for engine in self._engines.engines)

    @property
    def backend(self) -> str:
        """Of the engines that run."""
        return self._engines.backend

    def refuse(self) -> None:
        """Take no more requests and refuse those that wait; those that are drawn go on."""
        with self._condition:
            self._is_closed = True
            waiting = [*self._queue]
            self._queue.clear()
            self._condition.notify_all()
        for job in waiting:
            _answer(job, ClosedError("the service ends, and this request had not begun; send it again"))

    def close(self, seconds: float | None = None) -> None:
        """Refuse what waits, let what is drawn end, and free everything.

        Args:
            seconds: after which what is still drawn is ended too; no limit if None.
        """
        self.refuse()
        until = None if seconds is None else time.monotonic() + seconds
        for thread in self._threads:
            thread.join(None if until is None else max(0.0, until - time.monotonic()))
        for job in [*self._drawn]:
            self._end(job, ClosedError("the service ends, and this request took too long; send it again"))
        for thread in self._threads:
            thread.join()
        self._engines.close()

    def _work(self, slot: Slot) -> None:
        """Draw one request after the other with one pipeline, until the service is closed."""
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._queue or self._is_closed)
                if not self._queue:
                    return
                job = self._queue.popleft()
                self._drawn.add(job)
            try:
                self._draw(slot, job)
            finally:
                with self._condition:
                    self._drawn.discard(job)
            del job  # with its pictures, while this thread waits for the next

    def _draw(self, slot: Slot, job: Job) -> None:
        start = time.monotonic()
        try:
            if job.deadline is not None and start > job.deadline:
                raise DeadlineError("the request's time was over before it began")
            with self._engines.batcher.member(job.deadline) as member:
                job.member = member
                if job.ending is not None:
                    raise job.ending
                picture = slot.draw(job.request, member, start - job.submitted, job.show)
        except BaseException as error:
            _answer(job, error)
            return
        finally:
            job.member = None
        self._places.took(time.monotonic() - start)
        picture = replace(picture, times=replace(picture.times, total=time.monotonic() - job.submitted))
        _answer(job, picture)

    def _end(self, job: Job, error: CancelledError | ClosedError) -> None:
        with self._condition:
            job.ending = error
            is_waiting = job in self._queue
            if is_waiting:
                self._queue.remove(job)
        if is_waiting:
            _answer(job, error)
        elif (member := job.member) is not None:
            member.cancel(error)


def _answer(job: Job, answer: Picture | BaseException) -> None:
    """Answer a job, unless it has been answered."""
    with contextlib.suppress(InvalidStateError):
        if isinstance(answer, BaseException):
            job.future.set_exception(answer)
        else:
            job.future.set_result(answer)

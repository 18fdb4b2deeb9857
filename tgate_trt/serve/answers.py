"""What a request is answered with: pictures as JSON or as a stream of events, or what is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence

from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from tgate_trt.errors import BusyError, CancelledError, ClosedError, DeadlineError, InputError
from tgate_trt.serve.drawers import Event, UnknownModelError
from tgate_trt.serve.guard import Receive, Scope, Send
from tgate_trt.serve.picture import Record, Times
from tgate_trt.serve.remote import LostError
from tgate_trt.serve.schema import Failure, Problem, Seconds, TokensOfInput, Usage

logger = logging.getLogger(__name__)

CLIENT_GONE = 499
"""Status of an answer that nobody receives, as nginx counts it."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """An error as an answer."""

    status: int
    outcome: str
    """Of `tgate_trt.serve.metrics.OUTCOMES`."""
    problem: Problem
    headers: dict[str, str]


def answer_to(error: BaseException) -> Answer:
    """The answer to an error; those that are no fault of the client's tell nothing but that they happened."""
    text = str(error)
    if isinstance(error, UnknownModelError):
        return Answer(404, "invalid", Problem(message=text, type="invalid_request_error", param="model", code="model_not_found"), {})
    if isinstance(error, InputError):
        return Answer(400, "invalid", Problem(message=text, type="invalid_request_error"), {})
    if isinstance(error, BusyError):
        wait = str(max(1, round(error.retry_after)))
        return Answer(429, "busy", Problem(message=text, type="rate_limit_error", code="rate_limit_exceeded"), {"retry-after": wait})
    if isinstance(error, ClosedError):
        return Answer(
            503, "closed", Problem(message=text, type="server_error", code="closing"), {"retry-after": "1", "connection": "close"}
        )
    if isinstance(error, DeadlineError):
        return Answer(504, "deadline", Problem(message=text, type="server_error", code="deadline"), {})
    if isinstance(error, LostError):
        text = "the process that drew the picture ended, and so did the next; send the request again"
        return Answer(503, "error", Problem(message=text, type="server_error", code="lost"), {"retry-after": "1"})
    if isinstance(error, CancelledError | asyncio.CancelledError):
        return Answer(CLIENT_GONE, "client_gone", Problem(message="the client has gone", type="invalid_request_error"), {})
    return Answer(500, "error", Problem(message="the server failed to draw; its log says why", type="server_error"), {})


def failure(answer: Answer) -> JSONResponse:
    """An error as a response."""
    return JSONResponse(Failure(error=answer.problem).model_dump(), answer.status, answer.headers)


async def while_there(receive: Receive, events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
    """Events, as long as the client is there; they are closed in any case.

    Raises:
        CancelledError: if the client goes.
    """
    gone = asyncio.ensure_future(_gone(receive))
    try:
        while True:
            step = asyncio.ensure_future(anext(events, None))
            try:
                await asyncio.wait({gone, step}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not step.done():
                    step.cancel()
                    await asyncio.wait({step})
            if step.cancelled():
                raise CancelledError("the client has gone")
            event = step.result()
            if event is None:
                return
            yield event
    finally:
        gone.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await gone
        await events.aclose()


async def _gone(receive: Receive) -> None:
    """Return when the client goes; its body has been received."""
    while (await receive())["type"] != "http.disconnect":
        pass


def usage_of(records: Sequence[Record]) -> Usage:
    """What the pictures of one answer took together."""
    tokens = sum(record.tokens for record in records)
    names = [field.name for field in dataclasses.fields(Times)]
    seconds = {name: round(sum(getattr(record.times, name) for record in records), 6) for name in names}
    steps: Counter[str] = Counter()
    for record in records:
        steps.update(record.steps)
    details = TokensOfInput(text_tokens=tokens, image_tokens=0)
    return Usage(
        input_tokens=tokens,
        input_tokens_details=details,
        output_tokens=0,
        total_tokens=tokens,
        seconds=Seconds(**seconds),
        steps=dict(steps),
    )


def server_timing(usage: Usage) -> str:
    """The header of that name: milliseconds by phase."""
    return ", ".join(f"{name};dur={1000 * value:.1f}" for name, value in usage.seconds.model_dump().items())


class EventStream(Response):
    """Server-sent events."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[BaseModel], ended: Callable[[str, float], None]) -> None:
        """Answer with events.

        Args:
            events: bodies with a field ``type``; may raise, which becomes the last event.
            ended: is told the outcome and the seconds that the stream took.
        """
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._ended, self._start = events, ended, time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events."""
        outcome = "client_gone"
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async for event in self._events:
                    await send({"type": "http.response.body", "body": _sse(event.model_dump_json()), "more_body": True})
                outcome = "ok"
            except Exception as error:
                answer = answer_to(error)
                outcome = answer.outcome
                if outcome == "error":
                    log_failure(error)
                body = json.dumps({"type": "error", "error": answer.problem.model_dump()})
                await send({"type": "http.response.body", "body": _sse(body), "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            self._ended(outcome, time.monotonic() - self._start)


def _sse(body: str) -> bytes:
    """One event with its type, as JSON."""
    return f"event: {json.loads(body)['type']}\ndata: {body}\n\n".encode()


def log_failure(error: BaseException) -> None:
    """Log a failure that is the server's own, with its traceback; no message of it quotes a request."""
    logger.error("a request failed: %s", type(error).__name__, exc_info=error)

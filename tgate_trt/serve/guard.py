"""What every request passes before the application sees it: who it is from, whom it is for, and how much it may send."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException

from tgate_trt.errors import InputError
from tgate_trt.serve.limits import Limits
from tgate_trt.serve.schema import Failure, Problem

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("localhost", "127.0.0.1", "::1")

HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
"""Of every answer."""

_GUARDED = "/v1/"
"""Paths that need a key, where there are keys."""


def read_keys(file: Path) -> tuple[str, ...]:
    """API keys, one a line; empty lines and lines that begin with ``#`` are none.

    Raises:
        InputError: if the file cannot be read or holds no key.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read {file}: {getattr(error, 'strerror', None) or 'it is no text'}; choose another --api-key-file"
        ) from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise InputError(f"{file} holds no API key; write one a line")
    return keys


class Guard:
    """Middleware that refuses before anything is read or computed."""

    def __init__(
        self,
        app: App,
        *,
        limits: Limits,
        keys: Sequence[str] = (),
        hosts: Sequence[str] | None = None,
        refused: Callable[[str], None] | None = None,
    ) -> None:
        """Stand before an application.

        Args:
            app: that is guarded.
            limits: of bodies.
            keys: that clients may have; anyone may come if there are none.
            hosts: names under which the server may be called, so that no page of another site reaches it through a name of its own;
                any if None.
            refused: is told the outcome of each request that is refused, of `tgate_trt.serve.metrics.OUTCOMES`.
        """
        self._app, self._limits, self._hosts = app, limits, hosts
        self._digests = [_digest(key) for key in keys]
        self._refused = refused or (lambda outcome: None)
        self._held = 0
        """Bytes of bodies of requests that are served now."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        identity = secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = identity

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                for name, value in {**HEADERS, "x-request-id": identity}.items():
                    headers.setdefault(name, value)
            await send(message)

        headers = Headers(scope=scope)
        problem = self._problem(scope, headers)
        if problem is not None:
            await _answer(send_with_headers, *problem)
            return
        body = _Body()
        try:
            await self._app(scope, self._bounded(receive, body), send_with_headers)
        finally:
            self._held -= body.size

    def _problem(self, scope: Scope, headers: Headers) -> tuple[int, str, str, dict[str, str]] | None:
        """Status, type, message and headers of a refusal."""
        host = _host(headers.get("host", ""))
        if self._hosts is not None and host not in self._hosts:
            return 421, "invalid_request_error", "this server answers to a name of this machine's own alone", {}
        origin = headers.get("origin")
        if origin and scope["method"] not in ("GET", "HEAD") and urlsplit(origin).netloc.lower() != headers.get("host", "").lower():
            return 403, "invalid_request_error", "requests from pages of other sites are refused", {}
        if self._digests and scope["path"].startswith(_GUARDED) and not self._is_known(headers.get("authorization", "")):
            self._refused("unauthorized")
            return 401, "authentication_error", "give an API key as Authorization: Bearer KEY", {"www-authenticate": "Bearer"}
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._limits.body:
            self._refused("too_large")
            return 413, "invalid_request_error", f"a body has at most {self._limits.body} bytes", {"connection": "close"}
        return None

    def _is_known(self, authorization: str) -> bool:
        """Whether a header holds a key; every key is compared, each in constant time."""
        scheme, _, key = authorization.partition(" ")
        given = _digest(key.strip())
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(matches) and scheme.lower() == "bearer"

    def _bounded(self, receive: Receive, body: _Body) -> Receive:
        """Receives a body of bounded size within a bounded time, as long as all that are held do not get too large."""
        until = time.monotonic() + self._limits.body_seconds

        async def bounded() -> Message:
            if body.is_whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, until - time.monotonic()))
            except TimeoutError:
                raise self._refusal("slow", 408, f"the body did not come within {self._limits.body_seconds:g} s") from None
            size = len(message.get("body", b""))
            body.size += size
            self._held += size
            body.is_whole = not message.get("more_body", False)
            if body.size > self._limits.body:
                raise self._refusal("too_large", 413, f"a body has at most {self._limits.body} bytes")
            if self._held > self._limits.bodies:
                raise self._refusal("busy", 503, "the server holds as many bytes of requests as it may; try again later")
            return message

        return bounded

    def _refusal(self, outcome: str, status: int, message: str) -> HTTPException:
        self._refused(outcome)
        return HTTPException(status, message, {"connection": "close"} | ({"retry-after": "1"} if status == 503 else {}))


@dataclass
class _Body:
    """A body that is being received."""

    size: int = 0
    """Bytes so far."""
    is_whole: bool = False


def _digest(key: str) -> bytes:
    """Of equal length for all keys, so that a comparison tells nothing of theirs."""
    return hashlib.sha256(key.encode()).digest()


def _host(header: str) -> str:
    """The name in a ``Host`` header, without the port."""
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""


async def _answer(send: Send, status: int, kind: str, message: str, headers: dict[str, str]) -> None:
    body = json.dumps(Failure(error=Problem(message=message, type=kind)).model_dump()).encode()
    raw = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    raw += [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})

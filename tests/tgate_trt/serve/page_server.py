"""A stand-in for the server: it serves the page's files and speaks OpenAI's images API, with real PNGs and times that are made up."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import mimetypes
import select
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

PAGE = Path(__file__).parents[3] / "tgate_trt" / "serve" / "page"

CSP = "default-src 'self'; img-src 'self' data: blob:"

PREVIEWS = 3

PROMPTS = ["a small red circle at the top left on a blue background", "a large yellow square at the center on a green background"]

NESTED: dict[str, Any] = {
    "id": "shapes-64x64-fp32",
    "object": "model",
    "created": 1,
    "owned_by": "tgate-trt",
    "tgate": {"width": 64, "height": 64, "default_steps": 25, "default_gate": "noise:1.35", "prompts": PROMPTS},
}
"""A model that describes itself in a block of its own."""

FLAT: dict[str, Any] = {
    "id": "portraits-128x192-fp16",
    "object": "model",
    "created": 1,
    "owned_by": "tgate-trt",
    "size": "128x192",
    "steps": 20,
    "guidance_scale": 7.5,
    "gate": "0.25",
    "gates": ["tuned"],
}
"""A model that describes itself beside its name."""


@dataclass
class Refusal:
    """An answer in the place of pictures."""

    status: int
    message: str
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": "some_error", "param": self.param, "code": None}}


@dataclass
class Asked:
    """A request that came."""

    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any] = field(default_factory=dict)


@dataclass
class StandIn:
    """What the server does, which a test may change at any time, and what it saw."""

    address: str = ""
    models: list[dict[str, Any]] = field(default_factory=lambda: [NESTED, FLAT])
    key: str | None = None
    refusal: Refusal | None = None
    fails_after: int | None = None
    """Partial images after which a stream ends with an error."""
    ends_after: int | None = None
    """Partial images after which a stream just ends."""
    is_flat: bool = False
    """Whether times lie in ``usage`` itself, and steps are counts alone."""
    phases: list[str] | None = None
    """Of each step, in the place of those that the gate means."""
    holds_before: int | None = None
    """Partial image before which a stream waits for `released`."""
    released: threading.Event = field(default_factory=threading.Event)
    gone: threading.Event = field(default_factory=threading.Event)
    """Set when a client leaves while its picture is drawn."""
    asked: list[Asked] = field(default_factory=list)
    drawing: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def drawn(self) -> list[dict[str, Any]]:
        """Bodies of the requests for pictures."""
        return [asked.body for asked in self.asked if asked.path == "/v1/images/generations"]

    @contextlib.contextmanager
    def one_more(self) -> Iterator[None]:
        """Count pictures that are drawn at once."""
        with self.lock:
            self.drawing += 1
            self.most_at_once = max(self.most_at_once, self.drawing)
        try:
            yield
        finally:
            with self.lock:
                self.drawing -= 1


@contextlib.contextmanager
def serving() -> Iterator[StandIn]:
    """Serve on a free loopback port until the block ends."""
    stand_in = StandIn()
    handler = type("BoundHandler", (Handler,), {"stand_in": stand_in})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = False
    stand_in.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, name="page-server")
    thread.start()
    try:
        yield stand_in
    finally:
        stand_in.released.set()
        server.shutdown()
        server.server_close()
        thread.join(10)


class ClientGoneError(Exception):
    """Nobody waits for the answer."""


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"
    timeout = 30
    stand_in: StandIn

    def log_message(self, *arguments: Any) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        """Serve files and models."""
        self.stand_in.asked.append(Asked("GET", self.path, dict(self.headers)))
        if self.path == "/":
            self._file(PAGE / "index.html")
        elif self.path.startswith("/page/") and (PAGE / self.path.removeprefix("/page/")).is_file():
            self._file(PAGE / self.path.removeprefix("/page/"))
        elif self.path == "/v1/models":
            self._models()
        else:
            self._json(404, Refusal(404, "not found").body)

    def do_POST(self) -> None:
        """Draw."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.stand_in.asked.append(Asked("POST", self.path, dict(self.headers), body))
        refusal = self._refusal()
        if refusal is not None:
            self._json(refusal.status, refusal.body, refusal.headers)
            return
        try:
            with self.stand_in.one_more():
                self._stream(body)
        except (ClientGoneError, OSError):
            self.stand_in.gone.set()

    def _refusal(self) -> Refusal | None:
        key = self.stand_in.key
        if key is not None and self.headers.get("authorization") != f"Bearer {key}":
            return Refusal(401, "give an API key as Authorization: Bearer KEY")
        return self.stand_in.refusal

    def _models(self) -> None:
        refusal = self._refusal()
        if refusal is not None and refusal.status == 401:
            self._json(401, refusal.body)
        else:
            self._json(200, {"object": "list", "data": self.stand_in.models})

    def _file(self, path: Path) -> None:
        self._answer(200, mimetypes.guess_type(path.name)[0] or "", path.read_bytes(), {"content-security-policy": CSP})

    def _json(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        self._answer(status, "application/json", json.dumps(body).encode(), headers or {})

    def _answer(self, status: int, kind: str, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"content-type": kind, "content-length": str(len(data)), "connection": "close", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        for name, value in {"content-type": "text/event-stream", "transfer-encoding": "chunked", "connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        for index in range(body["partial_images"]):
            self._wait(index)
            if index == self.stand_in.fails_after:
                self._event({"type": "error", "error": Refusal(500, "the server failed to draw; its log says why").body["error"]})
                break
            if index == self.stand_in.ends_after:
                break
            share = (index + 1) / (PREVIEWS + 1)
            self._event({"type": "image_generation.partial_image", "b64_json": picture(body, share), "partial_image_index": index})
        else:
            self._event(completed(body, self.stand_in))
        self.wfile.write(b"0\r\n\r\n")

    def _wait(self, index: int) -> None:
        """Give other requests time, or hold until the test goes on; a client that leaves ends this."""
        is_held = index == self.stand_in.holds_before
        while True:
            is_released = self.stand_in.released.wait(0.02)
            readable, _, _ = select.select([self.connection], [], [], 0)
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                raise ClientGoneError
            if is_released or not is_held:
                return

    def _event(self, body: dict[str, Any]) -> None:
        """Send an event in two parts, as a network may."""
        data = f"event: {body['type']}\ndata: {json.dumps(body)}\n\n".encode()
        middle = len(data) // 2
        for part in (data[:middle], data[middle:]):
            self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            self.wfile.flush()


def completed(body: dict[str, Any], stand_in: StandIn) -> dict[str, Any]:
    """The last event of a stream."""
    phases = stand_in.phases or phases_of(body)
    counts = {phase: phases.count(phase) for phase in dict.fromkeys(phases)}
    seconds = {phase: round(0.018 * count if phase == "planning" else 0.009 * count, 6) for phase, count in counts.items()}
    seconds |= {"queue": 0.004, "hand_off": 0.001, "decode": 0.012}
    seconds["total"] = round(sum(seconds.values()), 6)
    event: dict[str, Any] = {
        "type": "image_generation.completed",
        "b64_json": picture(body, 1),
        "created_at": 1,
        "size": "64x64",
        "output_format": "png",
    }
    usage = {"input_tokens": 12, "output_tokens": 0, "total_tokens": 12}
    if stand_in.is_flat:
        return {**event, "seed": body["seed"], "usage": {**usage, "seconds": seconds, "steps": counts}}
    actions = [{"step": number, "phase": phase} for number, phase in enumerate(phases, 1)]
    return {**event, "usage": {**usage, "tgate": {"seed": body["seed"], "seconds": seconds, "steps": counts, "actions": actions}}}


def phases_of(body: dict[str, Any]) -> list[str]:
    """The phase of each step under a gate that is a number or none."""
    steps = int(body["num_inference_steps"])
    planning = int(body["gate"]) if str(body["gate"]).isdecimal() else steps
    return ["planning"] * planning + ["fidelity"] * (steps - planning)


def picture(body: dict[str, Any], share: float) -> str:
    """A PNG in base64: a circle out of noise, of a hue that the seed decides, a little smaller behind a gate."""
    noise = Image.effect_noise((64, 64), 160).convert("RGB")
    clean = Image.new("RGB", (64, 64), (28, 82, 200))
    hue = (220, 40 + 37 * int(body["seed"]) % 180, 40)
    edge = 8 if body["gate"] == "none" else 9
    ImageDraw.Draw(clean).ellipse((edge, edge, 38, 38), fill=hue)
    file = io.BytesIO()
    Image.blend(noise, clean, share).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")

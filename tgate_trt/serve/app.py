"""The HTTP application: OpenAI's images API over whatever draws, `tgate_trt.serve.drawers.Drawer`."""

from __future__ import annotations

import asyncio
import logging
import mimetypes
import secrets
import time
from base64 import b64encode
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response

from tgate_trt.errors import InputError, TGateError
from tgate_trt.serve.answers import (
    Answer,
    EventStream,
    answer_to,
    failure,
    log_failure,
    server_timing,
    usage_of,
    while_there,
)
from tgate_trt.serve.drawers import Drawer, Event, UnknownModelError
from tgate_trt.serve.guard import Guard
from tgate_trt.serve.limits import Limits
from tgate_trt.serve.metrics import CONTENT_TYPE, Metrics
from tgate_trt.serve.picture import LARGEST_SEED, Record, Request
from tgate_trt.serve.schema import (
    Completed,
    Drawn,
    Edit,
    Failure,
    Generation,
    ImageData,
    Images,
    Model,
    Models,
    PartialImage,
    Problem,
    State,
)
from tgate_trt.serve.uploads import opened_image, read_form

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"

_ERRORS = {
    400: "Something in the request is impossible.",
    401: "The API key is missing or unknown.",
    403: "The request comes from a page of another site.",
    404: "There is no such model.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    421: "The server was called by a name that is not its own.",
    429: "The queue is full; Retry-After says when to try again.",
    500: "The server failed.",
    503: "The server ends.",
    504: "The picture took too long.",
}
_RESPONSES: dict[int | str, dict[str, Any]] = {status: {"model": Failure, "description": text} for status, text in _ERRORS.items()}
_STREAM = {
    "text/event-stream": {"schema": {"anyOf": [{"$ref": f"#/components/schemas/{kind.__name__}"} for kind in (PartialImage, Completed)]}}
}


class Api:
    """The routes that draw."""

    def __init__(self, drawer: Drawer, metrics: Metrics, limits: Limits, *, log_prompts: bool = False) -> None:
        self._drawer, self._metrics, self._limits, self._log_prompts = drawer, metrics, limits, log_prompts

    async def generations(self, body: Generation, http: HttpRequest) -> Response:
        """Draw pictures from a prompt."""
        return await self._respond(http, body, "image_generation")

    async def edits(self, http: HttpRequest) -> Response:
        """Draw pictures from a picture, or within a mask of it."""
        try:
            fields, image, mask = await read_form(http)
            body = Edit.model_validate(fields)
            start = opened_image(image, self._limits, "image")
            within = None if mask is None else opened_image(mask, self._limits, "mask")
        except ValidationError as error:
            raise RequestValidationError(error.errors()) from error
        except InputError as error:
            return self._failed("", error)
        return await self._respond(http, body, "image_edit", {"image": start, "mask": within, "strength": body.strength})

    async def models(self) -> Models:
        """What is served; the first is the default."""
        return Models(data=await self._drawer.models())

    def _failed(self, model: str, error: BaseException) -> JSONResponse:
        answer = answer_to(error)
        self._metrics.ended(model, answer.outcome)
        if answer.outcome == "error":
            log_failure(error)
        return failure(answer)

    async def _respond(self, http: HttpRequest, body: Drawn, kind: str, start: dict[str, Any] | None = None) -> Response:
        begin, name = time.monotonic(), ""
        try:
            model = await self._model(body)
            name = model.id
            requests = self._requests(body, start or {})
            if self._log_prompts:
                logger.info("prompt for %s: %r", name, body.prompt)
            events = while_there(http.receive, self._drawer.draw(name, requests, body.output_format, self._limits.seconds))
            await anext(events)  # all were taken
            if body.stream:
                bodies = self._bodies(events, body, kind, model)
                return EventStream(bodies, lambda outcome, seconds: self._metrics.ended(name, outcome, seconds))
            answer = self._images(await self._collect(events, name, len(requests)), body, model)
        except Exception as error:
            return self._failed(name, error)
        except asyncio.CancelledError:  # a server in front of this one saw the client go
            self._metrics.ended(name, "client_gone")
            raise
        self._metrics.ended(name, "ok", time.monotonic() - begin)
        return JSONResponse(answer.model_dump(exclude_none=True), headers={"server-timing": server_timing(answer.usage)})

    async def _model(self, body: Drawn) -> Model:
        """The model that a body names.

        Raises:
            InputError: if there is none.
        """
        models = await self._drawer.models()
        model = next((model for model in models if body.model in (None, model.id)), None)
        if model is None:
            raise UnknownModelError(f"there is no such model; this server has {', '.join(model.id for model in models)}")
        return model

    def _requests(self, body: Drawn, start: dict[str, Any]) -> list[Request]:
        first = secrets.randbelow(2**31) if body.seed is None else body.seed
        if body.n > self._limits.images:
            raise InputError(f"n is at most {self._limits.images}")
        width, height = (None, None) if body.size == "auto" else (int(side) for side in body.size.split("x"))
        return [
            Request(
                width=width,
                height=height,
                prompt=body.prompt,
                negative_prompt=body.negative_prompt,
                steps=body.num_inference_steps,
                guidance_scale=body.guidance_scale,
                seed=(first + number) % (LARGEST_SEED + 1),
                gate=None if body.gate is None else str(body.gate),
                after_gate=body.after_gate,
                previews=body.partial_images if body.stream else 0,
                **start,
            )
            for number in range(body.n)
        ]

    async def _collect(self, events: AsyncGenerator[Event, None], model: str, count: int) -> list[tuple[bytes, Record]]:
        """The files of all pictures, and what they took."""
        drawn: dict[int, tuple[bytes, Record]] = {}
        async for event in events:
            if event.record is not None:
                self._metrics.drew(model, event.record)
                drawn[event.image] = event.data, event.record
        return [drawn[image] for image in range(count)]

    @staticmethod
    def _images(drawn: Sequence[tuple[bytes, Record]], body: Drawn, model: Model) -> Images:
        data = []
        for file, record in drawn:
            text = b64encode(file).decode("ascii")
            if body.response_format == "url":
                data.append(ImageData(url=f"data:image/{body.output_format};base64,{text}", seed=record.seed))
            else:
                data.append(ImageData(b64_json=text, seed=record.seed))
        usage = usage_of([record for _, record in drawn])
        return Images(created=int(time.time()), data=data, output_format=body.output_format, size=_size(body, model), usage=usage)

    async def _bodies(
        self, events: AsyncGenerator[Event, None], body: Drawn, kind: str, model: Model
    ) -> AsyncGenerator[PartialImage | Completed, None]:
        """The events of a stream, in OpenAI's form."""
        try:
            async for event in events:
                common: dict[str, Any] = {"image_index": event.image, "created_at": int(time.time()), "size": _size(body, model)}
                common |= {"output_format": body.output_format, "b64_json": b64encode(event.data).decode("ascii")}
                if event.preview is not None:
                    yield PartialImage(type=f"{kind}.partial_image", partial_image_index=event.preview, **common)  # type: ignore[arg-type]
                elif event.record is not None:
                    self._metrics.drew(model.id, event.record)
                    more = {"seed": event.record.seed, "usage": usage_of([event.record])}
                    yield Completed(type=f"{kind}.completed", **more, **common)  # type: ignore[arg-type]
        finally:
            await events.aclose()


def _size(body: Drawn, model: Model) -> str:
    return model.size if body.size == "auto" else body.size


def create_app(
    drawer: Drawer,
    metrics: Metrics,
    *,
    limits: Limits | None = None,
    keys: Sequence[str] = (),
    hosts: Sequence[str] | None = None,
    log_prompts: bool = False,
    page: Path = PAGE,
) -> FastAPI:
    """The application.

    Args:
        drawer: draws.
        metrics: what is counted, at ``/metrics``.
        limits: of requests.
        keys: API keys, of which a client must have one; anyone may draw if there are none.
        hosts: names under which the server may be called; see `tgate_trt.serve.guard.Guard`.
        log_prompts: whether to log what users ask for.
        page: folder of the page at ``/``.
    """
    limits = limits or Limits()
    app = FastAPI(title="tgate-serve", summary="Pictures by OpenAI's images API, with T-GATE.", docs_url=None, redoc_url=None)
    api = Api(drawer, metrics, limits, log_prompts=log_prompts)
    success: dict[int | str, dict[str, Any]] = {
        200: {"model": Images, "content": _STREAM, "description": "Pictures, or a stream of events."}
    }
    app.post("/v1/images/generations", responses=success | _RESPONSES, response_class=JSONResponse, tags=["images"])(api.generations)
    app.post(
        "/v1/images/edits",
        responses=success | _RESPONSES,
        response_class=JSONResponse,
        tags=["images"],
        openapi_extra={"requestBody": _edit_body()},
    )(api.edits)
    app.get("/v1/models", responses={401: _RESPONSES[401]}, tags=["models"])(api.models)
    _add_states(app, drawer, metrics)
    _add_page(app, page)
    _add_handlers(app, metrics)
    app.add_middleware(Guard, limits=limits, keys=keys, hosts=hosts, refused=lambda outcome: metrics.ended("", outcome))
    app.openapi = lambda: _schema(app)  # type: ignore[method-assign]
    return app


def _add_states(app: FastAPI, drawer: Drawer, metrics: Metrics) -> None:
    @app.get("/healthz", tags=["state"])
    async def healthz() -> State:
        """Whether the process answers."""
        return State(status="ok")

    @app.get("/readyz", tags=["state"], responses={503: {"model": State, "description": "The server ends."}})
    async def readyz() -> Response:
        """Whether requests are taken."""
        is_ready = await drawer.is_ready()
        return JSONResponse({"status": "ready" if is_ready else "closing"}, 200 if is_ready else 503)

    @app.get("/metrics", tags=["state"], response_class=PlainTextResponse)
    async def metrics_text() -> Response:
        """Prometheus' text form."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)


def _add_page(app: FastAPI, page: Path) -> None:
    """Serve the files of a folder as they are now, from memory: a path of a request names one of them or nothing."""
    files = {file.name: file.read_bytes() for file in page.iterdir() if file.is_file()} if page.is_dir() else {}

    def file_of(name: str) -> Response:
        if name not in files:
            raise HTTPException(404, "there is no such page")
        return Response(files[name], media_type=mimetypes.guess_type(name)[0] or "application/octet-stream")

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return file_of("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        return file_of(name)


def _add_handlers(app: FastAPI, metrics: Metrics) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_http: HttpRequest, error: RequestValidationError) -> JSONResponse:
        metrics.ended("", "invalid")
        return failure(Answer(400, "invalid", _problem_of(error), {}))

    @app.exception_handler(HTTPException)
    async def refused(http: HttpRequest, error: HTTPException) -> JSONResponse:
        if error.status_code == 400 and http.url.path.startswith("/v1/"):
            metrics.ended("", "invalid")
        kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
        return failure(Answer(error.status_code, "", Problem(message=str(error.detail), type=kind), dict(error.headers or {})))

    @app.exception_handler(TGateError)
    async def impossible(_http: HttpRequest, error: TGateError) -> JSONResponse:
        return failure(answer_to(error))


def _problem_of(error: RequestValidationError) -> Problem:
    """What is wrong with a body: the unknown fields by name, or the first value that is impossible, without the value."""
    found = error.errors()
    unknown = [str(one["loc"][-1]) for one in found if one["type"] == "extra_forbidden"]
    if unknown:
        text = f"unknown fields: {', '.join(unknown)}; this server takes {', '.join([*Edit.model_fields])}"
        return Problem(message=text, type="invalid_request_error", param=unknown[0], code="unknown_parameter")
    first = found[0]
    name = ".".join(str(part) for part in first["loc"] if part != "body") or None
    text = "the body is no JSON" if first["type"] == "json_invalid" else f"{name or 'the body'}: {first['msg']}"
    return Problem(message=text, type="invalid_request_error", param=name)


def _edit_body() -> dict[str, Any]:
    """The multipart body of an edit, for OpenAPI."""
    schema = Edit.model_json_schema()
    file = {"type": "string", "format": "binary"}
    schema["properties"] = {"image": file, "mask": file, **schema["properties"]}
    schema["required"] = ["image", *schema["required"]]
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}


def _schema(app: FastAPI) -> dict[str, Any]:
    """OpenAPI without what FastAPI adds and this application never answers."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version="1", summary=app.summary, routes=app.routes)
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        schemas = schema["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        for kind in (PartialImage, Completed):
            made = kind.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= made.pop("$defs", {})
            schemas[kind.__name__] = made
        app.openapi_schema = schema
    return app.openapi_schema

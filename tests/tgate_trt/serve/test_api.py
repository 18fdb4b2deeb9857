"""The HTTP API as its clients see it: OpenAI's own client unchanged, exact OpenAPI, and one clear error for everything else."""

from __future__ import annotations

import base64
import io
import json
import re
from typing import Any

import httpx2 as httpx
import jsonschema
import numpy
import openai
import pytest
from PIL import Image

from .conftest import Running

PROMPT = "a large red circle at the top right on a white background"
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


@pytest.fixture
def client(running: Running) -> Any:
    with openai.OpenAI(base_url=f"{running.address}/v1", api_key="none", max_retries=0) as client:
        yield client


def image_of(text: str | None) -> Image.Image:
    assert text is not None
    return Image.open(io.BytesIO(base64.b64decode(text)))


def png(size: tuple[int, int] = (64, 64), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    image = Image.new(mode, size, "blue" if mode == "RGB" else 255)
    if mode == "L":
        image.paste(0, (0, 0, size[0] // 2, size[1]))
    image.save(buffer, "PNG")
    return buffer.getvalue()


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "JPEG")
    return buffer.getvalue()


def post(running: Running, body: Any, path: str = GENERATIONS, **more: Any) -> httpx.Response:
    with running.client() as client:
        return client.post(path, json=body, **more)


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    found: dict[str, Any] = response.json()["error"]
    assert found["message"] and found["type"]
    return found


def test_openais_client_draws(client: openai.OpenAI, running: Running) -> None:
    answer = client.images.generate(prompt=PROMPT, n=2, size="auto", extra_body={"seed": 5, "num_inference_steps": 4, "gate": 2})
    assert answer.data is not None and answer.usage is not None and answer.size == "64x64"
    direct = [running.service.draw(PROMPT, seed=seed, steps=4, gate="2").image for seed in (5, 6)]
    for item, expected in zip(answer.data, direct, strict=True):
        assert (numpy.asarray(image_of(item.b64_json)) == numpy.asarray(expected)).all()
    usage: Any = answer.usage
    assert usage.steps == {"planning": 4, "fidelity": 4}
    assert usage.seconds["planning"] > 0 and usage.input_tokens > 0


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_openais_client_gets_the_format_that_it_asks_for(client: openai.OpenAI, kind: Any) -> None:
    answer = client.images.generate(prompt=PROMPT, output_format=kind, extra_body={"num_inference_steps": 2})
    assert answer.data is not None and image_of(answer.data[0].b64_json).format == kind.upper()


def test_a_url_is_a_data_url(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt=PROMPT, response_format="url", extra_body={"num_inference_steps": 2})
    assert answer.data is not None and answer.data[0].url is not None
    head, _, text = answer.data[0].url.partition(",")
    assert head == "data:image/png;base64" and image_of(text).size == (64, 64)


def test_openais_client_streams(client: openai.OpenAI) -> None:
    events: Any = client.images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body={"seed": 5, "num_inference_steps": 6})
    found = [*events]
    kinds = ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.type for event in found] == kinds
    assert [event.partial_image_index for event in found[:2]] == [0, 1]
    whole = client.images.generate(prompt=PROMPT, extra_body={"seed": 5, "num_inference_steps": 6})
    assert whole.data is not None and found[-1].b64_json == whole.data[0].b64_json
    assert found[-1].usage.steps["planning"] > 0


def test_openais_client_edits(client: openai.OpenAI) -> None:
    more = {"num_inference_steps": 4, "strength": 0.5, "seed": 3}
    answer = client.images.edit(image=("start.png", png()), prompt=PROMPT, extra_body=more)
    assert answer.data is not None and image_of(answer.data[0].b64_json).size == (64, 64)
    masked = client.images.edit(image=[("start.png", png())], mask=("mask.png", png(mode="L")), prompt=PROMPT, extra_body=more)
    assert masked.data is not None and masked.data[0].b64_json != answer.data[0].b64_json
    events: Any = client.images.edit(image=("start.png", png()), prompt=PROMPT, stream=True, partial_images=1, extra_body=more)
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_openais_client_lists_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    found: Any = model
    assert (model.id, found.size, found.abilities) == ("shapes", "64x64", ["generation", "edit", "inpainting"])


def test_openais_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no such model; this server has shapes"):
        client.images.generate(prompt=PROMPT, model="dall-e-3")
    with pytest.raises(openai.BadRequestError, match="draws a width of 64 pixels"):
        client.images.generate(prompt=PROMPT, size="1024x1024")


def test_server_timing_has_the_phases(running: Running) -> None:
    response = post(running, {"prompt": PROMPT, "num_inference_steps": 3})
    timing = dict(part.split(";dur=") for part in response.headers["server-timing"].split(", "))
    seconds = response.json()["usage"]["seconds"]
    assert {"queue", "planning", "fidelity", "hand_off", "decode"} <= timing.keys()
    assert all(float(timing[name]) == pytest.approx(1000 * value, abs=0.06) for name, value in seconds.items())


def test_unknown_fields_are_refused_by_name(running: Running) -> None:
    found = error_of(post(running, {"prompt": PROMPT, "quality": "hd", "style": "vivid"}), 400)
    assert found["message"].startswith("unknown fields: quality, style; this server takes prompt, ")
    assert (found["param"], found["code"]) == ("quality", "unknown_parameter")
    with running.client() as client:
        edit = client.post(EDITS, data={"prompt": PROMPT, "quality": "hd"}, files={"image": png()})
    assert error_of(edit, 400)["param"] == "quality"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "prompt: Field required"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x" * 8001}, "at most 8000"),
        ({"prompt": "circle " * 50}, "at most 24 tokens"),
        ({"prompt": PROMPT, "n": 9}, "n: "),
        ({"prompt": PROMPT, "n": 0}, "n: "),
        ({"prompt": PROMPT, "n": "1"}, "n: "),
        ({"prompt": PROMPT, "n": 1.5}, "n: "),
        ({"prompt": PROMPT, "size": "64×64"}, "size: "),
        ({"prompt": PROMPT, "size": "64x128"}, "a height of 64 pixels"),
        ({"prompt": PROMPT, "num_inference_steps": 201}, "num_inference_steps"),
        ({"prompt": PROMPT, "guidance_scale": "nan"}, "guidance_scale"),
        ({"prompt": PROMPT, "seed": -1}, "seed"),
        ({"prompt": PROMPT, "gate": "soon"}, "a gate step is"),
        ({"prompt": PROMPT, "gate": 0}, "at least 1"),
        ({"prompt": PROMPT, "gate": "none,deep=3"}, "no engine of the"),
        ({"prompt": PROMPT, "after_gate": "never"}, "after_gate"),
        ({"prompt": PROMPT, "output_format": "gif"}, "output_format"),
        ({"prompt": PROMPT, "partial_images": 4}, "partial_images"),
        ([PROMPT], "body"),
    ],
)
def test_impossible_values_are_refused_in_a_sentence(running: Running, body: Any, says: str) -> None:
    assert says in error_of(post(running, body), 400)["message"]


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"[" * 100_000, b'{"prompt": 1e999}', b"null"])
def test_bad_json_is_refused(running: Running, content: bytes) -> None:
    with running.client() as client:
        error_of(client.post(GENERATIONS, content=content, headers={"content-type": "application/json"}), 400)


@pytest.mark.parametrize(
    ("files", "data", "says"),
    [
        ({}, {"prompt": PROMPT}, "multipart/form-data"),
        ({"picture": png()}, {"prompt": PROMPT}, "the files image and mask"),
        ({"mask": png()}, {"prompt": PROMPT}, "needs the file image"),
        ({"image": b"no picture"}, {"prompt": PROMPT}, "image is no whole PNG, JPEG, WEBP"),
        ({"image": png()[:-30]}, {"prompt": PROMPT}, "image is no whole PNG, JPEG, WEBP"),
        ({"image": jpeg()[:-300]}, {"prompt": PROMPT}, "the picture to start from is damaged"),
        ({"image": png((8192, 8192))}, {"prompt": PROMPT}, "8192×8192 pixels"),
        ({"image": png((20000, 20000), "L")}, {"prompt": PROMPT}, "image"),
        ({"image": png(), "mask": b"GIF89a"}, {"prompt": PROMPT}, "mask is no whole"),
        ({"image": png()}, {}, "prompt"),
        ({"image": png()}, {"prompt": PROMPT, "strength": "2"}, "strength"),
    ],
)
def test_uploads_are_bounded(running: Running, files: Any, data: Any, says: str) -> None:
    with running.client() as client:
        response = client.post(EDITS, data=data, files=files) if files else client.post(EDITS, data=data)
    assert says in error_of(response, 400)["message"]


def test_openapi_is_exact(running: Running) -> None:
    """Every route and status is described, and every answer is of its schema."""
    with running.client() as client:
        schema = client.get("/openapi.json").json()
    assert set(schema["paths"]) == {GENERATIONS, EDITS, "/v1/models", "/healthz", "/readyz", "/metrics"}
    responses = schema["paths"][GENERATIONS]["post"]["responses"]
    assert set(responses) == {"200", "400", "401", "403", "404", "408", "413", "421", "429", "500", "503", "504"}
    assert schema["components"]["schemas"]["Generation"]["additionalProperties"] is False

    def check(response: httpx.Response, path: str, method: str) -> None:
        described = schema["paths"][path][method]["responses"][str(response.status_code)]["content"]["application/json"]["schema"]
        jsonschema.validate(response.json(), {**described, "components": schema["components"]})

    check(post(running, {"prompt": PROMPT, "num_inference_steps": 2}), GENERATIONS, "post")
    check(post(running, {"prompt": PROMPT, "n": 9}), GENERATIONS, "post")
    check(post(running, {"prompt": PROMPT, "model": "none"}), GENERATIONS, "post")
    with running.client() as client:
        check(client.get("/v1/models"), "/v1/models", "get")
        check(client.get("/readyz"), "/readyz", "get")
        edit = client.post(EDITS, data={"prompt": PROMPT, "num_inference_steps": "2"}, files={"image": png()})
    check(edit, EDITS, "post")
    form = schema["paths"][EDITS]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["required"] == ["image", "prompt"] and form["additionalProperties"] is False


def test_the_states(running: Running) -> None:
    with running.client() as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        assert client.get("/readyz").json() == {"status": "ready"}
        assert client.get("/nothing").status_code == 404


def test_the_page_and_its_files_are_there(running: Running) -> None:
    with running.client() as client:
        page = client.get("/")
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
        files = re.findall(r'(?:src|href)="(page/[^"]+)"', page.text)
        assert files
        for file in files:
            assert client.get(f"/{file}").status_code == 200
        assert client.get("/page/page.js").headers["content-type"].startswith(("text/javascript", "application/javascript"))


def test_every_answer_has_the_headers_that_protect_its_reader(running: Running) -> None:
    with running.client() as client:
        for path in ("/healthz", "/nothing", "/v1/models"):
            headers = client.get(path).headers
            assert headers["content-security-policy"] == "default-src 'self'; img-src 'self' data: blob:"
            assert headers["x-content-type-options"] == "nosniff"
            assert len(headers["x-request-id"]) == 16


def test_metrics_count_and_hold_nothing_that_a_client_sent(running: Running) -> None:
    before = running.outcomes().get("ok", 0)
    with running.client(headers={"x-request-id": "mine"}) as client:
        client.post(GENERATIONS, json={"prompt": PROMPT, "num_inference_steps": 4, "gate": 2, "user": "somebody"})
        client.post(GENERATIONS, json={"prompt": PROMPT, "model": "made-up"})
        text = client.get("/metrics").text
    assert running.outcomes()["ok"] == before + 1
    for name in ("tgate_requests_total", "tgate_running", "tgate_queued", "tgate_request_seconds_bucket", "tgate_queue_seconds_bucket"):
        assert re.search(rf'^{name}{{.*model="shapes"', text, re.MULTILINE)
    for phase in ("planning", "fidelity", "hand_off", "decode"):
        assert f'tgate_phase_seconds_total{{model="shapes",phase="{phase}"}}' in text
    for graph in ("planning", "fidelity", "vae_decoder"):
        assert f'tgate_batch_rows_bucket{{graph="{graph}",le="1.0",model="shapes"}}' in text
    assert 'tgate_memory_bytes{kind="resident"}' in text
    for typed in ("circle", "background", "somebody", "made-up", "mine"):
        assert typed not in text


def test_a_stream_that_fails_ends_with_an_error(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    (engine,) = [engine for engine in running.service._engines.engines if engine.spec.name == "fidelity"]

    def fails(batch: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine, "run_merged", fails)
    body = {"prompt": PROMPT, "num_inference_steps": 6, "gate": 3, "stream": True, "partial_images": 3}
    response = post(running, body)
    assert response.status_code == 200
    last = json.loads(response.text.strip().splitlines()[-1].removeprefix("data: "))
    assert last["type"] == "error" and "out of memory" not in response.text
    assert error_of(post(running, {**body, "stream": False}), 500)["message"] == "the server failed to draw; its log says why"

"""What a server does when too many come, when they send too much or too slowly, when they go, and when it is asked to end."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from PIL import Image
from typer.testing import CliRunner

from tgate_trt.bundle.bundle import Bundle
from tgate_trt.cli.serve import app as command
from tgate_trt.errors import InputError
from tgate_trt.serve.guard import read_keys
from tgate_trt.serve.limits import Limits
from tgate_trt.serve.server import Settings

from .conftest import Running, Serve

PROMPT = "a large red circle at the top right on a white background"
GENERATIONS = "/v1/images/generations"
LONG = {"prompt": PROMPT, "num_inference_steps": 200}
SHORT = {"prompt": PROMPT, "num_inference_steps": 2}
RUNNING, QUEUE = 2, 2
"""Of the fixture `settings`."""


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def post(running: Running, body: dict[str, Any], **more: Any) -> httpx.Response:
    with running.client() as client:
        return client.post(GENERATIONS, json=body, **more)


def full(running: Running, pool: ThreadPoolExecutor) -> list[Future[httpx.Response]]:
    """Requests that fill the server: as many as run and wait."""
    before = running.service.running + running.service.queued
    assert before == 0
    requests = [pool.submit(post, running, LONG) for _ in range(RUNNING + QUEUE)]
    until(lambda: (running.service.running, running.service.queued) == (RUNNING, QUEUE))
    return requests


def test_past_the_queue_comes_429_with_retry_after_and_the_others_are_drawn(running: Running, pool: ThreadPoolExecutor) -> None:
    before = running.outcomes().get("busy", 0)
    requests = full(running, pool)
    refused = [pool.submit(post, running, LONG) for _ in range(8)]
    for request in refused:
        response = request.result()
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["code"] == "rate_limit_exceeded"
    assert [request.result().status_code for request in requests] == [200] * len(requests)
    assert running.outcomes()["busy"] == before + len(refused)


def test_n_pictures_are_taken_together_or_not_at_all(running: Running) -> None:
    assert post(running, {**SHORT, "n": RUNNING + QUEUE + 1}).status_code == 429
    assert len(post(running, {**SHORT, "n": RUNNING + QUEUE}).json()["data"]) == RUNNING + QUEUE


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_place_at_the_next_step(running: Running, stream: bool) -> None:
    gone = running.outcomes().get("client_gone", 0)
    body = json.dumps({**LONG, "stream": stream, "n": RUNNING + 1}).encode()
    with running.connection() as connection:
        head = f"POST {GENERATIONS} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        until(lambda: (running.service.running, running.service.queued) == (RUNNING, 1))
    start = time.monotonic()
    until(lambda: (running.service.running, running.service.queued) == (0, 0))
    assert time.monotonic() - start < 1.5  # all of its steps take many seconds
    until(lambda: running.outcomes().get("client_gone", 0) == gone + 1)
    assert post(running, SHORT).status_code == 200


def test_a_client_that_goes_in_mid_stream(running: Running) -> None:
    gone = running.outcomes().get("client_gone", 0)
    with running.client() as client, client.stream("POST", GENERATIONS, json={**LONG, "stream": True, "partial_images": 3}) as response:
        first = next(response.iter_lines())
        assert first == "event: image_generation.partial_image"
    until(lambda: running.service.running == 0)
    until(lambda: running.outcomes().get("client_gone", 0) == gone + 1)


def test_a_large_body_is_refused_before_it_is_read(running: Running) -> None:
    """Of 100 MB, by its announced length; and of any length in chunks, once the bound is passed."""
    with running.connection() as connection:
        connection.sendall(f"POST {GENERATIONS} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {10**8}\r\n\r\n".encode())
        assert b" 413 " in connection.recv(65536).splitlines()[0]
    sent = 0
    with running.connection() as connection:
        head = f"POST {GENERATIONS} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
        connection.sendall(head.encode())
        chunk = b" " * 2**20
        try:
            for _ in range(100):
                connection.sendall(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
                sent += len(chunk)
        except OSError:
            pass
        assert sent < 64 * 2**20
    until(lambda: running.outcomes().get("too_large", 0) == 2)
    assert post(running, SHORT).status_code == 200


def test_bodies_are_bounded_together(serve: Serve) -> None:
    with serve(limits=Limits(bodies=2**20)) as running:
        head = (
            f"POST {GENERATIONS} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {2**20}\r\n\r\n".encode()
        )
        with running.connection() as first, running.connection() as second:
            for connection in (first, second):
                connection.sendall(head + b" " * (2**20 - 2**16))
            second.settimeout(30)
            answered = select.select([first, second], [], [], 30)[0]
            assert b" 503 " in answered[0].recv(65536).splitlines()[0]
        until(lambda: running.outcomes().get("busy") == 1)
        assert post(running, SHORT).status_code == 200


def test_a_slow_body_is_given_up(serve: Serve) -> None:
    with serve(limits=Limits(body_seconds=0.5)) as running, running.connection() as connection:
        connection.sendall(
            f"POST {GENERATIONS} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 90\r\n\r\n{{".encode()
        )
        start = time.monotonic()
        assert b" 408 " in connection.recv(65536).splitlines()[0]
        assert time.monotonic() - start < 5
        assert running.outcomes() == {"slow": 1}
        assert post(running, SHORT).status_code == 200


def test_a_deadline_is_held(serve: Serve) -> None:
    with serve(limits=Limits(seconds=0.4)) as running:
        response = post(running, LONG)
        assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline")
        assert running.outcomes() == {"deadline": 1}


def test_keys_are_asked_for(serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the tests\nfirst-key\n\nsecond-key\n", encoding="utf-8")
    with serve(api_key_file=file) as running:
        for header in ("", "Bearer", "Bearer wrong", "Basic first-key", "Bearer first-key2", "Bearer # of the tests"):
            response = post(running, SHORT, headers={"authorization": header} if header else {})
            assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
        for key in ("first-key", "second-key"):
            assert post(running, SHORT, headers={"authorization": f"Bearer {key}"}).status_code == 200
        with running.client() as client:
            assert client.get("/v1/models").status_code == 401
            assert client.get("/readyz").status_code == 200
        assert running.outcomes() == {"ok": 2, "unauthorized": 7}


@pytest.mark.parametrize("text", ["", "\n# nothing\n", None])
def test_a_file_without_keys_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "keys").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"holds no API key|cannot read"):
        read_keys(tmp_path / "keys")


def test_pages_of_other_sites_do_not_reach_a_server_of_this_machine(running: Running) -> None:
    """Neither by a name of theirs that leads here, nor by a form that posts here."""
    assert post(running, SHORT, headers={"host": "example.com"}).status_code == 421
    assert post(running, SHORT, headers={"origin": "https://example.com"}).status_code == 403
    own = running.address
    assert post(running, SHORT, headers={"origin": own}).status_code == 200


def test_the_end_finishes_what_is_drawn_and_refuses_what_waits(serve: Serve, pool: ThreadPoolExecutor) -> None:
    with serve() as running:
        requests = full(running, pool)
        running.server.should_exit = True
        statuses = sorted(request.result().status_code for request in requests)
        assert statuses == [200] * RUNNING + [503] * QUEUE
        closed = next(request.result() for request in requests if request.result().status_code == 503)
        assert closed.headers["retry-after"] == "1" and closed.json()["error"]["code"] == "closing"
        assert running.outcomes() == {"ok": RUNNING, "closed": QUEUE}


def test_what_users_type_is_logged_only_if_asked(serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level("DEBUG")
    bodies = [SHORT, {**SHORT, "gate": "10,circle"}, {**SHORT, "circle": 1}, {**SHORT, "prompt": "circle " * 60}]
    with serve() as running:
        for body in bodies:
            post(running, body)
        (engine,) = [engine for engine in running.service._engines.engines if engine.spec.name == "planning"]
        monkeypatch.setattr(engine, "run_merged", None)
        assert post(running, SHORT).status_code == 500
    texts = [record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    assert any("a request failed: GateError" in text or "a request failed: TypeError" in text for text in texts)
    assert not any("circle" in text for text in texts)
    caplog.clear()
    with serve(log_prompts=True) as running:
        post(running, SHORT)
    assert any(PROMPT in record.getMessage() for record in caplog.records)


def test_the_page_is_served_with_its_files(settings: Settings, tmp_path: Path) -> None:
    from starlette.testclient import TestClient

    from tgate_trt.serve.app import create_app
    from tgate_trt.serve.drawers import LocalDrawer
    from tgate_trt.serve.metrics import Metrics

    (tmp_path / "index.html").write_text("<!doctype html><title>page</title>", encoding="utf-8")
    (tmp_path / "page.js").write_text("1;", encoding="utf-8")
    (tmp_path.parent / "outside.txt").write_text("secret", encoding="utf-8")
    client = TestClient(create_app(LocalDrawer({}), Metrics(), page=tmp_path))
    assert "<title>page</title>" in client.get("/").text
    assert client.get("/page/page.js").text == "1;"
    assert client.get("/").headers["content-security-policy"] == "default-src 'self'; img-src 'self' data: blob:"
    for outside in ("/page/../outside.txt", "/page/%2e%2e/outside.txt", "/page//etc/passwd"):
        assert client.get(outside).status_code == 404


@pytest.fixture
def process(shapes_bundle: Bundle) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command in a process of its own, and its address."""
    line = [sys.executable, "-c", "from tgate_trt.cli.serve import main; main()", str(shapes_bundle.folder)]
    options = ["--port", "0", "--running", "1", "--queue", "1", "--threads", "1", "--backend", "onnxruntime"]
    with subprocess.Popen([*line, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            address = re.search(r"http://\S+", child.stdout.readline())
            assert address is not None, child.stderr and child.stderr.read()
            yield child, address.group()
        finally:
            child.kill()


def test_sigterm_under_load_ends_cleanly(process: tuple[subprocess.Popen[str], str], pool: ThreadPoolExecutor) -> None:
    child, address = process

    def ask(_: int) -> int:
        with httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
            return client.post(GENERATIONS, json=LONG).status_code

    requests = [pool.submit(ask, number) for number in range(2)]
    with httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
        until(lambda: all(text in client.get("/metrics").text for text in ('running{model="shapes"} 1.0', 'queued{model="shapes"} 1.0')))
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == 0
    assert sorted(request.result() for request in requests) == [200, 503]
    assert child.stderr is not None and child.stderr.read() == ""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=5)


def test_a_damaged_bundle_is_refused_at_the_start(shapes_bundle: Bundle, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "damaged"
    shutil.copytree(shapes_bundle.folder, copy)
    file = copy / "planning.onnx"
    file.write_bytes(file.read_bytes()[:-1])
    result = CliRunner().invoke(command, [str(copy), "--port", "0"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and "planning.onnx" in result.stderr


def test_a_port_that_is_taken_is_refused_in_a_sentence(shapes_bundle: Bundle) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = CliRunner().invoke(command, [str(shapes_bundle.folder), "--port", str(taken.getsockname()[1])])
    assert result.exit_code == 1 and "choose another --port" in result.stderr


def test_without_the_extra_the_command_says_what_to_install(shapes_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tgate_trt.serve.server", None)
    result = CliRunner().invoke(command, [str(shapes_bundle.folder)])
    assert result.exit_code == 1 and "extra [serve]" in result.stderr


def test_a_configuration_of_ray_is_written(shapes_bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    result = CliRunner().invoke(command, [str(shapes_bundle.folder), "--replicas", "2", "--write-config", str(file)])
    assert (result.exit_code, result.stdout) == (0, f"{file}\n")
    (application,) = json.loads(file.read_text(encoding="utf-8"))["applications"]
    assert application["args"]["replicas"] == 2


def test_a_full_disk_fails_no_request(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload of some MB, which a server would usually spool to a file."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    noise, buffer = Image.effect_noise((2000, 2000), 100), io.BytesIO()
    noise.save(buffer, "PNG")
    assert len(buffer.getvalue()) > 2**21
    with monkeypatch.context() as patch:
        for name in ("_mkstemp_inner", "NamedTemporaryFile", "TemporaryFile"):
            patch.setattr(tempfile, name, full)
        with running.client() as client:
            response = client.post(
                "/v1/images/edits", data={"prompt": PROMPT, "num_inference_steps": "2"}, files={"image": buffer.getvalue()}
            )
    assert response.status_code == 200


def test_several_bundles_share_a_machine_by_holding_one_engine_each(shapes_bundle: Bundle, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(shapes_bundle.folder, tmp_path / "other")
    settings = Settings((Path(shapes_bundle.folder), tmp_path / "other"), port=0, options={"backend": "onnxruntime", "threads": 1})
    assert settings.load_options["low_memory"] and settings.running_limit == 1
    with pytest.raises(InputError, match="must differ"):
        Settings((Path(shapes_bundle.folder),) * 2)
    from .conftest import serving

    with serving(settings) as running:
        answers = [post(running, {**SHORT, "seed": 1, "model": model}).json() for model in ("shapes", "other")]
        assert answers[0]["data"] == answers[1]["data"]
        with running.client() as client:
            assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["shapes", "other"]


def test_help_loads_nothing_heavy() -> None:
    code = "import sys; from tgate_trt.cli.serve import app; print(sorted({'torch', 'fastapi', 'ray', 'uvicorn'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ))
    assert done.stdout.strip() == "[]"


def test_a_clock_that_jumps_changes_nothing(running: Running, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines and times are of a clock that no one sets."""
    request = pool.submit(post, running, {"prompt": PROMPT, "num_inference_steps": 20})
    until(lambda: running.service.running == 1)
    now = time.time()
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now + 10**7)
        response = request.result()
    assert response.status_code == 200
    assert 0 < response.json()["usage"]["seconds"]["total"] < 60


def test_threads_end_with_the_server(serve: Serve) -> None:
    before = {thread.ident for thread in threading.enumerate()}
    with serve() as running:
        post(running, SHORT)
    assert {thread.ident for thread in threading.enumerate()} <= before

"""Two replicas on one machine under Ray: one is killed in mid-request, no request is lost, it comes back, and nothing stays behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import psutil
import pytest

from tgate_trt.bundle.bundle import Bundle

GENERATIONS = "/v1/images/generations"
PROMPT = "a large red circle at the top right on a white background"
REPLICAS, REQUESTS, STEPS = 2, 8, 60


@pytest.fixture
def cluster(shapes_bundle: Bundle) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command with two replicas in a process of its own, and its address."""
    line = [sys.executable, "-c", "from tgate_trt.cli.serve import main; main()", str(shapes_bundle.folder), "--replicas", str(REPLICAS)]
    options = ["--port", "0", "--running", "2", "--queue", "8", "--threads", "1", "--backend", "onnxruntime"]
    with subprocess.Popen([*line, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdout is not None
        family: list[psutil.Process] = []
        try:
            address = re.search(r"http://\S+", child.stdout.readline())
            assert address is not None
            family = psutil.Process(child.pid).children(recursive=True)
            yield child, address.group()
        finally:
            child.kill()
            for process in family:
                if process.is_running():
                    process.kill()


def replicas_of(child: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that hold the bundle."""
    family = psutil.Process(child.pid).children(recursive=True)
    return [process for process in family if process.status() != "zombie" and "ServeReplica:tgate:shapes" in " ".join(process.cmdline())]


def ask(address: str, seed: int) -> tuple[int, str]:
    with httpx.Client(base_url=address, timeout=120, trust_env=False) as client:
        response = client.post(GENERATIONS, json={"prompt": PROMPT, "seed": seed % 2, "num_inference_steps": STEPS})
        return response.status_code, response.json()["data"][0]["b64_json"]


@pytest.mark.slow
def test_a_replica_that_is_killed_loses_nothing_and_comes_back(cluster: tuple[subprocess.Popen[str], str]) -> None:
    child, address = cluster
    first = replicas_of(child)
    assert len(first) == REPLICAS
    expected = [ask(address, seed) for seed in range(2)]
    with ThreadPoolExecutor(REQUESTS) as pool:
        requests = [pool.submit(ask, address, seed) for seed in range(REQUESTS)]
        with httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
            while 'tgate_running{model="shapes"} 4.0' not in client.get("/metrics").text:
                time.sleep(0.02)
        os.kill(first[0].pid, signal.SIGKILL)
        answers = [request.result() for request in requests]
    assert answers == [expected[seed % 2] for seed in range(REQUESTS)]
    end = time.monotonic() + 60
    while len(replicas_of(child)) < REPLICAS:
        assert time.monotonic() < end
        time.sleep(0.2)
    with httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
        text = client.get("/metrics").text
    assert f'tgate_requests_total{{model="shapes",outcome="ok"}} {REQUESTS + 2}.0' in text
    family = psutil.Process(child.pid).children(recursive=True)
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == 0
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive

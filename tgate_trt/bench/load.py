"""A server under load, from another process on the same machine: closed loops, whose clients wait, and open ones, whose do not.

Every point is measured in rounds with each way to batch in turn, so that a drift of the machine meets all alike; the rates of open loops
follow from the capacity in the same round. In an open loop a
request's time counts from when it was due, and arrivals are a seeded Poisson process.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import psutil

from tgate_trt.errors import TGateError

CONTINUOUS, ONE, WAIT = "continuous batching", "one at a time", "batch and wait"

POLICIES = (CONTINUOUS, ONE, WAIT)
"""Ways to batch; `tgate_trt.bench.load_server` has a server of each."""

RUNNING, QUEUE = 4, 16
SHARES = (0.5, 1.0, 2.0, 4.0)
"""Rates of open loops, as shares of the capacity."""
LONGER = 4
"""The lowest rate has the fewest requests, so it is measured so many times as long."""

_PROMPT = "a large red circle at the top right on a white background"
_TIMEOUT = 120.0
_RAMP = 2.0
"""Seconds at the beginning of a point in which pictures are not counted for its throughput, for the first ones are not done yet."""
_INTERVAL = 0.25
"""Seconds between two looks at the server's memory."""


@dataclass(frozen=True)
class Sample:
    """One request."""

    status: int
    """0 if the connection broke."""
    seconds: float
    """From when it was due."""
    ended: float
    """Of `time.perf_counter`."""
    first_partial: float | None = None
    """Seconds until the first partial image of a stream."""


@dataclass
class Server:
    """A server in a process of its own."""

    policy: str
    process: subprocess.Popen[str]
    port: int

    def request(self, seed: int, due: float, *, stream: bool = False) -> Sample:
        """Ask for a picture, and take the time."""
        body: dict[str, Any] = {"prompt": _PROMPT, "seed": seed}
        body |= {"stream": True, "partial_images": 1} if stream else {}
        first: float | None = None
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_TIMEOUT)
        try:
            connection.request("POST", "/v1/images/generations", json.dumps(body), {"content-type": "application/json"})
            response = connection.getresponse()
            if stream and response.status == 200:
                first = _first_partial(response, due)
            response.read()
            status = response.status
        except (OSError, http.client.HTTPException):
            status = 0
        finally:
            connection.close()
        end = time.perf_counter()
        return Sample(status, end - due, end, first)

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_TIMEOUT)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


def _first_partial(response: http.client.HTTPResponse, due: float) -> float | None:
    for line in response:
        if line.startswith(b"event: image_generation.partial_image"):
            return time.perf_counter() - due
    return None


@contextlib.contextmanager
def servers(bundle: Path, running: int, queue: int, backend: str | None) -> Iterator[dict[str, Server]]:
    """A server of each policy.

    Raises:
        TGateError: if one does not start.
    """
    found: dict[str, Server] = {}
    with contextlib.ExitStack() as stack:
        for policy in POLICIES:
            line = [sys.executable, "-m", "tgate_trt.bench.load_server", str(bundle), policy, str(running), str(queue), backend or ""]
            process = stack.enter_context(subprocess.Popen(line, stdout=subprocess.PIPE, text=True))
            stack.callback(process.terminate)
            assert process.stdout is not None
            port = process.stdout.readline().strip()
            if not port.isdecimal():
                raise TGateError(f"the server with {policy} did not start; its error is above")
            found[policy] = Server(policy, process, int(port))
        yield found


def closed_loop(server: Server, clients: int, seconds: float, *, stream: bool = False) -> list[Sample]:
    """Requests of clients of which each waits for its answer before it asks again; one that is refused waits a moment."""
    end, samples, lock = time.perf_counter() + seconds, list[Sample](), threading.Lock()

    def client(number: int) -> None:
        seed = number
        while (due := time.perf_counter()) < end:
            sample = server.request(seed, due, stream=stream)
            with lock:
                samples.append(sample)
            if sample.status != 200:
                time.sleep(0.1)
            seed += clients

    with ThreadPoolExecutor(clients) as pool:
        for future in [pool.submit(client, number) for number in range(clients)]:
            future.result()
    return samples


def open_loop(server: Server, rate: float, seconds: float, seed: int = 0) -> list[Sample]:
    """Requests that come at random, so many a second, whatever became of those before."""
    generator, due, arrivals = random.Random(seed), 0.0, list[float]()
    while (due := due + generator.expovariate(rate)) < seconds:
        arrivals.append(due)
    begin = time.perf_counter()
    with ThreadPoolExecutor(max(1, len(arrivals))) as pool:
        futures = []
        for number, arrival in enumerate(arrivals):
            time.sleep(max(0.0, begin + arrival - time.perf_counter()))
            futures.append(pool.submit(server.request, number, begin + arrival))
        return [future.result() for future in futures]


class MemoryWatch:
    """Resident bytes of a process over a while."""

    def __init__(self, process: int) -> None:
        self._process, self._ended = psutil.Process(process), threading.Event()
        self.samples = [self._process.memory_info().rss]

    def __enter__(self) -> MemoryWatch:
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_INTERVAL):
            self.samples.append(self._process.memory_info().rss)


@dataclass
class Point:
    """One load of one server, measured in rounds."""

    server: Server
    kind: str
    """``"closed"``, ``"streams"``, which is closed with streams, or ``"open"``."""
    level: float
    """Clients; in an open loop, the rate as a share of the round's capacity."""
    seconds: float
    """How long requests are begun in a round."""

    def __post_init__(self) -> None:
        """Begin without samples."""
        self.rounds: list[list[Sample]] = []
        self.throughput: list[float] = []
        """Pictures a second within the time of each round, but for its beginning."""
        self.memory: list[int] = []
        self.engines = [0.0, 0.0, 0.0]
        self.wall = 0.0

    def run(self, capacity: float = 0.0) -> None:
        """Measure one round.

        Args:
            capacity: of the server in this round, in pictures a second; for an open loop.
        """
        before, start = [self.server.metric(name) for name in _ENGINE_METRICS], time.perf_counter()
        with MemoryWatch(self.server.process.pid) as memory:
            if self.kind == "open":
                samples = open_loop(self.server, self.level * capacity, self.seconds, seed=len(self.rounds))
            else:
                samples = closed_loop(self.server, int(self.level), self.seconds, stream=self.kind == "streams")
        self.wall += time.perf_counter() - start
        after = [self.server.metric(name) for name in _ENGINE_METRICS]
        self.engines = [own + end - begin for own, begin, end in zip(self.engines, before, after, strict=True)]
        ramp = min(_RAMP, self.seconds / 4)
        in_time = sum(sample.status == 200 and start + ramp <= sample.ended <= start + self.seconds for sample in samples)
        self.throughput.append(in_time / (self.seconds - ramp))
        self.rounds.append(samples)
        self.memory += memory.samples

    def p99(self, number: int) -> float:
        """Of a round's pictures, in seconds; not a number if there are none."""
        seconds = [sample.seconds for sample in self.rounds[number] if sample.status == 200]
        return float(numpy.percentile(seconds, 99)) if seconds else math.nan

    @property
    def errors(self) -> int:
        """Requests that ended neither with a picture nor with 429."""
        return sum(sample.status not in (200, 429) for samples in self.rounds for sample in samples)

    def results(self) -> dict[str, Any]:
        """Everything, as plain data."""
        samples = [sample for each in self.rounds for sample in each]
        drawn = [sample for sample in samples if sample.status == 200]
        engines, rows, ran = self.engines
        return {
            "policy": self.server.policy,
            "kind": self.kind,
            "level": self.level,
            "requests": len(samples),
            "throughput": statistics.median(self.throughput),
            "throughput_of_rounds": list(self.throughput),
            "latency": _percentiles([sample.seconds for sample in drawn]),
            "p99_of_rounds": [self.p99(number) for number in range(len(self.rounds))],
            "first_partial": _percentiles([sample.first_partial for sample in drawn if sample.first_partial is not None]),
            "refused": sum(sample.status == 429 for sample in samples),
            "errors": self.errors,
            "memory": {"first": self.memory[0], "last": self.memory[-1], "peak": max(self.memory)},
            "outside_engines": 1 - engines / self.wall if ran else None,
            "rows_a_batch": rows / ran if ran else None,
        }


_ENGINE_METRICS = ("tgate_engine_seconds_total", "tgate_rows_total", "tgate_batch_rows_count")


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """Percentiles in seconds, and how many values there are; None of none."""
    if not values:
        return None
    p50, p90, p99 = (float(value) for value in numpy.percentile(values, (50, 90, 99)))
    return {"p50": p50, "p90": p90, "p99": p99, "count": len(values)}


def measure(
    bundle: Path, seconds: float, rounds: int, *, running: int = RUNNING, queue: int = QUEUE, backend: str | None = None
) -> Iterator[dict[str, Any]]:
    """Measure a bundle under load.

    Args:
        bundle: folder of a bundle.
        seconds: of each point in a round.
        rounds: of every point, the ways to batch in turn.
        running: pictures at a time, and of a batch.
        queue: pictures that wait.
        backend: of the engines.

    Yields:
        After each round, the points, the capacity of continuous batching in each round, which is its throughput with as many clients as
        pictures are drawn at a time, and what was aimed at beside what was found.
    """
    with servers(bundle, running, queue, backend) as found:
        for server in found.values():
            closed_loop(server, running, 3.0)
        closed = {
            clients: [Point(server, "closed", clients, seconds) for server in found.values()] for clients in (1, running, running + queue)
        }
        streams = [Point(found[CONTINUOUS], "streams", clients, seconds) for clients in (1, running)]
        opened = {
            share: [Point(server, "open", share, seconds * (LONGER if share == SHARES[0] else 1)) for server in found.values()]
            for share in SHARES
        }
        capacities: list[float] = []
        for _ in range(rounds):
            for point in (*closed[1], *closed[running]):
                point.run()
            capacities.append(closed[running][0].throughput[-1])
            for point in (each for points in opened.values() for each in points):
                point.run(max(capacities[-1], 1 / seconds))
            for point in (*closed[running + queue], *streams):
                point.run()
            points = [point for group in (*closed.values(), streams, *opened.values()) for point in group]
            goals = goals_of(closed[1][0], closed[running][0], opened[SHARES[0]][0], opened[SHARES[-1]][0])
            yield {"points": [point.results() for point in points], "capacity": capacities, "goals": goals}


def goals_of(alone: Point, full: Point, half: Point, four: Point) -> dict[str, Any]:
    """What was aimed at for continuous batching, and what was found: ratios are medians of those within a round.

    Args:
        alone: a closed loop of one client.
        full: of as many clients as pictures are drawn at a time.
        half: an open loop of half the capacity.
        four: of four times the capacity.
    """
    tails = [half.p99(number) / alone.p99(number) for number in range(len(alone.rounds))]
    goodput = [
        own / max(best) if max(best) else math.nan for own, *best in zip(four.throughput, four.throughput, full.throughput, strict=True)
    ]
    return {
        "p99_at_half": {"found": statistics.median(tails), "goal": 1.5},
        "errors_at_four": {"found": four.errors, "goal": 0},
        "goodput_at_four": {"found": statistics.median(goodput), "goal": 0.9},
        "memory_growth": {"found": max(four.memory) / max(alone.memory), "goal": 1.1},
    }

"""One step of each graph, all of them in every round: what giving out cross-attention costs, and taking it in saves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from tgate_trt.bench.spread import in_rounds, ratios, spread
from tgate_trt.bench.stopwatch import seconds_of
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.bundle.manifest import graph_file
from tgate_trt.engines.base import Engine
from tgate_trt.export.macs import macs_of_graph
from tgate_trt.export.verify import random_inputs
from tgate_trt.running.loading import EngineLoader

GRAPHS = ("vanilla", "planning", "fidelity")
"""The first is the baseline of the others."""

_WARM_UP = 3
"""A plain run, a capture, a replay."""


def measure(bundle: Bundle, backends: Sequence[str], images: int, rounds: int, device: torch.device, threads: int | None) -> Iterator[Any]:
    """Time steps of guided pictures: vanilla and planning steps have two rows for each, fidelity steps have one.

    Args:
        bundle: with the graphs of `GRAPHS` in these backends.
        backends: whose engines run, one backend after the other.
        images: pictures in one step.
        rounds: number of rounds.
        device: where they run.
        threads: CPU threads of an engine; one a core if None.

    Yields:
        After each backend, the results of all so far, by backend and graph: ``rows``, ``seconds`` of a step, its ``ratio`` to the
        vanilla step of the same round, and ``bound``, the same ratio of multiply-accumulates.
    """
    results: dict[str, Any] = {}
    for backend in backends:
        loader = EngineLoader(bundle, backend, device, threads)
        engines = {graph: loader.load(graph) for graph in GRAPHS}
        ways = {graph: _step(engine, _rows(graph, images)) for graph, engine in engines.items()}
        in_rounds(ways, _WARM_UP)
        samples = in_rounds(ways, rounds)
        results[backend] = {graph: _result(bundle, graph, images, samples[graph], samples[GRAPHS[0]]) for graph in GRAPHS}
        for engine in engines.values():
            engine.close()
        yield dict(results)


def _step(engine: Engine, rows: int) -> Any:
    """A function that takes the seconds of a step of random inputs."""
    generator = torch.Generator().manual_seed(0)
    tensors = (random_inputs(specs, engine.spec.sizes(rows), generator) for specs in (engine.spec.inputs, engine.spec.outputs))
    inputs, outputs = ({name: tensor.to(engine.device) for name, tensor in found.items()} for found in tensors)
    return partial(seconds_of, partial(engine.run, inputs, outputs), engine.device)


def _rows(graph: str, images: int) -> int:
    return images if graph == "fidelity" else 2 * images


def _result(bundle: Bundle, graph: str, images: int, own: Sequence[float], vanilla: Sequence[float]) -> dict[str, Any]:
    work = {}
    for each in (graph, GRAPHS[0]):
        macs = macs_of_graph(bundle.folder / graph_file(each), bundle.graph(each).sizes(_rows(each, images)))
        work[each] = macs.linear + macs.sdpa
    return {"rows": _rows(graph, images), "seconds": spread(own), "ratio": ratios(own, vanilla), "bound": work[graph] / work[GRAPHS[0]]}

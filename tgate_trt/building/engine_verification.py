"""Verify engines: what each computes on its own device, beside eager PyTorch in fp32 with the bundle's weights.

A graph was verified against the model before its engines were made. An engine may still differ: its compiler chooses kernels,
fuses operators and rounds. So each is run where it will run; where that is not this machine, the manifest keeps what it needs.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tgate_trt import children
from tgate_trt.building.verification import Reference, component_reference, kept, sizes_to_compare
from tgate_trt.bundle.backends import ONNXRUNTIME, why_not
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.bundle.components import component_of
from tgate_trt.bundle.folder import locked
from tgate_trt.bundle.loras import BundleLoras
from tgate_trt.bundle.manifest import EngineSet, Report
from tgate_trt.eager import run_recipe
from tgate_trt.engines.base import Engine
from tgate_trt.errors import UnsupportedError
from tgate_trt.export.verify import cases_of, compare
from tgate_trt.running.loading import EngineLoader, best_device, eager_denoiser
from tgate_trt.specs import ROWS
from tgate_trt.taps import is_of_denoiser, recipe

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Task:
    """Engines to verify."""

    folder: Path
    """The bundle."""
    backends: Mapping[str, tuple[str, ...]]
    """Of each graph."""


def verify_engines(bundle: Bundle, *, again: bool = False) -> dict[str, EngineSet]:
    """Verify each engine of a bundle that has no report yet, in a process of its own.

    Args:
        bundle: opened, with its weights.
        again: whether to verify those too that have a report, or could not run when the bundle was built.

    Returns:
        The bundle's engine sets with what was found.

    Raises:
        VerificationError: if an engine differs from the eager model.
        StaleBundleError: if the bundle's weights were discarded.
        BuildError: if the child did not come to an end.
    """
    engine_sets = bundle.manifest.engines
    found = {backend: {} if again else dict(engines.verification) for backend, engines in engine_sets.items()}
    due = [(backend, graph) for backend, engines in engine_sets.items() for graph in engines.files if graph not in found[backend]]
    here: dict[str, tuple[str, ...]] = {}
    for backend, graph in due:
        reason = why_not(backend, engine_sets[backend])
        if reason is not None:
            found[backend][graph] = f"needs another machine: {reason}"
        elif backend == ONNXRUNTIME and _is_the_graph(bundle, graph):
            found[backend][graph] = bundle.manifest.verification[graph]
        else:
            here[graph] = (*here.get(graph, ()), backend)
    if here:
        reports = children.run(verify, Task(bundle.folder, here), "verifying the engines", "if memory ran out, build with --no-verify")
        for graph, by_backend in reports.items():
            for backend, report in by_backend.items():
                found[backend][graph] = report
    for backend, graph in due:
        logger.info("%s engine of %s %s", backend, graph, in_words(found[backend][graph]))
    return {backend: dataclasses.replace(engines, verification=found[backend]) for backend, engines in engine_sets.items()}


def in_words(found: Report | str) -> str:
    """What was found about an engine, as the rest of a sentence."""
    if isinstance(found, str):
        return f"not verified: {found}"
    error = max(check["error"] for check in found["checks"])
    return f"agrees with {found['compared_with']}: largest relative error {error:.1e}, tolerance {found['tolerance']:.0e}"


def verify_again(bundle: Bundle) -> Bundle:
    """Verify every engine of a bundle that runs here, and keep in its manifest what was found.

    Raises:
        VerificationError: if an engine differs from the eager model; the manifest stays as it was.
        StaleBundleError: if the bundle's weights were discarded.
        InputError: if the bundle's folder cannot be written.
    """
    with locked(bundle.folder):
        return bundle.with_manifest(dataclasses.replace(bundle.manifest, engines=verify_engines(bundle, again=True)))


def _is_the_graph(bundle: Bundle, graph: str) -> bool:
    """Whether ONNX Runtime runs here what it ran when the graph was verified: the graph itself, on the CPU, with its own weights."""
    return graph in bundle.manifest.verification and not bundle.manifest.lora and best_device(ONNXRUNTIME).type == "cpu"


def verify(task: Task) -> dict[str, dict[str, Report | str]]:
    """Verify engines in this process, and return what was found by graph and backend; see `verify_engines`."""
    bundle = Bundle.open(task.folder)
    return {graph: _verify(bundle, graph, backends) for graph, backends in task.backends.items()}


def _verify(bundle: Bundle, graph: str, backends: Sequence[str]) -> dict[str, Report | str]:
    """Compare the engines of a graph, one after the other, with the eager model."""
    spec, reference = bundle.graph(graph), _reference(bundle, graph)
    profile = spec.dimensions[ROWS]
    rows = sorted({min(max(size, profile.minimum), profile.maximum) for size in (*reference.rows, profile.optimum)})
    inputs = (*reference.signature.inputs, *spec.inputs)
    cases = cases_of(
        reference.load,
        reference.run,
        inputs,
        rows=sizes_to_compare(reference.signature, rows),
        vocabulary=reference.vocabulary,
    )
    found: dict[str, Report | str] = {}
    for backend in backends:
        try:
            engine = EngineLoader(bundle, backend, best_device(backend)).load(graph)
        except UnsupportedError as error:
            found[backend] = f"needs another machine: {error}"
            continue
        report = compare(partial(_run, engine), spec, cases, reference.precision)
        report.raise_if_wrong(f"the {backend} engine of {graph}")
        found[backend] = kept(report)
        engine.close()
    return found


def _reference(bundle: Bundle, graph: str) -> Reference:
    """The eager model with the weights and LoRAs that the bundle holds."""
    loras, built_for = BundleLoras.read(bundle), bundle.manifest.built_for
    if not is_of_denoiser(graph):
        return component_reference(bundle.pipeline, bundle.graph(graph), built_for, loras.weights(component_of(bundle, graph)))
    return Reference(
        lambda: eager_denoiser(loras, torch.float32),
        lambda denoiser, inputs: run_recipe(denoiser, recipe(graph), inputs),
        bundle.manifest.signature,
        (1, 2),
        built_for.precision,
    )


def _run(engine: Engine, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
    """Run an engine on its own device, given tensors on the CPU."""
    made = {name: tensor.to(engine.device) for name, tensor in outputs.items()}
    engine.run({name: tensor.to(engine.device) for name, tensor in inputs.items()}, made)
    for name, tensor in made.items():
        outputs[name].copy_(tensor)

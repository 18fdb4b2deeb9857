"""Build a bundle: weights, trace, cuts, verification, manifest."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, Unpack

import onnx_ir as ir

from tgate_trt.building.engine_verification import verify_engines
from tgate_trt.building.engines import EngineRequest, build_engines, request_of, stale_engine_reasons
from tgate_trt.building.graphs import signature_of, write_component_graph, write_graph, write_trace
from tgate_trt.building.request import BuildOptions, Request
from tgate_trt.building.staleness import missing_parts, stale_reasons
from tgate_trt.building.toolchain import toolchain
from tgate_trt.building.verification import Task, verify_in_child
from tgate_trt.bundle.bundle import Bundle, copy_into, describe_files, write_manifest
from tgate_trt.bundle.components import components_of
from tgate_trt.bundle.folder import building, locked
from tgate_trt.bundle.manifest import PIPELINE, TRACE, BuiltFrom, EngineSet, Manifest, graph_file
from tgate_trt.eager import torch_dtype
from tgate_trt.errors import BundleError, StaleBundleError
from tgate_trt.export import weights
from tgate_trt.gate.scheduler import level_of_gate, read_scheduler
from tgate_trt.models.fingerprints import Fingerprint
from tgate_trt.models.lora import LoraFile
from tgate_trt.models.resolve import resolve
from tgate_trt.models.saving import save_rest
from tgate_trt.models.source import ModelSource
from tgate_trt.specs import GraphSpec

_T = TypeVar("_T")

logger = logging.getLogger(__name__)


def build(model: str | os.PathLike[str] | Any, output: str | os.PathLike[str] | None = None, **options: Unpack[BuildOptions]) -> Bundle:
    """Build a bundle, or return the one that is there if nothing changed since it was built.

    Args:
        model: name of a model, diffusers folder, ``.safetensors`` checkpoint, hub id, or a pipeline.
        output: the bundle's folder; ``bundles/<model>-<width>x<height>-<precision>`` if None.
        **options: ``backend``, ``precision``, ``height``, ``width``, ``batch_size``, ``controls``, ``gates``, ``graphs``,
            ``compute_capability``, ``weights``, ``plan_options``, ``lora``, ``components``, ``fuse_cache_reuse``, ``discard_graphs``,
            ``config``, ``prediction_type``, ``random_weights``, ``verify``, ``force``; see `tgate_trt.building.request.BuildOptions`.

    Returns:
        The bundle, opened.

    Raises:
        InputError: if the model or an option cannot be used.
        BuildError: if the trace, a cut or an engine fails, or a graph differs from the eager model.
    """
    unknown = options.keys() - BuildOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"there is no option {sorted(unknown)[0]!r}; the options are {', '.join(BuildOptions.__annotations__)}")
    loras = [LoraFile.parse(one) if isinstance(one, str) else one for one in options.get("lora") or ()]
    source = resolve(
        model,
        random_weights=options.get("random_weights", False),
        config=options.get("config"),
        prediction_type=options.get("prediction_type"),
        lora=loras,
    )
    request = Request.resolved(source, options)
    target = (Path(output) if output is not None else default_output(source, request)).absolute()
    with locked(target):
        return _build(source, request, target)


def _build(source: ModelSource, request: Request, target: Path) -> Bundle:
    """Build a bundle, add to it, or return it as it is."""
    existing = None if request.force else _open_existing(target)
    fingerprint = source.fingerprint(existing.manifest.model.fingerprint if existing else None)
    if existing:
        reasons = stale_reasons(existing.manifest, fingerprint["content"], request)
        missing = [] if reasons else missing_parts(existing.manifest, request)
        if not reasons and not missing:
            logger.info("%s is up to date: model, sizes, precision, graphs and package versions are those it was built with", target)
            return existing
        logger.info("%s: %s", "building again" if reasons else "adding to the bundle", "; ".join(reasons or missing))
        if reasons:
            existing = None
    with building(target) as folder:
        if existing:
            copy_into(existing, folder)
            manifest = existing.manifest
        else:
            manifest = _begin(folder, source, request, fingerprint)
        _complete(folder, target, source, request, manifest)
    return Bundle.open(target)


def default_output(source: ModelSource, request: Request) -> Path:
    """The folder of a bundle without ``--output``."""
    built_for = request.built_for
    width, height = (str(side.optimum) if side.is_one else f"{side.minimum}-{side.maximum}" for side in (built_for.width, built_for.height))
    return Path("bundles") / f"{source.name}-{width}x{height}-{built_for.precision}"


def add_graph(bundle: Bundle, name: str) -> Bundle:
    """Cut one more graph from a bundle's trace and keep it in the bundle; return a bundle that has it as it is.

    Raises:
        BuildError: if the trace lacks the taps, or an engine cannot be built.
        StaleBundleError: if the bundle's graphs were discarded.
        InputError: if there is no graph of that name.
    """
    if name in bundle.manifest.graphs:
        return bundle
    manifest = bundle.manifest
    if TRACE not in manifest.files:
        raise StaleBundleError(f"{bundle.folder} holds no graphs to add to; build it again without --discard-graphs")
    bundle.load_graph(TRACE)  # for its check
    request = Request(manifest.built_for, (name,), EngineRequest(()), verify=False, components=False)
    with locked(bundle.folder), building(bundle.folder) as folder:
        copy_into(bundle, folder)
        _complete(folder, bundle.folder, None, request, manifest)
    return Bundle.open(bundle.folder)


def _open_existing(target: Path) -> Bundle | None:
    try:
        return Bundle.open(target)
    except BundleError as error:
        if target.exists():
            logger.info("building again: %s", error)
        return None


def _begin(folder: Path, source: ModelSource, request: Request, fingerprint: Fingerprint) -> Manifest:
    """Write weights, the rest of the pipeline and the trace into an empty folder; no graph is cut yet."""
    built_for = request.built_for
    file, tensors = folder / weights.WEIGHTS_FILE, source.tensors(torch_dtype(built_for.precision))
    _timed("weights", lambda: weights.write(file, source.tensor_shapes(), tensors, built_for.precision))
    _timed("text encoders and VAE", lambda: save_rest(source, folder / PIPELINE, built_for.precision))
    _timed("trace", lambda: write_trace(source, folder, built_for, anew=request.force))
    return Manifest(
        model=BuiltFrom(
            source.name,
            source.reference,
            source.denoiser_attribute,
            source.text_tokens,
            tuple(components_of(folder / PIPELINE)),
            fingerprint,
        ),
        built_for=built_for,
        built_with=toolchain(),
        signature=signature_of(source, built_for),
        graphs={},
        engines={},
        verification={},
        gate_step=source.gate_step,
        gate_noise=source.gate_step and level_of_gate(read_scheduler(folder / PIPELINE), source.steps, source.gate_step),
        steps=source.steps,
        guidance_scale=source.guidance_scale,
        after_gate=source.after_gate,
    )


def _complete(folder: Path, target: Path, source: ModelSource | None, request: Request, manifest: Manifest) -> None:
    """Add what a request asks for and a folder lacks: graphs, engines, verification.

    Args:
        folder: with the trace and every file of the manifest.
        target: the bundle that the folder will become.
        source: of the model; None if nothing is to be verified.
        request: what to add.
        manifest: of the folder as it is.
    """
    specs, verification, engines = dict(manifest.graphs), dict(manifest.verification), dict(manifest.engines)
    # The denoiser's engines first: the traces of the other graphs would stay in memory beside their builder.
    for graphs in (_denoiser_graphs, _component_graphs):
        specs |= graphs(folder, request, manifest)
        if request.verify and source is not None:
            verification |= _verify_all(folder, source, request, {name: spec for name, spec in specs.items() if name not in verification})
        engines = _engines(folder, target, request, specs, engines)
    known = {name: entry for name, entry in manifest.files.items() if _is_unchanged(folder / name, target / name)}
    files = _timed("hashes", lambda: describe_files(folder, known))
    manifest = dataclasses.replace(manifest, graphs=specs, engines=engines, verification=verification, files=files)
    if request.verify:
        write_manifest(folder, manifest)
        engines = _timed("verification of engines", lambda: verify_engines(Bundle(folder, manifest)))
        manifest = dataclasses.replace(manifest, engines=engines)
    if request.discard_graphs:
        discarded = _discard_graphs(folder, specs)
        manifest = dataclasses.replace(manifest, files={name: file for name, file in files.items() if name not in discarded})
    write_manifest(folder, manifest)


def _denoiser_graphs(folder: Path, request: Request, manifest: Manifest) -> dict[str, GraphSpec]:
    """Cut the graphs that the bundle lacks from the trace."""
    new = [name for name in request.graphs if name not in manifest.graphs]
    if not new:
        return {}
    trace = ir.load(folder / TRACE)
    return {name: _timed(f"{name} graph", partial(write_graph, folder, trace, name, request.built_for, manifest.signature)) for name in new}


def _component_graphs(folder: Path, request: Request, manifest: Manifest) -> dict[str, GraphSpec]:
    """Write the graphs of text encoders and VAE that the bundle lacks."""
    if not request.components:
        return {}
    written = {}
    for graph, component in components_of(folder / PIPELINE).items():
        if graph not in manifest.graphs:
            spec = component.spec(manifest.built_for, manifest.model.text_tokens, manifest.signature)
            _timed(f"{graph} graph", partial(write_component_graph, component, folder, spec, anew=request.force))
            written[graph] = spec
    return written


def _discard_graphs(folder: Path, graphs: Iterable[str]) -> set[str]:
    """Remove the files that baked engines do not need, and return their names."""
    discarded = {TRACE, weights.WEIGHTS_FILE, *map(graph_file, graphs)}
    for name in discarded:
        (folder / name).unlink(missing_ok=True)
    return discarded


def _is_unchanged(file: Path, before: Path) -> bool:
    """Whether a file is the one of the old bundle, linked."""
    return file.exists() and file.samefile(before)


def _engines(
    folder: Path, target: Path, request: Request, specs: dict[str, GraphSpec], held: Mapping[str, EngineSet]
) -> dict[str, EngineSet]:
    """The engines of every graph, for the requested backends and those that the bundle has."""
    engines = {}
    for backend in dict.fromkeys((*held, *request.engines.backends)):
        is_wanted, before = backend in request.engines.backends, held.get(backend)
        if is_wanted and before is not None and stale_engine_reasons(backend, before, request.engines):
            before = None
        missing = {name: spec for name, spec in specs.items() if before is None or name not in before.files}
        if before is not None and not missing:
            engines[backend] = before
            continue
        wanted = request.engines if before is None or is_wanted else request_of(backend, before)
        built = build_engines(folder, target, backend, missing, wanted)
        if before is not None:
            built = dataclasses.replace(before, files={**before.files, **built.files}, keys={**before.keys, **built.keys})
        engines[backend] = built
    return engines


def _verify_all(folder: Path, source: ModelSource, request: Request, specs: dict[str, GraphSpec]) -> dict[str, Any]:
    reports = {}
    for name, spec in specs.items():
        task = Task(source.reference, folder, spec, request.built_for)
        reports[name] = report = _timed(f"verification of {name}", partial(verify_in_child, task))
        worst = max(check["error"] for check in report["checks"])
        rows = ", ".join(dict.fromkeys(str(check["rows"]) for check in report["checks"]))
        logger.info(
            "%s agrees with %s at %s rows: largest relative error %.1e, tolerance %.0e",
            name,
            report["compared_with"],
            rows,
            worst,
            report["tolerance"],
        )
    return reports


def _timed(what: str, work: Callable[[], _T]) -> _T:
    """Do a piece of the build, and log its name and time."""
    logger.info("%s …", what)
    start = time.perf_counter()
    result = work()
    logger.info("%s done in %.1f s", what, time.perf_counter() - start)
    return result

"""Build a bundle: weights, trace, cuts, verification, manifest."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tgate_trt import engine_sets, models
from tgate_trt.build_request import Request, backends_for, fusion_for, request_for
from tgate_trt.bundle import PIPELINE, TRACE, Bundle, EngineSet, Manifest, building, copy_into, describe_files, write_manifest
from tgate_trt.engine_sets import EngineRequest
from tgate_trt.engines.tensorrt_builder import PlanOptions
from tgate_trt.errors import BundleError, StaleBundleError
from tgate_trt.lora import LoraFile
from tgate_trt.specs import GraphSpec
from tgate_trt.staleness import missing_parts, stale_reasons, toolchain
from tgate_trt.taps import recipe
from tgate_trt.tracing import save, write_trace

if TYPE_CHECKING:
    import onnx_ir as ir

_T = TypeVar("_T")

logger = logging.getLogger(__name__)


def build(
    model: str | os.PathLike[str] | Any,
    output: str | os.PathLike[str] | None = None,
    *,
    backend: str | Sequence[str] | None = None,
    precision: str | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: str = "1:1:1",
    graphs: Sequence[str] = ("planning", "fidelity"),
    compute_capability: Sequence[str] = (),
    weights: str = "baked",
    plan_options: PlanOptions | None = None,
    lora: Sequence[str | LoraFile] = (),
    components: bool = True,
    fuse_cache_reuse: str | None = None,
    discard_graphs: bool = False,
    random_weights: bool = False,
    verify: bool = True,
    force: bool = False,
) -> Bundle:
    """Build a bundle, or return the one that is there if nothing changed since it was built.

    Args:
        model: name of a model, diffusers folder, ``.safetensors`` checkpoint, hub id, or a pipeline.
        output: the bundle's folder; ``bundles/<model>-<width>x<height>-<precision>`` if None.
        backend: one of `tgate_trt.backends.BACKENDS`, or several.
        precision: ``"fp32"`` or ``"fp16"``; if None, fp32 for ONNX Runtime, and for PyTorch without a GPU; else fp16.
        height: of the picture in pixels; the model's own if None.
        width: of the picture in pixels; the model's own if None.
        batch_size: images a run, ``"MIN:OPT:MAX"``.
        graphs: names of graphs, of `tgate_trt.taps.GRAPHS`.
        compute_capability: GPUs to build TensorRT-RTX plans for, such as ``["SM89"]``; the one of this machine if empty,
            and where there is none, every one from Ampere on.
        weights: where those of TensorRT engines are: ``"baked"`` into the plan; ``"shared"``, one copy for all engines;
            or ``"shared-linear"``, shared but for those of convolutions.
        plan_options: further options of TensorRT plans.
        lora: files to fuse into the weights, ``"FILE"`` or ``"FILE:SCALE"``.
        components: whether text encoders and the VAE's decoder become engines too.
        fuse_cache_reuse: how the reuse of the cache runs: ``"plugin"``, TensorRT's plugin; ``"function"``, one op that backends
            expand; ``"off"``, an addition and a norm. If None, the plugin where TensorRT takes it, else the function.
        discard_graphs: whether to leave graphs and weights out of the bundle that baked engines do without. Nothing can
            be added to it then.
        random_weights: whether to fill a named architecture with seeded random weights.
        verify: whether to compare each graph with eager PyTorch.
        force: whether to build even if nothing changed.

    Returns:
        The bundle, opened.

    Raises:
        InputError: if the model or an argument cannot be used.
        BuildError: if the trace, a cut or an engine fails, or a graph differs from the eager model.
    """
    loras = [LoraFile.parse(one) if isinstance(one, str) else one for one in lora]
    source = models.resolve(model, random_weights=random_weights, lora=loras)
    options = dataclasses.replace(plan_options or PlanOptions(), capabilities=tuple(compute_capability))
    fusion, plugins = fusion_for(fuse_cache_reuse)
    engines = EngineRequest(backends_for(backend), weights, options, plugins)
    request = request_for(
        source,
        precision=precision,
        height=height,
        width=width,
        batch_size=batch_size,
        graphs=graphs,
        engines=engines,
        verify=verify,
        components=components,
        discard_graphs=discard_graphs,
        fuse_cache_reuse=fusion,
    )
    target = Path(output) if output is not None else default_output(source, request)
    existing = None if force else _open_existing(target)
    fingerprint = source.fingerprint(existing.manifest.model["source"] if existing else None)
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


def default_output(source: models.ModelSource, request: Request) -> Path:
    """Where a bundle goes without ``--output``."""
    return Path("bundles") / f"{source.name}-{request.width}x{request.height}-{request.precision}"


def add_graph(bundle: Bundle, name: str) -> Bundle:
    """Cut one more graph from a bundle's trace, and keep it there; a bundle that holds it is returned as it is.

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
    built_for = {**manifest.built_for, "batch_size": manifest.batch_size}
    request = Request(**built_for, graphs=(name,), engines=EngineRequest(()), verify=False, components=False)
    with building(bundle.folder) as folder:
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


def _begin(folder: Path, source: models.ModelSource, request: Request, fingerprint: dict[str, Any]) -> Manifest:
    """Write weights, the rest of the pipeline and the trace into an empty folder; no graph is cut yet."""
    import torch

    from tgate_trt.components import components_of
    from tgate_trt.export import weights
    from tgate_trt.specs import DTYPES

    dtype = getattr(torch, DTYPES[request.precision])
    shapes = source.tensor_shapes()
    _timed("weights", lambda: weights.write(folder / weights.WEIGHTS_FILE, shapes, source.tensors(dtype), request.precision))
    _timed("text encoders and VAE", lambda: source.save_rest(folder / PIPELINE, dtype))
    _timed("trace", lambda: write_trace(source, folder, request.precision, request.height, request.width))
    return Manifest(
        model={
            "name": source.name,
            "reference": source.reference,
            "attribute": source.denoiser_attribute,
            "random_seed": source.random_seed,
            "lora": source.lora_as_json(),
            "text_tokens": source.text_tokens,
            "components": list(components_of(folder / PIPELINE)),
            "content": fingerprint["content"],
            "source": fingerprint,
        },
        built_for=request.to_json(),
        built_with=toolchain(),
        graphs={},
        engines={},
        verification={},
        gate_step=source.gate_step,
        steps=source.steps,
        guidance_scale=source.guidance_scale,
    )


def _complete(folder: Path, target: Path, source: models.ModelSource | None, request: Request, manifest: Manifest) -> None:
    """Add to a folder what a request asks for and its manifest does not hold: graphs, engines, verification.

    Args:
        folder: with the trace and all that the manifest names.
        target: the bundle that the folder will become.
        source: of the model; None where nothing is to be verified.
        request: what is asked for.
        manifest: of what is there already.
    """
    specs, verification, engines = dict(manifest.graphs), dict(manifest.verification), dict(manifest.engines)
    # The denoiser's engines first: the traces of the others would stay in memory beside their builder.
    for graphs in (_denoiser_graphs, _component_graphs):
        specs |= graphs(folder, request, manifest)
        if request.verify and source is not None:
            verification |= _verify_all(folder, source, request, {name: spec for name, spec in specs.items() if name not in verification})
        engines = _engines(folder, target, request, specs, engines)
    if request.discard_graphs:
        _discard_graphs(folder, specs)
    known = {name: entry for name, entry in manifest.files.items() if _is_unchanged(folder / name, target / name)}
    files = _timed("hashes", lambda: describe_files(folder, known))
    write_manifest(folder, dataclasses.replace(manifest, graphs=specs, engines=engines, verification=verification, files=files))


def _denoiser_graphs(folder: Path, request: Request, manifest: Manifest) -> dict[str, GraphSpec]:
    """Cut the graphs that are not there yet from the trace."""
    new = [name for name in request.graphs if name not in manifest.graphs]
    if not new:
        return {}
    import onnx_ir as ir

    trace = ir.load(folder / TRACE)
    return {name: _timed(f"{name} graph", partial(_write_graph, folder, trace, name, request)) for name in new}


def _component_graphs(folder: Path, request: Request, manifest: Manifest) -> dict[str, GraphSpec]:
    """Write the graphs of text encoders and VAE that are asked for and not there yet."""
    if not request.components:
        return {}
    from tgate_trt.components import components_of, write_graph

    written = {}
    for graph, component in components_of(folder / PIPELINE).items():
        if graph not in manifest.graphs:
            spec = component.spec(request.precision, request.height, request.width, manifest.model["text_tokens"], request.batch_size)
            _timed(f"{graph} graph", partial(write_graph, component, folder, spec))
            written[graph] = spec
    return written


def _discard_graphs(folder: Path, graphs: Iterable[str]) -> None:
    """Remove what baked engines do without."""
    from tgate_trt.export.weights import WEIGHTS_FILE

    for name in (TRACE, WEIGHTS_FILE, *map(_graph_file, graphs)):
        (folder / name).unlink(missing_ok=True)


def _is_unchanged(file: Path, before: Path) -> bool:
    """Whether a file is the one of the old bundle, linked."""
    return file.exists() and file.samefile(before)


def _engines(
    folder: Path, target: Path, request: Request, specs: dict[str, GraphSpec], held: Mapping[str, EngineSet]
) -> dict[str, EngineSet]:
    """The engines of every graph, for the backends that are asked for and those that are there."""
    engines = {}
    for backend in dict.fromkeys((*held, *request.engines.backends)):
        is_wanted, before = backend in request.engines.backends, held.get(backend)
        if is_wanted and before is not None and engine_sets.stale_reasons(backend, before, request.engines):
            before = None
        missing = {name: spec for name, spec in specs.items() if before is None or name not in before.files}
        if before is not None and not missing:
            engines[backend] = before
            continue
        wish = request.engines if before is None or is_wanted else engine_sets.request_of(backend, before)
        built = engine_sets.build_engines(folder, target, backend, missing, wish)
        if before is not None:
            built = dataclasses.replace(built, files={**before.files, **built.files}, keys={**before.keys, **built.keys})
        engines[backend] = built
    return engines


def _write_graph(folder: Path, trace: ir.Model, name: str, request: Request) -> GraphSpec:
    from tgate_trt.export.cut import cut, spec_of
    from tgate_trt.export.fuse import fuse_cache_reuse

    model = cut(trace, recipe(name))
    spec = spec_of(model, name, request.rows(name))
    if spec.cache_inputs and request.fuse_cache_reuse == "function":
        places = fuse_cache_reuse(model)
        logger.info("%s: the reuse of the cache is one op at %d of %d places", name, places, len(spec.cache_inputs))
    save(model, folder, _graph_file(name))
    return spec


def _graph_file(name: str) -> str:
    return f"{name}.onnx"


def _verify_all(folder: Path, source: models.ModelSource, request: Request, specs: dict[str, GraphSpec]) -> dict[str, Any]:
    from tgate_trt.verification import Task, verify_in_child

    reports = {}
    for name, spec in specs.items():
        task = Task(
            source.reference,
            source.random_seed,
            source.lora_as_json(),
            str(folder),
            name,
            request.precision,
            spec.to_json(),
            request.height,
            request.width,
        )
        reports[name] = report = _timed(f"verification of {name}", partial(verify_in_child, task))
        worst = max(check["error"] for check in report["checks"])
        rows = ", ".join(str(check["rows"]) for check in report["checks"])
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
    """Do a piece of the build, and log what it is and how long it took."""
    logger.info("%s …", what)
    start = time.perf_counter()
    result = work()
    logger.info("%s done in %.1f s", what, time.perf_counter() - start)
    return result

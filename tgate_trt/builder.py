"""Build a bundle: weights, trace, cuts, verification, manifest."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tgate_trt import models
from tgate_trt.backends import BACKENDS
from tgate_trt.bundle import TRACE, Bundle, Manifest, building, describe_files, write_manifest
from tgate_trt.errors import BundleError, InputError, UnsupportedError
from tgate_trt.specs import MAXIMUM_ROWS, PRECISIONS, Bounds, GraphSpec
from tgate_trt.taps import recipe

if TYPE_CHECKING:
    import onnx_ir as ir

_T = TypeVar("_T")

logger = logging.getLogger(__name__)

_TOOLCHAIN = ("tgate-trt", "torch", "diffusers", "onnx", "onnx-ir", "onnxscript", "onnxruntime")
"""Packages whose versions decide what a build gives."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What a bundle is to be built for; each field is a reason to build again when it changes."""

    precision: str
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    batch_size: Bounds
    """Images."""
    graphs: tuple[str, ...]
    backends: tuple[str, ...]
    verify: bool

    def rows(self, graph: str) -> Bounds:
        """Rows of a graph: the fidelity graph runs without guidance, the others with or without."""
        images = self.batch_size
        if recipe(graph).takes_in:
            return images
        return Bounds(images.minimum, 2 * images.optimum, 2 * images.maximum)

    def to_json(self) -> dict[str, Any]:
        """The part that the manifest keeps as ``built_for``."""
        return {"precision": self.precision, "height": self.height, "width": self.width, "batch_size": str(self.batch_size)}


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
    random_weights: bool = False,
    verify: bool = True,
    force: bool = False,
) -> Bundle:
    """Build a bundle, or return the one that is there if nothing changed since it was built.

    Args:
        model: name of a model, diffusers folder, ``.safetensors`` checkpoint, hub id, or a pipeline.
        output: the bundle's folder; ``bundles/<model>-<width>x<height>-<precision>`` if None.
        backend: one of `tgate_trt.backends.BACKENDS`, or several.
        precision: ``"fp32"`` or ``"fp16"``; fp32 if None.
        height: of the picture in pixels; the model's own if None.
        width: of the picture in pixels; the model's own if None.
        batch_size: images a run, ``"MIN:OPT:MAX"``.
        graphs: names of graphs, of `tgate_trt.taps.GRAPHS`.
        random_weights: whether to fill a named architecture with seeded random weights.
        verify: whether to compare each graph with eager PyTorch.
        force: whether to build even if nothing changed.

    Returns:
        The bundle, opened.

    Raises:
        InputError: if the model or an argument cannot be used.
        BuildError: if the trace, a cut or an engine fails, or a graph differs from the eager model.
    """
    source = models.resolve(model, random_weights=random_weights)
    request = _request(source, backend, precision, height, width, batch_size, graphs, verify)
    target = Path(output) if output is not None else default_output(source, request)
    existing = None if force else _open_existing(target)
    fingerprint = source.fingerprint(existing.manifest.model["source"] if existing else None)
    if existing:
        reasons = stale_reasons(existing.manifest, fingerprint["content"], request)
        if not reasons:
            logger.info("%s is up to date: model, sizes, precision, graphs and package versions are those it was built with", target)
            return existing
        logger.info("building again: %s", "; ".join(reasons))
    with building(target) as folder:
        _build_into(folder, source, request, fingerprint)
    return Bundle.open(target)


def default_output(source: models.ModelSource, request: Request) -> Path:
    """Where a bundle goes without ``--output``."""
    return Path("bundles") / f"{source.name}-{request.width}x{request.height}-{request.precision}"


def stale_reasons(manifest: Manifest, content: str | None, request: Request | None = None) -> list[str]:
    """Why a bundle must be built again; empty if it need not be.

    Args:
        manifest: of the bundle.
        content: hash of the model as it is now, or None if it cannot be known.
        request: what is asked for now, or None to ask for the same.
    """
    reasons = []
    if content is not None and content != manifest.model["content"]:
        reasons.append("the model's files changed")
    for package, version in _versions().items():
        before = manifest.built_with.get(package)
        if before != version:
            reasons.append(f"{package} was {before} and is {version}")
    if request is not None:
        for name, value in request.to_json().items():
            if manifest.built_for[name] != value:
                reasons.append(f"{name.replace('_', ' ')} was {manifest.built_for[name]} and is {value}")
        reasons += [f"the {graph} graph is new" for graph in request.graphs if graph not in manifest.graphs]
        reasons += [f"the {backend} backend is new" for backend in request.backends if backend not in manifest.engines]
        held = set(request.graphs) & set(manifest.graphs)
        if request.verify and held - set(manifest.verification):
            reasons.append("it was not verified")
    return reasons


def add_graph(bundle: Bundle, name: str) -> Bundle:
    """Cut one more graph from a bundle's trace, and keep it there; a bundle that holds it is returned as it is.

    Raises:
        BuildError: if the trace lacks the taps.
        InputError: if there is no graph of that name.
    """
    if name in bundle.manifest.graphs:
        return bundle
    import onnx_ir as ir

    manifest = bundle.manifest
    request = Request(**{**manifest.built_for, "batch_size": manifest.batch_size}, graphs=(name,), backends=(), verify=False)
    spec = _write_graph(bundle.folder, ir.load(bundle.folder / TRACE), name, request.rows(name))
    engines = {backend: {**files, name: _graph_file(name)} for backend, files in manifest.engines.items()}
    extended = dataclasses.replace(manifest, graphs={**manifest.graphs, name: spec}, engines=engines, files=describe_files(bundle.folder))
    write_manifest(bundle.folder, extended)
    return Bundle.open(bundle.folder)


def _request(
    source: models.ModelSource,
    backend: str | Sequence[str] | None,
    precision: str | None,
    height: int | None,
    width: int | None,
    batch_size: str,
    graphs: Sequence[str],
    verify: bool,
) -> Request:
    """Check what was asked for, and fill in what was not."""
    if source.denoiser_attribute != "unet":
        raise UnsupportedError(f"{source.name} is a transformer; this version builds UNets")
    backends = tuple(backend.split(",") if isinstance(backend, str) else backend or BACKENDS[:1])
    for name in backends:
        if name not in BACKENDS:
            raise UnsupportedError(f"this version does not build for {name!r}; it builds for {', '.join(BACKENDS)}")
    precision = precision or "fp32"
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "bf16":
        raise UnsupportedError("ONNX Runtime has no bf16 kernels on the CPU; use --precision fp32 or fp16")
    images = Bounds.parse(batch_size)
    if 2 * images.maximum > MAXIMUM_ROWS:
        raise InputError(f"a run may have at most {MAXIMUM_ROWS // 2} images, got batch size {images}")
    for graph in graphs:
        recipe(graph)
    height, width = height or source.height, width or source.width
    source.signature(height, width, precision)
    return Request(precision, height, width, images, tuple(dict.fromkeys(graphs)), backends, verify)


def _open_existing(target: Path) -> Bundle | None:
    try:
        return Bundle.open(target)
    except BundleError as error:
        if target.exists():
            logger.info("building again: %s", error)
        return None


def _build_into(folder: Path, source: models.ModelSource, request: Request, fingerprint: dict[str, Any]) -> None:
    """Write a whole bundle into an empty folder."""
    import torch

    from tgate_trt.export import weights
    from tgate_trt.specs import DTYPES

    dtype = getattr(torch, DTYPES[request.precision])
    shapes = source.tensor_shapes()
    _timed("weights", lambda: weights.write(folder / weights.WEIGHTS_FILE, shapes, source.tensors(dtype), request.precision))
    _timed("text encoders and VAE", lambda: source.save_rest(folder / "pipeline", dtype))
    trace = _timed("trace", lambda: _trace(source, request, dtype))
    _save(trace, folder, TRACE)
    specs = {name: _timed(f"{name} graph", partial(_write_graph, folder, trace, name, request.rows(name))) for name in request.graphs}
    verification = _verify_all(folder, source, request, specs) if request.verify else {}
    manifest = Manifest(
        model={
            "name": source.name,
            "reference": source.reference,
            "attribute": source.denoiser_attribute,
            "random_seed": source.random_seed,
            "content": fingerprint["content"],
            "source": fingerprint,
        },
        built_for=request.to_json(),
        built_with=_versions(),
        graphs=specs,
        engines={backend: {name: _graph_file(name) for name in specs} for backend in request.backends},
        verification=verification,
        gate_step=source.gate_step,
        steps=source.steps,
        guidance_scale=source.guidance_scale,
        files=_timed("hashes", lambda: describe_files(folder)),
    )
    write_manifest(folder, manifest)


def _trace(source: models.ModelSource, request: Request, dtype: Any) -> ir.Model:
    from torch import nn

    from tgate_trt.export.trace import trace

    return trace(nn.Module.to(source.denoiser_on_meta(), dtype), source.signature(request.height, request.width, request.precision))


def _write_graph(folder: Path, trace: ir.Model, name: str, rows: Bounds) -> GraphSpec:
    from tgate_trt.export.cut import cut, spec_of

    model = cut(trace, recipe(name))
    _save(model, folder, _graph_file(name))
    return spec_of(model, name, rows)


def _save(model: ir.Model, folder: Path, name: str) -> None:
    import onnx_ir as ir

    from tgate_trt.export import weights

    weights.attach(model, weights.read_places(folder / weights.WEIGHTS_FILE), folder)
    ir.save(model, folder / name)


def _graph_file(name: str) -> str:
    return f"{name}.onnx"


def _verify_all(folder: Path, source: models.ModelSource, request: Request, specs: dict[str, GraphSpec]) -> dict[str, Any]:
    from tgate_trt.verification import Task, verify_in_child

    reports = {}
    for name, spec in specs.items():
        task = Task(
            source.reference, source.random_seed, str(folder), name, request.precision, spec.to_json(), request.height, request.width
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


def _versions() -> dict[str, str]:
    return {package: metadata.version(package) for package in _TOOLCHAIN}


def _timed(what: str, work: Callable[[], _T]) -> _T:
    """Do a piece of the build, and log what it is and how long it took."""
    logger.info("%s …", what)
    start = time.perf_counter()
    result = work()
    logger.info("%s done in %.1f s", what, time.perf_counter() - start)
    return result

"""Build a bundle's engines, or reuse those of bundles beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir
from pydantic import TypeAdapter

from tgate_trt.bundle.backends import ONNXRUNTIME, PYTORCH, UNCOMPILED
from tgate_trt.bundle.folder import beside
from tgate_trt.bundle.manifest import MANIFEST, EngineOptions, EngineSet, graph_file
from tgate_trt.engines.tensorrt_builder import PlanOptions, build_plan
from tgate_trt.engines.tensorrt_flavours import FLAVOURS, Flavour, gpu_is_present, gpu_name
from tgate_trt.errors import InputError, UnsupportedError
from tgate_trt.export.fuse import name_plugin
from tgate_trt.export.weights import WEIGHTS_FILE, files_of
from tgate_trt.export.weights_as_inputs import turn_weights_into_inputs
from tgate_trt.files import link_or_copy, sha256, stamp
from tgate_trt.kernels.cached_residual_layer_norm import WIDTHS
from tgate_trt.specs import GraphSpec, TensorSpec
from tgate_trt.taps import is_of_denoiser

logger = logging.getLogger(__name__)

_PLAN_OPTIONS = TypeAdapter(PlanOptions)

WEIGHTS = ("baked", "shared", "shared-linear")
"""Where the weights of a TensorRT engine are: in its plan; in inputs, so that all engines read one copy; or in inputs but for
those of convolutions."""


@dataclasses.dataclass(frozen=True)
class EngineRequest:
    """The engines to build."""

    backends: tuple[str, ...] = (ONNXRUNTIME,)
    weights: str = "baked"
    """Of `WEIGHTS`; PyTorch and ONNX Runtime read the bundle's one file in any case."""
    plan_options: PlanOptions = dataclasses.field(default_factory=PlanOptions)
    plugins: bool | None = None
    """Whether TensorRT takes the fused reuse of the cache as a plugin; if None, wherever it can."""

    def __post_init__(self) -> None:
        """Refuse what this machine cannot build, before anything starts.

        Raises:
            InputError: if a value is impossible.
            UnsupportedError: if a backend is not installed, or cannot build so on this machine.
        """
        if self.weights not in WEIGHTS:
            raise InputError(f"--weights is one of {', '.join(WEIGHTS)}, got {self.weights!r}")
        flavours = [FLAVOURS[backend] for backend in self.backends if backend in FLAVOURS]
        reasons = [flavour.why_no_plugins() for flavour in flavours]
        if self.plugins and None not in reasons:
            reason = "; ".join(str(reason) for reason in reasons) or "plugins are for --backend tensorrt"
            raise UnsupportedError(f"{reason}; use --fuse-cache-reuse function")
        if self.plan_options != PlanOptions() and not flavours:
            raise InputError("--compute-capability and the other options of plans are for --backend tensorrt-rtx and tensorrt")
        for flavour in flavours:
            flavour.load()
            self._options(flavour).check(flavour, has_gpu=gpu_is_present())

    def _options(self, flavour: Flavour) -> PlanOptions:
        """The options of one flavour: with no GPU here and none named, plans are for every GPU from Ampere on."""
        options = self.plan_options
        if options.capabilities or gpu_is_present() or not flavour.builds_ahead_of_time:
            return options
        return dataclasses.replace(options, capabilities=flavour.capabilities_by_default)

    def built_for(self, backend: str) -> EngineOptions:
        """What the manifest keeps as an `EngineSet`'s options."""
        if backend in UNCOMPILED:
            return EngineOptions()
        flavour, options = FLAVOURS[backend], self._options(FLAVOURS[backend])
        built_for = {
            "weights": self.weights,
            "gpu": None if options.capabilities else gpu_name(),
            **_PLAN_OPTIONS.dump_python(options, mode="json"),
        }
        return cast(EngineOptions, built_for | ({"plugins": self.uses_plugins(flavour)} if flavour.takes_plugins else {}))

    def uses_plugins(self, flavour: Flavour) -> bool:
        """Whether a flavour's engines hold the plugin."""
        return self.plugins is not False and flavour.why_no_plugins() is None

    def built_with(self, backend: str) -> dict[str, str]:
        """What the manifest keeps as an `EngineSet`'s versions."""
        return {} if backend in UNCOMPILED else {FLAVOURS[backend].requirement: FLAVOURS[backend].version() or "unknown"}


def request_of(backend: str, engines: EngineSet) -> EngineRequest:
    """The request that a backend's engines were built by."""
    if backend in UNCOMPILED:
        return EngineRequest((backend,))
    options = {name: value for name, value in engines.options.items() if name not in ("weights", "gpu", "plugins")}
    return EngineRequest((backend,), engines.options["weights"], _PLAN_OPTIONS.validate_python(options), engines.options.get("plugins"))


def stale_engine_reasons(backend: str, held: EngineSet, request: EngineRequest | None) -> list[str]:
    """Why a backend's engines must be built again; empty if they need not be.

    Args:
        backend: its name.
        held: its engines in the bundle.
        request: the options of this build, or None for the same as before.
    """
    reasons = []
    for package, before in held.built_with.items():
        version = FLAVOURS[backend].version()
        if version not in (before, None):
            reasons.append(f"{package} was {before} and is {version}")
    if request is not None:
        for name, value in request.built_for(backend).items():
            if held.options.get(name) != value:
                reasons.append(f"{backend}'s {name.replace('_', ' ')}: {_shown(held.options.get(name))} before, {_shown(value)} now")
    return reasons


def _shown(value: Any) -> Any:
    return ", ".join(value) if isinstance(value, list) else value


def build_engines(folder: Path, target: Path, backend: str, specs: Mapping[str, GraphSpec], request: EngineRequest) -> EngineSet:
    """Build a backend's engines of some graphs, one after the other, or reuse those of bundles beside the target.

    Args:
        folder: of the graphs and weights, where the engines are written.
        target: the bundle that the folder will become.
        backend: its name.
        specs: of the graphs.
        request: what to build for.

    Raises:
        BuildError: if an engine cannot be built.
    """
    if backend == PYTORCH:  # text encoders and VAE run in diffusers, which is PyTorch too
        return EngineSet(files={name: WEIGHTS_FILE for name in specs if is_of_denoiser(name)})
    if backend == ONNXRUNTIME:
        return EngineSet(files={name: graph_file(name) for name in specs})
    flavour = FLAVOURS[backend]
    files, keys = {}, {}
    for name, spec in specs.items():
        file = f"{name}.{backend}.plan"
        with _graph_to_build(folder, name, request.weights, request.uses_plugins(flavour)) as (graph, parameters):
            kernels = {"tgate-trt": metadata.version("tgate-trt")} if request.uses_plugins(flavour) else {}
            key = _key(folder, graph, spec, {**request.built_for(backend), **request.built_with(backend), **kernels})
            if not _reuse(target, backend, name, key, folder / file):
                _build(flavour, graph, folder / file, spec, request, parameters, target)
        files[name], keys[name] = file, key
    return EngineSet(files, request.built_for(backend), request.built_with(backend), keys)


@contextlib.contextmanager
def _graph_to_build(folder: Path, name: str, weights: str, plugins: bool) -> Iterator[tuple[Path, dict[str, TensorSpec]]]:
    """The graph to build an engine from, and those of its inputs that are weights."""
    graph = folder / graph_file(name)
    if weights == "baked" and not plugins:
        yield graph, {}
        return
    model = ir.load(graph)
    parameters = {} if weights == "baked" else turn_weights_into_inputs(model, convolutions=weights == "shared")
    if plugins:
        name_plugin(model, WIDTHS)
    variant = folder / f".{name}.variant.onnx"
    try:
        ir.save(model, variant)
        yield variant, parameters
    finally:
        variant.unlink(missing_ok=True)


def _key(folder: Path, graph: Path, spec: GraphSpec, built: Mapping[str, Any]) -> str:
    """Hash of everything that an engine depends on: graph, profile, options, versions, and the graph's weights files."""
    files = files_of(ir.load(graph))
    hashes = {name: _sha256_of_weights(folder / name, tuple(stamp(folder / name))) for name in files}
    text = json.dumps([sha256(graph), spec.to_json(), dict(built), hashes], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@functools.lru_cache(maxsize=8)
def _sha256_of_weights(path: Path, _stamp: tuple[int, ...]) -> str:
    """Hash of a weights file, computed once for all engines of a build."""
    return sha256(path)


def _reuse(target: Path, backend: str, name: str, key: str, plan: Path) -> bool:
    """Take an engine of this key from the old bundle or from one beside it, if there is one and it is undamaged."""
    for manifest in sorted(target.absolute().parent.glob(f"*/{MANIFEST}")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            data = json.loads(manifest.read_text(encoding="utf-8"))
            held = data["engines"][backend]
            if held["keys"].get(name) != key:
                continue
            file = manifest.parent / held["files"][name]
            if file.is_symlink() or sha256(file) != data["files"][file.name]["sha256"]:
                continue
            link_or_copy(file, plan)
            logger.info("%s engine of %s reused from %s: the same graph, sizes, options and version", backend, name, manifest.parent)
            return True
    return False


def _build(
    flavour: Flavour, graph: Path, plan: Path, spec: GraphSpec, request: EngineRequest, parameters: Mapping[str, TensorSpec], target: Path
) -> None:
    """Build one plan, with its progress in the log."""
    shared = beside(target)
    what = f"{flavour.backend} engine of {spec.name}"
    start = time.perf_counter()

    def log_progress(fraction: float, phase: str) -> None:
        logger.info("%s: %s …", what, phase, extra={"progress": fraction})

    logger.info("%s …", what)
    report = build_plan(
        flavour,
        graph,
        plan,
        spec,
        request._options(flavour),
        parameters=parameters,
        plugins=request.uses_plugins(flavour),
        log=shared / "logs" / f"{target.name}.{spec.name}.{flavour.backend}.log",
        timing_cache=shared / f"timing.{flavour.backend}-{flavour.version()}.cache",
        on_progress=log_progress,
    )
    logger.info("%s done in %.1f s", what, time.perf_counter() - start)
    logger.info("%s: %.1f MB", plan.name, report["bytes"] / 1e6)

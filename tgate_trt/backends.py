"""Backends: which of a bundle's engines runs on this machine, and how it is loaded."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from tgate_trt.bundle import BESIDE, Bundle, EngineSet
from tgate_trt.engines.tensorrt_flavours import FLAVOURS, compute_capability, gpu_is_present, gpu_name
from tgate_trt.errors import InputError, StaleBundleError, UnsupportedError
from tgate_trt.specs import DTYPES, MAXIMUM_ROWS, ROWS, Bounds, GraphSpec
from tgate_trt.taps import GRAPHS, recipe

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from tgate_trt.engines.base import Engine
    from tgate_trt.engines.shared_weights import SharedWeights
    from tgate_trt.engines.tensorrt import Arena, RuntimeOptions

ONNXRUNTIME, PYTORCH = "onnxruntime", "pytorch"

BACKENDS = ("tensorrt", "tensorrt-rtx", PYTORCH, ONNXRUNTIME)
"""Backends of this version, in the order in which `load` tries them on a GPU; on the CPU, PyTorch is the last."""

UNCOMPILED = (PYTORCH, ONNXRUNTIME)
"""Backends that run what a bundle holds anyway, its graphs or its weights, and build nothing."""


def why_not(backend: str, engines: EngineSet) -> str | None:
    """Why a bundle's engines of a backend cannot run on this machine; None if they can, as far as that shows without loading one."""
    if backend in UNCOMPILED:
        return None
    flavour = FLAVOURS.get(backend)
    if flavour is None:
        return "this version has no such backend"
    if not flavour.is_installed():
        return f"{flavour.requirement} is not installed"
    if not gpu_is_present():
        return "there is no NVIDIA GPU here"
    built, here = engines.built_with.get(flavour.requirement), flavour.version()
    if built != here and not engines.options["version_compatible"]:
        return f"they were built with {flavour.requirement} {built}, and {here} is installed"
    if engines.options["gpu"] not in (None, gpu_name()):
        return f"they were built for {engines.options['gpu']}, and the GPU here is {gpu_name()}"
    gpu, capabilities = compute_capability(), engines.options["capabilities"]
    if capabilities and gpu not in capabilities:
        return f"they were built for {', '.join(capabilities)}, and the GPU here is {gpu}"
    return None


def choose_backend(bundle: Bundle, backend: str | None) -> str:
    """The backend that was asked for, or the first of `BACKENDS` that the bundle holds and that runs here.

    Raises:
        InputError: if there is no such backend.
        StaleBundleError: if the bundle holds no engine of it that runs here.
    """
    if backend is not None and backend not in BACKENDS:
        raise InputError(f"there is no backend {backend!r}; this version has {', '.join(BACKENDS)}")
    import torch

    order = BACKENDS if torch.cuda.is_available() else sorted(BACKENDS, key=PYTORCH.__eq__)
    held = {name: bundle.manifest.engines[name] for name in order if name in bundle.manifest.engines and backend in (None, name)}
    if not held:
        raise StaleBundleError(f"{bundle.folder} holds no engine of {backend or 'a backend of this version'}; build it with tgate-build")
    reasons = {name: why_not(name, engines) for name, engines in held.items()}
    for name, reason in reasons.items():
        if reason is None:
            return name
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise StaleBundleError(f"no engine of {bundle.folder} runs here ({told}); add one with tgate-build --backend {ONNXRUNTIME}")


def has_engine(bundle: Bundle, graph: str, backend: str) -> bool:
    """Whether a bundle holds a backend's engine of a graph."""
    return backend in bundle.manifest.engines and graph in bundle.manifest.engines[backend].files


@dataclasses.dataclass
class EngineLoader:
    """Loads engines of one backend of a bundle; they share what engines of one pipeline can share."""

    bundle: Bundle
    backend: str
    device: torch.device | None = None
    """The backend's best if None."""
    threads: int | None = None
    """CPU threads of an engine; one a core if None."""
    options: RuntimeOptions | None = None
    """Of engines of a GPU; `runtime_options` of the bundle if None."""
    compile: bool = False
    """Whether PyTorch's engines run `torch.compile`'s code."""
    _arena: Arena | None = None
    _weights: dict[tuple[Path, ...], SharedWeights] = dataclasses.field(default_factory=dict)
    _state: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def load(self, graph: str) -> Engine:
        """Load one engine, with the LoRAs that were put into the bundle.

        Raises:
            BundleError: if the bundle holds no such engine, or it cannot be loaded.
            UnsupportedError: if the backend is not to be had here.
        """
        from tgate_trt.refitting import component_of, fused, loras_of

        engine = self._load(graph)
        weights = fused(self.bundle, loras_of(self.bundle), component_of(self.bundle, graph))
        if weights:
            engine.replace_weights(weights)
        return engine

    def _load(self, graph: str) -> Engine:
        spec = self.bundle.graph(graph)
        path = self.bundle.folder / self.bundle.manifest.engines[self.backend].files[graph]
        if self.backend in UNCOMPILED:
            # No profile is needed: such an engine takes every batch for which the trace holds.
            spec = dataclasses.replace(spec, dimensions={ROWS: Bounds(1, spec.dimensions[ROWS].optimum, MAXIMUM_ROWS)})
        if self.backend == PYTORCH:
            return self._load_module(graph, path, spec)
        if self.backend == ONNXRUNTIME:
            from tgate_trt.engines.onnxruntime import OnnxRuntimeEngine

            return OnnxRuntimeEngine(path, spec, device=self.device, threads=self.threads)
        return self._load_plan(graph, path, spec)

    def _load_module(self, graph: str, weights: Path, spec: GraphSpec) -> Engine:
        """The denoiser in PyTorch; all graphs share its weights."""
        import torch
        from safetensors.torch import load_file

        from tgate_trt.engines.pytorch import PyTorchEngine, PyTorchOptions

        device = self.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UnsupportedError("PyTorch cannot use CUDA here; use device='cpu'")
        if not self._state:
            self._state = load_file(weights, device=str(device))
        built_for = self.bundle.manifest.built_for
        dtype = getattr(torch, DTYPES[built_for["precision"]])
        options = PyTorchOptions(
            cuda_graphs=(self.options or runtime_options(self.bundle)).cuda_graphs,
            compile=self.compile,
            threads=self.threads,
            fuse_cache_reuse=built_for["fuse_cache_reuse"] == "function",
        )
        return PyTorchEngine(self.bundle.denoiser_on_meta(dtype), self._state, spec, recipe(graph), device, options)

    def _load_plan(self, graph: str, path: Path, spec: GraphSpec) -> Engine:
        import torch

        from tgate_trt.engines.shared_weights import SharedWeights
        from tgate_trt.engines.tensorrt import Arena, TensorRTEngine

        if self.device is not None and self.device.type != "cuda":
            raise UnsupportedError(
                f"{self.backend} runs on an NVIDIA GPU, not on {self.device}; use device='cuda' or backend='onnxruntime'"
            )
        if self._arena is None:
            self._arena = Arena(self.device or torch.device("cuda", torch.cuda.current_device()))
        files, weights = weight_files(self.bundle, graph), None
        if self.bundle.manifest.engines[self.backend].options["weights"] != "baked":
            weights = self._weights[files] = self._weights.get(files) or SharedWeights(files, self._arena.device)
        return TensorRTEngine(
            path,
            spec,
            FLAVOURS[self.backend],
            self._arena,
            weights=weights,
            weight_files=files,
            options=self.options or runtime_options(self.bundle),
        )


def runtime_options(bundle: Bundle, *, cuda_graphs: bool = True, specialisation: str = "lazy") -> RuntimeOptions:
    """How plans of a bundle are run; what TensorRT-RTX compiles is kept beside it.

    Raises:
        InputError: if there is no such specialisation.
    """
    from tgate_trt.engines.tensorrt import RuntimeOptions

    return RuntimeOptions(cuda_graphs, specialisation, bundle.folder.absolute().parent / BESIDE / "compiled")


def weight_files(bundle: Bundle, graph: str) -> tuple[Path, ...]:
    """The safetensors files of a graph's weights."""
    if graph not in GRAPHS:
        from tgate_trt.components import components_of
        from tgate_trt.components import weight_files as files_of_component

        return files_of_component(components_of(bundle.pipeline)[graph], bundle.folder)
    from tgate_trt.export.weights import WEIGHTS_FILE

    return (bundle.folder / WEIGHTS_FILE,)


def load_engine(bundle: Bundle, graph: str, *, backend: str, device: torch.device | None = None, threads: int | None = None) -> Engine:
    """Load one engine of a bundle; see `EngineLoader.load`."""
    return EngineLoader(bundle, backend, device, threads).load(graph)

"""Backends: which of a bundle's engines runs on this machine, and how it is loaded."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from tgate_trt.bundle import Bundle, EngineSet
from tgate_trt.engines.tensorrt_flavours import FLAVOURS, compute_capability, gpu_is_present
from tgate_trt.errors import InputError, StaleBundleError
from tgate_trt.specs import MAXIMUM_ROWS, ROWS, Bounds

if TYPE_CHECKING:
    import torch

    from tgate_trt.engines.base import Engine

ONNXRUNTIME = "onnxruntime"

BACKENDS = ("tensorrt", "tensorrt-rtx", ONNXRUNTIME)
"""Backends of this version, in the order in which `load` tries them."""


def why_not(backend: str, engines: EngineSet) -> str | None:
    """Why a bundle's engines of a backend cannot run on this machine; None if they can, as far as that shows without loading one."""
    if backend == ONNXRUNTIME:
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
    held = {name: bundle.manifest.engines[name] for name in BACKENDS if name in bundle.manifest.engines and backend in (None, name)}
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


def load_engine(bundle: Bundle, graph: str, *, backend: str, device: torch.device | None = None, threads: int | None = None) -> Engine:
    """Load one engine of a bundle.

    Raises:
        BundleError: if the bundle holds no such engine.
    """
    from tgate_trt.engines.onnxruntime import OnnxRuntimeEngine

    spec = bundle.graph(graph)
    # ONNX Runtime needs no profile: it takes every batch for which the trace holds.
    spec = dataclasses.replace(spec, dimensions={ROWS: Bounds(1, spec.dimensions[ROWS].optimum, MAXIMUM_ROWS)})
    return OnnxRuntimeEngine(bundle.folder / bundle.manifest.engines[backend].files[graph], spec, device=device, threads=threads)

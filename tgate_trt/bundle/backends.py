"""Backends: the kinds of engines that a bundle may hold, and which of them run on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tgate_trt.bundle.bundle import Bundle
from tgate_trt.bundle.manifest import EngineSet
from tgate_trt.engines.tensorrt_flavours import FLAVOURS, compute_capability, gpu_is_present, gpu_name
from tgate_trt.errors import InputError, StaleBundleError

if TYPE_CHECKING:
    pass


ONNXRUNTIME, PYTORCH = "onnxruntime", "pytorch"

BACKENDS = ("tensorrt", "tensorrt-rtx", PYTORCH, ONNXRUNTIME)
"""Backends, in the order in which `load` tries them on a GPU; on the CPU PyTorch comes last."""

UNCOMPILED = (PYTORCH, ONNXRUNTIME)
"""Backends that build no engine files: they run a bundle's graphs or weights as they are."""


def why_not(backend: str, engines: EngineSet) -> str | None:
    """Why a bundle's engines of a backend cannot run on this machine; None if they can, as far as can be checked without loading one."""
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
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise StaleBundleError(f"no engine of {bundle.folder} runs here ({why}); add one with tgate-build --backend {ONNXRUNTIME}")


def has_engine(bundle: Bundle, graph: str, backend: str) -> bool:
    """Whether a bundle holds a backend's engine of a graph."""
    return backend in bundle.manifest.engines and graph in bundle.manifest.engines[backend].files

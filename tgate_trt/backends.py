"""Backends: which of a bundle's engines runs on this machine, and how it is loaded."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from tgate_trt.bundle import Bundle
from tgate_trt.errors import InputError, StaleBundleError
from tgate_trt.specs import MAXIMUM_ROWS, ROWS, Bounds

if TYPE_CHECKING:
    import torch

    from tgate_trt.engines.base import Engine

BACKENDS = ("onnxruntime",)
"""Backends of this version, in the order in which `load` tries them."""


def choose_backend(bundle: Bundle, backend: str | None) -> str:
    """The backend that was asked for, or the first of `BACKENDS` that the bundle holds.

    Raises:
        InputError: if there is no such backend.
        StaleBundleError: if the bundle holds no engine of it.
    """
    if backend is not None and backend not in BACKENDS:
        raise InputError(f"there is no backend {backend!r}; this version has {', '.join(BACKENDS)}")
    held = [name for name in BACKENDS if name in bundle.manifest.engines and backend in (None, name)]
    if not held:
        raise StaleBundleError(f"{bundle.folder} holds no engine of {backend or 'a backend of this version'}; build it with tgate-build")
    return held[0]


def load_engine(bundle: Bundle, graph: str, *, backend: str, device: torch.device | None = None, threads: int | None = None) -> Engine:
    """Load one engine of a bundle.

    Raises:
        BundleError: if the bundle holds no such engine.
    """
    from tgate_trt.engines.onnxruntime import OnnxRuntimeEngine

    spec = bundle.graph(graph)
    # ONNX Runtime needs no profile: it takes every batch for which the trace holds.
    spec = dataclasses.replace(spec, dimensions={ROWS: Bounds(1, spec.dimensions[ROWS].optimum, MAXIMUM_ROWS)})
    return OnnxRuntimeEngine(bundle.folder / bundle.manifest.engines[backend][graph], spec, device=device, threads=threads)

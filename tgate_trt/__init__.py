"""tgate-trt: text-to-image diffusion as two compiled graphs that switch at the gate step (T-GATE, arXiv 2404.02747).

>>> import tgate_trt
>>> tgate_trt.build("shapes", "bundles/shapes")
>>> pipe = tgate_trt.load("bundles/shapes", gate_step=10)
>>> image = pipe("a small red circle at the top left on a blue background", num_inference_steps=25).images[0]
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tgate_trt.errors import (
    BuildError,
    BundleError,
    GateError,
    InputError,
    StaleBundleError,
    TGateError,
    UnsupportedError,
    VerificationError,
)

if TYPE_CHECKING:
    from tgate_trt.building.builder import build as build
    from tgate_trt.bundle.bundle import Bundle as Bundle
    from tgate_trt.gate.denoiser import GatedDenoiser as GatedDenoiser
    from tgate_trt.gate.gate import Gate as Gate
    from tgate_trt.gate.schedule import GateSchedule as GateSchedule
    from tgate_trt.running.pipeline import apply as apply
    from tgate_trt.running.pipeline import load as load
    from tgate_trt.running.pipeline import refit as refit
    from tgate_trt.running.pipeline import remove as remove

_LAZY = {
    "Bundle": "bundle.bundle",
    "Gate": "gate.gate",
    "GateSchedule": "gate.schedule",
    "GatedDenoiser": "gate.denoiser",
    "apply": "running.pipeline",
    "build": "building.builder",
    "load": "running.pipeline",
    "refit": "running.pipeline",
    "remove": "running.pipeline",
}
"""Module of each name that needs PyTorch, or leads to it: `import tgate_trt` alone loads none of it."""

__all__ = [
    "BuildError",
    "Bundle",
    "BundleError",
    "Gate",
    "GateError",
    "GateSchedule",
    "GatedDenoiser",
    "InputError",
    "StaleBundleError",
    "TGateError",
    "UnsupportedError",
    "VerificationError",
    "apply",
    "build",
    "load",
    "refit",
    "remove",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"tgate_trt.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return __all__

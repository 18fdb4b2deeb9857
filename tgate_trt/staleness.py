"""Whether a bundle still is what it would be if it were built now, and if not, why."""

from __future__ import annotations

from importlib import metadata

from tgate_trt import engine_sets
from tgate_trt.build_request import Request
from tgate_trt.bundle import TRACE, Manifest

_TOOLCHAIN = ("tgate-trt", "torch", "diffusers", "onnx", "onnx-ir", "onnxscript", "onnxruntime")
"""Packages whose versions decide what graphs a build gives."""


def toolchain() -> dict[str, str]:
    """Versions of the packages that make the graphs."""
    return {package: metadata.version(package) for package in _TOOLCHAIN}


def stale_reasons(manifest: Manifest, content: str | None, request: Request | None = None) -> list[str]:
    """Why a bundle must be built again from the start; empty if it need not be.

    Args:
        manifest: of the bundle.
        content: hash of the model as it is now, or None if it cannot be known.
        request: what is asked for now, or None to ask for the same.
    """
    reasons = []
    if content is not None and content != manifest.model["content"]:
        reasons.append("the model's files changed")
    for package, version in toolchain().items():
        before = manifest.built_with.get(package)
        if before != version:
            reasons.append(f"{package} was {before} and is {version}")
    for name, value in (request.to_json() if request else {}).items():
        before = manifest.built_for.get(name)
        if before != value:
            reasons.append(f"{name.replace('_', ' ')} was {before} and is {value}")
    if request is not None and TRACE not in manifest.files and (not request.discard_graphs or missing_parts(manifest, request)):
        reasons.append("its graphs were discarded")
    return reasons


def missing_parts(manifest: Manifest, request: Request) -> list[str]:
    """What a request asks for and a bundle lacks, though its trace is what it would be now; empty if it lacks nothing."""
    parts = [f"the {graph} graph is new" for graph in request.graphs if graph not in manifest.graphs]
    if request.components:
        parts += [f"the {graph} graph is new" for graph in manifest.model["components"] if graph not in manifest.graphs]
    for backend in request.engines.backends:
        held = manifest.engines.get(backend)
        if held is None:
            parts.append(f"the {backend} backend is new")
        else:
            parts += engine_sets.stale_reasons(backend, held, request.engines)
    if request.verify and set(manifest.graphs) - set(manifest.verification):
        parts.append("it was not verified")
    if request.discard_graphs and TRACE in manifest.files:
        parts.append("its graphs are to be discarded")
    return parts

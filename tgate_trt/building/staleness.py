"""Whether a build now would give the same bundle, and if not, why."""

from __future__ import annotations

from dataclasses import dataclass

from tgate_trt.building.engines import stale_engine_reasons
from tgate_trt.building.request import Request
from tgate_trt.building.toolchain import toolchain
from tgate_trt.bundle.backends import why_not
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.bundle.manifest import TRACE, Manifest
from tgate_trt.errors import InputError
from tgate_trt.models.resolve import resolve_again


def stale_reasons(manifest: Manifest, content: str | None, request: Request | None = None) -> list[str]:
    """Why a bundle must be built again from the start; empty if it need not be.

    Args:
        manifest: of the bundle.
        content: hash of the model as it is now, or None if the model is not here.
        request: the options of this build, or None for the same as before.
    """
    reasons = []
    if content is not None and content != manifest.model.content:
        reasons.append("the model's files changed")
    for package, version in toolchain().items():
        before = manifest.built_with.get(package)
        if before != version:
            reasons.append(f"{package} was {before} and is {version}")
    for name, value in (vars(request.built_for) if request else {}).items():
        before = getattr(manifest.built_for, name)
        if before != value:
            reasons.append(f"{name.replace('_', ' ')} was {before} and is {value}")
    if request is not None and TRACE not in manifest.files and (not request.discard_graphs or missing_parts(manifest, request)):
        reasons.append("its graphs were discarded")
    return reasons


def missing_parts(manifest: Manifest, request: Request) -> list[str]:
    """What a bundle whose trace is up to date lacks of a request; empty if it lacks nothing."""
    parts = [f"the {graph} graph is new" for graph in request.graphs if graph not in manifest.graphs]
    if request.components:
        parts += [f"the {graph} graph is new" for graph in manifest.model.components if graph not in manifest.graphs]
    for backend in request.engines.backends:
        held = manifest.engines.get(backend)
        if held is None:
            parts.append(f"the {backend} backend is new")
        else:
            parts += stale_engine_reasons(backend, held, request.engines)
    if request.verify and set(manifest.graphs) - set(manifest.verification):
        parts.append("it was not verified")
    elif request.verify and any(engines.files.keys() - engines.verification.keys() for engines in manifest.engines.values()):
        parts.append("its engines were not verified")
    if request.discard_graphs and TRACE in manifest.files:
        parts.append("its graphs are to be discarded")
    return parts


@dataclass(frozen=True)
class State:
    """The state of a bundle on this machine."""

    stale: tuple[str, ...]
    """Why it should be built again; empty if it is valid."""
    remarks: tuple[str, ...]
    """What could not be checked, and which engines run here."""


def state_of(bundle: Bundle) -> State:
    """Compare a bundle with its model, if that is still here, and with the installed packages."""
    remarks = []
    manifest = bundle.manifest
    try:
        content = resolve_again(manifest.model.reference).fingerprint(manifest.model.fingerprint)["content"]
    except InputError:
        content = None
        remarks.append(f"its model, {manifest.model.reference.model}, is not here, so changes to it cannot be seen")
    for backend, engines in manifest.engines.items():
        reason = why_not(backend, engines)
        remarks.append(f"its {backend} engines {'run here' if reason is None else f'do not run here: {reason}'}")
    reasons = stale_reasons(manifest, content)
    for backend, engines in manifest.engines.items():
        reasons += stale_engine_reasons(backend, engines, None)
    return State(tuple(reasons), tuple(remarks))

"""Whether a bundle is still valid on this machine, and if not, why."""

from __future__ import annotations

from dataclasses import dataclass

from tgate_trt import engine_sets, models
from tgate_trt.backends import why_not
from tgate_trt.bundle import Bundle
from tgate_trt.errors import InputError
from tgate_trt.staleness import stale_reasons


@dataclass(frozen=True)
class State:
    """What is to be said of a bundle on this machine."""

    stale: tuple[str, ...]
    """Why it should be built again; empty if it is valid."""
    remarks: tuple[str, ...]
    """What could not be checked, or does not run here."""


def state_of(bundle: Bundle) -> State:
    """Compare a bundle with its model, if that is still here, and with the packages that are installed."""
    remarks = []
    manifest = bundle.manifest
    try:
        source = models.resolve_again(manifest.model["reference"], manifest.model["random_seed"], manifest.model["lora"])
        content = source.fingerprint(manifest.model["source"])["content"]
    except InputError:
        content = None
        remarks.append(f"the model that it was built from, {manifest.model['reference']}, is not here, so changes to it cannot be seen")
    for backend, engines in manifest.engines.items():
        reason = why_not(backend, engines)
        remarks.append(f"its {backend} engines {'run here' if reason is None else f'do not run here: {reason}'}")
    reasons = stale_reasons(manifest, content)
    for backend, engines in manifest.engines.items():
        reasons += engine_sets.stale_reasons(backend, engines, None)
    return State(tuple(reasons), tuple(remarks))

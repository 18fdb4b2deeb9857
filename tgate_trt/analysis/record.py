"""Results of measurements: what was measured, on what and with what, as JSON."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tgate_trt.bundle.bundle import Bundle
from tgate_trt.errors import InputError
from tgate_trt.files import replace_file

SCHEMA = 2
"""Version of the records' form."""

_PACKAGES = ("tgate-trt", "torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")


def environment() -> dict[str, Any]:
    """Date, machine, package versions and commit."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "gpu": _gpu_model(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": f"{platform.system()} {platform.machine()}",
            "load_average_before": round(os.getloadavg()[0], 2),
        },
        "versions": {"python": platform.python_version(), **{package: metadata.version(package) for package in _PACKAGES}},
        "commit": _commit(),
    }


def record_of(
    what: str, command: str, before: Mapping[str, Any], settings: Mapping[str, Any], results: Any, subject: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """One measurement, with all that is needed to judge and to repeat it.

    Args:
        what: was measured; decides how it is shown, see `tgate_trt.bench.report`.
        command: as it can be typed again.
        before: `environment` at the start.
        settings: how it was measured.
        results: plain JSON data.
        subject: on which bundle; see `describe`.
    """
    return {
        "schema": SCHEMA,
        "what": what,
        "command": command,
        **before,
        "subject": dict(subject or {}),
        "settings": dict(settings),
        "results": results,
    }


def write(path: Path, text: str) -> None:
    """Write a file of results, whole or not at all.

    Raises:
        InputError: if nothing can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text)
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror or error}; choose another file") from error


def read(path: Path) -> dict[str, Any]:
    """A record that was written.

    Raises:
        InputError: if the file is no record of this version.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        schema = found["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no record of a benchmark; take it away and measure again") from error
    if schema != SCHEMA:
        raise InputError(f"{path} has schema {schema}, this version reads {SCHEMA}; take it away and measure again")
    return found


def describe(bundle: Bundle) -> dict[str, Any]:
    """A bundle as the subject of a record."""
    manifest = bundle.manifest
    return {
        "model": manifest.model.name,
        "random_weights": manifest.model.reference.random_seed is not None,
        "content": manifest.model.content,
        **vars(manifest.built_for),
        "batch_size": str(manifest.built_for.batch_size),
        "built_with": dict(manifest.built_with),
        "engines": {
            backend: {"options": engines.options, "built_with": dict(engines.built_with)} for backend, engines in manifest.engines.items()
        },
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _gpu_model() -> str | None:
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def _commit() -> str | None:
    """The commit of the source, marked where files differ from it; None outside a checkout."""
    head = _git(("rev-parse", "HEAD"))
    if head is None:
        return None
    return f"{head} with changes" if _git(("status", "--porcelain", "--untracked-files=no")) else head


def _git(arguments: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(("git", "-C", str(Path(__file__).parent), *arguments), capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None

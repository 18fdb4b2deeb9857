"""The record of a measurement: what was measured, on which machine, with which versions; one form for every command, as JSON."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from tgate_trt.bundle.bundle import Bundle
from tgate_trt.errors import InputError
from tgate_trt.files import replacing

SCHEMA = 3
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
            "memory_bytes": psutil.virtual_memory().total,
            "system": f"{platform.system()} {platform.machine()}",
            "load_average_before": round(os.getloadavg()[0], 2),
        },
        "versions": {"python": platform.python_version(), **{package: metadata.version(package) for package in _PACKAGES}},
        "commit": commit_of(Path(__file__).parent),
    }


def record_of(
    what: str, command: str, before: Mapping[str, Any], settings: Mapping[str, Any], results: Any, subject: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Make the record of one measurement: all that is needed to judge it and to repeat it.

    Args:
        what: kind of measurement, which decides on tables (`tgate_trt.bench.report`) and figures.
        command: the command line, ready to be typed again.
        before: `environment` at the start.
        settings: how it was measured.
        results: plain JSON data.
        subject: the measured bundle (see `describe`) or model.
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


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A file to write results to, which takes the place of ``path`` when the block ends well: whole or not at all.

    Raises:
        InputError: if nothing can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            yield partial
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror or error}; choose another file") from error


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as JSON, whole or not at all.

    Raises:
        InputError: if nothing can be written there.
    """
    with writing(path) as partial:
        partial.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_writable(path: Path) -> None:
    """Check before a long measurement that its results can be written; make the folder if there is none.

    Raises:
        InputError: if they cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise InputError(f"cannot write to {path.parent}: {error.strerror or error}; choose another place") from error
    if path.is_dir():
        raise InputError(f"{path} is a folder, and results are written to a file; choose another file")


def read(path: Path) -> dict[str, Any]:
    """Read a record that `write` wrote.

    Raises:
        InputError: if the file is no record of this version.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        schema = found["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no record of a measurement; move it away, or choose another file") from error
    if schema != SCHEMA:
        raise InputError(f"{path} has schema {schema}, this version reads {SCHEMA}; move it away, or choose another file")
    return found


def describe(bundle: Bundle) -> dict[str, Any]:
    """Describe a bundle as the subject of a record."""
    manifest = bundle.manifest
    return {
        "model": manifest.model.name,
        "random_weights": manifest.model.reference.random_seed is not None,
        "content": manifest.model.content,
        **manifest.built_for.described(),
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


def commit_of(folder: Path) -> str | None:
    """The commit of the checkout around a folder, marked where files outside ``docs`` differ from it; None outside a checkout.

    Results lie in ``docs``, so that one measurement after another is still of the commit.
    """
    head = _git(folder, ("rev-parse", "HEAD"))
    if head is None:
        return None
    changed = _git(folder, ("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)docs"))
    return f"{head} with changes" if changed else head


def _git(folder: Path, arguments: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(("git", "-C", str(folder), *arguments), capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None

"""What was measured, on what and with what, as JSON: a file for each benchmark and model."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from tgate_trt.bundle import Bundle, replace_file
from tgate_trt.errors import InputError

SCHEMA = 1
"""Version of the records' form."""

_PREFIX = "cpu-"
_PACKAGES = ("tgate-trt", "torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")


def environment() -> dict[str, Any]:
    """Date, machine, package versions and commit."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": f"{platform.system()} {platform.machine()}",
            "load_average_before": round(os.getloadavg()[0], 2),
        },
        "versions": {"python": platform.python_version(), **{package: metadata.version(package) for package in _PACKAGES}},
        "commit": _commit(),
    }


@dataclass
class Recorder:
    """Writes the records of one run of the command."""

    folder: Path
    command: str
    """As it can be typed again."""
    environment: Mapping[str, Any] = field(default_factory=environment)

    def __post_init__(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write to {self.folder}: {error.strerror or error}; choose another --output") from error

    def save(
        self, what: str, subject: Mapping[str, Any], settings: Mapping[str, Any], results: Any, *, complete: bool = True
    ) -> dict[str, Any]:
        """Write a record over the one that an earlier round or run left.

        Args:
            what: was measured: ``"steps"``, ``"pictures"``, ``"scores"`` or ``"build"``.
            subject: on which model; see `describe`.
            settings: how.
            results: plain JSON data.
            complete: whether this is all that was asked for, and not what a run had until it was cut off.
        """
        record = {
            "schema": SCHEMA,
            "what": what,
            "command": self.command,
            **self.environment,
            "subject": dict(subject),
            "settings": dict(settings),
            "complete": complete,
            "results": results,
        }
        name = "-".join(filter(None, (what, subject["model"], subject.get("variant"))))
        replace_file(self.folder / f"{_PREFIX}{name}.json", json.dumps(record, indent=2) + "\n")
        return record


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Every record in a folder, in the order of their names.

    Raises:
        InputError: if a file is no record of this version.
    """
    records = []
    for path in sorted(folder.glob(f"{_PREFIX}*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["schema"] != SCHEMA:
                raise InputError(f"{path} has schema {record['schema']}, this version reads {SCHEMA}; take it away and measure again")
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} is no record of a benchmark; take it away and measure again") from error
        records.append(record)
    return records


def describe(bundle: Bundle) -> dict[str, Any]:
    """A bundle as the subject of a record."""
    manifest = bundle.manifest
    return {
        "model": manifest.model["name"],
        "random_weights": manifest.model["random_seed"] is not None,
        "content": manifest.model["content"],
        **manifest.built_for,
        "built_with": dict(manifest.built_with),
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


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

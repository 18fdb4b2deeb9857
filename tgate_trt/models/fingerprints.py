"""Detect by content whether a model changed, without hashing gigabytes that did not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from tgate_trt.errors import InputError

_STAMP = ("size", "mtime_ns", "inode")


class Fingerprint(TypedDict):
    """Identity of a model's files."""

    content: str
    files: dict[str, dict[str, int | str]]
    seed: int | None
    revision: str | None


def fingerprint_of(
    files: Mapping[str, Path], *, seed: int | None, settings: Mapping[str, Any], revision: str | None, known: Fingerprint | None
) -> Fingerprint:
    """Identify files by content.

    Args:
        files: by the name under which each counts.
        seed: of random weights, or None.
        settings: of the scheduler, beside those in the files.
        revision: commit of a model from the hub, or None; it is recorded but does not enter the hash.
        known: an earlier fingerprint; a file whose stamp equals the one in it is not read.

    Raises:
        InputError: if a file cannot be read.
    """
    before = known["files"] if known else {}
    entries = {name: _entry(path, before.get(name)) for name, path in sorted(files.items())}
    counted: dict[str, Any] = {"files": {name: entry["sha256"] for name, entry in entries.items()}, "seed": seed}
    if settings:
        counted["scheduler"] = dict(settings)
    if seed is not None:
        from tgate_trt.models.random_weights import GENERATION

        counted["generation"] = GENERATION
    content = hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()
    return Fingerprint(content=content, files=entries, seed=seed, revision=revision)


def _entry(path: Path, before: Mapping[str, Any] | None) -> dict[str, Any]:
    """Stamp and hash of one file; the stamp is taken first, so that a write while hashing shows next time."""
    try:
        stat = path.stat()
        stamp = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "inode": stat.st_ino}
        if before and all(before.get(key) == stamp[key] for key in _STAMP) and "sha256" in before:
            return {**stamp, "sha256": before["sha256"]}
        with path.open("rb") as file:
            return {**stamp, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error

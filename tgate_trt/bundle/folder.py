"""A bundle's folder: written beside its place, and exchanged with what is there in one step."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tgate_trt.bundle.manifest import MANIFEST
from tgate_trt.errors import InputError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def building(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its place if the block ends well, and vanishes if not.

    The two are exchanged in one step where the system can (`renameat2`), so a build that is killed leaves the old
    bundle whole.

    Raises:
        InputError: if ``target`` exists and is no bundle, or cannot be written.
    """
    target = target.absolute()
    mend(target)
    if target.exists() and not (target / MANIFEST).is_file() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{target} exists and is not a bundle; choose another --output, or move it away")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_overs(target)
        folder = Path(tempfile.mkdtemp(prefix=f"{_building_prefix(target)}{os.getpid()}-", dir=target.parent))
    except OSError as error:
        raise InputError(f"cannot write to {target.parent}: {error.strerror}; choose another --output") from error
    try:
        folder.chmod(0o755)
        yield folder
        _exchange(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _building_prefix(target: Path) -> str:
    return f".{target.name}.building-"


def _remove_left_overs(target: Path) -> None:
    """Remove the temporary folders of builds of this bundle that were killed."""
    prefix = _building_prefix(target)
    for folder in target.parent.glob(f"{prefix}*"):
        process = folder.name.removeprefix(prefix).partition("-")[0]
        if process.isdecimal() and not Path(f"/proc/{process}").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _exchange(new: Path, target: Path) -> None:
    """Put ``new`` where ``target`` is; the old bundle, if there was one, is then where ``new`` was."""
    if not target.exists():
        new.rename(target)
        return
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 and renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE) == 0:
        return
    target.rename(_set_aside(target))
    new.rename(target)
    shutil.rmtree(_set_aside(target), ignore_errors=True)


def _set_aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.before")


def mend(target: Path) -> None:
    """Finish an exchange by two renames that was cut off between them."""
    if not target.exists() and _set_aside(target).exists():
        _set_aside(target).rename(target)

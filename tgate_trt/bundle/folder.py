"""A bundle's folder: built beside its place and exchanged with what is there in one step, by one process at a time."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from tgate_trt.bundle.manifest import BESIDE, MANIFEST
from tgate_trt.errors import BuildError, InputError

logger = logging.getLogger(__name__)

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2

GUESTS = (".git", ".gitattributes", ".gitignore", ".cache", "README.md", "LICENSE", "LICENSE.md", "LICENSE.txt")
"""Files and folders that a bundle may hold at its top without listing them: those of a repository, by which bundles are shared."""


def beside(target: Path) -> Path:
    """Folder for what the bundles of a place share; within a bundle that is a mount point, for the folder around it is not ours."""
    return (target if os.path.ismount(target) else target.absolute().parent) / BESIDE


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock of a bundle's place; wait while another process holds it.

    The lock is the system's (``flock``), so it ends with its process, and works between containers that share the file system.

    Raises:
        InputError: if the folder beside the bundle cannot be written.
    """
    folder = beside(target) / "locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / f"{target.absolute().name}.lock").open("w")
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}; choose another --output") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process builds %s; waiting for it …", target)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def building(target: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of ``target`` if the block ends well, and vanishes if not; call it under `locked`.

    The two are exchanged in one step where the system can (`renameat2`), so a build that is killed leaves the old bundle whole.
    A mount point and the working directory cannot be exchanged: there the files are moved into place, the manifest last.

    Raises:
        InputError: if ``target`` exists and is no bundle, or cannot be written.
        BuildError: if the disk is full.
    """
    target = target.absolute()
    mend(target)
    if target.exists() and not (target / MANIFEST).is_file() and not (target.is_dir() and not any(_own_entries(target))):
        raise InputError(f"{target} exists and is not a bundle; choose another --output, or move it away")
    stays = os.path.ismount(target) or Path.cwd().is_relative_to(target.resolve())
    parent, prefix = (target if stays else target.parent), f".{target.name}.building-"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for left_over in parent.glob(f"{prefix}*"):  # of builds that were killed: who holds the lock is the only one that lives
            shutil.rmtree(left_over, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    except OSError as error:
        raise InputError(f"cannot write to {parent}: {error.strerror}; choose another --output") from error
    try:
        folder.chmod(0o755)
        yield folder
        (_move_into if stays else _exchange)(folder, target)
    except (OSError, SafetensorError) as error:
        raise BuildError(_failure(folder, error)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _failure(folder: Path, error: Exception) -> str:
    where, reason = getattr(error, "filename", None) or folder.parent, getattr(error, "strerror", None) or error
    return f"cannot read or write {where}: {reason}; free some disk space, or choose another --output; what was there before is whole"


def _own_entries(target: Path) -> Iterator[Path]:
    """What a folder holds beside guests and what builds keep there."""
    return (
        path for path in target.iterdir() if path.name not in (*GUESTS, BESIDE) and not path.name.startswith(f".{target.name}.building-")
    )


def _exchange(new: Path, target: Path) -> None:
    """Put ``new`` where ``target`` is; the old bundle, if there was one, is then where ``new`` was, but for its guests."""
    if not target.exists():
        new.rename(target)
        return
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 and renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE) == 0:
        _move_guests(new, target)
        return
    target.rename(_set_aside(target))
    new.rename(target)
    _move_guests(_set_aside(target), target)
    shutil.rmtree(_set_aside(target), ignore_errors=True)


def _move_guests(old: Path, new: Path) -> None:
    for name in GUESTS:
        if (old / name).exists():
            (old / name).rename(new / name)


def _move_into(new: Path, target: Path) -> None:
    """Move the files of ``new`` into ``target``, the manifest last: a bundle cut off in between does not match its manifest."""
    (target / MANIFEST).unlink(missing_ok=True)
    for path in list(_own_entries(target)):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for path in sorted(new.iterdir(), key=lambda path: path.name == MANIFEST):
        path.rename(target / path.name)


def _set_aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.before")


def mend(target: Path) -> None:
    """Finish an exchange by two renames that was cut off between them."""
    if not target.exists() and _set_aside(target).exists():
        _set_aside(target).rename(target)

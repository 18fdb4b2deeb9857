"""A bundle: one folder that holds all it takes to make pictures, and a manifest that says what and for what.

    manifest.json         what the bundle is; written last
    trace.onnx            the tapped trace, from which further graphs are cut
    planning.onnx …       graphs, by name
    planning.<backend>.plan … engines that are files of their own
    weights.safetensors   the denoiser's weights, once for all graphs
    lora/                 LoRAs that were put in after the build
    pipeline/             the rest of the diffusers pipeline: tokenizers, text encoders, VAE, scheduler
    .stamps.json          size, time and inode of each file when its hash was last found right on this machine

Nothing in a bundle is ever unpickled.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgate_trt.errors import BundleError, InputError
from tgate_trt.schedule import GateStep
from tgate_trt.specs import Bounds, GraphSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

SCHEMA = 2
"""Version of the manifest's form; a bundle of another one is built again."""

MANIFEST = "manifest.json"
STAMPS = ".stamps.json"
TRACE = "trace.onnx"
PIPELINE = "pipeline"

BESIDE = ".tgate-trt"
"""Folder beside bundles of what they share: logs of builders, timing caches, kernels compiled for the GPU at hand."""

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@dataclass(frozen=True)
class EngineSet:
    """The engines of one backend."""

    files: Mapping[str, str]
    """File of each graph's engine."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What they were built for: options of the backend, ``weights`` among them."""
    built_with: Mapping[str, str] = field(default_factory=dict)
    """Versions of the packages that made them, beside those that made the graphs."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """By graph, a hash of everything that decides what an engine is: engines of one key stand for each other."""


@dataclass(frozen=True)
class Manifest:
    """What a bundle is, what it was built from, with and for."""

    model: Mapping[str, Any]
    """``name``, ``content`` (hash of what it was built from), ``source`` (its files), ``random_seed``, ``attribute`` of the denoiser in
    a pipeline, ``text_tokens`` of a prompt, ``components`` (graphs that its text encoders and VAE can become)."""
    built_for: Mapping[str, Any]
    """What was asked for: ``precision``, ``height``, ``width``, ``batch_size`` …"""
    built_with: Mapping[str, str]
    """Versions of the packages that made the graphs."""
    graphs: Mapping[str, GraphSpec]
    engines: Mapping[str, EngineSet]
    """By backend."""
    verification: Mapping[str, Any]
    """What was compared with eager PyTorch, by graph; empty where the build was told not to."""
    gate_step: GateStep | None
    """The model's default, or None if it has none."""
    steps: int
    """The model's default number of sampling steps."""
    guidance_scale: float | None
    """The model's default, or None for the pipeline's."""
    lora: Sequence[Mapping[str, Any]] = field(default_factory=list)
    """LoRAs that were put in after the build: ``file`` in the bundle, ``scale``, and the ``name`` that the file had."""
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """``size`` in bytes and ``sha256`` of every file, by path in the bundle."""

    @property
    def batch_size(self) -> Bounds:
        """Images a run may have."""
        return Bounds.parse(self.built_for["batch_size"])

    def to_json(self) -> dict[str, Any]:
        """This manifest as plain JSON data."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        data["graphs"] = {name: spec.to_json() for name, spec in self.graphs.items()}
        data["engines"] = {backend: dict(vars(engines)) for backend, engines in self.engines.items()}
        return {"schema": SCHEMA, **data}

    @classmethod
    def from_json(cls, data: Any) -> Manifest:
        """Read what `to_json` wrote.

        Raises:
            BundleError: if the data has another form or schema version.
        """
        if not isinstance(data, dict) or "schema" not in data:
            raise BundleError("its manifest.json is not one of tgate-trt")
        if data["schema"] != SCHEMA:
            raise BundleError(f"its manifest has schema version {data['schema']!r}, this version reads {SCHEMA}; build it again")
        fields = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
        missing = set(cls.__dataclass_fields__) - set(fields)
        if missing:
            raise BundleError(f"its manifest lacks {', '.join(sorted(missing))}")
        try:
            fields["graphs"] = {name: GraphSpec.from_json(name, graph) for name, graph in data["graphs"].items()}
            fields["engines"] = {backend: EngineSet(**engines) for backend, engines in data["engines"].items()}
            return cls(**fields)
        except (AttributeError, TypeError) as error:
            raise BundleError(f"its manifest is not in the form of schema {SCHEMA}: {error}") from error


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose manifest has been read and whose files are there as it says."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, full: bool = False) -> Bundle:
        """Open a bundle, checking every file's size, and its hash unless that was found right before.

        Args:
            folder: the bundle.
            full: hash every file, whatever its stamp says.

        Raises:
            BundleError: if the bundle is missing, foreign, damaged or of another version.
        """
        path = Path(folder)
        _mend(path)
        try:
            bundle = cls(path, _read_manifest(path))
            bundle._check_files(full)
        except BundleError as error:
            raise BundleError(f"{path}: {error}") from error
        return bundle

    @property
    def pipeline(self) -> Path:
        """The diffusers folder of everything but the denoiser's weights."""
        return self.folder / PIPELINE

    def denoiser_on_meta(self, dtype: torch.dtype) -> nn.Module:
        """The denoiser's architecture on the ``meta`` device: what a pipeline reads of it besides calling it."""
        import diffusers
        import torch

        config = json.loads((self.pipeline / self.manifest.model["attribute"] / "config.json").read_text(encoding="utf-8"))
        kind = getattr(diffusers, config["_class_name"])
        with torch.device("meta"):
            denoiser: nn.Module = kind.from_config(config)
        return torch.nn.Module.to(denoiser.eval(), dtype).requires_grad_(False)

    def graph(self, name: str) -> GraphSpec:
        """The spec of a graph.

        Raises:
            BundleError: if the bundle does not hold it.
        """
        if name not in self.manifest.graphs:
            raise BundleError(f"{self.folder} holds no {name} graph; build it with --graphs {','.join([*self.manifest.graphs, name])}")
        return self.manifest.graphs[name]

    def _check_files(self, full: bool) -> None:
        stamps = {} if full else _read_stamps(self.folder)
        found = {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if not path.is_dir()}
        foreign = sorted(found - set(self.manifest.files) - {MANIFEST, STAMPS})
        if foreign:
            raise BundleError(f"{foreign[0]} is not of this bundle; take it away")
        fresh = {}
        for name, expected in self.manifest.files.items():
            path = self.folder / name
            if name not in found or path.is_symlink():
                raise BundleError(f"{name} is missing; build the bundle again with --force")
            size = path.stat().st_size
            if size != expected["size"]:
                raise BundleError(f"{name} has {size} bytes instead of {expected['size']}; build the bundle again with --force")
            fresh[name] = stamp(path)
            if stamps.get(name) != fresh[name] and sha256(path) != expected["sha256"]:
                raise BundleError(f"{name} is not what was built (its sha256 differs); build the bundle again with --force")
        if fresh != stamps:
            write_stamps(self.folder, fresh)


def stamp(path: Path) -> list[int]:
    """Size, modification time in ns and inode: what changes when a file does."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def sha256(path: Path) -> str:
    """Hash of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_files(folder: Path, known: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Mapping[str, Any]]:
    """``size`` and ``sha256`` of every file of a folder but the manifest and the stamps, by path.

    Args:
        folder: of a bundle.
        known: of files that are there unchanged, so that they need not be read again.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST, STAMPS))
    names = {str(path.relative_to(folder)): path for path in paths}
    return {name: (known or {}).get(name) or {"size": path.stat().st_size, "sha256": sha256(path)} for name, path in names.items()}


def copy_into(bundle: Bundle, folder: Path) -> None:
    """Put the files of a bundle into an empty folder, without a copy of their bytes where the file system can link them."""
    for name in bundle.manifest.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(bundle.folder / name, folder / name)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where that cannot be."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest, whole or not at all, and the stamps of the files that it names."""
    replace_file(folder / MANIFEST, json.dumps(manifest.to_json(), indent=2) + "\n")
    write_stamps(folder, {name: stamp(folder / name) for name in manifest.files})


def write_stamps(folder: Path, stamps: Mapping[str, list[int]]) -> None:
    """Remember that these files were found right; a folder that cannot be written is hashed again next time."""
    with contextlib.suppress(OSError):
        replace_file(folder / STAMPS, json.dumps(stamps))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write that takes the place of ``path`` if the block ends well: readers see the old one or the new one."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def replace_file(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def building(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its place if the block ends well, and vanishes if not.

    The two are exchanged in one step where the system can (`renameat2`), so a build that is killed leaves the old
    bundle whole.

    Raises:
        InputError: if ``target`` exists and is no bundle, or cannot be written.
    """
    target = target.absolute()
    _mend(target)
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


def _mend(target: Path) -> None:
    """Finish an exchange by two renames that was cut off between them."""
    if not target.exists() and _set_aside(target).exists():
        _set_aside(target).rename(target)


def _read_manifest(folder: Path) -> Manifest:
    if not folder.is_dir():
        raise BundleError("there is no such folder; build a bundle with tgate-build")
    try:
        data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(f"it is not a bundle: it has no {MANIFEST}; build one with tgate-build") from None
    except (OSError, ValueError) as error:
        raise BundleError(f"its {MANIFEST} cannot be read ({error}); build the bundle again with --force") from error
    return Manifest.from_json(data)


def _read_stamps(folder: Path) -> dict[str, Any]:
    try:
        stamps = json.loads((folder / STAMPS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamps if isinstance(stamps, dict) else {}

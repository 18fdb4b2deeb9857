"""A bundle: one folder with everything that draws pictures, and its manifest.

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
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from tgate_trt.bundle.folder import GUESTS, mend
from tgate_trt.bundle.manifest import BESIDE, MANIFEST, PIPELINE, STAMPS, HeldFile, Manifest
from tgate_trt.eager import on_meta
from tgate_trt.errors import BundleError, InputError
from tgate_trt.export.weights import files_of
from tgate_trt.files import link_or_copy, read_json, replace_file, sha256, stamp
from tgate_trt.specs import GraphSpec


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose files match its manifest."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, full: bool = False) -> Bundle:
        """Open a bundle, checking every file's size, and its hash unless that was found right before.

        Args:
            folder: the bundle.
            full: hash every file, even if its stamp is unchanged.

        Raises:
            BundleError: if the bundle is missing, foreign, damaged or of another version.
        """
        path = Path(folder)
        mend(path)
        try:
            bundle = cls(path, _read_manifest(path))
            bundle._check_files(full)
        except BundleError as error:
            raise BundleError(f"{path}: {error}") from error
        return bundle

    def with_manifest(self, manifest: Manifest) -> Bundle:
        """The bundle with another manifest of the same files, which is written; call it under `tgate_trt.bundle.folder.locked`.

        Raises:
            InputError: if the folder cannot be written.
        """
        try:
            write_manifest(self.folder, manifest)
        except OSError as error:
            raise InputError(f"cannot write to {self.folder}: {error.strerror}; copy the bundle to a place of your own") from error
        return Bundle(self.folder, manifest)

    @property
    def pipeline(self) -> Path:
        """The diffusers folder of everything but the denoiser's weights."""
        return self.folder / PIPELINE

    def denoiser_on_meta(self, dtype: torch.dtype) -> nn.Module:
        """The denoiser's architecture on the ``meta`` device, with the attributes that a pipeline reads."""
        config = self.denoiser_config()
        return nn.Module.to(on_meta(config["_class_name"], config), dtype).requires_grad_(False)

    def denoiser_config(self) -> dict[str, Any]:
        """The denoiser's configuration, with its class."""
        return read_json(self.pipeline / self.manifest.model.attribute / "config.json")

    def graph(self, name: str) -> GraphSpec:
        """The spec of a graph.

        Raises:
            BundleError: if the bundle lacks it.
        """
        if name not in self.manifest.graphs:
            raise BundleError(f"{self.folder} holds no {name} graph; build it with --graphs {','.join([*self.manifest.graphs, name])}")
        return self.manifest.graphs[name]

    def load_graph(self, file: str) -> ir.Model:
        """Load a graph or the trace, whose weights are in files of this bundle.

        Raises:
            BundleError: if it names another file, whose hash the manifest does not have.
        """
        model = ir.load(self.folder / file)
        foreign = sorted(files_of(model) - set(self.manifest.files))
        if foreign:
            raise BundleError(f"{self.folder}: {file} takes weights from {foreign[0]!r}, which is not part of this bundle; build it again")
        return model

    def _check_files(self, full: bool) -> None:
        stamps = {} if full else _read_stamps(self.folder)
        found = {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if not path.is_dir()}
        guests = {name for name in found if name.partition("/")[0] in (*GUESTS, BESIDE)}
        foreign = sorted(found - guests - set(self.manifest.files) - {MANIFEST, STAMPS})
        if foreign:
            raise BundleError(f"{foreign[0]} is not part of this bundle; remove it")
        fresh = {}
        for name, expected in self.manifest.files.items():
            path = self.folder / name
            if name not in found:
                raise BundleError(f"{name} is missing; build the bundle again with --force")
            if not _stays_in(path.resolve(), self.folder.resolve()):
                raise BundleError(f"{name} is a link out of the bundle; put the file itself there")
            size = path.stat().st_size
            if size != expected.size:
                raise BundleError(f"{name} has {size} bytes instead of {expected.size}; build the bundle again with --force")
            fresh[name] = stamp(path)
            if stamps.get(name) != fresh[name] and sha256(path) != expected.sha256:
                raise BundleError(f"{name} is not what was built (its sha256 differs); build the bundle again with --force")
        for name in self.manifest.files:
            if name.endswith(".index.json"):
                _check_index(self.folder / name)
        if fresh != stamps:
            write_stamps(self.folder, fresh)


def _stays_in(file: Path, folder: Path) -> bool:
    """Whether a file is in a folder, or among the blobs to which the snapshots of the hub's cache link.

    Args:
        file: with its links resolved.
        folder: with its links resolved.
    """
    blobs = [parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots"]
    return file.is_relative_to(folder) or file.parent in blobs


def _check_index(index: Path) -> None:
    """Check that an index of shards names files of its own folder alone.

    Raises:
        BundleError: if it names another file.
    """
    files = read_json(index).get("weight_map", {}).values()
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            raise BundleError(f"{index.name} names {file!r}, which is not in its folder; build the bundle again with --force")


def describe_files(folder: Path, known: Mapping[str, HeldFile] | None = None) -> dict[str, HeldFile]:
    """Size and hash of every file of a folder but the manifest and the stamps, by path.

    Args:
        folder: of a bundle.
        known: records of files that are unchanged, which are not read again.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST, STAMPS))
    names = {str(path.relative_to(folder)): path for path in paths}
    return {name: (known or {}).get(name) or HeldFile(path.stat().st_size, sha256(path)) for name, path in names.items()}


def copy_into(bundle: Bundle, folder: Path) -> None:
    """Link the files of a bundle into an empty folder; copy them where the file system cannot link."""
    for name in bundle.manifest.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(bundle.folder / name, folder / name)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest, whole or not at all, and the stamps of the files that it names."""
    replace_file(folder / MANIFEST, json.dumps(manifest.to_json(), indent=2) + "\n")
    write_stamps(folder, {name: stamp(folder / name) for name in manifest.files})


def write_stamps(folder: Path, stamps: Mapping[str, list[int]]) -> None:
    """Record that these files matched their hashes; a folder that cannot be written is hashed again next time."""
    with contextlib.suppress(OSError):
        replace_file(folder / STAMPS, json.dumps(stamps))


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

"""Files: hashes, atomic writes, JSON, and safetensors, read and written one tensor at a time. Nothing is unpickled."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgate_trt.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_STEMS = ("diffusion_pytorch_model", "model")
"""Names of weights files in diffusers and in transformers."""
_VARIANTS = ("", ".fp32", ".fp16", ".bf16")
"""Variants of weights files, the most precise first."""
HEADER_LENGTH_BYTES = 8
"""A safetensors file begins with the length of its header, a number of so many bytes."""
_SHARD_BYTES = 1 << 30
"""Limit in bytes of the weights in memory while a component is written."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: if the file is missing or is no JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; the model is incomplete, download it again") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); download the model again") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} holds no JSON object; download the model again")
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object with sorted keys."""
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one component: a single file or all shards.

    Raises:
        InputError: if the folder has none, has only pickled weights, or lacks a shard.
    """
    for variant in _VARIANTS:
        for stem in _STEMS:
            single = folder / f"{stem}{variant}.safetensors"
            if single.is_file():
                return [single]
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if index.is_file():
                return _shards(index)
    if any(folder.glob("*.bin")) or any(folder.glob("*.ckpt")):
        raise InputError(
            f"{folder} holds pickled weights only, which can run code when they are read; if you trust them, convert them with "
            "diffusers: DiffusionPipeline.from_pretrained(old).save_pretrained(new)"
        )
    raise InputError(f"{folder} holds no .safetensors weights; download the model again, or build with --random-weights")


def _shards(index: Path) -> list[Path]:
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    paths = [index.parent / Path(name).name for name in names]
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path} is missing, which {index.name} names; download the model again")
    return paths


def read_tensors(files: Sequence[Path], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """Read the tensors of a model one at a time.

    Args:
        files: safetensors files that together hold the tensors.
        shapes: the tensors to read, in this order, with the shapes that they must have.

    Raises:
        InputError: if a file is not a whole safetensors file, or a tensor is missing or has another shape.
    """
    with contextlib.ExitStack() as stack:
        holders = {name: opened for path in files for opened in [stack.enter_context(opened_file(path))] for name in opened.keys()}  # noqa: SIM118
        for name, shape in shapes.items():
            if name not in holders:
                raise InputError(f"{files[0].parent} lacks the tensor {name!r}, which its config.json calls for; download the model again")
            tensor: Tensor = holders[name].get_tensor(name)
            if tuple(tensor.shape) != shape:
                raise InputError(
                    f"{name!r} in {files[0].parent} has shape {tuple(tensor.shape)}, but its config.json calls for {shape}; "
                    "download the model again"
                )
            yield name, tensor


def read_named(files: Sequence[Path], names: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Read the tensors of safetensors files one at a time, in the order of the files.

    Args:
        files: files to read.
        names: names of the tensors to read; all if None.

    Raises:
        InputError: if a file is not a whole safetensors file.
    """
    for path in files:
        with opened_file(path) as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                if names is None or name in names:
                    yield name, file.get_tensor(name)


@contextlib.contextmanager
def opened_file(path: Path) -> Iterator[Any]:
    """A memory-mapped safetensors file.

    Raises:
        InputError: if it is not a whole safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise InputError(_not_whole(path, error)) from error
    with opened as file:
        yield file


@dataclass(frozen=True)
class Place:
    """The place of one tensor in a safetensors file."""

    offset: int
    """Bytes from the start of the file."""
    length: int
    """Bytes."""
    shape: tuple[int, ...]


def places_of(path: Path) -> dict[str, Place]:
    """The place of each tensor in a safetensors file, from the file's header; the library safetensors does not return offsets.

    Raises:
        InputError: if the file is not a whole safetensors file.
    """
    try:
        with path.open("rb") as file:
            size, length = path.stat().st_size, int.from_bytes(file.read(HEADER_LENGTH_BYTES), "little")
            if length > size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        places = {}
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = (HEADER_LENGTH_BYTES + length + offset for offset in entry["data_offsets"])
                if end > size:
                    raise ValueError(f"it ends before {name!r} does")
                places[name] = Place(begin, end - begin, tuple(entry["shape"]))
        return places
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(_not_whole(path, error)) from error


def shapes_of(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in safetensors files, from the files' headers.

    Raises:
        InputError: if a file is not a whole safetensors file.
    """
    return {name: place.shape for path in files for name, place in places_of(path).items()}


def _not_whole(path: Path, error: Exception) -> str:
    return f"{path} is not a whole safetensors file ({error}); download it again, or build its bundle again"


def write_component(folder: Path, stem: str, tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> None:
    """Write a component's weights as safetensors, large ones in shards with the index that loaders expect.

    Args:
        folder: the component's folder, which is made if it does not exist.
        stem: ``"diffusion_pytorch_model"`` or ``"model"``.
        tensors: names and values.
        dtype: the dtype of floating tensors in the files.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = []
    total = 0
    for shard in _in_shards(tensors, dtype):
        save_file(shard, folder / f"{stem}.{len(shards)}.partial", metadata={"format": "pt"})
        shards.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(shards) == 1:
        (folder / f"{stem}.0.partial").rename(folder / f"{stem}.safetensors")
        return
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        file = f"{stem}-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{stem}.{index}.partial").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _in_shards(tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """Cast tensors and collect them in shards, of which only one is in memory at a time."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        cast = (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        if shard and size + cast.nbytes > _SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = cast
        size += cast.nbytes
    yield shard


def stamp(path: Path) -> list[int]:
    """Size in bytes, modification time in ns and inode, which change when the file does."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def sha256(path: Path) -> str:
    """Hash of a file, which is read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link_or_copy(source: Path, target: Path) -> None:
    """Make a hard link to a file, or copy it where links are impossible."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def cache_folder(name: str) -> Path:
    """A folder of this package in the user's cache, which need not be there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tgate-trt" / name


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which replaces ``path`` when the block ends without an exception: readers see the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def replace_file(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")

"""Files: hashes, atomic writes, JSON, and safetensors that are read and written a tensor at a time; nothing is unpickled."""

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
"""File names of weights, by diffusers and by transformers."""
_VARIANTS = ("", ".fp32", ".fp16", ".bf16")
"""Variants that a folder may hold, the one with all digits first."""
HEADER_LENGTH_BYTES = 8
"""Bytes of the number with which a safetensors file begins: the length of its header."""
_SHARD_BYTES = 1 << 30
"""Most bytes of weights that are held while a component is written."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: if the file is missing or holds something else.
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
    """Write a JSON object, its keys sorted."""
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one component: one, or all shards.

    Raises:
        InputError: if there are none, or only pickled ones.
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


def read_tensors(files: Sequence[Path], shapes: Mapping[str, tuple[int, ...]] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Read tensors one at a time from memory-mapped files.

    Args:
        files: safetensors files, which together hold the tensors.
        shapes: names in the order in which to give them, and the shapes that they must have; all as they lie if None.

    Raises:
        InputError: if a file is no safetensors, or a tensor is missing or of another shape.
    """
    with contextlib.ExitStack() as stack:
        holders = {name: opened for path in files for opened in [stack.enter_context(opened_file(path))] for name in opened.keys()}  # noqa: SIM118
        for name in shapes or holders:
            if name not in holders:
                raise InputError(f"{files[0].parent} lacks the tensor {name!r}, which its config.json calls for; download the model again")
            tensor: Tensor = holders[name].get_tensor(name)
            if shapes and tuple(tensor.shape) != shapes[name]:
                raise InputError(
                    f"{name!r} in {files[0].parent} has shape {tuple(tensor.shape)}, but its config.json calls for {shapes[name]}"
                )
            yield name, tensor


def read_named(files: Sequence[Path], names: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Read the tensors of safetensors files one at a time, as they lie.

    Args:
        files: to read.
        names: of the tensors to read; all if None.

    Raises:
        InputError: if a file is no safetensors.
    """
    for path in files:
        with opened_file(path) as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                if names is None or name in names:
                    yield name, file.get_tensor(name)


@contextlib.contextmanager
def opened_file(path: Path) -> Iterator[Any]:
    """A safetensors file, memory-mapped.

    Raises:
        InputError: if it is something else, or truncated.
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
    """Where one tensor lies in a safetensors file."""

    offset: int
    """Bytes from the start of the file."""
    length: int
    """Bytes."""
    shape: tuple[int, ...]


def places_of(path: Path) -> dict[str, Place]:
    """Where each tensor of a safetensors file lies, read from the file's header; safetensors itself does not give offsets.

    Raises:
        InputError: if the file is no safetensors.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(HEADER_LENGTH_BYTES), "little")
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        start = HEADER_LENGTH_BYTES + length
        return {
            name: Place(start + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0], tuple(entry["shape"]))
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(_not_whole(path, error)) from error


def shapes_of(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of safetensors files, from their headers.

    Raises:
        InputError: if a file is no safetensors.
    """
    return {name: place.shape for path in files for name, place in places_of(path).items()}


def _not_whole(path: Path, error: Exception) -> str:
    return f"{path} is not a whole safetensors file ({error}); download it again, or build its bundle again"


def write_component(folder: Path, stem: str, tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> None:
    """Write a component's weights as safetensors, in shards if they are large, with the index that loaders expect.

    Args:
        folder: of the component; is made.
        stem: ``"diffusion_pytorch_model"`` or ``"model"``.
        tensors: names and values.
        dtype: to which floating tensors are cast.
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
    data = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _in_shards(tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """Gather cast tensors into shards; a shard is dropped before the next begins."""
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
    """Size, modification time in ns and inode: what changes when a file does."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def sha256(path: Path) -> str:
    """Hash of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where that cannot be."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


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

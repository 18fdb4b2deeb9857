"""Reading and writing a component's safetensors files without holding the whole component; nothing is unpickled."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
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
        raise InputError(f"{path} is not a whole safetensors file ({error}); download it again") from error
    with opened as file:
        yield file


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

"""Weights beside graphs: one safetensors file, written a tensor at a time, to which graphs refer by offset.

The file holds the denoiser's state dict under diffusers' own names, shapes and layouts, so that any tool can read it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from tgate_trt.eager import torch_dtype
from tgate_trt.errors import BuildError
from tgate_trt.files import HEADER_LENGTH_BYTES, places_of

WEIGHTS_FILE = "weights.safetensors"

_SAFETENSORS_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
_ALIGNMENT = 64
"""Bytes to which the data section is aligned, so that vector loads can read a memory map of it."""


def write(path: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[tuple[str, Tensor]], precision: str) -> None:
    """Write a safetensors file without holding more than one tensor in memory.

    safetensors' own writer takes all tensors at once, which would double the memory that a build of SDXL needs.

    Args:
        path: file to write.
        shapes: every tensor's shape, in the order of ``tensors``.
        tensors: names and values, floating ones in the dtype of ``precision``.
        precision: ``"fp32"``, ``"fp16"`` or ``"bf16"``.

    Raises:
        BuildError: if the tensors differ from ``shapes`` in name, order or shape, or have another dtype.
    """
    dtype = torch_dtype(precision)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        length = dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + length]}
        offset += length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(HEADER_LENGTH_BYTES + len(text)) % _ALIGNMENT)
    expected = iter(shapes.items())
    with path.open("wb") as file:
        file.write(len(text).to_bytes(HEADER_LENGTH_BYTES, "little") + text)
        for name, tensor in tensors:
            if (name, tuple(tensor.shape)) != next(expected, None) or tensor.dtype != dtype:
                raise BuildError(
                    f"the weights hold {name!r} as {tensor.dtype} {tuple(tensor.shape)}, which the architecture does not expect; "
                    "download the model again"
                )
            tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tofile(file)
    missing = next(expected, None)
    if missing is not None:
        raise BuildError(f"the weights lack {missing[0]!r}, which the architecture expects; download the model again")


def files_of(model: ir.Model) -> set[str]:
    """The files of weights that a graph names, relative to its own folder."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return {str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}


def attach(
    model: ir.Model,
    folder: Path,
    files: Sequence[Path],
    names_in_files: Callable[[str], Sequence[str]] = lambda name: (name,),
    hint: str = "build the bundle again with --force",
) -> None:
    """Point each parameter of a graph at its place in safetensors files, and give it the name that it has there.

    Args:
        model: a graph from `tgate_trt.export.trace` or `tgate_trt.export.cut`, whose initializers without data are parameters by name.
        folder: where the graph is to be saved.
        files: safetensors files in that folder or below it, which together hold the parameters.
        names_in_files: the names that a parameter may have in the files, the likeliest first.
        hint: what to do if a parameter is not there.

    Raises:
        BuildError: if a parameter is in none of the files, or has another shape or dtype there.
        InputError: if a file is not a whole safetensors file.
    """
    places = {name: (file, place) for file in files for name, place in places_of(file).items()}
    for name, value in list(model.graph.initializers.items()):
        if not isinstance(value.const_value, ir.ExternalTensor):
            continue
        assert value.shape is not None and value.dtype is not None
        stored = next((candidate for candidate in names_in_files(name) if candidate in places), None)
        if stored is None or places[stored][1].shape != tuple(value.shape.numpy()):
            raise BuildError(f"the weights in {folder} do not hold {name!r} with shape {value.shape}; {hint}")
        file, place = places[stored]
        if place.length != value.dtype.itemsize * math.prod(place.shape):
            raise BuildError(f"the weights in {folder} hold {stored!r} in another dtype than {value.dtype.name}; {hint}")
        model.graph.initializers.pop(name)
        value.name = stored
        location, shape = os.path.relpath(file, folder), ir.Shape(place.shape)
        value.const_value = ir.ExternalTensor(location, place.offset, place.length, value.dtype, shape=shape, name=stored, base_dir=folder)
        model.graph.register_initializer(value)

"""One file of weights for every graph: safetensors, written a tensor at a time, referred to by offset.

The file holds the denoiser's state dict under diffusers' own names, shapes and layouts, so that any tool reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from tgate_trt.eager import torch_dtype
from tgate_trt.errors import BuildError
from tgate_trt.files import HEADER_LENGTH_BYTES, Place

WEIGHTS_FILE = "weights.safetensors"

_SAFETENSORS_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
_ALIGNMENT = 64
"""Bytes to which the data section is aligned, so that a memory map of it can be read by vector loads."""


def write(path: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[tuple[str, Tensor]], precision: str) -> None:
    """Write a safetensors file without holding more than one tensor in memory.

    safetensors' own writer wants all tensors at once, which for SDXL would double the memory of a build.

    Args:
        path: file to write.
        shapes: every tensor's shape, in the order in which ``tensors`` gives them.
        tensors: names and values, floating ones in the dtype of ``precision``.
        precision: ``"fp32"``, ``"fp16"`` or ``"bf16"``.

    Raises:
        BuildError: if the tensors do not come as ``shapes`` says.
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
                    f"the weights hold {name!r} as {tensor.dtype} {tuple(tensor.shape)}, which the architecture does not expect"
                )
            tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tofile(file)
    missing = next(expected, None)
    if missing is not None:
        raise BuildError(f"the weights lack {missing[0]!r}, which the architecture expects")


def attach(model: ir.Model, places: Mapping[str, Place], folder: Path) -> None:
    """Point each parameter of a graph at its place in the weights file.

    Args:
        model: a graph whose initializers without data are parameters by name.
        places: of the weights file, from `tgate_trt.files.places_of`.
        folder: folder of the weights file, where the graph is to be saved too.

    Raises:
        BuildError: if the file holds a parameter of another shape, or lacks one.
    """
    for name, value in model.graph.initializers.items():
        if not isinstance(value.const_value, ir.ExternalTensor):
            continue
        place = places.get(name)
        if place is None or value.shape is None or place.shape != tuple(value.shape.numpy()):
            raise BuildError(f"the weights file does not hold {name!r} with shape {value.shape}")
        assert value.dtype is not None
        value.const_value = ir.ExternalTensor(
            WEIGHTS_FILE, place.offset, place.length, value.dtype, shape=ir.Shape(place.shape), name=name, base_dir=folder
        )

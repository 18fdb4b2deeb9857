"""Text encoders and VAE decoders of diffusers' pipelines as graphs, their weights where the pipeline's own files hold them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from tgate_trt.errors import BuildError
from tgate_trt.export.trace import trace_module
from tgate_trt.files import places_of
from tgate_trt.specs import TensorSpec

LAST, PENULTIMATE, POOLED = "last_hidden_state", "penultimate_hidden_state", "text_embeds"
"""What a text encoder's graph can give: its output, the last layer's input, and the projected state of the end token."""

PIXELS = "pixels"

_RENAMED = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
"""Names that diffusers' attention layers had in files of before 2023, by those that they have now."""


class TextEncoder(nn.Module):
    """A CLIP text encoder of transformers that takes ids by position and gives what is asked for."""

    def __init__(self, model: nn.Module, outputs: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.outputs = tuple(outputs)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Encode ids ``[rows, tokens]`` int64; states are ``[rows, tokens, width]``, the pooled one ``[rows, width]``."""
        (input_ids,) = inputs
        inner: Any = getattr(self.model, "text_model", self.model)
        seen: dict[str, Tensor] = {}

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[PENULTIMATE] = args[0] if args else kwargs["hidden_states"]

        # The positions' buffer is computed, so it is in no file: here they are part of the graph.
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        hook = inner.encoder.layers[-1].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            found = self.model(input_ids, position_ids=positions)
        finally:
            hook.remove()
        seen[LAST] = found.last_hidden_state
        if POOLED in self.outputs:
            seen[POOLED] = found.text_embeds
        return tuple(seen[name] for name in self.outputs)


class VaeDecoder(nn.Module):
    """The decoder of an `AutoencoderKL`."""

    def __init__(self, model: nn.Module, outputs: Sequence[str] = (PIXELS,)) -> None:
        super().__init__()
        self.model = model
        self.outputs = tuple(outputs)

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        """Decode latents ``[rows, channels, height, width]``, not scaled, to pixels ``[rows, 3, height, width]`` from -1 to 1."""
        (latents,) = inputs
        model: Any = self.model
        return (model.decode(latents, return_dict=False)[0],)


def trace_component(module: TextEncoder | VaeDecoder, inputs: Sequence[TensorSpec], images: int) -> ir.Model:
    """Trace a component for at most so many images; see `tgate_trt.export.trace.trace_module`.

    A decoder's trace does not hold for every number: from 2³¹ numbers in a feature map on, diffusers' takes another path.
    """
    return trace_module(module, "model", inputs, module.outputs, max(images, 2))


def run_component(module: TextEncoder | VaeDecoder, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the graph of a component must give, computed by the eager model."""
    with torch.no_grad():
        return dict(zip(module.outputs, module(*inputs.values()), strict=True))


def attach(model: ir.Model, folder: Path, files: Sequence[Path]) -> None:
    """Point each parameter of a component's graph at its place in the pipeline's own files, and give it its name there.

    Args:
        model: from `trace_component`.
        folder: where the graph is to be saved.
        files: the component's safetensors files, below that folder.

    Raises:
        BuildError: if a parameter is in none of them, or has another shape or dtype there.
    """
    places = {name: (file, place) for file in files for name, place in places_of(file).items()}
    for name, value in list(model.graph.initializers.items()):
        if not isinstance(value.const_value, ir.ExternalTensor):
            continue
        stored = next((candidate for candidate in _names(name) if candidate in places), None)
        assert value.shape is not None and value.dtype is not None
        if stored is None or places[stored][1].shape != tuple(value.shape.numpy()):
            raise BuildError(f"the pipeline's files do not hold {name!r} with shape {value.shape}; build with --no-components")
        file, place = places[stored]
        if place.length != value.dtype.itemsize * math.prod(place.shape):
            raise BuildError(f"the pipeline's files hold {stored!r} in another dtype than {value.dtype.name}; build with --no-components")
        model.graph.initializers.pop(name)
        value.name = stored
        location = os.path.relpath(file, folder)
        value.const_value = ir.ExternalTensor(
            location, place.offset, place.length, value.dtype, shape=ir.Shape(place.shape), name=stored, base_dir=folder
        )
        model.graph.register_initializer(value)


def _names(name: str) -> list[str]:
    """What a parameter may be called in a file: transformers 5 leaves out a prefix that files have."""
    names = [name, f"text_model.{name}"]
    for new, old in _RENAMED.items():
        if f".attentions.0.{new}." in name:
            names.append(name.replace(f".{new}.", f".{old}."))
    return names

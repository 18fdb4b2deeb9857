"""Text encoders and VAE decoders of diffusers' pipelines as graphs, whose weights stay in the pipeline's own files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from tgate_trt.export.trace import trace_module
from tgate_trt.specs import Bounds, TensorSpec

LAST, PENULTIMATE, POOLED = "last_hidden_state", "penultimate_hidden_state", "text_embeds"
"""Outputs that a text encoder's graph can have: its last state, the last layer's input, and the projected state of the end token."""

PIXELS = "pixels"

_RENAMED = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
"""Names of the layers of diffusers' attention in files from before 2023, by today's names."""


class TextEncoder(nn.Module):
    """A CLIP text encoder of transformers that takes token ids by position and returns the outputs that it is made for."""

    def __init__(self, model: nn.Module, outputs: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.outputs = tuple(outputs)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Encode token ids ``[rows, tokens]`` int64 to states ``[rows, tokens, width]`` and the pooled state ``[rows, width]``."""
        (input_ids,) = inputs
        inner: Any = getattr(self.model, "text_model", self.model)
        seen: dict[str, Tensor] = {}

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[PENULTIMATE] = args[0] if args else kwargs["hidden_states"]

        # The model keeps positions in a buffer that no file holds, so the graph computes them.
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

    outputs = (PIXELS,)

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        """Decode unscaled latents ``[rows, channels, height, width]`` to pixels ``[rows, 3, height, width]`` from -1 to 1."""
        (latents,) = inputs
        model: Any = self.model
        return (model.decode(latents, return_dict=False)[0],)


def trace_component(
    module: TextEncoder | VaeDecoder, inputs: Sequence[TensorSpec], images: int, dimensions: Mapping[str, Bounds] | None = None
) -> ir.Model:
    """Trace a component; see `tgate_trt.export.trace.trace_module`.

    Args:
        module: the component, its model on the ``meta`` device; it is used up.
        inputs: what the component takes.
        images: the largest batch. A decoder's trace does not hold for every batch: diffusers takes another path where a feature map
            has 2³¹ elements or more.
        dimensions: bounds of the further dimensions that the inputs name.

    Raises:
        BuildError: if PyTorch cannot trace or translate the component.
    """
    return trace_module(module, "model", inputs, module.outputs, max(images, 2), dimensions)


def run_component(module: TextEncoder | VaeDecoder, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute with the eager model what the component's graph must return: outputs by name, for inputs in the graph's order."""
    with torch.no_grad():
        return dict(zip(module.outputs, module(*inputs.values()), strict=True))


def names_in_files(name: str) -> list[str]:
    """The names that a parameter of a component's graph may have in the pipeline's files.

    transformers 5 omits a prefix that files have, and diffusers has renamed its attention layers.
    """
    names = [name, f"text_model.{name}"]
    for new, old in _RENAMED.items():
        if f".attentions.0.{new}." in name:
            names.append(name.replace(f".{new}.", f".{old}."))
    return names

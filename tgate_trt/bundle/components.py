"""The parts of a pipeline beside its denoiser that become graphs, and the files of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tgate_trt.bundle.bundle import Bundle
from tgate_trt.bundle.manifest import PIPELINE, BuiltFor
from tgate_trt.eager import LOADING, on_meta
from tgate_trt.export.components import LAST, PENULTIMATE, PIXELS, POOLED, TextEncoder, VaeDecoder
from tgate_trt.export.weights import WEIGHTS_FILE
from tgate_trt.files import read_json
from tgate_trt.models.signature import precision_of_component
from tgate_trt.models.source import INDEX
from tgate_trt.specs import DTYPES, HEIGHT, ROWS, WIDTH, GraphSpec, TensorSpec, times
from tgate_trt.taps import is_of_denoiser

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")

VAE_DECODER = "vae_decoder"

_SD = {"text_encoder": (LAST,), VAE_DECODER: (PIXELS,)}

_SDXL = {"text_encoder": (LAST, PENULTIMATE), "text_encoder_2": (POOLED, PENULTIMATE), VAE_DECODER: (PIXELS,)}

_OUTPUTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "StableDiffusionPipeline": _SD,
    "LatentConsistencyModelPipeline": _SD,
    "StableDiffusionXLPipeline": _SDXL,
}
"""What each family of pipelines reads of its components, by graph."""

_KINDS = ("CLIPTextModel", "CLIPTextModelWithProjection", "AutoencoderKL")


@dataclass(frozen=True)
class Component:
    """A part of a pipeline that becomes a graph."""

    graph: str
    name: str
    """Of the pipeline's component, and of its folder."""
    outputs: tuple[str, ...]
    config: Mapping[str, Any]
    kind: str
    """Class in transformers or diffusers."""

    def wrap(self, model: nn.Module) -> TextEncoder | VaeDecoder:
        """The model behind the graph's inputs and outputs."""
        return VaeDecoder(model) if self.graph == VAE_DECODER else TextEncoder(model, self.outputs)

    def precision(self, precision: str) -> str:
        """That of its graph in a bundle of a precision."""
        return precision_of_component(self.config, precision)

    def spec(self, built_for: BuiltFor, tokens: int, signature: GraphSpec) -> GraphSpec:
        """What its graph takes and gives, for prompts of so many tokens, and for the latents of a denoiser of that signature."""
        dtype, others = DTYPES[self.precision(built_for.precision)], {}
        if self.graph == VAE_DECODER:
            factor = 2 ** (len(self.config["block_out_channels"]) - 1)
            sides = next(tensor for tensor in signature.inputs if tensor.name == "sample").shape[2:]
            takes = TensorSpec("latents", dtype, (ROWS, self.config.get("latent_channels", 4), *sides))
            gives = [TensorSpec(PIXELS, dtype, (ROWS, self.config.get("out_channels", 3), *(times(side, factor) for side in sides)))]
            others = {name: bounds for name, bounds in signature.dimensions.items() if name in (HEIGHT, WIDTH)}
        else:
            takes = TensorSpec("input_ids", "int64", (ROWS, tokens))
            states = (ROWS, tokens, self.config["hidden_size"])
            shapes = {LAST: states, PENULTIMATE: states, POOLED: (ROWS, self.config.get("projection_dim", 512))}
            gives = [TensorSpec(name, dtype, shapes[name]) for name in self.outputs]
        return GraphSpec(self.graph, (takes,), tuple(gives), {ROWS: built_for.batch_size, **others})

    def on_meta(self, dtype: torch.dtype) -> nn.Module:
        """Its architecture without weights, in eval mode."""
        return nn.Module.to(on_meta(self.kind, self.config), dtype).requires_grad_(False)

    def weight_files(self, folder: Path) -> tuple[Path, ...]:
        """The safetensors files of its weights in a bundle's folder."""
        return tuple(sorted((folder / PIPELINE / self.name).glob("*.safetensors")))

    def load(self, pipeline: Path, dtype: torch.dtype) -> nn.Module:
        """The component in eager PyTorch, from a pipeline's folder."""
        import diffusers
        import transformers

        loader = getattr(diffusers if self.graph == VAE_DECODER else transformers, self.kind)
        with LOADING:
            model: nn.Module = loader.from_pretrained(pipeline / self.name, torch_dtype=dtype, local_files_only=True, use_safetensors=True)
        return model.eval().requires_grad_(False)


def components_of(pipeline: Path) -> dict[str, Component]:
    """The parts of a pipeline that become graphs, by graph; none for families that are not known.

    Args:
        pipeline: diffusers folder.
    """
    index = read_json(pipeline / INDEX)
    found = {}
    for graph, outputs in _OUTPUTS.get(index["_class_name"], {}).items():
        name = "vae" if graph == VAE_DECODER else graph
        kind = (index.get(name) or [None, None])[1]
        if kind not in _KINDS:
            continue
        config = read_json(pipeline / name / "config.json")
        if config.get("use_attention_mask"):  # the pipeline passes a mask, which the graph does not take
            continue
        found[graph] = Component(graph, name, outputs, config, kind)
    return found


def component_of(bundle: Bundle, graph: str) -> str:
    """The pipeline's component whose weights a graph has."""
    if is_of_denoiser(graph):
        return bundle.manifest.model.attribute
    return "vae" if graph == VAE_DECODER else graph


def weight_files(bundle: Bundle, graph: str) -> tuple[Path, ...]:
    """The safetensors files of a graph's weights in a bundle."""
    if is_of_denoiser(graph):
        return (bundle.folder / WEIGHTS_FILE,)
    return components_of(bundle.pipeline)[graph].weight_files(bundle.folder)

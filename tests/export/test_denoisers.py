"""Every class of denoisers is traced and cut by the same rules, and equals the eager model; so does the PyTorch engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tgate_trt.eager import module_of, on_meta, run_recipe
from tgate_trt.engines.onnxruntime import OnnxRuntimeEngine
from tgate_trt.engines.pytorch import PyTorchEngine
from tgate_trt.errors import UnsupportedError
from tgate_trt.export import weights
from tgate_trt.export.cut import cut, spec_of
from tgate_trt.export.trace import trace
from tgate_trt.export.verify import random_inputs, relative_error
from tgate_trt.models.signature import dimensions, maximum_rows, signature
from tgate_trt.specs import CACHE_PREFIX, Bounds, GraphSpec, TensorSpec
from tgate_trt.taps import CROSS_ATTENTION, kind_of, recipe

CPU = torch.device("cpu")

_UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "attention_head_dim": 4,
    "block_out_channels": [16, 32, 32],
    "cross_attention_dim": 32,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "out_channels": 4,
    "sample_size": 8,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}

TINY: dict[str, dict[str, Any]] = {
    "unet": _UNET,
    "inpainting unet": _UNET | {"in_channels": 9},
    "kolors": _UNET
    | {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "encoder_hid_dim": 24,
        "encoder_hid_dim_type": "text_proj",
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
    },
    "pixart-alpha": {
        "_class_name": "PixArtTransformer2DModel",
        "attention_head_dim": 8,
        "caption_channels": 24,
        "cross_attention_dim": 24,
        "in_channels": 4,
        "interpolation_scale": 2,
        "num_attention_heads": 3,
        "num_layers": 2,
        "out_channels": 8,
        "patch_size": 2,
        "sample_size": 8,
        "use_additional_conditions": True,
    },
    "sana": {
        "_class_name": "SanaTransformer2DModel",
        "attention_head_dim": 8,
        "caption_channels": 24,
        "cross_attention_dim": 16,
        "cross_attention_head_dim": 8,
        "in_channels": 4,
        "num_attention_heads": 2,
        "num_cross_attention_heads": 2,
        "num_layers": 2,
        "out_channels": 4,
        "patch_size": 1,
        "sample_size": 8,
    },
    "hunyuan": {
        "_class_name": "HunyuanDiT2DModel",
        "activation_fn": "gelu-approximate",
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
        "cross_attention_dim_t5": 24,
        "hidden_size": 16,
        "in_channels": 4,
        "num_attention_heads": 2,
        "num_layers": 2,
        "patch_size": 2,
        "pooled_projection_dim": 16,
        "sample_size": 8,
        "text_len": 7,
        "text_len_t5": 9,
    },
    "wan": {
        "_class_name": "WanTransformer3DModel",
        "attention_head_dim": 12,
        "ffn_dim": 32,
        "freq_dim": 32,
        "in_channels": 4,
        "num_attention_heads": 2,
        "num_layers": 2,
        "out_channels": 4,
        "patch_size": [1, 2, 2],
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
        "text_dim": 16,
    },
    "cosmos": {
        "_class_name": "CosmosTransformer3DModel",
        "adaln_lora_dim": 8,
        "attention_head_dim": 12,
        "concat_padding_mask": False,  # resizing it needs torchvision
        "extra_pos_embed_type": None,
        "in_channels": 4,
        "max_size": [4, 16, 16],
        "num_attention_heads": 2,
        "num_layers": 2,
        "out_channels": 4,
        "patch_size": [1, 2, 2],
        "rope_scale": [1.0, 4.0, 4.0],
        "text_embed_dim": 16,
    },
    "stable-audio": {
        "_class_name": "StableAudioDiTModel",
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
        "cross_attention_input_dim": 16,
        "global_states_input_dim": 32,
        "in_channels": 4,
        "num_attention_heads": 2,
        "num_key_value_attention_heads": 2,
        "num_layers": 2,
        "out_channels": 4,
        "sample_size": 12,
        "time_proj_dim": 8,
    },
    "svd": {
        "_class_name": "UNetSpatioTemporalConditionModel",
        "addition_time_embed_dim": 8,
        "block_out_channels": [32, 64],
        "cross_attention_dim": 16,
        "down_block_types": ["CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"],
        "in_channels": 8,
        "layers_per_block": 1,
        "num_attention_heads": [2, 4],
        "num_frames": 3,
        "out_channels": 4,
        "projection_class_embeddings_input_dim": 24,
        "sample_size": 8,
        "transformer_layers_per_block": 1,
        "up_block_types": ["UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"],
    },
}
"""A small model of each class, and of each kind of conditions of a UNet."""

CONTROLS = ("controlnet", "t2i-adapter")
WHOLE = {"height": 64, "width": 96, "vae_scale_factor": 8, "text_tokens": Bounds(5, 7, 21)}
RANGED = WHOLE | {"height": Bounds(64, 64, 128), "width": Bounds(64, 96, 128)}


def made(config: dict[str, Any]) -> nn.Module:
    """The model with random weights, its cross-attention loud."""
    torch.manual_seed(0)
    return loud(module_of(config["_class_name"], config))


def loud(model: Any) -> Any:
    """A model with its cross-attention made loud, and without weights that are zeros."""
    for name, parameter in model.named_parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)  # Wan's and HunyuanDiT's last layers begin with zeros
        if "attn2.to_v" in name or "attn2.to_out" in name:
            parameter.data.mul_(4)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Traced:
    """A small model, and its trace."""

    config: dict[str, Any]
    inputs: tuple[TensorSpec, ...]
    named: dict[str, Bounds]
    trace: ir.Model


@pytest.fixture(scope="module", params=[*TINY, "unet with controls", "unet of a range"])
def traced(request: pytest.FixtureRequest) -> Traced:
    name: str = request.param
    config = TINY[name.partition(" with")[0].partition(" of")[0]]
    asked = (RANGED if "range" in name else WHOLE) | ({"controls": CONTROLS} if "controls" in name else {})
    inputs = signature(config, dtype="float32", **asked)
    named = dimensions(config, **{key: value for key, value in asked.items() if key != "controls"})
    return Traced(config, inputs, named, trace(on_meta(config["_class_name"], config), inputs, named, maximum_rows(config)))


@pytest.mark.parametrize("graph", ["planning", "fidelity"])
def test_a_graph_equals_the_eager_model(traced: Traced, graph: str, tmp_path: Path) -> None:
    config, inputs, named, model = traced.config, traced.inputs, traced.named, made(traced.config)
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, tmp_path / weights.WEIGHTS_FILE)
    model_cut = cut(traced.trace, recipe(graph))
    weights.attach(model_cut, tmp_path, [tmp_path / weights.WEIGHTS_FILE])
    ir.save(model_cut, tmp_path / "graph.onnx")
    spec = spec_of(model_cut, graph, Bounds(1, 2, 8), named)
    text = {tensor.name for tensor in spec.inputs} & {"encoder_hidden_states"}
    assert bool(text) == (graph == "planning"), "the text of a fidelity graph feeds cross-attention alone"
    assert spec.cache_inputs or graph == "planning"

    runs = OnnxRuntimeEngine(tmp_path / "graph.onnx", spec, device=CPU, threads=1)
    absent = [tensor for tensor in inputs if tensor.name not in {each.name for each in spec.inputs}]
    eager = PyTorchEngine(on_meta(config["_class_name"], config), model.state_dict(), spec, recipe(graph), CPU, absent=absent)
    for sizes in _sizes(spec, named):
        everything = _case(model, inputs, spec, sizes)
        expected = run_recipe(model, recipe(graph), everything)
        for engine in (runs, eager):
            outputs = {each.name: torch.full(each.concrete(**sizes), torch.nan) for each in spec.outputs}
            engine.run({each.name: everything[each.name] for each in spec.inputs}, outputs)
            for output, value in expected.items():
                assert relative_error(outputs[output], value) < 1e-4, (output, sizes)


def _sizes(spec: GraphSpec, named: dict[str, Bounds]) -> list[dict[str, int]]:
    """Sizes at which a graph is compared: rows, tokens and sides all change."""
    at = [spec.sizes(2), *({name: getattr(bounds, which) for name, bounds in named.items()} for which in ("minimum", "maximum"))]
    return [
        {"batch": rows, **{name: bounds.optimum for name, bounds in named.items()}, **sizes}
        for rows, sizes in zip((2, 1, 3), at, strict=True)
    ]


def _case(model: nn.Module, inputs: Any, spec: GraphSpec, sizes: dict[str, int]) -> dict[str, Tensor]:
    return random_inputs(tuple({each.name: each for each in (*inputs, *spec.inputs)}.values()), sizes, torch.Generator().manual_seed(1))


def test_motion_modules_have_no_cross_attention() -> None:
    """The ``attn2`` of AnimateDiff's motion modules is fed by nothing but the hidden states."""
    from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel

    settings = {key: value for key, value in _UNET.items() if key != "_class_name"}
    adapter = MotionAdapter(
        block_out_channels=(16, 32, 32), motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=4
    )
    model = UNetMotionModel.from_unet2d(UNet2DConditionModel(**settings), adapter)
    from tgate_trt.eager import attention_modules

    taps = [tap for tap, _ in attention_modules(model) if kind_of(tap) == CROSS_ATTENTION]
    assert taps and not any("motion_modules" in tap for tap in taps)
    assert any("motion_modules" in path and path.endswith("attn2") for path, _ in model.named_modules())


def test_joint_attention_is_refused_with_its_reason() -> None:
    with pytest.raises(UnsupportedError, match="share one attention"):
        signature({"_class_name": "FluxTransformer2DModel"}, dtype="float32", **WHOLE)


def test_a_transformer_is_built_for_one_size() -> None:
    with pytest.raises(UnsupportedError, match="one size"):
        signature(TINY["pixart-alpha"], dtype="float32", **RANGED)


@pytest.mark.parametrize("traced", ["unet of a range"], indirect=True)
def test_caches_of_a_range_follow_its_sides(traced: Traced) -> None:
    spec = spec_of(cut(traced.trace, recipe("fidelity")), "fidelity", Bounds(1, 1, 1), traced.named)
    shapes = {tensor.name.removeprefix(CACHE_PREFIX): tensor.shape for tensor in spec.cache_inputs}
    assert shapes["cross_attention.down_blocks.0.attentions.0.transformer_blocks.0"] == ("batch", "16*height*width", 16)
    assert spec.dimensions == {"batch": Bounds(1, 1, 1), "height": Bounds(2, 2, 4), "width": Bounds(2, 3, 4)}

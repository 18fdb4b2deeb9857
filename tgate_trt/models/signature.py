"""The inputs of a denoiser, from its configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tgate_trt.errors import InputError, UnsupportedError
from tgate_trt.specs import ROWS, TensorSpec

_UNSUPPORTED = {
    "class_embed_type": "class embeddings",
    "num_class_embeds": "class embeddings",
    "encoder_hid_dim_type": "hint or image embeddings",
}
"""Conditions of a UNet that the graphs lack, by key of the configuration."""

_TIME_IDS = 6
"""Numbers of SDXL's micro-conditioning: original size, crop and target size, two each."""


def precision_of_component(config: Mapping[str, Any], precision: str) -> str:
    """The precision of a text encoder or VAE in a bundle: SDXL's VAE overflows in fp16 (``force_upcast``), so it stays in fp32."""
    return "fp32" if config.get("force_upcast") and precision == "fp16" else precision


def signature(
    config: Mapping[str, Any],
    *,
    height: int,
    width: int,
    vae_scale_factor: int,
    text_tokens: int,
    dtype: str,
) -> tuple[TensorSpec, ...]:
    """The inputs of a denoiser, in the order in which graphs take them.

    Args:
        config: the denoiser's configuration, with ``_class_name``.
        height: of the picture in pixels.
        width: of the picture in pixels.
        vae_scale_factor: pixels of a latent's side.
        text_tokens: tokens of an encoded prompt.
        dtype: of the graph, such as ``"float16"``. ``timestep`` is float32 always, for it may be a fraction.

    Raises:
        InputError: if the model cannot make a picture of this size.
        UnsupportedError: if the denoiser takes conditions that the graphs lack.
    """
    # Each of diffusers' pipelines asks for multiples of 8 pixels, whatever its VAE.
    step = math.lcm(8, vae_scale_factor * config.get("patch_size", 1))
    latent_height, latent_width = (_checked(side, size, step) // vae_scale_factor for side, size in (("height", height), ("width", width)))
    inputs = {"sample": (config["in_channels"], latent_height, latent_width), "timestep": ()}
    if config["_class_name"] == "UNet2DConditionModel":
        inputs |= _unet_conditions(config, text_tokens)
    elif config["_class_name"] == "PixArtTransformer2DModel":
        inputs |= _pixart_conditions(config, text_tokens)
    else:
        raise UnsupportedError(f"this version builds UNet2DConditionModel and PixArtTransformer2DModel, got {config['_class_name']}")
    return tuple(TensorSpec(name, "float32" if name == "timestep" else dtype, (ROWS, *shape)) for name, shape in inputs.items())


def _checked(side: str, size: int, step: int) -> int:
    if size < step or size % step:
        raise InputError(
            f"the {side} must be a multiple of {step} pixels for this model, got {size}; the nearest is {_nearest(size, step)}"
        )
    return size


def _nearest(size: int, step: int) -> int:
    return max(step, (size + step // 2) // step * step)


def _unet_conditions(config: Mapping[str, Any], text_tokens: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a UNet's conditions, without the batch dimension (diffusers, ``UNet2DConditionModel.forward``)."""
    for key, what in _UNSUPPORTED.items():
        if config.get(key) is not None:
            raise UnsupportedError(f"this version does not build UNets with {what} ({key} is {config[key]!r})")
    if config.get("attention_type", "default") != "default":
        raise UnsupportedError(f"this version does not build UNets with {config['attention_type']!r} attention")
    width = config["cross_attention_dim"]
    if not isinstance(width, int):
        if len(set(width)) > 1:
            raise UnsupportedError(f"this version builds UNets with one text width, got cross_attention_dim {width}")
        width = width[0]
    conditions: dict[str, tuple[int, ...]] = {"encoder_hidden_states": (text_tokens, width)}
    if config.get("time_cond_proj_dim") is not None:
        conditions["timestep_cond"] = (config["time_cond_proj_dim"],)
    embedding = config.get("addition_embed_type")
    if embedding == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - _TIME_IDS * config["addition_time_embed_dim"]
        conditions |= {"text_embeds": (pooled,), "time_ids": (_TIME_IDS,)}
    elif embedding is not None:
        raise UnsupportedError(f"this version does not build UNets with addition_embed_type {embedding!r}")
    return conditions


def _pixart_conditions(config: Mapping[str, Any], text_tokens: int) -> dict[str, tuple[int, ...]]:
    """Shapes of PixArt's conditions, without the batch dimension (diffusers, ``PixArtTransformer2DModel.forward``)."""
    conditions: dict[str, tuple[int, ...]] = {
        "encoder_hidden_states": (text_tokens, config["caption_channels"]),
        "encoder_attention_mask": (text_tokens,),
    }
    additional = config.get("use_additional_conditions")
    if additional or (additional is None and config["sample_size"] == 128):
        conditions |= {"resolution": (2,), "aspect_ratio": (1,)}
    return conditions

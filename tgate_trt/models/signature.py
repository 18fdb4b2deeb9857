"""The inputs of a denoiser, from its configuration: a row of data for each class of diffusers.

A size that may vary is named: ``batch``, ``tokens``, and the sides of a picture, ``height`` and ``width``, as products such as
``"8*height"``; see `tgate_trt.specs`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tgate_trt import ip_adapter
from tgate_trt.errors import InputError, UnsupportedError
from tgate_trt.specs import HEIGHT, MAXIMUM_ROWS, ROWS, TOKENS, WIDTH, Bounds, TensorSpec, times

Config = Mapping[str, Any]
Shape = tuple[int | str, ...]
Shapes = dict[str, Shape]

TIME_IDS, TIME_IDS_WITH_SCORE = 6, 5
"""Numbers of SDXL's micro-conditioning: original size, crop and target size, two each; the refiner has a score in the target's place."""

CONTROLS = ("controlnet", "t2i-adapter")
"""What may add to the hidden states of a UNet, by the name that a build takes."""

_GRAPH = "of the graph"


@dataclass(frozen=True)
class Asked:
    """What a signature is for, beside the configuration."""

    height: int | str
    """Of the latents."""
    width: int | str
    tokens: int | str
    """Of an encoded prompt."""
    time_ids: int = TIME_IDS
    controls: tuple[str, ...] = ()
    """Of `CONTROLS`."""


@dataclass(frozen=True)
class Denoiser:
    """One class of diffusers' denoisers."""

    inputs: Callable[[Config, Asked], Shapes]
    """Shapes by name, in the order in which graphs take them; the first is ``sample``."""
    calls_a_half: bool = False
    """Whether pipelines call it once for each half of the guidance."""
    dtypes: Mapping[str, str] = field(default_factory=dict)
    """Of inputs that are not in the graph's dtype, but for ``timestep``, which is float32 as a rule, for it may be a fraction."""
    takes_any_text: bool = True
    """Whether a prompt may have any number of tokens."""
    ranges: bool = False
    """Whether one trace holds for a range of sizes; else positions are computed for one size when the model is made."""


def precision_of_component(config: Config, precision: str) -> str:
    """The precision of a text encoder or VAE in a bundle: SDXL's VAE overflows in fp16 (``force_upcast``), so it stays in fp32."""
    return "fp32" if config.get("force_upcast") and precision == "fp16" else precision


def denoiser_of(config: Config) -> Denoiser:
    """The row of a configuration's class.

    Raises:
        UnsupportedError: if there is none.
    """
    kind = config["_class_name"]
    if kind not in DENOISERS:
        joint = "; its text and picture share one attention, so there is no cross-attention to cache" if kind in JOINT else ""
        raise UnsupportedError(f"this version builds {', '.join(DENOISERS)}, got {kind}{joint}")
    return DENOISERS[kind]


def signature(
    config: Config,
    *,
    height: int | Bounds,
    width: int | Bounds,
    vae_scale_factor: int,
    text_tokens: int | Bounds,
    dtype: str,
    time_ids: int = TIME_IDS,
    controls: tuple[str, ...] = (),
) -> tuple[TensorSpec, ...]:
    """The inputs of a denoiser, in the order in which graphs take them.

    Args:
        config: the denoiser's configuration, with ``_class_name``.
        height: of the picture in pixels; bounds of more than one size become the dimension ``height``.
        width: of the picture in pixels, likewise.
        vae_scale_factor: pixels of a latent's side.
        text_tokens: tokens of an encoded prompt; bounds become the dimension ``tokens``.
        dtype: of the graph, such as ``"float16"``.
        time_ids: numbers of SDXL's micro-conditioning.
        controls: what adds to the hidden states, of `CONTROLS`.

    Raises:
        InputError: if the model cannot make a picture of this size.
        UnsupportedError: if the denoiser takes conditions that the graphs lack.
    """
    row = denoiser_of(config)
    if isinstance(text_tokens, Bounds) and not row.takes_any_text:
        text_tokens = text_tokens.optimum
    asked = Asked(
        _latent_side(config, height, vae_scale_factor, HEIGHT),
        _latent_side(config, width, vae_scale_factor, WIDTH),
        TOKENS if isinstance(text_tokens, Bounds) else text_tokens,
        time_ids,
        controls,
    )
    dtypes = {"timestep": "float32"} | {name: dtype if each == _GRAPH else each for name, each in row.dtypes.items()}
    return tuple(TensorSpec(name, dtypes.get(name.partition(".")[0], dtype), shape) for name, shape in row.inputs(config, asked).items())


def dimensions(
    config: Config, *, height: int | Bounds, width: int | Bounds, vae_scale_factor: int, text_tokens: int | Bounds
) -> dict[str, Bounds]:
    """Bounds of the dimensions that `signature` names, but for the rows."""
    found = {TOKENS: text_tokens} if isinstance(text_tokens, Bounds) and denoiser_of(config).takes_any_text else {}
    unit = _unit(config, vae_scale_factor)
    for name, size in ((HEIGHT, height), (WIDTH, width)):
        if isinstance(size, Bounds) and not size.is_one:
            found[name] = Bounds(size.minimum // unit, size.optimum // unit, size.maximum // unit)
    return found


def maximum_rows(config: Config) -> int:
    """The largest batch for which a trace holds: SVD's frames are rows within its model."""
    return MAXIMUM_ROWS // int(config.get("num_frames") or 1)


def _unit(config: Config, vae_scale_factor: int) -> int:
    """Pixels by which a side can grow in a range: every level of a UNet then halves without a rest."""
    levels = len(config.get("block_out_channels", (0,)))
    return int(vae_scale_factor * 2 ** (levels - 1))


def _latent_side(config: Config, size: int | Bounds, vae_scale_factor: int, side: str) -> int | str:
    """A side of the latents: a number, or a product of the dimension.

    Raises:
        InputError: if the model cannot make a picture of this size.
        UnsupportedError: if it cannot be traced for a range.
    """
    # Each of diffusers' pipelines asks for multiples of 8 pixels, whatever its VAE.
    step = math.lcm(8, vae_scale_factor * _patch(config))
    if not isinstance(size, Bounds) or size.is_one:
        return _checked(side, size if isinstance(size, int) else size.optimum, step) // vae_scale_factor
    if not denoiser_of(config).ranges:
        raise UnsupportedError(
            f"a {config['_class_name']} computes its positions for one size; give one {side}, not {size}, and build a bundle a size"
        )
    unit = _unit(config, vae_scale_factor)
    for each in (size.minimum, size.optimum, size.maximum):
        _checked(side, each, unit)
    return times(side, unit // vae_scale_factor)


def _patch(config: Config) -> int:
    patch = config.get("patch_size", 1)
    return int(patch if isinstance(patch, int) else patch[-1])


def _checked(side: str, size: int, step: int) -> int:
    if size < step or size % step:
        raise InputError(
            f"the {side} must be a multiple of {step} pixels for this model, got {size}; the nearest is {_nearest(size, step)}"
        )
    return size


def _nearest(size: int, step: int) -> int:
    return max(step, (size + step // 2) // step * step)


_UNSUPPORTED = {
    "class_embed_type": "class embeddings",
    "num_class_embeds": "class embeddings",
}
"""Conditions of a UNet that the graphs lack, by key of the configuration."""


def _unet(config: Config, asked: Asked) -> Shapes:
    """diffusers, ``UNet2DConditionModel.forward``."""
    for key, what in _UNSUPPORTED.items():
        if config.get(key) is not None:
            raise UnsupportedError(f"this version does not build UNets with {what} ({key} is {config[key]!r})")
    if config.get("attention_type", "default") != "default":
        raise UnsupportedError(f"this version does not build UNets with {config['attention_type']!r} attention")
    inputs = _image(config, asked) | {"encoder_hidden_states": (ROWS, asked.tokens, _text_width(config))}
    if config.get("time_cond_proj_dim") is not None:
        inputs["timestep_cond"] = (ROWS, config["time_cond_proj_dim"])
    embedding = config.get("addition_embed_type")
    if embedding == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - asked.time_ids * config["addition_time_embed_dim"]
        inputs |= {"text_embeds": (ROWS, pooled), "time_ids": (ROWS, asked.time_ids)}
    elif embedding is not None:
        raise UnsupportedError(f"this version does not build UNets with addition_embed_type {embedding!r}")
    return inputs | ip_adapter_inputs(config) | dict(_residuals(config, asked))


def _text_width(config: Config) -> int:
    """Width of the text that a UNet is given."""
    projected, width = config.get("encoder_hid_dim_type"), config["cross_attention_dim"]
    if projected == "ip_image_proj" and config.get(ip_adapter.KEY):
        projected = None
    if projected == "text_proj":
        return int(config["encoder_hid_dim"])
    if projected is not None:
        raise UnsupportedError(f"this version does not build UNets with hint or image embeddings (encoder_hid_dim_type is {projected!r})")
    if not isinstance(width, int):
        if len(set(width)) > 1:
            raise UnsupportedError(f"this version builds UNets with one text width, got cross_attention_dim {width}")
        width = width[0]
    return int(width)


def _residuals(config: Config, asked: Asked) -> Iterator[tuple[str, Shape]]:
    """What ControlNets and T2I-Adapters add to a UNet's hidden states, each of the shape of the value that it is added to."""
    channels, layers = config["block_out_channels"], config.get("layers_per_block", 2)
    kinds = config["down_block_types"]

    def features(width: int, level: int) -> Shape:
        return (ROWS, width, _halved(asked.height, level), _halved(asked.width, level))

    last = len(channels) - 1
    if "controlnet" in asked.controls:
        skips = [features(channels[0], 0)]
        for level, width in enumerate(channels):
            count = layers if isinstance(layers, int) else layers[level]
            skips += [features(width, level)] * count + [features(width, level + 1)] * (level < last)
        yield from ((f"down_block_additional_residuals.{index}", shape) for index, shape in enumerate(skips))
        yield "mid_block_additional_residual", features(channels[-1], last)
    if "t2i-adapter" in asked.controls:
        shapes = [
            features(width, level if "CrossAttn" in kind or level == last else level + 1)
            for level, (width, kind) in enumerate(zip(channels, kinds, strict=True))
        ]
        shapes += [features(channels[-1], last)] * (len(channels) == _BLOCKS_OF_SDXL)
        yield from ((f"down_intrablock_additional_residuals.{index}", shape) for index, shape in enumerate(shapes))


def ip_adapter_inputs(config: Config) -> Shapes:
    """What a UNet's IP-Adapters take: an embedding of an image for each, and a scale for each; see `tgate_trt.ip_adapter`."""
    adapters = config.get(ip_adapter.KEY) or []
    images: Shapes = {f"image_embeds.{index}": (ROWS, 1, adapter["width"]) for index, adapter in enumerate(adapters)}
    return images | ({ip_adapter.SCALE: (len(adapters),)} if adapters else {})


_BLOCKS_OF_SDXL = 3
"""Its T2I-Adapters give one feature more than it has blocks; that one is added in the middle."""


def _halved(size: int | str, times: int) -> int | str:
    """A side of the latents at a deeper level of a UNet; an odd side is rounded up, as a strided convolution does."""
    if isinstance(size, int):
        for _ in range(times):
            size = -(-size // 2)
        return size
    factor, _, name = size.partition("*")
    deeper = int(factor) >> times
    return name if deeper == 1 else f"{deeper}*{name}"


def _image(config: Config, asked: Asked) -> Shapes:
    return {"sample": (ROWS, config["in_channels"], asked.height, asked.width), "timestep": (ROWS,)}


def _pixart(config: Config, asked: Asked) -> Shapes:
    """diffusers, ``PixArtTransformer2DModel.forward``."""
    inputs = _image(config, asked) | _masked_text(config["caption_channels"], asked)
    additional = config.get("use_additional_conditions")
    if additional or (additional is None and config["sample_size"] == 128):
        inputs |= {"resolution": (ROWS, 2), "aspect_ratio": (ROWS, 1)}
    return inputs


def _masked_text(width: int, asked: Asked) -> Shapes:
    return {"encoder_hidden_states": (ROWS, asked.tokens, width), "encoder_attention_mask": (ROWS, asked.tokens)}


def _sana(config: Config, asked: Asked) -> Shapes:
    """diffusers, ``SanaTransformer2DModel.forward``."""
    if config.get("guidance_embeds"):
        raise UnsupportedError("this version does not build Sana models with an embedded guidance scale")
    return _image(config, asked) | _masked_text(config["caption_channels"], asked)


def _hunyuan(config: Config, asked: Asked) -> Shapes:
    """diffusers, ``HunyuanDiT2DModel.forward``: CLIP's text and T5's, each with a mask, and positions that all rows share."""
    assert isinstance(asked.height, int) and isinstance(asked.width, int)
    positions = (asked.height // _patch(config)) * (asked.width // _patch(config))
    inputs = _image(config, asked) | {
        "encoder_hidden_states": (ROWS, config["text_len"], config["cross_attention_dim"]),
        "text_embedding_mask": (ROWS, config["text_len"]),
        "encoder_hidden_states_t5": (ROWS, config["text_len_t5"], config["cross_attention_dim_t5"]),
        "text_embedding_mask_t5": (ROWS, config["text_len_t5"]),
    }
    if config.get("use_style_cond_and_image_meta_size", True):
        inputs |= {"image_meta_size": (ROWS, 6), "style": (ROWS,)}
    return inputs | {f"image_rotary_emb.{part}": (positions, config["attention_head_dim"]) for part in range(2)}


def _wan(config: Config, asked: Asked) -> Shapes:
    """Latents of one frame, and text without a mask: diffusers, ``WanTransformer3DModel.forward``."""
    if config.get("image_dim") or config.get("added_kv_proj_dim"):
        raise UnsupportedError("this version builds Wan's text to video models, not those that begin from an image")
    return _frame(config, asked, config["text_dim"])


def _frame(config: Config, asked: Asked, text_width: int) -> Shapes:
    """Latents of one frame of a video, and a text."""
    return {
        "sample": (ROWS, config["in_channels"], 1, asked.height, asked.width),
        "timestep": (ROWS,),
        "encoder_hidden_states": (ROWS, asked.tokens, text_width),
    }


def _cosmos(config: Config, asked: Asked) -> Shapes:
    """diffusers, ``CosmosTransformer3DModel.forward`` for one frame; the mask marks padding, which pictures do not have."""
    inputs = _frame(config, asked, config["text_embed_dim"])
    if config.get("concat_padding_mask", True):
        inputs["padding_mask"] = (1, 1, asked.height, asked.width)
    return inputs


def _stable_audio(config: Config, asked: Asked) -> Shapes:
    """diffusers, ``StableAudioDiTModel.forward``: sound has a length, and no height and width."""
    length, width = config["sample_size"], config["attention_head_dim"] // 2
    return {
        "sample": (ROWS, config["in_channels"], length),
        "timestep": (ROWS,),
        "encoder_hidden_states": (ROWS, asked.tokens, config["cross_attention_input_dim"]),
        "global_hidden_states": (ROWS, 1, config["global_states_input_dim"]),
    } | {f"rotary_embedding.{part}": (length + 1, width) for part in range(2)}


def _svd(config: Config, asked: Asked) -> Shapes:
    """diffusers, ``UNetSpatioTemporalConditionModel.forward``: the text is one token, which encodes an image."""
    return {
        "sample": (ROWS, config["num_frames"], config["in_channels"], asked.height, asked.width),
        "timestep": (ROWS,),
        "encoder_hidden_states": (ROWS, 1, _text_width(config)),
        "added_time_ids": (ROWS, 3),
    }


DENOISERS: Mapping[str, Denoiser] = {
    "UNet2DConditionModel": Denoiser(_unet, ranges=True),
    "PixArtTransformer2DModel": Denoiser(_pixart),
    "SanaTransformer2DModel": Denoiser(_sana),
    "HunyuanDiT2DModel": Denoiser(
        _hunyuan, takes_any_text=False, dtypes={"timestep": _GRAPH, "style": "int64", "image_rotary_emb": "float32"}
    ),
    "WanTransformer3DModel": Denoiser(_wan, calls_a_half=True),
    "CosmosTransformer3DModel": Denoiser(_cosmos, calls_a_half=True),
    "StableAudioDiTModel": Denoiser(_stable_audio, dtypes={"rotary_embedding": "float32"}),
    "UNetSpatioTemporalConditionModel": Denoiser(_svd, takes_any_text=False),
}
"""The classes that this version builds."""

JOINT = frozenset(
    {
        "FluxTransformer2DModel",
        "SD3Transformer2DModel",
        "AuraFlowTransformer2DModel",
        "ChromaTransformer2DModel",
        "QwenImageTransformer2DModel",
        "ZImageTransformer2DModel",
        "Lumina2Transformer2DModel",
        "CogVideoXTransformer3DModel",
    }
)
"""Classes that are not built because of their attention."""

"""Models by name and by path: what a bundle can be built from, and what a denoiser takes.

A model is a name of `ARCHITECTURES`, a diffusers folder, a ``.safetensors`` checkpoint, a hub id or a pipeline; `resolve`
turns each into a `ModelSource`. Configurations of the named models are shipped, so that none needs a hub for its shapes.
"""

from __future__ import annotations

import atexit
import dataclasses
import difflib
import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgate_trt import demo
from tgate_trt.errors import InputError, UnsupportedError
from tgate_trt.model_source import ModelSource, source_of_checkpoint, source_of_folder, source_of_hub
from tgate_trt.specs import ROWS, TensorSpec

if TYPE_CHECKING:
    from tgate_trt.lora import LoraFile

__all__ = ["ARCHITECTURES", "Architecture", "ModelSource", "resolve", "signature"]

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Architecture:
    """What is to be known of a named model beside its configuration files."""

    name: str
    height: int
    """Native height of a picture in pixels."""
    width: int
    """Native width of a picture in pixels."""
    gate_step: int | float
    """Default gate: the official code's count over the official number of steps, so that it suits any number."""
    steps: int
    """Default number of sampling steps."""
    guidance_scale: float | None
    """Default guidance scale, or None for the pipeline's own."""
    hub_id: str | None
    """Where its weights are published; None if they come with this package."""
    denoiser_hub_id: str | None = None
    """Where the denoiser's weights are published, if not there."""

    @property
    def folder(self) -> Path:
        """Folder of its configuration files, and of its weights if they come with this package."""
        return _HERE / "configs" / self.name if self.hub_id else _HERE / "demo" / "model"


_SDXL = "stabilityai/stable-diffusion-xl-base-1.0"

ARCHITECTURES: Mapping[str, Architecture] = {
    row.name: row
    for row in (
        Architecture("shapes", 64, 64, 0.4, demo.NUM_INFERENCE_STEPS, demo.GUIDANCE_SCALE, None),
        Architecture("sd15", 512, 512, 10 / 25, 25, 7.5, "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        Architecture("sd21", 768, 768, 10 / 25, 25, 7.5, "stabilityai/stable-diffusion-2-1"),
        Architecture("sdxl", 1024, 1024, 10 / 25, 25, 5.0, _SDXL),
        Architecture("lcm-sdxl", 1024, 1024, 2 / 4, 4, 8.0, _SDXL, "latent-consistency/lcm-sdxl"),
        Architecture("pixart-alpha", 1024, 1024, 15 / 25, 25, 4.5, "PixArt-alpha/PixArt-XL-2-1024-MS"),
        Architecture("pixart-sigma", 1024, 1024, 15 / 25, 25, 4.5, "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"),
    )
}
"""The named models; gate steps are the official defaults of T-GATE."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PICKLED = (".ckpt", ".bin", ".pt", ".pth", ".pkl")


def resolve(
    model: str | os.PathLike[str] | Any,
    *,
    random_weights: bool = False,
    seed: int = 0,
    config: str | os.PathLike[str] | None = None,
    lora: Sequence[LoraFile] = (),
) -> ModelSource:
    """Find a model by name, path, hub id, or from a pipeline.

    Args:
        model: a name of `ARCHITECTURES`, which wins over a folder of that name; a diffusers folder; a ``.safetensors``
            checkpoint in the original authors' layout; a hub id ``owner/name``; or a diffusers pipeline.
        random_weights: whether to fill the architecture with seeded random weights; for a name or a folder.
        seed: of the random weights.
        config: diffusers folder with a checkpoint's configuration and tokenizers; found out from the checkpoint if None.
        lora: files to fuse into its weights wherever they are read.

    Raises:
        InputError: if there is no such model, or it cannot be read.
        UnsupportedError: if its denoiser is of a kind that this version does not build.
    """
    source = _resolved(model, random_weights=random_weights, seed=seed, config=config)
    if not lora:
        return source
    fused = dataclasses.replace(source, name="+".join([source.name, *(one.path.stem for one in lora)]), lora=tuple(lora))
    fused.loras()
    return fused


def resolve_again(reference: str, random_seed: int | None, lora: Sequence[tuple[str, float]]) -> ModelSource:
    """Find a model that was resolved before, from plain data.

    Args:
        reference: `ModelSource.reference`.
        random_seed: `ModelSource.random_seed`.
        lora: `ModelSource.lora_as_json`.

    Raises:
        InputError: if it is not there any more.
    """
    from tgate_trt.lora import LoraFile

    files = [LoraFile(Path(path), scale) for path, scale in lora]
    return resolve(reference, random_weights=random_seed is not None, seed=random_seed or 0, lora=files)


def _resolved(
    model: str | os.PathLike[str] | Any, *, random_weights: bool, seed: int, config: str | os.PathLike[str] | None
) -> ModelSource:
    """The source without LoRAs."""
    if not isinstance(model, str | os.PathLike):
        return source_of_folder(_saved(model))
    random_seed = seed if random_weights else None
    text = os.fspath(model)
    if text in ARCHITECTURES:
        return _named(ARCHITECTURES[text], random_seed)
    path = Path(text).expanduser()
    if path.is_dir():
        return source_of_folder(path.resolve(), random_seed=random_seed)
    if random_weights:
        raise InputError(f"random weights fill a named model ({', '.join(ARCHITECTURES)}) or a diffusers folder, got {text!r}")
    if path.is_file() or path.suffix == ".safetensors":
        return source_of_checkpoint(_checkpoint(path), None if config is None else Path(config))
    if path.suffix in _PICKLED:
        raise InputError(f"there is no file {text}")
    if _HUB_ID.fullmatch(text) and not text.startswith("."):
        return source_of_hub(text)
    raise InputError(_unknown(text))


def _named(row: Architecture, random_seed: int | None) -> ModelSource:
    """The source of a named model."""
    defaults = {
        "name": row.name,
        "reference": row.name,
        "gate_step": row.gate_step,
        "steps": row.steps,
        "guidance_scale": row.guidance_scale,
        "height": row.height,
        "width": row.width,
    }
    if random_seed is not None or row.hub_id is None:
        if not row.folder.is_dir():
            raise InputError(f"the model {row.name!r} is not part of this installation; train it with python -m tgate_trt.demo.train")
        return source_of_folder(row.folder, random_seed=random_seed, **defaults)
    try:
        return source_of_hub(row.hub_id, row.denoiser_hub_id, configs=row.folder, **defaults)
    except UnsupportedError:
        raise
    except InputError as error:
        raise InputError(f"{error}; or build {row.name} with --random-weights, which needs no download") from error


def _saved(pipeline: Any) -> Path:
    """Save a pipeline to a folder that lasts as long as this process."""
    if not hasattr(pipeline, "save_pretrained") or not hasattr(pipeline, "components"):
        raise InputError(f"a model is a name, a path, a hub id or a diffusers pipeline, got {type(pipeline).__name__}")
    folder = Path(tempfile.mkdtemp(prefix="tgate-trt-")) / type(pipeline).__name__
    atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def _checkpoint(path: Path) -> Path:
    """Check that a file can be read without unpickling it."""
    if path.suffix in _PICKLED:
        raise InputError(
            f"{path} is a pickle, which can run code when it is read; convert it to .safetensors with a tool that you trust, "
            "or use the model's .safetensors file"
        )
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    return path.resolve()


def _unknown(text: str) -> str:
    """One sentence on a model that is nowhere."""
    near = difflib.get_close_matches(text.lower(), ARCHITECTURES, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the named models are {', '.join(ARCHITECTURES)}"
    return f"there is no model {text!r}: it is no name, no folder, no .safetensors file and no hub id owner/name; {hint}"


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
        UnsupportedError: if the denoiser takes conditions that the graphs do not.
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


_UNSUPPORTED = {
    "class_embed_type": "class embeddings",
    "num_class_embeds": "class embeddings",
    "encoder_hid_dim_type": "hint or image embeddings",
}
"""Conditions of a UNet that graphs do not take, by the configuration's key."""

_TIME_IDS = 6
"""SDXL's micro-conditioning: original size, crop and target size, two numbers each."""


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

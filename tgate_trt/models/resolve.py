"""Find a model by name, path, hub id or from a pipeline.

`resolve` turns each into a `ModelSource`. Configurations of the named models are shipped, so that none needs a hub for its
shapes.
"""

from __future__ import annotations

import atexit
import dataclasses
import difflib
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tgate_trt import ip_adapter
from tgate_trt.errors import InputError, UnsupportedError
from tgate_trt.files import read_json, write_json
from tgate_trt.models.architectures import ARCHITECTURES, Architecture
from tgate_trt.models.hub import download_denoiser, download_pipeline
from tgate_trt.models.lora import LoraFile
from tgate_trt.models.single_file import check_denoiser, configuration_of
from tgate_trt.models.source import (
    IMAGE_TO_VIDEO,
    LEFT_OUT,
    Checkpoint,
    ModelReference,
    ModelSource,
    Random,
    Stored,
    normalised,
    read_index,
)

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
"""What a denoiser may predict, by diffusers' names."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PICKLED = (".ckpt", ".bin", ".pt", ".pth", ".pkl")

_DENOISERS = ("unet", "transformer")

_LIBRARIES = ("diffusers", "transformers", "kolors", "stable_audio", None)
"""Where the classes of a pipeline's components may come from: the third and the fourth are parts of diffusers' pipelines."""

_TOKENS = {
    "PixArtAlphaPipeline": 120,
    "PixArtSigmaPipeline": 300,
    "SanaPipeline": 300,
    "WanPipeline": 512,
    "Cosmos2TextToImagePipeline": 512,
    "KolorsPipeline": 256,
    "HunyuanDiTPipeline": 77,
    "StableAudioPipeline": 130,
    "StableVideoDiffusionPipeline": 1,
}
"""Tokens of an encoded prompt in the pipelines that do not read them from their tokenizer: with Stable Audio's two of time."""

_DEFAULT_STEPS, _LCM_STEPS, _LCM_GATE_STEP, _PIXART_GATE_STEP = 25, 4, 2 / 4, 15 / 25


def resolve(
    model: str | os.PathLike[str] | Any,
    *,
    random_weights: bool = False,
    seed: int = 0,
    config: str | os.PathLike[str] | None = None,
    prediction_type: str | None = None,
    lora: Sequence[LoraFile] = (),
) -> ModelSource:
    """Find a model by name, path, hub id, or from a pipeline.

    Args:
        model: a name of `ARCHITECTURES`, which wins over a folder of that name; a diffusers folder; a ``.safetensors``
            checkpoint in the original authors' layout; a hub id ``owner/name``; or a diffusers pipeline.
        random_weights: whether to fill the architecture with seeded random weights; for a name or a folder.
        seed: of the random weights.
        config: diffusers folder with a checkpoint's configuration and tokenizers; found out from the checkpoint if None.
        prediction_type: of `PREDICTION_TYPES`, in the place of what the model states or leaves open.
        lora: files to fuse into its weights wherever they are read.

    Raises:
        InputError: if there is no such model, or it cannot be read.
        UnsupportedError: if its denoiser is of a kind that this version does not build.
    """
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise InputError(f"a prediction type is one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}")
    if config is not None and not Path(config).is_dir():
        raise InputError(f"there is no folder {config}; --config takes a diffusers folder with a checkpoint's configuration and tokenizers")
    source = _resolved(model, random_weights=random_weights, seed=seed, config=config, prediction_type=prediction_type)
    if prediction_type is not None:
        source = dataclasses.replace(source, scheduler={**source.scheduler, "prediction_type": prediction_type})
    config = None if config is None else str(Path(config).resolve())
    reference = dataclasses.replace(source.reference, prediction_type=prediction_type, config=config)
    source = dataclasses.replace(source, reference=reference)
    if not lora:
        return source
    name = "+".join([source.name, *(one.path.stem for one in lora)])
    fused = dataclasses.replace(source, name=name, reference=dataclasses.replace(source.reference, lora=tuple(lora)))
    fused.loras()
    return fused


def resolve_again(reference: ModelReference) -> ModelSource:
    """Find a model that was resolved before.

    Raises:
        InputError: if it is not there any more.
    """
    seed = reference.random_seed
    return resolve(
        reference.model,
        random_weights=seed is not None,
        seed=seed or 0,
        config=reference.config,
        prediction_type=reference.prediction_type,
        lora=reference.lora,
    )


def _resolved(
    model: str | os.PathLike[str] | Any,
    *,
    random_weights: bool,
    seed: int,
    config: str | os.PathLike[str] | None,
    prediction_type: str | None,
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
        return source_of_checkpoint(_checkpoint(path), None if config is None else Path(config).resolve(), prediction_type)
    if path.suffix in _PICKLED:
        raise InputError(f"there is no file {text}")
    if _HUB_ID.fullmatch(text) and not text.startswith("."):
        return source_of_hub(text)
    raise InputError(_unknown(text))


def _named(row: Architecture, random_seed: int | None) -> ModelSource:
    """The source of a named model."""
    defaults: dict[str, Any] = {
        "name": row.name,
        "model": row.name,
        "gate_step": row.gate_step,
        "steps": row.steps,
        "guidance_scale": row.guidance_scale,
        "height": row.height,
        "width": row.width,
        "after_gate": row.after_gate,
    }
    if random_seed is not None or row.hub_id is None:
        if not row.folder.is_dir():
            raise InputError(
                f"the model {row.name!r} is not part of this installation; train it with python -m tgate_trt.demo.training.train"
            )
        without = () if random_seed is None else row.without
        return source_of_folder(row.folder, random_seed=random_seed, elsewhere=row.shared, without=without, **defaults)
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
    for name, part in pipeline.components.items():
        if getattr(part, "peft_config", None):
            raise InputError(
                f"the pipeline's {name} has LoRAs loaded; unload them by pipeline.unload_lora_weights(), and give their files to the "
                "build: lora=['FILE.safetensors:0.8'], or --lora"
            )
    folder = Path(tempfile.mkdtemp(prefix="tgate-trt-")) / type(pipeline).__name__
    atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
    pipeline.save_pretrained(folder, safe_serialization=True)
    if (unet := getattr(pipeline, "unet", None)) is not None and (adapters := ip_adapter.described(unet)):
        config = folder / "unet" / "config.json"
        write_json(config, read_json(config) | {ip_adapter.KEY: adapters})
    return folder


def _checkpoint(path: Path) -> Path:
    """Check that a checkpoint exists and is not a pickle."""
    if path.suffix in _PICKLED:
        raise InputError(
            f"{path} is a pickle, which can run code when it is read; convert it to .safetensors with a tool that you trust, "
            "or use the model's .safetensors file"
        )
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    return path.resolve()


def _unknown(text: str) -> str:
    """One sentence for a model that does not exist."""
    near = difflib.get_close_matches(text.lower(), ARCHITECTURES, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the named models are {', '.join(ARCHITECTURES)}"
    return f"there is no model {text!r}: expected a named model, a folder, a .safetensors file or a hub id owner/name; {hint}"


def source_of_folder(
    folder: Path, *, model: str | None = None, random_seed: int | None = None, checkpoint: Path | None = None, **known: Any
) -> ModelSource:
    """The source of a diffusers folder.

    Args:
        folder: with ``model_index.json`` and a folder for each component.
        model: what `resolve` takes to find it again; the folder if None.
        random_seed: of random weights, or None for the model's own.
        checkpoint: file that holds the weights, if they are not in the folder.
        **known: fields that are known better than from the folder; None is not known.

    Raises:
        InputError: if it is no diffusers pipeline, or lacks weights that can be read without unpickling.
        UnsupportedError: if its denoiser is of a kind that this version does not build.
    """
    index = read_index(folder)
    attribute = next((name for name in _DENOISERS if isinstance(index.get(name), list) and index[name][0]), None)
    if attribute is None:
        raise UnsupportedError(f"{folder} is a {index['_class_name']}, which has no unet or transformer; this version builds those")
    for name, entry in index.items():
        if isinstance(entry, list) and entry[0] not in _LIBRARIES and name not in LEFT_OUT:
            raise UnsupportedError(
                f"{folder} has a {name} of {entry[0]!r}, whose code is not part of diffusers; this version runs no foreign code"
            )
    elsewhere = known.get("elsewhere", {})
    config = normalised(read_json(elsewhere.get(attribute, folder / attribute) / "config.json"))
    factor = _vae_scale_factor(read_json(elsewhere.get("vae", folder / "vae") / "config.json"))
    height, width = _native_size(config, factor)
    found = {
        "name": folder.name,
        "denoiser_attribute": attribute,
        "height": height,
        "width": width,
        "vae_scale_factor": factor,
        "text_tokens": _text_tokens(folder, elsewhere, index["_class_name"]),
        **_defaults(config, index),
    }
    source = ModelSource(
        reference=ModelReference(model or str(folder), random_seed),
        folder=folder,
        weights=Checkpoint(checkpoint) if checkpoint else Stored() if random_seed is None else Random(random_seed),
        **(found | {name: value for name, value in known.items() if value is not None}),
    )
    source.signature(source.height, source.width, "fp32")
    source.files()
    return source


def source_of_checkpoint(path: Path, config: Path | None = None, prediction_type: str | None = None) -> ModelSource:
    """The source of a single ``.safetensors`` file; see `tgate_trt.models.single_file`."""
    folder, known = configuration_of(path, config, prediction_type)
    source = source_of_folder(folder, name=path.stem, model=str(path), checkpoint=path, **known)
    check_denoiser(path, source.denoiser_config(), source.tensor_shapes())
    return source


def source_of_hub(hub_id: str, denoiser_hub_id: str | None = None, configs: Path | None = None, **known: Any) -> ModelSource:
    """The source of a model on the Hugging Face hub, downloaded unless its cache holds it.

    Args:
        hub_id: ``owner/name``.
        denoiser_hub_id: repository of the denoiser alone, if it is another.
        configs: shipped configuration, whose scheduler a denoiser from elsewhere needs.
        **known: see `source_of_folder`.

    Raises:
        InputError: if it is neither on the hub, as far as that can be reached, nor in the cache.
    """
    folder = download_pipeline(hub_id)
    elsewhere = {}
    if denoiser_hub_id is not None and configs is not None:
        elsewhere = {"unet": download_denoiser(denoiser_hub_id), "scheduler": configs / "scheduler"}
    defaults = {"name": hub_id.rpartition("/")[2], "model": hub_id, "revision": folder.name}
    return source_of_folder(folder, **(defaults | known), elsewhere=elsewhere)


def _vae_scale_factor(config: Mapping[str, Any]) -> int:
    """Pixels of a latent's side, as diffusers' pipelines compute it."""
    if "temperal_downsample" in config:
        return int(2 ** len(config["temperal_downsample"]))
    levels = config.get("encoder_block_out_channels", config.get("block_out_channels", (1, 1, 1, 1)))
    return int(2 ** (len(levels) - 1))


def _native_size(config: Mapping[str, Any], vae_scale_factor: int) -> tuple[int, int]:
    """Height and width in pixels of the pictures that a denoiser was trained on."""
    size = config.get("sample_size") or 64
    if config["_class_name"] == "StableAudioDiTModel":
        size = 1  # sound has no sides
    height, width = (size, size) if isinstance(size, int) else size
    return height * vae_scale_factor, width * vae_scale_factor


def _text_tokens(folder: Path, elsewhere: Mapping[str, Path], pipeline: str) -> int:
    """Number of tokens to which a pipeline pads a prompt."""
    if pipeline in _TOKENS:
        return _TOKENS[pipeline]
    encoders = (elsewhere.get(name, folder / name) for name in ("text_encoder", "text_encoder_2"))
    encoder = next((each for each in encoders if each.is_dir()), folder / "text_encoder")
    limit = int(read_json(encoder / "config.json").get("max_position_embeddings", 77))
    settings = folder / encoder.name.replace("text_encoder", "tokenizer") / "tokenizer_config.json"
    # A tokenizer that was saved without a length has 10^30 here.
    return min(limit, int(read_json(settings).get("model_max_length", limit))) if settings.is_file() else limit


def _defaults(config: Mapping[str, Any], index: Mapping[str, Any]) -> dict[str, Any]:
    """T-GATE's default gate for a model of this family, and the steps that go with it."""
    if config.get("time_cond_proj_dim") is not None or "LCM" in str(index.get("scheduler")):
        return {"gate_step": _LCM_GATE_STEP, "steps": _LCM_STEPS, "guidance_scale": None}
    if index["_class_name"] == IMAGE_TO_VIDEO:
        row = ARCHITECTURES["svd"]
        return {"gate_step": row.gate_step, "steps": row.steps, "guidance_scale": row.guidance_scale, "after_gate": row.after_gate}
    pixart = config["_class_name"] == "PixArtTransformer2DModel"
    return {"gate_step": _PIXART_GATE_STEP if pixart else None, "steps": _DEFAULT_STEPS, "guidance_scale": None}

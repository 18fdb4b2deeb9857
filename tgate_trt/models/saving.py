"""Write everything of a model but its denoiser's weights, as a diffusers pipeline folder."""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path

from tgate_trt.eager import torch_dtype
from tgate_trt.errors import InputError
from tgate_trt.files import read_json, write_component, write_json
from tgate_trt.models import stand_in_tokenizer
from tgate_trt.models.signature import precision_of_component
from tgate_trt.models.source import INDEX, SCHEDULER, ModelSource

RANDOM_NOTICE = "RANDOM_WEIGHTS.txt"
"""File that marks a pipeline folder whose weights and tokenizers are stand-ins."""


def save_rest(source: ModelSource, folder: Path, precision: str) -> None:
    """Write a diffusers pipeline folder of everything but the denoiser's weights.

    It loads offline with ``DiffusionPipeline.from_pretrained(folder, unet=…)``.

    Args:
        source: the model.
        folder: is made if it does not exist.
        precision: of the text encoders' and the VAE's weights, of `tgate_trt.specs.PRECISIONS`.

    Raises:
        InputError: if a component lacks files, or they cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # diffusers reads the version of an inpainting pipeline without asking whether there is one.
    write_json(folder / INDEX, {"_diffusers_version": metadata.version("diffusers"), **source.index()})
    (folder / source.denoiser_attribute).mkdir(exist_ok=True)
    write_json(folder / source.denoiser_attribute / "config.json", source.denoiser_config())
    for name, tensors in source.other_tensors():
        config = read_json(source.component(name) / "config.json")
        stem = "diffusion_pytorch_model" if "_class_name" in config else "model"
        write_component(folder / name, stem, tensors, torch_dtype(precision_of_component(config, precision)))
        write_json(folder / name / "config.json", config)
    models = {source.denoiser_attribute, *source.other_models()}
    for name, kind in source.components().items():
        if name not in models:
            _save_small(source, name, kind, folder / name)
    if source.scheduler:
        write_json(folder / "scheduler" / SCHEDULER, source.scheduler_config())
    seed = source.reference.random_seed
    if seed is not None:
        notice = f"The weights here are random (seed {seed}) and tokenizers may be stand-ins: pictures have no meaning.\n"
        (folder / RANDOM_NOTICE).write_text(notice, encoding="utf-8")


def _save_small(source: ModelSource, name: str, kind: str, folder: Path) -> None:
    """Copy a tokenizer or a scheduler; make a stand-in if a named model comes without its tokenizer."""
    own = source.component(name)
    if own.is_dir() and any(own.iterdir()):
        shutil.copytree(own, folder, dirs_exist_ok=True)
    elif source.reference.random_seed is not None and "Tokenizer" in kind:
        _save_stand_in(source, name, kind, folder)
    else:
        raise InputError(f"the pipeline {source.folder} has no folder {name!r}, which its {INDEX} names; download the model again")


def _save_stand_in(source: ModelSource, name: str, kind: str, folder: Path) -> None:
    """Make a tokenizer with which a pipeline runs."""
    if kind.startswith("T5"):
        stand_in_tokenizer.save_t5(folder, model_max_length=source.text_tokens)
        return
    text_config = read_json(source.component(name.replace("tokenizer", "text_encoder")) / "config.json")
    pads_with_first = name == "tokenizer_2" or text_config.get("hidden_act") == "gelu"
    stand_in_tokenizer.save_clip(folder, text_config, model_max_length=source.text_tokens, pad_with_first=pads_with_first)

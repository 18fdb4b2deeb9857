"""Features of whole pictures, from networks in files that the user names.

Nothing is downloaded. Pictures are float tensors `[N, 3, height, width]` in 0…1, as in `tgate_trt.analysis.metrics`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tgate_trt.analysis.metrics import check_pictures
from tgate_trt.errors import InputError

_BATCH = 16
"""Pictures in one call of a network."""


def clip_scores(pictures: Tensor, prompts: Sequence[str], folder: Path) -> Tensor:
    """CLIP scores: 100 times the cosine between a picture's and its prompt's embedding, at least 0 (Hessel et al., 2021).

    Args:
        pictures: `[N, 3, height, width]` in 0…1; the folder's image processor scales and crops them.
        prompts: one for each picture; tokens beyond the model's maximum are cut off.
        folder: folder of a whole CLIP in transformers' format (`CLIPModel.save_pretrained`, with tokenizer and image processor), in
            safetensors. Scores of different CLIPs are not comparable; papers of this field use ViT-L/14 or ViT-g/14.

    Returns:
        `[N]` float64.

    Raises:
        InputError: if the folder holds no such model, or the numbers of prompts and pictures differ.
    """
    check_pictures(pictures)
    if len(prompts) != len(pictures):
        raise InputError(f"CLIP scores take a prompt for each picture; got {len(prompts)} prompts and {len(pictures)} pictures")
    model, tokenizer, processor = _load_clip(folder)
    scores = []
    for start in range(0, len(pictures), _BATCH):
        words = tokenizer(
            list(prompts[start : start + _BATCH]),
            padding=True,
            truncation=True,
            max_length=model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        pixels = processor(
            images=list(_bytes(pictures[start : start + _BATCH]).numpy()), return_tensors="pt", input_data_format="channels_first"
        )
        with torch.no_grad():
            found = model(**words, **pixels)
        scores.append((found.image_embeds.double() * found.text_embeds.double()).sum(-1))
    return 100 * torch.cat(scores).clamp(min=0)


def inception_features(pictures: Tensor, file: Path) -> Tensor:
    """Features for FID, from a network that the user has as TorchScript, such as NVIDIA's widely used `inception-2015-12-05.pt`.

    The module takes bytes `[n, 3, height, width]` in 0…255 of the pictures' own size, and must scale (to 299) and normalise them
    itself, as that file does; if its `forward` has an argument `return_features`, it is called with True.

    Args:
        pictures: `[N, 3, height, width]` in 0…1.
        file: TorchScript for `torch.jit.load`; it is a program, so name only a file that you trust.

    Returns:
        `[N, d]` float64.

    Raises:
        InputError: if the file does not hold such a module.
    """
    check_pictures(pictures)
    module = _load_torchscript(file)
    named = {argument.name for argument in module.forward.schema.arguments}
    options = {"return_features": True} if "return_features" in named else {}
    features = []
    for some in torch.split(pictures, _BATCH):
        try:
            with torch.no_grad():
                found = module(_bytes(some), **options)
        except (RuntimeError, TypeError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise InputError(f"{file} does not take pictures as uint8 [N, 3, height, width] in 0…255: {reason}") from error
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(some):
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(f"{file} must give features [{len(some)}, d] for {len(some)} pictures; it gave {shape}")
        features.append(found.double())
    return torch.cat(features)


def _bytes(pictures: Tensor) -> Tensor:
    return (pictures * 255).round().to(torch.uint8)


def _load_clip(folder: Path) -> tuple[Any, Any, Any]:
    """Model, tokenizer and image processor of a folder."""
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{folder} holds no CLIP in transformers' format: it has no config.json that can be read") from error
    if kind != "clip":
        raise InputError(f"{folder} must hold a whole CLIP, text and vision (model_type 'clip' in config.json); got {kind!r}")
    try:
        model, report = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, output_loading_info=True)
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{folder} holds no whole CLIP with tokenizer and image processor, in safetensors: {reason}") from error
    if report["missing_keys"]:
        raise InputError(f"{folder} lacks weights of its CLIP, {min(report['missing_keys'])} among them")
    return model.eval(), tokenizer, processor


def _load_torchscript(file: Path) -> Any:
    if not file.is_file():
        raise InputError(f"there is no TorchScript file {file}")
    try:
        return torch.jit.load(file, map_location="cpu").eval()  # type: ignore[no-untyped-call]  # PyTorch left it so
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{file} cannot be read as TorchScript (torch.jit.save); expected one such as inception-2015-12-05.pt") from error

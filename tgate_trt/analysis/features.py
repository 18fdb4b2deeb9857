"""Features of whole pictures: from a fixed bank of filters, and from networks whose files the user names.

Nothing is downloaded. Pictures are float tensors `[N, 3, height, width]` in 0…1, as in `tgate_trt.analysis.metrics`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tgate_trt.analysis.metrics import check_pictures
from tgate_trt.errors import InputError

BANK_FEATURES = 31
"""How many numbers `bank_features` gives a picture."""

_LONG_SIDE = 256
"""Pixels; larger pictures are averaged down to about that, as FID's network scales pictures to 299."""
_LEVELS, _ORIENTATIONS = 4, 4
_WAVELENGTH = 4.0
"""Pixels of a level; each level has half as many as the one before."""
_SIGMA = 0.56 * _WAVELENGTH
"""Of the filters' Gaussian: a bandwidth of one octave."""
_GRAY_LEVEL = 1 / 255
_REACH = 6
"""Pixels from a filter's middle to its edge."""

_BATCH = 16
"""Pictures in one call of a network."""


def bank_features(pictures: Tensor) -> Tensor:
    """Describe pictures by oriented energy and colour, in the manner of the gist of a scene (Oliva and Torralba, 2001).

    - 16: for each of four octaves (wavelengths of 4, 8, 16 and 32 pixels) and four orientations, the logarithm of the mean magnitude of
      a complex Gabor filter on luminance, plus one gray level of 255; a wave of amplitude 1 has magnitude 1;
    - 12: the means of luminance, red − green and yellow − blue in each quarter of the picture;
    - 3: the standard deviations of these three.

    Over the demo's pictures the energies vary by 0.4 and the colours by 0.25, so neither rules a distance. They are few, so that a
    hundred pictures give a covariance. The Fréchet distance on them is **not FID**: no number of another program compares with it,
    it knows no objects, and it is meant to compare methods on pictures of one kind and size.

    Args:
        pictures: `[N, 3, height, width]` in 0…1.

    Returns:
        `[N, 31]` float64.

    Raises:
        InputError: if these are no pictures.
    """
    check_pictures(pictures)
    return torch.cat([_bank_features(some) for some in torch.split(pictures, _BATCH)])


def clip_scores(pictures: Tensor, prompts: Sequence[str], folder: Path) -> Tensor:
    """CLIP scores: 100 times the cosine between a picture's and its prompt's embedding, at least 0 (Hessel et al., 2021).

    Args:
        pictures: `[N, 3, height, width]` in 0…1, scaled and cropped as the folder's image processor says.
        prompts: one a picture; what the model's text does not hold is cut off.
        folder: of a whole CLIP in transformers' format (`CLIPModel.save_pretrained`, with tokenizer and image processor), in
            safetensors. Published scores name their CLIP; the papers of this field use ViT-L/14 or ViT-g/14, so name yours.

    Returns:
        `[N]` float64.

    Raises:
        InputError: if the folder holds no such model, or prompts are more or fewer than pictures.
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
    """Features for FID, by a network that the user has as TorchScript, such as NVIDIA's widely used `inception-2015-12-05.pt`.

    The module gets bytes `[n, 3, height, width]` in 0…255 of the pictures' own size and must scale (to 299) and normalise them
    itself, as that file does; where its `forward` has an argument `return_features`, it is True.

    Args:
        pictures: `[N, 3, height, width]` in 0…1.
        file: TorchScript, read by `torch.jit.load`; it is a program, so name only one that you trust.

    Returns:
        `[N, d]` float64.

    Raises:
        InputError: if the file is no such module.
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


def _bank_features(pictures: Tensor) -> Tensor:
    pictures = pictures.double()
    pictures = functional.avg_pool2d(pictures, max(1, max(pictures.shape[2:]) // _LONG_SIDE))
    red, green, blue = pictures.unbind(1)
    channels = torch.stack([(red + green + blue) / 3, red - green, (red + green) / 2 - blue], 1)
    quarters = functional.adaptive_avg_pool2d(channels, 2).flatten(1)
    energies = [(energy.mean((2, 3)) + _GRAY_LEVEL).log() for energy in _oriented_energies(channels[:, :1])]
    return torch.cat([*energies, quarters, channels.flatten(2).std(-1)], 1)


def _oriented_energies(luminance: Tensor) -> list[Tensor]:
    """For each octave, `[N, orientations, height, width]` magnitudes of the filters."""
    filters = _gabor_filters()
    energies = []
    for _ in range(_LEVELS):
        padded = functional.pad(luminance, (_REACH,) * 4, mode="replicate")
        real, imaginary = torch.chunk(functional.conv2d(padded, filters), 2, 1)
        energies.append(torch.hypot(real, imaginary))
        luminance = functional.avg_pool2d(luminance, 2)
    return energies


def _gabor_filters() -> Tensor:
    """`[2 · orientations, 1, side, side]`: the real filters, which sum to 0, and then the imaginary ones."""
    steps = torch.arange(-_REACH, _REACH + 1, dtype=torch.float64)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    envelope = (-(x.square() + y.square()) / (2 * _SIGMA**2)).exp()
    envelope /= envelope.sum() / 2
    angles = [math.pi * number / _ORIENTATIONS for number in range(_ORIENTATIONS)]
    phases = torch.stack([2 * math.pi / _WAVELENGTH * (x * math.cos(angle) + y * math.sin(angle)) for angle in angles])
    real = envelope * phases.cos()
    real = real - envelope * real.sum((1, 2), keepdim=True) / envelope.sum()
    return torch.cat([real, envelope * phases.sin()]).unsqueeze(1)


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

"""Single ``.safetensors`` checkpoints in the layout of the original authors, such as those shared for SD 1.5 and SDXL.

The header shows the architecture. diffusers' converter only moves values from key to key: called with names in place of
values, it gives the name in the checkpoint of each tensor, and tensors can then be read one at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from tgate_trt.errors import InputError, UnsupportedError
from tgate_trt.files import opened_file, shapes_of
from tgate_trt.models.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from torch import Tensor


logger = logging.getLogger(__name__)

_PARTS = {
    "denoiser": ("model.diffusion_model.",),
    "VAE": ("first_stage_model.",),
    "text encoders": ("cond_stage_model.", "conditioner.embedders."),
}
"""What a whole checkpoint holds, and how its tensors' names may begin."""

_ARCHITECTURES = {"v1": "sd15", "v2": "sd21", "xl_base": "sdxl"}
"""Named architecture by diffusers' name for the kind of checkpoint.

A v2 checkpoint may lack any mark of whether it predicts noise (512-base) or velocity (768); see `scheduler_settings_of`.
"""

_EPSILON, _VELOCITY = "epsilon", "v_prediction"
_NOISE_SIZE = 512
"""Pixels of a side of the pictures of v2 checkpoints that predict noise."""
_STEP_OF_V2_BASE = 875_000
"""Training step of Stable Diffusion 2's 512-base, by which diffusers recognises it (`single_file_utils`)."""


def configuration_of(path: Path, config: Path | None, prediction_type: str | None) -> tuple[Path, dict[str, Any]]:
    """Find the diffusers configuration of a checkpoint.

    Args:
        path: the checkpoint.
        config: folder that has it, with tokenizers, or None to find out.
        prediction_type: of the model, or None to find out.

    Returns:
        The folder, and further facts of the model, as keywords of `tgate_trt.models.resolve.source_of_folder`.

    Raises:
        InputError: if the file is no whole checkpoint, or its tokenizers cannot be had.
        UnsupportedError: if it is of an architecture that this version does not build.
    """
    shapes = shapes_of([path])
    for part, prefixes in _PARTS.items():
        if not any(name.startswith(prefixes) for name in shapes):
            raise InputError(f"{path} holds no {part} in the original authors' layout; give a whole checkpoint")
    if config is not None:
        return config, {}
    row = ARCHITECTURES[architecture_of(path, shapes)]
    settings = scheduler_settings_of(path, row.name, prediction_type)
    known: dict[str, Any] = {
        "gate_step": row.gate_step,
        "steps": row.steps,
        "guidance_scale": row.guidance_scale,
        "height": row.height,
        "width": row.width,
    }
    if row.name == "sd21" and settings["prediction_type"] == _EPSILON:
        known |= {"height": _NOISE_SIZE, "width": _NOISE_SIZE}
    known["scheduler"] = settings
    return row.folder, known | {"elsewhere": tokenizers_of(row.name, str(row.hub_id))}


def scheduler_settings_of(path: Path, name: str, prediction_type: str | None) -> dict[str, Any]:
    """The scheduler's settings that depend on how a checkpoint was trained, beside those of its architecture.

    In this order: what the caller gives; the marker keys ``v_pred`` and ``ztsnr``; the file's metadata (``modelspec``); the training
    step that v2 checkpoints may hold. A v2 checkpoint without any mark is taken to predict velocity, as diffusers does, and a
    logged warning names the guess.

    Args:
        path: the checkpoint.
        name: of its architecture.
        prediction_type: given by the caller, or None.
    """
    with opened_file(path) as file:
        names, metadata = set(file.keys()), file.metadata() or {}
        step = int(file.get_tensor("global_step")) if "global_step" in names else None
    settings: dict[str, Any] = {}
    if "ztsnr" in names:
        settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    stated = metadata.get("modelspec.prediction_type", metadata.get("modelspec.architecture", ""))
    if prediction_type is not None:
        return settings | {"prediction_type": prediction_type}
    if "v_pred" in names or stated.rpartition("-")[2] in ("v", _VELOCITY):
        return settings | {"prediction_type": _VELOCITY}
    if name != "sd21" or stated == _EPSILON or stated.endswith("-512") or step == _STEP_OF_V2_BASE:
        return settings | {"prediction_type": _EPSILON}
    if step is None and not stated:
        logger.warning(
            "%s has no mark of what it predicts; assuming velocity at 768 pixels, as diffusers does; "
            "overrule it with --prediction-type epsilon if pictures are noise",
            path.name,
        )
    return settings | {"prediction_type": _VELOCITY}


def architecture_of(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The named architecture that a checkpoint's tensors have."""
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    kind = infer_diffusers_model_type({name: SimpleNamespace(shape=shape, ndim=len(shape)) for name, shape in shapes.items()})
    if kind not in _ARCHITECTURES:
        raise UnsupportedError(
            f"{path} is a checkpoint of kind {kind!r}; this version reads {', '.join(_ARCHITECTURES.values())} from one file"
        )
    return _ARCHITECTURES[kind]


def tokenizers_of(name: str, hub_id: str) -> dict[str, Path]:
    """Folders of a named model's tokenizers, which no checkpoint holds, from the hub or its cache."""
    from huggingface_hub import snapshot_download

    wanted = ("tokenizer", "tokenizer_2") if name == "sdxl" else ("tokenizer",)
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=[f"{part}/*" for part in wanted]))
    except (OSError, ValueError):
        folder = Path()
    found = {part: folder / part for part in wanted if (folder / part).is_dir()}
    if len(found) < len(wanted):
        raise InputError(
            f"a {name} checkpoint holds no tokenizer, and that of {hub_id!r} is neither in the hub's cache nor can it be downloaded; "
            f"connect once, or run hf download {hub_id} --include 'tokenizer*/*' where there is a connection and copy the cache"
        )
    return found


def check_denoiser(path: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare a checkpoint's denoiser with an architecture, by the header alone.

    Args:
        path: the checkpoint.
        config: of the denoiser.
        shapes: its state dict.

    Raises:
        InputError: if the checkpoint lacks a tensor or holds it in another shape.
    """
    held = shapes_of([path])
    sources = original_names(held, config)
    for name, shape in shapes.items():
        got = held.get(sources.get(name, ""))
        if got != shape:
            state = "lacks it" if got is None else f"holds it with shape {got}"
            raise InputError(f"the architecture calls for {name!r} with shape {shape}, but {path} {state}; give a diffusers folder instead")


def read_denoiser(path: Path, config: Mapping[str, Any], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Read a checkpoint's denoiser one tensor at a time under diffusers' names, in the order of ``names``."""
    with opened_file(path) as file:
        sources = original_names(file.keys(), config)
        for name in names:
            yield name, file.get_tensor(sources[name])


def original_names(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """The name in a checkpoint of each tensor of a denoiser's state dict.

    Raises:
        InputError: if the checkpoint lacks one.
    """
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    try:
        sources: dict[str, str] = convert_ldm_unet_checkpoint({name: name for name in names}, config)
    except KeyError as error:  # it looks up some names without a check
        raise InputError(f"the checkpoint lacks {error}, which its architecture calls for; give a diffusers folder instead") from error
    return sources


def original_components(path: Path, kind: str, config: Path, tokenizers: Mapping[str, tuple[str, Path]], **given: Any) -> Any:
    """Load a checkpoint's text encoders and VAE in fp32, as the parts of a pipeline.

    Args:
        path: the checkpoint.
        kind: class of the pipeline.
        config: folder of its configuration.
        tokenizers: class and folder of each.
        **given: components that need not be read.

    Raises:
        InputError: if diffusers cannot read them.
    """
    import diffusers
    import torch
    import transformers

    given |= {name: getattr(transformers, tokenizer).from_pretrained(folder) for name, (tokenizer, folder) in tokenizers.items()}
    try:
        return getattr(diffusers, kind).from_single_file(
            str(path), config=str(config), torch_dtype=torch.float32, local_files_only=True, **given
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"diffusers cannot read {path} as a {kind}: {reason}") from error

"""`ModelSource`: one model on disk, or one architecture to be filled with random weights, read a tensor at a time."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgate_trt.errors import InputError, UnsupportedError
from tgate_trt.fingerprints import fingerprint_of
from tgate_trt.specs import DTYPES, TensorSpec
from tgate_trt.stored_weights import read_json, read_tensors, weight_files, write_component

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from tgate_trt.lora import Lora, LoraFile

INDEX = "model_index.json"
RANDOM_NOTICE = "RANDOM_WEIGHTS.txt"
"""File that marks a pipeline folder whose weights and tokenizers are stand-ins."""

_LARGE = 500_000_000
"""Parameters."""

_DENOISERS = ("unet", "transformer")
_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that text to image does without."""
_PIXART_TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
"""Default ``max_sequence_length`` of the pipelines that do not read it from their tokenizer."""
_DEFAULT_STEPS, _LCM_STEPS, _LCM_GATE_STEP, _PIXART_GATE_STEP = 25, 4, 2 / 4, 15 / 25


@dataclass(frozen=True)
class ModelSource:
    """A model that a bundle can be built from. It holds places and numbers, no tensors, so it is cheap and picklable."""

    name: str
    """As it stands in the bundle's folder name."""
    reference: str
    """What `tgate_trt.models.resolve` takes to find it again."""
    folder: Path
    """Diffusers folder with at least its configuration."""
    random_seed: int | None
    """Seed of random weights, or None for the model's own."""
    denoiser_attribute: str
    """``"unet"`` or ``"transformer"``."""
    gate_step: int | float | None
    """The model's default gate, or None if nothing is known of it."""
    steps: int
    guidance_scale: float | None
    height: int
    """Native height of a picture in pixels."""
    width: int
    """Native width of a picture in pixels."""
    vae_scale_factor: int
    """Pixels of a latent's side."""
    text_tokens: int
    """Tokens of an encoded prompt."""
    checkpoint: Path | None = None
    """File that holds the weights in the original authors' layout, if they are not in the folder."""
    elsewhere: Mapping[str, Path] = field(default_factory=dict)
    """Folders of components that are not in ``folder``."""
    revision: str | None = None
    """Commit of a model from the hub."""
    lora: tuple[LoraFile, ...] = ()
    """Fused into its weights wherever they are read."""

    def component(self, name: str) -> Path:
        """Folder of a component."""
        return self.elsewhere.get(name, self.folder / name)

    def index(self) -> dict[str, Any]:
        """The pipeline's ``model_index.json`` with the components that bundles leave out set to null."""
        index = _read_index(self.folder)
        index[self.denoiser_attribute] = ["diffusers", self.denoiser_config()["_class_name"]]
        if "scheduler" in self.elsewhere:
            index["scheduler"] = ["diffusers", read_json(self.component("scheduler") / "scheduler_config.json")["_class_name"]]
        if "requires_safety_checker" in index:
            index["requires_safety_checker"] = False
        return index | {name: [None, None] for name in _LEFT_OUT if name in index}

    def components(self) -> dict[str, str]:
        """Class name of each component that a bundle keeps, the denoiser's included."""
        return {name: entry[1] for name, entry in self.index().items() if isinstance(entry, list) and entry[0] is not None}

    def denoiser_config(self) -> dict[str, Any]:
        """The denoiser's configuration, with its class and without what depends on where and when it was saved."""
        return _normalised(read_json(self.component(self.denoiser_attribute) / "config.json"))

    def signature(self, height: int, width: int, precision: str) -> tuple[TensorSpec, ...]:
        """The denoiser's inputs for pictures of a size in pixels; see `tgate_trt.models.signature`."""
        from tgate_trt import models

        return models.signature(
            self.denoiser_config(),
            height=height,
            width=width,
            vae_scale_factor=self.vae_scale_factor,
            text_tokens=self.text_tokens,
            dtype=DTYPES[precision],
        )

    def fingerprint(self, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Identify the content that a bundle is built from.

        Args:
            known: an earlier fingerprint; a file whose size, time and inode equal those in it is not read again.

        Returns:
            JSON data: ``content``, a hash of everything that matters and of no place or time; ``files``, with ``size``,
            ``mtime_ns``, ``inode`` and ``sha256`` by path; ``seed``, ``revision``.
        """
        return fingerprint_of(self._files(), seed=self.random_seed, revision=self.revision, known=known)

    def _files(self) -> dict[str, Path]:
        """Every file that decides what a bundle holds, by its path in a diffusers folder."""
        files = {INDEX: self.folder / INDEX}
        for name, kind in self.components().items():
            folder = self.component(name)
            if _is_model(name, kind):
                files[f"{name}/config.json"] = folder / "config.json"
                if self.random_seed is None and self.checkpoint is None:
                    files |= {f"{name}/{path.name}": path for path in weight_files(folder)}
            else:
                files |= {f"{name}/{path.name}": path for path in sorted(folder.glob("*")) if path.is_file()}
        if self.checkpoint is not None:
            files["checkpoint.safetensors"] = self.checkpoint
        files |= {f"lora/{index}:{one.scale}": one.path for index, one in enumerate(self.lora)}
        return files

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the denoiser's state dict, in its order; no weights are read."""
        return dict(_shapes(json.dumps(self.denoiser_config(), sort_keys=True)))

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Give the denoiser's state dict one tensor at a time, in its order, under diffusers' own names and shapes.

        Args:
            dtype: to which floating tensors are cast.

        Raises:
            InputError: if the files lack a tensor or hold it in another shape.
        """
        for name, tensor in self.fused(self.denoiser_attribute, self._stored_tensors()):
            yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor

    def fused(self, component: str, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """A component's weights with the LoRAs in them, in fp32 where there are any, so that they are rounded once."""
        if not self.lora:
            return iter(tensors)
        from tgate_trt.lora import fuse

        widened = ((name, tensor.float() if tensor.is_floating_point() else tensor) for name, tensor in tensors)
        return fuse(self.loras(), component, widened)

    def lora_as_json(self) -> list[tuple[str, float]]:
        """Path and scale of each LoRA, as plain data."""
        return [(str(one.path), one.scale) for one in self.lora]

    @property
    def is_large(self) -> bool:
        """Whether a step takes minutes on a CPU, and tracing hundreds of megabytes."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values()) > _LARGE

    def loras(self) -> list[Lora]:
        """The LoRAs, read and checked against the denoiser's weights.

        Raises:
            InputError: if one is not of this architecture.
        """
        from tgate_trt.lora import Lora

        loras = [Lora.read(file, self.denoiser_config()) for file in self.lora]
        for lora in loras:
            lora.check(self.denoiser_attribute, self.tensor_shapes())
            for component in set(lora.factors) - set(self.components()):
                raise InputError(f"{lora.file.path} changes the {component}, which this model does not have")
        return loras

    def _stored_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The same in the dtypes in which they are stored or drawn."""
        if self.random_seed is not None:
            from tgate_trt.random_weights import state_tensors

            return state_tensors(self.denoiser_on_meta(), seed=self.random_seed, component=self.denoiser_attribute)
        if self.checkpoint is not None:
            from tgate_trt.single_file import read_denoiser

            return read_denoiser(self.checkpoint, self.denoiser_config(), self.tensor_shapes())
        return read_tensors(weight_files(self.component(self.denoiser_attribute)), self.tensor_shapes())

    def denoiser_on_meta(self) -> nn.Module:
        """The denoiser's architecture on the ``meta`` device, in eval mode."""
        import torch

        with torch.device("meta"):
            return _denoiser(self.denoiser_config())

    def load_denoiser(self, dtype: torch.dtype) -> nn.Module:
        """The denoiser in eager PyTorch on the CPU, in eval mode, without gradients: the reference for every graph."""
        from accelerate import init_empty_weights
        from torch import nn

        # Buffers that are computed, such as PixArt's positions, are in no file: only parameters start out empty.
        with init_empty_weights(include_buffers=False):
            denoiser = _denoiser(self.denoiser_config())
        denoiser.load_state_dict(dict(self.tensors(dtype)), assign=True)
        # Computed buffers are cast as `from_pretrained` does; the models' own `to` would warn of layers that are not there.
        return nn.Module.to(denoiser, dtype).requires_grad_(False)

    def save_rest(self, folder: Path, dtype: torch.dtype) -> None:
        """Write a diffusers pipeline folder of everything but the denoiser's weights.

        It loads offline with ``DiffusionPipeline.from_pretrained(folder, unet=…)``.

        Args:
            folder: is made if it does not exist.
            dtype: of the text encoders' and VAE's weights.

        Raises:
            InputError: if a component lacks files.
        """
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / INDEX, self.index())
        (folder / self.denoiser_attribute).mkdir(exist_ok=True)
        _write_json(folder / self.denoiser_attribute / "config.json", self.denoiser_config())
        if self.checkpoint is not None:
            from tgate_trt.single_file import save_rest

            save_rest(self, folder, dtype)
            return
        for name, kind in self.components().items():
            if name == self.denoiser_attribute:
                continue
            if _is_model(name, kind):
                self._save_model(name, kind, folder / name, dtype)
            else:
                self._save_small(name, kind, folder / name)
        if self.random_seed is not None:
            notice = f"The weights here are random (seed {self.random_seed}) and tokenizers may be stand-ins: pictures have no meaning.\n"
            (folder / RANDOM_NOTICE).write_text(notice, encoding="utf-8")

    def _save_model(self, name: str, kind: str, folder: Path, dtype: torch.dtype) -> None:
        """Write a text encoder or the VAE, holding at most one shard of its weights."""
        config = read_json(self.component(name) / "config.json")
        dtype = dtype_of_component(config, dtype)
        if self.random_seed is None:
            tensors = read_tensors(weight_files(self.component(name)))
        else:
            from tgate_trt.random_weights import state_tensors

            tensors = state_tensors(_on_meta(kind, config), seed=self.random_seed, component=name)
        tensors = self.fused(name, tensors)
        stem = "diffusion_pytorch_model" if "_class_name" in config else "model"
        write_component(folder, stem, tensors, dtype)
        _write_json(folder / "config.json", config)

    def _save_small(self, name: str, kind: str, folder: Path) -> None:
        """Copy a tokenizer or a scheduler; make a stand-in if a named model comes without its tokenizer."""
        source = self.component(name)
        if source.is_dir() and any(source.iterdir()):
            shutil.copytree(source, folder, dirs_exist_ok=True)
        elif self.random_seed is not None and "Tokenizer" in kind:
            self._save_stand_in(name, kind, folder)
        else:
            raise InputError(f"the pipeline {self.folder} has no folder {name!r}, which its {INDEX} names; download the model again")

    def _save_stand_in(self, name: str, kind: str, folder: Path) -> None:
        from tgate_trt import stand_in_tokenizer

        if kind.startswith("T5"):
            stand_in_tokenizer.save_t5(folder, model_max_length=self.text_tokens)
            return
        text_config = read_json(self.component(name.replace("tokenizer", "text_encoder")) / "config.json")
        pads_with_first = name == "tokenizer_2" or text_config.get("hidden_act") == "gelu"
        stand_in_tokenizer.save_clip(folder, text_config, model_max_length=self.text_tokens, pad_with_first=pads_with_first)


def dtype_of_component(config: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
    """The dtype of a text encoder or VAE in a bundle: SDXL's VAE overflows in fp16, as its configuration says, so it stays in fp32."""
    import torch

    return torch.float32 if config.get("force_upcast") and dtype == torch.float16 else dtype


def source_of_folder(folder: Path, **known: Any) -> ModelSource:
    """The source of a diffusers folder.

    Args:
        folder: with ``model_index.json`` and a folder for each component.
        **known: fields that are known better than the folder tells them; None is not known.

    Raises:
        InputError: if it is no diffusers pipeline, or lacks weights that can be read without unpickling.
        UnsupportedError: if its denoiser is of a kind that this version does not build.
    """
    index = _read_index(folder)
    attribute = next((name for name in _DENOISERS if isinstance(index.get(name), list) and index[name][0]), None)
    if attribute is None:
        raise UnsupportedError(f"{folder} is a {index['_class_name']}, which has no unet or transformer; this version builds those")
    for name, entry in index.items():
        if isinstance(entry, list) and entry[0] not in ("diffusers", "transformers", None) and name not in _LEFT_OUT:
            raise UnsupportedError(
                f"{folder} has a {name} of {entry[0]!r}, whose code is not part of diffusers; this version runs no foreign code"
            )
    elsewhere = known.get("elsewhere", {})
    config = _normalised(read_json(elsewhere.get(attribute, folder / attribute) / "config.json"))
    factor = _vae_scale_factor(read_json(elsewhere.get("vae", folder / "vae") / "config.json"))
    height, width = _native_size(config, factor)
    found = {
        "name": folder.name,
        "reference": str(folder),
        "folder": folder,
        "random_seed": None,
        "denoiser_attribute": attribute,
        "height": height,
        "width": width,
        "vae_scale_factor": factor,
        "text_tokens": _text_tokens(folder, index["_class_name"]),
        **_defaults(config, index),
    }
    source = ModelSource(**(found | {name: value for name, value in known.items() if value is not None}))
    source.signature(source.height, source.width, "fp32")
    if source.random_seed is None and source.checkpoint is None:
        source._files()
    return source


def source_of_checkpoint(path: Path, config: Path | None) -> ModelSource:
    """The source of a single ``.safetensors`` file; see `tgate_trt.single_file`."""
    from tgate_trt.single_file import check_denoiser, configuration_of

    folder, known = configuration_of(path, config)
    source = source_of_folder(folder, name=path.stem, reference=str(path), checkpoint=path, **known)
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
    from tgate_trt.hub import download_denoiser, download_pipeline

    folder = download_pipeline(hub_id)
    elsewhere = {}
    if denoiser_hub_id is not None and configs is not None:
        elsewhere = {"unet": download_denoiser(denoiser_hub_id), "scheduler": configs / "scheduler"}
    defaults = {"name": hub_id.rpartition("/")[2], "reference": hub_id, "revision": folder.name}
    return source_of_folder(folder, **(defaults | known), elsewhere=elsewhere)


def _read_index(folder: Path) -> dict[str, Any]:
    if not (folder / INDEX).is_file():
        raise InputError(f"{folder} is no diffusers pipeline: it has no {INDEX}; give the folder that holds unet, vae and text_encoder")
    index = read_json(folder / INDEX)
    if "_class_name" not in index:
        raise InputError(f"{folder / INDEX} names no pipeline class; download the model again")
    return index


def _normalised(config: Mapping[str, Any]) -> dict[str, Any]:
    """A denoiser's configuration without private keys, under the name that its class has now."""
    if "_class_name" not in config:
        raise InputError("the denoiser's config.json names no class; download the model again")
    kind = config["_class_name"]
    if kind == "Transformer2DModel" and config.get("norm_type") == "ada_norm_single":
        kind = "PixArtTransformer2DModel"  # diffusers split it off in 0.28; published PixArt models have the old name
    return {"_class_name": kind} | {name: value for name, value in config.items() if not name.startswith("_")}


def _vae_scale_factor(config: Mapping[str, Any]) -> int:
    """Pixels of a latent's side, as diffusers' pipelines compute it."""
    return int(2 ** (len(config.get("block_out_channels", (1, 1, 1, 1))) - 1))


def _native_size(config: Mapping[str, Any], vae_scale_factor: int) -> tuple[int, int]:
    """Height and width in pixels of the pictures that a denoiser was trained on."""
    size = config.get("sample_size") or 64
    height, width = (size, size) if isinstance(size, int) else size
    return height * vae_scale_factor, width * vae_scale_factor


def _text_tokens(folder: Path, pipeline: str) -> int:
    """Tokens to which a pipeline pads a prompt."""
    if pipeline in _PIXART_TOKENS:
        return _PIXART_TOKENS[pipeline]
    limit = int(read_json(folder / "text_encoder" / "config.json").get("max_position_embeddings", 77))
    settings = folder / "tokenizer" / "tokenizer_config.json"
    # A tokenizer that was saved without a length says 10^30.
    return min(limit, int(read_json(settings).get("model_max_length", limit))) if settings.is_file() else limit


def _defaults(config: Mapping[str, Any], index: Mapping[str, Any]) -> dict[str, Any]:
    """T-GATE's default gate for a model of this family, and the steps that go with it."""
    if config.get("time_cond_proj_dim") is not None or "LCM" in str(index.get("scheduler")):
        return {"gate_step": _LCM_GATE_STEP, "steps": _LCM_STEPS, "guidance_scale": None}
    pixart = config["_class_name"] == "PixArtTransformer2DModel"
    return {"gate_step": _PIXART_GATE_STEP if pixart else None, "steps": _DEFAULT_STEPS, "guidance_scale": None}


def _is_model(name: str, kind: str) -> bool:
    """Whether a component has weights."""
    return name != "scheduler" and "Tokenizer" not in kind


def _denoiser(config: Mapping[str, Any]) -> nn.Module:
    import diffusers

    settings = {name: value for name, value in config.items() if not name.startswith("_")}
    denoiser: nn.Module = getattr(diffusers, config["_class_name"]).from_config(settings)
    return denoiser.eval()


def _on_meta(kind: str, config: Mapping[str, Any]) -> nn.Module:
    """A text encoder or VAE on the ``meta`` device."""
    import diffusers
    import torch
    import transformers

    with torch.device("meta"):
        if "_class_name" in config:
            model: nn.Module = getattr(diffusers, kind).from_config(dict(config))
        else:
            loader = getattr(transformers, kind)
            model = loader(loader.config_class.from_dict(dict(config)))
    return model.eval()


@lru_cache(maxsize=8)
def _shapes(config: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and shapes of a denoiser's state dict; SDXL takes a second, and builds ask several times."""
    import torch

    with torch.device("meta"):
        return tuple((name, tuple(tensor.shape)) for name, tensor in _denoiser(json.loads(config)).state_dict().items())


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")

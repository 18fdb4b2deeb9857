"""`ModelSource`: a model that a bundle can be built from, read a tensor at a time.

Where its weights come from is one of `Stored`, `Checkpoint` and `Random`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tgate_trt import ip_adapter
from tgate_trt.errors import InputError
from tgate_trt.files import read_json, read_named, read_tensors, weight_files
from tgate_trt.models.fingerprints import Fingerprint, fingerprint_of
from tgate_trt.models.lora import Lora, LoraFile, fuse
from tgate_trt.models.signature import TIME_IDS, TIME_IDS_WITH_SCORE, dimensions, maximum_rows, signature
from tgate_trt.models.single_file import original_components, read_denoiser
from tgate_trt.specs import DTYPES, ROWS, Bounds, GraphSpec, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

INDEX = "model_index.json"
SCHEDULER = "scheduler_config.json"

LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that text to image does without; the last two encode an image, for image to video and IP-Adapters."""

IMAGE_TO_VIDEO = "StableVideoDiffusionPipeline"

_SMALL = ("Tokenizer", "Processor", "FeatureExtractor")
"""Parts of the class names of components without weights, beside schedulers."""

_LARGE = 500_000_000
"""Parameters."""

Tensors = Iterator[tuple[str, "Tensor"]]
"""Names and values of a component's state dict, one at a time."""


@dataclass(frozen=True)
class ModelReference:
    """How a model is found again, as plain data: a manifest keeps it, and a child process is given it."""

    model: str
    """A name, a path or a hub id, as `tgate_trt.models.resolve.resolve` takes it."""
    random_seed: int | None = None
    """Seed of random weights, or None for the model's own."""
    lora: tuple[LoraFile, ...] = ()
    """Fused into its weights wherever they are read."""
    prediction_type: str | None = None
    """Given by the caller, or None for the model's own."""
    config: str | None = None
    """Folder of a checkpoint's configuration, given by the caller."""


class Weights(Protocol):
    """Where the weights of a model come from."""

    def files(self, component: str, folder: Path) -> dict[str, Path]:
        """The files that hold a component's weights, by the name under which each counts."""

    def denoiser(self, source: ModelSource) -> Tensors:
        """The denoiser's tensors, in the order of its state dict, in the dtypes in which they are stored or drawn."""

    def others(self, source: ModelSource) -> Iterator[tuple[str, Tensors]]:
        """Every other component that has weights, with its tensors."""


@dataclass(frozen=True)
class Stored:
    """Weights in the safetensors files of a diffusers folder."""

    def files(self, component: str, folder: Path) -> dict[str, Path]:
        return {f"{component}/{path.name}": path for path in weight_files(folder)}

    def denoiser(self, source: ModelSource) -> Tensors:
        return read_tensors(weight_files(source.component(source.denoiser_attribute)), source.tensor_shapes())

    def others(self, source: ModelSource) -> Iterator[tuple[str, Tensors]]:
        for name in source.other_models():
            yield name, read_named(weight_files(source.component(name)))


@dataclass(frozen=True)
class Checkpoint:
    """Weights in one file in the original authors' layout; the folder has the configuration alone."""

    file: Path

    def files(self, component: str, folder: Path) -> dict[str, Path]:
        return {"checkpoint.safetensors": self.file}

    def denoiser(self, source: ModelSource) -> Tensors:
        return read_denoiser(self.file, source.denoiser_config(), source.tensor_shapes())

    def others(self, source: ModelSource) -> Iterator[tuple[str, Tensors]]:
        tokenizers = {name: (kind, source.component(name)) for name, kind in source.components().items() if "Tokenizer" in kind}
        denoiser = {source.denoiser_attribute: source.denoiser_on_meta()}
        pipeline = original_components(self.file, source.index()["_class_name"], source.folder, tokenizers, **denoiser)
        for name in source.other_models():
            yield name, iter(getattr(pipeline, name).state_dict().items())


@dataclass(frozen=True)
class Random:
    """Seeded random weights for an architecture."""

    seed: int

    def files(self, component: str, folder: Path) -> dict[str, Path]:
        return {}

    def denoiser(self, source: ModelSource) -> Tensors:
        return self._tensors(source.denoiser_attribute, source.denoiser_on_meta())

    def others(self, source: ModelSource) -> Iterator[tuple[str, Tensors]]:
        from tgate_trt.eager import on_meta

        for name, kind in source.other_models().items():
            yield name, self._tensors(name, on_meta(kind, read_json(source.component(name) / "config.json")))

    def _tensors(self, component: str, module: nn.Module) -> Tensors:
        from tgate_trt.models.random_weights import state_tensors

        return state_tensors(module, seed=self.seed, component=component)


@dataclass(frozen=True)
class ModelSource:
    """A model that a bundle can be built from. It holds places and numbers, no tensors, so it is cheap and picklable."""

    name: str
    """As it stands in the bundle's folder name."""
    reference: ModelReference
    folder: Path
    """Diffusers folder with at least its configuration."""
    weights: Weights
    denoiser_attribute: str
    """``"unet"`` or ``"transformer"``."""
    gate_step: int | float | None
    """The model's default gate, or None if it has none."""
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
    elsewhere: Mapping[str, Path] = field(default_factory=dict)
    """Folders of components that are not in ``folder``."""
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    """Settings of its scheduler that differ from those of the folder."""
    revision: str | None = None
    """Commit of a model from the hub."""
    after_gate: str | None = None
    """What the model's runs do from the gate on, or None for the method's own way."""
    without: tuple[str, ...] = ()
    """Further components that bundles leave out."""

    def component(self, name: str) -> Path:
        """Folder of a component."""
        return self.elsewhere.get(name, self.folder / name)

    def index(self) -> dict[str, Any]:
        """The pipeline's ``model_index.json`` with the components that bundles leave out set to null."""
        index = read_index(self.folder)
        index[self.denoiser_attribute] = ["diffusers", self.denoiser_config()["_class_name"]]
        if "scheduler" in self.elsewhere:
            index["scheduler"] = ["diffusers", read_json(self.component("scheduler") / SCHEDULER)["_class_name"]]
        if "requires_safety_checker" in index:
            index["requires_safety_checker"] = False
        takes_images = index["_class_name"] == IMAGE_TO_VIDEO or self.denoiser_config().get(ip_adapter.KEY)
        left_out = LEFT_OUT[:1] if takes_images else LEFT_OUT
        return index | {name: [None, None] for name in (*left_out, *self.without) if name in index}

    def components(self) -> dict[str, str]:
        """Class name of each component that a bundle keeps, the denoiser's included."""
        return {name: entry[1] for name, entry in self.index().items() if isinstance(entry, list) and entry[0] is not None}

    def other_models(self) -> dict[str, str]:
        """Class name of each component but the denoiser that has weights."""
        return {name: kind for name, kind in self.components().items() if name != self.denoiser_attribute and _has_weights(name, kind)}

    def denoiser_config(self) -> dict[str, Any]:
        """The denoiser's configuration, with its class and without what depends on where and when it was saved."""
        return normalised(read_json(self.component(self.denoiser_attribute) / "config.json"))

    def signature(self, height: int, width: int, precision: str) -> tuple[TensorSpec, ...]:
        """The denoiser's inputs for pictures of one size in pixels and prompts of the model's own length."""
        return self.spec(height, width, precision, self.text_tokens).inputs

    def spec(
        self, height: int | Bounds, width: int | Bounds, precision: str, text_tokens: int | Bounds, controls: tuple[str, ...] = ()
    ) -> GraphSpec:
        """The denoiser's inputs, with every dimension that may vary; see `tgate_trt.models.signature.signature`.

        Raises:
            InputError: if the model cannot make pictures of these sizes.
            UnsupportedError: if it takes conditions that the graphs lack.
        """
        config = self.denoiser_config()
        sizes: dict[str, Any] = {
            "height": height,
            "width": width,
            "vae_scale_factor": self.vae_scale_factor,
            "text_tokens": text_tokens,
        }
        inputs = signature(config, **sizes, dtype=DTYPES[precision], time_ids=self.time_ids, controls=controls)
        most = maximum_rows(config)
        return GraphSpec("denoiser", inputs, (), {ROWS: Bounds(1, min(2, most), most)} | dimensions(config, **sizes))

    @property
    def time_ids(self) -> int:
        """Numbers of SDXL's micro-conditioning; the refiner's pipeline gives an aesthetic score instead of a target size."""
        return TIME_IDS_WITH_SCORE if read_index(self.folder).get("requires_aesthetics_score") else TIME_IDS

    def fingerprint(self, known: Fingerprint | None = None) -> Fingerprint:
        """Identify the content that a bundle is built from.

        Args:
            known: an earlier fingerprint; a file whose size, time and inode equal those in it is not read again.

        Returns:
            JSON data: ``content``, a hash of everything that matters and of no place or time; ``files``, with ``size``,
            ``mtime_ns``, ``inode`` and ``sha256`` by path; ``seed``, ``revision``.
        """
        return fingerprint_of(self.files(), seed=self.reference.random_seed, settings=self.scheduler, revision=self.revision, known=known)

    def files(self) -> dict[str, Path]:
        """Every file that decides what a bundle holds, by its path in a diffusers folder.

        Raises:
            InputError: if a component lacks weights that can be read without unpickling.
        """
        files = {INDEX: self.folder / INDEX}
        for name, kind in self.components().items():
            folder = self.component(name)
            if _has_weights(name, kind):
                files |= {f"{name}/config.json": folder / "config.json", **self.weights.files(name, folder)}
            else:
                files |= {f"{name}/{path.name}": path for path in sorted(folder.glob("*")) if path.is_file()}
        return files | {f"lora/{index}:{one.scale}": one.path for index, one in enumerate(self.reference.lora)}

    def scheduler_config(self) -> dict[str, Any]:
        """The scheduler's configuration."""
        return read_json(self.component("scheduler") / SCHEDULER) | dict(self.scheduler)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the denoiser's state dict, in its order; no weights are read."""
        return dict(_shapes(json.dumps(self.denoiser_config(), sort_keys=True)))

    def tensors(self, dtype: torch.dtype) -> Tensors:
        """Give the denoiser's state dict one tensor at a time, in its order, under diffusers' own names and shapes.

        Args:
            dtype: to which floating tensors are cast.

        Raises:
            InputError: if the files lack a tensor or hold it in another shape.
        """
        for name, tensor in self._fused(self.denoiser_attribute, self.weights.denoiser(self), self.loras()):
            yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor

    def other_tensors(self) -> Iterator[tuple[str, Tensors]]:
        """Give every component but the denoiser that has weights, with its tensors, LoRAs fused.

        Raises:
            InputError: if a component's files cannot be read.
        """
        loras = self.loras()
        for name, tensors in self.weights.others(self):
            yield name, self._fused(name, tensors, loras)

    def loras(self) -> list[Lora]:
        """The LoRAs, read and checked against the denoiser's weights.

        Raises:
            InputError: if one is not of this architecture.
        """
        loras = [Lora.read(file, self.denoiser_config()) for file in self.reference.lora]
        for lora in loras:
            lora.check(self.denoiser_attribute, self.tensor_shapes())
            for component in set(lora.factors) - set(self.components()):
                raise InputError(f"{lora.file.path} changes the {component}, which this model does not have")
        return loras

    def _fused(self, component: str, tensors: Iterable[tuple[str, Tensor]], loras: Sequence[Lora]) -> Tensors:
        """A component's weights with the LoRAs in them, in fp32 where there are any, so that they are rounded once."""
        if not loras:
            return iter(tensors)
        return fuse(loras, component, ((name, tensor.float() if tensor.is_floating_point() else tensor) for name, tensor in tensors))

    @property
    def is_large(self) -> bool:
        """Whether a step takes minutes on a CPU, and tracing hundreds of megabytes."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values()) > _LARGE

    def denoiser_on_meta(self) -> nn.Module:
        """The denoiser's architecture on the ``meta`` device, in eval mode."""
        from tgate_trt.eager import on_meta

        config = self.denoiser_config()
        return on_meta(config["_class_name"], config)

    def load_denoiser(self, dtype: torch.dtype) -> nn.Module:
        """The denoiser in eager PyTorch on the CPU, in eval mode, without gradients: the reference for every graph."""
        from torch import nn

        from tgate_trt.eager import empty

        config = self.denoiser_config()
        denoiser = empty(config["_class_name"], config)
        denoiser.load_state_dict(dict(self.tensors(dtype)), assign=True)
        # `from_pretrained` casts computed buffers so; the models' own `to` would warn of layers that are not there.
        return nn.Module.to(denoiser, dtype).requires_grad_(False)


def read_index(folder: Path) -> dict[str, Any]:
    """A pipeline's ``model_index.json``.

    Raises:
        InputError: if the folder is no diffusers pipeline.
    """
    if not (folder / INDEX).is_file():
        raise InputError(f"{folder} is no diffusers pipeline: it has no {INDEX}; give the folder that holds unet, vae and text_encoder")
    index = read_json(folder / INDEX)
    if "_class_name" not in index:
        raise InputError(f"{folder / INDEX} names no pipeline class; download the model again")
    return index


def is_distilled(config: Mapping[str, Any], guidance_scale: float | None) -> bool:
    """Whether a model draws without guidance: its scale is an input of the denoiser, as LCM's, or there is none by default, as Turbo's."""
    return bool(config.get("time_cond_proj_dim")) or (guidance_scale is not None and guidance_scale <= 1)


def normalised(config: Mapping[str, Any]) -> dict[str, Any]:
    """A denoiser's configuration without private keys, under the name that its class has now.

    Raises:
        InputError: if it names no class.
    """
    if "_class_name" not in config:
        raise InputError("the denoiser's config.json names no class; download the model again")
    kind = config["_class_name"]
    if kind == "Transformer2DModel" and config.get("norm_type") == "ada_norm_single":
        kind = "PixArtTransformer2DModel"  # diffusers split it off in 0.28; published PixArt models have the old name
    return {"_class_name": kind} | {name: value for name, value in config.items() if not name.startswith("_")}


def _has_weights(name: str, kind: str) -> bool:
    """Whether a component is a model, not a scheduler or a tokenizer."""
    return name != "scheduler" and not any(part in kind for part in _SMALL)


@lru_cache(maxsize=8)
def _shapes(config: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and shapes of a denoiser's state dict; SDXL takes a second, and builds ask several times."""
    from tgate_trt.eager import on_meta

    data = json.loads(config)
    return tuple((name, tuple(tensor.shape)) for name, tensor in on_meta(data["_class_name"], data).state_dict().items())

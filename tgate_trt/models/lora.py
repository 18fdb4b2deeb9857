"""LoRA files: read in the usual formats, and fused into weights a tensor at a time.

A LoRA changes a weight ``W`` to ``W + scale · (alpha / rank) · up @ down``. Files use many
names for ``up`` and ``down``; diffusers' own conversions map them, so peft is not needed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgate_trt.errors import InputError, UnsupportedError
from tgate_trt.files import opened_file

if TYPE_CHECKING:
    from torch import Tensor

_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
_NOT_PLAIN = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_": "LoHa", "lokr_": "LoKr", "lora_mid": "LoCon with a core"}
"""Kinds of adapters that are more than two factors, by a part of their keys."""


@dataclass(frozen=True)
class LoraFile:
    """A file and its scale, as a user gives them."""

    path: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> LoraFile:
        """Read ``FILE`` or ``FILE:SCALE``.

        Raises:
            InputError: if there is no such file, it is no .safetensors file, or the scale is no number.
        """
        name, colon, scale = text.rpartition(":")
        if not colon or Path(text).is_file():
            name, scale = text, "1"
        path = Path(name).expanduser()
        try:
            strength = float(scale)
        except ValueError:
            strength = math.nan
        if not math.isfinite(strength):
            raise InputError(f"a LoRA is FILE or FILE:SCALE, such as style.safetensors:0.8, got {text!r}")
        if not path.is_file():
            raise InputError(f"there is no LoRA file {path}")
        if path.suffix != ".safetensors":
            raise InputError(f"a LoRA is read from a .safetensors file, which cannot run code, got {path}")
        return cls(path.resolve(), strength)


@dataclass(frozen=True)
class Lora:
    """A LoRA in memory: two factors for each weight that it changes."""

    file: LoraFile
    factors: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]
    """``up`` and ``down`` by component and parameter; the scale and ``alpha / rank`` are part of ``up``."""

    @classmethod
    def read(cls, file: LoraFile, denoiser: Mapping[str, Any]) -> Lora:
        """Read a file of kohya's, diffusers' or peft's format.

        Args:
            file: to read.
            denoiser: configuration of the denoiser; kohya's names for SDXL depend on its blocks.

        Raises:
            InputError: if the file cannot be read, or holds what no LoRA holds.
            UnsupportedError: if it is an adapter of another kind.
        """
        tensors, metadata = _load(file.path)
        for key in tensors:
            for part, kind in _NOT_PLAIN.items():
                if part in key:
                    raise UnsupportedError(f"{file.path} is a {kind} adapter ({key!r}); this version fuses plain LoRA")
        by_component: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        for component, state in _by_component(file.path, _fold_alphas(file.path, tensors), denoiser).items():
            scales = _Scales(metadata, component)
            by_component[component] = {
                f"{module}.weight": (up.float() * (file.scale * scales.of(module, down.shape[0])), down.float())
                for module, (up, down) in _pairs(file.path, state).items()
            }
        return cls(file, by_component)

    def check(self, component: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that a model has the weights that this LoRA changes.

        Args:
            component: of the pipeline.
            shapes: of its parameters, by name.

        Raises:
            InputError: naming the first weight that does not fit.
        """
        known = {_short(name): shape for name, shape in shapes.items()}
        for name, (up, down) in self.factors.get(component, {}).items():
            shape = known.get(_short(name))
            if shape is None or up.shape[0] * down[0].numel() != math.prod(shape) or up.shape[0] != shape[0]:
                has = "the model has no such weight" if shape is None else f"the model's has shape {list(shape)}"
                raise InputError(
                    f"{self.file.path} does not fit this model: it changes {component}.{name} by {[up.shape[0], *down.shape[1:]]}, "
                    f"and {has}; is it made for another architecture?"
                )


def fuse(loras: Sequence[Lora], component: str, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Fuse LoRAs into the weights of a component, as they pass by.

    Args:
        loras: all that count.
        component: ``"unet"``, ``"transformer"``, ``"text_encoder"`` or ``"text_encoder_2"``.
        tensors: names and weights. Sums are taken in fp32 and rounded once, to the weight's dtype.

    Yields:
        Every name with its weight, the very same tensor where no LoRA changes it.
    """
    factors = [{_short(name): pair for name, pair in lora.factors.get(component, {}).items()} for lora in loras]
    for name, tensor in tensors:
        pairs = [own[_short(name)] for own in factors if _short(name) in own]
        if not pairs:
            yield name, tensor
            continue
        total = tensor.float()
        for up, down in pairs:
            total = total + (up.flatten(1) @ down.flatten(1)).reshape(tensor.shape).to(total.device)
        yield name, total.to(tensor.dtype)


_PREFIX = "text_model."
"""Begins the names of a text encoder's parameters in files; transformers 5 leaves it out of modules."""


def parameter_names(name: str) -> tuple[str, str]:
    """The names that a parameter may have in a module of transformers 5 and in files: without and with their prefix."""
    short = name.removeprefix(_PREFIX)
    return short, _PREFIX + short


def _short(name: str) -> str:
    return parameter_names(name)[0]


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, and the settings that peft left in its header."""
    with opened_file(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        try:
            settings = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
        except ValueError as error:
            raise InputError(f"{path} has settings of peft that are not JSON ({error}); save the LoRA again") from error
    if not tensors:
        raise InputError(f"{path} holds no tensors")
    return tensors, settings


def _fold_alphas(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Kohya's files hold an ``alpha`` a module: multiply ``up`` by alpha / rank, so that it is not asked for again."""
    folded = {name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}
    for name in tensors.keys() - folded.keys():
        module = name.removesuffix(".alpha")
        up, down = f"{module}.lora_up.weight", f"{module}.lora_down.weight"
        if up not in folded or down not in folded:
            raise InputError(f"{path} holds {name!r} without the LoRA's factors; it is not a LoRA that this version reads")
        folded[up] = folded[up].float() * (float(tensors[name]) / folded[down].shape[0])
    return folded


def _by_component(path: Path, tensors: dict[str, Tensor], denoiser: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The file's tensors under peft's names, by component."""
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
    from diffusers.utils.state_dict_utils import (
        StateDictType,
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    try:
        state, _ = StableDiffusionXLLoraLoaderMixin.lora_state_dict(tensors, unet_config=_Config(denoiser))
        if not any(name.startswith(_COMPONENTS) for name in state):  # attention processors of before 2023 are a UNet's
            state = {f"unet.{name}": tensor for name, tensor in state.items()}
        found = {}
        for component in _COMPONENTS:
            own = {name.removeprefix(f"{component}."): tensor for name, tensor in state.items() if name.startswith(f"{component}.")}
            if own and component.startswith("text"):
                kind = StateDictType.DIFFUSERS_OLD if any(re.search(r"\.to_(q|k|v|out)_lora\.", name) for name in own) else None
                own = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own, kind))
            elif own and not any("lora_A" in name for name in own):
                own = convert_unet_state_dict_to_peft(own)
            if own:
                found[component] = own
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"{path} is not a LoRA in a format that diffusers reads: {reason}") from error
    lost = [name for name in state if not name.startswith(tuple(f"{component}." for component in found))]
    if lost:
        raise UnsupportedError(f"{path} holds {lost[0]!r}, which belongs to no component that this version supports")
    return found


class _Config:
    """A denoiser's configuration as diffusers' conversion reads it, by attributes."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.layers_per_block = config.get("layers_per_block", 2)


def _pairs(path: Path, state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """``up`` and ``down`` by module; every tensor must be one of the two."""
    pairs = {}
    used = set()
    for name, down in state.items():
        module, found, _ = name.partition(".lora_A.")
        up = state.get(name.replace(".lora_A.", ".lora_B."))
        if not found or up is None:
            continue
        if down.ndim not in (2, 4) or up.shape[1] != down.shape[0] or any(size != 1 for size in up.shape[2:]):
            raise UnsupportedError(
                f"{path} changes {module!r} by factors of shapes {list(up.shape)} and {list(down.shape)}, not a plain LoRA's"
            )
        pairs[module] = (up, down)
        used |= {name, name.replace(".lora_A.", ".lora_B.")}
    left = sorted(set(state) - used)
    if left:
        raise UnsupportedError(f"{path} holds {left[0]!r}, which is no factor of a plain LoRA")
    return pairs


class _Scales:
    """Alpha over rank of each module, from peft's settings; 1 where a file has none, because its alphas are folded in."""

    def __init__(self, metadata: Mapping[str, Any], component: str) -> None:
        prefix = f"{component}."
        self._settings = {name.removeprefix(prefix): value for name, value in metadata.items() if name.startswith(prefix)}

    def of(self, module: str, rank: int) -> float:
        """The factor of one module."""
        if "lora_alpha" not in self._settings:
            return 1.0
        patterns: Mapping[str, float] = self._settings.get("alpha_pattern") or {}
        alpha = next(
            (value for name, value in patterns.items() if module == name or module.endswith(f".{name}")), self._settings["lora_alpha"]
        )
        return float(alpha) / (math.sqrt(rank) if self._settings.get("use_rslora") else rank)

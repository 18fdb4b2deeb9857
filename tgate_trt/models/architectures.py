"""The named models, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Architecture:
    """Facts about a named model that its configuration files lack."""

    name: str
    height: int
    """Native height of a picture in pixels."""
    width: int
    """Native width of a picture in pixels."""
    gate_step: int | float
    """Default gate: the official step over the official number of steps, so that it suits any number of steps."""
    steps: int
    """Default number of sampling steps."""
    guidance_scale: float | None
    """Default guidance scale, or None for the pipeline's own."""
    hub_id: str | None
    """Repository of its weights; None if this package ships them."""
    denoiser_hub_id: str | None = None
    """Repository of the denoiser's weights, if another."""
    base: str | None = None
    """Model whose configuration files stand in for those that this one shares with it."""
    without: tuple[str, ...] = ()
    """Components that random weights leave out, as text encoders of gigabytes are; the pipeline then takes ``prompt_embeds``."""
    what: str = "text to image"
    """What it makes from what."""
    after_gate: str | None = None
    """What its runs do from the gate on, if it is not the method's own way; of `tgate_trt.gate.after_gate.AFTER_GATE`."""
    is_official: bool = True
    """Whether the gate is one of the official code; else it is our own choice, after the nearest of those."""

    @property
    def folder(self) -> Path:
        """Folder of its configuration files, and of its weights if this package ships them."""
        return _HERE / "configs" / self.name if self.hub_id else _HERE / "demo" / "model"

    @property
    def shared(self) -> dict[str, Path]:
        """Folders of the configuration files that it shares with its base, by component."""
        if self.base is None:
            return {}
        theirs = ARCHITECTURES[self.base].folder
        return {each.name: each for each in theirs.iterdir() if each.is_dir() and not (self.folder / each.name).exists()}


DEMO = Architecture("shapes", 64, 64, 10 / 25, 25, 2.0, None)
"""The model that this package ships, at the steps and the guidance scale for which its accuracy is stated."""

_SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
_TEXT = ("text_encoder", "tokenizer")
_UNET_GATE, _TRANSFORMER_GATE, _LCM_GATE = 10 / 25, 15 / 25, 2 / 4

ARCHITECTURES: Mapping[str, Architecture] = {
    row.name: row
    for row in (
        DEMO,
        Architecture("sd15", 512, 512, _UNET_GATE, 25, 7.5, "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        Architecture("sd21", 768, 768, _UNET_GATE, 25, 7.5, "stabilityai/stable-diffusion-2-1"),
        Architecture("sdxl", 1024, 1024, _UNET_GATE, 25, 5.0, _SDXL),
        Architecture("lcm-sdxl", 1024, 1024, _LCM_GATE, 4, 8.0, _SDXL, "latent-consistency/lcm-sdxl"),
        Architecture("pixart-alpha", 1024, 1024, _TRANSFORMER_GATE, 25, 4.5, "PixArt-alpha/PixArt-XL-2-1024-MS", without=_TEXT),
        Architecture("pixart-sigma", 1024, 1024, _TRANSFORMER_GATE, 25, 4.5, "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", without=_TEXT),
        Architecture(
            "lcm-pixart", 1024, 1024, _LCM_GATE, 4, 0.0, "PixArt-alpha/PixArt-LCM-XL-2-1024-MS", base="pixart-alpha", without=_TEXT
        ),
        Architecture(
            "svd",
            576,
            1024,
            _UNET_GATE,
            25,
            None,
            "stabilityai/stable-video-diffusion-img2vid",
            what="image to video",
            after_gate="positive-mean",
        ),
        Architecture(
            "sdxl-refiner",
            1024,
            1024,
            _UNET_GATE,
            25,
            5.0,
            "stabilityai/stable-diffusion-xl-refiner-1.0",
            base="sdxl",
            what="image to image",
            is_official=False,
        ),
        Architecture("sdxl-turbo", 512, 512, _LCM_GATE, 4, 0.0, "stabilityai/sdxl-turbo", base="sdxl", is_official=False),
        Architecture(
            "playground-v2.5",
            1024,
            1024,
            _UNET_GATE,
            25,
            3.0,
            "playgroundai/playground-v2.5-1024px-aesthetic",
            base="sdxl",
            is_official=False,
        ),
        Architecture(
            "kolors", 1024, 1024, _UNET_GATE, 25, 5.0, "Kwai-Kolors/Kolors-diffusers", base="sdxl", without=_TEXT, is_official=False
        ),
        Architecture(
            "sana",
            1024,
            1024,
            _TRANSFORMER_GATE,
            20,
            4.5,
            "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
            without=_TEXT,
            is_official=False,
        ),
        Architecture(
            "hunyuan-dit",
            1024,
            1024,
            _TRANSFORMER_GATE,
            25,
            5.0,
            "Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers",
            base="pixart-sigma",
            without=(*_TEXT, "text_encoder_2", "tokenizer_2"),
            is_official=False,
        ),
        Architecture(
            "cosmos-predict2",
            704,
            1280,
            _TRANSFORMER_GATE,
            35,
            7.0,
            "nvidia/Cosmos-Predict2-2B-Text2Image",
            without=_TEXT,
            is_official=False,
        ),
        Architecture(
            "wan-1.3b", 480, 832, _TRANSFORMER_GATE, 25, 5.0, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", without=_TEXT, is_official=False
        ),
        Architecture(
            "stable-audio", 8, 8, _TRANSFORMER_GATE, 100, 7.0, "stabilityai/stable-audio-open-1.0", what="text to sound", is_official=False
        ),
    )
}
"""The named models."""


def names(what: str | None = None) -> str:
    """The names of the models, all or those that make this from that, as text with commas."""
    return ", ".join(row.name for row in ARCHITECTURES.values() if what in (None, row.what))


def table() -> str:
    """The named models as a table in Markdown."""
    lines = ["| model | makes | weights | picture | steps | guidance | gate step |", "|---|---|---|---|---|---|---|"]
    for row in ARCHITECTURES.values():
        weights = f"`{row.hub_id}`" if row.hub_id else "in this package"
        if row.denoiser_hub_id:
            weights += f", `{row.denoiser_hub_id}`"
        size = "–" if row.what == "text to sound" else f"{row.width}×{row.height}"
        guidance = "the pipeline's" if row.guidance_scale is None else f"{row.guidance_scale:g}"
        gate = f"{round(row.gate_step * row.steps)} of {row.steps}" + ("" if row.is_official else " (ours)")
        lines.append(f"| `{row.name}` | {row.what} | {weights} | {size} | {row.steps} | {guidance} | {gate} |")
    return "\n".join(lines)


def short_table() -> str:
    """The names of the models alone, by what they make, as a table in Markdown."""
    usual = "text to image"
    others = ", ".join(f"{row.name} ({row.what})" for row in ARCHITECTURES.values() if row.what != usual)
    return f"| makes | `--model` |\n|---|---|\n| {usual} | {names(usual)} |\n| other | {others} |"

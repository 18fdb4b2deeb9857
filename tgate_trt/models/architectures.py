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

    @property
    def folder(self) -> Path:
        """Folder of its configuration files, and of its weights if this package ships them."""
        return _HERE / "configs" / self.name if self.hub_id else _HERE / "demo" / "model"


DEMO = Architecture("shapes", 64, 64, 10 / 25, 25, 2.0, None)
"""The model that this package ships, at the steps and the guidance scale for which its accuracy is stated."""

_SDXL = "stabilityai/stable-diffusion-xl-base-1.0"

ARCHITECTURES: Mapping[str, Architecture] = {
    row.name: row
    for row in (
        DEMO,
        Architecture("sd15", 512, 512, 10 / 25, 25, 7.5, "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        Architecture("sd21", 768, 768, 10 / 25, 25, 7.5, "stabilityai/stable-diffusion-2-1"),
        Architecture("sdxl", 1024, 1024, 10 / 25, 25, 5.0, _SDXL),
        Architecture("lcm-sdxl", 1024, 1024, 2 / 4, 4, 8.0, _SDXL, "latent-consistency/lcm-sdxl"),
        Architecture("pixart-alpha", 1024, 1024, 15 / 25, 25, 4.5, "PixArt-alpha/PixArt-XL-2-1024-MS"),
        Architecture("pixart-sigma", 1024, 1024, 15 / 25, 25, 4.5, "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"),
    )
}
"""The named models; gate steps are the official defaults of T-GATE."""

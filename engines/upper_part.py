"""The part of a UNet that runs while its deep features are reused (DeepCache, arXiv 2312.00858)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tgate_trt.taps import LAYERS_OF_A_BRANCH


def keep_upper_part(unet: Any, branch: int, deep: Callable[[], Tensor]) -> None:
    """Remove from a UNet of diffusers every layer whose output nothing needs once the deep features are given.

    Args:
        unet: is changed; `tgate_trt.eager.deep_paths` describes its branches.
        branch: at which the deep features enter.
        deep: gives them, ``[rows, channels, height, width]``.
    """
    block, layer = divmod(branch, LAYERS_OF_A_BRANCH)
    down, up = list(unet.down_blocks), list(unet.up_blocks)[-1 - block :]
    layers = min(layer + 1, len(up[0].resnets))
    _keep_layers(up[0], slice(-layers, None))
    _keep_layers(down[block], slice(layers - 1))
    down[block].downsamplers = None
    unet.down_blocks, unet.mid_block, unet.up_blocks = nn.ModuleList(down[: block + 1]), _Given(deep), nn.ModuleList(up)


def _keep_layers(block: Any, kept: slice) -> None:
    for name in ("resnets", "attentions"):
        if isinstance(layers := getattr(block, name, None), nn.ModuleList):
            setattr(block, name, nn.ModuleList(list(layers)[kept]))


class _Given(nn.Module):
    """Stands where the middle of the UNet stood, and returns what it is given."""

    def __init__(self, value: Callable[[], Tensor]) -> None:
        super().__init__()
        self._value = value

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self._value()

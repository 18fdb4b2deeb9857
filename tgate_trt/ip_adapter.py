"""IP-Adapters of a UNet: modules that a configuration of diffusers does not describe, and a scale that is an input of the graphs.

A UNet's configuration gets a key, `KEY`, with a row of data for each adapter. A scale acts on the values of the image's tokens, which a
linear layer without a bias gives: scaling those is scaling what the image adds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from tgate_trt.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor, nn

KEY = "ip_adapters"
"""Key of a UNet's configuration: a list with the ``tokens`` of an image and the ``width`` of its embedding for each adapter."""

SCALE = "ip_adapter_scale"
"""Input of the graphs: one scale for each adapter."""


def described(unet: nn.Module) -> list[dict[str, int]]:
    """The adapters of a UNet, as its configuration is to have them; none for a UNet without.

    Raises:
        UnsupportedError: if one is of a kind that this version does not build.
    """
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

    projections = getattr(unet, "encoder_hid_proj", None)
    if not isinstance(projections, MultiIPAdapterImageProjection):
        return []
    found = []
    for layer in projections.image_projection_layers:
        if type(layer) is not ImageProjection:
            raise UnsupportedError(
                f"this version builds IP-Adapters with an ImageProjection, got {type(layer).__name__}; unload it by unload_ip_adapter()"
            )
        found.append({"tokens": int(layer.num_image_text_embeds), "width": int(layer.image_embeds.in_features)})
    return found


def add(unet: Any, adapters: list[dict[str, int]]) -> None:
    """Give a UNet adapters without weights, where `torch.device` says."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

    width = unet.config.cross_attention_dim
    tokens = [adapter["tokens"] for adapter in adapters]
    layers = [ImageProjection(adapter["width"], width, adapter["tokens"]) for adapter in adapters]
    unet.encoder_hid_proj = MultiIPAdapterImageProjection(layers)
    for module in _with_adapters(unet):
        module.set_processor(IPAdapterAttnProcessor2_0(module.inner_dim, width, num_tokens=tokens, scale=1.0))
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")


def scale_of(unet: Any) -> list[float]:
    """The scale of each adapter, which all layers share.

    Raises:
        UnsupportedError: if layers have scales of their own.
    """
    scales = {tuple(cast(Any, module.processor).scale) for module in _with_adapters(unet)}
    if len(scales) != 1 or not all(isinstance(scale, int | float) for scale in next(iter(scales))):
        raise UnsupportedError("an IP-Adapter has one scale for all layers here; give set_ip_adapter_scale one number for each adapter")
    return [float(scale) for scale in scales.pop()]


@contextlib.contextmanager
def scaled(unet: nn.Module, scale: Tensor) -> Iterator[None]:
    """Within this context, what each adapter adds is multiplied by its scale, ``[adapters]``, in the place of the processors' own."""
    handles = []
    before = [(cast(Any, module.processor), cast(Any, module.processor).scale) for module in _with_adapters(unet)]
    for processor, own in before:
        processor.scale = [1.0] * len(own)
        for index, layer in enumerate(processor.to_v_ip):
            handles.append(layer.register_forward_hook(lambda _m, _i, values, index=index: values * scale[index]))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for processor, own in before:
            processor.scale = own


def _with_adapters(unet: nn.Module) -> list[Any]:
    """The attention modules of a UNet that an adapter acts on: its cross-attention."""
    return [module for path, module in unet.named_modules() if path.endswith("attn2") and "motion_modules" not in path]

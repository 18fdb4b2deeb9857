"""Modules of diffusers that compute with our kernels what they compute with several of PyTorch's: on instances, never on classes.

A module is changed only if its class is the very one whose ``forward`` is written out here, in diffusers 0.42, and all of its settings
are those that are assumed. Its parameters, and hooks on modules within it, stay.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tgate_trt.kernels import cached_residual_layer_norm as add_and_norm
from tgate_trt.kernels.cached_residual_layer_norm import cached_residual_layer_norm
from tgate_trt.kernels.geglu import geglu
from tgate_trt.kernels.group_norm import group_norm


def fuse_modules(model: nn.Module) -> None:
    """Fuse norms with what stands around them, and gated linear units, in a UNet, a transformer or a VAE; best with channels last."""
    from diffusers.models.activations import GEGLU
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    for module in list(model.modules()):
        kind: Any = module
        if type(module) is ResnetBlock2D and _is_plain(module):
            kind.forward = partial(_residual_block, module, module.forward)
        elif type(module) is GEGLU:
            kind.forward = partial(_gated_unit, module)
        elif type(module) is Transformer2DModel and module.is_input_continuous and _is_norm(module.norm):
            kind._operate_on_continuous_inputs = partial(_into_tokens, module)
            kind._get_output_for_continuous_inputs = partial(_out_of_tokens, module)
        if _is_norm(getattr(module, "conv_norm_out", None)) and type(getattr(module, "conv_act", None)) is nn.SiLU:
            kind.conv_norm_out.forward = partial(_norm, kind.conv_norm_out, silu=True)
            kind.conv_act.forward = _same


def adds_and_normalises(block: nn.Module, attention: nn.Module) -> bool:
    """Whether `transformer_block` computes what a block does, if this is its cross-attention."""
    from diffusers.models.attention import BasicTransformerBlock

    return (
        type(block) is BasicTransformerBlock
        and attention is block.attn2
        and block.norm_type == "layer_norm"
        and not block.only_cross_attention
        and block.pos_embed is None
        and block._chunk_size is None
        and not hasattr(block, "fuser")
        and all(_can_be_added_to(norm) for norm in (block.norm2, block.norm3))
    )


def transformer_block(
    block: Any,
    cached: Callable[[], Tensor] | None,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """The forward of diffusers' `BasicTransformerBlock` for ``norm_type="layer_norm"``; each sum and the norm after it are one op.

    Args:
        block: meets `adds_and_normalises`.
        cached: gives the output of the cross-attention, which then does not run.
        hidden_states: ``[rows, tokens, width]``.
        attention_mask: of the self-attention.
        encoder_hidden_states: text, ``[rows, tokens, width]``.
        encoder_attention_mask: of the cross-attention.
    """
    attended = block.attn1(block.norm1(hidden_states), attention_mask=attention_mask)
    if cached is None:
        hidden, normed = _add_and_norm(hidden_states, attended, block.norm2)
        crossed = block.attn2(normed, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)
    else:
        hidden, crossed = attended + hidden_states, cached()
    residual, normed = _add_and_norm(hidden, crossed, block.norm3)
    output: Tensor = block.ff(normed) + residual
    return output


def _add_and_norm(hidden: Tensor, more: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    residual, normed = cached_residual_layer_norm(hidden, more, norm.weight, norm.bias, norm.eps)
    return residual, normed


def _can_be_added_to(norm: Any) -> bool:
    return isinstance(norm, nn.LayerNorm) and norm.bias is not None and add_and_norm.takes(norm.weight.numel(), norm.weight.dtype)


def _is_norm(norm: Any) -> bool:
    return type(norm) is nn.GroupNorm and norm.affine


def _is_plain(block: Any) -> bool:
    """Whether `_residual_block` computes what a residual block does."""
    return (
        block.upsample is None
        and block.downsample is None
        and block.time_embedding_norm == "default"
        and type(block.nonlinearity) is nn.SiLU
        and _is_norm(block.norm1)
        and _is_norm(block.norm2)
    )


def _norm(norm: nn.GroupNorm, x: Tensor, shift: Tensor | None = None, *, silu: bool = False) -> Tensor:
    normed: Tensor = group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu, shift)
    return normed


def _same(x: Tensor) -> Tensor:
    return x


def _residual_block(block: Any, plain: Callable[..., Tensor], input_tensor: Tensor, temb: Tensor | None = None, *_: Any) -> Tensor:
    """The forward of diffusers' `ResnetBlock2D`: norms take the addition of the time embedding before and the SiLU after them."""
    shift = None
    if block.time_emb_proj is None and temb is not None:
        return plain(input_tensor, temb)
    if block.time_emb_proj is not None:
        shift = block.time_emb_proj(temb if block.skip_time_act else torch.nn.functional.silu(temb))  # type: ignore[arg-type]
    hidden = block.conv1(_norm(block.norm1, input_tensor, silu=True))
    hidden = block.conv2(block.dropout(_norm(block.norm2, hidden, shift, silu=True)))
    if block.conv_shortcut is not None:
        input_tensor = block.conv_shortcut(input_tensor)
    total: Tensor = input_tensor + hidden
    return total if block.output_scale_factor == 1 else total / block.output_scale_factor


def _gated_unit(module: Any, hidden_states: Tensor, *_: Any) -> Tensor:
    gated: Tensor = geglu(module.proj(hidden_states))
    return gated


def _into_tokens(model: Any, hidden_states: Tensor) -> tuple[Tensor, int]:
    """Pictures ``[rows, C, height, width]`` as tokens ``[rows, height · width, width]``: no copy if their channels come last."""
    rows, _, height, width = hidden_states.shape
    hidden = _norm(model.norm, hidden_states)
    if not model.use_linear_projection:
        hidden = model.proj_in(hidden)
    inner = hidden.shape[1]
    tokens = hidden.permute(0, 2, 3, 1).reshape(rows, height * width, inner)
    return (model.proj_in(tokens) if model.use_linear_projection else tokens), inner


def _out_of_tokens(model: Any, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int) -> Tensor:
    """Tokens as pictures, whose channels come last, added to the pictures that they came from."""
    hidden = model.proj_out(hidden_states) if model.use_linear_projection else hidden_states
    hidden = hidden.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)
    output: Tensor = (hidden if model.use_linear_projection else model.proj_out(hidden)) + residual
    return output

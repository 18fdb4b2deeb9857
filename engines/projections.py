"""Weights in the layout that a GPU's kernels read fastest: convolutions with channels last, an attention's projections as one matrix.

Both leave names, shapes and values as they are, so that engines share one copy of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tgate_trt.eager import attention_modules

_PROJECTIONS = ("to_q", "to_k", "to_v")
_JOINT = ("to_qkv", "to_kv")
"""Layers that diffusers' `FusedAttnProcessor2_0` calls."""


def arranged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights, convolutions with channels last, and those of each attention's projections one after the other in memory.

    Args:
        weights: by state-dict name.
    """
    found = {name: tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor for name, tensor in weights.items()}
    for name, value in weights.items():
        path, layer, kind = _split(name)
        if layer != "to_v":
            continue
        names = [f"{path}.{each}.{kind}" for each in _PROJECTIONS]
        together = [each for each in names if each in weights and weights[each].shape[1:] == value.shape[1:]]
        parts = [weights[each] for each in together]
        found.update(zip(together, torch.split(torch.cat(parts), [len(part) for part in parts]), strict=True))
    return found


def is_arranged(weights: Mapping[str, Tensor]) -> bool:
    """Whether `arranged` made these weights, as far as its convolutions show."""
    return any(
        tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
        for tensor in weights.values()
    )


def fuse_projections(denoiser: nn.Module) -> None:
    """Let each attention compute in one product the projections whose weights lie one after the other: of self-attention all three."""
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0

    for _, module in attention_modules(denoiser):
        if type(module) is not Attention or type(module.processor) not in (AttnProcessor2_0, FusedAttnProcessor2_0):
            continue
        names = _PROJECTIONS[1:] if module.is_cross_attention else _PROJECTIONS
        layers = [module.get_submodule(name) for name in names]
        joint = _joint_layer(layers) if all(type(layer) is nn.Linear for layer in layers) else None
        # Past nn.Module's registry: it holds no weights of its own.
        object.__setattr__(module, _JOINT[len(_PROJECTIONS) - len(names)], joint)
        module.processor = AttnProcessor2_0() if joint is None else FusedAttnProcessor2_0()


def separate_projections(denoiser: nn.Module) -> None:
    """Undo `fuse_projections`, which holds the weights."""
    for _, module in attention_modules(denoiser):
        for name in _JOINT:
            module.__dict__.pop(name, None)


def _joint_layer(layers: Sequence[nn.Module]) -> nn.Linear | None:
    """The layers as one on the same memory; None if their weights or biases do not lie one after the other."""
    weights = [layer.get_parameter("weight") for layer in layers]
    biases = [layer.get_parameter("bias") for layer in layers if layer.bias is not None]
    weight = _joint(weights)
    bias = _joint(biases) if len(biases) == len(layers) else None
    if weight is None or (biases and bias is None):
        return None
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _joint(tensors: Sequence[Tensor]) -> Tensor | None:
    """The tensors as one, without a copy; None if they do not lie one after the other."""
    first, end = tensors[0], tensors[0].data_ptr()
    for tensor in tensors:
        fits = tensor.shape[1:] == first.shape[1:] and tensor.dtype == first.dtype and tensor.is_contiguous()
        if not fits or tensor.data_ptr() != end or tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        end += tensor.nbytes
    return first.detach().as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride(), first.storage_offset())


def _split(name: str) -> tuple[str, str, str]:
    """Path, layer and kind of a parameter, such as ``…attn1``, ``to_q`` and ``weight``."""
    path, _, kind = name.rpartition(".")
    path, _, layer = path.rpartition(".")
    return path, layer, kind

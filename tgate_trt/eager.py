"""A denoiser in eager PyTorch, called by tensor names, with taps taken in and given out: the reference for every graph."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tgate_trt import ip_adapter
from tgate_trt.specs import CACHE_PREFIX, DTYPES
from tgate_trt.taps import CROSS_ATTENTION, LAYERS_OF_A_BRANCH, TAPPED_MODULES, Recipe, deep_features, kind_of

LOADING = threading.RLock()
"""Held while a module is made without weights or loaded: diffusers and accelerate patch `torch.nn.Module` meanwhile, for all threads, and
two that do so at once leave it patched."""

ADDED_CONDITIONS = ("text_embeds", "time_ids", "resolution", "aspect_ratio", "image_embeds")
"""Inputs that diffusers passes inside the dictionary ``added_cond_kwargs``."""


def torch_dtype(name: str) -> torch.dtype:
    """PyTorch's dtype for a precision, such as ``"fp16"``, or for a dtype's name, such as ``"float16"``."""
    dtype: torch.dtype = getattr(torch, DTYPES.get(name, name))
    return dtype


def module_of(kind: str, config: Mapping[str, Any]) -> nn.Module:
    """A module of diffusers or transformers, made from its configuration, in eval mode and with PyTorch's initial weights.

    Args:
        kind: name of its class.
        config: its ``config.json``; that of a module of diffusers has ``_class_name``.
    """
    if "_class_name" in config:
        import diffusers

        adapters = config.get(ip_adapter.KEY)
        left_out = (ip_adapter.KEY, "encoder_hid_dim_type") if adapters else ()
        settings = {name: value for name, value in config.items() if not name.startswith("_") and name not in left_out}
        module: nn.Module = getattr(diffusers, kind).from_config(settings)
        if adapters:
            ip_adapter.add(module, adapters)
    else:
        import transformers

        loader = getattr(transformers, kind)
        module = loader(loader.config_class.from_dict(dict(config)))
    return module.eval()


def on_meta(kind: str, config: Mapping[str, Any]) -> nn.Module:
    """The same module on the ``meta`` device: an architecture without weights, but with what it computes itself, such as positions."""
    with LOADING, torch.device("meta"):
        module = module_of(kind, config)
    if module.state_dict().keys() >= dict(module.named_buffers()).keys():
        return module
    return empty(kind, config)


def empty(kind: str, config: Mapping[str, Any]) -> nn.Module:
    """The same module whose parameters alone are on the ``meta`` device: what it computes itself, such as positions, has its values."""
    from accelerate import init_empty_weights

    with LOADING, init_empty_weights(include_buffers=False):
        return module_of(kind, config)


def is_architecture(module: nn.Module) -> bool:
    """Whether a module is on the ``meta`` device: an architecture without weights."""
    return any(parameter.is_meta for parameter in module.parameters())


def forward(denoiser: nn.Module, tensors: Mapping[str, Tensor | None]) -> Tensor:
    """Call a denoiser of diffusers with inputs by their names in `tgate_trt.models.signature.signature`.

    Args:
        denoiser: a UNet or a transformer of diffusers.
        tensors: inputs by name, at least ``sample``, ``timestep`` and ``encoder_hidden_states``; the last may be None if every
            cross-attention is cached.

    Returns:
        The prediction, ``[batch, channels, height, width]``.
    """
    scale = tensors.get(ip_adapter.SCALE)
    keywords = nested({name: tensor for name, tensor in tensors.items() if name != ip_adapter.SCALE})
    if "sample" not in inspect.signature(denoiser.forward).parameters:
        keywords["hidden_states"] = keywords.pop("sample")
    with contextlib.nullcontext() if scale is None else ip_adapter.scaled(denoiser, scale):
        prediction: Tensor = denoiser(**keywords, return_dict=False)[0]
    return prediction


def nested(tensors: Mapping[str, Tensor | None]) -> dict[str, Any]:
    """A denoiser's arguments from inputs by name: `flat` undone."""
    arguments: dict[str, Any] = {}
    added: dict[str, Any] = {}
    for name, tensor in tensors.items():
        argument, _, index = name.rpartition(".")
        holder = added if (argument or name) in ADDED_CONDITIONS else arguments
        if argument and index.isdecimal():
            holder.setdefault(argument, []).append(tensor)
        else:
            holder[name] = tensor
    return arguments | ({"added_cond_kwargs": added} if added else {})


def flat(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs by name from a denoiser's arguments: ``name.0``, ``name.1`` … for a list, and the entries of ``added_cond_kwargs``."""
    tensors: dict[str, Any] = {}
    for name, value in ({**arguments, **(arguments.get("added_cond_kwargs") or {})}).items():
        if name == "added_cond_kwargs":
            continue
        if isinstance(value, list | tuple) and value and all(isinstance(each, Tensor) for each in value):
            tensors |= {f"{name}.{index}": each for index, each in enumerate(value)}
        else:
            tensors[name] = value
    return tensors


def attention_modules(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each attention's tap, and its module.

    ``down_blocks.1.attentions.0.transformer_blocks.0.attn2`` carries the tap
    ``cross_attention.down_blocks.1.attentions.0.transformer_blocks.0``. What feeds a module decides, where it knows that itself: the
    ``attn2`` of AnimateDiff's motion modules is a second self-attention, and carries none.
    """
    for path, module in denoiser.named_modules():
        block, _, attribute = path.rpartition(".")
        kind = TAPPED_MODULES.get(attribute)
        if kind is not None and getattr(module, "is_cross_attention", kind == CROSS_ATTENTION) == (kind == CROSS_ATTENTION):
            yield f"{kind}.{block}", module


def tapped_modules(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each tap's name, and the module whose output it is."""
    yield from attention_modules(denoiser)
    for branch, path in enumerate(deep_paths(denoiser)):
        yield f"{deep_features(branch)}.{path}", denoiser.get_submodule(path)


def deep_paths(denoiser: nn.Module) -> list[str]:
    """Path of the module whose output is the deep features of each of DeepCache's branches; none for a model that is no UNet.

    The layers that a branch computes anew are the last ``layer + 1`` of the up-block that is the ``block``-th from the end, and all
    after it; they read the output of the layer, block or middle before them. A block with fewer layers has the same place for its
    further branches.
    """
    blocks = getattr(denoiser, "up_blocks", None)
    if blocks is None:
        return []
    paths = []
    for branch in range(LAYERS_OF_A_BRANCH * len(blocks)):
        block, layer = divmod(branch, LAYERS_OF_A_BRANCH)
        index = len(blocks) - 1 - block
        first = max(len(blocks[index].resnets) - 1 - layer, 0)
        if first:
            layers = "attentions" if getattr(blocks[index], "attentions", None) else "resnets"
            paths.append(f"up_blocks.{index}.{layers}.{first - 1}")
        else:
            paths.append(f"up_blocks.{index - 1}" if index else "mid_block")
    return paths


def replaced(output: Any, value: Tensor) -> Any:
    """A module's output with another tensor in the place of its tap: diffusers' transformers return it in a tuple."""
    return (value, *output[1:]) if isinstance(output, tuple) else value


def tensor_of(output: Any) -> Tensor:
    """The tensor in a module's output that is its tap."""
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


@contextlib.contextmanager
def tapped(denoiser: nn.Module, on_tap: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Within this context, ``on_tap(name, output)`` receives the output of each tapped module and returns its replacement."""

    def hook(tap: str) -> Callable[[nn.Module, object, Any], Any]:
        return lambda _module, _inputs, output: replaced(output, on_tap(tap, tensor_of(output)))

    handles = [module.register_forward_hook(hook(tap)) for tap, module in tapped_modules(denoiser)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_recipe(denoiser: nn.Module, recipe: Recipe, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute with the eager model what the graph of a recipe must return.

    Args:
        denoiser: the model, in the dtype of the floating inputs.
        recipe: which taps are taken in and given out.
        tensors: the model's inputs, and ``cache.<tap>`` for each tap that is taken in. Below the deep features that are taken in,
            taps do not reach the prediction, and may be missing.

    Returns:
        ``noise_pred``, and ``cache.<tap>`` for each tap that is given out.
    """
    given_out: dict[str, Tensor] = {}

    def on_tap(tap: str, output: Tensor) -> Tensor:
        value = tensors.get(CACHE_PREFIX + tap, output) if kind_of(tap) in recipe.takes_in else output
        if kind_of(tap) in recipe.gives_out:
            given_out[CACHE_PREFIX + tap] = value
        return value

    model_inputs = {name: tensor for name, tensor in tensors.items() if not name.startswith(CACHE_PREFIX)}
    with torch.no_grad(), tapped(denoiser, on_tap):
        prediction = forward(denoiser, model_inputs)
    return {"noise_pred": prediction, **given_out}

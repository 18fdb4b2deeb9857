"""The work of a step in multiply-accumulates: what bounds its time where arithmetic is all that counts.

Linear and convolution layers are counted, the two products of attention are not: the convention that reproduces the
figures of the T-GATE paper (arXiv 2404.02747, table 1) within 0.05 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tgate_trt.eager import forward
from tgate_trt.specs import ROWS, TensorSpec
from tgate_trt.taps import TAPPED_MODULES, recipe

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def macs_of_step(denoiser: nn.Module, inputs: Sequence[TensorSpec], graph: str, rows: int) -> int:
    """Multiply-accumulates of one call of a graph.

    Args:
        denoiser: the architecture on the ``meta`` device, in fp32.
        inputs: its whole signature, `tgate_trt.models.signature`.
        graph: which graph; modules whose outputs it takes in are not counted, for it does not compute them.
        rows: rows of the batch, two an image under guidance.
    """
    replaced = {attribute for attribute, kind in TAPPED_MODULES.items() if kind in recipe(graph).takes_in}
    total = 0

    def count(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += output.numel() * _macs_of_element(module)

    hooks = [
        module.register_forward_hook(count)
        for path, module in denoiser.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and not replaced & set(path.split("."))
    ]
    try:
        with torch.no_grad():
            forward(denoiser, {tensor.name: torch.empty(tensor.concrete(**{ROWS: rows}), device="meta") for tensor in inputs})
    finally:
        for hook in hooks:
            hook.remove()
    return total


def macs_of_picture(step: int, refinement: int, planning_steps: int, steps: int) -> int:
    """Multiply-accumulates of a picture's denoising.

    Args:
        step: of a step before the gate.
        refinement: of a step from the gate on.
        planning_steps: steps before the gate.
        steps: of the whole run.
    """
    return planning_steps * step + (steps - planning_steps) * refinement


def _macs_of_element(module: nn.Module) -> int:
    """Multiply-accumulates of one element of a layer's output."""
    if isinstance(module, nn.Linear):
        return module.in_features
    assert isinstance(module, _CONVOLUTIONS)
    return module.in_channels // module.groups * math.prod(module.kernel_size)

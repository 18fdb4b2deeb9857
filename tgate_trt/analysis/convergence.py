"""The change of attention from step to step: the convergence curve of T-GATE (arXiv 2404.02747, section 3, figure 2).

``D_t = ‖C_t − C_{t+1}‖₂`` with ``C = softmax(Q·Kᵀ/√d)·V``, the heads side by side, which is the input of an attention
module's output projection. The norm is over the tokens and channels of one row; the mean is over both guidance halves, over
depth and over pictures. ``D_t / ‖C_t‖₂`` is measured too, because layers differ in width and scale; it is 0 where C stays 0, as
in the negative half of SDXL, whose null prompt is zeros.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tgate_trt.analysis.calls import Call, watching
from tgate_trt.analysis.intervals import Band, band
from tgate_trt.eager import attention_modules
from tgate_trt.errors import UnsupportedError
from tgate_trt.taps import CROSS_ATTENTION, SELF_ATTENTION, kind_of

KINDS = (CROSS_ATTENTION, SELF_ATTENTION)

ALL_LAYERS = "all layers"
"""The group of all layers."""

_SIDES = ("down", "mid", "up")
"""Sides of a UNet, in the order in which its layers run."""

_THIRDS = ("first third", "middle third", "last third")
"""Groups of a transformer, whose layers have no levels, by depth."""


@dataclass(frozen=True)
class Layer:
    """One attention module over all runs."""

    tap: str
    tokens: int
    """Tokens of a picture at the layer's resolution."""
    absolute: Tensor
    """``D_t``, ``[steps - 1, pictures]``, float64."""
    relative: Tensor
    """``D_t / ‖C_t‖₂``, ``[steps - 1, pictures]``, float64."""


@dataclass(frozen=True)
class Convergence:
    """The mean curve of some layers, with its 95 % interval over pictures; entry 0 is the change from step 1 to step 2."""

    layers: int
    absolute: Band
    relative: Band

    def to_json(self) -> dict[str, Any]:
        """Everything, for a file of results."""
        return {"layers": self.layers, "absolute": self.absolute.to_json(), "relative": self.relative.to_json()}


class Recording:
    """The result of `recording`. It holds, for each module, C at the previous step, and two numbers for each step and picture."""

    def __init__(self, denoiser: nn.Module) -> None:
        self.modules = dict(attention_modules(denoiser))
        self._call: Call | None = None
        self._before: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._changes: dict[str, list[list[Tensor]]] = defaultdict(list)
        """By tap, run and step: ``[2, pictures]``, absolute and relative."""

    def layers(self) -> list[Layer]:
        """Every attention module, in the order of the denoiser, over all runs so far."""
        layers = []
        for tap, runs in self._changes.items():
            absolute, relative = torch.cat([torch.stack(steps, 1) for steps in runs], -1).cpu().double()
            layers.append(Layer(tap, self._tokens[tap], absolute, relative))
        return layers

    def on_call(self, call: Call, _keywords: Mapping[str, Any]) -> None:
        """Remember the call to which the next outputs belong."""
        if call.number == 0:
            self._before.clear()
            for tap in self.modules:
                self._changes[tap].append([])
        self._call = call

    def record(self, tap: str, output: Tensor) -> None:
        """Record C of one module, ``[rows, tokens, channels]``."""
        call = self._call
        if call is None or not call.ends_step:
            return
        before = self._before.get(tap)
        if before is not None:
            # In fp32: the squares of half-precision values overflow their own type.
            change = torch.linalg.vector_norm(before.float() - output.float(), dim=(1, 2))
            size = torch.linalg.vector_norm(before.float(), dim=(1, 2)).clamp(min=torch.finfo(torch.float32).tiny)
            rows = torch.stack([change, change / size])
            self._changes[tap][-1].append(torch.stack(rows.chunk(2, 1)).mean(0) if call.guided else rows)
        self._before[tap], self._tokens[tap] = output, output.shape[1]


@contextlib.contextmanager
def recording(pipeline: Any, denoiser: nn.Module) -> Iterator[Recording]:
    """Within this context, record the attention of every run of a pipeline.

    Args:
        pipeline: the pipeline that calls the denoiser, whose scheduler gives the step.
        denoiser: a UNet or transformer of diffusers in eager PyTorch.

    Raises:
        UnsupportedError: if the denoiser has no attention modules of a known kind.
    """
    seen = Recording(denoiser)
    if not seen.modules:
        raise UnsupportedError(
            f"{type(denoiser).__name__} has no cross-attention or self-attention of a known kind; leave convergence out of --only"
        )
    with contextlib.ExitStack() as stack:
        for tap, module in seen.modules.items():
            projection: Any = module.to_out
            handle = projection[0].register_forward_pre_hook(lambda _module, inputs, tap=tap: seen.record(tap, inputs[0]))
            stack.callback(handle.remove)
        stack.enter_context(watching(pipeline, denoiser, seen.on_call))
        yield seen


def curves(layers: Sequence[Layer], height: int, width: int) -> dict[str, dict[str, Convergence]]:
    """The curves of all layers and of each group of layers.

    Args:
        layers: layers of a `Recording`.
        height: height of the latents, which gives the resolution of a layer from its tokens.
        width: width of the latents.

    Returns:
        The curves by kind of attention and by group: first `ALL_LAYERS`, then the groups in the order in which they run.
    """
    found = {}
    for kind in KINDS:
        of_kind = [layer for layer in layers if kind_of(layer.tap) == kind]
        of_kind.sort(key=lambda layer: _SIDES.index(side) if (side := _side(layer)) else 0)  # a UNet lists its middle last
        groups: dict[str, list[Layer]] = {ALL_LAYERS: of_kind}
        for index, layer in enumerate(of_kind):
            groups.setdefault(group_of(layer, index / len(of_kind), height, width), []).append(layer)
        if of_kind:
            found[kind] = {name: _curve(members) for name, members in groups.items()}
    return found


def group_of(layer: Layer, depth: float, height: int, width: int) -> str:
    """The group of a layer: side and resolution in a UNet, such as ``"down 16×16"``; the third of the depth in a transformer.

    Args:
        layer: a layer of the denoiser.
        depth: depth of the layer among those of its kind, from 0 to below 1.
        height: height of the latents.
        width: width of the latents.
    """
    side = _side(layer)
    if side is None:
        return _THIRDS[int(3 * depth)]
    shrink = (height * width / layer.tokens) ** 0.5
    return f"{side} {round(height / shrink)}×{round(width / shrink)}"


def _side(layer: Layer) -> str | None:
    """The side of a UNet that holds a layer; None in a model without sides."""
    side, _, rest = layer.tap.split(".")[1].partition("_")
    return side if side in _SIDES and rest.startswith("block") else None


def _curve(layers: Sequence[Layer]) -> Convergence:
    absolute, relative = (torch.stack([getattr(layer, name) for layer in layers]).mean(0) for name in ("absolute", "relative"))
    return Convergence(len(layers), band(absolute), band(relative))

"""T-GATE by hand in eager PyTorch, around any denoiser: the oracle for pipelines that the official code does not know."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tgate_trt.eager import replaced, tapped_modules, tensor_of
from tgate_trt.taps import CROSS_ATTENTION, kind_of

TOLERANCE = 1e-4


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether latents are equal to `TOLERANCE` of the largest one, or of 1."""
    return bool((ours - theirs).abs().max() < TOLERANCE * theirs.abs().max().clamp(min=1))


class HandGated(nn.Module):
    """Stands where a denoiser stood; counts its calls, keeps the cross-attentions of the last planning step, and reuses their mean.

    Steps are calls, or pairs of calls where a pipeline calls once for each half, the positive one first.
    """

    def __init__(self, denoiser: nn.Module, gate_step: int, *, guided: bool = True, in_pairs: bool = False) -> None:
        super().__init__()
        self.denoiser, self.gate_step, self.guided, self.in_pairs = denoiser, gate_step, guided, in_pairs
        self.calls = 0
        self.kept: dict[str, list[Tensor]] = {}
        self.prediction: Any = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("denoiser"), name)

    @contextlib.contextmanager
    def cache_context(self, name: str, **_: Any) -> Iterator[None]:
        """What diffusers' pipelines enter around each of two calls."""
        yield

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        step, self.calls = self.calls // (1 + self.in_pairs), self.calls + 1
        if step < self.gate_step:
            if step == self.gate_step - 1 and (not self.in_pairs or self.calls % 2):
                self.kept.clear()
            with self._hooked(self._keep):
                return self.denoiser(*arguments, **keywords)
        if self.in_pairs and self.calls % 2 == 0:
            return self.prediction
        if self.guided and not self.in_pairs:
            sample = arguments[0] if arguments else keywords.get("sample", keywords.get("hidden_states"))
            rows = sample.shape[0]
            arguments, keywords = _negative(arguments, rows), _negative(keywords, rows)
        with self._hooked(self._reuse):
            output = self.denoiser(*arguments, **keywords)
        self.prediction = output
        if not self.guided or self.in_pairs:
            return output
        return (torch.cat([output[0]] * 2),)

    @contextlib.contextmanager
    def _hooked(self, act: Any) -> Iterator[None]:
        taps = [(tap, module) for tap, module in tapped_modules(self.denoiser) if kind_of(tap) == CROSS_ATTENTION]
        handles = [module.register_forward_hook(lambda _m, _i, output, tap=tap: act(tap, output)) for tap, module in taps]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, tap: str, output: Any) -> None:
        self.kept[tap] = [*self.kept.get(tap, [])[-1:], tensor_of(output).clone()] if self.in_pairs else [tensor_of(output).clone()]

    def _reuse(self, tap: str, output: Any) -> Any:
        kept = self.kept[tap]
        if self.guided and not self.in_pairs:
            kept = list(kept[0].chunk(2))
        return replaced(output, sum(kept[1:], start=kept[0]) / len(kept))


def _negative(value: Any, rows: int) -> Any:
    """The negative half of everything that has the batch's rows."""
    if isinstance(value, Tensor):
        return value.chunk(2)[0] if value.dim() and value.shape[0] == rows else value
    if isinstance(value, dict):
        return {key: _negative(each, rows) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_negative(each, rows) for each in value)
    return value

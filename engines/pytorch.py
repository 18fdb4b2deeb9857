"""PyTorch: runs a cut with the denoiser itself, on a GPU with our kernels and CUDA graphs, on the CPU in eager mode.

It needs no compiler, and runs on every GPU that PyTorch supports. A tap that is taken in replaces its attention module, which does
not run. Where a block of diffusers allows it, the addition of the cache and the norm after it are one kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tgate_trt.eager import forward, tapped_modules
from tgate_trt.engines.base import check, given
from tgate_trt.errors import BundleError, GateError
from tgate_trt.kernels.cached_residual_layer_norm import cached_residual_layer_norm
from tgate_trt.specs import CACHE_PREFIX, GraphSpec
from tgate_trt.taps import Recipe, kind_of

_MAXIMUM_GRAPHS = 8
"""CUDA graphs that an engine keeps, one for each batch size and each set of buffers."""


@dataclass(frozen=True)
class PyTorchOptions:
    """How an engine runs."""

    cuda_graphs: bool = True
    """Whether to capture the launches of a call on a GPU and replay them."""
    compile: bool = False
    """Whether to compile with `torch.compile`, which takes minutes at the first call of each batch size."""
    threads: int | None = None
    """CPU threads; PyTorch's own setting if None."""
    fuse_cache_reuse: bool = True
    """Whether one kernel adds a cache and normalises the sum, where a block allows it."""


class PyTorchEngine:
    """A denoiser with the taps of one graph taken in and given out."""

    spec: GraphSpec
    """The graph's inputs and outputs."""
    device: torch.device
    """The device that must hold the tensors that `run` receives."""

    def __init__(
        self,
        architecture: nn.Module,
        weights: Mapping[str, Tensor],
        spec: GraphSpec,
        recipe: Recipe,
        device: torch.device,
        options: PyTorchOptions | None = None,
        *,
        changed: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Put weights into an architecture, and cut it.

        Args:
            architecture: the denoiser of diffusers on the ``meta`` device, which becomes the engine's own.
            weights: by state-dict name, on ``device``; several engines may share them.
            spec: the graph's inputs and outputs.
            recipe: which taps are taken in and given out.
            device: ``cpu`` or a CUDA device.
            options: how to run.
            changed: weights that differ from ``weights``, by name.

        Raises:
            BundleError: if the weights do not fit the architecture.
        """
        self.spec, self.device, self._options = spec, device, options or PyTorchOptions()
        self._weights = weights
        own = self._own(changed or {})
        self._replaced = set(own)
        try:
            architecture.load_state_dict({**weights, **own}, assign=True)
        except RuntimeError as error:
            raise BundleError(
                f"the weights are not those of {type(architecture).__name__}: {str(error).splitlines()[-1].strip()}; build the bundle again"
            ) from error
        self._denoiser = architecture.eval().requires_grad_(False)
        cut = _Cut(self._denoiser, recipe, fuse=self._options.fuse_cache_reuse)
        self._call = torch.compile(cut, dynamic=False) if self._options.compile else cut
        self._graphs: dict[tuple[int, ...], _Captured] = {}
        self._pool: Any = None
        self._met: set[tuple[int, ...]] = set()
        self._closed = False

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Run once; see `tgate_trt.engines.base.Engine.run`.

        On a GPU the second call with the same caches, outputs and batch size captures a CUDA graph, and later calls replay it; the
        other inputs are copied to buffers that the graph reads.

        Raises:
            GateError: if the engine was closed, or a tensor is missing or does not fit.
        """
        if self._closed:
            raise GateError(f"the {self.spec.name} engine has been closed; load the bundle again")
        taken = {tensor.name: given(self.spec, inputs, tensor) for tensor in self.spec.inputs}
        made = {tensor.name: given(self.spec, outputs, tensor) for tensor in self.spec.outputs}
        for tensor in self.spec.inputs:
            check(self.spec, tensor, taken[tensor.name], self.device)
        for tensor in self.spec.outputs:
            check(self.spec, tensor, made[tensor.name], self.device)
        with torch.inference_mode(), self._threads():
            if self.device.type == "cuda" and self._options.cuda_graphs:
                self._replay(taken, made)
            else:
                self._run_into(taken, made)

    def replace_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace some weights; see `tgate_trt.engines.base.Engine.replace_weights`."""
        own = self._own(weights)
        state = {name: self._weights[name] for name in self._replaced} | own
        self.unload()  # a captured graph reads the old weights
        self._denoiser.load_state_dict(state, strict=False, assign=True)
        self._denoiser.requires_grad_(False)
        self._replaced = set(own)

    def _own(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights among these that the denoiser has, on its device and in its dtypes."""
        return {name: tensor.to(self.device, self._weights[name].dtype) for name, tensor in weights.items() if name in self._weights}

    def unload(self) -> None:
        """Free the captured graphs and their buffers; the weights stay, because engines share them."""
        self._graphs.clear()
        self._met.clear()

    def close(self) -> None:
        """Free the graphs and the weights; the engine cannot run again."""
        self._closed = True
        self.unload()
        self._denoiser.to("meta")
        self._weights = {}

    @contextlib.contextmanager
    def _threads(self) -> Iterator[None]:
        """Let PyTorch use this engine's number of threads on the CPU."""
        before = torch.get_num_threads()
        torch.set_num_threads(before if self.device.type == "cuda" else self._options.threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _run_into(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        results = self._call(inputs)
        for name, output in outputs.items():
            output.copy_(results[name])

    def _replay(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        fixed = [tensor for name, tensor in inputs.items() if name.startswith(CACHE_PREFIX)] + list(outputs.values())
        key = (len(inputs["sample"]), *(tensor.data_ptr() for tensor in fixed))
        captured = self._graphs.get(key)
        if captured is None:
            if key not in self._met:  # the first call sets up what a capture does not allow
                self._met.add(key)
                self._run_into(inputs, outputs)
                return
            if len(self._graphs) == _MAXIMUM_GRAPHS:
                self.unload()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            captured = self._graphs[key] = _Captured.capture(self._run_into, inputs, outputs, self._pool)
        captured.replay(inputs)


@dataclass(frozen=True)
class _Captured:
    """The captured launches of one call, and the tensors that they read and write."""

    graph: Any
    inputs: Mapping[str, Tensor]
    """Copies of all inputs except caches, at fixed addresses."""
    held: tuple[Tensor, ...]
    """The caller's caches and outputs, kept alive."""

    @classmethod
    def capture(cls, run_into: Any, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], pool: Any) -> _Captured:
        own = {name: tensor.clone() for name, tensor in inputs.items() if not name.startswith(CACHE_PREFIX)}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            run_into({**inputs, **own}, outputs)
        caches = [tensor for name, tensor in inputs.items() if name not in own]
        return cls(graph, own, (*caches, *outputs.values()))

    def replay(self, inputs: Mapping[str, Tensor]) -> None:
        for name, tensor in self.inputs.items():
            tensor.copy_(inputs[name])
        self.graph.replay()


class _Cut(nn.Module):
    """A denoiser that is called by tensor names. Taps that are taken in replace their modules; others are given out."""

    def __init__(self, denoiser: nn.Module, recipe: Recipe, *, fuse: bool) -> None:
        super().__init__()
        self.denoiser = denoiser
        self._fuse = fuse
        self._taken: dict[str, Tensor] = {}
        self._made: dict[str, Tensor] = {}
        self._gives_what_it_takes = bool(set(recipe.takes_in) & set(recipe.gives_out))
        for tap, module in list(tapped_modules(denoiser)):
            name, kind = CACHE_PREFIX + tap, kind_of(tap)
            if kind in recipe.takes_in:
                self._take_in(name, tap, module)
            elif kind in recipe.gives_out:
                module.register_forward_hook(partial(self._give_out, name))

    def forward(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._taken = {name: tensor for name, tensor in tensors.items() if name.startswith(CACHE_PREFIX)}
        self._made = dict(self._taken) if self._gives_what_it_takes else {}
        inputs = {name: tensor for name, tensor in tensors.items() if name not in self._taken}
        # Blocks with a cached cross-attention need no text, so their graph has no such input.
        prediction = forward(self.denoiser, {"encoder_hidden_states": None, **inputs})
        return {"noise_pred": prediction, **self._made}

    def _take_in(self, name: str, tap: str, module: nn.Module) -> None:
        block = self.denoiser.get_submodule(tap.partition(".")[2])
        if self._fuse and _adds_and_normalises(block, module):
            block.forward = partial(self._forward_block, block, name)
        else:
            module.forward = lambda *_, **__: self._taken[name]

    def _forward_block(self, block: Any, name: str, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
        """The forward of diffusers' `BasicTransformerBlock` for ``norm_type="layer_norm"``, with its cross-attention cached."""
        hidden = block.attn1(block.norm1(hidden_states), attention_mask=attention_mask) + hidden_states
        norm = block.norm3
        residual, normed = cached_residual_layer_norm(hidden, self._taken[name], norm.weight, norm.bias, norm.eps)
        output: Tensor = block.ff(normed) + residual
        return output

    def _give_out(self, name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self._made[name] = output


def _adds_and_normalises(block: nn.Module, attention: nn.Module) -> bool:
    """Whether a block adds this attention's output to its input and passes the sum to an affine norm, so that one op can do both."""
    from diffusers.models.attention import BasicTransformerBlock

    return (
        type(block) is BasicTransformerBlock
        and attention is block.attn2
        and block.norm_type == "layer_norm"
        and not block.only_cross_attention
        and block.pos_embed is None
        and block._chunk_size is None
        and not hasattr(block, "fuser")
        and isinstance(block.norm3, nn.LayerNorm)
        and block.norm3.bias is not None
    )

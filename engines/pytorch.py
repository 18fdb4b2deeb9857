"""PyTorch: runs a cut with the denoiser itself, on a GPU with our kernels and CUDA graphs, on the CPU in eager mode.

It needs no compiler, and runs on every GPU that PyTorch supports. A tap that is taken in replaces its attention module, which does
not run. Where a block of diffusers allows it, the addition of the cache and the norm after it are one kernel. Where the weights of
an attention's projections lie one after the other in memory, as `arranged` puts them, they are one matrix product.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from tgate_trt.eager import forward, tapped_modules, tensor_of, torch_dtype
from tgate_trt.engines.base import check, given
from tgate_trt.engines.fused_modules import adds_and_normalises, fuse_modules, transformer_block
from tgate_trt.engines.graphs import GraphCache, Staging
from tgate_trt.engines.projections import arranged, fuse_projections, is_arranged, separate_projections
from tgate_trt.engines.upper_part import keep_upper_part
from tgate_trt.errors import BundleError, GateError
from tgate_trt.specs import CACHE_PREFIX, ROWS, GraphSpec, TensorSpec
from tgate_trt.taps import Recipe, branch_of, kind_of


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
    fuse_modules: bool | None = None
    """Whether our kernels take the places of several of PyTorch's, where a module allows it; if None, on a GPU."""


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
        absent: Sequence[TensorSpec] = (),
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
            absent: inputs of the whole denoiser that the graph does not need, in whose places zeros stand.

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
        self._denoiser = architecture.to(device).eval().requires_grad_(False)  # what it computed itself is on the CPU
        self._owners = dict(architecture.named_modules())
        """Every module by its path in the whole denoiser: what a cut leaves has other paths."""
        fuse_projections(self._denoiser)
        fuses = device.type == "cuda" if self._options.fuse_modules is None else self._options.fuse_modules
        if fuses:
            fuse_modules(self._denoiser)
        cut = _Cut(self._denoiser, recipe, absent, fuse_cache_reuse=self._options.fuse_cache_reuse, fuse_modules=fuses)
        self._call = torch.compile(cut, dynamic=False) if self._options.compile else cut
        self._graphs, self._staging = GraphCache(spec.name), Staging()
        self._lock = threading.Lock()
        self._closed = False

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Run once; see `tgate_trt.engines.base.Engine.run`.

        On a GPU the second call with the same caches, outputs and batch size captures a CUDA graph, and later calls replay it; the
        other inputs are copied to buffers that the graph reads. Threads may call it, and take turns.

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
        with self._lock, torch.inference_mode(), self._here():
            if self.device.type != "cuda" or not self._options.cuda_graphs:
                self._call(taken, made)
                return
            own = {name: tensor if name.startswith(CACHE_PREFIX) else self._staging.copied(name, tensor) for name, tensor in taken.items()}
            key = tuple((tensor.data_ptr(), tensor.shape) for tensor in (*own.values(), *made.values()))
            self._graphs.run(key, partial(self._call, own, made))

    def replace_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace some weights; see `tgate_trt.engines.base.Engine.replace_weights`."""
        with self._lock:
            own = self._own(weights)
            state = {name: self._weights[name] for name in self._replaced} | own
            self.unload()  # a captured graph reads the old weights
            for name, tensor in state.items():
                owner, _, parameter = name.rpartition(".")
                self._owners[owner].load_state_dict({parameter: tensor}, strict=False, assign=True)
            fuse_projections(self._denoiser.requires_grad_(False))
            self._replaced = set(own)

    def unload(self) -> None:
        """Free the captured graphs and their buffers; the weights stay, because engines share them."""
        self._graphs.clear()
        self._staging.clear()

    def close(self) -> None:
        """Free the graphs and the weights; the engine cannot run again."""
        self._closed = True
        self.unload()
        separate_projections(self._denoiser)
        self._denoiser.to("meta")
        self._weights, self._owners = {}, {}

    @contextlib.contextmanager
    def _here(self) -> Iterator[None]:
        """Run on the engine's GPU, or with its number of threads on the CPU."""
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                yield
            return
        before = torch.get_num_threads()
        torch.set_num_threads(self._options.threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _own(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights among these that the denoiser has, on its device, in its dtypes, and arranged as its others."""
        own = {name: tensor.to(self.device, self._weights[name].dtype) for name, tensor in weights.items() if name in self._weights}
        return arranged(own) if is_arranged(self._weights) else own


class _Cut(nn.Module):
    """A denoiser that is called by tensor names. Taps that are taken in replace their modules; others are given out."""

    def __init__(
        self, denoiser: nn.Module, recipe: Recipe, absent: Sequence[TensorSpec] = (), *, fuse_cache_reuse: bool, fuse_modules: bool
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self._absent = tuple(absent)
        self._taken: Mapping[str, Tensor] = {}
        self._outputs: Mapping[str, Tensor] = {}
        # With the modules of all taps at hand first: what the upper part leaves has other paths.
        taps = [(tap, module, denoiser.get_submodule(tap.partition(".")[2])) for tap, module in tapped_modules(denoiser)]
        for tap, module, owner in taps:
            name, kind, block = CACHE_PREFIX + tap, kind_of(tap), cast(Any, owner)
            takes = kind in recipe.takes_in
            branch = branch_of(kind)
            if takes and branch is not None:
                keep_upper_part(denoiser, branch, partial(self._cached, name))
                continue
            if (fuse_cache_reuse if takes else fuse_modules) and adds_and_normalises(block, module):
                block.forward = partial(transformer_block, block, partial(self._cached, name) if takes else None)
            elif takes:
                module.forward = partial(self._cached, name)
            if kind in recipe.gives_out and not takes:
                module.register_forward_hook(partial(self._give_out, name))

    def forward(self, tensors: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Run on inputs by name, and write outputs by name. No tensor is kept."""
        self._taken = {name: tensor for name, tensor in tensors.items() if name.startswith(CACHE_PREFIX)}
        self._outputs = outputs
        inputs = {name: tensor for name, tensor in tensors.items() if name not in self._taken}
        sample = tensors["sample"]
        missing = {each.name: _zeros(each, sample) for each in self._absent}
        prediction = forward(self.denoiser, {"encoder_hidden_states": None, **missing, **inputs})
        outputs["noise_pred"].copy_(prediction)
        for name, tensor in self._taken.items():
            if name in outputs:
                outputs[name].copy_(tensor)
        self._taken = self._outputs = {}

    def _cached(self, name: str, *_: Any, **__: Any) -> Tensor:
        return self._taken[name]

    def _give_out(self, name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._outputs[name].copy_(tensor_of(output))


def _zeros(tensor: TensorSpec, sample: Tensor) -> Tensor:
    """An input that has no effect, as short as it can be."""
    shape = [sample.shape[0] if size == ROWS else 1 if isinstance(size, str) else size for size in tensor.shape]
    return torch.zeros(shape, dtype=torch_dtype(tensor.dtype), device=sample.device)

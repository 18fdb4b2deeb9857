"""Text encoders and VAE that run as engines in a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tgate_trt.bundle.components import TEXT_ENCODERS, VAE_DECODER, Component, components_of
from tgate_trt.eager import LOADING, is_architecture, torch_dtype
from tgate_trt.engines.base import Engine
from tgate_trt.errors import GateError, UnsupportedError
from tgate_trt.export.components import LAST, PENULTIMATE, PIXELS, POOLED
from tgate_trt.gate.stand_in import StandIn
from tgate_trt.models.lora import parameter_names
from tgate_trt.specs import ROWS, sizes_in

if TYPE_CHECKING:
    from tgate_trt.bundle.bundle import Bundle


class Compiled(StandIn):
    """Replaces a component and runs an engine.

    Other attributes come from its architecture, or from the eager component, which is loaded at the first access. Callers
    that access the eager component may modify it (a LoRA, tiling), so from then on the eager component runs.
    """

    def __init__(self, engine: Engine, architecture: nn.Module, eager: Callable[[], nn.Module]) -> None:
        super().__init__(architecture, self.eager if is_architecture(architecture) else None)
        # Past nn.Module's registry too.
        object.__setattr__(self, "architecture", architecture)
        object.__setattr__(self, "_load_eager", eager)
        object.__setattr__(self, "_eager", None)
        self.engine = engine
        self.is_touched = False
        self.replaced: Mapping[str, Tensor] = {}
        """Weights of the engine that differ from the bundle's; the eager component gets them too."""
        self._memory: dict[torch.Size, dict[str, Tensor]] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            pass
        if name == "device":
            return self.engine.device
        if name in ("config", "dtype"):
            return getattr(self.architecture, name)
        if name.startswith("_") or not hasattr(self.architecture, name):
            raise AttributeError(f"{type(self.architecture).__name__} has no attribute {name!r}")
        self.is_touched = True
        return getattr(self.eager(), name)

    def eager(self) -> nn.Module:
        """The component in eager PyTorch, on the engine's device."""
        with LOADING:
            if object.__getattribute__(self, "_eager") is None:
                loaded: nn.Module = object.__getattribute__(self, "_load_eager")()
                write_weights(loaded, self.replaced)
                object.__setattr__(self, "_eager", loaded)
        eager: nn.Module = object.__getattribute__(self, "_eager")
        return eager

    def share_eager(self, other: Compiled) -> None:
        """Use another's eager component where one is needed, and not one more."""
        object.__setattr__(self, "_load_eager", other.eager)

    def replace_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Run with other values of some weights; see `tgate_trt.engines.base.Engine.replace_weights`.

        Raises:
            UnsupportedError: if the eager component was accessed, and so may have been modified.
        """
        if self.is_touched:
            raise UnsupportedError(
                f"the pipeline's {type(self.architecture).__name__} was accessed and may have been modified; load the bundle again"
            )
        self.engine.replace_weights(weights)
        self.replaced = dict(weights)
        object.__setattr__(self, "_eager", None)

    def run(self, tensor: Tensor) -> dict[str, Tensor]:
        """Run the engine on its one input, and return copies of its outputs in the component's dtype."""
        (takes,) = self.engine.spec.inputs
        value = tensor.to(self.engine.device, torch_dtype(takes.dtype)).contiguous()
        rows, images = value.shape[0], self.engine.spec.dimensions[ROWS]
        if rows not in images:
            raise GateError(
                f"this bundle's {self.engine.spec.name} takes {images.minimum} to {images.maximum} prompts or pictures at a time, "
                f"got {rows}; draw in several runs, or build a bundle with another --batch-size"
            )
        if value.shape not in self._memory:
            sizes = sizes_in(self.engine.spec, {takes.name: value})
            self._memory = {
                value.shape: {
                    gives.name: torch.empty(gives.concrete(**sizes), dtype=torch_dtype(gives.dtype), device=self.engine.device)
                    for gives in self.engine.spec.outputs
                }
            }
        self.engine.run({takes.name: value}, self._memory[value.shape])
        return {name: output.to(self.architecture.dtype, copy=True) for name, output in self._memory[value.shape].items()}

    def close(self) -> None:
        """Free the engine and its buffers."""
        self.engine.close()
        self._memory.clear()


class CompiledTextEncoder(Compiled):
    """Replaces ``pipe.text_encoder`` or ``pipe.text_encoder_2``."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = False, **others: Any) -> Any:
        """Encode ids as the eager encoder does; the eager encoder runs where the graph lacks an output that the caller asks for.

        Args:
            input_ids: ``[rows, tokens]``.
            attention_mask: None, or the eager encoder runs.
            output_hidden_states: whether to give the layers' states; the graph gives the last but one, SDXL's.
            **others: see transformers.
        """
        tokens = self.engine.spec.inputs[0].shape[1]
        gives = {tensor.name for tensor in self.engine.spec.outputs}
        is_plain = not self.is_touched and attention_mask is None and not others and input_ids.shape[1] == tokens
        if not is_plain or (output_hidden_states and PENULTIMATE not in gives):
            return self._run_eager(input_ids, attention_mask=attention_mask, output_hidden_states=output_hidden_states, **others)
        from transformers.modeling_outputs import BaseModelOutputWithPooling
        from transformers.models.clip.modeling_clip import CLIPTextModelOutput

        found = self.run(input_ids)
        states: Any = None
        if output_hidden_states:
            states = _HiddenStates(found[PENULTIMATE], lambda: self._run_eager(input_ids, output_hidden_states=True).hidden_states)
        if POOLED in found:
            return CLIPTextModelOutput(text_embeds=found[POOLED], hidden_states=states)
        return BaseModelOutputWithPooling(last_hidden_state=found[LAST], hidden_states=states)

    def _run_eager(self, *arguments: Any, **keywords: Any) -> Any:
        with torch.no_grad():
            return self.eager()(*arguments, **keywords)


class _HiddenStates(tuple[Tensor, ...]):
    """States of all layers: the last but one from the engine, the others computed at the first access (``clip_skip``)."""

    def __new__(cls, penultimate: Tensor, compute: Callable[[], tuple[Tensor, ...]]) -> _HiddenStates:
        made = super().__new__(cls, (penultimate,))
        made.compute = compute  # type: ignore[attr-defined]
        return made

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(0) if index == -2 else self.compute()[index]  # type: ignore[attr-defined]


class CompiledVae(Compiled):
    """Replaces ``pipe.vae``: decodes by an engine, encodes by the eager VAE."""

    def decode(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """Decode latents ``[rows, channels, height, width]``, not scaled, as `AutoencoderKL.decode` does."""
        expected = self.engine.spec.inputs[0].shape[1:]
        if self.is_touched or tuple(z.shape[1:]) != expected:
            eager: Any = self.eager()
            with torch.no_grad():
                return eager.decode(z.to(eager.dtype), return_dict=return_dict)
        pixels = self.run(z)[PIXELS]
        if not return_dict:
            return (pixels,)
        from diffusers.models.autoencoders.vae import DecoderOutput

        return DecoderOutput(sample=pixels)

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Encode pixels as `AutoencoderKL.encode` does."""
        eager: Any = self.eager()
        with torch.no_grad():
            return eager.encode(x, return_dict=return_dict)


def compiled(component: Component, engine: Engine, architecture: nn.Module, eager: Callable[[], nn.Module]) -> Compiled:
    """The replacement of a component."""
    kind = CompiledVae if component.graph == VAE_DECODER else CompiledTextEncoder
    return kind(engine, architecture, eager)


def write_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Write over some of a module's weights, under either of the names that they may have."""
    state = module.state_dict()
    for name, value in weights.items():
        own = next(own for own in parameter_names(name) if own in state)
        state[own].copy_(value)


def load_compiled(bundle: Bundle, graphs: Sequence[str], load_engine: Callable[[str], Engine], precision: str) -> dict[str, Compiled]:
    """The compiled components of a bundle, by the pipeline's attribute.

    Args:
        bundle: with graphs of components.
        graphs: of those, which to load.
        load_engine: gives a graph's engine.
        precision: of the pipeline, in which an eager component is loaded and outputs are given.
    """
    loaded = {}
    for graph, component in components_of(bundle.pipeline).items():
        if graph not in graphs:
            continue
        engine = load_engine(graph)
        own = torch_dtype(component.precision(precision))

        def eager(component: Component = component, engine: Engine = engine, own: torch.dtype = own) -> nn.Module:
            return component.load(bundle.pipeline, own).to(engine.device)

        loaded[component.name] = compiled(component, engine, component.on_meta(own), eager)
    return loaded


def replace_components(pipeline: Any, bundle: Bundle, graphs: Sequence[str], load_engine: Callable[[str], Engine]) -> None:
    """Put engines in the places of a pipeline's own text encoders and VAE; see `load_compiled`."""
    for graph, component in components_of(bundle.pipeline).items():
        if graph in graphs:
            own = getattr(pipeline, component.name)
            eager = own.eager() if isinstance(own, Compiled) else own
            setattr(pipeline, component.name, compiled(component, load_engine(graph), eager, partial(_same, eager)))


def _same(module: nn.Module) -> nn.Module:
    return module


def restore_components(pipeline: Any) -> None:
    """Put the eager components back where compiled ones stand, and free their engines."""
    for name in (*TEXT_ENCODERS, "vae"):
        part = getattr(pipeline, name, None)
        if isinstance(part, Compiled):
            setattr(pipeline, name, part.eager())
            part.close()

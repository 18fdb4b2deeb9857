"""Load a bundle as a diffusers pipeline, or put its engines into a pipeline that is there already."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tgate_trt.after_gate import DEFAULT_AFTER_GATE
from tgate_trt.backends import EngineLoader, choose_backend, has_engine, runtime_options
from tgate_trt.bundle import Bundle
from tgate_trt.components import TEXT_ENCODERS, Compiled, load_compiled, replace_components, restore_components, write_weights
from tgate_trt.denoiser import GatedDenoiser
from tgate_trt.engines.base import Engine
from tgate_trt.errors import InputError
from tgate_trt.lora import Lora, LoraFile
from tgate_trt.refitting import fused, loras_of, read, refuse_what_cannot_be_refitted
from tgate_trt.schedule import DEFAULT_GATE_STEP, GateStep, check_gate_step
from tgate_trt.specs import DTYPES


def load(
    bundle: str | os.PathLike[str] | Bundle,
    *,
    gate_step: GateStep | None = None,
    backend: str | None = None,
    device: str | torch.device | None = None,
    guidance: bool | None = None,
    after_gate: str = DEFAULT_AFTER_GATE,
    threads: int | None = None,
    low_memory: bool = False,
    components: bool = True,
    cuda_graphs: bool = True,
    specialisation: str = "lazy",
    torch_compile: bool = False,
) -> Any:
    """Load a bundle as a diffusers pipeline whose denoiser switches engines at the gate.

    Args:
        bundle: folder of a bundle, or a bundle that is open.
        gate_step: number of planning steps, a fraction of the steps, or ``"none"``; the model's own default if None.
        backend: of `tgate_trt.backends.BACKENDS`; the first that the bundle holds and that runs here if None.
        device: ``"cpu"`` or ``"cuda"``; where the backend runs best if None.
        guidance: whether runs use classifier-free guidance; read from the pipeline at each run if None.
        after_gate: what a guided run does from the gate on: ``"negative"`` is T-GATE; ``"positive"`` keeps the prompt's half;
            ``"fading"`` keeps that and fades guidance out; see `tgate_trt.after_gate`.
        threads: CPU threads of an engine; one a core if None.
        low_memory: whether to hold one of the denoiser's engines at a time; each is loaded anew in every run.
        components: whether text encoders and the VAE's decoder run as engines too, where the bundle holds them.
        cuda_graphs: whether engines of TensorRT and PyTorch capture their launches on a GPU, and replay them.
        specialisation: when TensorRT-RTX compiles kernels for a shape: ``"lazy"``, in the background; ``"eager"``; ``"none"``.
        torch_compile: whether PyTorch's engines run `torch.compile`'s code; it takes minutes at the first call.

    Returns:
        The `DiffusionPipeline` that the bundle was built from, on the engines' device.

    Raises:
        BundleError: if the bundle cannot be used.
        InputError: if an argument is impossible.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    loader = _loader(opened, backend, device, threads, cuda_graphs=cuda_graphs, specialisation=specialisation, torch_compile=torch_compile)
    engines = _Engines.load(loader, low_memory)
    pipeline = pipeline_of(opened, loader, engines.device, components=components)
    architecture = getattr(pipeline, opened.manifest.model["attribute"])
    _put(pipeline, opened, loader, engines, architecture, gate_step, guidance, after_gate)
    _refit_components(pipeline, opened, loras_of(opened), with_engines=False)
    return pipeline.to(engines.device)


def pipeline_of(bundle: Bundle, loader: EngineLoader, device: torch.device, *, components: bool) -> Any:
    """The bundle's pipeline; its denoiser is an architecture without weights, in whose place a `GatedDenoiser` is to be put.

    Args:
        bundle: that is open.
        loader: of the components' engines.
        device: of the pipeline.
        components: whether text encoders and the VAE's decoder run as engines, where the bundle holds them.
    """
    from diffusers import DiffusionPipeline

    dtype = _pipeline_dtype(bundle, device)
    parts = load_compiled(bundle, _component_graphs(loader) if components else (), loader.load, dtype)
    given = {name: part.architecture for name, part in parts.items()} | {bundle.manifest.model["attribute"]: bundle.denoiser_on_meta(dtype)}
    pipeline = DiffusionPipeline.from_pretrained(bundle.pipeline, **given, torch_dtype=dtype, local_files_only=True, use_safetensors=True)
    for name, part in parts.items():
        setattr(pipeline, name, part)
    return pipeline


def apply(
    pipeline: Any,
    bundle: str | os.PathLike[str] | Bundle,
    *,
    gate_step: GateStep | None = None,
    backend: str | None = None,
    device: str | torch.device | None = None,
    guidance: bool | None = None,
    after_gate: str = DEFAULT_AFTER_GATE,
    threads: int | None = None,
    low_memory: bool = False,
    components: bool = False,
    cuda_graphs: bool = True,
    specialisation: str = "lazy",
    torch_compile: bool = False,
) -> Any:
    """Put a bundle's engines into a diffusers pipeline in the place of its UNet or transformer.

    Args:
        pipeline: a pipeline of the model that the bundle was built from, on the device of the engines.
        bundle: folder of a bundle, or a bundle that is open.
        gate_step: see `load`.
        backend: see `load`.
        device: see `load`.
        guidance: see `load`.
        after_gate: see `load`.
        threads: see `load`.
        low_memory: see `load`.
        components: whether to replace the pipeline's text encoders and VAE too.
        cuda_graphs: see `load`.
        specialisation: see `load`.
        torch_compile: see `load`.

    Returns:
        The same pipeline.

    Raises:
        BundleError: if the bundle cannot be used.
        InputError: if the pipeline is of another model, or an argument is impossible.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    attribute = opened.manifest.model["attribute"]
    before = getattr(pipeline, attribute, None)
    denoiser = before.replaces if isinstance(before, GatedDenoiser) else before
    if not isinstance(denoiser, nn.Module):
        raise InputError(f"the bundle replaces a pipeline's {attribute!r}, which {type(pipeline).__name__} does not have")
    _refuse_another_model(denoiser, opened)
    loader = _loader(opened, backend, device, threads, cuda_graphs=cuda_graphs, specialisation=specialisation, torch_compile=torch_compile)
    _put(pipeline, opened, loader, _Engines.load(loader, low_memory), denoiser, gate_step, guidance, after_gate)
    if components:
        replace_components(pipeline, opened, _component_graphs(loader), loader.load)
    if isinstance(before, GatedDenoiser) and before.serves(pipeline):  # not one that `from_pipe` shares with another pipeline
        before.close()
    return pipeline


def remove(pipeline: Any) -> Any:
    """Put back the denoiser that `apply` replaced, and free the engines.

    Raises:
        InputError: if the pipeline has none of our denoisers, or `load` made it, so that there is none to put back.
    """
    gated = _gated(pipeline)
    if any(parameter.is_meta for parameter in gated.replaces.parameters()):
        raise InputError("this pipeline was loaded from a bundle, so it has no denoiser to go back to; load the model with diffusers")
    if gated.serves(pipeline):
        gated.close()
    setattr(pipeline, "unet" if pipeline.components.get("unet") is gated else "transformer", gated.replaces)
    restore_components(pipeline)
    return pipeline


@dataclasses.dataclass(frozen=True)
class _Engines:
    """The two engines of a gated run."""

    planning: Engine
    fidelity: Engine
    low_memory: bool

    @property
    def device(self) -> torch.device:
        return self.planning.device

    @classmethod
    def load(cls, loader: EngineLoader, low_memory: bool) -> _Engines:
        planning = loader.load("planning")
        if low_memory:
            planning.unload()
        return cls(planning, loader.load("fidelity"), low_memory)


def _loader(
    bundle: Bundle,
    backend: str | None,
    device: str | torch.device | None,
    threads: int | None,
    *,
    cuda_graphs: bool,
    specialisation: str,
    torch_compile: bool,
) -> EngineLoader:
    options = runtime_options(bundle, cuda_graphs=cuda_graphs, specialisation=specialisation)
    chosen, on = choose_backend(bundle, backend), None if device is None else torch.device(device)
    return EngineLoader(bundle, chosen, on, threads, options, torch_compile)


def _component_graphs(loader: EngineLoader) -> list[str]:
    """Graphs of components of which the bundle holds engines of the backend that runs."""
    return [graph for graph in loader.bundle.manifest.model["components"] if has_engine(loader.bundle, graph, loader.backend)]


def refit_pipeline(pipeline: Any, files: Sequence[LoraFile]) -> Any:
    """Put LoRAs into a pipeline that runs a bundle's engines; see `tgate_trt.refitting.refit`. The bundle on disk stays as it is."""
    gated = _gated(pipeline)
    bundle, backend = gated.built_from
    loras = read(bundle, files)
    refuse_what_cannot_be_refitted(bundle, backend, loras)
    weights = fused(bundle, loras, bundle.manifest.model["attribute"])
    for engine in (gated.planning, gated.fidelity):
        engine.replace_weights(weights)
    _refit_components(pipeline, bundle, loras, with_engines=True)
    return pipeline


def _gated(pipeline: Any) -> GatedDenoiser:
    """The pipeline's denoiser that runs engines.

    Raises:
        InputError: if it has none.
    """
    for attribute in ("unet", "transformer"):
        gated = getattr(pipeline, attribute, None)
        if isinstance(gated, GatedDenoiser):
            return gated
    raise InputError(f"{type(pipeline).__name__} has no engines of tgate-trt; load a bundle, or apply one to it")


def _refit_components(pipeline: Any, bundle: Bundle, loras: Sequence[Lora], *, with_engines: bool) -> None:
    """Give the text encoders the weights that LoRAs change; eager ones first get back those that earlier ones changed."""
    for name in TEXT_ENCODERS:
        part, weights = getattr(pipeline, name, None), fused(bundle, loras, name)
        if isinstance(part, Compiled):
            if with_engines:
                part.replace_weights(weights)
            part.replaced = weights
        elif isinstance(part, nn.Module):
            before: dict[str, Tensor] = getattr(part, _BEFORE, {})
            write_weights(part, before)
            kept = {key: value.clone() for key, value in part.state_dict().items() if key in weights or f"text_model.{key}" in weights}
            setattr(part, _BEFORE, kept)
            write_weights(part, weights)


_BEFORE = "_tgate_trt_weights_before_loras"
"""Attribute of an eager text encoder with the weights that LoRAs changed."""


def _put(
    pipeline: Any,
    bundle: Bundle,
    loader: EngineLoader,
    engines: _Engines,
    replaces: nn.Module,
    gate_step: GateStep | None,
    guidance: bool | None,
    after_gate: str,
) -> None:
    if gate_step is None:
        gate_step = bundle.manifest.gate_step or DEFAULT_GATE_STEP
    gated = GatedDenoiser(
        pipeline,
        replaces,
        engines.planning,
        engines.fidelity,
        gate_step=check_gate_step(gate_step),
        guidance=guidance,
        after_gate=after_gate,
        low_memory=engines.low_memory,
    )
    gated.built_from = (bundle, loader.backend)
    setattr(pipeline, bundle.manifest.model["attribute"], gated)


def _pipeline_dtype(bundle: Bundle, device: torch.device) -> torch.dtype:
    """The precision of the bundle on a GPU; fp32 on a CPU, where half precision is slow and partly missing."""
    dtype: torch.dtype = getattr(torch, DTYPES[bundle.manifest.built_for["precision"]]) if device.type == "cuda" else torch.float32
    return dtype


def _refuse_another_model(denoiser: nn.Module, bundle: Bundle) -> None:
    """Refuse a pipeline whose denoiser has another architecture or other weights than the bundle was built from.

    The first row of each parameter is compared: another checkpoint or a fused LoRA changes all of them.
    """
    from safetensors import safe_open

    from tgate_trt.export.weights import WEIGHTS_FILE

    own, built = denoiser.state_dict(), bundle.denoiser_on_meta(torch.float32).state_dict()
    if {name: tensor.shape for name, tensor in own.items()} != {name: tensor.shape for name, tensor in built.items()}:
        raise InputError(f"the pipeline's {type(denoiser).__name__} has another architecture than {bundle.folder} was built from")
    if WEIGHTS_FILE not in bundle.manifest.files:
        return  # discarded: the architecture is all that can be compared
    with safe_open(bundle.folder / WEIGHTS_FILE, "pt") as weights:
        for name, tensor in own.items():
            if tensor.is_meta:
                return  # `load` made it: it has no weights of its own
            first_row = weights.get_slice(name)[:1]
            if not torch.equal(tensor[:1].to(first_row.device, first_row.dtype), first_row):
                raise InputError(f"the pipeline has other weights than {bundle.folder} was built from: {name!r} differs; build it anew")

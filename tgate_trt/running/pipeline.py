"""Load a bundle as a diffusers pipeline, or put its engines into a pipeline that is there already."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import logging
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn

from tgate_trt.bundle.backends import choose_backend, has_engine
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.bundle.components import TEXT_ENCODERS
from tgate_trt.bundle.loras import BundleLoras, refit_bundle
from tgate_trt.bundle.manifest import Manifest
from tgate_trt.eager import LOADING, is_architecture, torch_dtype
from tgate_trt.engines.base import Engine
from tgate_trt.errors import GateError, InputError, StaleBundleError
from tgate_trt.export.weights import WEIGHTS_FILE
from tgate_trt.files import opened_file
from tgate_trt.gate.actions import substitute
from tgate_trt.gate.denoiser import GatedDenoiser
from tgate_trt.gate.gate import Gate
from tgate_trt.gate.schedule import NONE, GateStep
from tgate_trt.gate.scheduler import schedule_of
from tgate_trt.gate.stand_in import StandIn
from tgate_trt.models.lora import LoraFile, parameter_names
from tgate_trt.models.signature import denoiser_of
from tgate_trt.running.components import Compiled, load_compiled, replace_components, restore_components, write_weights
from tgate_trt.running.loading import EngineLoader, best_device, eager_denoiser

logger = logging.getLogger(__name__)


class LoadOptions(TypedDict, total=False):
    """How a bundle's engines are loaded, and how they run: keywords of `load` and `apply`."""

    gate: Gate | str | int | float | None
    """How runs are filled with actions, as a `Gate` or its text form, such as ``"10,sp=5,warm=2"``, or the name of a gate that the
    bundle holds, such as ``"tuned"``; in the place of ``gate_step`` and ``after_gate``."""
    gate_step: GateStep | None
    """Number of planning steps, a fraction of the steps, a noise level such as ``"noise:1.35"``, or ``"none"``; the model's own if None."""
    after_gate: str | None
    """What a guided run does from the gate on: ``"negative"`` is T-GATE; ``"positive"`` keeps the prompt's half; ``"fading"``
    keeps that and fades guidance out; see `tgate_trt.gate.after_gate`."""
    backend: str | None
    """Of `tgate_trt.bundle.backends.BACKENDS`; the first that the bundle holds and that runs here if None."""
    device: str | torch.device | None
    """``"cpu"`` or ``"cuda"``; where the backend runs best if None."""
    guidance: bool | None
    """Whether runs use classifier-free guidance; read from the pipeline at each run if None."""
    threads: int | None
    """CPU threads of an engine; one a core if None."""
    low_memory: bool
    """Whether to hold one of the denoiser's engines at a time; each is loaded anew in every run."""
    components: bool
    """Whether text encoders and the VAE's decoder run as engines too, where the bundle holds them; by default in `load`, and not in
    `apply`, where they would replace the pipeline's own."""
    cuda_graphs: bool
    """Whether engines of TensorRT and PyTorch capture their launches on a GPU, and replay them; the default."""
    specialisation: str
    """When TensorRT-RTX compiles kernels for a shape: ``"lazy"``, in the background, the default; ``"eager"``; ``"none"``."""
    torch_compile: bool
    """Whether PyTorch's engines run `torch.compile`'s code; it takes minutes at the first call."""


@dataclasses.dataclass
class Origin:
    """Where the engines of a pipeline's denoiser come from."""

    bundle: Bundle
    backend: str
    loras: BundleLoras
    """That their weights have now."""


def load(bundle: str | os.PathLike[str] | Bundle, **options: Unpack[LoadOptions]) -> Any:
    """Load a bundle as a diffusers pipeline whose denoiser switches engines at the gate.

    Args:
        bundle: folder of a bundle, or a bundle that is open.
        **options: ``gate``, ``gate_step``, ``after_gate``, ``backend``, ``device``, ``guidance``, ``threads``, ``low_memory``,
            ``components``, ``cuda_graphs``, ``specialisation``, ``torch_compile``; see `LoadOptions`.

    Returns:
        The `DiffusionPipeline` that the bundle was built from, on the engines' device.

    Raises:
        BundleError: if the bundle cannot be used.
        InputError: if an option is impossible.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    return load_by(loader_of(opened, options), options)


def load_by(loader: EngineLoader, options: LoadOptions, modules: Mapping[str, nn.Module] = MappingProxyType({})) -> Any:
    """Load a pipeline with a loader's engines, which may be those of other pipelines too; see `load`.

    Args:
        loader: of the bundle.
        options: as for `load`; the loader was made from them.
        modules: eager components of another pipeline of the bundle, by name, that this one shares.
    """
    opened = loader.bundle
    pipeline = pipeline_of(opened, loader, components=options.get("components", True), modules=modules)
    _put(pipeline, loader, getattr(pipeline, opened.manifest.model.attribute), options)
    _refit_components(pipeline, loader.loras, with_engines=False)
    _draw_by_default(pipeline, opened.manifest.built_for.height.optimum, opened.manifest.built_for.width.optimum)
    _warn_of_a_scheduler_that_cannot_be_followed(pipeline, opened.manifest.steps)
    return pipeline.to(_gated(pipeline).device)


def apply(pipeline: Any, bundle: str | os.PathLike[str] | Bundle, **options: Unpack[LoadOptions]) -> Any:
    """Put a bundle's engines into a diffusers pipeline in the place of its UNet or transformer.

    Args:
        pipeline: a pipeline of the model that the bundle was built from, on the device of the engines.
        bundle: folder of a bundle, or a bundle that is open.
        **options: see `load`; text encoders and VAE stay the pipeline's own unless ``components=True``.

    Returns:
        The same pipeline.

    Raises:
        BundleError: if the bundle cannot be used.
        InputError: if the pipeline is of another model, or an option is impossible.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    attribute = opened.manifest.model.attribute
    before = getattr(pipeline, attribute, None)
    denoiser = before.replaces if isinstance(before, GatedDenoiser) else before
    if not isinstance(denoiser, nn.Module):
        raise InputError(f"the bundle replaces a pipeline's {attribute!r}, which {type(pipeline).__name__} does not have")
    _refuse_another_model(denoiser, opened)
    loader = loader_of(opened, options)
    _put(pipeline, loader, denoiser, options)
    if options.get("components", False):
        replace_components(pipeline, opened, component_graphs(loader), loader.load)
    if isinstance(before, GatedDenoiser) and before.serves(pipeline):  # not one that `from_pipe` shares with another pipeline
        before.close()
    return pipeline


def remove(pipeline: Any) -> Any:
    """Put back the denoiser that `apply` replaced, and free the engines.

    Raises:
        InputError: if the pipeline has none of our denoisers, or `load` made it, so that there is none to put back.
    """
    gated = _gated(pipeline)
    if is_architecture(gated.replaces):
        raise InputError("this pipeline was loaded from a bundle, so it has no denoiser to go back to; load the model with diffusers")
    if gated.serves(pipeline):
        gated.close()
    setattr(pipeline, "unet" if pipeline.components.get("unet") is gated else "transformer", gated.replaces)
    restore_components(pipeline)
    return pipeline


def refit(target: str | os.PathLike[str] | Bundle | Any, lora: Sequence[str | LoraFile] = ()) -> Any:
    """Put LoRAs into a bundle without building it again, or into a pipeline that was loaded from one.

    Args:
        target: folder of a bundle, a bundle that is open, or a pipeline of `load` or `apply`, whose bundle on disk stays as it is.
        lora: files, ``"FILE"`` or ``"FILE:SCALE"``, that take the place of those of an earlier refit; none brings back the
            weights that were built.

    Returns:
        The bundle, opened anew, or the same pipeline.

    Raises:
        InputError: if a file is no LoRA, or of another architecture.
        UnsupportedError: if an engine holds its weights and cannot be given others.
        StaleBundleError: if the bundle's weights were discarded.
    """
    files = [LoraFile.parse(one) if isinstance(one, str) else one for one in lora]
    if isinstance(target, str | os.PathLike | Bundle):
        return refit_bundle(target if isinstance(target, Bundle) else Bundle.open(target), files)
    gated = _gated(target)
    origin: Origin = gated.origin
    loras = BundleLoras.read(origin.bundle, files)
    loras.refuse_what_cannot_be_refitted(origin.backend)
    weights = loras.weights(origin.bundle.manifest.model.attribute)
    for engine in gated.engines.values():
        engine.replace_weights(weights)
    origin.loras = loras
    _refit_components(target, loras, with_engines=True)
    return target


def loader_of(bundle: Bundle, options: LoadOptions) -> EngineLoader:
    """The loader of the engines that options ask for.

    Raises:
        TypeError: if there is no such option.
        InputError: if there is no such backend.
        StaleBundleError: if the bundle holds no engine that runs here.
    """
    unknown = options.keys() - LoadOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"there is no option {sorted(unknown)[0]!r}; the options are {', '.join(LoadOptions.__annotations__)}")
    backend, device = choose_backend(bundle, options.get("backend")), options.get("device")
    return EngineLoader(
        bundle,
        backend,
        best_device(backend) if device is None else torch.device(device),
        options.get("threads"),
        options.get("cuda_graphs", True),
        options.get("specialisation", "lazy"),
        options.get("torch_compile", False),
    )


def pipeline_of(bundle: Bundle, loader: EngineLoader, *, components: bool, modules: Mapping[str, nn.Module] = MappingProxyType({})) -> Any:
    """The bundle's pipeline; its denoiser is an architecture without weights, in whose place a `GatedDenoiser` is to be put.

    Args:
        bundle: that is open.
        loader: of the components' engines.
        components: whether text encoders and the VAE's decoder run as engines, where the bundle holds them.
        modules: components by name that are taken as they are.
    """
    from diffusers import DiffusionPipeline

    precision = _pipeline_precision(bundle, loader.device)
    parts = load_compiled(bundle, component_graphs(loader) if components else (), loader.load, precision)
    dtype = torch_dtype(precision)
    given = {**modules, **{name: part.architecture for name, part in parts.items()}}
    given |= {bundle.manifest.model.attribute: bundle.denoiser_on_meta(dtype)}
    with LOADING:
        pipeline = DiffusionPipeline.from_pretrained(
            bundle.pipeline, **given, torch_dtype=dtype, local_files_only=True, use_safetensors=True
        )
    for name, part in parts.items():
        setattr(pipeline, name, part)
    return pipeline


def _warn_of_a_scheduler_that_cannot_be_followed(pipeline: Any, steps: int) -> None:
    """Try the gate's arithmetic on a copy of the scheduler; the user may still set another one, so this is no error yet."""
    scheduler = copy.deepcopy(pipeline.scheduler)
    scheduler.set_timesteps(steps)
    try:
        schedule_of(SimpleNamespace(scheduler=scheduler), scheduler.timesteps[0], NONE)
    except GateError as error:
        logger.warning("runs with this bundle's own scheduler will be refused: %s", error)


def _draw_by_default(pipeline: Any, height: int, width: int) -> None:
    """Let a pipeline draw pictures of this size in pixels where a call names none.

    diffusers takes the default from the denoiser's configuration, where most pipelines read one side for both. So the pipeline
    becomes of a class that differs from its own in this alone, under the same name.
    """
    kind = type(pipeline)
    signature = inspect.signature(kind.__call__)
    if not {"height", "width"} <= signature.parameters.keys():
        return

    @functools.wraps(kind.__call__)
    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        given = signature.bind_partial(self, *arguments, **options)
        for name, side in (("height", height), ("width", width)):
            if given.arguments.get(name) is None:
                given.arguments[name] = side
        return kind.__call__(*given.args, **given.kwargs)

    refusals = {"__deepcopy__": StandIn.__deepcopy__, "__reduce_ex__": StandIn.__reduce_ex__}
    names = {"__call__": call, "__module__": kind.__module__, "__qualname__": kind.__qualname__, **refusals}
    pipeline.__class__ = type(kind.__name__, (kind,), names)


def component_graphs(loader: EngineLoader) -> list[str]:
    """Graphs of components of which the bundle holds engines of the backend that runs."""
    return [graph for graph in loader.bundle.manifest.model.components if has_engine(loader.bundle, graph, loader.backend)]


def _put(pipeline: Any, loader: EngineLoader, replaces: nn.Module, options: LoadOptions) -> None:
    """Load the denoiser's engines and put them into a pipeline."""
    origin = Origin(loader.bundle, loader.backend, loader.loras)
    manifest, low_memory = loader.bundle.manifest, options.get("low_memory", False)

    def load(graph: str, gate: Gate) -> Engine | None:
        if graph == "vanilla" and has_engine(loader.bundle, "planning", loader.backend):
            return None if low_memory else loader.load_vanilla()
        if not has_engine(loader.bundle, graph, loader.backend):
            if (other := substitute(graph)) is not None and has_engine(loader.bundle, other, loader.backend):
                return None
            raise StaleBundleError(
                f"{loader.bundle.folder} holds no {loader.backend} engine of the {graph} graph, which this gate needs; add it with "
                f"tgate-build --model {manifest.model.reference.model} --output {loader.bundle.folder} --backend {loader.backend} "
                f"--gate {gate}"
            )
        engine = loader.load(graph)
        if low_memory:
            engine.unload()
        return engine

    first = next(graph for graph in ("planning", *loader.bundle.manifest.graphs) if has_engine(loader.bundle, graph, loader.backend))
    gated = GatedDenoiser(
        pipeline,
        replaces,
        {first: loader.load(first)},
        gate=gate_from(manifest, options),
        guidance=options.get("guidance"),
        low_memory=low_memory,
        signature=manifest.signature,
        calls_a_half=denoiser_of(loader.bundle.denoiser_config()).calls_a_half,
        picture=(manifest.built_for.height, manifest.built_for.width),
        origin=origin,
        eager=(lambda: eager_denoiser(origin.loras, gated.dtype)) if is_architecture(replaces) else None,
        load=load,
    )
    setattr(pipeline, manifest.model.attribute, gated)


def gate_from(manifest: Manifest, options: LoadOptions) -> Gate:
    """The gate that options name; the bundle's own if they name none.

    Raises:
        InputError: if it is impossible, or both ``gate`` and ``gate_step`` or ``after_gate`` are named.
    """
    step, after = options.get("gate_step"), options.get("after_gate")
    gate = options.get("gate")
    if gate is not None:
        if step is not None or after is not None:
            raise InputError("a gate names its step and what comes after it, so gate_step and after_gate are for loads without one")
        return manifest.gate(gate)
    return Gate(manifest.default_gate_step if step is None else step, after or manifest.after_gate)


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


def _refit_components(pipeline: Any, loras: BundleLoras, *, with_engines: bool) -> None:
    """Give the text encoders the weights that LoRAs change; eager ones first get back those that earlier ones changed."""
    for name in TEXT_ENCODERS:
        part, weights = getattr(pipeline, name, None), loras.weights(name)
        if isinstance(part, Compiled):
            if with_engines:
                part.replace_weights(weights)
            part.replaced = weights
        elif isinstance(part, nn.Module):
            before: dict[str, Tensor] = getattr(part, _BEFORE, {})
            write_weights(part, before)
            kept = {key: value.clone() for key, value in part.state_dict().items() if not weights.keys().isdisjoint(parameter_names(key))}
            setattr(part, _BEFORE, kept)
            write_weights(part, weights)


_BEFORE = "_tgate_trt_weights_before_loras"
"""Attribute of an eager text encoder with the weights that LoRAs changed."""


def _pipeline_precision(bundle: Bundle, device: torch.device) -> str:
    """The precision of the bundle on a GPU; fp32 on a CPU, where half precision is slow and partly missing."""
    return bundle.manifest.built_for.precision if device.type == "cuda" else "fp32"


def _refuse_another_model(denoiser: nn.Module, bundle: Bundle) -> None:
    """Refuse a pipeline whose denoiser has another architecture or other weights than the bundle was built from.

    The first row of each parameter is compared, up to the rounding of the coarser of the two dtypes: another checkpoint changes
    all of them, a fused LoRA those of its layers.

    Raises:
        InputError: with what differs, and what to do.
    """
    own, built = denoiser.state_dict(), bundle.denoiser_on_meta(torch.float32).state_dict()
    kind = type(denoiser).__name__
    if getattr(denoiser, "peft_config", None):
        raise InputError(
            f"the pipeline's {kind} has LoRAs loaded; unload them by pipeline.unload_lora_weights(), apply the bundle, and put them in "
            "with tgate_trt.refit(pipeline, ['FILE.safetensors:0.8'])"
        )
    shapes, expected = ({name: tuple(tensor.shape) for name, tensor in state.items()} for state in (own, built))
    if shapes != expected:
        name = next(name for name in (*expected, *shapes) if shapes.get(name) != expected.get(name))
        raise InputError(
            f"the pipeline's {kind} has another architecture than {bundle.folder} was built from: {name!r} has shape "
            f"{shapes.get(name, 'none')}, in the bundle {expected.get(name, 'none')}; build a bundle of this pipeline"
        )
    if WEIGHTS_FILE not in bundle.manifest.files or is_architecture(denoiser):
        return  # the bundle's weights were discarded, or `load` made the pipeline: the architecture is all that can be compared
    with opened_file(bundle.folder / WEIGHTS_FILE) as weights:
        other = [name for name, tensor in own.items() if not _is_rounded(tensor[:1].cpu(), weights.get_slice(name)[:1])]
    if other:
        raise InputError(
            f"{len(other)} of the {len(own)} weights of the pipeline's {kind} are other than {bundle.folder} was built from, {other[0]!r} "
            "first; if a LoRA is fused into them, unfuse it and put it in with tgate_trt.refit; else build a bundle of this pipeline"
        )


def _is_rounded(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal up to the rounding of the coarser of their dtypes."""
    if one.dtype == other.dtype:
        return torch.equal(one, other)
    coarser = max((one.dtype, other.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    info = torch.finfo(coarser)
    return torch.allclose(one.float(), other.float(), rtol=info.eps, atol=info.smallest_normal * info.eps)

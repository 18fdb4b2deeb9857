"""The options of a build, checked and completed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import TypedDict

from tgate_trt.building.engines import EngineRequest
from tgate_trt.building.graphs import signature_of
from tgate_trt.bundle.backends import BACKENDS, ONNXRUNTIME, PYTORCH, UNCOMPILED
from tgate_trt.bundle.manifest import BuiltFor
from tgate_trt.engines.tensorrt_builder import PlanOptions
from tgate_trt.engines.tensorrt_flavours import TENSORRT, gpu_is_present
from tgate_trt.errors import InputError, UnsupportedError
from tgate_trt.gate.actions import graphs_of, substitute
from tgate_trt.gate.gate import Gate, gate_of
from tgate_trt.models.lora import LoraFile
from tgate_trt.models.signature import CONTROLS, maximum_rows
from tgate_trt.models.source import ModelSource
from tgate_trt.specs import PRECISIONS, Bounds
from tgate_trt.taps import LAYERS_OF_A_BRANCH, branch_of, recipe

FUSIONS = ("plugin", "function", "off")
"""How the reuse of the cache runs: as a TensorRT plugin, and as a local function for the other backends; as a local function
for all; or as the addition and the norm that were traced."""


class BuildOptions(TypedDict, total=False):
    """What a bundle is built for: keywords of `tgate_trt.build`."""

    backend: str | Sequence[str] | None
    """One of `tgate_trt.bundle.backends.BACKENDS`, or several; if None, TensorRT where it is installed and sees a GPU, else ONNX
    Runtime."""
    precision: str | None
    """``"fp32"`` or ``"fp16"``; if None, fp32 for ONNX Runtime, and for PyTorch without a GPU; else fp16."""
    height: int | str | None
    """Of the picture in pixels, or a range of sizes, ``"512:768:1024"``; the model's own if None."""
    width: int | str | None
    """Of the picture in pixels, likewise."""
    batch_size: str
    """Images of a run, ``"MIN:OPT:MAX"``; ``"1:1:1"`` by default."""
    controls: Sequence[str]
    """What may add to the denoiser's hidden states: ``"controlnet"``, ``"t2i-adapter"``; their inputs become inputs of the graphs."""
    gates: Sequence[str | Gate]
    """Gates, or their text forms, that the bundle shall be able to run: the graphs that they need are cut besides ``graphs``."""
    graphs: Sequence[str] | None
    """Names of graphs, of `tgate_trt.taps.GRAPHS`; if None, planning and fidelity, and where TensorRT engines share their weights
    vanilla too, which then costs no memory and spares the steps before the last planning one the taps."""
    compute_capability: Sequence[str]
    """GPUs to build TensorRT-RTX plans for, such as ``["SM89"]``; the one of this machine if empty, and where there is none, every one
    from Ampere on."""
    weights: str
    """Where those of TensorRT engines are: ``"baked"`` into the plan, the default; ``"shared"``, one copy for all engines;
    or ``"shared-linear"``, shared but for those of convolutions."""
    plan_options: PlanOptions | None
    """Further options of TensorRT plans."""
    lora: Sequence[str | LoraFile]
    """Files to fuse into the weights, ``"FILE"`` or ``"FILE:SCALE"``."""
    components: bool
    """Whether text encoders and the VAE's decoder become engines too; by default they do."""
    fuse_cache_reuse: str | None
    """How the reuse of the cache runs: ``"plugin"``, TensorRT's plugin; ``"function"``, one op that backends expand; ``"off"``, an
    addition and a norm. If None, the plugin where TensorRT takes it, else the function."""
    discard_graphs: bool
    """Whether to leave graphs and weights out of the bundle that baked engines do without. Nothing can be added to it then."""
    config: str | os.PathLike[str] | None
    """Diffusers folder with the configuration and tokenizers of a ``.safetensors`` checkpoint; found out from the file if None."""
    prediction_type: str | None
    """``"epsilon"``, ``"v_prediction"`` or ``"sample"``, in the place of what the model states; its own if None."""
    random_weights: bool
    """Whether to fill a named architecture with seeded random weights."""
    verify: bool
    """Whether to compare each graph with eager PyTorch; by default it is compared."""
    force: bool
    """Whether to build even if nothing changed, and to trace even if the cache holds the trace."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What to build."""

    built_for: BuiltFor
    graphs: tuple[str, ...]
    engines: EngineRequest
    verify: bool = True
    components: bool = True
    discard_graphs: bool = False
    force: bool = False

    @classmethod
    def resolved(cls, source: ModelSource, options: BuildOptions) -> Request:
        """Check the options, and fill in those that were left out.

        Raises:
            InputError: if a value is impossible.
            UnsupportedError: if this version does not build it.
        """
        fusion = options.get("fuse_cache_reuse")
        if fusion is not None and fusion not in FUSIONS:
            raise InputError(f"--fuse-cache-reuse is one of {', '.join(FUSIONS)}, got {fusion!r}")
        plans = options.get("plan_options") or PlanOptions()
        engines = EngineRequest(
            _backends(options.get("backend")),
            options.get("weights", "baked"),
            dataclasses.replace(plans, capabilities=tuple(options.get("compute_capability") or ())),
            plugins=None if fusion is None else fusion == "plugin",
        )
        graphs = _graphs(options.get("graphs"), [gate_of(gate) for gate in options.get("gates") or ()], engines)
        _refuse_branches(graphs, LAYERS_OF_A_BRANCH * len(source.denoiser_config().get("up_block_types", ())))
        built_for = BuiltFor(
            _precision(options.get("precision"), engines.backends),
            _side(options.get("height") or source.height),
            _side(options.get("width") or source.width),
            _images(options.get("batch_size", "1:1:1"), maximum_rows(source.denoiser_config())),
            fusion != "off",
            Bounds(1, source.text_tokens, _PROMPTS * source.text_tokens),
            _controls(options.get("controls") or ()),
        )
        signature_of(source, built_for)
        request = cls(
            built_for,
            graphs,
            engines,
            options.get("verify", True),
            options.get("components", True),
            options.get("discard_graphs", False),
            options.get("force", False),
        )
        needs_them = engines.weights != "baked" or engines.plan_options.stripped
        if request.discard_graphs and (set(UNCOMPILED) & set(engines.backends) or needs_them):
            raise InputError(
                "--discard-graphs is for TensorRT engines with --weights baked alone; the others read the bundle's graphs or weights"
            )
        return request


def _graphs(named: Sequence[str] | None, gates: Sequence[Gate], engines: EngineRequest) -> tuple[str, ...]:
    """The graphs of a build: those named, or the default ones, and those that gates need and none of these can stand for.

    Raises:
        InputError: if there is no graph of a name.
    """
    shares = engines.weights == "shared" and not set(engines.backends) <= set(UNCOMPILED)
    graphs = list(dict.fromkeys(named or ("planning", "fidelity", *(("vanilla",) if shares else ()))))
    for graph in graphs:
        recipe(graph)
    needed = {graph: None for gate in gates for graph in graphs_of(gate) if graph not in graphs}
    return (*graphs, *(graph for graph in needed if substitute(graph) not in (*graphs, *needed)))


def _refuse_branches(graphs: Sequence[str], branches: int) -> None:
    """Refuse graphs whose deep features the model does not have.

    Raises:
        InputError: with the branches that it has.
    """
    for graph in graphs:
        for kind in (*recipe(graph).takes_in, *recipe(graph).gives_out):
            branch = branch_of(kind)
            if branch is not None and branch >= branches:
                raise InputError(f"this model has no branch {branch} for DeepCache; it has 0 to {branches - 1}")


def _backends(backend: str | Sequence[str] | None) -> tuple[str, ...]:
    """The backends asked for, or the default of this machine."""
    if not backend:
        return (TENSORRT.backend,) if gpu_is_present() and TENSORRT.is_installed() else (ONNXRUNTIME,)
    names = backend.split(",") if isinstance(backend, str) else backend
    for name in names:
        if name not in BACKENDS:
            raise UnsupportedError(f"this version does not build for {name!r}; it builds for {', '.join(BACKENDS)}")
    return tuple(dict.fromkeys(names))


def _precision(precision: str | None, backends: Sequence[str]) -> str:
    """The precision asked for, or the default of the backends."""
    on_cpu = ONNXRUNTIME in backends or (PYTORCH in backends and not gpu_is_present())
    precision = precision or ("fp32" if on_cpu else "fp16")
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "bf16":
        raise UnsupportedError("this version builds fp32 and fp16; ONNX Runtime, which verifies a build, has no bf16 kernels on the CPU")
    return precision


_PROMPTS = 3
"""Prompts of the model's own length that a profile of TensorRT takes in one, as tools that weight prompts give them."""


def _images(batch_size: str, rows: int) -> Bounds:
    """The images that a run may have, where a trace holds for so many rows."""
    images = Bounds.parse(batch_size)
    if 2 * images.maximum > rows > 1:
        raise InputError(f"a run may have at most {rows // 2} images, got batch size {images}")
    return images


def _side(size: int | str) -> Bounds:
    """A side of the picture in pixels, or a range of it."""
    return Bounds.parse(str(size))


def _controls(names: str | Sequence[str]) -> tuple[str, ...]:
    """What may add to the hidden states.

    Raises:
        InputError: if there is no such control.
    """
    names = names.split(",") if isinstance(names, str) else names
    for name in names:
        if name not in CONTROLS:
            raise InputError(f"--control is one of {', '.join(CONTROLS)}, got {name!r}")
    return tuple(sorted(set(names)))

"""What is compared: a bundle's engines, and PyTorch without engines, each behind a pipeline that draws and is timed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import nn

from tgate_trt.analysis.subject import eager_denoiser
from tgate_trt.bench.macs import Macs, macs_of_graph
from tgate_trt.bench.settings import COMPILED, OFFICIAL, Setting
from tgate_trt.bench.stopwatch import Stopwatch, Watched
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.errors import InputError, UnsupportedError
from tgate_trt.gate.denoiser import GatedDenoiser
from tgate_trt.gate.schedule import NONE, GateStep
from tgate_trt.running.drawing import scheduler_of
from tgate_trt.running.loading import EngineLoader
from tgate_trt.running.pipeline import pipeline_of
from tgate_trt.specs import DTYPES

PLANNING, FIDELITY, HAND_OFF, TEXT, VAE = "planning step", "fidelity step", "hand-off", "text encoding", "VAE"
OUTSIDE = ("denoiser", "scheduler", "pipeline")
"""Time that is Python around the models: of `GatedDenoiser`, of the scheduler, and of diffusers' pipeline."""
PARTS = (PLANNING, FIDELITY, HAND_OFF, TEXT, VAE, *OUTSIDE)

_OFFICIAL_LOADERS = {"StableDiffusionPipeline": "TgateSDLoader", "StableDiffusionXLPipeline": "TgateSDXLLoader"}
_WITHOUT_SELF_ATTENTION_REUSE = {"sp_interval": 1, "fi_interval": 1, "warm_up": 2}
"""Of the official code: its default reuses self-attention before the gate too, which is the method's second version."""


@dataclass(frozen=True)
class Conditions:
    """What all contenders have in common."""

    steps: int
    guidance_scale: float | None
    scheduler: str | None
    """By the name that the commands take; the pipeline's own if None."""
    images: int = 1
    """Pictures in one call."""
    threads: int | None = None
    """CPU threads of an engine; one a core if None."""

    def arguments(self, bundle: Bundle, steps: int | None = None) -> dict[str, Any]:
        """Of a pipeline's call, but for prompt and noise."""
        built_for = bundle.manifest.built_for
        arguments: dict[str, Any] = {"height": built_for.height, "width": built_for.width, "num_inference_steps": steps or self.steps}
        if self.guidance_scale is not None:
            arguments["guidance_scale"] = self.guidance_scale
        return arguments


class Contender(Protocol):
    """One way to draw, ready to be timed."""

    setting: Setting

    @property
    def engine(self) -> str:
        """What computes, in words."""

    @property
    def pipeline(self) -> Any:
        """The diffusers pipeline, made to draw in this way: called as it is, or timed by `draw`."""

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int | None = None, watch: Stopwatch | None = None) -> Any:
        """Draw pictures in one call, timed part by part if a watch is given.

        Args:
            prompts: as many as pictures.
            seeds: of the noise of each.
            steps: of the scheduler; those of the conditions if None.
            watch: whose parts are `PARTS`.
        """


@dataclass
class Studio:
    """Contenders of one bundle on one device. What they can share they share: pipelines, engines, weights."""

    bundle: Bundle
    device: torch.device
    conditions: Conditions
    components: bool = True
    """Whether text encoders and VAE run as engines where the bundle holds them."""
    keeps_engines: bool = True
    """Whether all engines stay loaded, or only those of the contender that draws."""
    _loaders: dict[str, EngineLoader] = field(default_factory=dict)
    _pipelines: dict[str, Any] = field(default_factory=dict)
    _engines: dict[tuple[str, str], Any] = field(default_factory=dict)
    _contenders: dict[Setting, Contender] = field(default_factory=dict)
    _macs: dict[tuple[str, int], Macs] = field(default_factory=dict)
    _eager: nn.Module | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for engine in self._engines.values():
            engine.close()

    @property
    def dtype(self) -> torch.dtype:
        """Of pipelines: the bundle's precision on a GPU, fp32 on a CPU."""
        precision = self.bundle.manifest.built_for.precision if self.device.type == "cuda" else "fp32"
        dtype: torch.dtype = getattr(torch, DTYPES[precision])
        return dtype

    @property
    def attribute(self) -> str:
        """Of a pipeline's denoiser."""
        return self.bundle.manifest.model.attribute

    @cached_property
    def architecture(self) -> nn.Module:
        """The denoiser's, without weights."""
        return self.bundle.denoiser_on_meta(self.dtype)

    def gate_step(self, setting: Setting, steps: int | None) -> GateStep:
        """Of a run of so many steps; of a run that warms up, such that steps come before and after it."""
        if setting.gate_step == NONE or steps is None:
            return NONE if setting.gate_step == NONE else setting.planning_steps(self.conditions.steps)
        return max(1, steps // 2)

    def contender(self, setting: Setting) -> Contender:
        """Make or find the contender of a setting; where memory is short, engines of others are closed."""
        if setting not in self._contenders:
            self._contenders[setting] = _Ours(self, setting) if setting.backend else _PyTorch(self, setting)
        return self._contenders[setting]

    def engine(self, backend: str, graph: str, beside: Sequence[str] = ()) -> Any:
        """A graph's engine; those of graphs that are not ``beside`` it may be closed for it."""
        if not self.keeps_engines:
            for key in [key for key in self._engines if key[0] != backend or key[1] not in (graph, *beside)]:
                self._engines.pop(key).close()
        if (backend, graph) not in self._engines:
            self._engines[backend, graph] = self._loader(backend).load(graph)
        return self._engines[backend, graph]

    def our_pipeline(self, backend: str) -> Any:
        """The bundle's pipeline around a backend's engines, but for the denoiser's."""
        if backend not in self._pipelines:
            pipeline = pipeline_of(self.bundle, self._loader(backend), components=self.components)
            for name, part in pipeline.components.items():
                if isinstance(part, nn.Module) and name != self.attribute:  # which has no weights to move
                    part.to(self.device)
            self._pipelines[backend] = self._ready(pipeline)
        return self._pipelines[backend]

    def eager_pipeline(self) -> Any:
        """A pipeline of its own in PyTorch; the denoisers of several share their weights."""
        from diffusers import DiffusionPipeline

        if self._eager is None:
            self._eager = denoiser = eager_denoiser(self.bundle, self.dtype).to(self.device)
        else:
            denoiser = self.bundle.denoiser_on_meta(self.dtype)
            denoiser.load_state_dict(self._eager.state_dict(), assign=True)
            denoiser.requires_grad_(False)
        pipeline = DiffusionPipeline.from_pretrained(
            self.bundle.pipeline, **{self.attribute: denoiser}, torch_dtype=self.dtype, local_files_only=True, use_safetensors=True
        )
        return self._ready(pipeline.to(self.device))

    def macs(self, graph: str, rows: int) -> Macs:
        """Multiply-accumulates of one call of a graph."""
        if (graph, rows) not in self._macs:
            self._macs[graph, rows] = macs_of_graph(self.bundle.folder / f"{graph}.onnx", rows)
        return self._macs[graph, rows]

    def _loader(self, backend: str) -> EngineLoader:
        if backend not in self._loaders:
            self._loaders[backend] = EngineLoader(self.bundle, backend, self.device, self.conditions.threads)
        return self._loaders[backend]

    def _ready(self, pipeline: Any) -> Any:
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = scheduler_of(pipeline, self.conditions.scheduler)
        return pipeline


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """The noise of each picture, the same on every device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


class _Ours:
    """A bundle's engines behind a `GatedDenoiser`, which stays from call to call, for engines bind its buffers once."""

    def __init__(self, studio: Studio, setting: Setting) -> None:
        self.studio, self.setting = studio, setting
        self._denoiser: GatedDenoiser | None = None
        self._engines: list[Watched] = []
        """Its engines, with their clocks."""

    @property
    def engine(self) -> str:
        return f"{self.setting.backend} {self.studio.bundle.manifest.built_for.precision}"

    @property
    def pipeline(self) -> Any:
        pipeline = self.studio.our_pipeline(str(self.setting.backend))
        denoiser = self._ready(pipeline)
        denoiser.gate_step = self.studio.gate_step(self.setting, None)
        for engine in self._engines:
            engine.watch = None
        setattr(pipeline, self.studio.attribute, denoiser)
        return pipeline

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int | None = None, watch: Stopwatch | None = None) -> Any:
        pipeline = self.pipeline
        denoiser = getattr(pipeline, self.studio.attribute)
        denoiser.gate_step = self.studio.gate_step(self.setting, steps)
        call = _Call(pipeline, pipeline, self.studio, prompts, seeds, steps)
        for engine in self._engines:
            engine.watch = watch
        if watch is None:
            return call()
        with watch.watching(denoiser, "forward", "denoiser"), watch.watching(denoiser, "_hand_off", HAND_OFF):
            return call(watch)

    def _ready(self, pipeline: Any) -> GatedDenoiser:
        """This setting's denoiser; a new one where its engines have been loaded anew."""
        graphs, backend = self.setting.graphs, str(self.setting.backend)
        engines = [self.studio.engine(backend, graph, graphs) for graph in graphs]
        if self._denoiser is None or [watched.engine for watched in self._engines] != engines:
            self._engines = [Watched(engine, part) for engine, part in zip(engines, (PLANNING, FIDELITY), strict=True)]
            self._denoiser = GatedDenoiser(
                pipeline, self.studio.architecture, *self._engines, gate_step=self.setting.gate_step, after_gate=self.setting.after_gate
            )
        return self._denoiser


class _PyTorch:
    """Diffusers as it is, with its denoiser compiled, or as the official T-GATE code runs it."""

    def __init__(self, studio: Studio, setting: Setting) -> None:
        self.studio, self.setting = studio, setting
        self.pipeline = studio.eager_pipeline()
        self._denoiser: nn.Module = getattr(self.pipeline, studio.attribute)
        self._call: Callable[..., Any] = self.pipeline
        if setting.kind == COMPILED:
            self._denoiser.compile(dynamic=False)
        elif setting.kind == OFFICIAL:
            self._call = _official(self.pipeline)

    @property
    def engine(self) -> str:
        return f"PyTorch {str(self.studio.dtype).removeprefix('torch.')}"

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int | None = None, watch: Stopwatch | None = None) -> Any:
        more: dict[str, Any] = {}
        if self.setting.kind == OFFICIAL:
            more = {"gate_step": self.studio.gate_step(self.setting, steps), **_WITHOUT_SELF_ATTENTION_REUSE}
        call = _Call(self.pipeline, self._call, self.studio, prompts, seeds, steps, more)
        if watch is None:
            return call()
        with _watching_calls(watch, self._denoiser, 2 * len(prompts)):
            return call(watch)


@dataclass(frozen=True)
class _Call:
    """A call of a pipeline, its parts watched."""

    pipeline: Any
    function: Callable[..., Any]
    """The pipeline, or another function of it."""
    studio: Studio
    prompts: Sequence[str]
    seeds: Sequence[int]
    steps: int | None
    more: dict[str, Any] = field(default_factory=dict)

    def __call__(self, watch: Stopwatch | None = None) -> Any:
        arguments = self.studio.conditions.arguments(self.studio.bundle, self.steps) | self.more
        arguments |= {"prompt": list(self.prompts), "generator": generators(self.seeds)}
        if watch is None:
            return self.function(**arguments).images
        with contextlib.ExitStack() as stack:
            stack.enter_context(watch.watching(self.pipeline, "encode_prompt", TEXT))
            stack.enter_context(watch.watching(self.pipeline.vae, "decode", VAE))
            stack.enter_context(watch.watching(self.pipeline.scheduler, "step", "scheduler"))
            stack.enter_context(watch.time("pipeline"))
            return self.function(**arguments).images


@contextlib.contextmanager
def _watching_calls(watch: Stopwatch, denoiser: nn.Module, guided_rows: int) -> Iterator[None]:
    """Time each call of a denoiser by hooks, which stay where the official code takes another ``forward``."""

    def begin(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        sample = arguments[0] if arguments else keywords.get("sample", keywords.get("hidden_states"))
        watch.start(PLANNING if sample is not None and len(sample) == guided_rows else FIDELITY)

    handles = [
        denoiser.register_forward_pre_hook(begin, with_kwargs=True),
        denoiser.register_forward_hook(lambda *_: watch.stop()),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _official(pipeline: Any) -> Callable[..., Any]:
    """The official code's function that draws with a pipeline.

    Raises:
        UnsupportedError: if it is not installed, or does not know the pipeline.
    """
    try:
        import tgate
    except ImportError as error:
        raise UnsupportedError("--beside official needs the official code; install it with `pip install tgate==1.0.0`") from error
    loader = _OFFICIAL_LOADERS.get(type(pipeline).__name__)
    if loader is None:
        raise InputError(f"--beside official is for {', '.join(_OFFICIAL_LOADERS)}, got {type(pipeline).__name__}")
    function: Callable[..., Any] = getattr(tgate, loader)(pipeline).tgate
    return function

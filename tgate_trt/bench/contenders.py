"""What is compared: a bundle's engines, and PyTorch without engines, each in a pipeline that draws and can be timed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from tgate_trt.bench.graphed import capture_calls
from tgate_trt.bench.settings import CAPTURED, CHANNELS_LAST, COMPILED, CUTOFF, GATED, OFFICIAL, TGATE, Setting
from tgate_trt.bench.stopwatch import Stopwatch
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.bundle.loras import BundleLoras
from tgate_trt.eager import torch_dtype
from tgate_trt.engines.base import Engine
from tgate_trt.errors import InputError, UnsupportedError
from tgate_trt.export.macs import Macs, macs_of_graph
from tgate_trt.gate.actions import substitute
from tgate_trt.gate.denoiser import FIDELITY, FORECAST, HAND_OFF, PLANNING, GatedDenoiser
from tgate_trt.gate.schedule import NONE, GateStep
from tgate_trt.running.drawing import Drawing, draw, prepare
from tgate_trt.running.loading import EngineLoader, eager_denoiser
from tgate_trt.running.pipeline import pipeline_of

TEXT, VAE = "text encoding", "VAE"
OUTSIDE = ("denoiser", "scheduler", "pipeline")
"""Parts of Python around the models: `GatedDenoiser`, the scheduler, and diffusers' pipeline."""
PARTS = (PLANNING, FIDELITY, HAND_OFF, FORECAST, TEXT, VAE, *OUTSIDE)
"""Parts of the time of a call, which add up to the whole."""

_OFFICIAL_LOADERS = {"StableDiffusionPipeline": "TgateSDLoader", "StableDiffusionXLPipeline": "TgateSDXLLoader"}
_WITHOUT_SELF_ATTENTION_REUSE = {"sp_interval": 1, "fi_interval": 1, "warm_up": 2}
"""Settings of the official code: by default it also reuses self-attention before the gate, as in the method's second version."""
_CUTOFFS = {"StableDiffusionPipeline": "SDCFGCutoffCallback", "StableDiffusionXLPipeline": "SDXLCFGCutoffCallback"}
"""diffusers' own callbacks that end guidance, by pipeline."""
_WARM_UP_STEPS, _WARM_UP_RUNS_ON_GPU = 2, 3
"""One step before the gate and one after it. On a GPU a step is run, captured and replayed before the clock runs."""


@dataclass(frozen=True)
class Contender:
    """One way to draw: a setting, and a pipeline that draws in it."""

    setting: Setting
    pipeline: Any
    """A diffusers pipeline, which contenders of one backend share."""
    attribute: str
    """Attribute of the denoiser in the pipeline."""
    denoiser: nn.Module
    """The setting's own denoiser. It stays from call to call, because engines bind its buffers once."""
    function: Callable[..., Any]
    """The function that draws: the pipeline itself, or that of the official code."""

    def draw(self, drawing: Drawing, watch: Stopwatch | None = None, **more: Any) -> Any:
        """Draw all pictures of a drawing in one call.

        Args:
            drawing: the pictures, with their number of steps.
            watch: times the parts of the call, `PARTS`, if given.
            **more: further keywords of the pipeline.

        Returns:
            The pipeline's ``images``.
        """
        assert drawing.steps is not None
        drawing = replace(drawing, steps=self.setting.steps or drawing.steps)
        gate_step = NONE if self.setting.gate_step == NONE else self.setting.planning_steps(drawing.steps or 0)
        return self._draw(drawing, gate_step, watch, **more)

    def warm_up(self, drawing: Drawing) -> None:
        """Draw in a step before the gate and one after it, on a GPU until the launches of each are captured and replayed.

        A gate in text form may have actions of further kinds, so it runs whole.
        """
        on_gpu = self.pipeline.device.type == "cuda"
        wanted = _WARM_UP_STEPS * (1 + on_gpu)  # two before the gate, of which the last may be another engine's
        steps = min(wanted, drawing.steps or wanted)
        for _ in range(_WARM_UP_RUNS_ON_GPU if on_gpu else 1):
            if self.setting.text is not None:
                self.draw(drawing)
                continue
            self._draw(replace(drawing, steps=steps), NONE if self.setting.gate_step == NONE else steps // 2, None)

    def _draw(self, drawing: Drawing, gate_step: GateStep, watch: Stopwatch | None, **more: Any) -> Any:
        setattr(self.pipeline, self.attribute, self.denoiser)
        if isinstance(self.denoiser, GatedDenoiser) and self.setting.text is None:
            self.denoiser.gate_step = gate_step
        if self.setting.kind == OFFICIAL:
            more |= {"gate_step": gate_step, **_WITHOUT_SELF_ATTENTION_REUSE}
        if self.setting.kind == CUTOFF:
            more |= {"callback_on_step_end": _cutoff(self.pipeline, int(gate_step), len(drawing.prompts))}
        if watch is None:
            return draw(self.function, drawing, **more)
        with self._timed(watch, 2 * len(drawing.prompts)) as function:
            return draw(function, drawing, **more)

    @contextlib.contextmanager
    def _timed(self, watch: Stopwatch, guided_rows: int) -> Iterator[Callable[..., Any]]:
        """Within this context, the function that it gives draws with the parts of the call timed."""

        @functools.wraps(self.function, updated=())  # so that it has the same signature
        def function(**arguments: Any) -> Any:
            with watch.time("pipeline"):
                return self.function(**arguments)

        with contextlib.ExitStack() as stack:
            stack.enter_context(watch.watching(self.pipeline, "encode_prompt", TEXT))
            stack.enter_context(watch.watching(self.pipeline.vae, "decode", VAE))
            stack.enter_context(watch.watching(self.pipeline.scheduler, "step", "scheduler"))
            if isinstance(self.denoiser, GatedDenoiser):
                stack.enter_context(watch.watching(self.denoiser, "forward", "denoiser"))
                stack.callback(setattr, self.denoiser, "observer", None)
                self.denoiser.observer = watch.time
            else:
                stack.enter_context(_timed_calls(watch, self.denoiser, guided_rows))
            yield function


@dataclass
class Studio:
    """Makes the contenders of one bundle on one device, which share pipelines, engines and weights."""

    bundle: Bundle
    device: torch.device
    scheduler: str | None = None
    """Scheduler of all pipelines; see `tgate_trt.running.drawing.prepare`."""
    threads: int | None = None
    """CPU threads of an engine, and of PyTorch while the studio is open; one for each core if None."""
    components: bool = True
    """Whether text encoders and VAE run as engines if the bundle holds such engines."""
    keeps_engines: bool = True
    """Whether all engines stay loaded, or only those of the contender that draws."""
    _loaders: dict[str, EngineLoader] = field(default_factory=dict)
    _pipelines: dict[str, Any] = field(default_factory=dict)
    _engines: dict[tuple[str, str], Engine] = field(default_factory=dict)
    """By backend and graph."""
    _contenders: dict[Setting, Contender] = field(default_factory=dict)
    _macs: dict[tuple[str, int], Macs] = field(default_factory=dict)
    _eager: nn.Module | None = None

    def __enter__(self) -> Self:
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(self.threads or self._threads_before)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        torch.set_num_threads(self._threads_before)
        for engine in self._engines.values():
            engine.close()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of pipelines: the bundle's precision on a GPU, fp32 on a CPU."""
        return torch_dtype(self.bundle.manifest.built_for.precision if self.device.type == "cuda" else "fp32")

    @functools.cached_property
    def architecture(self) -> nn.Module:
        """The denoiser without weights."""
        return self.bundle.denoiser_on_meta(self.dtype)

    def contender(self, setting: Setting) -> Contender:
        """The contender of a setting; unless engines are kept, the engines of all others are closed."""
        if setting.backend and not self.keeps_engines:
            self._close_others(setting)
        if setting not in self._contenders:
            self._contenders[setting] = self._with_engines(setting, setting.backend) if setting.backend else self._eager_contender(setting)
        return self._contenders[setting]

    def engine_name(self, setting: Setting) -> str:
        """What computes a setting's pictures, in words."""
        if setting.backend:
            return f"{setting.backend} {self.bundle.manifest.built_for.precision}"
        return f"PyTorch {str(self.dtype).removeprefix('torch.')}"

    def pipeline(self, backend: str) -> Any:
        """The bundle's pipeline for a backend's engines, without its denoiser."""
        if backend not in self._pipelines:
            pipeline = pipeline_of(self.bundle, self._loader(backend), components=self.components)
            for name, part in pipeline.components.items():
                if isinstance(part, nn.Module) and name != self.bundle.manifest.model.attribute:  # which has no weights to move
                    part.to(self.device)
            self._pipelines[backend] = prepare(pipeline, self.scheduler)
        return self._pipelines[backend]

    def macs(self, graph: str, rows: int) -> Macs:
        """Multiply-accumulates of one call of a graph."""
        if (graph, rows) not in self._macs:
            self._macs[graph, rows] = macs_of_graph(self.bundle.folder / f"{graph}.onnx", self.bundle.manifest.signature.sizes(rows))
        return self._macs[graph, rows]

    def _loader(self, backend: str) -> EngineLoader:
        if backend not in self._loaders:
            self._loaders[backend] = EngineLoader(self.bundle, backend, self.device, self.threads)
        return self._loaders[backend]

    def _close_others(self, setting: Setting) -> None:
        """Close the engines that a setting does not use, and forget the contenders that use them."""
        for backend, graph in list(self._engines):
            if backend != setting.backend or graph not in self._graphs(setting, backend):
                self._engines.pop((backend, graph)).close()
        for other in [other for other in self._contenders if other.backend]:
            if any((other.backend, graph) not in self._engines for graph in self._graphs(other, str(other.backend))):
                del self._contenders[other]

    def _graphs(self, setting: Setting, backend: str) -> tuple[str, ...]:
        """The graphs whose engines a setting runs: planning steps before the last run the vanilla one where weights are shared."""
        shares = self._loader(backend).shares_weights
        if setting.kind == GATED:
            held = [graph for graph in setting.graphs if graph != "vanilla"]
            return setting.graphs if shares or substitute("vanilla") not in held else tuple(held)
        return (*setting.graphs, "vanilla") if setting.kind == TGATE and shares else setting.graphs

    def _with_engines(self, setting: Setting, backend: str) -> Contender:
        """A contender that runs a bundle's engines behind a `GatedDenoiser`."""
        graphs = self._graphs(setting, backend)
        for graph in graphs:
            if (backend, graph) not in self._engines:
                self._engines[backend, graph] = self._loader(backend).load(graph)
        pipeline, engines = self.pipeline(backend), {graph: self._engines[backend, graph] for graph in graphs}
        denoiser = GatedDenoiser(pipeline, self.architecture, engines, gate=setting.gate)
        return Contender(setting, pipeline, self.bundle.manifest.model.attribute, denoiser, pipeline)

    def _eager_contender(self, setting: Setting) -> Contender:
        """A contender in PyTorch: diffusers, its captured or compiled denoiser, or the official T-GATE code, all on the same weights.

        Raises:
            InputError: if it needs a GPU and there is none, or does not support the pipeline.
            UnsupportedError: if the official code is not installed.
        """
        from diffusers import DiffusionPipeline

        attribute = self.bundle.manifest.model.attribute
        if self._eager is None:
            self._eager = denoiser = eager_denoiser(BundleLoras.read(self.bundle), self.dtype).to(self.device)
        else:
            denoiser = self.bundle.denoiser_on_meta(self.dtype)
            denoiser.load_state_dict(self._eager.state_dict(), assign=True)
            denoiser.requires_grad_(False)
        pipeline = DiffusionPipeline.from_pretrained(
            self.bundle.pipeline, **{attribute: denoiser}, torch_dtype=self.dtype, local_files_only=True, use_safetensors=True
        )
        pipeline = prepare(pipeline.to(self.device), self.scheduler)
        if setting.kind == COMPILED:
            denoiser.compile(dynamic=False)
        if setting.kind in (CAPTURED, CHANNELS_LAST):
            if self.device.type != "cuda":
                raise InputError("--beside graphs and channels-last capture CUDA graphs, and there is no NVIDIA GPU here; leave them out")
            if setting.kind == CHANNELS_LAST:
                denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            capture_calls(denoiser)
        return Contender(setting, pipeline, attribute, denoiser, _official(pipeline) if setting.kind == OFFICIAL else pipeline)


@contextlib.contextmanager
def _timed_calls(watch: Stopwatch, denoiser: nn.Module, guided_rows: int) -> Iterator[None]:
    """Within this context, time each call of a denoiser with hooks, which stay when the official code replaces its ``forward``."""

    def begin(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        sample = arguments[0] if arguments else keywords.get("sample", keywords.get("hidden_states"))
        watch.start(PLANNING if sample is not None and len(sample) == guided_rows else FIDELITY)

    compiled = denoiser._compiled_call_impl
    if compiled is not None:  # hooks would be compiled too, and break the graph

        def timed(*arguments: Any, **keywords: Any) -> Any:
            begin(denoiser, arguments, keywords)
            try:
                return compiled(*arguments, **keywords)
            finally:
                watch.stop()

        denoiser._compiled_call_impl = timed
        try:
            yield
        finally:
            denoiser._compiled_call_impl = compiled
        return
    handles = [
        denoiser.register_forward_pre_hook(begin, with_kwargs=True),
        denoiser.register_forward_hook(lambda *_: watch.stop()),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _cutoff(pipeline: Any, gate_step: int, pictures: int) -> Any:
    """The callback of diffusers that ends guidance after so many steps.

    Raises:
        InputError: if diffusers has none for the pipeline, or for several pictures at a time.
    """
    from diffusers import callbacks

    name = _CUTOFFS.get(type(pipeline).__name__)
    if name is None or pictures > 1:
        raise InputError(f"--beside cutoff takes one picture at a time of {', '.join(_CUTOFFS)}; leave it out")
    return getattr(callbacks, name)(cutoff_step_ratio=None, cutoff_step_index=gate_step - 1)


def _official(pipeline: Any) -> Callable[..., Any]:
    """The function of the official code that draws with a pipeline.

    Raises:
        InputError: if the official code does not support the pipeline.
        UnsupportedError: if it is not installed.
    """
    try:
        import tgate
    except ImportError as error:
        raise UnsupportedError("--beside official needs the official code; install it with `pip install tgate==1.0.0`") from error
    loader = _OFFICIAL_LOADERS.get(type(pipeline).__name__)
    if loader is None:
        raise InputError(f"--beside official takes {', '.join(_OFFICIAL_LOADERS)}, got {type(pipeline).__name__}; leave it out")
    function: Callable[..., Any] = getattr(tgate, loader)(pipeline).tgate
    return function

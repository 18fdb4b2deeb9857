"""`GatedDenoiser`: stands where a pipeline's UNet or transformer stood, and carries out a row of actions.

A diffusers pipeline calls it at every step with the guidance batch ``[negative, positive]``. What each call does follows from the gate
and the run (`tgate_trt.gate.actions`): an engine runs on all rows or on one half, reuses taps that earlier calls kept and keeps some
itself, or no engine runs and the prediction is forecast. From the gate on, T-GATE (arXiv 2404.02747, section 4) runs the negative half
alone with the mean of both halves' cross-attention. A prediction ``n`` of one half is returned twice, so that the pipeline's guidance,
``n + s·(n − n)``, gives ``n``; `tgate_trt.gate.after_gate` has the other modes.
"""

from __future__ import annotations

import inspect
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from tgate_trt import ip_adapter
from tgate_trt.eager import flat, torch_dtype
from tgate_trt.engines.base import Engine
from tgate_trt.errors import GateError, InputError, UnsupportedError
from tgate_trt.gate.actions import POSITIVE, Action, actions_of, graphs_of, substitute
from tgate_trt.gate.after_gate import AfterGate, after_gate_of
from tgate_trt.gate.caller import calling_pipeline, is_executing, is_of_this_thread
from tgate_trt.gate.fetched import Fetched
from tgate_trt.gate.gate import Gate, gate_of
from tgate_trt.gate.history import History
from tgate_trt.gate.schedule import NONE, GateSchedule, GateStep, check_gate_step
from tgate_trt.gate.scheduler import begin_at, place_of, schedule_of
from tgate_trt.gate.stand_in import StandIn
from tgate_trt.kernels.hand_off import HandOff
from tgate_trt.specs import CACHE_PREFIX, ROWS, TOKENS, Bounds, GraphSpec, TensorSpec, size_of, sizes_in
from tgate_trt.taps import kind_of, recipe

logger = logging.getLogger(__name__)

_PREDICTION = "noise_pred"
_TIMESTEP = TensorSpec("timestep", "float32", (ROWS,))

PLANNING, FIDELITY, HAND_OFF, FORECAST = "planning step", "fidelity step", "hand-off", "forecast"
"""Parts of a run that an `Observer` surrounds."""

Observer = Callable[[str], AbstractContextManager[object]]
"""Takes the name of a part, and returns a context in which the part runs."""


_READ = frozenset({"add_embedding", "encoder_hid_proj", "num_parameters", "get_memory_footprint", "save_config"})
"""Modules and methods of the replaced denoiser that pipelines read and that change nothing."""

_SCALED = frozenset({"attn_processors", "down_blocks", "mid_block", "up_blocks"})
"""What pipelines read to set the scale of an IP-Adapter, where there is one."""

_WITHOUT_EFFECT = frozenset(
    {
        "set_attention_slice",
        "set_use_memory_efficient_attention_xformers",
        "enable_xformers_memory_efficient_attention",
        "disable_xformers_memory_efficient_attention",
        "set_default_attn_processor",
        "set_attention_backend",
        "reset_attention_backend",
        "fuse_qkv_projections",
        "unfuse_qkv_projections",
        "enable_gradient_checkpointing",
        "disable_gradient_checkpointing",
        "disable_freeu",
        "unload_lora",
        "disable_lora",
    }
)
"""Methods that leave a denoiser's output as it is, or undo what cannot be done here."""


_WAYS = {
    "image_embeds": "build one from a pipeline with the IP-Adapter loaded",
    "down_block_additional_residuals": "build one with --control controlnet",
    "mid_block_additional_residual": "build one with --control controlnet",
    "down_intrablock_additional_residuals": "build one with --control t2i-adapter",
}
"""What to do about an argument that the graphs do not take."""


@dataclass
class _Run:
    """The state of one denoising run, dropped when it ends."""

    pipeline: weakref.ref[Any]
    """Whose run it is."""
    timesteps: Tensor
    """The scheduler's own tensor; another object there means that another run has begun."""
    schedule: GateSchedule
    gate: Gate
    start: int | None
    """The step of ``gate.start``."""
    actions: tuple[Action, ...]
    """One for each call."""
    guided: bool
    rows: int
    """Rows of each call: two an image under guidance."""
    frame: FrameType | None
    """Of the pipeline's method, until the last call."""
    first: int | None
    """Index of the first call's timestep in the scheduler's tensor, or None for a copy."""
    awaited: Fetched
    """What the host checks once the first call is launched; see `GatedDenoiser._check`."""
    histories: Mapping[int | None, History]
    """Earlier predictions; of each half, where a pipeline calls once for each half."""
    calls: int = 0
    """Calls made so far."""
    lost_guidance: bool = False
    """Whether the pipeline dropped guidance within the run."""
    part: int | None = None
    """The half of the guidance that the present call is for, where a pipeline calls once for each half."""
    conditions: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    """Of each half, what stays the same from step to step, where a pipeline calls once for each half."""
    called: set[int] = field(default_factory=set)
    """The halves for which the present step has been called."""
    scale: tuple[list[float], Tensor] | None = None
    """Of each IP-Adapter, and the same for the engines."""
    both: Tensor | None = None
    """Predictions ``[negative, positive]`` of the present step, where one half's stand for both."""
    times: Sequence[float] = ()
    """The timestep of each call, once the first is launched."""
    kept: set[tuple[str, int]] = field(default_factory=set)
    """Kinds of tap that this run has kept, with the rows; the other buffers hold another run's."""

    @property
    def images(self) -> int:
        return self.rows // 2 if self.guided else self.rows


@dataclass(frozen=True)
class LatestRun:
    """What is known of the run that began last."""

    schedule: GateSchedule
    guided: bool
    """Whether its steps before the gate had two rows for each image."""
    actions: tuple[Action, ...]
    """One for each call."""


class GatedDenoiser(StandIn):
    """A drop-in for ``pipe.unet`` or ``pipe.transformer`` that runs engines by a gate.

    Attributes that a pipeline reads (``config``, ``dtype``, ``add_embedding``) come from the module that this one replaces,
    which may be an architecture without weights.
    """

    def __init__(
        self,
        pipeline: Any,
        replaces: nn.Module,
        engines: Mapping[str, Engine],
        *,
        gate: Gate | str | int | float | None = None,
        gate_step: GateStep | None = None,
        after_gate: str | None = None,
        guidance: bool | None = None,
        low_memory: bool = False,
        signature: GraphSpec | None = None,
        calls_a_half: bool = False,
        picture: tuple[Bounds, Bounds] | None = None,
        origin: Any = None,
        eager: Callable[[], nn.Module] | None = None,
        load: Callable[[str, Gate], Engine | None] | None = None,
    ) -> None:
        """Make a denoiser for one pipeline.

        Args:
            pipeline: the diffusers pipeline that will call it; the step follows from its scheduler.
            replaces: the denoiser that stood there, or its architecture on the ``meta`` device.
            engines: by the names of their graphs, at least one. Steps whose taps nobody reuses run one that gives them out in vain where
                there is none that does not.
            gate: how a run is filled with actions: a `Gate`, its text form, or its step.
            gate_step: in the place of ``gate``: its ``step``.
            after_gate: what a guided run does from the gate on, of `tgate_trt.gate.after_gate.AFTER_GATE`.
            guidance: whether runs are guided; read from the pipeline if None.
            low_memory: whether to hold one engine at a time: each is loaded anew in every run.
            signature: all inputs of the whole denoiser; those of the engines if None.
            calls_a_half: whether guided pipelines call it once for each half of the guidance, in ``cache_context("cond")`` and
                ``("uncond")``, or else in this order; else once with both halves in one batch.
            picture: height and width in pixels of the pictures that the engines draw, for errors; those of the latents if None.
            origin: where the engines come from, for whoever loaded them.
            eager: gives the replaced module with its weights, to save it, if ``replaces`` is an architecture.
            load: loads the engine of a further graph for a gate that needs it; gives None if a substitute shall run.

        Raises:
            InputError: if the gate is impossible, or needs a graph of which there is no engine.
        """
        super().__init__(replaces, eager)
        self._pipeline = weakref.ref(pipeline)
        self.engines = dict(engines)
        """By the names of their graphs; `gate` adds those that it needs."""
        self.guidance = guidance
        self.origin = origin
        self._signature = signature or _signature_of([engine.spec for engine in self.engines.values()])
        self._has_rows = {tensor.name: tensor.has_rows for tensor in self._signature.inputs}
        self._arguments = inspect.signature(type(replaces).forward)
        self._calls_a_half = calls_a_half
        self._context = ""
        self._picture = picture
        self._sides: dict[str, int] = {}
        """Of the latents that the buffers are for, by dimension."""
        self.observer: Observer | None = None
        """Surrounds every run of an engine and every hand-off while it is set, for example to time them."""
        self._low_memory = low_memory
        self._load = load
        self._names: dict[str, tuple[str, tuple[TensorSpec, ...]]] = {}
        """For each graph that an action names, the graph whose engine runs, and its inputs but for caches."""
        self._run: _Run | None = None
        self._displaced: list[FrameType] = []
        """Pipelines' methods whose runs another run began within."""
        self._lock = threading.Lock()
        self._memory: dict[tuple[str, int], Tensor] = {}
        self._hand_offs: dict[tuple[int, int, AfterGate, tuple[str, ...]], HandOff] = {}
        self._gate = Gate()
        self.gate = gate_of(gate) if gate is not None else Gate(NONE if gate_step is None else gate_step, after_gate)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            pass
        value = getattr(self._orig_mod, name)
        is_module = isinstance(value, nn.Module) or name == "attn_processors"
        if name in _READ or not (callable(value) or is_module):
            return value
        if name in _SCALED and ip_adapter.SCALE in self.__dict__["_has_rows"]:
            return value
        if name in _WITHOUT_EFFECT:
            return lambda *_, **__: logger.warning("%s has no effect on compiled engines", name)
        return self._refuse_change(name) if is_module else lambda *_, **__: self._refuse_change(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.__dict__ and not hasattr(type(self), name) and hasattr(self.__dict__.get("replaces"), name):
            self._refuse_change(name)
        super().__setattr__(name, value)

    def _refuse_change(self, name: str) -> NoReturn:
        of_loras = "lora" in name or "adapter" in name
        way = "put LoRAs in with tgate_trt.refit(pipeline, ['FILE.safetensors:0.8'])" if of_loras else "run this pipeline without tgate-trt"
        raise UnsupportedError(
            f"{name!r} can change a {type(self._orig_mod).__name__}, which does not run here: compiled engines stand in its place; {way}"
        )

    @property
    def gate(self) -> Gate:
        """How runs are filled with actions; setting one that is impossible, or that needs an engine that there is not, raises."""
        return self._gate

    @gate.setter
    def gate(self, gate: Gate | str | int | float) -> None:
        found = gate_of(gate)
        for graph in graphs_of(found):
            self._engine(graph, found)
        self._gate = found

    @property
    def gate_step(self) -> GateStep:
        """The gate's boundary: a count or a fraction of the steps, a noise level, or ``"none"``; setting it keeps its other settings."""
        return self.gate.boundary

    @gate_step.setter
    def gate_step(self, gate_step: GateStep) -> None:
        check_gate_step(gate_step)
        if gate_step == NONE:
            self.gate = replace(self.gate, step=NONE, drop=None, fi=1)
        elif self.gate.drop is None:
            self.gate = replace(self.gate, step=gate_step)
        else:
            self.gate = replace(self.gate, drop=gate_step)

    @property
    def after_gate(self) -> str:
        """What a guided run does from the gate on; setting anything but a mode raises `InputError`."""
        return self.gate.mode

    @after_gate.setter
    def after_gate(self, after_gate: str) -> None:
        after_gate_of(after_gate)
        self.gate = replace(self.gate, after=after_gate)

    @property
    def latest_run(self) -> LatestRun:
        """The run that began last.

        Raises:
            GateError: before the first.
        """
        if self._run is None:
            raise GateError("this denoiser has made no run; draw a picture first")
        return LatestRun(self._run.schedule, self._run.guided or self._run.lost_guidance, self._run.actions)

    @property
    def device(self) -> torch.device:
        """Where the engines run. Pipelines read it in each run; the replaced module would search all of its parameters for it."""
        return next(iter(self.engines.values())).device

    def forward(self, *arguments: Any, return_dict: bool = True, **keywords: Any) -> Any:
        """Predict noise as the replaced denoiser would, or from the gate on by the mode ``after_gate``.

        Args:
            *arguments: those of the replaced denoiser: latents, ``[rows, …]``, ``[negative, positive]`` under guidance; one timestep, or
                one a row; text, ``[rows, tokens, width]``; further conditions, by diffusers' names.
            return_dict: whether to return diffusers' output object instead of a tuple.
            **keywords: further arguments of the replaced denoiser.

        Raises:
            GateError: if this call cannot belong to the run, for example with another batch size.
            UnsupportedError: if the pipeline conditions the denoiser in a way that the graphs do not take.
        """
        tensors = self._named(arguments, keywords)
        sample, timestep = tensors["sample"], tensors["timestep"]
        with self._lock, torch.no_grad():
            run = self._advance(sample, timestep)
            if run.calls == 1 and len(run.called) < 2:
                self._refuse_sizes(run, tensors)
            if ip_adapter.SCALE in self._has_rows:
                tensors[ip_adapter.SCALE] = self._scale(run)
            tensors = {
                name: _rows_of(run, name, tensor, sample) if self._has_rows.get(name, True) else tensor for name, tensor in tensors.items()
            }
            tensors["timestep"] = self._buffer(_TIMESTEP, sample.shape[0], sample.device).copy_(torch.as_tensor(timestep))
            act = self._carry_out if run.part is None else self._carry_out_part
            prediction = act(run, run.calls - 1, tensors)
        if not return_dict:
            return (prediction,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=prediction)

    def _reset_stateful_cache(self, *_: Any) -> None:
        """Forget what diffusers' own caches keep from run to run, as pipelines ask for at the end of each: here nothing."""

    @contextmanager
    def cache_context(self, name: str, **_: Any) -> Iterator[None]:
        """The half of the guidance that a call within this context is for: ``"cond"`` or ``"uncond"``; diffusers' pipelines enter it."""
        before, self._context = self._context, name
        try:
            yield
        finally:
            self._context = before

    def _named(self, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of a call by their names in the graphs.

        Raises:
            UnsupportedError: if the graphs do not take one of them.
        """
        try:
            given = self._arguments.bind(self, *arguments, **keywords).arguments
        except TypeError as error:
            raise UnsupportedError(f"{type(self._orig_mod).__name__}.forward: {error}; run this pipeline without tgate-trt") from error
        tensors = flat({name: value for name, value in list(given.items())[1:] if name != "return_dict"})
        if "hidden_states" in tensors:
            tensors["sample"] = tensors.pop("hidden_states")
        for name, value in tensors.items():
            if name not in self._has_rows and value is not None and not (isinstance(value, Mapping) and not value):
                argument = name.partition(".")[0]
                if f"{argument}.0" in self._has_rows:
                    self._refuse_count(argument, tensors)
                way = _WAYS.get(argument, "run this pipeline without tgate-trt")
                raise UnsupportedError(f"the graphs of this bundle do not take {argument!r}; {way}")
        text = tensors.get("encoder_hidden_states")
        if not isinstance(text, Tensor):
            raise UnsupportedError(f"encoder_hidden_states must be one tensor, got {type(text).__name__}; pass the text alone")
        return {name: value for name, value in tensors.items() if name in self._has_rows}

    def _scale(self, run: _Run) -> Tensor:
        """The scale of each IP-Adapter, which a run keeps, ``[adapters]``.

        Raises:
            GateError: if it is not the run's.
        """
        scale = ip_adapter.scale_of(self._orig_mod)
        if run.scale is None:
            run.scale = scale, torch.tensor(scale, device=self.device)
        if run.scale[0] != scale:
            raise GateError("the scale of an IP-Adapter changed within a run; the cache has what it was, so change it between runs")
        return run.scale[1]

    def engine_of(self, graph: str) -> Engine:
        """The engine that runs a graph, or its substitute.

        Raises:
            InputError: if there is neither.
        """
        return self._engine(graph, self.gate)

    def serves(self, pipeline: Any) -> bool:
        """Whether this is the pipeline whose scheduler and guidance the denoiser reads."""
        return self._pipeline() is pipeline

    def close(self) -> None:
        """Free the engines, the run and its buffers."""
        for engine in self.engines.values():
            engine.close()
        self._run = None
        self._memory.clear()
        self._hand_offs.clear()

    def _refuse_sizes(self, run: _Run, tensors: Mapping[str, Any]) -> None:
        """Refuse a run of pictures, prompts or batches of other sizes than the engines', before its first step.

        Raises:
            GateError: with the sizes of the bundle and of the call.
        """
        sample = tensors["sample"]
        engines = [(self._engine(action.graph, run.gate), action) for action in run.actions if action.graph is not None]
        if not _fits(self._signature, "sample", sample):
            raise GateError(self._other_size(tuple(sample.shape)))
        self._refuse_conditions([engine.spec for engine, _ in engines], tensors)
        is_doubled = run.guided and not self._calls_a_half
        rows = {(engine.spec.dimensions[ROWS], 2 if is_doubled and action.half is None else 1) for engine, action in engines}
        least, most = max(-(-profile.minimum // an_image) for profile, an_image in rows), min(profile.maximum // an for profile, an in rows)
        if not least <= run.images <= most:
            raise GateError(
                f"this bundle draws {least} to {most} images in one run, and the call asks for {run.images}; "
                "draw them in several runs, or build a bundle with another --batch-size"
            )

    def _other_size(self, shape: tuple[int, ...]) -> str:
        """One sentence for latents that the engines do not take."""
        own = next(tensor for tensor in self._signature.inputs if tensor.name == "sample").shape
        if len(shape) != len(own) or self._picture is None or shape[1:-2] != own[1:-2]:
            return f"this bundle takes latents of shape {list(own)}, and the call gives {list(shape)}; use the pipeline of its model"
        bounds = self._signature.dimensions
        pixels = [
            side.optimum // size_of(size, {n: b.optimum for n, b in bounds.items()})
            for side, size in zip(self._picture, own[-2:], strict=True)
        ]
        height, width = (side * each for side, each in zip(shape[-2:], pixels, strict=True))
        draws = "×".join(side.short for side in reversed(self._picture))
        way = f"height={self._picture[0].optimum} and width={self._picture[1].optimum}"
        return (
            f"this bundle draws pictures of {draws} pixels, and the call asks for {width}×{height}; "
            f"pass {way}, or build a bundle of that size"
        )

    def _refuse_conditions(self, specs: Sequence[GraphSpec], tensors: Mapping[str, Any]) -> None:
        """Refuse conditions of another model: too long a prompt, embeddings of another width, the residuals of another ControlNet.

        Raises:
            GateError: with what was expected and what came.
        """
        inputs = {tensor.name: (spec, tensor) for spec in specs for tensor in spec.inputs if tensor.name in self._has_rows}
        for argument in {name.partition(".")[0] for name in inputs if "residual" in name}:
            self._refuse_count(argument, tensors)
        for name, (spec, tensor) in inputs.items():
            value = tensors.get(name)
            if not isinstance(value, Tensor) or name == "timestep" or _fits(spec, name, value):
                continue
            if name == "encoder_hidden_states" and tuple(value.shape[2:]) == tensor.shape[2:]:
                tokens = spec.dimensions[TOKENS] if TOKENS in spec.dimensions else tensor.shape[1]
                raise GateError(f"this bundle takes prompts of {tokens} tokens, and the call gives {value.shape[1]}; shorten the prompt")
            raise GateError(
                f"this bundle takes {name!r} of shape {list(tensor.shape)}, and the call gives {list(value.shape)}; "
                "it is made by another model's encoder"
            )

    def _refuse_count(self, argument: str, tensors: Mapping[str, Any]) -> None:
        """Refuse a list of which there are more or fewer than the model takes; none at all is no list.

        Raises:
            GateError: with both counts.
        """
        own, given = ({name for name in names if name.partition(".")[0] == argument} for names in (self._has_rows, tensors))
        if given and given != own:
            raise GateError(f"the call gives {len(given)} of {argument!r}, and this model takes {len(own)}: they are of another model")

    def _advance(self, sample: Tensor, timestep: Tensor | float | int) -> _Run:
        """Count this call, and return the run that it belongs to."""
        pipeline, frame = self._caller(timestep)
        timesteps = pipeline.scheduler.timesteps
        place = place_of(timesteps, timestep)
        run = self._run
        if run is None or run.pipeline() is not pipeline or run.timesteps is not timesteps:
            self._refuse_a_run_within_a_run(frame, timestep)
            run = self._run = self._begin(pipeline, frame, sample, timestep)
        if self._is_other_half(run):
            return run
        if run.calls == run.schedule.calls:
            raise GateError(
                f"the denoiser was called more than the run's {run.schedule.calls} times; a run starts with scheduler.set_timesteps"
            )
        if place != (None if run.first is None else run.first + run.calls):
            raise GateError(
                "the timesteps of a run came out of order: another run began before this one had ended; run one after the other"
            )
        if run.guided and sample.shape[0] == run.images and not self._is_guided(pipeline, sample):
            run.part = None
            run.rows, run.guided, run.lost_guidance = run.images, False, True
            again = actions_of(run.gate, run.schedule, guided=False, start=run.start, begins=run.calls)
            run.actions = (*run.actions[: run.calls], *again[run.calls :])
        rows = run.images if run.part is not None else run.rows
        if sample.shape[0] != rows:
            raise GateError(f"the batch changed within a run, from {rows} rows to {sample.shape[0]}; start a new run for another batch")
        if run.part is not None:
            if len(run.called) == 1:
                raise GateError("the pipeline called for one half of the guidance alone; pass guidance=False if its runs are not guided")
            run.called, run.both = {run.part}, None
        run.calls += 1
        if run.calls == run.schedule.calls:
            run.frame = None  # it holds all that the pipeline's method has in memory
        return run

    def _is_other_half(self, run: _Run) -> bool:
        """Whether this call is for the other half of the guidance than the last one, in the same step; notes which half it is for."""
        if run.part is None:
            return False
        by_order = POSITIVE if len(run.called) != 1 else 1 - run.part
        run.part = {"cond": POSITIVE, "uncond": 1 - POSITIVE}.get(self._context, by_order)
        if len(run.called) != 1 or run.part in run.called:
            return False
        run.called.add(run.part)
        return True

    def _caller(self, timestep: Tensor | float | int) -> tuple[Any, FrameType | None]:
        """The pipeline that calls and its method's frame; outside a pipeline, the one that this denoiser was made for and None.

        Raises:
            GateError: if the call comes from no pipeline, and its timestep is not of that one's scheduler.
        """
        found = calling_pipeline(self)
        if found is not None:
            return found
        pipeline = self._pipeline()
        if pipeline is None or place_of(pipeline.scheduler.timesteps, timestep) is None:
            raise GateError(
                "this call comes from no pipeline that has this denoiser, and its timestep is not of the scheduler of the pipeline "
                "that the bundle was loaded for; call that pipeline, or take the timesteps from its scheduler"
            )
        return pipeline, None

    def _refuse_a_run_within_a_run(self, frame: FrameType | None, timestep: Tensor | float | int) -> None:
        """Refuse the first call of a run, or a call that goes on with a run whose caches another run took.

        Raises:
            GateError: if another thread is in the middle of a run, or this run was begun before the present one.
        """
        run = self._run
        if any(frame is displaced for displaced in self._displaced) or (run is not None and place_of(run.timesteps, timestep) is not None):
            raise GateError("another run with this denoiser began within this one; run one after the other")
        if run is None or run.frame is None or not is_executing(run.frame):
            return
        if not is_of_this_thread(run.frame):
            raise GateError(
                "another thread is in the middle of a run with this denoiser; run one after the other, or give each pipeline "
                "a denoiser of its own by tgate_trt.load or tgate_trt.apply"
            )
        self._displaced = [*filter(is_executing, self._displaced), run.frame]

    def _begin(self, pipeline: Any, frame: FrameType | None, sample: Tensor, timestep: Tensor | float | int) -> _Run:
        guided = self._is_guided(pipeline, sample)
        _refuse_more_than_two_predictions(pipeline, guided)
        in_parts = guided and self._calls_a_half
        rows = sample.shape[0] * (2 if in_parts else 1)
        timesteps = pipeline.scheduler.timesteps
        differ = differing_halves(self._noisy(sample)) if guided and not in_parts else torch.zeros((), dtype=torch.bool)
        if not differ.is_cuda:
            _refuse_differing_halves(differ, rows)
        awaited = Fetched(differ, timesteps)
        sizes = sizes_in(self._signature, {"sample": sample})
        del sizes[ROWS]
        for key in [key for key in self._memory if key[1] not in (rows, rows // 2) or sizes != self._sides]:
            del self._memory[key]
        for each in [each for each in self._hand_offs if each[0] != rows or sizes != self._sides]:
            del self._hand_offs[each]
        self._sides = sizes
        gate = self.gate
        schedule = schedule_of(pipeline, timestep, gate.boundary)
        start = None if gate.start is None else schedule_of(pipeline, timestep, gate.start).gate_step
        actions = actions_of(gate, schedule, guided=guided, start=start)
        place = place_of(timesteps, timestep)
        run = _Run(
            weakref.ref(pipeline),
            timesteps,
            schedule,
            gate,
            start,
            actions,
            guided,
            rows,
            frame,
            place,
            awaited,
            {part: History(gate.rule) for part in (None, 0, 1)},
        )
        run.part = POSITIVE if in_parts else None
        return run

    def _check(self, run: _Run) -> None:
        """Once the first call is launched, check its batch, and spare the scheduler a search on the GPU.

        The host waits for what lies before that call, so the GPU goes on with the call meanwhile. A scheduler that knows no place to
        begin at would search for it after the call, and wait until the GPU has done it.

        Raises:
            GateError: if the batch of a guided run is not the same latents twice.
        """
        differ, timesteps = run.awaited.values()
        _refuse_differing_halves(differ, run.rows)
        first = len(timesteps) - run.schedule.calls if run.first is None else run.first
        run.times = timesteps.tolist()[first : first + run.schedule.calls]
        pipeline = run.pipeline()
        if run.first is not None and pipeline is not None:
            begin_at(pipeline.scheduler, timesteps, run.first)

    def _is_guided(self, pipeline: Any, sample: Tensor) -> bool:
        """Whether the batch is ``[negative, positive]``: by ``guidance``, else by the pipeline, else by equal halves at the first call."""
        if self.guidance is not None:
            return self.guidance
        does_guidance = getattr(pipeline, "do_classifier_free_guidance", None)
        if does_guidance is None and self._calls_a_half:
            does_guidance = getattr(pipeline, "guidance_scale", 0) > 1
        return not bool(differing_halves(self._noisy(sample))) if does_guidance is None else bool(does_guidance)

    def _noisy(self, sample: Tensor) -> Tensor:
        """The channels of the latents that are denoised: in SVD's others one half of the guidance has the image, and the other zeros."""
        config: Any = getattr(self._orig_mod, "config", {})
        takes, gives = config.get("in_channels"), config.get("out_channels")
        if not takes or not gives or gives >= takes:
            return sample
        own = next(tensor for tensor in self._signature.inputs if tensor.name == "sample").shape
        return sample.narrow(own.index(takes, 1), 0, gives) if takes in own[1:] else sample

    def _engine(self, graph: str, gate: Gate) -> Engine:
        """The engine that runs a graph, or a substitute for it.

        Raises:
            InputError: if there is neither.
        """
        if graph not in self._names:
            name = next((name for name in (graph, substitute(graph)) if name is not None and self._has(name, gate)), None)
            if name is None:
                raise InputError(f"the gate {gate} needs the {graph} graph, of which there is no engine; build a bundle with --gate {gate}")
            self._names[graph] = name, _own_inputs(self.engines[name])
        return self.engines[self._names[graph][0]]

    def _has(self, graph: str, gate: Gate) -> bool:
        """Whether there is an engine of a graph, which is loaded if need be."""
        if graph not in self.engines and self._load is not None and (loaded := self._load(graph, gate)) is not None:
            self.engines[graph] = loaded
        return graph in self.engines

    def _carry_out_part(self, run: _Run, call: int, tensors: Mapping[str, Any]) -> Tensor:
        """The same for a pipeline that calls once for each half: return the prediction of the half that the call is for.

        An action on both halves runs once in each call. One on a single half runs in the step's first call, and the second call gets
        what that one gave.
        """
        assert run.part is not None
        part, half = run.part, run.actions[call].half
        if half is None:
            run.conditions[part] = {name: value for name, value in tensors.items() if name not in ("sample", "timestep")}
            return self._carry_out(run, call, tensors, part)
        if run.both is None:
            run.both = self._carry_out(run, call, {**tensors, **run.conditions.get(half, {})})
        return run.both.chunk(2)[part].clone()

    def _carry_out(self, run: _Run, call: int, tensors: Mapping[str, Any], part: int | None = None) -> Tensor:
        """Do what the action of a call says, and return the prediction for all rows of the call, in the caller's dtype.

        Args:
            run: the call's run.
            call: its number in the run.
            tensors: the inputs by name.
            part: the half of the guidance that the tensors are of, where a pipeline calls once for each half.
        """
        action, dtype = run.actions[call], tensors["sample"].dtype
        phase, history = (action.is_planning, action.half, run.rows), run.histories[part]
        if action.graph is None:
            with self._observed(FORECAST):
                prediction = history.forecast(phase, run.times[call])
        else:
            prediction = self._run_graph(run, call, action, tensors, part)
            if call == 0 and not run.times:
                self._check(run)
            if run.gate.forecast is not None:
                history.add(phase, run.times[call], prediction)
        if action.half is None:
            return prediction.to(dtype, copy=True)
        both = torch.cat([prediction] * 2).to(dtype)
        after = run.gate.after_gate
        if after.fades and not action.is_planning:  # [p − w·d, p], of which the guidance, n + s·(p − n), makes p + (s − 1)·w·d
            both[: run.images].sub_(self._direction(run), alpha=after.weight(run.schedule, call))
        return both

    def _run_graph(self, run: _Run, call: int, action: Action, tensors: Mapping[str, Any], part: int | None) -> Tensor:
        """Run an engine with the taps that it reuses, keep those that it gives out, and hand off those that one half reuses."""
        assert action.graph is not None
        engine, cut = self._engine(action.graph, run.gate), recipe(action.graph)
        rows = run.rows if action.half is None else run.images
        if not {(kind, rows) for kind in cut.takes_in} <= run.kept:
            raise GateError("this run has no cache of its own, because its last planning step failed; start a new run")
        if self._low_memory:
            for other in self.engines.values():
                if other is not engine:
                    other.unload()
        caches = {tensor.name: self._buffer(tensor, rows, engine.device) for tensor in engine.spec.cache_inputs}
        outputs = {tensor.name: self._buffer(tensor, rows, engine.device) for tensor in engine.spec.outputs}
        if part is not None:  # the halves lie one after the other, as those of one call do
            whole, caches, outputs = outputs, _halves(caches, part), _halves(outputs, part)
        half = action.half if run.part is None else None
        inputs = self._inputs(self._names[action.graph][1], tensors, half) | caches
        with self._observed(PLANNING if action.is_planning else FIDELITY):
            engine.run(inputs, outputs)
        if part is not None:
            if len(run.called) < 2:
                return outputs[_PREDICTION]
            part_of, outputs = outputs[_PREDICTION], whole
        run.kept |= {(kind, rows) for kind in cut.gives_out}
        if action.half is None and run.guided and run.gate.after_gate.fades and self._ends_guidance(run, call):
            negative, positive = outputs[_PREDICTION].chunk(2)
            torch.sub(positive, negative, out=self._direction(run))
        if action.hands_off:
            with self._observed(HAND_OFF):
                self._hand_off(run, action.hands_off, outputs)
        return outputs[_PREDICTION] if part is None else part_of

    @staticmethod
    def _ends_guidance(run: _Run, call: int) -> bool:
        """Whether this is the last planning call."""
        return call + 1 < len(run.actions) and run.schedule.is_planning(call) and not run.schedule.is_planning(call + 1)

    def _hand_off(self, run: _Run, kinds: tuple[str, ...], outputs: Mapping[str, Tensor]) -> None:
        """Write the taps that one half reuses: the mean of the halves, or that half's own."""
        after = run.gate.after_gate
        key = (run.rows, run.images, after, kinds)
        if key not in self._hand_offs:
            taps = {name: tensor for name, tensor in outputs.items() if _kind(name) in kinds}
            caches = {name: self._half_buffer(name, tap, run.images) for name, tap in taps.items()}
            if not after.averages:
                taps = {name: tap.chunk(2)[after.half] for name, tap in taps.items()}
            self._hand_offs[key] = HandOff(taps, caches)
        self._hand_offs[key].run()
        run.kept |= {(kind, run.images) for kind in kinds}

    def _observed(self, part: str) -> AbstractContextManager[object]:
        return nullcontext() if self.observer is None else self.observer(part)

    def _direction(self, run: _Run) -> Tensor:
        """``p − n`` of the last guided step."""
        return self._half_buffer("direction", self._memory[_PREDICTION, run.rows], run.images)

    def _inputs(self, wanted: tuple[TensorSpec, ...], tensors: Mapping[str, Any], half: int | None) -> dict[str, Tensor]:
        """The inputs of an engine, or one half of each, contiguous in its dtypes, copied only where they differ.

        Raises:
            GateError: if one is missing. What a control would add is zeros in a step without it.
        """
        inputs = {}
        for tensor in wanted:
            value = tensors.get(tensor.name)
            if value is None:
                if "residual" not in tensor.name:
                    raise GateError(f"the graphs need {tensor.name!r}, which the pipeline did not give")
                value = self._buffer(replace(tensor, name=f"no {tensor.name}"), len(tensors["sample"]), tensors["sample"].device).zero_()
            if half is not None and tensor.has_rows:
                value = value.chunk(2)[half]
            inputs[tensor.name] = value.to(torch_dtype(tensor.dtype)).contiguous()
        return inputs

    def _buffer(self, tensor: TensorSpec, rows: int, device: torch.device) -> Tensor:
        """Memory at an address that stays from call to call and from run to run, so that engines bind it once."""

        def make() -> Tensor:
            shape = tensor.concrete(**{**self._sides, ROWS: rows})
            return torch.empty(shape, dtype=torch_dtype(tensor.dtype), device=device)

        return self._held(tensor.name, rows, make)

    def _half_buffer(self, name: str, both: Tensor, images: int) -> Tensor:
        """The same for one half of a tensor that has both halves of the guidance."""
        return self._held(name, images, lambda: torch.empty_like(both[: len(both) // 2]))

    def _held(self, name: str, rows: int, make: Callable[[], Tensor]) -> Tensor:
        key = (name, rows)
        if key not in self._memory:
            with torch.inference_mode(False):  # a later run outside inference mode may write to it too
                self._memory[key] = make()
        return self._memory[key]


def _kind(name: str) -> str:
    """The kind of a cache by its tensor's name, or the name of another tensor."""
    return kind_of(name.removeprefix(CACHE_PREFIX))


def differing_halves(sample: Tensor) -> Tensor:
    """Whether the first half of the rows differs from the second, as it does not in a batch doubled for guidance: bool, ``[]``."""
    rows = sample.shape[0]
    return torch.ones((), dtype=torch.bool) if rows % 2 else (sample[: rows // 2] != sample[rows // 2 :]).any()


def _refuse_differing_halves(differ: Tensor, rows: int) -> None:
    if differ:
        raise GateError(
            f"a guided batch is the same latents twice, [negative, positive], but these {rows} rows are not; "
            "pass guidance=False if they are not guided, and apply the bundle to the pipeline that you run"
        )


def _refuse_more_than_two_predictions(pipeline: Any, guided: bool) -> None:
    """Refuse guidance between three predictions.

    Raises:
        UnsupportedError: if the pipeline asks for it.
    """
    if getattr(pipeline, "do_perturbed_attention_guidance", False) or (guided and getattr(pipeline, "image_guidance_scale", None)):
        raise UnsupportedError(
            f"{type(pipeline).__name__} guides by three predictions, and T-GATE keeps one of two; run this pipeline without tgate-trt"
        )


def _rows_of(run: _Run, name: str, tensor: Any, sample: Tensor) -> Any:
    """A condition with the rows of the latents: of one that still has both halves after guidance ended, the positive half.

    Raises:
        GateError: if it has another number of rows.
    """
    rows = sample.shape[0]
    if not isinstance(tensor, Tensor) or name == "timestep" or tensor.shape[0] == rows:
        return tensor
    if run.lost_guidance and tensor.shape[0] == 2 * rows:
        return tensor.chunk(2)[1]
    raise GateError(f"{name!r} has {tensor.shape[0]} rows in a batch of {rows}; give one row for each row of the latents")


def _signature_of(specs: Sequence[GraphSpec]) -> GraphSpec:
    """The inputs that any of these graphs takes, but for caches."""
    inputs = {tensor.name: tensor for spec in specs for tensor in spec.inputs if not tensor.name.startswith(CACHE_PREFIX)}
    return GraphSpec("denoiser", tuple(inputs.values()), (), {name: bounds for spec in specs for name, bounds in spec.dimensions.items()})


def _fits(spec: GraphSpec, name: str, value: Tensor) -> bool:
    """Whether a tensor has the shape of a graph's input, but for its rows."""
    (tensor,) = (each for each in spec.inputs if each.name == name)
    shape = tuple(value.shape)
    if tensor.has_rows:  # whatever their number
        shape = (spec.dimensions[ROWS].optimum, *shape[1:])
    return spec.admits(tensor, shape)


def _halves(tensors: Mapping[str, Tensor], part: int) -> dict[str, Tensor]:
    return {name: tensor.chunk(2)[part] for name, tensor in tensors.items()}


def _own_inputs(engine: Engine) -> tuple[TensorSpec, ...]:
    """An engine's inputs, but for its caches."""
    return tuple(tensor for tensor in engine.spec.inputs if not tensor.name.startswith(CACHE_PREFIX))

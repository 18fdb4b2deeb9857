"""`GatedDenoiser`: stands where a pipeline's UNet or transformer stood, and carries out a row of actions.

A diffusers pipeline calls it at every step with the guidance batch ``[negative, positive]``. What each call does follows from the gate
and the run (`tgate_trt.gate.actions`): an engine runs on all rows or on one half, reuses taps that earlier calls kept and keeps some
itself, or no engine runs and the prediction is forecast. From the gate on, T-GATE (arXiv 2404.02747, section 4) runs the negative half
alone with the mean of both halves' cross-attention. A prediction ``n`` of one half is returned twice, so that the pipeline's guidance,
``n + s·(n − n)``, gives ``n``; `tgate_trt.gate.after_gate` has the other modes.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from tgate_trt.eager import torch_dtype
from tgate_trt.engines.base import Engine
from tgate_trt.errors import GateError, InputError, UnsupportedError
from tgate_trt.gate.actions import Action, actions_of, graphs_of, substitute
from tgate_trt.gate.after_gate import AfterGate, after_gate_of
from tgate_trt.gate.caller import calling_pipeline, is_executing, is_of_this_thread
from tgate_trt.gate.fetched import Fetched
from tgate_trt.gate.gate import Gate, gate_of
from tgate_trt.gate.history import History
from tgate_trt.gate.schedule import NONE, GateSchedule, GateStep, check_gate_step
from tgate_trt.gate.scheduler import begin_at, place_of, schedule_of
from tgate_trt.gate.stand_in import StandIn
from tgate_trt.kernels.hand_off import HandOff
from tgate_trt.specs import CACHE_PREFIX, ROWS, TensorSpec
from tgate_trt.taps import kind_of, recipe

logger = logging.getLogger(__name__)

_PREDICTION = "noise_pred"
_TIMESTEP = TensorSpec("timestep", "float32", (ROWS,))

PLANNING, FIDELITY, HAND_OFF, FORECAST = "planning step", "fidelity step", "hand-off", "forecast"
"""Parts of a run that an `Observer` surrounds."""

Observer = Callable[[str], AbstractContextManager[object]]
"""Takes the name of a part, and returns a context in which the part runs."""


_READ = frozenset({"add_embedding", "num_parameters", "get_memory_footprint", "save_config"})
"""Modules and methods of the replaced denoiser that pipelines read and that change nothing."""

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
    history: History
    calls: int = 0
    """Calls made so far."""
    lost_guidance: bool = False
    """Whether the pipeline dropped guidance within the run."""
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
        picture: tuple[int, int] | None = None,
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
        spec = next(iter(self.engines.values())).spec
        self._latents: tuple[Any, ...] = next(tensor for tensor in spec.inputs if tensor.name == "sample").shape[2:]
        self._picture = picture or self._latents
        self.observer: Observer | None = None
        """Surrounds every run of an engine and every hand-off while it is set, for example to time them."""
        self._low_memory = low_memory
        self._load = load
        self._names: dict[str, tuple[str, tuple[tuple[str, torch.dtype], ...]]] = {}
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

    def forward(
        self,
        sample: Tensor | None = None,
        timestep: Tensor | float | int = 0,
        encoder_hidden_states: Tensor | None = None,
        *,
        hidden_states: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """Predict noise as the replaced denoiser would, or from the gate on by the mode ``after_gate``.

        Args:
            sample: noisy latents, ``[rows, channels, height, width]``; ``[negative, positive]`` under guidance.
            timestep: one timestep, or one a row.
            encoder_hidden_states: text, ``[rows, tokens, width]``.
            hidden_states: what a transformer's pipeline calls ``sample``.
            timestep_cond: guidance embedding of models that were distilled on it, ``[rows, width]``.
            added_cond_kwargs: further conditions, by diffusers' names.
            return_dict: whether to return diffusers' output object instead of a tuple.
            **others: refused unless None or empty.

        Raises:
            GateError: if this call cannot belong to the run, for example with another batch size.
            UnsupportedError: if the pipeline conditions the denoiser in a way that the graphs do not take.
        """
        sample = hidden_states if sample is None else sample
        assert sample is not None
        tensors = {"sample": sample, "encoder_hidden_states": encoder_hidden_states, "timestep_cond": timestep_cond}
        tensors |= added_cond_kwargs or {}
        self._refuse_unknown(tensors, others)
        with self._lock, torch.no_grad():
            run = self._advance(sample, timestep)
            if run.calls == 1:
                self._refuse_sizes(run, sample, encoder_hidden_states)
            tensors = {name: _rows_of(run, name, tensor) for name, tensor in tensors.items()}
            tensors["timestep"] = self._buffer(_TIMESTEP, run.rows, sample.device).copy_(torch.as_tensor(timestep))
            prediction = self._carry_out(run, run.calls - 1, tensors)
        if not return_dict:
            return (prediction,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=prediction)

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

    def _refuse_unknown(self, tensors: Mapping[str, Any], others: Mapping[str, Any]) -> None:
        known = {tensor.name for engine in self.engines.values() for tensor in engine.spec.inputs}
        unknown = {name: value for name, value in tensors.items() if name not in known} | dict(others)
        for name, value in unknown.items():
            if value is not None and not (isinstance(value, Mapping) and not value):
                raise UnsupportedError(f"the graphs of this bundle do not take {name!r}; run this pipeline without tgate-trt")
        text = tensors["encoder_hidden_states"]
        if not isinstance(text, Tensor):
            raise UnsupportedError(f"encoder_hidden_states must be one tensor, got {type(text).__name__}; IP-Adapter is not supported")

    def _refuse_sizes(self, run: _Run, sample: Tensor, text: Any) -> None:
        """Refuse a run of pictures, prompts or batches of other sizes than the engines', before its first step.

        Raises:
            GateError: with the sizes of the bundle and of the call.
        """
        if tuple(sample.shape[2:]) != self._latents:
            pixels = self._picture[0] // self._latents[0]
            height, width = (side * pixels for side in sample.shape[2:])
            raise GateError(
                f"this bundle draws pictures of {self._picture[1]}×{self._picture[0]} pixels, and the call asks for {width}×{height}; "
                f"pass height={self._picture[0]} and width={self._picture[1]}, or build a bundle of that size"
            )
        engines = [(self._engine(action.graph, run.gate), action) for action in run.actions if action.graph is not None]
        takes_text = (tensor for engine, _ in engines for tensor in engine.spec.inputs if tensor.name == "encoder_hidden_states")
        tokens = next((tensor.shape[1] for tensor in takes_text), text.shape[1])
        if text.shape[1] != tokens:
            raise GateError(f"this bundle takes prompts of {tokens} tokens, and the call gives {text.shape[1]}; shorten the prompt")
        rows = {(engine.spec.dimensions[ROWS], 2 if run.guided and action.half is None else 1) for engine, action in engines}
        least, most = max(-(-profile.minimum // an_image) for profile, an_image in rows), min(profile.maximum // an for profile, an in rows)
        if not least <= run.images <= most:
            raise GateError(
                f"this bundle draws {least} to {most} images in one run, and the call asks for {run.images}; "
                "draw them in several runs, or build a bundle with another --batch-size"
            )

    def _advance(self, sample: Tensor, timestep: Tensor | float | int) -> _Run:
        """Count this call, and return the run that it belongs to."""
        pipeline, frame = self._caller(timestep)
        timesteps = pipeline.scheduler.timesteps
        place = place_of(timesteps, timestep)
        run = self._run
        if run is None or run.pipeline() is not pipeline or run.timesteps is not timesteps:
            self._refuse_a_run_within_a_run(frame, timestep)
            run = self._run = self._begin(pipeline, frame, sample, timestep)
        if run.calls == run.schedule.calls:
            raise GateError(
                f"the denoiser was called more than the run's {run.schedule.calls} times; a run starts with scheduler.set_timesteps"
            )
        if place != (None if run.first is None else run.first + run.calls):
            raise GateError(
                "the timesteps of a run came out of order: another run began before this one had ended; run one after the other"
            )
        if run.guided and sample.shape[0] == run.images and not self._is_guided(pipeline, sample):
            run.rows, run.guided, run.lost_guidance = run.images, False, True
            again = actions_of(run.gate, run.schedule, guided=False, start=run.start, begins=run.calls)
            run.actions = (*run.actions[: run.calls], *again[run.calls :])
        if sample.shape[0] != run.rows:
            raise GateError(f"the batch changed within a run, from {run.rows} rows to {sample.shape[0]}; start a new run for another batch")
        run.calls += 1
        if run.calls == run.schedule.calls:
            run.frame = None  # it holds all that the pipeline's method has in memory
        return run

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
        rows = sample.shape[0]
        guided = self._is_guided(pipeline, sample)
        timesteps = pipeline.scheduler.timesteps
        differ = differing_halves(sample) if guided else torch.zeros((), dtype=torch.bool)
        if not differ.is_cuda:
            _refuse_differing_halves(differ, rows)
        awaited = Fetched(differ, timesteps)
        for key in [key for key in self._memory if key[1] not in (rows, rows // 2)]:
            del self._memory[key]
        for sizes in [sizes for sizes in self._hand_offs if sizes[0] != rows]:
            del self._hand_offs[sizes]
        gate = self.gate
        schedule = schedule_of(pipeline, timestep, gate.boundary)
        start = None if gate.start is None else schedule_of(pipeline, timestep, gate.start).gate_step
        actions = actions_of(gate, schedule, guided=guided, start=start)
        place = place_of(timesteps, timestep)
        return _Run(
            weakref.ref(pipeline), timesteps, schedule, gate, start, actions, guided, rows, frame, place, awaited, History(gate.rule)
        )

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
        return not bool(differing_halves(sample)) if does_guidance is None else bool(does_guidance)

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

    def _carry_out(self, run: _Run, call: int, tensors: Mapping[str, Any]) -> Tensor:
        """Do what the action of a call says, and return the prediction for all rows of the call, in the caller's dtype."""
        action, dtype = run.actions[call], tensors["sample"].dtype
        phase = (action.is_planning, action.half, run.rows)
        if action.graph is None:
            with self._observed(FORECAST):
                prediction = run.history.forecast(phase, run.times[call])
        else:
            prediction = self._run_graph(run, call, action, tensors)
            if call == 0:
                self._check(run)
            if run.gate.forecast is not None:
                run.history.add(phase, run.times[call], prediction)
        if action.half is None:
            return prediction.to(dtype, copy=True)
        both = torch.cat([prediction] * 2).to(dtype)
        after = run.gate.after_gate
        if after.fades and not action.is_planning:  # [p − w·d, p], of which the guidance, n + s·(p − n), makes p + (s − 1)·w·d
            both[: run.images].sub_(self._direction(run), alpha=after.weight(run.schedule, call))
        return both

    def _run_graph(self, run: _Run, call: int, action: Action, tensors: Mapping[str, Any]) -> Tensor:
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
        inputs = _inputs(self._names[action.graph][1], tensors, action.half) | caches
        with self._observed(PLANNING if action.is_planning else FIDELITY):
            engine.run(inputs, outputs)
        run.kept |= {(kind, rows) for kind in cut.gives_out}
        if action.half is None and run.guided and run.gate.after_gate.fades and self._ends_guidance(run, call):
            negative, positive = outputs[_PREDICTION].chunk(2)
            torch.sub(positive, negative, out=self._direction(run))
        if action.hands_off:
            with self._observed(HAND_OFF):
                self._hand_off(run, action.hands_off, outputs)
        return outputs[_PREDICTION]

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
            caches = {name: self._buffer_like(name, tap, run.images) for name, tap in taps.items()}
            if not after.averages:
                taps = {name: tap.chunk(2)[after.half] for name, tap in taps.items()}
            self._hand_offs[key] = HandOff(taps, caches)
        self._hand_offs[key].run()
        run.kept |= {(kind, run.images) for kind in kinds}

    def _observed(self, part: str) -> AbstractContextManager[object]:
        return nullcontext() if self.observer is None else self.observer(part)

    def _direction(self, run: _Run) -> Tensor:
        """``p − n`` of the last guided step."""
        return self._buffer_like("direction", self._memory[_PREDICTION, run.rows], run.images)

    def _buffer(self, tensor: TensorSpec, rows: int, device: torch.device) -> Tensor:
        """Memory at an address that stays from call to call and from run to run, so that engines bind it once."""
        key = (tensor.name, rows)
        if key not in self._memory:
            with torch.inference_mode(False):  # a later run outside inference mode may write to it too
                self._memory[key] = torch.empty(tensor.concrete(**{ROWS: rows}), dtype=torch_dtype(tensor.dtype), device=device)
        return self._memory[key]

    def _buffer_like(self, name: str, tensor: Tensor, rows: int) -> Tensor:
        """The same for a tensor of another number of rows."""
        key = (name, rows)
        if key not in self._memory:
            with torch.inference_mode(False):
                self._memory[key] = torch.empty((rows, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)
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


def _rows_of(run: _Run, name: str, tensor: Any) -> Any:
    """A condition with the run's rows: of one that still has both halves after guidance ended, the positive half.

    Raises:
        GateError: if it has another number of rows.
    """
    if not isinstance(tensor, Tensor) or tensor.shape[0] == run.rows:
        return tensor
    if run.lost_guidance and tensor.shape[0] == 2 * run.rows:
        return tensor.chunk(2)[1]
    raise GateError(f"{name!r} has {tensor.shape[0]} rows in a batch of {run.rows}; give one row for each row of the latents")


def _own_inputs(engine: Engine) -> tuple[tuple[str, torch.dtype], ...]:
    """Names and dtypes of an engine's inputs, but for its caches."""
    names = {tensor.name for tensor in engine.spec.cache_inputs}
    return tuple((tensor.name, torch_dtype(tensor.dtype)) for tensor in engine.spec.inputs if tensor.name not in names)


def _inputs(wanted: tuple[tuple[str, torch.dtype], ...], tensors: Mapping[str, Any], half: int | None) -> dict[str, Tensor]:
    """The inputs of an engine, or one half of each, contiguous in its dtypes, copied only where they differ."""
    inputs = {}
    for name, dtype in wanted:
        value = tensors.get(name)
        if value is None:
            raise GateError(f"the graphs need {name!r}, which the pipeline did not give")
        if half is not None:
            value = value.chunk(2)[half]
        inputs[name] = value.to(dtype).contiguous()
    return inputs

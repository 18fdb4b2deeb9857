"""`GatedDenoiser`: stands where a pipeline's UNet or transformer stood, and switches engines at the gate.

A diffusers pipeline calls it at every step with the guidance batch ``[negative, positive]``. Before the gate it runs the vanilla
engine on that batch if it has one, and at the last planning call the planning engine, which gives out cross-attention too. That
call's outputs are averaged over the two halves and kept.
From the gate on it runs the fidelity engine on the negative half alone and returns the prediction ``n`` twice, so that
the pipeline's guidance, ``n + s·(n − n)``, gives ``n`` (T-GATE, arXiv 2404.02747, section 4). `tgate_trt.gate.after_gate` has
the other modes.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from tgate_trt.eager import torch_dtype
from tgate_trt.engines.base import Engine
from tgate_trt.errors import GateError, InputError, UnsupportedError
from tgate_trt.gate.after_gate import DEFAULT_AFTER_GATE, AfterGate, after_gate_of
from tgate_trt.gate.caller import calling_pipeline, is_executing, is_of_this_thread
from tgate_trt.gate.fetched import Fetched
from tgate_trt.gate.schedule import GateSchedule, GateStep, check_gate_step
from tgate_trt.gate.scheduler import begin_at, place_of, schedule_of
from tgate_trt.gate.stand_in import StandIn
from tgate_trt.kernels.hand_off import HandOff
from tgate_trt.specs import ROWS, TensorSpec

logger = logging.getLogger(__name__)

_PREDICTION = "noise_pred"
_TIMESTEP = TensorSpec("timestep", "float32", (ROWS,))

PLANNING, FIDELITY, HAND_OFF = "planning step", "fidelity step", "hand-off"
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
    after_gate: AfterGate
    guided: bool
    rows: int
    """Rows of each call: two an image under guidance."""
    frame: FrameType | None
    """Of the pipeline's method, until the last call."""
    first: int | None
    """Index of the first call's timestep in the scheduler's tensor, or None for a copy."""
    awaited: Fetched
    """What the host checks once the first call is launched; see `GatedDenoiser._check`."""
    calls: int = 0
    """Calls made so far."""
    lost_guidance: bool = False
    """Whether the pipeline dropped guidance within the run."""
    has_cache: bool = False
    """Whether this run has made its hand-off; before that the buffers hold another run's caches."""

    @property
    def images(self) -> int:
        return self.rows // 2 if self.guided else self.rows


@dataclass(frozen=True)
class LatestRun:
    """What is known of the run that began last."""

    schedule: GateSchedule
    guided: bool
    """Whether its steps before the gate had two rows for each image."""


class GatedDenoiser(StandIn):
    """A drop-in for ``pipe.unet`` or ``pipe.transformer`` that runs two engines and one gate.

    Attributes that a pipeline reads (``config``, ``dtype``, ``add_embedding``) come from the module that this one replaces,
    which may be an architecture without weights.
    """

    def __init__(
        self,
        pipeline: Any,
        replaces: nn.Module,
        planning: Engine,
        fidelity: Engine,
        vanilla: Engine | None = None,
        *,
        gate_step: GateStep,
        guidance: bool | None = None,
        after_gate: str = DEFAULT_AFTER_GATE,
        low_memory: bool = False,
        picture: tuple[int, int] | None = None,
        origin: Any = None,
        eager: Callable[[], nn.Module] | None = None,
    ) -> None:
        """Make a denoiser for one pipeline.

        Args:
            pipeline: the diffusers pipeline that will call it; the step follows from its scheduler.
            replaces: the denoiser that stood there, or its architecture on the ``meta`` device.
            planning: engine for the last planning step, and for all without a vanilla one.
            fidelity: engine for the steps from the gate on. One that takes no caches, such as the vanilla graph's,
                drops guidance at the gate and nothing else.
            vanilla: engine for the planning steps whose cross-attention is not reused: it need not give it out.
            gate_step: number of planning steps, a fraction of the steps, a noise level such as ``"noise:1.35"``, or ``"none"``.
            guidance: whether runs are guided; read from the pipeline if None.
            after_gate: what a guided run does from the gate on, of `tgate_trt.gate.after_gate.AFTER_GATE`.
            low_memory: whether to hold one engine at a time: each is loaded anew in every run.
            picture: height and width in pixels of the pictures that the engines draw, for errors; those of the latents if None.
            origin: where the engines come from, for whoever loaded them.
            eager: gives the replaced module with its weights, to save it, if ``replaces`` is an architecture.

        Raises:
            InputError: if ``gate_step`` is impossible, or ``after_gate`` is no mode.
        """
        super().__init__(replaces, eager)
        self._pipeline = weakref.ref(pipeline)
        self.planning = planning
        self.fidelity = fidelity
        self.vanilla = vanilla
        self.gate_step = gate_step
        self.guidance = guidance
        self.after_gate = after_gate
        self.origin = origin
        sample = next(tensor for tensor in planning.spec.inputs if tensor.name == "sample")
        self._latents: tuple[Any, ...] = sample.shape[2:]
        self._picture = picture or self._latents
        self.observer: Observer | None = None
        """Surrounds every run of an engine and every hand-off while it is set, for example to time them."""
        self._low_memory = low_memory and planning is not fidelity
        if low_memory and vanilla is not None:
            raise InputError("low_memory holds one engine at a time, so it takes no vanilla engine beside the planning one")
        self._known = {tensor.name for engine in (planning, fidelity) for tensor in engine.spec.inputs}
        self._planning_inputs, self._fidelity_inputs = _own_inputs(planning), _own_inputs(fidelity)
        self._vanilla_inputs = None if vanilla is None else _own_inputs(vanilla)
        self._cache_inputs = fidelity.spec.cache_inputs
        self._run: _Run | None = None
        self._displaced: list[FrameType] = []
        """Pipelines' methods whose runs another run began within."""
        self._lock = threading.Lock()
        self._memory: dict[tuple[str, int], dict[str, Tensor]] = {}
        self._hand_offs: dict[tuple[int, int, AfterGate], HandOff] = {}

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
    def gate_step(self) -> GateStep:
        """A count or a fraction of the steps, a noise level, or ``"none"``; setting an impossible one raises `InputError`."""
        return self._gate_step

    @gate_step.setter
    def gate_step(self, gate_step: GateStep) -> None:
        self._gate_step = check_gate_step(gate_step)

    @property
    def after_gate(self) -> str:
        """What a guided run does from the gate on; setting anything but a mode raises `InputError`."""
        return self._after_gate

    @after_gate.setter
    def after_gate(self, after_gate: str) -> None:
        after_gate_of(after_gate)
        self._after_gate = after_gate

    @property
    def latest_run(self) -> LatestRun:
        """The run that began last.

        Raises:
            GateError: before the first.
        """
        if self._run is None:
            raise GateError("this denoiser has made no run; draw a picture first")
        return LatestRun(self._run.schedule, self._run.guided or self._run.lost_guidance)

    @property
    def device(self) -> torch.device:
        """Where the engines run. Pipelines read it in each run; the replaced module would search all of its parameters for it."""
        return self.planning.device

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
            tensors["timestep"] = self._allocated("timestep", (_TIMESTEP,), run.rows, sample.device)["timestep"].copy_(
                torch.as_tensor(timestep)
            )
            call = run.calls - 1
            prediction = (self._run_planning if run.schedule.is_planning(call) else self._run_fidelity)(run, call, tensors)
            if call == 0:
                self._check(run)
        if not return_dict:
            return (prediction,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=prediction)

    @property
    def engines(self) -> tuple[Engine, ...]:
        """All of its engines."""
        return (self.planning, self.fidelity, *(() if self.vanilla is None else (self.vanilla,)))

    def serves(self, pipeline: Any) -> bool:
        """Whether this is the pipeline whose scheduler and guidance the denoiser reads."""
        return self._pipeline() is pipeline

    def close(self) -> None:
        """Free the engines, the run and its buffers."""
        for engine in self.engines:
            engine.close()
        self._run = None
        self._memory.clear()
        self._hand_offs.clear()

    def _refuse_unknown(self, tensors: Mapping[str, Any], others: Mapping[str, Any]) -> None:
        unknown = {name: value for name, value in tensors.items() if name not in self._known} | dict(others)
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
        tokens = next((tensor.shape[1] for tensor in self.planning.spec.inputs if tensor.name == "encoder_hidden_states"), text.shape[1])
        if text.shape[1] != tokens:
            raise GateError(f"this bundle takes prompts of {tokens} tokens, and the call gives {text.shape[1]}; shorten the prompt")
        planning, fidelity, *vanilla = (engine.spec.dimensions[ROWS] for engine in self.engines)
        most = min(min(rows.maximum for rows in (planning, *vanilla)) // (2 if run.guided else 1), fidelity.maximum)
        if not fidelity.minimum <= run.images <= most:
            raise GateError(
                f"this bundle draws {fidelity.minimum} to {most} images in one run, and the call asks for {run.images}; "
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
        schedule, after_gate = schedule_of(pipeline, timestep, self.gate_step), after_gate_of(self.after_gate)
        return _Run(weakref.ref(pipeline), timesteps, schedule, after_gate, guided, rows, frame, place_of(timesteps, timestep), awaited)

    def _check(self, run: _Run) -> None:
        """Once the first call is launched, check its batch, and spare the scheduler a search on the GPU.

        The host waits for what lies before that call, so the GPU goes on with the call meanwhile. A scheduler that knows no place to
        begin at would search for it after the call, and wait until the GPU has done it.

        Raises:
            GateError: if the batch of a guided run is not the same latents twice.
        """
        differ, timesteps = run.awaited.values()
        _refuse_differing_halves(differ, run.rows)
        pipeline = run.pipeline()
        if run.first is not None and pipeline is not None:
            begin_at(pipeline.scheduler, timesteps, run.first)

    def _is_guided(self, pipeline: Any, sample: Tensor) -> bool:
        """Whether the batch is ``[negative, positive]``: by ``guidance``, else by the pipeline, else by equal halves at the first call."""
        if self.guidance is not None:
            return self.guidance
        does_guidance = getattr(pipeline, "do_classifier_free_guidance", None)
        return not bool(differing_halves(sample)) if does_guidance is None else bool(does_guidance)

    def _run_planning(self, run: _Run, call: int, tensors: Mapping[str, Any]) -> Tensor:
        """Run the planning engine on the whole batch and hand off its caches at the last planning call, else the vanilla one."""
        if self._low_memory:
            self.fidelity.unload()
        hands_off = run.schedule.hands_off(call)
        engine, wanted = self.planning, self._planning_inputs
        if not hands_off and self.vanilla is not None and self._vanilla_inputs is not None:
            engine, wanted = self.vanilla, self._vanilla_inputs
        outputs = self._outputs(engine, run.rows)
        inputs = _inputs(wanted, tensors, None)
        with self._observed(PLANNING):
            engine.run(inputs, outputs)
        if hands_off:
            with self._observed(HAND_OFF):
                self._hand_off(run, outputs)
        return outputs[_PREDICTION].to(tensors["sample"].dtype, copy=True)

    def _hand_off(self, run: _Run, outputs: Mapping[str, Tensor]) -> None:
        """Write the caches of the fidelity phase: under guidance the mean of the halves or one half, else all rows."""
        after = run.after_gate
        if run.guided and after.fades:
            negative, positive = outputs[_PREDICTION].chunk(2)
            torch.sub(positive, negative, out=self._direction(run))
        key = (run.rows, run.images, after)
        if key not in self._hand_offs:
            taps = {tensor.name: outputs[tensor.name] for tensor in self._cache_inputs}
            if run.guided and not after.averages:
                taps = {name: tap.chunk(2)[after.half] for name, tap in taps.items()}
            self._hand_offs[key] = HandOff(taps, self._caches(run))
        self._hand_offs[key].run()
        run.has_cache = True

    def _run_fidelity(self, run: _Run, call: int, tensors: Mapping[str, Any]) -> Tensor:
        """Run the fidelity engine on the kept half with the caches, and return the prediction for both halves."""
        if not run.has_cache:
            raise GateError("this run has no cache of its own, because its last planning step failed; start a new run")
        if self._low_memory:
            self.planning.unload()
        after = run.after_gate
        inputs = _inputs(self._fidelity_inputs, tensors, after.half if run.guided else None)
        outputs = self._outputs(self.fidelity, run.images)
        inputs |= self._caches(run)
        with self._observed(FIDELITY):
            self.fidelity.run(inputs, outputs)
        dtype = tensors["sample"].dtype
        if not run.guided:
            return outputs[_PREDICTION].to(dtype, copy=True)
        both = torch.cat([outputs[_PREDICTION]] * 2).to(dtype)
        if after.fades:  # [p − w·d, p], of which the pipeline's guidance, n + s·(p − n), makes p + (s − 1)·w·d
            both[: run.images].sub_(self._direction(run), alpha=after.weight(run.schedule, call))
        return both

    def _observed(self, part: str) -> AbstractContextManager[object]:
        return nullcontext() if self.observer is None else self.observer(part)

    def _caches(self, run: _Run) -> dict[str, Tensor]:
        return self._allocated("cache", self._cache_inputs, run.images, self.fidelity.device)

    def _direction(self, run: _Run) -> Tensor:
        """``p − n`` of the last guided step."""
        tensors = tuple(tensor for tensor in self.planning.spec.outputs if tensor.name == _PREDICTION)
        return self._allocated("direction", tensors, run.images, self.planning.device)[_PREDICTION]

    def _outputs(self, engine: Engine, rows: int) -> dict[str, Tensor]:
        return self._allocated(engine.spec.name, engine.spec.outputs, rows, engine.device)

    def _allocated(self, purpose: str, tensors: tuple[TensorSpec, ...], rows: int, device: torch.device) -> dict[str, Tensor]:
        """Buffers at addresses that stay from call to call and from run to run, so that engines bind them once."""
        key = (purpose, rows)
        if key not in self._memory:
            with torch.inference_mode(False):  # a later run outside inference mode may write to them too
                self._memory[key] = {
                    tensor.name: torch.empty(tensor.concrete(**{ROWS: rows}), dtype=torch_dtype(tensor.dtype), device=device)
                    for tensor in tensors
                }
        return self._memory[key]


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

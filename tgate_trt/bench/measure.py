"""Measure one bundle on this machine: every setting in every round, on the same prompts, noise and scheduler."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tgate_trt.analysis.prompts import held_out, prompts_of
from tgate_trt.bench.contenders import OUTSIDE, PARTS, Contender, Studio
from tgate_trt.bench.memory import available, peak_memory
from tgate_trt.bench.quality import quality
from tgate_trt.bench.settings import Setting, settings_of
from tgate_trt.bench.spread import ratios, spread
from tgate_trt.bench.stopwatch import Stopwatch
from tgate_trt.building.builder import add_graph
from tgate_trt.building.engines import stale_engine_reasons
from tgate_trt.bundle.backends import choose_backend
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.bundle.manifest import TRACE
from tgate_trt.errors import InputError, StaleBundleError
from tgate_trt.export.weights import WEIGHTS_FILE
from tgate_trt.files import read_json
from tgate_trt.gate.actions import Action, graphs_of, work_of
from tgate_trt.gate.after_gate import AFTER_GATE, DEFAULT_AFTER_GATE
from tgate_trt.gate.denoiser import FIDELITY, FORECAST, HAND_OFF, PLANNING, GatedDenoiser
from tgate_trt.gate.gate import Gate
from tgate_trt.gate.schedule import NONE, GateStep, noise_of, parse_gate_step, planning_steps
from tgate_trt.gate.scheduler import levels_of_run, read_scheduler
from tgate_trt.models.source import SCHEDULER
from tgate_trt.running.drawing import Drawing, scheduler_of, to_bytes

logger = logging.getLogger(__name__)

_BATCH_SIZE = 16
"""Pictures of the demo model in one call, if they are judged and not timed."""

_COPIES = 2
"""Copies of the weights in an engine, one of them in the layout of the processor's kernels."""


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    bundle: Path
    drawing: Drawing = field(default_factory=Drawing)
    """The pictures; see `tgate_trt.analysis.prompts.prompts_of` for their prompts, and `scheduler_for` for their scheduler."""
    gate_steps: tuple[str, ...] = ()
    """Counts, fractions and noise levels; the bundle's own gate if empty."""
    after_gate: tuple[str, ...] = (DEFAULT_AFTER_GATE,)
    """Keys of `tgate_trt.gate.after_gate.AFTER_GATE`."""
    gates: tuple[str, ...] = ()
    """Further gates in text form, or by their names in the bundle."""
    fewer_steps: tuple[str, ...] = ()
    """Numbers of steps in which vanilla runs too."""
    backends: tuple[str, ...] = ()
    """Backends of the engines; the first that runs here if empty."""
    beside: tuple[str, ...] = ()
    """Keys of `tgate_trt.bench.settings.BESIDE`."""
    images: int = 1
    """Pictures in one call."""
    rounds: int = 5
    """Number of times that each setting is timed."""
    threads: int | None = None
    """CPU threads; one for each core if None."""
    memory: bool = True
    """Whether to measure peak memory, in one process for each setting."""

    def __post_init__(self) -> None:
        for name, value in (("--rounds", self.rounds), ("--images", self.images)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}; choose another number")
        for text in self.fewer_steps:
            if not text.isdecimal() or int(text) < 1:
                raise InputError(f"--fewer-steps takes numbers of steps with commas, such as 12,15; got {text!r}")
        for mode in self.after_gate:
            if mode not in AFTER_GATE:
                raise InputError(f"--after-gate takes {', '.join(AFTER_GATE)}, got {mode!r}; see tgate-bench --help")


@dataclass(frozen=True)
class Sample:
    """The times of one call."""

    parts: Mapping[str, float]
    """Seconds of each of `PARTS`."""
    calls: Mapping[str, int]
    """Number of times that each part was started."""
    actions: tuple[Action, ...] = ()
    """Of the run; none of settings without engines."""

    @property
    def whole(self) -> float:
        """Seconds of the whole call."""
        return sum(self.parts.values())

    @property
    def denoising(self) -> float:
        """Seconds of the denoising loop, without text encoding, decoding and the rest of the pipeline."""
        return sum(self.parts[part] for part in (PLANNING, FIDELITY, HAND_OFF, FORECAST, "denoiser", "scheduler"))

    @property
    def outside(self) -> float:
        """Seconds of Python around the models."""
        return sum(self.parts[part] for part in OUTSIDE)

    def step(self, part: str) -> float:
        """Seconds of one call of an engine; 0 without a call."""
        return self.parts[part] / max(1, self.calls.get(part, 0))


@dataclass
class Measurement:
    """A bundle that is ready to be measured, its settings, and the samples so far."""

    plan: Plan
    drawing: Drawing
    """The pictures of all rounds, with their number of steps."""
    studio: Studio
    settings: tuple[Setting, ...]
    samples: dict[Setting, list[Sample]] = field(default_factory=dict)
    memory: dict[Setting, dict[str, int]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Sampling steps of every picture."""
        assert self.drawing.steps is not None
        return self.drawing.steps

    def run(self) -> Iterator[dict[str, Any]]:
        """Warm up, then sample every setting in each round, alternately in forward and reverse order.

        Yields:
            After each round, the results of all rounds so far, by setting; see `results`.
        """
        for number, batch in enumerate(self.drawing.batches(self.plan.images)):
            order = self.settings if number % 2 == 0 else tuple(reversed(self.settings))
            for setting in order:
                contender = self.studio.contender(setting)
                if number == 0 or not self.studio.keeps_engines:
                    logger.info("warming up %s …", self.label(setting))
                    contender.warm_up(batch)
                self.samples.setdefault(setting, []).append(self._sample(contender, batch))
                logger.info(
                    "round %d of %d: %s: %.3f s", number + 1, self.plan.rounds, self.label(setting), self.samples[setting][-1].whole
                )
            yield self.results()

    def quality(self, samples: int, clip: Path | None, inception: Path | None) -> dict[str, Any]:
        """Draw the same prompts from the same noise with every setting that runs engines, and judge the pictures.

        Args:
            samples: pictures of each setting; for the demo model at most the number of its held-out captions.
            clip: see `tgate_trt.bench.quality.quality`.
            inception: see `tgate_trt.bench.quality.quality`.

        Returns:
            Plain data by setting.
        """
        model = self.studio.bundle.manifest.model.name
        captioned = held_out(model, samples)
        prompts = tuple(each.caption for each in captioned) or prompts_of(model, self.plan.drawing.prompts, samples)[0]
        batches = list(replace(self.drawing, prompts=prompts).batches(_BATCH_SIZE if captioned else 1))
        pictures = {}
        for setting in self.settings:
            if setting.backend:
                logger.info("%d pictures by %s …", len(prompts), self.label(setting))
                contender = self.studio.contender(setting)
                drawn = [to_bytes(contender.draw(batch, output_type="pt")) for batch in batches]
                pictures[self.label(setting)] = torch.cat(drawn).float() / 255
        judged = quality(
            pictures, self.label(self.settings[0]), captioned=captioned or None, prompts=prompts, clip=clip, inception=inception
        )
        return {name: row.to_json() for name, row in judged.items()}

    def measure_memory(self) -> None:
        """Measure the peak memory of each setting in a separate process, which draws one picture in two steps."""
        for setting in self.settings:
            logger.info("memory of %s …", self.label(setting))
            self.memory[setting] = peak_memory(self.studio, setting, next(self.drawing.batches(1)))

    def label(self, setting: Setting) -> str:
        """A setting's name, with its backend if several are measured."""
        several = len({each.backend for each in self.settings if each.backend}) > 1
        return setting.label(self.steps) + (f", {setting.backend}" if several and setting.backend else "")

    def results(self) -> dict[str, Any]:
        """Plain data of every sampled setting: times, ratios to its baseline, parts, steps, bound and memory."""
        first = self.samples[self.settings[0]]
        return {self.label(setting): self._result(setting, row, first[: len(row)]) for setting, row in self.samples.items()}

    def _result(self, setting: Setting, row: Sequence[Sample], first: Sequence[Sample]) -> dict[str, Any]:
        base = self.samples[setting.baseline][: len(row)]
        whole = [sample.whole for sample in row]
        return {
            "setting": dataclasses.asdict(setting),
            "engine": self.studio.engine_name(setting),
            "baseline": self.label(setting.baseline),
            "planning_steps": setting.planning_steps(setting.steps or self.steps),
            "seconds": spread(whole),
            "images_per_second": self.plan.images / spread(whole)["median"],
            "ratio": ratios(whole, [sample.whole for sample in base]),
            "ratio_to_first": ratios(whole, [sample.whole for sample in first]),
            "denoising": spread([sample.denoising for sample in row]),
            "denoising_ratio": ratios([sample.denoising for sample in row], [sample.denoising for sample in base]),
            "steps": {part: spread([sample.step(part) for sample in row]) for part in (PLANNING, FIDELITY) if row[0].calls.get(part)},
            "parts": {part: spread([sample.parts[part] for sample in row]) for part in PARTS},
            "calls": dict(row[0].calls),
            "outside": spread([sample.outside for sample in row]),
            "outside_share": spread([sample.outside / sample.whole for sample in row]),
            "bound": self._bound(setting, row[0], base[0]),
            "memory": self.memory.get(setting),
        }

    def _bound(self, setting: Setting, sample: Sample, base: Sample) -> dict[str, float]:
        """Ratios of multiply-accumulates to the baseline's, without and with attention's two products."""
        own, other = self._work(setting, sample), self._work(setting.baseline, base)
        return {"linear": own[0] / other[0], "with_sdpa": own[1] / other[1]}

    def _work(self, setting: Setting, sample: Sample) -> tuple[int, int]:
        """Multiply-accumulates of a call's denoising: in linear and convolution layers, and including attention's two products."""
        if sample.actions:

            def work(count: Callable[[str, int], int]) -> int:
                return work_of(sample.actions, self.plan.images, guided=self._is_guided, count=count)

            linear = work(lambda graph, rows: self.studio.macs(graph, rows).linear)
            return linear, linear + work(lambda graph, rows: self.studio.macs(graph, rows).sdpa)
        rows = self.plan.images * (2 if self._is_guided else 1), self.plan.images
        linear = whole = 0
        for graph, size, part in zip(setting.graphs, rows, (PLANNING, FIDELITY), strict=True):  # without engines
            macs, calls = self.studio.macs(graph, size), sample.calls.get(part, 0)
            linear, whole = linear + calls * macs.linear, whole + calls * (macs.linear + macs.sdpa)
        return linear, whole

    @property
    def _is_guided(self) -> bool:
        return bool(getattr(self.studio.pipeline(str(self.settings[0].backend)), "do_classifier_free_guidance", False))

    def _sample(self, contender: Contender, batch: Drawing) -> Sample:
        watch = Stopwatch(self.studio.device)
        contender.draw(batch, watch)
        seconds = watch.seconds()
        actions = contender.denoiser.latest_run.actions if isinstance(contender.denoiser, GatedDenoiser) else ()
        return Sample({part: seconds.get(part, 0.0) for part in PARTS}, dict(watch.calls), actions)


def prepare(plan: Plan) -> Measurement:
    """Open a bundle, add the graphs to compare, and prepare the measurement.

    Raises:
        BundleError: if the bundle cannot be used here.
        InputError: if the plan is impossible.
        StaleBundleError: if the engines to compare were built with different versions, or the bundle holds no graphs.
    """
    bundle = Bundle.open(plan.bundle)
    if TRACE not in bundle.manifest.files:
        raise StaleBundleError(f"{bundle.folder} holds no graphs to count and extend; build it again without --discard-graphs")
    backends = tuple(choose_backend(bundle, backend) for backend in (plan.backends or (None,)))
    refuse_unfair(bundle, backends)
    for graph in ("vanilla", "planning", "fidelity"):
        bundle = add_graph(bundle, graph)
    manifest = bundle.manifest
    prompts, _ = prompts_of(manifest.model.name, plan.drawing.prompts, plan.rounds * plan.images)
    own = read_json(bundle.pipeline / "scheduler" / SCHEDULER)["_class_name"]
    drawing = replace(plan.drawing, prompts=prompts, scheduler=scheduler_for(own, plan.drawing.scheduler)).of(bundle)
    gates = [whole_gate_of(bundle, drawing, text) for text in plan.gates]
    for graph in dict.fromkeys(graph for gate in gates for graph in graphs_of(gate)):
        bundle = add_graph(bundle, graph)
    steps = gates_of(bundle, drawing, plan.gate_steps) if plan.gate_steps or not gates else ()
    settings = settings_of(backends, steps, plan.after_gate, plan.beside, gates, [int(text) for text in plan.fewer_steps])
    studio = Studio(bundle, device_of(backends), drawing.scheduler, plan.threads, keeps_engines=_fits(bundle, settings))
    measurement = Measurement(plan, drawing, studio, settings)
    for setting in settings:
        setting.planning_steps(measurement.steps)  # refuses a gate step beyond the last step
    return measurement


def gates_of(bundle: Bundle, drawing: Drawing, texts: Sequence[str]) -> tuple[GateStep, ...]:
    """The gates to compare; of each noise level, the number of planning steps that it makes of the drawing's steps.

    Args:
        bundle: whose own gate is taken if there is no other.
        drawing: with its number of steps and its scheduler.
        texts: gates as the command takes them.

    Raises:
        InputError: if one is impossible.
        GateError: if the scheduler shows no noise levels.
    """
    gates = tuple(parse_gate_step(text) for text in texts) or (bundle.manifest.default_gate_step,)
    if all(noise_of(gate) is None for gate in gates):
        return gates
    scheduler = scheduler_of(SimpleNamespace(scheduler=read_scheduler(bundle.pipeline)), drawing.scheduler)
    levels = levels_of_run(scheduler, drawing.steps or bundle.manifest.steps)
    return tuple(gate if noise_of(gate) is None else planning_steps(gate, len(levels), levels) for gate in gates)


def whole_gate_of(bundle: Bundle, drawing: Drawing, text: str) -> Gate:
    """A gate in text form, or by its name in the bundle; of noise levels, the numbers of steps that they make of the drawing's steps."""
    gate = bundle.manifest.gate(text)

    def step(value: GateStep) -> GateStep:
        return value if value == NONE else gates_of(bundle, drawing, (str(value),))[0]

    return replace(
        gate,
        step=step(gate.step),
        drop=None if gate.drop is None else step(gate.drop),
        start=None if gate.start is None else step(gate.start),
    )


def scheduler_for(own: str, wanted: str | None) -> str | None:
    """The scheduler of all settings, a key of `tgate_trt.running.drawing.SCHEDULERS`, or None for the model's own.

    Args:
        own: class of the model's own scheduler.
        wanted: a key of `SCHEDULERS`; ``"own"`` for the model's own; None for DPM-Solver++, but LCM's own if it has that.
    """
    if wanted == "own" or (wanted is None and own == "LCMScheduler"):
        return None
    return wanted or "dpm++"


def refuse_unfair(bundle: Bundle, backends: Sequence[str]) -> None:
    """Refuse to compare engines that were built with other versions than the engines that would be added.

    Raises:
        StaleBundleError: if a backend's engines were built with other versions than those installed here.
    """
    for backend in backends:
        reasons = stale_engine_reasons(backend, bundle.manifest.engines[backend], None)
        if reasons:
            raise StaleBundleError(f"the comparison would not be fair: {'; '.join(reasons)}; build the bundle again with tgate-build")


def device_of(backends: Sequence[str]) -> torch.device:
    """The device of engines of these backends: the GPU if there is one and, with ONNX Runtime among them, it can use the GPU."""
    from tgate_trt.engines.onnxruntime import cuda_is_available

    on_gpu = torch.cuda.is_available() and ("onnxruntime" not in backends or cuda_is_available())
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def conditions_of(measurement: Measurement) -> dict[str, Any]:
    """How a measurement was made, as in its record."""
    plan, drawing = measurement.plan, measurement.drawing
    return {
        "steps": drawing.steps,
        "guidance_scale": drawing.guidance_scale,
        "scheduler": drawing.scheduler,
        "images": plan.images,
        "threads": plan.threads,
        "rounds": plan.rounds,
        "seed": drawing.seed,
        "prompts": list(dict.fromkeys(drawing.prompts)),
        "device": str(measurement.studio.device),
        "pytorch_threads": torch.get_num_threads(),
        "keeps_engines": measurement.studio.keeps_engines,
    }


def _fits(bundle: Bundle, settings: Sequence[Setting]) -> bool:
    """Whether all engines together take at most half of the available memory."""
    held = bundle.manifest.files[WEIGHTS_FILE].size
    engines = {(setting.backend, graph) for setting in settings if setting.backend for graph in setting.graphs}
    others = sum(setting.backend is None for setting in settings)
    return 2 * held * (_COPIES * len(engines) + others) <= available()

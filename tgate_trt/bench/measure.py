"""Measure one bundle on this machine in one run: every setting in every round, on the same prompts, noise and scheduler."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tgate_trt.bench.contenders import FIDELITY, HAND_OFF, OUTSIDE, PARTS, PLANNING, Conditions, Contender, Studio
from tgate_trt.bench.memory import available, peak_memory
from tgate_trt.bench.quality import draw, quality
from tgate_trt.bench.settings import Setting, settings_of
from tgate_trt.bench.spread import ratios, spread
from tgate_trt.bench.stopwatch import Stopwatch
from tgate_trt.building.builder import add_graph
from tgate_trt.building.engines import stale_engine_reasons
from tgate_trt.bundle.backends import choose_backend
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.bundle.manifest import TRACE
from tgate_trt.demo.dataset import Captioned, examples
from tgate_trt.errors import InputError, StaleBundleError
from tgate_trt.export.weights import WEIGHTS_FILE
from tgate_trt.gate.after_gate import AFTER_GATE, DEFAULT_AFTER_GATE
from tgate_trt.gate.schedule import DEFAULT_GATE_STEP

logger = logging.getLogger(__name__)

PROMPTS = ("an astronaut riding a horse in a jungle", "a bowl of fruit on a wooden table", "a lighthouse on a cliff at sunset")
"""Of models other than the demo model, in turn."""

_BATCH_SIZE = 16
"""Pictures of the demo model in one call, where they are judged and not timed."""

_COPIES = 2
"""An engine may hold its weights a second time, laid out for the processor's kernels."""


@dataclass(frozen=True)
class Plan:
    """What is to be measured; each field is an option of the command."""

    bundle: Path
    gate_steps: tuple[str, ...] = ()
    """Counts and fractions; the bundle's own if empty."""
    after_gate: tuple[str, ...] = (DEFAULT_AFTER_GATE,)
    backends: tuple[str, ...] = ()
    """The first that runs here if empty."""
    beside: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    """In turn, one a picture; captions for the demo model, else `PROMPTS`, if empty."""
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    """Of `tgate_trt.running.drawing.SCHEDULERS`, or ``"own"`` for the model's; DPM-Solver++ if None, but for LCM, which has its own."""
    images: int = 1
    rounds: int = 5
    threads: int | None = None
    memory: bool = True
    """Whether peak memory is measured, in a process for each setting."""

    def __post_init__(self) -> None:
        for name, value in (("--rounds", self.rounds), ("--images", self.images), ("--steps", 1 if self.steps is None else self.steps)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        for mode in self.after_gate:
            if mode not in AFTER_GATE:
                raise InputError(f"--after-gate takes {', '.join(AFTER_GATE)}, got {mode!r}")


@dataclass(frozen=True)
class Sample:
    """One timed call of one contender."""

    parts: Mapping[str, float]
    """Seconds of each of `PARTS`."""
    calls: Mapping[str, int]
    """How often each was begun."""

    @property
    def whole(self) -> float:
        """Seconds of the whole call."""
        return sum(self.parts.values())

    @property
    def denoising(self) -> float:
        """Seconds of the denoising loop: without text encoding, decoding and what the pipeline does around them."""
        return sum(self.parts[part] for part in (PLANNING, FIDELITY, HAND_OFF, "denoiser", "scheduler"))

    @property
    def outside(self) -> float:
        """Seconds that are none of the models'."""
        return sum(self.parts[part] for part in OUTSIDE)

    def step(self, part: str) -> float:
        """Seconds of one call of an engine; 0 where there was none."""
        return self.parts[part] / max(1, self.calls.get(part, 0))


@dataclass
class Measurement:
    """A bundle made ready, its settings, and what was sampled so far."""

    plan: Plan
    studio: Studio
    settings: tuple[Setting, ...]
    samples: dict[Setting, list[Sample]] = field(default_factory=dict)
    memory: dict[Setting, dict[str, int]] = field(default_factory=dict)

    def run(self) -> Iterator[dict[str, Any]]:
        """Warm up, then sample every setting in each round, forwards and backwards in turn.

        Yields:
            After each round, the results of all rounds so far, by setting; see `results`.
        """
        for number in range(self.plan.rounds):
            order = self.settings if number % 2 == 0 else tuple(reversed(self.settings))
            for setting in order:
                contender = self.studio.contender(setting)
                if number == 0 or not self.studio.keeps_engines:
                    logger.info("warming up %s …", self.label(setting))
                    contender.draw(*self._pictures(number), steps=min(2, self.studio.conditions.steps))
                self.samples.setdefault(setting, []).append(self._sample(contender, number))
                logger.info(
                    "round %d of %d: %s: %.3f s", number + 1, self.plan.rounds, self.label(setting), self.samples[setting][-1].whole
                )
            yield self.results()

    def quality(self, samples: int, clip: Path | None, inception: Path | None) -> dict[str, Any]:
        """Draw the same prompts from the same noise by every setting that runs engines, and judge the pictures.

        Args:
            samples: pictures of each; of the demo model at most as many as it has held-out captions.
            clip: see `tgate_trt.bench.quality.quality`.
            inception: likewise.

        Returns:
            Plain data by setting.
        """
        captioned = _held_out(self.studio.bundle, samples)
        prompts = [each.caption for each in captioned] or list(itertools.islice(itertools.cycle(self.plan.prompts), samples))
        pictures = {}
        for setting in self.settings:
            if setting.backend:
                logger.info("%d pictures by %s …", len(prompts), self.label(setting))
                pictures[self.label(setting)] = self._draw(setting, prompts, batch_size=_BATCH_SIZE if captioned else 1)
        judged = quality(
            pictures, self.label(self.settings[0]), captioned=captioned or None, prompts=prompts, clip=clip, inception=inception
        )
        return {name: row.to_json() for name, row in judged.items()}

    def _draw(self, setting: Setting, prompts: Sequence[str], batch_size: int) -> Tensor:
        pipeline, bundle = self.studio.contender(setting).pipeline, self.studio.bundle
        scale = self.studio.conditions.guidance_scale
        if scale is None:
            scale = inspect.signature(pipeline.__call__).parameters["guidance_scale"].default
        size = {side: getattr(bundle.manifest.built_for, side) for side in ("height", "width")}
        steps, seed = self.studio.conditions.steps, self.plan.seed
        return draw(pipeline, prompts, steps=steps, guidance_scale=scale, seed=seed, batch_size=batch_size, **size)

    def measure_memory(self) -> None:
        """Measure the peak memory of each setting in a process of its own, which draws one picture in two steps."""
        for setting in self.settings:
            logger.info("memory of %s …", self.label(setting))
            self.memory[setting] = peak_memory(self.studio, setting, str(self._pictures(0)[0][0]))

    def label(self, setting: Setting) -> str:
        """A setting's name, with its backend where several are measured."""
        several = len({each.backend for each in self.settings if each.backend}) > 1
        return setting.label(self.studio.conditions.steps) + (f", {setting.backend}" if several and setting.backend else "")

    def results(self) -> dict[str, Any]:
        """Plain data of every setting that was sampled: times, ratios to its baseline, parts, steps, bound and memory."""
        first = self.samples[self.settings[0]]
        return {self.label(setting): self._result(setting, row, first[: len(row)]) for setting, row in self.samples.items()}

    def _result(self, setting: Setting, row: Sequence[Sample], first: Sequence[Sample]) -> dict[str, Any]:
        base = self.samples[setting.baseline][: len(row)]
        whole = [sample.whole for sample in row]
        return {
            "setting": dataclasses.asdict(setting),
            "engine": self.studio.contender(setting).engine,
            "baseline": self.label(setting.baseline),
            "planning_steps": setting.planning_steps(self.studio.conditions.steps),
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
        """The ratio of multiply-accumulates to the baseline's, without attention's two products and with them."""
        own, other = self._work(setting, sample), self._work(setting.baseline, base)
        return {"linear": own[0] / other[0], "with_sdpa": own[1] / other[1]}

    def _work(self, setting: Setting, sample: Sample) -> tuple[int, int]:
        """Multiply-accumulates of a call's denoising: of linear and convolution layers, and those with attention's two products."""
        rows = self.plan.images * (2 if self._is_guided else 1), self.plan.images
        linear = whole = 0
        for graph, size, part in zip(setting.graphs, rows, (PLANNING, FIDELITY), strict=True):
            macs, calls = self.studio.macs(graph, size), sample.calls.get(part, 0)
            linear, whole = linear + calls * macs.linear, whole + calls * (macs.linear + macs.sdpa)
        return linear, whole

    @property
    def _is_guided(self) -> bool:
        return bool(getattr(self.studio.our_pipeline(str(self.settings[0].backend)), "do_classifier_free_guidance", False))

    def _sample(self, contender: Contender, number: int) -> Sample:
        watch = Stopwatch(self.studio.device)
        contender.draw(*self._pictures(number), watch=watch)
        seconds = watch.seconds()
        return Sample({part: seconds.get(part, 0.0) for part in PARTS}, dict(watch.calls))

    def _pictures(self, number: int) -> tuple[list[str], list[int]]:
        """Prompts and seeds of one round's call."""
        first = number * self.plan.images
        prompts = itertools.islice(itertools.cycle(self.plan.prompts), first, first + self.plan.images)
        return list(prompts), [self.plan.seed + first + place for place in range(self.plan.images)]


def prepare(plan: Plan) -> Measurement:
    """Open a bundle, add the graphs that are compared, and make ready what is to be measured.

    Raises:
        BundleError: if the bundle cannot be used here.
        InputError: if the plan is impossible.
        StaleBundleError: if engines that would be compared were built with different versions.
    """
    bundle = Bundle.open(plan.bundle)
    if TRACE not in bundle.manifest.files:
        raise StaleBundleError(f"{bundle.folder} holds no graphs to count and add to; build it again without --discard-graphs")
    backends = tuple(choose_backend(bundle, backend) for backend in (plan.backends or (None,)))
    refuse_unfair(bundle, backends)
    for graph in ("vanilla", "planning", "fidelity"):
        bundle = add_graph(bundle, graph)
    manifest = bundle.manifest
    conditions = Conditions(
        steps=plan.steps or manifest.steps,
        guidance_scale=manifest.guidance_scale if plan.guidance_scale is None else plan.guidance_scale,
        scheduler=_scheduler(bundle, plan.scheduler),
        images=plan.images,
        threads=plan.threads,
    )
    settings = settings_of(backends, plan.gate_steps, plan.after_gate, plan.beside, manifest.gate_step or DEFAULT_GATE_STEP)
    for setting in settings:
        setting.planning_steps(conditions.steps)
    if plan.threads:
        torch.set_num_threads(plan.threads)
    studio = Studio(bundle, device_of(backends), conditions, keeps_engines=_fits(bundle, settings))
    prompts = plan.prompts or [each.caption for each in _held_out(bundle, plan.rounds * plan.images)] or PROMPTS
    return Measurement(dataclasses.replace(plan, prompts=tuple(prompts)), studio, settings)


def refuse_unfair(bundle: Bundle, backends: Sequence[str]) -> None:
    """Refuse to compare engines that would not be built alike: all of a backend have the same options and versions.

    Raises:
        StaleBundleError: if engines are of another version than those that would be built beside them.
    """
    for backend in backends:
        reasons = stale_engine_reasons(backend, bundle.manifest.engines[backend], None)
        if reasons:
            raise StaleBundleError(f"a comparison would not be fair: {'; '.join(reasons)}; build the bundle again with tgate-build")


def device_of(backends: Sequence[str]) -> torch.device:
    """Where engines of these backends run: the GPU where there is one, but ONNX Runtime's only where it can use it."""
    from tgate_trt.engines.onnxruntime import cuda_is_available

    on_gpu = torch.cuda.is_available() and ("onnxruntime" not in backends or cuda_is_available())
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def conditions_of(measurement: Measurement) -> dict[str, Any]:
    """How it was measured, as a record keeps it."""
    plan, conditions = measurement.plan, measurement.studio.conditions
    return {
        **dataclasses.asdict(conditions),
        "rounds": plan.rounds,
        "seed": plan.seed,
        "prompts": list(plan.prompts[: plan.rounds * plan.images]),
        "device": str(measurement.studio.device),
        "pytorch_threads": torch.get_num_threads(),
        "keeps_engines": measurement.studio.keeps_engines,
    }


def _scheduler(bundle: Bundle, name: str | None) -> str | None:
    """The scheduler that all settings use, None for the model's own."""
    config = json.loads((bundle.pipeline / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    if name == "own" or (name is None and config["_class_name"] == "LCMScheduler"):
        return None
    return name or "dpm++"


def _held_out(bundle: Bundle, samples: int) -> list[Captioned]:
    """Held-out captions, where the bundle is of the demo model."""
    return examples(samples, held_out=True, seed=0) if bundle.manifest.model.name == "shapes" else []


def _fits(bundle: Bundle, settings: Sequence[Setting]) -> bool:
    """Whether all engines take at most half of the memory that is there."""
    held = bundle.manifest.files[WEIGHTS_FILE].size
    engines = {(setting.backend, graph) for setting in settings if setting.backend for graph in setting.graphs}
    others = sum(setting.backend is None for setting in settings)
    return 2 * held * (_COPIES * len(engines) + others) <= available()

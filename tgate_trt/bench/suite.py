"""What `python -m tgate_trt.bench` measures: models by parts, every round written when it is done."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import torch

from tgate_trt.bench import pictures, scores, steps
from tgate_trt.bench.record import Recorder, describe
from tgate_trt.bench.studio import SCHEDULER, Studio
from tgate_trt.bench.subjects import PRESETS, open_bundle, preset_of
from tgate_trt.bench.tables import Table, tables_of, write_page
from tgate_trt.demo import GUIDANCE_SCALE
from tgate_trt.errors import InputError
from tgate_trt.schedule import planning_steps

logger = logging.getLogger(__name__)

PARTS = ("steps", "pictures", "scores")

GATE = 10 / 25
"""Where the gate of the timed pictures stands, as a fraction of the steps: the official code's default for SD models."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be measured; each field is an option of the command."""

    models: tuple[str, ...]
    parts: tuple[str, ...] = PARTS
    rounds: int | None = None
    """The model's own if None."""
    steps: int = 25
    samples: int = 100
    threads: int | None = None
    """CPU threads of an engine; one a core if None."""

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in PARTS:
                raise InputError(f"--only takes {', '.join(PARTS)}, got {part!r}")
        for model in self.models:
            preset_of(model)
        if not self.parts or not self.models:
            raise InputError("nothing is left to measure; give --model and --only at least one name each")
        if self.parts == ("scores",) and not any(model == scores.MODEL or model not in PRESETS for model in self.models):
            raise InputError(f"scores are read from pictures of {scores.MODEL}, got --model {','.join(self.models)}")
        planning_steps(GATE, self.steps)

    def rounds_of(self, model: str) -> int:
        """How often a model's times are taken."""
        return self.rounds or preset_of(model).rounds


def run(plan: Plan, recorder: Recorder) -> Iterator[Table]:
    """Measure, and give the tables of each part when it is done.

    Raises:
        InputError: if a model cannot be built.
        BundleError: if a bundle cannot be used.
    """
    for model in plan.models:
        with Studio(open_bundle(model), plan.threads) as studio:
            for part in plan.parts:
                if part != "scores" or studio.bundle.manifest.model["name"] == scores.MODEL:
                    yield from _measure(part, studio, plan, plan.rounds_of(model), recorder)


def _measure(part: str, studio: Studio, plan: Plan, rounds: int, recorder: Recorder) -> Iterator[Table]:
    """Measure one part, and write what there is after each of its rounds."""
    subject = describe(studio.bundle)
    settings, results, total = _prepare(part, studio, plan, rounds)
    logger.info("%s of %s, %d rounds …", part, subject["model"], total)
    for number, result in enumerate(results, start=1):
        record = recorder.save(part, subject, settings | {"rounds_done": number}, result, complete=number == total)
        write_page(recorder.folder)
        logger.info("%s of %s: %d of %d", part, subject["model"], number, total)
    yield from tables_of(record)


def _prepare(part: str, studio: Studio, plan: Plan, rounds: int) -> tuple[dict[str, Any], Iterator[dict[str, Any]], int]:
    """Settings, results after each round, and the number of rounds, of one part."""
    common: dict[str, Any] = {"threads": plan.threads or "one a core", "pytorch_threads": torch.get_num_threads(), "backend": "onnxruntime"}
    if part == "steps":
        return common | {"rounds": rounds, "least_seconds": steps.LEAST_SECONDS}, steps.measure(studio, rounds), rounds
    common |= {"steps": plan.steps, "scheduler": SCHEDULER}
    if part == "pictures":
        settings = common | {"rounds": rounds, "gate": GATE, "prompt": pictures.PROMPT, "guidance_scale": pictures.GUIDANCE_SCALE}
        return settings, pictures.measure(studio, rounds, gate=GATE, steps=plan.steps), rounds
    settings = common | {"samples": plan.samples, "seed": scores.SEED, "guidance_scale": GUIDANCE_SCALE}
    return settings | {"batch_size": scores.BATCH_SIZE}, scores.measure(studio, samples=plan.samples, steps=plan.steps), len(scores.GATES)

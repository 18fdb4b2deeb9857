"""The whole analysis of a model, from its name to a record and a figure."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tgate_trt.analysis import convergence, figure, gate_sweep, null_text
from tgate_trt.analysis.convergence import Convergence
from tgate_trt.analysis.outcomes import DISTANCE, Series
from tgate_trt.analysis.plotting import check_available
from tgate_trt.analysis.record import check_writable, describe, environment, record_of, write
from tgate_trt.analysis.subject import Subject, check_weights
from tgate_trt.analysis.suggestion import suggest
from tgate_trt.building.builder import build
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.bundle.manifest import MANIFEST
from tgate_trt.errors import InputError
from tgate_trt.gate.schedule import planning_steps
from tgate_trt.running.drawing import Drawing
from tgate_trt.taps import CROSS_ATTENTION

logger = logging.getLogger(__name__)

PARTS = ("convergence", "null-text", "gate")

LEAST_STEPS = 2
"""An analysis compares a step with the next one."""

DEFINITIONS = {
    "convergence": "D_t = ‖C_t − C_{t+1}‖₂ for t = 1 … T − 1; absolute, and relative to ‖C_t‖₂",
    "text first": "text in the first m steps, the null prompt after; m in 'at'",
    "text last": "the null prompt in the first m steps, text after; m in 'at'",
    "gate": "planning steps g in 'at'",
    "noise levels": "σ, noise over signal in standard deviations, at the beginning of each step; null where it is infinite or unknown",
    "distance": DISTANCE,
    "accuracy": "share of pictures that show every attribute of their caption, with Wilson's 95 % interval",
    "low, high": "95 % interval of the mean over pictures",
}
"""Definitions of the entries of a record's results."""


def check_parts(parts: tuple[str, ...]) -> tuple[str, ...]:
    """Check the names of parts, and return them.

    Raises:
        InputError: if there are none, or one is unknown.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise InputError(
            f"--only takes one or more of {', '.join(PARTS)}, got {unknown[0] if unknown else 'none'!r}; see tgate-analyze --help"
        )
    return parts


def analyze(
    model: str | os.PathLike[str],
    drawing: Drawing,
    *,
    samples: int | None = None,
    command: str,
    parts: tuple[str, ...] = PARTS,
    backend: str | None = None,
    random_weights: bool = False,
) -> dict[str, Any]:
    """Analyse a model over the steps of its pictures.

    Args:
        model: folder of a bundle; or any model that `tgate_trt.build` takes, from which a bundle is built in its default folder.
        drawing: the pictures; see `tgate_trt.analysis.prompts.prompts_of` for their prompts.
        samples: number of pictures; see `prompts_of`.
        command: the command line, for the record.
        parts: parts of the analysis, from `PARTS`.
        backend: backend of the engines that draw; see `tgate_trt.load`. Convergence is measured in eager PyTorch.
        random_weights: whether to fill a named architecture with seeded random weights.

    Returns:
        The record; see `tgate_trt.analysis.record.record_of`. Parts that were not asked for are None.

    Raises:
        InputError: if the model or a setting cannot be used.
        BundleError: if the bundle cannot be used.
    """
    check_parts(parts)
    if drawing.steps is not None and drawing.steps < LEAST_STEPS:
        raise InputError(f"an analysis compares steps and needs at least {LEAST_STEPS}, got {drawing.steps}; choose more --steps")
    before = environment()
    bundle = open_bundle(model, backend, random_weights=random_weights)
    if "convergence" in parts:
        check_weights(bundle)
    subject = Subject(bundle, drawing, backend, samples)
    gates = _sweep(subject) if "gate" in parts else None
    swapped = _swap(subject) if "null-text" in parts else None
    curves = _converge(subject) if "convergence" in parts else None  # last, because it frees the engines
    relative = curves[CROSS_ATTENTION][convergence.ALL_LAYERS].relative.mean if curves and CROSS_ATTENTION in curves else None
    results = {
        "definitions": DEFINITIONS,
        "default_gate_step": planning_steps(bundle.manifest.default_gate_step, subject.steps, subject.levels),
        "noise_levels": subject.levels and [level if math.isfinite(level) else None for level in subject.levels],
        "suggestion": suggest(relative, gates).to_json(subject.levels),
        "convergence": None if curves is None else {kind: _to_json(groups) for kind, groups in curves.items()},
        "null_text": None if swapped is None else _to_json(swapped),
        "gate": None if gates is None else gates.to_json(),
    }
    return record_of("analysis", command, before, _settings(subject, parts, samples), results, describe(bundle))


@dataclasses.dataclass(frozen=True)
class Files:
    """The files to which an analysis is written; None for those that are not wanted."""

    folder: Path | None = None
    """Folder for ``analysis-<model>.json`` and ``analysis-<model>.png``."""
    json: Path | None = None
    """File for the record, instead of that one."""
    plot: Path | None = None
    """File for the figure, instead of that one."""

    def check(self) -> None:
        """Check before the work that the files can be written.

        Raises:
            InputError: if one cannot.
            UnsupportedError: if a figure is wanted and matplotlib is not installed.
        """
        if self.folder is not None or self.plot is not None:
            check_available(self.plot)
        for path in (self.folder and self.folder / "analysis.json", self.json, self.plot):
            if path is not None:
                check_writable(path)

    def write(self, record: dict[str, Any]) -> list[Path]:
        """Write the record and the figure, each whole or not at all, and return the paths.

        Raises:
            InputError: if one cannot be written.
        """
        json, plot = self.json, self.plot
        if self.folder is not None:
            stem = f"analysis-{record['subject']['model']}"
            json, plot = json or self.folder / f"{stem}.json", plot or self.folder / f"{stem}.png"
        if json is not None:
            write(json, record)
        if plot is not None:
            figure.save(record, plot)
        return [path for path in (json, plot) if path is not None]


def open_bundle(model: str | os.PathLike[str], backend: str | None, *, random_weights: bool) -> Bundle:
    """Open the bundle in a folder, or build one.

    Raises:
        InputError: if there is no such model.
        BundleError: if the bundle cannot be used.
    """
    if (Path(model) / MANIFEST).is_file():
        return Bundle.open(model)
    return build(model, backend=backend, random_weights=random_weights)


def _sweep(subject: Subject) -> Series:
    return gate_sweep.measure(subject, _progress("pictures by gate step", subject.steps))


def _swap(subject: Subject) -> dict[str, Series]:
    return null_text.measure(subject, _progress("pictures with the null text", 2 * (subject.steps + 1)))


def _converge(subject: Subject) -> dict[str, dict[str, Convergence]]:
    denoiser = subject.use_eager()
    sample = next(tensor for tensor in subject.bundle.graph("planning").inputs if tensor.name == "sample")
    height, width = (int(side) for side in sample.shape[2:])
    with convergence.recording(subject.pipeline, denoiser) as recorded:
        subject.run(_progress("convergence of attention", len(subject.drawing.prompts)))
    return convergence.curves(recorded.layers(), height, width)


def _to_json(entries: Mapping[str, Convergence | Series]) -> dict[str, Any]:
    return {name: entry.to_json() for name, entry in entries.items()}


def _progress(what: str, total: int) -> Callable[[], None]:
    """Return a function to call for each of ``total`` things that is done; it logs the fraction."""
    done = 0
    logger.info("%s …", what)

    def advance() -> None:
        nonlocal done
        done += 1
        logger.info("%s", what, extra={"progress": done / total})
        if done == total:
            logger.info("%s: done", what)

    return advance


def _settings(subject: Subject, parts: tuple[str, ...], samples: int | None) -> dict[str, Any]:
    drawing = subject.drawing
    return {
        "prompts": list(dict.fromkeys(drawing.prompts)),
        "samples": samples,
        "steps": subject.steps,
        "seed": drawing.seed,
        "guidance_scale": drawing.guidance_scale,
        "scheduler": type(subject.pipeline.scheduler).__name__,
        "parts": list(parts),
        "pictures": len(drawing.prompts),
        "backend": subject.backend,
        "pictures_in_a_call": subject.batch_size,
        "pytorch_threads": torch.get_num_threads(),
    }

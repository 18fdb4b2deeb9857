"""The whole analysis of a model, from its name to a figure and a file of results."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tgate_trt.analysis import convergence, figure, gate_sweep, null_text
from tgate_trt.analysis.convergence import Convergence
from tgate_trt.analysis.outcomes import Series
from tgate_trt.analysis.plotting import check_available
from tgate_trt.analysis.record import describe, environment
from tgate_trt.analysis.results import Study
from tgate_trt.analysis.subject import Subject, check_weights
from tgate_trt.analysis.suggestion import suggest
from tgate_trt.building.builder import build
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.bundle.manifest import MANIFEST
from tgate_trt.errors import InputError
from tgate_trt.files import replace_file
from tgate_trt.gate.schedule import DEFAULT_GATE_STEP, planning_steps
from tgate_trt.running.drawing import Drawing
from tgate_trt.taps import CROSS_ATTENTION

logger = logging.getLogger(__name__)

PARTS = ("convergence", "null-text", "gate")

LEAST_STEPS = 2
"""An analysis compares a step with the next one."""


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
    parts: tuple[str, ...] = PARTS,
    backend: str | None = None,
    random_weights: bool = False,
) -> Study:
    """Analyse a model over the steps of its pictures.

    Args:
        model: folder of a bundle; or any model that `tgate_trt.build` takes, from which a bundle is built in its default folder.
        drawing: the pictures; see `tgate_trt.analysis.prompts.prompts_of` for their prompts.
        samples: number of pictures; see `prompts_of`.
        parts: parts of the analysis, from `PARTS`.
        backend: backend of the engines that draw; see `tgate_trt.load`. Convergence is measured in eager PyTorch.
        random_weights: whether to fill a named architecture with seeded random weights.

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
    subject, manifest = Subject(bundle, drawing, backend, samples), bundle.manifest
    gates = _sweep(subject) if "gate" in parts else None
    swapped = _swap(subject) if "null-text" in parts else None
    curves = _converge(subject) if "convergence" in parts else None  # last, because it frees the engines
    relative = curves[CROSS_ATTENTION][convergence.ALL_LAYERS].relative.mean if curves and CROSS_ATTENTION in curves else None
    return Study(
        subject=describe(bundle),
        settings=_settings(subject, parts, samples),
        environment=before,
        steps=subject.steps,
        own_gate_step=planning_steps(manifest.gate_step or DEFAULT_GATE_STEP, subject.steps),
        curves=curves,
        null_text=swapped,
        gates=gates,
        suggestion=suggest(relative, gates),
    )


def analyze_and_save(
    model: str | os.PathLike[str],
    drawing: Drawing,
    *,
    samples: int | None = None,
    parts: tuple[str, ...] = PARTS,
    backend: str | None = None,
    random_weights: bool = False,
    output: Path | None = None,
    json_file: Path | None = None,
    plot: Path | None = None,
) -> tuple[Study, list[Path]]:
    """Analyse a model, and write the results and the figure, each whole or not at all.

    Args:
        model: see `analyze`.
        drawing: see `analyze`.
        samples: see `analyze`.
        parts: see `analyze`.
        backend: see `analyze`.
        random_weights: see `analyze`.
        output: folder for ``analysis-<model>.json`` and ``analysis-<model>.png``.
        json_file: file for the results, instead of that one.
        plot: file for the figure, instead of that one.

    Returns:
        The results and the files.

    Raises:
        InputError: if the model or a setting cannot be used, or a file cannot be written; both are checked before the work begins.
        UnsupportedError: if a figure is wanted and matplotlib is not installed.
        BundleError: if the bundle cannot be used.
    """
    check_parts(parts)
    if output is not None or plot is not None:
        check_available(plot)
    for folder in [path for path in (output, *(file.parent for file in (json_file, plot) if file is not None)) if path is not None]:
        _make(folder)
    study = analyze(model, drawing, samples=samples, parts=parts, backend=backend, random_weights=random_weights)
    if output is not None:
        json_file = json_file or output / f"analysis-{study.name}.json"
        plot = plot or output / f"analysis-{study.name}.png"
    try:
        if json_file is not None:
            replace_file(json_file, json.dumps(study.to_json(), indent=1, ensure_ascii=False) + "\n")
        if plot is not None:
            figure.save(study, plot)
    except OSError as error:
        raise InputError(f"cannot write to {error.filename}: {error.strerror or error}; choose another place") from error
    return study, [path for path in (json_file, plot) if path is not None]


def _make(folder: Path) -> None:
    """Make a folder, and check that files can be written to it.

    Raises:
        InputError: if they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "Permission denied")
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}; choose another place") from error


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


def _progress(what: str, total: int) -> Callable[[], None]:
    """Returns a function to call for each of ``total`` things that is done; it logs the fraction."""
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

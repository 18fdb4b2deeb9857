"""Trace a model's denoiser into a bundle's folder, large ones in a process of its own.

PyTorch's exporter keeps a third of a gigabyte of what it met on SDXL, which would stay for the rest of a build. A process
more costs seconds, so small models are traced in this one.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgate_trt import children
from tgate_trt.bundle import TRACE

if TYPE_CHECKING:
    import onnx_ir as ir

    from tgate_trt.model_source import ModelSource


@dataclasses.dataclass(frozen=True)
class Task:
    """What is to be traced."""

    model: str
    """What `tgate_trt.models.resolve` takes."""
    random_seed: int | None
    """Seed of random weights, or None for the model's own."""
    lora: list[tuple[str, float]]
    """Path and scale of each LoRA in its weights."""
    folder: str
    """Folder of the weights, where the trace goes."""
    precision: str
    height: int
    width: int


def write_trace(source: ModelSource, folder: Path, precision: str, height: int, width: int) -> None:
    """Write ``trace.onnx``, its parameters in the weights file beside it.

    Raises:
        BuildError: if PyTorch cannot trace or translate the model.
    """
    if source.is_large:
        task = Task(source.reference, source.random_seed, source.lora_as_json(), str(folder), precision, height, width)
        children.run(__name__, task, "tracing the model", "if memory ran out, free some")
    else:
        _write(source, folder, precision, height, width)


def _write(source: ModelSource, folder: Path, precision: str, height: int, width: int) -> None:
    import torch
    from torch import nn

    from tgate_trt.export.trace import trace
    from tgate_trt.specs import DTYPES

    denoiser = nn.Module.to(source.denoiser_on_meta(), getattr(torch, DTYPES[precision]))
    save(trace(denoiser, source.signature(height, width, precision)), folder, TRACE)


def save(model: ir.Model, folder: Path, name: str) -> None:
    """Save a trace or a graph whose parameters are in the folder's weights file."""
    import onnx_ir as ir

    from tgate_trt.export import weights

    weights.attach(model, weights.read_places(folder / weights.WEIGHTS_FILE), folder)
    ir.save(model, folder / name)


def _work(task: Task) -> dict[str, Any]:
    from tgate_trt.models import resolve_again

    _write(resolve_again(task.model, task.random_seed, task.lora), Path(task.folder), task.precision, task.height, task.width)
    return {"trace": TRACE}


if __name__ == "__main__":
    children.answer(_work, Task)

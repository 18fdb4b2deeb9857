"""A bundle's pipeline on the CPU, its engines loaded as they are wanted, and the ways to draw that are compared."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from tgate_trt.after_gate import DEFAULT_AFTER_GATE
from tgate_trt.backends import EngineLoader, choose_backend
from tgate_trt.bench.macs import macs_of_picture, macs_of_step
from tgate_trt.bundle import Bundle
from tgate_trt.denoiser import GatedDenoiser
from tgate_trt.engines.base import Engine
from tgate_trt.export.weights import WEIGHTS_FILE
from tgate_trt.generate import scheduler_of
from tgate_trt.schedule import NONE, planning_steps
from tgate_trt.specs import DTYPES, GraphSpec

SCHEDULER = "dpm++"
"""Of every picture here, as `tgate_trt.generate.SCHEDULERS` names it: one call of the denoiser a step."""

_CPU = torch.device("cpu")
_COPIES = 2
"""An engine may hold its weights a second time, laid out for the processor's kernels."""


@dataclass(frozen=True)
class Method:
    """A way to draw a picture."""

    name: str
    planning: str
    """Graph of the steps before the gate."""
    fidelity: str
    """Graph of the steps from the gate on."""
    gated: bool = True
    after_gate: str = DEFAULT_AFTER_GATE
    """What is kept of the guidance batch after the gate, of `tgate_trt.after_gate.AFTER_GATE`."""

    def planning_steps(self, gate: float, steps: int) -> int:
        """Steps before the gate, which stands at a fraction of the steps; without a gate, all of them."""
        return planning_steps(gate if self.gated else NONE, steps)

    def label(self, planning_steps: int) -> str:
        """How it is shown to people."""
        return f"{self.name}, g = {planning_steps}" if self.gated else self.name


VANILLA = Method("vanilla", "vanilla", "vanilla", gated=False)
CFG_DROP = Method("cfg-drop", "vanilla", "vanilla", after_gate="positive")
TGATE = Method("T-GATE", "planning", "fidelity")
METHODS = (VANILLA, CFG_DROP, TGATE)
"""From the gate on, cfg-drop leaves out guidance and nothing else: the rest of the saving is T-GATE's own."""


class Studio:
    """Pipeline and engines of one bundle, all engines of one backend, on one device and with one number of threads."""

    def __init__(self, bundle: Bundle, threads: int | None = None, *, backend: str | None = None, device: torch.device = _CPU) -> None:
        """Open a studio.

        Args:
            bundle: with every graph of `tgate_trt.taps.GRAPHS`.
            threads: of an engine; one a core if None.
            backend: of its engines; the first that runs here if None.
            device: of its engines and its pipeline.
        """
        self.bundle = bundle
        self.device = device
        self.loader = EngineLoader(bundle, choose_backend(bundle, backend), device, threads)
        self.dtype: torch.dtype = getattr(torch, DTYPES[bundle.manifest.built_for["precision"]]) if device.type == "cuda" else torch.float32
        self.architecture = bundle.denoiser_on_meta(self.dtype)
        self.keeps_engines = _fits(bundle)
        """Whether all engines stay loaded; where memory does not allow it, only those in use do."""
        self._engines: dict[str, Engine] = {}
        self._macs: dict[tuple[str, int], int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._close(self._engines.copy())

    def spec(self, graph: str) -> GraphSpec:
        """What a graph takes and gives."""
        return self.bundle.graph(graph)

    def engines(self, *graphs: str) -> list[Engine]:
        """The engines of graphs; others may be closed for them."""
        if not self.keeps_engines:
            self._close(set(self._engines) - set(graphs))
        for graph in graphs:
            if graph not in self._engines:
                self._engines[graph] = self.loader.load(graph)
        return [self._engines[graph] for graph in graphs]

    @property
    def picture_size(self) -> dict[str, int]:
        """Height and width, in pixels, that the bundle was built for."""
        built_for = self.bundle.manifest.built_for
        return {"height": built_for["height"], "width": built_for["width"]}

    def macs(self, graph: str, rows: int) -> int:
        """Multiply-accumulates of one call of a graph."""
        key = (graph, rows)
        if key not in self._macs:
            self._macs[key] = macs_of_step(self.architecture, self.spec("vanilla").inputs, graph, rows)
        return self._macs[key]

    def macs_of(self, method: Method, gate: float, steps: int) -> int:
        """Multiply-accumulates of the denoising of one picture."""
        refinement = self.macs(method.fidelity, 1)
        return macs_of_picture(self.macs(method.planning, 2), refinement, method.planning_steps(gate, steps), steps)

    @cached_property
    def pipeline(self) -> Any:
        """The bundle's pipeline with `SCHEDULER`, without engines; see `put`."""
        from diffusers import DiffusionPipeline

        attribute = self.bundle.manifest.model["attribute"]
        pipeline = DiffusionPipeline.from_pretrained(
            self.bundle.pipeline, **{attribute: self.architecture}, torch_dtype=self.dtype, local_files_only=True, use_safetensors=True
        )
        if self.device.type != "cpu":
            pipeline.to(self.device)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = scheduler_of(pipeline, SCHEDULER)
        return pipeline

    def put(self, method: Method, gate: float) -> GatedDenoiser:
        """Make the pipeline draw by a method, its gate at a fraction of the steps of each run."""
        planning, fidelity = self.engines(method.planning, method.fidelity)
        gate_step = gate if method.gated else NONE
        denoiser = GatedDenoiser(self.pipeline, self.architecture, planning, fidelity, gate_step=gate_step, after_gate=method.after_gate)
        setattr(self.pipeline, self.bundle.manifest.model["attribute"], denoiser)
        return denoiser

    def _close(self, graphs: Iterable[str]) -> None:
        for graph in graphs:
            self._engines.pop(graph).close()


def _fits(bundle: Bundle) -> bool:
    """Whether all engines of a bundle, take at most half of the memory."""
    engines = len(bundle.manifest.graphs) * _COPIES * (bundle.folder / WEIGHTS_FILE).stat().st_size
    return 2 * engines <= _available_memory()


def _available_memory() -> int:
    """Bytes that this machine can still give, those that hold files included; all of its memory where it does not say."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

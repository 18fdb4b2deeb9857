"""The multiply-accumulates (MACs) of a picture and the parameters of a model, beside the paper's figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import TypeVar

import onnx_ir as ir

from tgate_trt.eager import deep_paths
from tgate_trt.export.cut import cut
from tgate_trt.export.macs import Macs, macs_of, size_of
from tgate_trt.export.trace import trace
from tgate_trt.gate.actions import actions_of, work_of
from tgate_trt.gate.gate import Gate
from tgate_trt.gate.schedule import GateSchedule, planning_steps
from tgate_trt.models.resolve import resolve
from tgate_trt.models.source import ModelSource, is_distilled
from tgate_trt.taps import CROSS_ATTENTION, TAPPED_MODULES, recipe

GATES = (5 / 25, 10 / 25)
"""The gate in the paper's tables, as a fraction of the steps: 5 and 10 of 25, and LCM's 1 and 2 of 4."""

GATES_OF_PIXART = (10 / 25, 15 / 25)
"""Those of PixArt with guidance: the paper's figure of a gate at 15 without self-attention reuse, 70.23, is what a gate at 10 comes to."""

PUBLISHED: Mapping[str, Mapping[int, float]] = {
    "sd15": {25: 16.938, 5: 9.875, 10: 11.641},
    "sd21": {25: 38.041, 5: 22.208, 10: 26.166},
    "sdxl": {25: 149.438, 5: 84.438, 10: 100.688},
    "pixart-alpha": {25: 107.031, 10: 70.23},
    "pixart-sigma": {25: 107.766},
    "lcm-pixart": {4: 8.563, 1: 7.623},
    "lcm-sdxl": {4: 11.955, 1: 11.171, 2: 11.433},
}
"""The paper's tera-MACs of a picture by the number of planning steps (for vanilla, of all steps), to compare our own counts with."""


FURTHER: Mapping[str, float | None] = {"5,sp=3,warm=1": 83.498, "10,sp=5,warm=2": 95.988, "none,deep=3,branch=1": 57.888}
"""Gates of self-attention reuse and DeepCache with the paper's tera-MACs of SDXL. Its table names neither warm-up nor branch: these are
the ones that give its figures."""

UNMET = "10,deep=3,branch=1", 43.868
"""DeepCache with the gate, and the paper's figure of it for SDXL. No count of whole and of reused steps before and after a gate at 5 or
10 gives that figure with the branch that gives DeepCache's own."""

_Work = TypeVar("_Work", int, Macs)


def macs_of_picture(step: _Work, refinement: _Work, planning_steps: int, steps: int) -> _Work:
    """Multiply-accumulates of a picture's denoising.

    Args:
        step: of a step before the gate.
        refinement: of a step from the gate on.
        planning_steps: steps before the gate.
        steps: of the whole run.
    """
    return planning_steps * step + (steps - planning_steps) * refinement


@dataclass(frozen=True)
class Parameters:
    """Numbers of a denoiser's parameters."""

    whole: int
    """Those of the vanilla graph."""
    cross_attention: int
    """Those of them in cross-attention."""
    fidelity_graph: int
    """Those of the fidelity graph, which has no norm before cross-attention either, where the denoiser is a UNet."""

    @property
    def without_cross_attention(self) -> int:
        """The paper's column."""
        return self.whole - self.cross_attention


@dataclass(frozen=True)
class PictureCost:
    """One row of the table of MACs."""

    method: str
    """``"vanilla"``, ``"cfg-drop"`` or ``"T-GATE"``, as `tgate_trt.bench.settings` names them; or a gate in text form."""
    planning_steps: int
    """Steps before the gate; all of them without a gate."""
    macs: Macs
    published: float | None
    """The paper's tera-MACs, to compare with ``macs.linear``; None where it gives none."""
    is_met: bool = True
    """Whether the published figure is one that can be met; see `UNMET`."""

    @property
    def deviation(self) -> float | None:
        """The difference of our count from the paper's, as a fraction of the paper's."""
        return None if self.published is None else self.macs.linear / (self.published * 1e12) - 1


@dataclass(frozen=True)
class ModelCost:
    """The work and the parameters of a model at its native size, for one picture."""

    model: str
    height: int
    width: int
    text_tokens: int
    steps: int
    """The model's own number."""
    guided: bool
    """Whether steps before the gate have two rows; see `rows_of_step`."""
    vanilla: Macs
    """Of a step of the vanilla graph, with guidance where the model has it."""
    planning: Macs
    """Of a step of the planning graph, likewise."""
    single: Macs
    """Of a step of the vanilla graph at one row: cfg-drop's, from the gate on."""
    fidelity: Macs
    """Of a step of the fidelity graph, at one row."""
    parameters: Parameters
    further: tuple[PictureCost, ...] = ()
    """Self-attention reuse and DeepCache, where there is guidance."""

    def pictures(self) -> tuple[PictureCost, ...]:
        """The table's rows: vanilla, and at each of `GATES` cfg-drop (where there is guidance to drop) and T-GATE."""
        published = PUBLISHED.get(self.model, {})
        rows = [PictureCost("vanilla", self.steps, self.steps * self.vanilla, published.get(self.steps))]
        gates = GATES_OF_PIXART if self.guided and self.model.startswith("pixart") else GATES
        for steps in (planning_steps(gate, self.steps) for gate in gates):
            if self.guided:
                rows.append(PictureCost("cfg-drop", steps, macs_of_picture(self.vanilla, self.single, steps, self.steps), None))
            gated = macs_of_picture(self.planning, self.fidelity, steps, self.steps)
            rows.append(PictureCost("T-GATE", steps, gated, published.get(steps)))
        return (*rows, *self.further)


def cost_of(model: str) -> ModelCost:
    """Trace a model's architecture, cut it, and count the graphs, without any weights.

    Args:
        model: a name of `tgate_trt.models.architectures.ARCHITECTURES`, or a diffusers folder.

    Raises:
        InputError: if there is no such model.
        UnsupportedError: if its denoiser is of a kind that this version does not build.
        BuildError: if PyTorch cannot trace it.
    """
    source = resolve(model, random_weights=True)
    traced = trace(source.denoiser_on_meta(), source.signature(source.height, source.width, "fp32"))
    graphs = {name: cut(traced, recipe(name)) for name in ("vanilla", "planning", "fidelity")}
    rows = rows_of_step(source)
    further = _further(traced, source) if rows == 2 and deep_paths(source.denoiser_on_meta()) else ()
    return ModelCost(
        model=source.name,
        height=source.height,
        width=source.width,
        text_tokens=source.text_tokens,
        steps=source.steps,
        guided=rows == 2,
        vanilla=macs_of(graphs["vanilla"], rows),
        planning=macs_of(graphs["planning"], rows),
        single=macs_of(graphs["vanilla"], 1),
        fidelity=macs_of(graphs["fidelity"], 1),
        parameters=_parameters(graphs, source.tensor_shapes()),
        further=further,
    )


def _further(traced: ir.Model, source: ModelSource) -> tuple[PictureCost, ...]:
    """Rows of self-attention reuse and DeepCache, counted on the graphs that each of their actions runs."""

    @cache
    def macs(graph: str, rows: int) -> Macs:
        return macs_of(cut(traced, recipe(graph)), rows)

    def count(part: str, graph: str, rows: int) -> int:
        found: int = getattr(macs(graph, rows), part)
        return found

    found = []
    for text, published in (*FURTHER.items(), UNMET):
        gate = Gate.parse(text)
        schedule = GateSchedule(source.steps, planning_steps(gate.boundary, source.steps))
        row = actions_of(gate, schedule, guided=True)
        work = Macs(*(work_of(row, 1, guided=True, count=partial(count, part)) for part in ("linear", "sdpa")))
        found.append(PictureCost(text, schedule.gate_step, work, published if source.name == "sdxl" else None, text != UNMET[0]))
    return tuple(found)


def rows_of_step(source: ModelSource) -> int:
    """Rows of an image before the gate: two under guidance, one where the model was distilled on it, as LCM and Turbo were."""
    return 1 if is_distilled(source.denoiser_config(), source.guidance_scale) else 2


def _parameters(graphs: Mapping[str, ir.Model], state: Mapping[str, tuple[int, ...]]) -> Parameters:
    """Count the parameters of a state dict that graphs use; PixArt's computed positions are in the graph and are no parameters."""
    whole, fidelity = (
        {name: value for name, value in graphs[graph].graph.initializers.items() if name in state} for graph in ("vanilla", "fidelity")
    )
    modules = {attribute for attribute, kind in TAPPED_MODULES.items() if kind == CROSS_ATTENTION}
    attention = [value for name, value in whole.items() if modules & set(name.split("."))]
    return Parameters(*(sum(map(size_of, values)) for values in (whole.values(), attention, fidelity.values())))

"""Multiply-accumulates (MACs) and parameters, counted on the nodes of the graphs that are run.

The T-GATE paper (arXiv 2404.02747, table 1) counts convolutions and linear layers, and not the two products of attention:
`Macs` keeps the two apart. Graphs are counted as they were cut; no formula of an architecture is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import onnx_ir as ir
from onnx_ir.passes import common as passes

from tgate_trt.errors import BuildError
from tgate_trt.export.cut import cut
from tgate_trt.export.trace import trace
from tgate_trt.gate.schedule import planning_steps
from tgate_trt.models.resolve import resolve
from tgate_trt.models.source import ModelSource
from tgate_trt.taps import CROSS_ATTENTION, TAPPED_MODULES, recipe

GATES = (5 / 25, 10 / 25)
"""The gate in the paper's tables, as a fraction of the steps: 5 and 10 of 25, and LCM's 1 and 2 of 4."""

PUBLISHED: Mapping[str, Mapping[int, float]] = {
    "sd15": {25: 16.938, 5: 9.875, 10: 11.641},
    "sd21": {25: 38.041, 5: 22.208, 10: 26.166},
    "sdxl": {25: 149.438, 5: 84.438, 10: 100.688},
    "pixart-alpha": {25: 107.031},
    "lcm-sdxl": {4: 11.955, 1: 11.171, 2: 11.433},
}
"""The paper's tera-MACs of a picture by the number of planning steps (for vanilla, of all steps), to compare our own counts with."""


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates."""

    linear: int = 0
    """In convolutions and in products with a parameter, which the paper counts."""
    sdpa: int = 0
    """In products of two activations, which are those of scaled dot-product attention."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.linear + self.sdpa

    def __add__(self, other: Macs) -> Macs:
        return Macs(self.linear + other.linear, self.sdpa + other.sdpa)

    def __rmul__(self, times: int) -> Macs:
        return Macs(times * self.linear, times * self.sdpa)


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


def macs_of_graph(path: Path, rows: int) -> Macs:
    """Multiply-accumulates of one call of a graph in a file; its weights are not read. See `macs_of`."""
    return macs_of(ir.load(path), rows)


def macs_of(model: ir.Model, rows: int) -> Macs:
    """Multiply-accumulates of one call of a graph.

    ``Conv``, ``Gemm``, ``MatMul`` and ``Attention`` are counted. A product is linear if an operand is a parameter or computed from
    parameters alone. Calls of local functions contain none of these (`tgate_trt.export.fuse`).

    Args:
        model: a graph, which is not changed; its parameters need no data.
        rows: rows of the batch, two an image under guidance.

    Raises:
        BuildError: if the graph lacks the shape of an operand.
    """
    model = _at(model, rows)
    fixed = set(model.graph.initializers.values())
    counted = Macs()
    for node in model.graph:
        operands = [value for value in node.inputs if value is not None]
        if fixed.issuperset(operands):
            fixed.update(node.outputs)
        if not node.domain and node.op_type in _COUNTS:
            macs = _COUNTS[node.op_type](node)
            counted += Macs(sdpa=macs) if fixed.isdisjoint(operands[:2]) else Macs(linear=macs)
    return counted


def _at(model: ir.Model, rows: int) -> ir.Model:
    """A copy with numbers for all sizes: those of the trace, and those of ONNX's inference where passes left a value without a shape.

    Only rows vary in a trace. Most sizes name them as we do, and some are expressions in the exporter's name for them.
    """
    model = model.clone()
    for value in (*model.graph.inputs, *(output for node in model.graph for output in node.outputs)):
        if value.shape is not None and not value.shape.is_static():
            symbols = {name for size in value.shape if isinstance(size, ir.SymbolicDim) for name in size.free_symbols()}
            value.shape = value.shape.evaluate(dict.fromkeys(symbols, rows))
    passes.ShapeInferencePass(data_prop=True)(model)
    return model


def _shape(value: ir.Value | None) -> tuple[int, ...]:
    if value is None or value.shape is None or not value.shape.is_static():
        raise BuildError(
            f"the graph lacks the shape of {value.name if value else 'an input'!r}, so its MACs cannot be counted; build the bundle again"
        )
    return tuple(value.shape.numpy())


def _numel(value: ir.Value | None) -> int:
    return math.prod(_shape(value))


def _conv(node: ir.Node) -> int:
    """A weight of [out, in / groups, *kernel] at every element of the output."""
    return _numel(node.outputs[0]) * math.prod(_shape(node.inputs[1])[1:])


def _matmul(node: ir.Node) -> int:
    return _numel(node.outputs[0]) * _shape(node.inputs[0])[-1]


def _gemm(node: ir.Node) -> int:
    return _numel(node.outputs[0]) * _shape(node.inputs[0])[0 if node.attributes.get_int("transA", 0) else 1]


def _attention(node: ir.Node) -> int:
    """Every query with every key, then every row of weights with every column of the values: 3-D and 4-D alike."""
    query, key, *_ = node.inputs
    return (_numel(query) + _numel(node.outputs[0])) * _shape(key)[-2]


_COUNTS: Mapping[str, Callable[[ir.Node], int]] = {"Conv": _conv, "MatMul": _matmul, "Gemm": _gemm, "Attention": _attention}


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
    """``"vanilla"``, ``"cfg-drop"`` or ``"T-GATE"``, as `tgate_trt.bench.settings` names them."""
    planning_steps: int
    """Steps before the gate; all of them without a gate."""
    macs: Macs
    published: float | None
    """The paper's tera-MACs, to compare with ``macs.linear``; None where it gives none."""

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

    def pictures(self) -> tuple[PictureCost, ...]:
        """The table's rows: vanilla, and at each of `GATES` cfg-drop (where there is guidance to drop) and T-GATE."""
        published = PUBLISHED.get(self.model, {})
        rows = [PictureCost("vanilla", self.steps, self.steps * self.vanilla, published.get(self.steps))]
        for steps in (planning_steps(gate, self.steps) for gate in GATES):
            if self.guided:
                rows.append(PictureCost("cfg-drop", steps, macs_of_picture(self.vanilla, self.single, steps, self.steps), None))
            gated = macs_of_picture(self.planning, self.fidelity, steps, self.steps)
            rows.append(PictureCost("T-GATE", steps, gated, published.get(steps)))
        return tuple(rows)


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
    )


def rows_of_step(source: ModelSource) -> int:
    """Rows of an image before the gate: two under guidance, one where the guidance scale is an input of the denoiser, as in LCM."""
    return 1 if source.denoiser_config().get("time_cond_proj_dim") else 2


def _parameters(graphs: Mapping[str, ir.Model], state: Mapping[str, tuple[int, ...]]) -> Parameters:
    """Count the parameters of a state dict that graphs use; PixArt's computed positions are in the graph and are no parameters."""
    whole, fidelity = (
        {name: value for name, value in graphs[graph].graph.initializers.items() if name in state} for graph in ("vanilla", "fidelity")
    )
    modules = {attribute for attribute, kind in TAPPED_MODULES.items() if kind == CROSS_ATTENTION}
    attention = [value for name, value in whole.items() if modules & set(name.split("."))]
    return Parameters(*(sum(map(_numel, values)) for values in (whole.values(), attention, fidelity.values())))

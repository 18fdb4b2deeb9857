"""The row of actions of a whole run with a bundle's own scheduler, and the work of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir

from tgate_trt.bundle.bundle import Bundle
from tgate_trt.bundle.manifest import TRACE, graph_file
from tgate_trt.errors import StaleBundleError
from tgate_trt.export.cut import cut
from tgate_trt.export.macs import macs_of
from tgate_trt.files import read_json
from tgate_trt.gate.actions import Action, actions_of, graphs_of, substitute, work_of
from tgate_trt.gate.gate import Gate
from tgate_trt.gate.schedule import GateSchedule
from tgate_trt.gate.scheduler import read_scheduler, schedule_of
from tgate_trt.models.source import INDEX, is_distilled
from tgate_trt.taps import recipe


@dataclass(frozen=True)
class Row:
    """What a run does, call by call."""

    gate: Gate
    schedule: GateSchedule
    guided: bool
    actions: tuple[Action, ...]
    """One for each call."""
    macs: tuple[int, ...]
    """Multiply-accumulates of each call for one image, in convolutions and products with a parameter."""
    vanilla: int
    """Those of one call without a gate."""
    missing: tuple[str, ...]
    """Graphs that the gate needs and the bundle lacks."""

    @property
    def share(self) -> float:
        """The work of the run as a share of vanilla's."""
        return sum(self.macs) / (self.vanilla * len(self.actions))


def row_of(bundle: Bundle, gate: Gate, steps: int | None = None, scheduler: Any = None) -> Row:
    """The row of a gate.

    Args:
        bundle: whose scheduler makes the steps, and whose graphs are counted; graphs that it lacks are cut from its trace.
        gate: its settings.
        steps: of the run; the model's own number if None.
        scheduler: in the place of the bundle's own.

    Raises:
        InputError: if the run is too short for the gate.
        GateError: if the gate cannot follow the scheduler.
        StaleBundleError: if the bundle's graphs were discarded.
    """
    manifest = bundle.manifest
    if TRACE not in manifest.files:
        raise StaleBundleError(f"{bundle.folder} holds no graphs to count; build it again without --discard-graphs")
    scheduler = scheduler or read_scheduler(bundle.pipeline)
    scheduler.set_timesteps(steps or manifest.steps)
    pipeline, first = SimpleNamespace(scheduler=scheduler), scheduler.timesteps[0]
    schedule = schedule_of(pipeline, first, gate.boundary)
    start = None if gate.start is None else schedule_of(pipeline, first, gate.start).gate_step
    guided = _is_guided(bundle)
    actions = actions_of(gate, schedule, guided=guided, start=start)
    trace = bundle.load_graph(TRACE)

    @cache
    def count(graph: str, rows: int) -> int:
        model = ir.load(bundle.folder / graph_file(graph)) if graph in manifest.graphs else cut(trace, recipe(graph))
        return macs_of(model, manifest.signature.sizes(rows)).linear

    macs = tuple(work_of((action,), 1, guided=guided, count=count) for action in actions)
    missing = tuple(graph for graph in graphs_of(gate) if not {graph, substitute(graph)} & manifest.graphs.keys())
    return Row(gate, schedule, guided, actions, macs, count("vanilla", 2 if guided else 1), missing)


def _is_guided(bundle: Bundle) -> bool:
    """Whether the bundle's pipeline draws with guidance by default: not one that was distilled, such as LCM's."""
    index: Mapping[str, Any] = read_json(bundle.pipeline / INDEX)
    is_lcm = str(index["_class_name"]).startswith("LatentConsistency")
    return not (is_lcm or is_distilled(bundle.denoiser_config(), bundle.manifest.guidance_scale))

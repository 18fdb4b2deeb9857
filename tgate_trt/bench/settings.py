"""The ways to draw that are compared, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tgate_trt.errors import InputError
from tgate_trt.gate.actions import graphs_of
from tgate_trt.gate.gate import Gate
from tgate_trt.gate.schedule import NONE, GateStep, planning_steps

VANILLA, CFG_DROP, TGATE, GATED = "vanilla", "cfg-drop", "T-GATE", "gate"
EAGER, COMPILED, OFFICIAL = "diffusers", "torch.compile", "official tgate"
CAPTURED, CHANNELS_LAST, CUTOFF = "diffusers, CUDA graphs", "diffusers, CUDA graphs, channels last", "diffusers, CFG cutoff"
BESIDE = {
    "eager": EAGER,
    "graphs": CAPTURED,
    "channels-last": CHANNELS_LAST,
    "cutoff": CUTOFF,
    "compile": COMPILED,
    "official": OFFICIAL,
}
"""Kinds that run no engines, by the names that the command takes."""


@dataclass(frozen=True)
class Setting:
    """One way to draw a picture.

    ``vanilla``, ``cfg-drop``, ``T-GATE`` and ``gate`` run a bundle's engines: the whole graph with guidance at every step; the whole
    graph, without guidance from the gate on; the planning graph before the gate and the fidelity graph after it; or whatever a gate in
    text form says. The others are
    PyTorch without engines: unchanged diffusers; the same with its denoiser's launches captured into CUDA graphs, so that a gain of
    ours is not that of graphs; its own callback that ends guidance at the gate; a compiled denoiser; and the official T-GATE code.
    """

    kind: str
    backend: str | None = None
    """Backend of the bundle's engines; None without engines."""
    gate_step: GateStep = NONE
    after_gate: str = "negative"
    text: str | None = None
    """Of the gate, for ``gate``."""
    steps: int | None = None
    """Sampling steps, if they differ from the other settings'."""

    @property
    def gate(self) -> Gate:
        """How runs are filled with actions."""
        if self.text is not None:
            return Gate.parse(self.text)
        if self.kind == CFG_DROP:
            return Gate(drop=self.gate_step, after=self.after_gate)
        return Gate(self.gate_step, self.after_gate)

    @property
    def graphs(self) -> tuple[str, ...]:
        """The graphs that run; without engines, the graphs that do the same work before and after the gate."""
        if self.kind == GATED:
            return graphs_of(self.gate)
        return ("planning", "fidelity") if self.kind in (TGATE, OFFICIAL) else ("vanilla", "vanilla")

    @property
    def baseline(self) -> Setting:
        """The setting that its time is divided by: vanilla on the same engines, or unchanged diffusers for PyTorch without engines."""
        return Setting(VANILLA, self.backend) if self.backend else Setting(EAGER)

    def planning_steps(self, steps: int) -> int:
        """Number of steps before the gate, in a run of ``steps``."""
        return planning_steps(self.gate.boundary, steps)

    def label(self, steps: int) -> str:
        """The name in tables and figures, for a run of ``steps``."""
        if self.text is not None:
            return self.text
        if self.steps is not None:
            return f"{self.kind} in {self.steps} steps"
        gate = "" if self.gate_step == NONE else f" g={self.planning_steps(steps)}"
        mode = "" if self.kind != TGATE or self.after_gate == "negative" else f" {self.after_gate}"
        return f"{self.kind}{gate}{mode}"


def settings_of(
    backends: Sequence[str],
    gate_steps: Sequence[GateStep],
    after_gate: Sequence[str],
    beside: Sequence[str],
    gates: Sequence[Gate] = (),
    fewer_steps: Sequence[int] = (),
) -> tuple[Setting, ...]:
    """All settings to measure, baselines first.

    Args:
        backends: backends of the engines.
        gate_steps: counts and fractions.
        after_gate: keys of `tgate_trt.gate.after_gate.AFTER_GATE`, for T-GATE.
        beside: keys of `BESIDE`.
        gates: further ones, whole.
        fewer_steps: numbers of steps in which vanilla runs too.

    Raises:
        InputError: if a value is unknown.
    """
    if NONE in gate_steps:
        raise InputError("--gate-step takes counts, fractions and noise levels here, got none; vanilla is always measured, so leave it out")
    for name in beside:
        if name not in BESIDE:
            raise InputError(f"--beside takes {', '.join(BESIDE)}, got {name!r}; see tgate-bench --help")
    ours: list[Setting] = []
    for backend in backends:
        ours += [Setting(VANILLA, backend), *(Setting(CFG_DROP, backend, gate, "positive") for gate in gate_steps)]
        ours += [Setting(TGATE, backend, gate, mode) for gate in gate_steps for mode in after_gate]
        ours += [Setting(GATED, backend, gate.boundary, text=str(gate)) for gate in gates]
        ours += [Setting(VANILLA, backend, steps=steps) for steps in fewer_steps]
    others = [Setting(EAGER)] if beside else []  # the baseline of the others
    for name in ("graphs", "channels-last", "compile"):
        others += [Setting(BESIDE[name])] if name in beside else []
    for name in ("cutoff", "official"):
        others += [Setting(BESIDE[name], None, gate) for gate in gate_steps] if name in beside else []
    return tuple(dict.fromkeys([*ours, *others]))

"""Ways to draw a picture that are compared, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tgate_trt.errors import InputError
from tgate_trt.gate.schedule import NONE, GateStep, parse_gate_step, planning_steps

VANILLA, CFG_DROP, TGATE = "vanilla", "cfg-drop", "T-GATE"
EAGER, COMPILED, OFFICIAL = "diffusers", "torch.compile", "official tgate"
BESIDE = {"eager": EAGER, "compile": COMPILED, "official": OFFICIAL}
"""What can be measured beside a bundle's engines, by the names that the command takes."""


@dataclass(frozen=True)
class Setting:
    """One way to draw a picture.

    ``vanilla``, ``cfg-drop`` and ``T-GATE`` run a bundle's engines: the whole graph with guidance at every step; the same without
    guidance from the gate on; the planning graph before the gate and the fidelity graph after it. The others are
    PyTorch without engines: diffusers as it is, its denoiser through `torch.compile`, and the official T-GATE code.
    """

    kind: str
    backend: str | None = None
    """Of the bundle's engines; None where there are none."""
    gate_step: GateStep = NONE
    after_gate: str = "negative"

    @property
    def graphs(self) -> tuple[str, str]:
        """The graphs before and after the gate, or those that do the same work."""
        return ("planning", "fidelity") if self.kind in (TGATE, OFFICIAL) else ("vanilla", "vanilla")

    @property
    def baseline(self) -> Setting:
        """What its speed is set against: vanilla by the same engines, and for PyTorch without engines diffusers as it is."""
        return Setting(VANILLA, self.backend) if self.backend else Setting(EAGER)

    def planning_steps(self, steps: int) -> int:
        """Steps before the gate."""
        return planning_steps(self.gate_step, steps)

    def label(self, steps: int) -> str:
        """How it is shown to people."""
        gate = "" if self.gate_step == NONE else f" g={self.planning_steps(steps)}"
        mode = "" if self.kind != TGATE or self.after_gate == "negative" else f" {self.after_gate}"
        return f"{self.kind}{gate}{mode}"


def settings_of(
    backends: Sequence[str], gate_steps: Sequence[str], after_gate: Sequence[str], beside: Sequence[str], default: GateStep
) -> tuple[Setting, ...]:
    """Every way that is asked for, baselines first.

    Args:
        backends: whose engines are measured.
        gate_steps: as the command takes them; the default alone if empty.
        after_gate: modes of T-GATE.
        beside: of `BESIDE`.
        default: the bundle's own gate step.

    Raises:
        InputError: if a value is none of those that there are.
    """
    gates = [parse_gate_step(text) for text in gate_steps] or [default]
    if NONE in gates:
        raise InputError("vanilla is measured in any case: --gate-step takes counts and fractions here")
    for name in beside:
        if name not in BESIDE:
            raise InputError(f"--beside takes {', '.join(BESIDE)}, got {name!r}")
    ours: list[Setting] = []
    for backend in backends:
        ours += [Setting(VANILLA, backend), *(Setting(CFG_DROP, backend, gate, "positive") for gate in gates)]
        ours += [Setting(TGATE, backend, gate, mode) for gate in gates for mode in after_gate]
    others = [Setting(EAGER)] if beside else []  # what the others are set against
    others += [Setting(COMPILED)] if "compile" in beside else []
    others += [Setting(OFFICIAL, None, gate) for gate in gates] if "official" in beside else []
    return tuple(dict.fromkeys([*ours, *others]))

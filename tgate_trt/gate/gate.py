"""A `Gate`: the settings by which a run is filled with actions, and their text form.

In text, a gate is its step, ``10``, ``0.4``, ``noise:1.35`` or ``none``, and then other settings as ``,key=value``: ``10,sp=5,warm=2``
is T-GATE's second version, ``none,deep=3`` is DeepCache, ``7,after=positive,forecast=2`` forecasts every other step after the gate,
and ``drop=10`` drops guidance at step 10 and nothing else. Commands, results and labels share this form.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tgate_trt.errors import InputError
from tgate_trt.gate.after_gate import AFTER_GATE, DEFAULT_AFTER_GATE, AfterGate, after_gate_of
from tgate_trt.gate.forecast import RULES
from tgate_trt.gate.schedule import NONE, GateStep, check_gate_step, parse_gate_step


@dataclass(frozen=True)
class Gate:
    """How a run is filled with actions; `tgate_trt.gate.actions.actions_of` does so."""

    step: GateStep = NONE
    """Planning steps: from this step on, cross-attention is reused and guidance ends."""
    after: str | None = None
    """Of `AFTER_GATE`, what a guided run keeps from then on; if None, ``"negative"``, and with ``drop`` ``"positive"``."""
    drop: GateStep | None = None
    """In the place of ``step``: from this step on guidance ends, and cross-attention is computed (cfg-drop)."""
    sp: int = 1
    """Self-attention before the gate is computed in every ``sp``-th step and else reused (``sp_interval`` of T-GATE's second version)."""
    warm: int = 0
    """Steps in which it is computed whatever ``sp`` says (``warm_up``)."""
    fi: int = 1
    """The same after the gate (``fi_interval``)."""
    deep: int | None = None
    """Steps from one in which a UNet's deep features are computed to the next; else they are reused (DeepCache's interval)."""
    branch: int = 0
    """Where they are kept (DeepCache's branch)."""
    forecast: int | None = None
    """Steps from one in which the denoiser runs to the next; between them its prediction is forecast."""
    rule: str = "linear"
    """Of `tgate_trt.gate.forecast.RULES`, how."""
    start: GateStep | None = None
    """First step that may be forecast; if None, the one after the gate's, and without a gate a quarter of the run."""
    unguided: int = 0
    """Steps at the beginning that run without guidance, on the positive half alone (guidance interval, arXiv 2404.07724)."""

    def __post_init__(self) -> None:
        """Check each setting, and that they do not contradict each other.

        Raises:
            InputError: with the setting and what it must be.
        """
        check_gate_step(self.step)
        for name in ("drop", "start"):
            if getattr(self, name) is not None:
                check_gate_step(getattr(self, name))
        if NONE in (self.start, self.drop):
            raise InputError("drop and start are steps, fractions or noise levels; leave them out for none")
        if self.after is not None:
            after_gate_of(self.after)
        for name, least in (("sp", 1), ("warm", 0), ("fi", 1), ("deep", 2), ("branch", 0), ("forecast", 2), ("unguided", 0)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise InputError(f"{name}={value} is impossible: it is a whole number, at least {least}" + _HINTS.get(name, ""))
        if self.rule not in RULES:
            raise InputError(f"rule={self.rule} is impossible: it is one of {', '.join(RULES)}")
        self._check_together()

    def _check_together(self) -> None:
        """Refuse settings that contradict each other."""
        if self.drop is not None and self.step != NONE:
            raise InputError(f"a gate has a step or drop, not both; got step {self.step} and drop={self.drop}")
        if self.fi > 1 and self.step == NONE:
            raise InputError(f"fi={self.fi} is about the steps after the gate, and there is none; name its step")
        if self.warm and self.sp == 1:
            raise InputError(f"warm={self.warm} needs sp, the interval at which self-attention is computed after the warm-up")
        if isinstance(self.boundary, int) and self.sp > 1 and self.warm >= self.boundary - 1:
            raise InputError(f"warm={self.warm} leaves nothing to reuse before the gate at step {self.boundary}; take a smaller one")
        if isinstance(self.boundary, int) and self.unguided >= self.boundary:
            raise InputError(f"unguided={self.unguided} leaves no guided step before the gate at step {self.boundary}; take a smaller one")
        if self.deep is not None and (self.sp > 1 or self.fi > 1):
            raise InputError("self-attention reuse (sp, fi) and DeepCache (deep) do not combine; choose one of them")
        if self.branch and self.deep is None:
            raise InputError(f"branch={self.branch} needs deep, the interval at which deep features are computed")
        if self.forecast is None and (self.rule != "linear" or self.start is not None):
            raise InputError("rule and start need forecast, the interval at which the denoiser runs")

    @property
    def boundary(self) -> GateStep:
        """Where guidance ends: ``step``, ``drop`` or ``"none"``."""
        return self.step if self.drop is None else self.drop

    @property
    def mode(self) -> str:
        """Of `AFTER_GATE`, what a guided run keeps from the boundary on."""
        return self.after or (DEFAULT_AFTER_GATE if self.drop is None else "positive")

    @property
    def after_gate(self) -> AfterGate:
        """The same, as data."""
        return AFTER_GATE[self.mode]

    @classmethod
    def parse(cls, text: str) -> Gate:
        """Read a gate's text form.

        Raises:
            InputError: if the text is none, with the part that is not understood.
        """
        first, *others = text.split(",")
        settings: dict[str, Any] = {}
        if "=" in first and not first.startswith("noise:"):
            others.insert(0, first)
        else:
            settings["step"] = parse_gate_step(first)
        for part in others:
            key, found, value = part.partition("=")
            if not found or key not in _KEYS:
                raise InputError(f"a gate is a step and settings such as sp=5, of {', '.join(_KEYS)}; got {part!r} in {text!r}")
            if key in settings:
                raise InputError(f"{key} stands twice in {text!r}")
            try:
                settings[key] = _KEYS[key](value)
            except ValueError:
                raise InputError(f"{key} is a whole number, got {value!r} in {text!r}") from None
        return cls(**settings)

    def __str__(self) -> str:
        """The text form: the step, and what differs from the defaults."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        parts = [f"{key}={value}" for key in _KEYS if (value := getattr(self, key)) != defaults[key]]
        return ",".join(parts if self.step == NONE and self.drop is not None else [str(self.step), *parts])


_HINTS = {"forecast": "; forecast=2 runs the denoiser in every other step", "deep": "; deep=3 computes them in every third step"}

_KEYS: Mapping[str, Callable[[str], Any]] = {
    "drop": parse_gate_step,
    "after": str,
    "sp": int,
    "warm": int,
    "fi": int,
    "deep": int,
    "branch": int,
    "forecast": int,
    "rule": str,
    "start": parse_gate_step,
    "unguided": int,
}
"""Settings of the text form in its order, and how each is read."""


def gate_of(gate: Gate | str | int | float) -> Gate:
    """A gate from a gate, its text form, or its step alone.

    Raises:
        InputError: if it is none.
    """
    if isinstance(gate, Gate):
        return gate
    return Gate.parse(gate) if isinstance(gate, str) else Gate(check_gate_step(gate))

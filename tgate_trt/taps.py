"""Taps, and the graphs cut at them: every method is a line of data here.

A *tap* is a named value in the trace of a denoiser. A *graph* is that trace with some kinds of tap given out and some
taken in; what the cut leaves without a use falls away, weights too.
"""

from __future__ import annotations

from dataclasses import dataclass

from tgate_trt.errors import InputError

CROSS_ATTENTION = "cross_attention"
SELF_ATTENTION = "self_attention"

TAPPED_MODULES = {"attn2": CROSS_ATTENTION, "attn1": SELF_ATTENTION}
"""Kind of tap by the attribute under which diffusers' transformer blocks hold the attention module.

The value tapped is the module's output: after ``to_out`` and before the residual sum, as the official code caches it.
"""


@dataclass(frozen=True)
class Recipe:
    """How one graph is cut from the trace."""

    takes_in: tuple[str, ...] = ()
    """Kinds of tap whose values become inputs."""
    gives_out: tuple[str, ...] = ()
    """Kinds of tap whose values become outputs."""


GRAPHS = {
    "vanilla": Recipe(),
    "planning": Recipe(gives_out=(CROSS_ATTENTION,)),
    "fidelity": Recipe(takes_in=(CROSS_ATTENTION,)),
}


def recipe(graph: str) -> Recipe:
    """The recipe of a graph by name.

    Raises:
        InputError: if there is no graph of that name.
    """
    if graph not in GRAPHS:
        raise InputError(f"there is no graph {graph!r}; choose from {', '.join(GRAPHS)}")
    return GRAPHS[graph]


def tap_of(module_path: str, tapped: tuple[str, ...]) -> str | None:
    """Name of the tap on a module, or None if the module is not tapped.

    ``down_blocks.1.attentions.0.transformer_blocks.0.attn2`` carries the tap
    ``cross_attention.down_blocks.1.attentions.0.transformer_blocks.0``.

    Args:
        module_path: path of the module in the denoiser.
        tapped: attributes that are tapped, of `TAPPED_MODULES`.
    """
    block, _, attribute = module_path.rpartition(".")
    if attribute not in tapped or ".transformer_blocks." not in f".{block}":
        return None
    return f"{TAPPED_MODULES[attribute]}.{block}"


def kind_of(tap: str) -> str:
    """The kind of a tap: ``cross_attention`` of ``cross_attention.mid_block…``."""
    return tap.partition(".")[0]

"""Taps, and the graphs that are cut at them: each method is a line of data here.

A *tap* is a named value in the trace of a denoiser. A *graph* is the trace with some kinds of tap as outputs and some as inputs,
without the nodes and weights that it then does not need.
"""

from __future__ import annotations

from dataclasses import dataclass

from tgate_trt.errors import InputError

CROSS_ATTENTION = "cross_attention"
SELF_ATTENTION = "self_attention"

TAPPED_MODULES = {"attn2": CROSS_ATTENTION, "attn1": SELF_ATTENTION}
"""Kind of tap, by the attribute of diffusers' transformer blocks that holds the attention module.

The tapped value is the module's output, after ``to_out`` and before the residual sum, as in the official code.
"""


@dataclass(frozen=True)
class Recipe:
    """The cut that makes one graph from the trace."""

    takes_in: tuple[str, ...] = ()
    """Kinds of tap that become inputs."""
    gives_out: tuple[str, ...] = ()
    """Kinds of tap that become outputs."""


GRAPHS = {
    "vanilla": Recipe(),
    "planning": Recipe(gives_out=(CROSS_ATTENTION,)),
    "fidelity": Recipe(takes_in=(CROSS_ATTENTION,)),
}


def recipe(graph: str) -> Recipe:
    """The recipe of the graph of that name.

    Raises:
        InputError: if there is none.
    """
    if graph not in GRAPHS:
        raise InputError(f"there is no graph {graph!r}; choose from {', '.join(GRAPHS)}")
    return GRAPHS[graph]


def tap_of(module_path: str, tapped: tuple[str, ...]) -> str | None:
    """The name of a module's tap, or None if the module is not tapped.

    ``down_blocks.1.attentions.0.transformer_blocks.0.attn2`` carries the tap
    ``cross_attention.down_blocks.1.attentions.0.transformer_blocks.0``.

    Args:
        module_path: path of the module in the denoiser.
        tapped: the tapped attributes, of `TAPPED_MODULES`.
    """
    block, _, attribute = module_path.rpartition(".")
    if attribute not in tapped or ".transformer_blocks." not in f".{block}":
        return None
    return f"{TAPPED_MODULES[attribute]}.{block}"


def kind_of(tap: str) -> str:
    """The kind of a tap, such as ``cross_attention`` for ``cross_attention.mid_block…``."""
    return tap.partition(".")[0]

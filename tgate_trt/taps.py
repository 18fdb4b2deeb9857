"""Taps, and the graphs that are cut at them: each method is a line of data here.

A *tap* is a named value in the trace of a denoiser. A *graph* is the trace with some kinds of tap as outputs and some as inputs,
without the nodes and weights that it then does not need.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tgate_trt.errors import InputError

CROSS_ATTENTION = "cross_attention"
SELF_ATTENTION = "self_attention"
DEEP_FEATURES = "deep_features"
"""Of a UNet: what its upper part receives from the deeper one. Each branch is a kind of its own, see `deep_features`."""

TAPPED_MODULES = {
    "attn2": CROSS_ATTENTION,
    "attn1": SELF_ATTENTION,
    "cross_attention": CROSS_ATTENTION,
    "self_attention": SELF_ATTENTION,
}
"""Kind of tap, by the attribute of diffusers' transformer blocks that holds the attention module.

The tapped value is the module's output, after ``to_out`` and before the residual sum, as in the official code.
"""

LAYERS_OF_A_BRANCH = 3
"""Branches that DeepCache counts in a block of a UNet (its ``cache_branch_id`` is ``3 · block + layer``)."""


def deep_features(branch: int) -> str:
    """The kind of tap at which DeepCache's branch of that number leaves the UNet: 0 keeps the least of it."""
    return f"{DEEP_FEATURES}_{branch}"


def branch_of(kind: str) -> int | None:
    """The branch of a kind of tap that is deep features; None for another kind."""
    return int(kind.rpartition("_")[2]) if kind.startswith(DEEP_FEATURES) else None


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
"""The graphs with names of their own; `graph_name` composes those of all others."""

_PARTS = re.compile(r"(?:(planning|fidelity)|(keep|reuse)-(self|deep(\d+)))(?:-|$)")


def recipe(graph: str) -> Recipe:
    """The recipe of the graph of that name.

    The name of a graph is ``vanilla``, or of these parts those that apply, joined by hyphens: ``planning`` gives out cross-attention
    and ``fidelity`` takes it in; ``keep-self`` and ``reuse-self`` do so with self-attention, ``keep-deep0`` and ``reuse-deep0`` with
    the deep features of branch 0.

    Raises:
        InputError: if there is none.
    """
    if graph in GRAPHS:
        return GRAPHS[graph]
    taken: list[str] = []
    given: list[str] = []
    place = 0
    while place < len(graph) and (part := _PARTS.match(graph, place)):
        place = part.end()
        if part[1]:
            (given if part[1] == "planning" else taken).append(CROSS_ATTENTION)
        else:
            kind = SELF_ATTENTION if part[3] == "self" else deep_features(int(part[4]))
            (given if part[2] == "keep" else taken).append(kind)
    found = Recipe(tuple(taken), tuple(given))
    if place < len(graph) or not graph or graph_name(found) != graph:
        raise InputError(f"there is no graph {graph!r}; choose from {', '.join(GRAPHS)}, or name a gate with --gate")
    return found


def graph_name(recipe: Recipe) -> str:
    """The name of a recipe's graph; see `recipe`."""
    parts: list[str] = []
    for verb, kinds in (("keep", recipe.gives_out), ("reuse", recipe.takes_in)):
        for kind in sorted(kinds, reverse=True):
            if kind == CROSS_ATTENTION:
                parts.insert(0, "planning" if verb == "keep" else "fidelity")
            else:
                parts.append(f"{verb}-self" if kind == SELF_ATTENTION else f"{verb}-deep{branch_of(kind)}")
    return "-".join(parts) or "vanilla"


def is_of_denoiser(graph: str) -> bool:
    """Whether a graph is cut from the denoiser's trace; else it is a component's."""
    try:
        recipe(graph)
    except InputError:
        return False
    return True


def kind_of(tap: str) -> str:
    """The kind of a tap, such as ``cross_attention`` for ``cross_attention.mid_block…``."""
    return tap.partition(".")[0]

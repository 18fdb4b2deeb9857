"""The null-text swap: text for some of the steps and the null prompt for the others (arXiv 2404.02747, section 3, figure 3).

``S^F`` has the text in the first m steps and the null prompt after them; ``S^L`` has the null prompt first and then the text. The null
prompt is the prompt of the negative half, so guidance ``n + s·(p − n)`` gives ``n`` in the steps without text; without guidance it is
the empty prompt. Cross-attention is computed at every step, so the experiment is about text and not about a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from tgate_trt.analysis.calls import Call, watching
from tgate_trt.analysis.outcomes import Outcome, Series
from tgate_trt.analysis.subject import Subject
from tgate_trt.gate.schedule import NONE

TEXT_FIRST, TEXT_LAST = "text first", "text last"
"""S^F and S^L."""

_TEXT = ("encoder_hidden_states", "encoder_attention_mask", "text_embeds")
"""Names of an encoded prompt among a denoiser's keywords and in its ``added_cond_kwargs``, without sizes and crops."""


def measure(subject: Subject, progress: Callable[[], None]) -> dict[str, Series]:
    """Draw with the text in the first or in the last steps alone, for every m from 0 to T.

    ``S^F`` with m = T and ``S^L`` with m = 0 are vanilla; the other ends of both orders are the null prompt.

    Args:
        subject: the subject, with its engines.
        progress: called for every m of both orders.

    Returns:
        The results by order, `TEXT_FIRST` and `TEXT_LAST`.
    """
    null = null_prompt(subject)
    known: dict[tuple[bool, ...], Outcome] = {(True,) * subject.steps: subject.compare(subject.vanilla)}

    def outcome(order: str, m: int) -> Outcome:
        plan = text_steps(order, m, subject.steps)
        if plan not in known:
            known[plan] = subject.compare(draw(subject, plan, null))
        progress()
        return known[plan]

    at = tuple(range(subject.steps + 1))
    return {order: Series(at, tuple(outcome(order, m) for m in at)) for order in (TEXT_FIRST, TEXT_LAST)}


def text_steps(order: str, m: int, steps: int) -> tuple[bool, ...]:
    """Whether each step has the text, for an order and its m."""
    return tuple((step < m) == (order == TEXT_FIRST) for step in range(steps))


def draw(subject: Subject, plan: Sequence[bool], null: Mapping[str, Tensor]) -> Tensor:
    """Draw every picture, ``[pictures, 3, height, width]``, uint8.

    Args:
        subject: the subject, with its engines.
        plan: whether each step has the text.
        null: the null prompt; see `null_prompt`.
    """

    def swap(call: Call, keywords: dict[str, Any]) -> dict[str, Any] | None:
        return None if plan[call.step] else _with_text(keywords, null)

    with watching(subject.pipeline, subject.denoiser, swap):
        return subject.draw(NONE)


def null_prompt(subject: Subject) -> dict[str, Tensor]:
    """The null prompt in the denoiser's tensors, one row of each, from a short run with the empty prompt.

    The first row of such a run belongs to the negative half with guidance, and to the empty prompt without it.
    """
    found: dict[str, Tensor] = {}

    def look(_call: Call, keywords: dict[str, Any]) -> None:
        found.update({name: tensor[:1].clone() for name, tensor in _text_of(keywords).items()})

    with watching(subject.pipeline, subject.denoiser, look):
        subject.warm_up("")
    return found


def _text_of(keywords: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a call that hold the encoded prompt."""
    given = {**keywords, **(keywords.get("added_cond_kwargs") or {})}
    return {name: given[name] for name in _TEXT if given.get(name) is not None}


def _with_text(keywords: Mapping[str, Any], text: Mapping[str, Tensor]) -> dict[str, Any]:
    """The keywords of a call, with another text in every row."""
    rows = {name: text[name].expand_as(tensor) for name, tensor in _text_of(keywords).items()}
    replaced = {name: rows.get(name, value) for name, value in keywords.items()}
    added = keywords.get("added_cond_kwargs")
    return replaced | ({"added_cond_kwargs": {name: rows.get(name, value) for name, value in added.items()}} if added else {})

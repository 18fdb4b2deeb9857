"""The prompts of pictures, and what the pictures of the demo model must show."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from tgate_trt import demo
from tgate_trt.demo.dataset import Captioned, examples, parse
from tgate_trt.errors import InputError

T = TypeVar("T")

PROMPTS = (
    "a photograph of an astronaut riding a horse",
    "a red bus parked beside a yellow house",
    "two cats sleeping on a blue sofa",
    "an oil painting of a lighthouse in a storm",
)
"""The prompts of every model but the demo model, unless others are given."""

DEMO_SAMPLES = 100
"""The number of the demo model's held-out captions, unless another is given."""


def prompts_of(
    model: str, prompts: Sequence[str], samples: int | None = None, seed: int = 0
) -> tuple[tuple[str, ...], tuple[Captioned, ...] | None]:
    """The prompt of each picture, and what each picture must show if a scorer can read it.

    Args:
        model: name of the model.
        prompts: prompts to take in turn; held-out captions of the demo model, or `PROMPTS` of any other model, if empty.
        samples: number of pictures; one for each prompt if None.
        seed: seed of the demo model's captions.

    Returns:
        The prompts, and the captions with their combinations; None for the latter unless all prompts are captions of the demo model.

    Raises:
        InputError: if ``samples`` is below 1.
    """
    if samples is not None and samples < 1:
        raise InputError(f"samples must be at least 1, got {samples}; choose another number of pictures")
    captioned = _parsed(prompts) if prompts and model == demo.NAME else held_out(model, samples or DEMO_SAMPLES, seed)
    texts = prompts or [each.caption for each in captioned] or PROMPTS
    count = samples or len(texts)
    return in_turn(texts, count), in_turn(captioned, count) or None


def held_out(model: str, count: int, seed: int = 0) -> list[Captioned]:
    """At most ``count`` captions held out of the demo model's training; none for any other model, whose pictures no scorer can read."""
    return examples(count, held_out=True, seed=seed) if model == demo.NAME else []


def in_turn(values: Sequence[T], count: int) -> tuple[T, ...]:
    """So many of the values, from the first again after the last; none if there are no values."""
    return tuple(itertools.islice(itertools.cycle(values), count))


def read_prompts(file: Path) -> tuple[str, ...]:
    """The prompts of a text file, one on each line; empty lines are skipped.

    Raises:
        InputError: if the file cannot be read, or holds no prompts.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read prompts from {file}: {reason}; choose a text file with one prompt on each line") from error
    prompts = tuple(line for line in lines if line)
    if not prompts:
        raise InputError(f"{file} holds no prompts; write one prompt on each line")
    return prompts


def _parsed(prompts: Sequence[str]) -> list[Captioned]:
    """The combination of each caption; empty if a prompt is not a caption."""
    try:
        return [Captioned(prompt, parse(prompt)) for prompt in prompts]
    except ValueError:
        return []

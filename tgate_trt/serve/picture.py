"""What is asked of a service, one picture, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass, field

from PIL import Image

from tgate_trt.errors import InputError

LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Request:
    """One picture to draw. None stands for the model's own value.

    Raises:
        InputError: if a number is impossible.
    """

    prompt: str
    negative_prompt: str | None = None
    steps: int | None = None
    """Sampling steps."""
    guidance_scale: float | None = None
    seed: int = 0
    """Of the noise: one seed is one picture."""
    gate: str | None = None
    """In text form, such as ``"10"`` or ``"7,after=positive,forecast=2"``, or the name of one that the bundle holds; its own if None."""
    after_gate: str | None = None
    """What a guided run does from the gate on, where ``gate`` does not say."""
    width: int | None = None
    """Pixels."""
    height: int | None = None
    """Pixels."""
    image: Image.Image | None = field(default=None, repr=False)
    """A picture to start from, of any size."""
    mask: Image.Image | None = field(default=None, repr=False)
    """Where to draw anew: white, or transparent if the mask has transparency; needs ``image``."""
    strength: float | None = None
    """How much of ``image`` is drawn anew, from 0 to 1."""
    previews: int = 0
    """Pictures to give while it is drawn, spread over the steps."""

    def __post_init__(self) -> None:
        """Check each number."""
        if self.steps is not None and self.steps < 1:
            raise InputError(f"steps must be at least 1, got {self.steps}; choose another number of steps")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise InputError(f"a seed is a number from 0 to {LARGEST_SEED}, got {self.seed}; choose another seed")
        if self.previews < 0:
            raise InputError(f"previews must be at least 0, got {self.previews}")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise InputError(f"strength is above 0 and at most 1, got {self.strength}")
        if self.image is None and (self.mask is not None or self.strength is not None):
            raise InputError("a mask and a strength need a picture to start from; give an image too")


@dataclass(frozen=True)
class Times:
    """Seconds of one picture, from submission to its end."""

    queue: float = 0.0
    """Until a pipeline was free."""
    encode: float = 0.0
    """Of prompt and start picture, until the first step."""
    planning: float = 0.0
    """In planning calls of engines, with the wait for their batches."""
    fidelity: float = 0.0
    """The same from the gate on."""
    hand_off: float = 0.0
    forecast: float = 0.0
    """In predictions without an engine."""
    decode: float = 0.0
    """From the last step to the picture."""
    previews: float = 0.0
    """In decoding pictures that were given on the way."""
    waiting: float = 0.0
    """For other batches, of all engines; a part of the others."""
    total: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a picture took."""

    seed: int
    times: Times
    steps: dict[str, int]
    """Calls of the denoiser by what they did: ``"planning"``, ``"fidelity"``, ``"forecast"``."""
    tokens: int = 0
    """Of the prompt."""


@dataclass(frozen=True, kw_only=True)
class Picture(Record):
    """A picture, and what it took."""

    image: Image.Image

    @property
    def record(self) -> Record:
        """What it took, without the picture."""
        return Record(seed=self.seed, times=self.times, steps=self.steps, tokens=self.tokens)


@dataclass(frozen=True)
class Preview:
    """A picture that is not finished."""

    image: Image.Image
    index: int
    """From 0."""
    step: int
    """After which it was made, from 1."""
    steps: int
    """Of the run."""

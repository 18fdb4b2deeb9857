"""What a server takes at most from whoever can reach it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of one request. Sizes of pictures are the bundle's own."""

    body: int = 32 * 2**20
    """Bytes of a request's body."""
    body_seconds: float = 30.0
    """Until a body must be here."""
    bodies: int = 256 * 2**20
    """Bytes of all bodies that are held at a time."""
    pixels: int = 16 * 2**20
    """Of an uploaded picture, before it is scaled to the bundle's size."""
    prompt: int = 8000
    """Characters of a prompt; the model's tokens are the narrower bound."""
    steps: int = 200
    """Sampling steps."""
    images: int = 8
    """Pictures of one request."""
    previews: int = 3
    """Partial images of one picture, as in OpenAI's API."""
    seconds: float = 600.0
    """Until a picture must be drawn, its wait included."""

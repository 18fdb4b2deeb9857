"""Find the pipeline that calls a denoiser, so that a denoiser which several pipelines share serves each by its own scheduler."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

_ATTRIBUTES = ("unet", "transformer")


def calling_pipeline(denoiser: object) -> tuple[Any, FrameType] | None:
    """The pipeline whose method calls the denoiser, and the frame of that method; None if the caller is no pipeline.

    diffusers makes pipelines from others (`from_pipe`, ``components``, `AutoPipelineFor…`) that share the denoiser and know
    nothing of each other. Which of them calls shows only on the stack: it is the ``self`` of the nearest method that has a
    scheduler and this denoiser.
    """
    for frame in _callers(sys._getframe(1)):
        names = frame.f_code.co_varnames
        if names and names[0] == "self":
            owner = frame.f_locals.get("self")
            if any(vars_of(owner).get(attribute) is denoiser for attribute in _ATTRIBUTES) and hasattr(owner, "scheduler"):
                return owner, frame
    return None


def vars_of(owner: object) -> dict[str, Any]:
    """An object's own attributes, without running code of its class."""
    found = getattr(owner, "__dict__", {})
    return found if isinstance(found, dict) else {}


def is_executing(frame: FrameType) -> bool:
    """Whether a frame is on the stack of any thread."""
    return any(caller is frame for top in sys._current_frames().values() for caller in _callers(top))


def is_of_this_thread(frame: FrameType) -> bool:
    """Whether a frame is on the stack of the thread that asks."""
    return any(caller is frame for caller in _callers(sys._getframe(1)))


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back

"""The observer of a denoiser surrounds the parts of a run, and no other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

import tgate_trt
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.gate.denoiser import FIDELITY, HAND_OFF, PLANNING
from tgate_trt.running.drawing import Drawing, draw, prepare


def test_an_observer_surrounds_each_part_of_a_run_and_changes_no_picture(sd_bundle: Bundle) -> None:
    seen: list[str] = []

    @contextlib.contextmanager
    def observer(part: str) -> Iterator[None]:
        seen.append(part)
        yield
        seen.append(f"end of {part}")

    pipeline = prepare(tgate_trt.load(sd_bundle, gate_step=2, threads=1), "ddim")
    drawing = Drawing(("a red fox",), steps=3).of(sd_bundle)
    expected = draw(pipeline, drawing, output_type="latent")
    pipeline.unet.observer = observer
    assert torch.equal(draw(pipeline, drawing, output_type="latent"), expected)
    parts = [PLANNING, PLANNING, HAND_OFF, FIDELITY]
    assert seen == [text for part in parts for text in (part, f"end of {part}")]
    pipeline.unet.observer = None
    draw(pipeline, drawing, output_type="latent")
    assert len(seen) == 2 * len(parts)

"""A drawing gives the same pictures from the same noise, whatever draws it and in whatever batches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tgate_trt
from tgate_trt.demo import MODEL_DIR
from tgate_trt.demo.dataset import examples
from tgate_trt.demo.evaluate import load_pipeline
from tgate_trt.errors import InputError
from tgate_trt.running.drawing import Drawing, draw, draw_columns, to_bytes


def dice(prompt: list[str], *, generator: list[torch.Generator], **settings: Any) -> SimpleNamespace:
    """A pipeline whose picture is its prompt, the first number of its generator, and the other keywords."""
    numbers = [int(torch.randint(1000, (), generator=one)) for one in generator]
    return SimpleNamespace(images=[(text, number, settings) for text, number in zip(prompt, numbers, strict=True)])


PROMPTS = tuple(f"prompt {number}" for number in range(5))


def number_of(seed: int) -> int:
    return int(torch.randint(1000, (), generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_each_picture_has_its_own_noise_in_any_batch(size: int) -> None:
    drawing = Drawing(PROMPTS, seed=3, height=8)
    drawn = [picture for batch in drawing.batches(size) for picture in draw(dice, batch)]
    assert drawn == [(prompt, number_of(3 + number), {"height": 8}) for number, prompt in enumerate(PROMPTS)]


def test_a_pipeline_receives_what_is_set_and_nothing_else() -> None:
    ((_, _, bare),) = draw(dice, Drawing(("a",)))
    assert bare == {}
    drawing = Drawing(("a", "b"), negative_prompt="c", steps=4, guidance_scale=2.0, scheduler="ddim", width=16)
    (_, _, given), _ = draw(dice, drawing, output_type="latent")
    assert given == {"negative_prompt": ["c", "c"], "num_inference_steps": 4, "guidance_scale": 2.0, "width": 16, "output_type": "latent"}


def test_pixart_keeps_the_size_of_its_graphs() -> None:
    def binned(use_resolution_binning: bool = True, **others: Any) -> SimpleNamespace:
        return SimpleNamespace(images=[use_resolution_binning])

    assert draw(binned, Drawing(("a",))) == [False]


def test_a_drawing_has_at_least_one_step() -> None:
    with pytest.raises(InputError, match="steps must be at least 1, got 0; choose another number of steps"):
        Drawing(("a",), steps=0)


def test_bytes_are_those_of_the_pictures_in_any_batch() -> None:
    pipeline = load_pipeline(MODEL_DIR)
    drawing = Drawing(tuple(example.caption for example in examples(3, held_out=True)), steps=2, guidance_scale=2.0, seed=4)
    together, apart = (torch.cat([to_bytes(draw(pipeline, batch, output_type="pt")) for batch in drawing.batches(size)]) for size in (3, 1))
    assert together.shape == (3, 3, 64, 64) and together.dtype == torch.uint8
    assert (together.int() - apart.int()).abs().max() <= 2
    files = [torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(64, 64, 3) for picture in draw(pipeline, drawing)]
    assert torch.equal(together, torch.stack(files).permute(0, 3, 1, 2))
    assert (together[0].int() - together[1].int()).abs().max() > 25


@pytest.mark.parametrize("seed", [10**20, -1, 2**63 - 1])
def test_a_seed_that_is_none_is_refused(seed: int) -> None:
    with pytest.raises(InputError, match=r"a seed is a number from 0 to \d+, got"):
        Drawing(("a", "b"), seed=seed)


def test_more_steps_than_the_scheduler_has_are_refused(tiny_sd: Path, tmp_path: Path) -> None:
    bundle = tgate_trt.build(tiny_sd, tmp_path / "bundle", verify=False, components=False)
    with pytest.raises(InputError, match="DDIMScheduler has 1000 steps at most, got 1001"):
        draw_columns(bundle.folder, Drawing(("a",), steps=1001))


def test_a_pipeline_that_draws_from_pictures_is_refused(tiny_sd: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_sd, tmp_path / "model"))
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionInpaintPipeline"}))
    bundle = tgate_trt.build(model, tmp_path / "bundle", verify=False, components=False)
    with pytest.raises(InputError, match="StableDiffusionInpaintPipeline draws from pictures, and tgate-generate draws from prompts alone"):
        draw_columns(bundle.folder, Drawing(("a",), steps=2))

"""The shipped weights: they load without a network, are small, and draw captions that training never used."""

from typing import Any

import pytest

from tgate_trt.demo import GUIDANCE_SCALE, MODEL_DIR, NUM_INFERENCE_STEPS
from tgate_trt.demo.dataset import ATTRIBUTES, PICTURE_SIZE, SHORT_TEMPLATES, caption, examples
from tgate_trt.demo.evaluate import evaluate, load_pipeline
from tgate_trt.demo.scorer import read
from tgate_trt.demo.training.architecture import CAPTION_TOKENS
from tgate_trt.running.drawing import SCHEDULERS, Drawing, draw, prepare


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return load_pipeline(MODEL_DIR)


def test_the_model_is_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in MODEL_DIR.rglob("*") if path.is_file()) <= 20e6


def test_nothing_in_the_model_is_pickled() -> None:
    assert {path.suffix for path in MODEL_DIR.rglob("*") if path.is_file()} == {".json", ".safetensors"}


def test_every_level_has_cross_attention(pipeline: Any) -> None:
    config = pipeline.unet.config
    assert set(config.down_block_types) == {"CrossAttnDownBlock2D"}
    assert config.mid_block_type == "UNetMidBlock2DCrossAttn"
    assert set(config.up_block_types) == {"CrossAttnUpBlock2D"}


def test_prompts_and_positions_have_the_same_length(pipeline: Any) -> None:
    assert pipeline.tokenizer.model_max_length == pipeline.text_encoder.config.max_position_embeddings == CAPTION_TOKENS


def test_other_schedulers_take_over_what_they_need(pipeline: Any) -> None:
    from diffusers import DDIMScheduler

    config = DDIMScheduler.from_config(pipeline.scheduler.config).config
    assert config.prediction_type == "v_prediction"
    assert config.clip_sample is False


def test_held_out_captions_are_drawn_right(pipeline: Any) -> None:
    captioned = examples(12, held_out=True, seed=7)
    score = evaluate(pipeline, captioned, steps=NUM_INFERENCE_STEPS, guidance_scale=GUIDANCE_SCALE, seed=7)
    assert score.overall.correct >= 11, {name: str(share) for name, share in score.attributes.items()}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_draws_captions_right(name: str) -> None:
    captioned = examples(4, held_out=True, seed=11)
    pipeline = prepare(load_pipeline(MODEL_DIR), name)
    score = evaluate(pipeline, captioned, steps=NUM_INFERENCE_STEPS, guidance_scale=GUIDANCE_SCALE, seed=11)
    assert score.overall.correct >= 3, {name: str(share) for name, share in score.attributes.items()}


@pytest.mark.parametrize("template", SHORT_TEMPLATES)
def test_a_short_prompt_draws_what_it_names_and_nothing_odd(template: str, pipeline: Any) -> None:
    chosen = [example.combination for example in examples(4, held_out=False, seed=13)]
    drawing = Drawing(tuple(caption(each, template=template) for each in chosen), steps=NUM_INFERENCE_STEPS, guidance_scale=GUIDANCE_SCALE)
    named = [attribute for attribute in ATTRIBUTES if f"{{{attribute}}}" in template]
    right = 0
    for picture, expected in zip(draw(pipeline, drawing), chosen, strict=True):
        found = read(picture)
        right += None not in vars(found).values() and all(found.agreement(expected)[attribute] for attribute in named)
    assert right >= 3


def test_the_default_picture_has_the_data_sets_size(pipeline: Any) -> None:
    assert pipeline("a large red circle", num_inference_steps=1).images[0].size == (PICTURE_SIZE, PICTURE_SIZE)

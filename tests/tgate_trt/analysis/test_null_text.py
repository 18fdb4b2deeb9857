"""The null-text swap: its ends are the pictures of the prompt and of the null prompt, and each step has the text it should have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tgate_trt.analysis.null_text import TEXT_FIRST, TEXT_LAST, draw, measure, null_prompt, text_steps
from tgate_trt.analysis.subject import Subject
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.running.drawing import Drawing

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 3


def subject_of(bundle: Bundle, *prompts: str, **settings: Any) -> Subject:
    return Subject(bundle, Drawing(prompts, steps=STEPS, **settings), "onnxruntime")


def swapped(subject: Subject, order: str, m: int) -> Tensor:
    return draw(subject, text_steps(order, m, STEPS), null_prompt(subject))


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
@pytest.mark.parametrize("scheduler", ["ddim", "heun"])
def test_the_ends_are_vanilla_and_the_null_prompt(sd_bundle: Bundle, scheduler: str, guidance_scale: float) -> None:
    subject = subject_of(sd_bundle, "a red fox", scheduler=scheduler, guidance_scale=guidance_scale)
    null = subject_of(sd_bundle, "", scheduler=scheduler, guidance_scale=guidance_scale).vanilla
    assert not torch.equal(subject.vanilla, null)
    assert torch.equal(swapped(subject, TEXT_FIRST, STEPS), subject.vanilla)
    assert torch.equal(swapped(subject, TEXT_LAST, 0), subject.vanilla)
    assert torch.equal(swapped(subject, TEXT_FIRST, 0), null)
    assert torch.equal(swapped(subject, TEXT_LAST, STEPS), null)
    between = swapped(subject, TEXT_FIRST, 1)
    assert not torch.equal(between, null) and not torch.equal(between, subject.vanilla)


def test_pooled_text_is_swapped_too(sdxl_bundle: Bundle) -> None:
    subject = subject_of(sdxl_bundle, "a red fox")
    encoded = subject.pipeline.encode_prompt("a red fox", num_images_per_prompt=1, do_classifier_free_guidance=True)
    null, pooled = torch.zeros_like(encoded[0]), torch.zeros_like(encoded[2])  # SDXL's null prompt: `force_zeros_for_empty_prompt`
    picture = subject.pipeline(
        prompt_embeds=null,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=null,
        negative_pooled_prompt_embeds=pooled,
        num_inference_steps=STEPS,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    assert torch.equal(swapped(subject, TEXT_FIRST, 0), (picture * 255).round().to(torch.uint8))


def test_each_call_has_the_text_of_its_step(sd_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = subject_of(sd_bundle, "a red fox", "two birds", scheduler="heun")
    null, engine = null_prompt(subject), subject.gated.engines["planning"]
    is_null: list[bool] = []

    def run(inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        text, row = inputs["encoder_hidden_states"], null["encoder_hidden_states"]
        torch.testing.assert_close(text[:2], row.expand_as(text[:2]))
        is_null.append(torch.equal(text[2:], row.expand_as(text[2:])))
        type(engine).run(engine, inputs, outputs)

    monkeypatch.setattr(engine, "run", run)
    draw(subject, text_steps(TEXT_FIRST, 2, STEPS), null)
    assert is_null == [False, False, False, False, True]  # Heun calls twice a step, but for the last
    is_null.clear()
    draw(subject, text_steps(TEXT_LAST, 1, STEPS), null)
    assert is_null == [True, True, False, False, False]


def test_every_m_is_measured(sd_bundle: Bundle) -> None:
    subject = subject_of(sd_bundle, "a red fox", "two birds")
    done: list[int] = []
    found = measure(subject, lambda: done.append(1))
    assert list(found) == [TEXT_FIRST, TEXT_LAST] and len(done) == 2 * (STEPS + 1)
    first, last = found[TEXT_FIRST], found[TEXT_LAST]
    assert first.at == last.at == tuple(range(STEPS + 1))
    assert first.distance.mean[STEPS] == last.distance.mean[0] == 0
    assert first.distance.mean[0] == last.distance.mean[STEPS] > 0
    assert first.accuracy is None

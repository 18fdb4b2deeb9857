"""A denoiser that several pipelines share serves each as a denoiser of its own would, or refuses its first call."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tgate_trt
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.errors import GateError
from tgate_trt.running.drawing import scheduler_of

PROMPTS = ("a red circle", "a small blue square", "a green triangle")


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, prompt: str = PROMPTS[0], **more: Any) -> Tensor:
    """Latents from the same noise."""
    arguments = {"num_inference_steps": 4, "output_type": "latent", "generator": torch.Generator().manual_seed(3), **more}
    latents: Tensor = pipeline(prompt, **arguments).images
    return latents


def start() -> Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(6))


@pytest.fixture
def load(sd_bundle: Bundle) -> Callable[[], Any]:
    """Loads the bundle anew."""
    return lambda: quiet(tgate_trt.load(sd_bundle, gate_step=2, threads=1))


def test_components_with_another_scheduler_object(load: Callable[[], Any]) -> None:
    from diffusers import StableDiffusionPipeline

    first, alone = load(), load()
    made = quiet(
        StableDiffusionPipeline(**{**first.components, "scheduler": copy.deepcopy(first.scheduler)}, requires_safety_checker=False)
    )
    for prompt in PROMPTS:
        assert torch.equal(draw(made, prompt), draw(alone, prompt))
    assert torch.equal(draw(first), draw(alone))


def test_schedulers_of_two_kinds_share_a_denoiser(load: Callable[[], Any]) -> None:
    from diffusers import StableDiffusionPipeline

    first, alone = load(), load()
    made = quiet(StableDiffusionPipeline(**first.components, requires_safety_checker=False))
    made.scheduler = scheduler_of(made, "heun")
    euler, heun = draw(alone), None
    alone.scheduler = scheduler_of(alone, "heun")
    heun = draw(alone)
    for _ in range(2):
        assert torch.equal(draw(first), euler)
        assert torch.equal(draw(made), heun)


@pytest.mark.parametrize("make", ["StableDiffusionImg2ImgPipeline", "AutoPipelineForImage2Image"])
def test_from_pipe_after_an_unguided_run_and_with_other_steps(make: str, load: Callable[[], Any]) -> None:
    import diffusers

    kind = getattr(diffusers, make)
    first, alone = load(), quiet(kind.from_pipe(load()))
    made = quiet(kind.from_pipe(first))
    for unguided in (True, False):
        draw(first, guidance_scale=1.0 if unguided else 7.5, num_inference_steps=5)
        for steps, strength in ((8, 0.5), (8, 1.0), (3, 0.9)):
            arguments = {"image": start(), "strength": strength, "num_inference_steps": steps}
            assert torch.equal(draw(made, **arguments), draw(alone, **arguments))


def test_a_pipeline_that_is_gone_leaves_its_denoiser_to_others(load: Callable[[], Any]) -> None:
    from diffusers import StableDiffusionPipeline

    components = load().components
    made = quiet(StableDiffusionPipeline(**components, requires_safety_checker=False))
    assert torch.equal(draw(made), draw(load()))


class Stop(Exception):
    """Raised in the middle of a run."""


def test_a_broken_run_of_one_pipeline_does_not_block_another(load: Callable[[], Any]) -> None:
    from diffusers import StableDiffusionPipeline

    def stop(_pipeline: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            raise Stop
        return values

    first = load()
    made = quiet(
        StableDiffusionPipeline(**{**first.components, "scheduler": copy.deepcopy(first.scheduler)}, requires_safety_checker=False)
    )
    with pytest.raises(Stop):
        draw(first, callback_on_step_end=stop)
    assert torch.equal(draw(made), draw(load()))


@pytest.mark.parametrize("nested_at", [0, 1, 2])
def test_a_run_of_one_pipeline_within_that_of_another_is_an_error_of_the_outer(nested_at: int, load: Callable[[], Any]) -> None:
    from diffusers import StableDiffusionPipeline

    first = load()
    made = quiet(
        StableDiffusionPipeline(**{**first.components, "scheduler": copy.deepcopy(first.scheduler)}, requires_safety_checker=False)
    )
    inner: list[Tensor] = []

    def nest(_pipeline: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == nested_at:
            inner.append(draw(made))
        return values

    with pytest.raises(GateError, match="began within this one"):
        draw(first, PROMPTS[1], callback_on_step_end=nest)
    assert torch.equal(inner[0], draw(load()))
    assert torch.equal(draw(first), inner[0])


@pytest.mark.parametrize("shared", ["the denoiser", "the pipeline"])
def test_a_second_thread_is_refused_and_the_first_draws_on_or_is_refused(shared: str, load: Callable[[], Any]) -> None:
    """A thread that begins while another is in the middle of a run gets an error, never a wrong picture."""
    from diffusers import StableDiffusionPipeline

    first, second_is_done, errors = load(), threading.Event(), list[str]()
    scheduler = copy.deepcopy(first.scheduler)
    other = first
    if shared == "the denoiser":
        other = quiet(StableDiffusionPipeline(**{**first.components, "scheduler": scheduler}, requires_safety_checker=False))

    def run_second() -> None:
        try:
            draw(other, PROMPTS[1])
        except GateError as error:
            errors.append(str(error))

    def wait(_pipeline: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            thread = threading.Thread(target=run_second)
            thread.start()
            thread.join()
            second_is_done.set()
        return values

    if shared == "the denoiser":
        assert torch.equal(draw(first, callback_on_step_end=wait), draw(load()))
    else:
        with pytest.raises(GateError):  # the second thread set the one scheduler anew
            draw(first, callback_on_step_end=wait)
    assert second_is_done.is_set()
    assert errors == [
        "another thread is in the middle of a run with this denoiser; run one after the other, or give each pipeline "
        "a denoiser of its own by tgate_trt.load or tgate_trt.apply"
    ]
    assert torch.equal(draw(first), draw(load()))


def test_several_threads_load_at_once(load: Callable[[], Any]) -> None:
    """Diffusers and accelerate patch `torch.nn.Module` while they load, for all threads; each puts back what it found."""
    patched = ("register_parameter", "register_buffer", "load_state_dict")
    before = [getattr(torch.nn.Module, name) for name in patched]
    expected, drawn, barrier = draw(load()), dict[int, Tensor](), threading.Barrier(4)

    def run(index: int) -> None:
        barrier.wait()
        pipeline = load()
        assert not any(parameter.is_meta for parameter in pipeline.vae.encoder.parameters())  # loaded at this access
        drawn[index] = draw(pipeline)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [getattr(torch.nn.Module, name) for name in patched] == before
    assert not torch.nn.Linear(2, 2).weight.is_meta
    assert len(drawn) == 4 and all(torch.equal(latents, expected) for latents in drawn.values())


def test_a_call_from_no_pipeline_with_foreign_timesteps_is_refused(load: Callable[[], Any]) -> None:
    pipeline = load()
    draw(pipeline)
    foreign = copy.deepcopy(pipeline.scheduler)
    foreign.set_timesteps(4)
    with pytest.raises(GateError, match="comes from no pipeline that has this denoiser"):
        pipeline.unet(torch.zeros(2, 4, 8, 8), foreign.timesteps[0], torch.zeros(2, 77, 32))


def test_runs_in_inference_mode_and_outside_take_turns(load: Callable[[], Any]) -> None:
    pipeline, expected = load(), draw(load())
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(draw(pipeline), expected)
        assert torch.equal(draw(pipeline), expected)
    with torch.inference_mode():
        pictures = pipeline(PROMPTS[0], num_inference_steps=2, output_type="pt").images
    assert torch.isfinite(pictures + pipeline(PROMPTS[0], num_inference_steps=2, output_type="pt").images).all()


def test_an_applied_bundle_serves_pipelines_made_afterwards(tiny_sd: Path, sd_bundle: Bundle, load: Callable[[], Any]) -> None:
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    own = quiet(DiffusionPipeline.from_pretrained(tiny_sd, torch_dtype=torch.float32, local_files_only=True))
    tgate_trt.apply(own, sd_bundle, gate_step=2, threads=1)
    made = quiet(StableDiffusionPipeline.from_pipe(own))
    draw(own, guidance_scale=1.0)
    assert (draw(made) - draw(load())).abs().max() < 1e-4

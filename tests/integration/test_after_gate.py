"""What a guided run does after the gate, against an eager sampling loop that does the same by hand: `reference`.

Compared are latents, without the VAE, within 1e-4 of the largest latent: ONNX Runtime sums in another order than PyTorch.
Runs of the same engines are compared bit for bit.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import tgate_trt
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.cli import generate
from tgate_trt.errors import InputError
from tgate_trt.gate.after_gate import AFTER_GATE
from tgate_trt.gate.denoiser import GatedDenoiser
from tgate_trt.running.drawing import scheduler_of
from tgate_trt.running.loading import load_engine

from .conftest import Pipelines

A, B = ["a red circle"], ["a small blue square"]
STEPS, SCALE = 5, 4.0
TOLERANCE = 1e-4


def draw(pipeline: Any, prompts: list[str] = A, **more: Any) -> Tensor:
    """Latents that a pipeline draws."""
    arguments = {
        "num_inference_steps": STEPS,
        "guidance_scale": SCALE,
        "latents": noise(len(prompts)),
        "generator": torch.Generator().manual_seed(9),
    }
    latents: Tensor = pipeline(prompts, **{**arguments, "output_type": "latent", **more}).images
    return latents


def noise(rows: int) -> Tensor:
    """Standard normal latents, another for each picture."""
    return torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def reference(pipeline: Any, prompts: list[str], mode: str, gate_step: int, *, reuse: bool = True, rescale: float = 0.0) -> Tensor:
    """Latents of an eager pipeline whose guidance, after the gate, is what the mode says, written out.

    Args:
        pipeline: an eager pipeline with its own UNet.
        prompts: what to draw.
        mode: of `AFTER_GATE`.
        gate_step: steps with cross-attention and two predictions.
        reuse: whether cross-attention is reused after the gate, or computed on.
        rescale: guidance rescale, by the equations 15 and 16 of arXiv 2305.08891.
    """
    negative, positive = conditions_of(pipeline, prompts)
    scheduler, generator = pipeline.scheduler, torch.Generator().manual_seed(9)
    scheduler.set_timesteps(STEPS)
    latents = noise(len(prompts)) * scheduler.init_noise_sigma
    more = pipeline.prepare_extra_step_kwargs(generator, 0.0)
    seen: dict[str, dict[Any, Tensor]] = {"negative": {}, "positive": {}}
    direction = torch.zeros_like(latents)
    for call, t in enumerate(scheduler.timesteps):
        step = call // 2 if scheduler.order == 2 else max(call - (len(scheduler.timesteps) - STEPS), 0)
        sample = scheduler.scale_model_input(latents, t)
        if step < gate_step:
            n, p = (
                predict(pipeline.unet, sample, t, conditions, keep_in=seen[half])
                for half, conditions in (("negative", negative), ("positive", positive))
            )
            direction = p - n
            guided = n + SCALE * direction
        else:
            means = {module: (output + seen["positive"][module]) / 2 for module, output in seen["negative"].items()}
            caches = (means if mode in ("negative", "positive-mean") else seen["positive"]) if reuse else {}
            p = predict(pipeline.unet, sample, t, negative if mode == "negative" else positive, taken=caches)
            weight = ((STEPS - step) / (STEPS - gate_step + 1)) ** 3 if mode == "fading" else 0
            guided = p + (SCALE - 1) * weight * direction
        if rescale:
            deviation = [tensor.std(dim=(1, 2, 3), keepdim=True) for tensor in (p, guided)]
            guided = rescale * guided * deviation[0] / deviation[1] + (1 - rescale) * guided
        latents = scheduler.step(guided, t, latents, **more, return_dict=False)[0]
    return latents


def conditions_of(pipeline: Any, prompts: list[str]) -> list[dict[str, Any]]:
    """What the UNet is called with besides sample and timestep: for the empty prompt, and for the prompts."""
    encode = partial(pipeline.encode_prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    encoded = encode(prompt=prompts)
    if len(encoded) == 2:
        return [{"encoder_hidden_states": encoded[1]}, {"encoder_hidden_states": encoded[0]}]
    sizes = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]).repeat(len(prompts), 1)
    return [
        {"encoder_hidden_states": text, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
        for text, pooled in ((encoded[1], encoded[3]), (encoded[0], encoded[2]))
    ]


def predict(
    unet: Any,
    sample: Tensor,
    t: Tensor,
    conditions: dict[str, Any],
    *,
    keep_in: dict[Any, Tensor] | None = None,
    taken: dict[Any, Tensor] | None = None,
) -> Tensor:
    """One half's prediction; its cross-attentions' outputs are kept, or others are taken in their place."""

    def hook(module: Any, _inputs: object, output: Tensor) -> Tensor:
        if keep_in is not None:
            keep_in[module] = output
        return (taken or {}).get(module, output)

    handles = [module.register_forward_hook(hook) for name, module in unet.named_modules() if name.endswith("attn2")]
    try:
        prediction: Tensor = unet(sample, t, **conditions, return_dict=False)[0]
    finally:
        for handle in handles:
            handle.remove()
    return prediction


def difference(one: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the largest latent where that is above 1."""
    assert one.shape == other.shape
    assert torch.isfinite(other).all()
    return float((one - other).abs().max() / other.abs().max().clamp(min=1))


@pytest.fixture(params=["sd", "sdxl"])
def gated(request: pytest.FixtureRequest, gated_pipelines: Pipelines) -> Any:
    """Both models' gated pipelines with DDIM, the gate at step 2, as T-GATE goes on."""
    pipeline = gated_pipelines(request.param)
    pipeline.scheduler = scheduler_of(pipeline, "ddim")
    pipeline.unet.gate_step = 2
    return pipeline


@pytest.fixture
def eager(gated: Any, eager_pipelines: Pipelines) -> Any:
    """The eager pipeline of the same model with DDIM."""
    pipeline = eager_pipelines("sdxl" if hasattr(gated, "text_encoder_2") else "sd")
    pipeline.scheduler = scheduler_of(pipeline, "ddim")
    return pipeline


def gated_at(pipeline: Any, mode: str, gate_step: int | str = 2) -> Any:
    """The same pipeline, with another mode and gate."""
    pipeline.unet.after_gate, pipeline.unet.gate_step = mode, gate_step
    return pipeline


# Against the eager loop


@pytest.mark.parametrize("gate_step", [1, 3])
@pytest.mark.parametrize("scheduler", ["ddim", "dpm++", "euler-a", "heun", "pndm"])
@pytest.mark.parametrize("mode", AFTER_GATE)
def test_every_mode_equals_eager_gated_by_hand(mode: str, scheduler: str, gate_step: int, gated: Any, eager: Any) -> None:
    gated.scheduler, eager.scheduler = scheduler_of(gated, scheduler), scheduler_of(eager, scheduler)
    assert difference(draw(gated_at(gated, mode, gate_step)), reference(eager, A, mode, gate_step)) < TOLERANCE


@pytest.mark.parametrize("gate_step", [1, 3])
def test_modes_differ_by_more_than_the_tolerance(gate_step: int, gated: Any) -> None:
    own = [mode for mode in AFTER_GATE if mode != "positive-mean" or hasattr(gated, "text_encoder_2")]  # else text is the only condition
    drawn = [draw(gated_at(gated, mode, gate_step)) for mode in own]
    for index, one in enumerate(drawn):
        assert all(difference(one, other) > 10 * TOLERANCE for other in drawn[index + 1 :])


@pytest.mark.parametrize("mode", AFTER_GATE)
def test_every_mode_equals_eager_with_two_prompts_and_rescaled_guidance(mode: str, gated: Any, eager: Any) -> None:
    expected = reference(eager, A + B, mode, 2, rescale=0.7)
    assert difference(draw(gated_at(gated, mode), A + B, guidance_rescale=0.7), expected) < TOLERANCE


@pytest.mark.parametrize("mode", AFTER_GATE)
def test_every_mode_equals_eager_where_engines_take_no_cache(
    mode: str, gated: Any, eager: Any, request: pytest.FixtureRequest, sd_bundle: Bundle
) -> None:
    """The vanilla graph on both sides of the gate: the mode then says whose conditions are kept, and whether guidance fades."""
    bundle = request.getfixturevalue("sdxl_bundle") if hasattr(gated, "text_encoder_2") else sd_bundle
    vanilla = load_engine(bundle, "vanilla", backend="onnxruntime", threads=1)
    own = gated.unet
    gated.unet = GatedDenoiser(gated, own.replaces, {"vanilla": vanilla}, gate=f"drop=2,after={mode}")
    try:
        drawn = draw(gated)
    finally:
        gated.unet = own
    assert difference(drawn, reference(eager, A, mode, 2, reuse=False)) < TOLERANCE


def test_a_pipeline_may_be_loaded_or_applied_with_a_mode(sd_bundle: Bundle, tiny_sd: Path, gated_pipelines: Pipelines) -> None:
    from diffusers import DiffusionPipeline

    gated = gated_pipelines("sd")
    gated.scheduler = scheduler_of(gated, "ddim")
    expected = draw(gated_at(gated, "fading"))
    loaded = tgate_trt.load(sd_bundle, gate_step=2, after_gate="fading", threads=1)
    applied = DiffusionPipeline.from_pretrained(tiny_sd, torch_dtype=torch.float32, local_files_only=True)
    tgate_trt.apply(applied, sd_bundle, gate_step=2, after_gate="fading", threads=1)
    for pipeline in (loaded, applied):
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = scheduler_of(pipeline, "ddim")
        assert difference(draw(pipeline), expected) < TOLERANCE  # the applied one keeps its eager text encoder


# Where modes must not differ


@pytest.mark.parametrize("mode", AFTER_GATE)
def test_a_gate_after_the_last_step_is_no_gate_in_every_mode(mode: str, gated: Any) -> None:
    vanilla = draw(gated_at(gated, "negative", "none"))
    assert torch.equal(draw(gated_at(gated, mode, "none")), vanilla)
    assert torch.equal(draw(gated_at(gated, mode, STEPS)), vanilla)
    assert not torch.equal(draw(gated_at(gated, mode, STEPS - 1)), vanilla)


def test_without_guidance_all_modes_are_one(gated: Any) -> None:
    drawn = [draw(gated_at(gated, mode), A + B, guidance_scale=1.0) for mode in AFTER_GATE]
    assert all(torch.equal(one, drawn[0]) for one in drawn)
    assert difference(drawn[0], draw(gated_at(gated, "negative"), A + B)) > 10 * TOLERANCE


# Nothing crosses from run to run


@pytest.mark.parametrize("other", AFTER_GATE)
@pytest.mark.parametrize("mode", AFTER_GATE)
def test_a_run_between_changes_nothing(mode: str, other: str, gated: Any) -> None:
    """Of another prompt, batch and mode, to its end and broken off after its hand-off."""

    def stop(_pipeline: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            raise KeyboardInterrupt
        return values

    before = draw(gated_at(gated, mode))
    gated_at(gated, other)
    draw(gated, B)
    draw(gated, A + B)
    draw(gated, B, guidance_scale=1.0)
    with pytest.raises(KeyboardInterrupt):
        draw(gated, B, callback_on_step_end=stop)
    assert torch.equal(draw(gated_at(gated, mode)), before)
    assert torch.equal(draw(gated), before)


def test_a_mode_that_is_set_within_a_run_is_the_next_runs(gated: Any) -> None:
    def switch(pipeline: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipeline.unet.after_gate = "fading" if step == 1 else pipeline.unet.after_gate
        return values

    whole = {mode: draw(gated_at(gated, mode)) for mode in ("negative", "fading")}
    gated_at(gated, "negative")
    assert torch.equal(draw(gated, callback_on_step_end=switch), whole["negative"])
    assert torch.equal(draw(gated), whole["fading"])


# What cannot be


def test_an_unknown_mode_is_refused_in_one_sentence(gated: Any, sd_bundle: Bundle) -> None:
    own = gated.unet
    for attempt in (
        lambda: tgate_trt.load(sd_bundle, after_gate="mean"),
        lambda: GatedDenoiser(gated, own.replaces, own.engines, gate_step=2, after_gate="mean"),
        lambda: draw(gated_at(gated, "mean")),
    ):
        with pytest.raises(InputError, match="negative, positive, positive-mean, fading; got 'mean'") as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_the_denoiser_is_where_its_engines_are(gated: Any) -> None:
    assert gated.unet.device == gated.unet.engines["planning"].device == gated._execution_device


@pytest.mark.parametrize(
    ("mode", "code", "message"),
    [("fading", 0, "gate step 1, fading"), ("mean", 1, "must be one of negative, positive, positive-mean, fading; got 'mean'")],
)
def test_the_command_takes_a_mode(mode: str, code: int, message: str, sd_bundle: Bundle, tmp_path: Path) -> None:
    output = tmp_path / "picture.png"
    options = ["--prompt", "a cat", "--steps", "3", "--gate-step", "1", "--after-gate", mode, "--threads", "1", "--output", str(output)]
    result = CliRunner().invoke(generate.app, [str(sd_bundle.folder), *options])
    assert result.exit_code == code
    assert message in (result.stderr if code else result.output)
    assert output.exists() is (code == 0)

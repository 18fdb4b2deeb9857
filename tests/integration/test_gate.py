"""The gate end to end, against eager PyTorch that is gated by hand: a plain sampling loop and hooks on the cross-attentions.

Compared are latents, without the VAE. ONNX Runtime sums in another order than PyTorch, so the difference to eager is some
1e-6 of the largest latent: `assert_equal` allows 1e-4 of the largest latent, and 1e-4 where that is below 1. Runs of the same
engines are compared bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tgate_trt
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.errors import GateError, InputError, UnsupportedError
from tgate_trt.gate.denoiser import GatedDenoiser
from tgate_trt.gate.schedule import GateStep
from tgate_trt.gate.scheduler import level_of_gate
from tgate_trt.running.drawing import SCHEDULERS, scheduler_of
from tgate_trt.running.loading import load_engine

from .conftest import Pipelines

MODELS = ("sd", "sdxl")
ONE = "a red circle"
TWO = ["a red circle", "a small blue square"]


@dataclass(frozen=True)
class Run:
    """What is drawn; the pipeline and the reference draw it from the same noise."""

    prompts: Sequence[str] = (ONE,)
    negative_prompt: str | None = None
    steps: int = 5
    guidance_scale: float = 7.5
    images: int = 1
    """Pictures a prompt."""
    strength: float | None = None
    """Of image-to-image, from `start_image`."""

    @property
    def rows(self) -> int:
        """Pictures of the run."""
        return len(self.prompts) * self.images


def noise_of(run: Run) -> Tensor:
    """Standard normal latents, another for each picture."""
    return torch.randn(run.rows, 4, 8, 8, generator=torch.Generator().manual_seed(5))


def start_image(run: Run) -> Tensor:
    """Latents of the pictures that image-to-image starts from."""
    return torch.randn(run.rows, 4, 8, 8, generator=torch.Generator().manual_seed(6))


def draw(pipeline: Any, run: Run = Run(), **more: Any) -> Tensor:
    """Latents that a pipeline draws."""
    latents: Tensor = pipeline(**_arguments(run), **more).images
    return latents


def _arguments(run: Run) -> dict[str, Any]:
    start = {"latents": noise_of(run)} if run.strength is None else {"image": start_image(run), "strength": run.strength}
    return {
        "prompt": list(run.prompts),
        "negative_prompt": None if run.negative_prompt is None else [run.negative_prompt] * len(run.prompts),
        "num_inference_steps": run.steps,
        "guidance_scale": run.guidance_scale,
        "num_images_per_prompt": run.images,
        "generator": torch.Generator().manual_seed(9),
        "output_type": "latent",
        **start,
    }


class CrossAttentions:
    """The outputs of a UNet's cross-attentions, as they were when last seen or as they are to be."""

    def __init__(self, unet: nn.Module) -> None:
        self.modules = [module for name, module in unet.named_modules() if name.endswith("attn2")]
        self.seen: dict[nn.Module, Tensor] = {}
        self.kept: dict[nn.Module, Tensor] = {}

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """While this lasts, see every output, and put what is kept in its place."""
        handles = [module.register_forward_hook(self._hook) for module in self.modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        self.seen[module] = output
        return self.kept.get(module, output)

    def keep(self, *, guided: bool) -> None:
        """From now on give what was last seen: the mean of the guidance halves, or all of it without guidance."""
        for module, output in self.seen.items():
            self.kept[module] = sum(output.chunk(2)) / 2 if guided else output


@torch.no_grad()
def reference(
    pipeline: Any, run: Run, gate_step: int | None, *, kept_half: int = 0, reuse: bool = True, unguided_from: int | None = None
) -> Tensor:
    """Latents of an eager pipeline, gated by hand.

    Args:
        pipeline: an eager pipeline with its own UNet.
        run: what to draw.
        gate_step: steps with cross-attention and guidance; all of them if None.
        kept_half: of the conditioning after the gate: 0 for the negative half, 1 for the positive.
        reuse: whether cross-attention is reused after the gate, or only guidance dropped.
        unguided_from: step from which the pipeline goes on without guidance, with the positive half; never if None.
    """
    guided = run.guidance_scale > 1
    halves = conditions_of(pipeline, run, guided=guided)
    both = {name: torch.cat([half[name] for half in halves]) for name in halves[0]}
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(run.steps)
    order, generator = getattr(scheduler, "order", 1), torch.Generator().manual_seed(9)
    first = 0 if run.strength is None else run.steps - int(run.steps * run.strength)
    timesteps, steps = scheduler.timesteps[first * order :], run.steps - first
    if run.strength is None:
        latents = noise_of(run) * scheduler.init_noise_sigma
    else:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first * order)
        noise = torch.randn(run.rows, 4, 8, 8, generator=generator)
        latents = scheduler.add_noise(start_image(run), noise, timesteps[:1].repeat(run.rows))
    step_arguments = pipeline.prepare_extra_step_kwargs(generator, 0.0)
    crossed = CrossAttentions(pipeline.unet)
    with crossed.hooked():
        for call, t in enumerate(timesteps):
            step = call // 2 if order == 2 else max(call - (len(timesteps) - steps), 0)
            planning = gate_step is None or step < gate_step
            if not planning and reuse and not crossed.kept:
                crossed.keep(guided=guided)
            if guided and step == unguided_from:
                guided, halves = False, halves[1:]
                both = halves[0]
            sample = scheduler.scale_model_input(torch.cat([latents] * 2) if guided and planning else latents, t)
            conditions = both if planning else halves[kept_half if guided else 0]
            prediction = predict(pipeline.unet, sample, t, conditions)
            if guided and planning:
                negative, positive = prediction.chunk(2)
                prediction = negative + run.guidance_scale * (positive - negative)
            latents = scheduler.step(prediction, t, latents, **step_arguments, return_dict=False)[0]
    return latents


def conditions_of(pipeline: Any, run: Run, *, guided: bool) -> list[dict[str, Tensor]]:
    """The UNet's conditions by name, of the negative and the positive half, or of the prompt alone."""
    negative_prompt = None if run.negative_prompt is None else [run.negative_prompt] * len(run.prompts)
    encoded = pipeline.encode_prompt(
        prompt=list(run.prompts),
        device=torch.device("cpu"),
        num_images_per_prompt=run.images,
        do_classifier_free_guidance=guided,
        negative_prompt=negative_prompt,
    )
    positive = {"text": encoded[0]}
    negative = {"text": encoded[1]}
    if len(encoded) == 4:  # SDXL: original size, crop and target size beside the pooled text
        time_ids = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]).repeat(run.rows, 1)
        positive |= {"text_embeds": encoded[2], "time_ids": time_ids}
        negative |= {"text_embeds": encoded[3], "time_ids": time_ids}
    return [negative, positive] if guided else [positive]


def predict(unet: Any, sample: Tensor, t: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    """One call of a UNet."""
    added = {name: tensor for name, tensor in conditions.items() if name != "text"}
    prediction: Tensor = unet(sample, t, conditions["text"], added_cond_kwargs=added or None, return_dict=False)[0]
    return prediction


def assert_equal(ours: Tensor, expected: Tensor) -> None:
    """Equal to 1e-4 of the largest latent, or to 1e-4 if that is below 1."""
    assert ours.shape == expected.shape
    assert torch.isfinite(expected).all()
    assert (ours - expected).abs().max() / expected.abs().max().clamp(min=1) < 1e-4


def differ(one: Tensor, other: Tensor) -> bool:
    """Whether they differ by much more than `assert_equal` allows."""
    return float((one - other).abs().max() / other.abs().max().clamp(min=1)) > 1e-3


def is_same(one: Tensor, other: Tensor) -> bool:
    """Whether they are equal bit for bit."""
    return torch.equal(one, other)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    """Both models in turn."""
    name: str = request.param
    return name


@pytest.fixture
def gated(model: str, gated_pipelines: Pipelines) -> Any:
    """A gated pipeline with DDIM, its gate at step 2."""
    pipeline = gated_pipelines(model)
    pipeline.scheduler = scheduler_of(pipeline, "ddim")
    pipeline.unet.gate_step = 2
    return pipeline


@pytest.fixture
def eager(model: str, eager_pipelines: Pipelines) -> Any:
    """The eager pipeline with DDIM."""
    pipeline = eager_pipelines(model)
    pipeline.scheduler = scheduler_of(pipeline, "ddim")
    return pipeline


@pytest.fixture
def gated_sd(gated_pipelines: Pipelines) -> Any:
    """The gated pipeline of `tiny_sd` with DDIM, its gate at step 2."""
    pipeline = gated_pipelines("sd")
    pipeline.scheduler = scheduler_of(pipeline, "ddim")
    pipeline.unet.gate_step = 2
    return pipeline


@pytest.fixture
def eager_sd(eager_pipelines: Pipelines) -> Any:
    """The eager pipeline of `tiny_sd` with DDIM."""
    pipeline = eager_pipelines("sd")
    pipeline.scheduler = scheduler_of(pipeline, "ddim")
    return pipeline


@pytest.fixture
def own_sd(tiny_sd: Path) -> Any:
    """An eager pipeline of `tiny_sd` that a test may change."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(tiny_sd, torch_dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# Every scheduler


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_gate_after_the_last_step_is_no_gate_and_equals_eager(scheduler: str, gated: Any, eager: Any) -> None:
    gated.scheduler, eager.scheduler = scheduler_of(gated, scheduler), scheduler_of(eager, scheduler)
    gated.unet.gate_step = "none"
    vanilla = draw(gated)
    gated.unet.gate_step = Run().steps
    assert is_same(draw(gated), vanilla)
    assert_equal(vanilla, draw(eager))


@pytest.mark.parametrize(("gate_step", "planning"), [(2, 2), (4, 4), (0.5, 3)])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_gated_latents_equal_eager_gated_by_hand(scheduler: str, gate_step: float, planning: int, gated: Any, eager: Any) -> None:
    gated.scheduler, eager.scheduler = scheduler_of(gated, scheduler), scheduler_of(eager, scheduler)
    gated.unet.gate_step = gate_step
    expected = reference(eager, Run(), planning)
    assert_equal(draw(gated), expected)
    assert differ(expected, reference(eager, Run(), planning - 1))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_gate_at_a_noise_level_is_that_of_its_step(scheduler: str, gated_sd: Any) -> None:
    gated_sd.scheduler = scheduler_of(gated_sd, scheduler)
    gated_sd.unet.gate_step = 3
    expected = draw(gated_sd)
    level = level_of_gate(gated_sd.scheduler, Run().steps, 3)
    gated_sd.unet.gate_step = f"noise:{level}"
    assert is_same(draw(gated_sd), expected)


def test_the_reference_without_a_gate_is_the_eager_pipeline(eager: Any) -> None:
    run = Run(TWO, "green", images=2)
    assert_equal(reference(eager, run, None), draw(eager, run))


def test_custom_timesteps_make_the_steps_of_a_run(gated_sd: Any, eager_sd: Any) -> None:
    gated_sd.scheduler, eager_sd.scheduler = scheduler_of(gated_sd, "ddpm"), scheduler_of(eager_sd, "ddpm")
    gated_sd.unet.gate_step = "none"
    draw(gated_sd)  # leaves its number of steps in the scheduler
    ours, expected = (
        pipeline(**{**_arguments(Run()), "num_inference_steps": 50, "timesteps": [900, 600, 300]}).images
        for pipeline in (gated_sd, eager_sd)
    )
    assert_equal(ours, expected)


def test_pndm_with_its_runge_kutta_start_is_refused(gated_sd: Any) -> None:
    from diffusers import PNDMScheduler

    gated_sd.scheduler = PNDMScheduler.from_config(gated_sd.scheduler.config, skip_prk_steps=False)
    with pytest.raises(GateError, match="skip_prk_steps=True") as refused:
        draw(gated_sd)
    assert "\n" not in str(refused.value)


def test_a_gate_above_the_steps_is_refused(gated_sd: Any) -> None:
    gated_sd.unet.gate_step = 6
    with pytest.raises(InputError, match=r"gate_step=6 .* 5 steps"):
        draw(gated_sd)


# Batches


@pytest.mark.parametrize(
    "run",
    [
        Run(TWO),
        Run(TWO, "green", images=2),
        Run((ONE,), "large", images=3),
        Run(TWO, guidance_scale=1.0),
        Run((ONE,), guidance_scale=1.0),
        Run((ONE,), guidance_scale=1.0, images=3),
    ],
    ids=["two prompts", "negative, two images", "negative, three images", "two unguided", "one unguided", "three unguided"],
)
def test_batches_equal_eager(run: Run, gated: Any, eager: Any) -> None:
    assert_equal(draw(gated, run), reference(eager, run, 2))


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
def test_a_batch_equals_each_picture_alone(guidance_scale: float, gated: Any) -> None:
    together = draw(gated, Run(TWO, guidance_scale=guidance_scale))
    noise = noise_of(Run(TWO))
    for index, prompt in enumerate(TWO):
        alone = draw_from(gated, noise[index : index + 1], Run((prompt,), guidance_scale=guidance_scale))
        assert_equal(together[index : index + 1], alone)
    assert differ(together[:1], together[1:])


def draw_from(pipeline: Any, latents: Tensor, run: Run) -> Tensor:
    """Latents that a pipeline draws from given noise."""
    drawn: Tensor = pipeline(**{**_arguments(run), "latents": latents}).images
    return drawn


def test_guidance_rescale_ends_at_the_gate(gated: Any, eager: Any) -> None:
    """Twice the same prediction has the deviation of its positive half, so rescaling it leaves it as it is."""
    gated.unet.gate_step = 1
    rescaled = draw(gated, Run(steps=2), guidance_rescale=0.7)
    assert torch.isfinite(rescaled).all()
    gated.unet.gate_step = "none"
    assert differ(draw(gated, Run(steps=2), guidance_rescale=0.7), draw(gated, Run(steps=2)))
    assert_equal(draw(gated, Run(steps=2), guidance_rescale=0.7), draw(eager, Run(steps=2), guidance_rescale=0.7))


@pytest.mark.parametrize("guidance", [True, False])
def test_guidance_may_be_told(guidance: bool, sd_bundle: Bundle, gated_sd: Any) -> None:
    run = Run(TWO, guidance_scale=7.5 if guidance else 1.0)
    told = tgate_trt.load(sd_bundle, gate_step=2, guidance=guidance, threads=1)
    told.set_progress_bar_config(disable=True)
    assert is_same(draw(told, run), draw(gated_sd, run))


# No cache crosses from run to run

A, B = Run((ONE,)), Run(("a small blue square",))


def test_the_same_prompt_again_is_the_same_picture(gated: Any) -> None:
    assert is_same(draw(gated), draw(gated))


@pytest.mark.parametrize(
    "between",
    [B, Run(TWO), Run(TWO, guidance_scale=1.0), Run((ONE,), steps=3), Run((ONE,), guidance_scale=1.0, images=2)],
    ids=["another prompt", "another batch", "two unguided", "fewer steps", "as many rows unguided"],
)
def test_a_run_between_changes_nothing(between: Run, gated: Any) -> None:
    before = draw(gated, A)
    other = draw(gated, between)
    assert is_same(draw(gated, A), before)
    assert is_same(draw(gated, between), other)


@pytest.mark.parametrize("gate_step", [1, 4, 0.9, "none"])
def test_another_gate_step_between_changes_nothing(gate_step: float | str, gated: Any) -> None:
    before = draw(gated)
    gated.unet.gate_step = gate_step
    assert differ(draw(gated), before)
    gated.unet.gate_step = 2
    assert is_same(draw(gated), before)


class Stop(Exception):
    """Raised in the middle of a run."""


@pytest.mark.parametrize("stopped_at", [0, 1, 2, 3])
def test_a_run_after_a_broken_one_is_that_of_a_fresh_pipeline(stopped_at: int, gated_sd: Any, sd_bundle: Bundle) -> None:
    def stop(_pipeline: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == stopped_at:
            raise Stop
        return values

    with pytest.raises(Stop):
        draw(gated_sd, B, callback_on_step_end=stop)
    fresh = tgate_trt.load(sd_bundle, gate_step=2, threads=1)
    fresh.set_progress_bar_config(disable=True)
    assert is_same(draw(gated_sd, A), draw(fresh, A))


@pytest.mark.parametrize("interrupted_at", [0, 1, 3])
def test_an_interrupted_run_leaves_nothing(interrupted_at: int, gated_sd: Any) -> None:
    def interrupt(pipeline: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipeline._interrupt = step == interrupted_at
        return values

    before = draw(gated_sd, A)
    assert not is_same(draw(gated_sd, B, callback_on_step_end=interrupt), draw(gated_sd, B))
    assert is_same(draw(gated_sd, A), before)


@pytest.mark.parametrize("broken", [False, True], ids=["whole", "broken"])
@pytest.mark.parametrize("inner_steps", [3, 5])
@pytest.mark.parametrize("nested_at", [0, 1, 2, 3])
def test_a_run_within_a_run_is_an_error_of_the_outer(nested_at: int, inner_steps: int, broken: bool, gated_sd: Any) -> None:
    """Whether the inner run came to its end or not, the outer may not go on with its cache."""
    inner: list[Tensor] = []

    def stop(_pipeline: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if broken and step == nested_at:
            raise Stop
        return values

    def nest(pipeline: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == nested_at:
            with contextlib.suppress(Stop):
                inner.append(draw(pipeline, Run((ONE,), steps=inner_steps), callback_on_step_end=stop))
        return values

    alone = draw(gated_sd, Run((ONE,), steps=inner_steps))
    with pytest.raises(GateError):
        draw(gated_sd, B, callback_on_step_end=nest)
    assert all(is_same(drawn, alone) for drawn in inner)


def cutoff_of(model: str, step: int) -> Any:
    """Diffusers' callback that ends guidance after a step."""
    from diffusers import callbacks

    kind = {"sd": callbacks.SDCFGCutoffCallback, "sdxl": callbacks.SDXLCFGCutoffCallback}[model]
    return kind(cutoff_step_ratio=None, cutoff_step_index=step)


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_callback_may_end_guidance_within_a_run(after: int, model: str, gated: Any, eager: Any) -> None:
    """Before the gate at step 2, at it, and after it; the run goes on with the half that the pipeline kept."""
    drawn = draw(gated, callback_on_step_end=cutoff_of(model, after))
    expected = reference(eager, Run(), 2, unguided_from=after + 1)
    assert_equal(drawn, expected)
    if after == 0 or model == "sdxl":  # SD's fidelity graph takes no condition of either half
        assert differ(expected, reference(eager, Run(), 2))
    assert_equal(draw(gated), reference(eager, Run(), 2))


@pytest.mark.parametrize("after", [0, 2])
def test_a_callback_may_set_the_guidance_scale_to_1(after: int, gated: Any, eager: Any) -> None:
    def set_scale(pipeline: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == after:
            pipeline._guidance_scale = 1.0
        return values

    assert_equal(draw(gated, Run(TWO), callback_on_step_end=set_scale), reference(eager, Run(TWO), 2, unguided_from=after + 1))


def test_a_batch_that_changes_within_a_run_is_refused(gated_sd: Any) -> None:
    """Diffusers' callback keeps one prompt of two, with which no UNet can go on."""
    with pytest.raises(GateError, match="'encoder_hidden_states' has 1 rows in a batch of 2"):
        draw(gated_sd, Run(TWO), callback_on_step_end=cutoff_of("sd", 0))


def test_more_calls_than_a_run_has_are_refused(gated_sd: Any) -> None:
    draw(gated_sd)
    t = gated_sd.scheduler.timesteps[-1]
    with pytest.raises(GateError, match="more than the run's 5 times"):
        gated_sd.unet(torch.zeros(2, 4, 8, 8), t, torch.zeros(2, 77, 32))


def test_guidance_that_the_batch_belies_is_refused(sd_bundle: Bundle) -> None:
    pipeline = tgate_trt.load(sd_bundle, gate_step=2, guidance=True, threads=1)
    pipeline.set_progress_bar_config(disable=True)
    for prompts in ((ONE,), TWO):
        with pytest.raises(GateError, match="guidance=False"):
            draw(pipeline, Run(prompts, guidance_scale=1.0))


# What the graphs do not take


@pytest.mark.parametrize(
    "more",
    [
        {"down_block_additional_residuals": (torch.zeros(2, 32, 8, 8),), "mid_block_additional_residual": torch.zeros(2, 64, 4, 4)},
        {"added_cond_kwargs": {"image_embeds": [torch.zeros(2, 1, 4, 32)]}},
        {"encoder_hidden_states": (torch.zeros(2, 77, 32), [torch.zeros(2, 4, 32)])},
        {"timestep_cond": torch.zeros(2, 8)},
        {"class_labels": torch.zeros(2)},
        {"cross_attention_kwargs": {"scale": 0.5}},
    ],
    ids=["ControlNet", "IP-Adapter", "IP-Adapter text", "guidance embedding", "class labels", "cross-attention arguments"],
)
def test_conditions_that_the_graphs_do_not_take_are_refused(more: dict[str, Any], gated_sd: Any) -> None:
    gated_sd.scheduler.set_timesteps(5)
    arguments = {"encoder_hidden_states": torch.zeros(2, 77, 32), **more}
    with pytest.raises(UnsupportedError):
        gated_sd.unet(torch.zeros(2, 4, 8, 8), gated_sd.scheduler.timesteps[0], **arguments)


# Into a pipeline and out of it


def test_apply_gates_a_pipeline_and_remove_restores_it(own_sd: Any, sd_bundle: Bundle) -> None:
    own = own_sd.unet
    before = draw(own_sd)
    assert tgate_trt.apply(own_sd, sd_bundle, gate_step=2, threads=1) is own_sd
    gated = draw(own_sd)
    assert tgate_trt.remove(own_sd) is own_sd
    assert own_sd.unet is own
    assert is_same(draw(own_sd), before)
    assert_equal(gated, reference(own_sd, Run(), 2))


def test_apply_again_takes_the_place_of_the_first(own_sd: Any, sd_bundle: Bundle) -> None:
    own = own_sd.unet
    tgate_trt.apply(own_sd, sd_bundle, gate_step=1, threads=1)
    tgate_trt.apply(own_sd, sd_bundle, gate_step=3, threads=1)
    gated = draw(own_sd)
    assert tgate_trt.remove(own_sd).unet is own
    assert_equal(gated, reference(own_sd, Run(), 3))


def test_a_pipeline_made_from_another_gets_a_gate_of_its_own(own_sd: Any, sd_bundle: Bundle) -> None:
    """`from_pipe` shares the gated denoiser; applying to the new pipeline must leave the first one's engines alone."""
    from diffusers import StableDiffusionPipeline

    loaded = tgate_trt.load(sd_bundle, gate_step=2, threads=1)
    tgate_trt.apply(own_sd, sd_bundle, gate_step=2, threads=1)
    for first in (loaded, own_sd):
        first.set_progress_bar_config(disable=True)
        before = draw(first)
        second = StableDiffusionPipeline.from_pipe(first)
        second.set_progress_bar_config(disable=True)
        tgate_trt.apply(second, sd_bundle, gate_step=2, threads=1)
        assert second.unet is not first.unet
        assert is_same(draw(second), before)
        assert is_same(draw(first), before)


@pytest.mark.parametrize("name", ["conv_in.weight", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"])
def test_apply_refuses_other_weights(name: str, own_sd: Any, sd_bundle: Bundle) -> None:
    with torch.no_grad():
        own_sd.unet.get_parameter(name).add_(1)
    own = own_sd.unet
    with pytest.raises(InputError, match="are other than"):
        tgate_trt.apply(own_sd, sd_bundle)
    assert own_sd.unet is own


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_apply_takes_the_same_weights_in_another_precision(dtype: torch.dtype, own_sd: Any, sd_bundle: Bundle) -> None:
    own_sd.to(dtype)
    tgate_trt.apply(own_sd, sd_bundle, gate_step=2, threads=1)
    assert isinstance(own_sd.unet, GatedDenoiser)
    tgate_trt.remove(own_sd)
    with torch.no_grad():
        own_sd.unet.conv_in.weight[0].mul_(1.1)
    with pytest.raises(
        InputError, match=r"1 of the \d+ weights of the pipeline's UNet2DConditionModel are other .* 'conv_in.weight' first"
    ):
        tgate_trt.apply(own_sd, sd_bundle)


@pytest.mark.parametrize("fused", [False, True])
def test_apply_and_build_name_a_lora_that_is_loaded(fused: bool, own_sd: Any, sd_bundle: Bundle, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    own_sd.load_lora_weights(
        {f"{name}.lora_A.weight": torch.randn(4, 32, generator=generator), f"{name}.lora_B.weight": torch.randn(32, 4, generator=generator)}
    )
    if fused:
        own_sd.fuse_lora()
    for attempt in (lambda: tgate_trt.apply(own_sd, sd_bundle), lambda: tgate_trt.build(own_sd, tmp_path / "bundle")):
        with pytest.raises(InputError, match=r"unet|UNet2DConditionModel"):
            attempt()
    with pytest.raises(InputError, match=r"has LoRAs loaded; unload them by pipeline\.unload_lora_weights\(\)"):
        tgate_trt.apply(own_sd, sd_bundle)
    own_sd.unload_lora_weights()
    if fused:
        with pytest.raises(InputError, match=r"1 of the .* if a LoRA is fused into them, unfuse it"):
            tgate_trt.apply(own_sd, sd_bundle)
    else:
        tgate_trt.apply(own_sd, sd_bundle, threads=1)


def test_apply_refuses_another_architecture(own_sd: Any, sdxl_bundle: Bundle) -> None:
    own = own_sd.unet
    with pytest.raises(InputError, match="another architecture"):
        tgate_trt.apply(own_sd, sdxl_bundle)
    assert own_sd.unet is own


def test_remove_refuses_a_plain_pipeline(own_sd: Any) -> None:
    with pytest.raises(InputError, match="no engines"):
        tgate_trt.remove(own_sd)


# Beside the gate


@pytest.mark.parametrize(("after_gate", "kept_half"), [("negative", 0), ("positive", 1)])
def test_guidance_dropped_alone_equals_eager(
    after_gate: str, kept_half: int, gated: Any, eager: Any, request: pytest.FixtureRequest
) -> None:
    """The vanilla graph on both sides of the gate takes no cache: cross-attention goes on, guidance does not."""
    name = "sdxl" if hasattr(gated, "text_encoder_2") else "sd"
    vanilla = load_engine(request.getfixturevalue(f"{name}_bundle"), "vanilla", backend="onnxruntime", threads=1)
    own = gated.unet
    gated.unet = GatedDenoiser(gated, own.replaces, {"vanilla": vanilla}, gate=f"drop=2,after={after_gate}")
    try:
        drawn = draw(gated, Run(TWO))
    finally:
        gated.unet = own
    expected = reference(eager, Run(TWO), 2, kept_half=kept_half, reuse=False)
    assert_equal(drawn, expected)
    assert differ(expected, reference(eager, Run(TWO), 2))


@pytest.mark.parametrize(("gate_step", "planning"), [(1, 1), (2, 2), (0.5, 2), ("noise:100", 1)])
@pytest.mark.parametrize("scheduler", ["ddim", "euler-a", "pndm", "heun"])
def test_image_to_image_gates_the_executed_steps(
    scheduler: str, gate_step: GateStep, planning: int, own_sd: Any, sd_bundle: Bundle
) -> None:
    """Of 5 steps at strength 0.6 only the last 3 are executed; the gate counts those."""
    from diffusers import StableDiffusionImg2ImgPipeline

    run = Run(TWO, steps=5, strength=0.6)
    pipeline = StableDiffusionImg2ImgPipeline(**own_sd.components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = scheduler_of(pipeline, scheduler)
    tgate_trt.apply(pipeline, sd_bundle, gate_step=gate_step, threads=1)
    gated = draw(pipeline, run)
    tgate_trt.remove(pipeline)
    expected = reference(pipeline, run, planning)
    assert_equal(gated, expected)
    assert differ(expected, reference(pipeline, run, 3))

"""Gated latents equal those of the official code, PyPI ``tgate==1.0.0``, in fp32; its quirks are named one by one.

Compared are latents, without the VAE. ONNX Runtime sums in another order than PyTorch, so the difference is some 1e-6 of
the largest latent and not zero: the tests allow 1e-4 of the largest latent, and 1e-4 where that is below 1.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tgate_trt
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.engines.base import Engine
from tgate_trt.errors import InputError
from tgate_trt.gate.denoiser import GatedDenoiser
from tgate_trt.specs import CACHE_PREFIX, GraphSpec

from .conftest import Lender, Pipelines, eager_pipeline

tgate = pytest.importorskip("tgate", reason="the official code is a development dependency")

TOLERANCE = 1e-4

SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
}

LOADERS = {"sd": "TgateSDLoader", "sdxl": "TgateSDXLLoader"}

WITHOUT_SELF_ATTENTION_REUSE = {"sp_interval": 1, "fi_interval": 1, "warm_up": 2}
"""Quirk: the official default, sp_interval=5, reuses self-attention too, which is the method's second version."""

BATCHES: Mapping[str, dict[str, Any]] = {
    "one prompt": {"prompt": "a red circle"},
    "two prompts": {"prompt": ["a red circle", "a small blue square"], "negative_prompt": ["green", "large"]},
    "two images a prompt": {"prompt": ["a red circle", "a blue square"], "num_images_per_prompt": 2, "guidance_rescale": 0.7},
}

MODELS = ("sd", "sdxl")


class Wrapped:
    """An engine through which a test looks or meddles."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def spec(self) -> GraphSpec:
        """The engine's own."""
        return self.engine.spec

    @property
    def device(self) -> torch.device:
        """The engine's own."""
        return self.engine.device

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Run as the engine does."""
        self.engine.run(inputs, outputs)

    def close(self) -> None:
        """Leave the engine to its owner."""


class CountedRuns(Wrapped):
    """Counts the runs."""

    runs = 0

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Run and count."""
        self.runs += 1
        super().run(inputs, outputs)


class ScaledCaches(Wrapped):
    """Multiplies the caches, all or one of them, before each run."""

    def __init__(self, engine: Engine, factor: float, only: str | None = None) -> None:
        super().__init__(engine)
        self.factor, self.only = factor, only

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Run with the caches changed."""

        def is_changed(name: str) -> bool:
            return name == self.only if self.only else name.startswith(CACHE_PREFIX)

        changed = {name: tensor * self.factor if is_changed(name) else tensor for name, tensor in inputs.items()}
        super().run(changed, outputs)


def set_scheduler(pipeline: Any, name: str) -> None:
    """Give a pipeline a scheduler with its own betas."""
    import diffusers

    kind, settings = SCHEDULERS[name]
    pipeline.scheduler = getattr(diffusers, kind).from_config(pipeline.scheduler.config, **settings)


def latents_of(call: Any, steps: int, batch: Mapping[str, Any], **more: Any) -> Tensor:
    """Latents of one run, always from the same noise."""
    arguments = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(7), "output_type": "latent", **batch, **more}
    latents: Tensor = call(**arguments).images
    return latents


def official(pipeline: Any, model: str) -> Any:
    """The official code's call of a pipeline."""
    return getattr(tgate, LOADERS[model])(pipeline).tgate


@pytest.fixture(scope="module")
def official_lender(request: pytest.FixtureRequest) -> Lender:
    """Lends eager pipelines apart from all other tests'.

    Quirk: a pipeline that the official code has run once stays patched, so only official calls may follow.
    """
    return Lender(lambda model: eager_pipeline(request.getfixturevalue(f"tiny_{model}")))


@pytest.fixture
def official_pipelines(official_lender: Lender) -> Pipelines:
    """Eager pipelines that the official code may patch."""
    return functools.cache(official_lender.lend)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest latent where that is above 1."""
    assert ours.shape == theirs.shape
    assert torch.isfinite(theirs).all()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))


@pytest.mark.parametrize(("steps", "gate_step", "batch"), [(5, 1, "two prompts"), (6, 4, "one prompt"), (4, 2, "two images a prompt")])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("model", MODELS)
def test_gated_latents_equal_the_official_code(
    model: str, scheduler: str, steps: int, gate_step: int, batch: str, gated_pipelines: Pipelines, official_pipelines: Pipelines
) -> None:
    ours, theirs = gated_pipelines(model), official_pipelines(model)
    set_scheduler(ours, scheduler)
    set_scheduler(theirs, scheduler)
    ours.unet.gate_step = gate_step
    expected = latents_of(official(theirs, model), steps, BATCHES[batch], gate_step=gate_step, **WITHOUT_SELF_ATTENTION_REUSE)
    assert difference(latents_of(ours, steps, BATCHES[batch]), expected) < TOLERANCE


@pytest.mark.parametrize("gate_step", [1, 3, 5])
def test_a_pipeline_loaded_for_a_gate_step_equals_the_official_code(
    gate_step: int, sd_bundle: Bundle, official_pipelines: Pipelines
) -> None:
    ours = tgate_trt.load(sd_bundle.folder, gate_step=gate_step, threads=1)
    ours.set_progress_bar_config(disable=True)
    theirs = official_pipelines("sd")
    set_scheduler(theirs, "ddim")
    expected = latents_of(official(theirs, "sd"), 5, BATCHES["one prompt"], gate_step=gate_step, **WITHOUT_SELF_ATTENTION_REUSE)
    assert difference(latents_of(ours, 5, BATCHES["one prompt"]), expected) < TOLERANCE


@pytest.mark.parametrize("model", MODELS)
def test_the_gate_and_its_step_change_the_latents(model: str, gated_pipelines: Pipelines) -> None:
    pipeline = gated_pipelines(model)
    set_scheduler(pipeline, "ddim")
    drawn = []
    for gate_step in ("none", 4, 3, 2, 1):
        pipeline.unet.gate_step = gate_step
        drawn.append(latents_of(pipeline, 5, BATCHES["one prompt"]))
    for index, one in enumerate(drawn):
        assert all(difference(one, other) > 10 * TOLERANCE for other in drawn[index + 1 :])


@pytest.mark.parametrize("model", MODELS)
def test_every_cache_shows_in_the_latents(model: str, gated_pipelines: Pipelines) -> None:
    """So the comparisons above would find any one cache wrong, and all of them wrong by a hundredth."""
    pipeline = gated_pipelines(model)
    set_scheduler(pipeline, "ddim")
    gated = pipeline.unet
    gated.gate_step = 2
    right = latents_of(pipeline, 5, BATCHES["one prompt"])
    changes = [(1.01, None), *((0.0, cache.name) for cache in gated.engines["fidelity"].spec.cache_inputs)]
    assert len(changes) > 4
    for factor, only in changes:
        engine = ScaledCaches(gated.engines["fidelity"], factor, only)
        pipeline.unet = GatedDenoiser(pipeline, gated.replaces, {**gated.engines, "fidelity": engine}, gate_step=2)
        try:
            wrong = latents_of(pipeline, 5, BATCHES["one prompt"])
        finally:
            pipeline.unet = gated
        assert difference(wrong, right) > 2 * TOLERANCE, only


def test_quirk_without_guidance_the_official_code_averages_two_images(gated_pipelines: Pipelines, official_pipelines: Pipelines) -> None:
    """It halves the batch although no half is negative: two images get each other's cache, and one image fails."""
    ours, theirs = gated_pipelines("sd"), official_pipelines("sd")
    set_scheduler(ours, "ddim")
    set_scheduler(theirs, "ddim")
    ours.unet.gate_step = 2
    call = official(theirs, "sd")
    unguided = {"gate_step": 2, "guidance_scale": 1.0, **WITHOUT_SELF_ATTENTION_REUSE}
    mixed = latents_of(call, 5, BATCHES["two prompts"], **unguided)
    assert difference(latents_of(ours, 5, BATCHES["two prompts"], guidance_scale=1.0), mixed) > 10 * TOLERANCE
    with pytest.raises(ValueError, match="not enough values to unpack"):
        latents_of(call, 5, BATCHES["one prompt"], **unguided)
    assert torch.isfinite(latents_of(ours, 5, BATCHES["one prompt"], guidance_scale=1.0)).all()


def test_quirk_without_guidance_the_latent_consistency_flag_is_right(gated_pipelines: Pipelines, official_pipelines: Pipelines) -> None:
    """SDXL's ``lcm=True`` keeps the batch as it is, as our runs do wherever there is no guidance."""
    ours, theirs = gated_pipelines("sdxl"), official_pipelines("sdxl")
    set_scheduler(ours, "euler")
    set_scheduler(theirs, "euler")
    ours.unet.gate_step = 2
    unguided = {"gate_step": 2, "guidance_scale": 1.0, "lcm": True, **WITHOUT_SELF_ATTENTION_REUSE}
    expected = latents_of(official(theirs, "sdxl"), 5, BATCHES["two prompts"], **unguided)
    assert difference(latents_of(ours, 5, BATCHES["two prompts"], guidance_scale=1.0), expected) < TOLERANCE


def test_quirk_gate_step_zero_takes_the_last_runs_cache(gated_pipelines: Pipelines, official_pipelines: Pipelines) -> None:
    """The same call gives another picture after another prompt; ours refuses a run that would have no cache of its own."""
    theirs = official_pipelines("sd")
    set_scheduler(theirs, "ddim")
    call = official(theirs, "sd")
    drawn = []
    for before in ("a red circle", "a large green triangle"):
        latents_of(call, 3, {"prompt": before}, gate_step=2, **WITHOUT_SELF_ATTENTION_REUSE)
        drawn.append(latents_of(call, 3, {"prompt": "a blue square"}, gate_step=0, **WITHOUT_SELF_ATTENTION_REUSE))
    assert difference(*drawn) > 10 * TOLERANCE
    ours = gated_pipelines("sd")
    with pytest.raises(InputError, match="at least 1"):
        ours.unet.gate_step = 0


def test_quirk_the_official_pipeline_stays_patched(tiny_sd: Path, gated_pipelines: Pipelines) -> None:
    """A plain call after a gated one reuses its cache, silently; ours has nothing to undo between runs."""
    from diffusers import DiffusionPipeline

    theirs = DiffusionPipeline.from_pretrained(tiny_sd, torch_dtype=torch.float32, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    plain = latents_of(theirs, 4, BATCHES["one prompt"])
    latents_of(official(theirs, "sd"), 4, {"prompt": "a green triangle"}, gate_step=2, **WITHOUT_SELF_ATTENTION_REUSE)
    assert difference(latents_of(theirs, 4, BATCHES["one prompt"]), plain) > 10 * TOLERANCE

    ours = gated_pipelines("sd")
    set_scheduler(ours, "ddim")
    ours.unet.gate_step = 2
    latents_of(ours, 4, {"prompt": "a green triangle"})
    ours.unet.gate_step = "none"
    assert difference(latents_of(ours, 4, BATCHES["one prompt"]), plain) < TOLERANCE


def test_quirk_the_official_gate_counts_calls_of_a_second_order_scheduler(
    gated_pipelines: Pipelines, official_pipelines: Pipelines
) -> None:
    """Heun calls the model twice a step: the official gate of 3 steps closes after 2 calls, and the next one fails; ours after 6."""
    from diffusers import HeunDiscreteScheduler

    theirs, ours = official_pipelines("sd"), gated_pipelines("sd")
    for pipeline in (theirs, ours):
        pipeline.scheduler = HeunDiscreteScheduler.from_config(pipeline.scheduler.config)
    rows: list[int] = []
    handle = theirs.unet.conv_in.register_forward_pre_hook(lambda _module, inputs: rows.append(inputs[0].shape[0]))
    try:
        with pytest.raises(ValueError, match="not enough values to unpack"):
            latents_of(official(theirs, "sd"), 5, BATCHES["one prompt"], gate_step=3, **WITHOUT_SELF_ATTENTION_REUSE)
    finally:
        handle.remove()
    assert rows == [2, 2, 1]

    own = ours.unet
    counted = CountedRuns(own.engines["planning"])
    ours.unet = GatedDenoiser(ours, own.replaces, {**own.engines, "planning": counted}, gate_step=3)
    try:
        latents_of(ours, 5, BATCHES["one prompt"])
    finally:
        ours.unet = own
    assert counted.runs == 6

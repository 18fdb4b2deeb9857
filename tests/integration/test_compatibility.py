"""The table of docs/compatibility.md, walked through: each feature of diffusers works, works through ours, does nothing, or is refused."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import tgate_trt
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.errors import GateError, TGateError, UnsupportedError
from tgate_trt.running.drawing import scheduler_of

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
STATES = ("works", "works through", "no effect", "refused")


@dataclass
class Trial:
    """A loaded pipeline without a gate, and diffusers' own to compare it with."""

    ours: Any
    theirs: Any
    folder: Path

    def draw(self, pipeline: Any, **more: Any) -> Tensor:
        arguments = {"prompt": "a red circle", "num_inference_steps": 3, "output_type": "latent", **more}
        latents: Tensor = pipeline(**{"generator": torch.Generator().manual_seed(3), **arguments}).images
        return latents

    def same(self, change: Callable[[Any], Any] = lambda pipeline: pipeline, **more: Any) -> None:
        """Both draw the same after the same change, which makes a difference, or is a way to call."""
        drawn = [self.draw(change(pipeline) or pipeline, **more) for pipeline in (self.ours, self.theirs)]
        assert (drawn[0] - drawn[1]).abs().max() / drawn[1].abs().max().clamp(min=1) < 1e-4

    def no_effect(self, change: Callable[[Any], Any]) -> None:
        before = self.draw(self.ours)
        change(self.ours)
        assert torch.equal(self.draw(self.ours), before)

    def refused(self, attempt: Callable[[Any], Any], error: type[TGateError] = UnsupportedError) -> None:
        with pytest.raises(error) as caught:
            attempt(self.ours)
        assert "\n" not in str(caught.value)

    def lora(self) -> str:
        generator = torch.Generator().manual_seed(0)
        name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
        factors = {f"{name}.lora_A.weight": (4, 32), f"{name}.lora_B.weight": (32, 4)}
        save_file({key: torch.randn(shape, generator=generator) for key, shape in factors.items()}, self.folder / "lora.safetensors")
        return str(self.folder / "lora.safetensors")


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def trial(sd_bundle: Bundle, tiny_sd: Path, tmp_path: Path) -> Trial:
    from diffusers import DiffusionPipeline

    ours = quiet(tgate_trt.load(sd_bundle, gate_step="none", threads=1))
    return Trial(ours, quiet(DiffusionPipeline.from_pretrained(tiny_sd, local_files_only=True)), tmp_path)


FEATURES: dict[str, tuple[str, Callable[[Trial], None]]] = {}
"""State and trial of each feature, by its name in the table."""


def feature(name: str, state: str) -> Callable[[Callable[[Trial], None]], Callable[[Trial], None]]:
    def add(function: Callable[[Trial], None]) -> Callable[[Trial], None]:
        FEATURES[name] = (state, function)
        return function

    return add


@feature("another scheduler", "works")
def _(trial: Trial) -> None:
    for name in ("dpm++", "heun", "pndm"):
        trial.same(lambda pipeline, name=name: setattr(pipeline, "scheduler", scheduler_of(pipeline, name)))  # type: ignore[misc]


@feature("negative prompts", "works")
def _(trial: Trial) -> None:
    trial.same(negative_prompt="blue")


@feature("several prompts and `num_images_per_prompt`", "works")
def _(trial: Trial) -> None:
    trial.same(prompt=["a red circle", "a blue square"], num_images_per_prompt=2)


@feature("no guidance", "works")
def _(trial: Trial) -> None:
    trial.same(guidance_scale=1.0)


@feature("`guidance_rescale`", "works")
def _(trial: Trial) -> None:
    trial.same(guidance_rescale=0.7)


@feature("`latents` and `generator`", "works")
def _(trial: Trial) -> None:
    trial.same(latents=torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)))


@feature("`prompt_embeds` of any number of tokens", "works")
def _(trial: Trial) -> None:
    embeddings = torch.randn(2, 1, 77, 32, generator=torch.Generator().manual_seed(1))
    trial.same(prompt=None, prompt_embeds=embeddings[0], negative_prompt_embeds=embeddings[1])


@feature("`sigmas` and `timesteps`", "works")
def _(trial: Trial) -> None:
    trial.same(lambda pipeline: setattr(pipeline, "scheduler", scheduler_of(pipeline, "euler")), sigmas=[10.0, 3.0, 0.5])
    trial.same(lambda pipeline: setattr(pipeline, "scheduler", scheduler_of(pipeline, "ddpm")), timesteps=[900, 500, 100])


@feature("callbacks, and guidance that a callback ends", "works")
def _(trial: Trial) -> None:
    from diffusers.callbacks import SDCFGCutoffCallback

    trial.same(callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0))


@feature("image to image, by `from_pipe` or `AutoPipelineForImage2Image`", "works")
def _(trial: Trial) -> None:
    from diffusers import AutoPipelineForImage2Image, StableDiffusionImg2ImgPipeline

    image = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for kind in (StableDiffusionImg2ImgPipeline, AutoPipelineForImage2Image):
        trial.same(lambda pipeline, kind=kind: quiet(kind.from_pipe(pipeline)), image=image, strength=0.7)  # type: ignore[misc]


@feature("inpainting with a denoiser of 4 channels", "works")
def _(trial: Trial) -> None:
    from diffusers import StableDiffusionInpaintPipeline
    from PIL import Image

    image, mask = Image.new("RGB", (64, 64), "red"), Image.new("L", (64, 64), 255)
    trial.same(lambda pipeline: quiet(StableDiffusionInpaintPipeline.from_pipe(pipeline)), image=image, mask_image=mask)


@feature("other pipelines that share the modules, each with its own scheduler", "works")
def _(trial: Trial) -> None:
    from diffusers import StableDiffusionPipeline

    def remake(pipeline: Any) -> Any:
        parts = {**pipeline.components, "scheduler": scheduler_of(pipeline, "dpm++")}
        return quiet(StableDiffusionPipeline(**parts, requires_safety_checker=False))

    trial.draw(trial.ours)
    trial.same(remake)


@feature("textual inversions", "works")
def _(trial: Trial) -> None:
    token = torch.randn(32, generator=torch.Generator().manual_seed(1))

    def load(pipeline: Any) -> None:
        pipeline.load_textual_inversion({"<thing>": token}, token="<thing>")

    before = trial.draw(trial.ours, prompt="a <thing>")
    trial.same(load, prompt="a <thing>")
    assert not torch.equal(trial.draw(trial.ours, prompt="a <thing>"), before)


@feature("slicing and tiling of the VAE", "works")
def _(trial: Trial) -> None:
    trial.same(lambda pipeline: pipeline.vae.enable_slicing(), output_type="pt")
    trial.same(lambda pipeline: pipeline.vae.enable_tiling(), output_type="pt")


@feature("`torch.inference_mode`", "works")
def _(trial: Trial) -> None:
    with torch.inference_mode():
        trial.same()
    trial.same()


@feature("`save_pretrained`", "works")
def _(trial: Trial) -> None:
    from diffusers import DiffusionPipeline

    trial.ours.save_pretrained(trial.folder / "saved")
    trial.theirs = quiet(DiffusionPipeline.from_pretrained(trial.folder / "saved", local_files_only=True))
    trial.same()


@feature("LoRAs", "works through")
def _(trial: Trial) -> None:
    file = trial.lora()
    trial.same(lambda pipeline: tgate_trt.refit(pipeline, [file]) if pipeline is trial.ours else pipeline.load_lora_weights(file))


@feature("`load_lora_weights`, `set_adapters`, `fuse_lora`", "refused")
def _(trial: Trial) -> None:
    file = trial.lora()
    trial.refused(lambda pipeline: pipeline.load_lora_weights(file))
    trial.refused(lambda pipeline: pipeline.unet.set_adapters(["a"]))
    trial.refused(lambda pipeline: pipeline.unet.fuse_lora())


@feature("attention slicing, xFormers, fused projections, gradient checkpointing", "no effect")
def _(trial: Trial) -> None:
    trial.no_effect(lambda pipeline: pipeline.enable_attention_slicing())
    trial.no_effect(lambda pipeline: pipeline.unet.enable_xformers_memory_efficient_attention())
    trial.no_effect(lambda pipeline: pipeline.unet.fuse_qkv_projections())
    trial.no_effect(lambda pipeline: pipeline.unet.enable_gradient_checkpointing())


@feature("FreeU", "refused")
def _(trial: Trial) -> None:
    trial.refused(lambda pipeline: pipeline.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4))


@feature("attention processors, and changes of the denoiser's modules", "refused")
def _(trial: Trial) -> None:
    trial.refused(lambda pipeline: pipeline.unet.set_attn_processor(None))
    trial.refused(lambda pipeline: pipeline.unet.up_blocks)


@feature("`cross_attention_kwargs`", "refused")
def _(trial: Trial) -> None:
    trial.refused(lambda pipeline: trial.draw(pipeline, cross_attention_kwargs={"scale": 0.5}))


@feature("ControlNet and T2I-Adapter, without `--control` at the build", "refused")
def _(trial: Trial) -> None:
    trial.ours.scheduler.set_timesteps(3)
    call = (torch.zeros(2, 4, 8, 8), trial.ours.scheduler.timesteps[0], torch.zeros(2, 77, 32))
    trial.refused(lambda pipeline: pipeline.unet(*call, mid_block_additional_residual=torch.zeros(2, 64, 4, 4)))
    trial.refused(lambda pipeline: pipeline.unet(*call, down_intrablock_additional_residuals=[torch.zeros(2, 32, 8, 8)]))


@feature("an IP-Adapter that the bundle was built without", "refused")
def _(trial: Trial) -> None:
    trial.ours.scheduler.set_timesteps(3)
    text = (torch.zeros(2, 77, 32), [torch.zeros(2, 4, 32)])
    trial.refused(lambda pipeline: pipeline.unet(torch.zeros(2, 4, 8, 8), pipeline.scheduler.timesteps[0], text))
    trial.refused(lambda pipeline: pipeline.set_ip_adapter_scale(0.5))


@feature("other sizes, `prompt_embeds` of another width, more images than the bundle's", "refused")
def _(trial: Trial) -> None:
    trial.refused(lambda pipeline: trial.draw(pipeline, height=128, width=128), GateError)
    wide = {"prompt": None, "prompt_embeds": torch.zeros(1, 77, 48), "negative_prompt_embeds": torch.zeros(1, 77, 48)}
    trial.refused(lambda pipeline: trial.draw(pipeline, **wide), GateError)
    trial.refused(lambda pipeline: trial.draw(pipeline, num_images_per_prompt=32), GateError)


@feature("runs of one pipeline, or of pipelines that share its denoiser, at the same time in several threads", "refused")
def _(trial: Trial) -> None:
    def run_beside(pipeline: Any) -> None:
        errors: list[TGateError] = []

        def second() -> None:
            try:
                trial.draw(pipeline)
            except TGateError as error:
                errors.append(error)

        def callback(_pipeline: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            if step == 0:
                thread = threading.Thread(target=second)
                thread.start()
                thread.join()
            return values

        trial.draw(pipeline, callback_on_step_end=callback)

    trial.refused(run_beside, GateError)


@feature("`copy.deepcopy` and `pickle`", "refused")
def _(trial: Trial) -> None:
    trial.refused(copy.deepcopy)
    trial.refused(pickle.dumps)


def rows() -> dict[str, str]:
    """State of each feature in the page's table."""
    table = PAGE.read_text(encoding="utf-8").partition("## What a bundle")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: state for name, state, *_ in cells[1:]}


def test_the_table_has_every_trial_and_no_other_row() -> None:
    found = {name: next(state for state in STATES if text.startswith(state)) for name, text in rows().items()}
    # "works through" begins with "works": the longer state is the row's.
    found = {name: "works through" if rows()[name].startswith("works through") else state for name, state in found.items()}
    assert found == {name: state for name, (state, _) in FEATURES.items()}


@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_is_as_the_table_says(name: str, trial: Trial) -> None:
    FEATURES[name][1](trial)

"""Transformers with cross-attention: PixArt equals the official code, and every way of calling equals a loop gated by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tgate_trt
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.errors import GateError

from ..conftest import TINY_PIXART
from ..export.test_denoisers import TINY, loud
from .conftest import eager_pipeline, quiet
from .hand_gated import HandGated, close

tgate = pytest.importorskip("tgate", reason="the official code is a development dependency")

LOADERS = {"tiny_pixart": "TgatePixArtAlphaLoader", "tiny_pixart_sigma": "TgatePixArtSigmaLoader"}
SETTINGS: dict[str, Any] = {
    "num_inference_steps": 6,
    "height": 64,
    "width": 64,
    "output_type": "latent",
    "use_resolution_binning": False,
    "guidance_scale": 4.5,
}

SETTINGS_OF = {name: {key: value for key, value in config.items() if key[0] != "_"} for name, config in TINY.items()}
"""Arguments of each small model's class."""


@pytest.fixture(scope="module", params=LOADERS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Bundle]:
    folder = request.getfixturevalue(request.param)
    graphs = ("vanilla", "planning", "fidelity")
    options: Any = {"graphs": graphs, "gates": ["4,sp=2,warm=1"], "backend": ["onnxruntime", "pytorch"], "verify": False}
    bundle = tgate_trt.build(folder, tmp_path_factory.mktemp("bundles") / request.param, height=64, width=64, **options)
    return request.param, folder, bundle


@pytest.mark.parametrize("batch", [{"prompt": "a red circle"}, {"prompt": ["a red circle", "blue"], "negative_prompt": ["green", "x"]}])
@pytest.mark.parametrize("gate_step", [1, 4])
def test_pixart_equals_the_official_code(model: tuple[str, Path, Bundle], gate_step: int, batch: dict[str, Any]) -> None:
    name, folder, bundle = model
    official = getattr(tgate, LOADERS[name])(eager_pipeline(folder), gate_step=gate_step, num_inference_steps=6)
    ours = quiet(tgate_trt.load(bundle, gate_step=gate_step, threads=1))
    more = {"gate_step": gate_step, "sp_interval": 1, "fi_interval": 1, "warm_up": 2}
    theirs = official.tgate(**SETTINGS, **batch, **more, generator=torch.Generator().manual_seed(5)).images
    drawn = ours(**SETTINGS, **batch, generator=torch.Generator().manual_seed(5)).images
    assert close(drawn, theirs)
    vanilla = eager_pipeline(folder)(**SETTINGS, **batch, generator=torch.Generator().manual_seed(5)).images
    assert not close(drawn, vanilla), "the gate has no effect, so the comparison shows nothing"


def test_without_a_gate_it_is_diffusers_own(model: tuple[str, Path, Bundle]) -> None:
    _, folder, bundle = model
    pipelines = quiet(tgate_trt.load(bundle, gate_step="none", threads=1)), eager_pipeline(folder)
    for tokens in (40, 200):  # the text's length is a dimension of the graph
        more = {"prompt": "a red circle", "max_sequence_length": tokens}
        ours, theirs = (each(**SETTINGS, **more, generator=torch.Generator().manual_seed(5)).images for each in pipelines)
        assert close(ours, theirs)


def test_self_attention_is_reused_as_the_official_code_does(model: tuple[str, Path, Bundle]) -> None:
    name, folder, bundle = model
    official = getattr(tgate, LOADERS[name])(eager_pipeline(folder), gate_step=4, num_inference_steps=6)
    more = {"gate_step": 4, "sp_interval": 2, "fi_interval": 1, "warm_up": 1}
    theirs = official.tgate(**SETTINGS, prompt="a red circle", **more, generator=torch.Generator().manual_seed(5)).images
    ours = quiet(tgate_trt.load(bundle, gate="4,sp=2,warm=1", threads=1))
    assert close(ours(**SETTINGS, prompt="a red circle", generator=torch.Generator().manual_seed(5)).images, theirs)


def test_another_size_is_refused(model: tuple[str, Path, Bundle]) -> None:
    pipeline = quiet(tgate_trt.load(model[2], threads=1))
    with pytest.raises(GateError, match=r"draws pictures of 64×64 pixels, and the call asks for 128×64"):
        pipeline(**SETTINGS | {"width": 128}, prompt="a red circle")


def test_every_engine_draws_the_same(model: tuple[str, Path, Bundle]) -> None:
    drawn = []
    for backend in ("onnxruntime", "pytorch"):
        pipeline = quiet(tgate_trt.load(model[2], gate_step=3, threads=1, backend=backend))
        drawn.append(pipeline(**SETTINGS, prompt="red", generator=torch.Generator().manual_seed(5)).images)
    assert close(*drawn)


# Further classes, whose pipelines are made here: without text encoders, so they are given embeddings.


def text(width: int, tokens: int = 7, seed: int = 1) -> Tensor:
    return torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed))


def wan() -> tuple[Any, dict[str, Any]]:
    """Wan, which is called twice a step, in a context that names the half."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    vae = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    transformer = WanTransformer3DModel(**SETTINGS_OF["wan"])
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipeline = WanPipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=loud(transformer), scheduler=scheduler)
    return pipeline, {"prompt_embeds": text(16), "negative_prompt_embeds": text(16, seed=2), "num_frames": 1}


def sana() -> tuple[Any, dict[str, Any]]:
    """Sana, whose cross-attention has no norm before it, and whose text has a mask."""
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    blocks: dict[str, Any] = {f"{part}_block_types": "ResBlock" for part in ("encoder", "decoder")}
    blocks |= {f"{part}_block_out_channels": (8,) * 4 for part in ("encoder", "decoder")}
    blocks |= {f"{part}_layers_per_block": (1,) * 4 for part in ("encoder", "decoder")}
    blocks |= {f"{part}_qkv_multiscales": ((),) * 4 for part in ("encoder", "decoder")}
    vae = AutoencoderDC(latent_channels=4, **blocks)
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    transformer = loud(SanaTransformer2DModel(**SETTINGS_OF["sana"]))
    pipeline = SanaPipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=scheduler)
    mask = torch.ones(1, 7)
    mask[:, 5:] = 0
    more = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask, "use_resolution_binning": False}
    return pipeline, {"prompt_embeds": text(24), "negative_prompt_embeds": text(24, seed=2), "negative_prompt": None, **more}


def hunyuan() -> tuple[Any, dict[str, Any]]:
    """HunyuanDiT, with two texts and with positions that all rows share."""
    from diffusers import AutoencoderKL, DDPMScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline

    vae = AutoencoderKL(**{name: value for name, value in TINY_PIXART["vae/config.json"].items() if name[0] != "_"})
    transformer = loud(HunyuanDiT2DModel(**SETTINGS_OF["hunyuan"]))
    pipeline = HunyuanDiTPipeline(
        vae=vae, text_encoder=None, tokenizer=None, transformer=transformer, scheduler=DDPMScheduler(prediction_type="v_prediction"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    more: dict[str, Any] = {"use_resolution_binning": False}
    for sign, seed in (("", 1), ("negative_", 2)):
        for part, width, size in (("", 16, 7), ("_2", 24, 9)):
            more[f"{sign}prompt_attention_mask{part}"] = torch.ones(1, size)
            more[f"{sign}prompt_embeds{part}"] = text(width, size, seed)
    return pipeline, more


@pytest.fixture(scope="module", params=[wan, sana, hunyuan])
def further(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any], Bundle]:
    """An eager pipeline, arguments of its call, and a bundle that is compared with it at its build."""
    torch.manual_seed(0)
    pipeline, more = request.param()
    folder = tmp_path_factory.mktemp("bundles") / request.param.__name__
    return quiet(pipeline), more, tgate_trt.build(pipeline, folder, height=64, width=64, components=False)


@pytest.mark.parametrize("gate", ["3", "3,after=positive", "none,forecast=2", "3,forecast=2"])
def test_a_pipeline_equals_one_that_is_gated_by_hand(further: tuple[Any, dict[str, Any], Bundle], gate: str) -> None:
    pipeline, more, bundle = further
    call = {"num_inference_steps": 6, "height": 64, "width": 64, "output_type": "latent", "guidance_scale": 4.5, **more}

    def draw() -> Tensor:
        drawn = pipeline(**call, generator=torch.Generator().manual_seed(5))
        latents: Tensor = drawn.frames if hasattr(drawn, "frames") else drawn.images
        return latents

    vanilla, own = draw(), pipeline.transformer
    try:
        pipeline.transformer = HandGated(own, 3, in_pairs=type(pipeline).__name__ == "WanPipeline")
        by_hand, pipeline.transformer = draw(), own
        tgate_trt.apply(pipeline, bundle, gate="none", threads=1)
        assert close(draw(), vanilla)
        pipeline.transformer.gate = gate
        drawn = draw()
    finally:
        pipeline.transformer = own
    assert not close(drawn, vanilla)
    assert close(drawn, by_hand) == (gate == "3")


def test_image_to_video_equals_the_official_code(tmp_path: Path) -> None:
    """SVD: the context is one token, frames are rows within the model, and the half that stays is the image's, with the caches' mean."""
    from diffusers import (
        AutoencoderKLTemporalDecoder,
        EulerDiscreteScheduler,
        StableVideoDiffusionPipeline,
        UNetSpatioTemporalConditionModel,
    )
    from PIL import Image
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=56, projection_dim=16
    )
    blocks: dict[str, Any] = {"block_out_channels": [32] * 4, "down_block_types": ["DownEncoderBlock2D"] * 4, "latent_channels": 4}
    pipeline = quiet(
        StableVideoDiffusionPipeline(
            vae=AutoencoderKLTemporalDecoder(**blocks).eval(),
            image_encoder=CLIPVisionModelWithProjection(vision).eval(),
            unet=loud(UNetSpatioTemporalConditionModel(**SETTINGS_OF["svd"])),
            scheduler=EulerDiscreteScheduler(
                prediction_type="v_prediction", timestep_type="continuous", use_karras_sigmas=True, sigma_min=0.002, sigma_max=700.0
            ),
            feature_extractor=CLIPImageProcessor(size={"shortest_edge": 224}),
        )
    )
    bundle = tgate_trt.build(pipeline, tmp_path / "bundle", height=64, width=64, backend=["onnxruntime", "pytorch"], verify=False)
    call = {"height": 64, "width": 64, "num_frames": 3, "num_inference_steps": 5, "output_type": "latent", "decode_chunk_size": 1}
    image = Image.new("RGB", (64, 64), (200, 30, 60))

    def draw(function: Any, **more: Any) -> Tensor:
        frames: Tensor = function(image, **call, **more, generator=torch.Generator().manual_seed(5)).frames
        return frames

    vanilla = draw(pipeline)
    official = tgate.TgateSVDLoader(pipeline)
    theirs = draw(official.tgate, gate_step=2, sp_interval=1, fi_interval=1, warm_up=0)
    assert not close(theirs, vanilla)
    for backend in ("onnxruntime", "pytorch"):
        ours = quiet(tgate_trt.load(bundle, gate_step=2, threads=1, backend=backend))
        assert ours.unet.after_gate == "positive-mean"
        assert close(draw(ours), theirs)

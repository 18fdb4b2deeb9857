"""What a user does to a pipeline's modules works, has no effect by nature, or raises: nothing is swallowed."""

from __future__ import annotations

import copy
import logging
import operator
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

import tgate_trt
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.errors import UnsupportedError


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, **more: Any) -> Tensor:
    arguments = {"num_inference_steps": 3, "output_type": "pt", "height": 64, "width": 64, "generator": torch.Generator().manual_seed(3)}
    pictures: Tensor = pipeline("a red circle", **{**arguments, **more}).images
    return pictures


@pytest.fixture(params=["loaded", "applied"])
def pipeline(request: pytest.FixtureRequest, sd_bundle: Bundle, tiny_sd: Path) -> Any:
    """A pipeline from `load`, and one of diffusers' with a bundle applied."""
    if request.param == "loaded":
        return quiet(tgate_trt.load(sd_bundle, gate_step=2, threads=1))
    own = DiffusionPipeline.from_pretrained(tiny_sd, torch_dtype=torch.float32, local_files_only=True)
    return quiet(tgate_trt.apply(own, sd_bundle, gate_step=2, threads=1))


@pytest.fixture
def lora(tiny_sd: Path, tmp_path: Path) -> Path:
    """A LoRA that changes the UNet alone."""
    generator = torch.Generator().manual_seed(0)
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = {f"{name}.lora_A.weight": (4, 32), f"{name}.lora_B.weight": (32, 4)}
    file = tmp_path / "lora.safetensors"
    save_file({key: torch.randn(shape, generator=generator) for key, shape in factors.items()}, file)
    return file


@pytest.mark.parametrize("loaded_from", ["a path", "a state dict"])
def test_loading_a_lora_the_way_of_diffusers_names_ours(loaded_from: str, pipeline: Any, lora: Path) -> None:
    from safetensors.torch import load_file

    before = draw(pipeline)
    with pytest.raises(UnsupportedError, match=r"'load_lora_adapter' .* put LoRAs in with tgate_trt\.refit\(pipeline"):
        pipeline.load_lora_weights(str(lora) if loaded_from == "a path" else load_file(lora))
    assert torch.equal(draw(pipeline), before)
    tgate_trt.refit(pipeline, [str(lora)])
    assert not torch.equal(draw(pipeline), before)
    pipeline.unload_lora_weights()  # diffusers' has none to unload


@pytest.mark.parametrize(
    "change",
    [
        lambda pipeline: pipeline.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
        lambda pipeline: pipeline.unet.set_attn_processor(None),
        lambda pipeline: pipeline.unet.attn_processors,
        lambda pipeline: pipeline.unet.add_adapter(None),
        lambda pipeline: pipeline.unet.set_adapters(["a"]),
        lambda pipeline: pipeline.unet.enable_layerwise_casting(),
        lambda pipeline: pipeline.unet.down_blocks,
        lambda pipeline: pipeline.unet.mid_block.resnets,
        lambda pipeline: setattr(pipeline.unet, "conv_in", torch.nn.Identity()),
        lambda pipeline: setattr(pipeline.unet, "time_proj", None),
        lambda pipeline: pipeline.set_ip_adapter_scale(0.5),
    ],
)
def test_a_change_of_the_denoiser_raises(change: Any, pipeline: Any) -> None:
    before = draw(pipeline)
    with pytest.raises(UnsupportedError, match="which does not run here"):
        change(pipeline)
    assert torch.equal(draw(pipeline), before)


@pytest.mark.parametrize(
    "change", ["enable_attention_slicing", "disable_attention_slicing", "disable_freeu", "vae.enable_slicing", "vae.enable_tiling"]
)
def test_what_changes_no_output_works_or_warns(change: str, pipeline: Any, caplog: pytest.LogCaptureFixture) -> None:
    before = draw(pipeline)
    with caplog.at_level(logging.WARNING, "tgate_trt"):
        operator.attrgetter(change)(pipeline)()
    assert (draw(pipeline) - before).abs().max() < 1e-4
    assert "vae" in change or "has no effect on compiled engines" in caplog.text


def test_what_pipelines_read_is_there(pipeline: Any) -> None:
    assert pipeline.unet.config.in_channels == 4 and pipeline.unet.dtype == torch.float32
    assert hasattr(pipeline.unet, "add_embedding") is hasattr(pipeline.unet.replaces, "add_embedding")
    assert not hasattr(pipeline.unet, "nothing_of_the_kind")
    assert pipeline.config["unet"] == ("diffusers", "UNet2DConditionModel")


def test_a_pipeline_is_saved_whole_and_loads_as_diffusers_own(pipeline: Any, tiny_sd: Path, tmp_path: Path) -> None:
    before = draw(pipeline, num_inference_steps=2)
    pipeline.save_pretrained(tmp_path / "saved")
    saved, own = (quiet(DiffusionPipeline.from_pretrained(path, local_files_only=True)) for path in (tmp_path / "saved", tiny_sd))
    assert {name: type(part) for name, part in saved.components.items()} == {name: type(part) for name, part in own.components.items()}
    for name in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(saved, name).state_dict(), getattr(own, name).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert torch.equal(draw(pipeline, num_inference_steps=2), before), "saving changes nothing"


def test_a_saved_pipeline_has_the_loras_that_were_put_into_it(sd_bundle: Bundle, lora: Path, tmp_path: Path) -> None:
    pipeline = quiet(tgate_trt.load(sd_bundle, gate_step="none", threads=1))
    tgate_trt.refit(pipeline, [str(lora)])
    pipeline.save_pretrained(tmp_path / "saved")
    saved = quiet(DiffusionPipeline.from_pretrained(tmp_path / "saved", local_files_only=True))
    assert (draw(saved) - draw(pipeline)).abs().max() < 1e-4


def test_a_bundle_is_built_from_a_loaded_pipeline(pipeline: Any, sd_bundle: Bundle, tmp_path: Path) -> None:
    built = tgate_trt.build(pipeline, tmp_path / "again", verify=False, components=False)
    assert built.manifest.files["weights.safetensors"] == sd_bundle.manifest.files["weights.safetensors"]


def test_copies_and_pickles_are_refused(pipeline: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"cannot be copied; load the bundle again"):
        copy.deepcopy(pipeline)
    with pytest.raises(UnsupportedError, match=r"cannot be pickled; load the bundle in the other process"):
        pickle.dumps(pipeline)

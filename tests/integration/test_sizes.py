"""A loaded pipeline draws its bundle's size by default; errors of size speak of pictures, tokens and images."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import tgate_trt
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.errors import GateError


@pytest.fixture(scope="module", params=["tiny_sd", "tiny_sdxl"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle for pictures that are not the model's own size, and not square."""
    folder = tmp_path_factory.mktemp("bundles") / request.param
    return tgate_trt.build(request.getfixturevalue(request.param), folder, height=96, width=128, verify=False)


@pytest.fixture(scope="module")
def pipeline(bundle: Bundle) -> Any:
    loaded = tgate_trt.load(bundle, gate_step=1, threads=1)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_the_default_size_is_the_bundles(pipeline: Any) -> None:
    arguments = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
    drawn = pipeline("a red circle", **arguments).images
    assert drawn.shape == (1, 3, 96, 128)
    arguments["generator"] = torch.Generator().manual_seed(0)
    assert torch.equal(pipeline("a red circle", height=96, width=128, **arguments).images, drawn)


def test_the_pipeline_is_of_its_own_class(pipeline: Any) -> None:
    own = getattr(diffusers, type(pipeline).__name__)
    assert isinstance(pipeline, own) and type(pipeline).__module__ == own.__module__
    assert inspect.signature(pipeline.__call__) == inspect.signature(own.__call__.__get__(pipeline))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 64, "width": 64}, "draws pictures of 128×96 pixels, and the call asks for 64×64; pass height=96 and width=128"),
        ({"height": 128}, "draws pictures of 128×96 pixels, and the call asks for 128×128"),
        ({"num_images_per_prompt": 32}, "draws 1 to 31 images in one run, and the call asks for 32"),
        ({"num_images_per_prompt": 64, "guidance_scale": 1.0}, "draws 1 to 63 images in one run, and the call asks for 64"),
    ],
)
def test_errors_speak_of_pictures(arguments: dict[str, Any], message: str, pipeline: Any) -> None:
    with pytest.raises(GateError, match=message):
        pipeline("a red circle", num_inference_steps=2, output_type="latent", **arguments)


def test_a_long_prompt_is_one_sentence(sd_bundle: Bundle) -> None:
    pipeline = tgate_trt.load(sd_bundle, gate_step=1, threads=1)
    embeddings = {name: torch.zeros(1, 154, 32) for name in ("prompt_embeds", "negative_prompt_embeds")}
    with pytest.raises(GateError, match="takes prompts of 77 tokens, and the call gives 154"):
        pipeline(**embeddings, num_inference_steps=2, output_type="latent")


def test_other_sizes_are_refused_where_a_bundle_is_applied(tiny_sd: Path, sd_bundle: Bundle) -> None:
    from diffusers import DiffusionPipeline

    own = DiffusionPipeline.from_pretrained(tiny_sd, local_files_only=True)
    tgate_trt.apply(own, sd_bundle, gate_step=1, threads=1)
    with pytest.raises(GateError, match="draws pictures of 64×64 pixels, and the call asks for 96×64"):
        own("a red circle", height=64, width=96, num_inference_steps=2, output_type="latent")

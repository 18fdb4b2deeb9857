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
from tgate_trt.errors import GateError, InputError
from tgate_trt.specs import Bounds

from .conftest import eager_pipeline, quiet
from .hand_gated import HandGated, close

RANGE = {"height": "64:96:128", "width": "64:96:160"}


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


def test_other_sizes_are_refused_where_a_bundle_is_applied(tiny_sd: Path, sd_bundle: Bundle) -> None:
    from diffusers import DiffusionPipeline

    own = DiffusionPipeline.from_pretrained(tiny_sd, local_files_only=True)
    tgate_trt.apply(own, sd_bundle, gate_step=1, threads=1)
    with pytest.raises(GateError, match="draws pictures of 64×64 pixels, and the call asks for 96×64"):
        own("a red circle", height=64, width=96, num_inference_steps=2, output_type="latent")


# One bundle for a range of sizes


@pytest.fixture(scope="module", params=["tiny_sd", "tiny_sdxl"])
def ranged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    """A model and a bundle of it for pictures of many sizes; that of the small SD is compared with eager PyTorch at its build."""
    folder: Path = request.getfixturevalue(request.param)
    place = tmp_path_factory.mktemp("bundles") / "ranged"
    options: Any = {"graphs": ("vanilla", "planning", "fidelity"), "backend": ["onnxruntime", "pytorch"], **RANGE}
    return folder, tgate_trt.build(folder, place, verify=request.param == "tiny_sd", **options)


@pytest.mark.parametrize("ranged", ["tiny_sd"], indirect=True)
def test_graphs_of_a_range_are_compared_at_its_ends(ranged: tuple[Path, Bundle]) -> None:
    _, bundle = ranged
    assert {graph: len(report["checks"]) for graph, report in bundle.manifest.verification.items()}["planning"] == 5
    assert bundle.graph("fidelity").dimensions["height"] == Bounds(4, 6, 8)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 160), (128, 80)])
@pytest.mark.parametrize("backend", ["onnxruntime", "pytorch"])
def test_a_range_draws_every_size(ranged: tuple[Path, Bundle], backend: str, height: int, width: int, images: int) -> None:
    folder, bundle = ranged
    call = {"prompt": "a red circle", "height": height, "width": width, "num_inference_steps": 4, "num_images_per_prompt": images}

    def draw(pipeline: Any) -> torch.Tensor:
        latents: torch.Tensor = quiet(pipeline)(**call, output_type="latent", generator=torch.Generator().manual_seed(1)).images
        return latents

    by_hand = eager_pipeline(folder)
    by_hand.unet = HandGated(by_hand.unet, 2)
    expected, drawn = draw(by_hand), draw(tgate_trt.load(bundle, gate_step=2, threads=1, backend=backend))
    assert drawn.shape[2:] == (height // 8, width // 8)
    assert close(drawn, expected)


def test_sizes_follow_one_another(ranged: tuple[Path, Bundle]) -> None:
    """Buffers and caches of one size never reach a run of another."""
    _, bundle = ranged
    pipeline = quiet(tgate_trt.load(bundle, gate_step=2, threads=1))
    sizes = [(64, 64), (96, 160), (64, 64)]
    drawn = [
        pipeline(
            "a red circle", height=height, width=width, num_inference_steps=4, output_type="pt", generator=torch.Generator().manual_seed(1)
        ).images
        for height, width in sizes
    ]
    assert [tuple(picture.shape[2:]) for picture in drawn] == sizes
    assert torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(("height", "width"), [(160, 64), (64, 48)])
def test_sizes_outside_a_range_are_refused_with_it(ranged: tuple[Path, Bundle], height: int, width: int) -> None:
    pipeline = quiet(tgate_trt.load(ranged[1], gate_step=2, threads=1))
    with pytest.raises(GateError, match=f"pictures of 64:96:160×64:96:128 pixels, and the call asks for {width}×{height}"):
        pipeline("a red circle", height=height, width=width, num_inference_steps=4, output_type="latent")


def test_a_range_is_in_steps_of_the_model(tiny_sd: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="multiple of 16 pixels for this model, got 72; the nearest is 80"):
        tgate_trt.build(tiny_sd, tmp_path / "bundle", height="64:72:128")

"""LoRAs in bundles: fused when they are built, put in and taken out afterwards, on disk and in a pipeline that runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from typer.testing import CliRunner

import tgate_trt
from tgate_trt.building.staleness import state_of
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.cli import refit as command
from tgate_trt.engines.tensorrt_flavours import RTX
from tgate_trt.errors import InputError, StaleBundleError, UnsupportedError
from tgate_trt.files import sha256

ARGUMENTS = {"num_inference_steps": 2, "output_type": "pt", "height": 64, "width": 64}


@pytest.fixture(scope="module")
def loras(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two LoRAs ``a`` and ``b`` of `tiny_sdxl`'s UNet and text encoders, and ``conv`` of its convolutions."""
    folder = tmp_path_factory.mktemp("loras")
    text = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "out_proj", "fc1"], init_lora_weights=False)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        pipeline = DiffusionPipeline.from_pretrained(tiny_sdxl, local_files_only=True)
        pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        pipeline.text_encoder.add_adapter(text)
        pipeline.text_encoder_2.add_adapter(text)
        layers = {
            f"{part}_lora_layers": get_peft_model_state_dict(getattr(pipeline, part)) for part in ("unet", "text_encoder", "text_encoder_2")
        }
        pipeline.save_lora_weights(folder, weight_name=f"{name}.safetensors", **layers)
    pipeline = DiffusionPipeline.from_pretrained(tiny_sdxl, local_files_only=True)
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["conv1"], init_lora_weights=False))
    pipeline.save_lora_weights(folder, weight_name="conv.safetensors", unet_lora_layers=get_peft_model_state_dict(pipeline.unet))
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture
def bundle(sdxl_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of the bundle of `tiny_sdxl`, with engines of ONNX Runtime."""
    shutil.copytree(sdxl_bundle.folder, tmp_path / "bundle")
    return tmp_path / "bundle"


def draw(pipeline: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    pictures: torch.Tensor = pipeline("a red circle", generator=torch.Generator().manual_seed(0), **ARGUMENTS).images
    return pictures


def load(bundle: Path | Bundle, **more: Any) -> Any:
    return tgate_trt.load(bundle, gate_step="none", threads=1, **more)


def drawn_by_diffusers(folder: Path, lora: Path, scale: float) -> torch.Tensor:
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    pipeline.fuse_lora(lora_scale=scale, components=["unet", "text_encoder", "text_encoder_2"])
    return draw(pipeline)


@pytest.mark.parametrize("components", [True, False])
def test_a_refitted_bundle_draws_as_diffusers_does(bundle: Path, tiny_sdxl: Path, loras: dict[str, Path], components: bool) -> None:
    expected = drawn_by_diffusers(tiny_sdxl, loras["a"], 0.8)
    before = draw(load(bundle, components=components))
    tgate_trt.refit(bundle, [f"{loras['a']}:0.8"])
    after = draw(load(bundle, components=components))
    assert (after - expected).abs().max() < 1e-4
    assert (after - before).abs().max() > 1e-3, "and it makes a difference"


def test_from_a_to_b_to_a_leaves_a(bundle: Path, loras: dict[str, Path]) -> None:
    weights = {path: sha256(path) for path in bundle.rglob("*.safetensors")}
    built = draw(load(bundle))
    pictures = {}
    for step, name in enumerate("aba"):
        held = tgate_trt.refit(bundle, [str(loras[name])]).manifest.lora
        assert [entry.name for entry in held] == [f"{name}.safetensors"]
        pictures[step] = draw(load(bundle))
    assert torch.equal(pictures[0], pictures[2]) and not torch.equal(pictures[0], pictures[1])
    assert tgate_trt.refit(bundle).manifest.lora == ()
    assert torch.equal(draw(load(bundle)), built)
    assert {path: sha256(path) for path in bundle.rglob("*.safetensors")} == weights
    assert not state_of(Bundle.open(bundle)).stale


@pytest.mark.parametrize("components", [True, False])
def test_a_running_pipeline_is_refitted(bundle: Path, loras: dict[str, Path], components: bool) -> None:
    pipeline = load(bundle, components=components)
    built = draw(pipeline)
    pictures = [draw(tgate_trt.refit(pipeline, [str(loras[name])])) for name in "aba"]
    assert torch.equal(pictures[0], pictures[2]) and not torch.equal(pictures[0], pictures[1])
    assert torch.equal(draw(tgate_trt.refit(pipeline, [])), built)
    assert not Bundle.open(bundle).manifest.lora, "the bundle on disk stays as it is"
    tgate_trt.refit(bundle, [str(loras["a"])])
    assert torch.equal(draw(load(bundle, components=components)), pictures[0])


def test_a_lora_that_is_built_in(tiny_sdxl: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    built = tgate_trt.build(tiny_sdxl, tmp_path / "built", lora=[f"{loras['a']}:0.8"], components=False)
    assert (draw(load(built)) - drawn_by_diffusers(tiny_sdxl, loras["a"], 0.8)).abs().max() < 1e-4
    assert not state_of(built).stale
    assert tgate_trt.build(tiny_sdxl, tmp_path / "built", lora=[f"{loras['a']}:0.8"], components=False).manifest == built.manifest, (
        "it is up to date"
    )


@pytest.mark.skipif(not RTX.is_installed(), reason="tensorrt-rtx is not installed here")
@pytest.mark.parametrize(("weights", "taken"), [("baked", ""), ("shared-linear", "a"), ("shared", "ac")])
def test_engines_that_hold_their_weights_refuse(tiny_sdxl: Path, loras: dict[str, Path], tmp_path: Path, weights: str, taken: str) -> None:
    bundle = tgate_trt.build(
        tiny_sdxl,
        tmp_path / "bundle",
        backend="tensorrt-rtx",
        precision="fp32",
        weights=weights,
        verify=False,
        graphs=["fidelity"],
        components=False,
    )
    for lora in ("a", "conv"):
        if lora[0] in taken:
            assert tgate_trt.refit(bundle.folder, [str(loras[lora])]).manifest.lora
            continue
        with pytest.raises(UnsupportedError, match="which the LoRA changes; build the bundle with --weights shared, or with --lora"):
            tgate_trt.refit(bundle.folder, [str(loras[lora])])


def test_the_command(bundle: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(command.app, [str(bundle), "--lora", f"{loras['a']}:0.5", "--lora", str(loras["conv"])])
    assert done.exit_code == 0 and "a.safetensors (0.5), conv.safetensors (1)" in done.output
    done = runner.invoke(command.app, [str(bundle)])
    assert done.exit_code == 0 and "the weights that were built" in done.output
    for arguments, message in (
        ([str(bundle), "--lora", str(tmp_path / "gone.safetensors")], "there is no LoRA file"),
        ([str(tmp_path / "nowhere"), "--lora", str(loras["a"])], "there is no such folder"),
    ):
        failed = runner.invoke(command.app, arguments)
        assert failed.exit_code == 1 and message in failed.output and "Traceback" not in failed.output


def test_what_cannot_be_refitted(bundle: Path, sd_bundle: Bundle, loras: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="does not fit this model"):
        tgate_trt.refit(sd_bundle, [str(loras["a"])])
    (bundle / "weights.safetensors").unlink()
    with pytest.raises((StaleBundleError, tgate_trt.BundleError)):
        tgate_trt.refit(bundle, [str(loras["a"])])
    with pytest.raises(InputError, match="has no engines of tgate-trt"):
        tgate_trt.refit(DiffusionPipeline.from_pretrained(sd_bundle.pipeline, unet=None, local_files_only=True), [])

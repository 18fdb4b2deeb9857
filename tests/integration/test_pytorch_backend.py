"""PyTorch as a backend of a bundle: built, chosen, inspected and refitted like the others, and the same pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tgate_trt
from tgate_trt.building.staleness import state_of
from tgate_trt.bundle.backends import choose_backend
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.engines.pytorch import PyTorchEngine
from tgate_trt.errors import InputError, UnsupportedError

ARGUMENTS: dict[str, Any] = {"num_inference_steps": 5, "output_type": "latent", "height": 64, "width": 64}
PROMPT = ["a red circle", "a small blue square"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_sdxl: Path) -> Bundle:
    """Bundle of `tiny_sdxl` with engines of both backends. Read only."""
    return tgate_trt.build(
        tiny_sdxl, tmp_path_factory.mktemp("bundles") / "tiny-sdxl", backend=["onnxruntime", "pytorch"], verify=False, components=False
    )


def draw(pipeline: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    latents: torch.Tensor = pipeline(PROMPT, generator=torch.Generator().manual_seed(0), **ARGUMENTS).images
    return latents


@pytest.mark.parametrize("gate_step", [1, 3, "none"])
def test_both_backends_draw_the_same(bundle: Bundle, gate_step: int | str) -> None:
    pictures = [draw(tgate_trt.load(bundle, backend=backend, gate_step=gate_step)) for backend in ("onnxruntime", "pytorch")]
    torch.testing.assert_close(*pictures, rtol=0, atol=1e-4 * float(pictures[0].abs().max()))


def test_a_bundle_of_pytorch_alone_runs(tiny_sd: Path, tmp_path: Path) -> None:
    bundle = tgate_trt.build(tiny_sd, tmp_path / "bundle", backend="pytorch", precision="fp32", components=False)
    assert set(bundle.manifest.engines) == {"pytorch"}
    assert set(bundle.manifest.verification) >= {"planning", "fidelity"}
    pipeline = tgate_trt.load(bundle)
    assert isinstance(pipeline.unet.engines["planning"], PyTorchEngine)
    assert draw(pipeline).isfinite().all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_onnx_runtime_comes_first(bundle: Bundle) -> None:
    assert choose_backend(bundle, None) == "onnxruntime"
    assert choose_backend(bundle, "pytorch") == "pytorch"
    assert "its pytorch engines run here" in state_of(bundle).remarks
    with pytest.raises(UnsupportedError, match="PyTorch cannot use CUDA here; use device='cpu'"):
        tgate_trt.load(bundle, backend="pytorch", device="cuda")


def test_loras_are_put_in_and_taken_out(bundle: Bundle, tmp_path: Path) -> None:
    weight = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    width = load_file(bundle.folder / "weights.safetensors")[weight.removeprefix("unet.") + ".weight"].shape[0]
    lora = {f"{weight}.lora_A.weight": torch.randn(2, width), f"{weight}.lora_B.weight": torch.randn(width, 2)}
    save_file(lora, tmp_path / "lora.safetensors")
    pictures = {}
    for backend in ("onnxruntime", "pytorch"):
        pipeline = tgate_trt.load(bundle, backend=backend, gate_step=2)
        before = draw(pipeline)
        tgate_trt.refit(pipeline, [f"{tmp_path / 'lora.safetensors'}:0.5"])
        pictures[backend] = draw(pipeline)
        assert not torch.equal(pictures[backend], before)
        tgate_trt.refit(pipeline, [])
        assert torch.equal(draw(pipeline), before)
    torch.testing.assert_close(*pictures.values(), rtol=0, atol=1e-4 * float(pictures["pytorch"].abs().max()))


def test_it_needs_the_bundles_weights(tiny_sd: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--discard-graphs is for TensorRT engines"):
        tgate_trt.build(tiny_sd, tmp_path / "bundle", backend="pytorch", discard_graphs=True)
    assert not (tmp_path / "bundle").exists()

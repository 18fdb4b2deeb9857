"""Fused modules compute what diffusers' do, with the same parameters and the same taps."""

from __future__ import annotations

import copy
from pathlib import Path

import diffusers
import pytest
import torch
from torch import nn

from tgate_trt.eager import run_recipe
from tgate_trt.engines import fused_modules
from tgate_trt.engines.fused_modules import fuse_modules
from tgate_trt.engines.projections import arranged
from tgate_trt.engines.pytorch import PyTorchEngine, PyTorchOptions
from tgate_trt.export.verify import relative_error
from tgate_trt.taps import GRAPHS, recipe

from .test_pytorch import CPU, architecture, case, eager, poisoned, spec_of, weights_of

TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=["tiny_sd", "tiny_sdxl"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("graph", GRAPHS)
def test_a_fused_cut_equals_the_eager_model(folder: Path, graph: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("there is no NVIDIA GPU here")
        for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
            monkeypatch.setattr(backend, "allow_tf32", False)
    where, spec = torch.device(device), spec_of(folder, graph)
    weights = arranged(weights_of(folder, where))
    engine = PyTorchEngine(architecture(folder), weights, spec, recipe(graph), where, PyTorchOptions(fuse_modules=True))
    for seed in range(3):
        inputs, everything = case(folder, spec, 2, seed)
        outputs = poisoned(spec, 2, where)
        engine.run({name: tensor.to(where) for name, tensor in inputs.items()}, outputs)
        expected = run_recipe(eager(folder), recipe(graph), everything)
        assert outputs.keys() == expected.keys()
        for name, output in outputs.items():
            assert relative_error(output.cpu(), expected[name]) <= (TOLERANCE if device == "cpu" else 1e-4), name


def test_every_place_is_fused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A UNet has two norms a residual block, one a transformer and one at its end; a sum and a norm twice a block; a GEGLU a block."""
    counts = dict.fromkeys(("group_norm", "geglu", "cached_residual_layer_norm"), 0)
    for name in counts:
        op = getattr(fused_modules, name)

        def counted(*arguments: object, name: str = name, op: object = op) -> object:
            counts[name] += 1
            return op(*arguments)  # type: ignore[operator]

        monkeypatch.setattr(fused_modules, name, counted)
    spec = spec_of(folder, "vanilla")
    engine = PyTorchEngine(architecture(folder), weights_of(folder), spec, recipe("vanilla"), CPU, PyTorchOptions(fuse_modules=True))
    engine.run(case(folder, spec, 1)[0], poisoned(spec, 1))
    modules = [type(module).__name__ for module in engine._denoiser.modules()]
    blocks = modules.count("BasicTransformerBlock")
    assert counts["group_norm"] == 2 * modules.count("ResnetBlock2D") + modules.count("Transformer2DModel") + 1
    assert (counts["geglu"], counts["cached_residual_layer_norm"]) == (blocks, 2 * blocks)


def test_on_the_cpu_nothing_is_fused_unasked(folder: Path) -> None:
    engine = PyTorchEngine(architecture(folder), weights_of(folder), spec_of(folder, "vanilla"), recipe("vanilla"), CPU)
    assert not any("forward" in vars(module) for module in engine._denoiser.modules())


def test_a_decoder_is_fused_too(folder: Path) -> None:
    vae: nn.Module = diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval()
    fused = copy.deepcopy(vae)
    fuse_modules(fused)
    latents = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(fused.decode(latents).sample, vae.decode(latents).sample, rtol=1e-4, atol=1e-5)
    assert any("forward" in vars(module) for module in fused.modules())
    assert not any("forward" in vars(module) for module in vae.modules())


def test_what_is_assumed_nowhere_is_left_alone() -> None:
    from diffusers.models.resnet import ResnetBlock2D

    plain = {"in_channels": 32, "temb_channels": 16, "groups": 8}
    for more in ({"time_embedding_norm": "scale_shift"}, {"non_linearity": "mish"}, {"up": True}, {"down": True}):
        block = ResnetBlock2D(**plain, **more)
        fuse_modules(block)
        assert "forward" not in vars(block), more

"""D_t against a direct computation from Q, K and V, for UNets and a transformer, by steps and not by calls."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tgate_trt.analysis.convergence import ALL_LAYERS, Layer, curves, group_of, recording
from tgate_trt.analysis.subject import check_weights
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.bundle.loras import BundleLoras
from tgate_trt.errors import StaleBundleError
from tgate_trt.running.drawing import SCHEDULERS
from tgate_trt.running.loading import eager_denoiser
from tgate_trt.taps import CROSS_ATTENTION, SELF_ATTENTION

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 4
PROMPTS = ["a red fox", "two blue birds in a tree"]


class Direct:
    """An attention processor that computes ``softmax(Q·Kᵀ/√d)·V`` by hand, head by head, and keeps it."""

    def __init__(self, kept: list[Tensor]) -> None:
        self.kept = kept

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **others: Any) -> Tensor:
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        bias = others.get("attention_mask")
        query, key, value = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
        heads = []
        for q, k, v in zip(query.chunk(attn.heads, -1), key.chunk(attn.heads, -1), value.chunk(attn.heads, -1), strict=True):
            scores = q @ k.mT / math.sqrt(q.shape[-1])
            heads.append(torch.softmax(scores if bias is None else scores + bias, -1) @ v)
        self.kept.append(torch.cat(heads, -1))
        projected: Tensor = attn.to_out[0](self.kept[-1])
        return projected


def directly(denoiser: Any, draw: Callable[[], Any]) -> dict[str, list[Tensor]]:
    """C of each attention module at every call of a run, by the module's path."""
    kept: dict[str, list[Tensor]] = defaultdict(list)
    before = denoiser.attn_processors
    denoiser.set_attn_processor({name: Direct(kept[name.removesuffix(".processor")]) for name in before})
    draw()
    denoiser.set_attn_processor(before)
    return kept


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check(pipeline: Any, denoiser: nn.Module, draw: Callable[[], Any], last_calls: list[int], *, guided: bool) -> list[Layer]:
    """Compare every module's curve with that from the calls that end a step."""
    with recording(pipeline, denoiser) as recorded:
        draw()
    layers = recorded.layers()
    kept = directly(denoiser, draw)
    assert len(layers) == len(kept) > 0
    for layer in layers:
        kind, _, block = layer.tap.partition(".")
        values = kept[f"{block}.{'attn2' if kind == CROSS_ATTENTION else 'attn1'}"]
        assert len(values) == last_calls[-1] + 1
        steps = torch.stack([values[call] for call in last_calls]).double()
        change = (steps[:-1] - steps[1:]).flatten(2).norm(dim=2)
        relative = (change / steps[:-1].flatten(2).norm(dim=2)).nan_to_num()  # 0 of 0: the values of a prompt of zeros are zeros
        if guided:
            change, relative = ((rows[:, : rows.shape[1] // 2] + rows[:, rows.shape[1] // 2 :]) / 2 for rows in (change, relative))
        assert layer.tokens == steps.shape[2]
        torch.testing.assert_close(layer.absolute, change, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(layer.relative, relative, rtol=1e-3, atol=1e-5)
        assert layer.absolute.shape == (STEPS - 1, len(PROMPTS)) and layer.absolute.min() > 0
    assert not denoiser._forward_pre_hooks
    return layers


@pytest.mark.parametrize(
    ("scheduler", "guidance_scale", "last_calls"),
    [("ddim", 5.0, [0, 1, 2, 3]), ("ddim", 1.0, [0, 1, 2, 3]), ("heun", 5.0, [1, 3, 5, 6]), ("pndm", 5.0, [1, 2, 3, 4])],
)
def test_a_unets_curve_is_that_of_the_last_call_of_each_step(
    tiny_sd: Path, scheduler: str, guidance_scale: float, last_calls: list[int]
) -> None:
    import diffusers

    pipeline = quiet(diffusers.DiffusionPipeline.from_pretrained(tiny_sd, local_files_only=True))
    kind, settings = SCHEDULERS[scheduler]
    pipeline.scheduler = getattr(diffusers, kind).from_config(pipeline.scheduler.config, **settings)

    def draw() -> None:
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        pipeline(PROMPTS, num_inference_steps=STEPS, guidance_scale=guidance_scale, generator=generators, output_type="latent")

    layers = check(pipeline, pipeline.unet, draw, last_calls, guided=guidance_scale > 1)
    assert len(layers) == 8


def test_sdxl(tiny_sdxl: Path) -> None:
    from diffusers import DiffusionPipeline

    pipeline = quiet(DiffusionPipeline.from_pretrained(tiny_sdxl, local_files_only=True))

    def draw() -> None:
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        pipeline(PROMPTS, num_inference_steps=STEPS, height=64, width=64, generator=generators, output_type="latent")

    layers = check(pipeline, pipeline.unet, draw, [0, 1, 2, 3], guided=True)
    found = curves(layers, 8, 8)
    assert list(found) == [CROSS_ATTENTION, SELF_ATTENTION]
    counts = {name: curve.layers for name, curve in found[CROSS_ATTENTION].items()}
    assert list(counts.items()) == [(ALL_LAYERS, 11), ("down 8×8", 1), ("down 4×4", 2), ("mid 4×4", 2), ("up 4×4", 4), ("up 8×8", 2)]
    cross = [layer.absolute for layer in layers if layer.tap.startswith(CROSS_ATTENTION)]
    assert found[CROSS_ATTENTION][ALL_LAYERS].absolute.mean == pytest.approx(torch.stack(cross).mean((0, 2)).tolist())
    for groups in found.values():
        for curve in groups.values():
            for band in (curve.absolute, curve.relative):
                assert all(low <= mean <= high for low, mean, high in zip(band.low, band.mean, band.high, strict=True))


def test_a_transformers_groups_are_thirds_of_its_depth() -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=3, sample_size=8, caption_channels=16, cross_attention_dim=16, in_channels=4
    ).eval()
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    pipeline = quiet(PixArtAlphaPipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=DDIMScheduler()))
    text = torch.randn(4, 5, 16)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])

    def draw() -> None:
        pipeline(
            prompt_embeds=text[:2],
            negative_prompt=None,
            negative_prompt_embeds=text[2:],
            prompt_attention_mask=mask,
            negative_prompt_attention_mask=mask,
            num_inference_steps=STEPS,
            height=8,
            width=8,
            generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
            output_type="latent",
            use_resolution_binning=False,
        )

    layers = check(pipeline, transformer, draw, [0, 1, 2, 3], guided=True)
    assert list(curves(layers, 8, 8)[CROSS_ATTENTION]) == [ALL_LAYERS, "first third", "middle third", "last third"]


@pytest.mark.parametrize(
    ("block", "tokens", "depth", "expected"),
    [
        ("down_blocks.1.attentions.0.transformer_blocks.0", 60, 0.1, "down 6×10"),
        ("mid_block.attentions.0.transformer_blocks.0", 15, 0.9, "mid 3×5"),
        ("transformer_blocks.27", 64, 27 / 28, "last third"),
        ("transformer_blocks.9", 64, 9 / 28, "first third"),
    ],
)
def test_groups(block: str, tokens: int, depth: float, expected: str) -> None:
    layer = Layer(f"{CROSS_ATTENTION}.{block}", tokens, torch.zeros(1, 1), torch.zeros(1, 1))
    assert group_of(layer, depth, 12, 20) == expected


def test_the_denoiser_comes_from_the_bundles_weights(sd_bundle: Bundle, tiny_sd: Path) -> None:
    state = eager_denoiser(BundleLoras.read(sd_bundle), torch.float32).state_dict()
    source = load_file(tiny_sd / "unet" / "diffusion_pytorch_model.safetensors")
    assert state.keys() == source.keys()
    assert all(torch.equal(state[name], source[name]) for name in source)


def test_a_bundle_without_weights_is_refused_before_anything_is_drawn(sd_bundle: Bundle) -> None:
    check_weights(sd_bundle)
    discarded = replace(sd_bundle, manifest=replace(sd_bundle.manifest, files={}))
    with pytest.raises(StaleBundleError, match="--discard-graphs"):
        check_weights(discarded)

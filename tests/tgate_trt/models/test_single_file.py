"""Single-file checkpoints in the original authors' layout, here made from a diffusers folder by the inverse renaming."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import tgate_trt
from tgate_trt.building.staleness import state_of
from tgate_trt.errors import InputError, UnsupportedError
from tgate_trt.models.resolve import resolve
from tgate_trt.models.saving import save_rest
from tgate_trt.models.single_file import architecture_of, original_names, scheduler_settings_of, tokenizers_of

PREFIX = "model.diffusion_model."


def original_unet_name(name: str, *, layers: int) -> str:
    """The original name of a UNet's tensor, for levels of ``layers`` resnets."""
    head, *rest = name.split(".")
    fixed = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    if head in fixed:
        return f"{fixed[head]}.{rest[0]}"
    if head in ("time_embedding", "add_embedding"):
        place = {"linear_1": "0", "linear_2": "2"}[rest[0]]
        return ".".join(["time_embed" if head == "time_embedding" else "label_emb.0", place, rest[1]])
    if head == "mid_block":
        kind, index, *rest = rest
        place = str(2 * int(index) + (kind == "attentions"))
        return ".".join(["middle_block", place, *original_resnet(rest)])
    level, kind, index, *rest = rest
    first = int(level) * (layers + 1)
    place = str(int(kind == "attentions"))
    if head == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{first + layers + 1}.0.op.{rest[-1]}"
        return ".".join(["input_blocks", str(first + int(index) + 1), place, *original_resnet(rest)])
    if kind == "upsamplers":
        return f"output_blocks.{first + layers}.{{}}.conv.{rest[-1]}"
    return ".".join(["output_blocks", str(first + int(index)), place, *original_resnet(rest)])


def original_unet(names: Iterable[str], *, layers: int) -> dict[str, str]:
    """The original name of each of a UNet's tensors; an upsampler comes after the attention, if its block has any."""
    originals = {name: original_unet_name(name, layers=layers) for name in names}
    taken = {".".join(original.split(".")[:3]) for original in originals.values()}
    return {
        name: PREFIX + original.format(2 if f"{original.partition('.{}')[0]}.1" in taken else 1) for name, original in originals.items()
    }


def original_resnet(parts: list[str]) -> list[str]:
    names = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    return [names.get(parts[0], parts[0]) if len(parts) == 2 else parts[0], *parts[1:]]


def original_vae_name(name: str, levels: int) -> str:
    """The original name of a VAE's tensor."""
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda found: f"up.{levels - 1 - int(found[1])}.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{levels - 1 - int(found[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    for ours, original in {
        "mid_block.attentions.0": "mid.attn_1",
        "group_norm": "norm",
        "to_out.0": "proj_out",
        "conv_shortcut": "nin_shortcut",
        "conv_norm_out": "norm_out",
    }.items():
        name = name.replace(ours, original)
    return re.sub(r"to_([qkv])\.", r"\1.", name)


@pytest.fixture
def checkpoint(tiny_sd: Path, tmp_path: Path) -> Path:
    """`tiny_sd` as one file in the layout of the original authors."""
    tensors = {}
    unet = load_file(tiny_sd / "unet" / "diffusion_pytorch_model.safetensors")
    for name, original in original_unet(unet, layers=1).items():
        tensors[original] = unet[name]
    for name, tensor in load_file(tiny_sd / "vae" / "diffusion_pytorch_model.safetensors").items():
        original = original_vae_name(name, levels=4)
        is_projection = ".attn_1." in original and tensor.ndim == 2
        tensors[f"first_stage_model.{original}"] = tensor[:, :, None, None].contiguous() if is_projection else tensor
    for name, tensor in load_file(tiny_sd / "text_encoder" / "model.safetensors").items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    save_file(tensors, tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def test_a_checkpoint_is_the_folder_that_it_was_made_from(checkpoint: Path, tiny_sd: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    source = resolve(checkpoint, config=tiny_sd)
    assert (source.name, source.reference.model) == ("tiny", str(checkpoint))
    ours = dict(source.tensors(torch.float32))
    assert list(ours) == list(source.tensor_shapes())
    theirs = load_file(tiny_sd / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    save_rest(source, tmp_path / "rest", "fp32")
    rest = StableDiffusionPipeline.from_pretrained(tmp_path / "rest", unet=source.load_denoiser(torch.float32), local_files_only=True)
    whole = StableDiffusionPipeline.from_pretrained(tiny_sd)
    pictures = []
    for pipeline in (rest, whole):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        pictures.append(pipeline("a cat", num_inference_steps=2, generator=generator, output_type="pt").images)
    assert torch.equal(*pictures)


def test_a_checkpoint_is_identified_by_its_content(checkpoint: Path, tiny_sd: Path, tmp_path: Path) -> None:
    before = resolve(checkpoint, config=tiny_sd).fingerprint()
    moved = Path(shutil.copy(checkpoint, tmp_path / "renamed.safetensors"))
    assert resolve(moved, config=tiny_sd).fingerprint()["content"] == before["content"]


@pytest.mark.parametrize(
    ("prefix", "sentence"),
    [("model.diffusion_model.", "no denoiser"), ("first_stage_model.", "no VAE"), ("cond_stage_model.", "no text encoders")],
)
def test_a_checkpoint_that_is_not_whole_is_refused(checkpoint: Path, tiny_sd: Path, prefix: str, sentence: str) -> None:
    save_file({name: tensor for name, tensor in load_file(checkpoint).items() if not name.startswith(prefix)}, checkpoint)
    with pytest.raises(InputError, match=sentence):
        resolve(checkpoint, config=tiny_sd)


def test_a_checkpoint_of_another_architecture_is_refused(checkpoint: Path, tiny_sdxl: Path) -> None:
    with pytest.raises(InputError, match="the checkpoint lacks 'label_emb"):
        resolve(checkpoint, config=tiny_sdxl)


def test_a_checkpoint_of_another_size_is_refused(checkpoint: Path, tiny_sd: Path, tmp_path: Path) -> None:
    config = Path(shutil.copytree(tiny_sd, tmp_path / "config"))
    settings = json.loads((config / "unet" / "config.json").read_text())
    (config / "unet" / "config.json").write_text(json.dumps(settings | {"cross_attention_dim": 48}))
    with pytest.raises(InputError, match=r"calls for .* with shape \(32, 48\), but .* holds it with shape \(32, 32\)"):
        resolve(checkpoint, config=config)


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_the_architecture_shows_in_names_and_shapes(name: str) -> None:
    source = resolve(name, random_weights=True)
    expected = source.tensor_shapes()
    header = {original: expected[tensor] for tensor, original in original_unet(expected, layers=2).items()}
    assert len(header) == len(expected)
    if name == "sdxl":  # diffusers tells SDXL by its second text encoder
        header["conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"] = (1280,)
    assert architecture_of(Path("x"), header) == name
    sources = original_names(header, source.denoiser_config())
    assert {tensor: header[original] for tensor, original in sources.items()} == expected


def test_a_checkpoint_of_another_kind_is_named() -> None:
    with pytest.raises(UnsupportedError, match="xl_refiner"):
        architecture_of(Path("x"), {"conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias": (1280,)})


def test_a_checkpoint_without_a_tokenizer_says_where_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"holds no tokenizer.*hf download"):
        tokenizers_of("sdxl", "stabilityai/stable-diffusion-xl-base-1.0")


# What a checkpoint predicts

ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.mark.parametrize(
    ("name", "keys", "metadata", "given", "settings"),
    [
        ("sdxl", [], {}, None, {"prediction_type": "epsilon"}),
        ("sdxl", ["v_pred"], {}, None, {"prediction_type": "v_prediction"}),
        ("sdxl", ["v_pred", "ztsnr"], {}, None, {"prediction_type": "v_prediction", **ZERO_SNR}),
        ("sdxl", [], {"modelspec.prediction_type": "v"}, None, {"prediction_type": "v_prediction"}),
        ("sdxl", ["v_pred"], {}, "epsilon", {"prediction_type": "epsilon"}),
        ("sd15", [], {}, None, {"prediction_type": "epsilon"}),
        ("sd15", ["v_pred"], {}, None, {"prediction_type": "v_prediction"}),
        ("sd15", [], {"modelspec.architecture": "stable-diffusion-v1"}, None, {"prediction_type": "epsilon"}),
        ("sd21", [], {"modelspec.architecture": "stable-diffusion-v2-512"}, None, {"prediction_type": "epsilon"}),
        ("sd21", [], {"modelspec.architecture": "stable-diffusion-v2-768-v"}, None, {"prediction_type": "v_prediction"}),
        ("sd21", [], {"modelspec.prediction_type": "epsilon"}, None, {"prediction_type": "epsilon"}),
        ("sd21", [("global_step", 875_000)], {}, None, {"prediction_type": "epsilon"}),
        ("sd21", [("global_step", 140_000)], {}, None, {"prediction_type": "v_prediction"}),
        ("sd21", [], {}, "epsilon", {"prediction_type": "epsilon"}),
    ],
)
def test_what_a_file_states_is_believed(
    name: str, keys: list[Any], metadata: dict[str, str], given: str | None, settings: dict[str, Any], tmp_path: Path
) -> None:
    marks = {key if isinstance(key, str) else key[0]: torch.tensor(0 if isinstance(key, str) else key[1]) for key in keys}
    save_file({"weight": torch.zeros(1), **marks}, tmp_path / "model.safetensors", metadata=metadata)
    assert scheduler_settings_of(tmp_path / "model.safetensors", name, given) == settings


def test_a_guess_is_stated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert scheduler_settings_of(tmp_path / "model.safetensors", "sd21", None) == {"prediction_type": "v_prediction"}
    assert "assuming velocity at 768 pixels, as diffusers does; overrule it with --prediction-type epsilon" in caplog.text


def test_a_prediction_type_reaches_the_bundle_and_the_pipeline(checkpoint: Path, tiny_sd: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"config": tiny_sd, "prediction_type": "v_prediction", "components": False}
    built = tgate_trt.build(checkpoint, tmp_path / "bundle", **options)
    pipeline = tgate_trt.load(built)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert tgate_trt.build(checkpoint, tmp_path / "bundle", **options).manifest == built.manifest, "it is up to date"
    assert not state_of(built).stale
    other = tgate_trt.build(checkpoint, tmp_path / "bundle", **{**options, "prediction_type": None}, verify=False)
    assert tgate_trt.load(other).scheduler.config.get("prediction_type", "epsilon") == "epsilon"


def test_bad_values_are_one_sentence(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one of epsilon, v_prediction, sample, got 'velocity'"):
        resolve(checkpoint, prediction_type="velocity")
    with pytest.raises(InputError, match=r"there is no folder .* --config takes a diffusers folder"):
        resolve(checkpoint, config=tmp_path / "nowhere")

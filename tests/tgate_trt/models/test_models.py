"""Models by name and by path, the weights they give, and the inputs of their denoisers."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tgate_trt import files
from tgate_trt.eager import torch_dtype
from tgate_trt.errors import InputError, UnsupportedError
from tgate_trt.models.architectures import ARCHITECTURES, Architecture
from tgate_trt.models.resolve import resolve, source_of_folder, source_of_hub
from tgate_trt.models.saving import RANDOM_NOTICE, save_rest
from tgate_trt.models.signature import signature
from tgate_trt.models.source import ModelReference
from tgate_trt.specs import TensorSpec

TOKENS = {
    "pixart-alpha": 120,
    "lcm-pixart": 120,
    "pixart-sigma": 300,
    "sana": 300,
    "kolors": 256,
    "cosmos-predict2": 512,
    "wan-1.3b": 512,
    "stable-audio": 130,
    "svd": 1,
}
WITHOUT_A_SIZE = ("svd", "cosmos-predict2", "wan-1.3b", "stable-audio")
"""Models whose configuration has no size of a picture, or another than that of their pipeline."""

PUBLISHED = [row for row in ARCHITECTURES.values() if row.hub_id]


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def folder(tiny_sd: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_sd` that a test may change."""
    return Path(shutil.copytree(tiny_sd, tmp_path / "model"))


# Named models


@pytest.mark.parametrize(
    ("name", "parameters", "in_cross_attention", "blocks"),
    [("sd15", 859_520_964, 43_962_560, 16), ("sdxl", 2_567_463_684, 545_670_400, 70), ("pixart-alpha", 611_349_152, 148_764_672, 28)],
)
def test_named_models_have_the_published_sizes(name: str, parameters: int, in_cross_attention: int, blocks: int) -> None:
    shapes = resolve(name, random_weights=True).tensor_shapes()
    sizes = {tensor: math.prod(shape) for tensor, shape in shapes.items()}
    assert sum(sizes.values()) == parameters
    assert sum(size for tensor, size in sizes.items() if ".attn2." in tensor) == in_cross_attention
    assert sum(tensor.endswith(".attn2.to_q.weight") for tensor in sizes) == blocks


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.name)
def test_what_is_said_of_a_named_model_is_what_its_configuration_says(row: Architecture) -> None:
    named = resolve(row.name, random_weights=True)
    found = source_of_folder(row.folder, random_seed=0, elsewhere=row.shared, without=row.without)
    if row.name not in WITHOUT_A_SIZE:
        assert (named.height, named.width) == (found.height, found.width)
    assert found.steps == named.steps or not row.is_official
    assert found.gate_step in (None, named.gate_step)
    assert named.text_tokens == TOKENS.get(row.name, 77)
    assert named.vae_scale_factor == {"sana": 32}.get(row.name, 8) or row.name == "stable-audio"


def test_gate_steps_are_the_official_counts() -> None:
    counts = {row.name: int(row.gate_step * row.steps + 0.5) for row in PUBLISHED if row.is_official}
    unets, transformers = dict.fromkeys(("sd15", "sd21", "sdxl", "svd"), 10), dict.fromkeys(("pixart-alpha", "pixart-sigma"), 15)
    assert counts == unets | transformers | dict.fromkeys(("lcm-sdxl", "lcm-pixart"), 2)


def test_importing_models_loads_neither_torch_nor_diffusers() -> None:
    code = "import sys, tgate_trt.models.resolve; print({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


# What cannot be resolved says why


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("sdlx", "did you mean sdxl"),
        ("nothing-like-it-at-all", "the named models are shapes, sd15"),
        ("./sub/dir/model", "no model"),
        ("missing.safetensors", "no file missing.safetensors"),
        ("sdxl", "--random-weights"),
        ("nobody/nothing", "HF_HUB_OFFLINE is set"),
        (3, "got int"),
    ],
)
def test_a_model_that_is_not_there_is_one_sentence(model: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        resolve(model)


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt"])
def test_a_pickle_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    torch.save({}, path)
    with pytest.raises(InputError, match=r"can run code.*convert it to .safetensors"):
        resolve(path)


def test_a_file_that_is_not_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04 this is no header")
    with pytest.raises(InputError, match="not a whole safetensors file"):
        resolve(tmp_path / "model.safetensors")


def test_random_weights_need_an_architecture() -> None:
    with pytest.raises(InputError, match="named model"):
        resolve("owner/name", random_weights=True)


def test_a_folder_without_a_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no model_index\.json"):
        resolve(tmp_path)


def test_a_folder_of_pickles_is_refused(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(InputError, match=r"pickled weights only.*save_pretrained"):
        resolve(folder)


def test_a_folder_without_weights_is_refused(tiny_sd_configs: Path) -> None:
    with pytest.raises(InputError, match=r"no \.safetensors weights"):
        resolve(tiny_sd_configs)


def test_truncated_weights_are_refused(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    with pytest.raises(InputError, match="not a whole safetensors file"):
        list(resolve(folder).tensors(torch.float32))


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    edit(folder / "unet" / "config.json", cross_attention_dim=48)
    with pytest.raises(InputError, match=r"has shape \(32, 32\).*calls for \(32, 48\)"):
        list(resolve(folder).tensors(torch.float32))


def test_missing_weights_are_refused(folder: Path) -> None:
    edit(folder / "unet" / "config.json", layers_per_block=2)
    with pytest.raises(InputError, match="lacks the tensor"):
        list(resolve(folder).tensors(torch.float32))


def test_a_damaged_configuration_is_refused(folder: Path) -> None:
    (folder / "unet" / "config.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        resolve(folder)


def test_foreign_code_is_not_run(folder: Path) -> None:
    edit(folder / "model_index.json", unet=["my_unet", "MyUNet"])
    with pytest.raises(UnsupportedError, match="runs no foreign code"):
        resolve(folder)


def test_a_pipeline_without_a_denoiser_that_we_know_is_refused(folder: Path) -> None:
    edit(folder / "unet" / "config.json", _class_name="UNet3DConditionModel")
    with pytest.raises(UnsupportedError, match="got UNet3DConditionModel"):
        resolve(folder)


# Folders


@pytest.mark.parametrize("fixture", ["tiny_sd", "tiny_sdxl"])
def test_a_folder_gives_the_state_dict_of_diffusers(fixture: str, request: pytest.FixtureRequest) -> None:
    from diffusers import UNet2DConditionModel

    path = request.getfixturevalue(fixture)
    source = resolve(path)
    theirs = UNet2DConditionModel.from_pretrained(path / "unet").state_dict()
    ours = dict(source.tensors(torch.float32))
    assert list(ours) == list(theirs) == list(source.tensor_shapes())
    assert equal(ours, theirs)
    assert equal(dict(source.tensors(torch.float16)), {name: tensor.half() for name, tensor in theirs.items()})


def test_load_denoiser_computes_what_diffusers_computes(tiny_sdxl: Path) -> None:
    from diffusers import UNet2DConditionModel

    source = resolve(tiny_sdxl)
    ours, theirs = source.load_denoiser(torch.float32), UNet2DConditionModel.from_pretrained(tiny_sdxl / "unet")
    inputs = [torch.randn(spec.concrete(batch=2)) for spec in source.signature(64, 64, "fp32")]
    sample, _, text, pooled, ids = inputs
    keywords = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}, "return_dict": False}
    with torch.no_grad():
        assert torch.equal(ours(sample, 500.0, text, **keywords)[0], theirs(sample, 500.0, text, **keywords)[0])
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_shards_and_variants_are_read(folder: Path, tiny_sd: Path) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny_sd / "unet").half()
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet", max_shard_size="300KB", variant="fp16")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    assert equal(dict(resolve(folder).tensors(torch.float16)), unet.state_dict())
    next((folder / "unet").glob("*.safetensors")).unlink()
    with pytest.raises(InputError, match="is missing"):
        resolve(folder)


def test_a_folder_is_described(tiny_sdxl: Path) -> None:
    source = resolve(tiny_sdxl)
    assert (source.name, source.reference, source.denoiser_attribute) == (tiny_sdxl.name, ModelReference(str(tiny_sdxl)), "unet")
    assert (source.height, source.width, source.text_tokens) == (64, 64, 77)
    assert pickle.loads(pickle.dumps(source)) == source
    assert {parameter.device.type for parameter in source.denoiser_on_meta().parameters()} == {"meta"}
    assert not {"_diffusers_version", "_name_or_path"} & source.denoiser_config().keys()


def test_old_pixart_configurations_have_their_new_class(tmp_path: Path) -> None:
    path = Path(shutil.copytree(ARCHITECTURES["pixart-alpha"].folder, tmp_path / "pixart"))
    edit(path / "transformer" / "config.json", _class_name="Transformer2DModel")
    edit(path / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    source = resolve(path, random_weights=True)
    assert source.denoiser_config()["_class_name"] == "PixArtTransformer2DModel"
    assert source.index()["transformer"] == ["diffusers", "PixArtTransformer2DModel"]
    assert type(source.denoiser_on_meta()).__name__ == "PixArtTransformer2DModel"


def test_pixart_loads_with_its_computed_positions(tmp_path: Path) -> None:
    path = Path(shutil.copytree(ARCHITECTURES["pixart-alpha"].folder, tmp_path / "pixart"))
    small = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 24}
    edit(path / "transformer" / "config.json", **small, sample_size=8, use_additional_conditions=False)
    denoiser = resolve(path, random_weights=True).load_denoiser(torch.float32)
    assert all(not tensor.is_meta and tensor.isfinite().all() for tensor in (*denoiser.parameters(), *denoiser.buffers()))


def test_a_pipeline_object_is_taken(tiny_sd: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    with torch.no_grad():
        pipeline.unet.conv_in.bias.add_(1)
    source = resolve(pipeline)
    assert equal(dict(source.tensors(torch.float32)), pipeline.unet.state_dict())
    assert source.name == "StableDiffusionPipeline"


# Random weights


def test_random_weights_depend_on_seed_and_name_alone(tiny_sdxl_configs: Path) -> None:
    def drawn(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        return dict(resolve(tiny_sdxl_configs, random_weights=True, seed=seed).tensors(dtype))

    first, other = drawn(0), drawn(1)
    assert equal(first, drawn(0))
    assert equal(drawn(0, torch.float16), {name: tensor.half() for name, tensor in first.items()})
    assert not any(torch.equal(first[name], other[name]) for name in first)
    by_shape: dict[torch.Size, list[torch.Tensor]] = {}
    for tensor in first.values():
        assert not any(torch.equal(tensor, before) for before in by_shape.setdefault(tensor.shape, []))
        by_shape[tensor.shape].append(tensor)


def test_random_weights_have_the_spread_of_pytorch() -> None:
    tensors = resolve("sd15", random_weights=True).tensors(torch.float32)
    tensor = next(tensor for name, tensor in tensors if name == "time_embedding.linear_1.weight")
    bound = 1 / math.sqrt(320)
    assert tensor.abs().max() <= bound
    assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert tensor.mean().item() == pytest.approx(0, abs=bound / 100)


def test_a_random_denoiser_keeps_unit_scale(tiny_sd_configs: Path) -> None:
    denoiser = resolve(tiny_sd_configs, random_weights=True).load_denoiser(torch.float32)
    with torch.no_grad():
        prediction = denoiser(torch.randn(2, 4, 8, 8), 500.0, torch.randn(2, 77, 32)).sample
    assert 0.05 < prediction.std().item() < 5


# Fingerprints


def test_a_fingerprint_tells_content_and_not_place(folder: Path, tiny_sd: Path) -> None:
    before = resolve(tiny_sd).fingerprint()
    copied = resolve(folder).fingerprint()
    assert json.loads(json.dumps(before)) == before
    assert before["content"] == copied["content"]
    assert "unet/diffusion_pytorch_model.safetensors" in before["files"]
    edit(folder / "scheduler" / "scheduler_config.json", beta_end=0.013)
    assert resolve(folder).fingerprint(copied)["content"] != copied["content"]


def test_a_fingerprint_reads_only_files_whose_stamp_changed(folder: Path) -> None:
    source = resolve(folder)
    known = source.fingerprint()
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    stat = weights.stat()
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert source.fingerprint(known)["content"] == known["content"], "the stamp is the same, so the file need not be read"
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert source.fingerprint(known)["content"] != known["content"]


def test_a_fingerprint_of_random_weights_tells_the_seed(tiny_sd_configs: Path) -> None:
    contents = {resolve(tiny_sd_configs, random_weights=True, seed=seed).fingerprint()["content"] for seed in (0, 1, 0)}
    assert len(contents) == 2


# The rest of the pipeline


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_rest_of_a_folder_loads_offline_around_an_empty_denoiser(tiny_sdxl: Path, tmp_path: Path, precision: str) -> None:
    from diffusers import DiffusionPipeline

    dtype = torch_dtype(precision)
    source = resolve(tiny_sdxl)
    save_rest(source, tmp_path, precision)
    assert {path.name for path in (tmp_path / "unet").iterdir()} == {"config.json"}
    for file in tmp_path.rglob("*.safetensors"):  # the VAE says that it overflows in fp16
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32 if file.parent.name == "vae" else dtype}
    ours = DiffusionPipeline.from_pretrained(tmp_path, unet=source.denoiser_on_meta(), local_files_only=True, dtype=torch.float32)
    theirs = DiffusionPipeline.from_pretrained(tiny_sdxl)
    latents, tolerance = torch.randn(1, 4, 8, 8), 0 if dtype is torch.float32 else 0.02
    with torch.no_grad():
        for own, other in zip(encoded(ours), encoded(theirs), strict=True):
            assert (own - other).abs().max() <= tolerance
        assert (ours.vae.decode(latents).sample - theirs.vae.decode(latents).sample).abs().max() <= tolerance
    assert ours.scheduler.config == theirs.scheduler.config
    assert not (tmp_path / RANDOM_NOTICE).exists()


def encoded(pipeline: Any) -> tuple[torch.Tensor, ...]:
    """Prompt embeddings, negative ones, and both pooled."""
    prompts: tuple[torch.Tensor, ...] = pipeline.encode_prompt("A red cat", device="cpu", negative_prompt="a blue dog")
    return prompts


def test_a_safety_checker_is_left_out(folder: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    edit(
        folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        requires_safety_checker=True,
    )
    source = resolve(folder)
    save_rest(source, tmp_path / "rest", "fp32")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "rest", unet=source.denoiser_on_meta(), local_files_only=True)
    assert pipeline.safety_checker is None
    assert not pipeline.config.requires_safety_checker


def test_a_missing_component_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(InputError, match="no folder 'tokenizer'"):
        save_rest(resolve(folder), tmp_path / "rest", "fp32")


def test_large_components_are_written_in_shards(
    tiny_sd_configs: Path, tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import CLIPTextModel

    monkeypatch.setattr(files, "_SHARD_BYTES", 20_000)
    save_rest(resolve(tiny_sd_configs, random_weights=True), tmp_path, "fp32")
    assert len(list((tmp_path / "text_encoder").glob("model-*.safetensors"))) > 2
    whole, sharded = (CLIPTextModel.from_pretrained(path / "text_encoder").state_dict() for path in (tiny_sd, tmp_path))
    assert equal(sharded, whole)
    assert not list(tmp_path.rglob("*.partial"))


def test_the_rest_of_random_weights_says_that_it_is_random(tiny_sd: Path) -> None:
    assert "random" in (tiny_sd / RANDOM_NOTICE).read_text()


# Stand-in tokenizers


def test_a_clip_stand_in_has_the_special_tokens_where_clip_has_them(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    from tgate_trt.models.stand_in_tokenizer import save_clip

    for name, first in (("one", False), ("two", True)):
        save_clip(tmp_path / name, {"vocab_size": 49408}, model_max_length=77, pad_with_first=first)
        tokenizer = CLIPTokenizer.from_pretrained(tmp_path / name)
        ids = tokenizer("A cat, naïve 猫!", padding="max_length", truncation=True, max_length=77).input_ids
        assert (len(tokenizer), tokenizer.model_max_length, len(ids), ids[0]) == (49408, 77, 77, 49406)
        assert ids.index(49407) == ids.index(max(ids)) < 30
        assert ids[-1] == (0 if first else 49407)
        assert tokenizer("a cat").input_ids != tokenizer("a dog").input_ids
        assert len(tokenizer("word " * 100, truncation=True).input_ids) == 77


def test_a_t5_stand_in_has_the_special_tokens_where_t5_has_them(tmp_path: Path) -> None:
    from transformers import T5Tokenizer

    from tgate_trt.models.stand_in_tokenizer import save_t5

    save_t5(tmp_path, model_max_length=120)
    tokenizer = T5Tokenizer.from_pretrained(tmp_path)
    encoding = tokenizer("A cat 猫", padding="max_length", truncation=True, max_length=120)
    ids = encoding.input_ids
    length = sum(encoding.attention_mask)
    assert (len(tokenizer), len(ids), ids[length - 1], ids[-1]) == (32100, 120, 1, 0)
    assert 2 in ids, "an unknown letter"
    assert 5 < length < 20


# The hub's cache


def cache(root: Path, hub_id: str, folder: Path) -> str:
    """Lay a folder into a hub cache as if it had been downloaded; returns its commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = root / f"models--{hub_id.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return commit


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_hub_id_is_found_in_the_cache(tiny_sd: Path, hub_cache: Path) -> None:
    commit = cache(hub_cache, "someone/tiny", tiny_sd)
    source = resolve("someone/tiny")
    assert (source.name, source.reference.model, source.revision) == ("tiny", "someone/tiny", commit)
    fingerprint = source.fingerprint()
    assert fingerprint["revision"] == commit
    assert fingerprint["content"] == resolve(tiny_sd).fingerprint()["content"]
    assert equal(dict(source.tensors(torch.float32)), load_file(tiny_sd / "unet" / "diffusion_pytorch_model.safetensors"))


def test_a_denoiser_from_another_repository_takes_its_scheduler_along(
    tiny_sdxl: Path, tiny_sdxl_configs: Path, hub_cache: Path, tmp_path: Path
) -> None:
    """LCM-SDXL is published as a UNet alone."""
    denoiser = Path(shutil.copytree(tiny_sdxl / "unet", tmp_path / "distilled"))
    tensors = load_file(denoiser / "diffusion_pytorch_model.safetensors")
    tensors["conv_in.bias"] += 1
    save_file(tensors, denoiser / "diffusion_pytorch_model.safetensors")
    configs = Path(shutil.copytree(tiny_sdxl_configs, tmp_path / "configs"))
    (configs / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "LCMScheduler"}')
    cache(hub_cache, "someone/base", tiny_sdxl)
    cache(hub_cache, "someone/distilled", denoiser)
    source = source_of_hub("someone/base", "someone/distilled", configs=configs, name="both")
    assert equal(dict(source.tensors(torch.float32)), tensors)
    save_rest(source, tmp_path / "rest", "fp32")
    index = json.loads((tmp_path / "rest" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "LCMScheduler"]
    assert json.loads((tmp_path / "rest" / "scheduler" / "scheduler_config.json").read_text()) == {"_class_name": "LCMScheduler"}


# Inputs


def test_the_signature_of_sdxl() -> None:
    config = resolve("sdxl", random_weights=True).denoiser_config()
    assert signature(config, height=768, width=1344, vae_scale_factor=8, text_tokens=77, dtype="float16") == (
        TensorSpec("sample", "float16", ("batch", 4, 96, 168)),
        TensorSpec("timestep", "float32", ("batch",)),
        TensorSpec("encoder_hidden_states", "float16", ("batch", 77, 2048)),
        TensorSpec("text_embeds", "float16", ("batch", 1280)),
        TensorSpec("time_ids", "float16", ("batch", 6)),
    )


@pytest.mark.parametrize(
    ("name", "added"),
    [
        ("sd15", {}),
        ("sd21", {}),
        ("lcm-sdxl", {"timestep_cond": (256,), "text_embeds": (1280,), "time_ids": (6,)}),
        ("pixart-alpha", {"encoder_attention_mask": (120,), "resolution": (2,), "aspect_ratio": (1,)}),
        ("pixart-sigma", {"encoder_attention_mask": (300,)}),
    ],
)
def test_conditions_follow_the_configuration(name: str, added: dict[str, tuple[int, ...]]) -> None:
    source = resolve(name, random_weights=True)
    shapes = {spec.name: spec.shape[1:] for spec in source.signature(source.height, source.width, "bf16")}
    basic = ("sample", "timestep", "encoder_hidden_states")
    assert {condition: shape for condition, shape in shapes.items() if condition not in basic} == added
    assert shapes["timestep"] == ()


@pytest.mark.parametrize(
    ("name", "height", "sentence"),
    [
        ("sd15", 510, "multiple of 8.*nearest is 512"),
        ("pixart-alpha", 1000, "multiple of 16.*nearest is 1008"),
        ("sdxl", 0, "nearest is 8"),
    ],
)
def test_a_size_that_cannot_be_is_refused(name: str, height: int, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        resolve(name, random_weights=True).signature(height, 512, "fp32")


@pytest.mark.parametrize(
    "change",
    [
        {"class_embed_type": "timestep"},
        {"num_class_embeds": 1000},
        {"encoder_hid_dim_type": "ip_image_proj"},
        {"addition_embed_type": "image_hint"},
        {"attention_type": "gated"},
        {"cross_attention_dim": [32, 64]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_conditions_that_graphs_do_not_take_are_named(tiny_sd_configs: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    path = Path(shutil.copytree(tiny_sd_configs, tmp_path / "model"))
    edit(path / "unet" / "config.json", **change)
    with pytest.raises(UnsupportedError, match=str(next(iter(change.values()))).replace("[", r"\[").replace("]", r"\]")):
        resolve(path, random_weights=True)

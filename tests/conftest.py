"""Tiny diffusers pipelines with random weights, made on the spot: no test asks a hub for anything."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import random
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tqdm
from hypothesis import core
from typer import Typer
from typer.testing import CliRunner, Result

from .process_state import ProcessState, wait_for_threads

if TYPE_CHECKING:
    from tgate_trt.bundle.bundle import Bundle

Run = Callable[..., Result]
"""Runs a command: takes its application and its arguments."""

CACHES = {
    "XDG_CACHE_HOME": "",  # tgate_trt's compiled kernels, ONNX Runtime, PyTorch, pip
    "CUDA_CACHE_PATH": "cuda",
    "HF_HOME": "huggingface",
    "HF_HUB_CACHE": "huggingface/hub",
    "HYPOTHESIS_STORAGE_DIRECTORY": "hypothesis",
    "MPLCONFIGDIR": "matplotlib",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_HOME": "torch",
    "TRITON_CACHE_DIR": "triton/cache",
    "TRITON_HOME": "triton",
}
"""Variables that name the folders of caches, each with its place in the one temporary folder of a run."""


def own_caches() -> None:
    """Begin a run with empty caches, and leave the user's alone. The workers of a run share its caches."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    folder = Path(tempfile.mkdtemp(prefix="tgate-trt-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ.update({name: str(folder / place) for name, place in CACHES.items()})


# Before the packages are imported that read these variables.
own_caches()
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, and threads that wait for each other spin
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # and its pool would outlive the test
tqdm.tqdm.monitor_interval = 0  # else the first progress bar starts a thread that stays

CROSS_ATTENTION_GAIN = 4.0
"""Cross-attention with random weights is faint; this makes a wrong cache stand out of any tolerance."""

_VOCABULARY = 600


def _clip(kind: str, *, hidden_act: str) -> dict[str, Any]:
    return {
        "architectures": [kind],
        "bos_token_id": _VOCABULARY - 2,
        "eos_token_id": _VOCABULARY - 1,
        "hidden_act": hidden_act,
        "hidden_size": 32,
        "intermediate_size": 64,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "pad_token_id": 1,
        "projection_dim": 32,
        "vocab_size": _VOCABULARY,
    }


def _unet(**more: Any) -> dict[str, Any]:
    return {
        "_class_name": "UNet2DConditionModel",
        "attention_head_dim": 4,
        "block_out_channels": [32, 64],
        "in_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "out_channels": 4,
        "sample_size": 8,
        **more,
    }


_VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 8, 8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 64,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}

_BETAS = {"beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000, "steps_offset": 1}

TINY_SD: dict[str, dict[str, Any]] = {
    "model_index.json": {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    },
    "scheduler/scheduler_config.json": {
        "_class_name": "DDIMScheduler",
        **_BETAS,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
    },
    "text_encoder/config.json": _clip("CLIPTextModel", hidden_act="quick_gelu"),
    "unet/config.json": _unet(
        cross_attention_dim=32,
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    ),
    "vae/config.json": _VAE,
}
"""SD 1.5 in small, by file."""

TINY_SDXL: dict[str, dict[str, Any]] = {
    "model_index.json": {
        "_class_name": "StableDiffusionXLPipeline",
        "feature_extractor": [None, None],
        "force_zeros_for_empty_prompt": True,
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    },
    "scheduler/scheduler_config.json": {"_class_name": "EulerDiscreteScheduler", **_BETAS, "timestep_spacing": "leading"},
    "text_encoder/config.json": _clip("CLIPTextModel", hidden_act="quick_gelu"),
    "text_encoder_2/config.json": _clip("CLIPTextModelWithProjection", hidden_act="gelu"),
    "unet/config.json": _unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        attention_head_dim=[2, 4],
        cross_attention_dim=64,
        down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        projection_class_embeddings_input_dim=32 + 6 * 8,
        transformer_layers_per_block=[1, 2],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        use_linear_projection=True,
    ),
    "vae/config.json": {**_VAE, "force_upcast": True, "scaling_factor": 0.13025},
}
"""SDXL in small, by file."""


_T5 = {
    "architectures": ["T5EncoderModel"],
    "d_ff": 32,
    "d_kv": 8,
    "d_model": 24,
    "eos_token_id": 1,
    "is_encoder_decoder": True,
    "model_type": "t5",
    "num_heads": 2,
    "num_layers": 1,
    "pad_token_id": 0,
    "vocab_size": 32128,
}


def _pixart(pipeline: str, sample_size: int, **more: Any) -> dict[str, dict[str, Any]]:
    """PixArt in small, by file."""
    return {
        "model_index.json": {
            "_class_name": pipeline,
            "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
            "text_encoder": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "T5Tokenizer"],
            "transformer": ["diffusers", "PixArtTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "DPMSolverMultistepScheduler",
            "algorithm_type": "dpmsolver++",
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "beta_start": 0.0001,
            "num_train_timesteps": 1000,
            "timestep_spacing": "linspace",
        },
        "text_encoder/config.json": _T5,
        "transformer/config.json": {
            "_class_name": "PixArtTransformer2DModel",
            "activation_fn": "gelu-approximate",
            "attention_bias": True,
            "attention_head_dim": 8,
            "caption_channels": 24,
            "cross_attention_dim": 24,
            "in_channels": 4,
            "interpolation_scale": 1,
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "norm_type": "ada_norm_single",
            "num_attention_heads": 3,
            "num_embeds_ada_norm": 1000,
            "num_layers": 2,
            "out_channels": 8,
            "patch_size": 2,
            "sample_size": sample_size,
            **more,
        },
        "vae/config.json": _VAE,
    }


TINY_PIXART = _pixart("PixArtAlphaPipeline", 128, use_additional_conditions=True)
TINY_PIXART_SIGMA = _pixart("PixArtSigmaPipeline", 8, use_additional_conditions=False)


def write_configs(folder: Path, files: dict[str, dict[str, Any]]) -> Path:
    """Write a diffusers folder of configurations alone."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data), encoding="utf-8")
    return folder


def write_pipeline(folder: Path, configs: Path, *, seed: int = 0) -> Path:
    """Write a whole diffusers pipeline with random fp32 weights, its cross-attention made loud."""
    import torch
    from safetensors.torch import save_file

    from tgate_trt.models.resolve import resolve
    from tgate_trt.models.saving import save_rest

    source = resolve(configs, random_weights=True, seed=seed)
    save_rest(source, folder, "fp32")
    loud = ("attn2.to_v.weight", "attn2.to_out.0.weight")
    tensors = {name: tensor * CROSS_ATTENTION_GAIN if name.endswith(loud) else tensor for name, tensor in source.tensors(torch.float32)}
    save_file(tensors, folder / source.denoiser_attribute / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    return folder


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global random generators of Python, NumPy and PyTorch for a while, and let them go on afterwards from where they were."""
    import numpy
    import torch

    before = random.getstate(), numpy.random.get_state()
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(before[0])
        numpy.random.set_state(before[1])


def seed_of(config: pytest.Config) -> int:
    """The seed of pytest-randomly, which the run prints; 0 without it."""
    seed: int = config.getoption("randomly_seed", 0)
    return seed


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Let Hypothesis draw its examples from the seed of the run, unless it is given one."""
    if core.global_force_seed is None:
        core.global_force_seed = seed_of(config)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Iterator[None]:
    """Seed a shared fixture by its name: it draws the same whichever test asks for it first, and that test the same as if it were not."""
    if fixturedef.scope == "function":
        return (yield)
    with seeded(zlib.crc32(fixturedef.argname.encode())):
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Seed a test by its name and by the seed that the run prints: ``--randomly-seed=N`` repeats both the order and the numbers."""
    with seeded(seed_of(item.config) + zlib.crc32(item.nodeid.encode())):
        return (yield)


def leaves_the_process_as_it_was() -> Iterator[None]:
    before = ProcessState.now()
    yield
    wait_for_threads(before)
    changes = ProcessState.now().changes_since(before)
    if changes:
        pytest.fail("the process was left changed:\n" + "\n".join(changes), pytrace=False)


# A test is compared without the shared fixtures that it uses, and a file with them.
of_a_test = pytest.fixture(autouse=True)(leaves_the_process_as_it_was)
of_a_file = pytest.fixture(autouse=True, scope="module")(leaves_the_process_as_it_was)


@pytest.fixture(scope="session")
def tiny_sd_configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configurations of `tiny_sd`, without weights or tokenizer."""
    return write_configs(tmp_path_factory.mktemp("configs") / "tiny-sd", TINY_SD)


@pytest.fixture(scope="session")
def tiny_sdxl_configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configurations of `tiny_sdxl`, without weights or tokenizers."""
    return write_configs(tmp_path_factory.mktemp("configs") / "tiny-sdxl", TINY_SDXL)


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory, tiny_sd_configs: Path) -> Path:
    """A pipeline folder: SD 1.5 in small, pictures of 64×64 pixels, latents of 8×8, four cross-attention blocks. Read only."""
    return write_pipeline(tmp_path_factory.mktemp("pipelines") / "tiny-sd", tiny_sd_configs)


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory, tiny_sdxl_configs: Path) -> Path:
    """A pipeline folder: SDXL in small, with two text encoders, pooled text and time ids; its UNet's pictures are 64×64. Read only."""
    return write_pipeline(tmp_path_factory.mktemp("pipelines") / "tiny-sdxl", tiny_sdxl_configs)


@pytest.fixture(scope="session")
def tiny_pixart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder: PixArt-α in small, its prompts of 120 tokens with masks, its pictures with resolution and aspect. Read only."""
    configs = write_configs(tmp_path_factory.mktemp("configs") / "tiny-pixart", TINY_PIXART)
    return write_pipeline(tmp_path_factory.mktemp("pipelines") / "tiny-pixart", configs)


@pytest.fixture(scope="session")
def tiny_pixart_sigma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for PixArt-Σ: prompts of 300 tokens, no resolution. Read only."""
    configs = write_configs(tmp_path_factory.mktemp("configs") / "tiny-pixart-sigma", TINY_PIXART_SIGMA)
    return write_pipeline(tmp_path_factory.mktemp("pipelines") / "tiny-pixart-sigma", configs)


@pytest.fixture(scope="session")
def shapes_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Bundle of the demo model for ONNX Runtime and PyTorch. Read only."""
    import tgate_trt

    folder = tmp_path_factory.mktemp("bundles") / "shapes"
    return tgate_trt.build("shapes", folder, verify=False, backend=["onnxruntime", "pytorch"], graphs=("planning", "fidelity"))


@pytest.fixture(scope="session")
def run() -> Run:
    """Runs a command in this process, and checks that it ends without a traceback."""

    def run(app: Typer, *arguments: object) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return run


@pytest.fixture(scope="session")
def error_of(run: Run) -> Callable[..., str]:
    """Runs a command that must fail on its user's input, and returns the one sentence of its error."""

    def error_of(app: Typer, *arguments: object) -> str:
        result = run(app, *arguments)
        assert result.exit_code == 1, result.output
        lines = result.stderr.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
        return lines[0]

    return error_of

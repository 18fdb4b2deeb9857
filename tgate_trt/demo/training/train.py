"""Trains the demo model: `python -m tgate_trt.demo.training.train --output DIR`.

Tokenizer, text encoder, autoencoder, denoiser, export: each stage continues from its checkpoint in the work folder, so the same
command resumes a killed run.
"""

import logging
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import typer
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from tgate_trt.console import reporting
from tgate_trt.demo.evaluate import load_pipeline
from tgate_trt.demo.training.architecture import caption_words, make_scheduler, make_text_encoder, make_tokenizer, make_unet, make_vae
from tgate_trt.demo.training.fitting import Recipe
from tgate_trt.demo.training.stages import Bench, draw_training_set, encode_training_set, train_text_encoder, train_unet, train_vae
from tgate_trt.errors import InputError

logger = logging.getLogger("tgate_trt.demo.training.train")  # as a command, this module is `__main__`

_Part = TypeVar("_Part", bound=nn.Module)


@dataclass(frozen=True)
class Settings:
    """Everything that determines the trained weights."""

    text_encoder: Recipe = field(default_factory=lambda: Recipe(steps=500, batch_size=128, learning_rate=1e-3))
    vae: Recipe = field(default_factory=lambda: Recipe(steps=2000, batch_size=16, learning_rate=2e-3, warm_up=50))
    unet: Recipe = field(default_factory=lambda: Recipe(steps=3900, batch_size=32, learning_rate=1.5e-3, warm_up=200, average=0.999))
    further: Recipe = field(default_factory=lambda: Recipe(steps=2400, batch_size=32, learning_rate=6e-4, average=0.995))
    """Of a denoiser that is trained already."""
    pictures: int = 8
    """Jittered pictures of each combination in the denoiser's training set."""
    captions: int = 6
    """Wordings of each combination in the denoiser's training set."""
    seed: int = 0


DEFAULTS = Settings()


def train(output: Path, work: Path, *, settings: Settings, device: torch.device, start: Path | None = None) -> None:
    """Trains every part, or only the denoiser of a trained pipeline further, and writes the pipeline.

    Args:
        output: folder of the pipeline, in diffusers' format; replaced when the training is done.
        work: folder of the checkpoints.
        settings: recipes and seed.
        device: where to train.
        start: folder of a trained pipeline, whose other parts are kept.

    Raises:
        InputError: if the work folder belongs to a training with other settings, `output` holds something other than a pipeline,
            or `start` holds none.
    """
    if output.exists() and not (output / "model_index.json").exists() and any(output.iterdir()):
        raise InputError(f"{output} must be empty or hold a diffusers pipeline; other files are not replaced, so choose another --output")
    trained = None if start is None else load_pipeline(start)
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(work, device, settings.seed)
    pictures = draw_training_set(settings.pictures, bench)
    tokenizer = make_tokenizer(caption_words())
    if trained is None:
        text_encoder = train_text_encoder(tokenizer, settings.text_encoder, bench)
        vae = train_vae(pictures, settings.vae, bench)
        recipe, unet = settings.unet, None
    else:
        text_encoder = _with_weights(make_text_encoder(tokenizer), trained.text_encoder).to(device).eval().requires_grad_(False)
        vae = _with_weights(make_vae(), trained.vae).to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        vae.register_to_config(scaling_factor=trained.vae.config.scaling_factor)
        recipe, unet = settings.further, _with_weights(make_unet(), trained.unet)
    encoded = encode_training_set(pictures, settings.captions, tokenizer, text_encoder, vae, bench)
    export(output, tokenizer, text_encoder, vae, train_unet(encoded, recipe, bench, unet))
    logger.info("wrote %s", output)


def _with_weights(part: _Part, trained: nn.Module) -> _Part:
    """A new part of the pipeline with the weights of a trained one, in fp32.

    Raises:
        InputError: if that has another architecture.
    """
    try:
        part.load_state_dict(trained.state_dict())
    except RuntimeError as error:
        raise InputError(f"the {type(part).__name__} of --start is not like the demo model's; choose another --start") from error
    return part


def export(output: Path, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, vae: AutoencoderKL, unet: UNet2DConditionModel) -> None:
    """Writes the pipeline beside `output` and moves it there; its denoiser, by far the largest part, is in half precision."""
    pipeline = StableDiffusionPipeline(
        vae=vae.to("cpu", memory_format=torch.contiguous_format),
        text_encoder=text_encoder.to("cpu"),
        tokenizer=tokenizer,
        unet=unet.to("cpu", torch.float16, memory_format=torch.contiguous_format),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    temporary = output.with_name(f".{output.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.save_pretrained(temporary)
    if output.exists():
        shutil.rmtree(output)
    temporary.replace(output)


def main(
    output: Annotated[Path, typer.Option(help="Folder to write the pipeline to, in diffusers' format.")] = Path("shapes"),
    work: Annotated[Path | None, typer.Option(help="Folder of the checkpoints. [default: OUTPUT.work]")] = None,
    start: Annotated[Path | None, typer.Option(help="Folder of a trained pipeline, whose denoiser alone is trained further.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda. [default: cuda if there is a GPU]")] = "",
    seed: Annotated[int, typer.Option(help="Seed of all randomness.")] = DEFAULTS.seed,
    text_steps: Annotated[int, typer.Option(min=1, help="Steps of the text encoder.")] = DEFAULTS.text_encoder.steps,
    vae_steps: Annotated[int, typer.Option(min=1, help="Steps of the autoencoder.")] = DEFAULTS.vae.steps,
    unet_steps: Annotated[int, typer.Option(min=1, help="Steps of a new denoiser.")] = DEFAULTS.unet.steps,
    further_steps: Annotated[int, typer.Option(min=1, help="Steps of the denoiser of --start.")] = DEFAULTS.further.steps,
) -> None:
    """Trains the demo model on pictures that this program draws, and resumes a run that was stopped."""
    settings = replace(
        DEFAULTS,
        seed=seed,
        text_encoder=replace(DEFAULTS.text_encoder, steps=text_steps),
        vae=replace(DEFAULTS.vae, steps=vae_steps),
        unet=replace(DEFAULTS.unet, steps=unet_steps),
        further=replace(DEFAULTS.further, steps=further_steps),
    )
    with reporting(verbose=False, interrupted="stopped; the same command continues from the last checkpoint"):
        train(output, work or output.with_name(f"{output.name}.work"), settings=settings, device=_device(device), start=start)


def _device(name: str) -> torch.device:
    available = {"cpu"} | ({"cuda"} if torch.cuda.is_available() else set())
    chosen = name or max(available)  # "cuda" sorts after "cpu"
    if chosen not in available:
        raise InputError(f"--device must be {' or '.join(sorted(available))} on this machine, got {name!r}; choose another --device")
    return torch.device(chosen)


if __name__ == "__main__":
    typer.run(main)

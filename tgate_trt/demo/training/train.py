"""Trains the demo model: `python -m tgate_trt.demo.training.train --output DIR`.

Tokenizer, text encoder, autoencoder, denoiser, export: each stage goes on from its checkpoint in the work folder, so a killed
run is started again by the same command.
"""

import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from tgate_trt.demo.training.architecture import caption_words, make_scheduler, make_tokenizer
from tgate_trt.demo.training.fitting import Recipe
from tgate_trt.demo.training.reporting import Reporter
from tgate_trt.demo.training.stages import Bench, draw_training_set, encode_training_set, train_text_encoder, train_unet, train_vae
from tgate_trt.errors import InputError, TGateError


@dataclass(frozen=True)
class Settings:
    """All that decides which weights come out."""

    text_encoder: Recipe = field(default_factory=lambda: Recipe(steps=500, batch_size=128, learning_rate=1e-3))
    vae: Recipe = field(default_factory=lambda: Recipe(steps=2000, batch_size=16, learning_rate=2e-3, warm_up=50))
    unet: Recipe = field(default_factory=lambda: Recipe(steps=3900, batch_size=32, learning_rate=1.5e-3, warm_up=200, average=0.999))
    pictures: int = 8
    """Jittered pictures of each combination that the denoiser is trained on."""
    captions: int = 6
    """Wordings of each combination that the denoiser is trained on."""
    seed: int = 0


DEFAULTS = Settings()


def train(output: Path, work: Path, *, settings: Settings, device: torch.device, reporter: Reporter) -> None:
    """Trains every part and writes the pipeline.

    Args:
        output: folder of the pipeline, in diffusers' format; replaced when the training is done, and not before.
        work: folder of the checkpoints.
        settings: recipes and seed.
        device: where to train.
        reporter: where progress goes.

    Raises:
        InputError: when the work folder is of a training with other settings, or `output` holds something else than a pipeline.
    """
    if output.exists() and not (output / "model_index.json").exists() and any(output.iterdir()):
        raise InputError(f"{output} holds something else than a diffusers pipeline, so it is not replaced; take another --output")
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(work, device, settings.seed, reporter)
    tokenizer = make_tokenizer(caption_words())
    text_encoder = train_text_encoder(tokenizer, settings.text_encoder, bench)
    pictures = draw_training_set(settings.pictures, bench)
    vae = train_vae(pictures, settings.vae, bench)
    encoded = encode_training_set(pictures, settings.captions, tokenizer, text_encoder, vae, bench)
    unet = train_unet(encoded, settings.unet, bench)
    export(output, tokenizer, text_encoder, vae, unet)
    reporter.say(f"wrote {output}")


def export(output: Path, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, vae: AutoencoderKL, unet: UNet2DConditionModel) -> None:
    """Writes the pipeline beside `output` and moves it there: its denoiser, by far its largest part, in half precision."""
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
    device: Annotated[str, typer.Option(help="cpu or cuda. [default: cuda where there is one]")] = "",
    seed: Annotated[int, typer.Option(help="Of all randomness.")] = DEFAULTS.seed,
    text_steps: Annotated[int, typer.Option(min=1, help="Steps of the text encoder.")] = DEFAULTS.text_encoder.steps,
    vae_steps: Annotated[int, typer.Option(min=1, help="Steps of the autoencoder.")] = DEFAULTS.vae.steps,
    unet_steps: Annotated[int, typer.Option(min=1, help="Steps of the denoiser.")] = DEFAULTS.unet.steps,
) -> None:
    """Trains the demo model from pictures that it draws itself, and goes on where it was stopped."""
    settings = replace(
        DEFAULTS,
        seed=seed,
        text_encoder=replace(DEFAULTS.text_encoder, steps=text_steps),
        vae=replace(DEFAULTS.vae, steps=vae_steps),
        unet=replace(DEFAULTS.unet, steps=unet_steps),
    )
    reporter = Reporter()
    try:
        chosen = _device(device)
        train(output, work or output.with_name(f"{output.name}.work"), settings=settings, device=chosen, reporter=reporter)
    except TGateError as error:
        reporter.say(f"error: {error}")
        sys.exit(1)


def _device(name: str) -> torch.device:
    available = {"cpu"} | ({"cuda"} if torch.cuda.is_available() else set())
    chosen = name or max(available)  # "cuda" sorts after "cpu"
    if chosen not in available:
        raise InputError(f"--device must be {' or '.join(sorted(available))} on this machine; got {name!r}")
    return torch.device(chosen)


if __name__ == "__main__":
    typer.run(main)

"""The stages of training: text encoder, autoencoder, denoiser. Each is a function from the finished parts to the next one.

The text encoder is trained first and alone, like CLIP's: when it learns together with the denoiser, positions stay at chance for
thousands of steps. Pictures and captions are encoded once, so that a step of the denoiser costs nothing but the denoiser.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from tgate_trt.demo.dataset import (
    ATTRIBUTES,
    BACKGROUND_COLOURS,
    POSITIONS,
    SHORT_TEMPLATES,
    TEMPLATES,
    Combination,
    caption,
    combinations,
    draw_jittered,
    examples,
)
from tgate_trt.demo.training.architecture import TEXT_WIDTH, make_scheduler, make_text_encoder, make_unet, make_vae, noise_levels
from tgate_trt.demo.training.fitting import Loss, Recipe, StageLog, fit

logger = logging.getLogger(__name__)

SHORT_CAPTIONS = 0.1
"""The share of training captions that do not name every attribute."""

EMPTY_CAPTIONS = 0.1
"""The share of the denoiser's training captions that the empty caption replaces, for classifier-free guidance."""

SHAPE_WEIGHT = 5.0
"""Weight of a shape's pixel in the autoencoder's loss; a background pixel has 1, and most pixels are background."""

WHOLE_PICTURES_FROM = 0.85
"""The share of the autoencoder's steps after which it trains on whole pictures."""

KL_WEIGHT = 1e-6

NOT_NAMED = -100
"""The label that cross-entropy ignores."""


@dataclass(frozen=True)
class Bench:
    """The folder, device and seed of all stages."""

    work: Path
    """Folder of the checkpoints."""
    device: torch.device
    seed: int

    def fit(self, module: nn.Module, loss: Loss, recipe: Recipe, stage: str) -> None:
        """Trains `module` in place, from this stage's checkpoint if there is one."""
        checkpoint = self.work / f"{stage.replace(' ', '_')}.pt"
        fit(module, loss, recipe, stage=stage, seed=self.seed, checkpoint=checkpoint)


def train_text_encoder(tokenizer: CLIPTokenizer, recipe: Recipe, bench: Bench) -> CLIPTextModel:
    """Trains a text encoder from whose states, at and after the caption's end, linear heads read every attribute that it names."""
    torch.manual_seed(bench.seed)
    encoder = make_text_encoder(tokenizer)
    heads = nn.ModuleDict({attribute: nn.Linear(TEXT_WIDTH, len(values)) for attribute, values in ATTRIBUTES.items()})
    module = nn.ModuleDict({"encoder": encoder, "heads": heads}).to(bench.device)
    pool = combinations(held_out=False)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        rng = _numpy(generator)
        captions, labels = zip(*(training_caption(pool[i], rng) for i in rng.integers(len(pool), size=recipe.batch_size)), strict=True)
        ids = tokenize(tokenizer, captions).to(bench.device)
        states, ended = encoder(ids).last_hidden_state, ids == tokenizer.eos_token_id
        targets = torch.tensor(labels, device=bench.device)[:, None].expand(-1, ids.shape[1], -1)
        losses = [functional.cross_entropy(head(states[ended]), targets[ended][:, i]) for i, head in enumerate(heads.values())]
        return torch.stack(losses).sum()

    bench.fit(module, loss, recipe, "text encoder")
    understood = _captions_understood(tokenizer, encoder, heads, bench.device)
    logger.info("text encoder: %.1f %% of held-out captions understood", 100 * understood)
    return encoder.requires_grad_(False)


def training_caption(combination: Combination, rng: np.random.Generator) -> tuple[str, tuple[int, ...]]:
    """A random wording, sometimes a short one, and its labels in the order of `ATTRIBUTES`."""
    templates = SHORT_TEMPLATES if rng.random() < SHORT_CAPTIONS else TEMPLATES
    template = templates[rng.integers(len(templates))]
    labels = (label if f"{{{name}}}" in template else NOT_NAMED for name, label in zip(ATTRIBUTES, combination.labels, strict=True))
    return caption(combination, rng, template), tuple(labels)


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> torch.Tensor:
    """Token ids `[len(captions), CAPTION_TOKENS]`, padded as a diffusers pipeline pads them."""
    return torch.tensor(tokenizer(list(captions), padding="max_length", truncation=True).input_ids)


@torch.no_grad()
def _captions_understood(tokenizer: CLIPTokenizer, encoder: CLIPTextModel, heads: nn.ModuleDict, device: torch.device) -> float:
    """The share of held-out captions from which the heads read every attribute."""
    held_out = examples(held_out=True)
    pooled = encoder(tokenize(tokenizer, [example.caption for example in held_out]).to(device)).pooler_output
    predicted = torch.stack([head(pooled).argmax(-1) for head in heads.values()], -1).cpu()
    expected = torch.tensor([example.combination.labels for example in held_out])
    return float((predicted == expected).all(-1).float().mean())


def draw_training_set(each: int, bench: Bench) -> torch.Tensor:
    """Jittered pictures of the training combinations, `[combinations, each, 3, height, width]`, uint8."""
    pool, rng = combinations(held_out=False), np.random.default_rng(bench.seed)
    pictures = np.stack([draw_jittered([combination] * each, rng) for combination in pool])
    return torch.from_numpy(pictures).permute(0, 1, 4, 2, 3)


def train_vae(pictures: torch.Tensor, recipe: Recipe, bench: Bench) -> AutoencoderKL:
    """Trains an autoencoder whose latents have mean 0 and standard deviation 1 in each channel.

    Most steps use only the shape and its surroundings, a quarter of a picture, because the rest is flat and soon learnt. The
    last steps use whole pictures, on which the group norms must work later.

    Args:
        pictures: pictures of the training combinations, `[combinations, each, 3, height, width]`, uint8.
        recipe: how to optimise.
        bench: folder, device and seed.
    """
    torch.manual_seed(bench.seed)
    vae = make_vae().to(bench.device, memory_format=torch.channels_last)
    pool = combinations(held_out=False)
    backgrounds = torch.tensor([BACKGROUND_COLOURS[combination.background] for combination in pool])
    centres = torch.tensor([POSITIONS[combination.position] for combination in pool])
    whole_from = int(WHOLE_PICTURES_FROM * recipe.steps)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        cropped = step < whole_from
        size = recipe.batch_size if cropped else recipe.batch_size // 2
        rows = torch.randint(len(pool), (size,), generator=generator)
        chosen = pictures[rows, torch.randint(pictures.shape[1], (size,), generator=generator)]
        if cropped:
            chosen = _crop(chosen, centres[rows], generator)
        target = _to_model(chosen, bench.device)
        weights = 1 + (SHAPE_WEIGHT - 1) * _on_shape(chosen, backgrounds[rows]).to(bench.device)
        latents = vae.encode(target).latent_dist
        error = (vae.decode(latents.sample(generator)).sample - target).abs()
        total: torch.Tensor = (error * weights).mean() / weights.mean() + KL_WEIGHT * latents.kl().mean()
        return total

    bench.fit(vae, loss, recipe, "autoencoder")
    latents = encode_pictures(vae, pictures[:, 0], bench)
    standardise(vae, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
    return vae.requires_grad_(False)


def _crop(pictures: torch.Tensor, centres: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A square of half the width around each shape, moved by a few random pixels."""
    side = pictures.shape[-1] // 2
    corners = centres - side // 2 + torch.randint(-6, 7, centres.shape, generator=generator)
    corners = corners.long().clamp(0, pictures.shape[-1] - side)
    return torch.stack([picture[:, y : y + side, x : x + side] for picture, (x, y) in zip(pictures, corners.tolist(), strict=True)])


def _to_model(pictures: torch.Tensor, device: torch.device) -> torch.Tensor:
    """From uint8 to float32 in -1…1, on the device."""
    return (pictures.to(device) / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def _on_shape(pictures: torch.Tensor, backgrounds: torch.Tensor) -> torch.Tensor:
    """1 where a pixel differs from the background, else 0, `[batch, 1, height, width]`."""
    return ((pictures - backgrounds[:, :, None, None]).abs().amax(1, keepdim=True) > 6).float()


@torch.no_grad()
def standardise(vae: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Folds `(latents - mean) / std` of each channel into the 1×1 convolutions before and after the latents; pictures stay the same.

    Args:
        vae: the autoencoder, changed in place.
        mean: mean of each channel of its latents, `[LATENT_CHANNELS]`.
        std: standard deviation of each channel of its latents, `[LATENT_CHANNELS]`.
    """
    mean, std = mean.to(vae.device), std.to(vae.device)
    before, after = vae.quant_conv, vae.post_quant_conv
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std[None, :, None, None]
    before.bias -= torch.cat([mean, 2 * std.log()])  # the encoder returns means, then logarithms of variances
    scale = torch.cat([1 / std, torch.ones_like(std)])
    before.weight *= scale[:, None, None, None]
    before.bias *= scale
    vae.register_to_config(scaling_factor=1.0)


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: torch.Tensor, bench: Bench) -> torch.Tensor:
    """Latents `[count, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE]` of uint8 pictures `[count, 3, height, width]`, on the CPU."""
    latents, log = [], StageLog("encode pictures", len(pictures))
    for start in range(0, len(pictures), 64):
        batch = _to_model(pictures[start : start + 64], bench.device)
        latents.append(vae.encode(batch).latent_dist.mode().cpu().contiguous())
        log.advance(count=len(batch))
    return torch.cat(latents)


@torch.no_grad()
def encode_captions(tokenizer: CLIPTokenizer, encoder: CLIPTextModel, captions: Sequence[str], device: torch.device) -> torch.Tensor:
    """States `[len(captions), CAPTION_TOKENS, TEXT_WIDTH]` as the pipeline gives them to the denoiser, on the CPU."""
    batches = (captions[start : start + 256] for start in range(0, len(captions), 256))
    return torch.cat([encoder(tokenize(tokenizer, batch).to(device)).last_hidden_state.cpu() for batch in batches])


@dataclass(frozen=True)
class Encoded:
    """The training set of the denoiser; the rows of its first two tensors are the same combinations in the same order."""

    latents: torch.Tensor
    """`[combinations, pictures of each, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE]`."""
    captions: torch.Tensor
    """`[combinations, captions of each, CAPTION_TOKENS, TEXT_WIDTH]`."""
    empty: torch.Tensor
    """The empty caption, `[CAPTION_TOKENS, TEXT_WIDTH]`."""

    def batch(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents and captions of random combinations, pictures and wordings; some captions are the empty one."""
        count, pictures, wordings = self.latents.shape[0], self.latents.shape[1], self.captions.shape[1]
        rows = torch.randint(count, (size,), generator=generator)
        latents = self.latents[rows, torch.randint(pictures, (size,), generator=generator)]
        captions = self.captions[rows, torch.randint(wordings, (size,), generator=generator)]
        dropped = torch.rand(size, generator=generator) < EMPTY_CAPTIONS
        return latents, torch.where(dropped[:, None, None], self.empty, captions)


def encode_training_set(
    pictures: torch.Tensor, captions: int, tokenizer: CLIPTokenizer, encoder: CLIPTextModel, vae: AutoencoderKL, bench: Bench
) -> Encoded:
    """Latents of the pictures `[combinations, each, 3, height, width]` and states of `captions` wordings of each combination."""
    pool, rng = combinations(held_out=False), np.random.default_rng(bench.seed)
    texts = [training_caption(combination, rng)[0] for combination in pool for _ in range(captions)]
    states = encode_captions(tokenizer, encoder, [*texts, ""], bench.device)
    latents = encode_pictures(vae, pictures.flatten(0, 1), bench)
    return Encoded(
        latents=latents.reshape(*pictures.shape[:2], *latents.shape[1:]),
        captions=states[:-1].reshape(len(pool), captions, *states.shape[1:]),
        empty=states[-1],
    )


def train_unet(encoded: Encoded, recipe: Recipe, bench: Bench, start: UNet2DConditionModel | None = None) -> UNet2DConditionModel:
    """Trains a denoiser to predict velocity (Salimans and Ho, 2022), which gives weight to high noise, where positions are decided.

    Args:
        encoded: the training set.
        recipe: how to optimise.
        bench: folder, device and seed.
        start: a trained denoiser to go on with, changed in place; a new one if None.
    """
    torch.manual_seed(bench.seed)
    unet = (start or make_unet()).requires_grad_().to(bench.device, memory_format=torch.channels_last)
    scheduler = make_scheduler()
    signal, noise_share = noise_levels(scheduler)
    count = len(signal)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        latents, captions = encoded.batch(recipe.batch_size, generator)
        noise = torch.randn(latents.shape, generator=generator)
        # One timestep from each of batch_size equal intervals: less variance than independent timesteps.
        stretch = torch.arange(len(latents)) + torch.rand(len(latents), generator=generator)
        timesteps = (stretch * count / len(latents)).long().clamp(max=count - 1)
        a, b = signal[timesteps].view(-1, 1, 1, 1), noise_share[timesteps].view(-1, 1, 1, 1)
        noisy, velocity = a * latents + b * noise, a * noise - b * latents
        noisy = noisy.to(bench.device, memory_format=torch.channels_last)
        predicted = unet(noisy, timesteps.to(bench.device), captions.to(bench.device)).sample
        return functional.mse_loss(predicted, velocity.to(bench.device))

    if bench.device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())  # on a CPU, PyTorch's fused attention takes twice as long as plain products
    bench.fit(unet, loss, recipe, "denoiser")
    unet.set_default_attn_processor()
    return unet.requires_grad_(False)


def _numpy(generator: torch.Generator) -> np.random.Generator:
    """A numpy generator that continues a torch generator's randomness."""
    return np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))

"""The untrained parts of the demo model, small enough for two CPU cores to train in an hour or two."""

import itertools
import re
from collections import Counter
from collections.abc import Iterable

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tgate_trt.demo.dataset import ATTRIBUTES, PICTURE_SIZE, SHORT_TEMPLATES, SYNONYMS, TEMPLATES

CAPTION_TOKENS = 24
"""Tokens of an encoded prompt, including start, end and padding; the longest caption has 18."""

TEXT_WIDTH = 128
"""Channels of a token's embedding."""

LATENT_CHANNELS = 4

LATENT_SIZE = PICTURE_SIZE // 4
"""With an 8× smaller width and height, even of 16 or 32 channels, the autoencoder takes several times as long to learn shapes."""

START, END = "<|startoftext|>", "<|endoftext|>"


def caption_words() -> list[str]:
    """Every word that can occur in a caption, sorted."""
    values = [word for names in ATTRIBUTES.values() for name in names for word in SYNONYMS.get(name, (name,))]
    plain = [re.sub(r"{\w+}", " ", template) for template in (*TEMPLATES, *SHORT_TEMPLATES)]
    return sorted(set(re.findall(r"[a-z]+", " ".join([*values, *plain]))))


def make_tokenizer(words: Iterable[str]) -> CLIPTokenizer:
    """A CLIP tokenizer for which each of `words` is one token; other text becomes letters, digits and punctuation."""
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'\"()-")
    merges = byte_pair_merges(words)
    tokens = dict.fromkeys([*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), START, END])
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CAPTION_TOKENS)


def byte_pair_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, in order, that join the letters of each word into one token (Sennrich et al., 2016, algorithm 1)."""
    spelled = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for symbols in spelled for pair in itertools.pairwise(symbols)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        spelled = [_merge(symbols, best) for symbols in spelled]
    return merges


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """CLIP's causal text transformer, narrow; its final layer norm gives the denoiser states of unit scale."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CAPTION_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def make_vae() -> AutoencoderKL:
    """An autoencoder to latents `[LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE]`, with few channels at full size, where it spends its time."""
    widths = (16, 32, 64)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,  # norms over few channels remove most of a flat colour
        mid_block_add_attention=False,
        sample_size=PICTURE_SIZE,
    )


def make_unet() -> UNet2DConditionModel:
    """A denoiser with cross-attention at each level, 16×16 to 2×2; the lower levels infer positions from the padding."""
    widths = (32, 64, 64, 96)
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * len(widths),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=tuple(width // 32 for width in widths),  # diffusers reads this as the number of heads: 32 channels each
        norm_num_groups=8,
    )


def make_scheduler() -> DPMSolverMultistepScheduler:
    """DPM-Solver++ on the cosine schedule (Nichol and Dhariwal, 2021, section 3.2), which they found to suit small pictures.

    On DDPM's linear schedule ten of 25 trailing steps have more than 7 times as much noise as signal, of which 16×16 latents keep nothing.
    """
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
        algorithm_type="dpmsolver++",
    )
    # For schedulers made from this configuration, not for this one: latents exceed -1…1.
    scheduler.register_to_config(clip_sample=False, set_alpha_to_one=False, skip_prk_steps=True)
    return scheduler


def noise_levels(scheduler: DPMSolverMultistepScheduler) -> tuple[torch.Tensor, torch.Tensor]:
    """The shares of signal and noise at each training timestep, both `[1000]`: sqrt(ᾱ) and sqrt(1 - ᾱ)."""
    cumulative = scheduler.alphas_cumprod
    return cumulative.sqrt(), (1 - cumulative).sqrt()

"""Every stage of the training, for a few tiny steps, and its continuation after a kill."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from tgate_trt.demo import MODEL_DIR
from tgate_trt.demo.dataset import Combination, examples
from tgate_trt.demo.evaluate import load_pipeline
from tgate_trt.demo.training.architecture import CAPTION_TOKENS, LATENT_CHANNELS, LATENT_SIZE, caption_words, make_tokenizer, make_vae
from tgate_trt.demo.training.fitting import Recipe, fit
from tgate_trt.demo.training.stages import NOT_NAMED, standardise, tokenize, training_caption
from tgate_trt.demo.training.train import Settings, train
from tgate_trt.errors import InputError


def tiny(steps: int) -> Recipe:
    return Recipe(steps=steps, batch_size=4, learning_rate=1e-3, warm_up=1)


@dataclass
class Killed(Exception):
    """Stands for the end of the process."""

    step: int


def fit_line(checkpoint: Path, recipe: Recipe, *, killed_at: int | None = None, seed: int = 0) -> nn.Linear:
    """Fits a line to noisy points that each step draws afresh."""
    torch.manual_seed(1)
    line = nn.Linear(3, 1)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        if step == killed_at:
            raise Killed(step)
        x = torch.randn(recipe.batch_size, 3, generator=generator)
        return (line(x) - x.sum(1, keepdim=True)).square().mean()

    fit(line, loss, recipe, stage="line", seed=seed, checkpoint=checkpoint)
    return line


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_a_killed_fit_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, average: float) -> None:
    monkeypatch.setattr("tgate_trt.demo.training.fitting.SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    recipe = replace(tiny(20), average=average)
    whole = fit_line(tmp_path / "whole.pt", recipe)
    with pytest.raises(Killed):
        fit_line(tmp_path / "killed.pt", recipe, killed_at=13)
    resumed = fit_line(tmp_path / "killed.pt", recipe)
    assert torch.equal(whole.weight, resumed.weight)
    assert torch.equal(whole.bias, resumed.bias)


def test_a_finished_fit_is_not_run_again(tmp_path: Path) -> None:
    first = fit_line(tmp_path / "line.pt", tiny(5))
    again = fit_line(tmp_path / "line.pt", tiny(5), killed_at=0)
    assert torch.equal(first.weight, again.weight)


def test_a_fit_learns(tmp_path: Path) -> None:
    line = fit_line(tmp_path / "line.pt", replace(tiny(300), learning_rate=0.1))
    assert torch.allclose(line.weight, torch.ones(1, 3), atol=0.05)


def test_each_step_is_logged_with_its_loss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="tgate_trt")
    fit_line(tmp_path / "line.pt", tiny(2))
    half, whole, done = caplog.records
    assert (half.progress, whole.progress) == (0.5, 1.0)  # type: ignore[attr-defined]
    assert half.getMessage().startswith("line, loss ") and done.getMessage() == f"{whole.getMessage()}: done"


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    fit_line(tmp_path / "line.pt", tiny(5))
    with pytest.raises(InputError, match="another seed, steps"):
        fit_line(tmp_path / "line.pt", tiny(6), seed=1)


def test_every_word_of_a_caption_is_one_token() -> None:
    tokenizer = make_tokenizer(caption_words())
    for example in examples(50, held_out=True):
        words = example.caption.replace(",", " ,").split()
        assert tokenizer.tokenize(example.caption) == [f"{word}</w>" for word in words]


def test_every_caption_fits_with_room_for_its_end() -> None:
    tokenizer = make_tokenizer(caption_words())
    ids = tokenize(tokenizer, [example.caption for example in examples(held_out=False)])
    assert ids.shape[1] == CAPTION_TOKENS
    assert (ids[:, -1] == tokenizer.eos_token_id).all()
    assert (ids[:, 0] == tokenizer.bos_token_id).all()


def test_an_attribute_that_a_short_caption_leaves_open_has_no_label() -> None:
    combination = Combination("circle", "red", "small", "top left", "white")
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        text, labels = training_caption(combination, rng)
        assert (labels[4] == NOT_NAMED) == ("white" not in text)
        assert labels[0] == combination.labels[0]
        seen.add(labels[4] == NOT_NAMED)
    assert seen == {True, False}


def test_standardising_latents_changes_no_picture() -> None:
    torch.manual_seed(0)
    vae = make_vae().eval()
    pictures = torch.rand(8, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = vae.encode(pictures).latent_dist
        picture = vae.decode(before.mean).sample
        standardise(vae, before.mean.mean((0, 2, 3)), before.mean.std((0, 2, 3)))
        after = vae.encode(pictures).latent_dist
        assert torch.allclose(after.mean.mean((0, 2, 3)), torch.zeros(LATENT_CHANNELS), atol=1e-4)
        assert torch.allclose(after.mean.std((0, 2, 3)), torch.ones(LATENT_CHANNELS), atol=1e-4)
        assert torch.allclose(vae.decode(after.mean).sample, picture, atol=1e-4)


def test_training_writes_a_pipeline_that_draws(tmp_path: Path) -> None:
    settings = Settings(text_encoder=tiny(2), vae=tiny(2), unet=replace(tiny(2), average=0.9), pictures=1, captions=1)
    (tmp_path / "shapes").mkdir()
    train(tmp_path / "shapes", tmp_path / "work", settings=settings, device=torch.device("cpu"))
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "shapes", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline("a red circle", num_inference_steps=2, output_type="latent").images
    assert latents.shape == (1, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shapes", "work"]


def test_a_trained_pipeline_goes_on_with_its_denoiser_alone(tmp_path: Path) -> None:
    settings = Settings(further=tiny(2), pictures=1, captions=1)
    train(tmp_path / "shapes", tmp_path / "work", settings=settings, device=torch.device("cpu"), start=MODEL_DIR)
    before, after = (load_pipeline(folder) for folder in (MODEL_DIR, tmp_path / "shapes"))
    for part in ("text_encoder", "vae"):
        kept = getattr(after, part).state_dict()
        assert all(torch.equal(kept[name], value) for name, value in getattr(before, part).state_dict().items())
    changed = {name: (after.unet.state_dict()[name] - value).abs().max() for name, value in before.unet.state_dict().items()}
    assert 0 < max(changed.values()) < 0.1, "the denoiser went on from its weights"
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["denoiser.pt"]


def test_a_start_without_a_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no diffusers pipeline"):
        train(tmp_path / "shapes", tmp_path / "work", settings=Settings(), device=torch.device("cpu"), start=tmp_path)
    assert not (tmp_path / "shapes").exists()


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(InputError, match="not replaced"):
        train(tmp_path, tmp_path / "work", settings=Settings(), device=torch.device("cpu"))
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]

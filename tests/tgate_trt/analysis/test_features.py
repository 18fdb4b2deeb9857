"""Features: CLIP and Inception are read from files alone, and give what the networks give."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tgate_trt.analysis.features import clip_scores, inception_features
from tgate_trt.errors import InputError

PROMPTS = ["a red circle", "a word " * 60, "blue"]


def random_pictures(count: int, side: int = 64) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_clip_scores_are_100_times_the_cosine(clip_folder: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    pictures = random_pictures(3)
    model, processor = CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder)
    images = [(255 * picture).round().to(torch.uint8) for picture in pictures]
    inputs = processor(text=PROMPTS, images=images, return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        logits = model.eval()(**inputs).logits_per_image.diagonal() / model.logit_scale.exp()
    scores = clip_scores(pictures, PROMPTS, clip_folder)
    assert scores.tolist() == pytest.approx((100 * logits.clamp(min=0)).tolist(), abs=1e-4)
    assert scores.max() > 0


def test_clip_scores_do_not_depend_on_the_batch(clip_folder: Path) -> None:
    pictures, prompts = random_pictures(20, 40), [f"{number} shapes" for number in range(20)]
    together = clip_scores(pictures, prompts, clip_folder)
    assert together[17:].tolist() == pytest.approx(clip_scores(pictures[17:], prompts[17:], clip_folder).tolist(), abs=1e-4)


def test_a_clip_that_is_missing_or_not_whole_is_one_sentence(clip_folder: Path, tmp_path: Path) -> None:
    pictures = random_pictures(3)
    without_processor, without_weights, pickled = (Path(shutil.copytree(clip_folder, tmp_path / name)) for name in ("a", "b", "c"))
    (without_processor / "preprocessor_config.json").unlink()
    weights = load_file(without_weights / "model.safetensors")
    weights.pop("visual_projection.weight")
    save_file(weights, without_weights / "model.safetensors", metadata={"format": "pt"})
    (pickled / "model.safetensors").unlink()
    torch.save(weights, pickled / "pytorch_model.bin")
    text_only = tmp_path / "text"
    text_only.mkdir()
    (text_only / "config.json").write_text('{"model_type": "clip_text_model"}')
    for folder, message in (
        (tmp_path / "nothing", "holds no CLIP in transformers' format"),
        (text_only, "must hold a whole CLIP, text and vision .*; got 'clip_text_model'"),
        (without_processor, "holds no whole CLIP with tokenizer and image processor"),
        (without_weights, "lacks weights of its CLIP, visual_projection.weight among them"),
        (pickled, "holds no whole CLIP with tokenizer and image processor, in safetensors"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            clip_scores(pictures, PROMPTS, folder)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(InputError, match="got 2 prompts and 3 pictures"):
        clip_scores(pictures, PROMPTS[:2], clip_folder)


def test_inception_gets_bytes_of_any_size_and_gives_features(inception: nn.Module, inception_file: Path) -> None:
    pictures = random_pictures(20, 48)
    with torch.no_grad():
        expected = inception((255 * pictures).round(), return_features=True)
    assert torch.allclose(inception_features(pictures, inception_file).float(), expected, atol=1e-5)


class Features(nn.Module):
    """Without an argument for features: the means of the channels."""

    def forward(self, picture: Tensor) -> Tensor:
        return picture.float().mean((2, 3))


class Map(nn.Module):
    """Gives no row of features."""

    def forward(self, picture: Tensor) -> Tensor:
        return picture.float()


class Weighted(nn.Module):
    """Multiplies without a cast, which bytes do not bear."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64, 64))

    def forward(self, picture: Tensor) -> Tensor:
        return (picture @ self.weight).mean((2, 3))


def saved(module: nn.Module, folder: Path) -> Path:
    file = folder / f"{type(module).__name__}.pt"
    torch.jit.save(torch.jit.script(module), file)
    return file


def test_a_module_that_gives_features_only_is_called_as_it_is(tmp_path: Path) -> None:
    found = inception_features(torch.full((2, 3, 64, 64), 1.0), saved(Features(), tmp_path))
    assert found.tolist() == [[255.0] * 3] * 2


def test_an_inception_that_is_missing_or_unfit_is_one_sentence(tmp_path: Path) -> None:
    text = tmp_path / "text.pt"
    text.write_text("no program")
    for file, message in (
        (tmp_path / "nothing.pt", "there is no TorchScript file"),
        (text, r"cannot be read as TorchScript \(torch\.jit\.save\)"),
        (saved(Map(), tmp_path), r"must give features \[2, d\] for 2 pictures; it gave \[2, 3, 64, 64\]"),
        (saved(Weighted(), tmp_path), "does not take pictures as uint8"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            inception_features(random_pictures(2), file)
        assert len(str(caught.value).splitlines()) == 1

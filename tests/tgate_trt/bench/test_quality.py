"""Quality: each measure lands at its method, distances are to the set they name, and all of it is JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tgate_trt.analysis.features import clip_scores, inception_features
from tgate_trt.analysis.metrics import frechet_distance, perceptual_distance, psnr, ssim
from tgate_trt.bench.quality import TRUE_PICTURES, quality, true_pictures
from tgate_trt.demo.dataset import Captioned, Combination, examples
from tgate_trt.demo.evaluate import Proportion
from tgate_trt.errors import InputError

COUNT = 24


@pytest.fixture
def captioned() -> list[Captioned]:
    return examples(COUNT, held_out=True)


@pytest.fixture
def methods(captioned: list[Captioned]) -> dict[str, Tensor]:
    """A baseline that draws well, its equal but for one picture, and one with noise."""
    drawn = true_pictures(captioned, seed=1)
    nearly, noise = drawn.clone(), torch.randn(drawn.shape, generator=torch.Generator().manual_seed(0))
    nearly[0] = 1 - nearly[0]
    return {"base": drawn, "nearly": nearly, "noisy": (drawn + 0.05 * noise).clamp(0, 1)}


def test_each_method_is_compared_with_the_baseline(methods: dict[str, Tensor], captioned: list[Captioned]) -> None:
    found = quality(methods, "base", captioned=captioned)
    assert list(found) == list(methods)
    assert found["base"].likeness is None
    noisy, nearly = found["noisy"].likeness, found["nearly"].likeness
    assert noisy and nearly and noisy.psnr
    assert (noisy.identical, nearly.identical) == (0, COUNT - 1)
    assert nearly.psnr is None
    pair = methods["noisy"], methods["base"]
    assert noisy.psnr.value == pytest.approx(psnr(*pair).mean().item())
    assert noisy.ssim.value == pytest.approx(ssim(*pair).mean().item())
    assert noisy.perceptual_distance.value == pytest.approx(perceptual_distance(*pair).mean().item())
    assert all(estimate.low < estimate.value < estimate.high for estimate in (noisy.psnr, noisy.ssim, noisy.perceptual_distance))


def test_fid_is_to_the_true_pictures_or_else_to_the_baseline(
    methods: dict[str, Tensor], captioned: list[Captioned], inception_file: Path
) -> None:
    with_captions = quality(methods, "base", captioned=captioned, inception=inception_file)
    assert {entry.distance_to for entry in with_captions.values()} == {TRUE_PICTURES}
    features = inception_features(true_pictures(captioned), inception_file)
    for name, entry in with_captions.items():
        assert entry.fid is not None
        assert entry.fid.value == pytest.approx(frechet_distance(inception_features(methods[name], inception_file), features))
    assert with_captions["base"].fid.high < with_captions["noisy"].fid.low  # type: ignore[union-attr]
    alone = quality(methods, "base", inception=inception_file)
    assert {entry.distance_to for entry in alone.values()} == {"base"}
    assert alone["base"].fid is None and alone["noisy"].fid is not None
    assert alone["noisy"].semantics is alone["noisy"].clip_score is quality(methods, "base")["noisy"].fid is None


def test_meaning_is_read_from_the_pictures(captioned: list[Captioned]) -> None:
    first, *rest = captioned
    wrong = Combination(**vars(first.combination) | {"size": "large" if first.combination.size == "small" else "small"})
    methods = {"right": true_pictures(captioned), "one wrong": true_pictures([Captioned("", wrong), *rest])}
    found = quality(methods, "right", captioned=captioned)
    right, one_wrong = found["right"].semantics, found["one wrong"].semantics
    assert right and one_wrong
    assert right.overall == Proportion(COUNT, COUNT)
    assert one_wrong.overall == one_wrong.attributes["size"] == Proportion(COUNT - 1, COUNT)
    assert one_wrong.attributes["colour"] == Proportion(COUNT, COUNT)


def test_the_users_networks_are_used_where_named(
    methods: dict[str, Tensor], captioned: list[Captioned], clip_folder: Path, inception_file: Path
) -> None:
    found = quality(methods, "base", captioned=captioned, clip=clip_folder, inception=inception_file)
    captions = [example.caption for example in captioned]
    for name, entry in found.items():
        assert entry.clip_score and entry.fid
        assert entry.clip_score.value == pytest.approx(clip_scores(methods[name], captions, clip_folder).mean().item())
    assert found["base"].fid.value < found["noisy"].fid.value  # type: ignore[union-attr]
    prompted = quality(methods, "base", prompts=captions, clip=clip_folder, inception=inception_file)
    assert prompted["noisy"].clip_score == found["noisy"].clip_score
    assert prompted["base"].fid is None
    with pytest.raises(InputError, match="give prompts or captioned"):
        quality(methods, "base", clip=clip_folder)


def test_all_of_it_is_json(methods: dict[str, Tensor], captioned: list[Captioned]) -> None:
    found = quality(methods, "base", captioned=captioned)
    data = json.loads(json.dumps({name: entry.to_json() for name, entry in found.items()}, allow_nan=False))
    assert data["base"]["likeness"] is None
    assert data["nearly"]["likeness"]["psnr"] is None
    assert data["noisy"]["likeness"]["ssim"].keys() == {"value", "low", "high"}
    assert data["noisy"]["distance_to"] == TRUE_PICTURES
    assert len(data["noisy"]["semantics"]["overall"]["interval"]) == 2


def test_sets_that_are_not_alike_are_refused(methods: dict[str, Tensor], captioned: list[Captioned]) -> None:
    base = methods["base"]
    for changes, options, message in (
        ({}, {"baseline": "none"}, "the baseline must be one of base, nearly, noisy; got 'none'"),
        ({"nearly": base[:5]}, {}, r"base has pictures \[24, 3, 64, 64\], nearly \[5, 3, 64, 64\]"),
        ({"nearly": 2 * base + 1}, {}, r"the pictures of nearly must hold values in 0…1"),
        ({}, {"captioned": captioned[:5]}, "captioned holds 5 captions for 24 pictures"),
        (dict.fromkeys(methods, base[:1]), {}, "at least 2 pictures a method"),
    ):
        with pytest.raises(InputError, match=message):
            quality(methods | changes, **{"baseline": "base"} | options)  # type: ignore[arg-type]

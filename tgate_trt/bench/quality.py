"""The quality of each method's pictures: their likeness to the baseline's, their meaning, and CLIP score and FID if wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tgate_trt.analysis.features import clip_scores, inception_features
from tgate_trt.analysis.metrics import (
    Estimate,
    check_pictures,
    frechet_estimate,
    mean_estimate,
    perceptual_distance,
    psnr,
    ssim,
)
from tgate_trt.demo.dataset import Captioned, draw_jittered
from tgate_trt.demo.evaluate import Score, score
from tgate_trt.errors import InputError

TRUE_PICTURES = "true pictures"
"""Name of the pictures that the data set draws for the captions, to which FID is measured."""

_FID_RESAMPLES = 200
"""Resamples of FID's interval; with thousands of features, each takes some ten milliseconds for a hundred pictures."""


@dataclass(frozen=True)
class Likeness:
    """The likeness of a method's pictures to the baseline's, each pair drawn from the same prompt and noise."""

    identical: int
    """Number of pictures that equal the baseline's bit for bit."""
    psnr: Estimate | None
    """Peak signal-to-noise ratio in dB over the pictures that are not identical; None if there are fewer than two."""
    ssim: Estimate
    """See `tgate_trt.analysis.metrics.ssim`; 1 for equal pictures."""
    perceptual_distance: Estimate
    """See `tgate_trt.analysis.metrics.perceptual_distance`; 0 for equal pictures."""


@dataclass(frozen=True)
class Quality:
    """The measures of one method's pictures; None for a measure that does not apply or was not wanted."""

    pictures: int
    likeness: Likeness | None
    """None for the baseline itself."""
    distance_to: str
    """The pictures to which `fid` is the distance: `TRUE_PICTURES`, or the name of the baseline."""
    fid: Estimate | None
    """Fréchet distance of the features of the user's Inception network; None for the baseline to itself. With fewer pictures than
    features it is far above the FID of thousands of pictures."""
    semantics: Score | None
    """The pictures of the demo model that match their captions."""
    clip_score: Estimate | None
    """100 times the cosine between picture and prompt in the user's CLIP."""

    def to_json(self) -> dict[str, Any]:
        """Plain data: every estimate with its interval, every share with its counts."""
        return asdict(self) | {"semantics": self.semantics and self.semantics.to_json()}


def quality(
    pictures: Mapping[str, Tensor],
    baseline: str,
    *,
    captioned: Sequence[Captioned] | None = None,
    prompts: Sequence[str] | None = None,
    clip: Path | None = None,
    inception: Path | None = None,
) -> dict[str, Quality]:
    """Measure the pictures of several methods.

    FID between two methods that share prompts and noise would be too small: a method that only repeats the baseline would get 0. So
    FID is measured to the `true_pictures` of the captions, for the baseline too; and to the baseline only without captions.

    Args:
        pictures: by method, `[N, 3, height, width]` in 0…1, picture i from prompt i and the same noise, N at least 2.
        baseline: the method that the others are compared with.
        captioned: what each picture of the demo model must show.
        prompts: prompts for CLIP scores; the captions if None.
        clip: folder of a CLIP; see `tgate_trt.analysis.features.clip_scores`.
        inception: TorchScript file; see `tgate_trt.analysis.features.inception_features`.

    Returns:
        The measures by method, in the order of `pictures`.

    Raises:
        InputError: if the methods have different numbers or sizes of pictures, the baseline is missing, or a model cannot be used.
    """
    _check(pictures, baseline, captioned)
    distance_to = baseline if captioned is None else TRUE_PICTURES
    fids, clips, semantics = {}, {}, {}
    if inception is not None:
        fids = _fids(pictures, distance_to, pictures[baseline] if captioned is None else true_pictures(captioned), inception)
    if clip is not None:
        words = _words(prompts, captioned)
        clips = {name: mean_estimate(clip_scores(drawn, words, clip)) for name, drawn in pictures.items()}
    if captioned is not None:
        semantics = {name: score(_images(drawn), captioned) for name, drawn in pictures.items()}
    return {
        name: Quality(
            pictures=len(drawn),
            likeness=None if name == baseline else _likeness(drawn, pictures[baseline]),
            distance_to=distance_to,
            fid=fids.get(name),
            semantics=semantics.get(name),
            clip_score=clips.get(name),
        )
        for name, drawn in pictures.items()
    }


def true_pictures(captioned: Sequence[Captioned], seed: int = 0) -> Tensor:
    """The pictures that the demo's data set draws for captions, `[N, 3, 64, 64]` in 0…1, each shape with its own jitter.

    Args:
        captioned: captions and their combinations.
        seed: seed of the jitter.
    """
    drawn = draw_jittered([example.combination for example in captioned], np.random.default_rng(seed))
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255


def _check(pictures: Mapping[str, Tensor], baseline: str, captioned: Sequence[Captioned] | None) -> None:
    if baseline not in pictures:
        raise InputError(f"the baseline must be one of {', '.join(pictures) or 'the methods'}; got {baseline!r}")
    shape = list(pictures[baseline].shape)
    for name, drawn in pictures.items():
        check_pictures(drawn, f"the pictures of {name}")
        if list(drawn.shape) != shape:
            raise InputError(f"every method draws the same prompts: {baseline} has pictures {shape}, {name} {list(drawn.shape)}")
    if shape[0] < 2:
        raise InputError("quality takes at least 2 pictures a method; got 1")
    if captioned is not None and len(captioned) != shape[0]:
        raise InputError(f"captioned holds {len(captioned)} captions for {shape[0]} pictures; expected one for each picture")


def _words(prompts: Sequence[str] | None, captioned: Sequence[Captioned] | None) -> list[str]:
    if prompts is None and captioned is None:
        raise InputError("CLIP scores take the prompts of the pictures, and there are none; give prompts or captioned")
    return list(prompts) if prompts is not None else [example.caption for example in captioned or ()]


def _fids(pictures: Mapping[str, Tensor], distance_to: str, others: Tensor, inception: Path) -> dict[str, Estimate]:
    """FID of every method to other pictures, except of a method to itself."""
    reference = inception_features(others, inception)
    return {
        name: frechet_estimate(inception_features(drawn, inception), reference, resamples=_FID_RESAMPLES)
        for name, drawn in pictures.items()
        if name != distance_to
    }


def _likeness(pictures: Tensor, others: Tensor) -> Likeness:
    noise = psnr(pictures, others)
    different = noise[noise.isfinite()]
    return Likeness(
        identical=len(noise) - len(different),
        psnr=mean_estimate(different) if len(different) > 1 else None,
        ssim=mean_estimate(ssim(pictures, others)),
        perceptual_distance=mean_estimate(perceptual_distance(pictures, others)),
    )


def _images(pictures: Tensor) -> list[npt.NDArray[np.uint8]]:
    """Each picture as `[height, width, 3]` in 0…255."""
    return list((pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())

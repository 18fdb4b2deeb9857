"""How good the pictures of each method are: beside the baseline's, beside a reference, and as what their captions say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tgate_trt.analysis.features import bank_features, clip_scores, inception_features
from tgate_trt.analysis.metrics import (
    RESAMPLES,
    Estimate,
    check_pictures,
    frechet_estimate,
    mean_estimate,
    perceptual_distance,
    psnr,
    ssim,
)
from tgate_trt.demo import GUIDANCE_SCALE, NUM_INFERENCE_STEPS
from tgate_trt.demo.dataset import Captioned, draw_jittered
from tgate_trt.demo.evaluate import Score, pictures_of, score
from tgate_trt.errors import InputError

REFERENCE, TRUE_PICTURES = "reference", "true pictures"
"""What the distances of sets are to, where it is not the baseline."""

_FID_RESAMPLES = 200
"""Of the interval of FID, whose features are thousands: each resample takes some ten milliseconds for a hundred pictures."""


@dataclass(frozen=True)
class Likeness:
    """How like the baseline's pictures a method's are, each drawn from the same prompt and noise."""

    identical: int
    """Pictures that equal the baseline's in every bit."""
    psnr: Estimate | None
    """Peak signal-to-noise ratio in dB, of the pictures that are not identical; None where fewer than two are not."""
    ssim: Estimate
    """See `tgate_trt.analysis.metrics.ssim`; 1 is equal."""
    perceptual_distance: Estimate
    """See `tgate_trt.analysis.metrics.perceptual_distance`; 0 is equal."""


@dataclass(frozen=True)
class Quality:
    """What is known of one method's pictures; None stands where a measure does not apply or was not asked for."""

    pictures: int
    likeness: Likeness | None
    """None for the baseline itself."""
    distance_to: str
    """Which set `frechet_distance` and `fid` are to: `REFERENCE`, `TRUE_PICTURES`, or the baseline by its name."""
    frechet_distance: Estimate | None
    """On the fixed features of `tgate_trt.analysis.features.bank_features`: not FID. None for the baseline to itself."""
    fid: Estimate | None
    """On the features of the user's Inception network; for fewer pictures than features far above what thousands would give."""
    semantics: Score | None
    """Pictures of the demo model that show what their captions say."""
    clip_score: Estimate | None
    """By the user's CLIP; 100 times the cosine."""

    def to_json(self) -> dict[str, Any]:
        """Plain data: every estimate with its interval, every share with its counts."""
        return asdict(self) | {"semantics": self.semantics and self.semantics.to_json()}


def quality(
    pictures: Mapping[str, Tensor],
    baseline: str,
    *,
    captioned: Sequence[Captioned] | None = None,
    prompts: Sequence[str] | None = None,
    reference: Tensor | None = None,
    clip: Path | None = None,
    inception: Path | None = None,
) -> dict[str, Quality]:
    """Measure the pictures of several methods.

    A distance between sets that share prompts and noise is too small to say much: a method that only repeats the baseline gets 0.
    So the distance is to pictures of the same prompts that share no noise with any method, and the baseline gets one too: to
    `reference`; else, with `captioned`, to the `true_pictures` of the captions; and to the baseline only where there is neither.

    Args:
        pictures: for each method `[N, 3, height, width]` in 0…1, picture i of prompt i and of the same noise, N at least 2.
        baseline: the method that the others are compared with.
        captioned: of the demo model: what each picture must show.
        prompts: for CLIP scores; the captions if None.
        reference: of the same shape, picture i of prompt i: from other seeds, or real ones.
        clip: folder of a CLIP; see `tgate_trt.analysis.features.clip_scores`.
        inception: TorchScript file; see `tgate_trt.analysis.features.inception_features`.

    Returns:
        For each method, in the order of `pictures`.

    Raises:
        InputError: if the sets are not alike, the baseline is not among them, or a model cannot be used.
    """
    _check(pictures, baseline)
    distance_to, others = _target(pictures, baseline, captioned, reference)
    distances = _distances(pictures, distance_to, others, bank_features)
    fids, clips, semantics = {}, {}, {}
    if inception is not None:
        fids = _distances(pictures, distance_to, others, lambda drawn: inception_features(drawn, inception), _FID_RESAMPLES)
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
            frechet_distance=distances.get(name),
            fid=fids.get(name),
            semantics=semantics.get(name),
            clip_score=clips.get(name),
        )
        for name, drawn in pictures.items()
    }


def true_pictures(captioned: Sequence[Captioned], seed: int = 0) -> Tensor:
    """What the demo's data set draws for captions: `[N, 3, 64, 64]` in 0…1, each shape with its own jitter.

    Args:
        captioned: captions and what they mean.
        seed: of the jitter.
    """
    drawn = draw_jittered([example.combination for example in captioned], np.random.default_rng(seed))
    return _tensor(drawn)


def draw(
    pipeline: Any,
    wanted: Sequence[Captioned] | Sequence[str],
    *,
    steps: int = NUM_INFERENCE_STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
    seed: int = 0,
    batch_size: int = 16,
    **settings: Any,
) -> Tensor:
    """Pictures by a diffusers pipeline, as its users see them: of 8 bits a channel.

    Args:
        pipeline: from prompts to pictures, called as it stands.
        wanted: captions or prompts, one a picture.
        steps: of the scheduler.
        guidance_scale: of classifier-free guidance.
        seed: picture i starts from the noise of `seed + i`, whatever the batch size.
        batch_size: prompts in one call.
        settings: more keywords of the pipeline's call, such as `height`.

    Returns:
        `[N, 3, height, width]` float32 in 0…1.
    """
    prompts = [entry if isinstance(entry, str) else entry.caption for entry in wanted]
    drawn = pictures_of(
        pipeline, prompts, num_inference_steps=steps, guidance_scale=guidance_scale, seed=seed, batch_size=batch_size, **settings
    )
    return _tensor(np.stack([np.asarray(picture.convert("RGB")) for picture in drawn]))


def _check(pictures: Mapping[str, Tensor], baseline: str) -> None:
    if baseline not in pictures:
        raise InputError(f"the baseline must be one of {', '.join(pictures) or 'the methods'}; got {baseline!r}")
    shape = list(pictures[baseline].shape)
    for name, drawn in pictures.items():
        check_pictures(drawn, f"the pictures of {name}")
        if list(drawn.shape) != shape:
            raise InputError(f"every method draws the same prompts: {baseline} has pictures {shape}, {name} {list(drawn.shape)}")
    if shape[0] < 2:
        raise InputError("quality takes at least 2 pictures a method; got 1")


def _target(
    pictures: Mapping[str, Tensor], baseline: str, captioned: Sequence[Captioned] | None, reference: Tensor | None
) -> tuple[str, Tensor]:
    """The set that distances are to, and its name."""
    drawn = pictures[baseline]
    if captioned is not None and len(captioned) != len(drawn):
        raise InputError(f"captioned holds {len(captioned)} captions for {len(drawn)} pictures; expected one a picture")
    if reference is None and captioned is None:
        return baseline, drawn
    name, others = (REFERENCE, reference) if reference is not None else (TRUE_PICTURES, true_pictures(captioned or ()))
    if others.shape != drawn.shape:
        raise InputError(f"{name} are compared with as many pictures of their size; got {list(others.shape)} and {list(drawn.shape)}")
    return name, others


def _words(prompts: Sequence[str] | None, captioned: Sequence[Captioned] | None) -> list[str]:
    if prompts is None and captioned is None:
        raise InputError("CLIP scores take the pictures' prompts; give prompts or captioned")
    return list(prompts) if prompts is not None else [example.caption for example in captioned or ()]


def _distances(
    pictures: Mapping[str, Tensor], distance_to: str, others: Tensor, describe: Callable[[Tensor], Tensor], resamples: int = RESAMPLES
) -> dict[str, Estimate]:
    """Fréchet distances to a set, of every method that is not the set."""
    features = describe(others)
    return {
        name: frechet_estimate(describe(drawn), features, resamples=resamples) for name, drawn in pictures.items() if name != distance_to
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


def _tensor(drawn: npt.NDArray[np.uint8]) -> Tensor:
    """`[N, height, width, 3]` of 0…255 as `[N, 3, height, width]` in 0…1."""
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255


def _images(pictures: Tensor) -> list[npt.NDArray[np.uint8]]:
    """The inverse of `_tensor`, a picture at a time."""
    return list((pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())

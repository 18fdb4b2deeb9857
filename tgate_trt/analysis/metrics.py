"""Measures that compare pictures, with their intervals; none of them needs weights.

Pictures are float tensors `[N, 3, height, width]` in 0…1 (sRGB, as in a file), with at least `LEAST_SIDE` pixels on each side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tgate_trt.errors import InputError

LEAST_SIDE = 32
"""Pixels; in smaller pictures the coarsest bands of the measures are a single value."""

RESAMPLES = 1000
"""Resamples of each bootstrap interval."""

_VALUES_AT_ONCE = 2**22
"""Pixels times channels that are processed together: pictures of 1024² one by one, small ones in batches."""

_SSIM_WINDOW, _SSIM_SIGMA, _SSIM_K1, _SSIM_K2 = 11, 1.5, 0.01, 0.03
_LOW_PASS = (0.05, 0.25, 0.4, 0.25, 0.05)
_BANDS: tuple[tuple[float, dict[tuple[int, int], float]], ...] = (
    (0.0248, {(-1, 0): 0.1015, (0, -2): 0.0072, (0, -1): 0.1460, (0, 1): 0.1493, (1, 0): 0.1011}),
    (0.0185, {(-1, 0): 0.0837, (0, -1): 0.1846, (0, 1): 0.1986, (1, 0): 0.0757}),
    (0.0179, {(-1, 0): 0.0467, (0, -1): 0.2243, (0, 1): 0.2138, (1, 0): 0.0477}),
    (0.0191, {(0, -1): 0.2616, (0, 1): 0.2503}),
    (0.0220, {(0, -1): 0.2552, (0, 1): 0.2598}),
    (0.2782, {(0, -1): 0.0717, (0, 1): 0.2215}),
)
"""For each band, from fine to coarse, a constant and the weight of each neighbour (rows down, columns right). The authors
learned them from photographs (`NLP_dist.m`, whose kernels `conv2` flips)."""


def check_pictures(pictures: Tensor, name: str = "pictures") -> None:
    """Check that a tensor holds pictures.

    Raises:
        InputError: if it is not float `[N, 3, height, width]` in 0…1 with N at least 1 and sides of at least `LEAST_SIDE`.
    """
    if pictures.ndim != 4 or pictures.shape[1] != 3 or not len(pictures) or not pictures.is_floating_point():
        raise InputError(f"{name} must be a float tensor [N, 3, height, width]; got {pictures.dtype} {list(pictures.shape)}")
    if min(pictures.shape[2:]) < LEAST_SIDE:
        raise InputError(f"{name} must be at least {LEAST_SIDE} pixels high and wide; got {list(pictures.shape[2:])}")
    low, high = (float(value) for value in pictures.aminmax())
    if not (low >= 0 and high <= 1):
        raise InputError(f"{name} must hold values in 0…1; got {low:g}…{high:g}")


def psnr(pictures: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, over all pixels and channels.

    Args:
        pictures: `[N, 3, height, width]` in 0…1.
        others: the same number of pictures of the same size.

    Returns:
        `[N]` float64; infinite for equal pictures.

    Raises:
        InputError: if an argument holds no pictures, or their numbers or sizes differ.
    """
    return _each(lambda a, b: -10 * (a - b).square().mean((1, 2, 3)).log10(), pictures, others)


def ssim(pictures: Tensor, others: Tensor) -> Tensor:
    """Structural similarity (Wang et al., 2004, doi:10.1109/TIP.2003.819861) of each RGB channel, and their mean.

    As in the paper: a Gaussian window of 11×11 pixels and sigma 1.5, K₁ 0.01, K₂ 0.03; only windows inside the picture; no
    downscaling. The paper measures luminance alone, which misses a change of colour at equal luminance; this measures each channel.

    Args:
        pictures: `[N, 3, height, width]` in 0…1.
        others: the same number of pictures of the same size.

    Returns:
        `[N]` float64, at most 1; 1 for equal pictures.

    Raises:
        InputError: see `psnr`.
    """
    return _each(_ssim, pictures, others)


def perceptual_distance(pictures: Tensor, others: Tensor) -> Tensor:
    """Normalized Laplacian pyramid distance (Laparra, Ballé, Berardino and Simoncelli, Electronic Imaging 2016, HVEI-103).

    A model of early vision, similar to LPIPS but with fixed features. It takes six bands of a Laplacian pyramid and divides each
    value by the activity around it, so a change counts more in a calm neighbourhood. The distance is the mean over the bands of the
    root mean square difference. As a distance between transformed pictures it also orders strong changes, for which a deviation of
    similarities, such as GMSD, decreases again. The authors' filters and constants, made for gray pictures, are applied to each RGB
    channel, and the squares of the channels are averaged: gray pictures have the authors' value, and changes of colour count.

    Args:
        pictures: `[N, 3, height, width]` in 0…1.
        others: the same number of pictures of the same size.

    Returns:
        `[N]` float64, without a unit; 0 for equal pictures. The values are not those of LPIPS.

    Raises:
        InputError: see `psnr`.
    """
    return _each(_normalized_laplacian_distance, pictures, others)


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians with the means and covariances of two sets of features (Dowson and Landau, 1982).

    With features of Inception it is FID: ``‖μ − ν‖² + tr Σ + tr Ω − 2 tr (ΣΩ)^½``. The last trace is the sum of the singular
    values of ``A Bᵀ`` with ``Σ = AᵀA``, ``Ω = BᵀB``, which are the roots of the eigenvalues of the symmetric ``A Ω Aᵀ``. This needs no
    root of a matrix and squares no small values, so it is accurate for features that hardly vary or outnumber the pictures.

    Two samples of the same kind of pictures have a distance above 0 too, which grows with fewer pictures and with more features. So
    compare values of equal N, to the same reference.

    Args:
        features: `[N, d]`, N at least 2.
        reference: `[M, d]`, M at least 2.

    Raises:
        InputError: if the shapes differ from these.
    """
    shapes = list(features.shape), list(reference.shape)
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1] or min(map(len, (features, reference))) < 2:
        raise InputError(f"a Fréchet distance takes two sets of at least 2 rows of as many features; got {shapes[0]} and {shapes[1]}")
    return float(_frechet_distances(features.double(), reference.double()))


@dataclass(frozen=True)
class Estimate:
    """A measure of a sample of pictures, with its 95 % interval.

    Raises:
        ValueError: if the value is outside of its interval, or is not finite.
    """

    value: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not (self.low <= self.value <= self.high and math.isfinite(self.high - self.low)):
            raise ValueError(f"an estimate lies in its interval and is finite; got {self.value} in {self.low}…{self.high}")

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g}…{self.high:.3g})"

    def to_json(self) -> dict[str, float]:
        """The value and the ends of its interval."""
        return asdict(self)


def mean_estimate(values: Tensor, seed: int = 0) -> Estimate:
    """The mean over pictures, with the percentile interval of the bootstrap (Efron, 1979).

    Args:
        values: `[N]`, N at least 2, finite.
        seed: seed of the resampling.

    Raises:
        InputError: if N is less than 2.
    """
    if len(values) < 2:
        raise InputError(f"an interval takes at least 2 pictures; got {len(values)}")
    values = values.double()
    return _estimate(float(values.mean()), values[_resampled(len(values), RESAMPLES, seed)].mean(1))


def frechet_estimate(features: Tensor, reference: Tensor, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The Fréchet distance of two sets of pictures of the same prompts, with a bootstrap interval over the prompts.

    A resample takes the same prompts from both sets; otherwise the variety of prompts would hide the difference of the sets. A
    resample has fewer distinct pictures, which alone makes its distance larger, so the interval is shifted by the difference between
    its mean and the value. It shows the spread over other prompts, and not the bias that all samples of this size have.

    Args:
        features: `[N, d]`, N at least 2.
        reference: `[N, d]`, row i from the same prompt.
        seed: seed of the resampling.
        resamples: number of resamples.

    Raises:
        InputError: if the shapes differ from these.
    """
    if features.shape != reference.shape:
        raise InputError(f"the interval of a Fréchet distance takes pairs; got {list(features.shape)} and {list(reference.shape)}")
    value = frechet_distance(features, reference)
    rows = torch.split(_resampled(len(features), resamples, seed), max(1, _VALUES_AT_ONCE // features.numel()))
    distances = torch.cat([_frechet_distances(features.double()[some], reference.double()[some]) for some in rows])
    return _estimate(value, (distances - distances.mean() + value).clamp(min=0))


def _resampled(count: int, resamples: int, seed: int) -> Tensor:
    """Indices `[resamples, count]`, drawn with replacement."""
    return torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(seed))


def _estimate(value: float, resampled: Tensor) -> Estimate:
    low, high = (float(end) for end in resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)))
    return Estimate(value, min(low, value), max(high, value))  # against rounding, if all resamples are equal


def _frechet_distances(features: Tensor, reference: Tensor) -> Tensor:
    """`[…]` distances of samples `[…, N, d]`."""
    (mean, root), (other_mean, other_root) = _mean_and_root(features), _mean_and_root(reference)
    spreads = root.square().sum((-2, -1)) + other_root.square().sum((-2, -1))
    common = torch.linalg.svdvals(root @ other_root.mT).sum(-1)
    distances: Tensor = (mean - other_mean).square().sum(-1) + spreads - 2 * common
    return distances.clamp(min=0)  # rounding can make the distance of equal sets negative


def _mean_and_root(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean `[…, d]`, and a factor `[…, min(N, d), d]` whose square is the covariance."""
    mean = features.mean(-2)
    centred = (features - mean.unsqueeze(-2)) / math.sqrt(features.shape[-2] - 1)
    return mean, torch.linalg.qr(centred, mode="r").R


def _each(measure: Callable[[Tensor, Tensor], Tensor], pictures: Tensor, others: Tensor) -> Tensor:
    """Measure pairs of pictures in float64, a few at a time."""
    check_pictures(pictures)
    check_pictures(others, "the other pictures")
    if pictures.shape != others.shape:
        raise InputError(f"pictures are compared with as many of their size; got {list(pictures.shape)} and {list(others.shape)}")
    rows = max(1, _VALUES_AT_ONCE // pictures[0].numel())
    pairs = zip(torch.split(pictures, rows), torch.split(others, rows), strict=True)
    return torch.cat([measure(some.double(), their.double()) for some, their in pairs])


def _ssim(pictures: Tensor, others: Tensor) -> Tensor:
    bell = [math.exp(-((step - _SSIM_WINDOW // 2) ** 2) / (2 * _SSIM_SIGMA**2)) for step in range(_SSIM_WINDOW)]
    window = [weight / sum(bell) for weight in bell]
    products = torch.stack([pictures, others, pictures.square(), others.square(), pictures * others])
    mean, other_mean, square, other_square, product = _separable(products, window)
    c1, c2 = _SSIM_K1**2, _SSIM_K2**2
    luminance = (2 * mean * other_mean + c1) / (mean.square() + other_mean.square() + c1)
    spreads = (square - mean.square()) + (other_square - other_mean.square())
    structure = (2 * (product - mean * other_mean) + c2) / (spreads + c2)
    similarity: Tensor = luminance * structure
    return similarity.mean((1, 2, 3))


def _separable(values: Tensor, kernel: Sequence[float]) -> Tensor:
    """`[…, height, width]` filtered by a symmetric kernel along both axes, without padding.

    It is a sum of shifted pictures, because `conv2d` took ten times as long for float64 planes of 1024² on a CPU.
    """
    for axis in (-2, -1):
        length = values.shape[axis] - len(kernel) + 1
        filtered = kernel[0] * values.narrow(axis, 0, length)
        for shift, weight in enumerate(kernel[1:], start=1):
            filtered.add_(values.narrow(axis, shift, length), alpha=weight)
        values = filtered
    return values


def _normalized_laplacian_distance(pictures: Tensor, others: Tensor) -> Tensor:
    bands = zip(_normalized_pyramid(pictures), _normalized_pyramid(others), strict=True)
    return torch.stack([(band - other).square().mean((1, 2, 3)).sqrt() for band, other in bands]).mean(0)


def _normalized_pyramid(pictures: Tensor) -> Iterator[Tensor]:
    """The bands of a Laplacian pyramid (Burt and Adelson, 1983), the last of them low-pass, each divided by its local activity."""
    for number, (constant, neighbours) in enumerate(_BANDS, start=1):
        coarser = None if number == len(_BANDS) else _halved(pictures)
        band = pictures if coarser is None else pictures - _doubled(coarser, pictures.shape[-2:])
        yield band / (constant + _activity(band.abs(), neighbours))
        if coarser is not None:
            pictures = coarser


def _halved(pictures: Tensor) -> Tensor:
    """Every second pixel of the low-passed picture, which is mirrored at its edges, the edge pixel included."""
    mirrored = pictures
    for axis in (-2, -1):
        ends = pictures.shape[axis] - 1
        rows = torch.tensor([min(1, ends), 0, *range(ends + 1), ends, max(0, ends - 1)])
        mirrored = mirrored.index_select(axis, rows)
    return _separable(mirrored, _LOW_PASS)[..., ::2, ::2]


def _doubled(pictures: Tensor, size: torch.Size) -> Tensor:
    """The picture interpolated to twice as many pixels on each side, or one fewer."""
    padded = functional.pad(pictures, (1, 1, 1, 1), mode="replicate")
    spaced = padded.new_zeros(*padded.shape[:-2], 2 * padded.shape[-2], 2 * padded.shape[-1])
    spaced[..., ::2, ::2] = 4 * padded
    return _separable(spaced, _LOW_PASS)[..., : size[0], : size[1]]


def _activity(magnitudes: Tensor, neighbours: dict[tuple[int, int], float]) -> Tensor:
    """The weighted sum of each value's neighbours, with zeros beyond the edges."""
    reach = 2
    height, width = magnitudes.shape[-2:]
    padded = functional.pad(magnitudes, (reach,) * 4)
    total = torch.zeros_like(magnitudes)
    for (down, right), weight in neighbours.items():
        total += weight * padded[..., reach + down : reach + down + height, reach + right : reach + right + width]
    return total

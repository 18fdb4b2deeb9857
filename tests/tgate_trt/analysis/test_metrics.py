"""Measures: equal to their papers' definitions, computed in another way, and with the properties of a measure of pictures."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tgate_trt.analysis.metrics import (
    Estimate,
    frechet_distance,
    frechet_estimate,
    mean_estimate,
    perceptual_distance,
    psnr,
    ssim,
)
from tgate_trt.demo.dataset import draw_jittered, examples
from tgate_trt.errors import InputError

Floats = npt.NDArray[np.float64]


def shapes(count: int, side: int) -> Tensor:
    """Pictures of the demo's data set, scaled to a size."""
    drawn = draw_jittered([example.combination for example in examples(count, held_out=True)], np.random.default_rng(0))
    pictures = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255
    return functional.interpolate(pictures, size=(side, side), mode="bilinear")


def random_pictures(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def noisy(pictures: Tensor, strength: float) -> Tensor:
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1))
    return (pictures + 0.02 * strength * noise).clamp(0, 1)


def blurred(pictures: Tensor, strength: float) -> Tensor:
    side = 2 * int(strength) * pictures.shape[-1] // 64 + 1
    padded = functional.pad(pictures, (side // 2,) * 4, mode="replicate")
    return functional.avg_pool2d(padded, side, stride=1).clamp(0, 1)


def shifted(pictures: Tensor, strength: float) -> Tensor:
    return pictures.roll(int(strength) * pictures.shape[-1] // 64, -1)


def rearranged(pictures: Tensor, strength: float) -> Tensor:
    """One to four squares about the middle turned over: other structure, the same pixels."""
    changed, side = pictures.clone(), pictures.shape[-1] // 4
    for number in range(int(strength).bit_length()):
        top, left = (side * (1 + index) for index in divmod(number, 2))
        square = pictures[..., top : top + side, left : left + side]
        changed[..., top : top + side, left : left + side] = square.flip((-1, -2))
    return changed


def recoloured(pictures: Tensor, strength: float) -> Tensor:
    """Red and green drawn to each other's places."""
    share = strength / 8
    return (1 - share) * pictures + share * pictures[:, [1, 0, 2]]


CHANGES = (noisy, blurred, shifted, rearranged, recoloured)


@pytest.mark.parametrize("side", [64, 128])
@pytest.mark.parametrize("change", CHANGES)
def test_the_perceptual_distance_grows_with_the_strength_of_a_change(change: Callable[[Tensor, float], Tensor], side: int) -> None:
    pictures = shapes(10, side)
    distances = [perceptual_distance(pictures, change(pictures, strength)).mean() for strength in (1, 2, 4, 8)]
    assert distances[0] > 0.001
    assert all(later > earlier * 1.02 for earlier, later in pairwise(distances)), distances


@pytest.mark.parametrize("measure", [perceptual_distance, ssim, psnr])
def test_large_pictures_are_measured_like_small_ones(measure: Callable[[Tensor, Tensor], Tensor]) -> None:
    pictures = shapes(2, 1024)
    slight, strong = measure(pictures, noisy(pictures, 1)), measure(pictures, noisy(pictures, 4))
    assert slight.shape == strong.shape == (2,)
    assert ((strong > slight) if measure is perceptual_distance else (strong < slight)).all()


def test_equal_pictures_measure_as_equal() -> None:
    pictures = random_pictures(3, 3, 64, 48)
    assert perceptual_distance(pictures, pictures).tolist() == [0, 0, 0]
    assert ssim(pictures, pictures).tolist() == pytest.approx([1, 1, 1], abs=1e-12)
    assert psnr(pictures, pictures).tolist() == [torch.inf] * 3


@pytest.mark.parametrize("measure", [perceptual_distance, ssim, psnr])
def test_a_measure_has_no_direction_and_looks_at_one_pair_at_a_time(measure: Callable[[Tensor, Tensor], Tensor]) -> None:
    pictures, others = random_pictures(400, 3, 64, 64), random_pictures(400, 3, 64, 64, seed=1)  # more than are worked on together
    together = measure(pictures, others)
    assert torch.allclose(together, measure(others, pictures), rtol=1e-12)
    assert torch.allclose(together[[0, 399]], measure(pictures[[0, 399]], others[[0, 399]]), rtol=1e-12)


@pytest.mark.parametrize("measure", [perceptual_distance, lambda one, other: 1 - ssim(one, other)])
def test_colours_of_equal_luminance_are_told_apart(measure: Callable[[Tensor, Tensor], Tensor]) -> None:
    pictures = torch.full((1, 3, 64, 64), 0.5)
    pictures[:, :, 16:48, 16:48] = torch.tensor([0.8, 0.2, 0.5])[:, None, None]
    assert measure(pictures, pictures[:, [1, 0, 2]]) > 0.1


def test_psnr_is_that_of_the_mean_square() -> None:
    pictures = torch.full((2, 3, 32, 32), 0.5)
    others = torch.stack([pictures[0] + 0.1, pictures[1]])
    others[1, 0, 0, 0] += 0.5
    assert psnr(pictures, others).tolist() == pytest.approx([20, -10 * np.log10(0.25 / (3 * 32 * 32))], abs=1e-5)


def ssim_by_windows(one: Floats, other: Floats) -> float:
    """Of a plane: equations 13 to 17 of Wang et al., 2004, window by window."""
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for top in range(one.shape[0] - 10):
        for left in range(one.shape[1] - 10):
            x, y = one[top : top + 11, left : left + 11], other[top : top + 11, left : left + 11]
            mx, my = (weights * x).sum(), (weights * y).sum()
            vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
            covariance = (weights * (x - mx) * (y - my)).sum()
            values.append((2 * mx * my + 1e-4) * (2 * covariance + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    return float(np.mean(values))


def test_ssim_is_the_mean_of_the_channels_windows() -> None:
    pictures = random_pictures(1, 3, 32, 41)
    others = (pictures + 0.3 * random_pictures(1, 3, 32, 41, seed=1)).clamp(0, 1)
    planes = zip(pictures[0].double().numpy(), others[0].double().numpy(), strict=True)
    assert ssim(pictures, others).item() == pytest.approx(np.mean([ssim_by_windows(*pair) for pair in planes]), abs=1e-9)


LOW_PASS = np.outer([0.05, 0.25, 0.4, 0.25, 0.05], [0.05, 0.25, 0.4, 0.25, 0.05])
SIGMAS = (0.0248, 0.0185, 0.0179, 0.0191, 0.0220, 0.2782)
KERNELS = (  # of the authors' conv2: top, left, right, far right, bottom
    (0.1011, 0.1493, 0.1460, 0.0072, 0.1015),
    (0.0757, 0.1986, 0.1846, 0, 0.0837),
    (0.0477, 0.2138, 0.2243, 0, 0.0467),
    (0, 0.2503, 0.2616, 0, 0),
    (0, 0.2598, 0.2552, 0, 0),
    (0, 0.2215, 0.0717, 0, 0),
)


def filtered(plane: Floats, kernel: Floats) -> Floats:
    """Correlated with a 5×5 kernel, zero beyond the edges."""
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(plane, 2), (5, 5))
    return np.einsum("hwij,ij->hw", windows, kernel)


def pyramid_by_the_authors(plane: Floats) -> list[Floats]:
    """`NLP_dist.m` step by step."""
    bands = []
    for level in range(6):
        rest = plane
        if level < 5:
            low = filtered(np.pad(plane, 2, mode="symmetric"), LOW_PASS)[2:-2, 2:-2][::2, ::2]
            padded = np.pad(low, 1, mode="edge")
            spaced = np.zeros((2 * padded.shape[0], 2 * padded.shape[1]))
            spaced[::2, ::2] = 4 * padded
            odd = 2 * low.shape[0] - plane.shape[0], 2 * low.shape[1] - plane.shape[1]
            up = filtered(spaced, LOW_PASS)
            rest, plane = plane - up[2 : up.shape[0] - 2 - odd[0], 2 : up.shape[1] - 2 - odd[1]], low
        top, left, right, far, bottom = KERNELS[level]
        kernel = np.zeros((5, 5))
        kernel[1, 2], kernel[2, 1], kernel[2, 3], kernel[2, 4], kernel[3, 2] = top, left, right, far, bottom
        bands.append(rest / (SIGMAS[level] + filtered(np.abs(rest), kernel[::-1, ::-1])))
    return bands


@pytest.mark.parametrize(("height", "width"), [(64, 64), (37, 50)])
def test_of_gray_pictures_the_perceptual_distance_is_the_authors(height: int, width: int) -> None:
    one, other = random_pictures(2, 1, height, width).expand(2, 3, height, width)
    bands = zip(*(pyramid_by_the_authors(picture[0].double().numpy()) for picture in (one, other)), strict=True)
    expected = np.mean([np.sqrt(np.mean((band - their) ** 2)) for band, their in bands])
    assert perceptual_distance(one[None], other[None]).item() == pytest.approx(expected, rel=1e-9)


def sample(mean: Floats, covariance: Floats, count: int, seed: int) -> Tensor:
    """Rows whose own mean and covariance are exactly these."""
    rows = np.random.default_rng(seed).standard_normal((count, len(mean)))
    rows -= rows.mean(0)
    white = rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows, rowvar=False))).T
    return torch.from_numpy(white @ np.linalg.cholesky(covariance).T + mean)


def random_covariance(size: int, seed: int) -> Floats:
    root = np.random.default_rng(seed).standard_normal((size, size))
    return root @ root.T / size + 0.01 * np.eye(size)


def test_the_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    variances, others = np.array([1.0, 4.0, 0.25]), np.array([9.0, 1.0, 0.25])
    mean, other_mean = np.array([0.0, 1.0, 2.0]), np.array([1.0, 1.0, 0.0])
    expected = 1 + 4 + ((variances**0.5 - others**0.5) ** 2).sum()
    found = frechet_distance(sample(mean, np.diag(variances), 50, 0), sample(other_mean, np.diag(others), 80, 1))
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("size", [2, 31])
def test_the_frechet_distance_takes_covariances_that_do_not_commute(size: int) -> None:
    one, other = random_covariance(size, 0), random_covariance(size, 1)
    common = np.sqrt(np.linalg.eigvals(one @ other).real).sum()
    expected = size + np.trace(one) + np.trace(other) - 2 * common
    found = frechet_distance(sample(np.zeros(size), one, 100, 2), sample(np.ones(size), other, 70, 3))
    assert found == pytest.approx(expected, rel=1e-8)


def test_the_frechet_distance_is_sound_where_features_are_more_than_pictures_or_do_not_vary() -> None:
    features, others = random_pictures(10, 300), random_pictures(12, 300, seed=1)
    for one, other in ((features, others), (features * (torch.arange(300) < 2), others)):
        roots = []
        for rows in (one, other):
            values, vectors = np.linalg.eigh(np.cov(rows.double().numpy(), rowvar=False))
            roots.append(vectors * np.sqrt(values.clip(min=0)) @ vectors.T)
        common = np.linalg.norm(roots[0] @ roots[1], "nuc")
        shift = (one.double().mean(0) - other.double().mean(0)).square().sum().item()
        expected = shift + sum((root**2).sum() for root in roots) - 2 * common
        assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(features, features + 1) == pytest.approx(300, rel=1e-6)


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution_for_normal_values() -> None:
    values = 3 + torch.randn(200, generator=torch.Generator().manual_seed(0)).double()
    estimate = mean_estimate(values)
    margin = 1.96 * values.std().item() / 200**0.5
    assert estimate.value == pytest.approx(values.mean().item())
    assert estimate.high - estimate.value == pytest.approx(margin, rel=0.15)
    assert estimate.value - estimate.low == pytest.approx(margin, rel=0.15)
    assert mean_estimate(values) == estimate
    assert mean_estimate(values, seed=1) != estimate


def test_the_interval_of_values_without_spread_is_the_value() -> None:
    assert list(mean_estimate(torch.full((7,), 0.1)).to_json().values()) == pytest.approx([0.1] * 3, rel=1e-6)


def test_the_interval_of_a_frechet_distance_holds_it_and_narrows_with_more_pictures() -> None:
    widths = []
    for count in (40, 640):
        features = torch.randn(count, 5, generator=torch.Generator().manual_seed(0))
        estimate = frechet_estimate(features, features * 1.5 + 0.5)
        assert estimate.low < estimate.value < estimate.high
        assert estimate.value == frechet_distance(features, features * 1.5 + 0.5)
        widths.append(estimate.high - estimate.low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.3)  # the root of 16


def test_the_frechet_distances_interval_is_drawn_by_prompt() -> None:
    features = 100 * random_pictures(50, 3)
    estimate = frechet_estimate(features, features + 1)
    assert estimate.value == pytest.approx(3, abs=1e-4)
    assert estimate.high - estimate.low == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("pictures", [torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.zeros(3, 64, 64), torch.zeros(1, 1, 64, 64)])
def test_what_is_no_picture_is_refused(pictures: Tensor) -> None:
    with pytest.raises(InputError, match=r"must be a float tensor \[N, 3, height, width\]"):
        psnr(pictures, pictures)


def test_values_sizes_and_numbers_that_do_not_fit_are_refused() -> None:
    pictures = torch.zeros(2, 3, 64, 64)
    for others, message in (
        (pictures + 2, r"must hold values in 0…1; got 2…2"),
        (pictures + torch.nan, r"must hold values in 0…1"),
        (pictures[:, :, :31], r"at least 32 pixels high and wide; got \[31, 64\]"),
        (pictures[:1], r"as many of their size; got \[2, 3, 64, 64\] and \[1, 3, 64, 64\]"),
    ):
        with pytest.raises(InputError, match=message):
            ssim(pictures, others)
    with pytest.raises(InputError, match="at least 2 pictures; got 1"):
        mean_estimate(torch.zeros(1))
    for one, other in ((torch.zeros(1, 4), torch.zeros(5, 4)), (torch.zeros(5, 4), torch.zeros(5, 3))):
        with pytest.raises(InputError, match="at least 2 rows of as many features"):
            frechet_distance(one, other)
    with pytest.raises(InputError, match="takes pairs"):
        frechet_estimate(torch.zeros(5, 4), torch.zeros(6, 4))
    with pytest.raises(ValueError, match="lies in its interval"):
        Estimate(1, 2, 3)

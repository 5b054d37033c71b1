# SPDX-License-Identifier: MIT
"""Squeezers against SciPy, OpenCV and hand-written ones; the detector against its definition."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from benchmark.real import load_case
from conftest import REAL, TinyNet, blobs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torchattacks import PGD

from captum_adv2 import storage
from captum_adv2.defenses import BitDepth, FeatureSqueezing, MedianSmoothing, NonLocalMeans
from captum_adv2.defenses.squeezing import Squeezer, _from_lab, _to_lab

seeds = st.integers(0, 2**31)
sides = st.tuples(st.integers(1, 9), st.integers(1, 9))
SQUEEZERS = (
    BitDepth(1),
    BitDepth(3),
    BitDepth(8),
    BitDepth(2, straight_through=True),
    MedianSmoothing(2),
    MedianSmoothing(3),
    NonLocalMeans(),
    NonLocalMeans(5, 1, 20.0),
    NonLocalMeans(3, 5, 2.0),
)
squeezers = pytest.mark.parametrize("squeezer", SQUEEZERS, ids=repr)


def images(
    seed: int, shape: tuple[int, ...], *, levels: int = 255, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return random images of some levels: 255 for those of 8 bits, 3 for many ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(levels + 1, shape, generator=generator).to(dtype) / levels


# What all squeezers have in common


@squeezers
@given(seed=seeds, side=sides, channels=st.sampled_from([1, 3]))
@settings(max_examples=10)
def test_squeezed_images_are_images(
    squeezer: Squeezer, seed: int, side: tuple[int, int], channels: int
) -> None:
    x = images(seed, (2, channels, *side))
    before = x.clone()
    squeezed = squeezer(x)
    assert squeezed.shape == x.shape
    assert squeezed.aminmax().min >= 0
    assert squeezed.aminmax().max <= 1
    assert torch.equal(x, before)
    assert torch.equal(squeezed, squeezer(x))
    singles = torch.cat([squeezer(image) for image in x.split(1)])
    torch.testing.assert_close(squeezed, singles, atol=1e-6, rtol=0)


@squeezers
@given(values=st.lists(st.integers(0, 255), min_size=3, max_size=3), side=sides)
@settings(max_examples=10)
def test_constant_images_stay_constant(
    squeezer: Squeezer, values: list[int], side: tuple[int, int]
) -> None:
    x = (torch.tensor(values).float() / 255).view(1, 3, 1, 1).expand(1, 3, *side)
    kept = x if not isinstance(squeezer, BitDepth) else squeezer(x[..., :1, :1]).expand_as(x)
    torch.testing.assert_close(squeezer(x), kept, atol=3e-6, rtol=0)


@squeezers
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(squeezer: Squeezer, dtype: torch.dtype) -> None:
    x = images(0, (2, 3, 8, 7), levels=16, dtype=dtype)  # levels that all dtypes can hold
    squeezed = squeezer(x)
    assert squeezed.dtype == squeezer(x[:, :1]).dtype == dtype
    expected = squeezer(x.float())
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(squeezed.float(), expected, atol=max(step, 3e-6), rtol=0)


@squeezers
def test_layout_does_not_matter(squeezer: Squeezer) -> None:
    x = images(0, (2, 3, 8, 7))
    for other in (x.to(memory_format=torch.channels_last), x.mT.contiguous().mT):
        torch.testing.assert_close(squeezer(other), squeezer(x), atol=1e-6, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no second device")
@squeezers
def test_device_is_kept(squeezer: Squeezer) -> None:
    x = images(0, (2, 3, 16, 17))
    squeezed = squeezer(x.cuda())
    assert squeezed.is_cuda
    torch.testing.assert_close(squeezed.cpu(), squeezer(x), atol=1e-5, rtol=0)


@squeezers
def test_squeezers_are_values(squeezer: Squeezer) -> None:
    assert eval(repr(squeezer)) == squeezer
    assert hash(eval(repr(squeezer))) == hash(squeezer)
    with pytest.raises(AttributeError):
        squeezer.bits = 3  # type: ignore[attr-defined]


@squeezers
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([0.5], TypeError, r"expected images to be a torch\.Tensor, got list"),
        (torch.zeros(1, 3, 4, 4).byte(), TypeError, "expected images of a floating dtype"),
        (torch.zeros(3, 4, 4), ValueError, "expected images with 4 dimensions"),
        (torch.full((1, 3, 4, 4), 128.0), ValueError, r"expected images in \[0, 1\], got"),
        (torch.full((1, 3, 4, 4), torch.nan), ValueError, "expected finite images"),
    ],
)
def test_bad_images(squeezer: Squeezer, bad: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        squeezer(bad)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: BitDepth(0), ValueError, "expected bits at least 1 and at most 8, got 0"),
        (lambda: BitDepth(9), ValueError, "expected bits at least 1 and at most 8, got 9"),
        (lambda: BitDepth(2.0), TypeError, "expected bits to be an integer, got float"),
        (lambda: MedianSmoothing(1), ValueError, "expected window at least 2 and at most 3, got 1"),
        (lambda: MedianSmoothing(5), ValueError, "expected window at least 2 and at most 3, got 5"),
        (lambda: MedianSmoothing(None), TypeError, "expected window to be an integer"),
        (lambda: NonLocalMeans(10), ValueError, "expected search to be odd, got 10; a window has"),
        (lambda: NonLocalMeans(11, 2), ValueError, "expected patch to be odd, got 2"),
        (lambda: NonLocalMeans(-1), ValueError, "expected search at least 1, got -1"),
        (lambda: NonLocalMeans(strength=0), ValueError, "expected strength above 0, got 0"),
        (lambda: NonLocalMeans(strength=torch.inf), ValueError, "expected strength above 0"),
        (lambda: NonLocalMeans(strength="4"), TypeError, "expected strength to be a number"),
    ],
)
def test_bad_settings(build: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


# Bit depth


@given(seeds, st.integers(1, 8))
def test_bit_depth_equals_numpy(seed: int, bits: int) -> None:
    x = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    levels = 2**bits - 1
    np.testing.assert_array_equal(BitDepth(bits)(x), np.rint(x.numpy() * levels) / levels)


@given(seeds, st.integers(1, 8), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_bit_depth_is_idempotent_and_monotone(seed: int, bits: int, dtype: torch.dtype) -> None:
    squeezer = BitDepth(bits)
    x = torch.rand(64, generator=torch.Generator().manual_seed(seed)).sort().values.to(dtype)
    squeezed = squeezer(x.view(1, 1, 8, 8)).flatten()
    assert (squeezed.diff() >= 0).all()
    assert len(squeezed.unique()) <= 2**bits
    assert torch.equal(squeezer(squeezed.view(1, 1, 8, 8)).flatten(), squeezed)
    # Half a level at most is lost, and the last bits of the dtype.
    limit = 0.5 / (2**bits - 1) + torch.finfo(dtype).eps
    assert (squeezed.float() - x.float()).abs().max() <= limit


def test_eight_bits_keep_pictures() -> None:
    x = (torch.arange(256.0) / 255).view(1, 1, 16, 16)
    assert torch.equal(BitDepth(8)(x), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_straight_through(dtype: torch.dtype) -> None:
    x = torch.rand(2, 3, 5, 4).to(dtype).requires_grad_()
    weight = torch.rand(x.shape).to(dtype)
    straight, plain = BitDepth(3, straight_through=True)(x), BitDepth(3)(x)
    assert torch.equal(straight, plain)  # to the last bit
    (gradient,) = torch.autograd.grad((straight * weight).sum(), x)
    assert torch.equal(gradient, weight)
    (gradient,) = torch.autograd.grad((plain * weight).sum(), x)
    assert not gradient.any()


# Median


@given(seeds, sides, st.sampled_from([2, 3]), st.sampled_from([1, 3, 255]))
def test_median_equals_scipy(seed: int, side: tuple[int, int], window: int, levels: int) -> None:
    x = images(seed, (2, 3, *side), levels=levels)
    expected = scipy.ndimage.median_filter(x.numpy(), (1, 1, window, window), mode="reflect")
    np.testing.assert_array_equal(MedianSmoothing(window)(x), expected)


def test_window_of_two_reaches_up_and_left_and_takes_the_upper_median() -> None:
    x = torch.zeros(1, 1, 4, 4)
    x[..., 1, 1] = x[..., 2, 2] = 1  # two of the four values at (2, 2) only
    assert MedianSmoothing(2)(x).nonzero()[:, 2:].tolist() == [[2, 2]]


@given(seeds, st.sampled_from([2, 3]))
def test_median_is_monotone_and_commutes_with_monotone_functions(seed: int, window: int) -> None:
    squeezer = MedianSmoothing(window)
    x = images(seed, (2, 1, 6, 7), dtype=torch.float64)
    y = x + (1 - x) * images(seed + 1, (2, 1, 6, 7), dtype=torch.float64)
    assert (squeezer(y) >= squeezer(x)).all()
    assert torch.equal(squeezer(x.square()), squeezer(x).square())
    assert torch.equal(squeezer(x).mT, squeezer(x.mT))


@pytest.mark.parametrize("window", [2, 3])
def test_median_has_the_right_gradient(window: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randperm(2 * 2 * 20, generator=generator).view(2, 2, 4, 5).double() / 100 + 0.1
    assert gradcheck(MedianSmoothing(window), x.requires_grad_())


@pytest.mark.parametrize("window", [2, 3])
def test_median_of_ties_has_a_gradient(window: int) -> None:
    x = torch.full((1, 1, 4, 4), 0.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(MedianSmoothing(window)(x).sum(), x)
    assert gradient.isfinite().all()
    assert gradient.sum() == pytest.approx(16)


# Non-local means


def bytes_of(x: Tensor) -> Tensor:
    return (x * 255).round().to(torch.uint8)


def opencv(x: Tensor, search: int = 11, patch: int = 3, strength: float = 4.0) -> Tensor:
    """Return what OpenCV makes of images, read as RGB or grey, in units of 1/255."""
    out = []
    for image in bytes_of(x).permute(0, 2, 3, 1).numpy():
        if image.shape[2] == 1:
            done = cv2.fastNlMeansDenoising(image[..., 0].copy(), None, strength, patch, search)
            out.append(done[..., None])
        else:
            bgr = np.ascontiguousarray(image[..., ::-1])
            windows = (patch, search)
            done = cv2.fastNlMeansDenoisingColored(bgr, None, strength, strength, *windows)
            out.append(done[..., ::-1])
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).float()


def quantiles(difference: Tensor) -> tuple[float, float, float, float]:
    """Return mean, 99 %, 99.9 % quantile and maximum of absolute values."""
    size = difference.abs().flatten().sort().values
    at = (int(0.99 * len(size)), int(0.999 * len(size)), -1)
    return (float(size.mean()), *(float(size[i]) for i in at))  # type: ignore[return-value]


def generated(count: int, side: int) -> Tensor:
    """Return noisy pictures of slopes, stripes and discs, of 8 bits."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.rand, generator=generator)
    rows, columns = torch.meshgrid(*2 * [torch.linspace(0, 1, side)], indexing="ij")
    slope = draw(count, 3, 1, 1) * rows + draw(count, 3, 1, 1) * columns
    stripes = (6.3 * (1 + 4 * draw(count, 3, 1, 1)) * columns).sin()
    centre = draw(count, 2, 1, 1)
    disc = (rows - centre[:, :1]).square() + (columns - centre[:, 1:]).square() < 0.05
    picture = 0.35 * slope + 0.1 * stripes + 0.3 * disc * draw(count, 3, 1, 1) + 0.1
    noise = 0.01 * torch.randn(picture.shape, generator=generator)
    return bytes_of((picture + noise).clamp(0, 1)).float() / 255


SETTINGS = pytest.mark.parametrize(
    "settings",
    [(11, 3, 4.0), (11, 3, 2.0), (13, 3, 4.0), (7, 5, 10.0), (5, 1, 6.0)],
    ids=lambda settings: "-".join(f"{value:g}" for value in settings),
)


@SETTINGS
def test_grey_follows_opencv(settings: tuple[int, int, float]) -> None:
    x = generated(4, 48)[:, :1]
    theirs = opencv(x, *settings)
    assert (theirs - 255 * x).abs().mean() > 0.5  # there is something to follow
    mean, _, most, largest = quantiles(255 * NonLocalMeans(*settings)(x) - theirs)
    assert mean < 0.27  # rounding alone gives 0.25
    assert most < 0.85
    assert largest < 1.5


@SETTINGS
def test_colour_follows_opencv(settings: tuple[int, int, float]) -> None:
    x = generated(4, 48)
    theirs = opencv(x, *settings)
    assert (theirs - 255 * x).abs().mean() > 1
    mean, high, _, largest = quantiles(255 * NonLocalMeans(*settings)(x) - theirs)
    assert mean < 0.9
    assert high < 3
    assert largest < 7


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [1, 2, 3, 5, 7, 12])
def test_borders_and_small_images_follow_opencv(channels: int, side: int) -> None:
    x = generated(20, 48)[:, :channels, :side, :side]
    mean, _, _, largest = quantiles(255 * NonLocalMeans()(x) - opencv(x))
    assert mean < (0.3 if channels == 1 else 1)
    assert largest < (1 if channels == 1 else 7)


@pytest.mark.real
def test_photographs_follow_opencv() -> None:
    x = torch.load(REAL / "imagenet_dev.pt", weights_only=True)["images"][:6].float() / 255
    mean, high, _, largest = quantiles(255 * NonLocalMeans()(x) - opencv(x))
    assert mean < 0.8
    assert high < 2.9
    assert largest < 6
    mean, _, most, largest = quantiles(255 * NonLocalMeans()(x[:, :1]) - opencv(x[:, :1]))
    assert mean < 0.25
    assert most < 0.6
    assert largest < 0.85


@pytest.mark.real
def test_rgb_handed_to_opencv_as_it_is() -> None:
    x = torch.load(REAL / "imagenet_dev.pt", weights_only=True)["images"][:1].float() / 255
    raw = bytes_of(x)[0].permute(1, 2, 0).contiguous().numpy()
    theirs = torch.from_numpy(cv2.fastNlMeansDenoisingColored(raw, None, 4, 4, 3, 11))
    ours = 255 * NonLocalMeans()(x.flip(1)).flip(1)
    assert quantiles(ours - theirs.permute(2, 0, 1))[0] < 0.8


@given(seeds)
def test_lab_is_opencvs(seed: int) -> None:
    x = images(seed, (2, 3, 8, 8)) * torch.tensor([1.0, 0.02]).view(2, 1, 1, 1)  # below the knee
    lab = _to_lab(x)
    ours = lab.permute(0, 2, 3, 1).numpy() / [2.55, 1, 1]
    for image, expected in zip(x.permute(0, 2, 3, 1).contiguous().numpy(), ours, strict=True):
        np.testing.assert_allclose(cv2.cvtColor(image, cv2.COLOR_LRGB2Lab), expected, atol=0.1)
    torch.testing.assert_close(_from_lab(lab), x, atol=3e-6, rtol=0)


def by_hand(x: np.ndarray, search: int, patch: int, strength: float) -> np.ndarray:
    """Return non-local means of an image ``(C, H, W)``, pixel by pixel."""
    half, margin = search // 2, patch // 2
    reach = half + margin
    padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach)), mode="reflect")

    def patch_at(i: int, j: int) -> np.ndarray:
        return padded[:, i - margin : i + margin + 1, j - margin : j + margin + 1]

    out = np.zeros_like(x)
    for i, j in np.ndindex(x.shape[1:]):
        total, weights = 0.0, 0.0
        for dy, dx in np.ndindex(search, search):
            p, q = (i + reach, j + reach), (i + reach + dy - half, j + reach + dx - half)
            weight = np.exp(-((patch_at(*p) - patch_at(*q)) ** 2).mean() / strength**2)
            weight = weight if weight >= 1e-3 else 0.0
            total, weights = total + weight * padded[:, q[0], q[1]], weights + weight
        out[:, i, j] = total / weights
    return out


@pytest.mark.parametrize("settings", [(3, 1, 90.0), (5, 3, 120.0), (3, 5, 60.0), (1, 3, 10.0)])
def test_it_is_the_formula(settings: tuple[int, int, float]) -> None:
    squeezer = NonLocalMeans(*settings)
    grey = images(0, (2, 1, 6, 7), dtype=torch.float64)
    for image, squeezed in zip(grey, squeezer(grey), strict=True):
        expected = by_hand(255 * image.numpy(), *settings) / 255
        np.testing.assert_allclose(squeezed, expected, atol=1e-12)
    colour = images(0, (1, 3, 6, 7), dtype=torch.float64)
    lab = _to_lab(colour)[0].numpy()
    smooth = np.concatenate([by_hand(lab[:1], *settings), by_hand(lab[1:], *settings)])
    expected = _from_lab(torch.from_numpy(smooth)[None]).clamp(0, 1)
    torch.testing.assert_close(squeezer(colour), expected, atol=1e-12, rtol=0)


def test_it_takes_away_noise_and_keeps_edges() -> None:
    clean = torch.full((1, 3, 24, 24), 0.3)
    clean[..., 12:] = 0.7
    noisy = (clean + 0.01 * torch.randn(clean.shape)).clamp(0, 1)
    squeezed = NonLocalMeans(strength=8.0)(noisy)
    assert (squeezed - clean).square().mean() < 0.1 * (noisy - clean).square().mean()


@pytest.mark.parametrize("channels", [1, 3])
def test_non_local_means_has_the_right_gradients(channels: int) -> None:
    # Near enough to each other that no weight is cut off, and on either side of the knee of L*a*b*.
    for level in (0.004, 0.5):
        x = level + 0.003 * torch.rand(1, channels, 4, 3, dtype=torch.float64)
        squeezer = NonLocalMeans(3, 3, 12.0)
        assert gradcheck(squeezer, x.requires_grad_(), eps=1e-7, atol=1e-4)
    assert gradgradcheck(squeezer, x, eps=1e-7, atol=1e-3, rtol=1e-2)


def test_gradients_are_finite_at_black_and_white() -> None:
    x = torch.zeros(1, 3, 6, 6)
    x[..., 3:] = 1
    x[..., :2, :] = torch.eye(3)[:, :, None, None].amax(0)
    (gradient,) = torch.autograd.grad(NonLocalMeans()(x.requires_grad_()).sum(), x)
    assert gradient.isfinite().all()


def test_the_graph_is_small() -> None:
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.numel()
        return x

    x = images(0, (1, 1, 32, 32)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        NonLocalMeans(11)(x)
    # Some images for each row of the window, none for each of its 121 offsets.
    assert sum(kept.values()) < 3 * 11 * x.numel()


@pytest.mark.parametrize("channels", [2, 4])
def test_neither_grey_nor_rgb(channels: int) -> None:
    with pytest.raises(ValueError, match=f"expected grey or RGB images, .* got {channels}"):
        NonLocalMeans()(torch.rand(1, channels, 8, 8))


# The detector


SOME = (BitDepth(2), MedianSmoothing(2), MedianSmoothing(3))


@given(seeds, st.integers(1, 5))
@settings(max_examples=10)
def test_scores_are_distances_of_softmax_vectors(trained: nn.Module, seed: int, batch: int) -> None:
    x = images(seed, (batch, 3, 16, 16))
    detector = FeatureSqueezing(trained, SOME)
    with torch.no_grad():
        p = np.exp(trained(x).double().numpy())
        p /= p.sum(axis=1, keepdims=True)
        for column, squeezer in zip(detector.scores(x).T, SOME, strict=True):
            q = np.exp(trained(squeezer(x)).double().numpy())
            q /= q.sum(axis=1, keepdims=True)
            np.testing.assert_allclose(column, np.abs(p - q).sum(axis=1), atol=1e-5)
    scores = detector.scores(x)
    assert scores.shape == (batch, 3)
    assert ((scores >= 0) & (scores <= 2)).all()
    assert torch.equal(detector.score(x), scores.amax(dim=1))
    singles = torch.cat([detector.scores(image) for image in x.split(1)])
    torch.testing.assert_close(scores, singles, atol=1e-5, rtol=0)


def test_nothing_squeezed_scores_zero(model: nn.Module) -> None:
    assert not FeatureSqueezing(model, [torch.clone]).score(torch.rand(2, 3, 16, 16)).any()


def test_opposite_certainties_score_two() -> None:
    class Threshold(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            bright = (x.mean(dim=(1, 2, 3)) > 0.5).to(x.dtype)
            return torch.stack([bright, 1 - bright], dim=1) * 1000

    detector = FeatureSqueezing(Threshold(), [lambda x: 1 - x])
    assert detector.score(torch.tensor([0.2, 0.8]).view(2, 1, 1, 1)).tolist() == [2, 2]


def test_rounding_does_not_lift_a_score_above_two() -> None:
    class Shown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x > 0, 10 * x, -1e4).flatten(1)

    # Other classes after a flip: twice the sum of a softmax vector, which is only nearly 1.
    x = F.pad(images(0, (200, 1, 1, 3)).clamp(min=0.1), (0, 3))
    p, q = (Shown()(z).softmax(dim=1) for z in (x, x.flip(3)))
    assert (p - q).abs().sum(dim=1).max() > 2
    assert FeatureSqueezing(Shown(), [lambda x: x.flip(3)]).score(x).max() == 2


def test_one_forward_pass(model: nn.Module) -> None:
    seen: list[int] = []
    handle = model.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    try:
        FeatureSqueezing(model, SOME).scores(torch.rand(5, 3, 16, 16))
    finally:
        handle.remove()
    assert seen == [20]


def test_softmax_of_half_logits_is_in_float32() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(dim=(2, 3)).half()

    x = images(0, (4, 3, 8, 8))
    scores = FeatureSqueezing(Half(), [BitDepth(1)]).scores(x)
    p, q = (z.mean(dim=(2, 3)).half().float().softmax(1) for z in (x, BitDepth(1)(x)))
    assert scores.dtype == torch.float32
    assert torch.equal(scores[:, 0], (p - q).abs().sum(dim=1))


def test_double_stays_double(smooth: nn.Module) -> None:
    assert FeatureSqueezing(smooth, SOME).score(images(0, (1, 3, 8, 8)).double()).dtype == (
        torch.float64
    )


def test_scores_have_no_graph_and_squeezers_keep_their_gradient(model: nn.Module) -> None:
    x = torch.rand(2, 3, 16, 16, requires_grad=True)
    assert not FeatureSqueezing(model, SOME).scores(x).requires_grad
    assert torch.is_grad_enabled()


class Failing(TinyNet):
    """Raises in its forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        raise RuntimeError("no memory")


def state(model: nn.Module) -> tuple[list[bool], dict[str, Tensor], list[Any]]:
    flags = [module.training for module in model.modules()]
    values = {name: value.clone() for name, value in model.state_dict().items()}
    return flags, values, [(p.requires_grad, p.grad) for p in model.parameters()]


@pytest.mark.parametrize("fails", ["model", "squeezer", None])
def test_the_model_is_left_as_it_was(fails: str | None) -> None:
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("no memory")

    model = Failing() if fails == "model" else TinyNet()
    model.fc.eval()  # a mixed state
    before = state(model)
    x = blobs(4)[0]
    detector = FeatureSqueezing(model, [broken if fails == "squeezer" else BitDepth(3)])
    random = torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError, match="no memory"):
            detector.fit(x)
    else:
        first = detector.fit(x).score(x)
        assert torch.equal(first, detector.score(x))  # dropout and batch norm are in eval mode
    after = state(model)
    assert after[0] == before[0]
    assert all(torch.equal(after[1][name], value) for name, value in before[1].items())
    assert after[2] == before[2]
    assert torch.equal(random, torch.get_rng_state())
    assert torch.is_grad_enabled()


def test_thresholds_of_benign_images(model: nn.Module) -> None:
    benign, _ = blobs(60, seed=1)
    detector = FeatureSqueezing(model, SOME).fit(benign, rate=0.1, batch=7)
    scores = torch.cat([detector.scores(chunk) for chunk in benign.split(7)])
    joint = scores.amax(dim=1)
    assert (joint > detector.threshold).sum() == 6
    assert len(detector.thresholds) == 3
    for column, threshold in zip(scores.T, detector.thresholds, strict=True):
        assert (column > threshold).sum() <= 6
    flagged = detector.detect(benign)
    assert flagged.dtype == torch.bool
    assert torch.equal(flagged, detector.score(benign) > detector.threshold)
    each = detector.detect_each(benign)
    assert torch.equal(each, detector.scores(benign) > torch.tensor(detector.thresholds))


@pytest.mark.real
def test_it_detects_small_changes_of_real_pictures() -> None:
    case = load_case("resnet20", 16)
    attack = PGD(case.model, eps=2 / 255, alpha=0.5 / 255, steps=10, random_start=False)
    adversarial = attack(case.images, case.labels)
    assert (case.model(adversarial).argmax(dim=1) != case.labels).all()
    curve = FeatureSqueezing(case.model, [MedianSmoothing(2)]).roc(case.images, adversarial)
    assert curve.auc > 0.7


def test_what_it_says_of_itself(model: nn.Module) -> None:
    detector = FeatureSqueezing(model, iter([BitDepth(2), NonLocalMeans(13)]))
    assert repr(detector) == (
        "FeatureSqueezing(TinyNet, [BitDepth(bits=2, straight_through=False), "
        "NonLocalMeans(search=13, patch=3, strength=4.0)])"
    )


class TestFiles:
    def test_a_detector_comes_back(self, model: nn.Module, tmp_path: Path) -> None:
        x = blobs(30)[0]
        detector = FeatureSqueezing(model, SOME).fit(x)
        detector.save(tmp_path / "thresholds")
        again = FeatureSqueezing.load(str(tmp_path / "thresholds"), model, list(SOME))
        assert again.threshold == detector.threshold
        assert again.thresholds == detector.thresholds
        assert torch.equal(again.detect(x), detector.detect(x))
        assert torch.equal(again.detect_each(x), detector.detect_each(x))

    @pytest.mark.parametrize(
        "others", [SOME[:2], SOME[::-1], (BitDepth(3), *SOME[1:])], ids=["fewer", "order", "bits"]
    )
    def test_other_squeezers(
        self, model: nn.Module, tmp_path: Path, others: tuple[Squeezer, ...]
    ) -> None:
        FeatureSqueezing(model, SOME).fit(blobs(4)[0]).save(tmp_path / "thresholds")
        ours, theirs = (re.escape(str(list(part))[1:-1]) for part in (others, SOME))
        message = (
            f"^expected the thresholds of {ours}, got .*thresholds, with those of {theirs}; "
            "pass the same squeezers, or fit again$"
        )
        with pytest.raises(ValueError, match=message):
            FeatureSqueezing.load(tmp_path / "thresholds", model, others)

    def test_other_files(self, model: nn.Module, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            FeatureSqueezing.load(tmp_path / "none", model, SOME)
        storage.save({}, tmp_path / "other", "thing")
        with pytest.raises(ValueError, match="expected the file of a feature squeezing detector"):
            FeatureSqueezing.load(tmp_path / "other", model, SOME)

    def test_unfitted(self, model: nn.Module, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"expected a fitted FeatureSqueezing, .*; call fit"):
            FeatureSqueezing(model, SOME).save(tmp_path / "thresholds")
        assert not list(tmp_path.iterdir())


class TestBadInput:
    @pytest.mark.parametrize(
        ("squeezers", "error", "message"),
        [
            ([], ValueError, "^expected at least one squeezer, got none$"),
            (
                BitDepth(3),
                TypeError,
                "^expected squeezers to be a list of functions, got BitDepth; "
                "put a single one into a list$",
            ),
            (
                [BitDepth(2), 3],
                TypeError,
                "^expected squeezers to be functions of images, got 3; pass an instance, for",
            ),
            (
                [BitDepth],
                TypeError,
                r"got <class .*BitDepth'>; pass an instance, for example BitDepth\(3\)$",
            ),
        ],
    )
    def test_squeezers(
        self, model: nn.Module, squeezers: Any, error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            FeatureSqueezing(model, squeezers)

    def test_model(self) -> None:
        with pytest.raises(TypeError, match=r"expected model to be a torch\.nn\.Module, got"):
            FeatureSqueezing(torch.relu, SOME)  # type: ignore[arg-type]

    def test_images(self, model: nn.Module) -> None:
        with pytest.raises(ValueError, match=r"expected images in \[0, 1\]"):
            FeatureSqueezing(model, SOME).score(torch.full((1, 3, 16, 16), 2.0))

    @pytest.mark.parametrize(
        ("squeezer", "got"),
        [
            (lambda x: x[:, :1], r"\(2, 1, 16, 16\), torch.float32"),
            (lambda x: x.double(), r"\(2, 3, 16, 16\), torch.float64"),
            (lambda x: None, "NoneType"),
            (lambda x: [x], "list"),
        ],
    )
    def test_squeezers_that_do_something_else(
        self, model: nn.Module, squeezer: Any, got: str
    ) -> None:
        with pytest.raises(ValueError, match=rf"to return images of shape \(2, 3, .*, got {got}"):
            FeatureSqueezing(model, [squeezer]).score(torch.rand(2, 3, 16, 16))

    def test_logits(self) -> None:
        with pytest.raises(ValueError, match=r"expected the model to return logits of shape \(4, "):
            FeatureSqueezing(nn.Identity(), [BitDepth(3)]).score(torch.rand(2, 3, 4, 4))

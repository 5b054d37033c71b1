# SPDX-License-Identifier: MIT
"""Squeezers against SciPy, OpenCV and hand-written ones; the detector against its definition."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.ndimage
import torch
from conftest import REAL, blobs, mixed
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import Around
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torchattacks import PGD

from captum_adv2 import storage
from captum_adv2.defenses import BitDepth, FeatureSqueezing, MedianSmoothing, NonLocalMeans
from captum_adv2.defenses.squeezing import Squeezer, _from_lab, _to_lab
from captum_adv2.study.embedded import load_resnet, make_shapes

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
    # Sums round by the size of the batch; another image would count for a level, 1 / 255.
    torch.testing.assert_close(squeezed, singles, atol=1e-5, rtol=0)


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


@pytest.mark.parametrize("windows", [(10, 3), (11, 2)])
def test_windows_have_a_pixel_at_their_centre(windows: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="expected search and patch to be odd, got NonLocal"):
        NonLocalMeans(*windows)


@pytest.mark.parametrize("channels", [2, 4])
def test_non_local_means_is_for_grey_and_rgb(channels: int) -> None:
    with pytest.raises(ValueError, match=f"expected grey or RGB images, .* got {channels}"):
        NonLocalMeans()(torch.rand(1, channels, 8, 8))


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


@pytest.mark.parametrize("window", [2, 3])
def test_median_has_the_right_gradient(window: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randperm(2 * 2 * 20, generator=generator).view(2, 2, 4, 5).double() / 100 + 0.1
    assert gradcheck(MedianSmoothing(window), x.requires_grad_())
    tied = torch.full((1, 1, 4, 4), 0.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(MedianSmoothing(window)(tied).sum(), tied)
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


def assert_follows_opencv(
    x: Tensor, bounds: tuple[float, ...], settings: tuple[int, int, float] = (11, 3, 4.0)
) -> None:
    """Hold mean, 99 % and 99.9 % quantile and maximum of the differences to bounds."""
    size = (255 * NonLocalMeans(*settings)(x) - opencv(x, *settings)).abs().flatten().sort().values
    places = [int(0.99 * len(size)), int(0.999 * len(size)), -1]
    np.testing.assert_array_less([size.mean(), *size[places]], bounds)


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


# By channels. Rounding alone gives grey images a mean of 0.25.
BOUNDS = {1: (0.27, 0.85, 0.85, 1.5), 3: (0.9, 3, 7, 7)}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "settings", [(11, 3, 4.0), (11, 3, 2.0), (13, 3, 4.0), (7, 5, 10.0), (5, 1, 6.0)]
)
def test_non_local_means_follows_opencv(channels: int, settings: tuple[int, int, float]) -> None:
    x = generated(4, 48)[:, :channels]
    assert (opencv(x, *settings) - 255 * x).abs().mean() > 0.5  # there is something to follow
    assert_follows_opencv(x, BOUNDS[channels], settings)


@pytest.mark.parametrize(("channels", "bounds"), [(1, (0.3, 1, 1, 1)), (3, (1, 7, 7, 7))])
@pytest.mark.parametrize("side", [1, 2, 3, 5, 7, 12])
def test_borders_and_small_images_follow_opencv(
    channels: int, bounds: tuple[float, ...], side: int
) -> None:
    assert_follows_opencv(generated(20, 48)[:, :channels, :side, :side], bounds)


@pytest.mark.real
def test_photographs_follow_opencv() -> None:
    x = torch.load(REAL / "imagenet_dev.pt", weights_only=True)["images"][:6].float() / 255
    assert_follows_opencv(x, (0.8, 2.9, 6, 6))
    assert_follows_opencv(x[:, :1], (0.25, 0.6, 0.6, 0.85))


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


@pytest.mark.parametrize(("channels", "level"), [(1, 0.5), (3, 0.004), (3, 0.5)])
def test_non_local_means_has_the_right_gradients(channels: int, level: float) -> None:
    # Near enough to each other that no weight is cut off, and on either side of the knee of L*a*b*.
    x = level + 0.003 * torch.rand(1, channels, 3, 3, dtype=torch.float64)
    squeezer = NonLocalMeans(3, 3, 12.0)
    assert gradcheck(squeezer, x.requires_grad_(), eps=1e-7, atol=1e-4)
    assert gradgradcheck(squeezer, x, eps=1e-7, atol=1e-3, rtol=1e-2, fast_mode=True)


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


# The detector


SOME = (BitDepth(2), MedianSmoothing(2), MedianSmoothing(3))


@given(seeds, st.integers(1, 5))
@settings(max_examples=10)
def test_scores_are_distances_of_softmax_vectors(trained: nn.Module, seed: int, batch: int) -> None:
    x = images(seed, (batch, 3, 16, 16))
    scores = FeatureSqueezing(trained, SOME).scores(x)
    assert scores.shape == (batch, 3)
    with torch.no_grad():
        p = np.exp(trained(x).double().numpy())
        p /= p.sum(axis=1, keepdims=True)
        for column, squeezer in zip(scores.T, SOME, strict=True):
            q = np.exp(trained(squeezer(x)).double().numpy())
            q /= q.sum(axis=1, keepdims=True)
            np.testing.assert_allclose(column, np.abs(p - q).sum(axis=1), atol=1e-5)


def test_scores_at_their_ends(model: nn.Module) -> None:
    assert not FeatureSqueezing(model, [torch.clone]).score(torch.rand(2, 3, 16, 16)).any()
    x = torch.tensor([[0.2, 0.8], [0.9, 0.1]]).view(2, 1, 1, 2)
    table = Around(None, lambda _, x: 1000 * x[:, 0, 0])
    assert FeatureSqueezing(table, [lambda x: 1 - x]).score(x).tolist() == [2, 2]


def test_rounding_does_not_lift_a_score_above_two() -> None:
    net = Around(None, lambda _, x: torch.where(x > 0, 10 * x, -1e4).flatten(1))
    # Other classes after a flip: twice the sum of a softmax vector, which is only nearly 1.
    x = torch.nn.functional.pad(images(0, (200, 1, 1, 3)).clamp(min=0.1), (0, 3))
    p, q = (net(z).softmax(dim=1) for z in (x, x.flip(3)))
    assert (p - q).abs().sum(dim=1).max() > 2
    assert FeatureSqueezing(net, [lambda x: x.flip(3)]).score(x).max() == 2


def test_one_forward_pass_without_a_graph(model: nn.Module) -> None:
    seen: list[int] = []
    handle = model.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    scores = FeatureSqueezing(model, SOME).scores(torch.rand(5, 3, 16, 16, requires_grad=True))
    handle.remove()
    assert seen == [20]
    assert not scores.requires_grad


@pytest.mark.parametrize(
    ("dtype", "wide"), [(torch.float16, torch.float32), (torch.float64, torch.float64)]
)
def test_softmax_is_in_float32_at_least(dtype: torch.dtype, wide: torch.dtype) -> None:
    cast = Around(None, lambda _, x: x.mean(dim=(2, 3)).to(dtype))
    x = images(0, (4, 3, 8, 8))
    scores = FeatureSqueezing(cast, [BitDepth(1)]).score(x)
    p, q = (cast(z).to(wide).softmax(dim=1) for z in (x, BitDepth(1)(x)))
    assert scores.dtype == wide
    torch.testing.assert_close(scores, (p - q).abs().sum(dim=1))


def test_the_model_is_in_eval_mode_and_left_as_it_was(trained: nn.Module) -> None:
    model, x = mixed(trained), blobs(4)[0]
    modes = [module.training for module in model.modules()]
    expected = FeatureSqueezing(trained, SOME).score(x)
    torch.testing.assert_close(FeatureSqueezing(model, SOME).score(x), expected)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), trained.buffers(), strict=True))


def test_it_detects_small_changes() -> None:
    model, (x, labels, *_) = load_resnet(), make_shapes(32, seed=3)
    attack = PGD(model, eps=2 / 255, alpha=0.5 / 255, steps=10, random_start=False)
    curve = FeatureSqueezing(model, [NonLocalMeans()]).roc(x, attack(x, labels))
    assert curve.auc > 0.75


@pytest.mark.parametrize(
    ("squeezer", "got"),
    [
        (lambda x: x[:1], r"\(1, 3, 16, 16\), torch.float32"),
        (lambda x: x[:, :1], r"\(2, 1, 16, 16\), torch.float32"),
        (lambda x: x.double(), r"\(2, 3, 16, 16\), torch.float64"),
    ],
)
def test_squeezers_must_keep_shape_and_dtype(
    model: nn.Module, squeezer: Squeezer, got: str
) -> None:
    with pytest.raises(ValueError, match=rf"to return images of shape \(2, 3, .*, got {got}"):
        FeatureSqueezing(model, [squeezer]).score(torch.rand(2, 3, 16, 16))


def test_a_detector_needs_squeezers_and_logits(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="^expected at least one squeezer, got none$"):
        FeatureSqueezing(model, [])
    with pytest.raises(ValueError, match=r"expected the model to return logits of shape \(4, "):
        FeatureSqueezing(nn.Identity(), [BitDepth(3)]).score(torch.rand(2, 3, 4, 4))
    with pytest.raises(TypeError, match="images of the model's dtype .*float32 .*use images.to"):
        FeatureSqueezing(model, [BitDepth(3)]).score(torch.rand(2, 3, 16, 16).double())


def test_a_detector_comes_back_from_its_file(model: nn.Module, tmp_path: Path) -> None:
    detector = FeatureSqueezing(model, SOME).fit(blobs(30)[0])
    detector.save(tmp_path / "thresholds")
    again = FeatureSqueezing.load(str(tmp_path / "thresholds"), model, list(SOME))
    assert again.threshold == detector.threshold
    assert again.thresholds == detector.thresholds
    assert repr(again) == f"FeatureSqueezing(TinyNet, {list(SOME)})"


def test_thresholds_of_others_are_refused(model: nn.Module, tmp_path: Path) -> None:
    FeatureSqueezing(model, SOME).fit(blobs(4)[0]).save(tmp_path / "thresholds")
    for others in (SOME[:2], SOME[::-1], (BitDepth(3), *SOME[1:])):  # fewer, order, bits
        with pytest.raises(ValueError, match="^expected the thresholds of .*; pass the same squee"):
            FeatureSqueezing.load(tmp_path / "thresholds", model, others)
    other = copy.deepcopy(model)
    next(other.parameters()).data += 1e-3
    with pytest.raises(ValueError, match="expected the thresholds of this model, got"):
        FeatureSqueezing.load(tmp_path / "thresholds", other, SOME)
    storage.save({}, tmp_path / "other", "thing")
    with pytest.raises(ValueError, match="expected the file of a feature squeezing detector"):
        FeatureSqueezing.load(tmp_path / "other", model, SOME)
    with pytest.raises(ValueError, match=r"expected a fitted FeatureSqueezing, .*; call fit"):
        FeatureSqueezing(model, SOME).save(tmp_path / "unfitted")

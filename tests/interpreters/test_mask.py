# SPDX-License-Identifier: MIT
"""MASK against plain recomputations of its objective, its replacements and its optimisation."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import blobs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from captum_adv2.interpreters import MASK
from captum_adv2.interpreters.mask import Blur, Noise
from captum_adv2.optim import Adam
from captum_adv2.testing import unchanged

SEEDS = st.integers(0, 2**32 - 1)
TARGET = torch.tensor([2, 0, 1])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def images64(count=3, seed=7):
    """Pictures of the classes in TARGET, in double precision."""
    images, labels = blobs(60, seed)
    chosen = [int((labels == label).nonzero()[0]) for label in TARGET[:count]]
    return images[chosen].double()


@pytest.fixture(scope="module")
def net(trained_smooth):
    return trained_smooth


class Record(nn.Module):
    """Records its inputs; its logits are the mean colours of four columns."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return x.mean(dim=(1, 2))[:, :4]


# The objective


@given(
    seed=SEEDS,
    tv=st.floats(0, 1),
    sparsity=st.floats(0, 1),
    beta=st.sampled_from([1.0, 2.0, 2.5, 3.0]),
    size=st.sampled_from([1, 3, 4]),
)
def test_the_objective_is_equation_16(net, seed, tv, sparsity, beta, size):
    x, kept = images64(seed=seed), torch.rand(3, 1, size, size, dtype=torch.float64)
    mask = MASK(net, size, tv=tv, sparsity=sparsity, beta=beta, jitter=0)
    found = mask.objective(mask.scene(x, TARGET), kept, 0)

    m = F.interpolate(kept, (16, 16), mode="bilinear", align_corners=False)
    with torch.no_grad():
        p = net(m * x + (1 - m) * Blur()(x)).softmax(dim=1)[range(3), TARGET].numpy()
    k = kept.numpy()
    dx, dy = abs(np.diff(k, axis=3)), abs(np.diff(k, axis=2))
    rough = (dx**beta).sum((1, 2, 3)) + (dy**beta).sum((1, 2, 3))
    expected = p + tv * rough + sparsity * (1 - k).sum((1, 2, 3))
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-12)


@given(jitter=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=10)
def test_jitter_shows_every_image_the_same_crop_of_an_enlarged_image(jitter, seed):
    model, x = Record(), images64(1).repeat(2, 1, 1, 1)
    scene = MASK(model, 4, jitter=jitter).scene(x, TARGET[:2])
    assert scene.images.shape == scene.deleted.shape == (2, 3, 16 + jitter, 16 + jitter)
    enlarged = F.interpolate(x, 16 + jitter, mode="bilinear", align_corners=False)
    crops = enlarged.unfold(2, 16, 1).unfold(3, 16, 1)[0]  # (C, top, left, 16, 16)

    def offsets(seed):
        mask, found = MASK(model, 4, jitter=jitter, seed=seed), []
        for step in range(20):
            mask.objective(scene, torch.ones(2, 1, 4, 4).double(), step)
            first, second = model.seen[-1]
            torch.testing.assert_close(first, second, rtol=0, atol=1e-12)
            apart = (crops - first[:, None, None]).abs().amax(dim=(0, 3, 4))
            (where,) = (apart < 1e-9).nonzero().tolist()
            found.append(tuple(where))
        return found

    assert len(set(offsets(seed))) > 1
    assert offsets(seed) == offsets(seed) != offsets(seed + 100)


# The replacement of deleted pixels


@pytest.mark.parametrize("sigma", [None, 0.3, 2.0, 50.0])
@pytest.mark.parametrize("shape", [(8, 8), (5, 11), (1, 4), (2, 2)])
def test_blur_keeps_constants_range_and_shape(sigma, shape):
    flat = torch.full((2, 3, *shape), 0.3, dtype=torch.float64)
    torch.testing.assert_close(Blur(sigma)(flat), flat)
    x = torch.rand(2, 3, *shape, dtype=torch.float64)
    blurred = Blur(sigma)(x)
    assert blurred.shape == x.shape
    assert (blurred.amin(dim=(2, 3)) >= x.amin(dim=(2, 3)) - 1e-12).all()
    assert (blurred.amax(dim=(2, 3)) <= x.amax(dim=(2, 3)) + 1e-12).all()


def test_blur_is_a_gaussian_of_a_32nd_of_the_longer_side():
    dot = torch.zeros(1, 1, 21, 64, dtype=torch.float64)
    dot[..., 10, 30] = 1
    line = torch.exp(-0.5 * (torch.arange(-6, 7).double() / 2) ** 2)
    line = line / line.sum()
    expected = F.pad(line, (4, 4))[:, None] * F.pad(line, (24, 27))
    for blur in (Blur(2.0), Blur()):
        torch.testing.assert_close(blur(dot)[0, 0], expected)


@given(seed=st.integers(0, 99), std=st.sampled_from([0.0, 0.5, 1.0, 20.0]))
def test_noise_is_shared_by_all_images_and_comes_from_its_seed(seed, std):
    x = images64(2, seed=seed)
    x[1] = x[0]
    noise = Noise(std, seed)(x)
    assert ((noise >= 0) & (noise <= 1)).all()
    torch.testing.assert_close(noise[0], noise[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(Noise(std, seed)(x[:1]), noise[:1], rtol=0, atol=1e-12)
    if std == 0:
        torch.testing.assert_close(noise, x.mean(dim=(2, 3), keepdim=True).expand_as(x))
    else:
        assert not torch.equal(Noise(std, seed + 1)(x), noise)


def test_noise_has_the_images_mean_colour_and_spread():
    x = 0.5 + 0.05 * torch.randn(1, 3, 64, 64, generator=seeded(0), dtype=torch.float64)
    noise = Noise()(x)
    torch.testing.assert_close(noise.mean(dim=(2, 3)), x.mean(dim=(2, 3)), rtol=0, atol=5e-3)
    assert noise.std().item() == pytest.approx(x.std().item(), rel=0.05)


# The solution


@pytest.mark.parametrize("jitter", [0, 2])
@pytest.mark.parametrize("perturb", [Blur(4.0), Noise()])
def test_solving_is_torchs_adam_and_a_clamp(net, jitter, perturb):
    x = images64()
    mask = MASK(net, 4, 25, jitter=jitter, perturb=perturb, tv=0.1, sparsity=0.002)
    scene = mask.scene(x, TARGET)
    kept = torch.full((3, 1, 4, 4), 0.5, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([kept], lr=0.1)
    for step in range(25):
        adam.zero_grad()
        mask.objective(scene, kept, step).sum().backward(inputs=[kept])
        adam.step()
        with torch.no_grad():
            kept.clamp_(0, 1)
    assert ((kept == 0) | (kept == 1)).any()  # the clamp had an effect
    found = mask.solve(x, TARGET)
    torch.testing.assert_close(found.kept, kept.detach(), rtol=0, atol=1e-7)
    assert (found.step, found.moments.steps) == (25, 25)
    maps, logits, _ = mask.explain(x, TARGET)
    assert torch.equal(maps, 1 - found.kept)
    assert logits is None


@pytest.mark.parametrize("perturb", [Blur(4.0), Noise()])
def test_a_batch_is_solved_like_its_images(net, perturb):
    x, mask = images64(), MASK(net, 4, 20, perturb=perturb, jitter=2)
    single = [mask(x[i : i + 1], TARGET[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(mask(x, TARGET), torch.cat(single), rtol=0, atol=1e-8)


def test_the_map_has_no_graph_and_leaves_nothing_behind(net):
    model, leaf = copy.deepcopy(net), images64().requires_grad_()
    model.stem[0].weight.requires_grad_(False)
    model.fc.bias.grad = torch.ones_like(model.fc.bias)
    mask = MASK(model, 4, 5, perturb=Noise())
    with unchanged(model, leaf):
        for images in (leaf, leaf * 1):
            maps = mask(images, TARGET)
            assert not maps.requires_grad
            assert torch.equal(maps, mask(images.detach(), TARGET))


# Settings


def test_the_defaults_are_fong_and_vedaldis():
    mask = MASK(nn.Identity())
    assert (mask.size, mask.iterations, mask.tv, mask.sparsity) == (28, 300, 1e-2, 1e-4)
    assert (mask.beta, mask.jitter, mask.adam) == (3.0, 4, Adam(0.1))


def test_small_settings_and_overrides(net):
    assert MASK.small(net).size == 16
    mask = MASK.small(net, iterations=3, perturb=Noise(), size=5)
    assert (mask.iterations, mask.perturb) == (3, Noise())
    assert mask(images64(), TARGET).shape == (3, 1, 5, 5)

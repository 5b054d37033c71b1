# SPDX-License-Identifier: MIT
"""GRAD and its relatives: equal to float64 computations by hand, at any confidence."""

from __future__ import annotations

import copy
from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
from conftest import TinyNet
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from captum_adv2.interpreters import Gradient, IntegratedGradients, SmoothGrad
from captum_adv2.interpreters.first_order import Autograd
from captum_adv2.interpreters.gradient import log_odds, pool_maps, probability


def reduced(attributions: np.ndarray, pool: int) -> np.ndarray:
    """Return |a|, max over channels, pooled, min-max scaled; in NumPy."""
    largest = np.abs(attributions).max(axis=1)
    batch, height, width = (size // pool if i else size for i, size in enumerate(largest.shape))
    cut = largest[:, : height * pool, : width * pool]
    maps = cut.reshape(batch, height, pool, width, pool).mean(axis=(2, 4))[:, None]
    low = maps.min(axis=(1, 2, 3), keepdims=True)
    return (maps - low) / (maps.max(axis=(1, 2, 3), keepdims=True) - low)


def softmax_gradient(model: nn.Module, images: Tensor, target: Tensor) -> np.ndarray:
    x = images.double().requires_grad_()
    p = copy.deepcopy(model).double()(x).softmax(dim=1)
    return torch.autograd.grad(p[torch.arange(len(x)), target].sum(), x)[0].numpy()


class TestScores:
    @given(
        st.lists(st.floats(-8, 8), min_size=2, max_size=6),
        st.integers(0, 1),
        st.integers(0, 1),
        st.floats(-50, 50),
    )
    def test_definitions(self, values: list[float], one: int, two: int, shift: float) -> None:
        logits, target = torch.tensor([values, values[::-1]]).double(), torch.tensor([one, two])
        p = logits.softmax(dim=1)
        index = torch.arange(2), target
        rest = p.sum(dim=1) - p[index]
        odds = log_odds(logits + shift, target)
        torch.testing.assert_close(odds, (p[index] / rest).log(), atol=1e-9, rtol=1e-6)
        torch.testing.assert_close(probability(logits, target), p[index], atol=1e-12, rtol=1e-9)

    @given(st.floats(-90, 90), st.floats(-90, 90))
    def test_two_classes_are_opposites(self, a: float, b: float) -> None:
        logits = torch.tensor([[a, b]], dtype=torch.float64)
        first, second = (log_odds(logits, torch.tensor([c])).item() for c in (0, 1))
        assert first == pytest.approx(a - b)
        assert first == -second

    @pytest.mark.parametrize("function", [log_odds, probability])
    def test_derivatives(self, function: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(3, 4, dtype=torch.float64, generator=generator).requires_grad_()
        target = torch.tensor([0, 3, 1])
        assert torch.autograd.gradcheck(lambda z: function(z, target), (logits,))
        assert torch.autograd.gradgradcheck(lambda z: function(z, target), (logits,))

    @pytest.mark.parametrize("gap", [5.0, 20.0, 40.0, 60.0, 80.0])
    @pytest.mark.parametrize("sign", [1, -1])
    def test_the_gradient_does_not_vanish_in_float32(self, gap: float, sign: int) -> None:
        logits = torch.tensor([[sign * gap, 0.0, -300.0]], requires_grad=True)
        p = probability(logits, torch.tensor([0]))
        (gradient,) = torch.autograd.grad(p, logits)
        exact = np.exp(-gap) / (1 + np.exp(-gap)) ** 2
        np.testing.assert_allclose(gradient[0, :2].numpy(), [exact, -exact], rtol=2e-5)
        (linear,) = torch.autograd.grad(log_odds(logits, torch.tensor([0])), logits)
        np.testing.assert_allclose(linear[0, :2].numpy(), [1, -1], rtol=1e-6)


class TestPooling:
    @pytest.mark.parametrize(
        ("shape", "expected"),
        [
            ((128, 128), (32, 32)),
            ((127, 127), (63, 63)),
            ((128, 127), (64, 63)),
            ((224, 160), (56, 40)),
            ((32, 32), (16, 16)),
            ((3, 2), (1, 1)),
            ((1, 1), (1, 1)),
            ((1, 8), (1, 8)),
        ],
    )
    def test_default(self, shape: tuple[int, int], expected: tuple[int, int]) -> None:
        assert pool_maps(torch.rand(1, 1, *shape), None).shape[2:] == expected

    def test_is_the_mean_of_blocks(self) -> None:
        maps = torch.arange(36.0).view(1, 1, 6, 6)
        assert pool_maps(maps, 3).flatten().tolist() == [7, 10, 25, 28]
        assert torch.equal(pool_maps(maps, 1), maps)
        assert torch.equal(pool_maps(maps, 2), pool_maps(maps, None))


class TestGradient:
    @pytest.mark.parametrize("pool", [1, 2, 3])
    def test_is_the_gradient_of_the_probability(
        self, model: nn.Module, data: Any, pool: int
    ) -> None:
        images, labels = data
        for target in (labels, (labels + 2) % 4):
            expected = reduced(softmax_gradient(model, images, target), pool)
            maps = Gradient(model, pool=pool)(images, target)
            np.testing.assert_allclose(maps.numpy(), expected, atol=2e-4)

    @pytest.mark.parametrize("gap", [20.0, 60.0])
    def test_at_high_confidence(self, model: nn.Module, data: Any, gap: float) -> None:
        images = data[0][:1]
        sure = copy.deepcopy(model)
        top = sure(images).detach().topk(2).values[0]
        sure.fc.weight.data.mul_(gap / (top[0] - top[1]))
        sure.fc.bias.data.mul_(gap / (top[0] - top[1]))
        wide = copy.deepcopy(sure).double()
        target = wide(images.double()).argmax(dim=1)
        # At a gap of 60 even float64's softmax has lost the gradient. By hand: the gradient of p_c
        # is p_c times the sum over k != c of p_k (z_c' - z_k'), and a factor does not matter.
        x = images.double().requires_grad_()
        logits = wide(x)
        first, second = logits[0].topk(2).values.tolist()
        assert first - second == pytest.approx(gap, rel=1e-4)
        slopes = torch.stack([torch.autograd.grad(z, x, retain_graph=True)[0] for z in logits[0]])
        others = logits[0].detach().clone()
        others[target] = -torch.inf
        weights = others.softmax(dim=0)
        by_hand = (weights.view(-1, 1, 1, 1, 1) * (slopes[target] - slopes)).sum(dim=0)
        expected = reduced(by_hand.numpy(), 2)
        np.testing.assert_allclose(Gradient(sure)(images, target).numpy(), expected, atol=1e-3)

    def test_reported_map_uses_exact_relu(self, model: nn.Module, data: Any) -> None:
        plain = Gradient(model, smoothing=None)(*data)
        for smoothing in ("auto", 10.0):
            assert torch.equal(Gradient(model, smoothing=smoothing)(*data), plain)

    def test_two_classes(self) -> None:
        net = TinyNet(classes=2).eval()
        images = torch.rand(2, 3, 8, 8)
        # With two classes the maps of both are the same: p_0 + p_1 = 1.
        first, second = (Gradient(net)(images, torch.full((2,), c)) for c in (0, 1))
        torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


class TestSmoothGrad:
    def test_is_the_mean_over_noisy_copies(self, smooth: nn.Module) -> None:
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(2, 3, 8, 8, generator=generator, dtype=torch.float64)
        target, std, samples = torch.tensor([1, 3]), 0.2, 4
        noise = torch.randn(samples, 1, 3, 8, 8, generator=torch.Generator().manual_seed(5))
        gradients = [softmax_gradient(smooth, images + std * n.double(), target) for n in noise]
        maps = SmoothGrad(smooth, samples=samples, std=std, seed=5, pool=1)(images, target)
        np.testing.assert_allclose(maps.numpy(), reduced(np.mean(gradients, axis=0), 1), atol=1e-9)

    def test_seed(self, model: nn.Module, data: Any) -> None:
        first = SmoothGrad(model, samples=2, seed=3)(*data)
        assert torch.equal(SmoothGrad(model, samples=2, seed=3)(*data), first)
        assert not torch.equal(SmoothGrad(model, samples=2, seed=4)(*data), first)


class TestIntegratedGradients:
    @pytest.mark.parametrize("baseline", [0.0, 0.4, torch.linspace(0, 1, 192).view(3, 8, 8)])
    def test_completeness(self, smooth: nn.Module, baseline: Any) -> None:
        generator = torch.Generator().manual_seed(1)
        images = torch.rand(3, 3, 8, 8, generator=generator, dtype=torch.float64)
        target = torch.tensor([0, 2, 3])
        smooth.fc.weight.data.mul_(20)
        interpreter = IntegratedGradients(smooth, steps=30, baseline=baseline)
        attributions, logits = interpreter.attribute(
            Autograd(False), images.requires_grad_(), target
        )
        start = torch.as_tensor(baseline).to(images).expand_as(images)
        index = torch.arange(3), target
        rise = smooth(images).softmax(dim=1)[index] - smooth(start).softmax(dim=1)[index]
        assert rise.abs().min() > 1e-3
        torch.testing.assert_close(
            attributions.sum(dim=(1, 2, 3)), rise.detach(), atol=1e-8, rtol=0
        )
        torch.testing.assert_close(logits, smooth(images))

    @pytest.mark.parametrize("steps", [1, 4, 11])
    @pytest.mark.parametrize("baseline", [0.0, 0.3])
    def test_equals_captums_on_the_probability(
        self, smooth: nn.Module, steps: int, baseline: float
    ) -> None:
        generator = torch.Generator().manual_seed(2)
        images = torch.rand(2, 3, 8, 8, generator=generator, dtype=torch.float64)
        target = torch.tensor([1, 2])
        theirs = captum.attr.IntegratedGradients(lambda x: smooth(x).softmax(dim=1))
        expected = theirs.attribute(images, baseline, target=target, n_steps=steps)
        maps = IntegratedGradients(smooth, steps, baseline, pool=1)(images, target)
        np.testing.assert_allclose(maps.numpy(), reduced(expected.numpy(), 1), atol=1e-8)

    @settings(max_examples=15)
    @given(st.integers(0, 2**31), st.integers(0, 2), st.floats(0.05, 1))
    def test_proposition_1(self, seed: int, target: int, size: float) -> None:
        """What the probability gains from x0 to x is at most the L1 norm of IG (Prop. 1)."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = nn.Sequential(
                nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)
            ).double()  # fmt: skip
            net[-1].weight.data.mul_(5)
            clean = torch.rand(1, 1, 6, 6, dtype=torch.float64)
            image = (clean + size * (torch.rand_like(clean) - 0.5)).clamp(0, 1)
        interpreter = IntegratedGradients(net, steps=20, baseline=clean[0])
        index = torch.tensor([target])
        attributions, _ = interpreter.attribute(Autograd(False), image.requires_grad_(), index)
        gain = (net(image).softmax(dim=1) - net(clean).softmax(dim=1))[0, target].item()
        assert abs(gain) <= attributions.abs().sum().item() + 1e-9
        assert gain == pytest.approx(attributions.sum().item(), abs=1e-6)

    def test_baseline_shapes(self, model: nn.Module, data: Any) -> None:
        image = torch.full((3, 16, 16), 0.25)
        expected = IntegratedGradients(model, 2, 0.25)(*data)
        for baseline in (image, image[None]):
            assert torch.equal(IntegratedGradients(model, 2, baseline)(*data), expected)

    def test_an_image_that_is_the_baseline(self, model: nn.Module, data: Any) -> None:
        images, labels = data
        x = images[:1].clone().requires_grad_()
        maps = IntegratedGradients(model, 3, images[0])(x, labels[:1])
        assert not maps.any()
        assert torch.autograd.grad(maps.sum(), x)[0].isfinite().all()

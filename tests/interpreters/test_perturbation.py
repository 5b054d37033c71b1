# SPDX-License-Identifier: MIT
"""Maps of perturbed images: fits against NumPy's, Shapley values against sums over subsets."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import blobs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from captum_adv2 import ADV2, evaluate
from captum_adv2.interpreters import (
    FeatureAblation,
    Interpreter,
    KernelShap,
    Lime,
    Occlusion,
    ShapleyValueSampling,
)
from captum_adv2.interpreters.perturbation import feature_mask, least_squares

OF_FEATURES = (FeatureAblation, ShapleyValueSampling, KernelShap, Lime)
DRAWN = (ShapleyValueSampling, KernelShap, Lime)


def attributions(interpreter: Any, images: Tensor, target: Tensor) -> Tensor:
    """Return signed attributions, before reduction and scaling."""
    return interpreter.attribute(interpreter.model, images, target)[0].detach()


def of_features(interpreter: Any, images: Tensor, target: Tensor) -> Tensor:
    """Return one number a feature, ``(B, F)``, of a method whose features are a 2 x 2 grid."""
    found = attributions(interpreter, images, target)
    return found[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]]


def game(model: nn.Module, image: Tensor, label: int, baseline: float) -> Callable[..., float]:
    """Return the logit of an image of which some of the four quarters are kept."""
    regions = feature_mask(2, tuple(image.shape))

    @torch.no_grad()
    def value(kept: tuple[int, ...]) -> float:
        mask = torch.isin(regions, torch.tensor(kept, dtype=torch.long))
        return model(torch.where(mask, image, baseline)[None])[0, label].item()

    return value


def exact_shapley(value: Callable[..., float], features: int) -> list[float]:
    """Return Shapley values by their definition, a sum over subsets."""
    found = []
    for feature in range(features):
        others = [f for f in range(features) if f != feature]
        total = 0.0
        for size in range(features):
            for kept in itertools.combinations(others, size):
                share = math.factorial(size) * math.factorial(features - size - 1)
                gain = value((*kept, feature)) - value(kept)
                total += share / math.factorial(features) * gain
        found.append(total)
    return found


@pytest.fixture
def wide(smooth: nn.Module) -> tuple[nn.Module, Tensor, Tensor]:
    """A network and three images, in double precision."""
    images, labels = blobs(3, seed=5)
    return smooth, images.double(), labels


class TestShapley:
    @pytest.mark.parametrize(
        ("build", "tolerance"), [(ShapleyValueSampling, 1e-10), (KernelShap, 1e-5)]
    )
    def test_all_subsets_are_exact(
        self, build: Any, tolerance: float, wide: tuple[nn.Module, Tensor, Tensor]
    ) -> None:
        model, images, labels = wide
        found = of_features(build(model, 2, None, 0.3), images, labels)
        for values, image, label in zip(found, images, labels, strict=True):
            exact = values.new_tensor(exact_shapley(game(model, image, label, 0.3), 4))
            assert (values - exact).abs().amax() < tolerance * exact.abs().amax()

    @pytest.mark.parametrize(("build", "samples"), [(ShapleyValueSampling, 300), (KernelShap, 900)])
    def test_sampling_comes_near(
        self, build: Any, samples: int, wide: tuple[nn.Module, Tensor, Tensor]
    ) -> None:
        model, images, labels = wide
        exact = of_features(build(model, 2, None), images, labels)
        error = of_features(build(model, 2, samples), images, labels) - exact
        assert error.norm() < 0.1 * exact.norm()

    @settings(max_examples=10)
    @given(seed=st.integers(0, 1000), samples=st.integers(1, 4), side=st.integers(1, 4))
    def test_they_add_up(self, seed: int, samples: int, side: int) -> None:
        """Whatever the orders, the gains along one of them are the whole gain."""
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        images, target = torch.rand(2, 3, 4, 4).double(), torch.tensor([2, 0])
        mask = feature_mask(side, (3, 4, 4))[0]
        found = attributions(
            ShapleyValueSampling(model, mask, samples, 0.2, seed=seed), images, target
        )
        once = [(mask == feature).nonzero()[0] for feature in range(int(mask.amax()) + 1)]
        total = sum(found[:, 0, row, column] for row, column in once)
        gain = model(images) - model(torch.full_like(images, 0.2))
        torch.testing.assert_close(total, gain.gather(1, target[:, None])[:, 0].detach())

    def test_a_linear_model_is_its_own_explanation(self) -> None:
        """There all methods agree: a feature is worth what it adds, in any company."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).double()
        images, target = torch.rand(2, 3, 4, 4).double(), torch.tensor([1, 2])
        weights = model[1].weight[target].view(2, 3, 4, 4).detach()
        gains = (weights * (images - 0.1)).sum(dim=1)
        expected = gains.view(2, 2, 2, 2, 2).sum(dim=(2, 4)).flatten(1)
        for build, samples in zip(OF_FEATURES, (None, 2, 16, 16), strict=True):
            more = {} if samples is None else {"samples": samples}
            interpreter = build(model, features=2, baseline=0.1, **more)
            found = of_features(interpreter, images, target)
            torch.testing.assert_close(found, expected, msg=build.__name__)


class TestLeastSquares:
    @given(
        count=st.integers(2, 12),
        features=st.integers(1, 6),
        ridge=st.sampled_from([0.0, 0.5]),
        seed=st.integers(0, 1000),
    )
    def test_against_numpy(self, count: int, features: int, ridge: float, seed: int) -> None:
        draw = np.random.default_rng(seed)
        masks = draw.integers(0, 2, (count, features)).astype(float)
        weights, values = draw.uniform(0.1, 2, count), draw.normal(size=count)
        # The intercept goes by centring, then the slopes of least norm: lstsq's.
        root = np.sqrt(weights)[:, None]
        design = root * (masks - np.average(masks, axis=0, weights=weights))
        right = root[:, 0] * (values - np.average(values, weights=weights))
        rows = np.vstack([design, np.sqrt(ridge) * np.eye(features)])
        expected = np.linalg.lstsq(rows, np.append(right, np.zeros(features)))[0]
        matrix = least_squares(torch.tensor(masks), torch.tensor(weights), ridge)
        np.testing.assert_allclose(matrix.numpy() @ values, expected, atol=1e-8)

    def test_slopes_of_a_line_are_found(self) -> None:
        masks = torch.randint(0, 2, (30, 4)).double()
        weights = torch.rand(5, 30).double() + 0.1
        slopes = torch.tensor([1.0, -2.0, 0.0, 3.0]).double()
        found = least_squares(masks, weights) @ (masks @ slopes + 7)
        torch.testing.assert_close(found, slopes.expand(5, 4))

    def test_derivative(self) -> None:
        masks = torch.randint(0, 2, (9, 3)).double()
        weights = (torch.rand(2, 9).double() + 0.2).requires_grad_()
        assert torch.autograd.gradcheck(lambda w: least_squares(masks, w), weights)
        assert torch.autograd.gradcheck(lambda w: least_squares(masks, w, 0.3), weights)

    @pytest.mark.parametrize("distance", ["cosine", "euclidean"])
    @pytest.mark.parametrize("ridge", [0.0, 0.2])
    def test_lime_is_this_fit(
        self, distance: str, ridge: float, wide: tuple[nn.Module, Tensor, Tensor]
    ) -> None:
        """By hand: perturbed images, their distances, NumPy's fit."""
        model, images, labels = wide
        lime = Lime(model, 2, 12, 0.4, seed=3, width=2.0, distance=distance, ridge=ridge)
        found = of_features(lime, images, labels)
        masks = lime._masks(4)
        regions = feature_mask(2, (3, 16, 16))
        for values, image, label in zip(found, images, labels, strict=True):
            perturbed = torch.where(masks[:, regions], image, 0.4)
            apart = (
                1 - nn.functional.cosine_similarity(perturbed.flatten(1), image.flatten()[None])
                if distance == "cosine"
                else (perturbed - image).flatten(1).norm(dim=1)
            )
            root = (-apart.square() / 8).exp().sqrt().numpy()
            scores = model(perturbed)[:, label].detach().numpy()
            design = root[:, None] * np.hstack([np.ones((12, 1)), masks.double().numpy()])
            rows = np.vstack([design, np.sqrt(ridge) * np.eye(5)[1:]])
            fit = np.linalg.lstsq(rows, np.append(root * scores, np.zeros(4)))[0]
            np.testing.assert_allclose(values.numpy(), fit[1:], atol=1e-8)

    def test_kernel_shap_is_this_fit(self, wide: tuple[nn.Module, Tensor, Tensor]) -> None:
        model, images, labels = wide
        shap = KernelShap(model, 2, 11, 0.4, seed=3, endpoint=100.0)
        found = of_features(shap, images, labels)
        masks = shap._masks(4)
        kept = masks.sum(dim=1)
        assert kept[:2].tolist() == [4, 0]
        assert ((kept[2:] > 0) & (kept[2:] < 4)).all()
        root = np.where((kept == 0) | (kept == 4), 10.0, 1.0)
        design = root[:, None] * np.hstack([np.ones((11, 1)), masks.double().numpy()])
        for values, image, label in zip(found, images, labels, strict=True):
            value = game(model, image, label, 0.4)
            scores = [value(tuple(mask.nonzero()[:, 0].tolist())) for mask in masks]
            fit = np.linalg.lstsq(design, root * scores)[0]
            np.testing.assert_allclose(values.numpy(), fit[1:], atol=1e-8)


class TestAblation:
    def test_features(self, wide: tuple[nn.Module, Tensor, Tensor]) -> None:
        model, images, labels = wide
        found = of_features(FeatureAblation(model, 2, 0.3), images, labels)
        for values, image, label in zip(found, images, labels, strict=True):
            value = game(model, image, label, 0.3)
            whole = (0, 1, 2, 3)
            expected = [value(whole) - value(tuple({*whole} - {f})) for f in whole]
            assert values.tolist() == pytest.approx(expected)

    @given(
        window=st.integers(1, 5),
        stride=st.integers(1, 5),
        side=st.integers(5, 9),
        wide=st.booleans(),
    )
    def test_windows(self, window: int, stride: int, side: int, wide: bool) -> None:
        """Pixel by pixel: the mean over the windows on it, of what each takes away."""
        stride = min(stride, window)
        torch.manual_seed(0)
        shape = (2, side, side + wide)
        model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 3), nn.Tanh()).double()
        image = torch.rand(1, *shape).double()
        total, count = torch.zeros(shape[1:]).double(), torch.zeros(shape[1:])
        rows, columns = (
            [*range(0, size - window, stride), -(-(size - window) // stride) * stride]
            for size in shape[1:]
        )
        for row, column in itertools.product(dict.fromkeys(rows), dict.fromkeys(columns)):
            place = (..., slice(row, row + window), slice(column, column + window))
            occluded = image.clone()
            occluded[place] = 0.5
            total[place] += (model(image) - model(occluded))[0, 1].item()
            count[place] += 1
        assert count.all()
        found = attributions(Occlusion(model, window, stride, 0.5), image, torch.tensor([1]))
        torch.testing.assert_close(found[0, 0], total / count)


class TestPerturbations:
    @pytest.mark.parametrize("build", DRAWN)
    def test_fixed_by_the_seed(self, build: Any, model: nn.Module, data: Any) -> None:
        state = torch.get_rng_state()
        first, again, fresh = (build(model, 3, 5, seed=seed)(*data) for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert (first - fresh).abs().amax() > 1e-3
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("chunk", [1, 3, 1000])
    @pytest.mark.parametrize("build", [*OF_FEATURES, Occlusion])
    def test_chunks(self, build: Any, chunk: int, model: nn.Module, data: Any) -> None:
        more = {"samples": 9} if build in DRAWN else {}
        whole, parts = (
            build(model, 3, **more, perturbations_per_eval=c)
            if build is not Occlusion
            else Occlusion(model, 6, 5, perturbations_per_eval=c)
            for c in (None, chunk)
        )
        torch.testing.assert_close(parts(*data), whole(*data), atol=1e-5, rtol=0)

    def test_one_forward_pass_without_repetitions(self, model: nn.Module, data: Any) -> None:
        clone, sizes = copy.deepcopy(model), []
        clone.fc.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
        explanation = KernelShap(clone, 2, 300).explain(*data)
        # Of four features there are 16 subsets; and the images themselves, for the logits.
        assert sizes == [6 * 17]
        torch.testing.assert_close(explanation.logits, model(data[0]), atol=1e-5, rtol=1e-5)
        KernelShap(clone, 2, 300, perturbations_per_eval=4)(*data)
        assert sizes[1:] == [24, 24, 24, 24, 6]

    @pytest.mark.parametrize("build", [FeatureAblation, KernelShap, Occlusion])
    def test_baselines(self, build: Any, model: nn.Module, data: Any) -> None:
        grey, colour = (
            build(model, 4, baseline=baseline)(*data)
            for baseline in (0.3, torch.full((3, 1, 1), 0.3))
        )
        assert torch.equal(grey, colour)
        assert not torch.equal(build(model, 4)(*data), grey)
        with pytest.raises(ValueError, match=r"a baseline for images \(6, 3, 16, 16\), got shape"):
            build(model, 4, baseline=torch.zeros(2, 5))(*data)

    def test_euclidean_weights_have_a_derivative_at_the_image(self, smooth: nn.Module) -> None:
        x = torch.rand(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
        for distance in ("cosine", "euclidean"):
            # Two features: some perturbations replace nothing, and some replace everything.
            mask = torch.arange(6).expand(6, 6) // 3
            lime = Lime(smooth, mask, 16, 0.0, distance=distance, reduce="sum")
            assert {0, 2} <= {*lime._masks(2).sum(dim=1).tolist()}

            def found(x: Tensor, lime: Lime = lime) -> Tensor:
                return 1e3 * lime.attribute(smooth, x, torch.tensor([0, 1]))[0]

            assert torch.autograd.gradcheck(found, x, fast_mode=True)


class TestMask:
    @pytest.mark.parametrize("shape", [(3, 5, 7), (1, 16, 16), (3, 2, 9)])
    @pytest.mark.parametrize("side", [1, 3, 100])
    def test_grid(self, side: int, shape: tuple[int, ...]) -> None:
        mask = feature_mask(side, shape)
        rows, columns = (min(side, n) for n in shape[1:])
        assert mask.shape == (1, *shape[1:])
        assert mask.unique().tolist() == [*range(rows * columns)]
        sizes = mask.unique(return_counts=True)[1]
        assert sizes.amax() <= -(-shape[1] // rows) * -(-shape[2] // columns)

    def test_of_values_and_of_ones_own(self) -> None:
        assert feature_mask(None, (2, 2, 2)).tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
        own = torch.tensor([[3, 3], [4, 5]])
        for mask in (own, own[None], own[None, None]):
            assert feature_mask(mask, (3, 2, 2)).tolist() == [[[0, 0], [1, 2]]]
        columns = torch.tensor([[0, 1]])
        assert feature_mask(columns, (3, 2, 2)).tolist() == [[[0, 1], [0, 1]]]
        channels = torch.arange(3).view(1, 3, 1, 1)
        assert feature_mask(channels, (3, 2, 2))[:, 0, 0].tolist() == [0, 1, 2]

    def test_does_not_fit(self, model: nn.Module, data: Any) -> None:
        with pytest.raises(ValueError, match=r"for images \(3, 16, 16\), got shape \(8, 8\)"):
            FeatureAblation(model, torch.arange(64).view(8, 8))(*data)


class TestInput:
    @pytest.mark.parametrize(
        ("build", "error", "message"),
        [
            (lambda m: FeatureAblation(lambda x: x), TypeError, "model to be a torch.nn.Module"),
            (lambda m: KernelShap(m, 0), ValueError, "expected features at least 1, got 0"),
            (lambda m: KernelShap(m, 2.0), TypeError, "features to be an integer, got float"),
            (lambda m: KernelShap(m, torch.rand(4, 4)), TypeError, "of an integer dtype, got"),
            (lambda m: Lime(m, torch.arange(4)), ValueError, r"mask \(H, W\), .*got shape \(4,\)"),
            (
                lambda m: Lime(m, torch.zeros(2, 3, 4, 4, dtype=torch.long)),
                ValueError,
                "one for all images",
            ),
            (
                lambda m: Lime(m, torch.tensor([[0, 2]])),
                ValueError,
                "every integer from 0 to 2, got 2 of them; use mask.unique",
            ),
            (lambda m: KernelShap(m, samples=0), ValueError, "expected samples at least 1, got 0"),
            (lambda m: Lime(m, samples=None), TypeError, "samples to be an integer, got NoneType"),
            (lambda m: Lime(m, seed=-1), ValueError, "expected seed at least 0"),
            (lambda m: Lime(m, width=0), ValueError, "expected width above 0, got 0"),
            (lambda m: Lime(m, ridge=-1), ValueError, "expected ridge at least 0"),
            (lambda m: Lime(m, distance="l1"), ValueError, "'cosine' or 'euclidean', got 'l1'"),
            (lambda m: KernelShap(m, endpoint=0), ValueError, "expected endpoint at least 1"),
            (lambda m: Occlusion(m, window=0), ValueError, "expected window at least 1, got 0"),
            (lambda m: Occlusion(m, (1, 2, 3, 4)), ValueError, "window to be a number, "),
            (lambda m: Occlusion(m, baseline="grey"), TypeError, "baseline to be a number"),
            (lambda m: Occlusion(m, reduce="mean"), ValueError, "expected reduce to be one of"),
            (
                lambda m: Occlusion(m, perturbations_per_eval=0),
                ValueError,
                "expected perturbations_per_eval at least 1",
            ),
        ],
    )
    def test_of_settings(
        self, build: Any, error: type[Exception], message: str, model: nn.Module
    ) -> None:
        with pytest.raises(error, match=message):
            build(model)

    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (lambda m: Occlusion(m, 17), r"a window within images \(3, 16, 16\), got"),
            (lambda m: Occlusion(m, 4, 5), "strides of at most the window"),
            (lambda m: KernelShap(m, 5, None), "at most 16 features for all subsets, got 25"),
            (lambda m: ShapleyValueSampling(m, 3, None), "at most 7 features for all orders, got"),
        ],
    )
    def test_of_a_call(self, build: Any, message: str, model: nn.Module, data: Any) -> None:
        with pytest.raises(ValueError, match=message):
            build(model)(*data)

    def test_without_a_model(self, model: nn.Module, data: Any) -> None:
        """They explain a function too, by `attribute` alone."""
        nobody = FeatureAblation(None, 2)
        found, logits = nobody.attribute(model, *data)
        assert torch.equal(found, FeatureAblation(model, 2).attribute(model, *data)[0])
        torch.testing.assert_close(logits, model(data[0]), atol=1e-5, rtol=1e-5)
        with pytest.raises(TypeError, match="expected FeatureAblation to have a model, got None"):
            nobody(*data)


def test_an_attack_brings_the_map_nearer(model: nn.Module, data: Any) -> None:
    images, labels = data
    target = (labels + 1) % 4
    interpreter: Interpreter = KernelShap(model, 2, 12)
    reports = []
    for chosen in (None, interpreter):
        attack = ADV2(model, chosen, eps=0.1, alpha=0.02, steps=20)
        attack.set_mode_targeted_by_label(quiet=True)
        reports.append(evaluate(model, interpreter, images, attack(images, target), target))
    regular, both = reports
    assert both.success.all()
    assert both.l1.mean() < 0.5 * regular.l1.mean()

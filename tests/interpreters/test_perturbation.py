# SPDX-License-Identifier: MIT
"""Maps of perturbed images: fits against NumPy's, Shapley values against sums over subsets."""

from __future__ import annotations

import copy
import itertools
import math
from functools import partial
from typing import Any

import captum.attr as ca
import numpy as np
import pytest
import torch
from conftest import blobs
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from captum_adv2 import ADV2, evaluate
from captum_adv2.interpreters import CaptumInterpreter, base
from captum_adv2.interpreters.perturbation import (
    ABLATION,
    SAMPLING,
    SHAPLEY,
    Game,
    attribute,
    grid,
    kernel_shap,
    least_squares,
    lime,
    occlusion,
)

GAMES = {
    "ablation": ABLATION,
    "shapley": SHAPLEY,
    "sampling": SAMPLING,
    "kernel": kernel_shap(1e6),
    "lime": lime(0.5, "cosine", 0.0),
}
Case = tuple[nn.Module, Tensor, Tensor]


@pytest.fixture
def case(smooth: nn.Module) -> Case:
    """A network and three images, in double precision."""
    images, labels = blobs(3, seed=5)
    return smooth, images.double(), labels


def quarters(game: Game, case: Case, **kwargs: Any) -> Tensor:
    """Return the attributions of an image's four quarters, ``(B, 4)``."""
    found = attribute(game, *case, feature_mask=2, **kwargs)[0].detach()
    assert torch.equal(found, found[:, :1].expand_as(found))
    return found[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]]


@torch.no_grad()
def exact_shapley(model: nn.Module, image: Tensor, label: Tensor, baseline: float) -> list[float]:
    """Return the Shapley values of an image's quarters by their definition."""
    regions = grid(2, *image.shape[1:])

    def value(*kept: int) -> float:
        mask = torch.isin(regions, torch.tensor(kept, dtype=torch.long))
        return model(torch.where(mask, image, baseline)[None])[0, label].item()

    found = [0.0] * 4
    for feature, size in itertools.product(range(4), range(4)):
        share = math.factorial(size) * math.factorial(3 - size) / math.factorial(4)
        for kept in itertools.combinations({*range(4)} - {feature}, size):
            found[feature] += share * (value(*kept, feature) - value(*kept))
    return found


class TestShapley:
    def test_over_all_subsets(self, case: Case) -> None:
        found = quarters(SHAPLEY, case, baselines=0.3)
        for values, image, label in zip(found, *case[1:], strict=True):
            exact = exact_shapley(case[0], image, label, 0.3)
            assert values.tolist() == pytest.approx(exact, rel=1e-10)

    @pytest.mark.parametrize(("name", "samples"), [("sampling", 300), ("kernel", 900)])
    def test_sampling_comes_near(self, name: str, samples: int, case: Case) -> None:
        exact = quarters(SHAPLEY, case)
        error = quarters(GAMES[name], case, n_samples=samples) - exact
        assert error.norm() < 0.1 * exact.norm()

    @settings(max_examples=10)
    @given(
        seed=st.integers(0, 1000),
        samples=st.integers(1, 4),
        side=st.integers(1, 3),
        name=st.sampled_from(["shapley", "sampling"]),
    )
    def test_they_add_up(self, seed: int, samples: int, side: int, name: str) -> None:
        """Whatever the orders, the gains along one of them add up to the whole gain."""
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        images, target = torch.rand(2, 3, 4, 4).double(), torch.tensor([2, 0])
        settings = {"n_samples": samples, "baselines": 0.2, "seed": seed}
        found, _ = attribute(GAMES[name], model, images, target, feature_mask=side, **settings)
        cells = grid(side, 4, 4)
        first = [(cells == feature).nonzero()[0] for feature in range(side * side)]
        total = sum(found[:, 0, row, column] for row, column in first)
        gain = model(images) - model(torch.full_like(images, 0.2))
        torch.testing.assert_close(total, gain.gather(1, target[:, None])[:, 0])

    @pytest.mark.parametrize("game", GAMES.values(), ids=GAMES)
    def test_a_linear_model_is_its_own_explanation(self, game: Game) -> None:
        """There all methods agree: a feature is worth what it adds, in any company."""
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).double()
        images, target = torch.rand(2, 3, 4, 4).double(), torch.tensor([1, 2])
        weights = model[1].weight[target].view(2, 3, 4, 4).detach()
        gains = (weights * (images - 0.1)).sum(dim=1)
        expected = gains.view(2, 2, 2, 2, 2).sum(dim=(2, 4)).flatten(1)
        found = quarters(game, (model, images, target), baselines=0.1, n_samples=40)
        torch.testing.assert_close(found, expected)

    def test_too_many_features_for_all_subsets(self, case: Case) -> None:
        with pytest.raises(ValueError, match="at most 16 features .* got 25; pass a feature_mask"):
            attribute(SHAPLEY, *case, feature_mask=5)


class TestLeastSquares:
    @example(count=9, features=1, ridge=0.0, seed=45)  # one feature, which all masks keep
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
        # Centring removes the intercept; lstsq finds the slopes of least norm.
        root = np.sqrt(weights)[:, None]
        design = root * (masks - np.average(masks, axis=0, weights=weights))
        design[:, np.ptp(masks, axis=0) == 0] = 0  # and not what rounding leaves
        right = root[:, 0] * (values - np.average(values, weights=weights))
        rows = np.vstack([design, np.sqrt(ridge) * np.eye(features)])
        expected = np.linalg.lstsq(rows, np.append(right, np.zeros(features)))[0]
        matrix = least_squares(torch.tensor(masks), torch.tensor(weights), ridge)
        np.testing.assert_allclose(matrix.numpy() @ values, expected, atol=1e-8)

    @pytest.mark.parametrize("distance", ["cosine", "euclidean"])
    def test_lime_has_a_derivative_where_nothing_is_replaced(
        self, distance: Any, smooth: nn.Module
    ) -> None:
        x = torch.rand(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
        halves, game = torch.arange(6).expand(6, 6) // 3, lime(0.5, distance, 0.0)
        kept = game.masks(2, 40, torch.Generator().manual_seed(0)).sum(dim=1)
        assert {0, 2} <= {*kept.tolist()}

        def found(x: Tensor) -> Tensor:
            settings = {"feature_mask": halves, "n_samples": 40}
            return 1e3 * attribute(game, smooth, x, torch.tensor([0, 1]), **settings)[0]

        assert torch.autograd.gradcheck(found, x, fast_mode=True)


class TestOcclusion:
    @given(window=st.integers(1, 5), stride=st.integers(1, 5), side=st.integers(5, 9))
    def test_windows(self, window: int, stride: int, side: int) -> None:
        """Pixel by pixel: the mean over the windows on it, of what each takes away."""
        stride = min(stride, window)
        torch.manual_seed(0)
        shape = (2, side, side + 1)
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
        sizes = {"sliding_window_shapes": (2, window, window), "strides": (2, stride, stride)}
        found, _ = occlusion(model, image, torch.tensor([1]), baselines=0.5, **sizes)
        torch.testing.assert_close(found, (total / count).expand(1, *shape))

    def test_windows_that_leave_gaps(self, case: Case) -> None:
        with pytest.raises(ValueError, match=r"windows that cover images, got"):
            occlusion(*case, sliding_window_shapes=(3, 4, 4), strides=5)


OCCLUSION = partial(occlusion, sliding_window_shapes=(3, 6, 6), strides=5)
ALL = {
    name: partial(attribute, game, feature_mask=3, n_samples=9)
    for name, game in GAMES.items()
    if name != "shapley"
}


class TestPerturbations:
    @pytest.mark.parametrize("chunk", [1, 3, 1000])
    @pytest.mark.parametrize("method", [*ALL.values(), OCCLUSION], ids=[*ALL, "occlusion"])
    def test_chunks(self, method: Any, chunk: int, case: Case) -> None:
        whole, parts = (method(*case, perturbations_per_eval=c) for c in (None, chunk))
        torch.testing.assert_close(parts, whole)

    @pytest.mark.parametrize("method", [*ALL.values(), OCCLUSION], ids=[*ALL, "occlusion"])
    def test_a_map_is_made_in_parts(
        self, method: Any, case: Case, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, images, target = case
        results, sizes = [], []
        for numbers in (2**21, 1):  # in one part, and a perturbation at a time
            monkeypatch.setattr(base, "_NUMBERS", numbers)
            leaf = images.clone().requires_grad_()
            values, _ = method(lambda x: sizes.append(len(x)) or model(x), leaf, target)
            results += [values.detach(), torch.autograd.grad(values.square().sum(), leaf)[0]]
        torch.testing.assert_close(results[2:], results[:2])
        assert sizes[0] > sizes[1] == len(images)

    def test_the_model_sees_no_perturbation_twice(self, case: Case) -> None:
        model, sizes = copy.deepcopy(case[0]), []
        model.fc.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
        settings = {"feature_mask": 2, "n_samples": 300}
        _, logits = attribute(kernel_shap(1e6), model, *case[1:], **settings)
        # Of four features there are 16 subsets; and the images themselves, for the logits.
        assert sizes == [3 * 17]
        torch.testing.assert_close(logits, model(case[1]))
        sizes.clear()
        attribute(kernel_shap(1e6), model, *case[1:], perturbations_per_eval=4, **settings)
        assert sizes == [12, 12, 12, 12, 3]


@pytest.mark.parametrize(("height", "width"), [(5, 7), (16, 16), (2, 9)])
@pytest.mark.parametrize("cells", [1, 3, 100])
def test_grid(cells: int, height: int, width: int) -> None:
    mask = grid(cells, height, width)
    rows, columns = (min(cells, n) for n in (height, width))
    assert mask.shape == (height, width)
    assert mask.unique().tolist() == [*range(rows * columns)]
    sizes = mask.unique(return_counts=True)[1]
    assert sizes.amax() <= -(-height // rows) * -(-width // columns)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]),
        (1, [[[0, 0], [0, 0]], [[0, 0], [0, 0]]]),
        (torch.tensor([[3, 3], [4, 5]]), [[[0, 0], [1, 2]], [[0, 0], [1, 2]]]),
        (torch.tensor([[[[0, 1]]]]), [[[0, 1], [0, 1]], [[0, 1], [0, 1]]]),
        (torch.arange(2).view(2, 1, 1), [[[0, 0], [0, 0]], [[1, 1], [1, 1]]]),
    ],
)
def test_features_of_a_mask(mask: Any, expected: list[Any]) -> None:
    """By ablation of a linear model in which each feature is worth its number."""
    features = torch.tensor(expected)
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 2, bias=False)).double()
    size = features.flatten().bincount()[features]
    model[1].weight.data[:] = (features / size).flatten()
    images, target = torch.ones(1, 2, 2, 2).double(), torch.tensor([0])
    found, _ = attribute(ABLATION, model, images, target, feature_mask=mask)
    torch.testing.assert_close(found[0].detach(), features.double())


def test_an_attack_brings_the_map_nearer(model: nn.Module, data: Any) -> None:
    images, labels = data
    target = (labels + 1) % 4
    interpreter = CaptumInterpreter(ca.KernelShap(model), feature_mask=2, n_samples=12)
    reports = []
    for chosen in (None, interpreter):
        attack = ADV2(model, chosen, eps=0.1, alpha=0.02, steps=40)
        attack.set_mode_targeted_by_label(quiet=True)
        reports.append(evaluate(model, interpreter, images, attack(images, target), target))
    regular, both = reports
    assert both.success.all()
    assert both.l1.mean() < 0.5 * regular.l1.mean()

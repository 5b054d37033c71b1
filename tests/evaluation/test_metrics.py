# SPDX-License-Identifier: MIT
"""The measures equal NumPy's, image by image, and know their extremes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from captum_adv2.evaluation.metrics import confidence, interval, iou, l1, l2, success

seeds = st.integers(0, 2**31)
sizes = st.tuples(st.integers(1, 4), st.just(1), st.integers(1, 6), st.integers(1, 6))


def maps(seed: int, size: tuple[int, ...]) -> Tensor:
    """Return maps in [0, 1]; a third of the pixels at either end."""
    raw = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (raw * 3 - 1).clamp(0, 1)


@given(seeds, sizes)
def test_distances_equal_numpy(seed: int, size: tuple[int, ...]) -> None:
    a, b = maps(seed, size), maps(seed + 1, size)
    flat = (a - b).numpy().reshape(size[0], -1)
    pixels = size[2] * size[3]
    assert l1(a, b).shape == l2(a, b).shape == (size[0],)
    np.testing.assert_allclose(l1(a, b), np.linalg.norm(flat, 1, axis=1) / pixels)
    np.testing.assert_allclose(l2(a, b), np.linalg.norm(flat, 2, axis=1) / np.sqrt(pixels))


@given(seeds, sizes)
def test_distances_are_distances(seed: int, size: tuple[int, ...]) -> None:
    a, b, c = (maps(seed + i, size) for i in range(3))
    for distance in (l1, l2):
        assert not distance(a, a).any()
        assert torch.equal(distance(a, b), distance(b, a))
        assert (distance(a, c) <= distance(a, b) + distance(b, c) + 1e-12).all()
        assert ((distance(a, b) >= 0) & (distance(a, b) <= 1)).all()
    assert (l1(a, b) <= l2(a, b) + 1e-12).all()


@given(seeds, sizes, st.floats(0, 1))
def test_iou_equals_numpy(seed: int, size: tuple[int, ...], threshold: float) -> None:
    a, b = maps(seed, size), maps(seed + 1, size)
    expected = []
    for ours, theirs in zip(a.numpy() > threshold, b.numpy() > threshold, strict=True):
        union = np.logical_or(ours, theirs).sum()
        expected.append(np.logical_and(ours, theirs).sum() / union if union else 1.0)
    np.testing.assert_allclose(iou(a, b, threshold), expected, rtol=1e-6)
    assert torch.equal(iou(a, b, threshold), iou(b, a, threshold))
    assert torch.equal(iou(a, a, threshold), torch.ones(size[0]))


def test_iou_at_its_ends() -> None:
    left = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    empty = torch.zeros_like(left)
    assert iou(left, 1 - left).item() == 0
    assert iou(left, empty).item() == 0
    assert iou(empty, empty).item() == 1
    assert iou(left, torch.ones_like(left)).item() == 0.5


def test_iou_threshold_must_be_exceeded() -> None:
    half = torch.full((1, 1, 1, 2), 0.5)
    assert iou(half, torch.ones_like(half)).item() == 0
    assert iou(half, torch.ones_like(half), threshold=0.49).item() == 1


def test_measures_are_per_image() -> None:
    reference = torch.zeros(2, 1, 2, 2)
    values = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    assert l1(values, reference).tolist() == [0, 1]
    assert l2(values, reference).tolist() == [0, 1]
    assert iou(values, reference).tolist() == [1, 0]


@given(seeds, st.integers(1, 5), st.integers(2, 6))
def test_success_and_confidence(seed: int, batch: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(batch, classes, generator=generator, dtype=torch.float64)
    target = torch.randint(classes, (batch,), generator=generator)
    exponentials = np.exp(logits.numpy())
    p = exponentials / exponentials.sum(axis=1, keepdims=True)
    expected = p[np.arange(batch), target.numpy()]
    np.testing.assert_allclose(confidence(logits, target), expected, rtol=1e-9, atol=1e-12)
    reached = success(logits, target)
    assert reached.dtype == torch.bool
    assert reached.tolist() == (p.argmax(axis=1) == target.numpy()).tolist()
    assert success(logits, logits.argmax(dim=1)).all()


@pytest.mark.parametrize("measure", [success, confidence])
def test_targets_go_where_the_logits_are(measure: Any) -> None:
    # A device without numbers, which every machine has.
    logits, target = torch.zeros(2, 3, device="meta"), torch.tensor([0, 1])
    assert measure(logits, target).device == logits.device


MAPS = torch.full((2, 1, 3, 3), 0.5)


class TestBadInput:
    @pytest.mark.parametrize("measure", [l1, l2, iou])
    @pytest.mark.parametrize(
        ("ours", "theirs", "message"),
        [
            (
                MAPS,
                MAPS[:1],
                r"^expected reference of shape \(2, 1, 3, 3\) from the attack, got \(1, 1, 3, 3\);",
            ),
            (MAPS, MAPS[..., :2], r"expected reference of shape .* got \(2, 1, 3, 2\)"),
            (MAPS[:, 0], MAPS[:, 0], "expected maps with 4 dimensions"),
            (MAPS, MAPS * 3, r"expected reference in \[0, 1\], got values in \[1\.5, 1\.5\]"),
            (MAPS - 1, MAPS, r"expected maps in \[0, 1\]"),
            (MAPS, MAPS * torch.nan, "expected finite reference"),
        ],
    )
    def test_values(self, measure: Any, ours: Tensor, theirs: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            measure(ours, theirs)

    @pytest.mark.parametrize("measure", [l1, l2, iou])
    @pytest.mark.parametrize(
        ("ours", "theirs", "message"),
        [
            (MAPS.long(), MAPS, "expected maps of a floating dtype"),
            (MAPS, MAPS.numpy(), r"expected reference to be a torch\.Tensor, got ndarray"),
            (None, MAPS, r"expected maps to be a torch\.Tensor, got NoneType"),
            ([0.5], MAPS, r"expected maps to be a torch\.Tensor, got list"),
        ],
    )
    def test_types(self, measure: Any, ours: Any, theirs: Any, message: str) -> None:
        with pytest.raises(TypeError, match=message):
            measure(ours, theirs)

    @pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
    def test_threshold(self, threshold: float) -> None:
        with pytest.raises(ValueError, match="expected threshold at least 0 and at most 1, got"):
            iou(MAPS, MAPS, threshold)

    @pytest.mark.parametrize("measure", [success, confidence])
    def test_predictions(self, measure: Any) -> None:
        logits = torch.zeros(2, 3)
        with pytest.raises(
            ValueError, match=r"expected target in \[0, 2\], got values in \[0, 3\]"
        ):
            measure(logits, torch.tensor([0, 3]))
        with pytest.raises(ValueError, match=r"expected target of shape \(2,\)"):
            measure(logits, torch.tensor([0]))
        with pytest.raises(TypeError, match="expected target of an integer dtype"):
            measure(logits, torch.tensor([0.0, 1.0]))
        with pytest.raises(ValueError, match="with at least two classes"):
            measure(logits[:, :1], torch.tensor([0, 0]))


class TestInterval:
    @given(seeds, st.integers(1, 40))
    def test_percentiles_of_resampled_means(self, seed: int, count: int) -> None:
        values = torch.rand(count, generator=torch.Generator().manual_seed(seed)).double()
        index = torch.randint(count, (2000, count), generator=torch.Generator().manual_seed(0))
        means = values.numpy()[index.numpy()].mean(axis=1)
        np.testing.assert_allclose(interval(values), np.percentile(means, [2.5, 97.5]), atol=1e-12)
        assert interval(values) == interval(values.numpy())
        low, high = interval(values)
        assert values.min() - 1e-12 <= low <= high <= values.max() + 1e-12

    @given(seeds, st.floats(-5, 5), st.floats(0.1, 5))
    def test_moves_and_scales_with_the_values(self, seed: int, shift: float, scale: float) -> None:
        values = np.random.default_rng(seed).normal(size=30)
        expected = np.array(interval(values)) * scale + shift
        np.testing.assert_allclose(interval(values * scale + shift), expected, atol=1e-9)

    @given(seeds)
    def test_holds_the_mean_and_narrows_with_more_values(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        few, many = random.uniform(size=50), random.uniform(size=800)
        widths = []
        for values in (few, many):
            low, high = interval(values)
            assert low < values.mean() < high
            widths.append(high - low)
            # of a normal mean: 2 * 1.96 standard errors
            error = values.std() / np.sqrt(len(values))
            assert high - low == pytest.approx(3.92 * error, rel=0.2)
        assert widths[1] < widths[0]

    @given(seeds)
    def test_order_matters_no_more_than_chance(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        values = random.uniform(size=200)
        again = interval(random.permutation(values))
        np.testing.assert_allclose(interval(values), again, atol=0.5 * values.std() / 200**0.5)

    @given(seeds, st.floats(0.1, 0.9))
    def test_a_higher_level_is_wider(self, seed: int, level: float) -> None:
        values = np.random.default_rng(seed).uniform(size=20)
        (low, high), (lower, higher) = interval(values, level), interval(values, level + 0.09)
        assert lower <= low <= high <= higher

    def test_a_single_draw_is_a_resampled_mean(self) -> None:
        low, high = interval(torch.tensor([0.0, 1.0, 4.0]), draws=1)
        index = torch.randint(3, (1, 3), generator=torch.Generator().manual_seed(0))
        assert low == high == pytest.approx(np.array([0.0, 1.0, 4.0])[index].mean())

    def test_few_values_and_other_types(self) -> None:
        assert np.isnan(interval(torch.empty(0))).all()
        assert np.isnan(interval(np.empty(0))).all()
        assert np.isnan(interval(np.array([0.5, np.nan]))).all()
        assert interval(torch.tensor([0.25])) == (0.25, 0.25)
        assert interval(np.array([1, 1])) == interval(torch.ones(2).half()) == (1, 1)
        flags = np.array([True, False] * 50)
        assert interval(flags) == interval(flags.astype(float))
        values = torch.rand(10, dtype=torch.float64, requires_grad=True)
        assert interval(values) == interval(values.detach().numpy())

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match=r"expected values of shape \(n,\), got \(2, 2\)"):
            interval(torch.zeros(2, 2))
        with pytest.raises(ValueError, match="^expected level at least 0 and at most 1, got 1.5"):
            interval(torch.zeros(2), level=1.5)
        with pytest.raises(ValueError, match="^expected draws at least 1, got 0"):
            interval(torch.zeros(2), draws=0)

# SPDX-License-Identifier: MIT
"""The measures equal NumPy's, image by image, and know their extremes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import Tensor

from captum_adv2 import SoundnessWarning
from captum_adv2.evaluation.metrics import (
    confidence,
    distances,
    interval,
    iou,
    l1,
    l2,
    success,
    wilson,
)

seeds = st.integers(0, 2**31)
sizes = st.tuples(st.integers(1, 4), st.just(1), st.integers(1, 6), st.integers(1, 6))


def maps(seed: int, size: tuple[int, ...]) -> Tensor:
    """Return maps in [0, 1]; a third of the pixels at either end."""
    raw = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (raw * 3 - 1).clamp(0, 1)


@given(seeds, sizes, st.floats(0, 1))
def test_measures_equal_numpys(seed: int, size: tuple[int, ...], threshold: float) -> None:
    a, b = maps(seed, size), maps(seed + 1, size)
    flat = (a - b).numpy().reshape(size[0], -1)
    pixels = size[2] * size[3]
    overlap = []
    for ours, theirs in zip(a.numpy() > threshold, b.numpy() > threshold, strict=True):
        union = np.logical_or(ours, theirs).sum()
        overlap.append(np.logical_and(ours, theirs).sum() / union if union else 1.0)
    found = distances(a, b, threshold)
    np.testing.assert_allclose(found.l1, np.linalg.norm(flat, 1, axis=1) / pixels)
    np.testing.assert_allclose(found.l2, np.linalg.norm(flat, 2, axis=1) / np.sqrt(pixels))
    np.testing.assert_allclose(found.iou, overlap, rtol=1e-6)
    assert torch.equal(l1(a, b), found.l1)
    assert torch.equal(l2(a, b), found.l2)
    assert torch.equal(iou(a, b, threshold), found.iou)


@given(seeds, sizes)
def test_distances_are_distances(seed: int, size: tuple[int, ...]) -> None:
    a, b, c = (maps(seed + i, size) for i in range(3))
    for distance in (l1, l2):
        assert not distance(a, a).any()
        assert torch.equal(distance(a, b), distance(b, a))
        assert (distance(a, c) <= distance(a, b) + distance(b, c) + 1e-12).all()
        assert ((distance(a, b) >= 0) & (distance(a, b) <= 1)).all()
    assert (l1(a, b) <= l2(a, b) + 1e-12).all()
    assert torch.equal(iou(a, b), iou(b, a))
    assert torch.equal(iou(a, a), torch.ones(size[0]))


def test_iou_of_equal_values_and_of_empty_maps() -> None:
    half, empty = torch.full((1, 1, 1, 2), 0.5), torch.zeros(1, 1, 1, 2)
    assert iou(half, torch.ones_like(half)).item() == 0  # a pixel must exceed the threshold
    assert iou(half, torch.ones_like(half), threshold=0.49).item() == 1
    assert iou(empty, empty).item() == 1


@pytest.mark.parametrize("other", [(1, 1, 3, 3), (2, 1, 3, 2), (2, 2, 3, 3)])
def test_maps_of_other_shapes_are_not_broadcast(other: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected reference of shape \(2, 1, 3, 3\), got"):
        l1(torch.zeros(2, 1, 3, 3), torch.zeros(other))


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


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_logits_that_are_not_finite_are_no_success(bad: float, place: int) -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    logits[0, place] = bad
    for target in (0, 1):
        assert success(logits, torch.tensor([target, 1])).tolist() == [False, True]
    assert success(torch.tensor([[0.0, -torch.inf]]), torch.tensor([0]))  # a class ruled out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_probabilities_warn(dtype: torch.dtype) -> None:
    logits, target = torch.randn(3, 1000), torch.tensor([0, 1, 2])
    for others in (logits, logits.log_softmax(dim=1), logits.sigmoid()):
        confidence(others.to(dtype), target)
    probabilities = logits.softmax(dim=1).to(dtype)
    with pytest.warns(SoundnessWarning, match="rows in .* that sum to 1: probabilities"):
        confidence(probabilities, target)
    probabilities[0] *= 2  # one row is enough to tell
    confidence(probabilities, target)


@pytest.mark.parametrize("measure", [success, confidence])
def test_targets_go_where_the_logits_are(measure: Any) -> None:
    # A device without numbers, which every machine has.
    logits, target = torch.zeros(2, 3, device="meta"), torch.tensor([0, 1])
    assert measure(logits, target).device == logits.device


@pytest.mark.parametrize("measure", [success, confidence])
@pytest.mark.parametrize(
    ("target", "message"),
    [([0, 3], r"expected target in \[0, 2\], got values in \[0, 3\]"), ([0], r"of shape \(2,\)")],
)
def test_targets_must_be_classes(measure: Any, target: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(torch.zeros(2, 3), torch.tensor(target))


class TestInterval:
    @given(seeds)
    def test_is_that_of_a_normal_mean_where_values_are_many(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        for count in (50, 800):
            values = random.uniform(size=count)
            low, high = interval(values)
            assert low < values.mean() < high
            error = values.std() / np.sqrt(count)
            assert high - low == pytest.approx(2 * 1.96 * error, rel=0.2)

    def test_is_between_percentiles_of_all_resamples(self) -> None:
        # All means of three draws from 0, 1, 4; the level cuts between two of them.
        means = np.sort(np.add.outer(np.add.outer([0, 1, 4], [0, 1, 4]), [0, 1, 4]).ravel()) / 3
        low, high = interval(np.array([0.0, 1.0, 4.0]), level=0.8, draws=20_000)
        assert low == pytest.approx(np.quantile(means, 0.1, method="inverted_cdf"))
        assert high == pytest.approx(np.quantile(means, 0.9, method="inverted_cdf"))

    @given(seeds, st.floats(0.1, 0.9))
    def test_a_higher_level_is_wider(self, seed: int, level: float) -> None:
        values = np.random.default_rng(seed).uniform(size=20)
        (low, high), (lower, higher) = interval(values, level), interval(values, level + 0.09)
        assert values.min() <= lower <= low <= high <= higher <= values.max()
        assert interval(values, level) == (low, high)  # from a fixed seed

    def test_few_values_and_other_types(self) -> None:
        assert np.isnan(interval(torch.empty(0))).all()
        assert np.isnan(interval(np.array([0.5, np.nan]))).all()
        assert interval(torch.tensor([0.25])) == (0.25, 0.25)
        assert interval(np.array([1, 1])) == interval(torch.ones(2).bfloat16()) == (1, 1)
        flags = np.array([True, False] * 50)
        assert interval(flags) == interval(flags.astype(float))
        values = torch.rand(10, dtype=torch.float64, requires_grad=True)
        assert interval(values) == interval(values.detach().numpy())
        with pytest.raises(ValueError, match=r"expected values of shape \(n,\), got \(2, 2\)"):
            interval(torch.zeros(2, 2))


class TestWilson:
    @given(st.integers(0, 60), st.integers(0, 60), st.floats(0.5, 0.999))
    def test_it_is_scipys(self, won: int, lost: int, level: float) -> None:
        low, high = wilson(won, won + lost, level)
        if not won + lost:
            assert np.isnan([low, high]).all()
            return
        expected = binomtest(won, won + lost).proportion_ci(level, method="wilson")
        np.testing.assert_allclose((low, high), expected, atol=1e-12)
        assert 0 <= low <= won / (won + lost) <= high <= 1

    def test_extremes(self) -> None:
        assert wilson(1, 2, 1.0) == (0, 1)
        with pytest.raises(ValueError, match="expected at most 2 successes, the count, got 3"):
            wilson(3, 2)

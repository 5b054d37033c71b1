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

from captum_adv2.evaluation.metrics import confidence, iou, l1, l2, success

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


MAPS = torch.full((2, 1, 3, 3), 0.5)


class TestBadInput:
    @pytest.mark.parametrize("measure", [l1, l2, iou])
    @pytest.mark.parametrize(
        ("ours", "theirs", "message"),
        [
            (MAPS, MAPS[:1], r"expected reference of shape \(2, 1, 3, 3\) .* got \(1, 1, 3, 3\)"),
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

# SPDX-License-Identifier: MIT
"""Thresholds keep their rate whatever the scores; the ROC is the rank statistic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from captum_adv2.defenses.detection import Detector, Roc, roc, threshold_at

# Few different values, so that ties are the rule; and any values.
tied = st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0]), min_size=1, max_size=30)
free = st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=30)
scores = (tied | free).map(lambda values: torch.tensor(values))
rates = st.floats(0, 1) | st.integers(0, 20).map(lambda k: k / 20)


class Pixel(Detector):
    """Scores images by two of their pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def scores(self, images: Tensor) -> Tensor:
        self.calls.append(len(images))
        return images[:, 0, 0, :2]


def pictures(first: Tensor, second: Tensor) -> Tensor:
    """Return images whose two scores are given."""
    return torch.stack([first, second], dim=1)[:, None, None, :]


@given(scores, rates)
def test_threshold_keeps_the_rate(benign: Tensor, rate: float) -> None:
    threshold = threshold_at(benign, rate)
    assert (benign > threshold).double().mean() <= rate
    # It is one of the scores, and a lower one would let too many through.
    assert threshold in benign.tolist()
    lower = benign[benign < threshold]
    assert not len(lower) or (benign > lower.max()).double().mean() > rate


@pytest.mark.parametrize(
    ("rate", "threshold"), [(0, 9), (0.09, 9), (0.1, 8), (0.3, 6), (0.99, 0), (1, 0)]
)
def test_threshold_of_ten_scores(rate: float, threshold: float) -> None:
    assert threshold_at(torch.arange(10.0).flip(0), rate) == threshold


@pytest.mark.parametrize("count", [20, 30, 100, 1000])
def test_a_rate_that_is_a_share_is_reached(count: int) -> None:
    for flagged in range(count + 1):
        threshold = threshold_at(torch.arange(float(count)), flagged / count)
        assert count - 1 - threshold == min(flagged, count - 1)


@given(scores, scores)
def test_roc_is_what_counting_gives(benign: Tensor, adversarial: Tensor) -> None:
    fpr, tpr, auc = roc(benign, adversarial)
    values = sorted({*benign.tolist(), *adversarial.tolist()}, reverse=True)
    expected = [
        [np.mean(s.numpy() > value) for value in [*values, -np.inf]] for s in (benign, adversarial)
    ]
    np.testing.assert_allclose([fpr.tolist(), tpr.tolist()], expected)
    # The rank statistic of Mann and Whitney.
    a, b = adversarial.double()[:, None], benign.double()
    np.testing.assert_allclose(auc, ((a > b).double() + 0.5 * (a == b)).mean(), atol=1e-12)


@given(scores, scores)
def test_roc_is_a_curve(benign: Tensor, adversarial: Tensor) -> None:
    curve = roc(benign, adversarial)
    for share in (curve.fpr, curve.tpr):
        assert share[0] == 0
        assert share[-1] == 1
        assert (share.diff() >= 0).all()
    assert 0 <= curve.auc <= 1
    assert roc(adversarial, benign).auc == pytest.approx(1 - curve.auc)
    order = torch.randperm(len(benign))
    assert roc(benign[order], adversarial).auc == curve.auc
    # A monotone function of the scores changes nothing.
    assert roc(benign.double() * 4, adversarial.double() * 4).auc == curve.auc


def test_roc_at_its_ends() -> None:
    low, high = torch.tensor([0.0, 0.1]), torch.tensor([0.2, 0.3, 0.4])
    assert roc(low, high).auc == 1
    assert roc(high, low).auc == 0
    assert roc(low, low).auc == 0.5
    assert roc(torch.ones(3), torch.ones(5)).auc == 0.5
    assert isinstance(roc(low, high), Roc)
    assert roc(low.half(), high.half()).fpr.dtype == torch.float64


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.floats(0, 1, width=32)), min_size=1), rates)
def test_fitted_detector_keeps_the_rate(pairs: list[tuple[float, float]], rate: float) -> None:
    images = pictures(*torch.tensor(pairs).unbind(1))
    detector = Pixel()
    assert detector.fit(images, rate) is detector
    assert detector.detect(images).double().mean() <= rate
    assert (detector.detect_each(images).double().mean(dim=0) <= rate).all()
    joint = images.amax(dim=(1, 2, 3))
    assert detector.threshold == threshold_at(joint, rate)
    assert torch.equal(detector.score(images), joint)
    assert torch.equal(detector.detect(images), joint > detector.threshold)
    assert detector.thresholds == tuple(threshold_at(images[:, 0, 0, i], rate) for i in (0, 1))
    each = torch.stack([images[:, 0, 0, i] > detector.thresholds[i] for i in (0, 1)], dim=1)
    assert torch.equal(detector.detect_each(images), each)


@pytest.mark.parametrize("batch", [1, 3, 7, 100])
def test_batches_change_nothing(batch: int) -> None:
    benign, adversarial = torch.rand(7, 1, 1, 2), torch.rand(5, 1, 1, 2)
    detector = Pixel().fit(benign, 0.2, batch=batch)
    assert sum(detector.calls) == 7
    assert max(detector.calls) == min(batch, 7)
    assert detector.thresholds == Pixel().fit(benign, 0.2).thresholds
    expected = roc(Pixel().score(benign), Pixel().score(adversarial))
    found = Pixel().roc(benign, adversarial, batch=batch)
    assert found.auc == expected.auc
    assert torch.equal(found.fpr, expected.fpr)


def test_fitting_again_replaces_the_thresholds() -> None:
    detector = Pixel().fit(torch.zeros(3, 1, 1, 2))
    assert detector.fit(torch.ones(3, 1, 1, 2)).threshold == 1


class TestBadInput:
    @pytest.mark.parametrize(
        ("bad", "error", "message"),
        [
            ([0.5], TypeError, r"expected benign to be a torch\.Tensor, got list"),
            (torch.tensor([1]), TypeError, "expected benign of a floating dtype, got torch.int64"),
            (torch.rand(2, 2), ValueError, r"benign to be scores of shape \(n,\).* got \(2, 2\)"),
            (torch.rand(0), ValueError, r"benign to be scores of shape \(n,\).* got \(0,\)"),
            (torch.tensor([torch.nan]), ValueError, "expected finite scores of benign, got NaN"),
            (torch.tensor([torch.inf]), ValueError, "expected finite scores of benign"),
        ],
    )
    def test_scores(self, bad: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            roc(bad, torch.rand(2))
        with pytest.raises(error, match=message.replace("benign", "adversarial")):
            roc(torch.rand(2), bad)
        with pytest.raises(error, match=message):
            threshold_at(bad, 0.05)

    @pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
    def test_rate(self, rate: float) -> None:
        message = "expected rate at least 0 and at most 1"
        with pytest.raises(ValueError, match=message):
            threshold_at(torch.rand(2), rate)
        detector = Pixel()
        with pytest.raises(ValueError, match=message):
            detector.fit(torch.rand(2, 1, 1, 2), rate)
        assert not detector.calls

    def test_images_and_batch(self) -> None:
        detector, good = Pixel(), torch.rand(2, 1, 1, 2)
        with pytest.raises(ValueError, match="expected images with 4 dimensions"):
            detector.fit(good[0])
        with pytest.raises(ValueError, match=r"expected images in \[0, 1\]"):
            detector.fit(good * 3)
        with pytest.raises(ValueError, match="expected batch at least 1, got 0"):
            detector.fit(good, batch=0)
        with pytest.raises(TypeError, match=r"expected adversarial to be a torch\.Tensor"):
            detector.roc(good, None)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"expected benign in \[0, 1\]"):
            detector.roc(good + 2, good)
        assert not detector.calls

    @pytest.mark.parametrize("use", ["detect", "detect_each"])
    def test_unfitted(self, use: str) -> None:
        detector = Pixel()
        with pytest.raises(ValueError, match=r"expected a fitted Pixel, .*; call fit\(images\)"):
            getattr(detector, use)(torch.rand(2, 1, 1, 2))
        assert not detector.calls
        for name in ("threshold", "thresholds"):
            with pytest.raises(ValueError, match="expected a fitted Pixel"):
                getattr(detector, name)

    def test_scores_that_are_not_numbers_are_not_benign(self) -> None:
        class Broken(Detector):
            def scores(self, images: Tensor) -> Tensor:
                return torch.full((len(images), 2), torch.nan)

        detector, images = Broken(), torch.rand(2, 1, 1, 2)
        with pytest.raises(ValueError, match="expected finite scores of images"):
            detector.fit(images)
        detector._fitted = (0.5, 0.5, 0.5)
        for use in (detector.detect, detector.detect_each):
            with pytest.raises(ValueError, match="expected finite scores of images"):
                use(images)

    def test_the_base_is_abstract(self) -> None:
        with pytest.raises(TypeError, match="abstract"):
            Detector()  # type: ignore[abstract]

# SPDX-License-Identifier: MIT
"""Thresholds and ROC curves against counting; detectors keep their false-positive rate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from captum_adv2.defenses.detection import Detector, roc, threshold_at

# Few different values, so that ties are the rule; and any values.
tied = st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0]), min_size=1, max_size=30)
free = st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=30)
scores = (tied | free).map(torch.tensor)
rates = st.floats(0, 1) | st.integers(0, 20).map(lambda k: k / 20)


class Pixel(Detector):
    """Scores images by two of their pixels; notes how many at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def scores(self, images: Tensor) -> Tensor:
        self.calls.append(len(images))
        return images[:, 0, 0, :2]


@given(scores, rates)
def test_threshold_keeps_the_rate(benign: Tensor, rate: float) -> None:
    threshold = threshold_at(benign, rate)
    assert (benign > threshold).double().mean() <= rate
    # It is one of the scores, and a lower one would let too many through.
    assert threshold in benign.tolist()
    lower = benign[benign < threshold]
    assert not len(lower) or (benign > lower.max()).double().mean() > rate


@pytest.mark.parametrize("count", [10, 30, 1000])
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


def test_roc_at_its_ends() -> None:
    low, high = torch.tensor([0.0, 0.1]), torch.tensor([0.2, 0.3, 0.4])
    assert roc(low, high).auc == 1
    assert roc(high, low).auc == 0
    assert roc(torch.ones(3), torch.ones(5)).auc == 0.5
    assert roc(low.half(), high.half()).fpr.dtype == torch.float64


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.floats(0, 1, width=32)), min_size=1), rates)
def test_a_fitted_detector_keeps_the_rate(pairs: list[tuple[float, float]], rate: float) -> None:
    both = torch.tensor(pairs)
    images, joint, detector = both[:, None, None, :], both.amax(dim=1), Pixel()
    assert detector.fit(images, rate) is detector
    assert detector.threshold == threshold_at(joint, rate)
    assert detector.thresholds == tuple(threshold_at(part, rate) for part in both.unbind(1))
    assert torch.equal(detector.score(images), joint)
    assert torch.equal(detector.detect(images), joint > detector.threshold)
    assert torch.equal(detector.detect_each(images), both > torch.tensor(detector.thresholds))
    assert detector.detect(images).double().mean() <= rate
    assert (detector.detect_each(images).double().mean(dim=0) <= rate).all()


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


@pytest.mark.parametrize("use", ["detect", "detect_each"])
def test_a_detector_must_be_fitted(use: str) -> None:
    detector = Pixel()
    with pytest.raises(ValueError, match=r"expected a fitted Pixel, .*; call fit\(images\)"):
        getattr(detector, use)(torch.rand(2, 1, 1, 2))
    assert not detector.calls


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scores_must_be_finite(bad: float) -> None:
    class Broken(Detector):
        def scores(self, images: Tensor) -> Tensor:
            return torch.where(images[:, 0, 0, :2] > 0.5, bad, 0.0)

    good, broken = torch.zeros(2, 1, 1, 2), torch.ones(2, 1, 1, 2)
    detector = Broken().fit(good)
    for use in (detector.detect, detector.detect_each, detector.fit):
        with pytest.raises(ValueError, match="expected finite scores of images"):
            use(broken)
    with pytest.raises(ValueError, match="expected finite scores of adversarial"):
        detector.roc(good, broken)
    with pytest.raises(ValueError, match="expected finite scores of benign"):
        threshold_at(torch.tensor([0.0, bad]), 0.05)

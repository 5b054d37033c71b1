# SPDX-License-Identifier: MIT
"""Detectors of adversarial images: a score, a threshold fitted on benign images, and the ROC."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, NamedTuple, Self, TypeAlias

import torch
from torch import Tensor

from captum_adv2.spec import Array, Count, Images, Unit, checked

Scores: TypeAlias = Annotated[Tensor, Array(1)]


class Roc(NamedTuple):
    """How well a score separates adversarial images from benign ones, over all thresholds.

    Attributes:
        fpr: Share of benign images flagged at each threshold, float64 ``(n,)``, from 0 up to 1.
        tpr: Share of adversarial images flagged at the same thresholds, ``(n,)``.
        auc: Area under the curve, the chance that an adversarial image scores above a benign one; a
            tie counts a half.
    """

    fpr: Tensor
    tpr: Tensor
    auc: float


@checked
def roc(benign: Scores, adversarial: Scores) -> Roc:
    """Return the ROC curve of finite scores ``(m,)`` of benign, ``(n,)`` of adversarial images.

    An image is flagged if it scores above a threshold; equal scores are one point of the curve.

    >>> roc(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0])).auc
    0.875
    """
    benign, adversarial = _sorted(benign, "benign"), _sorted(adversarial, "adversarial")
    thresholds = torch.unique(torch.cat([benign, adversarial]))
    curves = []
    for scores in (benign, adversarial):
        above = len(scores) - torch.searchsorted(scores, thresholds, right=True)
        share = above.double() / len(scores)
        curves.append(torch.cat([share.flip(0), share.new_ones(1)]))  # strictest first
    fpr, tpr = curves
    return Roc(fpr, tpr, float(torch.trapezoid(tpr, fpr)))


@checked
def threshold_at(benign: Scores, rate: Unit) -> float:
    """Return the lowest of finite scores ``(m,)`` that at most a share ``rate`` of them exceed.

    >>> threshold_at(torch.tensor([4.0, 1.0, 3.0, 2.0]), 0.25)
    3.0
    """
    scores = _sorted(benign, "benign")
    count = len(scores)
    allowed = int(rate * count) + 1
    while allowed / count > rate:  # as the share is computed, so that rounding cannot break it
        allowed -= 1
    return float(scores[max(count - 1 - allowed, 0)])


class Detector(ABC):
    """Flags images whose score exceeds a threshold, which is set on benign images.

    A subclass implements `scores`, with one score for each part of the detector, such as a
    squeezer, and calls ``super().__init__()``. The joint score is the largest.
    """

    def __init__(self) -> None:
        self._fitted: tuple[float, ...] | None = None  # joint, then each part

    @abstractmethod
    def scores(self, images: Tensor) -> Tensor:
        """Return the score of each part on images ``(B, C, H, W)``, unchecked, ``(B, n)``."""

    @checked
    def score(self, images: Images) -> Tensor:
        """Return the joint score, the largest of the parts', ``(B,)``."""
        return self.scores(images).amax(dim=1)

    @checked
    def fit(self, images: Images, rate: Unit = 0.05, batch: Count = 32) -> Self:
        """Set the thresholds on benign images ``(N, C, H, W)``; return the detector.

        At most a share ``rate`` of the images scores above the joint threshold, and as many above
        that of each part by itself; ``batch`` images are scored at a time.
        """
        scores = self._over(images, batch, "images")
        columns = (scores.amax(dim=1), *scores.unbind(dim=1))
        self._fitted = tuple(threshold_at(column, rate) for column in columns)
        return self

    @property
    def threshold(self) -> float:
        """The joint threshold."""
        return self._expect_fitted()[0]

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The threshold of each part by itself."""
        return self._expect_fitted()[1:]

    @checked
    def detect(self, images: Images) -> Tensor:
        """Return whether the joint score exceeds its threshold, bool ``(B,)``."""
        threshold = self.threshold
        return _expect_finite(self.scores(images), "images").amax(dim=1) > threshold

    @checked
    def detect_each(self, images: Images) -> Tensor:
        """Return whether each part's score exceeds the part's own threshold, bool ``(B, n)``."""
        thresholds = self.thresholds
        scores = _expect_finite(self.scores(images), "images")
        return scores > scores.new_tensor(thresholds)

    @checked
    def roc(self, benign: Images, adversarial: Images, batch: Count = 32) -> Roc:
        """Return the ROC curve of the joint score on images ``(N, C, H, W)``; needs no `fit`."""
        scores = self._over(benign, batch, "benign"), self._over(adversarial, batch, "adversarial")
        return roc(*(each.amax(dim=1) for each in scores))

    def _over(self, images: Tensor, batch: int, name: str) -> Tensor:
        """Return the parts' scores of many images ``(N, n)``."""
        scores = [self.scores(chunk) for chunk in torch.split(images, batch)]
        return _expect_finite(torch.cat(scores), name)

    def _expect_fitted(self) -> tuple[float, ...]:
        if self._fitted is None:
            raise ValueError(
                f"expected a fitted {type(self).__name__}, got one without thresholds; "
                "call fit(images) with benign images first"
            )
        return self._fitted


def _expect_finite(scores: Tensor, name: str) -> Tensor:
    if not scores.isfinite().all():
        raise ValueError(
            f"expected finite scores of {name}, got NaN or infinity; look at the model's logits"
        )
    return scores


def _sorted(scores: Tensor, name: str) -> Tensor:
    """Return finite scores ``(n,)`` in ascending order, float64 on the CPU."""
    return _expect_finite(scores.detach().cpu().double(), name).sort().values

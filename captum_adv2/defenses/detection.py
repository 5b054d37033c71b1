# SPDX-License-Identifier: MIT
"""Detectors of adversarial images: a score, a threshold fitted on benign images, and the ROC."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, Self, final

import torch
from torch import Tensor

from captum_adv2.checks import expect_images, expect_integer, expect_number

__all__ = ["Detector", "Roc", "roc", "threshold_at"]


class Roc(NamedTuple):
    """How a score tells adversarial images from benign ones, over all thresholds.

    Attributes:
        fpr: Share of benign images flagged at each threshold, float64 ``(n,)``, from 0 up to 1.
        tpr: Share of adversarial images flagged at the same thresholds, ``(n,)``.
        auc: Area under the curve, in [0, 1]: the chance that an adversarial image scores above a
            benign one, a tie counting a half.
    """

    fpr: Tensor
    tpr: Tensor
    auc: float


def roc(benign: Tensor, adversarial: Tensor) -> Roc:
    """Return the ROC curve of scores, an image being flagged if it scores above a threshold.

    Equal scores are one point of the curve, so that their order does not matter.

    Args:
        benign: Scores of benign images ``(m,)``.
        adversarial: Scores of adversarial images ``(n,)``.

    Raises:
        TypeError: Not tensors of a floating dtype.
        ValueError: Not one dimension, empty, or not finite.

    >>> roc(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0])).auc
    0.875
    """
    curves = []
    benign, adversarial = _sorted(benign, "benign"), _sorted(adversarial, "adversarial")
    thresholds = torch.unique(torch.cat([benign, adversarial]))
    for scores in (benign, adversarial):
        above = len(scores) - torch.searchsorted(scores, thresholds, right=True)
        share = above.double() / len(scores)
        curves.append(torch.cat([share.flip(0), share.new_ones(1)]))  # strictest first
    fpr, tpr = curves
    return Roc(fpr, tpr, float(torch.trapezoid(tpr, fpr)))


def threshold_at(benign: Tensor, rate: float) -> float:
    """Return the lowest score of a benign image that at most a share ``rate`` of them exceed.

    Args:
        benign: Scores of benign images ``(m,)``.
        rate: False-positive rate in [0, 1].

    Raises:
        TypeError: Scores that are not a tensor of a floating dtype, a rate that is no number.
        ValueError: Scores without one dimension, empty or not finite, a rate outside [0, 1].

    >>> threshold_at(torch.tensor([4.0, 1.0, 3.0, 2.0]), 0.25)
    3.0
    """
    rate = expect_number(rate, "rate", low=0.0, high=1.0)
    scores = _sorted(benign, "benign")
    count = len(scores)
    allowed = int(rate * count) + 1
    while allowed / count > rate:  # as the share is computed, so that rounding cannot break it
        allowed -= 1
    return float(scores[max(count - 1 - allowed, 0)])


class Detector(ABC):
    """Flags images whose score exceeds a threshold, which benign images set.

    Subclasses fill in `scores`, one for each part of the detector: a part is the squeezer, or the
    pair of interpreters, that may give an image away. The joint score is the largest. Call
    ``super().__init__()``. Subclasses are final.
    """

    def __init__(self) -> None:
        self._fitted: tuple[float, ...] | None = None  # joint, then each part

    @abstractmethod
    def scores(self, images: Tensor) -> Tensor:
        """Return the score of each part on images ``(B, C, H, W)``, ``(B, n)``."""

    @final
    def score(self, images: Tensor) -> Tensor:
        """Return the joint score, the largest of the parts', ``(B,)``."""
        return self.scores(images).amax(dim=1)

    @final
    def fit(self, images: Tensor, rate: float = 0.05, batch: int = 32) -> Self:
        """Set the thresholds by benign images; return the detector.

        At most a share ``rate`` of these images scores above the joint threshold; and the same
        holds for the threshold of each part, for use by itself.

        Args:
            images: Benign images ``(N, C, H, W)`` in [0, 1]; with fewer than ``1 / rate`` of them
                none may be flagged, and the largest score is the threshold.
            rate: False-positive rate in [0, 1].
            batch: How many images to score at a time.

        Raises:
            TypeError: Something of a wrong type.
            ValueError: A number out of range, bad images, scores that are not finite.
        """
        expect_number(rate, "rate", low=0.0, high=1.0)
        scores = self._over(images, batch, "images")
        columns = (scores.amax(dim=1), *scores.unbind(dim=1))
        self._fitted = tuple(threshold_at(column, rate) for column in columns)
        return self

    @property
    def threshold(self) -> float:
        """The joint threshold; ``ValueError`` before `fit`."""
        return self._expect_fitted()[0]

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The threshold of each part by itself; ``ValueError`` before `fit`."""
        return self._expect_fitted()[1:]

    @final
    def detect(self, images: Tensor) -> Tensor:
        """Return whether the joint score exceeds its threshold, bool ``(B,)``.

        Raises:
            ValueError: Not fitted, bad images, or scores that are not finite.
        """
        threshold = self.threshold
        return _expect_finite(self.score(images), "images") > threshold

    @final
    def detect_each(self, images: Tensor) -> Tensor:
        """Return whether each part's score exceeds the part's own threshold, bool ``(B, n)``.

        Raises:
            ValueError: Not fitted, bad images, or scores that are not finite.
        """
        thresholds = self.thresholds
        scores = _expect_finite(self.scores(images), "images")
        return scores > scores.new_tensor(thresholds)

    @final
    def roc(self, benign: Tensor, adversarial: Tensor, batch: int = 32) -> Roc:
        """Return the ROC curve of the joint score; needs no `fit`.

        Args:
            benign: Images ``(N, C, H, W)`` in [0, 1].
            adversarial: Images ``(M, C, H, W)`` in [0, 1].
            batch: How many images to score at a time.
        """
        expect_images(adversarial, "adversarial")
        scores = [
            self._over(images, batch, name).amax(dim=1)
            for images, name in ((benign, "benign"), (adversarial, "adversarial"))
        ]
        return roc(*scores)

    def _over(self, images: Tensor, batch: int, name: str) -> Tensor:
        """Return the parts' scores of many images ``(N, n)``."""
        expect_integer(batch, "batch", low=1)
        expect_images(images, name)
        scores = [self.scores(chunk) for chunk in torch.split(images, batch)]
        return _expect_finite(torch.cat(scores), name)

    def _expect_fitted(self) -> tuple[float, ...]:
        if self._fitted is None:
            raise ValueError(
                f"expected a fitted {type(self).__name__}, got one without threshold; "
                "call fit(images) with benign images first"
            )
        return self._fitted


def _expect_finite(scores: Tensor, name: str) -> Tensor:
    if not scores.isfinite().all():
        raise ValueError(
            f"expected finite scores of {name}, got NaN or infinite values; "
            "look at the model's logits on them"
        )
    return scores


def _sorted(scores: Tensor, name: str) -> Tensor:
    """Return scores ``(n,)`` in ascending order, float64 on the CPU, if they are scores."""
    if not isinstance(scores, Tensor):
        raise TypeError(f"expected {name} to be a torch.Tensor, got {type(scores).__name__}")
    if not scores.is_floating_point():
        raise TypeError(f"expected {name} of a floating dtype, got {scores.dtype}")
    if scores.ndim != 1 or not len(scores):
        raise ValueError(
            f"expected {name} to be scores of shape (n,), one an image, got {tuple(scores.shape)}"
        )
    return _expect_finite(scores.detach().cpu().double(), name).sort().values

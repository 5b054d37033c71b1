# SPDX-License-Identifier: MIT
r"""Distances of attribution maps, and success of an attack on the prediction (§4).

Every measure is per image, ``(B,)``, at the maps' native resolution: L1 is
:math:`\|m - m_0\|_1 / (h w)`, L2 is :math:`\|m - m_0\|_2 / \sqrt{h w}`. The paper does not say how
it binarises maps for IoU; here a pixel belongs to the object where its value exceeds ``threshold``.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from captum_adv2 import spec
from captum_adv2.attacks.loop import classified
from captum_adv2.interpreters.gradient import probability
from captum_adv2.spec import (
    Classes,
    Count,
    Fraction,
    Index,
    Logits,
    Maps,
    NonNegative,
    Unit,
    checked,
)


class Distances(NamedTuple):
    """The measures of two batches of maps, each ``(B,)`` in [0, 1]."""

    l1: Tensor
    l2: Tensor
    iou: Tensor


@checked
def distances(maps: Maps, reference: Maps, threshold: Fraction = 0.5) -> Distances:
    """Return `l1`, `l2` and `iou` of maps ``(B, 1, h, w)``.

    >>> tuple(distances(torch.tensor([[[[0.5, 1.0]]]]), torch.tensor([[[[0.0, 0.5]]]])))
    (tensor([0.5000]), tensor([0.5000]), tensor([0.]))
    """
    spec.expect_shape(reference, maps.shape, "reference")
    pixels = (1, 2, 3)
    change = maps - reference
    ours, theirs = maps > threshold, reference > threshold
    both, either = (ours & theirs).sum(dim=pixels), (ours | theirs).sum(dim=pixels)
    return Distances(
        l1=change.abs().mean(dim=pixels),
        l2=change.square().mean(dim=pixels).sqrt(),
        iou=torch.where(either > 0, both / either.clamp(min=1), 1.0),
    )


def l1(maps: Maps, reference: Maps) -> Tensor:
    """Return the mean absolute difference of maps ``(B, 1, h, w)``, in [0, 1], ``(B,)``."""
    return distances(maps, reference).l1


def l2(maps: Maps, reference: Maps) -> Tensor:
    """Return the root mean square difference of maps ``(B, 1, h, w)``, in [0, 1], ``(B,)``."""
    return distances(maps, reference).l2


def iou(maps: Maps, reference: Maps, threshold: Fraction = 0.5) -> Tensor:
    """Return the intersection over union of maps ``(B, 1, h, w)``, in [0, 1], ``(B,)``.

    It is of the pixels above the threshold; two maps without any have an IoU of 1.
    """
    return distances(maps, reference, threshold).iou


@checked
def success(logits: Logits, target: Classes) -> Tensor:
    """Return whether each image is classified as its target, bool ``(B,)``.

    An image whose logits have NaN or infinity in them has no class; -infinity rules a class out.

    >>> success(torch.tensor([[0.0, 1.0], [0.0, torch.nan]]), torch.tensor([1, 1])).tolist()
    [True, False]
    """
    spec.expect_classes(target, logits, "target")
    return classified(logits, target.to(logits.device).long())


@checked
def confidence(logits: Logits, target: Classes) -> Tensor:
    """Return the probability of each image's target class, in [0, 1], ``(B,)``.

    >>> confidence(torch.tensor([[0.0, 0.0]]), torch.tensor([1])).tolist()
    [0.5]
    """
    spec.expect_classes(target, logits, "target")
    return probability(logits, target.to(logits.device).long())


@checked
def interval(
    values: Tensor | np.ndarray[Any, Any], level: Unit = 0.95, draws: Count = 2000
) -> tuple[float, float]:
    """Return the bootstrap interval of the mean of values ``(n,)``, of any dtype; NaN of none.

    It holds a share ``level`` of the means of resampled values, which are drawn from a fixed seed.

    >>> interval(torch.tensor([0.5, 0.5, 0.5])), interval(torch.empty(0))
    ((0.5, 0.5), (nan, nan))
    """
    if isinstance(values, Tensor):
        spec.expect_dense(values, "values")
    elif not (isinstance(values, np.ndarray) and values.dtype.kind in "biuf"):
        got = getattr(values, "dtype", type(values).__name__)
        raise TypeError(f"expected values to be a torch.Tensor or an array of numbers, got {got}")
    sample = torch.as_tensor(values).detach().double().cpu().numpy()
    if sample.ndim != 1:
        raise ValueError(f"expected values of shape (n,), got {sample.shape}")
    if not len(sample):
        return math.nan, math.nan
    # Unlike scipy.stats.bootstrap, this takes a single value and equal ones.
    means = np.random.default_rng(0).choice(sample, (draws, len(sample))).mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@checked
def wilson(successes: NonNegative, count: Index, level: Unit = 0.95) -> tuple[float, float]:
    """Return Wilson's interval of a rate, which does not shrink to a point where all succeed.

    Successes may be fractions, such as one half of an image that one of two attacks fooled.

    >>> [round(end, 3) for end in wilson(6, 6)], wilson(0, 0)
    ([0.61, 1.0], (nan, nan))

    Reference: Wilson, Probable Inference, JASA 1927.
    """
    if successes > count:
        raise ValueError(f"expected at most {count} successes, the count, got {successes}")
    if not count:
        return math.nan, math.nan
    if level == 1:
        return 0.0, 1.0
    z, rate = NormalDist().inv_cdf((1 + level) / 2), successes / count
    middle = rate + z**2 / (2 * count)
    half = z * math.sqrt(rate * (1 - rate) / count + (z / (2 * count)) ** 2)
    low, high = ((middle + side * half) / (1 + z**2 / count) for side in (-1, 1))
    return min(low, rate) if successes else 0.0, max(high, rate) if successes < count else 1.0

# SPDX-License-Identifier: MIT
r"""How much two sets of maps differ, and whether an attack on the prediction succeeded (§4).

Every measure is per image, ``(B,)``, at the maps' native resolution: L1 is
:math:`\|m - m_0\|_1 / (h w)`, L2 is :math:`\|m - m_0\|_2 / \sqrt{h w}`. The paper does not say how
it binarises maps for IoU; here a pixel belongs to the object where its value exceeds ``threshold``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from captum_adv2.checks import (
    expect_integer,
    expect_labels,
    expect_logits,
    expect_maps,
    expect_number,
)
from captum_adv2.interpreters.gradient import probability

__all__ = ["confidence", "interval", "iou", "l1", "l2", "success"]


def l1(maps: Tensor, reference: Tensor) -> Tensor:
    """Return the mean absolute difference of maps ``(B, 1, h, w)``, in [0, 1], ``(B,)``.

    >>> l1(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.5)).tolist()
    [0.5]
    """
    return _difference(maps, reference).abs().mean(dim=(1, 2, 3))


def l2(maps: Tensor, reference: Tensor) -> Tensor:
    """Return the root mean square difference of maps ``(B, 1, h, w)``, in [0, 1], ``(B,)``.

    >>> l2(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.5)).tolist()
    [0.5]
    """
    return _difference(maps, reference).square().mean(dim=(1, 2, 3)).sqrt()


def iou(maps: Tensor, reference: Tensor, threshold: float = 0.5) -> Tensor:
    """Return the intersection over union of the pixels above a threshold, in [0, 1], ``(B,)``.

    Two maps without any such pixel are alike: 1.

    Args:
        maps: ``(B, 1, h, w)`` in [0, 1].
        reference: ``(B, 1, h, w)`` in [0, 1].
        threshold: Value in [0, 1] that a pixel must exceed.

    >>> iou(torch.tensor([[[[1.0, 1.0]]]]), torch.tensor([[[[1.0, 0.0]]]])).tolist()
    [0.5]
    """
    expect_number(threshold, "threshold", low=0.0, high=1.0)
    _difference(maps, reference)
    ours, theirs = maps > threshold, reference > threshold
    both = (ours & theirs).sum(dim=(1, 2, 3))
    either = (ours | theirs).sum(dim=(1, 2, 3))
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def success(logits: Tensor, target: Tensor) -> Tensor:
    """Return whether each image is classified as its target, bool ``(B,)``.

    >>> success(torch.tensor([[0.0, 1.0]]), torch.tensor([1])).tolist()
    [True]
    """
    logits = expect_logits(logits, len(logits))
    target = expect_labels(target, len(logits), logits.shape[1], name="target")
    return logits.argmax(dim=1) == target.to(logits.device)


def confidence(logits: Tensor, target: Tensor) -> Tensor:
    """Return the probability of each image's target class, in [0, 1], ``(B,)``.

    >>> confidence(torch.tensor([[0.0, 0.0]]), torch.tensor([1])).tolist()
    [0.5]
    """
    logits = expect_logits(logits, len(logits))
    target = expect_labels(target, len(logits), logits.shape[1], name="target")
    return probability(logits, target.to(logits.device))


def interval(
    values: Tensor | npt.NDArray[Any], level: float = 0.95, draws: int = 2000
) -> tuple[float, float]:
    """Return the bootstrap interval of a mean (percentiles), from a seed of its own.

    Args:
        values: ``(n,)``, of any dtype; NaN twice where there are none.
        level: Share of the resampled means that are inside, in [0, 1].
        draws: How many times to resample.

    Raises:
        TypeError: Something of a wrong type.
        ValueError: A number out of range, or values without one dimension.

    >>> interval(torch.tensor([0.5, 0.5, 0.5])), interval(torch.empty(0))
    ((0.5, 0.5), (nan, nan))
    """
    level = expect_number(level, "level", low=0.0, high=1.0)
    draws = expect_integer(draws, "draws", low=1)
    try:
        values = torch.as_tensor(values).detach().cpu()
    except RuntimeError:  # whatever torch has no dtype for
        raise TypeError(f"expected values to be numbers, got {type(values).__name__}") from None
    if values.ndim != 1:
        raise ValueError(f"expected values of shape (n,), got {tuple(values.shape)}")
    if not len(values):
        return math.nan, math.nan
    if values.dtype not in (torch.float32, torch.float64):  # the only ones with quantiles
        values = values.double()
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(values), (draws, len(values)), generator=generator)
    means = values[index].mean(dim=1)
    return means.quantile((1 - level) / 2).item(), means.quantile((1 + level) / 2).item()


def _difference(maps: Tensor, reference: Tensor) -> Tensor:
    """Return ``maps - reference`` of two checked batches of maps."""
    shape = tuple(expect_maps(maps, None, "the attack", "maps").shape)
    return maps - expect_maps(reference, shape, "the attack", "reference")

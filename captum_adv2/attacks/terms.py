# SPDX-License-Identifier: MIT
"""The terms of the attacker's loss (Eq. 3), per image, and their schedules.

Every term returns ``(B,)``. Losses are summed over the batch only where a gradient is taken, so
that attacking a batch equals attacking its images one by one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_adv2.spec import Index, NonNegative, Real, Unit, checked, doubt

Schedule: TypeAlias = Callable[[float], float]
"""Maps the progress of an attack, in [0, 1], to a value."""


class Candidate(NamedTuple):
    """One iterate of an attack, as every term sees it.

    Images ``(B, C, H, W)``, the model's logits ``(B, classes)`` and the surrogate's maps
    ``(B, J, h, w)``, one channel for each step it looks ahead; target classes ``(B,)`` and target
    maps ``(B, 1, h, w)``; the share of the attack that is done, in [0, 1]; and the indices ``(B,)``
    of the images in the attacked batch, ``None`` for all of them.
    """

    images: Tensor
    logits: Tensor
    maps: Tensor
    target: Tensor
    target_maps: Tensor
    progress: float
    rows: Tensor | None = None


class Term(Protocol):
    """A summand of the attacker's loss, per image."""

    def __call__(self, candidate: Candidate, /) -> Tensor:
        """Return the loss ``(B,)`` of a candidate."""


def total(terms: tuple[Term, ...], candidate: Candidate) -> Tensor:
    """Return the sum ``(B,)`` of terms; refuse a term that is not one loss for each image."""
    losses = torch.zeros_like(candidate.images[:, 0, 0, 0])
    for term in terms:
        loss = term(candidate)
        if loss.shape != losses.shape:
            raise ValueError(
                f"expected one loss for each image, shape {tuple(losses.shape)}, from {term!r}, "
                f"got {tuple(loss.shape)}; do not reduce over the batch"
            )
        losses = losses + loss
    return losses


@checked
@dataclass(frozen=True)
class Linear:
    """A schedule that changes linearly from ``first`` to ``last``.

    >>> Linear(5.0, 10.0)(0.5)
    7.5
    """

    first: Real
    last: Real

    def __call__(self, progress: float) -> float:
        """Return the value at ``progress`` in [0, 1]."""
        return self.first + (self.last - self.first) * progress


@checked
@dataclass(frozen=True)
class Stages:
    """A schedule that holds each value for a share of the attack.

    Args:
        values: The values, in order.
        lengths: The length of each stage, in any unit.

    >>> [Stages((1.0, 2.0), (300, 100))(progress) for progress in (0.0, 0.7, 0.8)]
    [1.0, 1.0, 2.0]
    """

    values: tuple[Real, ...]
    lengths: tuple[NonNegative, ...]

    def __call__(self, progress: float) -> float:
        """Return the value at ``progress`` in [0, 1]."""
        stages = list(zip(self.values, self.lengths, strict=True))  # a list: strict at once
        end, whole = 0.0, sum(self.lengths)
        for value, length in stages:
            end += length
            if progress < end / whole:
                return value
        return self.values[-1]


def at(value: float | Schedule, progress: float) -> float:
    """Return a number, or a schedule's value at ``progress``."""
    return value(progress) if callable(value) else value


@checked
@dataclass(frozen=True)
class CrossEntropy:
    """Cross entropy to the target class with label smoothing (§3.6): the prediction loss.

    The target class gets probability ``1 - rho / 2``, the mean of the paper's uniform draw from
    (1 - rho, 1); the other classes share the rest. With a seed it is such a draw: a new one at each
    step, the same for the whole batch. ``rho = 0`` is plain cross entropy.

    Args:
        rho: Amount of smoothing, or its schedule.
        seed: Draw uniformly, from this seed and the progress of the attack.
    """

    rho: Unit | Schedule = Linear(0.05, 0.01)
    seed: Index | None = None

    def __call__(self, candidate: Candidate) -> Tensor:
        """Return the loss ``(B,)``."""
        loss = F.cross_entropy(candidate.logits, candidate.target, reduction="none")
        rho = at(self.rho, candidate.progress)
        if rho == 0:
            return loss
        draw = 0.5
        if self.seed is not None:  # a function of the progress: a run can be repeated exactly
            draw = random.Random(f"{self.seed}:{candidate.progress}").random()
        log_p = candidate.logits.log_softmax(dim=1)
        others = (-log_p.sum(dim=1) - loss) / (log_p.shape[1] - 1)
        return (1 - rho * draw) * loss + rho * draw * others


@dataclass(frozen=True)
class Margin:
    """The largest other logit minus the target's (Carlini & Wagner, S&P 2017)."""

    def __call__(self, candidate: Candidate) -> Tensor:
        """Return the loss ``(B,)``."""
        index = candidate.target[:, None]
        others = candidate.logits.scatter(1, index, -torch.inf).amax(dim=1)
        return others - candidate.logits.gather(1, index)[:, 0]


@checked
@dataclass(frozen=True)
class MapDistance:
    """Distance of the attribution map to the target map: the interpretation loss.

    Squared L2 distance (Eq. 3) plus a share of the L1 distance, by which attacks are judged: its
    gradient does not vanish as the maps come near, and fewer steps are needed.

    Args:
        weight: lambda of Eq. 3, or its schedule.
        reduction: ``"mean"`` over the map's pixels, so that one weight suits every resolution, or
            ``"sum"``, as Eq. 3 has it.
        l1: Weight of the L1 distance, relative to the squared L2 distance; 0 is Eq. 3.
        shape: Share of the distance that is measured after the best affine function of the map.
            Min-max scaling depends on two pixels only; this share does not depend on the map's
            scale and offset. 0 is Eq. 3.
        gate: Power of the target class's probability by which the weight is multiplied, without a
            gradient of its own. At 30 the map counts little below a probability of 0.9: the class
            comes first, and one weight suits near and far target maps. 0 is Eq. 3.
        map_size: Height and width of the maps that the weight was chosen for; an attack on maps of
            another size begins with a `SoundnessWarning`.
    """

    weight: NonNegative | Schedule = 150.0
    reduction: Literal["mean", "sum"] = "mean"
    l1: NonNegative = 0.1
    shape: Unit = 0.5
    gate: NonNegative = 0.0
    map_size: tuple[int, int] | None = None

    def __call__(self, candidate: Candidate) -> Tensor:
        """Return the loss ``(B,)``, summed over the look-ahead steps where there are several."""
        size = tuple(candidate.maps.shape[-2:])
        if candidate.progress == 0 and self.map_size not in (None, size):
            doubt(
                f"the weight of the map term was chosen for maps of size {self.map_size}, got "
                f"{size}: prediction and map are balanced differently"
            )
        raw = _distance(candidate.maps - candidate.target_maps, self.l1)
        shape = _distance(_misfit(candidate.maps, candidate.target_maps), self.l1)
        distance = ((1 - self.shape) * raw + self.shape * shape).sum(dim=1).flatten(1)  # (B, h w)
        distance = distance.sum(dim=1) if self.reduction == "sum" else distance.mean(dim=1)
        distance = at(self.weight, candidate.progress) * distance
        if self.gate == 0:
            return distance
        missing = F.cross_entropy(candidate.logits.detach(), candidate.target, reduction="none")
        return (-self.gate * missing).exp() * distance


def _distance(change: Tensor, l1: float) -> Tensor:
    return change.square() + l1 * change.abs()


def _misfit(maps: Tensor, target_maps: Tensor) -> Tensor:
    """Return target maps minus the best affine function of the maps, by least squares."""
    ours, theirs = (m - m.mean(dim=(2, 3), keepdim=True) for m in (maps, target_maps))
    power = ours.square().sum(dim=(2, 3), keepdim=True)
    match = (ours * theirs).sum(dim=(2, 3), keepdim=True)
    return theirs - ours * match / torch.where(power > 0, power, torch.ones_like(power))

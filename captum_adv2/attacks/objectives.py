# SPDX-License-Identifier: MIT
r"""The attacker's loss, per image: prediction and interpretation (Eq. 3), and extra terms.

.. math:: \ell_{adv}(x) = \ell_{prd}(f(x), c_t) + \lambda \, \ell_{int}(g(x; f), m_t)

Everything here returns ``(B,)``; losses are summed over the batch only where a gradient is taken,
so that attacking a batch equals attacking its images one by one.
"""

from __future__ import annotations

import math
import random
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_adv2.checks import SoundnessWarning, expect_integer, expect_number
from captum_adv2.types import Candidate, Schedule

__all__ = ["CrossEntropy", "Linear", "MapDistance", "Margin", "Stages", "at"]


def at(value: float | Schedule, progress: float) -> float:
    """Return a number, or a schedule's value at ``progress`` in [0, 1].

    >>> at(3.0, 0.5), at(Linear(0.0, 1.0), 0.5)
    (3.0, 0.5)
    """
    return value(progress) if callable(value) else value


@dataclass(frozen=True)
class Linear:
    """A schedule that goes straight from ``first`` to ``last``.

    Raises:
        TypeError: A number of a wrong type.
        ValueError: A number that is not finite.

    >>> Linear(5.0, 10.0)(0.5)
    7.5
    """

    first: float
    last: float

    def __post_init__(self) -> None:
        """Check the ends."""
        for name in ("first", "last"):
            expect_number(getattr(self, name), name, low=-math.inf)

    def __call__(self, progress: float) -> float:
        """Return the value at ``progress`` in [0, 1]."""
        return self.first + (self.last - self.first) * progress


@dataclass(frozen=True)
class Stages:
    """A schedule that holds each value for its share of the attack.

    Args:
        values: The values, in order.
        lengths: How long each is held, in any unit.

    Raises:
        TypeError: Something of a wrong type.
        ValueError: A number out of range, or not a length for each value.

    >>> [Stages((1.0, 2.0), (300, 100))(progress) for progress in (0.0, 0.7, 0.8)]
    [1.0, 1.0, 2.0]
    """

    values: tuple[float, ...]
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check values and lengths."""
        for name, low in (("values", -math.inf), ("lengths", 0.0)):
            given = getattr(self, name)
            if not isinstance(given, tuple | list):
                raise TypeError(f"expected {name} to be a tuple, got {type(given).__name__}")
            for number in given:
                expect_number(number, name, low=low, above=True)
        if len(self.values) != len(self.lengths) or not self.values:
            raise ValueError(
                f"expected a length for each value, at least one, got {len(self.lengths)} for "
                f"{len(self.values)}"
            )

    def __call__(self, progress: float) -> float:
        """Return the value at ``progress`` in [0, 1]."""
        end, total = 0, sum(self.lengths)
        for value, length in zip(self.values, self.lengths, strict=True):
            end += length
            if progress < end / total:
                return value
        return self.values[-1]


@dataclass(frozen=True)
class CrossEntropy:
    """Cross entropy to the target class with label smoothing (§3.6): the prediction loss.

    The target class gets probability ``1 - rho / 2``, the mean of the paper's uniform draw from
    (1 - rho, 1); the other classes share the rest. With a seed it is such a draw, one an iteration,
    shared by the batch. ``rho = 0`` is plain cross entropy.

    Args:
        rho: Amount of smoothing in [0, 1], or its schedule.
        seed: Draw uniformly, from this seed and the progress of the attack.

    Raises:
        TypeError: Something of a wrong type.
        ValueError: ``rho`` outside [0, 1].
    """

    rho: float | Schedule = Linear(0.05, 0.01)
    seed: int | None = None

    def __post_init__(self) -> None:
        """Check the range of rho at both ends of the attack."""
        for progress in (0.0, 1.0):
            expect_number(at(self.rho, progress), "rho", low=0.0, high=1.0)
        if self.seed is not None:
            expect_integer(self.seed, "seed", low=0)

    def __call__(self, candidate: Candidate) -> Tensor:
        """Return the loss ``(B,)``."""
        loss = F.cross_entropy(candidate.logits, candidate.target, reduction="none")
        rho = at(self.rho, candidate.progress)
        if rho == 0:
            return loss
        draw = 0.5 if self.seed is None else _uniform(self.seed, candidate.progress)
        log_p = candidate.logits.log_softmax(dim=1)
        others = (-log_p.sum(dim=1) - loss) / (log_p.shape[1] - 1)
        return (1 - rho * draw) * loss + rho * draw * others


@dataclass(frozen=True)
class Margin:
    """The largest other logit less the target's: negative once the class is reached.

    >>> logits = torch.tensor([[1.0, 4.0, 2.0]])
    >>> maps = torch.zeros(1, 1, 1, 1)
    >>> target = torch.tensor([1])
    >>> Margin()(Candidate(maps, logits, maps, target, maps, 0.0)).tolist()
    [-2.0]

    Reference: Carlini & Wagner, Towards Evaluating the Robustness of Neural Networks, S&P 2017.
    """

    def __call__(self, candidate: Candidate) -> Tensor:
        """Return the loss ``(B,)``."""
        index = candidate.target[:, None]
        others = candidate.logits.scatter(1, index, -torch.inf).amax(dim=1)
        return others - candidate.logits.gather(1, index)[:, 0]


def _uniform(seed: int, progress: float) -> float:
    # Without state, so that a run gives the same bytes when it is repeated.
    return random.Random(f"{seed}:{progress}").random()


@dataclass(frozen=True)
class MapDistance:
    """Distance of the attribution map to the target map: the interpretation loss.

    Squared L2 distance (Eq. 3) plus a share of the L1 distance, the measure attacks are judged by:
    its gradient does not fade as the maps come near, and fewer steps are needed.

    Args:
        weight: lambda of Eq. 3, or its schedule.
        reduction: ``"mean"`` over the map's pixels, so that one weight suits every resolution, or
            ``"sum"``, as Eq. 3 has it.
        l1: Weight of the L1 distance, relative to the squared L2 distance; 0 is Eq. 3.
        shape: Share, in [0, 1], of the distance that is measured after the best affine function of
            the map. Scaling a map to [0, 1] hangs it on two pixels; this looks past them. 0 is
            Eq. 3.
        map_size: Height and width of the maps that the weight was chosen for; an attack on maps of
            another size begins with a `SoundnessWarning`.

    Raises:
        ValueError: A negative weight or an unknown reduction.
    """

    weight: float | Schedule = 150.0
    reduction: Literal["mean", "sum"] = "mean"
    l1: float = 0.1
    shape: float = 0.5
    map_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Check the weights, at both ends of the attack, and the reduction."""
        expect_number(self.l1, "l1", low=0.0)
        expect_number(self.shape, "shape", low=0.0, high=1.0)
        for progress in (0.0, 1.0):
            expect_number(at(self.weight, progress), "weight", low=0.0)
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"expected reduction 'mean' or 'sum', got {self.reduction!r}")

    def __call__(self, candidate: Candidate) -> Tensor:
        """Return the loss ``(B,)``, summed over the look-ahead steps where there are several."""
        size = tuple(candidate.maps.shape[-2:])
        if candidate.progress == 0 and self.map_size not in (None, size):
            warnings.warn(
                f"the weight of the map term belongs to maps of size {self.map_size}, these are "
                f"{size}: prediction and map are balanced differently",
                SoundnessWarning,
                stacklevel=2,
            )
        raw = _distance(candidate.maps - candidate.target_maps, self.l1)
        shape = _distance(_misfit(candidate.maps, candidate.target_maps), self.l1)
        distance = ((1 - self.shape) * raw + self.shape * shape).sum(dim=1).flatten(1)  # (B, h w)
        distance = distance.sum(dim=1) if self.reduction == "sum" else distance.mean(dim=1)
        return at(self.weight, candidate.progress) * distance


def _distance(change: Tensor, l1: float) -> Tensor:
    return change.square() + l1 * change.abs()


def _misfit(maps: Tensor, target_maps: Tensor) -> Tensor:
    """Return what is left of target maps after the best affine function of the maps."""
    ours, theirs = (m - m.mean(dim=(2, 3), keepdim=True) for m in (maps, target_maps))
    power = ours.square().sum(dim=(2, 3), keepdim=True)
    match = (ours * theirs).sum(dim=(2, 3), keepdim=True)
    return theirs - ours * match / torch.where(power > 0, power, torch.ones_like(power))

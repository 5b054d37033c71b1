# SPDX-License-Identifier: MIT
r"""Several interpreters as one, and how far they disagree (§5 Q3, Defense 1).

Interpreters look at different aspects of a network, and an attack on one rarely carries over to the
others (Table 9). The ensemble's map is their weighted mean,

.. math:: g(x) = \sum_k w_k \, g_k(x), \qquad \sum_k w_k = 1,

at one resolution; where they disagree, an image may have been made to fool some of them. An
attacker who knows attacks the ensemble: it is an interpreter like any other, whose surrogate is its
members', advanced together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Self, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_adv2.interpreters.base import Explanation, Interpreter, Surrogate, min_max
from captum_adv2.spec import Count, NonNegative, checked


@final
@dataclass(frozen=True)
class Together(Surrogate):
    """The surrogates of an ensemble's members; the state is a tuple of theirs."""

    def init(self, ensemble: Any, images: Tensor, target: Tensor) -> Any:
        """Return the members' states to start from."""
        return tuple(g.surrogate.init(g, images, target) for g in ensemble.interpreters)

    def advance(self, ensemble: Any, images: Tensor, state: Any, progress: float) -> Any:
        """Advance each member's state."""
        members = zip(ensemble.interpreters, state, strict=True)
        return tuple(g.surrogate.advance(g, images, own, progress) for g, own in members)

    def __call__(self, ensemble: Any, images: Tensor, state: Any, progress: float) -> Explanation:
        """Return the joint explanation; penalties add up."""
        members = zip(ensemble.interpreters, state, strict=True)
        parts = [g.surrogate(g, images, own, progress) for g, own in members]
        joint: Explanation = ensemble.join(parts)
        return joint


@final
class Ensemble(Interpreter):
    """The weighted mean of several interpreters' maps: a holistic view (§5 Q3, Defense 1).

    Convention:
        Members' maps as they are (some min-max scaled, some raw), resized to the finest member's
        resolution (bilinear; to a lower ``size``, averaged over areas), and averaged: in [0, 1],
        not scaled again.

    Logits are the first member's that has them, so the model runs as often as the members run it.
    An attack sees the mean. One that is also to pass for agreement adds `disagreement`, which is
    differentiable where the members' maps are, as a term of its loss.

    Args:
        interpreters: Two or more, built on the same model.
        weights: Of each member, at least 0, in any unit; default: equal.
        size: Height and width of the map, or one number for both; default: the finest member's.

    Attributes:
        interpreters: The members.
        weights: Their weights, which add up to 1.

    >>> from captum_adv2.interpreters import CAM, Gradient
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ...                       nn.Linear(4, 3))
    >>> ensemble = Ensemble([CAM(model), Gradient(model)])
    >>> images, target = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    >>> ensemble(images, target).shape, ensemble.disagreement(images, target).shape
    (torch.Size([2, 1, 6, 6]), torch.Size([2]))
    """

    scaled = False
    surrogate = Together()

    @checked
    def __init__(
        self,
        interpreters: Sequence[Interpreter],
        weights: Sequence[NonNegative] | None = None,
        size: Count | tuple[Count, Count] | None = None,
    ) -> None:
        if len(interpreters) < 2:
            raise ValueError(f"expected two interpreters or more, got {len(interpreters)}")
        self.interpreters = tuple(interpreters)
        super().__init__(_common_model(self.interpreters))
        self.weights = _shares(weights, len(self.interpreters))
        self.size = (size, size) if isinstance(size, int) else size

    def __repr__(self) -> str:
        return f"Ensemble({', '.join(map(repr, self.interpreters))})"

    def explain(self, images: Tensor, target: Tensor) -> Explanation:
        """See `Interpreter.explain`."""
        return self.join([member.explain(images, target) for member in self.interpreters])

    def after(self, preprocess: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy whose members explain the model on ``preprocess(images)``."""
        clone = super().after(preprocess)
        clone.interpreters = tuple(member.after(preprocess) for member in self.interpreters)
        return clone

    def maps(self, images: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        """Return each member's maps ``(B, 1, h, w)``, at its own resolution.

        Args:
            images: ``(B, C, H, W)``, floating, in [0, 1].
            target: Class to explain, one an image, ``(B,)`` integer.
        """
        return tuple(member(images, target) for member in self.interpreters)

    def disagreement(self, images: Tensor, target: Tensor) -> Tensor:
        """Return how far the members' maps are apart, in [0, 1], ``(B,)``.

        The mean, over the pairs of members, of the L1 distance of their maps, each min-max scaled
        and then resized as for the ensemble's map. Weights do not count.

        Args:
            images: ``(B, C, H, W)``, floating, in [0, 1].
            target: Class to explain, one an image, ``(B,)`` integer.
        """
        # In this order: resized, a constant map would have rounding errors to be scaled up.
        alike = self._resized([min_max(maps) for maps in self.maps(images, target)])
        apart = [(a - b).abs().mean(dim=(1, 2, 3)) for a, b in combinations(alike, 2)]
        return torch.stack(apart).mean(dim=0)

    def join(self, explanations: Sequence[Explanation]) -> Explanation:
        """Return one explanation from the members': the mean map, shared logits, all penalties.

        Where members look ahead, the others, and those that see less far, stay at their last map.
        """
        maps = self._resized([explanation.maps for explanation in explanations])
        steps = torch.arange(max(m.shape[1] for m in maps))
        weighted = [
            weight * m[:, steps.clamp(max=m.shape[1] - 1)]
            for weight, m in zip(self.weights, maps, strict=True)
        ]
        logits = [e.logits for e in explanations if e.logits is not None]
        penalties = [e.penalty for e in explanations if e.penalty is not None]
        return Explanation(
            torch.stack(weighted).sum(dim=0),
            logits[0] if logits else None,
            torch.stack(penalties).sum(dim=0) if penalties else None,
        )

    def _resized(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return maps at one resolution."""
        height = max(m.shape[2] for m in maps)
        width = max(m.shape[3] for m in maps)
        return [_resize(m, self.size or (height, width)) for m in maps]


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps at a size: bilinear on the way up, averaged over areas on the way down."""
    # Not interpolate's antialiasing: on a CPU it goes wrong at width 1 (seen in PyTorch 2.15).
    height, width = (min(sides) for sides in zip(maps.shape[2:], size, strict=True))
    if (height, width) != maps.shape[2:]:
        maps = F.adaptive_avg_pool2d(maps, (height, width))
    if (height, width) != size:
        maps = F.interpolate(maps, size, mode="bilinear", align_corners=False)
    return maps


def _common_model(members: tuple[Interpreter, ...]) -> nn.Module | None:
    """Return the model that members explain; one that cannot tell its model goes with any."""
    known = [member.model for member in members if member.model is not None]
    for model in known:
        if model is not known[0]:
            raise ValueError(
                "expected interpreters of the same model, got ones built on a "
                f"{type(known[0]).__name__} and on another {type(model).__name__}; build all on "
                "the same object"
            )
    return known[0] if known else None


def _shares(weights: Sequence[float] | None, members: int) -> tuple[float, ...]:
    """Return weights that add up to 1."""
    given = (1.0,) * members if weights is None else tuple(weights)
    if len(given) != members or sum(given) <= 0:
        raise ValueError(
            f"expected {members} weights, one for each interpreter, with a positive sum, got "
            f"{given}"
        )
    return tuple(weight / sum(given) for weight in given)

# SPDX-License-Identifier: MIT
r"""An ensemble of interpreters, and the disagreement of its members (§5 Q3, Defense 1).

Interpreters look at different aspects of a network, and an attack on one rarely transfers to the
others (Table 9). The ensemble's map is the weighted mean of theirs,

.. math:: g(x) = \sum_k w_k \, g_k(x), \qquad \sum_k w_k = 1,

at one resolution. Disagreement is evidence of an image made to fool some of them. An attacker who
knows of the defense attacks the ensemble, which is an interpreter like any other; its surrogate
combines those of its members.
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
    """The surrogates of an ensemble's members; the state is a tuple of their states."""

    needs = "interpreters"

    def init(self, ensemble: Ensemble, images: Tensor, target: Tensor) -> Any:
        """See `Surrogate.init`."""
        return tuple(g.surrogate.init(g, images, target) for g in ensemble.interpreters)

    def advance(self, ensemble: Ensemble, images: Tensor, state: Any, progress: float) -> Any:
        """See `Surrogate.advance`."""
        members = zip(ensemble.interpreters, state, strict=True)
        return tuple(g.surrogate.advance(g, images, own, progress) for g, own in members)

    def __call__(
        self, ensemble: Ensemble, images: Tensor, state: Any, progress: float
    ) -> Explanation:
        """Return the joint explanation of the members."""
        members = zip(ensemble.interpreters, state, strict=True)
        parts = [g.surrogate(g, images, own, progress) for g, own in members]
        return ensemble.join(parts)


@final
class Ensemble(Interpreter):
    """The weighted mean of several interpreters' maps (§5 Q3, Defense 1).

    Convention:
        Members' maps as they are (some min-max scaled, some raw), resized to the finest member's
        resolution (bilinear; to a lower ``size``, averaged over areas), and averaged: in [0, 1],
        not scaled again.

    Logits are those of the first member that shares its own, so the model runs only as often as
    the members run it. An attack sees the mean; to make the members agree as well, add
    `disagreement`, which is differentiable where the members' maps are, to the terms of its loss.

    Args:
        interpreters: Two or more, built on the same model.
        weights: Weight of each member, in any unit; default: equal. As an attribute they sum to 1.
        size: Height and width of the map, or one number for both; default: the finest member's.

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
        given = (1.0,) * len(interpreters) if weights is None else tuple(weights)
        if len(given) != len(interpreters) or sum(given) <= 0:
            wanted = f"{len(interpreters)} weights, one an interpreter, with a positive sum"
            raise ValueError(f"expected {wanted}, got {given}")
        self.weights = tuple(weight / sum(given) for weight in given)
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
        """Return each member's maps ``(B, 1, h, w)``, at its own resolution."""
        return tuple(member(images, target) for member in self.interpreters)

    def disagreement(self, images: Tensor, target: Tensor) -> Tensor:
        """Return the disagreement of the members' maps, in [0, 1], ``(B,)``.

        It is the mean, over the pairs of members, of the L1 distance of their maps, each min-max
        scaled and then resized as for the ensemble's map. Weights have no influence.
        """
        # Scaled first: min-max would blow up the rounding errors of a resized constant map.
        scaled = self._resized([min_max(maps) for maps in self.maps(images, target)])
        distances = [(a - b).abs().mean(dim=(1, 2, 3)) for a, b in combinations(scaled, 2)]
        return torch.stack(distances).mean(dim=0)

    def join(self, explanations: Sequence[Explanation]) -> Explanation:
        """Return one explanation of the members': the mean map, shared logits, summed penalties.

        Members that look fewer steps ahead than others keep their last map.
        """
        maps = self._resized([explanation.maps for explanation in explanations])
        steps = max(m.shape[1] for m in maps)
        alike = [torch.cat([m, *[m[:, -1:]] * (steps - m.shape[1])], dim=1) for m in maps]
        weighted = [weight * m for weight, m in zip(self.weights, alike, strict=True)]
        logits = [e.logits for e in explanations if e.logits is not None]
        penalties = [e.penalty for e in explanations if e.penalty is not None]
        return Explanation(
            torch.stack(weighted).sum(dim=0),
            logits[0] if logits else None,
            torch.stack(penalties).sum(dim=0) if penalties else None,
        )

    def _resized(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return resized(maps, self.size)


def resized(maps: Sequence[Tensor], size: tuple[int, int] | None = None) -> list[Tensor]:
    """Return maps ``(B, k, h, w)`` of several interpreters at one size; default: the finest's."""
    height = max(m.shape[2] for m in maps)
    width = max(m.shape[3] for m in maps)
    return [_resize(m, size or (height, width)) for m in maps]


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps at a size: bilinear on the way up, averaged over areas on the way down."""
    # Not by interpolate's antialiasing, which is wrong on a CPU at width 1 (PyTorch 2.15).
    height, width = (min(sides) for sides in zip(maps.shape[2:], size, strict=True))
    if (height, width) != maps.shape[2:]:
        maps = F.adaptive_avg_pool2d(maps, (height, width))
    if (height, width) != size:
        maps = F.interpolate(maps, size, mode="bilinear")
    return maps


def _common_model(members: tuple[Interpreter, ...]) -> nn.Module | None:
    """Return the model that members explain; members of an unknown model fit any."""
    known = [member.model for member in members if member.model is not None]
    for model in known:
        if model is not known[0]:
            got = f"a {type(known[0]).__name__} and another {type(model).__name__}"
            hint = "build all on the same object"
            raise ValueError(f"expected interpreters of the same model, got {got}; {hint}")
    return known[0] if known else None

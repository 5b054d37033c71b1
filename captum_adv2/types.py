# SPDX-License-Identifier: MIT
"""What flows through the package: small tuples, and the shapes of the callables users may pass.

Shapes, everywhere: images ``(B, C, H, W)`` float in [0, 1]; classes ``(B,)`` long; maps
``(B, 1, h, w)`` float in [0, 1] with 1 = important; every loss and metric ``(B,)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from torch import Tensor

if TYPE_CHECKING:
    from captum_adv2.interpreters.base import Interpreter, Surrogate

__all__ = ["Candidate", "Explanation", "Schedule", "SurrogateFactory", "TargetMap", "Term"]

Schedule: TypeAlias = Callable[[float], float]
"""Progress of the attack in [0, 1] to a value, for example a step size."""


SurrogateFactory: TypeAlias = "Callable[[Any, Tensor, Tensor], Surrogate]"
"""Interpreter, images and target to what an attacker differentiates in the interpreter's place."""


class Explanation(NamedTuple):
    """What an interpreter says of a batch, and what the model said in the same forward pass.

    Attributes:
        maps: Attribution maps ``(B, 1, h, w)`` in [0, 1].
        logits: The model's output ``(B, classes)`` on the very images explained, or ``None``
            where the interpreter has no forward pass of them to share.
        penalty: What else an attack on this interpreter should make small, ``(B,)``, or ``None``.
    """

    maps: Tensor
    logits: Tensor | None
    penalty: Tensor | None = None


class Candidate(NamedTuple):
    """One iterate of an attack, as every loss term sees it.

    Attributes:
        images: The iterate ``(B, C, H, W)``.
        logits: The model's output on it ``(B, classes)``.
        maps: The surrogate's attribution maps ``(B, J, h, w)``: one channel, or one for each
            look-ahead step of a surrogate that looks ahead.
        target: Class the attacker wants ``(B,)``.
        target_maps: Maps the attacker wants ``(B, 1, h, w)``.
        progress: Share of the attack that is done, in [0, 1].
        rows: Which images of the attacked batch these are ``(B,)``, or ``None`` for all of them, in
            order; some may have left, being finished. What a term holds for each image it looks up
            here.
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


class TargetMap(Protocol):
    """Chooses the maps an attack aims at."""

    def __call__(
        self, interpreter: Interpreter, images: Tensor, labels: Tensor, target: Tensor, /
    ) -> Tensor:
        """Return maps ``(B, 1, h, w)`` at the interpreter's native resolution.

        Args:
            interpreter: The interpreter under attack.
            images: Clean images ``(B, C, H, W)``.
            labels: Each image's own class, as the model sees it ``(B,)``.
            target: The attacker's class ``(B,)``.
        """

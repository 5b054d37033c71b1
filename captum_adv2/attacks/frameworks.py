# SPDX-License-Identifier: MIT
r"""Attack frameworks: what an attacker may change, and by how much.

A framework owns a *variable* that the attack optimises, turns it into an image, and keeps it legal.
`LinfBall` perturbs pixels: the variable is the image itself, and a move is projected onto
:math:`\{x : \|x - x_0\|_\infty \le \epsilon\} \cap [0, 1]` (Π of Eq. 1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

__all__ = ["Framework", "LinfBall"]


class Framework(ABC):
    """What an attack optimises, and which values of it are allowed."""

    @abstractmethod
    def init(self, clean: Tensor) -> Tensor:
        """Return the variable to start from, for clean images ``(B, C, H, W)``."""

    @abstractmethod
    def image(self, variable: Tensor, clean: Tensor) -> Tensor:
        """Return the images ``(B, C, H, W)`` in [0, 1] of a variable; differentiable."""

    @abstractmethod
    def move(self, variable: Tensor, direction: Tensor, clean: Tensor) -> Tensor:
        """Return the allowed variable nearest to ``variable + direction``, without a graph."""

    def penalty(self, variable: Tensor) -> Tensor:
        """Return the price ``(B,)`` of a variable, added to the loss; by default nothing."""
        return variable.new_zeros(len(variable))


@final
class LinfBall(Framework):
    """Pixel perturbation of at most ``eps`` in every pixel (Eq. 1, 4).

    Args:
        eps: Largest change of a pixel, in units of the image's range [0, 1].
        random_start: Start at a uniformly random point of the ball, not at the clean image.
        generator: Source of the random start; default: a fixed seed.

    >>> ball = LinfBall(0.1)
    >>> clean = torch.full((1, 1, 1, 2), 0.95)
    >>> ball.move(clean, torch.tensor([[[[0.3, -0.3]]]]), clean).flatten().tolist()
    [1.0, 0.8499999642372131]
    """

    def __init__(
        self,
        eps: float,
        random_start: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        self.eps = eps
        self.random_start = random_start
        self.generator = generator

    def init(self, clean: Tensor) -> Tensor:
        """Return the clean images, or a random point around them."""
        if not self.random_start:
            return clean.detach()
        generator = self.generator or torch.Generator().manual_seed(0)
        unit = torch.rand(clean.shape, generator=generator, device=generator.device)
        return self.move(clean, (2 * unit.to(clean) - 1) * self.eps, clean)

    def image(self, variable: Tensor, clean: Tensor) -> Tensor:
        """Return the variable: it is the image."""
        return variable

    def move(self, variable: Tensor, direction: Tensor, clean: Tensor) -> Tensor:
        """Add a direction and project onto the ball and onto [0, 1]."""
        moved = variable.detach() + direction  # new memory: the rest works in place
        return moved.sub_(clean).clamp_(-self.eps, self.eps).add_(clean).clamp_(0, 1)

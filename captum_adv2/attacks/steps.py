# SPDX-License-Identifier: MIT
r"""Step rules: how an attack goes from one iterate to the next.

A constant sign step :math:`x - \alpha \, \mathrm{sgn} \nabla \ell` (Eq. 4) has a noise floor:
near a minimum of the map distance it jumps over it, by alpha in every pixel. Momentum averages the
jumps out and a step that decays lowers the floor; both cost nothing. The defaults do this; the
paper's rule is ``SignDescent(momentum=0.0, final=1.0)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from captum_adv2.attacks.frameworks import Framework
from captum_adv2.checks import expect_number

__all__ = ["Problem", "SignDescent", "Step"]


class Problem:
    """What a step rule may ask of the attack at one iteration: a gradient, and a legal move.

    Args:
        framework: What the attack optimises.
        clean: Clean images ``(B, C, H, W)``.
        alpha: The attack's step size, in units of the image's range.
        steps: How many steps the rule will be asked for.
        loss: Images and the progress in [0, 1] to losses ``(B,)``.
    """

    def __init__(
        self,
        framework: Framework,
        clean: Tensor,
        alpha: float,
        steps: int,
        loss: Callable[[Tensor, float], Tensor],
    ) -> None:
        self.framework = framework
        self.clean = clean
        self.alpha = alpha
        self.steps = steps
        self.loss = loss
        self.progress = 0.0

    def gradient(self, variable: Tensor) -> Tensor:
        """Return the gradient of each image's loss at its variable: one gradient evaluation."""
        leaf = variable.detach().requires_grad_()
        losses = self.loss(self.framework.image(leaf, self.clean), self.progress)
        (gradient,) = torch.autograd.grad((losses + self.framework.penalty(leaf)).sum(), leaf)
        return gradient

    def move(self, variable: Tensor, direction: Tensor) -> Tensor:
        """Return the allowed variable nearest to ``variable + direction``."""
        return self.framework.move(variable, direction, self.clean)


class Step(Protocol):
    """Takes a variable to the next one; ``memory`` is the rule's own, ``None`` at the start."""

    def __call__(self, problem: Problem, variable: Tensor, memory: Any, /) -> tuple[Tensor, Any]:
        """Return the next variable and the memory to hand to the next call."""


@dataclass(frozen=True)
class SignDescent:
    """Sign descent with momentum on the L1-normalised gradient and a cosine decay of the step.

    Args:
        momentum: Share of the accumulated gradient that is kept, in [0, 1]; default 0.9, and
            1 - 5 / steps in runs so short that they could not average as long.
        final: Last step as a share of the first, alpha; 1 is a constant step. Default 0.01, and
            0.8 / steps in runs so short that they would spend their end on steps too small.

    Raises:
        ValueError: A number out of range.

    Reference: momentum as in Dong et al., Boosting Adversarial Attacks with Momentum, CVPR 2018.
    """

    momentum: float | None = None
    final: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("momentum", "final"):
            if getattr(self, name) is not None:
                expect_number(getattr(self, name), name, low=0.0, high=1.0)

    def __call__(
        self, problem: Problem, variable: Tensor, memory: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the next variable, and the accumulated gradient."""
        gradient = problem.gradient(variable)
        axes = tuple(range(1, gradient.ndim))
        norm = torch.linalg.vector_norm(gradient, ord=1, dim=axes, keepdim=True)
        direction = gradient / torch.where(norm > 0, norm, torch.ones_like(norm))
        momentum = self.momentum
        if momentum is None:
            momentum = min(0.9, max(0.0, 1 - 5 / problem.steps))
        velocity = direction if memory is None else memory.mul_(momentum).add_(direction)
        alpha = problem.alpha * self._decay(problem)
        return problem.move(variable, -alpha * velocity.sign()), velocity

    def _decay(self, problem: Problem) -> float:
        final = min(1.0, max(0.01, 0.8 / problem.steps)) if self.final is None else self.final
        return final + (1 - final) * (1 + math.cos(math.pi * problem.progress)) / 2

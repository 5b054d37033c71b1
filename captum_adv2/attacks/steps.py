# SPDX-License-Identifier: MIT
r"""Step rules: how an attack goes from one iterate to the next.

A constant sign step :math:`x - \alpha \, \mathrm{sgn} \nabla \ell` (Eq. 4) has a noise floor: it
jumps over a minimum of the map distance, by alpha in every pixel. Momentum averages the jumps out,
and a step size that decays lowers the floor. The paper's rule is
``SignDescent(momentum=0.0, final=1.0)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_adv2.attacks.loop import Problem
from captum_adv2.optim import Adam, AdamState
from captum_adv2.spec import Count, Fraction, NonNegative, Unit, checked


@checked
@dataclass(frozen=True)
class SignDescent:
    """Sign descent with momentum on the L1-normalised gradient and a cosine decay of the step.

    Args:
        momentum: Share of the accumulated gradient that is kept, in [0, 1]; default: 0.9, or
            1 - 5 / steps where that is less, as short runs have fewer steps to average over.
        final: Last step size as a share of the first, alpha; 1 is a constant step. Default: 0.01,
            or 0.8 / steps where that is more, as short runs cannot afford many tiny steps.

    Reference: momentum as in Dong et al., Boosting Adversarial Attacks with Momentum, CVPR 2018.
    """

    momentum: Unit | None = None
    final: Unit | None = None

    def __call__(
        self, problem: Problem, variable: Tensor, memory: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the next variable, and the accumulated gradient."""
        momentum, final = self.momentum, self.final
        if momentum is None:
            momentum = min(0.9, max(0.0, 1 - 5 / problem.steps))
        if final is None:
            final = min(1.0, max(0.01, 0.8 / problem.steps))
        direction = _unit(problem.gradient(variable), norm=1)
        velocity = direction if memory is None else momentum * memory + direction
        alpha = problem.alpha * _cosine(final, problem.progress)
        return problem.move(variable, -alpha * velocity.sign()), velocity


@checked
@dataclass(frozen=True)
class AdamDescent:
    """Adam with the attack's step size as its learning rate, which decays along a cosine.

    Args:
        betas: Decays of the two moments.
        final: Last learning rate as a share of the first; 1 is a constant learning rate.
    """

    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    final: Unit = 0.01

    def __call__(
        self, problem: Problem, variable: Tensor, memory: AdamState | None
    ) -> tuple[Tensor, AdamState]:
        """Return the next variable, and Adam's state."""
        adam = Adam(1.0, self.betas)
        state = adam.init(variable) if memory is None else memory
        step, state = adam.update(problem.gradient(variable), state)
        alpha = problem.alpha * _cosine(self.final, problem.progress)
        return problem.move(variable, -alpha * step), state


def _cosine(final: float, progress: float) -> float:
    """Return a factor that falls from 1 to its final value along a cosine."""
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


@checked
@dataclass(frozen=True)
class TwoPhase:
    """The paper's rule for MASK (§3.6): a prediction step, then the longest map step that is safe.

    The map step is found by bisection, per image: the longest, up to ``longest``, after which the
    probability of the target class is still ``kappa`` or more. A prediction step that would go
    below ``kappa`` is not taken, so a confidence once above ``kappa`` stays there. A step takes two
    gradients, which ``ADV2(steps=...)`` counts as one.

    Args:
        kappa: Probability of the target class to keep, in [0, 1].
        stride: L2 length of the prediction step.
        longest: Largest L2 length of the map step, alpha_max (Table 11).
        searches: Number of bisections, n_bs (Table 11); each costs one forward pass.
    """

    kappa: Unit = 0.9
    stride: NonNegative = 0.05
    longest: NonNegative = 0.08
    searches: Count = 12

    def __call__(self, problem: Problem, variable: Tensor, memory: None) -> tuple[Tensor, None]:
        """Return the next variable, and no memory."""
        gradient = problem.gradient(variable, "prediction")
        before = problem.confidence
        ahead = problem.move(variable, -self.stride * _unit(gradient))
        after = problem.reached(ahead)
        wanted = (after >= self.kappa) | (after >= before)
        base = torch.where(_spread(wanted, variable), ahead, variable)
        direction = _unit(problem.gradient(base, "interpretation"))
        low = torch.zeros_like(before)
        high = torch.full_like(before, self.longest)
        for _ in range(self.searches):
            middle = (low + high) / 2
            safe = problem.reached(problem.move(base, -_spread(middle, base) * direction))
            low = torch.where(safe >= self.kappa, middle, low)
            high = torch.where(safe >= self.kappa, high, middle)
        return problem.move(base, -_spread(low, base) * direction), None


def _spread(values: Tensor, like: Tensor) -> Tensor:
    """Return values ``(B,)`` with as many dimensions as a variable."""
    return values.view(-1, *(1,) * (like.ndim - 1))


def _unit(gradient: Tensor, norm: int = 2) -> Tensor:
    """Scale each image's gradient to length 1, in the L1 or the L2 norm; zero stays zero."""
    axes = tuple(range(1, gradient.ndim))
    length = torch.linalg.vector_norm(gradient, ord=norm, dim=axes, keepdim=True)
    return gradient / torch.where(length > 0, length, torch.ones_like(length))

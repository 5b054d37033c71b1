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
from captum_adv2.checks import expect_integer, expect_number
from captum_adv2.optim import Adam, AdamState

__all__ = ["AdamDescent", "Loss", "Problem", "SignDescent", "Step", "TwoPhase"]


class Loss(Protocol):
    """The attacker's loss at one phase of an attack, whole and in its two parts, each ``(B,)``.

    Attributes:
        confidence: Probability of the target class ``(B,)`` where a loss was last evaluated.
    """

    confidence: Tensor

    def __call__(self, images: Tensor, progress: float, /) -> Tensor:
        """Return prediction, interpretation and further terms together."""

    def prediction(self, images: Tensor, progress: float, /) -> Tensor:
        """Return the prediction loss alone; no map is computed."""

    def interpretation(self, images: Tensor, progress: float, /) -> Tensor:
        """Return the rest."""

    def reached(self, images: Tensor, /) -> Tensor:
        """Return the probability of the target class ``(B,)``."""


class Problem:
    """What a step rule may ask of the attack at one iteration: a gradient, and a legal move.

    Args:
        framework: What the attack optimises.
        clean: Clean images ``(B, C, H, W)`` that are under way.
        alpha: The attack's step size, in units of the image's range.
        steps: How many steps the rule will be asked for.
        loss: What to make small.
    """

    def __init__(
        self,
        framework: Framework,
        clean: Tensor,
        alpha: float,
        steps: int,
        loss: Loss,
    ) -> None:
        self.framework = framework
        self.clean = clean
        self.alpha = alpha
        self.steps = steps
        self.loss = loss
        self.progress = 0.0

    def gradient(
        self, variable: Tensor, part: Callable[[Tensor, float], Tensor] | None = None
    ) -> Tensor:
        """Return the gradient of each image's loss at its variable: one gradient evaluation.

        Args:
            variable: What the attack optimises.
            part: A part of the loss; default: all of it.
        """
        leaf = variable.detach().requires_grad_()
        losses = (part or self.loss)(self.framework.image(leaf, self.clean), self.progress)
        (gradient,) = torch.autograd.grad((losses + self.framework.penalty(leaf)).sum(), leaf)
        return gradient

    @torch.no_grad()
    def confidence(self, variable: Tensor) -> Tensor:
        """Return the probability of the target class ``(B,)``."""
        return self.loss.reached(self.framework.image(variable, self.clean))

    def move(self, variable: Tensor, direction: Tensor) -> Tensor:
        """Return the allowed variable nearest to ``variable + direction``."""
        return self.framework.move(variable, direction, self.clean)


class Step(Protocol):
    """Takes a variable to the next one; ``memory`` is the rule's own, ``None`` at the start.

    An attack with ``stop`` lets finished images leave. Memory is then made of tensors with the
    batch first, of numbers and tensors without dimensions, which stay, and of tuples of these.
    """

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
        direction = _unit(problem.gradient(variable), ord=1)
        momentum = self.momentum
        if momentum is None:
            momentum = min(0.9, max(0.0, 1 - 5 / problem.steps))
        velocity = direction if memory is None else memory.mul_(momentum).add_(direction)
        alpha = problem.alpha * self._decay(problem)
        return problem.move(variable, -alpha * velocity.sign()), velocity

    def _decay(self, problem: Problem) -> float:
        final = min(1.0, max(0.01, 0.8 / problem.steps)) if self.final is None else self.final
        return _cosine(final, problem.progress)


@dataclass(frozen=True)
class AdamDescent:
    """Adam with the attack's step size for its learning rate, which may fall along a cosine.

    Args:
        betas: Decay of the two moments, in [0, 1).
        final: Last learning rate as a share of the first; 1 is a constant one.

    Raises:
        ValueError: A number out of range.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    final: float = 0.01

    def __post_init__(self) -> None:
        """Check the ranges."""
        Adam(betas=self.betas)
        expect_number(self.final, "final", low=0.0, high=1.0)

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


@dataclass(frozen=True)
class TwoPhase:
    """The paper's rule for MASK (§3.6): a prediction step, then the longest map step that is safe.

    The map step is found by bisection, per image: the longest, up to ``longest``, after which the
    probability of the target class is still ``kappa`` or more. Where the prediction step would lose
    that, it is not taken; so a confidence once above ``kappa`` stays there. A step takes two
    gradients, which ``ADV2(steps=...)`` counts as one.

    Args:
        kappa: Probability of the target class to keep, in [0, 1].
        stride: L2 length of the prediction step.
        longest: Largest L2 length of the map step, alpha_max (Table 11).
        searches: Number of bisections, n_bs (Table 11); each costs one forward pass.

    Raises:
        TypeError: A number of a wrong type.
        ValueError: A number out of range.
    """

    kappa: float = 0.9
    stride: float = 0.05
    longest: float = 0.08
    searches: int = 12

    def __post_init__(self) -> None:
        """Check the ranges."""
        expect_number(self.kappa, "kappa", low=0.0, high=1.0)
        expect_number(self.stride, "stride", low=0.0)
        expect_number(self.longest, "longest", low=0.0)
        expect_integer(self.searches, "searches", low=1)

    def __call__(self, problem: Problem, variable: Tensor, memory: None) -> tuple[Tensor, None]:
        """Return the next variable; there is no memory."""
        gradient = problem.gradient(variable, problem.loss.prediction)
        before = problem.loss.confidence
        ahead = problem.move(variable, -self.stride * _unit(gradient))
        after = problem.confidence(ahead)
        wanted = (after >= self.kappa) | (after >= before)
        base = torch.where(_spread(wanted, variable), ahead, variable)
        direction = _unit(problem.gradient(base, problem.loss.interpretation))
        low = torch.zeros_like(before)
        high = torch.full_like(before, self.longest)
        for _ in range(self.searches):
            middle = (low + high) / 2
            safe = problem.confidence(problem.move(base, -_spread(middle, base) * direction))
            low = torch.where(safe >= self.kappa, middle, low)
            high = torch.where(safe >= self.kappa, high, middle)
        return problem.move(base, -_spread(low, base) * direction), None


def _spread(values: Tensor, like: Tensor) -> Tensor:
    """Give values ``(B,)`` the rank of a variable."""
    return values.view(-1, *(1,) * (like.ndim - 1))


def _unit(gradient: Tensor, ord: int = 2) -> Tensor:
    """Scale each image's gradient to length 1, in the L1 or the L2 norm; zero stays zero."""
    axes = tuple(range(1, gradient.ndim))
    norm = torch.linalg.vector_norm(gradient, ord=ord, dim=axes, keepdim=True)
    return gradient / torch.where(norm > 0, norm, torch.ones_like(norm))

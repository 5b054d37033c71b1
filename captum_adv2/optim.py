# SPDX-License-Identifier: MIT
"""Adam as a pure function: a gradient and a state go in, a step and the next state come out.

An optimiser that is part of what is differentiated (the bilevel attack on MASK unrolls it) cannot
be `torch.optim.Adam`, which changes its parameters in place and outside the graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from captum_adv2.spec import Fraction, Positive, checked


class AdamState(NamedTuple):
    """Running moments of the gradient, in the parameters' shape, and the steps taken."""

    first: Tensor
    second: Tensor
    steps: int


@checked
@dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba, ICLR 2015), per element and differentiable.

    From zero moments a step is ``lr * sign(gradient)``, whose derivative is close to zero: to
    differentiate through steps, take some first. After a change of the parameters `rescale` the
    moments instead of starting again. ``betas`` are the decays of the two moments.

    >>> adam, x = Adam(lr=0.1), torch.tensor([2.0])
    >>> step, state = adam.update(2 * x, adam.init(x))
    >>> (x - step).round(decimals=4).item(), state.steps
    (1.899999976158142, 1)
    """

    lr: Positive = 0.1
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Positive = 1e-8

    def init(self, parameters: Tensor) -> AdamState:
        """Return the state to start from."""
        # In float16 the squares of small gradients, and eps, are 0: steps would be 0 / 0.
        wide = torch.promote_types(parameters.dtype, torch.float32)
        zeros = torch.zeros_like(parameters, dtype=wide)
        return AdamState(zeros, zeros.clone(), 0)

    def update(self, gradient: Tensor, state: AdamState) -> tuple[Tensor, AdamState]:
        """Return what to subtract from the parameters, and the next state."""
        (decay1, decay2), count = self.betas, state.steps + 1
        wide = gradient.to(state.first.dtype)
        first = decay1 * state.first + (1 - decay1) * wide
        second = decay2 * state.second + (1 - decay2) * wide.square()
        root = safe_sqrt(second / (1 - decay2**count))
        step = self.lr * first / (1 - decay1**count) / (root + self.eps)
        return step.to(gradient.dtype), AdamState(first, second, count)

    def rescale(self, state: AdamState, factor: float, steps: int) -> AdamState:
        """Return a state as if the gradients had been ``factor`` times as large, at ``steps``."""
        return AdamState(factor * state.first, factor**2 * state.second, steps)


def safe_sqrt(values: Tensor) -> Tensor:
    """Return square roots whose derivative at 0 is 0, not infinite."""
    positive = values > 0
    return torch.where(positive, torch.where(positive, values, 1.0).sqrt(), 0.0)

# SPDX-License-Identifier: MIT
"""Gradients of scores, and the surrogate that differentiates them by first-order passes.

A `GradientBased` interpreter computes its map from gradients, in whichever way it is given:
`Autograd` for the map itself, `TwoPasses` (see `passes`) for what an attack differentiates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from captum_adv2.interpreters import base
from captum_adv2.interpreters.passes import Function, Passes, Score, gradient_of
from captum_adv2.interpreters.relu import Slope, Smoothing, as_slope


class Gradients(ABC):
    """A way to compute the gradients of scores.

    Attributes:
        graph: Whether they can be differentiated.
    """

    graph: bool = True

    @abstractmethod
    def __call__(
        self, function: Function, score: Score, points: Tensor, target: Tensor, batch: int
    ) -> tuple[Tensor, Tensor]:
        """Return the gradient ``(N, C, H, W)`` of each point's score, and the logits.

        ``batch`` is the number of images: as many points at least are computed at a time.
        """


@final
@dataclass(frozen=True)
class Autograd(Gradients):
    """PyTorch's gradients: with a graph, or without and in parts."""

    graph: bool

    def __call__(
        self, function: Function, score: Score, points: Tensor, target: Tensor, batch: int
    ) -> tuple[Tensor, Tensor]:
        """See `Gradients`."""
        if self.graph:
            return gradient_of(function, score, points, target, graph=True)
        parts = [
            gradient_of(function, score, part.detach().requires_grad_(), classes)
            for part, classes in _parts(batch, points, target)
        ]
        gradients, logits = zip(*parts, strict=True)
        return torch.cat(gradients), torch.cat([each.detach() for each in logits])


@final
@dataclass(frozen=True)
class TwoPasses(Gradients):
    """Gradients of a network with smooth ReLUs, differentiated by a second pass."""

    slope: Slope
    progress: float
    warn: bool = False  # where there is nothing to smooth

    def __call__(
        self, function: Function, score: Score, points: Tensor, target: Tensor, batch: int
    ) -> tuple[Tensor, Tensor]:
        """See `Gradients`."""
        parts = [
            (part, Passes(function, score, classes, self.slope, self.progress))
            for part, classes in _parts(batch, points, target)
        ]
        found = [passes(part, forget=len(parts) > 1) for part, passes in parts]
        if self.warn and not parts[0][1].found:
            base.warn_of_linear(function, points[:1])
        gradients, logits = zip(*found, strict=True)
        return torch.cat(gradients), torch.cat(logits)


def _parts(batch: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Split tensors ``(N, ...)`` so that the memory of a pass over a part is bounded."""
    size = base.at_once(tensors[0][0], batch)
    return list(zip(*(tensor.split(size) for tensor in tensors), strict=True))  # type: ignore[no-untyped-call]


class GradientBased(base.Interpreter):
    """An interpreter whose map is a function of gradients at points that depend on the image."""

    @abstractmethod
    def explain_by(self, gradients: Gradients, images: Tensor, target: Tensor) -> base.Explanation:
        """Return maps and logits, with gradients computed in a given way."""

    @final
    def explain(self, images: Tensor, target: Tensor) -> base.Explanation:
        """See `Interpreter.explain`."""
        with base.differentiable_input(images) as (x, graph):
            explanation = self.explain_by(Autograd(graph), x, target)
        return explanation if graph else base.detached(explanation)


@final
@dataclass(frozen=True)
class FirstOrder(base.Surrogate):
    """A gradient-based interpreter with smooth ReLUs, differentiated by first-order passes.

    A step costs two forward and two backward passes, in about twice the memory of one. The passes
    must do the same: what a model draws must come from PyTorch's global generators.
    """

    needs = "explain_by"

    slope: Slope

    def init(self, interpreter: GradientBased, images: Tensor, target: Tensor) -> Tensor:
        """See `Surrogate`."""
        base.warn_of_scripts(interpreter.model)
        return target

    def __call__(
        self, interpreter: GradientBased, images: Tensor, state: Tensor, progress: float
    ) -> base.Explanation:
        """See `Surrogate`."""
        with base.differentiable_input(images) as (x, graph):
            gradients = TwoPasses(self.slope, progress, warn=graph and progress == 0)
            explanation = interpreter.explain_by(gradients, x, state)
        return explanation if graph else base.detached(explanation)


def surrogate(smoothing: Smoothing) -> base.Surrogate:
    """Return the surrogate of a gradient-based interpreter for a smoothing."""
    return base.Exact() if smoothing is None else FirstOrder(as_slope(smoothing))

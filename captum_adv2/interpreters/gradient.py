# SPDX-License-Identifier: MIT
r"""Back-propagation-guided interpreters: GRAD, SmoothGrad, integrated gradients (§3.2).

GRAD is the gradient of the probability of a class, :math:`m = |\partial f_c(x) / \partial x|`
(Eq. 5), largest over colour channels, average-pooled, scaled to [0, 1] per image.

At high confidence the gradient of a float32 probability is 0. The log-odds
:math:`u_c = z_c - \log \sum_{k \ne c} e^{z_k}` have
:math:`\partial f_c = f_c (1 - f_c) \, \partial u_c`: a positive factor per image, which scaling to
[0, 1] removes. So GRAD takes the gradient of the log-odds, and is exact at any confidence.

The surrogates smooth the derivative of ReLU (see `relu`), and are differentiated by first-order
passes (see `first_order`).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_adv2.interpreters import base
from captum_adv2.interpreters.first_order import GradientBased, Gradients, surrogate
from captum_adv2.interpreters.relu import Smoothing
from captum_adv2.spec import Count, Index, NonNegative, checked


def log_odds(logits: Tensor, target: Tensor) -> Tensor:
    """Return log p / (1 - p) of each image's target class ``(B,)``, without forming p.

    >>> log_odds(torch.tensor([[90.0, 0.0]]), torch.tensor([0])).item()
    90.0
    """
    index = target[:, None]
    others = logits.scatter(1, index, -torch.inf).logsumexp(dim=1)
    return logits.gather(1, index)[:, 0] - others


def probability(logits: Tensor, target: Tensor) -> Tensor:
    """Return the probability of each image's target class, with a gradient that does not vanish.

    The gradient is exact to rounding where |log-odds| is at most 80.
    """
    # PyTorch computes sigmoid's derivative as s (1 - s), which is 0 once s rounds to 1: so take
    # the sigmoid of the two that is small.
    u = log_odds(logits, target)
    return torch.where(u > 0, 1 - torch.sigmoid(-u), torch.sigmoid(u))


def pool_maps(maps: Tensor, pool: int | None) -> Tensor:
    """Average-pool maps ``(B, 1, H, W)`` by a factor; by default 4 from 128 pixels on, else 2."""
    side = min(maps.shape[-2:])
    return F.avg_pool2d(maps, (4 if side >= 128 else min(2, side)) if pool is None else pool)


class _InputGradient(GradientBased):
    """What input gradients share: |attribution|, max over channels, pooled, min-max scaled."""

    model: nn.Module
    pool: int | None
    smoothing: Smoothing

    def __post_init__(self) -> None:
        super().__init__(self.model)
        self.surrogate = surrogate(self.smoothing)

    @abstractmethod
    def attribute(self, gradients: Gradients, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return signed attributions ``(B, C, H, W)`` and logits ``(B, classes)``."""

    @final
    def explain_by(self, gradients: Gradients, images: Tensor, target: Tensor) -> base.Explanation:
        """See `GradientBased`."""
        attributions, logits = self.attribute(gradients, images, target)
        maps = pool_maps(attributions.abs().amax(dim=1, keepdim=True), self.pool)
        return base.Explanation(base.min_max(maps), logits)


@final
@checked
@dataclass(eq=False, repr=False)
class Gradient(_InputGradient):
    """GRAD: the gradient of the class probability with respect to the image (Eq. 5).

    Convention:
        ``|gradient|``, max over channels, average-pooled, min-max scaled per image.

    In an attack the gradient of the prediction goes through the smoothed ReLUs, too.

    Args:
        model: Classifier returning logits ``(B, classes)`` with two classes or more.
        pool: Factor of the average pooling; default 4 for sides of 128 and more, else 2.
        smoothing: Derivative of ReLU in the surrogate: ``"auto"`` is a logistic function as wide as
            each layer needs, narrowing during an attack; a number is the paper's h(z), with this
            tau (§3.2); or a function of pre-activations; or ``None`` for ReLU's own. The reported
            map always uses exact ReLU.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    >>> Gradient(model)(torch.rand(2, 1, 4, 4), torch.tensor([0, 1])).shape
    torch.Size([2, 1, 2, 2])
    """

    model: nn.Module
    pool: Count | None = None
    smoothing: Smoothing = "auto"

    def attribute(self, gradients: Gradients, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """See `_InputGradient.attribute`."""
        return gradients(self.logits, log_odds, x, target, len(x))


@final
@checked
@dataclass(eq=False, repr=False)
class SmoothGrad(_InputGradient):
    """SmoothGrad: the gradient of the class probability, averaged over noisy copies of the image.

    Args:
        model: Classifier returning logits.
        samples: Number of noisy copies; a call costs as many forward and backward passes.
        std: Standard deviation of the Gaussian noise, in units of the image's range [0, 1].
        seed: Seed of the noise, the same at each call and for each image of a batch.
        pool, smoothing: See `Gradient`.

    Reference: Smilkov et al., SmoothGrad: removing noise by adding noise, 2017.
    """

    model: nn.Module
    samples: Count = 16
    std: NonNegative = 0.1
    seed: Index = 0
    pool: Count | None = None
    smoothing: Smoothing = "auto"

    def attribute(self, gradients: Gradients, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """See `_InputGradient.attribute`."""
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn((self.samples, 1, *x.shape[1:]), generator=generator)
        copies = x + self.std * noise.to(x)  # (samples, B, C, H, W)
        # The clean images come last in the same batch, for the logits.
        points = torch.cat([copies.flatten(0, 1), x])
        classes = target.repeat(self.samples + 1)
        gradient, logits = gradients(self.logits, probability, points, classes, len(x))
        noisy = gradient[: -len(x)].view(self.samples, *x.shape)
        return noisy.mean(dim=0), logits[-len(x) :]


@final
@checked
@dataclass(eq=False, repr=False)
class IntegratedGradients(_InputGradient):
    """Integrated gradients of the class probability along the line from a baseline (Eq. 11).

    Attributions sum to the difference of the probabilities at image and baseline (completeness),
    up to the error of the quadrature. Captum's default rule is used: Gauss-Legendre.

    Args:
        model: Classifier returning logits.
        steps: Number of points of the quadrature (Captum's ``n_steps``).
        baseline: Image to start from: a grey value in [0, 1], or ``(C, H, W)`` or ``(1, C, H, W)``.
        pool, smoothing: See `Gradient`.

    Reference: Sundararajan et al., Axiomatic Attribution for Deep Networks, ICML 2017.
    """

    model: nn.Module
    steps: Count = 50
    baseline: float | Tensor = 0.0
    pool: Count | None = None
    smoothing: Smoothing = "auto"

    def attribute(self, gradients: Gradients, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """See `_InputGradient.attribute`."""
        nodes, weights = np.polynomial.legendre.leggauss(self.steps)  # on [-1, 1]
        times = torch.as_tensor((nodes + 1) / 2).to(x).view(-1, 1, 1, 1, 1)
        shares = torch.as_tensor(weights / 2).to(x).view(-1, 1, 1, 1, 1)
        baseline = base.background(self.baseline, x)
        path = (baseline + times * (x - baseline)).flatten(0, 1)  # (steps B, C, H, W)
        points, classes = torch.cat([path, x]), target.repeat(self.steps + 1)
        gradient, logits = gradients(self.logits, probability, points, classes, len(x))
        slope = (shares * gradient[: len(path)].view(self.steps, *x.shape)).sum(dim=0)
        return (x - baseline) * slope, logits[len(path) :]

# SPDX-License-Identifier: MIT
r"""Back-propagation-guided interpreters: GRAD, SmoothGrad, integrated gradients (§3.2).

GRAD is the gradient of the probability of a class, :math:`m = |\partial f_c(x) / \partial x|`
(Eq. 5), largest over colour channels, average-pooled, scaled to [0, 1] per image.

Probabilities saturate: where the model is sure, and that is where an attack drives it, float32
softmax and log-softmax lose their gradient. With the log-odds
:math:`u_c = z_c - \log \sum_{k \ne c} e^{z_k}` we have :math:`f_c = 1 / (1 + e^{-u_c})` and
:math:`\partial f_c = f_c (1 - f_c) \, \partial u_c`: a positive factor an image, which scaling to
[0, 1] removes. So GRAD takes the gradient of the log-odds, and is exact at any confidence.

The surrogates smooth the derivative of ReLU by h(z) (see `relu`) and share one forward pass, one
differentiable backward pass and one double backward pass with the prediction.

Differs from the official code: there the gradient of log-softmax, a second copy of the network for
h(z), a floor of 1e-8 under the division that acts on the scale of a batch mean.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_adv2.checks import (
    expect_floats,
    expect_indices,
    expect_integer,
    expect_labels,
    expect_model,
    expect_number,
    expect_pair,
)
from captum_adv2.interpreters.base import (
    Direct,
    Interpreter,
    Surrogate,
    background,
    detached,
    differentiable_input,
    expect_baseline,
    min_max,
)
from captum_adv2.interpreters.relu import Derivative, as_derivative, smooth_relu
from captum_adv2.types import Explanation

__all__ = ["Gradient", "IntegratedGradients", "SmoothGrad", "log_odds", "pool_maps", "probability"]


def log_odds(logits: Tensor, target: Tensor) -> Tensor:
    """Return log p / (1 - p) of each image's target class, without forming p.

    Args:
        logits: ``(B, classes)``, at least two classes.
        target: ``(B,)`` long.

    Returns:
        ``(B,)``.

    Raises:
        TypeError: Logits or classes of a wrong type.
        ValueError: Logits or classes of a wrong shape or range.

    >>> log_odds(torch.tensor([[90.0, 0.0]]), torch.tensor([0])).item()
    90.0
    """
    expect_floats(logits, "logits", 2)
    index = expect_indices(target, len(logits), "target")[:, None]
    if index.device.type == "cpu":  # elsewhere a look has every step of an attack wait
        expect_labels(target, len(logits), logits.shape[1], "target")
    others = logits.scatter(1, index, -torch.inf).logsumexp(dim=1)
    return logits.gather(1, index)[:, 0] - others


def probability(logits: Tensor, target: Tensor) -> Tensor:
    """Return the probability of each image's target class, with a gradient that does not vanish.

    Args:
        logits: ``(B, classes)``.
        target: ``(B,)`` long.

    Returns:
        ``(B,)`` in [0, 1]. The gradient is exact to rounding where |log-odds| is at most 80.

    Raises:
        TypeError: Logits or classes of a wrong type.
        ValueError: Logits or classes of a wrong shape or range.

    >>> round(probability(torch.tensor([[0.0, 0.0]]), torch.tensor([0])).item(), 3)
    0.5
    """
    # PyTorch takes sigmoid's derivative as s (1 - s), which rounds to 0 as s rounds to 1; so the
    # sigmoid that is small is the one to take.
    u = log_odds(logits, target)
    return torch.where(u > 0, 1 - torch.sigmoid(-u), torch.sigmoid(u))


def pool_maps(maps: Tensor, pool: int | None) -> Tensor:
    """Average-pool maps ``(B, 1, H, W)`` by a factor; by default 4 from 128 pixels on, else 2.

    Raises:
        ValueError: The factor is larger than the map.
    """
    side = min(maps.shape[-2:])
    factor = (4 if side >= 128 else min(2, side)) if pool is None else pool
    if factor > side:
        raise ValueError(f"expected pool at most {side}, the images' shorter side, got {factor}")
    return F.avg_pool2d(maps, factor)


class _InputGradient(Interpreter):
    """What GRAD and its relatives share: |attribution|, max over channels, pooled, scaled."""

    def __init__(
        self, model: nn.Module, pool: int | None, smoothing: float | Derivative | None
    ) -> None:
        super().__init__(expect_model(model))
        self.pool = None if pool is None else expect_integer(pool, "pool", low=1)
        self.smoothing = as_derivative(smoothing)

    @abstractmethod
    def _attribute(
        self, images: Tensor, target: Tensor, create_graph: bool
    ) -> tuple[Tensor, Tensor]:
        """Return signed attributions ``(B, C, H, W)`` and logits ``(B, classes)``."""

    @final
    def explain(self, images: Tensor, target: Tensor) -> Explanation:
        """See `Interpreter.explain`."""
        with differentiable_input(images) as (x, create_graph):
            attributions, logits = self._attribute(x, target, create_graph)
            maps = pool_maps(attributions.abs().amax(dim=1, keepdim=True), self.pool)
            explanation = Explanation(min_max(maps), logits)
        return explanation if create_graph else detached(explanation)

    @final
    def surrogate(self, images: Tensor, target: Tensor) -> Surrogate:
        """Return the same map with the derivative of ReLU smoothed; see `relu`."""
        return Direct(self._explain_smooth, expect_pair(images, target))

    def _explain_smooth(self, images: Tensor, target: Tensor) -> Explanation:
        with smooth_relu(self.smoothing):
            return self.explain(images, target)


@final
class Gradient(_InputGradient):
    """GRAD: the gradient of the class probability with respect to the image (Eq. 5).

    Convention:
        |gradient|, max over channels, average-pooled, min-max scaled per image.

    The surrogate shares one forward pass with the prediction, so that in an attack the gradient of
    the prediction loss goes through the smoothed ReLUs too.

    Args:
        model: Classifier returning logits ``(B, classes)`` with two classes or more.
        pool: Factor of the average pooling; default 4 for sides of 128 and more, else 2.
        smoothing: tau of h(z) in the surrogate (§3.2), or another derivative of ReLU, or ``None``
            for the plain one. The reported map always uses exact ReLU.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``pool`` or ``smoothing`` is not positive.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    >>> Gradient(model)(torch.rand(2, 1, 4, 4), torch.tensor([0, 1])).shape
    torch.Size([2, 1, 2, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        pool: int | None = None,
        smoothing: float | Derivative | None = 1e-4,
    ) -> None:
        super().__init__(model, pool, smoothing)

    def _attribute(
        self, images: Tensor, target: Tensor, create_graph: bool
    ) -> tuple[Tensor, Tensor]:
        logits = self.logits(images, target)
        score = log_odds(logits, target).sum()
        (gradient,) = torch.autograd.grad(score, images, create_graph=create_graph)
        return gradient, logits


@final
class SmoothGrad(_InputGradient):
    """SmoothGrad: the gradient of the class probability, averaged over noisy copies of the image.

    The noise is drawn anew from ``seed`` at each call and shared by the images of a batch: the map
    is a function of the image, and a batch gives the maps of its images.

    Args:
        model: Classifier returning logits.
        samples: Number of noisy copies; a call costs as many forward and backward passes.
        std: Standard deviation of the Gaussian noise, in units of the image's range [0, 1].
        seed: Seed of the noise.
        pool: See `Gradient`.
        smoothing: See `Gradient`.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: A number out of range.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    >>> SmoothGrad(model, samples=4)(torch.rand(2, 1, 4, 4), torch.tensor([0, 1])).shape
    torch.Size([2, 1, 2, 2])

    Reference: Smilkov et al., SmoothGrad: removing noise by adding noise, 2017.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: int = 16,
        std: float = 0.1,
        *,
        seed: int = 0,
        pool: int | None = None,
        smoothing: float | Derivative | None = 1e-4,
    ) -> None:
        super().__init__(model, pool, smoothing)
        self.samples = expect_integer(samples, "samples", low=1)
        self.std = expect_number(std, "std", low=0.0)
        self.seed = expect_integer(seed, "seed", low=0)

    def _attribute(
        self, images: Tensor, target: Tensor, create_graph: bool
    ) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn((self.samples, 1, *images.shape[1:]), generator=generator)
        copies = images + self.std * noise.to(images)  # (samples, B, C, H, W)
        # The clean images ride along last, for the logits.
        logits = self.logits(torch.cat([copies.flatten(0, 1), images]), target)
        noisy, clean = logits[: -len(images)], logits[-len(images) :]
        score = probability(noisy, target.repeat(self.samples)).sum() / self.samples
        (gradient,) = torch.autograd.grad(score, images, create_graph=create_graph)
        return gradient, clean


@final
class IntegratedGradients(_InputGradient):
    """Integrated gradients of the class probability along the line from a baseline (Eq. 11).

    Attributions sum to the difference of the probabilities at image and baseline (completeness),
    up to the error of the quadrature. Captum's default rule is used: Gauss-Legendre.

    Args:
        model: Classifier returning logits.
        steps: Number of points of the quadrature (Captum's ``n_steps``).
        baseline: Image to start from: a grey value in [0, 1], or ``(C, H, W)`` or ``(1, C, H, W)``.
        pool: See `Gradient`.
        smoothing: See `Gradient`.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: A number out of range; or (at a call) a baseline that does not fit the images.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    >>> IntegratedGradients(model, steps=8)(torch.rand(2, 1, 4, 4), torch.tensor([0, 1])).shape
    torch.Size([2, 1, 2, 2])

    Reference: Sundararajan et al., Axiomatic Attribution for Deep Networks, ICML 2017.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: int = 50,
        baseline: float | Tensor = 0.0,
        *,
        pool: int | None = None,
        smoothing: float | Derivative | None = 1e-4,
    ) -> None:
        super().__init__(model, pool, smoothing)
        self.steps = expect_integer(steps, "steps", low=1)
        self.baseline = expect_baseline(baseline)

    def _attribute(
        self, images: Tensor, target: Tensor, create_graph: bool
    ) -> tuple[Tensor, Tensor]:
        nodes, weights = np.polynomial.legendre.leggauss(self.steps)  # on [-1, 1]
        times = torch.as_tensor((nodes + 1) / 2).to(images).view(-1, 1, 1, 1, 1)
        shares = torch.as_tensor(weights / 2).to(images).repeat_interleave(len(images))
        baseline = background(self.baseline, images)
        path = (baseline + times * (images - baseline)).flatten(0, 1)  # (steps B, C, H, W)
        logits = self.logits(torch.cat([path, images]), target)
        along, clean = logits[: len(path)], logits[len(path) :]
        score = (shares * probability(along, target.repeat(self.steps))).sum()
        (gradient,) = torch.autograd.grad(score, path, create_graph=create_graph)
        slope = gradient.view(self.steps, *images.shape).sum(dim=0)
        return (images - baseline) * slope, clean

# SPDX-License-Identifier: MIT
r"""MASK, the perturbation-guided interpreter.

MASK searches for the smallest part of an image whose deletion removes the class (Eq. 9, 16):

.. math:: \min_{0 \le m \le 1} f_c(\phi(x; m)) + \lambda_1 \, r_{tv}(m) + \lambda_2 \|1 - m\|_1,
          \qquad \phi(x; m) = m \, x + (1 - m) \, \tilde x

with m = 1 where x is *kept* and :math:`\tilde x` a blurred image or noise. The reported map is
1 - m, the deleted part. It has no usable derivative; `bilevel` has surrogates of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, Self, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_adv2.interpreters.base import Explanation, Interpreter, differentiable_input
from captum_adv2.interpreters.bilevel import FiniteDifference, Follower, Scene
from captum_adv2.interpreters.gradient import probability
from captum_adv2.optim import Adam
from captum_adv2.progress import progress_bar
from captum_adv2.spec import Count, Index, NonNegative, Positive, Unit, checked


@checked
@dataclass(frozen=True)
class Blur:
    """Replace deleted pixels by a Gaussian blur of the image.

    Args:
        sigma: Standard deviation in pixels; default: a 32nd of the longer side, 7 at 224.
    """

    sigma: Positive | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Return blurred images ``(B, C, H, W)``."""
        from kornia.filters import filter2d_separable, get_gaussian_kernel1d  # slow to import

        sides = images.shape[-2:]
        sigma = max(sides) / 32 if self.sigma is None else self.sigma
        reach = min(round(3 * sigma), min(sides) - 1)  # reflection cannot reach further
        line = get_gaussian_kernel1d(2 * reach + 1, sigma, dtype=images.dtype, device=images.device)
        rows, columns = (_reflected(side, reach, images.device) for side in sides)
        # Not padded by PyTorch, whose derivative of it has no deterministic form on CUDA.
        padded = images[..., rows[:, None], columns]
        return filter2d_separable(padded, line, line, padding="valid")


def _reflected(side: int, reach: int, device: torch.device) -> Tensor:
    """Return indices ``(side + 2 * reach,)`` that continue 0 to side - 1 by reflection."""
    index = torch.arange(-reach, side + reach, device=device).abs()
    return side - 1 - (side - 1 - index).abs()


@checked
@dataclass(frozen=True)
class Noise:
    """Replace deleted pixels by Gaussian noise around the image's mean colour.

    Args:
        std: Standard deviation of the noise, in units of the image's standard deviation.
        seed: Seed of the noise, which is the same for all images.
    """

    std: NonNegative = 1.0
    seed: Index = 0

    def __call__(self, images: Tensor) -> Tensor:
        """Return noise ``(B, C, H, W)`` in [0, 1]."""
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(images.shape[1:], generator=generator).to(images)
        spread = self.std * images.std(dim=(1, 2, 3), keepdim=True)
        return (images.mean(dim=(2, 3), keepdim=True) + spread * noise).clamp(0, 1)


@final
@checked
@dataclass(eq=False, repr=False)
class MASK(Interpreter):
    """MASK: the smallest part of an image whose deletion removes the class (Eq. 9, 16).

    Convention:
        Map = 1 - kept, raw in [0, 1], at ``size`` x ``size``; found by Adam from ``start``.

    The map carries no graph. Jitter is the same sequence of offsets for every image, so a map does
    not depend on the rest of its batch.

    Args:
        model: Classifier returning logits.
        size: Height and width of the mask, upsampled bilinearly to the image's.
        iterations: Steps of Adam; each costs one forward and one backward pass.
        perturb: Gives the pixels that replace deleted ones: `Blur`, `Noise`, or another function
            of images ``(B, C, H, W)``.
        tv: Weight of total variation, lambda_1 (a sum over the mask).
        sparsity: Weight of the L1 norm of the map, lambda_2 (a sum over the mask).
        beta: Exponent of total variation.
        jitter: Largest shift of the image against the mask, in pixels (tau of Eq. 16).
        lr: Learning rate of Adam.
        start: Initial value of the mask.
        seed: Seed of the jitter.
        verbose: Show a progress bar.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    >>> mask = MASK(model, size=4, iterations=5, jitter=0)
    >>> mask(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
    torch.Size([2, 1, 4, 4])

    Reference: Fong & Vedaldi, Interpretable Explanations of Black Boxes by Meaningful Perturbation,
    ICCV 2017; its defaults, at 224 pixels.
    """

    scaled = False
    surrogate = FiniteDifference()

    model: nn.Module
    size: Count = 28
    iterations: Count = 300
    _: KW_ONLY
    perturb: Callable[[Tensor], Tensor] = Blur()
    tv: NonNegative = 1e-2
    sparsity: NonNegative = 1e-4
    beta: Positive = 3.0
    jitter: Index = 4
    lr: Positive = 0.1
    start: Unit = 0.5
    seed: Index = 0
    verbose: bool = False

    def __post_init__(self) -> None:
        """Make the optimiser."""
        super().__init__(self.model)
        self.adam = Adam(self.lr)

    @classmethod
    def small(cls, model: nn.Module, **overrides: Any) -> Self:
        """Return MASK with settings for images of 32 or 64 pixels, and ``overrides`` of them.

        With these no map was empty on small networks. From a mask of one half, a confident network
        has no gradient to follow.
        """
        settings: dict[str, Any] = {"size": 16, "perturb": Blur(8.0), "sparsity": 5e-4}
        settings |= {"jitter": 1, "lr": 0.03, "start": 0.2}
        return cls(model, **(settings | overrides))

    def explain(self, images: Tensor, target: Tensor) -> Explanation:
        """See `Interpreter.explain`; the map carries no graph."""
        return Explanation(1 - self.solve(images, target).kept, None)

    def solve(self, images: Tensor, target: Tensor) -> Follower:
        """Return the state after ``iterations`` steps, for classes ``(B,)`` of images."""
        with differentiable_input(images):  # refuses inference mode
            scene = self.scene(images.detach(), target)
        follower = self.begin(images)
        steps = range(self.iterations)
        for _ in progress_bar(steps, desc="MASK", unit="step", shown=self.verbose):
            follower = self.descend(scene, follower)
        return follower

    def begin(self, images: Tensor) -> Follower:
        """Return the state before the first step."""
        kept = images.new_full((len(images), 1, self.size, self.size), self.start)
        return Follower(kept, self.adam.init(kept), 0)

    def scene(self, images: Tensor, target: Tensor) -> Scene:
        """Return images and their replacement, enlarged by as many pixels as jitter may shift."""
        pair = torch.cat([images, self.perturb(images)])
        if self.jitter:
            larger = [side + self.jitter for side in images.shape[-2:]]
            pair = F.interpolate(pair, larger, mode="bilinear")
        whole, deleted = pair.chunk(2)
        return Scene(whole, deleted, target)

    def objective(self, scene: Scene, kept: Tensor, step: int) -> Tensor:
        """Return MASK's loss ``(B,)`` of masks (Eq. 16), at the jitter of a step."""
        draw = random.Random(f"{self.seed}:{step}")
        top, left = draw.randint(0, self.jitter), draw.randint(0, self.jitter)
        height, width = (side - self.jitter for side in scene.images.shape[-2:])
        crop = (..., slice(top, top + height), slice(left, left + width))
        share = F.interpolate(kept, (height, width), mode="bilinear")
        seen = torch.lerp(scene.deleted[crop], scene.images[crop], share)
        confidence = probability(self.logits(seen), scene.target)
        rough = sum(kept.diff(dim=dim).abs().pow(self.beta).sum(dim=(1, 2, 3)) for dim in (2, 3))
        penalty = self.tv * rough + self.sparsity * (1 - kept).abs().sum(dim=(1, 2, 3))
        return confidence + penalty

    def descend(
        self, scene: Scene, follower: Follower, pace: float = 1.0, graph: bool = False
    ) -> Follower:
        """Take a step of Adam at ``pace`` times the learning rate; differentiable if ``graph``."""
        kept, moments, step = follower
        with torch.enable_grad():
            leaf = kept if kept.requires_grad else kept.detach().requires_grad_()
            losses = self.objective(scene, leaf, step)
            (gradient,) = torch.autograd.grad(losses.sum(), leaf, create_graph=graph)
            change, moments = self.adam.update(gradient, moments)
            return Follower((kept - pace * change).clamp(0, 1), moments, step + 1)

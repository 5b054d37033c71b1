# SPDX-License-Identifier: MIT
r"""Interpreters that perturb the image and see what the score does: occlusion, Shapley, LIME.

Parts of the image are replaced by a baseline, and the map is a linear function of the logits of the
perturbed images. Which parts are replaced is drawn from a seed, so for a given seed the map is a
differentiable function of the image: all perturbed images go through the model in one forward pass
(or in chunks), and what combines their logits is a matrix in closed form.

Features are the parts that are replaced together: cells of a grid, regions of a feature mask, or
single values. With :math:`z_p \in \{0, 1\}^F` for the features that perturbation p keeps, LIME and
KernelSHAP fit :math:`s_p \approx \phi_0 + z_p \cdot \phi` by weighted least squares,

.. math:: \phi = \big(\sqrt w (Z - \bar z)\big)^+ \sqrt w \, s,
          \qquad \bar z = w^T Z / \textstyle\sum w,

which is the solution of least norm where the perturbations do not determine it.

The numbers are drawn as Captum draws them: with the same seed of PyTorch's generator, and for one
image at a time, Captum's maps are these. Here all images of a batch are perturbed alike, so that a
batch gives the maps of its images. A map says how things are at *its* perturbations: judge an
attack with fresh ones too, by an interpreter with another seed.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Literal, TypeAlias, final

import torch
from torch import Tensor, nn

from captum_adv2.checks import expect_integer, expect_model, expect_number
from captum_adv2.interpreters.base import (
    Interpreter,
    background,
    detached,
    differentiable_input,
    expect_baseline,
    min_max,
)
from captum_adv2.interpreters.reduction import Reduction, expect_reduction, reduced
from captum_adv2.types import Explanation

__all__ = [
    "FeatureAblation",
    "Features",
    "KernelShap",
    "Lime",
    "Occlusion",
    "ShapleyValueSampling",
    "feature_mask",
    "least_squares",
]

Features: TypeAlias = int | Tensor | None
"""Cells along each side of a grid; or a feature mask; or ``None``: each value by itself."""

# All subsets of more features, or orders of more, are no longer drawn in full.
_MOST_SUBSETS = 16
_MOST_ORDERS = 7


def feature_mask(features: Features, shape: tuple[int, ...]) -> Tensor:
    """Return which feature each value of an image belongs to.

    Args:
        features: See `Features`. A mask has integers from 0 (or another start) to the number of
            features, none left out, and a shape that can be broadcast to ``(C, H, W)``.
        shape: Of the image, ``(C, H, W)``.

    Returns:
        ``(1 or C, H, W)``, long, from 0.

    Raises:
        ValueError: The mask does not fit the image.

    >>> feature_mask(2, (3, 3, 4))[0].tolist()
    [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3]]
    """
    height, width = shape[1:]
    if features is None:
        return torch.arange(math.prod(shape)).view(shape)
    if isinstance(features, Tensor):
        mask = features.reshape(features.shape[-3:]) - features.amin()
        fits = [n in (1, m) for n, m in zip(mask.shape[::-1], shape[::-1], strict=False)]
        if not all(fits):
            raise ValueError(
                f"expected a feature mask for images {shape}, got shape {tuple(features.shape)}"
            )
        return mask.expand(mask.shape[0] if mask.ndim == 3 else 1, height, width)
    rows, columns = (torch.arange(n) * min(features, n) // n for n in (height, width))
    # Cells differ in size by a pixel where the grid does not divide the side.
    return (rows[:, None] * min(features, width) + columns)[None]


def _expect_features(features: Features) -> Features:
    if features is None:
        return None
    if not isinstance(features, Tensor):
        return expect_integer(features, "features", low=1)
    if features.is_floating_point() or features.is_complex() or features.dtype == torch.bool:
        raise TypeError(f"expected a feature mask of an integer dtype, got {features.dtype}")
    if features.ndim < 2 or (features.ndim > 3 and features.shape[:-3].numel() != 1):
        raise ValueError(
            "expected a feature mask (H, W), (C, H, W) or (1, C, H, W), one for all images, got "
            f"shape {tuple(features.shape)}"
        )
    found = torch.unique(features)
    if len(found) != int(found[-1] - found[0]) + 1:
        raise ValueError(
            f"expected a feature mask with every integer from {found[0]} to {found[-1]}, got "
            f"{len(found)} of them; use mask.unique(return_inverse=True)[1]"
        )
    return features.long()


def least_squares(masks: Tensor, weights: Tensor, ridge: float = 0.0) -> Tensor:
    """Return the matrix that takes values to the slopes of their weighted linear fit.

    The fit has an intercept, which neither is returned nor counts for ``ridge``.

    Args:
        masks: What the values belong to ``(P, F)``.
        weights: Of the values, positive, ``(..., P)``.
        ridge: Times the sum of squared slopes, added to the weighted sum of squared errors.

    Returns:
        ``(..., F, P)``; differentiable with respect to ``weights``.

    >>> z = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> (least_squares(z, torch.ones(3)) @ torch.tensor([1.0, 3.0, 1.5])).round(decimals=4).tolist()
    [2.0, 0.5]
    """
    mean = weights @ masks / weights.sum(dim=-1, keepdim=True)
    root = weights.sqrt()
    centred = root[..., None] * (masks - mean[..., None, :])
    if ridge:
        penalty = math.sqrt(ridge) * torch.eye(masks.shape[1]).to(centred)
        centred = torch.cat([centred, penalty.expand(*centred.shape[:-2], -1, -1)], dim=-2)
    inverse: Tensor = torch.linalg.pinv(centred)
    return inverse[..., : len(masks)] * root[..., None, :]


class _Perturbation(Interpreter):
    """What the methods share: perturbed images, their scores, a map linear in these."""

    def __init__(
        self,
        model: nn.Module | None,
        baseline: float | Tensor,
        reduce: Reduction,
        perturbations_per_eval: int | None,
    ) -> None:
        super().__init__(None if model is None else expect_model(model))
        self.baseline = expect_baseline(baseline)
        self._reduce = expect_reduction(reduce)
        chunk = perturbations_per_eval
        self._chunk = (
            None if chunk is None else expect_integer(chunk, "perturbations_per_eval", low=1)
        )

    @final
    def explain(self, images: Tensor, target: Tensor) -> Explanation:
        """See `Interpreter.explain`."""
        # No gradient is taken inside: without a caller's there is no need of a graph.
        with differentiable_input(images) as (x, graph), torch.set_grad_enabled(graph):
            attributions, logits = self.attribute(partial(self._forward, target), x, target)
            explanation = Explanation(min_max(reduced(attributions, self._reduce)), logits)
        return explanation if graph else detached(explanation)

    @abstractmethod
    def attribute(
        self, forward: Callable[[Tensor], Tensor], images: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return signed attributions and the images' logits, for any function of images.

        Args:
            forward: Images ``(N, C, H, W)`` to logits ``(N, classes)``.
            images: ``(B, C, H, W)``.
            target: ``(B,)`` long.

        Returns:
            Attributions ``(B, 1 or C, H, W)``, logits ``(B, classes)``.
        """

    def _forward(self, target: Tensor, images: Tensor) -> Tensor:
        return self.logits(images, target)

    def _scores(
        self, forward: Callable[[Tensor], Tensor], images: Tensor, target: Tensor, keep: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what perturbing changes in the score, and the logits of the images themselves.

        Args:
            forward: Images to logits.
            images: ``(B, C, H, W)``.
            target: ``(B,)``.
            keep: What is not replaced ``(P, 1 or C, H, W)``.

        Returns:
            Logit of the target class less that of the image itself, ``(P, B)``; logits
            ``(B, classes)``.
        """
        deleted = background(self.baseline, images)
        whole = torch.ones_like(keep[:1])
        parts, count = [], len(images)
        for part in torch.split(torch.cat([whole, keep]), self._chunk or 1 + len(keep)):
            perturbed = torch.where(part[:, None], images, deleted)  # (p, B, C, H, W)
            parts.append(forward(perturbed.flatten(0, 1)))
        outputs = torch.cat(parts)
        scores = outputs.reshape(-1, count, outputs.shape[1])[
            :, torch.arange(count), target
        ].double()
        return scores[1:] - scores[:1], outputs[:count]


@final
class Occlusion(_Perturbation):
    """How much the logit falls when a window that slides over the image is replaced.

    A pixel gets the mean over the windows that cover it. Windows at the lower and right edge are
    cut off there.

    Convention:
        Reduced over channels, min-max scaled per image, at the image's resolution.

    Args:
        model: Classifier returning logits. ``None``: for `attribute` alone.
        window: Size of the window in pixels: one number, ``(h, w)``, or ``(c, h, w)``.
        stride: By how much it moves, likewise; at most its size.
        baseline: What replaces it: a number, or a tensor that broadcasts to the images.
        reduce: How channels become one; see `CaptumInterpreter`.
        perturbations_per_eval: Perturbed images an image in a forward pass; default: all.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: A number out of range, or (at a call) a window larger than the image.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    >>> Occlusion(model, window=4, stride=2)(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
    torch.Size([2, 1, 8, 8])

    Reference: Zeiler and Fergus, Visualizing and Understanding Convolutional Networks, ECCV 2014.
    """

    def __init__(
        self,
        model: nn.Module | None,
        window: int | tuple[int, ...] = 8,
        stride: int | tuple[int, ...] = 4,
        baseline: float | Tensor = 0.0,
        *,
        reduce: Reduction = "abs-max",
        perturbations_per_eval: int | None = None,
    ) -> None:
        super().__init__(model, baseline, reduce, perturbations_per_eval)
        self.window = _sides(window, "window")
        self.stride = _sides(stride, "stride")

    def attribute(
        self, forward: Callable[[Tensor], Tensor], images: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `_Perturbation.attribute`."""
        covered = self._windows(tuple(images.shape[1:])).to(images.device)
        change, logits = self._scores(forward, images, target, ~covered)
        spread = covered.flatten(1).to(change)  # (P, c H W)
        fallen = -change.T @ spread / spread.sum(dim=0)
        return fallen.to(images.dtype).reshape(len(images), *covered.shape[1:]), logits

    def _windows(self, shape: tuple[int, ...]) -> Tensor:
        """Return what each window covers, ``(P, 1 or C, H, W)``."""
        sides = []
        for size, window, stride in zip(shape, self.window, self.stride, strict=True):
            # No number: all channels.
            length, step = window or size, stride or window or size
            if length > size:
                raise ValueError(f"expected a window within images {shape}, got {self.window}")
            if length < size and step > length:
                raise ValueError(
                    f"expected strides of at most the window, {self.window}, got {self.stride}"
                )
            starts = torch.arange(math.ceil((size - length) / step) + 1)[:, None] * step
            places = torch.arange(size)
            sides.append((starts <= places) & (places < starts + length))
        if self.window[0] is None:
            sides[0] = sides[0][:, :1]
        channels, rows, columns = sides
        windows = channels[:, None, None, :, None, None] & (
            rows[:, None, :, None] & columns[:, None, :]
        ).unsqueeze(2)
        return windows.flatten(0, 2)


def _sides(value: int | tuple[int, ...], name: str) -> tuple[int | None, ...]:
    """Return numbers for channels, rows and columns; ``None`` for all channels."""
    sides = value if isinstance(value, tuple) else (value, value)
    if len(sides) not in (2, 3):
        raise ValueError(f"expected {name} to be a number, (h, w) or (c, h, w), got {value}")
    found = tuple(expect_integer(side, name, low=1) for side in sides)
    return found if len(found) == 3 else (None, *found)


class _OfFeatures(_Perturbation):
    """Methods that keep or replace features, each of which gets one number."""

    def __init__(
        self,
        model: nn.Module | None,
        features: Features,
        baseline: float | Tensor,
        reduce: Reduction,
        perturbations_per_eval: int | None,
    ) -> None:
        super().__init__(model, baseline, reduce, perturbations_per_eval)
        self.features = _expect_features(features)

    @final
    def attribute(
        self, forward: Callable[[Tensor], Tensor], images: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `_Perturbation.attribute`."""
        regions = feature_mask(self.features, tuple(images.shape[1:]))
        masks = self._masks(int(regions.amax()) + 1)
        # Where there are few features, perturbations come again and again.
        distinct, again = torch.unique(masks, dim=0, return_inverse=True)
        regions, distinct, again, masks = (
            part.to(images.device) for part in (regions, distinct, again, masks)
        )
        change, logits = self._scores(forward, images, target, distinct[:, regions])
        values = self._values(change[again], masks, regions, images)  # (B, F)
        return values.to(images.dtype)[:, regions], logits

    @abstractmethod
    def _masks(self, features: int) -> Tensor:
        """Return which of the features each perturbation keeps: boolean, ``(P, F)``."""

    @abstractmethod
    def _values(self, change: Tensor, masks: Tensor, regions: Tensor, images: Tensor) -> Tensor:
        """Return the number of each feature ``(B, F)``, from what perturbing changes ``(P, B)``."""


@final
class FeatureAblation(_OfFeatures):
    """How much the logit falls when one feature is replaced.

    Convention:
        Reduced over channels, min-max scaled per image, at the image's resolution.

    Args:
        model: Classifier returning logits. ``None``: for `attribute` alone.
        features: Cells along each side of a grid; or a feature mask ``(H, W)`` or ``(C, H, W)`` of
            integers; or ``None``: each value of the image by itself.
        baseline: What replaces them: a number, or a tensor that broadcasts to the images.
        reduce: How channels become one; see `CaptumInterpreter`.
        perturbations_per_eval: Perturbed images an image in a forward pass; default: all.

    Raises:
        TypeError: ``model`` is not a module, or a feature mask not of integers.
        ValueError: A number out of range, or a feature mask that leaves out an integer.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    >>> FeatureAblation(model, features=4)(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        model: nn.Module | None,
        features: Features = 8,
        baseline: float | Tensor = 0.0,
        *,
        reduce: Reduction = "abs-max",
        perturbations_per_eval: int | None = None,
    ) -> None:
        super().__init__(model, features, baseline, reduce, perturbations_per_eval)

    def _masks(self, features: int) -> Tensor:
        return ~torch.eye(features, dtype=torch.bool)

    def _values(self, change: Tensor, masks: Tensor, regions: Tensor, images: Tensor) -> Tensor:
        return -change.T


class _Drawn(_OfFeatures):
    """Methods whose perturbations are drawn from a seed."""

    def __init__(
        self,
        model: nn.Module | None,
        features: Features = 8,
        samples: int | None = 256,
        baseline: float | Tensor = 0.0,
        *,
        seed: int = 0,
        reduce: Reduction = "abs-max",
        perturbations_per_eval: int | None = None,
    ) -> None:
        super().__init__(model, features, baseline, reduce, perturbations_per_eval)
        self.samples = None if samples is None else expect_integer(samples, "samples", low=1)
        self.seed = expect_integer(seed, "seed", low=0)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


@final
class ShapleyValueSampling(_Drawn):
    """Shapley values: what a feature adds to the logit, on average over orders of appearance.

    Features appear one by one on the baseline, in orders drawn from ``seed``. The values of an
    image add up to the logit's difference between image and baseline, whatever the orders.

    Convention:
        Reduced over channels, min-max scaled per image, at the image's resolution.

    Args:
        model: See `FeatureAblation`.
        features: See `FeatureAblation`.
        samples: Number of orders; a map costs about as many forward passes for each feature.
            ``None``: all orders, of 7 features at most: exact Shapley values.
        baseline: See `FeatureAblation`.
        seed: Seed of the orders.
        reduce: See `FeatureAblation`.
        perturbations_per_eval: See `FeatureAblation`.

    Raises:
        TypeError: See `FeatureAblation`.
        ValueError: See `FeatureAblation`; or (at a call) too many features for all orders.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    >>> shapley = ShapleyValueSampling(model, features=2, samples=3)
    >>> shapley(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
    torch.Size([2, 1, 8, 8])

    Reference: Strumbelj and Kononenko, Explaining Prediction Models and Individual Predictions with
    Feature Contributions, 2014.
    """

    def __init__(
        self,
        model: nn.Module | None,
        features: Features = 8,
        samples: int | None = 4,
        baseline: float | Tensor = 0.0,
        *,
        seed: int = 0,
        reduce: Reduction = "abs-max",
        perturbations_per_eval: int | None = None,
    ) -> None:
        super().__init__(
            model,
            features,
            samples,
            baseline,
            seed=seed,
            reduce=reduce,
            perturbations_per_eval=perturbations_per_eval,
        )

    def _masks(self, features: int) -> Tensor:
        if self.samples is None:
            _expect_few(features, _MOST_ORDERS, "orders")
            orders = torch.tensor([*itertools.permutations(range(features))])
        else:
            generator = self._generator()
            drawn = [torch.randperm(features, generator=generator) for _ in range(self.samples)]
            orders = torch.stack(drawn)
        # Step k of an order keeps the features that come at place k or before, from none to all.
        places = orders.argsort(dim=1)[:, None]  # (orders, 1, F)
        return (places < torch.arange(features + 1)[:, None]).flatten(0, 1)

    def _values(self, change: Tensor, masks: Tensor, regions: Tensor, images: Tensor) -> Tensor:
        features = masks.shape[1]
        gains = change.reshape(-1, features + 1, change.shape[1]).diff(dim=1)  # (orders, F, B)
        entered = masks.to(change).reshape(-1, features + 1, features).diff(dim=1)  # one-hot
        return torch.einsum("okf,okb->bf", entered, gains) / len(gains)


def _expect_few(features: int, most: int, what: str) -> None:
    if features > most:
        raise ValueError(
            f"expected at most {most} features for all {what}, got {features}; pass samples, or "
            "fewer features"
        )


@final
class KernelShap(_Drawn):
    """Shapley values by a weighted linear fit to the logits of random subsets of features.

    Convention:
        Reduced over channels, min-max scaled per image, at the image's resolution.

    Args:
        model: See `FeatureAblation`.
        features: See `FeatureAblation`.
        samples: Number of perturbations, with none and all of the features among them; fewer than
            features give the fit of least norm. ``None``: all subsets, of 16 features at most:
            exact Shapley values, to about a millionth.
        baseline: See `FeatureAblation`.
        seed: Seed of the subsets.
        endpoint: Weight of no and of all features, which the fit is to pass through; the others'
            are 1 or less.
        reduce: See `FeatureAblation`.
        perturbations_per_eval: See `FeatureAblation`.

    Raises:
        TypeError: See `FeatureAblation`.
        ValueError: See `FeatureAblation`; or (at a call) too many features for all subsets.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    >>> KernelShap(model, 2, samples=None)(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
    torch.Size([2, 1, 8, 8])

    Reference: Lundberg and Lee, A Unified Approach to Interpreting Model Predictions, NeurIPS 2017.
    """

    def __init__(
        self,
        model: nn.Module | None,
        features: Features = 8,
        samples: int | None = 256,
        baseline: float | Tensor = 0.0,
        *,
        seed: int = 0,
        endpoint: float = 1e6,
        reduce: Reduction = "abs-max",
        perturbations_per_eval: int | None = None,
    ) -> None:
        super().__init__(
            model,
            features,
            samples,
            baseline,
            seed=seed,
            reduce=reduce,
            perturbations_per_eval=perturbations_per_eval,
        )
        self.endpoint = expect_number(endpoint, "endpoint", low=1.0)

    def _masks(self, features: int) -> Tensor:
        if self.samples is None:
            _expect_few(features, _MOST_SUBSETS, "subsets")
            return torch.tensor([*itertools.product((False, True), repeat=features)])
        generator = self._generator()
        ends = torch.ones(features, dtype=torch.bool), torch.zeros(features, dtype=torch.bool)
        chances = _shapley_kernel(torch.arange(features), features)
        drawn = []
        for _ in range(self.samples - 2 if features > 1 else 0):
            size = torch.multinomial(chances / chances.sum(), 1, True, generator=generator)
            values = torch.randn(1, features, generator=generator)
            # As many as the size says, those of the largest values.
            drawn.append((values > values.sort().values[0, features - 1 - size])[0])
        return torch.stack([*ends, *drawn][: self.samples])

    def _values(self, change: Tensor, masks: Tensor, regions: Tensor, images: Tensor) -> Tensor:
        features, kept = masks.shape[1], masks.sum(dim=1)
        weights = torch.ones(len(masks)).to(change)
        if self.samples is None:
            # Each subset comes once, where sampling draws its size by the kernel.
            subsets = [math.comb(features, size) for size in range(features + 1)]
            weights = (
                _shapley_kernel(kept, features).double() / torch.tensor(subsets).to(kept)[kept]
            )
            weights = weights.to(change)
        weights = weights.masked_fill((kept == 0) | (kept == features), self.endpoint)
        return (least_squares(masks.to(change), weights) @ change).T


def _shapley_kernel(size: Tensor, features: int) -> Tensor:
    """Return the kernel's weight of all subsets of a size together; 0 for none and all."""
    product = size * (features - size)
    return torch.where(product > 0, (features - 1) / product.clamp(min=1), 0.0)


@final
class Lime(_Drawn):
    r"""A linear fit to the logits of images with a random half of their features replaced.

    Perturbed images count by how near they are to the image,
    :math:`e^{-d^2 / 2 \sigma^2}`. These weights change with the image, and the map's gradient
    includes what that does.

    Convention:
        Reduced over channels, min-max scaled per image, at the image's resolution.

    Args:
        model: See `FeatureAblation`.
        features: See `FeatureAblation`.
        samples: Number of perturbations; fewer than features give the fit of least norm.
        baseline: See `FeatureAblation`.
        seed: Seed of the perturbations.
        width: Width of the kernel, sigma.
        distance: Of perturbed image and image: one less their cosine, or Euclidean.
        ridge: Times the squared slopes, added to the weighted squared errors.
        reduce: See `FeatureAblation`.
        perturbations_per_eval: See `FeatureAblation`.

    Raises:
        TypeError: See `FeatureAblation`.
        ValueError: See `FeatureAblation`; or an unknown distance.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    >>> Lime(model, features=2, samples=9)(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
    torch.Size([2, 1, 8, 8])

    Reference: Ribeiro et al., "Why Should I Trust You?": Explaining the Predictions of Any
    Classifier, KDD 2016. There the fit has few non-zero slopes (Lasso), which has no closed form.
    """

    samples: int

    def __init__(
        self,
        model: nn.Module | None,
        features: Features = 8,
        samples: int = 256,
        baseline: float | Tensor = 0.0,
        *,
        seed: int = 0,
        width: float = 1.0,
        distance: Literal["cosine", "euclidean"] = "cosine",
        ridge: float = 0.0,
        reduce: Reduction = "abs-max",
        perturbations_per_eval: int | None = None,
    ) -> None:
        super().__init__(
            model,
            features,
            expect_integer(samples, "samples", low=1),
            baseline,
            seed=seed,
            reduce=reduce,
            perturbations_per_eval=perturbations_per_eval,
        )
        self.width = expect_number(width, "width", low=0.0, above=True)
        self.ridge = expect_number(ridge, "ridge", low=0.0)
        if distance not in ("cosine", "euclidean"):
            raise ValueError(f"expected distance 'cosine' or 'euclidean', got {distance!r}")
        self.distance = distance

    def _masks(self, features: int) -> Tensor:
        generator, half = self._generator(), torch.full((1, features), 0.5)
        drawn = [torch.bernoulli(half, generator=generator) for _ in range(self.samples)]
        return torch.cat(drawn).bool()

    def _values(self, change: Tensor, masks: Tensor, regions: Tensor, images: Tensor) -> Tensor:
        masks = masks.to(change)
        square = self._squared_distance(masks, regions, images.to(change))
        weights = (-square / (2 * self.width**2)).exp()
        fit = least_squares(masks, weights, self.ridge)  # (B, F, P)
        return torch.einsum("bfp,pb->bf", fit, change)

    def _squared_distance(self, masks: Tensor, regions: Tensor, images: Tensor) -> Tensor:
        """Return the squared distance of each perturbed image to its image, ``(B, P)``.

        A perturbed image is the image on some features and the baseline on the others, so inner
        products with it are sums of those over features, and the images need not be formed again.
        """
        deleted = background(self.baseline, images)
        of = regions.expand_as(images[0]).flatten()

        def products(a: Tensor, b: Tensor) -> Tensor:
            sums = images.new_zeros(len(images), masks.shape[1])
            return sums.index_add(1, of, (a * b).flatten(1))  # (B, F)

        if self.distance == "euclidean":
            apart = images - deleted
            return products(apart, apart) @ (1 - masks).T
        own = products(images, images)
        mixed = own @ masks.T + products(images, deleted) @ (1 - masks).T
        other = own @ masks.T + products(deleted, deleted) @ (1 - masks).T
        norms = own.sum(dim=1, keepdim=True).clamp(min=1e-16) * other.clamp(min=1e-16)
        return (1 - mixed / norms.sqrt()).square()

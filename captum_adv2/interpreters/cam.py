# SPDX-License-Identifier: MIT
r"""Representation-guided interpreters: CAM (§3.3, Eq. 6, 7) and Grad-CAM (§A1, Eq. 14, 15).

A network that ends in global average pooling and a linear layer scores a class by
:math:`z_c = \sum_k w_{k,c} \, \mathrm{mean}_{ij} \, a_k[i, j]` (Eq. 6); CAM leaves out the mean:
:math:`m_c[i, j] = \sum_k w_{k,c} \, a_k[i, j]` (Eq. 7). Grad-CAM takes the weights from the
gradient of the logit, :math:`w_{k,c} = \mathrm{mean}_{ij} \, \partial z_c / \partial a_k[i, j]`
(Eq. 14), so that any head will do, and keeps the positive part (Eq. 15).

Features, map and logits come from one forward pass. The features are the input of the last pooling
that the forward pass runs, however it is written (a module, ``F.adaptive_avg_pool2d``, ``mean``);
where several poolings follow each other, as in VGG, the input of the first of them. So DenseNet's
functional ReLU is included, without a table of architectures. ``layer`` overrides this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_adv2.interpreters import base
from captum_adv2.interpreters.tap import find_module, tapped
from captum_adv2.spec import checked

_POOLINGS = {"adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "max_pool2d", "mean"}


class _PoolingInput(TorchFunctionMode):
    """Keeps the input of the last poolings, one after the other, that a forward pass runs."""

    features: Tensor | None = None
    _pooled: Any = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        pools = getattr(func, "__name__", "") in _POOLINGS
        if pools and args and args[0].ndim == 4:
            if args[0] is not self._pooled:
                self.features = args[0]
            self._pooled = out
        return out


class _FeatureMap(base.Interpreter):
    """What CAM and Grad-CAM share: features and logits of one forward pass."""

    model: nn.Module

    @checked
    def __init__(self, model: nn.Module, layer: nn.Module | str | None = None) -> None:
        super().__init__(model)
        self._layer = None if layer is None else find_module(model, layer)
        weighted = [m for m in model.modules() if isinstance(getattr(m, "weight", None), Tensor)]
        self._head = weighted[-1] if weighted else None

    def _features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features ``(B, K, h, w)`` and logits ``(B, classes)``."""
        if self._layer is not None:
            reading: Any = tapped(self._layer, "output")
        elif isinstance(self._head, nn.Conv2d):
            reading = tapped(self._head, "input")
        else:
            reading = _PoolingInput()
        with reading as tap:
            logits = self.logits(images)
        features: Tensor | None = tap.features
        if features is None or features.ndim != 4 or len(features) != len(images):
            found = "none" if features is None else f"shape {tuple(features.shape)}"
            raise ValueError(
                f"expected feature maps (B, K, h, w) for {type(self).__name__}, got {found}; pass "
                "layer=, the module (or its dotted name) whose output they are"
            )
        return features, logits


def _weighted(features: Tensor, weights: Tensor) -> Tensor:
    """Return the sum over k of w_k a_k, for ``(B, K, h, w)`` and ``(B, K)``: ``(B, 1, h, w)``."""
    # Not einsum: PyTorch 2.5's batch norm takes a wrong gradient from the strides of einsum's.
    maps = weights[:, None] @ features.flatten(2)  # (B, 1, h w)
    return maps.view(len(features), 1, *features.shape[2:])


@final
class CAM(_FeatureMap):
    """CAM, for networks that end in average pooling and a linear layer (Eq. 7).

    Convention:
        Min-max scaled per image, at the features' resolution (7x7 for ResNet-50 at 224).

    Features and head are found in torchvision's resnet, densenet, squeezenet, mobilenet_v2,
    efficientnet and the like, also inside a wrapper that normalises. The head is the model's last
    linear layer or 1x1 convolution. The first call checks that features and head give the logits
    (Eq. 6), unless the layer is named.

    Args:
        model: Classifier returning logits.
        layer: Module, or its dotted name, whose output the features are; default: found.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ...                     nn.Linear(2, 3))
    >>> CAM(net)(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
    torch.Size([2, 1, 6, 6])

    Reference: Zhou et al., Learning Deep Features for Discriminative Localization, CVPR 2016.
    """

    def __init__(self, model: nn.Module, layer: nn.Module | str | None = None) -> None:
        super().__init__(model, layer)
        self._verified = layer is not None
        head = self._head
        pointwise = isinstance(head, nn.Conv2d) and head.kernel_size == (1, 1)
        if not (pointwise or isinstance(head, nn.Linear)):
            got = "none" if head is None else type(head).__name__
            raise ValueError(
                f"expected {type(model).__name__} to end in a linear layer or a 1x1 convolution "
                f"for CAM, got {got}; use GradCAM, which needs no linear head"
            )
        self._linear: Any = head

    def explain(self, images: Tensor, target: Tensor) -> base.Explanation:
        """See `Interpreter.explain`."""
        features, logits = self._features(images)
        weight = self._linear.weight.flatten(1)  # (classes, K)
        if features.shape[1] != weight.shape[1]:
            raise ValueError(
                f"expected features of {weight.shape[1]} channels, the head's inputs, for CAM, got "
                f"{features.shape[1]}; pass the layer that is pooled, or use GradCAM"
            )
        # In train mode, dropout may act between features and logits.
        if not (self._verified or self.model.training):
            self._verify(features[:1].detach(), logits[:1].detach())
        return base.Explanation(base.min_max(_weighted(features, weight[target])), logits)

    def _verify(self, features: Tensor, logits: Tensor) -> None:
        """Check Eq. 6 on one image, with and without a ReLU between head and pooling."""
        weight = self._linear.weight.detach().flatten(1)[:, :, None, None]
        bias = None if self._linear.bias is None else self._linear.bias.detach()
        scores = F.conv2d(features, weight, bias)  # (1, classes, h, w)
        tolerance = 1e-2 * (1 + logits.abs().amax())
        self._verified = any(
            candidate.shape == logits.shape and bool((candidate - logits).abs().amax() < tolerance)
            for candidate in (scores.mean((2, 3)), scores.relu().mean((2, 3)))
        )
        if not self._verified:
            raise ValueError(
                f"expected {type(self.model).__name__} to be average pooling and one linear layer "
                "on its last feature maps for CAM, got other logits than these give; pass layer= "
                "to use CAM all the same, or use GradCAM"
            )


@final
class GradCAM(_FeatureMap):
    """Grad-CAM: features weighted by the mean gradient of the logit, positive part (Eq. 14, 15).

    Convention:
        Min-max scaled per image, at the features' resolution; a map without a positive part is 0.

    Works with any head; on average pooling and a linear head it is the positive part of CAM, at
    the same cost. Features are found as for `CAM`.

    Args:
        model: Classifier returning logits.
        layer: Module, or its dotted name, whose output the features are; default: found.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 3))
    >>> GradCAM(net)(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
    torch.Size([2, 1, 6, 6])

    Reference: Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks, ICCV 2017.
    """

    def explain(self, images: Tensor, target: Tensor) -> base.Explanation:
        """See `Interpreter.explain`."""
        with base.differentiable_input(images) as (x, graph):
            features, logits = self._features(x)
            score = logits.gather(1, target[:, None]).sum()
            (gradient,) = torch.autograd.grad(score, features, create_graph=graph)
            weights = gradient.mean(dim=(2, 3))  # Eq. 14, (B, K)
            explanation = base.Explanation(
                base.min_max(_weighted(features, weights).relu()), logits
            )
        return explanation if graph else base.detached(explanation)

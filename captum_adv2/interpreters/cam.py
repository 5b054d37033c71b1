# SPDX-License-Identifier: MIT
r"""Representation-guided interpreters: CAM (§3.3, Eq. 6, 7) and Grad-CAM (§A1, Eq. 14, 15).

A network that ends in global average pooling and a linear layer scores a class by
:math:`z_c = \sum_k w_{k,c} \, \mathrm{mean}_{ij} \, a_k[i, j]` (Eq. 6); CAM leaves out the mean:
:math:`m_c[i, j] = \sum_k w_{k,c} \, a_k[i, j]` (Eq. 7). Grad-CAM takes the weights from the
gradient of the logit, :math:`w_{k,c} = \mathrm{mean}_{ij} \, \partial z_c / \partial a_k[i, j]`
(Eq. 14; or of the probability, as printed there), so that any head will do, and keeps the positive
part (Eq. 15).

Features, map and logits come from one forward pass. The features are the last that have places, by
the pass itself (`features`): the input of the last pooling, however it is written, or where several
follow each other, as in VGG, of the first of them. The first pass at a size of images finds them,
and the later ones read them. ``layer`` overrides this.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_adv2.interpreters import base
from captum_adv2.interpreters.features import Graph, Pass
from captum_adv2.interpreters.gradient import log_odds
from captum_adv2.interpreters.tap import (
    Tap,
    eagerly,
    find_module,
    graph_enabled,
    module_of,
    tapped,
    warn_of_runs,
)
from captum_adv2.spec import checked


class _Place(NamedTuple):
    """Where features are in the passes of images of a shape, as far as that is known."""

    images: torch.Size
    length: int  # operations of such a pass
    output: tuple[int, int]  # of which operation, and which of its outputs
    channels: int  # the dimension of the features' channels


class _Features(NamedTuple):
    """Features as they were computed, and which dimension, 1 or 3, is channels."""

    raw: Tensor
    channels: int

    def maps(self, like: Tensor | None = None) -> Tensor:
        """Return features, or a tensor like them, as ``(B, K, h, w)``."""
        tensor = self.raw if like is None else like
        return tensor if self.channels == 1 else tensor.permute(0, 3, 1, 2)


class _FeatureMap(base.Interpreter):
    """What CAM and Grad-CAM share: features and logits of one forward pass."""

    model: nn.Module

    @checked
    def __init__(self, model: nn.Module, layer: nn.Module | str | None = None) -> None:
        super().__init__(model)
        self._layer = None if layer is None else find_module(model, layer)
        self._place: _Place | None = None

    def _features(self, images: Tensor) -> tuple[_Features, Tensor]:
        """Return features and logits ``(B, classes)`` of one pass."""
        place = self._place
        if place is None or place.images != images.shape[1:]:
            return self._found(images)
        if self._layer is None:
            with eagerly(), Pass(place.output) as run:
                logits = self.logits(images)
            raw = run.kept if run.count == place.length else None
        else:
            with tapped(self._layer, "output") as tap:
                logits = self.logits(images)
            raw = tap.features
        if raw is None:  # another preprocessing, or mode
            return self._found(images)
        return _Features(raw, place.channels), logits

    def _found(self, images: Tensor) -> tuple[_Features, Tensor]:
        """Find features in a pass, whose graph says what depends on what; remember the place."""
        keep = torch.is_grad_enabled()
        with graph_enabled():
            x = images if images.requires_grad else images.detach().clone().requires_grad_()
            watched = nullcontext(Tap()) if self._layer is None else tapped(self._layer, "output")
            with watched as tap, eagerly(), Pass() as run:
                logits = self.logits(x)
            graph = Graph(run, x, logits)
            self._note(graph)
            if self._layer is None:
                output, found = self._last(graph, x)
            else:
                output, found = (0, 0), self._named(graph, x, tap)
        self._place = _Place(images.shape[1:], run.count, output, found.channels)
        if not keep:
            found, logits = found._replace(raw=found.raw.detach()), logits.detach()
        return found, logits

    def _note(self, graph: Graph) -> None:
        """Take from the graph of the first pass what else is wanted of it."""

    def _last(self, graph: Graph, images: Tensor) -> tuple[tuple[int, int], _Features]:
        """Return the last features that have places, and where the pass makes them."""
        found = graph.features()
        if found is not None:
            return found.place, _Features(found.maps, found.channels)
        got, hint = "none", "pass layer=, the module (or its dotted name) whose output they are"
        if graph.mixed is not None:
            got = f"shape {tuple(graph.mixed.shape)}, which are mixed again further on"
            name = module_of(graph.mixed, self.model, lambda: self.logits(images))
            hint = hint if name is None else f"pass layer={name!r} to use them all the same"
        raise self._no_maps(got, f"{hint}, or use Gradient, which needs no feature maps")

    def _named(self, graph: Graph, images: Tensor, tap: Tap) -> _Features:
        """Return the features that the named layer gives, if their layout is known."""
        raw = tap.features
        if raw is None or raw.ndim != 4 or len(raw) != len(images):
            got = "none" if raw is None else f"shape {tuple(raw.shape)}"
            hint = "pass layer=, the module (or its dotted name) whose output they are"
            if raw is not None and raw.ndim == 3:
                hint = "of tokens there are no maps: use Gradient, or a layer before them"
            raise self._no_maps(got, hint)
        channels = graph.channels(raw, images.shape)
        if channels is None:
            hint = "pass a layer whose output has channels first"
            raise self._no_maps(f"shape {tuple(raw.shape)} of unknown layout", hint)
        found = _Features(raw, channels)
        if found.maps()[0, 0].numel() < 2:
            raise self._no_maps(f"one pixel, {tuple(raw.shape)}", "pass a layer before the pooling")
        warn_of_runs(f"the layer of {type(self).__name__}", tap.runs)
        return found

    def _no_maps(self, got: str, hint: str) -> ValueError:
        wanted = f"feature maps (B, K, h, w) for {type(self).__name__}"
        return ValueError(f"expected {wanted}, got {got}; {hint}")


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
    efficientnet, swin and the like, also inside a wrapper that normalises. The head is the last
    linear layer or 1x1 convolution that runs. The first call checks that features and head give the
    logits (Eq. 6), unless the layer is named.

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
        self._head = ""  # the name: the module may be replaced

    def explain(self, images: Tensor, target: Tensor) -> base.Explanation:
        """See `Interpreter.explain`."""
        found, logits = self._features(images)
        features = found.maps()
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

    @property
    def _linear(self) -> Any:
        return self.model.get_submodule(self._head)

    def _note(self, graph: Graph) -> None:
        """Remember the head: the module whose weight the last product of the pass has."""
        head = graph.weights
        if head is not None and head[0].numel() == head.shape[1]:
            for name, module in self.model.named_modules():
                weight = getattr(module, "weight", None)
                if isinstance(weight, Tensor) and torch.equal(weight, head):
                    self._head = name
                    return
        got = "none" if head is None else f"weights of shape {tuple(head.shape)}"
        raise ValueError(
            f"expected {type(self.model).__name__} to end in a linear layer or a 1x1 convolution "
            f"for CAM, got {got}; use GradCAM, which needs no linear head, or pass a model that "
            "returns the logits of one head"
        )

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
        score: What is differentiated: the logit, or the probability, as Eq. 14 has it. The gradient
            of the log-odds stands for the latter's: the same map, at any confidence.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 3))
    >>> GradCAM(net)(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
    torch.Size([2, 1, 6, 6])

    Reference: Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks, ICCV 2017.
    """

    @checked
    def __init__(
        self,
        model: nn.Module,
        layer: nn.Module | str | None = None,
        score: Literal["logit", "probability"] = "logit",
    ) -> None:
        super().__init__(model, layer)
        self._score = score

    def explain(self, images: Tensor, target: Tensor) -> base.Explanation:
        """See `Interpreter.explain`."""
        with base.differentiable_input(images) as (x, graph):
            found, logits = self._features(x)
            own = self._score == "logit"
            scores = logits.gather(1, target[:, None]) if own else log_odds(logits, target)
            (gradient,) = torch.autograd.grad(scores.sum(), found.raw, create_graph=graph)
            weights = found.maps(gradient).mean(dim=(2, 3))  # Eq. 14, (B, K)
            maps = base.min_max(_weighted(found.maps(), weights).relu())
            explanation = base.Explanation(maps, logits)
        return explanation if graph else base.detached(explanation)

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
follow each other, as in VGG, of the first of them; of a vision transformer, the last tokens that
all matter, on their grid (`tokens`). The first pass at a size of images finds them, and the later
ones read them. ``layer`` overrides this.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any, Literal, NamedTuple, TypeAlias, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from captum_adv2.interpreters import base
from captum_adv2.interpreters.features import Found, Graph, Pass
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
from captum_adv2.interpreters.tokens import Layout
from captum_adv2.spec import checked

Reshape: TypeAlias = Callable[[Tensor], Tensor]
"""Turns a layer's output, or a gradient like it, into maps ``(B, K, h, w)``."""

_LAYER = "pass layer=, the module (or its dotted name) whose output they are"
_TOKENS = (
    "pass an earlier layer, whose tokens all reach the logits, or reshape=, which puts them on "
    "their grid: lambda tokens: tokens[:, 1:].transpose(1, 2).unflatten(2, (h, w))"
)


class _Place(NamedTuple):
    """Where features are in the passes of images of a shape, as far as that is known."""

    images: torch.Size
    length: int  # operations of such a pass
    output: tuple[int, int]  # of which operation, and which of its outputs
    layout: Layout | None  # of the features; None where `reshape` is it


class _Features(NamedTuple):
    """Features as they were computed, and how they are read as maps."""

    raw: Tensor
    layout: Reshape

    def maps(self, like: Tensor | None = None) -> Tensor:
        """Return features, or a tensor like them, as ``(B, K, h, w)``."""
        return self.layout(self.raw if like is None else like)


class _FeatureMap(base.Interpreter):
    """What CAM and Grad-CAM share: features and logits of one forward pass."""

    model: nn.Module
    _reshape: Reshape | None = None

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
        return self._read(raw, place.layout), logits

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
            found = self._last(graph, x) if self._layer is None else self._named(graph, x, tap)
        output, raw, layout = found
        self._place = _Place(images.shape[1:], run.count, output, layout)
        if not keep:
            raw, logits = raw.detach(), logits.detach()
        return self._read(raw, layout), logits

    def _read(self, raw: Tensor, layout: Layout | None) -> _Features:
        """Return features of a layout, or, without one, those that ``reshape`` makes of them."""
        reshape: Any = self._reshape if layout is None else layout
        return _Features(raw, reshape)

    def _note(self, graph: Graph) -> None:
        """Take from the graph of the first pass what else is wanted of it."""

    def _last(self, graph: Graph, images: Tensor) -> Found:
        """Return the last features that have places, and where the pass makes them."""
        found = graph.features()
        if found is not None:
            return found
        graph.expect_slope(images)
        got, hint = "none", _LAYER
        if graph.mixed is not None:
            got = f"shape {tuple(graph.mixed.shape)}, which are mixed again further on"
            name = module_of(graph.mixed, self.model, lambda: self.logits(images))
            hint = hint if name is None else f"pass layer={name!r} to use them all the same"
        raise self._no_maps(got, f"{hint}, or use Gradient, which needs no feature maps")

    def _named(self, graph: Graph, images: Tensor, tap: Tap) -> Found:
        """Return the features that the named layer gives."""
        raw = tap.features
        if raw is None:
            raise self._no_maps("none", _LAYER)
        layout = None
        if self._reshape is None:
            first = raw.ndim in (3, 4) and len(raw) == len(images)
            layout = graph.layout(raw) if first else None
            if layout is None:
                graph.expect_slope(images)
                got = f"shape {tuple(raw.shape)} of unknown layout"
                hint = "pass a layer whose output has channels first, or reshape="
                raise self._no_maps(got, hint if raw.ndim == 4 else _TOKENS)
        maps = self._read(raw, layout).maps()
        if maps.ndim != 4 or len(maps) != len(images):
            raise self._no_maps(f"shape {tuple(maps.shape)}", "see the function given as reshape=")
        if maps[0, 0].numel() < 2:
            raise self._no_maps(f"one pixel, {tuple(raw.shape)}", "pass a layer before the pooling")
        warn_of_runs(f"the layer of {type(self).__name__}", tap.runs)
        return Found((0, 0), raw, layout)

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
        # Small logits are held to their own size, and to the rounding of what they are summed from.
        terms = F.conv2d(features.abs(), weight.abs()).mean((2, 3)).amax()
        rounding = max(torch.finfo(each.dtype).eps for each in (scores, logits))
        tolerance = 1e-2 * logits.abs().amax() + rounding * terms
        self._verified = any(
            candidate.shape == logits.shape and bool((candidate - logits).abs().amax() <= tolerance)
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
    the same cost. Features are found as for `CAM`; of a vision transformer they are the last tokens
    that all reach the logits, with a class token the input of the last block.

    Args:
        model: Classifier returning logits.
        layer: Module, or its dotted name, whose output the features are; default: found.
        reshape: Turns that layer's output into maps ``(B, K, h, w)``, as pytorch-grad-cam's
            ``reshape_transform`` does; default: found.
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
        reshape: Reshape | None = None,
        score: Literal["logit", "probability"] = "logit",
    ) -> None:
        super().__init__(model, layer)
        if reshape is not None and layer is None:
            raise ValueError("expected a layer for reshape, got none; pass layer=, too")
        self._reshape = reshape
        self._score = score

    def explain(self, images: Tensor, target: Tensor) -> base.Explanation:
        """See `Interpreter.explain`."""
        with ExitStack() as stack:
            x, graph = stack.enter_context(base.differentiable_input(images))
            if graph:  # fused attention has no second derivative
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            found, logits = self._features(x)
            own = self._score == "logit"
            scores = logits.gather(1, target[:, None]) if own else log_odds(logits, target)
            (gradient,) = torch.autograd.grad(scores.sum(), found.raw, create_graph=graph)
            weights = found.maps(gradient).mean(dim=(2, 3))  # Eq. 14, (B, K)
            maps = base.min_max(_weighted(found.maps(), weights).relu())
            explanation = base.Explanation(maps, logits)
        return explanation if graph else base.detached(explanation)

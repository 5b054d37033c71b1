# SPDX-License-Identifier: MIT
r"""The derivative of a gradient from first-order passes alone: no double backward.

An attack on a map made of gradients :math:`g = \nabla_x u` needs :math:`H v`, the Hessian of a
score u times a vector. The textbook way differentiates the backward pass a second time, which
costs three passes, keeps two graphs, and needs a second derivative of every operation. Here,

1. the *first pass* computes g at x, and keeps of each ReLU its input z, and
   :math:`c = s'(z) \, b`, where s is ReLU's smooth derivative and b the gradient at its output;
2. the *second pass* computes a gradient at :math:`x + \delta v`. In it, a ReLU is linear along s:
   its value is :math:`\mathrm{ReLU}(z) + s(z) \, t`, where t is how far its input is from z, and
   backward it passes on :math:`s(z) \, b' + c \, t`. The difference of the two gradients over
   :math:`\delta` is :math:`H v`.

Every path through the second pass is linear in :math:`\delta`, so the difference is exact for a
network of ReLUs, maxima and linear layers whatever :math:`\delta` is: nothing cancels, in single or
half precision either. For other operations (SiLU, attention, layer normalisation) it is a finite
difference, whose error is proportional to :math:`\delta`: about 1 % at the length used here. The
gradient of the prediction is computed along with it, in the same pass.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks

from captum_adv2.interpreters import base
from captum_adv2.interpreters.relu import Bend, Derivative, ReLUMode, Slope, Smoothing, as_slope
from captum_adv2.spec import SoundnessWarning

Function = Callable[[Tensor], Tensor]  # points (N, C, H, W) to logits (N, classes)
Score = Callable[[Tensor, Tensor], Tensor]  # logits and classes (N,) to one number each, (N,)

# Root mean square of delta v, in units of the image's range.
_SHIFT = 1 / 255
# Points in one pass, where there are more than images in the batch: 13 colour images of 224x224.
_NUMBERS = 2**21


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
            return _gradient(function, score, points, target, graph=True)
        parts = [
            _gradient(function, score, part.detach().requires_grad_(), classes)
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

    def __call__(
        self, function: Function, score: Score, points: Tensor, target: Tensor, batch: int
    ) -> tuple[Tensor, Tensor]:
        """See `Gradients`."""
        parts = [
            (part, _Passes(function, score, classes, self.slope, self.progress))
            for part, classes in _parts(batch, points, target)
        ]
        found = [_Node.apply(part, passes, len(parts) > 1) for part, passes in parts]
        if self.progress == 0 and not parts[0][1].found:
            _expect_curved(function, points[:1])
        gradients, logits = zip(*found, strict=True)
        return torch.cat(gradients), torch.cat(logits)


def _gradient(
    function: Function, score: Score, points: Tensor, target: Tensor, graph: bool = False
) -> tuple[Tensor, Tensor]:
    logits = function(points)
    total = score(_full(logits), target).sum()
    (gradient,) = torch.autograd.grad(total, points, create_graph=graph)
    return gradient, logits


def _full(logits: Tensor) -> Tensor:
    """Return logits in single precision, where they are in half precision."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _parts(batch: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Split tensors ``(N, ...)`` so that the memory of a pass over a part is bounded."""
    size = max(batch, _NUMBERS // tensors[0][0].numel())
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

    A step costs two forward and two backward passes, in about twice the memory of one.
    """

    slope: Slope

    def __call__(
        self, interpreter: GradientBased, images: Tensor, state: Tensor, progress: float
    ) -> base.Explanation:
        """See `Surrogate`."""
        return interpreter.explain_by(TwoPasses(self.slope, progress), images, state)


def surrogate(smoothing: Smoothing) -> base.Surrogate:
    """Return the surrogate of a gradient-based interpreter for a smoothing."""
    return base.Exact() if smoothing is None else FirstOrder(as_slope(smoothing))


def _expect_curved(function: Function, point: Tensor) -> None:
    """Warn where logits are piecewise linear in the image, for nothing was smoothed."""
    with torch.enable_grad():
        x = point.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(function(x)[:, 0].sum(), x, create_graph=True)
        curved = gradient.requires_grad and bool(
            torch.autograd.grad(gradient.square().sum(), x, materialize_grads=True)[0].any()
        )
    if not curved:
        message = (
            "the logits are piecewise linear in the image, and no ReLU was found to smooth: an "
            "attack cannot follow the map; write activations as nn.ReLU or F.relu, and pass the "
            "model as it was before torch.jit or torch.compile"
        )
        warnings.warn(message, SoundnessWarning, stacklevel=2)


class _Node(torch.autograd.Function):
    """The gradients of scores, whose own derivative is computed by a second pass."""

    @staticmethod
    def forward(ctx: Any, points: Tensor, passes: _Passes, forget: bool) -> tuple[Tensor, Tensor]:
        gradient, logits = passes.gradient(points)
        if forget:  # not to keep the memory of all parts at once
            passes.kept.clear()
        ctx.passes, ctx.forget = passes, forget
        ctx.save_for_backward(points, gradient, logits)
        return gradient, logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *changes: Any) -> Any:
        points, gradient, logits = ctx.saved_tensors
        if ctx.forget:
            ctx.passes.gradient(points)
        ctx.forget = True  # the second pass uses up what the first one kept
        return ctx.passes.change(points, gradient, logits, *changes), None, None


class _Layer:
    """What the first pass keeps of a ReLU."""

    slope: Tensor  # s(z)
    source: Tensor  # s'(z) times the gradient at its output

    def __init__(self, z: Tensor, bend: Bend, derivative: Derivative) -> None:
        self.z, self.bend, self.derivative = z, bend, derivative
        self.version = z._version


class _First(torch.autograd.Function):
    """A ReLU in the first pass."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, layer: _Layer, exact: Callable[[Tensor], Tensor], in_place: bool
    ) -> Tensor:
        ctx.layer = layer
        if in_place:
            ctx.mark_dirty(z)
        return exact(z)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        layer: _Layer = ctx.layer
        with torch.enable_grad():
            z = layer.z.detach().requires_grad_()
            slope = layer.bend.slope(layer.derivative, z)
            (layer.source,) = torch.autograd.grad(slope, z, gradients, materialize_grads=True)
        layer.slope = slope.detach()
        return gradients[0] * layer.slope, None, None, None


class _Second(torch.autograd.Function):
    """The same ReLU in the second pass, where it is linear; what the layer kept is used up."""

    @staticmethod
    def forward(
        ctx: Any, near: Tensor, layer: _Layer, exact: Callable[[Tensor], Tensor], in_place: bool
    ) -> Tensor:
        shift = near.sub_(layer.z) if in_place else near - layer.z
        ctx.save_for_backward(layer.slope, layer.source.mul_(shift))
        if in_place:
            ctx.mark_dirty(near)
        return torch.addcmul(exact(layer.z), layer.slope, shift, out=shift)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        slope, source = ctx.saved_tensors
        return torch.addcmul(source, slope, gradients[0]), None, None, None


_MAXIMA = {f"{kind}max_pool{n}d" for kind in ("", "adaptive_") for n in (1, 2, 3)}
_HOOKED = "expected no hooks on saved tensors"


class _Passes(ReLUMode):
    """Both passes of a function over points."""

    def __init__(
        self, function: Function, score: Score, target: Tensor, slope: Slope, progress: float
    ) -> None:
        super().__init__()
        self.function, self.score, self.target = function, score, target
        self.slope, self.progress = slope, progress
        # Of ReLUs and of the places of maxima, in the order of running; the second pass takes them.
        self.kept: deque[Any] = deque()
        self._second = False
        # Whether to keep copies of what later operations change in place, and to keep all that a
        # backward pass needs: activation checkpointing would run the function again without this.
        self._careful = False
        self.found = 0  # ReLUs

    def gradient(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Run the first pass; return the gradient of each point's score, and the logits."""
        self._second = False
        with torch.enable_grad():
            leaf = points.detach().requires_grad_()
            gradient, logits = _gradient(self._run, self.score, leaf, self.target)
        return gradient, logits.detach()

    def change(
        self, points: Tensor, gradient: Tensor, logits: Tensor, v: Tensor, c: Tensor
    ) -> Tensor:
        """Run the second pass; return H v, plus the gradient of the logits times c."""
        size = v.float().square().mean(dim=(1, 2, 3), keepdim=True).sqrt().to(v)
        delta = torch.where(size > 0, _SHIFT / size, 1.0)
        self._second = True
        with torch.enable_grad():
            leaf = (points + delta * v).detach().requires_grad_()
            near = self._run(leaf)
            at = _full(logits).detach().requires_grad_()
            total = self.score(at, self.target).sum()
            (slope,) = torch.autograd.grad(total, at, create_graph=True)
            if slope.requires_grad:  # the score is not linear in the logits
                slope = slope + torch.autograd.grad(slope, at, near.detach().to(at) - at)[0]
            weights = slope.detach() + delta.flatten(1) * c
            (moved,) = torch.autograd.grad(near, leaf, weights.to(near))
        return (moved - gradient) / delta

    def activate(
        self, z: Tensor, bend: Bend, exact: Callable[[Tensor], Tensor], in_place: bool
    ) -> Tensor:
        """See `ReLUMode`."""
        function: Any = _Second
        if self._second:
            layer = self.kept.popleft()
        else:
            before = z.detach().clone() if in_place or self._careful else z.detach()
            layer = _Layer(before, bend, self.slope(before, self.progress))
            self.kept.append(layer)
            self.found += 1
            function = _First
        result: Tensor = function.apply(z, layer, exact, in_place)
        return result

    def other(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Run a function that is no ReLU; in the second pass, maxima are where they were."""
        if name not in _MAXIMA or kwargs.get("return_indices"):
            return func(*args, **kwargs)
        if not self._second:
            values, places = getattr(F, f"{name}_with_indices")(*args, **kwargs)
            self.kept.append(places)
            return values
        places = self.kept.popleft()
        z = args[0] if args else kwargs["input"]
        return z.flatten(2).gather(2, places.flatten(2)).view_as(places)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `ReLUMode`."""
        if not self._careful:
            return super().__torch_function__(func, types, args, kwargs)
        with saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
            return super().__torch_function__(func, types, args, kwargs)

    def _run(self, points: Tensor) -> Tensor:
        """Return the logits of points; again and carefully where the first run asks for it."""
        if not self._careful:
            try:
                with disable_saved_tensors_hooks(_HOOKED), self:
                    logits = self.function(points)
                if self._second or not any(_changed(kept) for kept in self.kept):
                    return logits
            except RuntimeError as error:
                if _HOOKED not in str(error):
                    raise
            self.kept.clear()
            self._careful = True
        with self:
            return self.function(points)


def _changed(kept: Any) -> bool:
    return isinstance(kept, _Layer) and kept.z._version != kept.version

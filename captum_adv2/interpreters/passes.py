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

For a network of ReLUs, max-pooling and linear layers the second pass is linear in :math:`\delta`,
so the difference is exact, up to rounding, whatever :math:`\delta` is. Activations such as GELU are
linear, too, along their own derivative. For other operations (products, attention, normalisation)
it is a finite difference, whose error grows with :math:`\delta`. The length of :math:`\delta v`
balances the two by the precision: the error is below 1e-4 in float64, up to a few per cent in
float32, and in bfloat16 the direction remains. The gradient of the prediction is computed in the
same pass.
What has no gradient (masks, detached tensors, draws, places of maxima) is as in the first pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks

from captum_adv2.interpreters.relu import Bend, Derivative, ReLUMode, Slope, as_activation
from captum_adv2.interpreters.tap import eagerly
from captum_adv2.spec import doubt

Function = Callable[[Tensor], Tensor]  # points (N, C, H, W) to logits (N, classes)
Score = Callable[[Tensor, Tensor], Tensor]  # logits and classes (N,) to one number each, (N,)

# Unit roundoff of convolutions of float32 in TF32, seen as a whole.
_TF32 = 2**-15


def gradient_of(
    function: Function, score: Score, points: Tensor, target: Tensor, graph: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the gradient of each point's score, and the logits."""
    logits = function(points)
    total = score(_full(logits), target).sum()
    (gradient,) = torch.autograd.grad(total, points, create_graph=graph)
    return gradient, logits


def _full(logits: Tensor) -> Tensor:
    """Return logits in single precision, where they are in half precision."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _Node(torch.autograd.Function):
    """The gradients of scores, whose own derivative is computed by a second pass."""

    @staticmethod
    def forward(ctx: Any, points: Tensor, passes: Passes, forget: bool) -> tuple[Tensor, Tensor]:
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
        with ctx.passes.cast:
            if ctx.forget:
                ctx.passes.gradient(points)
            ctx.forget = True  # the second pass uses up what the first one kept
            return ctx.passes.change(points, gradient, logits, *changes), None, None


class _Kept:
    """A value that the second pass takes from the first, and the function that returned it."""

    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value = name, value
        self._version = self._now()

    def _now(self) -> int:
        return self.value._version if isinstance(self.value, Tensor) else 0

    def changed(self) -> bool:
        """Return whether the value has been changed in place since."""
        return self._now() != self._version


class _Layer(_Kept):
    """An activation in the first pass; its value is z."""

    slope: Any = None  # s(z), a tensor; none where the score does not depend on this layer
    source: Tensor  # s'(z) times the gradient at its output

    def __init__(self, z: Tensor, derivative: Derivative) -> None:
        super().__init__("activation", z)
        self.derivative = derivative


class _First(torch.autograd.Function):
    """An activation in the first pass."""

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
            z = layer.value.detach().requires_grad_()
            slope = layer.derivative(z)
            if slope.requires_grad:
                (layer.source,) = torch.autograd.grad(slope, z, gradients, materialize_grads=True)
            else:  # a derivative that is constant in z, or a step
                layer.source = torch.zeros_like(layer.value)
        layer.slope = slope.detach()
        return gradients[0] * layer.slope, None, None, None


class _Second(torch.autograd.Function):
    """The same activation in the second pass, linear in its input; uses up what was kept."""

    @staticmethod
    def forward(
        ctx: Any, near: Tensor, layer: _Layer, exact: Callable[[Tensor], Tensor], in_place: bool
    ) -> Tensor:
        shift = near.sub_(layer.value) if in_place else near - layer.value
        ctx.save_for_backward(layer.slope, layer.source.mul_(shift))
        if in_place:
            ctx.mark_dirty(near)
        return torch.addcmul(exact(layer.value), layer.slope, shift, out=shift)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        slope, source = ctx.saved_tensors
        return torch.addcmul(source, slope, gradients[0]), None, None, None


_MAXIMA = {f"{kind}max_pool{n}d" for kind in ("", "adaptive_") for n in (1, 2, 3)}
# Activations with a derivative of their own, of which the same holds as of smooth ReLUs.
_SMOOTH = {"silu", "gelu", "hardswish", "mish", "softplus", "elu", "selu", "celu"}
_SMOOTH |= {"tanh", "sigmoid"}
_ALIASES = {"detach", "detach_", "__get__"}  # and `Tensor.data`
_HOOKED = "expected no hooks on saved tensors"
_APART = (
    "expected a model that does the same at nearby images, got other operations, or a detached "
    "tensor that is changed in place; set the interpreter's surrogate to "
    "captum_adv2.interpreters.base.Smoothed, which runs the model once"
)
_KINKS = (
    "the gradient of the map is likely wrong: its first-order passes do not follow an operation, "
    "such as a custom autograd.Function, or amax, topk or abs of ReLUs; set the attack's surrogate "
    "to Smoothed(Auto()), from captum_adv2.interpreters.base and relu"
)


class Passes(ReLUMode):
    """Both passes of a function over points."""

    def __init__(
        self, function: Function, score: Score, target: Tensor, slope: Slope, progress: float
    ) -> None:
        super().__init__(slope, progress)
        self.function, self.score, self.target = function, score, target
        self.kept: deque[_Kept] = deque()  # in the order of running
        kind = target.device.type  # the second pass runs with the first one's autocast
        self.cast = torch.autocast(
            kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        )
        self._second = False
        # Whether to keep copies of what later operations change in place, and to keep all that a
        # backward pass needs: activation checkpointing would run the function again without this.
        self._careful = False
        self._coupled = False  # by batch statistics
        self._eps = 0.0  # the coarsest rounding that was seen
        self._random: list[Tensor] = []  # states of the global generators before the first run

    def __call__(self, points: Tensor, forget: bool) -> tuple[Tensor, Tensor]:
        """Return the gradient of each point's score, and the logits; both have a graph.

        With ``forget``, the first pass is run again for the second, and its memory is not kept.
        """
        found: tuple[Tensor, Tensor] = _Node.apply(points, self, forget)
        return found

    def gradient(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Run the first pass; return the gradient of each point's score, and the logits."""
        self._second = False
        with torch.enable_grad():
            leaf = points.detach().requires_grad_()
            gradient, logits = gradient_of(self._run, self.score, leaf, self.target)
        return gradient, logits.detach()

    def change(
        self, points: Tensor, gradient: Tensor, logits: Tensor, v: Tensor, c: Tensor
    ) -> Tensor:
        """Run the second pass; return H v, plus the gradient of the logits times c."""
        v, c = _full(v), _full(c)
        self._eps = max(self._eps, torch.finfo(logits.dtype).eps)
        delta, still = _length(v, c, self._grain(logits) ** (1 / 3) / 6, self._coupled)
        with torch.enable_grad():
            leaf, near, moved = self._nearby(points, delta * v, logits)
            at = _full(logits).detach().requires_grad_()
            total = self.score(at, self.target).sum()
            (slope,) = torch.autograd.grad(total, at, create_graph=True)
            weights = slope.detach()
            if slope.requires_grad:  # the score is not linear in the logits
                weights = weights + torch.autograd.grad(slope, at, moved)[0]
            weights = weights.masked_fill(still.flatten(1), 0) + delta.flatten(1) * c
            (there,) = torch.autograd.grad(near, leaf, weights.to(near))
        if self.progress == 0 and not self._coupled:
            self._warn_of_kinks(points, delta * v, gradient, logits, slope.detach(), moved)
        return ((there - gradient.masked_fill(still, 0)) / delta).to(points.dtype)

    def _grain(self, logits: Tensor) -> float:
        in_tf32 = logits.is_cuda and torch.backends.cudnn.allow_tf32
        return max(self._eps, _TF32 if in_tf32 else 0)

    def _nearby(self, x: Tensor, step: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run the model as before; return the points, the logits, and how far these have moved."""
        self._second = True
        leaf = (x + step).to(x.dtype).detach().requires_grad_()
        near = self._run(leaf)
        moved = _full(near.detach()) - _full(at)
        return leaf, near, moved.masked_fill(near == at, 0)  # where both are -infinity, too

    def _warn_of_kinks(
        self, x: Tensor, step: Tensor, gradient: Tensor, at: Tensor, slope: Tensor, moved: Tensor
    ) -> None:
        """Warn where the logits of the second pass are not where the gradient of the first says.

        Curvature, as of attention, moves them, too: four times as far at twice the step, where what
        is not followed moves them twice as far.
        """

        def gap(step: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
            wanted = (gradient * ((x + step).to(x.dtype) - x)).flatten(1)
            apart = (slope * moved).nan_to_num().sum(1) - wanted.sum(1)
            return apart, torch.linalg.vector_norm(wanted, dim=1)

        once, size = gap(step, moved)
        noise = 4 * self._grain(at) * _full(at).nan_to_num().abs().amax(1)
        stuck = ~moved.any(dim=1) & (size > noise)
        if not bool((stuck | (once.abs() > 0.05 * size + noise)).any()):
            return
        self.gradient(x)
        with torch.enable_grad():
            *_, moved = self._nearby(x, 2 * step, at)
        twice, _ = gap(2 * step, moved)
        apart = (2 * once - twice / 2).abs()  # the part that grows as the step does
        if bool((stuck | (apart > 0.05 * size + 3 * noise)).any()):
            doubt(_KINKS)

    def activate(
        self, bend: Bend | None, z: Tensor, exact: Callable[[Tensor], Tensor], in_place: bool
    ) -> Tensor:
        """See `ReLUMode`; without a bend, an activation has the derivative of its function."""
        if self._second:
            layer: Any = self._take("activation")
            if layer.value.shape != z.shape:
                raise ValueError(_APART)
            if layer.slope is None:
                return exact(z)
            again: Tensor = _Second.apply(z, layer, exact, in_place)
            return again
        if bend is None:
            derivative = partial(_derivative, exact)
        else:
            derivative = partial(bend.slope, self.slope(z.detach(), self.progress))
        self._eps = max(self._eps, torch.finfo(z.dtype).eps)
        before = z.detach().clone() if in_place or self._careful else z.detach()
        self.kept.append(_Layer(before, derivative))
        result: Tensor = _First.apply(z, self.kept[-1], exact, in_place)
        return result

    def other(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Run a function that is no ReLU; in the second pass, maxima are where they were."""
        if name in _MAXIMA and not kwargs.get("return_indices"):
            return self._maximum(name, args, kwargs)
        if name.strip("_") in _SMOOTH and torch.is_grad_enabled():
            return self.activate(None, *as_activation(func, name, args, kwargs))
        training = kwargs.get("training", args[5] if len(args) > 5 else False)
        self._coupled |= name == "batch_norm" and bool(training)
        result = func(*args, **kwargs)
        return result if _varies(name, result) else self._constant(name, result)

    def _maximum(self, name: str, args: Any, kwargs: Any) -> Any:
        if not self._second:
            values, places = getattr(F, f"{name}_with_indices")(*args, **kwargs)
            self.kept.append(_Kept(name, places))
            return values
        places = self._take(name).value
        z = args[0] if args else kwargs["input"]
        size = int(name[-2])  # dimensions of a place
        return z.flatten(-size).gather(-1, places.flatten(-size)).view_as(places)

    def _constant(self, name: str, result: Any) -> Any:
        """Return what has no gradient (a mask, a detached tensor, a number) as it was at first."""
        if self._second:
            return self._take(name).value
        # Of a tensor that shares memory with another one, a copy would not change along.
        copied = self._careful and isinstance(result, Tensor) and name not in _ALIASES
        self.kept.append(_Kept(name, result.clone() if copied else result))
        return result

    def _take(self, name: str) -> _Kept:
        if not self.kept or self.kept[0].name != name:
            raise ValueError(_APART)
        return self.kept.popleft()

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """See `Mode`."""
        if not self._careful:
            return super().run(func, args, kwargs)
        with saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
            return super().run(func, args, kwargs)

    def _run(self, points: Tensor) -> Tensor:
        """Return the logits of points; again and carefully where the first run asks for it."""
        if not self._careful:
            try:
                with disable_saved_tensors_hooks(_HOOKED):
                    logits = self._replayed(points)
                if self._second or not any(kept.changed() for kept in self.kept):
                    return logits
            except RuntimeError as error:
                if _HOOKED not in str(error):
                    raise
            self.kept.clear()
            self._careful = True
        logits = self._replayed(points)
        if not self._second and any(kept.changed() for kept in self.kept):
            raise ValueError(_APART)
        return logits

    def _replayed(self, points: Tensor) -> Tensor:
        """Return the logits of points; dropout, say, draws the same numbers in each run."""
        cuda = [points.device] if points.device.type == "cuda" else []
        again = bool(self._random)
        if not again:
            self._random = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, cuda)]
        with torch.random.fork_rng(cuda, enabled=again):
            if again:
                torch.set_rng_state(self._random[0])
                for device, state in zip(cuda, self._random[1:], strict=True):
                    torch.cuda.set_rng_state(state, device)
            with eagerly(), self:
                logits = self.function(points)
        if self._second and self.kept:
            raise ValueError(_APART)
        return logits


def _derivative(function: Derivative, z: Tensor) -> Tensor:
    """Return the derivative of an elementwise function."""
    return torch.autograd.grad(function(z.clone()).sum(), z, create_graph=True)[0]


def _length(v: Tensor, c: Tensor, shift: float, coupled: bool) -> tuple[Tensor, Tensor]:
    """Return delta ``(N, 1, 1, 1)``, and where v is 0, which makes the whole gradient c's.

    The size of delta v balances rounding and finite differences. Where c outweighs v by far, delta
    is smaller, so that its product with c does not overflow.
    """
    largest = v.abs().amax(dim=(1, 2, 3), keepdim=True)
    share = v / largest.masked_fill(largest == 0, 1)  # whose square does not underflow
    size = largest * share.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    delta = torch.minimum(shift / size, 100 / c.abs().amax(1).view_as(size))
    still = size == 0
    if coupled:  # each image's gradient changes with all images
        delta, still = (d.amin(dim=0, keepdim=True).expand_as(d) for d in (delta, still))
    return delta.masked_fill(delta.isinf(), 1.0), still


def _varies(name: str, result: Any) -> bool:
    """Return whether a result may be another one in the second pass."""
    if isinstance(result, Tensor):
        made = name.startswith(("new_", "empty")) or name.endswith("_like")  # and then filled
        return result.requires_grad or made
    return not isinstance(result, int | float)

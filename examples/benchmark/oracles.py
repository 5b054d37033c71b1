# SPDX-License-Identifier: MIT
"""Attribution maps, and gradients of the attack's loss on them, without captum_adv2: for `models`.

All of it is double backward, hooks and Captum's own calls, on the plain model in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from kinds import Kind
from torch import Tensor, nn

Map: TypeAlias = Callable[[Kind, nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]


def scaled(maps: Tensor) -> Tensor:
    """Scale each map to [0, 1]."""
    flat = maps.flatten(1)
    low, high = (v.view(-1, 1, 1, 1) for v in (flat.min(1).values, flat.max(1).values))
    return (maps - low) / (high - low)


# ReLUs with a smooth derivative


class _Bent(torch.autograd.Function):
    """An activation with its exact value and another slope; ReLUs are guided where that is set."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, value: Tensor, slope: Callable[[Tensor], Tensor], relu: bool
    ) -> Tensor:
        ctx.save_for_backward(z)
        ctx.slope, ctx.relu = slope, relu
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (z,) = ctx.saved_tensors
        passed = gradients[0] * ctx.slope(z)
        return passed * (passed > 0) if _guided and ctx.relu else passed, None, None, None


_guided: list[bool] = []


def _bent(
    exact: Callable[..., Tensor], slope: Callable[..., Tensor], z: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    kwargs.pop("inplace", None)
    size = z.detach().flatten(1).square().mean(dim=1).sqrt().view(-1, *[1] * (z.ndim - 1))
    further = [a.detach() if isinstance(a, Tensor) else a for a in (*args, *kwargs.values())]

    def smooth(z: Tensor) -> Tensor:
        return slope(z, lambda y: (y / (0.3 * size)).sigmoid(), *further)

    with torch.no_grad():
        value = exact(z.clone(), *args, **kwargs)  # it may work in place
    return _Bent.apply(z, value, smooth, slope is _SLOPES["relu"])


def _leaky(z: Tensor, s: Callable[..., Tensor], leak: Any = 0.01, *_: Any) -> Tensor:
    if isinstance(leak, Tensor):
        leak = leak.view(-1, 1, 1)
    return leak + (1 - leak) * s(z)


_SLOPES: dict[str, Callable[..., Tensor]] = {
    "relu": lambda z, s, *_: s(z),
    "relu6": lambda z, s, *_: s(z) - s(z - 6),
    "hardtanh": lambda z, s, low=-1.0, high=1.0, *_: s(z - low) - s(z - high),
    "hardsigmoid": lambda z, s, *_: (s(z + 3) - s(z - 3)) / 6,
    "leaky_relu": _leaky,
    "prelu": _leaky,
}


@contextmanager
def smooth() -> Iterator[None]:
    """Give the functions that modules of activations call the slopes of ``smoothing="auto"``."""
    with ExitStack() as stack:
        for name, slope in _SLOPES.items():
            stack.enter_context(patch.object(F, name, partial(_bent, getattr(F, name), slope)))
        yield


# Maps, each with the logits, differentiable


def _gradient(score: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(score.sum(), x, create_graph=True)[0]


def _probability(logits: Tensor, target: Tensor) -> Tensor:
    return logits.softmax(dim=1).gather(1, target[:, None])


def by_gradients(
    points: Callable[[Tensor], Iterable[tuple[float, Tensor]]], times_input: bool = False
) -> Map:
    """Return a map of gradients of the probability (Eq. 5), summed over weighted points."""

    def explain(kind: Kind, plain: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros_like(x)
        for weight, point in points(x):
            total = total + weight * _gradient(_probability(plain(point), target), point)
        maps = (x * total if times_input else total).abs().amax(dim=1, keepdim=True)
        return scaled(F.avg_pool2d(maps, 2)), plain(x)

    return explain


def noisy(x: Tensor) -> Iterator[tuple[float, Tensor]]:
    """Yield three noisy copies."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn((3, 1, *x.shape[1:]), generator=generator).to(x)
    return ((1.0, x + each) for each in noise)


def from_black(x: Tensor) -> Iterator[tuple[float, Tensor]]:
    """Yield three points of Gauss and Legendre on the line from black."""
    places, weights = np.polynomial.legendre.leggauss(3)
    return ((weight, x * (1 + place) / 2) for place, weight in zip(places, weights, strict=True))


gradient = by_gradients(lambda x: [(1.0, x)])
smooth_grad = by_gradients(noisy)
integrated = by_gradients(from_black, times_input=True)


def _features(kind: Kind, plain: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the last feature maps as they are, and the logits."""
    seen: list[Tensor] = []
    with ExitStack() as stack:
        if kind.pooling:
            pool = getattr(F, kind.pooling)

            def watched(maps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                seen.append(maps)
                return pool(maps, *args, **kwargs)

            stack.enter_context(patch.object(F, kind.pooling, watched))
        else:

            def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                seen.append(output)
                return output.clone()

            layer = plain.get_submodule(kind.layer)
            stack.enter_context(layer.register_forward_hook(keep))
        logits = plain(x)
    return seen[0], logits


def _planes(kind: Kind, maps: Tensor) -> Tensor:
    """Return feature maps as ``(B, K, h, w)``."""
    if kind.first is not None:
        side = int((maps.shape[1] - kind.first) ** 0.5)
        maps = maps[:, kind.first :].reshape(len(maps), side, side, -1)
    return maps.permute(0, 3, 1, 2) if kind.last or kind.first is not None else maps


def cam(kind: Kind, plain: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features weighted by the head (Eq. 7)."""
    maps, logits = _features(kind, plain, x)
    maps = _planes(kind, maps)
    weight: Any = plain.get_submodule(kind.head).weight
    return scaled((maps * weight.flatten(1)[target, :, None, None]).sum(1, keepdim=True)), logits


def grad_cam(
    kind: Kind, plain: nn.Module, x: Tensor, target: Tensor, absolute: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the features weighted by their mean gradient, positive part (Eq. 14, 15).

    Captum's LayerGradCam takes the ``absolute`` value.
    """
    maps, logits = _features(kind, plain, x)
    slope = _gradient(logits.gather(1, target[:, None]), maps)
    maps, slope = _planes(kind, maps), _planes(kind, slope)
    sums = (maps * slope.mean(dim=(2, 3), keepdim=True)).sum(1, keepdim=True)
    return scaled(sums.abs() if absolute else sums * (sums > 0)), logits


def saliency(
    kind: Kind, plain: nn.Module, x: Tensor, target: Tensor, guided: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the logit, of smooth ReLUs also by guided backpropagation."""
    logits = plain(x)
    _guided[:] = [True] * guided
    slope = _gradient(logits.gather(1, target[:, None]), x)
    _guided.clear()
    return scaled(slope.abs().amax(dim=1, keepdim=True)), logits


def by_captum(build: Callable[[nn.Module], Any], **settings: Any) -> Map:
    """Return a map that Captum computes, without a graph."""

    def explain(kind: Kind, plain: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        plain = unshared(plain, x)
        attributions = build(plain).attribute(x, target=target, **settings)
        return scaled(attributions.abs().amax(dim=1, keepdim=True)).detach(), plain(x)

    return explain


class _InTurn(nn.Module):
    """Several modules of which each run uses the next: Captum's rules want each to run once."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.turns, self.number = nn.ModuleList(modules), 0

    def forward(self, x: Tensor) -> Tensor:
        self.number += 1
        result: Tensor = self.turns[(self.number - 1) % len(self.turns)](x)
        return result


def unshared(plain: nn.Module, x: Tensor) -> nn.Module:
    """Return a network whose modules without weights run once each."""
    net = copy.deepcopy(plain)
    runs: dict[nn.Module, int] = {}
    with ExitStack() as stack:
        for module in net.modules():
            if not [*module.children(), *module.parameters()]:
                hook = lambda m, *_: runs.update({m: runs.get(m, 0) + 1})  # noqa: E731
                stack.enter_context(module.register_forward_hook(hook))
        net(x)
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if runs.get(child, 0) > 1:
                copies = [copy.deepcopy(child) for _ in range(runs[child])]
                setattr(parent, name, _InTurn(copies))
    return net


def mask(kind: Kind, plain: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return MASK's map after six steps of Adam (Eq. 9), from a grey baseline."""
    kept = torch.full((len(x), 1, 4, 4), 0.5, dtype=x.dtype, requires_grad=True)
    adam = torch.optim.Adam([kept], lr=0.1)
    for _ in range(6):
        share = F.interpolate(kept, x.shape[2:], mode="bilinear")
        seen = share * x + (1 - share) * 0.5
        rough = sum(kept.diff(dim=dim).abs().pow(3).sum() for dim in (2, 3))
        loss = _probability(plain(seen), target).sum() + 1e-2 * rough + 1e-4 * (1 - kept).sum()
        (kept.grad,) = torch.autograd.grad(loss, kept)
        adam.step()
        with torch.no_grad():
            kept.clamp_(0, 1)
    return 1 - kept.detach(), plain(x)


# The attack's loss


def loss(
    maps: Tensor, logits: Tensor, target: Tensor, wanted: Tensor, is_scaled: bool = True
) -> Tensor:
    """Return the loss of the attack's first step: labels smoothed, and the distance of maps."""
    logs = logits.log_softmax(dim=1)
    right = logs.gather(1, target[:, None])[:, 0]
    others = (logs.sum(dim=1) - right) / (logs.shape[1] - 1)
    prediction = -(0.975 * right + 0.025 * others)

    def distance(change: Tensor) -> Tensor:
        return (change.square() + 0.1 * change.abs()).flatten(1).mean(dim=1)

    raw = distance(maps - wanted)
    if is_scaled:
        m, t = maps.flatten(1), wanted.flatten(1)
        m, t = m - m.mean(dim=1, keepdim=True), t - t.mean(dim=1, keepdim=True)
        slope = (m * t).sum(dim=1, keepdim=True) / m.square().sum(dim=1, keepdim=True)
        raw = 0.5 * raw + 0.5 * distance(t - slope * m)
    else:  # the penalty of RTS
        prediction = prediction - 0.1 * right
    return (prediction + 150 * raw).sum()


def loss_gradient(
    explain: Map,
    kind: Kind,
    plain: nn.Module,
    x: Tensor,
    target: Tensor,
    wanted: Tensor,
    is_scaled: bool = True,
) -> Tensor:
    """Return the gradient of the loss by PyTorch's double backward."""
    x = x.clone().requires_grad_()
    maps, logits = explain(kind, plain, x, target)
    return torch.autograd.grad(loss(maps, logits, target, wanted, is_scaled), x)[0]


def slope_along(
    direction: Tensor,
    explain: Map,
    kind: Kind,
    plain: nn.Module,
    x: Tensor,
    target: Tensor,
    wanted: Tensor,
) -> float:
    """Return the derivative of the loss along a direction of length 1, by a central difference."""
    ends = [
        loss(*explain(kind, plain, x + sign * 1e-6 * direction, target), target, wanted)
        for sign in (1, -1)
    ]
    return float((ends[0] - ends[1]) / 2e-6)

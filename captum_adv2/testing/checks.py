# SPDX-License-Identifier: MIT
"""The checks: functions that raise where an interpreter breaks the promise in their docstring."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, TypeAlias
from unittest import SkipTest

import torch
from torch import Tensor, nn

from captum_adv2.interpreters.base import Explanation, Interpreter, background, eval_mode
from captum_adv2.interpreters.gradient import IntegratedGradients, probability
from captum_adv2.testing.drawn import Network
from captum_adv2.testing.traces import unchanged

Build: TypeAlias = Callable[[nn.Module], Interpreter]
Attributions: TypeAlias = Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]
Function: TypeAlias = Callable[..., None]


class Check(NamedTuple):
    """A check: a function, whose docstring is the promise it checks, and where it runs.

    Attributes:
        function: Takes ``(interpreter, images, target)`` or, if ``rebuilt``, ``(build, network,
            images, target)``, models in eval mode. Raises ``AssertionError``, or ``SkipTest`` where
            the promise does not apply.
        degenerate: Whether it runs on degenerate images too.
        exact: In double precision, so that a difference is more than rounding.
        smooth: On networks with derivatives of every order, where networks are drawn.
        drawn: On drawn networks only.
        rebuilt: On interpreters that it builds itself, of drawn networks.
    """

    function: Function
    degenerate: bool = False
    exact: bool = False
    smooth: bool = False
    drawn: bool = False
    rebuilt: bool = False


# In the order in which they run: a fault that several checks find is named after the first.
CHECKS: dict[str, Check] = {}


def _check(name: str, **where: bool) -> Callable[[Function], Function]:
    """Register a function as a check."""

    def register(function: Function) -> Function:
        CHECKS[name] = Check(function, **where)
        return function

    return register


@_check("shape")
def _shape(interpreter: Interpreter, images: Tensor, target: Tensor) -> None:
    """Maps are ``(B, 1, h, w)``, of the images' dtype, on their device."""
    maps, batch = interpreter(images, target), len(images)
    like = (maps.dtype, maps.device) == (images.dtype, images.device)
    if maps.ndim != 4 or maps.shape[:2] != (batch, 1) or not like:
        raise AssertionError(
            f"expected maps of shape ({batch}, 1, h, w), {images.dtype}, on {images.device}, got "
            f"{tuple(maps.shape)}, {maps.dtype}, on {maps.device}"
        )


@_check("finite", degenerate=True)
def _finite(interpreter: Interpreter, images: Tensor, target: Tensor) -> None:
    """The map, the surrogate's map and its gradient have no NaN and no infinity."""

    def hold(name: str, values: Tensor) -> None:
        wrong = (~values.isfinite()).flatten(1).sum(dim=1)
        _hold(wrong == 0, target, f"a finite {name}", wrong, "NaN or infinite values, in number ")

    hold("map", interpreter(images, target))
    maps, gradient = _attacked(interpreter, images, target)
    hold("map of the surrogate", maps)
    if gradient is not None:
        hold("gradient of the surrogate", gradient)


@_check("deterministic", exact=True)
def _deterministic(interpreter: Interpreter, images: Tensor, target: Tensor) -> None:
    """A second call gives the same maps, whatever was called before and the global seed is."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        first = interpreter(images, target)
        interpreter(images.flip(0)[:1], target.flip(0)[:1])
        torch.default_generator.manual_seed(2)
        _hold_near(interpreter(images, target), first, target, "the same map at a second call")


@_check("untouched")
def _untouched(interpreter: Interpreter, images: Tensor, target: Tensor) -> None:
    """A call, and an attack's gradient, leave everything `unchanged`, also if the model raises."""
    modules = [] if interpreter.model is None else list(interpreter.model.modules())
    leaves = [module for module in modules if not any(module.children())]

    def hold(call: Callable[..., object]) -> None:
        x = images.clone().requires_grad_()
        with unchanged(interpreter.model, x, target), suppress(_Planted):
            call(x, target)

    for call in (interpreter, partial(_attacked, interpreter)):
        hold(call)
        for module in leaves[:1] + leaves[-1:]:
            with module.register_forward_hook(_raise_planted):
                hold(call)
    with eval_mode(interpreter.model, switch=False):
        for module in modules[::2]:
            module.training = True
        hold(interpreter)  # in eval mode, and puts the modes back


@_check("batch", exact=True)
def _batch(interpreter: Interpreter, images: Tensor, target: Tensor) -> None:
    """A batch gives the maps, and the surrogate's gradients, of its images one by one."""
    if len(images) == 1:
        images, target = torch.cat([images, images.flip(3)]), target.repeat(2)
    singles = [(images[i : i + 1], target[i : i + 1]) for i in range(len(images))]
    alone = torch.cat([interpreter(*single) for single in singles])
    expected = "in a batch the map of the image alone"
    _hold_near(interpreter(images, target), alone, target, expected)
    gradient = _attacked(interpreter, images, target)[1]
    if gradient is not None:
        parts = [_attacked(interpreter, *single)[1] for single in singles]
        alone = torch.cat([torch.zeros_like(images[:1]) if g is None else g for g in parts])
        _hold_near(gradient, alone, target, "in a batch the gradient of the image alone")


@_check("range", degenerate=True)
def _range(interpreter: Interpreter, images: Tensor, target: Tensor) -> None:
    """Maps are in [0, 1]; where ``scaled``, each reaches both ends or is 0."""
    low, high = interpreter(images, target).detach().flatten(1).aminmax(dim=1)
    _hold(low >= -1e-5, target, "a map of at least 0", low)
    _hold(high <= 1 + 1e-5, target, "a map of at most 1", high)
    if interpreter.scaled:
        ends = (high >= 1 - 1e-5) | (high == 0)
        hint = "; natively in [0, 1]? then set scaled = False"
        _hold(low <= 1e-5, target, "a scaled map's smallest value to be 0", low)
        _hold(ends, target, f"a scaled map's largest value to be 1{hint}", high)


@_check("class", exact=True)
def _class(interpreter: Interpreter, images: Tensor, target: Tensor) -> None:
    """Of up to four classes, two have different maps, for at least one of the images."""
    count = class_count(interpreter, images)
    if count < 3:
        raise SkipTest("of two classes the maps may be the same, as the gradient of p is of 1 - p")
    others = [interpreter(images, (target + by) % count) for by in range(1, min(count, 4))]
    apart = (torch.stack(others) - interpreter(images, target)).abs().max().item()
    if not apart > 1e-3:
        raise AssertionError(
            f"expected maps that depend on the class, got maps of classes {target.tolist()} and of "
            f"{len(others)} others each that differ by {apart:.2g} at most; is target used?"
        )


@_check("differentiable", exact=True, smooth=True)
def _differentiable(interpreter: Interpreter, images: Tensor, target: Tensor) -> None:
    """The surrogate's map has a gradient, which is not 0 unless the map has two values at most."""
    maps, gradient = _attacked(interpreter, images, target)
    if gradient is None:
        raise AssertionError(
            "expected maps to be differentiable with respect to the images, got no graph that "
            "leads there; look for detach, data, no_grad, or a leaf made inside"
        )
    size, values = gradient.abs().flatten(1).amax(dim=1), maps.flatten(1)
    low, high = values.aminmax(dim=1, keepdim=True)
    flat = ((values == low) | (values == high)).all(dim=1)  # after scaling, 0 and 1 alone
    _hold((size > 0) | flat, target, "a gradient of the map that is not 0", size)


@_check("gradient", exact=True, smooth=True)
def _gradient(interpreter: Interpreter, images: Tensor, target: Tensor) -> None:
    """The map's gradient agrees with finite differences along the best of four directions.

    Along some of them, one of many ReLUs may switch, however small the step, so that the map jumps.
    A wrong gradient is wrong along all four.
    """
    if images.dtype != torch.float64:
        raise SkipTest("needs double precision, in which the interpreter cannot be copied or run")
    gradient, misses = _of_the_map(interpreter, images, target), []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        along = torch.randn(images.shape, generator=generator, dtype=images.dtype).to(images)
        with torch.no_grad():
            ahead, back = (
                _weighted(interpreter.explain(images + step * along, target).maps)
                for step in (1e-9, -1e-9)
            )
        slope, claimed = (ahead - back) / 2e-9, (gradient * along).flatten(1).sum(dim=1)
        size = torch.maximum(gradient.flatten(1).norm(dim=1), slope.abs())
        misses.append((claimed - slope).abs() / (size + 1e-3))  # rounding: about 1e-6
    least = torch.stack(misses).amin(dim=0)
    expected = "a gradient of the map that agrees with finite differences"
    _hold(least <= 1e-2, target, expected, least, "a relative error of ")


@_check("surrogate", exact=True, smooth=True, drawn=True)
def _surrogate(interpreter: Interpreter, images: Tensor, target: Tensor) -> None:
    """Where an attack starts, the surrogate's map is within 0.05 (L1) of the reported one."""
    _of_the_map(interpreter, images, target)
    maps, seen = interpreter(images, target), _attacked(interpreter, images, target)[0]
    apart = (seen[:, :1] - maps).abs().mean(dim=(1, 2, 3))
    expected = "the surrogate's map near the reported one"
    _hold(apart <= 0.05, target, expected, apart, "one apart by ")


@_check("logits", exact=True)
def _logits(interpreter: Interpreter, images: Tensor, target: Tensor) -> None:
    """Logits that come with a map, or with the surrogate's, are the model's, of these images."""
    with torch.no_grad():
        found = (interpreter.explain(images, target), _view(interpreter, images, target))
        logits = [explanation.logits for explanation in found if explanation.logits is not None]
        if interpreter.model is None or not logits:
            raise SkipTest("no logits come with the maps")
        expected = interpreter.logits(images)
    for each in logits:
        _hold_near(each, expected, target, "the model's logits")


def _invariance(what: str, exact: bool = True) -> Callable[[Callable[..., Any]], Function]:
    """Register as a check that a change of a network and its input leaves all maps the same."""

    def register(change: Callable[..., tuple[Tensor, Tensor]]) -> Function:
        def function(build: Build, network: Network, images: Tensor, target: Tensor) -> None:
            other = copy.deepcopy(network)
            with torch.no_grad():
                changed = change(other, images, target)
            with unchanged(network):
                interpreter = built(build, network)
            maps = interpreter(images, target)
            _hold_near(built(build, other)(*changed), maps, target, f"the same map {what}")

        function.__doc__ = change.__doc__
        name = change.__name__.removeprefix("_")
        return _check(name, exact=exact, drawn=True, rebuilt=True)(function)

    return register


@_invariance("from a second interpreter", exact=False)
def _build(network: Network, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Building an interpreter leaves the model as it was, and a second one gives the same maps."""
    return images, target


@_invariance("with 1.5 added to all logits")
def _shift(network: Network, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """A constant added to all logits changes no probability, and no map."""
    network.fc.bias.add_(1.5)
    return images, target


@_invariance("with classes in reverse order")
def _relabel(network: Network, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """With classes in reverse order, each has the map it had."""
    for parameter in network.fc.parameters():
        parameter.copy_(parameter.flip(0))  # in a rotation, the next class remains the next
    return images, network.fc.out_features - 1 - target


@_invariance("of images half as bright, with first weights twice as large")
def _scaling(network: Network, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Images half as bright have the same maps, on a network with first weights twice as large."""
    next(network.stem.parameters()).mul_(2)
    return images / 2, target


@_check("completeness", exact=True, smooth=True)
def _completeness(
    interpreter: Interpreter,
    images: Tensor,
    target: Tensor,
    attributions: Attributions | None = None,
) -> None:
    """Signed attributions add up to what the method promises, within 5 % of their size."""
    if attributions is None and not isinstance(interpreter, IntegratedGradients):
        raise SkipTest("completeness is no promise of this method; if it is, attributions=")
    attributions = attributions or _integrated
    values, promised = attributions(interpreter, images, target)
    total, size = values.flatten(1).sum(dim=1), values.abs().flatten(1).sum(dim=1)
    apart = (total - promised).abs()
    good = apart <= 0.05 * torch.maximum(size, promised.abs()) + 1e-6
    _hold(good, target, "attributions that add up to what they promise", apart, "a sum apart by ")


def _integrated(interpreter: Any, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    x = images.clone().requires_grad_()
    values, logits = interpreter.attribute(x, target, create_graph=False)
    with torch.no_grad():
        start = interpreter.logits(background(interpreter.baseline, images))
        return values, probability(logits, target) - probability(start, target)


def built(build: Build, network: nn.Module) -> Interpreter:
    """Build an interpreter; weights of its own, if it has any, are the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return build(network)


def class_count(interpreter: Interpreter, images: Tensor) -> int:
    """Return the number of the model's classes; if no model is known, the least possible."""
    if interpreter.model is None:
        return 2
    with torch.no_grad():
        return interpreter.logits(images[:1]).shape[1]


def _view(interpreter: Interpreter, x: Tensor, target: Tensor) -> Explanation:
    """Return what an attack differentiates in its first iteration."""
    surrogate, images = interpreter.surrogate, x.detach()
    state = surrogate.init(interpreter, images, target)
    state = surrogate.advance(interpreter, images, state, 0.0)
    return surrogate(interpreter, x, state, 0.0)


def _attacked(
    interpreter: Interpreter,
    images: Tensor,
    target: Tensor,
    view: Callable[..., Explanation] = _view,
) -> tuple[Tensor, Tensor | None]:
    """Return the surrogate's maps, and the gradient of a weighted sum of them if it has one."""
    x = images.clone().requires_grad_()
    maps = view(interpreter, x, target).maps
    if not maps.requires_grad:
        return maps, None
    # A map that requires a gradient proves nothing: it may depend on the parameters alone.
    (gradient,) = torch.autograd.grad(_weighted(maps).sum(), x, allow_unused=True)
    return maps.detach(), gradient


def _of_the_map(interpreter: Interpreter, images: Tensor, target: Tensor) -> Tensor:
    """Return the gradient of the reported map; skip the check where it has none by design."""
    gradient = _attacked(interpreter, images, target, type(interpreter).explain)[1]
    if gradient is None:
        raise SkipTest("the map has no derivative; an attack differentiates the surrogate's")
    return gradient


def _weighted(maps: Tensor) -> Tensor:
    """Return a sum over each image's map ``(B,)``, in which every pixel has its own weight."""
    weights = torch.linspace(1, 2, maps[0].numel(), dtype=maps.dtype, device=maps.device)
    return maps.flatten(1) @ weights


def _hold(good: Tensor, target: Tensor, expected: str, got: Tensor, of: str = "") -> None:
    """Raise for the first image ``(B,)`` that is not good."""
    if bool(good.all()):
        return
    index = int((~good).nonzero()[0])
    raise AssertionError(
        f"expected {expected}, got {of}{got[index].item():.4g} for image {index} of a batch of "
        f"{len(good)} (class {int(target[index])})"
    )


def _hold_near(got: Tensor, right: Tensor, target: Tensor, expected: str) -> None:
    """Raise for the first image whose values are apart by more than rounding, or NaN."""
    apart = (got - right).detach().abs().flatten(1).amax(dim=1)
    size = right.detach().abs().flatten(1).amax(dim=1).clamp(min=1)
    rounding = {torch.float64: 1e-6, torch.float32: 1e-3}.get(right.dtype, 5e-2)
    _hold(apart <= rounding * size, target, expected, apart, "one apart by ")


class _Planted(Exception):
    """Raised inside the model, to see what an exception leaves behind."""


def _raise_planted(*_: Any) -> None:
    raise _Planted

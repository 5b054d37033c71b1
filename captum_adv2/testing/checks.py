# SPDX-License-Identifier: MIT
"""The checks: functions that raise where an interpreter breaks the promise in their docstring."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, TypeAlias
from unittest import SkipTest

import torch
from torch import Tensor, nn

from captum_adv2.interpreters.base import Explanation, Interpreter, background, eval_mode
from captum_adv2.interpreters.first_order import Autograd
from captum_adv2.interpreters.gradient import IntegratedGradients, probability
from captum_adv2.testing.drawn import Network
from captum_adv2.testing.traces import unchanged

Build: TypeAlias = Callable[[nn.Module], Interpreter]
Attributions: TypeAlias = Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]
View: TypeAlias = Callable[[Tensor, Tensor], Explanation]


def _shape(interpreter: Interpreter, images: Tensor, target: Tensor) -> None:
    """Maps are ``(B, 1, h, w)``, of the images' dtype, on their device."""
    maps, like = interpreter(images, target), (images.dtype, images.device)
    if maps.ndim != 4 or maps.shape[:2] != (len(images), 1) or (maps.dtype, maps.device) != like:
        got = f"{tuple(maps.shape)}, {maps.dtype}, on {maps.device}"
        raise AssertionError(f"expected maps of shape ({len(images)}, 1, h, w), {like}, got {got}")


def _finite(interpreter: Interpreter, images: Tensor, target: Tensor) -> None:
    """The map, the surrogate's map and its gradient have no NaN and no infinity."""
    for name, values in _outputs(interpreter, images, target):
        wrong = (~values.isfinite()).flatten(1).sum(dim=1)
        _hold(wrong == 0, target, f"a finite {name}", wrong, "NaN or infinite values, in number ")


def _deterministic(interpreter: Interpreter, images: Tensor, target: Tensor) -> None:
    """A second call gives the same maps, whatever was called before and the global seed is."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        first = interpreter(images, target)
        interpreter(images.flip(0)[:1], target.flip(0)[:1])
        torch.default_generator.manual_seed(2)
        _hold_near(interpreter(images, target), first, target, "the same map at a second call")


def _untouched(interpreter: Interpreter, images: Tensor, target: Tensor) -> None:
    """A call, and an attack's gradient, leave everything `unchanged`, also if the model raises."""
    model, view = interpreter.model, partial(seen, interpreter)
    modules = [] if model is None else list(model.modules())
    leaves = [module for module in modules if not any(module.children())]
    for call in (interpreter, partial(_attacked, view)):
        for layer in (nn.Identity(), *leaves[:1], *leaves[-1:]):  # the model has no such one
            x = images.clone().requires_grad_()
            raising = layer.register_forward_hook(lambda *_: 1 / 0)
            with raising, unchanged(model, x, target), suppress(ZeroDivisionError):
                call(x, target)
    with eval_mode(model, switch=False):
        for module in modules[::2]:
            module.training = True
        with unchanged(model):
            interpreter(images, target)  # in eval mode, and puts the modes back


def _batch(interpreter: Interpreter, images: Tensor, target: Tensor) -> None:
    """A batch gives the maps, the surrogate's and their gradients, of its images one by one."""
    if len(images) == 1:
        images, target = torch.cat([images, images.flip(3)]), target.repeat(2)
    singles = [_outputs(interpreter, images[i][None], target[i][None]) for i in range(len(images))]
    whole = _outputs(interpreter, images, target)
    for (name, values), *parts in zip(whole, *singles, strict=False):
        alone = torch.cat([part for _, part in parts])
        _hold_near(values, alone, target, f"in a batch the {name} of the image alone")


def _range(interpreter: Interpreter, images: Tensor, target: Tensor) -> None:
    """Maps are in [0, 1]; where ``scaled``, each reaches both ends or is 0."""
    low, high = interpreter(images, target).detach().flatten(1).aminmax(dim=1)
    _hold(low >= -1e-5, target, "a map of at least 0", low)
    _hold(high <= 1 + 1e-5, target, "a map of at most 1", high)
    if interpreter.scaled:
        expected = "a map from 0 to 1 (natively in [0, 1]? then set scaled = False)"
        _hold(low <= 1e-5, target, expected, low, "a smallest value of ")
        _hold((high >= 1 - 1e-5) | (high == 0), target, expected, high, "a largest value of ")


def _class(interpreter: Interpreter, images: Tensor, target: Tensor) -> None:
    """Of up to four classes, two have different maps, for at least one of the images."""
    count = 2 if interpreter.model is None else interpreter.logits(images).shape[1]
    if count < 3:
        raise SkipTest("of two classes the maps may be the same, as the gradient of p is of 1 - p")
    others = [interpreter(images, (target + by) % count) for by in range(1, min(count, 4))]
    apart = (torch.stack(others) - interpreter(images, target)).abs().max().item()
    if not apart > 1e-3:
        got = f"maps of classes {target.tolist()} and others that differ by {apart:.2g} at most"
        raise AssertionError(f"expected maps that depend on the class, got {got}; is target used?")


def _differentiable(interpreter: Interpreter, images: Tensor, target: Tensor) -> None:
    """The surrogate's map has a gradient, which is not 0 unless the map has two values at most."""
    maps, gradient = _attacked(partial(seen, interpreter), images, target)
    if gradient is None:
        hint = "; look for detach, data, no_grad, or a leaf made inside"
        raise AssertionError(f"expected maps with a graph to the images, got none{hint}")
    size = gradient.abs().flatten(1).amax(dim=1)
    flat = torch.tensor([len(each.unique()) <= 2 for each in maps], device=size.device)
    _hold((size > 0) | flat, target, "a gradient of the map that is not 0", size)


def _gradient(interpreter: Interpreter, images: Tensor, target: Tensor) -> None:
    """The map's gradient agrees with finite differences along the best of four directions.

    Along some of them, one of many ReLUs may switch, however small the step, so that the map jumps.
    A wrong gradient is wrong along all four.
    """
    if images.dtype != torch.float64:
        raise SkipTest("needs double precision, in which the interpreter cannot be copied or run")
    gradient, misses = _of_the_map(interpreter, images, target), []
    generator = torch.Generator().manual_seed(0)
    for along in torch.randn(4, *images.shape, generator=generator, dtype=images.dtype).to(images):
        ends = (images + 1e-9 * along, images - 1e-9 * along)
        ahead, back = (_weighted(interpreter.explain(x, target).maps).detach() for x in ends)
        slope, claimed = (ahead - back) / 2e-9, (gradient * along).flatten(1).sum(dim=1)
        size = torch.maximum(gradient.flatten(1).norm(dim=1), slope.abs())
        misses.append((claimed - slope).abs() / (size + 1e-3))  # rounding: about 1e-6
    least = torch.stack(misses).amin(dim=0)
    expected = "a gradient of the map that agrees with finite differences"
    _hold(least <= 1e-2, target, expected, least, "a relative error of ")


def _surrogate(interpreter: Interpreter, images: Tensor, target: Tensor) -> None:
    """Where an attack starts, the surrogate's map is within 0.05 (L1) of the reported one."""
    _of_the_map(interpreter, images, target)
    maps = seen(interpreter, images, target).maps[:, :1]
    apart = (maps - interpreter(images, target)).abs().mean(dim=(1, 2, 3))
    expected = "the surrogate's map near the reported one"
    _hold(apart <= 0.05, target, expected, apart, "one apart by ")


def _logits(interpreter: Interpreter, images: Tensor, target: Tensor) -> None:
    """Logits that come with a map, or with the surrogate's, are the model's, of these images."""
    found = (interpreter.explain(images, target), seen(interpreter, images, target))
    logits = [explanation.logits for explanation in found if explanation.logits is not None]
    if interpreter.model is None or not logits:
        raise SkipTest("no logits come with the maps")
    for each in logits:
        _hold_near(each, interpreter.logits(images), target, "the model's logits")


def _same(change: str, build: Build, network: Network, images: Tensor, target: Tensor) -> None:
    """After a change that leaves each logit, or each probability, as it was, maps are the same."""
    other, x, y = copy.deepcopy(network), images, target
    what = "from a second interpreter"
    with torch.no_grad():
        if change == "shift":
            what = "with 1.5 added to all logits"
            other.fc.bias.add_(1.5)
        elif change == "relabel":
            what = "with classes in reverse order"
            for parameter in other.fc.parameters():
                parameter.copy_(parameter.flip(0))  # in a rotation, the next remains the next
            y = other.fc.out_features - 1 - target
        elif change == "scaling":
            what = "of images half as bright, with first weights twice as large"
            next(other.stem.parameters()).mul_(2)
            x = images / 2
    with unchanged(network):
        interpreter = built(build, network)
    maps = interpreter(images, target)
    _hold_near(built(build, other)(x, y), maps, target, f"the same map {what}")


def _integrated(interpreter: Any, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return integrated gradients, and the difference of probabilities that they add up to."""
    if not isinstance(interpreter, IntegratedGradients):
        raise SkipTest("completeness is no promise of this method; if it is, attributions=")
    x = images.clone().requires_grad_()
    values, logits = interpreter.attribute(Autograd(graph=False), x, target)
    with torch.no_grad():
        start = interpreter.logits(background(interpreter.baseline, images))
        return values, probability(logits, target) - probability(start, target)


def _completeness(
    interpreter: Any, images: Tensor, target: Tensor, attributions: Attributions = _integrated
) -> None:
    """Signed attributions add up to what the method promises, within 5 % of their size."""
    values, promised = attributions(interpreter, images, target)
    total, size = values.flatten(1).sum(dim=1), values.abs().flatten(1).sum(dim=1)
    apart = (total - promised).abs()
    good = apart <= 0.05 * torch.maximum(size, promised.abs()) + 1e-6
    _hold(good, target, "attributions that add up to what they promise", apart, "a sum apart by ")


def built(build: Build, network: nn.Module) -> Interpreter:
    """Build an interpreter; weights of its own, if it has any, are the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return build(network)


def seen(interpreter: Interpreter, x: Tensor, target: Tensor) -> Explanation:
    """Return what an attack differentiates in its first iteration."""
    surrogate, images = interpreter.surrogate, x.detach()
    state = surrogate.init(interpreter, images, target)
    state = surrogate.advance(interpreter, images, state, 0.0)
    return surrogate(interpreter, x, state, 0.0)


def _attacked(view: View, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the maps of a view, and the gradient of a weighted sum of them if they have one."""
    x = images.clone().requires_grad_()
    maps = view(x, target).maps
    if not maps.requires_grad:
        return maps, None
    # A map that requires a gradient proves nothing: it may depend on the parameters alone.
    (gradient,) = torch.autograd.grad(_weighted(maps).sum(), x, allow_unused=True)
    return maps.detach(), gradient


def _outputs(interpreter: Interpreter, *batch: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield by name the map and, computed only then, the surrogate's map and gradient."""
    yield "map", interpreter(*batch)
    maps, gradient = _attacked(partial(seen, interpreter), *batch)
    yield "map of the surrogate", maps
    if gradient is not None:
        yield "gradient of the surrogate", gradient


def _of_the_map(interpreter: Interpreter, images: Tensor, target: Tensor) -> Tensor:
    """Return the gradient of the reported map; skip the check where it has none by design."""
    gradient = _attacked(interpreter.explain, images, target)[1]
    if gradient is None:
        raise SkipTest("the map has no derivative; an attack differentiates the surrogate's")
    return gradient


def _weighted(maps: Tensor) -> Tensor:
    """Return a sum over each image's map ``(B,)``, in which every pixel has its own weight."""
    weights = torch.linspace(1, 2, maps[0].numel(), dtype=maps.dtype, device=maps.device)
    return maps.flatten(1) @ weights


def _hold(good: Tensor, target: Tensor, expected: str, got: Tensor, of: str = "") -> None:
    """Raise for the first image ``(B,)`` that is not good."""
    if wrong := (~good).nonzero().flatten().tolist():
        first = wrong[0]
        raise AssertionError(
            f"expected {expected}, got {of}{got[first].item():.4g} for image {first} of a batch of "
            f"{len(good)} (class {int(target[first])})"
        )


def _hold_near(got: Tensor, right: Tensor, target: Tensor, expected: str) -> None:
    """Raise for the first image whose values are apart by more than rounding, or NaN."""
    apart = (got - right).detach().abs().flatten(1).amax(dim=1)
    size = right.detach().abs().flatten(1).amax(dim=1).clamp(min=1)
    rounding = {torch.float64: 1e-6, torch.float32: 1e-3}.get(right.dtype, 5e-2)
    _hold(apart <= rounding * size, target, expected, apart, "one apart by ")


class Check(NamedTuple):
    """A check, and the examples on which it runs.

    The function takes ``(interpreter, images, target)`` or, if ``rebuilt``, ``(build, network,
    images, target)``, models in eval mode. It raises ``AssertionError``, or ``SkipTest`` where the
    promise does not apply.
    """

    function: Callable[..., None]
    degenerate: bool = False  # on degenerate images too
    exact: bool = False  # in double precision, so that a difference is more than rounding
    smooth: bool = False  # on networks with derivatives of every order, where networks are drawn
    drawn: bool = False  # on drawn networks only
    rebuilt: bool = False  # on interpreters that it builds itself, of drawn networks


# In the order in which they run: a fault that several checks find is named after the first.
CHECKS = {
    "shape": Check(_shape),
    "finite": Check(_finite, degenerate=True),
    "deterministic": Check(_deterministic, exact=True),
    "untouched": Check(_untouched),
    "batch": Check(_batch, exact=True),
    "range": Check(_range, degenerate=True),
    "class": Check(_class, exact=True),
    "differentiable": Check(_differentiable, exact=True, smooth=True),
    "gradient": Check(_gradient, exact=True, smooth=True),
    "surrogate": Check(_surrogate, exact=True, smooth=True, drawn=True),
    "logits": Check(_logits, exact=True),
    **{
        name: Check(partial(_same, name), exact=True, drawn=True, rebuilt=True)
        for name in ("build", "shift", "relabel", "scaling")
    },
    "completeness": Check(_completeness, exact=True, smooth=True),
}

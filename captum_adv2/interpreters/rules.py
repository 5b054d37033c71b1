# SPDX-License-Identifier: MIT
"""Backward passes with rules of their own: guided backpropagation, deconvolution, DeepLift.

These methods replace the derivative of some modules. Captum does so by hooks that also act when the
map itself is differentiated, and by detaching the tensors that DeepLift works with, so the gradient
of its maps is wrong. Here a rule is a differentiable function, and acts only in the pass that makes
the map: the pass that differentiates the map uses the true derivative.

References: Springenberg et al., 2015 (guided backpropagation); Zeiler and Fergus, ECCV 2014
(deconvolution); Shrikumar et al., ICML 2017 (DeepLift's rescale rule).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Visit:
    """One run of a module under a rule: its input z, its output y, and the gradient at y."""

    module: Any
    z: Tensor
    y: Tensor
    gradient: Any = None


class Rule(NamedTuple):
    """What modules pass on in the inner pass.

    Attributes:
        modules: Types of the modules under the rule.
        passed: From a visit and the true gradient at the module's input to the gradient passed on.
    """

    modules: tuple[type[nn.Module], ...]
    passed: Callable[[Visit, Tensor], Tensor]


class InnerPass:
    """A context in which `gradients` follows a rule; later backward passes do not.

    Hooks on tensors run in every backward pass, also in the one that differentiates the map, where
    these do nothing. They find their visit by its number, and this object keeps no tensors between
    calls: a hook that held a tensor computed after its own would make a cycle that is never freed.

    Args:
        model: The model, whose modules are hooked inside the context.
        rule: The rule.
    """

    def __init__(self, model: nn.Module, rule: Rule) -> None:
        self._modules = [m for m in model.modules() if isinstance(m, rule.modules)]
        self._rule = rule
        self._visits: list[Visit] = []
        self._running = False
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        for module in self._modules:
            self._hook(module)
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.close()

    def gradients(
        self, gradient_func: Callable[..., tuple[Tensor, ...]], *args: Any
    ) -> tuple[Tensor, ...]:
        """Return what Captum's ``gradient_func`` does, under the rule."""
        self._running = True
        try:
            found = gradient_func(*args)
            if self._modules and not self._visits:
                raise RuntimeError(
                    "expected the model to run the hooks of its modules, got none that ran; pass "
                    "the model as it was before torch.compile"
                )
            return found
        finally:
            self._running = False
            self._visits.clear()

    def _hook(self, module: nn.Module) -> None:
        inputs: list[Any] = []

        def before(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
            inputs.append(args[0])
            return args[0].clone()  # the module may work in place

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            z = inputs.pop()
            if output.requires_grad and z.requires_grad:
                number = len(self._visits)
                # Copies: what follows may change the tensors in place. Where z is the output of
                # another such module, that one sees the true gradient at it, as in Captum.
                self._visits.append(Visit(module, z.clone(), output.clone()))
                output.register_hook(partial(self._at_output, number))
                z.register_hook(partial(self._at_input, number))

        self._hooks.callback(module.register_forward_pre_hook(before).remove)
        self._hooks.callback(module.register_forward_hook(after).remove)

    def _at_output(self, number: int, gradient: Tensor) -> None:
        if self._running:
            self._visits[number].gradient = gradient

    def _at_input(self, number: int, gradient: Tensor) -> Tensor | None:
        if not self._running or self._visits[number].gradient is None:
            return None
        return self._rule.passed(self._visits[number], gradient)


def positive(tensor: Tensor) -> Tensor:
    """Return the positive part; unlike ReLU's, its derivative stays as it is in a surrogate."""
    return tensor * (tensor > 0)


GUIDED = Rule((nn.ReLU,), lambda visit, gradient: positive(gradient))
DECONVOLUTION = Rule((nn.ReLU,), lambda visit, gradient: positive(visit.gradient))


_ACTIVATIONS = (nn.ReLU, nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softmax)
_POOLINGS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_POOL = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}
_UNPOOL = {3: F.max_unpool1d, 4: F.max_unpool2d, 5: F.max_unpool3d}


def deep_lift(eps: float) -> Rule:
    """Return DeepLift's rescale rule, for batches of images followed by their baselines.

    Where the inputs of image and baseline agree, an activation passes on its slope there, and max
    pooling its gradient, each image its own; in Captum, max pooling takes the first image's. An
    `nn.Softmax` is an activation like the others; Captum's rule subtracts a mean, after which the
    attributions no longer add up to the change of the logit.

    Args:
        eps: Inputs that differ by less agree.
    """
    return Rule((*_ACTIVATIONS, *_POOLINGS), partial(_rescaled, eps))


def _rescaled(eps: float, visit: Visit, gradient: Tensor) -> Tensor:
    """Return the gradient at the output times the quotient of the differences."""
    difference = _differences(visit.z)
    flat = difference.abs() < eps
    safe = difference.masked_fill(flat, 1)
    if isinstance(visit.module, _POOLINGS):
        return torch.where(flat, gradient, _unpooled(visit) / safe)
    passed: Tensor = visit.gradient * _differences(visit.y) / safe
    if not flat.any():
        return passed
    return torch.where(flat, visit.gradient * _slope_between(visit), passed)


def _twice(half: Tensor) -> Tensor:
    return torch.cat([half, half])


def _differences(both: Tensor) -> Tensor:
    """Return images less baselines, for each half of a batch."""
    image, baseline = both.chunk(2)
    return _twice(image - baseline)


def _slope_between(visit: Visit) -> Tensor:
    """Return an activation's slope halfway: the limit of the quotient, as is its derivative."""
    with torch.enable_grad():
        middle = torch.stack(visit.z.chunk(2)).mean(dim=0)
        # Past the module's hooks; on a copy, for modules that work in place.
        value = visit.module.forward(middle.clone()).sum()
        (slope,) = torch.autograd.grad(value, middle, create_graph=True)
    return _twice(slope)


def _unpooled(visit: Visit) -> Tensor:
    """Return what max pooling passes on of its outputs' differences, summed over the two maxima."""
    module, z = visit.module, visit.z
    image, baseline = visit.y.chunk(2)
    highest = torch.maximum(image, baseline)
    differences = torch.cat([highest - baseline, image - highest])
    size = module.kernel_size, module.stride, module.padding
    _, places = _POOL[z.ndim](z, *size, module.dilation, module.ceil_mode, True)
    passed = _UNPOOL[z.ndim](visit.gradient * differences, places, *size, list(z.shape))
    return _twice(torch.stack(passed.chunk(2)).sum(dim=0))

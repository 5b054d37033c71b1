# SPDX-License-Identifier: MIT
"""Backward passes with rules of their own: guided backpropagation, deconvolution, DeepLift.

These methods replace the derivative of some modules. Captum does so by hooks that also act when the
map itself is differentiated, and by detaching what DeepLift works with, so that the gradient of its
maps is wrong. Here a rule is a differentiable function, and acts only in the pass that makes the
map: in the pass that differentiates the map, the network has its true derivative.

References: Springenberg et al., 2015 (guided backpropagation); Zeiler and Fergus, ECCV 2014
(deconvolution); Shrikumar et al., ICML 2017 (DeepLift's rescale rule).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gradients(
    forward_fn: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    target_ind: Tensor | None = None,
    additional_forward_args: Any = None,
    *,
    create_graph: bool,
) -> tuple[Tensor, ...]:
    """Stand in for Captum's ``compute_gradients``; can leave a graph."""
    if target_ind is None:  # DeepLift's function has its inputs and its target already
        score = forward_fn()
    else:
        output = forward_fn(*inputs, *(additional_forward_args or ()))
        # Captum repeats the target along with the images, except where it has one entry.
        score = output.gather(1, target_ind.reshape(-1, 1).expand(len(output), 1))
    return torch.autograd.grad(score.sum(), inputs, create_graph=create_graph)


class Rule(Protocol):
    """What a module passes on, from its input z, its output y, and the gradients at both."""

    def __call__(
        self, module: Any, z: Tensor, y: Tensor, grad_input: Tensor, grad_output: Tensor
    ) -> Tensor:
        """Return the gradient at the input."""


@dataclass
class _Visit:
    """One run of a module under a rule: its input, its output, and the gradient at its output."""

    module: nn.Module
    z: Tensor
    y: Tensor
    grad_output: Tensor | None = None


class InnerPass:
    """Forward passes, inside the context, whose first backward pass follows a rule.

    Hooks on tensors run in every backward pass, also in the one that differentiates the map, and do
    nothing there. They find what they need by its number: a hook that held a tensor computed after
    its own would make a cycle that is never freed.

    Args:
        rule: The rule.
        modules: Where it acts. A module that runs twice is treated twice.
        create_graph: Whether the gradients will be differentiated.
    """

    def __init__(self, rule: Rule, modules: Iterable[nn.Module], *, create_graph: bool) -> None:
        self._rule = rule
        self._modules = list(modules)
        self._create_graph = create_graph
        self._visits: list[_Visit] = []
        self._running = False
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for module in self._modules:
            self._hook(module)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def gradients(self, *args: Any) -> tuple[Tensor, ...]:
        """Stand in for Captum's ``compute_gradients``; the rule acts here alone.

        Raises:
            RuntimeError: The model runs without its modules' hooks, so the rule would be ignored.
        """
        self._running = True
        try:
            found = gradients(*args, create_graph=self._create_graph)
            if self._modules and not self._visits:
                raise RuntimeError(
                    "expected the model to run the hooks of its modules, got none run; pass the "
                    "model as it was before torch.compile or torch.jit"
                )
            return found
        finally:
            self._running = False
            self._visits.clear()

    def _hook(self, module: nn.Module) -> None:
        inputs: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
            inputs.append(args[0])
            return args[0].clone()  # the module may work in place

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            z: Any = inputs.pop()
            if not (output.requires_grad and z.requires_grad):
                return
            number = len(self._visits)
            # Copies: what follows may change the tensors in place.
            self._visits.append(_Visit(module, z.clone(), output.clone()))
            output.register_hook(partial(self._at_output, number))
            z.register_hook(partial(self._at_input, number))

        self._stack.callback(module.register_forward_pre_hook(before).remove)
        self._stack.callback(module.register_forward_hook(after).remove)

    def _at_output(self, number: int, gradient: Tensor) -> None:
        if self._running:
            self._visits[number].grad_output = gradient

    def _at_input(self, number: int, gradient: Tensor) -> Tensor | None:
        if not self._running:
            return None
        visit = self._visits[number]
        if visit.grad_output is None:
            return None
        return self._rule(visit.module, visit.z, visit.y, gradient, visit.grad_output)


def positive(tensor: Tensor) -> Tensor:
    """Return the positive part; unlike ReLU's, its derivative stays as it is in a surrogate."""
    return tensor * (tensor > 0)


def guided(
    module: nn.Module, z: Tensor, y: Tensor, grad_input: Tensor, grad_output: Tensor
) -> Tensor:
    """Guided backpropagation: pass on ReLU's gradient where it is positive."""
    return positive(grad_input)


def deconvolution(
    module: nn.Module, z: Tensor, y: Tensor, grad_input: Tensor, grad_output: Tensor
) -> Tensor:
    """Deconvolution: pass on the gradient at ReLU's output where it is positive."""
    return positive(grad_output)


_POOLINGS: dict[type[nn.Module], tuple[Any, Any]] = {
    nn.MaxPool1d: (F.max_pool1d, F.max_unpool1d),
    nn.MaxPool2d: (F.max_pool2d, F.max_unpool2d),
    nn.MaxPool3d: (F.max_pool3d, F.max_unpool3d),
}
_ACTIVATIONS = (nn.ReLU, nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softmax)


@dataclass(frozen=True)
class DeepLift:
    """DeepLift's rescale rule, for batches of images followed by their baselines.

    Where the inputs of image and baseline agree, an activation passes on its slope there, and max
    pooling its gradient, each image its own; in Captum, max pooling takes the first image's. An
    `nn.Softmax` is an activation like the others; Captum subtracts a mean, which is not complete.

    Args:
        eps: Inputs that differ by less agree.
    """

    eps: float

    @staticmethod
    def concerns(module: nn.Module) -> bool:
        """Return whether a module has a rule: Captum's activations and max poolings."""
        return type(module) in (*_ACTIVATIONS, *_POOLINGS)

    def __call__(
        self, module: Any, z: Tensor, y: Tensor, grad_input: Tensor, grad_output: Tensor
    ) -> Tensor:
        """Return the gradient at the output times the quotient of the differences."""
        difference = _differences(z)
        flat = difference.abs() < self.eps
        safe = difference.masked_fill(flat, 1)
        if type(module) in _POOLINGS:
            rescaled = _unpooled(module, z, y, grad_output) / safe
            return torch.where(flat, grad_input, rescaled)
        rescaled = grad_output * _differences(y) / safe
        if not flat.any():
            return rescaled
        return torch.where(flat, grad_output * _slope_between(module, z), rescaled)


def _differences(tensor: Tensor) -> Tensor:
    """Return images less baselines, for each half of a batch."""
    image, baseline = tensor.chunk(2)
    return _twice(image - baseline)


def _twice(half: Tensor) -> Tensor:
    return torch.cat([half, half])


def _slope_between(module: Any, z: Tensor) -> Tensor:
    """Return an activation's slope halfway: the limit of the quotient, as is its derivative."""
    with torch.enable_grad():
        middle = torch.stack(z.chunk(2)).mean(dim=0)
        # Past the module's hooks; on a copy, for modules that work in place.
        value = module.forward(middle.clone()).sum()
        (slope,) = torch.autograd.grad(value, middle, create_graph=True)
    return _twice(slope)


def _unpooled(module: Any, z: Tensor, y: Tensor, grad_output: Tensor) -> Tensor:
    """Return what max pooling passes on of its outputs' differences, summed over the two maxima."""
    image, baseline = y.chunk(2)
    highest = torch.maximum(image, baseline)
    differences = torch.cat([highest - baseline, image - highest])
    pool, unpool = _POOLINGS[type(module)]
    size = module.kernel_size, module.stride, module.padding
    _, places = pool(z, *size, module.dilation, module.ceil_mode, True)
    passed = unpool(grad_output * differences, places, *size, list(z.shape))
    return _twice(torch.stack(passed.chunk(2)).sum(dim=0))

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

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_adv2.interpreters.tap import eagerly
from captum_adv2.spec import doubt


@dataclass
class Visit:
    """One run of a module under a rule: its input z, its output y, and the gradient at y."""

    module: Any
    z: Tensor
    y: Tensor
    gradient: Any = None


class Rule(NamedTuple):
    """From a visit of such a module and its true gradient at z to the gradient passed on."""

    modules: tuple[type[nn.Module], ...]
    passed: Callable[[Visit, Tensor], Tensor]
    complete: bool = False  # whether attributions are to sum to the difference of the logits


@contextmanager
def inner_pass(model: nn.Module, rule: Rule) -> Iterator[list[Visit]]:
    """Let backward passes through a model follow a rule, until the context is left.

    Yields the visits that were made, which are forgotten then.

    Hooks on tensors run in every backward pass, also in the later one that differentiates the map,
    where these do nothing. They find their visit by its number, in a list that is emptied: a hook
    that held a tensor computed after its own would make a cycle that is never freed.
    """
    visits: list[Visit] = []
    modules = [module for module in model.modules() if isinstance(module, rule.modules)]
    with ExitStack() as stack:
        stack.callback(visits.clear)
        stack.enter_context(eagerly())
        for module in modules:
            _hook(module, rule, visits, stack)
        yield visits
        if modules and not visits:
            raise RuntimeError(
                "expected the model to run the hooks of its modules, got none that ran; pass the "
                "model as it was before torch.compile, with modules in place of functions"
            )


def warn_of_missed(name: str, rule: Rule, met: int, outputs: list[Tensor]) -> bool:
    """Warn where a rule met no module, or fewer than there are such functions in the graph.

    Returns whether it did.
    """
    words = tuple(module.__name__.lower() for module in rule.modules)
    nodes, stack = set(), [output.grad_fn for output in outputs]
    while stack:
        node = stack.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            stack += [parent for parent, _ in node.next_functions]
    total = sum(node.name().lower().startswith(words) for node in nodes)
    missed = not met or met < total
    if missed:
        got = f"{met} of {total} activations" if met else "no module that it is for"
        doubt(
            f"the rule of {name} met {got} in the forward pass: functional ones, and those of "
            "scripted or exported models, keep their own derivative",
        )
    return missed


def warn_of_rest(name: str, attributions: Tensor, output: Tensor, target: Tensor) -> None:
    """Warn where attributions do not sum to the difference of logits between image and baseline.

    ``output`` is that of images, each as often as there are baselines, and then of these.
    """
    with torch.no_grad():
        image, baseline = output.double().view(2, len(target), -1, output.shape[1])
        index = target.view(-1, 1, 1).expand(-1, image.shape[1], 1)
        wanted = (image - baseline).gather(2, index).mean(dim=(1, 2))
        each = attributions.double().flatten(1)
        share = 0.01 + 10 * torch.finfo(output.dtype).eps
        allowed = share * wanted.abs() + 0.1 * share * each.abs().sum(dim=1)
        allowed += 100 * torch.finfo(output.dtype).eps * output.abs().amax()
        rest = (each.sum(dim=1) - wanted).abs()
    if bool((rest > allowed).any()):
        doubt(
            f"the attributions of {name} do not sum to the difference of the logits: an operation "
            "has no rule, as it is no module of torch.nn or of another kind, or max pooling "
            "follows an activation",
        )


def _hook(module: nn.Module, rule: Rule, visits: list[Visit], stack: ExitStack) -> None:
    inputs: list[Any] = []

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        inputs.append(args[0])
        return args[0].clone()  # the module may work in place

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        z, number = inputs.pop(), len(visits)

        def at_output(gradient: Tensor) -> None:
            if visits:
                visits[number].gradient = gradient

        def at_input(gradient: Tensor) -> Tensor | None:
            if not visits or visits[number].gradient is None:
                return None
            return rule.passed(visits[number], gradient)

        if output.requires_grad and z.requires_grad:
            # Copies: what follows may change the tensors in place. Where z is the output of
            # another such module, that one sees the true gradient at it, as in Captum.
            visits.append(Visit(module, z.clone(), output.clone()))
            output.register_hook(at_output)
            z.register_hook(at_input)

    stack.enter_context(module.register_forward_pre_hook(before))
    stack.enter_context(module.register_forward_hook(after))


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

    Where the inputs of image and baseline differ by less than ``eps``, an activation passes on its
    slope there, and max pooling its gradient.
    """
    return Rule((*_ACTIVATIONS, *_POOLINGS), partial(_rescaled, eps), True)


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

# SPDX-License-Identifier: MIT
"""Captum's attribution methods as differentiable interpreters.

Captum computes maps for people, so its methods cut the graph, and several return a map that has a
graph and the *wrong* gradient: only the factor that is not a gradient carries it. That a map
requires grad therefore proves nothing, and `CaptumInterpreter` accepts only methods whose gradient
was held against finite differences; others are refused, with the reason.

Two public seams of Captum make a method differentiable: the attribute ``gradient_func`` of the
methods that take gradients at the input, and ``grad_kwargs`` of those that take them at a layer.
Both are used on a shallow copy: the attribution you pass goes on working as before.

Captum itself is not imported here: whoever has an attribution has imported it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, final

import torch
from torch import Tensor, nn

from captum_adv2.checks import expect_classes, expect_logits
from captum_adv2.interpreters.base import (
    Direct,
    Interpreter,
    Surrogate,
    detached,
    differentiable_input,
    min_max,
)
from captum_adv2.interpreters.relu import Derivative, as_derivative, smooth_relu
from captum_adv2.types import Explanation

__all__ = ["CaptumInterpreter", "Reduction"]

Reduction: TypeAlias = Literal["abs-max", "abs-sum", "max", "sum"] | Callable[[Tensor], Tensor]

_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "abs-max": lambda a: a.abs().amax(dim=1, keepdim=True),
    "abs-sum": lambda a: a.abs().sum(dim=1, keepdim=True),
    "max": lambda a: a.amax(dim=1, keepdim=True),
    "sum": lambda a: a.sum(dim=1, keepdim=True),
}

# Methods that take the gradient at the input, through their attribute gradient_func.
_AT_INPUT = frozenset({"Saliency", "InputXGradient", "IntegratedGradients"})
# Methods that take it at a layer, and hand grad_kwargs on to autograd.
_AT_LAYER = frozenset({"LayerGradCam", "LayerGradientXActivation", "InternalInfluence"})
# Methods whose maps are gradients alone: on a ReLU network these do not change with the image.
_SMOOTHED = _AT_INPUT | {"InternalInfluence"}

_NO_GRAD = "Captum runs it under torch.no_grad()"
_HOOKS = "its hooks change the backward pass, and would change the outer one too"
_REASONS = {
    "NoiseTunnel": f"{_NO_GRAD}; use SmoothGrad",
    "GradientShap": _NO_GRAD,
    "GuidedBackprop": _HOOKS,
    "Deconvolution": _HOOKS,
    "GuidedGradCam": _HOOKS,
    "DeepLift": _HOOKS,
    "DeepLiftShap": _HOOKS,
    "LRP": "it works on .data, outside the graph; on ReLU networks LRP-epsilon is InputXGradient",
    "LayerActivation": f"{_NO_GRAD}; use CAM or GradCAM",
    "LayerConductance": "Captum drops grad_kwargs on the way to autograd",
    "LayerIntegratedGradients": "Captum evaluates the layer without a graph",
    "LayerGradientShap": _NO_GRAD,
    "Occlusion": _NO_GRAD,
    "FeatureAblation": _NO_GRAD,
    "ShapleyValueSampling": _NO_GRAD,
    "ShapleyValues": _NO_GRAD,
    "Lime": "its linear model is fitted outside PyTorch",
    "KernelShap": "its linear model is fitted outside PyTorch",
}


def _create_graph(
    forward_fn: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    target_ind: Any = None,
    additional_forward_args: Any = None,
) -> tuple[Tensor, ...]:
    """Stand in for Captum's ``compute_gradients``, leaving a graph that can be differentiated."""
    output = forward_fn(*inputs, *(additional_forward_args or ()))
    # Captum repeats the target along with the images, except where it has one entry.
    scores = output.gather(1, target_ind.reshape(-1, 1).expand(len(output), 1))
    return torch.autograd.grad(scores.sum(), inputs, create_graph=True)


class _Recorder(NamedTuple):
    """A forward function that remembers what it said of the very images being explained."""

    forward: Callable[..., Tensor]
    images: Tensor
    record: list[Tensor]

    def __call__(self, inputs: Tensor, *args: Any) -> Tensor:
        output = self.forward(inputs, *args)
        if inputs is self.images:
            self.record.append(output)
        return output


def _expect_supported(attribution: Any, kwargs: dict[str, Any]) -> None:
    name = type(attribution).__name__
    if not any(base.__module__.startswith("captum.attr") for base in type(attribution).__mro__):
        raise TypeError(
            f"expected an attribution method of captum.attr, got {name}; for one of your own, "
            "subclass captum_adv2.interpreters.Interpreter"
        )
    own = type(attribution).__module__.startswith("captum.attr")
    if not own or name not in _AT_INPUT | _AT_LAYER:
        reason = (
            _REASONS.get(name, "its gradient has not been verified")
            if own
            else (
                "its gradient has not been verified; subclass captum_adv2.interpreters.Interpreter"
            )
        )
        known = ", ".join(sorted(_AT_INPUT | _AT_LAYER))
        raise TypeError(f"expected a differentiable Captum method ({known}), got {name}: {reason}")
    if kwargs.get("internal_batch_size") is not None:
        raise ValueError(
            "expected internal_batch_size=None, got "
            f"{kwargs['internal_batch_size']}; Captum cuts the graph between its chunks"
        )


@final
class CaptumInterpreter(Interpreter):
    """Any attribution instance of Captum that can be made differentiable, as an interpreter.

    Supported: ``Saliency``, ``InputXGradient``, ``IntegratedGradients``, ``LayerGradCam``,
    ``LayerGradientXActivation``, ``InternalInfluence``. The attribution is not changed.

    Convention:
        Reduced over channels, min-max scaled per image, at the attribution's own resolution.

    Args:
        attribution: Instance of a Captum method, built on the model (or on a function of it: then
            the attack takes the logits from its own model, in a forward pass of its own).
        reduce: How channels become one: ``"abs-max"``, ``"abs-sum"``, ``"max"``, ``"sum"``, or a
            function ``(B, C, h, w) -> (B, 1, h, w)``.
        smoothing: Derivative of ReLU in the surrogate of methods at the input; see `Gradient`.
        **attribute_kwargs: Passed to ``attribution.attribute`` at each call.

    Raises:
        TypeError: Not a Captum method, or one that cannot be differentiated; the reason is given.
        ValueError: Unknown ``reduce``, or ``internal_batch_size`` given.

    >>> from captum.attr import Saliency
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    >>> CaptumInterpreter(Saliency(model))(torch.rand(2, 1, 4, 4), torch.tensor([0, 1])).shape
    torch.Size([2, 1, 4, 4])
    """

    def __init__(
        self,
        attribution: Any,
        reduce: Reduction = "abs-max",
        *,
        smoothing: float | Derivative | None = 1e-4,
        **attribute_kwargs: Any,
    ) -> None:
        _expect_supported(attribution, attribute_kwargs)
        if not callable(reduce) and reduce not in _REDUCTIONS:
            raise ValueError(
                f"expected reduce to be one of {sorted(_REDUCTIONS)} or a function, got {reduce!r}"
            )
        forward = attribution.forward_func
        super().__init__(forward if isinstance(forward, nn.Module) else None)
        self.attribution = attribution
        self.smoothing = as_derivative(smoothing)
        self._reduce = reduce
        self._kwargs = attribute_kwargs

    def __repr__(self) -> str:
        return f"CaptumInterpreter({type(self.attribution).__name__})"

    def explain(self, images: Tensor, target: Tensor) -> Explanation:
        """See `Interpreter.explain`; logits are shared where Captum runs the model on images."""
        with differentiable_input(images) as (x, create_graph):
            recorder = _Recorder(partial(self._forward, target), x, [])
            attribution = copy.copy(self.attribution)
            attribution.forward_func = recorder
            attribution.gradient_func = _create_graph
            attributions = attribution.attribute(x, target=target, **self._kwargs, **self._knob())
            reduce = self._reduce if callable(self._reduce) else _REDUCTIONS[self._reduce]
            logits = recorder.record[0] if self.model is not None and recorder.record else None
            explanation = Explanation(min_max(reduce(attributions)), logits)
        return explanation if create_graph else detached(explanation)

    def surrogate(self, images: Tensor, target: Tensor) -> Surrogate:
        """Return the same map; where it is made of input gradients, with ReLU's smoothed."""
        smooth = type(self.attribution).__name__ in _SMOOTHED
        return Direct(self._explain_smooth if smooth else self.explain, target)

    @property
    def _at_input(self) -> bool:
        return type(self.attribution).__name__ in _AT_INPUT

    def _knob(self) -> dict[str, Any]:
        return {} if self._at_input else {"grad_kwargs": {"create_graph": True}}

    def _forward(self, target: Tensor, images: Tensor, *args: Any) -> Tensor:
        inputs = images if self._preprocess is None else self._preprocess(images)
        output = expect_logits(self.attribution.forward_func(inputs, *args), len(images))
        return expect_classes(output, target)

    def _explain_smooth(self, images: Tensor, target: Tensor) -> Explanation:
        with smooth_relu(self.smoothing):
            return self.explain(images, target)

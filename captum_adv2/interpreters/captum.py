# SPDX-License-Identifier: MIT
"""Captum's attribution methods as differentiable interpreters.

Captum's methods cut the graph, and several return a map that has a graph and the *wrong* gradient:
only the factor that is not a gradient carries it. So `CaptumInterpreter` accepts only methods whose
gradient was held against finite differences, those of the table in `methods`, and refuses others
with the reason. Captum itself is not imported: methods are known by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, final

from torch import Tensor, nn

from captum_adv2.interpreters import base
from captum_adv2.interpreters.first_order import GradientBased, Gradients
from captum_adv2.interpreters.methods import METHODS, Call, Method
from captum_adv2.interpreters.relu import Smoothing, as_slope
from captum_adv2.spec import Index, checked

Reduction: TypeAlias = Literal["abs-max", "abs-sum", "max", "sum"] | Callable[[Tensor], Tensor]

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "abs-max": lambda a: a.abs().amax(dim=1, keepdim=True),
    "abs-sum": lambda a: a.abs().sum(dim=1, keepdim=True),
    "max": lambda a: a.amax(dim=1, keepdim=True),
    "sum": lambda a: a.sum(dim=1, keepdim=True),
}

_DETACHED = "Captum detaches what its rules work with; use DeepLift"
_SHUFFLED = "it shuffles features among the images of a batch"
_REASONS = {
    "LRP": "it reads activations off .data; on ReLU networks LRP-epsilon is InputXGradient",
    "LayerLRP": "it reads activations off .data",
    "LayerGradientShap": "Captum runs it under torch.no_grad()",
    "LayerDeepLift": _DETACHED,
    "LayerDeepLiftShap": _DETACHED,
    "LayerFeatureAblation": "Captum runs it under torch.no_grad(); use FeatureAblation",
    "FeaturePermutation": _SHUFFLED,
    "LayerFeaturePermutation": _SHUFFLED,
}
_PASSED = {  # to a call, or by one
    "inputs": "the interpreter is called with the images",
    "target": "the interpreter is called with the classes",
}
_REFUSED = {
    "internal_batch_size": "Captum cuts the graph between its chunks",
    "return_convergence_delta": "a map is all that is returned",
    "draw_baseline_from_distrib": "baselines are drawn by GradientShap",
    "grad_kwargs": "they are what makes the map differentiable",
}


def _method(attribution: Any) -> Method:
    """Return the method of an attribution; raise where its gradient has not been verified."""
    if inspect.isclass(attribution):
        name = attribution.__name__
        raise TypeError(f"expected attribution to be an object, got the class; pass {name}(model)")
    kind = type(attribution)
    reason = "its gradient has not been verified; subclass captum_adv2.interpreters.Interpreter"
    if kind.__module__.startswith("captum.attr"):  # and no subclass, which may compute anything
        if kind.__name__ in METHODS:
            return METHODS[kind.__name__]
        reason = _REASONS.get(kind.__name__, reason)
    raise TypeError(
        f"expected attribution to be a differentiable method of captum.attr "
        f"({', '.join(sorted(METHODS))}), got {kind.__name__}: {reason}"
    )


def _expect_supported(attribution: Any, kwargs: dict[str, Any]) -> None:
    """Raise unless a method, and arguments of its ``attribute``, can be differentiated."""
    method = _method(attribution)
    if method.game is not None:
        method.game(attribution)
    for key, why in _REFUSED.items():
        if kwargs.get(key):
            raise ValueError(f"expected no {key}, got {kwargs[key]}; {why}")
    for key in _PASSED.keys() & kwargs.keys():
        raise TypeError(f"expected no {key}; {_PASSED[key]}")
    signature, kind = inspect.signature(attribution.attribute), type(attribution).__name__
    try:
        bound = signature.bind(None, **kwargs)
    except TypeError as error:
        taken = ", ".join([*signature.parameters][1:])
        raise TypeError(f"expected arguments of {kind}.attribute({taken}): {error}") from None
    inner = getattr(attribution, "attribution_method", None)
    if inner is not None:
        if _method(inner).random:
            raise TypeError(
                "expected a NoiseTunnel around a method that draws no numbers itself, got one "
                f"around {type(inner).__name__}"
            )
        _expect_supported(inner, bound.arguments.get("kwargs", {}))


@final
class CaptumInterpreter(GradientBased):
    """An attribution method of Captum, made differentiable.

    22 methods are supported (``docs/captum.md``): gradients at the input or a layer, guided
    backpropagation and DeepLift, perturbations of the image (``Lime`` with a linear or ridge
    regression), and a ``NoiseTunnel`` around one that draws no numbers.

    Convention:
        Reduced over channels, min-max scaled per image, at the attribution's own resolution.

    Args:
        attribution: Instance of a Captum method, which is not changed. Built on a function in place
            of a model, it shares no logits with an attack, which runs its own model for them.
        reduce: How channels become one: ``"abs-max"``, ``"abs-sum"``, ``"max"``, ``"sum"``, or a
            function ``(B, C, h, w) -> (B, 1, h, w)``.
        smoothing: Derivative of ReLU in the surrogate of methods that take gradients of the model;
            see `Gradient`. DeepLift's rules are smooth without it.
        seed: Seed of the method's random numbers, drawn anew at each call and the same for all
            images of a batch.
        **attribute_kwargs: Arguments of ``attribution.attribute``.

    >>> import torch
    >>> from captum.attr import Saliency
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    >>> CaptumInterpreter(Saliency(model))(torch.rand(2, 1, 4, 4), torch.tensor([0, 1])).shape
    torch.Size([2, 1, 4, 4])
    """

    @checked
    def __init__(
        self,
        attribution: Any,
        reduce: Reduction = "abs-max",
        *,
        smoothing: Smoothing = "auto",
        seed: Index = 0,
        **attribute_kwargs: Any,
    ) -> None:
        _expect_supported(attribution, attribute_kwargs)
        forward = attribution.forward_func
        super().__init__(forward if isinstance(forward, nn.Module) else None)
        self.attribution = attribution
        self.reduce = reduce
        self.seed = seed
        self._checked = False  # whether the first call has seen what a rule of modules misses
        # To Captum, None is the default of each of them.
        self._kwargs = {key: value for key, value in attribute_kwargs.items() if value is not None}
        inner = getattr(attribution, "attribution_method", attribution)
        if smoothing is not None:
            self.surrogate = _method(inner).surrogate(as_slope(smoothing))

    def __repr__(self) -> str:
        return f"CaptumInterpreter({type(self.attribution).__name__})"

    def explain_by(self, gradients: Gradients, images: Tensor, target: Tensor) -> base.Explanation:
        """See `GradientBased`; logits are shared where Captum runs the model on images."""
        size, check = len(images), not self._checked
        call = Call(self._run, images, target, self.seed, gradients, size, check)
        self._checked = True
        attributions = _method(self.attribution).run(self.attribution, call, **self._kwargs)
        if not isinstance(attributions, Tensor) or attributions.ndim != 4:
            got = getattr(attributions, "shape", type(attributions).__name__)
            raise ValueError(
                f"expected {type(self.attribution).__name__} to give attributions (B, C, h, w), "
                f"got {got}; choose one layer with feature maps"
            )
        reduce = REDUCTIONS[self.reduce] if isinstance(self.reduce, str) else self.reduce
        maps = base.min_max(reduce(attributions))
        # Their graph refers to the call, which must not keep them: it would never be freed.
        logits, call.logits = call.logits, None
        return base.Explanation(maps, None if self.model is None else logits)

    def _run(self, images: Tensor, *args: Any) -> Tensor:
        logits: Tensor = self.attribution.forward_func(self.prepare(images), *args)
        return logits

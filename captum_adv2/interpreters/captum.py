# SPDX-License-Identifier: MIT
"""Captum's attribution methods as differentiable interpreters.

Captum computes maps to be looked at, so its methods cut the graph, and several return a map that
has a graph and the *wrong* gradient: only the factor that is not a gradient carries it. That a map
requires grad therefore proves nothing, and `CaptumInterpreter` accepts only methods whose gradient
was held against finite differences; others are refused, with the reason.

A method is made differentiable on a shallow copy, so that the attribution you pass goes on working
as before:

- *gradients at the input*: the attribute ``gradient_func``, a public seam;
- *gradients at a layer*: ``grad_kwargs``, another one; and a forward pass that has a graph also
  where Captum turns gradients off around it;
- *a backward pass with rules of its own* (guided backpropagation, DeepLift): see `rules`;
- *random draws under* ``no_grad``: the same numbers, drawn here from a seed;
- *perturbations under* ``no_grad``: see `perturbation`.

Captum itself is not imported here: its methods are known by name.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias, final

import numpy as np
import torch
from torch import Tensor, nn

from captum_adv2.interpreters import perturbation, rules
from captum_adv2.interpreters.base import (
    Exact,
    Explanation,
    Interpreter,
    Smoothed,
    detached,
    differentiable_input,
    min_max,
)
from captum_adv2.interpreters.perturbation import Game
from captum_adv2.interpreters.relu import Derivative, as_derivative
from captum_adv2.interpreters.tap import tapped
from captum_adv2.spec import Count, Index, NonNegative, Positive, checked, expect

Reduction: TypeAlias = Literal["abs-max", "abs-sum", "max", "sum"] | Callable[[Tensor], Tensor]
"""How channels become one: by name, or a function ``(B, C, h, w) -> (B, 1, h, w)``."""

_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "abs-max": lambda a: a.abs().amax(dim=1, keepdim=True),
    "abs-sum": lambda a: a.abs().sum(dim=1, keepdim=True),
    "max": lambda a: a.amax(dim=1, keepdim=True),
    "sum": lambda a: a.sum(dim=1, keepdim=True),
}


@dataclass
class _Call:
    """One explanation to make.

    Attributes:
        function: The model: images to logits.
        images: ``(B, C, H, W)``.
        target: Classes ``(B,)``.
        seed: Seed of what is drawn.
        graph: Whether the attributions will be differentiated.
        logits: What the model said of the images, once it has run on these very ones.
    """

    function: Callable[..., Tensor]
    images: Tensor
    target: Tensor
    seed: int
    graph: bool
    logits: Tensor | None = None

    def forward(self, inputs: Tensor, *args: Any) -> Tensor:
        """Run the model with a graph: Captum forbids it where activations become the map."""
        with torch.enable_grad():
            output = self.function(inputs, *args)
        if inputs is self.images and self.logits is None:
            self.logits = output
        return output


@dataclass(frozen=True)
class _Method:
    """How a method of Captum is run, and what is particular about it.

    Attributes:
        run: From the attribution, a call and keyword arguments to attributions ``(B, C, h, w)``.
        smooth: Gradients of the model are in its map; on ReLUs they change with the image by jumps.
        distribution: It draws images of its own, or has baselines of another number.
        game: What is perturbed, where parts of the image are.
    """

    run: Callable[..., Any]
    smooth: bool = False
    distribution: bool = False
    game: Callable[[Any], Game] | None = None


def _copied(attribution: Any, forward: Callable[..., Tensor], **attributes: Any) -> Any:
    """Return a shallow copy that calls another forward function, with lists of its own."""
    clone = copy.copy(attribution)
    lists: dict[str, Any] = {key: [] for key in vars(clone) if key.endswith(("hooks", "handles"))}
    vars(clone).update({"forward_func": forward} | lists | attributes)
    return clone


def _at_input(attribution: Any, call: _Call, **kwargs: Any) -> Any:
    gradients = partial(rules.gradients, create_graph=call.graph)
    clone = _copied(attribution, call.forward, gradient_func=gradients)
    return clone.attribute(call.images, target=call.target, **kwargs)


def _at_layer(attribution: Any, call: _Call, **kwargs: Any) -> Any:
    clone = _copied(attribution, call.forward)
    if hasattr(clone, "ig"):  # LayerIntegratedGradients writes to it
        clone.ig = copy.copy(clone.ig)
    graph = {"create_graph": call.graph}
    if type(attribution).__name__ == "LayerConductance":
        # It takes grad_kwargs, and drops them on the way to autograd.
        clone._attribute = partial(clone._attribute, grad_kwargs=graph)
    return clone.attribute(call.images, target=call.target, grad_kwargs=graph, **kwargs)


def _layer_itself(
    attribution: Any,
    call: _Call,
    *,
    additional_forward_args: Any = None,
    attribute_to_layer_input: bool = False,
) -> Any:
    side: Literal["input", "output"] = "input" if attribute_to_layer_input else "output"
    with torch.set_grad_enabled(call.graph), tapped(attribution.layer, side) as tap:
        call.logits = call.function(call.images, *(additional_forward_args or ()))
    return tap.features


class _AsModule(nn.Module):
    """A function as a module, for methods that take a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        """Call the function."""
        return self.function(*inputs)


def _by_rules(attribution: Any, call: _Call, **kwargs: Any) -> Any:
    """Run a method that hooks modules, with our hooks in place of its own."""
    deep = hasattr(attribution, "eps")
    rule: rules.Rule
    if deep:
        rule = rules.DeepLift(attribution.eps)
    else:
        rule = rules.deconvolution if attribution.use_relu_grad_output else rules.guided
    concerns = rules.DeepLift.concerns if deep else lambda m: isinstance(m, nn.ReLU)
    modules = filter(concerns, attribution.model.modules())
    model = _AsModule(call.forward)
    clone = _copied(attribution, model, model=model)
    clone._register_hooks = lambda module: None
    with (
        rules.InnerPass(rule, modules, create_graph=call.graph) as inner,
        warnings.catch_warnings(),
    ):
        # Captum says at each call that it sets hooks.
        warnings.filterwarnings("ignore", "\\s*Setting (back|for)ward", UserWarning)
        clone.gradient_func = inner.gradients
        return clone.attribute(call.images, target=call.target, **kwargs)


def _guided_grad_cam(
    attribution: Any,
    call: _Call,
    *,
    additional_forward_args: Any = None,
    interpolate_mode: str = "nearest",
    attribute_to_layer_input: bool = False,
) -> Any:
    more = {"additional_forward_args": additional_forward_args}
    guided = _by_rules(attribution.guided_backprop, call, **more)
    cam = _at_layer(
        attribution.grad_cam, call, attribute_to_layer_input=attribute_to_layer_input, **more
    )
    size = call.images.shape[2:]
    resized = attribution.grad_cam.interpolate(
        rules.positive(cam), tuple(size), interpolate_mode=interpolate_mode
    )
    return guided * resized


def _noise(generator: torch.Generator, count: int, x: Tensor, std: float) -> Tensor:
    """Return noisy copies ``(B count, C, H, W)``, by images, all of which get the same noise."""
    spread = torch.full((count, *x.shape[1:]), float(std))
    noise = torch.normal(0.0, spread, generator=generator).to(x)
    return (x[:, None] + noise).flatten(0, 1)


def _noise_tunnel(
    attribution: Any,
    call: _Call,
    *,
    nt_type: Literal["smoothgrad", "smoothgrad_sq", "vargrad"] = "smoothgrad",
    nt_samples: Count = 5,
    nt_samples_batch_size: Count | None = None,
    stdevs: NonNegative = 1.0,
    **kwargs: Any,
) -> Any:
    inner = attribution.attribution_method
    run = METHODS[type(inner).__name__].run
    generator, x = torch.Generator().manual_seed(call.seed), call.images
    sums, squares, left = [], [], nt_samples
    while left:
        count = min(left, nt_samples_batch_size or left)
        left -= count
        given = {
            key: value.repeat_interleave(count, dim=0)
            if isinstance(value, Tensor) and len(value) == len(x) > 1
            else value
            for key, value in kwargs.items()
        }
        noisy = _noise(generator, count, x, stdevs)
        each = replace(call, images=noisy, target=call.target.repeat_interleave(count))
        parts = run(inner, each, **given)
        parts = parts.reshape(len(x), count, *parts.shape[1:])
        sums.append(parts.sum(dim=1))
        squares.append(parts.square().sum(dim=1))
    mean, square = (torch.stack(part).sum(dim=0) / nt_samples for part in (sums, squares))
    return {"smoothgrad": mean, "smoothgrad_sq": square, "vargrad": square - mean.square()}[nt_type]


def _gradient_shap(
    attribution: Any,
    call: _Call,
    *,
    baselines: Tensor | Callable[..., Tensor],
    n_samples: Count = 5,
    stdevs: NonNegative = 0.0,
    additional_forward_args: Any = None,
) -> Any:
    x = call.images
    if callable(baselines):
        baselines = baselines(x) if inspect.signature(baselines).parameters else baselines()
    # Captum draws from NumPy's old global generator, of which this is a private one.
    draws = np.random.RandomState(call.seed)  # noqa: NPY002
    noisy = _noise(torch.Generator().manual_seed(call.seed), n_samples, x, stdevs)
    chosen = baselines[draws.choice(len(baselines), n_samples)].to(x)
    baseline = chosen.repeat(len(x), 1, 1, 1)
    share = torch.as_tensor(draws.uniform(0.0, 1.0, n_samples)).to(x).repeat(len(x))
    share = share.view(-1, 1, 1, 1)
    between = share * noisy + (1 - share) * baseline
    (gradient,) = rules.gradients(
        call.forward,
        (between,),
        call.target.repeat_interleave(n_samples),
        additional_forward_args,
        create_graph=call.graph,
    )
    if attribution.multiplies_by_inputs:
        gradient = (noisy - baseline) * gradient
    return gradient.reshape(len(x), n_samples, *x.shape[1:]).mean(dim=1)


def _occlusion(
    attribution: Any,
    call: _Call,
    *,
    sliding_window_shapes: tuple[Count, Count, Count],
    strides: Count | tuple[Count, Count, Count] | None = None,
    baselines: float | Tensor | None = None,
    perturbations_per_eval: Count | None = None,
) -> Tensor:
    with torch.set_grad_enabled(call.graph):
        attributions, call.logits = perturbation.occlusion(
            call.function,
            call.images,
            call.target,
            window=sliding_window_shapes,
            stride=strides if isinstance(strides, tuple) else (strides or 1,) * 3,
            baseline=0.0 if baselines is None else baselines,
            chunk=perturbations_per_eval,
        )
    return attributions


def _features(
    attribution: Any,
    call: _Call,
    *,
    feature_mask: Count | Tensor | None = None,
    n_samples: Count = 25,
    baselines: float | Tensor | None = None,
    perturbations_per_eval: Count | None = None,
) -> Tensor:
    game: Any = METHODS[type(attribution).__name__].game
    with torch.set_grad_enabled(call.graph):
        attributions, call.logits = perturbation.attribute(
            game(attribution),
            call.function,
            call.images,
            call.target,
            features=_each_feature(feature_mask, call.images[0]),
            samples=n_samples,
            seed=call.seed,
            baseline=0.0 if baselines is None else baselines,
            chunk=perturbations_per_eval,
        )
    return attributions


def _each_feature(mask: int | Tensor | None, image: Tensor) -> Tensor:
    """Return the feature of each value of an image, ``(C, H, W)``; without a mask, its own."""
    if mask is None:
        mask = torch.arange(image.numel()).view_as(image)
    elif isinstance(mask, int):
        mask = perturbation.grid(mask, *image.shape[1:])
    return torch.broadcast_to(mask - mask.amin(), (1, *image.shape))[0].to(image.device)


def _lime(attribution: Any) -> Game:
    """Return a Captum Lime's method, if its fit has a closed form."""
    fit = attribution.interpretable_model
    kind, settings = type(fit).__name__, dict(getattr(fit, "construct_kwargs", {}))
    ridge = settings.pop("alpha", 1.0) if kind == "SkLearnRidge" else 0.0
    if kind not in ("SkLearnRidge", "SkLearnLinearRegression") or settings:
        raise TypeError(
            "expected a Lime with interpretable_model=SkLearnLinearRegression() or "
            f"SkLearnRidge(alpha=...), whose fit has a closed form, got {kind}, "
            "which is fitted outside PyTorch"
        )
    if attribution.perturb_func.__name__ != "default_perturb_func":
        raise TypeError("expected a Lime with Captum's own perturb_func, got another")
    return perturbation.lime(*_kernel(attribution.similarity_func), ridge)


def _kernel(similarity: Callable[..., float]) -> tuple[float, Literal["cosine", "euclidean"]]:
    """Return rate and distance of an exponential kernel :math:`e^{-r d^2}`, from its values."""
    right, up, far = (torch.tensor([xy]) for xy in ([1.0, 0.0], [0.0, 1.0], [2.0, 0.0]))
    by_angle, by_length = similarity(right, up, None), similarity(right, far, None)
    cosine = by_length == 1  # or hardly any weighting at all
    value = by_angle if cosine else by_length
    rate = -math.log(value) if value > 0 else math.inf
    # From up to far the cosine distance is 1, the squared Euclidean one 5.
    expected = math.exp(-rate * (1 if cosine else 5))
    if not math.isclose(similarity(up, far, None), expected, rel_tol=1e-6):
        raise TypeError(
            "expected a Lime with a similarity_func from get_exp_kernel_similarity_function, got "
            "another; its gradient has not been verified"
        )
    return rate, "cosine" if cosine else "euclidean"


METHODS: dict[str, _Method] = {
    "Saliency": _Method(_at_input, smooth=True),
    "InputXGradient": _Method(_at_input, smooth=True),
    "IntegratedGradients": _Method(_at_input, smooth=True),
    "GradientShap": _Method(_gradient_shap, smooth=True, distribution=True),
    "DeepLift": _Method(_by_rules),
    "DeepLiftShap": _Method(_by_rules, distribution=True),
    "GuidedBackprop": _Method(_by_rules, smooth=True),
    "Deconvolution": _Method(_by_rules, smooth=True),
    "GuidedGradCam": _Method(_guided_grad_cam, smooth=True),
    "NoiseTunnel": _Method(_noise_tunnel, distribution=True),
    "LayerActivation": _Method(_layer_itself),
    "LayerGradCam": _Method(_at_layer, smooth=True),
    "LayerGradientXActivation": _Method(_at_layer, smooth=True),
    "LayerConductance": _Method(_at_layer, smooth=True),
    "LayerIntegratedGradients": _Method(_at_layer, smooth=True),
    "InternalInfluence": _Method(_at_layer, smooth=True),
    "Occlusion": _Method(_occlusion),
    "FeatureAblation": _Method(_features, game=lambda _: perturbation.ablation()),
    "ShapleyValues": _Method(_features, game=lambda _: perturbation.shapley()),
    "ShapleyValueSampling": _Method(_features, game=lambda _: perturbation.shapley_sampling()),
    "KernelShap": _Method(_features, game=lambda a: perturbation.kernel_shap(a.inf_weight)),
    "Lime": _Method(_features, game=_lime),
}

_UNVERIFIED = "its gradient has not been verified"
_DETACHED = "Captum detaches what its rules work with; use DeepLift"
_SHUFFLED = "it shuffles features among the images of a batch: no map is of one image"
_REASONS = {
    "LRP": (
        "it reads activations off .data, no graph; on ReLU networks LRP-epsilon is InputXGradient"
    ),
    "LayerLRP": "as LRP, it reads activations off .data, outside the graph",
    "LayerGradientShap": "Captum runs it under torch.no_grad(), and offers no graph of the layer",
    "LayerDeepLift": _DETACHED,
    "LayerDeepLiftShap": _DETACHED,
    "LayerFeatureAblation": "Captum runs it under torch.no_grad(); use FeatureAblation",
    "FeaturePermutation": _SHUFFLED,
    "LayerFeaturePermutation": _SHUFFLED,
}
_REFUSED = {
    "internal_batch_size": "Captum cuts the graph between its chunks",
    "return_convergence_delta": "a map is all that is returned",
    "draw_baseline_from_distrib": "baselines are drawn by GradientShap",
    "grad_kwargs": "they are what makes the map differentiable",
}


def _method(attribution: Any) -> _Method:
    """Return the method of an attribution, if it is supported."""
    name, module = type(attribution).__name__, type(attribution).__module__
    if not any(base.__module__.startswith("captum.attr") for base in type(attribution).__mro__):
        raise TypeError(
            f"expected an attribution method of captum.attr, got {name}; for one of your own, "
            "subclass captum_adv2.interpreters.Interpreter"
        )
    own = not module.startswith("captum.attr")
    if own or name not in METHODS:
        reason = _REASONS.get(name, _UNVERIFIED)
        if own:
            reason = f"{_UNVERIFIED}; subclass captum_adv2.interpreters.Interpreter"
        known = ", ".join(sorted(METHODS))
        raise TypeError(f"expected a differentiable Captum method ({known}), got {name}: {reason}")
    method = METHODS[name]
    if method.game is not None:
        method.game(attribution)
    return method


def _expect_arguments(attribution: Any, kwargs: dict[str, Any]) -> None:
    """Raise for arguments that ``attribute`` does not have, or that break the graph."""
    for key, why in _REFUSED.items():
        if kwargs.get(key):
            raise ValueError(f"expected no {key}, got {kwargs[key]}; {why}")
    signature = inspect.signature(attribution.attribute)
    target = {"target": None} if "target" in signature.parameters else {}
    signature.bind(None, **target, **kwargs)
    run = inspect.signature(_method(attribution).run, eval_str=True)
    bound = run.bind(attribution, None, **kwargs)
    for name, value in kwargs.items():
        if name in run.parameters:
            expect(value, run.parameters[name].annotation, name)
    if hasattr(attribution, "attribution_method"):
        inner = attribution.attribution_method
        if _method(inner).distribution or _method(inner).game:
            raise TypeError(
                "expected a NoiseTunnel around a method of gradients that draws no numbers "
                f"itself, got one around {type(inner).__name__}"
            )
        _expect_arguments(inner, bound.arguments.get("kwargs", {}))


@final
class CaptumInterpreter(Interpreter):
    """Any attribution instance of Captum that can be made differentiable, as an interpreter.

    Supported are, of gradients at the input: ``Saliency``, ``InputXGradient``,
    ``IntegratedGradients``, ``GradientShap``, ``DeepLift``, ``DeepLiftShap``, ``GuidedBackprop``,
    ``Deconvolution``, ``GuidedGradCam``, and a ``NoiseTunnel`` around these and the next; at a
    layer: ``LayerActivation``, ``LayerGradCam``, ``LayerGradientXActivation``,
    ``LayerConductance``, ``LayerIntegratedGradients``, ``InternalInfluence``; of perturbations:
    ``Occlusion``, ``FeatureAblation``, ``ShapleyValues``, ``ShapleyValueSampling``, ``KernelShap``,
    and ``Lime`` with a linear or ridge regression. The attribution is not changed.

    Convention:
        Reduced over channels, min-max scaled per image, at the attribution's own resolution.

    Args:
        attribution: Instance of a Captum method, built on the model (or on a function of it: then
            the attack takes the logits from its own model, in a forward pass of its own).
        reduce: How channels become one: ``"abs-max"``, ``"abs-sum"``, ``"max"``, ``"sum"``, or a
            function ``(B, C, h, w) -> (B, 1, h, w)``.
        smoothing: Derivative of ReLU in the surrogate of methods that take gradients of the model;
            see `Gradient`. DeepLift's rules are smooth without it.
        seed: Seed of what the method draws, anew at each call; the same for all images of a batch.
        **attribute_kwargs: Passed to ``attribution.attribute`` at each call.

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
        smoothing: Positive | Derivative | None = 1e-4,
        seed: Index = 0,
        **attribute_kwargs: Any,
    ) -> None:
        _method(attribution)
        _expect_arguments(attribution, attribute_kwargs)
        forward = attribution.forward_func
        super().__init__(forward if isinstance(forward, nn.Module) else None)
        self.attribution = attribution
        self._reduce = reduce
        self._seed = seed
        self._kwargs = attribute_kwargs
        inner = getattr(attribution, "attribution_method", attribution)
        if _method(inner).smooth:
            self.surrogate = Smoothed(as_derivative(smoothing))
        else:
            self.surrogate = Exact()

    def __repr__(self) -> str:
        return f"CaptumInterpreter({type(self.attribution).__name__})"

    def explain(self, images: Tensor, target: Tensor) -> Explanation:
        """See `Interpreter.explain`; logits are shared where Captum runs the model on images."""
        with differentiable_input(images) as (x, graph):
            call = _Call(self._logits, x, target, self._seed, graph)
            attributions = _method(self.attribution).run(self.attribution, call, **self._kwargs)
            if not isinstance(attributions, Tensor) or attributions.ndim != 4:
                got = getattr(attributions, "shape", type(attributions).__name__)
                raise ValueError(
                    f"expected {type(self.attribution).__name__} to give attributions "
                    f"(B, C, h, w), got {got}; choose one layer with feature maps"
                )
            reduce = _REDUCTIONS[self._reduce] if isinstance(self._reduce, str) else self._reduce
            maps = min_max(reduce(attributions))
            explanation = Explanation(maps, None if self.model is None else call.logits)
        return explanation if graph else detached(explanation)

    def _logits(self, images: Tensor, *args: Any) -> Tensor:
        logits: Tensor = self.attribution.forward_func(self.prepare(images), *args)
        return logits

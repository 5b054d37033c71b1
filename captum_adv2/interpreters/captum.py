# SPDX-License-Identifier: MIT
"""Captum's attribution methods as differentiable interpreters.

Captum computes maps for people, so its methods cut the graph, and several return a map that has a
graph and the *wrong* gradient: only the factor that is not a gradient carries it. That a map
requires grad therefore proves nothing, and `CaptumInterpreter` accepts only methods whose gradient
was held against finite differences; others are refused, with the reason.

What makes a method differentiable, always on a shallow copy, so that the attribution you pass goes
on working as before:

- *gradients at the input*: the attribute ``gradient_func``, a public seam;
- *gradients at a layer*: ``grad_kwargs``, another one; and a forward pass that has a graph also
  where Captum turns gradients off around it;
- *a backward pass with rules of its own* (guided backpropagation, DeepLift): `_InnerPass`, whose
  rules act in the pass that makes the map and never in the one that differentiates it;
- *random draws under* ``no_grad``: the same numbers, drawn here from a seed;
- *perturbations under* ``no_grad``: the interpreters of `perturbation`.

Captum itself is not imported here: whoever has an attribution has imported it.
"""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from captum_adv2.checks import (
    expect_classes,
    expect_flag,
    expect_floats,
    expect_function,
    expect_integer,
    expect_logits,
    expect_number,
    expect_pair,
)
from captum_adv2.interpreters.base import (
    Direct,
    Interpreter,
    Surrogate,
    detached,
    differentiable_input,
    expect_baseline,
    min_max,
)
from captum_adv2.interpreters.perturbation import (
    FeatureAblation,
    KernelShap,
    Lime,
    Occlusion,
    ShapleyValueSampling,
)
from captum_adv2.interpreters.reduction import Reduction, expect_reduction, reduced
from captum_adv2.interpreters.relu import Derivative, as_derivative, smooth_relu
from captum_adv2.interpreters.tap import Side, own_hook
from captum_adv2.types import Explanation

__all__ = ["CaptumInterpreter", "Reduction"]

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


class _Forward:
    """A forward function that remembers what it said of the very images being explained."""

    def __init__(self, function: Callable[..., Tensor], images: Tensor) -> None:
        self._function, self._images = function, images
        self.logits: Tensor | None = None

    def __call__(self, inputs: Tensor, *args: Any) -> Tensor:
        """Run the function, with a graph: Captum forbids it where activations become the map."""
        with torch.enable_grad():
            output = self._function(inputs, *args)
        if inputs is self._images and self.logits is None:
            self.logits = output
        return output


class _OwnLayer(nn.Module):
    """A layer that Captum hooks for the running thread alone; see `own_hook`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def register_forward_pre_hook(self, hook: Any, **kwargs: Any) -> RemovableHandle:
        """Hook the layer itself."""
        return own_hook(self.layer, "input", hook)

    def register_forward_hook(self, hook: Any, **kwargs: Any) -> RemovableHandle:
        """Hook the layer itself."""
        return own_hook(self.layer, "output", hook)


class _AsModule(nn.Module):
    """A function as a module with the model's modules in it, for methods that hook these."""

    def __init__(self, function: Callable[..., Tensor], model: nn.Module) -> None:
        super().__init__()
        self.function, self.model = function, model

    def forward(self, *inputs: Tensor) -> Tensor:
        """Call the function."""
        return self.function(*inputs)


def _score(
    forward: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    target: Tensor | None,
    additional: Any,
) -> Tensor:
    if target is None:  # DeepLift's function has its inputs and its target already
        return forward().sum()
    output = forward(*inputs, *(additional or ()))
    # Captum repeats the target along with the images, except where it has one entry.
    return output.gather(1, target.reshape(-1, 1).expand(len(output), 1)).sum()


def _create_graph(
    forward_fn: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    target_ind: Any = None,
    additional_forward_args: Any = None,
) -> tuple[Tensor, ...]:
    """Stand in for Captum's ``compute_gradients``, leaving a graph that can be differentiated."""
    score = _score(forward_fn, inputs, target_ind, additional_forward_args)
    return torch.autograd.grad(score, inputs, create_graph=True)


def _positive(tensor: Tensor) -> Tensor:
    """Return the positive part; unlike ReLU's, its derivative stays as it is in a surrogate."""
    return tensor * (tensor > 0)


class _Rule(Protocol):
    """From a module, its input and output, and gradients there: the gradient to pass on."""

    def __call__(
        self, module: Any, z: Tensor, y: Tensor, grad_input: Tensor, grad_output: Tensor
    ) -> Tensor: ...


class _InnerPass:
    """One backward pass in which the modules hooked propagate gradients by a rule of their own.

    Hooks of a forward pass run in every backward pass through it, also in the one that
    differentiates the map, and must do nothing there. What they need is kept here and not in the
    hooks: a hook that holds a tensor computed after its own would never be freed.
    """

    def __init__(self, rule: _Rule) -> None:
        self._rule = rule
        self._calls: list[list[Any]] = []
        self._hooked: set[int] = set()
        self._running = False

    def gradient(
        self,
        forward_fn: Callable[..., Tensor],
        inputs: tuple[Tensor, ...],
        target_ind: Any = None,
        additional_forward_args: Any = None,
    ) -> tuple[Tensor, ...]:
        """Stand in for Captum's ``compute_gradients``; the rule acts here alone."""
        try:
            score = _score(forward_fn, inputs, target_ind, additional_forward_args)
            self._running = True
            return torch.autograd.grad(score, inputs, create_graph=True)
        finally:
            self._running = False
            self._calls.clear()

    def hook(self, module: nn.Module, stack: ExitStack) -> None:
        """Put a module under the rule until the stack unwinds. Every call counts by itself."""
        if id(module) in self._hooked:  # a module with two names
            return
        self._hooked.add(id(module))
        inputs: list[Any] = []

        def before(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
            inputs.append(args[0])
            return args[0].clone()  # the module may work in place

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            z = inputs.pop()
            if output.requires_grad and z.requires_grad:
                number = len(self._calls)
                # Copies: what follows may change the tensors in place.
                self._calls.append([module, z.clone(), output.clone(), None])
                output.register_hook(partial(self._at_output, number))
                z.register_hook(partial(self._at_input, number))

        stack.callback(own_hook(module, "input", before).remove)
        stack.callback(own_hook(module, "output", after).remove)

    def _at_output(self, number: int, gradient: Tensor) -> None:
        if self._running:
            self._calls[number][3] = gradient

    def _at_input(self, number: int, gradient: Tensor) -> Tensor | None:
        if not self._running or self._calls[number][3] is None:
            return None
        module, z, y, grad_output = self._calls[number]
        return self._rule(module, z, y, gradient, grad_output)


def _guided(module: Any, z: Tensor, y: Tensor, grad_input: Tensor, grad_output: Tensor) -> Tensor:
    return _positive(grad_input)


def _is_relu(module: nn.Module) -> bool:
    return isinstance(module, nn.ReLU)


def _deconvolution(
    module: Any, z: Tensor, y: Tensor, grad_input: Tensor, grad_output: Tensor
) -> Tensor:
    return _positive(grad_output)


class _DeepLift(NamedTuple):
    """DeepLift's rules, for batches of images followed by their baselines.

    Captum's own are not differentiable: they detach, and max pooling's is under ``no_grad``. Where
    input and baseline agree, max pooling there takes another image's gradient; here, the image's.
    """

    eps: float

    def __call__(
        self, module: Any, z: Tensor, y: Tensor, grad_input: Tensor, grad_output: Tensor
    ) -> Tensor:
        difference = _differences(z)
        flat = difference.abs() < self.eps
        safe = difference.masked_fill(flat, 1)
        pooling = type(module).__name__.startswith("MaxPool")
        if pooling:
            passed = _through_max_pooling(module, z, y, grad_output) / safe
        else:
            passed = grad_output * _differences(y) / safe
        if not flat.any():
            return passed
        if not pooling:
            grad_input = grad_output * _slope_between(module, z)
        return torch.where(flat, grad_input, passed)


def _differences(tensor: Tensor) -> Tensor:
    """Return images less baselines, for each half of a batch."""
    image, baseline = tensor.chunk(2)
    return (image - baseline).repeat(2, *[1] * (tensor.ndim - 1))


def _slope_between(module: Any, z: Tensor) -> Tensor:
    """Return an activation's slope halfway: the limit of the quotient, as is its derivative."""
    middle = torch.stack(z.chunk(2)).mean(dim=0)
    # Past the module's hooks; on a copy, for modules that work in place.
    value = module.forward(middle.clone()).sum()
    (slope,) = torch.autograd.grad(value, middle, create_graph=True)
    return slope.repeat(2, *[1] * (z.ndim - 1))


def _through_max_pooling(module: Any, z: Tensor, y: Tensor, grad_output: Tensor) -> Tensor:
    """Return what max pooling passes on of its outputs' differences, summed over the two maxima."""
    image, baseline = y.chunk(2)
    highest = torch.maximum(image, baseline)
    differences = torch.cat([highest - baseline, image - highest])
    dimensions = type(module).__name__[-2:]
    pool, unpool = (getattr(F, f"max_{kind}{dimensions}") for kind in ("pool", "unpool"))
    size = module.kernel_size, module.stride, module.padding
    _, places = pool(z, *size, module.dilation, module.ceil_mode, True)
    passed = unpool(grad_output * differences, places, *size, list(z.shape))
    return torch.stack(passed.chunk(2)).sum(dim=0).repeat(2, *[1] * (z.ndim - 1))


def _copied(attribution: Any, forward: Callable[..., Tensor], **attributes: Any) -> Any:
    """Return a shallow copy that calls another forward function, with lists of its own."""
    clone = copy.copy(attribution)
    lists: dict[str, Any] = {key: [] for key in vars(clone) if key.endswith(("hooks", "handles"))}
    vars(clone).update({"forward_func": forward} | lists | attributes)
    return clone


def _at_input(
    attribution: Any, forward: _Forward, x: Tensor, target: Tensor, seed: int, **kwargs: Any
) -> Any:
    clone = _copied(attribution, forward, gradient_func=_create_graph)
    return clone.attribute(x, target=target, **kwargs)


def _at_layer(
    attribution: Any, forward: _Forward, x: Tensor, target: Tensor, seed: int, **kwargs: Any
) -> Any:
    clone = _copied(attribution, forward, layer=_OwnLayer(attribution.layer))
    if hasattr(clone, "ig"):  # LayerIntegratedGradients writes to it
        clone.ig = copy.copy(clone.ig)
    graph = {"create_graph": True}
    if type(attribution).__name__ == "LayerConductance":
        # It takes grad_kwargs, and drops them on the way to autograd.
        clone._attribute = partial(clone._attribute, grad_kwargs=graph)
    return clone.attribute(x, target=target, grad_kwargs=graph, **kwargs)


def _layer_itself(
    attribution: Any,
    forward: _Forward,
    x: Tensor,
    target: Tensor,
    seed: int,
    *,
    additional_forward_args: Any = None,
    attribute_to_layer_input: bool = False,
) -> Any:
    seen: list[Any] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
        value = args[0] if attribute_to_layer_input else output
        # What follows may work in place.
        seen.append(value.clone() if isinstance(value, Tensor) else value)

    side: Side = "input" if attribute_to_layer_input else "output"
    with ExitStack() as stack:
        stack.callback(own_hook(attribution.layer, side, keep).remove)
        forward(x, *(additional_forward_args or ()))
    return seen[-1] if seen else None


# Captum says at each call that it sets hooks.
_SAID: Any = ("ignore", re.compile("Setting (back|for)ward"), UserWarning, None, 0)


@contextmanager
def _unsaid() -> Iterator[None]:
    """Ignore what Captum says; not by `catch_warnings`, which swaps the filters of all threads."""
    filters: Any = warnings.filters
    try:
        filters.insert(0, _SAID)
        yield
    finally:
        with suppress(ValueError):  # somebody has reset them
            filters.remove(_SAID)


def _by_rules(
    attribution: Any, forward: _Forward, x: Tensor, target: Tensor, seed: int, **kwargs: Any
) -> Any:
    model = _AsModule(forward, attribution.model)
    clone = _copied(attribution, model, model=model)
    if hasattr(clone, "eps"):
        inner, concerns = _InnerPass(_DeepLift(clone.eps)), clone._can_register_hook
    else:
        inner = _InnerPass(_deconvolution if clone.use_relu_grad_output else _guided)
        concerns = _is_relu
    with ExitStack() as stack, _unsaid():

        def register(module: nn.Module) -> None:
            if concerns(module):
                inner.hook(module, stack)

        clone.gradient_func, clone._register_hooks = inner.gradient, register
        return clone.attribute(x, target=target, **kwargs)


def _guided_grad_cam(
    attribution: Any,
    forward: _Forward,
    x: Tensor,
    target: Tensor,
    seed: int,
    *,
    additional_forward_args: Any = None,
    interpolate_mode: str = "nearest",
    attribute_to_layer_input: bool = False,
) -> Any:
    more = {"additional_forward_args": additional_forward_args}
    guided = _by_rules(attribution.guided_backprop, forward, x, target, seed, **more)
    cam = _at_layer(
        attribution.grad_cam,
        forward,
        x,
        target,
        seed,
        attribute_to_layer_input=attribute_to_layer_input,
        **more,
    )
    resize = partial(attribution.grad_cam.interpolate, interpolate_mode=interpolate_mode)
    return guided * resize(_positive(cam), tuple(x.shape[2:]))


def _noise(generator: torch.Generator, count: int, x: Tensor, std: float) -> Tensor:
    """Return noisy copies ``(B count, C, H, W)``, by images, all of which get the same noise."""
    spread = torch.full((count, *x.shape[1:]), float(std))
    noise = torch.normal(0.0, spread, generator=generator).to(x)
    return (x[:, None] + noise).flatten(0, 1)


def _noise_tunnel(
    attribution: Any,
    forward: _Forward,
    x: Tensor,
    target: Tensor,
    seed: int,
    *,
    nt_type: str = "smoothgrad",
    nt_samples: int = 5,
    nt_samples_batch_size: int | None = None,
    stdevs: float = 1.0,
    **kwargs: Any,
) -> Any:
    inner, generator = attribution.attribution_method, torch.Generator().manual_seed(seed)
    sums, squares, left = [], [], nt_samples
    while left:
        count = min(left, nt_samples_batch_size or left)
        left -= count
        noisy = _noise(generator, count, x, stdevs)
        given = {
            key: value.repeat_interleave(count, dim=0)
            if isinstance(value, Tensor) and len(value) == len(x) > 1
            else value
            for key, value in kwargs.items()
        }
        each = target.repeat_interleave(count)
        parts = _METHODS[type(inner).__name__](inner, forward, noisy, each, seed, **given)
        parts = parts.reshape(len(x), count, *parts.shape[1:])
        sums.append(parts.sum(dim=1))
        squares.append(parts.square().sum(dim=1))
    mean, square = (torch.stack(part).sum(dim=0) / nt_samples for part in (sums, squares))
    return {"smoothgrad": mean, "smoothgrad_sq": square, "vargrad": square - mean.square()}[nt_type]


def _gradient_shap(
    attribution: Any,
    forward: _Forward,
    x: Tensor,
    target: Tensor,
    seed: int,
    *,
    baselines: Any,
    n_samples: int = 5,
    stdevs: float = 0.0,
    additional_forward_args: Any = None,
) -> Any:
    if callable(baselines):
        baselines = baselines(x) if inspect.signature(baselines).parameters else baselines()
    # Captum draws from NumPy's old global generator, of which this is a private one.
    draws = np.random.RandomState(seed)  # noqa: NPY002
    noisy = _noise(torch.Generator().manual_seed(seed), n_samples, x, stdevs)
    chosen = baselines[draws.choice(len(baselines), n_samples)].to(x)
    baseline = chosen.repeat(len(x), 1, 1, 1)
    share = torch.as_tensor(draws.uniform(0.0, 1.0, n_samples)).to(x).repeat(len(x))
    share = share.view(-1, 1, 1, 1)
    between = share * noisy + (1 - share) * baseline
    each = target.repeat_interleave(n_samples)
    (gradient,) = _create_graph(forward, (between,), each, additional_forward_args)
    if attribution.multiplies_by_inputs:
        gradient = (noisy - baseline) * gradient
    return gradient.reshape(len(x), n_samples, *x.shape[1:]).mean(dim=1)


_Method: TypeAlias = Callable[..., Any]
# How to make a method's map with a graph; those of perturbations are in _PERTURBATIONS.
_METHODS: dict[str, _Method] = {
    "Saliency": _at_input,
    "InputXGradient": _at_input,
    "IntegratedGradients": _at_input,
    "GuidedBackprop": _by_rules,
    "Deconvolution": _by_rules,
    "GuidedGradCam": _guided_grad_cam,
    "DeepLift": _by_rules,
    "DeepLiftShap": _by_rules,
    "GradientShap": _gradient_shap,
    "NoiseTunnel": _noise_tunnel,
    "LayerActivation": _layer_itself,
    "LayerGradCam": _at_layer,
    "LayerGradientXActivation": _at_layer,
    "LayerConductance": _at_layer,
    "LayerIntegratedGradients": _at_layer,
    "InternalInfluence": _at_layer,
}
# Those whose noise or baselines would be drawn a second time inside a NoiseTunnel.
_NOT_IN_A_TUNNEL = {"NoiseTunnel", "GradientShap", "DeepLiftShap"}
# Those whose baselines are any number of images, or a function that returns them.
_DISTRIBUTIONS = {"GradientShap", "DeepLiftShap"}
_RANDOM = {"NoiseTunnel", "GradientShap", "KernelShap", "Lime", "ShapleyValueSampling"}
# Methods with a ReLU network's gradient in their maps, which changes with the image by jumps.
_SMOOTHED = {
    "Saliency",
    "InputXGradient",
    "IntegratedGradients",
    "GradientShap",
    "GuidedBackprop",
    "Deconvolution",
    "GuidedGradCam",
    "LayerGradCam",
    "LayerGradientXActivation",
    "LayerConductance",
    "InternalInfluence",
    "LayerIntegratedGradients",
}


def _lime_settings(attribution: Any) -> dict[str, Any]:
    """Return the settings of a Captum Lime, if its fit has a closed form.

    Raises:
        TypeError: It has none, or the perturbations are the user's own.
    """
    fit, nearness = attribution.interpretable_model, attribution.similarity_func
    kind, settings = type(fit).__name__, dict(getattr(fit, "construct_kwargs", {}))
    ridge = settings.pop("alpha", 1.0) if kind == "SkLearnRidge" else 0.0
    if kind not in ("SkLearnRidge", "SkLearnLinearRegression") or settings:
        raise TypeError(
            "expected a Lime with interpretable_model=SkLearnLinearRegression() or "
            f"SkLearnRidge(alpha=...), whose fit has a closed form, got {kind}, "
            "which is fitted outside PyTorch"
        )
    kernel = "get_exp_kernel_similarity_function" in getattr(nearness, "__qualname__", "")
    if not kernel or attribution.perturb_func.__name__ != "default_perturb_func":
        raise TypeError(
            "expected a Lime with Captum's own perturb_func, and a similarity_func from "
            "get_exp_kernel_similarity_function, got others; their gradient has not been verified"
        )
    found = inspect.getclosurevars(nearness).nonlocals
    return {"ridge": ridge, "width": found["kernel_width"], "distance": found["distance_mode"]}


_Perturbation: TypeAlias = Occlusion | FeatureAblation | ShapleyValueSampling | KernelShap | Lime
# Captum's methods of perturbations, each with ours and what the attribution itself says.
_PERTURBATIONS: dict[str, tuple[type[_Perturbation], Callable[[Any], dict[str, Any]]]] = {
    "Occlusion": (Occlusion, lambda attribution: {}),
    "FeatureAblation": (FeatureAblation, lambda attribution: {"features": None}),
    "ShapleyValues": (
        ShapleyValueSampling,
        lambda attribution: {"features": None, "samples": None},
    ),
    "ShapleyValueSampling": (
        ShapleyValueSampling,
        lambda attribution: {"features": None, "samples": 25},
    ),
    "KernelShap": (
        KernelShap,
        lambda attribution: {
            "features": None,
            "samples": 25,
            "endpoint": attribution.inf_weight,
        },
    ),
    "Lime": (
        Lime,
        lambda attribution: {"features": None, "samples": 25} | _lime_settings(attribution),
    ),
}
# Captum's names of arguments, and ours.
_RENAMED = {
    "baselines": "baseline",
    "feature_mask": "features",
    "n_samples": "samples",
    "sliding_window_shapes": "window",
    "strides": "stride",
    "perturbations_per_eval": "perturbations_per_eval",
}
_KNOWN = sorted(_METHODS | _PERTURBATIONS)


def _perturbation(attribution: Any, kwargs: dict[str, Any], seed: int) -> _Perturbation:
    """Return the interpreter that does what a perturbation method does."""
    unknown = sorted(set(kwargs) - set(_RENAMED))
    if unknown:
        raise ValueError(
            f"expected arguments from {sorted(_RENAMED)}, got {', '.join(unknown)}; perturbed "
            "images go through the model alone, and maps have the image's shape"
        )
    name = type(attribution).__name__
    kind, settings = _PERTURBATIONS[name]
    given = settings(attribution) | {_RENAMED[k]: v for k, v in kwargs.items() if v is not None}
    if name == "Occlusion":
        stride = given.get("stride", 1)
        given["stride"] = stride if isinstance(stride, tuple) else (stride,) * 3
    if name in _RANDOM:
        given["seed"] = seed
    return kind(None, **given)


def _expect_supported(attribution: Any) -> None:
    name = type(attribution).__name__
    if not any(base.__module__.startswith("captum.attr") for base in type(attribution).__mro__):
        raise TypeError(
            f"expected an attribution method of captum.attr, got {name}; for one of your own, "
            "subclass captum_adv2.interpreters.Interpreter"
        )
    own = type(attribution).__module__.startswith("captum.attr")
    if own and name in _KNOWN:
        return
    reason = _REASONS.get(name, _UNVERIFIED)
    if not own:
        reason = f"{_UNVERIFIED}; subclass captum_adv2.interpreters.Interpreter"
    known = ", ".join(_KNOWN)
    raise TypeError(f"expected a differentiable Captum method ({known}), got {name}: {reason}")


def _expect_baselines(value: Any, distribution: bool) -> None:
    """Check baselines as far as can be done without images."""
    if isinstance(value, tuple) and len(value) == 1:  # as Captum has them, one an input
        (value,) = value
    if not distribution:
        expect_baseline(value)
    elif not callable(value):
        expect_floats(value, "baselines", 4)
        expect_baseline(value)


def _expect_fitting(baselines: Any, x: Tensor, distribution: bool) -> None:
    """Check that baselines, where they are images, go with the images."""
    if isinstance(baselines, tuple) and len(baselines) == 1:
        (baselines,) = baselines
    if not isinstance(baselines, Tensor):
        return
    count, *shape = (0, *baselines.shape)[baselines.ndim > 0 :]
    if shape != [*x.shape[1:]] or not (distribution or count in (1, len(x))):
        raise ValueError(
            f"expected baselines for images of shape {tuple(x.shape)}, got shape "
            f"{tuple(baselines.shape)}"
        )


def _expect_one_of(value: Any, name: str, known: tuple[str, ...]) -> None:
    if not (isinstance(value, str) and value in known):
        raise ValueError(f"expected {name} to be one of {known}, got {value!r}")


# What Captum would assert, or PyTorch stumble over, in the middle of a pass.
_CHECKS: dict[str, Callable[[Any, str], object]] = {
    "abs": expect_flag,
    "attribute_to_layer_input": expect_flag,
    "attr_dim_summation": expect_flag,
    "custom_attribution_func": expect_function,
    "interpolate_mode": partial(
        _expect_one_of, known=("nearest", "nearest-exact", "area", "bilinear", "bicubic")
    ),
    "method": partial(
        _expect_one_of,
        known=(
            *(f"riemann_{place}" for place in ("left", "right", "middle", "trapezoid")),
            "gausslegendre",
        ),
    ),
    "n_samples": partial(expect_integer, low=1),
    "n_steps": partial(expect_integer, low=1),
    "nt_samples": partial(expect_integer, low=1),
    "nt_samples_batch_size": partial(expect_integer, low=1),
    "nt_type": partial(_expect_one_of, known=("smoothgrad", "smoothgrad_sq", "vargrad")),
    "relu_attributions": expect_flag,
    "stdevs": partial(expect_number, low=0.0),
}


def _expect_arguments(attribution: Any, kwargs: dict[str, Any]) -> None:
    """Check keyword arguments of ``attribute`` as far as can be done without images."""
    name, signature = type(attribution).__name__, inspect.signature(attribution.attribute)
    targeted = {"target": None} if "target" in signature.parameters else {}
    try:
        bound = signature.bind(None, **targeted, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"expected the arguments of Captum's {name}.attribute, got {kwargs}: {error}"
        ) from None
    if name == "NoiseTunnel":
        inner = attribution.attribution_method
        _expect_supported(inner)
        if type(inner).__name__ in _NOT_IN_A_TUNNEL | _PERTURBATIONS.keys():
            raise TypeError(
                "expected a NoiseTunnel around a method of gradients that draws no numbers "
                f"itself, got one around {type(inner).__name__}"
            )
        _expect_arguments(inner, bound.arguments.get("kwargs", {}))
    if isinstance(getattr(attribution, "layer", None), list):
        raise ValueError(f"expected {name} of one layer, got a list; build one for each")
    for key, default, why in (
        ("internal_batch_size", None, "Captum cuts the graph between its chunks"),
        ("return_convergence_delta", False, "a map is all that is returned"),
        ("draw_baseline_from_distrib", False, "baselines are drawn by GradientShap"),
        ("grad_kwargs", None, "they are what makes the map differentiable"),
    ):
        value = kwargs.get(key, default)
        if value is not default:
            raise ValueError(f"expected {key}={default}, got {value}; {why}")
    if name in _PERTURBATIONS:
        return  # ours check what they are given
    own = {key: kwargs[key] for key in kwargs if key in signature.parameters}
    for key, value in own.items():
        if value is None and signature.parameters[key].default is None:
            continue
        if key == "baselines":
            _expect_baselines(value, name in _DISTRIBUTIONS)
        elif key in _CHECKS:
            _CHECKS[key](value, key)


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

    Methods that draw numbers draw them anew from ``seed`` (0 unless given) at each call, those that
    Captum draws for a single image with its generators so seeded, and the same for all images of a
    batch: a batch gives the maps of its images.

    Convention:
        Reduced over channels, min-max scaled per image, at the attribution's own resolution.

    Args:
        attribution: Instance of a Captum method, built on the model (or on a function of it: then
            the attack takes the logits from its own model, in a forward pass of its own).
        reduce: How channels become one: ``"abs-max"``, ``"abs-sum"``, ``"max"``, ``"sum"``, or a
            function ``(B, C, h, w) -> (B, 1, h, w)``.
        smoothing: Derivative of ReLU in the surrogate of methods that take gradients of the model;
            see `Gradient`. DeepLift's rules are smooth without it.
        **attribute_kwargs: Passed to ``attribution.attribute`` at each call; and ``seed``.

    Raises:
        TypeError: Not a Captum method, or one that cannot be differentiated (the reason is given),
            or arguments that its ``attribute`` does not have.
        ValueError: Unknown ``reduce``, or an argument out of range, such as
            ``internal_batch_size``; or (at a call) attributions that are no feature maps.

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
        _expect_supported(attribution)
        name, kwargs = type(attribution).__name__, dict(attribute_kwargs)
        seed = kwargs.pop("seed", 0) if name in _RANDOM else 0
        _expect_arguments(attribution, kwargs)
        forward = attribution.forward_func
        super().__init__(forward if isinstance(forward, nn.Module) else None)
        self.attribution = attribution
        self.smoothing = as_derivative(smoothing)
        self._seed = expect_integer(seed, "seed", low=0)
        self._reduce = expect_reduction(reduce)
        self._kwargs = kwargs
        self._perturbation = (
            _perturbation(attribution, kwargs, self._seed) if name in _PERTURBATIONS else None
        )

    def __repr__(self) -> str:
        return f"CaptumInterpreter({self._name})"

    def explain(self, images: Tensor, target: Tensor) -> Explanation:
        """See `Interpreter.explain`; logits are shared where Captum runs the model on images."""
        with differentiable_input(images) as (x, create_graph):
            if self._perturbation is None:
                attributions, logits = self._by_captum(x, target)
            else:
                # No gradient is taken inside: without a caller's there is no need of a graph.
                with torch.set_grad_enabled(create_graph):
                    forward = partial(self._forward, target)
                    attributions, logits = self._perturbation.attribute(forward, x, target)
            if not isinstance(attributions, Tensor) or attributions.ndim != 4:
                got = getattr(attributions, "shape", type(attributions).__name__)
                raise ValueError(
                    f"expected {self._name} to give attributions (B, C, h, w), got {got}; "
                    "choose one layer with feature maps"
                )
            maps = min_max(reduced(attributions, self._reduce))
            explanation = Explanation(maps, None if self.model is None else logits)
        return explanation if create_graph else detached(explanation)

    def surrogate(self, images: Tensor, target: Tensor) -> Surrogate:
        """Return the same map; where gradients are in it, with ReLU's smoothed."""
        inner = getattr(self.attribution, "attribution_method", self.attribution)
        smooth = type(inner).__name__ in _SMOOTHED
        explain = self._explain_smooth if smooth else self.explain
        return Direct(explain, expect_pair(images, target))

    @property
    def _name(self) -> str:
        return type(self.attribution).__name__

    def _by_captum(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        forward = _Forward(partial(self._forward, target), x)
        inner = getattr(self.attribution, "attribution_method", self.attribution)
        distribution = type(inner).__name__ in _DISTRIBUTIONS
        _expect_fitting(self._kwargs.get("baselines"), x, distribution)
        method = _METHODS[self._name]
        attributions = method(self.attribution, forward, x, target, self._seed, **self._kwargs)
        return attributions, forward.logits

    def _forward(self, target: Tensor, images: Tensor, *args: Any) -> Tensor:
        inputs = images if self._preprocess is None else self._preprocess(images)
        output = expect_logits(self.attribution.forward_func(inputs, *args), len(images))
        return expect_classes(output, target)

    def _explain_smooth(self, images: Tensor, target: Tensor) -> Explanation:
        with smooth_relu(self.smoothing):
            return self.explain(images, target)

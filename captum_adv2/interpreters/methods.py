# SPDX-License-Identifier: MIT
"""How each of Captum's methods is run, so that its map has its true gradient.

A method is made differentiable on a shallow copy of the attribution, which stays as it was:

- *gradients at the input*: by the attribute ``gradient_func``, a public seam;
- *gradients at a layer*: by ``grad_kwargs``, another one; and by a forward pass that has a graph
  also where Captum turns gradients off around it;
- *a backward pass with rules of its own* (guided backpropagation, DeepLift): see `rules`;
- *random draws under* ``no_grad``: the same numbers, drawn here from a seed;
- *perturbations under* ``no_grad``: see `perturbation`.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from captum_adv2.interpreters import base, perturbation, rules
from captum_adv2.interpreters.first_order import FirstOrder, Gradients
from captum_adv2.interpreters.perturbation import Distance, Game
from captum_adv2.interpreters.relu import Slope
from captum_adv2.interpreters.tap import eagerly, tapped, warn_of_runs
from captum_adv2.spec import Count, NonNegative, checked


@dataclass
class Call:
    """One explanation to make."""

    function: Callable[..., Tensor]  # the model: images to logits
    images: Tensor  # (B, C, H, W)
    target: Tensor  # classes (B,)
    seed: int
    gradient: Gradients
    batch: int  # number of images; there may be noisy copies of them
    check: bool = False  # whether to warn where a rule misses what it is for
    passes: int = 0  # of the model
    logits: Tensor | None = None  # (B, classes), once the model has run on these very images

    def forward(self, inputs: Tensor, *args: Any) -> Tensor:
        """Run the model, with a graph also where Captum forbids it: activations become the map."""
        self.passes += 1
        with torch.enable_grad():
            output = self.function(inputs, *args)
        if inputs is self.images and self.logits is None:
            self.logits = output
        return output

    def gradients(
        self,
        forward_fn: Callable[..., Tensor],
        inputs: tuple[Tensor, ...],
        target_ind: Tensor | None = None,
        additional_forward_args: Any = None,
    ) -> tuple[Tensor, ...]:
        """Stand in for Captum's ``compute_gradients``, which leaves no graph."""
        if target_ind is None:  # DeepLift's function has its inputs and its target already
            return torch.autograd.grad(forward_fn().sum(), inputs, create_graph=self.graph)
        (points,), further = inputs, additional_forward_args or ()
        # Captum repeats the target along with the images, except where it has one entry.
        target = target_ind.reshape(-1).expand(len(points))
        size = len(points) if further else self.batch  # they cannot be split
        gradient, logits = self.gradient(
            lambda points: forward_fn(points, *further), _picked, points, target, size
        )
        if points is self.images:
            self.logits = logits
        return (gradient,)

    @property
    def graph(self) -> bool:
        """Whether the attributions will be differentiated."""
        return self.gradient.graph


def _picked(logits: Tensor, target: Tensor) -> Tensor:
    return logits.gather(1, target[:, None])[:, 0]


@dataclass(frozen=True)
class Method:
    """How a method of Captum is run, and what is particular about it."""

    # From the attribution, a call and keyword arguments to attributions (B, C, h, w).
    run: Callable[..., Any]
    # What an attacker should differentiate, given the derivative of ReLU.
    surrogate: Callable[[Slope], base.Surrogate] = lambda slope: base.Exact()
    # It draws numbers, so a NoiseTunnel cannot go around it.
    random: bool = False
    # From the attribution to its game, where it perturbs features.
    game: Callable[[Any], Game] | None = None


def _copied(attribution: Any, call: Call, **attributes: Any) -> Any:
    """Return a shallow copy that runs a call's model, with other attributes."""
    clone = copy.copy(attribution)
    vars(clone).update({"forward_func": call.forward} | attributes)
    return clone


def _at_input(attribution: Any, call: Call, **kwargs: Any) -> Any:
    clone = _copied(attribution, call, gradient_func=call.gradients)
    return clone.attribute(call.images, target=call.target, **kwargs)


def _at_layer(attribution: Any, call: Call, **kwargs: Any) -> Any:
    clone = _copied(attribution, call)
    if hasattr(clone, "ig"):  # LayerIntegratedGradients writes to it
        clone.ig = copy.copy(clone.ig)
    grad_kwargs = {"create_graph": call.graph}
    if type(attribution).__name__ == "LayerConductance":
        # It takes grad_kwargs, and drops them on the way to autograd.
        clone._attribute = partial(clone._attribute, grad_kwargs=grad_kwargs)
    layers = attribution.layer if isinstance(attribution.layer, list) else [attribution.layer]
    try:
        with eagerly(), ExitStack() as stack:
            taps = [stack.enter_context(tapped(layer, "output")) for layer in layers]
            found = clone.attribute(
                call.images, target=call.target, grad_kwargs=grad_kwargs, **kwargs
            )
    except AssertionError as error:
        hint = "pass a layer that is called, of the model as it was before torch.jit"
        got = f"expected the layer to run in the forward pass, got none that did ({error})"
        raise ValueError(f"{got}; {hint}") from error
    if call.check:
        runs = max(tap.runs for tap in taps)
        warn_of_runs(f"the layer of {type(attribution).__name__}", runs // max(1, call.passes))
    return found


def _layer_itself(attribution: Any, call: Call, **kwargs: Any) -> Any:
    side: Literal["input", "output"]
    side = "input" if kwargs.get("attribute_to_layer_input") else "output"
    with torch.set_grad_enabled(call.graph), tapped(attribution.layer, side) as tap:
        call.logits = call.function(call.images, *kwargs.get("additional_forward_args", ()))
    return tap.features


def _by_rule(
    rule_of: Callable[[Any], rules.Rule], attribution: Any, call: Call, **kwargs: Any
) -> Any:
    outputs: list[Tensor] = []

    def forward(*args: Any) -> Tensor:
        outputs.append(call.forward(*args))
        return outputs[-1]

    # Captum hooks this module, which has none inside, and warns at each call that it does.
    model: Any = nn.Module()
    model.forward = forward
    hooked = {"forward_func": model, "model": model, "gradient_func": call.gradients}
    rule, clone = rule_of(attribution), _copied(attribution, call, **hooked)
    with rules.inner_pass(attribution.model, rule) as visits:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"\s*Setting (back|for)ward", UserWarning)
            attributions = clone.attribute(call.images, target=call.target, **kwargs)
        met = len(visits)
    if call.check:
        name, call.check = type(attribution).__name__, False
        missed = rules.warn_of_missed(name, rule, met, outputs)
        if rule.complete and attribution.multiplies_by_inputs and not missed:
            rules.warn_of_rest(name, attributions, outputs[0], call.target)
    return attributions


_guided_backprop = partial(_by_rule, lambda _: rules.GUIDED)
_deconvolution = partial(_by_rule, lambda _: rules.DECONVOLUTION)
_deep_lift = partial(_by_rule, lambda attribution: rules.deep_lift(attribution.eps))


def _guided_grad_cam(attribution: Any, call: Call, **kwargs: Any) -> Any:
    mode = kwargs.pop("interpolate_mode", "nearest")
    side = {"attribute_to_layer_input": kwargs.pop("attribute_to_layer_input", False)}
    guided = _guided_backprop(attribution.guided_backprop, call, **kwargs)
    cam = rules.positive(_at_layer(attribution.grad_cam, call, **side, **kwargs))
    return guided * attribution.grad_cam.interpolate(cam, tuple(call.images.shape[2:]), mode)


def _noisy(call: Call, count: int, std: float, generator: torch.Generator) -> Call:
    """Return a call for noisy copies ``(B count, C, H, W)``; all images get the same noise."""
    spread = torch.full((count, *call.images.shape[1:]), float(std))
    noise = torch.normal(0.0, spread, generator=generator).to(call.images)
    images = (call.images[:, None] + noise).flatten(0, 1)
    return replace(call, images=images, target=call.target.repeat_interleave(count))


@checked
def _noise_tunnel(
    attribution: Any,
    call: Call,
    *,
    nt_type: Literal["smoothgrad", "smoothgrad_sq", "vargrad"] = "smoothgrad",
    nt_samples: Count = 5,
    nt_samples_batch_size: Count | None = None,
    stdevs: NonNegative = 1.0,
    **kwargs: Any,
) -> Any:
    inner, batch = attribution.attribution_method, len(call.images)
    generator = torch.Generator().manual_seed(call.seed)
    parts = []
    for part in torch.split(torch.arange(nt_samples), nt_samples_batch_size or nt_samples):
        count = len(part)
        repeated = {  # those that are one an image, with it
            key: value.repeat_interleave(count, dim=0)
            if isinstance(value, Tensor) and len(value) == batch > 1
            else value
            for key, value in kwargs.items()
        }
        noisy = _noisy(call, count, stdevs, generator)
        found = METHODS[type(inner).__name__].run(inner, noisy, **repeated)
        parts.append(found.reshape(batch, count, *found.shape[1:]))
        call.check = False  # once is enough
    samples = torch.cat(parts, dim=1)
    mean, square = samples.mean(dim=1), samples.square().mean(dim=1)
    return {"smoothgrad": mean, "smoothgrad_sq": square, "vargrad": square - mean.square()}[nt_type]


@checked
def _gradient_shap(
    attribution: Any,
    call: Call,
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
    draws = np.random.RandomState(call.seed % 2**32)  # noqa: NPY002
    noisy = _noisy(call, n_samples, stdevs, torch.Generator().manual_seed(call.seed))
    baseline = baselines[draws.choice(len(baselines), n_samples)].to(x).repeat(len(x), 1, 1, 1)
    share = torch.as_tensor(draws.uniform(0.0, 1.0, n_samples)).to(x).repeat(len(x))
    share = share.view(-1, 1, 1, 1)
    between = share * noisy.images + (1 - share) * baseline
    (gradient,) = call.gradients(call.forward, (between,), noisy.target, additional_forward_args)
    if attribution.multiplies_by_inputs:
        gradient = (noisy.images - baseline) * gradient
    return gradient.reshape(len(x), n_samples, *x.shape[1:]).mean(dim=1)


def _perturbed(attribution: Any, call: Call, **kwargs: Any) -> Tensor:
    method: Callable[..., tuple[Tensor, Tensor]] = perturbation.occlusion
    game = METHODS[type(attribution).__name__].game
    if game is not None:
        method = partial(perturbation.attribute, game(attribution), seed=call.seed)
    with torch.set_grad_enabled(call.graph):
        attributions, call.logits = method(call.function, call.images, call.target, **kwargs)
    return attributions


def _lime(attribution: Any) -> Game:
    """Return a Captum Lime's method, if its fit has a closed form."""
    fit = attribution.interpretable_model
    kind, settings = type(fit).__name__, dict(getattr(fit, "construct_kwargs", {}))
    penalties = {"SkLearnLinearRegression": 0.0, "SkLearnRidge": settings.pop("alpha", 1.0)}
    if kind not in penalties or settings:
        raise TypeError(
            "expected a Lime with a fit in closed form, SkLearnLinearRegression() or "
            f"SkLearnRidge(alpha=...), got {kind}, which is fitted outside PyTorch"
        )
    if getattr(attribution.perturb_func, "__name__", None) != "default_perturb_func":
        raise TypeError("expected a Lime with Captum's own perturb_func, got another")
    return perturbation.lime(*_kernel(attribution.similarity_func), penalties[kind])


def _kernel(similarity: Callable[..., float]) -> tuple[float, Distance]:
    """Return rate r and distance d of an exponential kernel :math:`e^{-r d^2}`, from its values."""
    right, up, far = (torch.tensor([[[xy]]]) for xy in ([1.0, 0.0], [0.0, 1.0], [2.0, 0.0]))
    cosine = similarity(right, far, None) == 1
    value = similarity(right, up if cosine else far, None)  # at a distance of 1
    expected = value if cosine else value**5
    if not (value > 0 and math.isclose(similarity(up, far, None), expected, rel_tol=1e-6)):
        raise TypeError(
            "expected a similarity_func from get_exp_kernel_similarity_function, got another"
        )
    return -math.log(value), "cosine" if cosine else "euclidean"


METHODS: dict[str, Method] = {
    "Saliency": Method(_at_input, surrogate=FirstOrder),
    "InputXGradient": Method(_at_input, surrogate=FirstOrder),
    "IntegratedGradients": Method(_at_input, surrogate=FirstOrder),
    "GradientShap": Method(_gradient_shap, surrogate=FirstOrder, random=True),
    "DeepLift": Method(_deep_lift),
    "DeepLiftShap": Method(_deep_lift),
    "GuidedBackprop": Method(_guided_backprop, surrogate=base.Smoothed),
    "Deconvolution": Method(_deconvolution, surrogate=base.Smoothed),
    "GuidedGradCam": Method(_guided_grad_cam, surrogate=base.Smoothed),
    "NoiseTunnel": Method(_noise_tunnel, random=True),
    "LayerActivation": Method(_layer_itself),
    "LayerGradCam": Method(_at_layer, surrogate=base.Smoothed),
    "LayerGradientXActivation": Method(_at_layer, surrogate=base.Smoothed),
    "LayerConductance": Method(_at_layer, surrogate=base.Smoothed),
    "LayerIntegratedGradients": Method(_at_layer, surrogate=base.Smoothed),
    "InternalInfluence": Method(_at_layer, surrogate=base.Smoothed),
    "Occlusion": Method(_perturbed),
    "FeatureAblation": Method(_perturbed, game=lambda _: perturbation.ABLATION),
    "ShapleyValues": Method(_perturbed, game=lambda _: perturbation.SHAPLEY),
    "ShapleyValueSampling": Method(_perturbed, random=True, game=lambda _: perturbation.SAMPLING),
    "KernelShap": Method(
        _perturbed, random=True, game=lambda shap: perturbation.kernel_shap(shap.inf_weight)
    ),
    "Lime": Method(_perturbed, random=True, game=_lime),
}

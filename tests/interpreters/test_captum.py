# SPDX-License-Identifier: MIT
"""The Captum adapter: Captum's own maps, made differentiable; what cannot be is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import captum.attr as ca
import numpy as np
import pytest
import torch
from conftest import TinyNet
from torch import Tensor, nn

from captum_adv2.interpreters import CaptumInterpreter

# Name to (how to build it on a model, keyword arguments of attribute).
SUPPORTED: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "Saliency": (ca.Saliency, {}),
    "Saliency, signed": (ca.Saliency, {"abs": False}),
    "InputXGradient": (ca.InputXGradient, {}),
    "IntegratedGradients": (ca.IntegratedGradients, {"n_steps": 5}),
    "IntegratedGradients, grey": (ca.IntegratedGradients, {"n_steps": 4, "baselines": 0.5}),
    "IntegratedGradients, trapezoid": (
        ca.IntegratedGradients,
        {"n_steps": 4, "method": "riemann_trapezoid"},
    ),
    "IntegratedGradients, local": (
        lambda m: ca.IntegratedGradients(m, multiply_by_inputs=False),
        {"n_steps": 4},
    ),
    "LayerGradCam": (lambda m: ca.LayerGradCam(m, m.body), {}),
    "LayerGradCam, ReLU": (lambda m: ca.LayerGradCam(m, m.body), {"relu_attributions": True}),
    "LayerGradCam, channels": (
        lambda m: ca.LayerGradCam(m, m.body),
        {"attr_dim_summation": False},
    ),
    "LayerGradientXActivation": (lambda m: ca.LayerGradientXActivation(m, m.stem), {}),
    "InternalInfluence": (lambda m: ca.InternalInfluence(m, m.stem), {"n_steps": 4}),
}
supported = pytest.mark.parametrize(("build", "kwargs"), SUPPORTED.values(), ids=SUPPORTED)

REDUCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "abs-max": lambda a: np.abs(a).max(axis=1, keepdims=True),
    "abs-sum": lambda a: np.abs(a).sum(axis=1, keepdims=True),
    "max": lambda a: a.max(axis=1, keepdims=True),
    "sum": lambda a: a.sum(axis=1, keepdims=True),
}


def scaled(maps: np.ndarray) -> np.ndarray:
    low = maps.min(axis=(1, 2, 3), keepdims=True)
    return (maps - low) / (maps.max(axis=(1, 2, 3), keepdims=True) - low)


def by_captum(attribution: Any, images: Tensor, labels: Tensor, **kwargs: Any) -> np.ndarray:
    x = images.clone().requires_grad_()  # Captum warns where it has to set this itself
    return attribution.attribute(x, target=labels, **kwargs).detach().double().numpy()


@supported
class TestSupported:
    def test_equals_captum(
        self, build: Callable[[Any], Any], kwargs: dict[str, Any], model: nn.Module, data: Any
    ) -> None:
        attribution = build(model)
        expected = scaled(REDUCTIONS["abs-max"](by_captum(attribution, *data, **kwargs)))
        maps = CaptumInterpreter(attribution, **kwargs)(*data)
        np.testing.assert_allclose(maps.numpy(), expected, atol=1e-5)
        with_graph = CaptumInterpreter(attribution, **kwargs)(
            data[0].clone().requires_grad_(), data[1]
        )
        assert torch.equal(with_graph, maps)

    def test_the_attribution_is_unchanged(
        self, build: Callable[[Any], Any], kwargs: dict[str, Any], model: nn.Module, data: Any
    ) -> None:
        images, labels = data
        attribution = build(model)
        first = by_captum(attribution, images, labels, **kwargs)
        before = {key: (id(value), repr(value)) for key, value in vars(attribution).items()}
        interpreter = CaptumInterpreter(attribution, **kwargs)
        x = images.clone().requires_grad_()
        interpreter(images, labels)
        torch.autograd.grad(interpreter.surrogate(x, labels)(x).maps.sum(), x)
        with pytest.raises(RuntimeError):
            interpreter(images[..., :1, :1], labels)
        assert before == {key: (id(value), repr(value)) for key, value in vars(attribution).items()}
        assert attribution.forward_func is model
        assert np.array_equal(by_captum(attribution, images, labels, **kwargs), first)

    def test_a_function_in_place_of_a_model(
        self, build: Callable[[Any], Any], kwargs: dict[str, Any], model: nn.Module, data: Any
    ) -> None:
        images, labels = data
        expected = CaptumInterpreter(build(model), **kwargs)(images, labels)
        attribution = build(model)
        attribution.forward_func = lambda x: model(x)
        interpreter = CaptumInterpreter(attribution, **kwargs)
        assert interpreter.model is None
        x = images.clone().requires_grad_()
        for explanation in (
            interpreter.explain(images, labels),
            interpreter.surrogate(x, labels)(x),
        ):
            assert explanation.logits is None
        torch.testing.assert_close(interpreter(images, labels), expected)


def test_a_function_from_the_start(model: nn.Module, data: Any) -> None:
    images, labels = data
    interpreter = CaptumInterpreter(ca.Saliency(lambda x: model(x).log_softmax(dim=1)))
    assert interpreter.model is None
    assert repr(interpreter) == "CaptumInterpreter(Saliency)"
    maps, logits, _penalty = interpreter.explain(images, labels)
    assert logits is None
    x = images.clone().requires_grad_()
    score = model(x).log_softmax(dim=1).gather(1, labels[:, None]).sum()
    (gradient,) = torch.autograd.grad(score, x)
    np.testing.assert_allclose(
        maps.numpy(), scaled(REDUCTIONS["abs-max"](gradient.numpy())), atol=1e-5
    )


class TestReduce:
    @pytest.mark.parametrize("name", REDUCTIONS)
    def test_by_name(self, model: nn.Module, data: Any, name: str) -> None:
        attribution = ca.InputXGradient(model)
        expected = scaled(REDUCTIONS[name](by_captum(attribution, *data)))
        maps = CaptumInterpreter(attribution, reduce=name)(*data)
        np.testing.assert_allclose(maps.numpy(), expected, atol=1e-5)
        assert torch.equal(CaptumInterpreter(attribution, name)(*data), maps)

    def test_by_function(self, model: nn.Module, data: Any) -> None:
        attribution = ca.InputXGradient(model)
        expected = scaled(by_captum(attribution, *data)[:, 1:2] ** 2)
        maps = CaptumInterpreter(attribution, lambda a: a[:, 1:2].square())(*data)
        np.testing.assert_allclose(maps.numpy(), expected, atol=1e-5)

    @pytest.mark.parametrize("reduce", ["mean", None, ""])
    def test_unknown(self, model: nn.Module, reduce: Any) -> None:
        with pytest.raises(ValueError, match=r"reduce to be one of \['abs-max', .* or a function"):
            CaptumInterpreter(ca.Saliency(model), reduce=reduce)


class TestDerivative:
    @pytest.mark.parametrize("build", [ca.Saliency, ca.InputXGradient, ca.IntegratedGradients])
    def test_the_graph_is_not_captums(self, smooth: nn.Module, build: Callable[[Any], Any]) -> None:
        """Captum's own map, where it has a graph, has the wrong gradient; ours the right one."""
        attribution, target = build(smooth), torch.tensor([1])
        generator = torch.Generator().manual_seed(2)
        x = torch.rand(1, 3, 6, 6, generator=generator, dtype=torch.float64).requires_grad_()
        kwargs = {"n_steps": 3} if build is ca.IntegratedGradients else {}
        interpreter = CaptumInterpreter(attribution, **kwargs)
        step = torch.randn(x.shape, generator=generator, dtype=torch.float64) * 1e-6
        weights = torch.rand(1, 1, 6, 6, generator=generator, dtype=torch.float64)

        def score(x: Tensor) -> Tensor:
            return (interpreter.explain(x, target).maps * weights).sum()

        (gradient,) = torch.autograd.grad(score(x), x)
        with torch.no_grad():
            change = score(x + step) - score(x - step)
        assert change.item() == pytest.approx(2 * (gradient * step).sum().item(), rel=1e-3)

    @pytest.mark.parametrize("tau", [1e-4, 0.1])
    def test_saliency_of_a_logit_moves_only_when_smoothed(
        self, model: nn.Module, data: Any, tau: float
    ) -> None:
        images, labels = data
        x = images.clone().requires_grad_()
        interpreter = CaptumInterpreter(ca.Saliency(model), smoothing=tau)

        def gradient(maps: Tensor) -> Tensor:
            return torch.autograd.grad(
                maps.square().sum(), x, allow_unused=True, materialize_grads=True
            )[0]

        # On ReLUs the gradient of a logit is piecewise constant.
        assert not gradient(interpreter.explain(x, labels).maps).any()
        assert gradient(interpreter.surrogate(x, labels)(x).maps).any()
        plain = CaptumInterpreter(ca.Saliency(model), smoothing=None)
        assert not gradient(plain.surrogate(x, labels)(x).maps).any()

    def test_layer_methods_are_their_own_surrogate(self, model: nn.Module, data: Any) -> None:
        images, labels = data
        interpreter = CaptumInterpreter(ca.LayerGradCam(model, model.body))
        surrogate = interpreter.surrogate(images, labels)
        assert torch.equal(surrogate(images).maps, interpreter(images, labels))

    def test_bad_smoothing(self, model: nn.Module) -> None:
        with pytest.raises(ValueError, match="expected smoothing above 0, got -1"):
            CaptumInterpreter(ca.Saliency(model), smoothing=-1)


class TestLogits:
    @pytest.mark.parametrize("build", [ca.Saliency, ca.InputXGradient])
    def test_shared_forward_pass(
        self, model: nn.Module, data: Any, build: Callable[[Any], Any]
    ) -> None:
        images, labels = data
        calls: list[int] = []
        clone = copy.deepcopy(model)
        clone.fc.register_forward_hook(lambda *_: calls.append(1))
        logits = CaptumInterpreter(build(clone)).explain(images, labels).logits
        assert torch.equal(logits, model(images))
        assert calls == [1]

    def test_not_those_of_other_images(self, model: nn.Module, data: Any) -> None:
        # Captum runs the path's images, not these: their logits would be somebody else's.
        interpreter = CaptumInterpreter(ca.IntegratedGradients(model), n_steps=3)
        assert interpreter.explain(*data).logits is None


class OwnSaliency(ca.Saliency):
    """A subclass may compute anything."""


class Saliency:
    """Has the name of a Captum method, and is none."""

    def __init__(self, model: nn.Module) -> None:
        self.forward_func = model


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "NoiseTunnel": (lambda m: ca.NoiseTunnel(ca.Saliency(m)), r"no_grad\(\); use SmoothGrad"),
    "GradientShap": (ca.GradientShap, r"torch\.no_grad\(\)"),
    "GuidedBackprop": (ca.GuidedBackprop, "hooks change the backward pass"),
    "Deconvolution": (ca.Deconvolution, "hooks change the backward pass"),
    "GuidedGradCam": (lambda m: ca.GuidedGradCam(m, m.body), "hooks change the backward pass"),
    "DeepLift": (ca.DeepLift, "hooks change the backward pass"),
    "DeepLiftShap": (ca.DeepLiftShap, "hooks change the backward pass"),
    "LRP": (ca.LRP, r"works on \.data, .* InputXGradient"),
    "LayerActivation": (lambda m: ca.LayerActivation(m, m.body), "use CAM or GradCAM"),
    "LayerConductance": (lambda m: ca.LayerConductance(m, m.body), "drops grad_kwargs"),
    "LayerIntegratedGradients": (
        lambda m: ca.LayerIntegratedGradients(m, m.body),
        "evaluates the layer without a graph",
    ),
    "LayerGradientShap": (lambda m: ca.LayerGradientShap(m, m.body), r"torch\.no_grad\(\)"),
    "Occlusion": (ca.Occlusion, r"torch\.no_grad\(\)"),
    "FeatureAblation": (ca.FeatureAblation, r"torch\.no_grad\(\)"),
    "ShapleyValueSampling": (ca.ShapleyValueSampling, r"torch\.no_grad\(\)"),
    "LayerDeepLift": (lambda m: ca.LayerDeepLift(m, m.body), "gradient has not been verified"),
    "NeuronGradient": (lambda m: ca.NeuronGradient(m, m.body), "gradient has not been verified"),
    "OwnSaliency": (OwnSaliency, r"not been verified; subclass captum_adv2\.interpreters\.Interp"),
}


class TestRefused:
    @pytest.mark.parametrize(("build", "reason"), REFUSED.values(), ids=REFUSED)
    def test_with_the_reason(
        self,
        build: Callable[[Any], Any],
        reason: str,
        request: pytest.FixtureRequest,
        model: nn.Module,
    ) -> None:
        name = request.node.callspec.id
        attribution = build(model)
        keys = set(vars(attribution))
        with pytest.raises(
            TypeError, match=rf"differentiable Captum method \(.*Saliency\), got {name}: .*{reason}"
        ):
            CaptumInterpreter(attribution)
        assert set(vars(attribution)) == keys

    @pytest.mark.parametrize("name", ["Lime", "KernelShap"])
    def test_linear_models(self, name: str, model: nn.Module) -> None:
        pytest.importorskip("sklearn", reason="Captum needs scikit-learn to build it")
        with pytest.raises(TypeError, match=f"got {name}: its linear model is fitted outside"):
            CaptumInterpreter(getattr(ca, name)(model))

    @pytest.mark.parametrize("attribution", [None, "Saliency", TinyNet(), Saliency(TinyNet())])
    def test_no_captum_method(self, attribution: Any) -> None:
        name = type(attribution).__name__
        with pytest.raises(
            TypeError, match=rf"method of captum\.attr, got {name}; for one of your"
        ):
            CaptumInterpreter(attribution)

    def test_the_class_in_place_of_an_instance(self) -> None:
        with pytest.raises(TypeError, match=r"expected an attribution method of captum\.attr, got"):
            CaptumInterpreter(ca.Saliency)

    def test_internal_batches(self, model: nn.Module, data: Any) -> None:
        attribution = ca.IntegratedGradients(model)
        with pytest.raises(
            ValueError, match="internal_batch_size=None, got 4; Captum cuts the gra"
        ):
            CaptumInterpreter(attribution, internal_batch_size=4)
        CaptumInterpreter(attribution, internal_batch_size=None, n_steps=2)(*data)

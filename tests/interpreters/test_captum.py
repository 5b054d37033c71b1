# SPDX-License-Identifier: MIT
"""The Captum adapter: Captum's own maps, made differentiable; what cannot be is refused."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import captum.attr as ca
import numpy as np
import pytest
import torch
from captum._utils.models.linear_model import SkLearnLinearRegression, SkLearnRidge
from captum.attr._core.lime import get_exp_kernel_similarity_function
from conftest import TinyNet
from torch import Tensor, nn

from captum_adv2.interpreters import CaptumInterpreter, min_max
from captum_adv2.interpreters.captum import _create_graph

REGIONS = torch.arange(16)[:, None] // 8 * 2 + torch.arange(16) // 8
BASELINES = torch.linspace(0.1, 0.8, 3).view(3, 1, 1, 1).expand(3, 3, 16, 16)

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
    "GradientShap": (ca.GradientShap, {"baselines": BASELINES, "n_samples": 3}),
    "GradientShap, noisy": (
        lambda m: ca.GradientShap(m, multiply_by_inputs=False),
        {"baselines": lambda: BASELINES, "n_samples": 4, "stdevs": 0.1},
    ),
    "DeepLift": (ca.DeepLift, {}),
    "DeepLift, grey": (lambda m: ca.DeepLift(m, multiply_by_inputs=False), {"baselines": 0.45}),
    "DeepLiftShap": (ca.DeepLiftShap, {"baselines": BASELINES}),
    "GuidedBackprop": (ca.GuidedBackprop, {}),
    "Deconvolution": (ca.Deconvolution, {}),
    "GuidedGradCam": (lambda m: ca.GuidedGradCam(m, m.body), {}),
    "GuidedGradCam, smooth": (
        lambda m: ca.GuidedGradCam(m, m.body),
        {"interpolate_mode": "bilinear"},
    ),
    "NoiseTunnel": (
        lambda m: ca.NoiseTunnel(ca.InputXGradient(m)),
        {"stdevs": 0.1, "nt_samples": 4},
    ),
    "NoiseTunnel, squares in parts": (
        lambda m: ca.NoiseTunnel(ca.IntegratedGradients(m)),
        {
            "stdevs": 0.1,
            "nt_type": "smoothgrad_sq",
            "nt_samples": 5,
            "nt_samples_batch_size": 2,
            "n_steps": 3,
            "baselines": 0.2,
        },
    ),
    "NoiseTunnel, variance": (
        lambda m: ca.NoiseTunnel(ca.DeepLift(m)),
        {"stdevs": 0.1, "nt_type": "vargrad", "nt_samples": 3},
    ),
    "NoiseTunnel, layer": (
        lambda m: ca.NoiseTunnel(ca.LayerGradCam(m, m.body)),
        {"stdevs": 0.1, "nt_samples": 3},
    ),
    "LayerActivation": (lambda m: ca.LayerActivation(m, m.body), {}),
    "LayerActivation, input": (
        lambda m: ca.LayerActivation(m, m.body),
        {"attribute_to_layer_input": True},
    ),
    "LayerGradCam": (lambda m: ca.LayerGradCam(m, m.body), {}),
    "LayerGradCam, ReLU": (lambda m: ca.LayerGradCam(m, m.body), {"relu_attributions": True}),
    "LayerGradCam, channels": (
        lambda m: ca.LayerGradCam(m, m.body),
        {"attr_dim_summation": False},
    ),
    "LayerGradientXActivation": (lambda m: ca.LayerGradientXActivation(m, m.stem), {}),
    "LayerConductance": (lambda m: ca.LayerConductance(m, m.stem), {"n_steps": 4}),
    "LayerIntegratedGradients": (
        lambda m: ca.LayerIntegratedGradients(m, m.stem),
        {"n_steps": 4, "baselines": 0.2},
    ),
    "LayerIntegratedGradients, input": (
        lambda m: ca.LayerIntegratedGradients(m, m.body),
        {"n_steps": 3, "attribute_to_layer_input": True},
    ),
    "InternalInfluence": (lambda m: ca.InternalInfluence(m, m.stem), {"n_steps": 4}),
    "Occlusion": (ca.Occlusion, {"sliding_window_shapes": (3, 5, 4), "strides": (3, 4, 3)}),
    "Occlusion, a channel": (
        ca.Occlusion,
        {"sliding_window_shapes": (1, 8, 8), "strides": (1, 4, 8), "baselines": 0.4},
    ),
    "FeatureAblation": (ca.FeatureAblation, {"feature_mask": REGIONS[None, None]}),
    "FeatureAblation, of channels": (
        ca.FeatureAblation,
        {
            "feature_mask": REGIONS // 2 + 2 * torch.arange(3).view(1, 3, 1, 1),
            "baselines": BASELINES[:1],
            "perturbations_per_eval": 2,
        },
    ),
    "ShapleyValueSampling": (
        ca.ShapleyValueSampling,
        {"feature_mask": REGIONS[None, None], "n_samples": 3},
    ),
    "ShapleyValues": (ca.ShapleyValues, {"feature_mask": REGIONS[None, None]}),
    "KernelShap": (ca.KernelShap, {"feature_mask": REGIONS[None, None], "n_samples": 12}),
    "Lime": (
        lambda m: ca.Lime(m, interpretable_model=SkLearnLinearRegression()),
        {"feature_mask": REGIONS[None, None] + 1, "n_samples": 14, "baselines": 0.3},
    ),
    "Lime, ridge": (
        lambda m: ca.Lime(
            m,
            interpretable_model=SkLearnRidge(alpha=0.3),
            similarity_func=get_exp_kernel_similarity_function("euclidean", 3.0),
        ),
        {"feature_mask": REGIONS[None, None], "n_samples": 9},
    ),
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


class LeastSquares:
    """What Captum fits with scikit-learn, by NumPy: weighted, with an intercept, ridge or not."""

    def __init__(self, ridge: float) -> None:
        self.ridge = ridge

    def fit(self, data: Any) -> None:
        ((masks, values, weights),) = data
        masks, values, root = (t.double().numpy() for t in (masks, values, weights.sqrt()))
        features = masks.shape[1]
        design = np.hstack([np.ones((len(masks), 1)), masks]) * root[:, None]
        penalty = np.sqrt(self.ridge) * np.eye(1 + features)[1:]
        rows = np.vstack([design, penalty])
        right = np.concatenate([values * root, np.zeros(features)])
        self.slopes = np.linalg.lstsq(rows, right)[0][1:]

    def representation(self) -> Tensor:
        return torch.tensor(self.slopes)


def by_captum(attribution: Any, images: Tensor, labels: Tensor, **kwargs: Any) -> np.ndarray:
    """Return Captum's attributions of each image by itself, from generators seeded with 0."""
    if isinstance(attribution, ca.Lime):
        attribution = copy.copy(attribution)
        settings = attribution.interpretable_model.construct_kwargs
        attribution.interpretable_model = LeastSquares(settings.get("alpha", 0.0))
    targeted = not isinstance(attribution, ca.LayerActivation)
    found = []
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # Captum says that it sets hooks
        for image, label in zip(images.split(1), labels.split(1), strict=True):
            torch.manual_seed(0)
            np.random.seed(0)  # noqa: NPY002  (what Captum draws from)
            x = image.clone().requires_grad_()  # Captum warns where it has to set this itself
            target = {"target": label} if targeted else {}
            found.append(attribution.attribute(x, **target, **kwargs).detach().double())
    return torch.cat(found).numpy()


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
        torch.autograd.grad(interpreter.surrogate(x, labels)(x).maps.sum(), x, allow_unused=True)
        with pytest.raises((RuntimeError, ValueError, AssertionError)):
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


class Mixed(nn.Module):
    """Activations and a pooling that some methods treat by rules of their own; smooth and not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Softplus(), nn.MaxPool2d(2))
        self.body = nn.Sequential(
            nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(5, 5, 3), nn.Tanh()
        )
        self.fc = nn.Linear(20, 4)
        for weight in self.parameters():
            weight.data.mul_(3)  # or it is all but linear, and hides errors of second order

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(self.stem(x)).flatten(1))


@pytest.fixture
def net() -> nn.Module:
    return Mixed().double().eval()


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(2, 3, 16, 16, generator=generator, dtype=torch.float64)
    return images.requires_grad_(), torch.tensor([0, 2])


def correct(maps: Callable[[Tensor], Tensor], x: Tensor, **settings: bool) -> bool:
    return torch.autograd.gradcheck(maps, x, fast_mode=True, raise_exception=False, **settings)


def before_scaling(attribution: Any, x: Tensor, target: Tensor, **kwargs: Any) -> Tensor:
    """Return attributions themselves, before they become a map."""
    seen: list[Tensor] = []
    CaptumInterpreter(attribution, lambda a: seen.append(a) or a[:, :1], **kwargs).explain(
        x, target
    )
    return seen[-1]


class TestDerivative:
    @supported
    def test_finite_differences(
        self, build: Callable[[Any], Any], kwargs: dict[str, Any], net: nn.Module, pair: Any
    ) -> None:
        x, target = pair
        interpreter = CaptumInterpreter(build(net), **kwargs)

        def maps(x: Tensor) -> Tensor:
            return interpreter.explain(x, target).maps

        assert correct(maps, x)
        # And along a direction, without gradcheck.
        direction, weights = torch.randn_like(x), torch.rand_like(maps(x))
        (gradient,) = torch.autograd.grad((maps(x) * weights).sum(), x)
        assert gradient.any()
        with torch.no_grad():
            ahead, behind = ((maps(x + s * 1e-6 * direction) * weights).sum() for s in (1, -1))
        slope = (ahead - behind).item() / 2e-6
        assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-4, abs=1e-6)

    @supported
    def test_equals_captum_in_double(
        self, build: Callable[[Any], Any], kwargs: dict[str, Any], net: nn.Module, pair: Any
    ) -> None:
        x, target = pair
        attribution = build(net)
        expected = scaled(REDUCTIONS["abs-max"](by_captum(attribution, *pair, **kwargs)))
        maps = CaptumInterpreter(attribution, **kwargs)(x, target)
        # Where Captum perturbs, it sums up in single precision.
        np.testing.assert_allclose(maps.detach().numpy(), expected, atol=1e-5)

    def test_captums_graphs_are_wrong(self, net: nn.Module, pair: Any) -> None:
        """Maps that require grad, with gradients that are not theirs: what the checks must see."""
        image, target = (part[:1] for part in pair)
        # What is wrong is told entry by entry: the colour alone is varied, not each pixel.
        x = torch.zeros(1, 3, 1, 1, dtype=image.dtype, requires_grad=True)
        guided = ca.GuidedBackprop(net)
        guided.gradient_func = _create_graph  # a graph, whose hooks act in the outer pass as well
        cam = ca.LayerGradCam(net, net.stem)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for attribution in (guided, ca.DeepLift(net), ca.InputXGradient(net), cam):
                assert attribution.attribute(image, target=target).requires_grad

                def maps(x: Tensor, attribution: Any = attribution) -> Tensor:
                    attributions = attribution.attribute(image + x, target=target)
                    return min_max(attributions.abs().amax(dim=1, keepdim=True))

                # Captum's hooks fail where a gradient is undefined.
                assert not correct(maps, x, check_undefined_grad=False)

    def test_deep_lift_where_image_and_baseline_agree(self, pair: Any) -> None:
        net, (x, target) = TinyNet(nn.Softplus, width=3).double().eval(), pair
        x = x.detach().clone()
        x[:, :, :, :9] = 0.3
        x[1] = 0.3
        direction = torch.randn_like(x)
        attribution = ca.DeepLift(net, multiply_by_inputs=False)

        def score(x: Tensor) -> Tensor:
            found = before_scaling(attribution, x, target, baselines=0.3)
            return (found * torch.linspace(0, 1, found.numel()).view_as(found)).sum()

        x.requires_grad_()
        (gradient,) = torch.autograd.grad(score(x), x)
        assert gradient.isfinite().all()
        with torch.no_grad():
            slope = (score(x + 1e-3 * direction) - score(x - 1e-3 * direction)).item() / 2e-3
        assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-3)

    def test_deep_lift_of_modules_used_twice(self, pair: Any) -> None:
        """Captum refuses them; every call counts by itself, and attributions add up."""

        class Reused(Mixed):
            def __init__(self) -> None:
                super().__init__()
                self.act = nn.ReLU(inplace=True)
                self.stem = nn.Conv2d(3, 4, 3, 2, 1)
                self.body = nn.Conv2d(4, 5, 3, 2, 1)
                self.fc = nn.Linear(80, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(self.act(self.body(self.act(self.stem(x)))).flatten(1))

        net, (x, target) = Reused().double().eval(), pair
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(RuntimeError, match="more than once"):
                ca.DeepLift(Reused().double()).attribute(x, target=target)
        found = before_scaling(ca.DeepLift(net), x, target, baselines=0.4)
        assert correct(lambda x: before_scaling(ca.DeepLift(net), x, target, baselines=0.4), x)
        gain = (net(x) - net(torch.full_like(x, 0.4))).gather(1, target[:, None])[:, 0]
        torch.testing.assert_close(found.sum(dim=(1, 2, 3)), gain)

    @pytest.mark.parametrize("build", [ca.GuidedBackprop, ca.DeepLift])
    def test_graphs_are_freed(self, build: Callable[[Any], Any], net: nn.Module, pair: Any) -> None:
        # A hook that keeps what is computed after it makes a cycle which is never collected.
        x, target = pair
        leaf = x.detach() * 1
        alive = weakref.ref(leaf)
        leaf.requires_grad_()
        maps = CaptumInterpreter(build(net)).explain(leaf, target).maps
        torch.autograd.grad(maps.sum(), leaf)
        del leaf, maps
        gc.collect()
        assert alive() is None

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

    @pytest.mark.parametrize(
        "kind",
        [
            ca.LayerGradCam,
            ca.LayerGradientXActivation,
            ca.LayerConductance,
            ca.LayerIntegratedGradients,
            ca.InternalInfluence,
            ca.GuidedGradCam,
        ],
    )
    def test_gradients_at_a_layer_are_smoothed(self, kind: Any, data: Any) -> None:
        images, labels = data
        net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Flatten()
        )
        net.append(nn.Linear(net(images).shape[1], 4))
        x = images.clone().requires_grad_()

        def gradients(smoothing: float | None) -> list[Tensor]:
            interpreter = CaptumInterpreter(kind(net, net[0]), smoothing=smoothing)
            maps = interpreter.explain(x, labels).maps, interpreter.surrogate(x, labels)(x).maps
            return [torch.autograd.grad(m.square().sum(), x)[0] for m in maps]

        true, smooth = gradients(0.1)
        assert (smooth - true).norm() > 0.1 * true.norm()
        assert torch.equal(*gradients(None))

    @pytest.mark.parametrize("method", ["LayerActivation", "DeepLift"])
    def test_where_no_gradient_is_in_the_map_it_is_its_own_surrogate(
        self, method: str, model: nn.Module, data: Any
    ) -> None:
        images, labels = data
        layer = (model.body,) if method.startswith("Layer") else ()
        interpreter = CaptumInterpreter(getattr(ca, method)(model, *layer), smoothing=0.1)
        surrogate = interpreter.surrogate(images, labels)
        assert torch.equal(surrogate(images).maps, interpreter(images, labels))

    def test_bad_smoothing(self, model: nn.Module) -> None:
        with pytest.raises(ValueError, match="expected smoothing above 0, got -1"):
            CaptumInterpreter(ca.Saliency(model), smoothing=-1)


class TestSeed:
    @pytest.mark.parametrize("name", ["GradientShap", "NoiseTunnel", "KernelShap", "Lime"])
    def test_another_seed_is_another_draw(self, name: str, model: nn.Module, data: Any) -> None:
        build, kwargs = SUPPORTED[name]
        first, again, other = (
            CaptumInterpreter(build(model), **kwargs, seed=seed)(*data) for seed in (0, 0, 1)
        )
        assert torch.equal(first, again)
        assert (first - other).abs().amax() > 1e-3


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
    "LRP": (ca.LRP, r"reads activations off \.data, .* InputXGradient"),
    "LayerLRP": (lambda m: ca.LayerLRP(m, m.body), r"reads activations off \.data"),
    "LayerGradientShap": (lambda m: ca.LayerGradientShap(m, m.body), r"torch\.no_grad\(\)"),
    "LayerDeepLift": (lambda m: ca.LayerDeepLift(m, m.body), "detaches .*; use DeepLift"),
    "NeuronGradient": (lambda m: ca.NeuronGradient(m, m.body), "gradient has not been verified"),
    "FeaturePermutation": (ca.FeaturePermutation, "shuffles features among the images"),
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
            TypeError,
            match=rf"differentiable Captum method \(.*Saliency.*\), got {name}: .*{reason}",
        ):
            CaptumInterpreter(attribution)
        assert set(vars(attribution)) == keys

    def test_fits_without_a_closed_form(self, model: nn.Module) -> None:
        with pytest.raises(TypeError, match="a Lime with .*got SkLearnLasso, which is fitted out"):
            CaptumInterpreter(ca.Lime(model))
        own = ca.Lime(
            model,
            interpretable_model=SkLearnLinearRegression(),
            similarity_func=lambda *_, **__: 1.0,
        )
        with pytest.raises(TypeError, match="a similarity_func from .*, got others"):
            CaptumInterpreter(own)

    def test_tunnels(self, model: nn.Module) -> None:
        for inner in (ca.GradientShap(model), ca.Occlusion(model), ca.DeepLiftShap(model)):
            with pytest.raises(TypeError, match=f"got one around {type(inner).__name__}"):
                CaptumInterpreter(ca.NoiseTunnel(inner), baselines=0, sliding_window_shapes=1)
        with pytest.raises(TypeError, match="got LRP: it reads"):
            CaptumInterpreter(ca.NoiseTunnel(ca.LRP(model)))
        with pytest.raises(ValueError, match=r"nt_type to be one of .*got 'mean'"):
            CaptumInterpreter(ca.NoiseTunnel(ca.Saliency(model)), nt_type="mean")
        with pytest.raises(ValueError, match="expected nt_samples at least 1, got 0"):
            CaptumInterpreter(ca.NoiseTunnel(ca.Saliency(model)), nt_samples=0)

    @pytest.mark.parametrize(
        ("build", "kwargs", "message"),
        [
            (ca.Saliency, {"steps": 3}, "arguments of Captum's Saliency.attribute, got .*'steps'"),
            (ca.GradientShap, {}, "GradientShap.attribute, got .*'baselines'"),
            (ca.Occlusion, {}, "Occlusion.attribute, got .*'sliding_window_shapes'"),
            (lambda m: ca.NoiseTunnel(ca.Saliency(m)), {"n_steps": 3}, "Saliency.attribute, got"),
            (ca.Saliency, {"seed": 3}, "Saliency.attribute, got {'seed': 3}"),
        ],
    )
    def test_arguments_of_others(
        self, build: Callable[[Any], Any], kwargs: dict[str, Any], message: str, model: nn.Module
    ) -> None:
        with pytest.raises(TypeError, match=message):
            CaptumInterpreter(build(model), **kwargs)

    @pytest.mark.parametrize(
        ("build", "kwargs", "message"),
        [
            (ca.DeepLift, {"return_convergence_delta": True}, "delta=False, got True; a map is"),
            (
                lambda m: ca.NoiseTunnel(ca.Saliency(m)),
                {"draw_baseline_from_distrib": True},
                "draw_baseline_from_distrib=False, got True",
            ),
            (
                ca.FeatureAblation,
                {"additional_forward_args": 3},
                "got additional_forward_args",
            ),
            (ca.FeatureAblation, {"feature_mask": REGIONS * 2}, "every integer from 0 to 6, got 4"),
            (ca.KernelShap, {"n_samples": 0}, "expected samples at least 1, got 0"),
            (ca.KernelShap, {"seed": -1}, "expected seed at least 0, got -1"),
            (
                lambda m: ca.LayerActivation(m, [m.stem]),
                {},
                "of one layer, got a list",
            ),
        ],
    )
    def test_bad_arguments(
        self, build: Callable[[Any], Any], kwargs: dict[str, Any], message: str, model: nn.Module
    ) -> None:
        with pytest.raises(ValueError, match=message):
            CaptumInterpreter(build(model), **kwargs)

    def test_attributions_that_are_no_maps(self, model: nn.Module, data: Any) -> None:
        interpreter = CaptumInterpreter(ca.LayerActivation(model, model.fc))
        with pytest.raises(ValueError, match=r"attributions \(B, C, h, w\), got .*feature maps"):
            interpreter(*data)

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

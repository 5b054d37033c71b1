# SPDX-License-Identifier: MIT
"""The Captum adapter: Captum's own maps, made differentiable; what cannot be is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import captum.attr as ca
import numpy as np
import pytest
import torch
from captum._utils.models.linear_model import SkLearnLinearRegression, SkLearnRidge
from captum.attr._core.lime import get_exp_kernel_similarity_function
from torch import Tensor, nn

from captum_adv2.interpreters import CaptumInterpreter
from captum_adv2.interpreters.base import Exact, Smoothed, min_max

REGIONS = torch.arange(16)[:, None] // 8 * 2 + torch.arange(16) // 8
BASELINES = torch.linspace(0.1, 0.8, 3).view(3, 1, 1, 1).expand(3, 3, 16, 16)
Build = Callable[[Any], Any]

# Name to (how to build it on a model, keyword arguments of attribute).
SUPPORTED: dict[str, tuple[Build, dict[str, Any]]] = {
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
    "NoiseTunnel, windows": (
        lambda m: ca.NoiseTunnel(ca.Occlusion(m)),
        {"stdevs": 0.1, "nt_samples": 2, "sliding_window_shapes": (3, 8, 8), "strides": 8},
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


def attacked(interpreter: CaptumInterpreter, x: Tensor, target: Tensor) -> Tensor:
    """Return the maps that an attack differentiates."""
    return interpreter.surrogate(interpreter, x, target, 0.0).maps


def slope(maps: Tensor, x: Tensor) -> Tensor:
    score = maps.square().sum()
    return torch.autograd.grad(score, x, allow_unused=True, materialize_grads=True)[0]


@supported
class TestSupported:
    def test_equals_captum_and_its_gradient_is_true(
        self, build: Build, kwargs: dict[str, Any], net: nn.Module, pair: Any
    ) -> None:
        x, target = pair
        interpreter = CaptumInterpreter(build(net), **kwargs)
        maps = interpreter(x, target)
        expected = scaled(REDUCTIONS["abs-max"](by_captum(build(net), *pair, **kwargs)))
        # Captum sums up perturbations in single precision.
        np.testing.assert_allclose(maps.detach().numpy(), expected, atol=1e-5)
        assert slope(maps, x).any()
        assert correct(lambda x: interpreter.explain(x, target).maps, x)

    def test_the_attribution_is_unchanged(
        self, build: Build, kwargs: dict[str, Any], model: nn.Module, data: Any
    ) -> None:
        images, labels = data[0][:2], data[1][:2]
        attribution = build(model)
        first = by_captum(attribution, images, labels, **kwargs)
        before = {key: (id(value), repr(value)) for key, value in vars(attribution).items()}
        interpreter = CaptumInterpreter(attribution, **kwargs)
        x = images.clone().requires_grad_()
        slope(attacked(interpreter, x, labels), x)
        with pytest.raises((RuntimeError, ValueError, AssertionError)):
            interpreter(images[..., :1, :1], labels)
        assert before == {key: (id(value), repr(value)) for key, value in vars(attribution).items()}
        assert np.array_equal(by_captum(attribution, images, labels, **kwargs), first)

    def test_a_function_in_place_of_a_model(
        self, build: Build, kwargs: dict[str, Any], model: nn.Module, data: Any
    ) -> None:
        images, labels = data
        expected = CaptumInterpreter(build(model), **kwargs)(images, labels)
        attribution = build(model)
        attribution.forward_func = lambda x: model(x)
        interpreter = CaptumInterpreter(attribution, **kwargs)
        assert interpreter.model is None
        assert interpreter.explain(images, labels).logits is None
        torch.testing.assert_close(interpreter(images, labels), expected)

    def test_no_graph_without_need(
        self,
        build: Build,
        kwargs: dict[str, Any],
        model: nn.Module,
        data: Any,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        interpreter, graphs = CaptumInterpreter(build(model), **kwargs), []
        grad = torch.autograd.grad

        def spy(outputs: Any, inputs: Any, **settings: Any) -> Any:
            graphs.append(settings.get("create_graph", False))
            return grad(outputs, inputs, **settings)

        monkeypatch.setattr(torch.autograd, "grad", spy)
        x = data[0].clone().requires_grad_()
        maps = interpreter(x, data[1])
        assert all(graphs)
        assert not graphs or maps.requires_grad
        inner, graphs[:] = bool(graphs), []
        with model.fc.register_forward_hook(lambda *io: graphs.append(io[2].requires_grad)):
            without = interpreter(*data)
        assert torch.equal(without, maps)
        # Methods of gradients run the model with a graph, and differentiate it without one.
        assert set(graphs) == ({True, False} if inner else {False})


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
    expected = scaled(REDUCTIONS["abs-max"](gradient.numpy()))
    np.testing.assert_allclose(maps.numpy(), expected, atol=1e-5)


class TestReduce:
    @pytest.mark.parametrize("name", REDUCTIONS)
    def test_by_name(self, model: nn.Module, data: Any, name: str) -> None:
        attribution = ca.InputXGradient(model)
        expected = scaled(REDUCTIONS[name](by_captum(attribution, *data)))
        maps = CaptumInterpreter(attribution, name)(*data)
        np.testing.assert_allclose(maps.numpy(), expected, atol=1e-5)

    def test_by_function(self, model: nn.Module, data: Any) -> None:
        attribution = ca.InputXGradient(model)
        expected = scaled(by_captum(attribution, *data)[:, 1:2] ** 2)
        maps = CaptumInterpreter(attribution, lambda a: a[:, 1:2].square())(*data)
        np.testing.assert_allclose(maps.numpy(), expected, atol=1e-5)

    def test_unknown(self, model: nn.Module) -> None:
        with pytest.raises(ValueError, match=r"reduce to be one of \['abs-max', .*got 'mean'"):
            CaptumInterpreter(ca.Saliency(model), reduce="mean")


def test_captums_graphs_are_wrong(net: nn.Module, pair: Any) -> None:
    """Maps that require grad, with gradients that are not theirs: what the checks must see."""

    def create_graph(forward: Any, inputs: Any, target: Any = None, more: Any = None) -> Any:
        score = forward() if target is None else forward(*inputs).gather(1, target[:, None])
        return torch.autograd.grad(score.sum(), inputs, create_graph=True)

    image, target = (part[:1] for part in pair)
    # The error is in every entry, so the colour alone is varied, not each pixel.
    x = torch.zeros(1, 3, 1, 1, dtype=image.dtype, requires_grad=True)
    guided = ca.GuidedBackprop(net)
    guided.gradient_func = create_graph  # a graph, whose hooks act in the outer pass as well
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


class TestSurrogate:
    @pytest.mark.parametrize("tau", [1e-4, 0.1])
    def test_saliency_of_a_logit_moves_only_when_smoothed(
        self, model: nn.Module, data: Any, tau: float
    ) -> None:
        images, labels = data
        x = images.clone().requires_grad_()
        interpreter = CaptumInterpreter(ca.Saliency(model), smoothing=tau)
        # On ReLUs the gradient of a logit is piecewise constant.
        assert not slope(interpreter(x, labels), x).any()
        assert slope(attacked(interpreter, x, labels), x).any()
        plain = CaptumInterpreter(ca.Saliency(model), smoothing=None)
        assert not slope(attacked(plain, x, labels), x).any()

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
            both = interpreter(x, labels), attacked(interpreter, x, labels)
            return [slope(maps, x) for maps in both]

        true, smooth = gradients(0.1)
        assert (smooth - true).norm() > 0.1 * true.norm()
        assert torch.equal(*gradients(None))

    def test_by_method(self, model: nn.Module) -> None:
        """Smoothed where a gradient of the model is in the map, be it in a tunnel."""
        for attribution, kind in (
            (ca.Saliency(model), Smoothed),
            (ca.NoiseTunnel(ca.LayerGradCam(model, model.body)), Smoothed),
            (ca.NoiseTunnel(ca.DeepLift(model)), Exact),
            (ca.LayerActivation(model, model.body), Exact),
            (ca.FeatureAblation(model), Exact),
        ):
            assert type(CaptumInterpreter(attribution).surrogate) is kind


@pytest.mark.parametrize(
    "name", ["GradientShap", "NoiseTunnel", "ShapleyValueSampling", "KernelShap", "Lime"]
)
def test_another_seed_is_another_draw(name: str, model: nn.Module, data: Any) -> None:
    build, kwargs = SUPPORTED[name]
    state = torch.get_rng_state()
    first, again, other = (
        CaptumInterpreter(build(model), **kwargs, seed=seed)(*data) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert (first - other).abs().amax() > 1e-3
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "calls"), [("Saliency", 1), ("InputXGradient", 1), ("IntegratedGradients", 1)]
)
def test_logits_are_of_the_very_images(name: str, calls: int, model: nn.Module, data: Any) -> None:
    clone, ran = copy.deepcopy(model), []
    clone.fc.register_forward_hook(lambda *_: ran.append(1))
    build, kwargs = SUPPORTED[name]
    logits = CaptumInterpreter(build(clone), **kwargs).explain(*data).logits
    assert len(ran) == calls
    # Integrated gradients run the images of the path alone.
    assert logits is None if name.startswith("Integrated") else torch.equal(logits, model(data[0]))


class OwnSaliency(ca.Saliency):
    """A subclass may compute anything."""


class Saliency:
    """Has the name of a Captum method, and is not one."""

    def __init__(self, model: nn.Module) -> None:
        self.forward_func = model


def similarity(original: Tensor, perturbed: Tensor, kept: Tensor, **_: Any) -> float:
    return 1 / (1 + (original - perturbed).norm().item())


# Name of the case to (attribution, keyword arguments, error, message).
REFUSED: dict[str, tuple[Build, dict[str, Any], type[Exception], str]] = {
    "LRP": (ca.LRP, {}, TypeError, r"got LRP: it reads activations off \.data, .*InputXGradient"),
    "a layer's LRP": (lambda m: ca.LayerLRP(m, m.body), {}, TypeError, "got LayerLRP: as LRP"),
    "no gradient at the layer": (
        lambda m: ca.LayerGradientShap(m, m.body),
        {},
        TypeError,
        r"got LayerGradientShap: Captum runs it under torch\.no_grad\(\)",
    ),
    "detached": (lambda m: ca.LayerDeepLift(m, m.body), {}, TypeError, "detaches .*; use DeepLift"),
    "not verified": (
        lambda m: ca.NeuronGradient(m, m.body),
        {},
        TypeError,
        "got NeuronGradient: its gradient has not been verified",
    ),
    "a map of the batch": (ca.FeaturePermutation, {}, TypeError, "it shuffles features among"),
    "a subclass": (OwnSaliency, {}, TypeError, r"verified; subclass captum_adv2\.interpreters"),
    "a namesake": (Saliency, {}, TypeError, r"method of captum\.attr, got Saliency; for one of"),
    "the class": (lambda m: ca.Saliency, {}, TypeError, r"method of captum\.attr, got type"),
    "the lasso": (ca.Lime, {}, TypeError, "a Lime with .*got SkLearnLasso, which is fitted out"),
    "a fit without intercept": (
        lambda m: ca.Lime(m, SkLearnRidge(fit_intercept=False)),
        {},
        TypeError,
        "a Lime with .*, got SkLearnRidge",
    ),
    "another kernel": (
        lambda m: ca.Lime(m, SkLearnLinearRegression(), similarity_func=similarity),
        {},
        TypeError,
        "a similarity_func from get_exp_kernel_similarity_function, got another",
    ),
    "other perturbations": (
        lambda m: ca.Lime(m, SkLearnLinearRegression(), perturb_func=lambda x, **_: x),
        {},
        TypeError,
        "Captum's own perturb_func",
    ),
    "a tunnel around draws": (
        lambda m: ca.NoiseTunnel(ca.GradientShap(m)),
        {"baselines": 0},
        TypeError,
        "draws no numbers itself, got one around GradientShap",
    ),
    "a tunnel around a refused one": (
        lambda m: ca.NoiseTunnel(ca.LRP(m)),
        {},
        TypeError,
        "got LRP: it reads",
    ),
    "parts of a path": (
        ca.IntegratedGradients,
        {"internal_batch_size": 4},
        ValueError,
        "expected no internal_batch_size, got 4; Captum cuts the graph",
    ),
    "two results": (
        ca.DeepLift,
        {"return_convergence_delta": True},
        ValueError,
        "expected no return_convergence_delta, got True; a map is all",
    ),
    "draws of another kind": (
        lambda m: ca.NoiseTunnel(ca.Saliency(m)),
        {"draw_baseline_from_distrib": True},
        ValueError,
        "expected no draw_baseline_from_distrib",
    ),
    "an unknown argument": (ca.Saliency, {"steps": 3}, TypeError, "unexpected .* 'steps'"),
    "an unknown argument in a tunnel": (
        lambda m: ca.NoiseTunnel(ca.Saliency(m)),
        {"n_steps": 3},
        TypeError,
        "unexpected .* 'n_steps'",
    ),
}


@pytest.mark.parametrize(("build", "kwargs", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(
    build: Build, kwargs: dict[str, Any], error: type[Exception], message: str, model: nn.Module
) -> None:
    attribution = build(model)
    before = set(vars(attribution))
    with pytest.raises(error, match=message):
        CaptumInterpreter(attribution, **kwargs)
    assert set(vars(attribution)) == before


@pytest.mark.parametrize(
    ("build", "kwargs", "error", "message"),
    [
        (lambda m: ca.LayerActivation(m, m.fc), {}, ValueError, r"\(B, C, h, w\), got .*one layer"),
        (lambda m: ca.NoiseTunnel(ca.Saliency(m)), {"nt_type": "mean"}, ValueError, "got 'mean'"),
        (ca.KernelShap, {"n_samples": 0}, ValueError, "expected n_samples at least 1, got 0"),
        (ca.GradientShap, {}, TypeError, "missing .* 'baselines'"),
        (ca.FeatureAblation, {"additional_forward_args": 3}, TypeError, "unexpected"),
    ],
)
def test_refused_at_a_call(
    build: Build,
    kwargs: dict[str, Any],
    error: type[Exception],
    message: str,
    model: nn.Module,
    data: Any,
) -> None:
    interpreter = CaptumInterpreter(build(model), **kwargs)
    with pytest.raises(error, match=message):
        interpreter(*data)

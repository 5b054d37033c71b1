# SPDX-License-Identifier: MIT
"""The Captum adapter: Captum's own maps, made differentiable; what cannot be is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import captum.attr as ca
import numpy as np
import pytest
import torch
from captum._utils.models.linear_model import SkLearnLinearRegression, SkLearnRidge
from captum.attr._core.lime import get_exp_kernel_similarity_function
from torch import Tensor, nn

from captum_adv2.interpreters import CaptumInterpreter
from captum_adv2.interpreters.base import Exact, Smoothed, min_max
from captum_adv2.interpreters.first_order import FirstOrder

QUARTERS = (torch.arange(16)[:, None] // 8 * 2 + torch.arange(16) // 8)[None, None]
THIRDS = QUARTERS // 2 + 2 * torch.arange(3).view(1, 3, 1, 1)  # a half of one channel
GREYS = torch.linspace(0.1, 0.8, 3).view(3, 1, 1, 1).expand(3, 3, 16, 16)
EUCLIDEAN = get_exp_kernel_similarity_function("euclidean", 3.0)


class Case(NamedTuple):
    """What builds an attribution on a model, and arguments of its ``attribute``."""

    build: Callable[[Any], Any]
    kwargs: dict[str, Any]


def case(build: Callable[[Any], Any], **kwargs: Any) -> Case:
    return Case(build, kwargs)


def at(layer: str, kind: Any, **kwargs: Any) -> Case:
    return Case(lambda model: kind(model, getattr(model, layer)), kwargs)


def tunnel(inner: Case, **kwargs: Any) -> Case:
    return Case(lambda model: ca.NoiseTunnel(inner.build(model)), {"stdevs": 0.1} | kwargs)


def local(kind: Any, **kwargs: Any) -> Case:
    return Case(lambda model: kind(model, multiply_by_inputs=False), kwargs)


def lime(fit: Any, similarity: Any = None, **kwargs: Any) -> Case:
    return Case(lambda model: ca.Lime(model, fit, similarity_func=similarity), kwargs)


SUPPORTED: dict[str, Case] = {
    "Saliency": case(ca.Saliency),
    "Saliency, signed": case(ca.Saliency, abs=False),
    "InputXGradient": case(ca.InputXGradient),
    "IntegratedGradients": case(ca.IntegratedGradients, n_steps=5),
    "IntegratedGradients, grey": case(ca.IntegratedGradients, n_steps=4, baselines=0.5),
    "IntegratedGradients, local": local(ca.IntegratedGradients, method="riemann_trapezoid"),
    "GradientShap": case(ca.GradientShap, baselines=GREYS, n_samples=3),
    "GradientShap, noisy": local(ca.GradientShap, baselines=lambda: GREYS, stdevs=0.1),
    "DeepLift": case(ca.DeepLift),
    "DeepLift, grey": local(ca.DeepLift, baselines=0.45),
    "DeepLiftShap": case(ca.DeepLiftShap, baselines=GREYS),
    "GuidedBackprop": case(ca.GuidedBackprop),
    "Deconvolution": case(ca.Deconvolution),
    "GuidedGradCam": at("body", ca.GuidedGradCam),
    "GuidedGradCam, smooth": at("body", ca.GuidedGradCam, interpolate_mode="bilinear"),
    "NoiseTunnel": tunnel(case(ca.InputXGradient), nt_samples=4),
    "NoiseTunnel, squares in parts": tunnel(
        case(ca.IntegratedGradients),
        **{"nt_type": "smoothgrad_sq", "nt_samples_batch_size": 2, "n_steps": 3, "baselines": 0.2},
    ),
    "NoiseTunnel, variance": tunnel(case(ca.DeepLift), nt_type="vargrad", nt_samples=3),
    "NoiseTunnel, layer": tunnel(at("body", ca.LayerGradCam), nt_samples=3),
    "NoiseTunnel, windows": tunnel(
        case(ca.Occlusion), nt_samples=2, sliding_window_shapes=(3, 8, 8), strides=8
    ),
    "LayerActivation": at("body", ca.LayerActivation),
    "LayerActivation, input": at("body", ca.LayerActivation, attribute_to_layer_input=True),
    "LayerGradCam": at("body", ca.LayerGradCam),
    "LayerGradCam, ReLU": at("body", ca.LayerGradCam, relu_attributions=True),
    "LayerGradCam, channels": at("body", ca.LayerGradCam, attr_dim_summation=False),
    "LayerGradientXActivation": at("stem", ca.LayerGradientXActivation),
    "LayerConductance": at("stem", ca.LayerConductance, n_steps=4),
    "LayerIntegratedGradients": at("stem", ca.LayerIntegratedGradients, baselines=0.2),
    "LayerIntegratedGradients, input": at(
        "body", ca.LayerIntegratedGradients, n_steps=3, attribute_to_layer_input=True
    ),
    "InternalInfluence": at("stem", ca.InternalInfluence, n_steps=4),
    "Occlusion": case(ca.Occlusion, sliding_window_shapes=(3, 5, 4), strides=(3, 4, 3)),
    "Occlusion, a channel": case(
        ca.Occlusion, sliding_window_shapes=(1, 8, 8), strides=(1, 4, 8), baselines=0.4
    ),
    "FeatureAblation": case(ca.FeatureAblation, feature_mask=QUARTERS),
    "FeatureAblation, of channels": case(
        ca.FeatureAblation, feature_mask=THIRDS, baselines=GREYS[:1], perturbations_per_eval=2
    ),
    "ShapleyValueSampling": case(ca.ShapleyValueSampling, feature_mask=QUARTERS, n_samples=3),
    "ShapleyValues": case(ca.ShapleyValues, feature_mask=QUARTERS),
    "KernelShap": case(ca.KernelShap, feature_mask=QUARTERS, n_samples=12),
    "Lime": lime(SkLearnLinearRegression(), feature_mask=QUARTERS + 1, n_samples=14),
    "Lime, ridge": lime(SkLearnRidge(alpha=0.3), EUCLIDEAN, feature_mask=QUARTERS, baselines=0.3),
}
supported = pytest.mark.parametrize("case", SUPPORTED.values(), ids=SUPPORTED)

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
        rows = np.vstack([design, np.sqrt(self.ridge) * np.eye(1 + features)[1:]])
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
        warnings.simplefilter("ignore")  # Captum warns that it sets hooks
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
@pytest.mark.filterwarnings("ignore:the attributions of DeepLift")
class TestSupported:
    def test_equals_captum_and_its_gradient_is_true(
        self, case: Case, net: nn.Module, pair: Any
    ) -> None:
        x, target = pair
        interpreter = CaptumInterpreter(case.build(net), **case.kwargs)
        maps = interpreter(x, target)
        expected = scaled(REDUCTIONS["abs-max"](by_captum(case.build(net), *pair, **case.kwargs)))
        # Captum sums up perturbations in single precision.
        np.testing.assert_allclose(maps.detach().numpy(), expected, atol=1e-5)
        assert slope(maps, x).any()
        assert correct(lambda x: interpreter.explain(x, target).maps, x)

    def test_the_attribution_is_unchanged(self, case: Case, model: nn.Module, data: Any) -> None:
        images, labels = data[0][:2], data[1][:2]
        attribution = case.build(model)
        first = by_captum(attribution, images, labels, **case.kwargs)
        before = {key: (id(value), repr(value)) for key, value in vars(attribution).items()}
        interpreter = CaptumInterpreter(attribution, **case.kwargs)
        x = images.clone().requires_grad_()
        slope(attacked(interpreter, x, labels), x)
        with pytest.raises((RuntimeError, ValueError, AssertionError)):
            interpreter(images[..., :1, :1], labels)
        assert before == {key: (id(value), repr(value)) for key, value in vars(attribution).items()}
        assert np.array_equal(by_captum(attribution, images, labels, **case.kwargs), first)

    def test_a_function_in_place_of_a_model(self, case: Case, model: nn.Module, data: Any) -> None:
        expected = CaptumInterpreter(case.build(model), **case.kwargs)(*data)
        attribution = case.build(model)
        attribution.forward_func = lambda x: model(x)
        interpreter = CaptumInterpreter(attribution, **case.kwargs)
        assert interpreter.model is None
        assert interpreter.explain(*data).logits is None
        torch.testing.assert_close(interpreter(*data), expected)

    def test_no_graph_without_need(
        self, case: Case, model: nn.Module, data: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        interpreter, graphs = CaptumInterpreter(case.build(model), **case.kwargs), []
        grad = torch.autograd.grad

        def spy(outputs: Any, inputs: Any, **settings: Any) -> Any:
            graphs.append(settings.get("create_graph", False))
            return grad(outputs, inputs, **settings)

        monkeypatch.setattr(torch.autograd, "grad", spy)
        maps = interpreter(data[0].clone().requires_grad_(), data[1])
        assert all(graphs)
        inner, graphs[:] = bool(graphs), []
        with model.fc.register_forward_hook(lambda *io: graphs.append(io[2].requires_grad)):
            assert torch.equal(interpreter(*data), maps)
        # Methods of gradients run the model with a graph, and differentiate it without one.
        assert set(graphs) == ({True, False} if inner else {False})


def squared_green(a: Any) -> Any:
    return a[:, 1:2] ** 2


@pytest.mark.parametrize("reduce", [*REDUCTIONS, squared_green])
def test_reduce(reduce: Any, model: nn.Module, data: Any) -> None:
    attribution = ca.InputXGradient(model)
    expected = scaled(REDUCTIONS.get(reduce, squared_green)(by_captum(attribution, *data)))
    maps = CaptumInterpreter(attribution, reduce)(*data)
    np.testing.assert_allclose(maps.numpy(), expected, atol=1e-5)


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


AT_A_LAYER = (
    *(ca.LayerGradCam, ca.LayerGradientXActivation, ca.LayerConductance),
    *(ca.LayerIntegratedGradients, ca.InternalInfluence, ca.GuidedGradCam),
)


class TestSurrogate:
    @pytest.mark.parametrize("tau", ["auto", 1e-4, 0.1])
    def test_saliency_of_a_logit_moves_only_when_smoothed(
        self, model: nn.Module, data: Any, tau: Any
    ) -> None:
        images, labels = data
        x = images.clone().requires_grad_()
        interpreter = CaptumInterpreter(ca.Saliency(model), smoothing=tau)
        # On ReLUs the gradient of a logit is piecewise constant.
        assert not slope(interpreter(x, labels), x).any()
        assert slope(attacked(interpreter, x, labels), x).any()
        plain = CaptumInterpreter(ca.Saliency(model), smoothing=None)
        assert not slope(attacked(plain, x, labels), x).any()

    @pytest.mark.parametrize("kind", AT_A_LAYER)
    def test_gradients_at_a_layer_are_smoothed(self, kind: Any, data: Any) -> None:
        net = Mixed()
        net.body.append(nn.Conv2d(5, 5, 1)).append(nn.ReLU())
        x = data[0].clone().requires_grad_()

        def gradients(smoothing: float | None) -> list[Tensor]:
            interpreter = CaptumInterpreter(kind(net, net.stem[0]), smoothing=smoothing)
            both = interpreter(x, data[1]), attacked(interpreter, x, data[1])
            return [slope(maps, x) for maps in both]

        true, smooth = gradients(0.1)
        assert (smooth - true).norm() > 0.1 * true.norm()
        assert torch.equal(*gradients(None))

    def test_by_method(self, model: nn.Module) -> None:
        """Smoothed where a gradient of the model is in the map, be it in a tunnel."""
        for attribution, kind in (
            (ca.Saliency(model), FirstOrder),
            (ca.NoiseTunnel(ca.InputXGradient(model)), FirstOrder),
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


@pytest.mark.parametrize("name", ["Saliency", "InputXGradient", "IntegratedGradients"])
def test_logits_are_of_the_very_images(name: str, model: nn.Module, data: Any) -> None:
    clone, calls = copy.deepcopy(model), []
    clone.fc.register_forward_hook(lambda *_: calls.append(1))
    logits = CaptumInterpreter(SUPPORTED[name].build(clone)).explain(*data).logits
    assert calls == [1]
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


def drawn_otherwise(model: nn.Module) -> ca.Lime:
    return ca.Lime(model, SkLearnLinearRegression(), perturb_func=lambda x, **_: x)


REFUSED: dict[str, Case] = {
    r"got LRP: it reads activations off \.data; .* InputXGradient": case(ca.LRP),
    r"got LayerLRP: it reads": at("body", ca.LayerLRP),
    r"got LayerGradientShap: .* torch\.no_grad\(\)": at("body", ca.LayerGradientShap),
    r"got LayerDeepLift: Captum detaches .*; use DeepLift": at("body", ca.LayerDeepLift),
    r"got NeuronGradient: its gradient has not been veri": at("body", ca.NeuronGradient),
    r"got FeaturePermutation: it shuffles features among": case(ca.FeaturePermutation),
    r"got OwnSaliency: .* verified; subclass captum_adv2": case(OwnSaliency),
    r"method of captum\.attr .*, got Saliency: .* subclass": case(Saliency),
    r"an object, got the class; pass Saliency\(model\)": case(lambda model: ca.Saliency),
    r"missing .* 'baselines'": case(ca.GradientShap),
    r"a Lime with .*, got SkLearnLasso, which is fitted outside": case(ca.Lime),
    r"a Lime with .*, got SkLearnRidge": lime(SkLearnRidge(fit_intercept=False)),
    r"a similarity_func from .*, got another": lime(SkLearnLinearRegression(), similarity),
    r"Captum's own perturb_func": case(drawn_otherwise),
    r"draws no numbers itself, got one around GradientShap": tunnel(case(ca.GradientShap)),
    r"got LRP: it": tunnel(case(ca.LRP)),
    r"no internal_batch_size, got 4; Captum cuts": case(ca.DeepLift, internal_batch_size=4),
    r"no return_convergence_delta, got": case(ca.DeepLift, return_convergence_delta=True),
    r"no draw_baseline_from": tunnel(case(ca.Saliency), draw_baseline_from_distrib=True),
    r"no grad_kwargs, got": at("body", ca.LayerGradCam, grad_kwargs={"create_graph": True}),
    r"of Saliency.attribute\(.*\): .*unexpected .* 'steps'": case(ca.Saliency, steps=3),
    r"no target; .* called with the classes": case(ca.Saliency, target=torch.tensor([0])),
    r"unexpected .* 'n_steps'": tunnel(case(ca.Saliency), n_steps=3),
    r"reduce to be one of \['abs-max', .*got 'mean'": case(ca.Saliency, reduce="mean"),
}


@pytest.mark.parametrize(("message", "case"), REFUSED.items())
def test_refused(message: str, case: Case, model: nn.Module) -> None:
    attribution = case.build(model)
    before = set(vars(attribution))
    with pytest.raises((TypeError, ValueError), match=message):
        CaptumInterpreter(attribution, **case.kwargs)
    assert set(vars(attribution)) == before


REFUSED_AT_A_CALL = {
    r"LayerActivation .*\(B, C, h, w\), got .*one layer": at("fc", ca.LayerActivation),
    r"nt_type to be one of .* got 'mean'": tunnel(case(ca.Saliency), nt_type="mean"),
    r"expected n_samples at least 1, got 0": case(ca.KernelShap, n_samples=0),
    r"images' shape, \(1, 3, 16, 16\), got \(16, 9\)": case(
        ca.FeatureAblation, feature_mask=torch.zeros(16, 9, dtype=torch.long)
    ),
    r"unexpected .* 'additional_forward_args'": case(ca.KernelShap, additional_forward_args=3),
}


@pytest.mark.parametrize(("message", "case"), REFUSED_AT_A_CALL.items())
def test_refused_at_a_call(message: str, case: Case, model: nn.Module, data: Any) -> None:
    interpreter = CaptumInterpreter(case.build(model), **case.kwargs)
    with pytest.raises((TypeError, ValueError), match=message):
        interpreter(*data)

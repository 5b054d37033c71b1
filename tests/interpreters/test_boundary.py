# SPDX-License-Identifier: MIT
"""Models of other people: what they return is logits that depend on the images, or is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchattacks
from kinds import Around, Run
from torch import Tensor, nn

from captum_adv2 import ADV2, BitDepthADV2, SoundnessWarning, StADV2, evaluate
from captum_adv2.attacks import RandomPatch
from captum_adv2.interpreters import CAM, GradCAM, Gradient, IntegratedGradients, SmoothGrad
from captum_adv2.interpreters.base import Smoothed
from captum_adv2.interpreters.boundary import differentiable_logits
from captum_adv2.interpreters.relu import as_slope
from captum_adv2.testing import unchanged

FLAT_MAPS = "ignore:(. of . target maps|the gradient of)"

ATTACKS = {
    "ADV2": lambda net, kind: ADV2(net, kind, eps=0.1, steps=3, warmup=1),
    "StADV2": lambda net, kind: StADV2(net, kind, steps=3, warmup=1),
    "BitDepthADV2": lambda net, kind: BitDepthADV2(ADV2(net, kind, eps=0.2, steps=2), 3, steps=2),
}


@pytest.fixture(params=ATTACKS)
def attacking(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return ATTACKS[request.param]


# What a model does to its input, and how many images it takes


def in_place(net: nn.Module, x: Tensor) -> Tensor:
    x -= 0.5
    x *= 2.0
    return net(x)


def out_of_place(net: nn.Module, x: Tensor) -> Tensor:
    return net((x - 0.5) * 2.0)


@pytest.mark.parametrize("kind", [CAM, Gradient, GradCAM])
@pytest.mark.filterwarnings(FLAT_MAPS)
def test_a_model_that_normalises_in_place(
    model: nn.Module, data: Any, attacking: Any, kind: Any
) -> None:
    ours, theirs = Around(model, in_place), Around(model, out_of_place)
    images, labels = data
    with unchanged(ours, images, labels):
        maps, adversarial = kind(ours)(images, labels), attacking(ours, kind)(images, labels)
        report = evaluate(ours, kind(ours), images, adversarial, labels)
    assert torch.equal(maps, kind(theirs)(images, labels))
    assert torch.equal(adversarial, attacking(theirs, kind)(images, labels))
    expected = evaluate(theirs, kind(theirs), images, adversarial, labels)
    torch.testing.assert_close(tuple(report), tuple(expected))


@pytest.mark.parametrize("kind", [CAM, Gradient])
@pytest.mark.filterwarnings(FLAT_MAPS)
def test_a_model_of_a_fixed_batch_size(
    model: nn.Module, data: Any, attacking: Any, kind: Any
) -> None:
    images, labels = data

    def of_six(net: nn.Module, x: Tensor) -> Tensor:
        return net(x.view(6, 3, 16, 16))

    def squeezing(net: nn.Module, x: Tensor) -> Tensor:
        return net(x).squeeze()

    for net in (Around(model, of_six), Around(model, squeezing)):
        torchattacks.PGD(net, steps=1)(images, labels)
        attack = attacking(net, kind)
        getattr(attack, "second", attack).target_map = RandomPatch()
        assert attack(images, labels).shape == images.shape
        assert kind(net)(images, labels).shape[:2] == (6, 1)


# Logits that do not depend on the images


def without_grad(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x)


def detached_inside(net: Any, x: Tensor) -> Tensor:
    return net.fc(net.body(net.norm(net.stem(x)).detach()).mean(dim=(2, 3)))


def rounded(net: nn.Module, x: Tensor) -> Tensor:
    return net((x * 255).round() / 255)


def quantised_head(net: Any, x: Tensor) -> Tensor:
    dynamic = pytest.importorskip("torch.ao.nn.quantized.dynamic")
    features = net.body(net.norm(net.stem(x))).mean(dim=(2, 3))
    return dynamic.Linear(16, 4)(features)


CUT: dict[str, tuple[Run, str]] = {
    "no_grad": (without_grad, "without a graph"),
    "detached input": (lambda net, x: net(x.detach()), "without a graph"),
    "detached output": (lambda net, x: net(x).detach(), "without a graph"),
    "detached inside": (detached_inside, "without a graph"),
    "data": (lambda net, x: net(x.data), "without a graph"),
    "rounded": (rounded, "a gradient of zero"),
    "quantised": (quantised_head, "without a graph"),
}


@pytest.mark.parametrize("how", CUT)
@pytest.mark.filterwarnings("ignore:.*autograd kernel was not registered", "ignore:.*deprecated")
def test_logits_without_a_gradient(model: nn.Module, data: Any, attacking: Any, how: str) -> None:
    run, got = CUT[how]
    net, records = Around(model, run), []
    message = f"expected logits that depend differentiably on the images, got .*{got}; run"
    attack = attacking(net, GradCAM)
    getattr(attack, "second", attack).callback = records.append
    with unchanged(net, *data), pytest.raises(ValueError, match=message):
        attack(*data)
    assert not records
    if how != "rounded":  # whose map is zero
        for kind in (Gradient, IntegratedGradients, SmoothGrad):
            with unchanged(net, *data), pytest.raises(ValueError, match=message):
                kind(net)(*data)
        with pytest.raises(ValueError, match=message):
            evaluate(net, Gradient(net), data[0], *data)


def test_a_gradient_of_zero_may_be_that_of_the_images(model: nn.Module, data: Any) -> None:
    black = torch.zeros_like(data[0])
    net = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(768, 4, bias=False))
    assert torch.equal(differentiable_logits(net, black), net(black))
    net[-1].weight.data.zero_()  # constant: legal, if of no use
    assert torch.equal(differentiable_logits(net, data[0]), net(data[0]))


# Logits that are none


ONE = r"got \(6(, 1)?,?\); one logit z is two, torch.stack\(\[0 \* z, z\], dim=1\)"
REFUSED: dict[str, tuple[Run, type[Exception], str]] = {
    "one logit": (lambda net, x: net(x)[:, :1], ValueError, ONE),
    "one number": (lambda net, x: net(x)[:, 0], ValueError, ONE),
    "classes": (lambda net, x: net(x).argmax(dim=1), TypeError, "floating, got torch.int64"),
    "integers": (lambda net, x: net(x).long(), TypeError, "floating, got torch.int64"),
    "a dictionary": (lambda net, x: {"logits": net(x)}, TypeError, "got dict; wrap it"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_outputs_that_are_not_logits(
    model: nn.Module, data: Any, attacking: Any, kind: str
) -> None:
    run, error, message = REFUSED[kind]
    net, wanted = Around(model, run), rf"expected the model to return logits .*{message}"
    with pytest.raises(error, match=wanted):
        attacking(net, Gradient)(*data)
    with pytest.raises(error, match=wanted):
        Gradient(net)(*data)
    with pytest.raises(error, match=wanted):
        evaluate(net, Gradient(net), data[0], *data)


def test_the_two_logits_of_one_have_its_probability() -> None:
    z = torch.randn(5)
    two = torch.stack([0 * z, z], dim=1)  # as the message says
    torch.testing.assert_close(two.softmax(dim=1)[:, 1], z.sigmoid())


@pytest.mark.filterwarnings("ignore:.*gradient of .* zero")
def test_probabilities(model: nn.Module, data: Any, attacking: Any) -> None:
    net, message = nn.Sequential(model, nn.Softmax(dim=1)), "expected logits, .*: probabilities"
    with pytest.warns(SoundnessWarning, match=message) as caught:
        SmoothGrad(net, samples=2)(*data)
    assert len(caught) == 1
    with pytest.warns(SoundnessWarning, match=message):
        attacking(net, Gradient)(*data)
    logs = nn.Sequential(model, nn.LogSoftmax(dim=1))  # are logits
    torch.testing.assert_close(Gradient(logs)(*data), Gradient(model)(*data))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.filterwarnings("ignore:. of . target maps")
def test_logits_that_are_not_numbers(model: nn.Module, data: Any, value: float) -> None:
    broken = torch.zeros(6, 1).index_fill(0, torch.tensor([1]), value)
    net = Around(model, lambda net, x: net(x) + broken)
    with pytest.warns(SoundnessWarning, match=r"NaN or infinite for 1 of 6 images"):
        adversarial = ADV2(net, lambda net: CAM(net, layer="net.body"), steps=2)(*data)
    assert adversarial.isfinite().all()
    out = torch.tensor([0.0, 0.0, 0.0, -torch.inf])
    ruled_out = Around(model, lambda net, x: net(x) + out)
    ADV2(ruled_out, Gradient, steps=2, warmup=1)(*data)


# Data types


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", [CAM, Gradient])
def test_images_of_another_dtype(
    model: nn.Module, data: Any, attacking: Any, dtype: torch.dtype, kind: Any
) -> None:
    other, given = copy.deepcopy(model).to(dtype), data[0].to(dtype)
    for net, images in ((model, given), (other, data[0])):
        own = next(net.parameters()).dtype
        message = f"the model's dtype and device, {own} on cpu, got {images.dtype} on cpu"
        with unchanged(net, images), pytest.raises(TypeError, match=message):
            attacking(net, kind)(images, data[1])
        with unchanged(net, images), pytest.raises(TypeError, match=message):
            kind(net)(images, data[1])
        with pytest.raises(TypeError, match=message):
            evaluate(net, kind(net), images, images, data[1])
    converting = Around(model, lambda net, x: net(x.float()))
    assert kind(converting)(given, data[1]).shape[:2] == (6, 1)  # it takes images of any type


@pytest.mark.parametrize("kind", [Gradient, SmoothGrad, IntegratedGradients])
@pytest.mark.filterwarnings("ignore:. of . target maps")
def test_a_gradient_that_is_not_finite_warns(model: nn.Module, data: Any, kind: Any) -> None:
    half, images = copy.deepcopy(model).half(), data[0].half()
    message = (
        r"gradient of .*'s map is not finite for \d of 6 images: .* in torch.float16; .*Smoothed"
    )
    with pytest.warns(SoundnessWarning, match=message):
        ADV2(half, kind, steps=2, surrogate=Smoothed(as_slope(1e-4)))(images, data[1])


def test_an_error_of_the_model_stays_as_it_is(model: nn.Module, data: Any, attacking: Any) -> None:
    def failing(net: nn.Module, x: Tensor) -> Tensor:
        raise RuntimeError("of my own")

    net = Around(model, failing)
    for call in (attacking(net, CAM), Gradient(net)):
        with pytest.raises(RuntimeError, match="^of my own$"):
            call(*data)
    with pytest.raises(RuntimeError, match="3 channels"):
        Gradient(model)(torch.rand(2, 4, 16, 16), data[1][:2])

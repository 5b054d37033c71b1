# SPDX-License-Identifier: MIT
"""StADV2: against stAdv, against torch.optim.Adam, image by image, interpreter by interpreter."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from conftest import INTERPRETERS
from torch import nn
from torchattacks.attack import Attack

from captum_adv2 import ADV2, StADV2, evaluate
from captum_adv2.attacks import AdamDescent, CrossEntropy, Flow, MapDistance, SignDescent, flow_loss
from captum_adv2.interpreters import CAM, GradCAM, Gradient

CLASSES = 4
BUILD = {row.name: row.build for row in INTERPRETERS}
FLAT_MAPS = "ignore::captum_adv2.SoundnessWarning"  # where a map happens to be constant


def shifted(images, labels):
    return (labels + 1) % CLASSES


def targeted(attack):
    attack.set_mode_targeted_by_function(shifted, quiet=True)
    return attack


def predictions(model, images):
    with torch.no_grad():
        return model(images).argmax(dim=1)


def stadv(model, images, classes, sign, weight, alpha, steps):
    """Return what stAdv gives: Adam on cross entropy and flow loss, at a constant rate."""
    framework = Flow(weight)
    flow = framework.init(images).requires_grad_()
    optimizer = torch.optim.Adam([flow], alpha)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(framework.image(flow, images))
        loss = sign * F.cross_entropy(logits, classes, reduction="sum")
        gradients = torch.autograd.grad(loss + weight * flow_loss(flow).sum(), flow)
        flow.grad = gradients[0]
        optimizer.step()
    return framework.image(flow, images).detach()


@pytest.fixture
def three(data):
    return data[0][:3].double(), data[1][:3]


def test_it_is_a_torchattacks_attack_of_the_models_own(model, data):
    attack = StADV2(model)
    assert isinstance(attack, Attack)
    assert attack.attack == "StADV2"
    assert attack.supported_mode == ["default", "targeted"]
    assert isinstance(attack.interpreter, Gradient)
    attack.steps = 2
    assert attack(*data).shape == data[0].shape


def test_arguments_are_those_of_adv2_but_for_the_framework():
    ours, pixels = (inspect.signature(kind).parameters for kind in (StADV2, ADV2))
    assert list(ours)[:4] == ["model", "interpreter", "flow_weight", "steps"]
    assert set(ours) - set(pixels) == {"flow_weight", "bound"}
    assert set(pixels) - set(ours) == {"eps", "random_start"}
    for name in set(ours) & set(pixels) - {"steps", "alpha", "step"}:
        assert ours[name].default == pixels[name].default
    assert ours["flow_weight"].default == 0.0005  # Table 12


# The regular attack


@pytest.mark.parametrize("mode", ["default", "targeted"])
@pytest.mark.parametrize("interpreter", [CAM, GradCAM, Gradient])
@pytest.mark.parametrize("keep", ["best", "final"])
@pytest.mark.filterwarnings(FLAT_MAPS)
def test_warm_start_alone_is_stadv(trained_smooth, three, mode, interpreter, keep):
    images, labels = three
    settings = {"flow_weight": 1e-3, "alpha": 0.1, "steps": 8}
    attack = StADV2(trained_smooth, interpreter, **settings, warmup=8, keep=keep)
    if mode == "targeted":
        targeted(attack)
    classes, sign = (shifted(images, labels), 1) if mode == "targeted" else (labels, -1)
    expected = stadv(trained_smooth, images, classes, sign, 1e-3, 0.1, 8)
    torch.testing.assert_close(attack(images, labels), expected, rtol=0, atol=1e-6)
    assert (expected - images).abs().max() > 0.05


def test_without_map_term_and_decay_it_is_stadv_too(trained_smooth, three):
    images, labels = three
    attack = StADV2(
        *(trained_smooth, CAM, 0.01, 8),
        alpha=0.1,
        warmup=0,
        prediction=CrossEntropy(rho=0.0),
        interpretation=MapDistance(0.0),
        step=AdamDescent(final=1.0),
        keep="final",
    )
    expected = stadv(trained_smooth, images, shifted(images, labels), 1, 0.01, 0.1, 8)
    torch.testing.assert_close(targeted(attack)(images, labels), expected, rtol=0, atol=1e-6)


def test_the_regular_attack_does_not_hear_the_interpreter(model, data):
    results = [
        targeted(StADV2(model, interpreter, steps=6, warmup=6))(*data)
        for interpreter in (CAM, Gradient)
    ]
    assert torch.equal(*results)
    dual = [
        targeted(StADV2(model, interpreter, steps=6, warmup=2))(*data)
        for interpreter in (CAM, Gradient)
    ]
    assert not torch.equal(*dual)


# What it reaches

# Steps that suffice on the tiny network, with maps nearer than the regular attack's where asked.
REACHES = [
    ("CAM", True),
    ("GradCAM", True),
    ("Gradient", True),
    ("RTS", True),
    ("MASK", False),  # so few iterations of it say little of maps
]


@pytest.mark.parametrize(("name", "nearer"), REACHES)
@pytest.mark.filterwarnings(FLAT_MAPS)
def test_it_reaches_the_class_and_hides_it_from_the_interpreter(model, data, name, nearer):
    images, labels = data
    target, g = shifted(images, labels), BUILD[name](model)
    ours = targeted(StADV2(model, g, alpha=0.2, steps=120))
    fooled = evaluate(model, g, images, ours(images, labels), target)
    assert fooled.success.all()
    if nearer:
        regular = targeted(StADV2(model, g, alpha=0.2, steps=120, warmup=120))
        visible = evaluate(model, g, images, regular(images, labels), target)
        assert visible.success.all()
        assert fooled.l1.mean() < (0.6 if name == "CAM" else 0.8) * visible.l1.mean()


def test_untargeted_success_is_another_class(model, data):
    images, labels = data
    adversarial = StADV2(model, CAM, alpha=0.2, steps=30)(images, labels)
    assert (predictions(model, adversarial) != labels).all()


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("mode", ["default", "targeted"])
@pytest.mark.filterwarnings(FLAT_MAPS)
def test_every_interpreter_the_same_bytes_again(model, data, name, mode):
    attack = StADV2(model, BUILD[name], alpha=0.2, steps=4)
    if mode == "targeted":
        targeted(attack)
    adversarial = attack(*data)
    assert adversarial.shape == data[0].shape
    assert adversarial.isfinite().all()
    assert torch.equal(attack(*data), adversarial)
    assert not torch.equal(adversarial, data[0])


# Images are independent


@pytest.mark.parametrize("name", ["CAM", "GradCAM", "Gradient", "RTS", "MASK"])
@pytest.mark.filterwarnings(FLAT_MAPS)
def test_a_batch_is_attacked_like_its_images(trained_smooth, three, name):
    images, labels = three
    attack = targeted(StADV2(trained_smooth, BUILD[name], alpha=0.1, steps=8))
    together = attack(images, labels)
    alone = [attack(images[i : i + 1], labels[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-6)


# The flow


def variables(model, data, **settings):
    """Return the flows that the framework is asked for on the way."""
    seen = []

    def step(problem, variable, memory):
        seen.append(variable)
        return AdamDescent()(problem, variable, memory)

    targeted(StADV2(model, CAM, **settings, step=step))(*data)
    return seen


@pytest.mark.parametrize("bound", [0.1, 0.5])
def test_no_pixel_goes_further_than_the_bound(model, data, bound):
    seen = variables(model, data, alpha=0.3, steps=10, warmup=0, bound=bound)
    assert max(flow.abs().max() for flow in seen) == bound
    free = variables(model, data, alpha=0.3, steps=10, warmup=0)
    assert max(flow.abs().max() for flow in free) > bound


def test_a_dear_flow_is_smooth(model, data):
    def rough(weight):
        return flow_loss(variables(model, data, flow_weight=weight, alpha=0.2, steps=20)[-1])

    assert (rough(0.1) < 0.5 * rough(0.0)).all()


def test_colours_come_from_nearby(model, data):
    """Sampling invents none: each channel stays within its own range, unlike a perturbation's."""
    images, labels = data
    adversarial = targeted(StADV2(model, CAM, alpha=0.2, steps=10))(images, labels)
    assert (adversarial.amax(dim=(2, 3)) <= images.amax(dim=(2, 3)) + 1e-6).all()
    assert (adversarial.amin(dim=(2, 3)) >= images.amin(dim=(2, 3)) - 1e-6).all()


def test_any_step_rule(model, data):
    adversarial = targeted(StADV2(model, CAM, alpha=0.1, steps=4, step=SignDescent()))(*data)
    assert not torch.equal(adversarial, data[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [(16, 16), (9, 13)])
def test_dtypes_and_odd_sizes(dtype, size):
    net = nn.Sequential(
        *(nn.Conv2d(1, 6, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
    ).to(dtype)
    images = torch.rand(2, 1, *size).to(dtype)
    adversarial = StADV2(net.eval(), CAM, alpha=0.25, steps=4)(images)
    assert adversarial.dtype == dtype
    assert adversarial.shape == images.shape
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1


def test_each_step_is_told_and_counted(model, data):
    told = []
    attack = StADV2(model, CAM, steps=40, callback=told.append)
    attack(*data)
    assert [progress.step for progress in told] == list(range(40))
    assert [bool(progress.distance.isnan().any()) for progress in told] == [True] * 2 + [False] * 38

# SPDX-License-Identifier: MIT
"""StADV2: against its loss written out and stepped by torch.optim.Adam."""

import kornia.geometry.transform
import pytest
import torch
import torch.nn.functional as F
from attack_helpers import shifted, targeted

from captum_adv2 import StADV2
from captum_adv2.attacks import AdamDescent, CrossEntropy, MapDistance, SignDescent
from captum_adv2.attacks.frameworks import Flow, flow_loss
from captum_adv2.interpreters import CAM


def equation_21(model, images, labels, classes, sign, weight, tau=0.01):
    """Return what eight steps of Adam at a constant rate of 0.1 make of the loss."""
    framework, cam = Flow(tau), CAM(model)
    flow = framework.init(images).requires_grad_()
    wanted = cam(images, labels).detach()
    optimizer = torch.optim.Adam([flow], 0.1)
    for _ in range(8):
        moved = framework.image(flow, images)
        apart = (cam(moved, classes) - wanted).square().mean(dim=(2, 3)).sum()
        loss = sign * F.cross_entropy(model(moved), classes, reduction="sum") + weight * apart
        (flow.grad,) = torch.autograd.grad(loss + tau * flow_loss(flow).sum(), flow)
        optimizer.step()
    return framework.image(flow, images).detach()


@pytest.fixture
def three(data):
    return data[0][:3].double(), data[1][:3]


@pytest.mark.parametrize(
    ("warmup", "aimed", "weight"),
    [(8, True, 0.0), (8, False, 0.0), (0, True, 0.0), (0, True, 50.0)],
    ids=["stAdv", "stAdv, untargeted", "stAdv, by the whole loss", "with the map"],
)
def test_it_is_equation_21(trained_smooth, three, warmup, aimed, weight):
    images, labels = three
    attack = StADV2(
        *(trained_smooth, CAM, 0.01, 8),
        alpha=0.1,
        warmup=warmup,
        prediction=CrossEntropy(rho=0.0),
        interpretation=MapDistance(weight, l1=0.0, shape=0.0),
        step=AdamDescent(final=1.0),
        keep="best" if warmup else "final",
    )
    classes, sign = (shifted(*three), 1) if aimed else (labels, -1)
    expected = equation_21(trained_smooth, *three, classes, sign, weight)
    adversarial = (targeted(attack) if aimed else attack)(*three)
    torch.testing.assert_close(adversarial, expected, rtol=0, atol=1e-6)
    assert (adversarial - images).abs().max() > 1e-3


def test_it_reaches_a_class(model, data):
    attack = targeted(StADV2(model, CAM, alpha=0.2, steps=100))
    reached = model(attack(*data)).argmax(dim=1) == shifted(*data)
    assert reached.sum() > 3  # all six in every training tried


@pytest.mark.parametrize("step", [AdamDescent(), SignDescent()])
@pytest.mark.parametrize("bound", [0.1, None])
def test_images_are_warped_once_a_step_within_the_bound(monkeypatch, model, data, step, bound):
    warps, flows, remap = [], [], kornia.geometry.transform.remap

    def noted(problem, variable, memory):
        flows.append(variable)
        return step(problem, variable, memory)

    def counting(*args, **kwargs):
        warps.append(1)
        return remap(*args, **kwargs)

    monkeypatch.setattr(kornia.geometry.transform, "remap", counting)
    counts, images = [], data[0]
    for steps in (6, 12):
        warps.clear()
        attack = StADV2(model, CAM, alpha=0.3, steps=steps, warmup=3, bound=bound, step=noted)
        adversarial = targeted(attack)(*data)
        counts.append(len(warps))
        # Sampling invents no colours: each channel stays within its own range.
        assert (adversarial.amax(dim=(2, 3)) <= images.amax(dim=(2, 3)) + 1e-6).all()
        assert (adversarial.amin(dim=(2, 3)) >= images.amin(dim=(2, 3)) - 1e-6).all()
    assert counts[1] - counts[0] == 6
    assert counts[0] <= 6 + 2  # one more at the end of each phase
    furthest = max(flow.abs().max() for flow in flows)
    assert furthest > 0.1 if bound is None else furthest == pytest.approx(bound)

# SPDX-License-Identifier: MIT
"""Presets against the paper's Tables 11, 12 and the published code's settings, typed once more."""

import math

import pytest
import torch
from conftest import untrained
from targeting import shifted
from torch import nn

from captum_adv2 import ADV2, SoundnessWarning, StADV2
from captum_adv2.attacks import AdamDescent, Candidate, CrossEntropy, Margin, SignDescent, presets
from captum_adv2.attacks.terms import at
from captum_adv2.interpreters import CAM, MASK, RTS, Gradient, Unrolled
from captum_adv2.interpreters.rts import EncoderGuided

INTERPRETERS = {
    "GRAD": Gradient,
    "CAM": CAM,
    "RTS": lambda model: RTS(model, untrained(model)),
    "MASK": MASK,
}
SIZES = {"GRAD": 56, "CAM": 7, "RTS": 56, "MASK": 28}  # of maps, in the code

# On ResNet: n_total, and lambda; MASK has none in Table 11: two steps of their own.
TABLE_11 = {"GRAD": (800, 0.007), "CAM": (1200, 0.204), "RTS": (1200, 0.002), "MASK": (1000, 1.0)}
# The same, and tau.
TABLE_12 = {
    "GRAD": (800, 0.023, 0.0005),
    "CAM": (600, 0.653, 0.0005),
    "MASK": (1000, 500.0, 0.004),
    "RTS": (600, 0.0408, 0.0005),
}
# The published code: steps of the warm start and after it, the weight of a sum half way.
PUBLISHED = {
    "GRAD": (300, 301 + 201 + 101 + 101, 0.004),
    "CAM": (400, 1200, 7.5 / 49),  # of a mean, on 49 pixels
    "RTS": (300, 1000, 7.5 / 49),
    "MASK": (400, 1000, 1.0),
}


def assert_equation_3(term, weight):
    """Check a term half way through: a weight times the plain sum of squares, on 49 pixels."""
    generator = torch.Generator().manual_seed(0)
    maps, goal = torch.rand(2, 3, 1, 7, 7, generator=generator)
    logits, target = torch.randn(3, 5, generator=generator), torch.tensor([0, 1, 4])
    loss = term(Candidate(maps, logits, maps, target, goal, 0.5))
    torch.testing.assert_close(loss, weight * (maps - goal).square().sum(dim=(1, 2, 3)))


def check_surrogate(name, surrogate, **unrolled):
    if name == "RTS":  # lambda_2 of both tables
        assert surrogate == EncoderGuided(weight=0.1)
    else:
        assert surrogate == (Unrolled(n_step=4, n_reset=50, **unrolled) if name == "MASK" else None)


@pytest.mark.parametrize("name", TABLE_11)
def test_paper_is_table_11(model, name):
    steps, weight = TABLE_11[name]
    attack = ADV2.from_preset(model, INTERPRETERS[name], presets.PAPER[name])
    assert (attack.eps, attack.alpha) == (0.031, 1.0 / 255)  # §B1
    assert (attack.steps, attack.warmup) == (steps, 400)  # §3.6
    assert (attack.keep, attack.confidence) == ("final", 0.0)  # the paper does not say
    assert attack.interpretation.map_size == (SIZES[name], SIZES[name])
    assert_equation_3(attack.interpretation, weight)
    check_surrogate(name, attack.surrogate, solved=True)  # Algorithm 1 begins at g(x)
    if name == "MASK":
        assert (attack.step.longest, attack.step.searches) == (0.08, 12)
    else:
        assert attack.step == SignDescent(momentum=0.0, final=1.0)  # Eq. 4
    if name == "GRAD":  # §3.6: rho from 0.05 to 0.01, drawn uniformly
        rho = [at(attack.prediction.rho, progress) for progress in (0.0, 0.5, 1.0)]
        assert rho == pytest.approx([0.05, 0.03, 0.01])
        assert attack.prediction.seed is not None
    else:
        assert attack.prediction == CrossEntropy(rho=0.0)


@pytest.mark.parametrize("name", TABLE_12)
def test_paper_stadv_is_table_12(model, name):
    steps, weight, tau = TABLE_12[name]
    preset = presets.PAPER_STADV[name]
    attack = StADV2.from_preset(model, INTERPRETERS[name], preset, bound=1.0)
    assert (attack.steps, attack.warmup, attack.flow_weight) == (steps, 400, tau)
    assert (attack.alpha, attack.step) == (0.01, AdamDescent((0.9, 0.999), final=1.0))  # §B2
    assert (attack.keep, attack.bound) == ("final", 1.0)
    assert attack.interpretation.map_size == (SIZES[name], SIZES[name])
    assert_equation_3(attack.interpretation, weight)
    check_surrogate(name, attack.surrogate)


@pytest.mark.parametrize("name", PUBLISHED)
def test_official_is_the_published_code(model, name):
    warmup, second, weight = PUBLISHED[name]
    attack = ADV2.from_preset(model, INTERPRETERS[name], presets.OFFICIAL[name])
    assert (attack.eps, attack.alpha) == (0.031, 1.0 / 255)
    assert (attack.warmup, attack.steps) == (warmup, warmup + second)
    assert attack.keep == ("best" if name in ("GRAD", "MASK") else "final")
    assert_equation_3(attack.interpretation, weight)
    check_surrogate(name, attack.surrogate, solved=False, shrink=0.5, count=100)
    if name == "MASK":
        assert (attack.step.stride, attack.step.longest, attack.step.searches) == (0.05, 0.08, 10)
        assert math.log(attack.step.kappa / (1 - attack.step.kappa)) == pytest.approx(10)
        assert attack.prediction == Margin()
        return
    assert attack.step == SignDescent(momentum=0.0, final=1.0)
    assert attack.prediction == CrossEntropy(rho=0.0)
    weights = [at(attack.interpretation.weight, number / second) for number in range(second)]
    if name == "GRAD":
        stages = {0.001: 301, 0.004: 201, 0.01: 101, 0.05: 101}
        assert weights == [weight for weight, length in stages.items() for _ in range(length)]
        assert attack.interpretation.map_size == (56, 56)
        assert attack.confidence == 0.8
    else:
        assert weights == pytest.approx([5 + 5 * number / second for number in range(second)])
        # The paper's weights of a sum are the code's of a mean, at its end or beginning.
        ends = {"CAM": 10.0 / 7**2, "RTS": 5.0 / 56**2}
        assert round(ends[name], 3) == TABLE_11[name][1]


def test_rts_has_a_tenth_of_the_encoders_cross_entropy(model, data):
    images, labels = data
    attack = ADV2.from_preset(model, INTERPRETERS["RTS"], presets.PAPER["RTS"])
    target, surrogate = shifted(images, labels), attack.surrogate
    state = surrogate.init(attack.interpreter, images, target)
    guided = surrogate(attack.interpreter, images, state, 0.0)
    p = model(images).softmax(dim=1)[range(len(images)), target]
    torch.testing.assert_close(guided.penalty, -0.1 * p.log())


def test_overrides_win_and_a_subclass_makes_its_own_kind(model):
    class Mine(ADV2):
        pass

    step = SignDescent(0.5, 0.5)
    attack = Mine.from_preset(model, CAM(model), presets.PAPER["CAM"], steps=7, step=step)
    assert type(attack) is Mine
    assert (attack.steps, attack.step, attack.eps) == (7, step, 0.031)


@pytest.mark.parametrize("name", ["GRAD", "CAM", "RTS"])
def test_a_preset_runs_and_warns_of_another_map_size(model, data, name):
    attack = ADV2.from_preset(model, INTERPRETERS[name], presets.PAPER[name], steps=4, warmup=1)
    with pytest.warns(SoundnessWarning, match=r"chosen for maps of size .* got \(8, 8\)"):
        adversarial = attack(*data)
    assert (adversarial - data[0]).abs().max() <= 0.031 + 1e-6


def test_a_preset_is_quiet_at_its_own_map_size(data):
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)]
    net = nn.Sequential(nn.Conv2d(3, 4, 4, stride=2), nn.SiLU(), *head).eval()  # 7x7 maps
    ADV2.from_preset(net, CAM, presets.PAPER["CAM"], steps=3, warmup=1)(*data)

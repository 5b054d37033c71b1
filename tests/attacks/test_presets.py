# SPDX-License-Identifier: MIT
"""Presets against the paper's Table 11 and the published code's settings, typed a second time."""

import math
import warnings

import pytest
import torch
from captum_adv2.attacks.objectives import at
from conftest import untrained
from torch import nn

from captum_adv2 import ADV2, SoundnessWarning
from captum_adv2.attacks import (
    AdamDescent,
    CrossEntropy,
    Margin,
    SignDescent,
    StADV2,
    TwoPhase,
    presets,
)
from captum_adv2.interpreters import CAM, MASK, RTS, EncoderGuided, Gradient
from captum_adv2.interpreters.bilevel import Unrolled
from captum_adv2.types import Candidate

INTERPRETERS = {
    "GRAD": Gradient,
    "CAM": CAM,
    "RTS": lambda model: RTS(model, untrained(model)),
    "MASK": MASK,
}
TYPES = {"GRAD": Gradient, "CAM": CAM, "RTS": RTS, "MASK": MASK}
EQ_4 = SignDescent(momentum=0.0, final=1.0)  # a constant sign step

# Table 11, ResNet: n_total, lambda (RTS: lambda_1). The maps are 56x56 and 7x7 in the code.
TABLE_11 = {
    "GRAD": (800, 0.007, (56, 56)),
    "CAM": (1200, 0.204, (7, 7)),
    "RTS": (1200, 0.002, (56, 56)),
}

# The published code for GRAD: (weight, steps) of the map term, after a warm start of 300.
GRAD_STAGES = [(0.001, 301), (0.004, 201), (0.01, 101), (0.05, 101)]


def assert_equation_3(term, weight):
    """Check a term half way through: a weight times the plain sum of squares, on 49 pixels."""
    generator = torch.Generator().manual_seed(0)
    maps, goal = torch.rand(2, 3, 1, 7, 7, generator=generator)
    logits, target = torch.randn(3, 5, generator=generator), torch.tensor([0, 1, 4])
    images, rows = torch.zeros(3, 3, 8, 8), torch.arange(3)
    loss = term(Candidate(images, logits, maps, target, goal, 0.5, rows))
    torch.testing.assert_close(loss, weight * (maps - goal).square().sum(dim=(1, 2, 3)))


@pytest.mark.parametrize("name", TABLE_11)
def test_paper_is_table_11(name):
    steps, weight, size = TABLE_11[name]
    preset = presets.PAPER[name]
    assert preset.steps == steps
    assert preset.interpretation.weight == weight
    assert preset.interpretation.map_size == size
    assert_equation_3(preset.interpretation, weight)
    assert (preset.eps, preset.alpha) == (0.031, 1.0 / 255)  # Appendix B1
    assert preset.warmup == 400  # §3.6
    assert (preset.keep, preset.confidence) == ("final", 0.0)  # the paper does not say


def test_only_grad_smooths_labels_in_the_paper():
    for name in ("CAM", "RTS"):
        assert presets.PAPER[name].prediction == CrossEntropy(rho=0.0)
    smoothing = presets.PAPER["GRAD"].prediction  # §3.6: rho from 0.05 to 0.01, drawn uniformly
    assert at(smoothing.rho, 0.0) == pytest.approx(0.05)
    assert at(smoothing.rho, 0.5) == pytest.approx(0.03)
    assert at(smoothing.rho, 1.0) == pytest.approx(0.01)
    assert smoothing.seed is not None


def test_official_cam_is_the_published_code():
    preset = presets.OFFICIAL["CAM"]
    assert (preset.warmup, preset.steps, preset.keep) == (400, 400 + 1200, "final")
    weight = preset.interpretation.weight
    assert [at(weight, progress) for progress in (0.0, 0.5, 1.0)] == [5.0, 7.5, 10.0]
    assert_equation_3(preset.interpretation, 7.5 / 49)


def test_official_rts_is_the_published_code():
    preset = presets.OFFICIAL["RTS"]
    assert (preset.warmup, preset.steps) == (300, 300 + 1000)
    assert (preset.keep, preset.confidence) == ("final", 0.0)
    weight = preset.interpretation.weight
    assert [at(weight, progress) for progress in (0.0, 0.5, 1.0)] == [5.0, 7.5, 10.0]
    assert_equation_3(preset.interpretation, 7.5 / 49)  # a mean over whatever size
    assert preset.interpretation.map_size is None


@pytest.mark.parametrize("table", ["PAPER", "OFFICIAL"])
def test_rts_has_a_tenth_of_the_encoders_cross_entropy(model, data, table):
    preset = getattr(presets, table)["RTS"]
    assert preset.surrogate == EncoderGuided(weight=0.1)  # lambda_2 of Table 11; the code's, too
    images, labels = data
    target = (labels + 1) % 4
    attack = ADV2.from_preset(model, INTERPRETERS["RTS"], preset)
    guided = attack.surrogate(attack.interpreter, images, target)(images)
    p = model(images).softmax(dim=1)[range(len(images)), target]
    torch.testing.assert_close(guided.penalty, -0.1 * p.log())


def test_the_papers_weights_are_the_codes_over_the_pixels():
    assert round(at(presets.OFFICIAL["RTS"].interpretation.weight, 0.0) / 56**2, 3) == 0.002
    assert round(at(presets.OFFICIAL["CAM"].interpretation.weight, 1.0) / 7**2, 3) == 0.204


def test_official_grad_is_the_published_code():
    preset = presets.OFFICIAL["GRAD"]
    second = sum(length for _, length in GRAD_STAGES)
    assert (preset.warmup, preset.steps) == (300, 300 + second)
    assert (preset.keep, preset.confidence) == ("best", 0.8)
    weights = [at(preset.interpretation.weight, number / second) for number in range(second)]
    assert weights == [weight for weight, length in GRAD_STAGES for _ in range(length)]
    assert preset.interpretation.map_size == (56, 56)
    assert_equation_3(preset.interpretation, 0.004)  # half way


def test_paper_mask_is_table_11_and_section_3_6():
    preset = presets.PAPER["MASK"]
    assert (preset.steps, preset.warmup) == (1000, 400)
    assert (preset.surrogate.n_step, preset.surrogate.n_reset) == (4, 50)
    assert preset.surrogate.solved  # Algorithm 1 begins at g(x)
    assert (preset.step.longest, preset.step.searches) == (0.08, 12)
    assert preset.prediction == CrossEntropy(rho=0.0)
    assert preset.interpretation.map_size == (28, 28)
    assert_equation_3(preset.interpretation, 1.0)  # two steps of their own: no lambda
    assert (preset.eps, preset.alpha) == (0.031, 1.0 / 255)


@pytest.mark.parametrize(
    ("name", "steps", "weight", "size", "tau"),
    [
        ("GRAD", 800, 0.023, (56, 56), 0.0005),
        ("CAM", 600, 0.653, (7, 7), 0.0005),
        ("MASK", 1000, 500.0, (28, 28), 0.004),
        ("RTS", 600, 0.0408, (56, 56), 0.0005),
    ],
)
def test_paper_stadv_is_table_12(model, name, steps, weight, size, tau):
    preset = presets.PAPER_STADV[name]
    assert (preset.steps, preset.warmup, preset.flow_weight) == (steps, 400, tau)
    assert preset.interpretation.map_size == size
    assert_equation_3(preset.interpretation, weight)
    assert (preset.alpha, preset.step) == (0.01, AdamDescent((0.9, 0.999), final=1.0))  # §B2
    if name == "MASK":
        assert (preset.surrogate.n_step, preset.surrogate.n_reset) == (4, 50)
    if name == "RTS":
        assert preset.surrogate == EncoderGuided(weight=0.1)
    attack = StADV2.from_preset(model, CAM, preset, bound=1.0)
    assert (attack.flow_weight, attack.alpha, attack.bound) == (tau, 0.01, 1.0)
    assert (attack.steps, attack.step, attack.keep) == (steps, preset.step, "final")


def test_official_mask_is_the_published_code():
    preset = presets.OFFICIAL["MASK"]
    assert (preset.steps, preset.warmup) == (400 + 1000, 400)
    assert (preset.step.stride, preset.step.longest, preset.step.searches) == (0.05, 0.08, 10)
    # A margin of 10 to one other class.
    p = torch.tensor([10.0, 0.0], dtype=torch.float64).softmax(dim=0)[0].item()
    assert preset.step.kappa == pytest.approx(p, abs=1e-12)
    assert math.log(preset.step.kappa / (1 - preset.step.kappa)) == pytest.approx(10)
    assert preset.prediction == Margin()
    assert preset.surrogate == Unrolled(4, 50, solved=False, shrink=0.5, count=100)
    assert preset.keep == "best"
    assert (preset.eps, preset.alpha) == (0.031, 1.0 / 255)


@pytest.mark.parametrize("table", [presets.PAPER, presets.OFFICIAL])
def test_only_mask_is_bilevel(table):
    assert set(table) == set(INTERPRETERS)
    for name, preset in table.items():
        bilevel = isinstance(preset.step, TwoPhase), isinstance(preset.surrogate, Unrolled)
        assert bilevel == ((True,) * 2 if name == "MASK" else (False,) * 2)
        surrogate = EncoderGuided(0.1) if name == "RTS" else None
        assert name == "MASK" or (preset.step, preset.surrogate) == (EQ_4, surrogate)


@pytest.mark.parametrize("name", ["GRAD", "CAM", "RTS"])
def test_the_code_has_no_smoothing_and_the_papers_ball(name):
    preset = presets.OFFICIAL[name]
    assert preset.prediction == CrossEntropy(rho=0.0)
    assert (preset.eps, preset.alpha) == (0.031, 1.0 / 255)


@pytest.mark.parametrize("table", ["PAPER", "OFFICIAL"])
@pytest.mark.parametrize("name", INTERPRETERS)
def test_from_preset_applies_every_setting(model, table, name):
    preset = getattr(presets, table)[name]
    attack = ADV2.from_preset(model, INTERPRETERS[name], preset)
    fields = {"steps", "warmup", "interpretation", "prediction", "keep", "confidence", "eps"}
    for field in fields | {"alpha", "step", "surrogate"}:
        assert getattr(attack, field) == getattr(preset, field), field
    assert isinstance(attack, ADV2)
    assert isinstance(attack.interpreter, TYPES[name])


def test_overrides_win(model):
    attack = ADV2.from_preset(
        model, CAM(model), presets.PAPER["CAM"], steps=7, warmup=2, keep="best", verbose=True
    )
    assert (attack.steps, attack.warmup, attack.keep, attack.verbose) == (7, 2, "best", True)
    assert attack.eps == 0.031
    step = SignDescent(0.5, 0.5)
    assert ADV2.from_preset(model, CAM, presets.PAPER["CAM"], step=step).step == step


def test_a_subclass_makes_its_own_kind(model):
    class Mine(ADV2):
        pass

    assert type(Mine.from_preset(model, CAM, presets.PAPER["CAM"])) is Mine


def test_presets_are_frozen():
    with pytest.raises(AttributeError, match="cannot assign"):
        presets.PAPER["CAM"].steps = 3


@pytest.mark.parametrize("name", ["GRAD", "CAM", "RTS"])
def test_a_preset_runs_and_says_that_its_map_size_differs(model, data, name):
    preset = presets.PAPER[name]
    attack = ADV2.from_preset(model, INTERPRETERS[name], preset, steps=4, warmup=1)
    with pytest.warns(SoundnessWarning, match="belongs to maps of size"):
        adversarial = attack(*data)
    assert (adversarial - data[0]).abs().max() <= 0.031 + 1e-6


def test_a_preset_is_quiet_at_its_own_map_size(data):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)]
        net = nn.Sequential(nn.Conv2d(3, 4, 4, stride=2), nn.SiLU(), *head).eval()  # 7x7 maps
    attack = ADV2.from_preset(net, CAM, presets.PAPER["CAM"], steps=3, warmup=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack(*data)

# SPDX-License-Identifier: MIT
"""Presets against the paper's Tables 11, 12 and the published code's settings, typed once more."""

import math

import pytest
import torch
from conftest import untrained
from torch import nn

from captum_adv2 import ADV2, SoundnessWarning, StADV2
from captum_adv2.attacks import AdamDescent, Candidate, CrossEntropy, SignDescent, presets
from captum_adv2.attacks.terms import Margin, at
from captum_adv2.interpreters import CAM, MASK, RTS, Gradient, Unrolled
from captum_adv2.interpreters.rts import EncoderGuided

BUILD = {
    "GRAD": Gradient,
    "CAM": CAM,
    "RTS": lambda model: RTS(model, untrained(model)),
    "MASK": MASK,
}
# Steps of the warm start, steps in all, weight of a sum half way, size of maps, kept iterate.
ROWS = {
    ("PAPER", "GRAD"): (400, 800, 0.007, 56, "final"),  # Table 11, §3.6
    ("PAPER", "CAM"): (400, 1200, 0.204, 7, "final"),
    ("PAPER", "RTS"): (400, 1200, 0.002, 56, "final"),
    ("PAPER", "MASK"): (400, 1000, 1.0, 28, "final"),  # no lambda: two steps of their own
    ("PAPER_STADV", "GRAD"): (400, 800, 0.023, 56, "final"),  # Table 12
    ("PAPER_STADV", "CAM"): (400, 600, 0.653, 7, "final"),
    ("PAPER_STADV", "RTS"): (400, 600, 0.0408, 56, "final"),
    ("PAPER_STADV", "MASK"): (400, 1000, 500.0, 28, "final"),
    ("PAPER_DENSENET", "RTS"): (400, 1200, 0.008, 56, "final"),
    ("PAPER_STADV_DENSENET", "RTS"): (400, 600, 0.0612, 56, "final"),
    ("PAPER_STADV_DENSENET", "MASK"): (400, 1000, 500.0, 28, "final"),
    ("OFFICIAL", "GRAD"): (300, 300 + 301 + 201 + 101 + 101, 0.004, 56, "best"),
    ("OFFICIAL", "CAM"): (400, 400 + 1200, 7.5 / 49, None, "final"),  # of a mean, on 49 pixels
    ("OFFICIAL", "RTS"): (300, 300 + 1000, 7.5 / 49, None, "final"),
    ("OFFICIAL", "MASK"): (400, 400 + 1000, 1.0, 28, "best"),
}


@pytest.mark.parametrize(("table", "name"), ROWS)
def test_presets_are_the_published_settings(model, table, name):
    warmup, steps, weight, side, keep = ROWS[table, name]
    kind = StADV2 if "STADV" in table else ADV2
    attack = kind.from_preset(model, BUILD[name], getattr(presets, table)[name])
    assert type(attack) is kind
    assert (attack.warmup, attack.steps, attack.keep) == (warmup, steps, keep)
    assert attack.interpretation.map_size == (side and (side, side))
    # The term, half way through, is the plain sum of squares of Eq. 3.
    maps, goal = torch.rand(2, 3, 1, 7, 7)
    candidate = Candidate(maps, torch.randn(3, 5), maps, torch.tensor([0, 1, 4]), goal, 0.5)
    squares = (maps - goal).square().sum(dim=(1, 2, 3))
    torch.testing.assert_close(attack.interpretation(candidate), weight * squares)

    if kind is ADV2:
        assert (attack.eps, attack.alpha) == (0.031, 1.0 / 255)  # §B1
        assert name == "MASK" or attack.step == SignDescent(momentum=0.0, final=1.0)  # Eq. 4
    else:
        tau = 0.005 if "DENSENET" in table else 0.004
        assert attack.flow_weight == (tau if name == "MASK" else 0.0005)
        assert (attack.alpha, attack.step) == (0.01, AdamDescent((0.9, 0.999), final=1.0))  # §B2
    if name == "MASK":  # Algorithm 1 begins at g(x), the code where MASK begins
        assert attack.surrogate == Unrolled(4, 50, table != "OFFICIAL", shrink=0.5, count=100)
    else:  # lambda_2 of both tables
        assert attack.surrogate == (EncoderGuided(weight=0.1) if name == "RTS" else None)
    if name == "GRAD" and table != "OFFICIAL":  # §3.6: drawn uniformly, rho from 0.05 to 0.01
        rho = [at(attack.prediction.rho, progress) for progress in (0.0, 0.5, 1.0)]
        assert rho == pytest.approx([0.05, 0.03, 0.01])
        assert attack.prediction.seed is not None
    elif (table, name) != ("OFFICIAL", "MASK"):
        assert attack.prediction == CrossEntropy(rho=0.0)


def test_details_of_the_published_code():
    grad, mask = presets.OFFICIAL["GRAD"], presets.OFFICIAL["MASK"]
    weight, stages = grad["interpretation"].weight, {0.001: 301, 0.004: 201, 0.01: 101, 0.05: 101}
    expected = [value for value, length in stages.items() for _ in range(length)]
    assert [weight(number / 704) for number in range(704)] == expected
    assert grad["confidence"] == 0.8
    for name, progress, pixels in (("CAM", 1.0, 7**2), ("RTS", 0.0, 56**2)):
        weight = presets.OFFICIAL[name]["interpretation"].weight
        assert [weight(share) for share in (0.0, 0.5, 1.0)] == [5.0, 7.5, 10.0]
        # The paper's weight of a sum is the code's of a mean, at its end or beginning.
        assert round(weight(progress) / pixels, 3) == ROWS["PAPER", name][2]
    assert mask["prediction"] == Margin()
    for step, searches in ((presets.PAPER["MASK"]["step"], 12), (mask["step"], 10)):
        assert (step.stride, step.longest, step.searches) == (0.05, 0.08, searches)
    assert math.log(mask["step"].kappa / (1 - mask["step"].kappa)) == pytest.approx(10)


@pytest.mark.parametrize("name", ["GRAD", "CAM", "RTS"])
def test_a_preset_runs_and_warns_of_another_map_size(model, data, name):
    class Mine(ADV2):
        pass

    attack = Mine.from_preset(model, BUILD[name], presets.PAPER[name], steps=4, warmup=1)
    assert type(attack) is Mine
    with pytest.warns(SoundnessWarning, match=r"chosen for maps of size .* got \(8, 8\)"):
        adversarial = attack(*data)
    assert (adversarial - data[0]).abs().max() <= 0.031 + 1e-6


def test_a_preset_is_quiet_at_its_own_map_size(data):
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)]
    net = nn.Sequential(nn.Conv2d(3, 4, 4, stride=2), nn.SiLU(), *head).eval()  # 7x7 maps
    ADV2.from_preset(net, CAM, presets.PAPER["CAM"], steps=3, warmup=1)(*data)

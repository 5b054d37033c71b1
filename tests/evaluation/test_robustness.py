# SPDX-License-Identifier: MIT
"""Bisection finds the least eps that works, image by image, with few attacks."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torchattacks import PGD
from toys import Brightness, Echo, flat

from captum_adv2 import SoundnessWarning
from captum_adv2.evaluation import robustness
from captum_adv2.evaluation.metrics import wilson
from captum_adv2.evaluation.robustness import LEVELS, Robustness
from captum_adv2.interpreters import CAM

IMAGES = flat(0.499, 0.49, 0.45, 0.2)
ONES = torch.ones(4, dtype=torch.long)


class Brighten:
    """Adds eps to all pixels; notes how many images it was given at each eps."""

    given: ClassVar[dict[float, int]] = {}

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def set_mode_targeted_by_label(self, quiet: bool) -> None:
        assert quiet

    def __call__(self, images: Tensor, target: Tensor) -> Tensor:
        self.given[self.eps] = self.given.get(self.eps, 0) + len(images)
        return (images + self.eps).clamp(0, 1)


def brighten(eps: float) -> Brighten:
    return Brighten(eps)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    Brighten.given.clear()


def test_the_least_level_after_rounding_to_8_bits() -> None:
    model = Brightness()
    found = robustness(model, Echo(model), IMAGES, ONES, threshold=0.05, attack=brighten)
    # Bright is from 128 of 255 on, rounded: 127.2 + 0.3, 124.95 + 2.55, 114.75 + 12.75.
    expected = [LEVELS[1], LEVELS[7], LEVELS[12], math.inf]
    assert found.least.tolist() == pytest.approx(expected)
    assert [round(255 * level, 2) for level in LEVELS[::2]] == [0.25, 0.5, 1, 2, 4, 8, 16]
    assert sum(Brighten.given.values()) <= 4 * len(IMAGES)


@pytest.mark.filterwarnings("ignore:.*no pixel above")
def test_a_map_that_changes_is_not_fooled() -> None:
    model = Brightness()
    found = robustness(model, Echo(model, share=1.0), IMAGES, ONES, attack=brighten)
    assert found.least.isinf().all()  # a bright image's map is above one half, a dark one's is not
    assert robustness(model, Echo(model, 1.0), IMAGES, ONES, iou=0.0, attack=brighten).area == 1


def test_other_levels() -> None:
    model = Brightness()
    levels = [0.001, 0.02, 0.2]
    how = {"threshold": 0.05, "attack": brighten}
    found = robustness(model, Echo(model), IMAGES, ONES, levels=levels, **how)
    assert found.least.tolist() == [0.001, 0.02, 0.2, math.inf]
    for wrong in ([0.2, 0.1], [0.2], [2, 8]):
        with pytest.raises(ValueError, match=r"expected at least two levels in \(0, 1\], rising"):
            robustness(model, Echo(model), IMAGES, ONES, levels=wrong)
    with pytest.raises(TypeError, match="expected a function that makes an attack of an eps"):
        robustness(model, Echo(model), IMAGES, ONES, attack=PGD(model))


def test_labels_in_place_of_targets_are_refused() -> None:
    model = Brightness()
    own = model(IMAGES).argmax(dim=1)
    with pytest.raises(ValueError, match="got the own class of 4 of 4 images"):
        robustness(model, Echo(model), IMAGES, own)


@pytest.mark.filterwarnings("ignore:.*no pixel above")
def test_the_maps_threshold() -> None:
    model = Brightness()
    how = {"iou": 0.0, "attack": brighten}  # bright images' maps have values near one half
    low, high = (
        robustness(model, Echo(model, 1.0), IMAGES, ONES, threshold=each, **how)
        for each in (0.1, 0.5)
    )
    assert low.area < high.area == 1


def test_maps_without_a_pixel_above_the_threshold_are_doubtful() -> None:
    model = Brightness()
    with pytest.warns(SoundnessWarning, match="4 of 4 benign maps have no pixel above"):
        robustness(model, Echo(model), IMAGES, ONES, threshold=0.99, attack=brighten)
    for name in ("iou", "threshold"):
        with pytest.raises(ValueError, match=name):
            robustness(model, Echo(model), IMAGES, ONES, attack=brighten, **{name: 1.0})


def test_an_attack_that_leaves_eps_is_refused() -> None:
    model = Brightness()
    with pytest.raises(ValueError, match=r"to change pixels by at most that, got 0\.[5-8]"):
        robustness(
            model, Echo(model), IMAGES, ONES, threshold=0.05, attack=lambda eps: Brighten(255 * eps)
        )


def test_numbers_of_a_curve() -> None:
    found = Robustness(torch.tensor([1.0, 2.0, 2.0, math.inf]) / 255, (1 / 255, 2 / 255, 4 / 255))
    assert found.shares() == [0.25, 0.75, 0.75]
    assert found.intervals()[1] == wilson(3, 4)
    # Over the logarithm: the area above is half of the first octave's 0.75 and the second's 0.25.
    assert found.area == pytest.approx((0.75 + 0.25) / 2)
    assert found.heights().tolist() == pytest.approx([0, 0.5, 0.5, 1])
    assert "area 0.500 [" in str(found)
    assert "2: 75%" in str(found)


def test_attack_and_classes_by_default(model, data) -> None:
    images, _ = data
    before = torch.random.get_rng_state()
    found, again = (robustness(model, CAM(model), images, steps=6) for _ in range(2))
    assert torch.equal(found.least, again.least)
    assert torch.equal(before, torch.random.get_rng_state())
    assert {*found.least.tolist()} <= {*LEVELS, math.inf}
    labels = model(images).argmax(dim=1)
    with pytest.raises(ValueError, match="target"):
        robustness(model, CAM(model), images, labels + 4, steps=2)

# SPDX-License-Identifier: MIT
"""Attacks on a classifier and its interpreter: the one loop, and its parts (§3.1, 3.6)."""

from captum_adv2.attacks import presets
from captum_adv2.attacks.adv2 import ADV2
from captum_adv2.attacks.frameworks import Framework, LinfBall
from captum_adv2.attacks.objectives import CrossEntropy, Linear, MapDistance, Margin, Stages
from captum_adv2.attacks.run import Progress
from captum_adv2.attacks.steps import Loss, Problem, SignDescent, Step, TwoPhase
from captum_adv2.attacks.targets import Benign

__all__ = [
    "ADV2",
    "Benign",
    "CrossEntropy",
    "Framework",
    "Linear",
    "LinfBall",
    "Loss",
    "MapDistance",
    "Margin",
    "Problem",
    "Progress",
    "SignDescent",
    "Stages",
    "Step",
    "TwoPhase",
    "presets",
]

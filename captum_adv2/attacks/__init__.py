# SPDX-License-Identifier: MIT
"""Attacks on a classifier and its interpreter: the one loop, and its parts (§3.1, 3.6)."""

from captum_adv2.attacks import presets
from captum_adv2.attacks.adaptive import BitDepthADV2, Matching, Squeezing
from captum_adv2.attacks.adv2 import ADV2
from captum_adv2.attacks.frameworks import Flow, Framework, LinfBall, flow_loss, quantize
from captum_adv2.attacks.objectives import CrossEntropy, Linear, MapDistance, Margin, Stages
from captum_adv2.attacks.run import Progress
from captum_adv2.attacks.stadv2 import StADV2
from captum_adv2.attacks.steps import AdamDescent, Loss, Problem, SignDescent, Step, TwoPhase
from captum_adv2.attacks.targets import Benign, RandomClass, RandomPatch

__all__ = [
    "ADV2",
    "AdamDescent",
    "Benign",
    "BitDepthADV2",
    "CrossEntropy",
    "Flow",
    "Framework",
    "Linear",
    "LinfBall",
    "Loss",
    "MapDistance",
    "Margin",
    "Matching",
    "Problem",
    "Progress",
    "RandomClass",
    "RandomPatch",
    "SignDescent",
    "Squeezing",
    "StADV2",
    "Stages",
    "Step",
    "TwoPhase",
    "flow_loss",
    "presets",
    "quantize",
]

# SPDX-License-Identifier: MIT
"""Attacks on a classifier and its interpreter: the one loop, and its parts (§3.1, 3.6)."""

from captum_adv2.attacks import presets
from captum_adv2.attacks.adaptive import BitDepthADV2, Squeezing
from captum_adv2.attacks.adv2 import ADV2, StADV2
from captum_adv2.attacks.blackbox import QueryADV2
from captum_adv2.attacks.frameworks import Framework
from captum_adv2.attacks.queries import Oracle
from captum_adv2.attacks.steps import AdamDescent, SignDescent, TwoPhase
from captum_adv2.attacks.surrogates import TransferADV2
from captum_adv2.attacks.targets import Benign, RandomClass, RandomPatch
from captum_adv2.attacks.terms import Candidate, CrossEntropy, MapDistance

__all__ = [
    "ADV2", "AdamDescent", "Benign", "BitDepthADV2", "Candidate", "CrossEntropy", "Framework",
    "MapDistance", "Oracle", "QueryADV2", "RandomClass", "RandomPatch", "SignDescent", "Squeezing",
    "StADV2", "TransferADV2", "TwoPhase", "presets",
]  # fmt: skip

# SPDX-License-Identifier: MIT
"""Measures, reports and pictures of attacks on classifier and interpreter (§4)."""

from captum_adv2.evaluation import localization, metrics, transfer, visualize
from captum_adv2.evaluation.evaluate import Report, evaluate
from captum_adv2.evaluation.robustness import Robustness, robustness

__all__ = [
    "Report", "Robustness", "evaluate", "localization", "metrics", "robustness", "transfer",
    "visualize",
]  # fmt: skip

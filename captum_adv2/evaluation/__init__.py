# SPDX-License-Identifier: MIT
"""Measures, reports and pictures of attacks on classifier and interpreter (§4)."""

from captum_adv2.evaluation import localization, metrics, transfer, visualize
from captum_adv2.evaluation.evaluate import Report, evaluate
from captum_adv2.evaluation.robustness import robustness

__all__ = [
    "Report", "evaluate", "localization", "metrics", "robustness", "transfer", "visualize",
]  # fmt: skip

# SPDX-License-Identifier: MIT
"""Measures, reports and pictures of attacks on classifier and interpreter (§4)."""

from captum_adv2.evaluation import localization, metrics, transfer, visualize
from captum_adv2.evaluation.evaluate import Report, evaluate

__all__ = ["Report", "evaluate", "localization", "metrics", "transfer", "visualize"]

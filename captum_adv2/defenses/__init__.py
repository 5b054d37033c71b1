# SPDX-License-Identifier: MIT
"""Countermeasures: interpreters that are trained to resist (§5 Q3)."""

from captum_adv2.defenses.aid import Distillation, distill

__all__ = ["Distillation", "distill"]

# SPDX-License-Identifier: MIT
"""Countermeasures: detectors (§4 Q3), and interpreters that are trained to resist (§5 Q3)."""

from captum_adv2.defenses.aid import distill
from captum_adv2.defenses.detection import Detector
from captum_adv2.defenses.ensemble import EnsembleDetector
from captum_adv2.defenses.squeezing import (
    BitDepth,
    FeatureSqueezing,
    MedianSmoothing,
    NonLocalMeans,
)

__all__ = [
    "BitDepth", "Detector", "EnsembleDetector", "FeatureSqueezing", "MedianSmoothing",
    "NonLocalMeans", "distill",
]  # fmt: skip

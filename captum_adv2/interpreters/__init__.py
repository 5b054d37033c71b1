# SPDX-License-Identifier: MIT
"""Interpreters: images and classes to attribution maps, differentiably (§3.2 to 3.5)."""

from captum_adv2.interpreters.base import (
    Direct,
    Interpreter,
    Surrogate,
    detached,
    differentiable_input,
    min_max,
)
from captum_adv2.interpreters.cam import CAM, GradCAM
from captum_adv2.interpreters.captum import CaptumInterpreter
from captum_adv2.interpreters.gradient import (
    Gradient,
    IntegratedGradients,
    SmoothGrad,
    log_odds,
    probability,
)
from captum_adv2.interpreters.relu import h, sigma, smooth_relu, step

__all__ = [
    "CAM",
    "CaptumInterpreter",
    "Direct",
    "GradCAM",
    "Gradient",
    "IntegratedGradients",
    "Interpreter",
    "SmoothGrad",
    "Surrogate",
    "detached",
    "differentiable_input",
    "h",
    "log_odds",
    "min_max",
    "probability",
    "sigma",
    "smooth_relu",
    "step",
]

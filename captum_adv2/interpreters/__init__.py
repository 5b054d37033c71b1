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
from captum_adv2.interpreters.bilevel import FiniteDifference, Follower, Unrolled
from captum_adv2.interpreters.cam import CAM, GradCAM
from captum_adv2.interpreters.captum import CaptumInterpreter
from captum_adv2.interpreters.ensemble import Ensemble
from captum_adv2.interpreters.gradient import (
    Gradient,
    IntegratedGradients,
    SmoothGrad,
    log_odds,
    probability,
)
from captum_adv2.interpreters.mask import MASK, Blur, Noise
from captum_adv2.interpreters.perturbation import (
    FeatureAblation,
    KernelShap,
    Lime,
    Occlusion,
    ShapleyValueSampling,
)
from captum_adv2.interpreters.relu import h, sigma, smooth_relu, step
from captum_adv2.interpreters.rts import RTS, EncoderGuided, MaskingModel
from captum_adv2.interpreters.training import Blend, MaskingLoss, fit, train_masking_model

__all__ = [
    "CAM",
    "MASK",
    "RTS",
    "Blend",
    "EncoderGuided",
    "Ensemble",
    "FeatureAblation",
    "MaskingLoss",
    "MaskingModel",
    "fit",
    "train_masking_model",
    "Blur",
    "CaptumInterpreter",
    "Direct",
    "FiniteDifference",
    "Follower",
    "GradCAM",
    "Gradient",
    "IntegratedGradients",
    "Interpreter",
    "KernelShap",
    "Lime",
    "Noise",
    "Occlusion",
    "ShapleyValueSampling",
    "SmoothGrad",
    "Surrogate",
    "Unrolled",
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

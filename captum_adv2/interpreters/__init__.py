# SPDX-License-Identifier: MIT
"""Interpreters: images and classes to attribution maps, differentiably (§3.2 to 3.5)."""

from captum_adv2.interpreters.attention import AttentionRollout, Relevance
from captum_adv2.interpreters.base import Explanation, Interpreter, Surrogate
from captum_adv2.interpreters.bilevel import FiniteDifference, Unrolled
from captum_adv2.interpreters.cam import CAM, GradCAM
from captum_adv2.interpreters.captum import CaptumInterpreter
from captum_adv2.interpreters.ensemble import Ensemble
from captum_adv2.interpreters.gradient import Gradient, IntegratedGradients, SmoothGrad
from captum_adv2.interpreters.mask import MASK
from captum_adv2.interpreters.opaque import Opaque
from captum_adv2.interpreters.rts import RTS, EncoderGuided, MaskingModel
from captum_adv2.interpreters.training import train_masking_model

__all__ = [
    "CAM",
    "MASK",
    "RTS",
    "AttentionRollout",
    "CaptumInterpreter",
    "EncoderGuided",
    "Ensemble",
    "Explanation",
    "FiniteDifference",
    "GradCAM",
    "Gradient",
    "IntegratedGradients",
    "Interpreter",
    "MaskingModel",
    "Opaque",
    "Relevance",
    "SmoothGrad",
    "Surrogate",
    "Unrolled",
    "train_masking_model",
]

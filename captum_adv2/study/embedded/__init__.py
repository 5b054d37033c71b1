# SPDX-License-Identifier: MIT
"""A generated data set and three small trained networks, so that everything runs offline."""

from captum_adv2.study.embedded.models import (
    SmallResNet,
    load_densenet,
    load_resnet,
    load_rts,
    load_vit,
    small_densenet,
    small_resnet,
    small_vit,
)
from captum_adv2.study.embedded.shapes import CLASSES, Shapes, make_shapes

__all__ = [
    "CLASSES",
    "Shapes",
    "SmallResNet",
    "load_densenet",
    "load_resnet",
    "load_rts",
    "load_vit",
    "make_shapes",
    "small_densenet",
    "small_resnet",
    "small_vit",
]

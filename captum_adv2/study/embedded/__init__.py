# SPDX-License-Identifier: MIT
"""A generated data set and two small trained networks, so that everything runs offline."""

from captum_adv2.study.embedded.models import (
    SmallResNet,
    load_densenet,
    load_resnet,
    load_rts,
    small_densenet,
    small_resnet,
)
from captum_adv2.study.embedded.shapes import CLASSES, Shapes, make_shapes

__all__ = [
    "CLASSES",
    "Shapes",
    "SmallResNet",
    "load_densenet",
    "load_resnet",
    "load_rts",
    "make_shapes",
    "small_densenet",
    "small_resnet",
]

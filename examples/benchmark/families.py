# SPDX-License-Identifier: MIT
"""Networks of torchvision and timm, for `models`: narrow or shallow, where that can be chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kinds import NO_LAYER, Kind
from torch import nn


def torchvision(name: str, **settings: Any) -> Callable[[], nn.Module]:
    """Return what makes a network of torchvision."""

    def plain() -> nn.Module:
        from torchvision import models

        net: nn.Module = getattr(models, name)(num_classes=4, **settings)
        return net

    return plain


def timm(name: str, **settings: Any) -> Callable[[], nn.Module]:
    """Return what makes a network of timm."""

    def plain() -> nn.Module:
        import timm

        net: nn.Module = timm.create_model(name, num_classes=4, **settings)
        return net

    return plain


def grad_checkpointed(plain: Any) -> nn.Module:
    """Turn on timm's activation checkpointing."""
    plain.set_grad_checkpointing(True)
    return plain


_SMALL = (2, 3, 32, 32)
_LARGE = (2, 3, 64, 64)


def vgg() -> nn.Module:
    """Return VGG-11, narrow."""
    from torchvision.models.vgg import VGG, make_layers

    widths: list[Any] = [8, "M", 8, "M", 12, 12, "M", 16, 16, "M", 16, 16, "M"]
    net = VGG(make_layers(widths), num_classes=4, init_weights=False)
    net.classifier = nn.Sequential(nn.Linear(16 * 49, 32), nn.ReLU(), nn.Linear(32, 4))
    return net


def convnext() -> nn.Module:
    """Return ConvNeXt of two stages."""
    from torchvision.models import ConvNeXt
    from torchvision.models.convnext import CNBlockConfig

    return ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 2)], num_classes=4)


def swin() -> nn.Module:
    """Return Swin of two stages."""
    from torchvision.models import SwinTransformer

    return SwinTransformer([2, 2], 8, [1, 1], [2, 2], [2, 2], num_classes=4)


def vit() -> nn.Module:
    """Return a vision transformer of two layers."""
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=4)


_SWIN = {"img_size": 64, "window_size": 2, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)}
_ATTO = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
_GOOGLE = {"aux_logits": False, "init_weights": False}
FAMILIES = [
    Kind("resnet18", torchvision("resnet18"), layer="layer4", shape=_LARGE),
    Kind(
        "densenet121",
        torchvision("densenet121"),
        layer="features",
        head="classifier",
        pooling="adaptive_avg_pool2d",
        shape=_LARGE,
    ),
    Kind("vgg11", vgg, layer="features.19", head="", shape=_LARGE),
    Kind(
        "squeezenet1_1",
        torchvision("squeezenet1_1"),
        layer="features",
        head="classifier.1",
        shape=_LARGE,
    ),
    Kind(
        "mobilenet_v2",
        torchvision("mobilenet_v2"),
        layer="features",
        head="classifier.1",
        shape=_LARGE,
    ),
    Kind(
        "mobilenet_v3_small",
        torchvision("mobilenet_v3_small"),
        layer="features",
        head="",
        shape=_LARGE,
    ),
    Kind(
        "efficientnet_b0",
        torchvision("efficientnet_b0"),
        layer="features",
        head="classifier.1",
        shape=_LARGE,
    ),
    Kind("regnet_y_400mf", torchvision("regnet_y_400mf"), layer="trunk_output", shape=_LARGE),
    Kind("shufflenet_v2_x0_5", torchvision("shufflenet_v2_x0_5"), layer="conv5", shape=_LARGE),
    Kind("googlenet", torchvision("googlenet", **_GOOGLE), layer="inception5b", shape=_LARGE),
    Kind("convnext", convnext, layer="features", head="", shape=_SMALL),
    Kind("swin", swin, layer="norm", head="head", last=True, shape=_SMALL),
    Kind("vit", vit, layer="encoder.layers.encoder_layer_0", head="", first=1, shape=_SMALL),
    Kind("timm resnet18", timm("resnet18"), grad_checkpointed, layer="layer4", shape=_LARGE),
    Kind("timm resnetv2_50", timm("resnetv2_50"), layer="norm", head="head.fc", shape=_LARGE),
    Kind("timm resnet50_clip", timm("resnet50_clip"), **NO_LAYER, shape=_LARGE),
    Kind(
        "timm swin_tiny",
        timm("swin_tiny_patch4_window7_224", **_SWIN),
        layer="norm",
        head="head.fc",
        last=True,
        shape=_LARGE,
    ),
    Kind(
        "timm convnext_atto", timm("convnext_atto", **_ATTO), layer="stages", head="", shape=_LARGE
    ),
    Kind("timm mobilenetv3", timm("mobilenetv3_small_050"), layer="blocks", head="", shape=_LARGE),
    Kind(
        "timm mixer",
        timm("mixer_s32_224", img_size=64),
        layer="norm",
        head="head",
        first=0,
        shape=_LARGE,
    ),
    Kind(
        "timm vit_tiny",
        timm("vit_tiny_patch16_224", img_size=64, depth=2),
        layer="blocks.0",
        head="",
        first=1,
        shape=_LARGE,
    ),
]

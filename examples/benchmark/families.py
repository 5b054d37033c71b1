# SPDX-License-Identifier: MIT
"""Networks of torchvision and timm, for `models`: narrow or shallow, where that can be chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kinds import NO_LAYER, Kind
from torch import nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.vgg import make_layers

LARGE = (2, 3, 64, 64)
SMALL = (2, 3, 32, 32)


def torchvision(name: str, plain: Callable[[], nn.Module] | None = None, **further: Any) -> Kind:
    """Return the kind of a network of torchvision."""
    made = plain or (lambda: getattr(models, name)(num_classes=4))
    return Kind(name, made, **{"shape": LARGE} | further)


def timm(name: str, settings: dict[str, Any], **further: Any) -> Kind:
    """Return the kind of a network of timm, called by the first parts of its name."""

    def plain() -> nn.Module:
        import timm

        net: nn.Module = timm.create_model(name, num_classes=4, **settings)
        return net

    return Kind(f"timm {name.partition('_patch')[0]}", plain, **{"shape": LARGE} | further)


def vgg() -> nn.Module:
    """Return VGG-11, narrow."""
    widths: list[Any] = [8, "M", 8, "M", 12, 12, "M", 16, 16, "M", 16, 16, "M"]
    net = models.VGG(make_layers(widths), num_classes=4, init_weights=False)
    net.classifier = nn.Sequential(nn.Linear(16 * 49, 32), nn.ReLU(), nn.Linear(32, 4))
    return net


def convnext() -> nn.Module:
    """Return ConvNeXt of two stages."""
    stages = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 2)]
    return models.ConvNeXt(stages, num_classes=4)


def swin() -> nn.Module:
    """Return Swin of two stages."""
    return models.SwinTransformer([2, 2], 8, [1, 1], [2, 2], [2, 2], num_classes=4)


def vit() -> nn.Module:
    """Return a vision transformer of two layers."""
    return models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=4)


def googlenet() -> nn.Module:
    """Return GoogLeNet with one head."""
    return models.googlenet(num_classes=4, aux_logits=False, init_weights=False)


def grad_checkpointed(plain: Any) -> nn.Module:
    """Turn on timm's activation checkpointing."""
    plain.set_grad_checkpointing(True)
    return plain


_SWIN = {"img_size": 64, "window_size": 2, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)}
_ATTO = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
_HEAD: dict[str, Any] = {"layer": "features", "head": "classifier.1"}
FAMILIES = [
    torchvision("resnet18", layer="layer4"),
    torchvision("densenet121", layer="features", head="classifier", pooling="adaptive_avg_pool2d"),
    torchvision("vgg11", vgg, layer="features.19", head=""),
    torchvision("squeezenet1_1", **_HEAD),
    torchvision("mobilenet_v2", **_HEAD),
    torchvision("mobilenet_v3_small", layer="features", head=""),
    torchvision("efficientnet_b0", **_HEAD),
    torchvision("regnet_y_400mf", layer="trunk_output"),
    torchvision("shufflenet_v2_x0_5", layer="conv5"),
    torchvision("googlenet", googlenet, layer="inception5b"),
    torchvision("convnext", convnext, layer="features", head="", shape=SMALL),
    torchvision("swin", swin, layer="norm", head="head", last=True, shape=SMALL),
    torchvision("vit", vit, layer="encoder.layers.encoder_layer_0", head="", first=1, shape=SMALL),
    timm("resnet18", {}, spelled=grad_checkpointed, layer="layer4"),
    timm("resnetv2_50", {}, layer="norm", head="head.fc"),
    timm("resnet50_clip", {}, **NO_LAYER),
    timm("swin_tiny_patch4_window7_224", _SWIN, layer="norm", head="head.fc", last=True),
    timm("convnext_atto", _ATTO, layer="stages", head=""),
    timm("mobilenetv3_small_050", {}, layer="blocks", head=""),
    timm("mixer_s32_224", {"img_size": 64}, layer="norm", head="head", first=0),
    timm(
        "vit_tiny_patch16_224",
        {"img_size": 64, "depth": 2},
        layer="blocks.0",
        head="",
        first=1,
    ),
]

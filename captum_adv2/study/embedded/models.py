# SPDX-License-Identifier: MIT
"""Three small networks for the embedded pictures, and masking models, with trained weights.

The networks take pictures ``(B, 3, 64, 64)`` in [0, 1] and return logits ``(B, 10)``; the first
module normalises. Their last feature maps are 8x8: the output of ``1.layer3`` in the residual
network and of ``1.features`` in the densely connected one; the vision transformer has 8x8 tokens.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import DenseNet, VisionTransformer
from torchvision.models.resnet import BasicBlock
from torchvision.transforms import v2

from captum_adv2 import storage
from captum_adv2.interpreters import MaskingModel

_FOLDER = Path(__file__).resolve().parent
_CLASSES = 10


class SmallResNet(nn.Module):
    """A residual network with torchvision's layer names and three stages.

    For 64x64 pictures the stages' outputs are 32x32, 16x16 and 8x8.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 5, stride=2, padding=2, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(BasicBlock(16, 16))
        self.layer2 = _stage(16, 32)
        self.layer3 = _stage(32, 64)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``(B, 10)`` of normalised pictures ``(B, 3, H, W)``."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def _stage(inplanes: int, planes: int) -> nn.Sequential:
    """Return two residual blocks, the first of which halves the resolution."""
    shortcut = nn.Sequential(
        nn.Conv2d(inplanes, planes, 1, stride=2, bias=False), nn.BatchNorm2d(planes)
    )
    return nn.Sequential(BasicBlock(inplanes, planes, 2, shortcut), BasicBlock(planes, planes))


def small_resnet() -> nn.Sequential:
    """Return the residual network with random weights, for pictures in [0, 1]."""
    return nn.Sequential(_normalize(), SmallResNet())


def small_densenet() -> nn.Sequential:
    """Return a small DenseNet of torchvision's with random weights, for pictures in [0, 1].

    For 64x64 pictures its two dense blocks work on 16x16 and 8x8 feature maps.
    """
    net = DenseNet(growth_rate=12, block_config=(4, 6), num_init_features=24, num_classes=_CLASSES)
    return nn.Sequential(_normalize(), net)


def small_vit() -> nn.Sequential:
    """Return a small vision transformer of torchvision's with random weights, for [0, 1].

    It is a hybrid: the stages of `SmallResNet` turn 64x64 pictures into 8x8 features, each of which
    is a token; a class token and four blocks follow.
    """
    net = SmallResNet()
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.layer1, net.layer2, net.layer3)
    vit = VisionTransformer(8, 1, 4, 4, 64, 128, num_classes=_CLASSES)
    vit.conv_proj = nn.Conv2d(64, 64, 1)
    return nn.Sequential(_normalize(), stem, vit)


def _normalize() -> v2.Normalize:
    """Map [0, 1] to about [-1, 1]: the pictures use little of [0, 1], for their contrast is low."""
    return v2.Normalize([0.5] * 3, [0.12] * 3)


def load_resnet() -> nn.Sequential:
    """Return the trained residual network, in evaluation mode."""
    return _load(small_resnet(), "resnet.pt")


def load_densenet() -> nn.Sequential:
    """Return the trained DenseNet, in evaluation mode."""
    return _load(small_densenet(), "densenet.pt")


def load_vit() -> nn.Sequential:
    """Return the trained vision transformer, in evaluation mode."""
    return _load(small_vit(), "vit.pt")


def _load(model: nn.Sequential, file: str) -> nn.Sequential:
    model.load_state_dict(torch.load(_FOLDER / file, map_location="cpu", weights_only=True))
    return model.eval()


def load_rts(encoder: nn.Module, name: str = "resnet") -> MaskingModel:
    """Return a trained masking model, in evaluation mode.

    Args:
        encoder: The residual network, as `load_resnet` returns it, also for the DenseNet.
        name: ``"resnet"`` explains the residual network, ``"densenet"`` the DenseNet;
            ``"resnet-aid"`` and ``"densenet-aid"`` are trained to resist ADV2.
    """
    if storage.digest(encoder) != storage.digest(load_resnet()):
        raise ValueError(
            "expected the residual network of load_resnet() as the encoder, got another network, "
            "or other weights; cast it later, or train a masking model for yours"
        )
    return MaskingModel.load(_FOLDER / f"rts-{name}.pt", encoder)

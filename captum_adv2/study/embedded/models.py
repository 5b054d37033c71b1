# SPDX-License-Identifier: MIT
"""Two small networks for the embedded data set, and masking models, with their trained weights.

Both take pictures (N, 3, 64, 64) in [0, 1] and return scores (N, 10); normalisation is part of the
model. Their last feature maps are 8x8: the output of `1.layer3` in the residual network and of
`1.features` in the densely connected one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torchvision.models import DenseNet  # type: ignore[import-untyped,unused-ignore]

from captum_adv2.interpreters import MaskingModel

__all__ = [
    "Normalize",
    "SmallResNet",
    "load_densenet",
    "load_resnet",
    "load_rts",
    "small_densenet",
    "small_resnet",
]

_FOLDER = Path(__file__).resolve().parent
_CLASSES = 10


class Normalize(nn.Module):
    """Map pictures in [0, 1] to the range in which the networks were trained, about [-1, 1].

    The standard values fit the data set, which uses little of [0, 1] because its contrast is low.
    """

    def __init__(self, mean: float = 0.5, std: float = 0.12) -> None:
        """Keep the two constants.

        Args:
            mean: subtracted from every value.
            std: divides the difference, must not be zero.
        """
        super().__init__()
        if std == 0.0:
            raise ValueError("expected a non-zero std, got 0; pass the spread of the pixel values")
        self.mean = mean
        self.std = std

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the normalised pictures; the input is left as it is."""
        return (images - self.mean) / self.std


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions with a skip connection; one in-place ReLU module serves both."""

    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, inplanes, H, W) to (N, planes, H / stride, W / stride)."""
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        result: torch.Tensor = self.relu(out)
        return result


def _stage(inplanes: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    """Stack residual blocks, the first of which changes the width and the resolution."""
    first = _BasicBlock(inplanes, planes, stride)
    rest = (_BasicBlock(planes, planes, 1) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


class SmallResNet(nn.Module):
    """A residual network with torchvision's layer names and three stages.

    For 64x64 pictures the stages' outputs are 32x32, 16x16 and 8x8.
    """

    def __init__(
        self,
        num_classes: int = _CLASSES,
        widths: tuple[int, int, int] = (16, 32, 64),
        blocks: tuple[int, int, int] = (1, 2, 2),
    ) -> None:
        """Build the network with random weights.

        Args:
            num_classes: number of scores.
            widths: channels of the three stages.
            blocks: residual blocks in the three stages.
        """
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 5, 2, 2, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(widths[0], widths[0], blocks[0], 1)
        self.layer2 = _stage(widths[0], widths[1], blocks[1], 2)
        self.layer3 = _stage(widths[1], widths[2], blocks[2], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[2], num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map normalised pictures (N, 3, H, W) to scores (N, num_classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        scores: torch.Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return scores


def small_resnet() -> nn.Sequential:
    """Build the residual network with random weights; it takes pictures in [0, 1]."""
    return nn.Sequential(Normalize(), SmallResNet())


def small_densenet() -> nn.Sequential:
    """Build a small torchvision DenseNet with random weights; it takes pictures in [0, 1].

    For 64x64 pictures its two dense blocks work on 16x16 and 8x8 feature maps.
    """
    net = DenseNet(growth_rate=12, block_config=(4, 6), num_init_features=24, num_classes=_CLASSES)
    return nn.Sequential(Normalize(), net)


def _load(model: nn.Sequential, path: Path) -> nn.Sequential:
    """Fill a model with a checkpoint's float16 weights and switch it to evaluation."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state)
    return model.eval()


def load_resnet() -> nn.Sequential:
    """Return the trained residual network, in evaluation mode, on the CPU, in float32."""
    return _load(small_resnet(), _FOLDER / "resnet.pt")


def load_densenet() -> nn.Sequential:
    """Return the trained DenseNet, in evaluation mode, on the CPU, in float32."""
    return _load(small_densenet(), _FOLDER / "densenet.pt")


def load_rts(encoder: nn.Module, name: str = "resnet") -> MaskingModel:
    """Return a trained masking model, in evaluation mode.

    Args:
        encoder: The residual network, as `load_resnet` returns it.
        name: ``"resnet"`` explains the residual network, ``"resnet-aid"`` is trained to resist
            ADV2, ``"densenet"`` explains the DenseNet.
    """
    return MaskingModel.load(_FOLDER / f"rts-{name}.pt", encoder)

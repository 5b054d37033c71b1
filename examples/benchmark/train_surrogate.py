# SPDX-License-Identifier: MIT
"""Train a ResNet-44 on CIFAR-10: an attacker's own second surrogate for ``blackbox.py``.

    python examples/benchmark/train_surrogate.py --out resnet44_cifar10.pt

It starts from ResNet-56 without the last two blocks of each stage, or from random weights
(``--scratch``), and is trained on 8,000 pictures, flipped and shifted at random.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from real import FOLDER, NORMALIZE, CifarResNet
from torch import nn
from torchvision.transforms import v2

SHIFT = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])


def cut(folder: Path) -> CifarResNet:
    """Return ResNet-56 without the last two blocks of each stage."""
    net = CifarResNet(7)
    weights = torch.load(folder / "resnet56_cifar10.pt", weights_only=True)
    known = net.state_dict()
    net.load_state_dict({name: value for name, value in weights.items() if name in known})
    return net


def accuracy(model: nn.Module, folder: Path) -> float:
    """Return the share of the 1,000 test pictures that a model gets right."""
    data = torch.load(folder / "cifar10_dev.pt", weights_only=True)
    images = data["images"].float() / 255
    with torch.no_grad():
        found = torch.cat([model.eval()(part).argmax(dim=1) for part in images.split(100)])
    return (found == data["labels"]).float().mean().item()


def train(model: nn.Module, epochs: int, rate: float, folder: Path, count: int) -> None:
    """Train a model in place by SGD with a one-cycle learning rate."""
    torch.manual_seed(0)
    data = torch.load(folder / "cifar10_train.pt", weights_only=True)
    order = torch.randperm(len(data["labels"]))[:count]
    images, labels = data["images"][order].float() / 255, data["labels"][order].long()
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), rate, 0.9, weight_decay=5e-4, nesterov=True)
    steps = epochs * -(-len(images) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    for epoch in range(epochs):
        model.train()
        for rows in torch.randperm(len(images)).split(128):
            pictures = torch.stack([SHIFT(images[row]) for row in rows])
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(pictures.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: accuracy {accuracy(model, folder):.1%}", flush=True)


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("resnet44_cifar10.pt"), help="file")
    parser.add_argument("--epochs", type=int, default=2, help="passes over the pictures (2)")
    parser.add_argument("--rate", type=float, default=0.05, help="highest learning rate (0.05)")
    parser.add_argument("--scratch", action="store_true", help="start from random weights")
    parser.add_argument("--real", type=Path, default=FOLDER, help="folder of models and pictures")
    parser.add_argument("--smoke", action="store_true", help="one pass over 200 pictures")
    args = parser.parse_args()
    if args.smoke:
        args.epochs = 1
    model = nn.Sequential(NORMALIZE, CifarResNet(7) if args.scratch else cut(args.real))
    train(model, args.epochs, args.rate, args.real, 200 if args.smoke else 8000)
    torch.save(model[1].state_dict(), args.out)


if __name__ == "__main__":
    main()

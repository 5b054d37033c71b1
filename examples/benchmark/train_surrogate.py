# SPDX-License-Identifier: MIT
"""Train a ResNet-44 on CIFAR-10: an attacker's own second surrogate for ``blackbox.py``.

    python examples/benchmark/train_surrogate.py --out resnet44_cifar10.pt

SGD with a one-cycle learning rate on the 8,000 training pictures, flipped and shifted at random.
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


def accuracy(model: nn.Module, folder: Path) -> float:
    """Return the share of the 1,000 test pictures that a model gets right."""
    data = torch.load(folder / "cifar10_dev.pt", weights_only=True)
    with torch.no_grad():
        found = [
            model.eval()(part.float() / 255).argmax(dim=1) for part in data["images"].split(100)
        ]
    return (torch.cat(found) == data["labels"]).float().mean().item()


def train(epochs: int, folder: Path, count: int, batch: int = 128) -> nn.Module:
    """Return a trained ResNet-44, in eval mode."""
    torch.manual_seed(0)
    data = torch.load(folder / "cifar10_train.pt", weights_only=True)
    images, labels = data["images"][:count].float() / 255, data["labels"][:count].long()
    model = nn.Sequential(NORMALIZE, CifarResNet(7)).to(memory_format=torch.channels_last)
    steps = epochs * -(-len(images) // batch)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, steps)
    for epoch in range(epochs):
        model.train()
        for rows in torch.randperm(len(images)).split(batch):
            pictures = torch.stack([SHIFT(images[row]) for row in rows])
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(pictures.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: accuracy {accuracy(model, folder):.1%}", flush=True)
    return model.eval()


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("resnet44_cifar10.pt"), help="file")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the pictures (10)")
    parser.add_argument("--real", type=Path, default=FOLDER, help="folder of models and pictures")
    parser.add_argument("--smoke", action="store_true", help="one pass over 200 pictures")
    args = parser.parse_args()
    epochs, count = (1, 200) if args.smoke else (args.epochs, 8000)
    torch.save(train(epochs, args.real, count)[1].state_dict(), args.out)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: MIT
"""Train the embedded networks and write their checkpoints.

    python examples/train_embedded.py --out networks            # all three, about 25 minutes
    python examples/train_embedded.py --out networks --model resnet --epochs 5
    python examples/train_embedded.py --smoke                   # seconds, into a temporary folder

The accuracy printed at the end is that of the checkpoint on disk, on pictures from another seed.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from captum_adv2.study.embedded import (
    Shapes,
    load_resnet,
    make_shapes,
    small_densenet,
    small_resnet,
    small_vit,
)


class Plan(NamedTuple):
    """A network and its training: passes over the pictures, and the largest learning rate."""

    build: Callable[[], nn.Sequential]
    epochs: int = 12
    rate: float = 5e-3


def stemmed_vit() -> nn.Sequential:
    """Return the vision transformer on the stages of the trained residual network, frozen."""
    model, trained = small_vit(), load_resnet()[1]
    parts = [trained.conv1, trained.bn1, trained.relu]
    parts += [trained.layer1, trained.layer2, trained.layer3]
    model[1].load_state_dict(nn.Sequential(*parts).state_dict())
    model[1].requires_grad_(False)
    return model


PLANS = {
    "resnet": Plan(small_resnet),
    "densenet": Plan(small_densenet),
    "vit": Plan(stemmed_vit, epochs=2, rate=2e-3),
}
TEST_SEED = 1_000_003  # far from the small seeds of training and of the examples
BATCH = 64


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip or turn a whole batch ``(B, 3, H, W)`` at random; no class depends on orientation."""
    flip, turns = torch.randint(4, (2,), generator=generator).tolist()
    return torch.rot90(images.flip(-1) if flip % 2 else images, turns, (-2, -1))


def train(
    model: nn.Sequential, data: Shapes, epochs: int, rate: float, seed: int, name: str
) -> None:
    """Train a model in place with AdamW and a one-cycle schedule."""
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(data.labels) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=rate, total_steps=steps, pct_start=0.25
    )
    # Convolutions run faster on this layout on most processors.
    model.to(memory_format=torch.channels_last).train()
    with tqdm(total=steps, desc=name, unit="batch") as progress:
        for _ in range(epochs):
            order = torch.randperm(len(data.labels), generator=generator)
            for chosen in torch.split(order[: steps // epochs * BATCH], BATCH):
                images = augment(data.images[chosen], generator)
                logits = model(images.contiguous(memory_format=torch.channels_last))
                loss = F.cross_entropy(logits, data.labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.update()
                progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def save(model: nn.Sequential, path: Path) -> None:
    """Write the weights, rounded to float16 to keep the repository small."""
    state = {
        key: (value.half() if value.is_floating_point() else value).contiguous()
        for key, value in model.state_dict().items()
    }
    torch.save(state, path)


@torch.no_grad()
def accuracy(model: nn.Sequential, data: Shapes) -> float:
    """Return the share of pictures whose highest logit is the right class."""
    predicted = torch.cat([model(images).argmax(1) for images in torch.split(data.images, BATCH)])
    return float((predicted == data.labels).float().mean())


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the embedded networks.")
    parser.add_argument("--model", choices=[*PLANS, "all"], default="all")
    parser.add_argument("--pictures", type=int, default=10_000, help="pictures to train on")
    parser.add_argument("--tested", type=int, default=2_000, help="pictures to test on")
    parser.add_argument("--epochs", type=int, help="passes over the pictures")
    parser.add_argument("--seed", type=int, default=0, help="pictures, weights and batch order")
    parser.add_argument("--out", type=Path, help="folder for the checkpoints")
    parser.add_argument("--smoke", action="store_true", help="tiny run into a temporary folder")
    args = parser.parse_args()
    if args.smoke:
        args.pictures, args.tested, args.epochs = 200, 100, 1
        args.out = args.out or Path(tempfile.mkdtemp(prefix="embedded-"))
    elif args.out is None:
        parser.error("expected --out FOLDER")
    return args


def main() -> None:
    """Train the networks named on the command line."""
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    data = make_shapes(args.pictures, seed=args.seed)
    test = make_shapes(args.tested, seed=TEST_SEED)
    for name in PLANS if args.model == "all" else (args.model,):
        torch.manual_seed(args.seed)
        build, epochs, rate = PLANS[name]
        model, path = build(), args.out / f"{name}.pt"
        train(model, data, args.epochs or epochs, rate, args.seed, name)
        save(model, path)
        reloaded = build()
        reloaded.load_state_dict(torch.load(path, weights_only=True))
        share = accuracy(reloaded.eval(), test)
        print(f"{name}: test accuracy {share:.2%} on {args.tested} pictures, {path}")


if __name__ == "__main__":
    main()

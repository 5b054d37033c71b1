# SPDX-License-Identifier: MIT
"""Train the two embedded networks and write their checkpoints.

    python captum_adv2/study/embedded/train.py                  # both, about 20 minutes
    python captum_adv2/study/embedded/train.py --model resnet --epochs 5 --out /tmp/models
    python captum_adv2/study/embedded/train.py --smoke          # a few seconds, into a temporary folder

The accuracy printed at the end is that of the checkpoint on disk, on pictures from another seed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from captum_adv2.study.embedded.models import small_densenet, small_resnet
from captum_adv2.study.embedded.shapes import Shapes, make_shapes

_FOLDER = Path(__file__).resolve().parent
_BUILDERS: dict[str, Callable[[], nn.Sequential]] = {
    "resnet": small_resnet,
    "densenet": small_densenet,
}
# Far from the small seeds that training and the examples use.
_TEST_SEED = 1_000_003
_BATCH = 64


class _Plan(NamedTuple):
    """How much to train: pictures to learn from, pictures to test on and epochs."""

    train_count: int
    test_count: int
    epochs: int


_FULL = _Plan(train_count=10_000, test_count=2_000, epochs=12)
_SMOKE = _Plan(train_count=200, test_count=100, epochs=1)


def _augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Flip or turn a whole batch (N, 3, H, W) at random; no class depends on orientation."""
    flip, turns = torch.randint(4, (2,), generator=generator).tolist()
    if flip % 2:
        images = images.flip(-1)
    return torch.rot90(images, turns, (-2, -1))


def _train(model: nn.Sequential, data: Shapes, epochs: int, seed: int, name: str) -> None:
    """Train a model in place with AdamW and a one-cycle schedule."""
    generator = torch.Generator().manual_seed(seed)
    batches = len(data.labels) // _BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=5e-3, total_steps=epochs * batches, pct_start=0.25
    )
    # Convolutions run faster on this layout on most processors.
    model.to(memory_format=torch.channels_last)
    model.train()
    progress = tqdm(total=epochs * batches, desc=name, unit="batch")
    for _ in range(epochs):
        order = torch.randperm(len(data.labels), generator=generator)
        for chosen in torch.split(order[: batches * _BATCH], _BATCH):
            images = _augment(data.images[chosen], generator)
            scores = model(images.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(scores, data.labels[chosen])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            progress.update()
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    progress.close()


def _save(model: nn.Sequential, path: Path) -> None:
    """Write the weights, rounded to float16 to keep the repository small."""
    state = {
        key: (value.half() if value.is_floating_point() else value).contiguous()
        for key, value in model.state_dict().items()
    }
    torch.save(state, path)


@torch.no_grad()
def _accuracy(model: nn.Sequential, data: Shapes) -> float:
    """Return the share of pictures whose highest score is the right class."""
    model.eval()
    predicted = torch.cat([model(images).argmax(1) for images in torch.split(data.images, _BATCH)])
    return float((predicted == data.labels).float().mean())


def _run(name: str, plan: _Plan, data: Shapes, seed: int, out: Path) -> None:
    """Train one network, write its checkpoint and print how good the written file is."""
    torch.manual_seed(seed)
    model = _BUILDERS[name]()
    _train(model, data, plan.epochs, seed, name)
    path = out / f"{name}.pt"
    _save(model, path)
    reloaded = _BUILDERS[name]()
    reloaded.load_state_dict(torch.load(path, weights_only=True))
    test = make_shapes(plan.test_count, seed=_TEST_SEED)
    kilobytes = path.stat().st_size / 1000
    print(
        f"{name}: test accuracy {_accuracy(reloaded, test):.2%} on {plan.test_count} pictures, "
        f"{kilobytes:.0f} kB in {path}"
    )


def _parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the embedded networks.")
    parser.add_argument("--model", choices=[*_BUILDERS, "both"], default="both")
    parser.add_argument("--epochs", type=int, help="passes over the training pictures")
    parser.add_argument("--seed", type=int, default=0, help="pictures, weights and batch order")
    parser.add_argument("--out", type=Path, help="folder for the checkpoints (default: here)")
    parser.add_argument("--smoke", action="store_true", help="tiny run into a temporary folder")
    arguments = parser.parse_args()
    if arguments.epochs is not None and arguments.epochs < 1:
        parser.error(f"expected --epochs >= 1, got {arguments.epochs}; one epoch is the least")
    if not 0 <= arguments.seed < _TEST_SEED:
        parser.error(f"expected --seed in [0, {_TEST_SEED}), got {arguments.seed}; use a small one")
    return arguments


def main() -> None:
    """Train the networks named on the command line."""
    arguments = _parse_arguments()
    plan = _SMOKE if arguments.smoke else _FULL
    if arguments.epochs is not None:
        plan = plan._replace(epochs=arguments.epochs)
    names = list(_BUILDERS) if arguments.model == "both" else [arguments.model]
    out = arguments.out
    if out is None:
        out = Path(tempfile.mkdtemp(prefix="embedded-")) if arguments.smoke else _FOLDER
    out.mkdir(parents=True, exist_ok=True)
    print(f"drawing {plan.train_count} pictures")
    data = make_shapes(plan.train_count, seed=arguments.seed)
    for name in names:
        _run(name, plan, data, arguments.seed, out)


if __name__ == "__main__":
    main()

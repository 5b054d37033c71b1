# SPDX-License-Identifier: MIT
"""Train masking models: RTS, and RTS^A, which resists ADV2 (adversarial distillation, §A5).

    python examples/train_rts.py resnet                    # the classifier as encoder, 20 minutes
    python examples/train_rts.py densenet                  # another network as encoder
    python examples/train_rts.py cifar10                   # ResNet-20, on photographs
    python examples/train_rts.py resnet --own              # RTS^A has its own encoder, too
    python examples/train_rts.py resnet --smoke            # a few seconds

Writes ``rts-NAME.pt`` and ``rts-NAME-aid.pt``; the package's own (`load_rts`) were trained like
this. With ``--checkpoints FOLDER`` a run that was interrupted resumes where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from benchmark.real import DEVICE, FOLDER, cifar_resnet
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from captum_adv2.defenses import distill
from captum_adv2.interpreters import MaskingModel, train_masking_model
from captum_adv2.study.embedded import load_densenet, load_resnet, make_shapes


class Plan(NamedTuple):
    """Networks, data and duration of a training.

    Attributes:
        models: Gives classifier and encoder; one object if the classifier is the encoder.
        data: Gives images ``(N, 3, H, W)`` in [0, 1] and labels ``(N,)``.
        epochs: Epochs of RTS.
        aid_epochs: Epochs of RTS^A; 0 trains none.
        width: Width of the decoder; see `MaskingModel`.
    """

    models: Callable[[Path], tuple[nn.Module, nn.Module]]
    data: Callable[[Path], tuple[Tensor, Tensor]]
    epochs: int
    aid_epochs: int = 0
    width: int | None = None


def shapes(folder: Path) -> tuple[Tensor, Tensor]:
    """Return the embedded data."""
    return make_shapes(4000, seed=0)[:2]


def photographs(folder: Path) -> tuple[Tensor, Tensor]:
    """Return photographs of CIFAR-10."""
    data = torch.load(folder / "cifar10_train.pt", weights_only=True)
    return data["images"].float() / 255, data["labels"].long()


PLANS = {
    "resnet": Plan(lambda _: (load_resnet(),) * 2, shapes, epochs=20, aid_epochs=3),
    "densenet": Plan(lambda _: (load_densenet(), load_resnet()), shapes, epochs=10, aid_epochs=3),
    "cifar10": Plan(
        lambda folder: (cifar_resnet(20, folder),) * 2,
        photographs,
        epochs=8,
        aid_epochs=2,
        width=48,
    ),
}

OWN = {"encoder": "own", "goal": "absent", "select": 1.0, "steps": 3, "alpha": 4 / 255, "lr": 1e-3}


def train(name: str, args: argparse.Namespace) -> None:
    """Carry out a plan."""
    plan = PLANS[name]
    model, encoder = (network.to(DEVICE) for network in plan.models(args.real))
    images, labels = plan.data(args.real)
    if args.smoke:
        plan = plan._replace(epochs=1, aid_epochs=min(1, plan.aid_epochs))
        images, labels = images[:64], labels[:64]
    data, stem = TensorDataset(images, labels), f"rts-{name}"
    torch.manual_seed(args.seed)
    masking_model = MaskingModel(encoder, width=plan.width, image_shape=images.shape[1:])

    def loader(batch: int) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(data, batch_size=batch, shuffle=True, drop_last=True)

    def settings(title: str, epochs: int) -> dict[str, object]:
        checkpoint = args.checkpoints and args.checkpoints / f"{title}.training"
        common = {"seed": args.seed, "verbose": not args.quiet}
        return common | {"epochs": epochs, "checkpoint": checkpoint}

    train_masking_model(model, loader(64), masking_model, **settings(stem, plan.epochs))
    write(masking_model, args.out / f"{stem}.pt")
    if plan.aid_epochs:
        title = f"{stem}-own" if args.own else f"{stem}-aid"
        hardened = settings(title, plan.aid_epochs) | (OWN if args.own else {})
        write(distill(model, loader(32), masking_model, **hardened), args.out / f"{title}.pt")


def write(masking_model: MaskingModel, path: Path) -> None:
    """Save a masking model."""
    masking_model.save(path)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    """Train the masking models named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("plans", nargs="+", choices=PLANS, help="networks to train for")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and attacks")
    parser.add_argument("--real", type=Path, default=FOLDER, help="folder of models and pictures")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the masking models")
    parser.add_argument("--checkpoints", type=Path, help="folder for checkpoints")
    parser.add_argument("--own", action="store_true", help="RTS^A trains a copy of the encoder")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--smoke", action="store_true", help="a tiny run")
    args = parser.parse_args()
    for folder in filter(None, (args.out, args.checkpoints)):
        folder.mkdir(parents=True, exist_ok=True)
    for name in args.plans:
        train(name, args)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: MIT
"""Train masking models: RTS, and RTS^A, which resists ADV2 (adversarial distillation, §A5).

    python examples/train_rts.py resnet                    # the two committed ones, 20 minutes
    python examples/train_rts.py densenet                  # the third: another network's encoder
    python examples/train_rts.py cifar10 --out models      # ResNet-20, from real pictures
    python examples/train_rts.py resnet --smoke            # a few seconds, into a temporary folder

Writes ``rts-NAME.pt`` and ``rts-NAME-aid.pt``. With ``--checkpoints FOLDER`` a run that was killed
goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from captum_adv2.defenses import distill
from captum_adv2.interpreters import MaskingModel, train_masking_model

sys.path.insert(0, str(Path(__file__).resolve().parent / "benchmark"))

from real import FOLDER, cifar_resnet

from captum_adv2.study.embedded.models import load_densenet, load_resnet
from captum_adv2.study.embedded.shapes import make_shapes

HERE = Path(__file__).resolve().parent


class Plan(NamedTuple):
    """What to train on, and for how long.

    Attributes:
        models: Classifier and encoder; one object where the classifier is the encoder.
        data: Images ``(N, 3, H, W)`` in [0, 1] and labels ``(N,)``.
        epochs: Of RTS.
        aid_epochs: Of RTS^A; 0 trains none.
        width: Of the decoder; see `MaskingModel`.
    """

    models: Callable[[Path], tuple[nn.Module, nn.Module]]
    data: Callable[[Path], tuple[Tensor, Tensor]]
    epochs: int
    aid_epochs: int = 0
    width: int | None = None


def _embedded(folder: Path) -> tuple[nn.Module, nn.Module]:
    model = load_resnet()
    return model, model


def _densenet(folder: Path) -> tuple[nn.Module, nn.Module]:
    return load_densenet(), load_resnet()


def _cifar10(folder: Path) -> tuple[nn.Module, nn.Module]:
    model = cifar_resnet(20, folder)
    return model, model


def _shapes(folder: Path) -> tuple[Tensor, Tensor]:
    shapes = make_shapes(4000, seed=0)
    return shapes.images, shapes.labels


def _photographs(folder: Path) -> tuple[Tensor, Tensor]:
    data = torch.load(folder / "cifar10_train.pt", weights_only=True)
    return data["images"].float() / 255, data["labels"].long()


PLANS = {
    "resnet": Plan(_embedded, _shapes, epochs=20, aid_epochs=3),
    "densenet": Plan(_densenet, _shapes, epochs=10),
    "cifar10": Plan(_cifar10, _photographs, epochs=8, aid_epochs=2, width=48),
}


def train(name: str, args: argparse.Namespace) -> None:
    """Train what a plan says and write it."""
    plan = PLANS[name]
    model, encoder = plan.models(args.real)
    images, labels = plan.data(args.real)
    if args.smoke:
        plan = plan._replace(epochs=1, aid_epochs=min(1, plan.aid_epochs))
        images, labels = images[:64], labels[:64]
    data = TensorDataset(images, labels)
    torch.manual_seed(args.seed)
    masking_model = MaskingModel(encoder, width=plan.width, image_shape=images.shape[1:])
    common = {"seed": args.seed, "verbose": not args.quiet}

    def write(title: str, found: MaskingModel) -> None:
        found.save(args.out / f"{title}.pt")
        size = (args.out / f"{title}.pt").stat().st_size / 1000
        print(f"{title}: {size:.0f} kB in {args.out}")

    def checkpoint(title: str) -> Path | None:
        return args.checkpoints and args.checkpoints / f"{title}.training"

    title = f"rts-{name}"
    train_masking_model(
        model,
        DataLoader(data, batch_size=64, shuffle=True, drop_last=True),
        masking_model,
        epochs=plan.epochs,
        checkpoint=checkpoint(title),
        **common,
    )
    write(title, masking_model)
    if plan.aid_epochs:
        hardened = distill(
            model,
            DataLoader(data, batch_size=32, shuffle=True, drop_last=True),
            masking_model,
            epochs=plan.aid_epochs,
            checkpoint=checkpoint(f"{title}-aid"),
            **common,
        )
        write(f"{title}-aid", hardened)


def main() -> None:
    """Train the masking models named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("plans", nargs="+", choices=PLANS, help="what to train for")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and attacks")
    parser.add_argument("--real", type=Path, default=FOLDER, help="folder of models and pictures")
    parser.add_argument("--out", type=Path, help="folder for the models (default: embedded/)")
    parser.add_argument("--checkpoints", type=Path, help="folder to go on from after a stop")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--smoke", action="store_true", help="tiny run into a temporary folder")
    args = parser.parse_args()
    if args.out is None:
        args.out = Path(tempfile.mkdtemp(prefix="rts-")) if args.smoke else HERE / "embedded"
    for folder in filter(None, (args.out, args.checkpoints)):
        folder.mkdir(parents=True, exist_ok=True)
    for name in args.plans:
        train(name, args)


if __name__ == "__main__":
    main()

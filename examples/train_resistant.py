# SPDX-License-Identifier: MIT
"""Train an RTS^A that resists an attack which knows it, and see what clean maps pay for it.

    python examples/train_resistant.py embedded                  # 40 minutes of a core
    python examples/train_resistant.py cifar10 --models FOLDER   # RTS by train_rts.py cifar10
    python examples/aid.py --rts-a rts-embedded-resistant.pt --steps 300

Adversarial training (Madry et al. 2018) of a masking model with an encoder of its own. What a short
attack cannot teach it, a longer one can: each picture keeps its perturbation and target class from
epoch to epoch, and a few steps go on from there (Zheng et al. 2020), until by chance, after seven
epochs on average, it starts anew. Of each batch it minimises

- a hinge on the distance of the attacked picture's map, for the target class, to the clean one's;
- the distance of clean maps, for the own class and another one, to those of RTS (the drift);
- the logistic losses of the selector, and the cross entropy of the encoder's own logits, which are
  to tell the class of clean and attacked pictures.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from benchmark.real import DEVICE, FOLDER, cifar_resnet
from torch import Tensor, nn
from tqdm import tqdm

from captum_adv2.evaluation import metrics
from captum_adv2.interpreters import MaskingModel
from captum_adv2.study.embedded import load_resnet, load_rts, make_shapes

EPS = 8 / 255
MARGIN = 0.2  # L1 of an attacked picture's map to the clean one's that is far enough
FRESH = 1 / 7  # share of pictures whose attack starts anew


class Plan(NamedTuple):
    """A classifier, its RTS, and pictures ``(N, 3, H, W)`` in [0, 1] with labels ``(N,)``."""

    model: nn.Module
    teacher: MaskingModel
    images: Tensor
    labels: Tensor


def shapes(args: argparse.Namespace) -> Plan:
    """Return the embedded residual network."""
    model = load_resnet().to(DEVICE)
    return Plan(model, load_rts(model), *make_shapes(args.pictures, seed=12_345)[:2])


def photographs(args: argparse.Namespace) -> Plan:
    """Return ResNet-20 on CIFAR-10."""
    model = cifar_resnet(20, args.real).to(DEVICE)
    teacher = MaskingModel.load(args.models / "rts-cifar10.pt", model)
    data = torch.load(args.real / "cifar10_train.pt", weights_only=True)
    images, labels = (data[name][: args.pictures] for name in ("images", "labels"))
    return Plan(model, teacher, images.float() / 255, labels.long())


PLANS: dict[str, Callable[[argparse.Namespace], Plan]] = {
    "embedded": shapes,
    "cifar10": photographs,
}


def attack(
    plan: Plan, student: MaskingModel, images: Tensor, target: Tensor, start: Tensor,
    benign: Tensor, eps: float, steps: int,
) -> Tensor:  # fmt: skip
    """Return images that a few more steps take to the target class, and their maps to benign ones.

    A simple ADV2: momentum, signs, and a weight of the map that differs from image to image. Images
    and start are ``(B, C, H, W)``, benign maps ``(B, 1, h, w)``, target classes ``(B,)``.
    """
    low, high = (images - eps).clamp(0, 1), (images + eps).clamp(0, 1)
    weight = 10 * 20 ** torch.rand(len(images)).to(DEVICE)
    adversarial, speed = start.clamp(low, high), torch.zeros_like(images)
    for number in range(steps):
        leaf = adversarial.requires_grad_()
        change = student(leaf, target) - benign
        distance = (change.square() + change.abs()).mean(dim=(1, 2, 3)) / 2
        missing = F.cross_entropy(plan.model(leaf), target, reduction="none")
        loss = missing.clamp(min=-math.log(0.95)) + weight * distance
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        size = gradient.abs().mean(dim=(1, 2, 3), keepdim=True)
        speed = 0.9 * speed + gradient / (size + 1e-12)
        rate = 2.5 * eps / steps * (1 + math.cos(math.pi * number / steps)) / 2 + 0.002
        adversarial = (leaf.detach() - rate * speed.sign()).clamp(low, high)
    return adversarial.detach()


def others(labels: Tensor, classes: int) -> Tensor:
    """Return another class for each label ``(B,)``."""
    return (labels + torch.randint(1, classes, labels.shape).to(labels)) % classes


def losses(
    plan: Plan, student: MaskingModel, images: Tensor, labels: Tensor, fooled: Tensor,
    target: Tensor, args: argparse.Namespace,
) -> dict[str, Tensor]:  # fmt: skip
    """Return the weighted terms ``(B,)``, or ``(2 B,)``, of a batch."""
    other = others(labels, student.classes)
    with torch.no_grad():
        before = plan.teacher.encode(images)
        own, third = (plan.teacher.decode(before, asked) for asked in (labels, other))
    asked = torch.cat([labels, target, other])
    encoded = student.encode(torch.cat([images, fooled, images]))
    clean, attacked, rest = student.decode(encoded, asked).chunk(3)
    shown, claimed, _ = student.presence(encoded, asked).chunk(3)
    logits = encoded.output[: 2 * len(images)]
    return {
        "far": args.far * (MARGIN - metrics.l1(attacked, clean)).relu(),
        "anchor": args.anchor * metrics.l1(clean, own),
        "other": args.anchor / 4 * metrics.l1(rest, third),
        "select": (F.softplus(-shown) + F.softplus(claimed)) / 2,
        "classify": 2 * F.cross_entropy(logits, labels.repeat(2)),
    }


def train(plan: Plan, args: argparse.Namespace) -> MaskingModel:
    """Return a masking model that was trained against the attack."""
    torch.manual_seed(args.seed)
    plan.model.requires_grad_(False)
    student = plan.teacher.with_own_encoder()
    optimizer = torch.optim.AdamW(student.trainable(), lr=args.lr)
    kept, targets = torch.zeros_like(plan.images), others(plan.labels, student.classes)
    batches = [
        rows
        for _ in range(args.epochs)
        for rows in torch.randperm(len(kept)).split(args.batch)
        if len(rows) == args.batch or args.smoke
    ]
    bar = tqdm(batches, disable=args.quiet, unit="batch")
    for number, rows in enumerate(bar):
        progress = number / len(batches)
        optimizer.param_groups[0]["lr"] = args.lr * (1 + math.cos(math.pi * progress)) / 2
        eps = EPS * min(1.0, 0.1 + 4 * progress)
        anew = torch.rand(len(rows)) < FRESH
        targets[rows] = torch.where(anew, others(plan.labels, student.classes)[rows], targets[rows])
        noise = EPS * (2 * torch.rand(kept[rows].shape) - 1)
        start = torch.where(anew.view(-1, 1, 1, 1), noise, kept[rows]).to(DEVICE)
        images, labels, target = (
            part[rows].to(DEVICE) for part in (plan.images, plan.labels, targets)
        )
        with torch.no_grad():
            benign = student(images, labels)
        fooled = attack(plan, student, images, target, images + start, benign, eps, args.steps)
        kept[rows] = (fooled - images).cpu()
        terms = losses(plan, student, images, labels, fooled, target, args)
        optimizer.zero_grad()
        torch.stack([term.mean() for term in terms.values()]).sum().backward()
        nn.utils.clip_grad_norm_(student.trainable(), 5.0)
        optimizer.step()
        bar.set_postfix({k: f"{v.mean().item():.2f}" for k, v in terms.items()}, refresh=False)
    return student.eval().requires_grad_(False)


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("plan", choices=PLANS, help="classifier")
    add("--pictures", type=int, default=2000, help="pictures to train on (2000)")
    add("--epochs", type=int, default=40, help="passes over the pictures (40)")
    add("--steps", type=int, default=5, help="steps of the attack an epoch (5)")
    add("--batch", type=int, default=32, help="pictures a batch (32)")
    add("--lr", type=float, default=1e-3, help="initial learning rate (0.001)")
    add("--far", type=float, default=40.0, help="weight of the hinge (40)")
    add("--anchor", type=float, default=20.0, help="weight of the drift (20)")
    add("--seed", type=int, default=0)
    add("--models", type=Path, default=Path(), help="folder of rts-cifar10.pt")
    add("--real", type=Path, default=FOLDER, help="folder of models and pictures")
    add("--out", type=Path, default=Path(), metavar="FOLDER", help="for the masking model")
    add("--quiet", action="store_true", help="no progress bar")
    add("--smoke", action="store_true", help="eight pictures, one epoch")
    args = parser.parse_args()
    if args.smoke:
        args.pictures, args.epochs, args.steps = 8, 1, 1
    if args.pictures < args.batch and not args.smoke:
        parser.error(f"expected at least --batch {args.batch} pictures, got {args.pictures}")
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"rts-{args.plan}-resistant.pt"
    train(PLANS[args.plan](args), args).save(file)
    print(f"{file}: {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: MIT
"""What makes RTS^A resist, and at what price? Settings of `distill` on the embedded ResNet.

    python examples/benchmark/aid.py                           # all settings, short trainings
    python examples/benchmark/aid.py own --pictures 4000 --epochs 10

Each row is a training from the package's RTS. Drift is the L1 distance of the maps of clean images
to those of RTS; PGD and ADV2 are judged on the trained interpreter, which ADV2 knows.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torchattacks import PGD

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import attacked, embedded_case, first, mean

from captum_adv2 import ADV2, evaluate
from captum_adv2.defenses import distill
from captum_adv2.evaluation import metrics
from captum_adv2.interpreters import RTS
from captum_adv2.study.embedded import load_rts, make_shapes

SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {"anchor": 0.0},  # Eq. 23 alone
    "anchored": {},
    "heavy": {"weight": 60.0},
    "absent": {"goal": "absent"},
    "selected": {"goal": "absent", "select": 2.0},
    "own": {"goal": "absent", "select": 2.0, "encoder": "own", "lr": 3e-4},
}


def row(name: str, args: argparse.Namespace) -> str:
    """Train with some settings; return what attacks do, as text."""
    case = embedded_case(200)
    rts = load_rts(case.model)
    images, labels, *_ = make_shapes(args.pictures, seed=0)
    loader = list(zip(images.split(32), labels.split(32), strict=True))
    settings = {"steps": args.inner, "alpha": 12 / 255 / args.inner, "epochs": args.epochs}
    hardened = distill(case.model, loader, rts, **settings | SETTINGS[name], verbose=args.verbose)
    if args.out:
        hardened.save(args.out / f"rts-resnet-{name}.pt")
    with torch.no_grad():
        maps = [each(case.images, case.labels) for each in (rts, hardened)]
    few, interpreter = first(case, args.attacked), RTS(case.model, hardened)
    found = [f"{name:9s} drift {metrics.l1(*maps).mean():.4f}"]
    attacks = {
        "PGD": PGD(case.model, steps=args.steps, random_start=False),
        "ADV2": ADV2(case.model, interpreter, steps=args.steps),
    }
    for kind, attack in attacks.items():
        adversarial = attacked(attack, few)
        report = evaluate(case.model, interpreter, few.images, adversarial, few.targets)
        rate, iou = report.success.float().mean(), report.iou.mean()
        found.append(f"{kind} {rate:4.0%}, L1 {mean(report.l1)} IoU {iou:.3f}")
    return " | ".join(found)


def main() -> None:
    """Print a row for each of the settings."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", choices=[[], *SETTINGS], help="settings (all)")
    parser.add_argument("--pictures", type=int, default=1000, help="pictures to train on")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the pictures")
    parser.add_argument("--inner", type=int, default=3, help="steps of the attack in the training")
    parser.add_argument("--attacked", type=int, default=24, help="pictures to attack")
    parser.add_argument("--steps", type=int, default=100, help="gradient evaluations of attacks")
    parser.add_argument("--out", type=Path, help="folder for the masking models")
    parser.add_argument("--verbose", action="store_true", help="show progress bars")
    parser.add_argument("--smoke", action="store_true", help="a few pictures and steps")
    args = parser.parse_args()
    if args.smoke:
        args.pictures, args.attacked, args.steps = 32, 2, 4
    for name in args.names or SETTINGS:
        print(row(name, args), flush=True)


if __name__ == "__main__":
    main()

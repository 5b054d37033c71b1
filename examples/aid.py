# SPDX-License-Identifier: MIT
"""Does training against ADV2 make an interpreter reveal attacks? The studies of §5 Q3.

    python examples/aid.py                              # embedded models
    python examples/aid.py --case cifar10 --models DIR  # trained by train_rts.py cifar10
    python examples/aid.py --rts-a rts-resnet-own.pt    # another RTS^A of the embedded model

RTS^A is RTS trained further by adversarial interpretation distillation. (a) Figure 15: noise at
which the classifier errs on 3 % and 30 % of the images; do their maps change? (b) Figure 16: ADV2
on each, and the distance of RTS^A's maps of clean images to RTS's. (c) Does RTS^A resist, or only
hide its gradient? Attacks that would get past that: from a random start, with five times the steps,
made on RTS, and by queries.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from benchmark.real import FOLDER, Case, load_case
from common import attacked, embedded_case, first, mean
from torch import Tensor
from torchattacks import PGD

from captum_adv2 import ADV2, evaluate
from captum_adv2.attacks.blackbox import QueryADV2
from captum_adv2.attacks.frameworks import quantize
from captum_adv2.evaluation import metrics, visualize
from captum_adv2.interpreters import RTS, MaskingModel
from captum_adv2.study.embedded import load_rts


def predict(case: Case, images: Tensor) -> Tensor:
    """Return the classes ``(N,)``."""
    with torch.no_grad():
        return torch.cat([case.model(part).argmax(dim=1) for part in images.split(200)])


def explain(rts: RTS, images: Tensor, target: Tensor) -> Tensor:
    """Return the maps ``(N, 1, h, w)``."""
    parts = zip(images.split(200), target.split(200), strict=True)
    with torch.no_grad():
        return torch.cat([rts(part, classes) for part, classes in parts])


def noisy(case: Case, kind: str, share: float) -> tuple[float, Tensor]:
    """Return the noise at which the classifier errs on a share of images, and these, by bisection.

    Noise is Gaussian or uniform, of a standard deviation; images are rounded to 8 bits.
    """
    generator = torch.Generator().manual_seed(0)
    shape = case.images.shape
    if kind == "normal":
        noise = torch.randn(shape, generator=generator)
    else:
        noise = 3**0.5 * (2 * torch.rand(shape, generator=generator) - 1)
    noise = noise.to(case.images.device)
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        errs = predict(case, quantize((case.images + middle * noise).clamp(0, 1))) != case.labels
        low, high = (middle, high) if errs.float().mean() < share else (low, middle)
    return high, quantize((case.images + high * noise).clamp(0, 1))


def noise_study(case: Case, interpreters: dict[str, RTS], out: Path) -> None:
    """Print how far noise moves the maps of images on which the classifier errs; draw some."""
    print(f"\n## (a) L1 of clean to noisy maps, of {len(case.images)} images those misclassified")
    every, drawn = torch.ones_like(case.labels, dtype=torch.bool), {"clean": case.images}
    for kind in ("normal", "uniform"):
        for share in (0.03, 0.30):
            level, images = noisy(case, kind, share)
            classes = predict(case, images)
            wrong = classes != case.labels
            moved = {
                name: metrics.l1(
                    explain(rts, images[wrong], classes[wrong]),
                    explain(rts, case.images[wrong], case.labels[wrong]),
                )
                for name, rts in interpreters.items()
            }
            moved["difference"] = moved["RTS^A"] - moved["RTS"]
            print(
                f"{kind:8s} std {level:.4f}, {wrong.float().mean():5.1%} misclassified "
                f"({int(wrong.sum())} images):",
                "; ".join(f"{name} {mean(values)}" for name, values in moved.items()),
            )
        drawn[kind], every = images, every & wrong  # of the higher level
    chosen = every.nonzero()[:4, 0]
    shown = {
        kind: {
            name: (images[chosen], explain(rts, images[chosen], predict(case, images[chosen])))
            for name, rts in interpreters.items()
        }
        for kind, images in drawn.items()
    }
    visualize.grid(shown).savefig(out / "aid-noise.png", dpi=80)


def attack_study(case: Case, interpreters: dict[str, RTS], steps: int, out: Path) -> None:
    """Print the results of ADV2 on each interpreter, which it knows; draw some maps."""
    print(f"\n## (b) ADV2, {steps} gradient evaluations, {len(case.images)} images")
    shown: dict[str, dict[str, Any]] = {"benign": {}, "PGD": {}, "ADV2": {}}
    for name, rts in interpreters.items():
        pgd = PGD(case.model, steps=steps, random_start=False)
        for kind, attack in (("PGD", pgd), ("ADV2", ADV2(case.model, rts, steps=steps))):
            adversarial = attacked(attack, case)
            report = evaluate(case.model, rts, case.images, adversarial, case.targets)
            distance = mean(report.l1[report.success])
            print(f"{kind} on {name}".ljust(16), report, f"L1 of successes {distance}", flush=True)
            shown["benign"][name] = (case.images[:4], report.benign_maps[:4])
            shown[kind][name] = (adversarial[:4], report.adversarial_maps[:4])
    maps = [explain(rts, case.images, case.labels) for rts in interpreters.values()]
    print(f"maps of clean images, one to the other: L1 {mean(metrics.l1(*maps))}")
    visualize.grid(shown).savefig(out / "aid-attack.png", dpi=80)


def masking_study(case: Case, interpreters: dict[str, RTS], steps: int) -> None:
    """Print the results on RTS^A of attacks that do not depend on its gradient at the image."""
    print(f"\n## (c) attacks on RTS^A, {len(case.images)} images")
    rts, hardened = interpreters.values()
    attacks = {
        f"{steps} steps": ADV2(case.model, hardened, steps=steps),
        "random start": ADV2(case.model, hardened, steps=steps, random_start=True),
        f"{5 * steps} steps": ADV2(case.model, hardened, steps=5 * steps),
        "made on RTS": ADV2(case.model, rts, steps=steps),
        f"{10 * steps} queries": QueryADV2(case.model, hardened, queries=10 * steps),
    }
    for name, attack in attacks.items():
        adversarial = attacked(attack, case)
        report = evaluate(case.model, hardened, case.images, adversarial, case.targets)
        print(name.ljust(16), report, flush=True)


def load(args: argparse.Namespace) -> tuple[Case, dict[str, RTS]]:
    """Return a case of images that the model gets right, and its two interpreters."""
    if args.case == "cifar10":
        case = load_case("resnet20", args.images, args.real)
        files = [args.models / f"rts-cifar10{kind}.pt" for kind in ("", "-aid")]
        files[1] = args.rts_a or files[1]
        found = [MaskingModel.load(file, case.model) for file in files]
    else:
        case = embedded_case(args.images)
        found = [load_rts(case.model, name) for name in ("resnet", "resnet-aid")]
    if args.rts_a:
        found[1] = MaskingModel.load(args.rts_a, case.model)
    pairs = zip(("RTS", "RTS^A"), found, strict=True)
    return case, {title: RTS(case.model, masking_model) for title, masking_model in pairs}


def main() -> None:
    """Run the studies."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", choices=("embedded", "cifar10"), default="embedded")
    parser.add_argument("--models", type=Path, default=Path(), help="folder of masking models")
    parser.add_argument("--rts-a", type=Path, metavar="FILE", help="masking model of RTS^A")
    parser.add_argument("--real", type=Path, default=FOLDER, help="folder of models and pictures")
    parser.add_argument("--images", type=int, default=1969, help="images of the noise study")
    parser.add_argument("--attacked", type=int, default=100, help="images of the attack study")
    parser.add_argument("--checked", type=int, default=12, help="images of the third study")
    parser.add_argument("--steps", type=int, default=100, help="gradient evaluations of attacks")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for pictures")
    parser.add_argument("--smoke", action="store_true", help="a few images and steps")
    args = parser.parse_args()
    if args.smoke:
        args.images, args.attacked, args.checked, args.steps = 100, 4, 2, 4
    args.out.mkdir(parents=True, exist_ok=True)
    case, interpreters = load(args)
    noise_study(case, interpreters, args.out)
    attack_study(first(case, args.attacked), interpreters, args.steps, args.out)
    masking_study(first(case, args.checked), interpreters, args.steps)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: MIT
"""Does training against ADV2 make an interpreter honest? The two studies of §5 Q3, with pictures.

    python examples/aid.py                              # embedded models
    python examples/aid.py --case cifar10 --models DIR  # trained by train_rts.py cifar10

RTS^A is RTS trained on by adversarial interpretation distillation. (a) Figure 15: images with as
much noise as makes the classifier err on 3 % and 30 %; do the maps of those it errs on change?
(b) Figure 16: ADV2 on each, and how far RTS^A's maps of clean images are from RTS's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torchattacks import PGD

from captum_adv2 import ADV2, evaluate
from captum_adv2.evaluation import metrics, visualize
from captum_adv2.interpreters import RTS, MaskingModel

sys.path.insert(0, str(Path(__file__).resolve().parent / "benchmark"))

from figures import interval, line, towards
from real import FOLDER, Case, load_case

from captum_adv2.study.embedded.models import load_resnet
from captum_adv2.study.embedded.shapes import make_shapes

HERE = Path(__file__).resolve().parent
LEVELS = (0.03, 0.30)


def normal(images: Tensor, level: float) -> Tensor:
    """Add Gaussian noise of a standard deviation; round to 8 bits."""
    return _noisy(images, level * torch.randn(images.shape, generator=_generator()))


def uniform(images: Tensor, level: float) -> Tensor:
    """Add uniform noise of a standard deviation; round to 8 bits."""
    unit = 2 * torch.rand(images.shape, generator=_generator()) - 1
    return _noisy(images, level * 3**0.5 * unit)


def _noisy(images: Tensor, noise: Tensor) -> Tensor:
    return ((images + noise).clamp(0, 1) * 255).round() / 255


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Return the classes ``(N,)``."""
    return torch.cat([model(part).argmax(dim=1) for part in images.split(200)])


@torch.no_grad()
def explain(rts: RTS, images: Tensor, target: Tensor) -> Tensor:
    """Return the maps ``(N, 1, h, w)``."""
    parts = zip(images.split(200), target.split(200), strict=True)
    return torch.cat([rts(part, classes) for part, classes in parts])


def level_for(
    share: float, add: Callable[[Tensor, float], Tensor], case: Case
) -> tuple[float, Tensor]:
    """Return the noise at which the classifier errs on a share of images, found by bisection."""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        errs = (predict(case.model, add(case.images, middle)) != case.labels).float().mean()
        low, high = (middle, high) if errs < share else (low, middle)
    return high, add(case.images, high)


def noise_study(case: Case, interpreters: dict[str, RTS], out: Path) -> None:
    """Print how far maps move on images that noise makes the classifier err on; draw some."""
    print(
        f"\n## (a) Noise: L1 of clean to noisy maps, of {len(case.images)} images those it errs on"
    )
    both, rows = torch.ones_like(case.labels, dtype=torch.bool), {"clean": case.images}
    for kind, add in (("normal", normal), ("uniform", uniform)):
        for share in LEVELS:
            level, noisy = level_for(share, add, case)
            classes = predict(case.model, noisy)
            wrong = classes != case.labels
            moved = {
                name: metrics.l1(
                    explain(rts, case.images[wrong], case.labels[wrong]),
                    explain(rts, noisy[wrong], classes[wrong]),
                )
                for name, rts in interpreters.items()
            }
            first, second = moved.values()
            texts = [
                f"{name} {values.mean():.4f} [{low:.4f}, {high:.4f}]"
                for name, values in (*moved.items(), ("difference", second - first))
                for low, high in [interval(values)]
            ]
            print(
                f"{kind:8s} std {level:.4f}, {wrong.float().mean():5.1%} misclassified "
                f"({int(wrong.sum())} images): " + "; ".join(texts)
            )
        rows[kind], both = noisy, both & wrong  # of the higher level
    chosen = both.nonzero()[:4, 0]
    shown = {
        kind: {
            name: (
                images[chosen],
                explain(rts, images[chosen], predict(case.model, images[chosen])),
            )
            for name, rts in interpreters.items()
        }
        for kind, images in rows.items()
    }
    visualize.grid(shown).savefig(out / "aid-noise.png", dpi=80)


def attack_study(case: Case, interpreters: dict[str, RTS], steps: int, out: Path) -> None:
    """Print what ADV2 achieves on each interpreter, which it knows; draw some maps."""
    print(f"\n## (b) ADV2, {steps} gradient evaluations, {len(case.images)} images")
    shown: dict[str, dict[str, tuple[Tensor, Tensor]]] = {"benign": {}, "PGD": {}, "ADV2": {}}
    pgd = towards(PGD(case.model, steps=steps, random_start=False), case.targets, case.images, 100)
    for name, rts in interpreters.items():
        attack = ADV2(case.model, rts, steps=steps)
        images = {"PGD": pgd, "ADV2": towards(attack, case.targets, case.images, 100)}
        for kind, adversarial in images.items():
            report = evaluate(case.model, rts, case.images, adversarial, case.targets)
            line(f"{kind} on {name}", report)
            shown["benign"][name] = (case.images[:4], report.benign_maps[:4])
            shown[kind][name] = (adversarial[:4], report.adversarial_maps[:4])
    maps = [explain(rts, case.images, case.labels) for rts in interpreters.values()]
    drift = metrics.l1(*maps)
    low, high = interval(drift)
    print(f"maps of clean images, one to the other: L1 {drift.mean():.4f} [{low:.4f}, {high:.4f}]")
    visualize.grid(shown).savefig(out / "aid-attack.png", dpi=80)


def load(name: str, count: int, models: Path, real: Path) -> tuple[Case, dict[str, RTS]]:
    """Return a case of images that the model gets right, and its two interpreters."""
    case = load_case("resnet20", count, real) if name == "cifar10" else _shapes(count)
    stem = "rts-cifar10" if name == "cifar10" else "rts-resnet"
    files = {"RTS": f"{stem}.pt", "RTS^A": f"{stem}-aid.pt"}
    return case, {
        title: RTS(case.model, MaskingModel.load(models / file, case.model))
        for title, file in files.items()
    }


def _shapes(count: int) -> Case:
    model, shapes = load_resnet(), make_shapes(count, seed=99)
    right = predict(model, shapes.images) == shapes.labels
    images, labels = shapes.images[right], shapes.labels[right]
    shift = torch.randint(1, 10, labels.shape, generator=_generator())
    return Case(model, images, labels, (labels + shift) % 10)


def main() -> None:
    """Run both studies."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", choices=("embedded", "cifar10"), default="embedded")
    parser.add_argument("--models", type=Path, default=HERE / "embedded", help="masking models")
    parser.add_argument("--real", type=Path, default=FOLDER, help="folder of models and pictures")
    parser.add_argument("--images", type=int, default=2000, help="images of the noise study")
    parser.add_argument("--attacked", type=int, default=100, help="images of the attack study")
    parser.add_argument("--steps", type=int, default=100, help="gradient evaluations of attacks")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for pictures")
    parser.add_argument("--smoke", action="store_true", help="a few images and steps")
    args = parser.parse_args()
    if args.smoke:
        args.images, args.attacked, args.steps = 100, 4, 4
    args.out.mkdir(parents=True, exist_ok=True)
    case, interpreters = load(args.case, args.images, args.models, args.real)
    noise_study(case, interpreters, args.out)
    few = Case(case.model, *(part[: args.attacked] for part in case[1:]))
    attack_study(few, interpreters, args.steps, args.out)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: MIT
"""Does feature squeezing detect ADV2, and an ADV2 that evades it? Tables 4 and 5 of §4 Q3.

    python examples/squeezing.py                      # embedded ResNet, CAM and RTS
    python examples/squeezing.py --case squeezenet    # ImageNet pictures, CAM

The detector (Xu et al., NDSS 2018) is fitted on benign images at 5 % false positives, and images
are rounded to 8 bits before they reach it. The adaptive attacks know one squeezer, or all of them;
bit depth is attacked as in Algorithm 2, and with a gradient passed straight through the rounding.
Rates are over successful attacks, with 95 % intervals. The picture has scores, benign and attacked.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmark.real import DEVICE, Case, load_case
from common import EPS, INTERPRETERS, attacked, embedded_case, first, share
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchattacks import PGD

from captum_adv2 import ADV2, BitDepthADV2, Report, evaluate
from captum_adv2.attacks import Squeezing
from captum_adv2.defenses import BitDepth, FeatureSqueezing, MedianSmoothing, NonLocalMeans
from captum_adv2.interpreters import Interpreter
from captum_adv2.study.embedded import make_shapes

SQUEEZERS = {
    "2 bits": BitDepth(2, straight_through=True),
    "3 bits": BitDepth(3, straight_through=True),
    "3x3": MedianSmoothing(3),
    "11-3-4": NonLocalMeans(),
}


def attacks(model: nn.Module, interpreter: Interpreter, steps: int) -> dict[str, Any]:
    """Return PGD, basic ADV2, and ADV2 that knows one squeezer or all."""

    def adaptive(*names: str) -> ADV2:
        term = Squeezing(model, [SQUEEZERS[name] for name in names])
        return ADV2(model, interpreter, eps=EPS, steps=steps, terms=(term,))

    plain = ADV2(model, interpreter, eps=EPS, steps=steps)
    return {
        "PGD": PGD(model, eps=EPS, steps=steps, random_start=False),
        "ADV2": plain,
        "Algorithm 2, 2 bits": BitDepthADV2(plain, 2, steps=steps, weight=5.0),
        "Algorithm 2, 3 bits": BitDepthADV2(plain, 3, steps=steps, weight=5.0),
        **{f"adaptive, {name}": adaptive(name) for name in SQUEEZERS},
        "adaptive, all": adaptive(*SQUEEZERS),
    }


def row(title: str, report: Report, detector: FeatureSqueezing, won: Tensor) -> None:
    """Print the success of an attack, and the share of the images it won with that is detected."""
    each = zip(SQUEEZERS, detector.detect_each(won).T, strict=True)
    rates = "; ".join(f"{name} {share(flags)}" for name, flags in each)
    success = "ASR {asr:4.0%}, L1 {l1:.4f}, IoU {iou:.3f}".format(**report.summary())
    joint = share(detector.detect(won))
    print(f"{title:20s} {success}; detected: {rates}; joint {joint}", flush=True)


def study(case: Case, benign: Tensor, interpreters: dict[str, Interpreter], steps: int) -> Figure:
    """Print a table for each interpreter; return the picture of joint scores."""
    detector = FeatureSqueezing(case.model, tuple(SQUEEZERS.values())).fit(benign)
    limits = zip(SQUEEZERS, detector.thresholds, strict=True)
    print(f"\nfitted on {len(benign)} benign images; thresholds: ", end="")
    print(", ".join(f"{name} {limit:.3f}" for name, limit in limits))
    figure = Figure(figsize=(3.6 * len(interpreters), 3), layout="constrained")
    axes = figure.subplots(1, len(interpreters), squeeze=False)[0]
    for axis, (name, interpreter) in zip(axes, interpreters.items(), strict=True):
        print(f"\n## {name}, {len(case.images)} images, {steps} gradient evaluations")
        scores = {"benign": detector.score(benign).cpu()}
        for title, attack in attacks(case.model, interpreter, steps).items():
            adversarial = attacked(attack, case, batch=20)
            report = evaluate(case.model, interpreter, case.images, adversarial, case.targets)
            won = adversarial[report.success]
            if not len(won):
                print(f"{title:20s} no success")
                continue
            row(title, report, detector, won)
            if title in ("PGD", "ADV2", "adaptive, all"):
                scores[title] = detector.score(won).cpu()
        axis.hist(list(scores.values()), bins=10, range=(0, 2), density=True, label=list(scores))
        axis.axvline(detector.threshold, color="black", linestyle=":")
        axis.set(title=name, xlabel="joint score", ylabel="density")
    axes[-1].legend(fontsize=7)
    return figure


def main() -> None:
    """Fit, attack, detect."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", choices=("embedded", "squeezenet"), default="embedded")
    parser.add_argument("--images", type=int, help="attacked images (default: 100; squeezenet: 16)")
    parser.add_argument("--steps", type=int, default=100, help="gradient evaluations")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the picture")
    parser.add_argument("--smoke", action="store_true", help="two images, five steps")
    args = parser.parse_args()
    if args.smoke:
        args.images, args.steps = 2, 5
    if args.case == "squeezenet":
        whole, count, names = load_case("squeezenet", 40), args.images or 16, ("CAM",)
        case, benign = first(whole, count), whole.images[count:]
    else:
        case, names = embedded_case(args.images or 100), ("CAM", "RTS")
        benign = make_shapes(20 if args.smoke else 500, seed=5).images.to(DEVICE)
    interpreters = {name: INTERPRETERS[name](case.model) for name in names}
    args.out.mkdir(parents=True, exist_ok=True)
    study(case, benign, interpreters, args.steps).savefig(args.out / "squeezing.png", dpi=80)


if __name__ == "__main__":
    main()

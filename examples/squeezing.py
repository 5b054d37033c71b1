# SPDX-License-Identifier: MIT
"""Does feature squeezing tell ADV2, and an ADV2 that knows of it? Tables 4 and 5 of §4 Q3.

    python examples/squeezing.py                      # embedded ResNet, CAM and RTS
    python examples/squeezing.py --case squeezenet    # ImageNet pictures, CAM

The detector (Xu et al., NDSS 2018) is fitted on benign images at 5 % false positives, and images
are rounded to 8 bits before it sees them. The adaptive attacks know one squeezer, or all of them;
bit depth is attacked as in Algorithm 2, and with a gradient passed straight through the rounding.
Rates are over successful attacks, with 95 % intervals. The picture has scores, benign and attacked.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor
from torchattacks import PGD

from captum_adv2 import ADV2, BitDepthADV2, evaluate
from captum_adv2.attacks import Squeezing, quantize
from captum_adv2.defenses import BitDepth, FeatureSqueezing, MedianSmoothing, NonLocalMeans
from captum_adv2.interpreters import CAM, RTS, Interpreter

sys.path.insert(0, str(Path(__file__).resolve().parent / "benchmark"))

from figures import EPS, interval, towards
from mask import embedded_case
from real import FOLDER, Case, load_case

from captum_adv2.study.embedded.models import load_rts
from captum_adv2.study.embedded.shapes import make_shapes

SQUEEZERS = {
    "2 bits": BitDepth(2, straight_through=True),
    "3 bits": BitDepth(3, straight_through=True),
    "3x3": MedianSmoothing(3),
    "11-3-4": NonLocalMeans(),
}


def attacks(case: Case, interpreter: Interpreter, steps: int) -> dict[str, Any]:
    """Return PGD, basic ADV2, and ADV2 that knows one squeezer or all."""

    def adaptive(*names: str, weight: float = 5.0) -> ADV2:
        chosen = tuple(SQUEEZERS[name] for name in names)
        term = Squeezing(case.model, chosen, weight=weight)
        return ADV2(case.model, interpreter, eps=EPS, steps=steps, terms=(term,))

    plain = ADV2(case.model, interpreter, eps=EPS, steps=steps)
    return {
        "PGD": PGD(case.model, eps=EPS, steps=steps, random_start=False),
        "ADV2": plain,
        "Algorithm 2, 2 bits": BitDepthADV2(plain, 2, steps=steps, weight=5.0),
        "Algorithm 2, 3 bits": BitDepthADV2(plain, 3, steps=steps, weight=5.0),
        **{f"adaptive, {name}": adaptive(name) for name in SQUEEZERS},
        "adaptive, all": adaptive(*SQUEEZERS, weight=2.0),
    }


def rate(flags: Tensor) -> str:
    """Return a share with its interval."""
    low, high = interval(flags.float())
    return f"{flags.float().mean():4.0%} [{low:4.0%}, {high:4.0%}]"


def study(case: Case, benign: Tensor, interpreters: dict[str, Interpreter], args: Any) -> Figure:
    """Print a table for each interpreter; return the picture of joint scores."""
    detector = FeatureSqueezing(case.model, tuple(SQUEEZERS.values())).fit(benign)
    limits = zip(SQUEEZERS, detector.thresholds, strict=True)
    print(f"\nfitted on {len(benign)} benign images; thresholds: ", end="")
    print(", ".join(f"{name} {limit:.3f}" for name, limit in limits))
    figure = Figure(figsize=(3.6 * len(interpreters), 3), layout="constrained")
    for axis, (name, interpreter) in zip(
        figure.subplots(1, len(interpreters), squeeze=False)[0], interpreters.items(), strict=True
    ):
        print(f"\n## {name}, {len(case.images)} images, {args.steps} gradient evaluations")
        scores = {"benign": detector.score(benign)}
        for title, attack in attacks(case, interpreter, args.steps).items():
            adversarial = quantize(towards(attack, case.targets, case.images, args.batch))
            report = evaluate(case.model, interpreter, case.images, adversarial, case.targets)
            won = report.success
            if not won.any():
                print(f"{title:20s} no success")
                continue
            each = detector.detect_each(adversarial)[won]
            rates = [f"{s} {rate(flags)}" for s, flags in zip(SQUEEZERS, each.T, strict=True)]
            print(
                f"{title:20s} ASR {won.float().mean():4.0%}, L1 {report.l1[won].mean():.4f}, IoU "
                f"{report.iou[won].mean():.3f}; detected: {'; '.join(rates)}; joint "
                f"{rate(detector.detect(adversarial)[won])}",
                flush=True,
            )
            if title in ("PGD", "ADV2", "adaptive, all"):
                scores[title] = detector.score(adversarial)[won]
        axis.hist(list(scores.values()), bins=10, range=(0, 2), density=True, label=list(scores))
        axis.axvline(detector.threshold, color="black", linestyle=":")
        axis.set(title=name, xlabel="joint score", ylabel="density")
    axis.legend(fontsize=7)
    return figure


def main() -> None:
    """Fit, attack, detect."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", choices=("embedded", "squeezenet"), default="embedded")
    parser.add_argument("--images", type=int, help="attacked images (default: 100; squeezenet: 16)")
    parser.add_argument("--steps", type=int, default=100, help="gradient evaluations")
    parser.add_argument("--batch", type=int, default=20, help="pictures a batch")
    parser.add_argument("--real", type=Path, default=FOLDER, help="folder of models and pictures")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the picture")
    parser.add_argument("--smoke", action="store_true", help="two images, two steps")
    args = parser.parse_args()
    if args.smoke:
        args.images, args.steps = 2, 2
    if args.case == "squeezenet":
        whole = load_case("squeezenet", 40, args.real)
        count = args.images or 16
        case, benign = (
            Case(whole.model, *(part[:count] for part in whole[1:])),
            whole.images[count:],
        )
        interpreters: dict[str, Interpreter] = {"CAM": CAM(case.model)}
    else:
        case = embedded_case(args.images or 100)
        benign = make_shapes(20 if args.smoke else 500, seed=5).images
        rts = RTS(case.model, load_rts(case.model))
        interpreters = {"CAM": CAM(case.model), "RTS": rts}
    args.out.mkdir(parents=True, exist_ok=True)
    study(case, benign, interpreters, args).savefig(args.out / "squeezing.png", dpi=80)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: MIT
"""Can every attribution of Captum be fooled? ADV2 against each that can be differentiated.

    python examples/captum_methods.py                                   # the embedded ResNet
    python examples/captum_methods.py --methods KernelShap DeepLift --images 8 --steps 60
    python examples/captum_methods.py --case cifar                      # ResNet-20 on CIFAR-10

One row a method: success rate of ADV2, and L1 and IoU of its maps to the benign ones beside PGD's.
Methods that perturb the image at random are fooled at the perturbations that the attack has seen;
a second row judges the same images at fresh ones. The last line names the methods that resist.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from common import EPS, attacked, embedded_case
from torch import Tensor
from torchattacks import PGD

from captum_adv2 import ADV2, Report, evaluate
from captum_adv2.evaluation import visualize

sys.path.insert(0, str(Path(__file__).resolve().parent / "benchmark"))

from captum_catalogue import METHODS, interpreter, refusal  # isort: skip
from real import load_case  # isort: skip

SHOWN = {"Saliency", "IntegratedGradients", "DeepLift", "GuidedBackprop", "LayerGradCam"}
SHOWN |= {"Occlusion", "KernelShap", "Lime"}
FRESH = ("ShapleyValueSampling", "KernelShap", "Lime")


def options() -> argparse.Namespace:
    """Read the command line."""
    title, _, text = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=title, epilog=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [name for name in METHODS if refusal(partial(interpreter, name)) is None]
    cases = ("embedded", "cifar")
    parser.add_argument("--case", choices=cases, default=cases[0], help="classifier")
    parser.add_argument("--methods", nargs="+", choices=known, default=known, metavar="NAME")
    parser.add_argument("--images", type=int, default=16, help="pictures (default: 16)")
    parser.add_argument("--steps", type=int, default=100, help="steps an attack (default: 100)")
    parser.add_argument("--smoothing", type=float, help="tau of h(z) (default: by layer)")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the picture")
    parser.add_argument("--smoke", action="store_true", help="two pictures, two steps")
    args = parser.parse_args()
    if args.smoke:
        args.images, args.steps = 2, 2
        args.methods = ["GuidedBackprop", "DeepLift", "KernelShap"]
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def row(name: str, ours: Report, theirs: Report) -> bool:
    """Print a method's row; return whether it resists."""
    l1, iou = ([report.summary()[key] for report in (theirs, ours)] for key in ("l1", "iou"))
    print(
        f"{name:28s} {ours.summary()['asr']:6.1%}   "
        f"{l1[0]:.4f}  {l1[1]:.4f}   {iou[0]:.3f}  {iou[1]:.3f}",
        flush=True,
    )
    return l1[1] > l1[0] / 2 or iou[1] <= 0.5


def main() -> None:
    """Attack, print, draw."""
    args = options()
    cifar = args.case == "cifar"
    case = load_case("resnet20", args.images) if cifar else embedded_case(args.images)
    fooled = attacked(PGD(case.model, eps=EPS, steps=args.steps, random_start=False), case)
    print(f"{len(case.images)} images, {args.steps} gradient evaluations, changes of at most 8/255")
    print(f"{'':28s} {'':6s}   {'L1 to benign':14s}   IoU to benign")
    print(f"{'method':28s} {'ASR':>6s}   PGD     ADV2     PGD    ADV2")
    resisting: list[str] = []
    shown: dict[str, dict[str, tuple[Tensor, Tensor]]] = {"benign": {}, "PGD": {}, "ADV2": {}}
    for name in args.methods:
        layer, side = case.model[1].layer2, case.images.shape[-1]
        smoothing = args.smoothing or "auto"
        built = partial(interpreter, name, case.model, layer, side, smoothing=smoothing)
        adversarial = attacked(ADV2(case.model, built(), eps=EPS, steps=args.steps), case)
        for seed, title in enumerate((name, f"{name}, fresh") if name in FRESH else (name,)):
            theirs, ours = (
                evaluate(case.model, built(seed=seed), case.images, images, case.targets)
                for images in (fooled, adversarial)
            )
            if row(title, ours, theirs):
                resisting.append(title)
            if title in SHOWN:
                shown["benign"][name] = case.images[:2], theirs.benign_maps[:2]
                shown["PGD"][name] = fooled[:2], theirs.adversarial_maps[:2]
                shown["ADV2"][name] = adversarial[:2], ours.adversarial_maps[:2]
    if shown["benign"]:
        visualize.grid(shown).savefig(args.out / "captum-methods.png", dpi=80)
    print("L1 and IoU are means over each attack's successes.")
    print(f"Resist (L1 above half of PGD's, or IoU at most 0.5): {', '.join(resisting) or 'none'}")


if __name__ == "__main__":
    main()

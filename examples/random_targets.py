# SPDX-License-Identifier: MIT
"""Can a map be made to show anything at all? Tables 6, 7, 8 and Figures 11 to 13 (§5 Q1).

    python examples/random_targets.py                    # MASK is what takes long; --smoke: seconds
    python examples/random_targets.py --models ResNet --interpreters CAM GRAD RTS --images 20

ADV2 aims at a random class, and at a map that has nothing to do with image or class: a patch of
random shape, angle and place; or the map of another image, of another class than the target. If
both are reached, classifier and interpreter are only loosely coupled. PGD, which looks at no map,
shows the distance of an adversarial image to the target map without that aim.
"""

from __future__ import annotations

from benchmark.real import DEVICE
from common import EPS, Rows, attacked, few, mean, options, subjects
from torch import Tensor
from torchattacks import PGD

from captum_adv2 import ADV2, Report, evaluate
from captum_adv2.attacks import RandomClass, RandomPatch
from captum_adv2.evaluation import metrics, visualize
from captum_adv2.study.embedded import make_shapes


def row(names: tuple[str, str, str, str], report: Report, wanted: Tensor) -> None:
    """Print how near the maps of an attack are to those wanted, and to the benign ones."""
    won, maps = report.success, report.adversarial_maps
    title = "{:9s} {:8s} {:6s} {:6s}".format(*names)
    cells = "{images:6d} {asr:6.1%} {confidence:11.3f}".format(**report.summary())
    print(
        f"{title} {cells}  {mean(metrics.l1(maps, wanted)[won])}  {mean(report.l1[won])}  "
        f"{metrics.iou(maps, wanted)[won].mean():5.3f}",
        flush=True,
    )


def main() -> None:
    """Attack, print, draw."""
    args = options(__doc__, ("CAM", "GRAD", "RTS", "MASK"), steps=100)
    pool = make_shapes(100, seed=5)
    classes = RandomClass(pool.images.to(DEVICE), pool.labels.to(DEVICE))
    aims = {"patch": RandomPatch(), "class": classes}
    print(f"{args.steps} gradient evaluations, on MASK {3 * args.steps}; changes of at most 8/255")
    print(
        f"{'model':9s} {'explains':8s} {'target':6s} {'attack':6s} images    ASR  confidence  "
        f"{'L1 to target, 95 %':24s} {'L1 to benign, 95 %':24s} IoU to target"
    )
    for number, subject in enumerate(subjects(args)):
        shown = Rows(dict)
        pgd = PGD(subject.case.model, eps=EPS, steps=args.steps, random_start=False)
        fooled = attacked(pgd, subject.case)
        for name, interpreter in subject.interpreters.items():
            case = few(subject.case, name, args)
            model, images, labels, targets = case
            steps = 3 * args.steps if name == "MASK" else args.steps
            given = {"eps": EPS, "steps": steps, "verbose": args.verbose}
            for aim, target_map in aims.items():
                # Random target maps depend on the image alone: the attack aims at the same ones.
                wanted = target_map(interpreter, images, labels, targets)
                both = attacked(ADV2(model, interpreter, target_map=target_map, **given), case)
                for title, adversarial in (("PGD", fooled[: len(images)]), ("ADV2", both)):
                    report = evaluate(model, interpreter, images, adversarial, targets)
                    row((subject.name, name, aim, title), report, wanted)
                shown["benign"][name] = images[:2], report.benign_maps[:2]
                shown[f"{aim}: target"][name] = images[:2], wanted[:2]
                shown[f"{aim}: ADV2"][name] = both[:2], report.adversarial_maps[:2]
        if number == 0:
            visualize.grid(shown).savefig(args.out / "random-targets.png", dpi=80)
    print("L1 and IoU are means over the successes.")


if __name__ == "__main__":
    main()

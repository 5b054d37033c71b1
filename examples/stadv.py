# SPDX-License-Identifier: MIT
"""Does ADV2 work with an attack that moves pixels instead of changing them? Figures 9, 10 (§4 Q5).

    python examples/stadv.py                    # MASK is what takes long; --smoke: seconds
    python examples/stadv.py --models ResNet --interpreters CAM GRAD RTS --images 20

stAdv displaces pixels by a smooth flow until the classifier says the target class; StADV2 also
keeps the map. Both have the same steps, the same weight of the flow's roughness and the same bound
on its length. stAdv knows no interpreter: its images are the same in every row.
"""

from __future__ import annotations

from common import Rows, attacked, few, mean, options, subjects

from captum_adv2 import StADV2, evaluate
from captum_adv2.evaluation import visualize

ALPHA, BOUND = 0.1, 2.0  # in pixels: learning rate, and largest displacement along an axis


def main() -> None:
    """Attack, print, draw."""
    price = 5e-4, "weight of the flow's roughness"
    args = options(__doc__, ("CAM", "GRAD", "RTS", "MASK"), steps=200, flow=price)
    flow = {"steps": args.steps, "alpha": ALPHA, "bound": BOUND, "flow_weight": args.flow}
    print(f"{args.steps} gradient evaluations; pixels move by at most {BOUND:g} along either axis")
    columns = f"images    ASR  confidence  {'map L1, 95 % interval':24s}   IoU  change of a pixel"
    print(f"{'model':9s} {'explains':8s} {'attack':7s} {columns}")
    for number, subject in enumerate(subjects(args)):
        rows = Rows(dict)
        moved = attacked(StADV2(subject.case.model, warmup=args.steps, **flow), subject.case)
        for name, interpreter in subject.interpreters.items():
            case = few(subject.case, name, args)
            attack = StADV2(case.model, interpreter, verbose=args.verbose, **flow)
            tried = {"stAdv": moved[: len(case.images)], "StADV2": attacked(attack, case)}
            for title, images in tried.items():
                report = evaluate(case.model, interpreter, case.images, images, case.targets)
                cells = "{images:6d} {asr:6.1%} {confidence:11.3f}".format(**report.summary())
                print(
                    f"{subject.name:9s} {name:8s} {title:7s} {cells}  "
                    f"{mean(report.l1[report.success])}  {report.summary()['iou']:5.3f} "
                    f"{(images - case.images).abs().mean():12.4f}",
                    flush=True,
                )
                rows["benign"][name] = case.images[:2], report.benign_maps[:2]
                rows[title][name] = images[:2], report.adversarial_maps[:2]
        if number == 0:
            visualize.grid(rows).savefig(args.out / "stadv.png", dpi=80)
    print("L1 and IoU: to the map of the clean image, over the successes.")


if __name__ == "__main__":
    main()

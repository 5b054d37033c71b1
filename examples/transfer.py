# SPDX-License-Identifier: MIT
"""Does what fools one interpreter, or one classifier, fool another? Table 9, Figure 14 (§5 Q2).

    python examples/transfer.py                        # --interpreters to add MASK, which is slow
    python examples/transfer.py --models DenseNet ResNet     # crafted on the DenseNet

First every attack, made against one interpreter, is tried on all of them. Then images made against
the first classifier are tried on the second, with an interpreter of its own. PGD's row is the
distance of maps that an attack on the prediction alone leaves.
"""

from __future__ import annotations

from common import EPS, INTERPRETERS, Rows, attacked, options, subjects
from torch import Tensor
from torchattacks import PGD

from captum_adv2 import ADV2
from captum_adv2.evaluation import transfer, visualize


def pictures(found: transfer.Matrix, images: Tensor, adversarial: dict[str, Tensor]) -> Rows:
    """Return the rows of Figure 14: two of each source's images, with every interpreter's maps."""
    rows = Rows(dict)
    for source, reports in zip(found.sources, found.reports, strict=True):
        title = source if source == "PGD" else f"ADV2: {source}"
        for name, report in zip(found.targets, reports, strict=True):
            rows["benign"][name] = images[:2], report.benign_maps[:2]
            rows[title][name] = adversarial[source][:2], report.adversarial_maps[:2]
    return rows


def main() -> None:
    """Attack, print, draw."""
    args = options(__doc__, ("CAM", "GradCAM", "GRAD", "RTS"), steps=100)
    if "MASK" in args.interpreters:
        args.images = min(args.images, args.mask_images)
    first, *others = subjects(args)
    model, images, labels, targets = first.case
    attacks = {"PGD": PGD(model, eps=EPS, steps=args.steps, random_start=False)} | {
        name: ADV2(model, interpreter, eps=EPS, steps=args.steps, verbose=args.verbose)
        for name, interpreter in first.interpreters.items()
    }
    adversarial = {name: attacked(attack, first.case) for name, attack in attacks.items()}
    print(f"{len(images)} images, {args.steps} gradient evaluations, changes of at most 8/255")
    print(f"\n## From interpreter to interpreter, {first.name}")
    found = transfer.matrix(model, first.interpreters, images, adversarial, targets, labels)
    print(found)
    visualize.grid(pictures(found, images, adversarial)).savefig(args.out / "transfer.png", dpi=80)
    for second in others:
        print(f"\n## From the {first.name} to the {second.name}, each explained by its own")
        models = {subject.name: subject.case.model for subject in (first, second)}
        for name in second.interpreters:
            sources = {source: adversarial[source] for source in ("PGD", name)}
            print(f"{name}:")
            print(transfer.across(models, INTERPRETERS[name], images, sources, targets, labels))


if __name__ == "__main__":
    main()

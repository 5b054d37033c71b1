# SPDX-License-Identifier: MIT
"""Do several interpreters give an attack away? §5 Q3, Defense 1, which the paper leaves open.

    python examples/ensemble.py               # --smoke: seconds
    python examples/ensemble.py --models DenseNet --interpreters CAM GRAD

A detector flags pictures on which the interpreters' maps disagree; benign pictures of its own set
the threshold, at 5 % false positives. It meets PGD; ADV2 against each interpreter alone; and two
attackers who know of it: ADV2 on the mean of the maps, and the same with the disagreement itself as
a further term of the loss. An area under the ROC curve of 0.5 is guessing; less than that, and the
attacked pictures agree better than benign ones.
"""

from __future__ import annotations

from typing import Any

from common import EPS, Subject, attacked, interval, mean, options, subjects
from matplotlib.figure import Figure
from torch import Tensor
from torchattacks import PGD

from captum_adv2 import ADV2, evaluate
from captum_adv2.defenses import EnsembleDetector
from captum_adv2.interpreters import Ensemble, Interpreter
from captum_adv2.study.embedded.shapes import make_shapes
from captum_adv2.types import Candidate, Term

RATE = 0.05
AGREEMENT = 10.0  # weight of the disagreement in the last attack


def share(flagged: Tensor) -> str:
    """Return a share and its 95 % bootstrap interval, as text."""
    low, high = interval(flagged.float())
    return f"{flagged.float().mean():6.1%} [{low:.0%}, {high:.0%}]"


def attacks(subject: Subject, ensemble: Ensemble, steps: int, verbose: bool) -> dict[str, Any]:
    """Return the attacks by name: none knows of the detector but the last two."""

    def agreement(candidate: Candidate) -> Tensor:
        return AGREEMENT * ensemble.disagreement(candidate.images, candidate.target)

    def adv2(interpreter: Interpreter, *terms: Term) -> ADV2:
        return ADV2(
            subject.case.model, interpreter, eps=EPS, steps=steps, terms=terms, verbose=verbose
        )

    return {
        "PGD": PGD(subject.case.model, eps=EPS, steps=steps, random_start=False),
        **{f"ADV2 on {name}": adv2(g) for name, g in subject.interpreters.items()},
        "ADV2 on the mean": adv2(ensemble),
        "ADV2 on mean and agreement": adv2(ensemble, agreement),
    }


def main() -> None:
    """Fit the detector, attack, print, draw."""
    args = options(__doc__, ("CAM", "GRAD", "RTS"), steps=100)
    if "MASK" in args.interpreters:
        args.images = min(args.images, args.mask_images)
    own = make_shapes(max(20, 2 * args.images), seed=5).images
    found = subjects(args)
    figure = Figure(figsize=(4.5 * len(args.models), 4.5), layout="constrained")
    axes = figure.subplots(1, len(args.models), squeeze=False)[0]
    print(f"{args.images} images, {args.steps} gradient evaluations, changes of at most 8/255")
    print(
        f"{'model':9s} {'attack':27s}    ASR  {'L1 of the mean map':24s}   AUC  "
        f"{'flagged, 95 % interval':23s}"
    )
    for subject, axis in zip(found, axes, strict=True):
        case = subject.case
        ensemble = Ensemble(list(subject.interpreters.values()))
        detector = EnsembleDetector(ensemble).fit(own, rate=RATE)
        print(f"{subject.name:9s} {'none':27s} {'':39s} {share(detector.detect(case.images))}")
        for name, attack in attacks(subject, ensemble, args.steps, args.verbose).items():
            images = attacked(attack, case)
            report = evaluate(case.model, ensemble, case.images, images, case.targets)
            curve = detector.roc(case.images, images)
            print(
                f"{subject.name:9s} {name:27s} {report.success.float().mean():6.1%}  "
                f"{mean(report.l1[report.success])}  {curve.auc:5.3f}  "
                f"{share(detector.detect(images))}",
                flush=True,
            )
            axis.plot(curve.fpr, curve.tpr, label=f"{name}: {curve.auc:.2f}")
        axis.plot((0, 1), (0, 1), color="grey", linewidth=0.5)
        axis.set(
            title=f"{subject.name}, {', '.join(subject.interpreters)}",
            aspect="equal",
            xlabel="benign images flagged",
            ylabel="attacked images flagged",
        )
        axis.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.15),
            title="area under the curve",
            fontsize=8,
        )
    figure.savefig(args.out / "ensemble.png", dpi=80, bbox_inches="tight")


if __name__ == "__main__":
    main()

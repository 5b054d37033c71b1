# SPDX-License-Identifier: MIT
"""Does disagreement of several interpreters reveal an attack? §5 Q3, Defense 1, left open there.

    python examples/ensemble.py               # --smoke: seconds
    python examples/ensemble.py --models DenseNet --interpreters CAM GRAD

A detector flags pictures on which the interpreters' maps disagree; benign pictures of its own set
the threshold, at 5 % false positives. The attacks are PGD; ADV2 against each interpreter alone; and
two that know of the detector: ADV2 on the mean of the maps, and the same with the disagreement as
a further term of the loss. An area under the ROC curve of 0.5 is guessing; below it, the attacked
pictures agree better than benign ones.
"""

from __future__ import annotations

from typing import Any

from benchmark.real import DEVICE
from common import EPS, Subject, attacked, mean, options, share, subjects
from matplotlib.figure import Figure
from torch import Tensor
from torchattacks import PGD

from captum_adv2 import ADV2, evaluate
from captum_adv2.attacks import Candidate
from captum_adv2.defenses import EnsembleDetector
from captum_adv2.interpreters import Ensemble, Interpreter
from captum_adv2.study.embedded import make_shapes

AGREEMENT = 10.0  # weight of the disagreement in the last attack


def attacks(subject: Subject, ensemble: Ensemble, steps: int, verbose: bool) -> dict[str, Any]:
    """Return the attacks by name; the last two know of the detector."""

    def agreement(candidate: Candidate) -> Tensor:
        return AGREEMENT * ensemble.disagreement(candidate.images, candidate.target)

    def adv2(interpreter: Interpreter, *terms: Any) -> ADV2:
        model = subject.case.model
        return ADV2(model, interpreter, eps=EPS, steps=steps, terms=terms, verbose=verbose)

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
    own = make_shapes(max(20, 2 * args.images), seed=5).images.to(DEVICE)
    figure = Figure(figsize=(4.5 * len(args.models), 4.5), layout="constrained")
    axes = figure.subplots(1, len(args.models), squeeze=False)[0]
    print(f"{args.images} images, {args.steps} gradient evaluations, changes of at most 8/255")
    columns = f"   ASR  {'L1 of the mean map':24s}   AUC  flagged, 95 % interval"
    print(f"{'model':9s} {'attack':27s} {columns}")
    for subject, axis in zip(subjects(args), axes, strict=True):
        case, ensemble = subject.case, Ensemble(list(subject.interpreters.values()))
        detector = EnsembleDetector(ensemble).fit(own, rate=0.05)
        print(f"{subject.name:9s} {'none':27s} {'':39s} {share(detector.detect(case.images))}")
        for name, attack in attacks(subject, ensemble, args.steps, args.verbose).items():
            images = attacked(attack, case)
            report = evaluate(case.model, ensemble, case.images, images, case.targets)
            curve = detector.roc(case.images, images)
            cells = f"{report.success.float().mean():6.1%}  {mean(report.l1[report.success])}"
            flagged = f"{curve.auc:5.3f}  {share(detector.detect(images))}"
            print(f"{subject.name:9s} {name:27s} {cells}  {flagged}", flush=True)
            axis.plot(curve.fpr, curve.tpr, label=f"{name}: {curve.auc:.2f}")
        axis.plot((0, 1), (0, 1), color="grey", linewidth=0.5)
        axis.set(title=f"{subject.name}, {', '.join(subject.interpreters)}", aspect="equal")
        axis.set(xlabel="benign images flagged", ylabel="attacked images flagged")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), fontsize=8)
    figure.savefig(args.out / "ensemble.png", dpi=80, bbox_inches="tight")


if __name__ == "__main__":
    main()

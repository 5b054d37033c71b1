# SPDX-License-Identifier: MIT
"""Measure what §3.2, §3.4 and §3.6 of the paper assert of the attack's parts, one by one.

    python examples/benchmark/ablations.py smoothing warm labels lookahead encoder scores far

``smoothing`` is the derivative of ReLU on GRAD: h, sigma, r, and other widths of the default;
``warm`` the length of the warm start; ``labels`` label smoothing on GRAD; ``lookahead`` the steps
of Algorithm 1 on MASK; ``encoder`` the loss on the encoder on RTS; ``scores`` what Grad-CAM
differentiates; ``far`` the weight of target maps that are far away. Protocol as in ``figures.py``,
on the embedded networks. Each row after the first ends with the paired difference of its L1 from
the first, with a 95 % bootstrap interval: below 0 is better.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from functools import partial

import torch
from figures import EPS, line, towards
from mask import embedded_case, scaled
from real import DEVICE, Case, parse

from captum_adv2 import ADV2, Report, SoundnessWarning, StADV2, evaluate
from captum_adv2.attacks import CrossEntropy, MapDistance, RandomPatch
from captum_adv2.attacks.terms import Linear
from captum_adv2.evaluation import metrics
from captum_adv2.evaluation.metrics import interval
from captum_adv2.interpreters import (
    CAM,
    MASK,
    RTS,
    EncoderGuided,
    FiniteDifference,
    GradCAM,
    Gradient,
    Interpreter,
)
from captum_adv2.interpreters.bilevel import Unrolled
from captum_adv2.interpreters.relu import Auto, Smoothing, sigma
from captum_adv2.study.embedded import load_densenet, load_resnet, load_rts

Args = argparse.Namespace
FAR = (15, 0), (150, 0), (150, 1), (150, 10), (30, 10), (60, 10), (150, 30), (200, 30)
Variants = dict[str, tuple[Interpreter, dict[str, object]]]  # interpreter, and settings of ADV2


def compare(title: str, case: Case, variants: Variants, steps: int, args: Args) -> None:
    """Print a row a variant; all have the same evaluations, pictures and target classes."""
    print(f"\n## {title}: {len(case.images)} images, {steps} gradient evaluations")
    first: Report | None = None
    for name, (interpreter, settings) in variants.items():
        attack = ADV2(case.model, interpreter, eps=EPS, steps=steps, **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SoundnessWarning)  # of r(z): its gradient is zero
            adversarial = towards(attack, case.targets, case.images, args.batch)
        report = evaluate(case.model, interpreter, case.images, adversarial, case.targets)
        line(name, report, "" if first is None else gap(report, first))
        first = first or report


def gap(report: Report, first: Report) -> str:
    """Return by how much L1 differs, on images where both attacks succeed."""
    both = report.success & first.success
    change = (report.l1 - first.l1)[both]
    low, high = interval(change)
    return f"less the first's: {change.mean():+.4f} [{low:+.4f}, {high:+.4f}]"


def smoothing(args: Args) -> None:
    """GRAD with h(z), sigma(z), r(z), and the default."""
    case = embedded_case(args.images or 100)
    kinds: dict[str, Smoothing] = {
        "r(z): ReLU's own": None,
        "sigma(z)": sigma,
        "h(z), tau 1e-4": 1e-4,
        "h(z), tau 1e-2": 1e-2,
        "default: sigma(z / w), narrowing": "auto",
        "from 0.15 of a layer's size": Auto(wide=0.15),
        "from 0.5": Auto(wide=0.5),
        "to 0.05": Auto(narrow=0.05),
    }
    variants: Variants = {
        n: (Gradient(case.model, smoothing=kind), {}) for n, kind in kinds.items()
    }
    compare("Derivative of ReLU, GRAD", case, variants, scaled(100, args), args)


def warm(args: Args) -> None:
    """The warm start: none, the default, and longer ones."""
    case, steps = embedded_case(args.images or 100), scaled(100, args)
    for interpreter in (
        Gradient(case.model),
        CAM(case.model),
        RTS(case.model, load_rts(case.model)),
    ):
        variants: Variants = {
            f"{share:.0%} of the steps": (interpreter, {"warmup": round(share * steps)})
            for share in (0.0, 0.05, 0.2, 0.4)
        }
        compare(f"Warm start, {type(interpreter).__name__}", case, variants, steps, args)


def labels(args: Args) -> None:
    """Label smoothing on GRAD."""
    case = embedded_case(args.images or 100)
    losses = {
        "none": CrossEntropy(rho=0.0),
        "the mean of the draws (default)": CrossEntropy(),
        "draws": CrossEntropy(Linear(0.05, 0.01), seed=0),
    }
    interpreter = Gradient(case.model)
    variants: Variants = {n: (interpreter, {"prediction": loss}) for n, loss in losses.items()}
    compare("Label smoothing, GRAD", case, variants, scaled(100, args), args)


def lookahead(args: Args) -> None:
    """Algorithm 1 on MASK with one step and with four, and the default attack."""
    case = embedded_case(args.images or 16)
    mask = MASK.small(case.model, **({"iterations": 4} if args.smoke else {}))
    surrogates = {
        "Algorithm 1, one step": Unrolled(n_step=1),
        "Algorithm 1, four steps": Unrolled(n_step=4),
        "default: finite difference": FiniteDifference(),
    }
    variants: Variants = {n: (mask, {"surrogate": each}) for n, each in surrogates.items()}
    compare("Look-ahead, MASK", case, variants, scaled(50, args), args)


def encoder(args: Args) -> None:
    """The loss on the encoder, where the encoder is another network than the classifier."""
    count, model = args.images or 100, load_densenet().to(DEVICE)
    case = embedded_case(2 * count)
    with torch.no_grad():
        right = (model(case.images).argmax(dim=1) == case.labels).nonzero()[:count, 0]
    case = Case(model, *(part[right] for part in case[1:]))
    rts = RTS(model, load_rts(load_resnet().to(DEVICE), "densenet"))
    variants: Variants = {
        f"weight {weight:g}": (rts, {"surrogate": EncoderGuided(weight)})
        for weight in (0.0, 0.1, 1.0)
    }
    compare("Loss on the encoder, RTS on DenseNet", case, variants, scaled(100, args), args)


def scores(args: Args) -> None:
    """Grad-CAM of logits and of probabilities (Eq. 14)."""
    case = embedded_case(args.images or 100)
    logit, probability = (GradCAM(case.model, score=of) for of in ("logit", "probability"))
    variants: Variants = {"logits": (logit, {}), "probabilities": (probability, {})}
    compare("Score of Grad-CAM", case, variants, scaled(100, args), args)
    apart = metrics.l1(*(each(case.images, case.labels) for each in (logit, probability)))
    print(f"benign maps of the two are {apart.mean():.4f} apart (L1)")


def far(args: Args) -> None:
    """The weight of a patch as CAM's target map, on pixels and on stAdv; L1 and IoU are to it."""
    case, patch = embedded_case(args.images or 24), RandomPatch()
    cam = CAM(case.model)
    wanted = patch(cam, *case[1:])
    print(f"\n## Weight of a far target map, CAM: {len(case.images)} images, L1 and IoU to a patch")
    pixels = partial(ADV2, eps=EPS, steps=scaled(100, args))
    flows = partial(StADV2, bound=2.0, steps=scaled(200, args))
    rows = [("ADV2", pixels, *pair) for pair in FAR]
    rows += [("StADV2", flows, 150, gate) for gate in (0, 30)]
    for title, build, weight, gate in rows:
        distance = MapDistance(weight, gate=gate)
        attack = build(case.model, cam, interpretation=distance, target_map=patch)
        adversarial = towards(attack, case.targets, case.images, args.batch)
        report = evaluate(case.model, cam, case.images, adversarial, case.targets)
        won, maps = report.success, report.adversarial_maps
        l1 = metrics.l1(maps, wanted)[won]
        low, high = interval(l1)
        print(
            f"{title}, weight {weight:g}, times p to the power {gate:g}".ljust(44)
            + f"ASR {won.float().mean():6.1%}  L1 {l1.mean():.4f} [{low:.4f}, {high:.4f}]  "
            f"IoU {metrics.iou(maps, wanted)[won].mean():.3f}",
            flush=True,
        )


CASES: dict[str, Callable[[Args], None]] = {
    case.__name__: case for case in (smoothing, warm, labels, lookahead, encoder, scores, far)
}


def main() -> None:
    """Run the cases named on the command line."""
    args = parse(__doc__, CASES, batch=100)
    for name in args.cases:
        CASES[name](args)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: MIT
"""Print the figures that README and docs quote, on the real models of ``real.py``.

    python examples/benchmark/figures.py cam cifar short grad grad-imagenet curve official cost time

Each case attacks towards random classes within 8/255, rounds to 8 bits, and prints one line per
attack: success rate and confidence over all images; L1, L2 and IoU of adversarial to benign maps
over the successes, with a 95 % bootstrap interval of L1. PGD runs beside it with as many steps.
``--images N`` makes every case smaller, ``--smoke`` makes all of it tiny.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from real import Case, load_case, parse
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torchattacks import PGD

from captum_adv2 import ADV2, Report, evaluate
from captum_adv2.attacks import MapDistance, presets
from captum_adv2.attacks.terms import Schedule, at
from captum_adv2.evaluation.metrics import interval
from captum_adv2.interpreters import CAM, GradCAM, Gradient, Interpreter

sys.path.append(str(Path(__file__).resolve().parents[1]))
from common import INTERPRETERS, embedded_case

EPS = 8 / 255


class Options(NamedTuple):
    """What the command line says."""

    images: int | None
    steps: int | None
    batch: int
    folder: Path
    verbose: bool

    def case(self, name: str, count: int) -> Case:
        """Load a case with ``--images`` pictures, or the figure's own number."""
        return load_case(name, self.images or count, self.folder)

    def scaled(self, steps: int) -> int:
        """Return ``--steps``, or the figure's own number."""
        return min(self.steps or steps, steps)


def towards(attack: Any, targets: Tensor, images: Tensor, batch: int) -> Tensor:
    """Attack images in batches, each towards its own target."""
    attack.set_mode_targeted_by_label(quiet=True)
    parts = zip(images.split(batch), targets.split(batch), strict=True)
    return torch.cat([attack(part, target) for part, target in parts])


def line(name: str, report: Report, cost: str = "") -> None:
    """Print one attack's row."""
    low, high = interval(report.l1[report.success])
    print(f"{name:34s} {report} [L1 95 % {low:.4f} to {high:.4f}] {cost}", flush=True)


def score(
    name: str, attack: Any, case: Case, interpreter: Interpreter, options: Options, cost: str = ""
) -> Report:
    """Attack a case, measure, print a row."""
    start = time.perf_counter()
    adversarial = towards(attack, case.targets, case.images, options.batch)
    seconds = time.perf_counter() - start
    report = evaluate(case.model, interpreter, case.images, adversarial, case.targets)
    line(name, report, f"{cost} {seconds:.0f} s")
    return report


def against_pgd(
    title: str,
    case: Case,
    builders: dict[str, Callable[[nn.Module], Interpreter]],
    steps: int,
    options: Options,
) -> None:
    """Print PGD's and ADV2's rows at equal steps, for each interpreter of a case."""
    print(f"\n## {title}: {len(case.images)} images, {steps} gradient evaluations")
    pgd = PGD(case.model, eps=EPS, steps=steps, random_start=False)
    adversarial = towards(pgd, case.targets, case.images, options.batch)
    for name, build in builders.items():
        interpreter = build(case.model)
        report = evaluate(case.model, interpreter, case.images, adversarial, case.targets)
        line(f"PGD on {name}", report)
        attack = ADV2(case.model, interpreter, eps=EPS, steps=steps, verbose=options.verbose)
        score(f"ADV2 on {name}", attack, case, interpreter, options)


def cam(options: Options) -> None:
    """CAM on SqueezeNet, default settings."""
    case = options.case("squeezenet", 40)
    against_pgd("CAM, SqueezeNet", case, {"CAM": CAM}, options.scaled(100), options)


def cifar(options: Options) -> None:
    """CAM and Grad-CAM on ResNet-56."""
    case = options.case("resnet56", 200)
    builders = {"CAM": CAM, "GradCAM": GradCAM}
    against_pgd("CAM and Grad-CAM, ResNet-56", case, builders, options.scaled(100), options)


def short(options: Options) -> None:
    """CAM with 16 gradient evaluations in all."""
    for name, count in (("resnet56", 200), ("squeezenet", 40)):
        case = options.case(name, count)
        against_pgd(f"CAM in 16, {name}", case, {"CAM": CAM}, options.scaled(16), options)


def grad(options: Options) -> None:
    """GRAD on the CIFAR networks (maps 16x16), default settings."""
    _grad({"resnet20": 200, "resnet56": 200}, options)


def grad_imagenet(options: Options) -> None:
    """GRAD on the ImageNet networks (maps 56x56), default settings."""
    _grad({"squeezenet": 40, "mobilenet": 16, "efficientnet": 16}, options)


def _grad(networks: dict[str, int], options: Options) -> None:
    for name, count in networks.items():
        case = options.case(name, count)
        against_pgd(f"GRAD, {name}", case, {"GRAD": Gradient}, options.scaled(100), options)


def curve(options: Options) -> None:
    """Map distance over the number of steps; RTS and MASK on the embedded residual network."""
    counts = sorted({options.scaled(steps) for steps in (8, 16, 32, 60, 100, 300)})
    for title, case, names in (
        ("ResNet-20", options.case("resnet20", 50), ("CAM", "GradCAM", "GRAD")),
        ("embedded ResNet", embedded_case(options.images or 16), ("RTS", "MASK")),
    ):
        for steps in counts:
            builders = {name: INTERPRETERS[name] for name in names}
            against_pgd(title, case, builders, steps, options)


def official(options: Options) -> None:
    """ADV2's defaults beside the published settings run in full, on the same images."""
    for name, model, build, count in (
        ("CAM", "resnet56", CAM, 50),
        ("GRAD", "resnet20", Gradient, 50),
    ):
        case = options.case(model, count)
        interpreter = build(case.model)
        preset = presets.OFFICIAL[name]
        steps = options.scaled(preset["steps"])
        warmup = preset["warmup"] * steps // preset["steps"]
        print(f"\n## {name}, {model}, {len(case.images)} images, beside the published settings")
        published = Gradient(case.model, smoothing=1e-4) if name == "GRAD" else interpreter
        theirs = ADV2.from_preset(
            case.model,
            published,
            preset,
            steps=steps,
            warmup=warmup,
            interpretation=per_pixel(preset["interpretation"]),
            verbose=options.verbose,
        )
        ours = ADV2(case.model, interpreter, eps=preset["eps"], steps=options.scaled(100))
        for title, attack in (("published", theirs), ("default", ours)):
            units = f_units(case, attack)
            cost = f"{units * attack.steps:.0f} F ({attack.steps} x {units:.2f})"
            score(f"{title} on {name}", attack, case, interpreter, options, cost)


class Scaled(NamedTuple):
    """A schedule times a factor."""

    factor: float
    weight: float | Schedule

    def __call__(self, progress: float) -> float:
        """Return the value at ``progress`` in [0, 1]."""
        return self.factor * at(self.weight, progress)


def per_pixel(distance: MapDistance) -> MapDistance:
    """Return a map loss whose weight keeps its balance on maps of another size than its own."""
    if distance.map_size is None:
        return distance
    height, width = distance.map_size
    weight = Scaled(height * width, distance.weight)
    return replace(distance, weight=weight, reduction="mean", map_size=None)


@contextmanager
def forwards(model: nn.Module) -> Iterator[list[int]]:
    """Count the images that pass forward through a model."""
    seen: list[int] = []
    handle = model.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    try:
        yield seen
    finally:
        handle.remove()


class Flops(TorchDispatchMode):
    """Counts floating point operations with PyTorch's own formulas, double backward included.

    ``FlopCounterMode`` has the same formulas, but its module hooks refuse `torch.autograd.grad`.
    """

    total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation; add what it cost."""
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **(kwargs or {}), out_val=out))
        return out


def flops(run: Callable[[], Any]) -> int:
    """Count the floating point operations of matrix products and convolutions in a call."""
    with Flops() as counter:
        run()
    return counter.total


def f_units(case: Case, attack: Any) -> float:
    """Return the cost of one more step, in forward passes of the batch (F-units)."""
    images, targets = case.images[:2], case.targets[:2]
    attack.set_mode_targeted_by_label(quiet=True)
    with torch.no_grad():
        forward = flops(lambda: case.model(images))
    steps, warmup, totals = attack.steps, getattr(attack, "warmup", None), []
    for count in (5, 10):  # MASK's attack does something every fifth step
        attack.steps = count
        if hasattr(attack, "warmup"):
            attack.warmup = 0
        totals.append(flops(lambda: attack(images, targets)))
    attack.steps = steps
    if hasattr(attack, "warmup"):
        attack.warmup = warmup
    return (totals[1] - totals[0]) / 5 / forward


def cost(options: Options) -> None:
    """F-units an iteration, and forward passes of a whole run, by count."""
    print("\n## Cost of an iteration (F = forward pass of the batch, by FLOPs), forwards of a run")
    for name in ("squeezenet", "resnet20", "mobilenet"):
        case = options.case(name, 2)
        attacks: dict[str, Any] = {"PGD": PGD(case.model, random_start=False)}
        for title, build in (("CAM", CAM), ("GradCAM", GradCAM), ("GRAD", Gradient)):
            attacks[f"ADV2 on {title}"] = ADV2(case.model, build(case.model))
        for title, attack in attacks.items():
            units = f_units(case, attack)
            attack.steps = 20
            with forwards(case.model) as seen:
                attack(case.images, case.targets)
            passes = sum(seen) / len(case.images)
            print(f"{name:12s} {title:16s} {units:5.2f} F; 20 steps run {passes:.1f} forwards")


def wall_time(options: Options) -> None:
    """Time of an iteration over one of torchattacks' PGD, alternated in one run."""
    print("\n## Wall time of an iteration, ADV2 over PGD, alternated")
    for name, count in (("squeezenet", 4), ("resnet56", 32), ("mobilenet", 4)):
        case = options.case(name, count)
        attacks: dict[str, Any] = {"PGD": PGD(case.model, random_start=False)}
        for title, build in (("CAM", CAM), ("GradCAM", GradCAM), ("GRAD", Gradient)):
            attacks[title] = ADV2(case.model, build(case.model))
        rounds = [
            {title: _per_step(attack, case) for title, attack in attacks.items()}
            for _ in range(2 if options.steps else 7)
        ]
        for title in ("CAM", "GradCAM", "GRAD"):
            ratios = [seconds[title] / seconds["PGD"] for seconds in rounds]
            middle, least, most = statistics.median(ratios), min(ratios), max(ratios)
            print(f"{name:12s} {title:8s} median {middle:.2f}, from {least:.2f} to {most:.2f}")


def _per_step(attack: Any, case: Case) -> float:
    """Return the seconds of a step: a long run less a short one, so that set-up cancels."""
    attack.set_mode_targeted_by_label(quiet=True)
    seconds = []
    for steps in (2, 12):
        attack.steps = steps
        start = time.perf_counter()
        attack(case.images, case.targets)
        seconds.append(time.perf_counter() - start)
    return (seconds[1] - seconds[0]) / 10


CASES: dict[str, Callable[[Options], None]] = {
    "cam": cam,
    "cifar": cifar,
    "short": short,
    "grad": grad,
    "grad-imagenet": grad_imagenet,
    "curve": curve,
    "official": official,
    "cost": cost,
    "time": wall_time,
}


def main() -> None:
    """Run the cases named on the command line."""
    args = parse(__doc__, CASES, batch=40)
    steps = 4 if args.smoke else None
    options = Options(args.images, steps, args.batch, args.real, args.verbose)
    for name in args.cases:
        CASES[name](options)


if __name__ == "__main__":
    main()

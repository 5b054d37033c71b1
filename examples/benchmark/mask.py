# SPDX-License-Identifier: MIT
"""MASK and the attacks on it: the figures and the curve that ``docs/mask.md`` quotes.

    python examples/benchmark/mask.py embedded squeezenet paper variants tries cost quality settings

Protocol as in ``figures.py``. Maps are MASK's from scratch on the image rounded to 8 bits, with the
same settings in every row of a table. ``--images N`` makes every case smaller, ``--smoke`` tiny.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from figures import EPS, Flops, f_units, flops, line, towards
from real import Case, load_case, parse
from torch import Tensor
from torchattacks import PGD

from captum_adv2 import ADV2, Report, evaluate
from captum_adv2.attacks import MapDistance, presets
from captum_adv2.evaluation import metrics, visualize
from captum_adv2.interpreters import MASK, Blur, FiniteDifference, Noise

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import embedded_case

from captum_adv2.study.embedded import load_resnet, make_shapes


class Options(NamedTuple):
    """What the command line says."""

    images: int | None
    smoke: bool
    batch: int
    folder: Path
    out: Path
    verbose: bool

    def mask(self, case: Case, **overrides: Any) -> MASK:
        """Return MASK with the settings of the tables, for a case's size of images."""
        if self.smoke:
            overrides["iterations"] = 4
        if case.images.shape[-1] < 128:
            return MASK.small(case.model, **overrides)
        return MASK(case.model, **({"lr": 0.03} | overrides))

    def maps(self, mask: MASK, images: Tensor, classes: Tensor) -> Tensor:
        """Return maps of images, found in batches."""
        parts = zip(images.split(self.batch), classes.split(self.batch), strict=True)
        return torch.cat([mask(part, target) for part, target in parts])

    def scaled(self, steps: int) -> int:
        """Return the figure's own number of steps, or a tiny one."""
        return min(steps, 4) if self.smoke else steps


@contextmanager
def counted(case: Case) -> Iterator[list[float]]:
    """Count what runs inside, in forward passes of all images of a case (F-units)."""
    with torch.no_grad():
        forward = flops(lambda: case.model(case.images[:1])) * len(case.images)
    spent: list[float] = []
    with Flops() as counter:
        yield spent
    spent.append(counter.total / forward)


def attacked(name: str, case: Case, mask: MASK, attack: Any, options: Options) -> tuple[Any, ...]:
    """Attack a case; print a row; return report, F-units and adversarial images."""
    start = time.perf_counter()
    with counted(case) as spent:
        adversarial = towards(attack, case.targets, case.images, options.batch)
    seconds = time.perf_counter() - start
    parts = [
        evaluate(case.model, mask, *(t[part] for t in (case.images, adversarial, case.targets)))
        for part in torch.arange(len(case.images)).split(options.batch)
    ]
    report = Report(*(torch.cat(column) for column in zip(*parts, strict=True)))
    line(name, report, f"{spent[0]:.0f} F, {seconds:.0f} s")
    return report, spent[0], adversarial


def beside_pgd(title: str, case: Case, steps: int, options: Options) -> None:
    """Print PGD's and ADV2's rows, and draw the first pictures."""
    mask = options.mask(case)
    steps = options.scaled(steps)
    print(f"\n## MASK, {title}: {len(case.images)} images; ADV2 {steps} steps, PGD 100")
    pgd = PGD(case.model, eps=EPS, steps=options.scaled(100), random_start=False)
    adv2 = ADV2(case.model, mask, eps=EPS, steps=steps, verbose=options.verbose)
    rows = {}
    for name, attack in (("PGD", pgd), ("ADV2", adv2)):
        report, _units, adversarial = attacked(f"{name} on MASK", case, mask, attack, options)
        rows["benign"] = {"MASK": (case.images[:6], report.benign_maps[:6])}
        rows[name] = {"MASK": (adversarial[:6], report.adversarial_maps[:6])}
    options.out.mkdir(parents=True, exist_ok=True)
    visualize.grid(dict(sorted(rows.items(), key=lambda row: "bPA".index(row[0][0])))).savefig(
        options.out / f"mask-{title.split(',')[0]}.png", dpi=80
    )


def embedded(options: Options) -> None:
    """MASK on the embedded residual network."""
    beside_pgd("embedded", embedded_case(options.images or 100), 300, options)


def squeezenet(options: Options) -> None:
    """MASK on SqueezeNet, 28x28 masks."""
    case = load_case("squeezenet", options.images or 16, options.folder)
    beside_pgd("squeezenet", case, 300, options)


def paper(options: Options) -> None:
    """The default beside the paper's unrolled attack: at equal cost, and at its full budget."""
    case = embedded_case(options.images or 16)
    mask = options.mask(case)
    print(f"\n## The default and the paper's attack, embedded, {len(case.images)} images")

    def unrolled(steps: int) -> ADV2:
        preset = presets.PAPER["MASK"]
        warmup = preset.warmup * steps // preset.steps
        return ADV2.from_preset(
            case.model, mask, preset, eps=EPS, steps=steps, warmup=warmup, verbose=options.verbose
        )

    for steps in (100, 300):
        ours = ADV2(case.model, mask, eps=EPS, steps=options.scaled(steps))
        attacked(f"default, {steps} steps", case, mask, ours, options)
    for steps in (100, 200, presets.PAPER["MASK"].steps):
        theirs = unrolled(options.scaled(steps))
        attacked(f"paper's, {steps} steps", case, mask, theirs, options)


VARIANTS: dict[str, dict[str, float]] = {
    "default": {},
    "shorter cycles": {"cycle": 25},
    "never restarts": {"cycle": 10**9},
    "at MASK's own pace": {"pace": 1.0},
    "value gap": {"damping": 1e6},
    "value gap, never restarts": {"damping": 1e6, "cycle": 10**9, "pace": 1.0},
    "small difference": {"reach": 0.1},
}


def variants(options: Options) -> None:
    """Map distance against cost, for each variant of the default and for the paper's attack."""
    case = embedded_case(options.images or 16)
    mask = options.mask(case)
    print(f"\n## Variants, embedded, {len(case.images)} images")
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, changes in VARIANTS.items():
        points = []
        for steps in (50, 100, 200):
            attack = ADV2(
                case.model,
                mask,
                eps=EPS,
                steps=options.scaled(steps),
                surrogate=FiniteDifference(**changes),  # type: ignore[arg-type]
            )
            report, units, _ = attacked(f"{name}, {steps}", case, mask, attack, options)
            points.append((units, report.l1.mean().item()))
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    points = []
    for steps in (50, 100, 200):
        attack = ADV2.from_preset(
            case.model,
            mask,
            presets.PAPER["MASK"],
            eps=EPS,
            steps=options.scaled(steps),
            warmup=options.scaled(steps) * 2 // 5,
        )
        report, units, _ = attacked(f"paper's, {steps}", case, mask, attack, options)
        points.append((units, report.l1.mean().item()))
    axes.plot(*zip(*points, strict=True), marker="s", color="black", label="paper's, unrolled")
    axes.set(xlabel="cost of the attack (F-units an image)", ylabel="L1 of the maps", xscale="log")
    axes.legend(fontsize=8)
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "mask-variants.png", dpi=80)


def tries(options: Options) -> None:
    """Other settings of the default on SqueezeNet, in a third of the steps: do they do better?"""
    case = load_case("squeezenet", options.images or 6, options.folder)
    mask = options.mask(case)
    print(f"\n## Tries on SqueezeNet, {len(case.images)} images, 100 steps")
    for name, settings in (
        ("default", FiniteDifference()),
        ("shorter cycles", FiniteDifference(cycle=25)),
        ("shorter cycles, map three times", FiniteDifference(cycle=25, gain=0.03)),
    ):
        attack = ADV2(case.model, mask, eps=EPS, steps=options.scaled(100), surrogate=settings)
        attacked(name, case, mask, attack, options)


def cost(options: Options) -> None:
    """F-units an iteration, and of a solution over its forward and backward passes alone."""
    print("\n## Cost of an iteration on MASK, and of MASK itself")
    for name in ("embedded", "squeezenet"):
        squeeze = name == "squeezenet"
        case = load_case(name, 2, options.folder) if squeeze else embedded_case(2)
        mask = options.mask(case)
        for title, attack in (
            ("default", ADV2(case.model, mask)),
            ("PAPER", ADV2.from_preset(case.model, mask, presets.PAPER["MASK"])),
            ("OFFICIAL", ADV2.from_preset(case.model, mask, presets.OFFICIAL["MASK"])),
        ):
            attack.interpretation = MapDistance()  # for maps of any size
            print(f"{name:12s} {title:10s} {f_units(case, attack):6.2f} F an iteration")
        ratio, spread = overhead(case, mask, options)
        print(f"{name:12s} a solution over its passes alone, time: {ratio:.3f} ({spread})")


def overhead(case: Case, mask: MASK, options: Options) -> tuple[float, str]:
    """Return the time of MASK's steps over bare forward and backward passes, alternated."""
    count = 2 if options.smoke else 10
    images = case.images.repeat(8 // len(case.images), 1, 1, 1)
    target = case.targets.repeat(8 // len(case.targets))

    def bare() -> None:
        for _ in range(count):
            leaf = images.clone().requires_grad_()
            score = case.model(leaf).gather(1, target[:, None]).sum()
            torch.autograd.grad(score, leaf)

    def timed(run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    follower = mask.begin(images)
    pairs = [
        timed(lambda: mask.solve(images, target, follower, count)) / timed(bare) for _ in range(9)
    ]
    return statistics.median(pairs), f"{min(pairs):.3f} to {max(pairs):.3f}"


def empty(maps: Tensor) -> Tensor:
    """Return which maps ``(B,)`` have nothing above 0.1."""
    return maps.amax(dim=(1, 2, 3)) <= 0.1


def quality(options: Options) -> None:
    """Whether MASK's maps point at the object: mass inside its mask, beside its share of area."""
    count = options.images or 100
    shapes = make_shapes(count, seed=99)
    model = load_resnet()
    case = Case(model, shapes.images, shapes.labels, shapes.labels)
    maps = options.maps(options.mask(case), case.images, case.labels)
    large = F.interpolate(maps, shapes.images.shape[-2:], mode="bilinear", align_corners=False)
    inside = (large * shapes.masks).sum(dim=(1, 2, 3)) / large.sum(dim=(1, 2, 3)).clamp(min=1e-9)
    area = shapes.masks.float().mean(dim=(1, 2, 3))
    density = inside / area / ((1 - inside) / (1 - area)).clamp(min=1e-9)
    some = ~empty(maps)
    print(f"\n## MASK's maps on the embedded data, {count} images")
    print(
        f"mass inside the object {inside[some].mean():.3f}, object's share of the area "
        f"{area.mean():.3f}; a pixel inside weighs {density[some].median():.1f} times one outside "
        f"(median); maps with nothing above 0.1: {int((~some).sum())}"
    )


def settings(options: Options) -> None:
    """What the settings were chosen by: empty maps, and how far a small change moves a map."""
    case = embedded_case(options.images or 30)
    print(f"\n## Settings of MASK, embedded, {len(case.images)} images")
    for title, overrides in (("start 0.5", {"start": 0.5}), ("its own start", {})):
        maps = options.maps(options.mask(case, **overrides), case.images, case.labels)
        print(f"{title}: {int(empty(maps).sum())} maps with nothing above 0.1", flush=True)
    for perturb in (Blur(8.0), Noise()):
        shift = metrics.l1(*shaken(case, options.mask(case, perturb=perturb), options)).mean()
        print(f"{perturb}: a change by 1/255 moves the map by {shift:.4f} (L1)", flush=True)
    if not options.folder.is_dir():
        print(f"SqueezeNet left out: there is no {options.folder}")
        return
    case = load_case("squeezenet", max(options.images or 4, 2), options.folder)
    first, second = torch.combinations(torch.arange(len(case.images))).T
    print(f"\n## Settings of MASK, SqueezeNet, {len(case.images)} images")
    for lr in (0.1, 0.03):
        maps, after = shaken(case, options.mask(case, lr=lr), options)
        apart = metrics.l1(maps[first], maps[second]).mean()
        print(
            f"lr {lr}: a change by 1/255 moves the map by {metrics.l1(maps, after).mean():.4f} "
            f"(L1), maps of unrelated pictures are {apart:.4f} apart",
            flush=True,
        )


def shaken(case: Case, mask: MASK, options: Options) -> tuple[Tensor, Tensor]:
    """Return maps of a case's images, and of these with every pixel changed by 1/255 at random."""
    up = torch.rand(case.images.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    changed = (case.images + torch.where(up, 1, -1) / 255).clamp(0, 1)
    before, after = (options.maps(mask, x, case.labels) for x in (case.images, changed))
    return before, after


CASES: dict[str, Callable[[Options], None]] = {
    "embedded": embedded,
    "squeezenet": squeezenet,
    "paper": paper,
    "variants": variants,
    "tries": tries,
    "cost": cost,
    "quality": quality,
    "settings": settings,
}


def main() -> None:
    """Run the cases named on the command line."""
    args = parse(__doc__, CASES, batch=20, out="folder for pictures")
    options = Options(args.images, args.smoke, args.batch, args.real, args.out, args.verbose)
    for name in args.cases:
        CASES[name](options)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: MIT
"""MASK and the attacks on it: the figures of ``docs/mask.md``, SqueezeNet's, and variants.

    python examples/benchmark/mask.py embedded squeezenet resnet56 mobilenet paper followers far
    python examples/benchmark/mask.py variants cost quality settings

Protocol as in ``figures.py``. Maps are those of MASK from its initial mask, on images rounded to
8 bits, with the same settings in every row of a table. ``--images N`` makes every case smaller,
``--smoke`` tiny.
"""

from __future__ import annotations

import argparse
import operator
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from figures import EPS, Flops, f_units, flops, line, towards
from real import DEVICE, Case, load_case, parse
from torch import Tensor
from torchattacks import PGD

from captum_adv2 import ADV2, Report, evaluate
from captum_adv2.attacks import MapDistance, RandomClass, RandomPatch, presets
from captum_adv2.evaluation import metrics, visualize
from captum_adv2.interpreters import MASK, FiniteDifference
from captum_adv2.interpreters.mask import Blur, Noise
from captum_adv2.study.embedded import load_densenet, load_resnet, make_shapes
from captum_adv2.study.estimates import contrasted

sys.path.append(str(Path(__file__).resolve().parents[1]))
from common import embedded_case

Args = argparse.Namespace


def mask_for(case: Case, args: Args, **overrides: Any) -> MASK:
    """Return MASK with the settings of the tables, for the size of a case's images."""
    if args.smoke:
        overrides["iterations"] = 4
    if case.images.shape[-1] < 128:
        return MASK.small(case.model, **overrides)
    return MASK(case.model, **({"lr": 0.03} | overrides))


def maps_of(mask: MASK, images: Tensor, classes: Tensor, args: Args) -> Tensor:
    """Return maps of images, found in batches."""
    parts = zip(images.split(args.batch), classes.split(args.batch), strict=True)
    return torch.cat([mask(part, target) for part, target in parts])


def scaled(steps: int, args: Args) -> int:
    """Return a case's number of steps, or a tiny one."""
    return min(steps, 4) if args.smoke else steps


def attacked(
    name: str, case: Case, mask: MASK, attack: Any, args: Args
) -> tuple[Report, float, Tensor]:
    """Attack a case and print a row; return report, F-units an image, adversarial images."""
    with torch.no_grad():
        forward = flops(lambda: case.model(case.images[:1])) * len(case.images)
    start = time.perf_counter()
    with Flops() as counter:
        adversarial = towards(attack, case.targets, case.images, args.batch)
    seconds, units = time.perf_counter() - start, counter.total / forward
    parts = [
        evaluate(case.model, mask, *(t[part] for t in (case.images, adversarial, case.targets)))
        for part in torch.arange(len(case.images)).split(args.batch)
    ]
    report = Report(*(torch.cat(column) for column in zip(*parts, strict=True)))
    line(name, report, f"{units:.0f} F, {seconds:.0f} s")
    return report, units, adversarial


def beside_pgd(title: str, case: Case, args: Args) -> None:
    """Print the rows of PGD and ADV2, and draw the first pictures."""
    mask, steps = mask_for(case, args), 300
    print(f"\n## MASK, {title}: {len(case.images)} images; ADV2 {steps} steps, PGD 100")
    pgd = PGD(case.model, eps=EPS, steps=scaled(100, args), random_start=False)
    adv2 = default(case, mask, steps, args)
    shown: dict[str, Any] = {"benign": None}
    for name, attack in (("PGD", pgd), ("ADV2", adv2)):
        report, _, adversarial = attacked(f"{name} on MASK", case, mask, attack, args)
        shown["benign"] = {"MASK": (case.images[:6], report.benign_maps[:6])}
        shown[name] = {"MASK": (adversarial[:6], report.adversarial_maps[:6])}
    visualize.grid(shown).savefig(args.out / f"mask-{title}.png", dpi=80)


def embedded(args: Args) -> None:
    """MASK on the embedded residual network."""
    beside_pgd("embedded", embedded_case(args.images or 100), args)


def squeezenet(args: Args) -> None:
    """MASK on SqueezeNet, 28x28 masks."""
    beside_pgd("squeezenet", load_case("squeezenet", args.images or 16, args.real), args)


def resnet56(args: Args) -> None:
    """MASK on ResNet-56 on CIFAR-10, 16x16 masks."""
    beside_pgd("resnet56", load_case("resnet56", args.images or 100, args.real), args)


def mobilenet(args: Args) -> None:
    """MASK on MobileNetV2: five followers, late iterates judged, and L1 as a share of PGD's."""
    case = load_case("mobilenet", args.images or 24, args.real)
    mask = mask_for(case, args)
    pgd = PGD(case.model, eps=EPS, steps=scaled(100, args), random_start=False)
    adv2 = default(case, mask, 300, args, followers=5)
    adv2.keep = 4
    print(f"\n## MASK, MobileNetV2, {len(case.images)} images")
    theirs, ours = (
        attacked(name, case, mask, attack, args)[0]
        for name, attack in (("PGD", pgd), ("5 followers, keep 4", adv2))
    )
    won = ours.success & theirs.success
    both = torch.stack([ours.l1, theirs.l1], dim=1)[won].numpy(force=True)
    print(f"L1, share of PGD's: {contrasted(operator.truediv, both)}")


def default(case: Case, mask: MASK, steps: int, args: Args, **changes: Any) -> ADV2:
    """Return the default attack, with changes of its surrogate."""
    settings = {"steps": scaled(steps, args), "surrogate": FiniteDifference(**changes)}
    return ADV2(case.model, mask, eps=EPS, verbose=args.verbose, **settings)


def unrolled(case: Case, mask: MASK, steps: int, args: Args) -> ADV2:
    """Return the paper's attack with another number of steps, two fifths of them regular."""
    preset, steps = presets.PAPER["MASK"], scaled(steps, args)
    changes = {"eps": EPS, "steps": steps, "warmup": steps * 2 // 5, "verbose": args.verbose}
    return ADV2.from_preset(case.model, mask, preset, **changes)


def paper(args: Args) -> None:
    """The default beside the paper's unrolled attack: at equal cost, and at its full budget."""
    case = embedded_case(args.images or 16)
    mask = mask_for(case, args)
    print(f"\n## The default and the paper's attack, embedded, {len(case.images)} images")
    for name, build, counts in (
        ("default", default, (100, 300)),
        ("paper's", unrolled, (100, 200, 1000)),
    ):
        for steps in counts[: 1 if args.smoke else None]:
            attack = build(case, mask, steps, args)
            attacked(f"{name}, {steps} steps", case, mask, attack, args)


NETWORKS = {"DenseNet": load_densenet, "ResNet": load_resnet}


def of(network: str, args: Args) -> Case:
    """Return an embedded network and pictures that it gets right."""
    count, model = args.images or 16, NETWORKS[network]().to(DEVICE)
    case = embedded_case(2 * count)
    with torch.no_grad():
        right = (model(case.images).argmax(dim=1) == case.labels).nonzero()[:count, 0]
    return Case(model, *(part[right] for part in case[1:]))


def followers(args: Args) -> None:
    """One follower and five, and late iterates judged, on both embedded networks."""
    for title in NETWORKS:
        case = of(title, args)
        mask = mask_for(case, args)
        print(f"\n## Followers, embedded {title}, {len(case.images)} images")
        pgd = PGD(case.model, eps=EPS, steps=scaled(100, args), random_start=False)
        attacked("PGD", case, mask, pgd, args)
        for number, keep in ((1, "best"), (1, 12), (5, "best"), (5, 12)):
            attack = default(case, mask, 300, args, followers=number)
            attack.keep = keep
            attacked(f"{number} followers, keep {keep}", case, mask, attack, args)


def far(args: Args) -> None:
    """Target maps that are far, with five followers and late iterates judged."""
    pool = make_shapes(100, seed=5)
    patch, other = RandomPatch(), RandomClass(pool.images.to(DEVICE), pool.labels.to(DEVICE))
    for title, aim in (("ResNet", patch), ("DenseNet", other), ("ResNet", other)):
        case = of(title, args)
        mask = mask_for(case, args)
        attack = default(case, mask, 300, args, followers=5)
        attack.keep, attack.target_map = 12, aim
        print(f"\n## {type(aim).__name__}, embedded {title}, {len(case.images)} images")
        report, _, _ = attacked("to the benign map", case, mask, attack, args)
        won, maps = report.success, report.adversarial_maps
        wanted = aim(mask, *case[1:])
        l1, _, iou = (each[won].mean() for each in metrics.distances(maps, wanted))
        ratio = l1 / report.l1[won].mean()
        print(
            f"to the target map: L1 {l1:.4f}, {ratio:.2f} of that to the benign one, IoU {iou:.3f}"
        )


VARIANTS: dict[str, dict[str, float]] = {
    "default": {},
    "longer cycles": {"cycle": 50},
    "never restarts": {"cycle": 10**9},
    "at MASK's own pace": {"pace": 1.0},
    "value gap": {"damping": 1e6},
    "value gap, never restarts": {"damping": 1e6, "cycle": 10**9, "pace": 1.0},
    "small difference": {"reach": 0.1},
}


def variants(args: Args) -> None:
    """Map distance against cost, for each variant of the default and for the paper's attack."""
    case = embedded_case(args.images or 16)
    mask = mask_for(case, args)
    builders = {name: partial(default, **changes) for name, changes in VARIANTS.items()}
    print(f"\n## Variants, embedded, {len(case.images)} images")
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, build in (builders | {"paper's, unrolled": unrolled}).items():
        points = []
        for steps in (50,) if args.smoke else (50, 100, 200):
            attack = build(case, mask, steps, args)
            report, units, _ = attacked(f"{name}, {steps}", case, mask, attack, args)
            points.append((units, report.l1.mean().item()))
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xlabel="cost of the attack (F-units an image)", ylabel="L1 of the maps", xscale="log")
    axes.legend(fontsize=8)
    figure.savefig(args.out / "mask-variants.png", dpi=80)


def cost(args: Args) -> None:
    """F-units an iteration, and of a solution over its forward and backward passes alone."""
    print("\n## Cost of an iteration on MASK, and of MASK itself")
    for name in ("embedded", "squeezenet"):
        case = embedded_case(2) if name == "embedded" else load_case(name, 2, args.real)
        mask = mask_for(case, args)
        for title, attack in (
            ("default", ADV2(case.model, mask)),
            ("PAPER", ADV2.from_preset(case.model, mask, presets.PAPER["MASK"])),
            ("OFFICIAL", ADV2.from_preset(case.model, mask, presets.OFFICIAL["MASK"])),
        ):
            attack.interpretation = MapDistance()  # for maps of any size
            print(f"{name:12s} {title:10s} {f_units(case, attack):6.2f} F an iteration")
        ratios = [overhead(case, mask, 2 if args.smoke else 10) for _ in range(9)]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(f"{name:12s} time over passes alone: {statistics.median(ratios):.3f} ({spread})")


def overhead(case: Case, mask: MASK, count: int) -> float:
    """Return the time of some of MASK's steps over bare forward and backward passes."""
    images, target = case.images.repeat(4, 1, 1, 1), case.targets.repeat(4)
    scene, follower = mask.scene(images, target), mask.begin(images)
    start = time.perf_counter()
    for _ in range(count):
        follower = mask.descend(scene, follower)
    middle = time.perf_counter()
    for _ in range(count):
        leaf = images.clone().requires_grad_()
        torch.autograd.grad(case.model(leaf).gather(1, target[:, None]).sum(), leaf)
    return (middle - start) / (time.perf_counter() - middle)


def empty(maps: Tensor) -> Tensor:
    """Return which maps ``(B,)`` have nothing above 0.1."""
    return maps.amax(dim=(1, 2, 3)) <= 0.1


def quality(args: Args) -> None:
    """Whether MASK's maps point at the object: mass inside its mask, beside its share of area."""
    shapes = make_shapes(args.images or 100, seed=99)
    case = Case(load_resnet(), shapes.images, shapes.labels, shapes.labels).to(DEVICE)
    maps = maps_of(mask_for(case, args), case.images, case.labels, args)
    large = F.interpolate(maps, shapes.images.shape[-2:], mode="bilinear")
    masks = shapes.masks.to(large)
    inside = (large * masks).sum(dim=(1, 2, 3)) / large.sum(dim=(1, 2, 3)).clamp(min=1e-9)
    area = masks.mean(dim=(1, 2, 3))
    density = inside / area / ((1 - inside) / (1 - area)).clamp(min=1e-9)
    some = ~empty(maps)
    print(f"\n## MASK's maps on the embedded data, {len(maps)} images")
    print(
        f"mass inside the object {inside[some].mean():.3f}, object's share of the area "
        f"{area.mean():.3f}; a pixel inside weighs {density[some].median():.1f} times one outside "
        f"(median); maps with nothing above 0.1: {int((~some).sum())}"
    )


def settings(args: Args) -> None:
    """The criteria for the settings: empty maps, and how far a small change moves a map."""
    case = embedded_case(args.images or 30)
    print(f"\n## Settings of MASK, embedded, {len(case.images)} images")
    for title, overrides in (("start 0.5", {"start": 0.5}), ("its own start", {})):
        maps = maps_of(mask_for(case, args, **overrides), case.images, case.labels, args)
        print(f"{title}: {int(empty(maps).sum())} maps with nothing above 0.1")
    for perturb in (Blur(8.0), Noise()):
        moved = shift(case, mask_for(case, args, perturb=perturb), args)[1]
        print(f"{perturb}: a change by 1/255 moves the map by {moved:.4f} (L1)")
    if not args.real.is_dir():
        print(f"SqueezeNet left out: there is no {args.real}")
        return
    case = load_case("squeezenet", max(args.images or 4, 2), args.real)
    first, second = torch.combinations(torch.arange(len(case.images))).T
    print(f"\n## Settings of MASK, SqueezeNet, {len(case.images)} images")
    for lr in (0.1, 0.03):
        maps, moved = shift(case, mask_for(case, args, lr=lr), args)
        apart = metrics.l1(maps[first], maps[second]).mean()
        print(
            f"lr {lr}: a change by 1/255 moves the map by {moved:.4f} (L1), maps of unrelated "
            f"pictures are {apart:.4f} apart"
        )


def shift(case: Case, mask: MASK, args: Args) -> tuple[Tensor, Tensor]:
    """Return maps, and how far a change of every pixel by 1/255 at random moves them (L1)."""
    up = torch.rand(case.images.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    changed = (case.images + torch.where(up, 1, -1).to(DEVICE) / 255).clamp(0, 1)
    before, after = (maps_of(mask, x, case.labels, args) for x in (case.images, changed))
    return before, metrics.l1(before, after).mean()


RESULTS = embedded, squeezenet, resnet56, mobilenet, paper, followers, far, variants
CASES: dict[str, Callable[[Args], None]] = {
    case.__name__: case for case in (*RESULTS, cost, quality, settings)
}


def main() -> None:
    """Run the cases named on the command line."""
    args = parse(__doc__, CASES, batch=20, out="folder for pictures")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.cases:
        CASES[name](args)


if __name__ == "__main__":
    main()

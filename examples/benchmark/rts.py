# SPDX-License-Identifier: MIT
"""RTS and the attack on it: the figures that ``docs/rts.md`` quotes.

    python examples/benchmark/rts.py quality attack encoder cost
    python examples/benchmark/rts.py cifar --models FOLDER    # trained by train_rts.py cifar10

Protocol as in ``figures.py``. ``--images N`` makes every case smaller, ``--smoke`` tiny.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from figures import EPS, f_units, line, towards
from mask import embedded_case
from real import Case, load_case, parse
from torch import Tensor
from torchattacks import PGD

from captum_adv2 import ADV2, evaluate
from captum_adv2.evaluation import localization
from captum_adv2.interpreters import RTS, EncoderGuided, MaskingModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from captum_adv2.study.embedded.models import load_densenet, load_resnet, load_rts
from captum_adv2.study.embedded.shapes import Shapes, make_shapes


class Options(NamedTuple):
    """What the command line says."""

    images: int | None
    smoke: bool
    batch: int
    folder: Path
    models: Path
    verbose: bool

    def scaled(self, steps: int) -> int:
        """Return the figure's own number of steps, or a tiny one."""
        return min(steps, 4) if self.smoke else steps


def rows(title: str, case: Case, rts: RTS, options: Options, weights: tuple[float, ...]) -> None:
    """Print PGD's row, and one of ADV2 for each weight of the encoder's loss."""
    steps = options.scaled(100)
    print(f"\n## RTS, {title}: {len(case.images)} images, {steps} gradient evaluations")
    pgd = PGD(case.model, eps=EPS, steps=steps, random_start=False)
    attacks = {"PGD": pgd} | {
        f"ADV2, encoder's loss {weight:g}": ADV2(
            case.model,
            rts,
            eps=EPS,
            steps=steps,
            surrogate=EncoderGuided(weight),
            verbose=options.verbose,
        )
        for weight in weights
    }
    for name, attack in attacks.items():
        adversarial = towards(attack, case.targets, case.images, options.batch)
        line(name, evaluate(case.model, rts, case.images, adversarial, case.targets))


def attack(options: Options) -> None:
    """ADV2 on RTS, embedded residual network; its encoder is the classifier."""
    case = embedded_case(options.images or 100)
    rows("embedded", case, RTS(case.model, load_rts(case.model)), options, (0.1,))


def cifar(options: Options) -> None:
    """ADV2 on RTS, ResNet-20 on CIFAR-10; its encoder is the classifier."""
    path = options.models / "rts-cifar10.pt"
    if not path.exists():
        print(f"\n## RTS, ResNet-20: skipped, there is no {path}; see examples/train_rts.py")
        return
    case = load_case("resnet20", options.images or 200, options.folder)
    masking_model = MaskingModel.load(path, case.model)
    rows("ResNet-20", case, RTS(case.model, masking_model), options, (0.1,))


def separate_case(count: int) -> tuple[Case, RTS]:
    """Return the DenseNet, with pictures it gets right, and RTS with the other net as encoder."""
    model = load_densenet()
    case = embedded_case(2 * count)
    with torch.no_grad():
        right = (model(case.images).argmax(dim=1) == case.labels).nonzero()[:count, 0]
    case = Case(model, case.images[right], case.labels[right], case.targets[right])
    return case, RTS(model, load_rts(load_resnet(), "densenet"))


def encoder(options: Options) -> None:
    """With and without the encoder's loss: encoder = classifier, and another network's encoder."""
    case = embedded_case(options.images or 100)
    weights = (0.0, 0.1, 1.0)
    rts = RTS(case.model, load_rts(case.model))
    rows("the encoder is the classifier", case, rts, options, weights)
    case, rts = separate_case(options.images or 100)
    rows("DenseNet, a ResNet for encoder", case, rts, options, weights)


def cost(options: Options) -> None:
    """F-units an iteration."""
    print("\n## Cost of an iteration on RTS")
    case = embedded_case(2)
    shared = ADV2(case.model, RTS(case.model, load_rts(case.model)))
    print(f"the encoder is the classifier: {f_units(case, shared):.2f} F an iteration")
    # The same network a second time, so that one forward pass of either is one F.
    twin = load_resnet()
    separate = ADV2(case.model, RTS(case.model, load_rts(twin)))
    print(f"an encoder of its own:         {f_units(case, separate):.2f} F an iteration")


def judged(name: str, maps: Tensor, shapes: Shapes) -> None:
    """Print how well maps point at the objects."""
    size = shapes.images.shape[-2:]
    large = F.interpolate(maps, size, mode="bilinear", align_corners=False)
    masks = shapes.masks.float()
    area, mass = masks.mean(dim=(1, 2, 3)), large.sum(dim=(1, 2, 3)).clamp(min=1e-9)
    inside = (large * masks).sum(dim=(1, 2, 3)) / mass
    density = inside / area / ((1 - inside) / (1 - area)).clamp(min=1e-9)
    found = localization.boxes(maps, size)
    wrong = localization.wrong(found, shapes.boxes).float().mean()
    print(
        f"{name:34s} mass inside {inside.mean():.3f} (share of area {area.mean():.3f}); a pixel "
        f"inside weighs {density.median():.2f} times one outside (median); mean {maps.mean():.3f}; "
        f"localisation error {wrong:.1%}"
    )


@torch.no_grad()
def quality(options: Options) -> None:
    """Whether the maps point at the object: trained, untrained, and asked for an absent class."""
    shapes = make_shapes(options.images or 500, seed=99)
    print(f"\n## RTS's maps on the embedded data, {len(shapes.labels)} images")
    model = load_resnet()
    torch.manual_seed(0)
    untrained = MaskingModel(model, image_shape=shapes.images.shape[1:])
    other = (shapes.labels + 1) % 10
    for name, masking_model, target in (
        ("RTS", load_rts(model), shapes.labels),
        ("RTS, untrained", untrained, shapes.labels),
        ("RTS, asked for an absent class", load_rts(model), other),
        ("RTS^A", load_rts(model, "resnet-aid"), shapes.labels),
        ("RTS^A, asked for an absent class", load_rts(model, "resnet-aid"), other),
    ):
        judged(name, masking_model(shapes.images, target), shapes)


CASES: dict[str, Callable[[Options], None]] = {
    "quality": quality,
    "attack": attack,
    "encoder": encoder,
    "cost": cost,
    "cifar": cifar,
}


def main() -> None:
    """Run the cases named on the command line."""
    args = parse(__doc__, CASES, batch=100, models="folder of models that train_rts.py wrote")
    options = Options(args.images, args.smoke, args.batch, args.real, args.models, args.verbose)
    for name in args.cases:
        CASES[name](options)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: MIT
"""RTS and the attack on it: the figures of ``docs/rts.md``.

    python examples/benchmark/rts.py quality attack encoder cost
    python examples/benchmark/rts.py cifar --models FOLDER    # trained by train_rts.py cifar10

Protocol as in ``figures.py``. ``--images N`` makes every case smaller, ``--smoke`` tiny.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from figures import EPS, f_units, line, towards
from mask import embedded_case, scaled
from real import DEVICE, Case, load_case, parse
from torch import Tensor
from torchattacks import PGD

from captum_adv2 import ADV2, evaluate
from captum_adv2.evaluation import localization
from captum_adv2.interpreters import RTS, EncoderGuided, MaskingModel
from captum_adv2.study.embedded import Shapes, load_densenet, load_resnet, load_rts, make_shapes

Args = argparse.Namespace


def rows(title: str, case: Case, rts: RTS, args: Args, *weights: float) -> None:
    """Print the row of PGD, and one of ADV2 for each weight of the encoder's loss."""
    steps = scaled(100, args)
    print(f"\n## RTS, {title}: {len(case.images)} images, {steps} gradient evaluations")
    settings = {"eps": EPS, "steps": steps, "verbose": args.verbose}
    attacks = {"PGD": PGD(case.model, eps=EPS, steps=steps, random_start=False)} | {
        f"ADV2, encoder's loss {weight:g}": ADV2(
            case.model, rts, surrogate=EncoderGuided(weight), **settings
        )
        for weight in weights
    }
    for name, attack in attacks.items():
        adversarial = towards(attack, case.targets, case.images, args.batch)
        line(name, evaluate(case.model, rts, case.images, adversarial, case.targets))


def attack(args: Args) -> None:
    """ADV2 on RTS, embedded residual network; its encoder is the classifier."""
    case = embedded_case(args.images or 100)
    rows("embedded", case, RTS(case.model, load_rts(case.model)), args, 0.1)


def cifar(args: Args) -> None:
    """ADV2 on RTS, ResNet-20 on CIFAR-10; its encoder is the classifier."""
    path = args.models / "rts-cifar10.pt"
    if not path.exists():
        print(f"\n## RTS, ResNet-20: skipped, there is no {path}; see examples/train_rts.py")
        return
    case = load_case("resnet20", args.images or 200, args.real)
    rows("ResNet-20", case, RTS(case.model, MaskingModel.load(path, case.model)), args, 0.1)


def encoder(args: Args) -> None:
    """With and without the encoder's loss: encoder = classifier, and another network's encoder."""
    count, weights = args.images or 100, (0.0, 0.1, 1.0)
    case = embedded_case(count)
    rows(
        "the encoder is the classifier", case, RTS(case.model, load_rts(case.model)), args, *weights
    )
    model, case = load_densenet().to(DEVICE), embedded_case(2 * count)
    with torch.no_grad():
        right = (model(case.images).argmax(dim=1) == case.labels).nonzero()[:count, 0]
    case = Case(model, *(part[right] for part in case[1:]))
    rts = RTS(model, load_rts(load_resnet().to(DEVICE), "densenet"))
    rows("DenseNet with a ResNet as encoder", case, rts, args, *weights)


def cost(args: Args) -> None:
    """F-units an iteration."""
    print("\n## Cost of an iteration on RTS")
    case = embedded_case(2)
    # An encoder of its own is the same network again, so that one forward pass of either is one F.
    for title, network in (
        ("the classifier", case.model),
        ("of its own", load_resnet().to(DEVICE)),
    ):
        units = f_units(case, ADV2(case.model, RTS(case.model, load_rts(network))))
        print(f"encoder {title:14s} {units:.2f} F an iteration")


@torch.no_grad()
def quality(args: Args) -> None:
    """Whether the maps point at the object: trained, untrained, and for an absent class."""
    shapes = make_shapes(args.images or 500, seed=99)
    print(f"\n## RTS's maps on the embedded data, {len(shapes.labels)} images")
    model = load_resnet()
    torch.manual_seed(0)
    untrained = MaskingModel(model, image_shape=shapes.images.shape[1:])
    other = (shapes.labels + 1) % 10
    for name, masking_model, target in (
        ("RTS", load_rts(model), shapes.labels),
        ("RTS, untrained", untrained, shapes.labels),
        ("RTS, an absent class", load_rts(model), other),
        ("RTS^A", load_rts(model, "resnet-aid"), shapes.labels),
        ("RTS^A, an absent class", load_rts(model, "resnet-aid"), other),
    ):
        judge(name, masking_model(shapes.images, target), shapes)


def judge(name: str, maps: Tensor, shapes: Shapes) -> None:
    """Print how well maps point at the objects."""
    size = shapes.images.shape[-2:]
    large, masks = F.interpolate(maps, size, mode="bilinear"), shapes.masks.float()
    area, mass = masks.mean(dim=(1, 2, 3)), large.sum(dim=(1, 2, 3)).clamp(min=1e-9)
    inside = (large * masks).sum(dim=(1, 2, 3)) / mass
    density = inside / area / ((1 - inside) / (1 - area)).clamp(min=1e-9)
    wrong = localization.wrong(localization.boxes(maps, tuple(size)), shapes.boxes).float().mean()
    print(
        f"{name:24s} mass inside {inside.mean():.3f} (share of area {area.mean():.3f}); a pixel "
        f"inside weighs {density.median():.2f} times one outside (median); mean {maps.mean():.3f}; "
        f"localisation error {wrong:.1%}"
    )


CASES: dict[str, Callable[[Args], None]] = {
    case.__name__: case for case in (quality, attack, encoder, cost, cifar)
}


def main() -> None:
    """Run the cases named on the command line."""
    args = parse(__doc__, CASES, batch=100, models="folder of models that train_rts.py wrote")
    for name in args.cases:
        CASES[name](args)


if __name__ == "__main__":
    main()

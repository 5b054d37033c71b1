# SPDX-License-Identifier: MIT
"""Shared by the scripts of one question each: command line, models, pictures, interpreters."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmark.real import DEVICE, Case
from torch import Tensor, nn

from captum_adv2.attacks.frameworks import quantize
from captum_adv2.evaluation.metrics import interval
from captum_adv2.interpreters import CAM, MASK, RTS, GradCAM, Gradient, Interpreter
from captum_adv2.study import embedded

EPS = 8 / 255
Rows = defaultdict[str, dict[str, tuple[Tensor, Tensor]]]  # what `visualize.grid` draws


class Subject(NamedTuple):
    """A classifier, pictures it gets right with random target classes, and its interpreters."""

    name: str
    case: Case
    interpreters: dict[str, Interpreter]


def _rts(model: nn.Module) -> RTS:
    """Return RTS for either classifier; the residual network is the encoder."""
    if isinstance(model[1], embedded.SmallResNet):
        return RTS(model, embedded.load_rts(model))
    return RTS(model, embedded.load_rts(embedded.load_resnet().to(DEVICE), "densenet"))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ResNet": embedded.load_resnet,
    "DenseNet": embedded.load_densenet,
}
INTERPRETERS: dict[str, Callable[[nn.Module], Interpreter]] = {
    "CAM": CAM,
    "GradCAM": GradCAM,
    "GRAD": Gradient,
    "RTS": _rts,
    "MASK": MASK.small,
}


def options(
    doc: str,
    interpreters: Collection[str],
    steps: int,
    **numbers: tuple[float, str],
) -> argparse.Namespace:
    """Read the command line of a script with a docstring, some defaults, and further options.

    Each further option is the default and the help of a number.
    """
    title, _, text = doc.partition("\n")
    parser = argparse.ArgumentParser(
        description=title, epilog=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=[*MODELS], help="classifiers")
    add("--interpreters", nargs="+", choices=INTERPRETERS, default=[*interpreters], help="columns")
    add("--images", type=int, default=100, help="pictures a model (default: 100)")
    add("--mask-images", type=int, default=16, help="pictures for MASK, which is slow (16)")
    add("--steps", type=int, default=steps, help=f"gradient evaluations (default: {steps})")
    for name, (value, purpose) in numbers.items():
        add(f"--{name}", type=float, default=value, help=f"{purpose} (default: {value:g})")
    return parsed(parser)


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line, with the options that every script has."""
    add = parser.add_argument
    add("--out", type=Path, default=Path(), metavar="FOLDER", help="for the picture")
    add("--verbose", action="store_true", help="show progress bars")
    add("--smoke", action="store_true", help="two pictures, four steps: seconds")
    args = parser.parse_args()
    if args.smoke:
        args.images, args.steps = 2, 4
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    return args


def embedded_case(count: int) -> Case:
    """Return the embedded residual network with pictures it gets right, and random targets."""
    model = embedded.load_resnet()
    shapes = embedded.make_shapes(2 * count, seed=99)
    with torch.no_grad():
        logits = torch.cat([model(part) for part in shapes.images.split(100)])
    right = (logits.argmax(dim=1) == shapes.labels).nonzero()[:count, 0]
    labels = shapes.labels[right]
    shift = torch.randint(
        1, len(embedded.CLASSES), labels.shape, generator=torch.Generator().manual_seed(0)
    )
    targets = (labels + shift) % len(embedded.CLASSES)
    return Case(model, shapes.images[right], labels, targets).to(DEVICE)


def subjects(args: argparse.Namespace) -> list[Subject]:
    """Return the chosen classifiers, on the same pictures, which each of them gets right."""
    models = {name: MODELS[name]().to(DEVICE) for name in args.models}
    case = embedded_case(2 * args.images)
    with torch.no_grad():
        wrong = [model(case.images).argmax(dim=1) != case.labels for model in models.values()]
    right = (~torch.stack(wrong).any(dim=0)).nonzero()[: args.images, 0]
    pictures = [part[right] for part in case[1:]]
    short = {"MASK": partial(MASK.small, iterations=4)} if args.smoke else {}
    builders = INTERPRETERS | short
    found = []
    for name, model in models.items():
        interpreters = {title: builders[title](model) for title in args.interpreters}
        found.append(Subject(name, Case(model, *pictures), interpreters))
    return found


def first(case: Case, count: int) -> Case:
    """Return a case with its first pictures."""
    return Case(case.model, *(part[:count] for part in case[1:]))


def few(case: Case, name: str, args: argparse.Namespace) -> Case:
    """Return the pictures for an interpreter: all of them, or the first few for MASK."""
    return first(case, args.mask_images if name == "MASK" else args.images)


def attacked(attack: Any, case: Case, batch: int = 50) -> Tensor:
    """Attack every picture towards its target class; round to 8 bits."""
    attack.set_mode_targeted_by_label(quiet=True)
    parts = zip(case.images.split(batch), case.targets.split(batch), strict=True)
    return quantize(torch.cat([attack(images, target) for images, target in parts]))


def mean(values: Tensor) -> str:
    """Return a mean and its 95 % bootstrap interval, as text of 23 characters."""
    low, high = interval(values)
    return f"{values.mean():.4f} [{low:.4f}, {high:.4f}]".ljust(23)


def share(flags: Tensor) -> str:
    """Return a share and its 95 % bootstrap interval, as text."""
    low, high = interval(flags)
    return f"{flags.float().mean():4.0%} [{low:.0%}, {high:.0%}]"

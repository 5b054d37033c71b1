# SPDX-License-Identifier: MIT
"""What the scripts of one question each share: command line, models, pictures, interpreters."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_adv2.interpreters import CAM, MASK, RTS, GradCAM, Gradient, Interpreter
from captum_adv2.study.embedded.models import SmallResNet, load_densenet, load_resnet, load_rts

sys.path.insert(0, str(Path(__file__).resolve().parent / "benchmark"))

from figures import EPS, interval, towards
from mask import embedded_case
from real import Case

__all__ = [
    "EPS",
    "INTERPRETERS",
    "Case",
    "Subject",
    "attacked",
    "few",
    "interval",
    "mean",
    "options",
    "subjects",
]


class Subject(NamedTuple):
    """A classifier, pictures it gets right with random target classes, and what explains it."""

    name: str
    case: Case
    interpreters: dict[str, Interpreter]


def _rts(model: nn.Module) -> RTS:
    """Return RTS for either classifier; the residual network is the encoder."""
    if isinstance(model, nn.Sequential) and isinstance(model[1], SmallResNet):
        return RTS(model, load_rts(model))
    return RTS(model, load_rts(load_resnet(), "densenet"))


MODELS: dict[str, Callable[[], nn.Module]] = {"ResNet": load_resnet, "DenseNet": load_densenet}
INTERPRETERS: dict[str, Callable[[nn.Module], Interpreter]] = {
    "CAM": CAM,
    "GradCAM": GradCAM,
    "GRAD": partial(Gradient, smoothing=1e-2),  # h(z) wide enough for pre-activations near 0.5
    "RTS": _rts,
    "MASK": MASK.small,
}


def options(
    doc: str,
    interpreters: Collection[str],
    steps: int,
    models: Collection[str] = tuple(MODELS),
    **numbers: tuple[float, str],
) -> argparse.Namespace:
    """Read the command line; ``--smoke`` means two pictures and four steps.

    Args:
        doc: The script's docstring.
        interpreters: Which ones, unless it says otherwise.
        steps: Gradient evaluations an attack, unless it says otherwise.
        models: Which ones, unless it says otherwise.
        **numbers: Further options: what each is unless it says otherwise, and what it means.
    """
    title, _, text = doc.partition("\n")
    parser = argparse.ArgumentParser(
        description=title, epilog=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        default=[*models],
        metavar="NAME",
        help=f"classifiers, of {', '.join(MODELS)} (default: {' '.join(models)})",
    )
    parser.add_argument(
        "--interpreters",
        nargs="+",
        choices=INTERPRETERS,
        default=[*interpreters],
        metavar="NAME",
        help=f"of {', '.join(INTERPRETERS)} (default: {' '.join(interpreters)}); MASK is slow",
    )
    for name, default, purpose in (
        ("--images", 100, "pictures a model"),
        ("--mask-images", 16, "pictures for MASK"),
        ("--steps", steps, "gradient evaluations an attack"),
    ):
        parser.add_argument(
            name, type=int, default=default, metavar="N", help=f"{purpose} (default: {default})"
        )
    for name, (value, purpose) in numbers.items():
        parser.add_argument(
            f"--{name}",
            type=float,
            default=value,
            metavar="X",
            help=f"{purpose} (default: {value:g})",
        )
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="FOLDER", help="for the picture"
    )
    parser.add_argument("--verbose", action="store_true", help="show progress bars")
    parser.add_argument("--smoke", action="store_true", help="two pictures, four steps: seconds")
    args = parser.parse_args()
    if args.smoke:
        args.images, args.steps = 2, 4
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def subjects(args: argparse.Namespace) -> list[Subject]:
    """Return the classifiers asked for, on the same pictures, which each of them gets right."""
    models = {name: MODELS[name]() for name in args.models}
    case = embedded_case(2 * args.images)
    with torch.no_grad():
        wrong = [model(case.images).argmax(dim=1) != case.labels for model in models.values()]
    right = (~torch.stack(wrong).any(dim=0)).nonzero()[: args.images, 0]
    images, labels, targets = (part[right] for part in case[1:])
    builders = dict(INTERPRETERS)
    if args.smoke:
        builders["MASK"] = partial(MASK.small, iterations=4)
    found = []
    for name, model in models.items():
        interpreters = {}
        for title in args.interpreters:
            try:
                interpreters[title] = builders[title](model)
            except FileNotFoundError as error:
                missing = Path(error.filename).name
                print(f"{name}: {title} left out, there is no {missing}; see train_rts.py")
        found.append(Subject(name, Case(model, images, labels, targets), interpreters))
    return found


def few(case: Case, name: str, args: argparse.Namespace) -> Case:
    """Return the pictures for an interpreter: all of them, or the first few for MASK."""
    count = args.mask_images if name == "MASK" else args.images
    return Case(case.model, *(part[:count] for part in case[1:]))


def attacked(attack: Any, case: Case) -> Tensor:
    """Attack every picture towards its target class; round to 8 bits."""
    return (towards(attack, case.targets, case.images, batch=50) * 255).round() / 255


def mean(values: Tensor) -> str:
    """Return a mean and its 95 % bootstrap interval, as text of 23 characters."""
    low, high = interval(values) if len(values) else (torch.nan, torch.nan)
    return f"{values.mean():.4f} [{low:.4f}, {high:.4f}]".ljust(23)

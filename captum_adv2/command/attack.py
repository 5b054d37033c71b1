# SPDX-License-Identifier: MIT
"""``python -m captum_adv2 attack``: ADV2 on pictures of one's own."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2

from captum_adv2.command import files
from captum_adv2.command.work import Scene, attacked
from captum_adv2.interpreters import Interpreter
from captum_adv2.interpreters.boundary import outputs_checked
from captum_adv2.spec import Count, Index, Unit, checked
from captum_adv2.study import classifiers, cli
from captum_adv2.study import settings as study
from captum_adv2.study.classifiers import Classifier, find_class
from captum_adv2.study.data import read
from captum_adv2.study.settings import label, option
from captum_adv2.study.subjects import INTERPRETERS, build_interpreter

_DESCRIPTION = """\
Change pictures so that a classifier sees a class of your choice while attribution maps look as
before. Beside it, PGD is run, which looks at the class alone. The adversarial images are written as
PNG files, read again, and judged as they were read."""

_EPILOG = """\
examples:
  with no internet, after pip install ".[demo]":
    python -m captum_adv2 attack cat.jpg --target "school bus"
  torchvision's ResNet-50, two interpreters:
    python -m captum_adv2 attack cat.jpg dog.jpg --model resnet50 --interpreter CAM GRAD
  a network of one's own: a function that returns it, and a file with its weights:
    python -m captum_adv2 attack cat.jpg --model my.networks:build --weights net.pt \\
        --normalise 0.485,0.456,0.406 0.229,0.224,0.225 --classes names.txt

exit status: 0; 1 if an image is not of the target class when read again; 2 for wrong arguments
"""

_UPRIGHT = v2.Lambda(ImageOps.exif_transpose, Image.Image)  # as a camera was held


@checked
@dataclass(frozen=True)
class Settings:
    """What is attacked, and how; ``python -m captum_adv2 attack --help`` explains each field."""

    model: str = option(
        "efficientnet-lite0",
        "classifier: efficientnet-lite0 (its weights are in a package), a name of torchvision's, "
        "timm:NAME, hf:NAME, embedded:resnet, or a function that returns one, "
        "package.module:function",
    )
    weights: str = option("", "file of the model's weights, a state dict by torch.save")
    normalise: tuple[str, ...] = option(
        (),
        "mean and standard deviation, each a number or one a channel (0.5,0.5,0.5), of a model "
        "that takes normalised images; known for named models",
    )
    size: Index = option(0, "side of the images in pixels; 0: that of the model's training")
    classes: str = option(
        "", "file with the names of the classes, one a line, or imagenet; known for named models"
    )
    interpreter: tuple[str, ...] = option(
        ("CAM",),
        "one or more of GRAD, CAM, MASK, RTS, RTS-A, GradCAM, GradCAM-P, IG, SmoothGrad, Ensemble, "
        "each attacked by itself; or a function of a model, package.module:function; of Captum's "
        "methods, captum.attr:Saliency",
    )
    masking_model: str = option("", "file of RTS's masking model, whose encoder is the model")
    target: str = option("random", "name or number of the class to reach, or random")
    map: str = option(
        "benign", "what the maps should show: benign (as before), patch, or a picture's file"
    )
    eps: Unit = option(
        8 / 255, "largest change of a pixel of images in [0, 1]; 8/255 is 8 of their 255 levels"
    )
    steps: Count = option(100, "gradient evaluations of an attack")
    seed: Index = option(0, "of random target classes and patches")


def add_to(commands: Any) -> None:
    """Add the command to those of a parser."""
    parser = commands.add_parser(
        "attack",
        help="pictures of your own: another class, the same map",
        usage="%(prog)s PICTURE [PICTURE ...] [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "pictures",
        nargs="+",
        type=Path,
        metavar="PICTURE",
        help="file of a picture; options follow",
    )
    add("--out", type=Path, default=Path("attack"), help="folder of the results (default: attack)")
    add("--quiet", action="store_true", help="show no progress")
    cli.declare(parser, Settings)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace, command: str) -> int:
    """Attack pictures; write and print the results; return the exit status."""
    settings = Settings(**cli.chosen(args, Settings))
    scene = prepare(settings, args.pictures)
    folder = files.Folder.made(args.out, args.pictures)
    rows = list(attacked(scene, folder, verbose=not args.quiet))
    failed = [row for row in rows if row.attack == "ADV2" and not row.success]
    folder.write(rows, scene, settings, command)
    print(files.table(rows, scene, folder))
    return 1 if failed else 0


def prepare(settings: Settings, pictures: Sequence[Path]) -> Scene:
    """Return all that an attack needs; raise where something of it is wrong."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = classifiers.read_names(settings.classes) if settings.classes else ()
    classifier = classifiers.load(
        settings.model,
        weights=settings.weights,
        names=names,
        normalise=_normalisation(settings.normalise),
    )
    classifier.model.to(device)
    side = settings.size or classifier.size
    resize = round(side * 8 / 7) if settings.size else classifier.resize
    cut = v2.Compose([_UPRIGHT, v2.Resize(resize, antialias=True), v2.CenterCrop(side)])
    images = torch.stack([read(file, 0, cut).image for file in pictures]).to(device)
    logits = _logits(classifier, settings.model, images)
    return Scene(
        classifier,
        images,
        logits.argmax(dim=1),
        _targets(settings, classifier, logits, pictures),
        _interpreters(settings, classifier, side),
        settings.map,
        _drawn(settings.map),
        {"eps": settings.eps, "steps": settings.steps},
        settings.seed,
    )


def _drawn(wanted: str) -> Tensor | None:
    """Return the map ``(1, 1, H, W)`` that a file has; ``None`` where none is named."""
    if wanted in ("benign", "patch"):
        return None
    drawn = read(wanted, 0, _UPRIGHT).image.mean(dim=0)[None, None]
    if drawn.min() == drawn.max():
        raise ValueError(f"expected bright and dark places in {wanted}, got one grey")
    return drawn


def _normalisation(given: Sequence[str]) -> list[list[float]]:
    """Return mean and standard deviation, each a list of one number or one a channel."""
    if not given:
        return []
    with suppress(ValueError):
        mean, std = ([float(number) for number in each.split(",")] for each in given)
        if {len(mean), len(std)} <= {1, 3} and all(map(isfinite, mean + std)) and min(std) > 0:
            return [mean, std]
    wanted = "--normalise MEAN STD, each a number or three (0.5,0.4,0.3), with STD above 0"
    raise ValueError(f"expected {wanted}, got {' '.join(given)}")


@torch.no_grad()
def _logits(classifier: Classifier, name: str, images: Tensor) -> Tensor:
    """Return the logits of images; raise unless they are logits, of the named classes."""
    model = classifier.model
    try:
        with outputs_checked(model, model, images[:1]):
            logits = torch.cat([model(image[None]) for image in images])
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        wanted = f"expected {name} to take images of shape {tuple(images.shape[1:])}"
        raise ValueError(f"{wanted}, got {reason}; --size changes it") from error
    if classifier.names and len(classifier.names) != logits.shape[1]:
        raise ValueError(
            f"expected {logits.shape[1]} names of classes, one for each logit of {name}, got "
            f"{len(classifier.names)}; --classes FILE has them"
        )
    return logits


def _targets(
    settings: Settings, classifier: Classifier, logits: Tensor, pictures: Sequence[Path]
) -> Tensor:
    """Return the target classes, other ones than the pictures'."""
    own, classes = logits.argmax(dim=1), logits.shape[1]
    if settings.target == "random":
        generator = torch.Generator().manual_seed(settings.seed)
        shift = torch.randint(1, classes, own.shape, generator=generator)
        return (own + shift.to(own)) % classes
    target = find_class(settings.target, classifier.names, classes)
    for file, label_ in zip(pictures, own.tolist(), strict=True):
        if label_ == target:
            raise ValueError(f"expected another class than that of {file}, got {settings.target}")
    return torch.full_like(own, target)


def _interpreters(
    settings: Settings, classifier: Classifier, side: int
) -> Mapping[str, Interpreter]:
    """Return the interpreters by short name."""
    spellings = {name.lower(): name for name in (*INTERPRETERS, "RTS", "RTS-A")}
    names = [spellings.get(name.lower(), name) for name in settings.interpreter]
    if not names or len({label(name) for name in names}) < len(names):
        got = ", ".join(names) or "none"
        raise ValueError(f"expected one or more different interpreters, got {got}")
    if settings.masking_model and "RTS" not in names:
        raise ValueError("expected --interpreter RTS with --masking-model")
    given = study.Settings(masking_model=settings.masking_model)
    return {
        label(name): build_interpreter(name, settings.model, classifier.model, given, side)
        for name in names
    }

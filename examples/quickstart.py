# SPDX-License-Identifier: MIT
"""Fool a classifier and its interpreters: a table and a picture, in under a minute.

    python examples/quickstart.py                                     # embedded models, no internet
    python examples/quickstart.py --weights imagenet --images FOLDER  # your pictures, torchvision

For each interpreter the same images are attacked towards the same random classes by torchattacks'
PGD, which looks at the prediction only, and by ADV2, which looks at prediction and map. Images are
rounded to 8 bits before they are judged. In the picture the class of every image in the second and
third row is the attacker's; only ADV2's maps hide it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchattacks import PGD

from captum_adv2 import ADV2, evaluate
from captum_adv2.evaluation import visualize
from captum_adv2.interpreters import CAM, MASK, GradCAM, Gradient, Interpreter
from captum_adv2.study.embedded import CLASSES, load_densenet, load_resnet, make_shapes

INTERPRETERS = {"CAM": CAM, "GradCAM": GradCAM, "GRAD": Gradient}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Subject(NamedTuple):
    """A classifier, images ``(N, 3, H, W)``, names of the classes, and its interpreters."""

    name: str
    model: nn.Module
    images: Tensor
    classes: tuple[str, ...]
    interpreters: dict[str, Callable[[nn.Module], Interpreter]]


def embedded(count: int) -> list[Subject]:
    """Return the two models that come with the examples, on generated pictures."""
    images = make_shapes(count, seed=7).images
    slow = {"MASK": MASK.small}  # every map is optimised: on the DenseNet it would take minutes
    return [
        Subject("small ResNet", load_resnet(), images, CLASSES, INTERPRETERS | slow),
        Subject("small DenseNet", load_densenet(), images, CLASSES, INTERPRETERS),
    ]


def imagenet(architecture: str, folder: Path, count: int) -> list[Subject]:
    """Return torchvision's pretrained model on the pictures of a folder, centre-cropped to 224."""
    from torchvision import models
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in {".jpg", ".jpeg", ".png"})
    if not files:
        raise SystemExit(f"expected pictures (.jpg, .jpeg, .png) in {folder}, got none")
    weights = models.get_model_weights(architecture).DEFAULT
    net = models.get_model(architecture, weights=weights)  # needs internet once
    crop = v2.Compose([v2.Resize(256), v2.CenterCrop(224)])
    pictures = [crop(decode_image(str(file), ImageReadMode.RGB)) for file in files[:count]]
    images = torch.stack(pictures).float() / 255
    model = nn.Sequential(v2.Normalize(MEAN, STD), net).eval()  # images stay in [0, 1]
    return [Subject(architecture, model, images, tuple(weights.meta["categories"]), INTERPRETERS)]


def compare(subject: Subject, args: argparse.Namespace) -> Figure:
    """Attack every interpreter of a subject; print the table; return the picture."""
    model, images, classes = subject.model, subject.images, len(subject.classes)
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    generator = torch.Generator().manual_seed(args.seed)
    target = (labels + torch.randint(1, classes, labels.shape, generator=generator)) % classes

    def attacked(attack: Any) -> Tensor:
        attack.set_mode_targeted_by_label(quiet=True)
        return attack(images, target)

    settings = {"eps": args.eps / 255, "steps": args.steps}
    fooled = attacked(PGD(model, random_start=False, **settings))
    rows: dict[str, dict[str, tuple[Tensor, Tensor]]] = {"benign": {}, "PGD": {}, "ADV2": {}}
    for name, build in subject.interpreters.items():
        interpreter = build(model)
        both = attacked(ADV2(model, interpreter, verbose=not args.quiet, **settings))
        for title, adversarial in (("PGD", fooled), ("ADV2", both)):
            report = evaluate(model, interpreter, images, adversarial, target)
            cells = "{asr:6.1%} {confidence:10.3f} {l1:8.4f} {iou:6.3f}".format(**report.summary())
            print(f"{subject.name:15s} {name:8s} {title:5s} {cells}")
            rows[title][name] = adversarial[: args.shown], report.adversarial_maps[: args.shown]
        rows["benign"][name] = images[: args.shown], report.benign_maps[: args.shown]
    return visualize.grid(rows, {row: captions(subject, shown) for row, shown in rows.items()})


@torch.no_grad()
def captions(subject: Subject, shown: dict[str, tuple[Tensor, Tensor]]) -> list[str]:
    """Return class and confidence of the images of the first interpreter."""
    pictures = next(iter(shown.values()))[0]
    best = subject.model(pictures).softmax(dim=1).max(dim=1)
    return [f"{subject.classes[c]} {p:.0%}" for p, c in zip(*best, strict=True)]


def main() -> None:
    """Attack, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--weights", choices=["embedded", "imagenet"], default="embedded")
    add("--arch", default="resnet50", help="with --weights imagenet: densenet169, …")
    add("--images", type=Path, help="with --weights imagenet: folder of pictures")
    add("--count", type=int, default=4, help="number of pictures")
    add("--shown", type=int, default=2, help="number of pictures drawn")
    add("--steps", type=int, default=100, help="gradient evaluations an attack")
    add("--eps", type=float, default=8.0, help="largest change, in 1/255")
    add("--seed", type=int, default=0, help="seed of the target classes")
    add("--out", type=Path, default=Path("quickstart.png"), help="the picture")
    add("--quiet", action="store_true", help="no progress bars")
    add("--smoke", action="store_true", help="two pictures, five steps")
    args = parser.parse_args()
    if args.smoke:
        args.count, args.steps = 2, 5
    if args.weights == "imagenet" and args.images is None:
        parser.error("--weights imagenet needs --images FOLDER")
    if args.weights == "imagenet":
        subjects = imagenet(args.arch, args.images, args.count)
    else:
        subjects = embedded(args.count)
    print(f"{'model':15s} {'explains':8s} {'attack':5s} {'success':>6s} confidence  map L1    IoU")
    figures = [compare(subject, args) for subject in subjects]
    figures[0].savefig(args.out, dpi=120)
    print(f"map L1, IoU: to the map of the clean image. Picture of the first model: {args.out}")


if __name__ == "__main__":
    main()

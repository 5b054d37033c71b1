# SPDX-License-Identifier: MIT
"""Melanomas called nevi: what an attack on classifier and map would mean for a patient (§4, Q4).

    python examples/isic_patient.py --data ham10000.zip --trained isic   # after isic.py: an hour
    python examples/isic_patient.py --smoke                               # on drawn lesions

PGD and ADV2 change melanomas that were held out and recognised, until the classifier calls them
nevi. For each interpreter it prints the share called nevi; the L1 distance and IoU of the maps with
the clean ones; and, of clean map, PGD's and ADV2's, the share of the map's sum that lies inside the
lesion's mask (the mask's share of the picture is what a constant map has there) and how often the
map's largest pixel does. ``melanoma.png`` shows two of the pictures.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmark.real import DEVICE, Case
from common import EPS, Rows, attacked, few, parsed
from isic import build, classifier
from lesions import CLASSES, Lesions, crop, generate
from torch import Tensor, nn
from torchattacks import PGD

from captum_adv2 import ADV2
from captum_adv2.evaluation import evaluate, visualize
from captum_adv2.interpreters import CAM, MASK, RTS, Gradient, Interpreter, MaskingModel

MELANOMA, NEVUS = CLASSES.index("MEL"), CLASSES.index("NV")
INTERPRETERS: dict[str, Callable[[nn.Module], Interpreter]] = {
    "GRAD": Gradient,
    "CAM": CAM,
    "MASK": MASK,
}


def melanomas(model: nn.Module, source: Lesions, count: int) -> tuple[Case, Tensor]:
    """Return melanomas that a classifier recognises, to be called nevi, and the lesions' masks.

    Masks are bool ``(N, 1, H, W)``; pictures without one are left out.
    """
    images, masks = [], []
    for index, label in enumerate(source.labels):
        if label == MELANOMA and len(images) < count:
            image, mask = source.masked(index)
            with torch.no_grad():
                found = model(image[None].to(DEVICE)).argmax()
            if len(mask) and found == MELANOMA:
                images.append(image)
                masks.append(mask)
    if not images:
        raise SystemExit("expected melanomas that the classifier recognises, got none")
    labels = torch.full((len(images),), MELANOMA)
    targets = torch.full_like(labels, NEVUS)
    case = Case(model, torch.stack(images), labels, targets)
    return case.to(DEVICE), torch.stack(masks).to(DEVICE)


def inside(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return each map's share of its sum inside a mask ``(N,)``, and whether the largest pixel is.

    Args:
        maps: ``(N, 1, h, w)`` in [0, 1], resized to the masks (bilinear).
        masks: Bool ``(N, 1, H, W)``.
    """
    large = F.interpolate(maps, masks.shape[-2:], mode="bilinear").flatten(1)
    flat = masks.flatten(1)
    share = (large * flat).sum(dim=1) / large.sum(dim=1).clamp(min=1e-12)
    return share, flat.gather(1, large.argmax(dim=1, keepdim=True))[:, 0]


def compared(
    name: str,
    case: Case,
    masks: Tensor,
    interpreter: Interpreter,
    pgd: Tensor,
    args: argparse.Namespace,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Attack an interpreter and print a row of the table; return pictures and maps by attack."""
    attack = ADV2(case.model, interpreter, eps=EPS, steps=args.steps, verbose=args.verbose)
    benign = interpreter(case.images, case.labels).detach()
    shown, cells = {"benign": (case.images, benign)}, [f"{name:5} {len(case.images):3}"]
    for title, images in {"PGD": pgd, "ADV2": attacked(attack, case, args.batch)}.items():
        report = evaluate(
            *(case.model, interpreter, case.images, images, case.targets, case.labels),
            benign_maps=benign,
        )
        shown[title] = images, report.adversarial_maps
        found = report.summary()
        cells.append(f"{found['asr']:5.0%} {found['l1']:.3f} {found['iou']:.2f}")
    measured = [inside(maps, masks) for _, maps in shown.values()]
    for kind in zip(*measured, strict=True):
        cells.append(" ".join(f"{values.float().mean():4.0%}" for values in kind))
    print("   ".join(cells), f"  {masks.float().mean():4.0%}", flush=True)
    return shown


def parse() -> argparse.Namespace:
    """Read the command line."""
    title, _, text = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=title, epilog=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = [*INTERPRETERS, "RTS"]
    add("--data", type=Path, metavar="PATH", help="folder or zip file of the pictures")
    add("--trained", type=Path, default=Path("isic"), metavar="FOLDER", help="that isic.py wrote")
    add("--interpreters", nargs="+", choices=names, default=names, help="rows")
    add("--images", type=int, default=40, help="melanomas (40)")
    add("--mask-images", type=int, default=16, help="for MASK, which is slow (16)")
    add("--batch", type=int, default=8, help="pictures at a time (8)")
    add("--size", type=int, default=160, help="side of the images, as isic.py had it (160)")
    add("--steps", type=int, default=100, help="gradient evaluations (100)")
    return parsed(parser)


def drawn(args: argparse.Namespace) -> tuple[nn.Module, Lesions, MaskingModel]:
    """Return a network and a masking model that are not trained, and drawn lesions."""
    torch.manual_seed(0)
    model = build("resnet18").eval().to(DEVICE)
    source = Lesions(generate(Path(tempfile.mkdtemp()), 14, size=(60, 80)), crop(64))
    with torch.no_grad():
        head = model[1].fc  # with which everything is a melanoma
        head.weight[MELANOMA].abs_()
        head.bias[MELANOMA] = 1
    return model, source, MaskingModel(model, image_shape=(3, 64, 64))


def main() -> None:
    """Attack, print, draw."""
    args = parse()
    if args.smoke:
        model, source, masking_model = drawn(args)
    else:
        model = classifier(args.trained / "classifier.pt").requires_grad_(False).to(DEVICE)
        source = Lesions(args.data, crop(args.size), args.trained / "held-out.csv")
        masking_model = MaskingModel.load(args.trained / "rts.pt", model)
    case, masks = melanomas(model, source, args.images)
    builders = INTERPRETERS | {"RTS": lambda model: RTS(model, masking_model)}
    if args.smoke:
        builders["MASK"] = partial(MASK, iterations=4)
    print(f"{len(case.images)} melanomas, {args.steps} gradient evaluations, at most 8/255")
    print("            called nevi, L1, IoU                sum inside the lesion, largest pixel")
    print("            PGD               ADV2             clean, PGD, ADV2; the same constant map")
    attack = PGD(model, eps=EPS, alpha=2 / 255, steps=args.steps, random_start=False)
    pgd, rows = attacked(attack, case, args.batch), Rows(dict)
    for name in args.interpreters:
        part, interpreter = few(case, name, args), builders[name](model)
        count = len(part.images)
        shown = compared(name, part, masks[:count], interpreter, pgd[:count], args)
        for title, (images, maps) in shown.items():
            rows[title][name] = images[:2], maps[:2]
        visualize.grid(rows, bar=True).savefig(args.out / "melanoma.png", dpi=100)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: MIT
r"""Train the skin-cancer classifier of §4 (Q4): seven diagnoses, task 3 of the ISIC 2018 challenge.

    python examples/isic.py --images ISIC2018_Task3_Training_Input \
        --ground-truth ISIC2018_Task3_Training_GroundTruth.csv --out isic.pt
    python examples/isic.py --generate lesions   # drawn ones in the same format, without the data
    python examples/isic.py --smoke              # a few seconds, into a temporary folder

Beside ``isic.pt`` it writes the confusion matrix of the images held out (Figure 18), ``isic.png``,
and the table of these images, ``isic.csv``. A run that was killed goes on with ``--resume``. A
study of the classifier, on images that it was not trained on, with this folder on ``PYTHONPATH``:

    ISIC_CHECKPOINT=isic.pt python -m captum_adv2 study --model isic:classifier \
        --images isic:ISIC2018_Task3_Training_Input:isic.csv
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision import models
from tqdm import tqdm

from captum_adv2 import storage
from captum_adv2.study.sources import ISIC2018, Sample

sys.path.insert(0, str(Path(__file__).resolve().parent / "benchmark"))

from real import Normalize

KIND = "skin-lesion classifier"
CLASSES = ISIC2018.CLASSES
HELD_OUT = 0.1


# The classifier


def build(model: str, weights: str = "none") -> nn.Sequential:
    """Return a ResNet of torchvision's for images in [0, 1], with a new last layer."""
    try:
        net = models.get_model(model, weights="DEFAULT" if weights == "imagenet" else None)
    except OSError as error:
        raise SystemExit(
            f"the weights of {model} could not be downloaded ({error}); they need internet once, "
            "or a copy in torch.hub.get_dir(). --weights none trains without them."
        ) from error
    net.fc = nn.Linear(net.fc.in_features, len(CLASSES))
    return nn.Sequential(Normalize(), net)


def load(path: str | Path) -> nn.Sequential:
    """Return a trained classifier of images ``(B, 3, H, W)`` in [0, 1], in eval mode.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A file of something else.
    """
    record = storage.load(path, KIND)
    model = build(record["settings"]["model"])
    model.load_state_dict(record["model"])
    return model.eval()


def classifier() -> nn.Sequential:
    """Return the classifier of the file that ``ISIC_CHECKPOINT`` names, or else of isic.pt."""
    return load(os.environ.get("ISIC_CHECKPOINT", "isic.pt"))


# Its training


class Split(NamedTuple):
    """Positions of the images to train on, and of those held out."""

    train: list[int]
    held_out: list[int]


def split(labels: Sequence[int], lesions: Sequence[str], seed: int) -> Split:
    """Hold out a share of the lesions of each class, at least one; a lesion is not torn apart."""
    members: dict[int, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for position, (label, lesion) in enumerate(zip(labels, lesions, strict=True)):
        members[label][lesion].append(position)
    generator = torch.Generator().manual_seed(seed)
    found = Split([], [])
    for label in sorted(members):
        groups = list(members[label].values())
        count = max(1, round(HELD_OUT * len(groups)))
        for place, chosen in enumerate(torch.randperm(len(groups), generator=generator).tolist()):
            (found.held_out if place < count else found.train).extend(groups[chosen])
    return Split(sorted(found.train), sorted(found.held_out))


def read_lesions(table: Path | None, names: Sequence[str]) -> list[str]:
    """Return for each image the lesion it shows; by default every image shows one of its own."""
    if table is None:
        return list(names)
    with table.open(newline="", encoding="utf-8-sig") as file:
        found = {row["image"]: row["lesion_id"] for row in csv.DictReader(file)}
    return [found[name] for name in names]


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip and turn each image by itself; no diagnosis depends on orientation."""
    ways = torch.randint(8, (len(images),), generator=generator).tolist()
    return torch.stack(
        [
            torch.rot90(image.flip(-1) if way % 2 else image, way // 2, (-2, -1))
            for image, way in zip(images, ways, strict=True)
        ]
    )


def class_weights(labels: Sequence[int]) -> Tensor:
    """Return weights that are inverse to how often each class occurs, one on average over images.

    Without them nevi, two thirds of the images, are most of the loss.
    """
    counts = torch.bincount(torch.tensor(labels), minlength=len(CLASSES))
    return len(labels) / (counts.count_nonzero() * counts.clamp(min=1))


def batches(
    source: ISIC2018, order: Sequence[int], args: argparse.Namespace, title: str
) -> Iterable[Sample]:
    """Return batches of samples in this order."""
    loader = DataLoader(Subset(source, order), args.batch, num_workers=args.workers)
    return tqdm(loader, desc=title, disable=args.quiet)


def train(source: ISIC2018, order: list[int], args: argparse.Namespace) -> nn.Sequential:
    """Train a classifier; write it after each epoch, with what the next epoch needs."""
    settings = {
        name: getattr(args, name) for name in ("model", "epochs", "batch", "lr", "seed", "size")
    }
    torch.manual_seed(args.seed)
    state = storage.load(args.out, KIND) if args.resume and args.out.exists() else None
    if state is not None and state["settings"] != settings:
        raise SystemExit(f"expected {settings} to resume {args.out}, got {state['settings']}")
    model = build(args.model, args.weights if state is None else "none").to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    steps = math.ceil(len(order) / args.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=args.lr, total_steps=args.epochs * steps
    )
    first = 0
    if state is not None:
        model.load_state_dict(state["model"])
        first = state["epoch"]
        if first < args.epochs:
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
    weight = class_weights([source.labels[index] for index in order]).to(args.device)
    for epoch in range(first, args.epochs):
        model.train()
        generator = torch.Generator().manual_seed(args.seed * args.epochs + epoch)
        shuffled = torch.randperm(len(order), generator=generator).tolist()
        title = f"epoch {epoch + 1} of {args.epochs}"
        for images, labels, *_ in batches(
            source, [order[place] for place in shuffled], args, title
        ):
            logits = model(augment(images, generator).to(args.device))
            loss = F.cross_entropy(logits, labels.to(args.device), weight=weight)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
        record = {"settings": settings, "epoch": epoch + 1, "model": model.state_dict()}
        if epoch + 1 < args.epochs:  # the file of a trained classifier is a third as large
            record |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        storage.save(record, args.out, KIND)
    return model.eval()


# Its figures


@torch.no_grad()
def confusion(
    model: nn.Module, source: ISIC2018, order: list[int], args: argparse.Namespace
) -> Tensor:
    """Return how many images of each diagnosis (row) get each diagnosis (column)."""
    found = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.long)
    for images, labels, *_ in batches(source, order, args, "held out"):
        predicted = model(images.to(args.device)).argmax(dim=1).cpu()
        found.index_put_((labels, predicted), torch.ones_like(labels), accumulate=True)
    return found


def recall(matrix: Tensor) -> Tensor:
    """Return the share of each diagnosis that is recognised; NaN for one without images."""
    return matrix.diagonal() / matrix.sum(dim=1)


def draw(matrix: Tensor, file: Path) -> None:
    """Draw a confusion matrix (Figure 18): shares of each row, and numbers of images."""
    from matplotlib.figure import Figure

    shares = (matrix / matrix.sum(dim=1, keepdim=True)).nan_to_num().numpy()
    figure = Figure(figsize=(6, 5.2), layout="constrained")
    axes = figure.subplots()
    figure.colorbar(axes.imshow(shares, cmap="Blues", vmin=0, vmax=1), label="share of the row")
    for (row, column), share in np.ndenumerate(shares):
        colour = "white" if share > 0.5 else "black"
        text = f"{share:.2f}\n{matrix[row, column]}"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=7)
    axes.set(xlabel="predicted", ylabel="diagnosis")
    axes.set_xticks(range(len(CLASSES)), CLASSES)
    axes.set_yticks(range(len(CLASSES)), CLASSES)
    figure.savefig(file, dpi=150)


def report(matrix: Tensor) -> str:
    """Return the confusion matrix and the accuracies as text."""
    recalls = recall(matrix)
    lines = ["".join(f"{name:>7s}" for name in ("", *CLASSES, "recall"))]
    for name, row, share in zip(CLASSES, matrix.tolist(), recalls.tolist(), strict=True):
        lines.append(f"{name:>7s}" + "".join(f"{count:7d}" for count in row) + f"{share:7.1%}")
    accuracy = matrix.diagonal().sum() / matrix.sum()
    lines.append(
        f"weighted multi-class accuracy {recalls.nanmean():.2%}, accuracy {accuracy:.2%}, on "
        f"{matrix.sum()} images held out"
    )
    return "\n".join(lines)


# Data in its format


def write_table(file: Path, names: Sequence[str], labels: Sequence[int]) -> None:
    """Write a table of diagnoses, as the challenge's."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream)
        table.writerow(("image", *CLASSES))
        for name, label in zip(names, labels, strict=True):
            table.writerow((name, *(float(label == other) for other in range(len(CLASSES)))))


# Colour of the middle and of the rim; how ragged the outline is, and how soft; number of dots.
_LOOKS = {
    "MEL": ((60, 40, 45), (110, 70, 60), 0.35, 0.10, 6),
    "NV": ((120, 75, 55), (150, 100, 75), 0.05, 0.10, 0),
    "BCC": ((215, 130, 125), (190, 110, 115), 0.10, 0.25, 8),
    "AKIEC": ((190, 70, 60), (205, 110, 90), 0.20, 0.40, 0),
    "BKL": ((170, 130, 80), (120, 85, 50), 0.12, 0.03, 12),
    "DF": ((225, 200, 180), (140, 90, 70), 0.05, 0.15, 0),
    "VASC": ((120, 20, 50), (180, 40, 60), 0.08, 0.06, 3),
}


def _lesion(label: int, size: tuple[int, int], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Return a picture of skin with a blob whose colours and outline depend on the class."""
    height, width = size
    middle, rim, ragged, soft, dots = _LOOKS[CLASSES[label]]
    y, x = np.mgrid[:height, :width] / height
    x, y = x - width / height / 2 + rng.uniform(-0.1, 0.1), y - 0.5 + rng.uniform(-0.1, 0.1)
    angle, radius = np.arctan2(y, x), rng.uniform(0.18, 0.32)
    outline = radius * (
        1
        + sum(
            ragged / 2 * rng.uniform() * np.sin(waves * angle + rng.uniform(0, 2 * np.pi))
            for waves in range(2, 8)
        )
    )
    inside = np.hypot(x, y) / outline
    skin = np.array((225, 175, 150)) + rng.normal(0, 12, 3)
    blend = np.clip(inside, 0, 1)[..., None] ** 2
    colour = (1 - blend) * np.array(middle) + blend * np.array(rim) + rng.normal(0, 8, 3)
    cover = np.clip((1 - inside) / soft + 0.5, 0, 1)[..., None]
    picture = skin + cover * (colour - skin)
    for _ in range(dots):
        turn, far = rng.uniform(0, 2 * np.pi), radius * rng.uniform(0, 0.8)
        near = np.hypot(x - far * np.cos(turn), y - far * np.sin(turn)) < rng.uniform(0.01, 0.03)
        picture[near] *= 0.6
    picture += rng.normal(0, 4, picture.shape)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def generate(
    folder: Path, count: int = 140, seed: int = 0, size: tuple[int, int] = (225, 300)
) -> tuple[Path, Path]:
    """Draw lesions in the format of the challenge; no substitute for its images.

    Args:
        folder: Where to write; it is made.
        count: Number of images; the classes are balanced and shuffled.
        seed: Of everything that is drawn.
        size: Height and width of the images; the challenge's are twice as large.

    Returns:
        The folder of images and the table of diagnoses.
    """
    images, table = folder / "images", folder / "ground-truth.csv"
    images.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % len(CLASSES)).tolist()
    names = [f"ISIC_{24306 + index:07d}" for index in range(count)]
    for name, label in zip(names, labels, strict=True):
        Image.fromarray(_lesion(label, size, rng)).save(images / f"{name}.jpg", quality=92)
    write_table(table, names, labels)
    return images, table


# The command line


def parse() -> argparse.Namespace:
    """Read the command line."""
    title, _, text = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=title, epilog=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="of ISIC_0024306.jpg and on")
    parser.add_argument("--ground-truth", type=Path, metavar="CSV", help="table of diagnoses")
    parser.add_argument(
        "--lesions", type=Path, metavar="CSV", help="LesionGroupings: holds out whole lesions"
    )
    parser.add_argument("--out", type=Path, default=Path("isic.pt"), metavar="FILE")
    parser.add_argument("--model", choices=("resnet18", "resnet50"), default="resnet50")
    parser.add_argument("--weights", choices=("imagenet", "none"), default="imagenet")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--size", type=int, default=224, help="side of the images, in pixels")
    parser.add_argument("--seed", type=int, default=0, help="of split, weights and batches")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=4, help="processes that read images")
    parser.add_argument("--resume", action="store_true", help="go on from --out, if it is there")
    parser.add_argument("--generate", type=Path, metavar="FOLDER", help="draw images; no training")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--smoke", action="store_true", help="28 drawn images, one epoch: seconds")
    args = parser.parse_args()
    if args.smoke:
        folder = Path(tempfile.mkdtemp(prefix="isic-"))
        args.images, args.ground_truth = generate(folder, 28, size=(90, 120))
        if args.out == parser.get_default("out"):
            args.out = folder / args.out
        args.model, args.weights, args.epochs, args.batch = "resnet18", "none", 1, 8
        args.size, args.workers = 64, 0
    elif not args.generate and not (args.images and args.ground_truth):
        parser.error(
            "expected --images FOLDER and --ground-truth CSV; --generate FOLDER draws some"
        )
    for name in ("epochs", "batch", "size"):
        if getattr(args, name) < 1:
            parser.error(f"expected --{name} >= 1, got {getattr(args, name)}")
    return args


def main() -> None:
    """Train, test and write the classifier."""
    args = parse()
    if args.generate:
        print("--images {} --ground-truth {}".format(*generate(args.generate)))
        return
    source = ISIC2018(args.images, args.ground_truth, args.size)
    names = [file.stem for file in source.files]
    parts = split(source.labels, read_lesions(args.lesions, names), args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_table(
        args.out.with_suffix(".csv"),
        [names[index] for index in parts.held_out],
        [source.labels[index] for index in parts.held_out],
    )
    model = train(source, parts.train, args)
    matrix = confusion(model, source, parts.held_out, args)
    draw(matrix, args.out.with_suffix(".png"))
    print(report(matrix))
    print(f"classifier in {args.out}; matrix and images held out in .png and .csv beside it")


if __name__ == "__main__":
    main()

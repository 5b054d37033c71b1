# SPDX-License-Identifier: MIT
r"""Train the skin-cancer classifier of §4 (Q4): seven diagnoses, task 3 of the ISIC 2018 challenge.

    python examples/isic.py --images ISIC2018_Task3_Training_Input \
        --ground-truth ISIC2018_Task3_Training_GroundTruth.csv --out isic.pt
    python examples/isic.py --generate lesions   # drawn ones in the same format, without the data
    python examples/isic.py --smoke              # a few seconds, into a temporary folder

Beside ``isic.pt`` it writes the confusion matrix of the images held out (Figure 18), ``isic.png``,
and the table of these images, ``isic.csv``. A run that was killed is continued by ``--resume``. A
study of the classifier, on images that it was not trained on:

    PYTHONPATH=examples python -m captum_adv2 study --models isic:classifier=isic.pt \
        --images isic:lesions=ISIC2018_Task3_Training_Input:isic.csv --out study-isic
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision import models
from torchvision.transforms import v2
from tqdm import tqdm

from captum_adv2 import storage
from captum_adv2.study.data import Sample, read

KIND = "skin-lesion classifier"
CLASSES = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
HELD_OUT = 0.1


class Lesions:
    """The pictures of a folder that a table of diagnoses lists, as a source of a study.

    Args:
        folder: Folder of ``ISIC_0024306.jpg`` and so on.
        table: CSV with the columns image, MEL, NV, ..., and 1.0 in that of an image's diagnosis.
        transform: Of pictures.
    """

    classes = CLASSES

    def __init__(self, folder: str | Path, table: str | Path, transform: v2.Transform) -> None:
        found = pd.read_csv(table, index_col="image")[list(CLASSES)]
        if found.empty or not (found.isin([0, 1]).all(axis=None) and found.sum(axis=1).eq(1).all()):
            raise ValueError(f"expected one 1.0 and six 0.0 in each row of {table}")
        self.names = [str(name) for name in found.index]
        self.labels = found.to_numpy().argmax(axis=1).tolist()
        self._folder, self._transform = Path(folder), transform

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        file = self._folder / f"{self.names[index]}.jpg"
        return read(file, self.labels[index], self._transform)


def lesions(transform: v2.Transform, files: str) -> Lesions:
    """Return the images of ``FOLDER:TABLE.csv``, for a study."""
    folder, _, table = files.rpartition(":")
    return Lesions(folder, table, transform)


def classifier(file: str | Path) -> nn.Sequential:
    """Return the classifier of a file, for a study."""
    record = storage.load(file, KIND)
    model = build(record["settings"]["model"])
    model.load_state_dict(record["model"])
    return model.eval()


def build(model: str, weights: str = "none") -> nn.Sequential:
    """Return a ResNet of torchvision's for images in [0, 1], with a new last layer."""
    net = models.get_model(model, weights="DEFAULT" if weights == "imagenet" else None)
    net.fc = nn.Linear(net.fc.in_features, len(CLASSES))
    return nn.Sequential(v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), net)


# Training


def split(labels: Sequence[int], lesions: Sequence[str], seed: int) -> tuple[list[int], list[int]]:
    """Return positions to train on and to hold out: a share of each class, lesions kept whole."""
    generator = torch.Generator().manual_seed(seed)
    held_out: list[int] = []
    for _, group in pd.DataFrame({"label": labels, "lesion": lesions}).groupby("label"):
        names = group.lesion.unique()
        order = torch.randperm(len(names), generator=generator)
        chosen = names[order[: max(1, round(HELD_OUT * len(names)))].numpy()]
        held_out += group.index[group.lesion.isin(chosen)].tolist()
    return sorted(set(range(len(labels))) - set(held_out)), sorted(held_out)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip and turn each image by itself; no diagnosis depends on orientation."""
    ways = torch.randint(8, (len(images),), generator=generator).tolist()
    flipped = [
        image.flip(-1) if way % 2 else image for image, way in zip(images, ways, strict=True)
    ]
    turned = zip(flipped, ways, strict=True)
    return torch.stack([torch.rot90(image, way // 2, (-2, -1)) for image, way in turned])


def class_weights(labels: Sequence[int]) -> Tensor:
    """Return weights inverse to how often each class occurs, one on average over images.

    Without them nevi, two thirds of the images, are most of the loss.
    """
    counts = torch.bincount(torch.tensor(labels), minlength=len(CLASSES))
    return len(labels) / (counts.count_nonzero() * counts.clamp(min=1))


def batches(
    source: Lesions, order: Sequence[int], args: argparse.Namespace, title: str
) -> Iterable[tuple[Tensor, Tensor]]:
    """Yield images and labels in this order."""
    loader = DataLoader(Subset(source, order), args.batch, num_workers=args.workers)
    for images, labels, *_ in tqdm(loader, desc=title, disable=args.quiet):
        yield images.to(args.device), labels.to(args.device)


def train(source: Lesions, order: list[int], args: argparse.Namespace) -> nn.Sequential:
    """Train a classifier; write it after each epoch, with what the next epoch needs."""
    names = ("model", "epochs", "batch", "lr", "seed", "size")
    settings = {name: getattr(args, name) for name in names}
    state = storage.load(args.out, KIND) if args.resume and args.out.exists() else None
    if state and state["settings"] != settings:
        raise SystemExit(f"expected {settings} to resume {args.out}, got {state['settings']}")
    torch.manual_seed(args.seed)
    model = build(args.model, "none" if state else args.weights).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    steps = args.epochs * -(-len(order) // args.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.lr, total_steps=steps)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    for name, part in parts.items():
        if state and name in state:
            part.load_state_dict(state[name])
    weight = class_weights([source.labels[index] for index in order]).to(args.device)
    for epoch in range(state["epoch"] if state else 0, args.epochs):
        model.train()
        generator = torch.Generator().manual_seed(args.seed * args.epochs + epoch)
        shuffled = torch.randperm(len(order), generator=generator).tolist()
        title = f"epoch {epoch + 1} of {args.epochs}"
        for images, labels in batches(source, [order[i] for i in shuffled], args, title):
            logits = model(augment(images, generator))
            optimizer.zero_grad()
            F.cross_entropy(logits, labels, weight=weight).backward()
            optimizer.step()
            schedule.step()
        if epoch + 1 == args.epochs:  # what is left is a third as large
            del parts["optimizer"], parts["schedule"]
        record = {name: part.state_dict() for name, part in parts.items()}
        storage.save({"settings": settings, "epoch": epoch + 1, **record}, args.out, KIND)
    return model.eval()


# Evaluation


@torch.no_grad()
def confusion(
    model: nn.Module, source: Lesions, order: list[int], args: argparse.Namespace
) -> Tensor:
    """Return how many images of each diagnosis (row) get each diagnosis (column)."""
    found = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.long)
    for images, labels in batches(source, order, args, "held out"):
        predicted = model(images).argmax(dim=1)
        found.index_put_((labels.cpu(), predicted.cpu()), torch.tensor(1), accumulate=True)
    return found


def draw(matrix: Tensor, file: Path) -> None:
    """Draw a confusion matrix (Figure 18): shares of each row, and numbers of images."""
    shares = (matrix / matrix.sum(dim=1, keepdim=True)).nan_to_num().numpy()
    figure = Figure(figsize=(6, 5.2), layout="constrained")
    axes = figure.subplots()
    figure.colorbar(axes.imshow(shares, cmap="Blues", vmin=0, vmax=1), label="share of the row")
    for (row, column), share in np.ndenumerate(shares):
        text, colour = f"{share:.2f}\n{matrix[row, column]}", "white" if share > 0.5 else "black"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=7)
    axes.set(xlabel="predicted", ylabel="diagnosis")
    axes.set_xticks(range(len(CLASSES)), CLASSES)
    axes.set_yticks(range(len(CLASSES)), CLASSES)
    figure.savefig(file, dpi=150)


def report(matrix: Tensor) -> str:
    """Return the confusion matrix and the accuracies as text."""
    recall = matrix.diagonal() / matrix.sum(dim=1)
    table = pd.DataFrame(matrix.numpy(), CLASSES, CLASSES)
    table["recall"] = [f"{share:.1%}" for share in recall.tolist()]
    accuracy = matrix.diagonal().sum() / matrix.sum()
    return (
        f"{table}\nweighted multi-class accuracy {recall.nanmean():.2%}, accuracy {accuracy:.2%}, "
        f"on {matrix.sum()} images held out"
    )


# Data in the challenge's format


def write_table(file: Path, names: Sequence[str], labels: Sequence[int]) -> None:
    """Write a table of diagnoses."""
    cells = pd.DataFrame(np.eye(len(CLASSES))[list(labels)], names, CLASSES)
    cells.to_csv(file, index_label="image")


_SKIN = (225, 175, 150)
_COLOURS = (
    *((60, 40, 45), (120, 75, 55), (215, 130, 125), (190, 70, 60)),
    *((170, 130, 80), (225, 200, 180), (120, 20, 50)),
)


def _lesion(label: int, size: tuple[int, int], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Return a picture of skin with a disc whose colour depends on the class."""
    height, width = size
    y, x = np.mgrid[:height, :width] - rng.uniform(0.4, 0.6, (2, 1, 1)) * np.reshape(
        size, (2, 1, 1)
    )
    inside = np.hypot(x, y) < rng.uniform(0.18, 0.32) * height
    picture = np.where(inside[..., None], _COLOURS[label], _SKIN) + rng.normal(0, 8, 3)
    return np.clip(picture + rng.normal(0, 4, picture.shape), 0, 255).astype(np.uint8)


def generate(
    folder: Path, count: int = 140, seed: int = 0, size: tuple[int, int] = (225, 300)
) -> tuple[Path, Path]:
    """Draw lesions; return the folder of images and the table of diagnoses."""
    images, table = folder / "images", folder / "ground-truth.csv"
    images.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % len(CLASSES)).tolist()
    names = [f"ISIC_{24306 + index:07d}" for index in range(count)]
    for name, label in zip(names, labels, strict=True):
        Image.fromarray(_lesion(label, size, rng)).save(images / f"{name}.jpg", quality=92)
    write_table(table, names, labels)
    return images, table


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
    parser.add_argument("--resume", action="store_true", help="continue --out, if it is there")
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
        parser.error("expected --images FOLDER and --ground-truth CSV; --generate draws some")
    return args


def main() -> None:
    """Train, test and write the classifier."""
    args = parse()
    if args.generate:
        print("--images {} --ground-truth {}".format(*generate(args.generate)))
        return
    crop = v2.Compose([v2.Resize(round(args.size * 8 / 7)), v2.CenterCrop(args.size)])
    source = Lesions(args.images, args.ground_truth, crop)
    groups = source.names
    if args.lesions:
        groups = pd.read_csv(args.lesions, index_col="image").lesion_id[source.names].tolist()
    order, held_out = split(source.labels, groups, args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    names, labels = ([values[i] for i in held_out] for values in (source.names, source.labels))
    write_table(args.out.with_suffix(".csv"), names, labels)
    matrix = confusion(train(source, order, args), source, held_out, args)
    draw(matrix, args.out.with_suffix(".png"))
    print(report(matrix))
    print(f"classifier in {args.out}; matrix and images held out in .png and .csv beside it")


if __name__ == "__main__":
    main()

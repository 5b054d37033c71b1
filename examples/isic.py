# SPDX-License-Identifier: MIT
r"""Train the skin-cancer classifier of §4 (Q4), seven diagnoses, and a masking model for RTS.

    python examples/isic.py --data ham10000.zip --weights mobilenet_v2_imagenet.pt --out isic
    python examples/isic.py --generate lesions   # drawn ones in the same format, without the data
    python examples/isic.py --smoke              # a few seconds, into a temporary folder

`lesions` describes the data. All pictures of a lesion are trained on, or held out. Into the folder
it writes the classifier, ``classifier.pt``, the confusion matrix of the pictures held out (Figure
18), ``confusion.png``, their table, ``held-out.csv``, and the masking model, ``rts.pt``. A run that
was killed is continued by ``--resume``. A study of the classifier, on the pictures held out:

    PYTHONPATH=examples python -m captum_adv2 study --models isic:classifier=isic/classifier.pt \
        --images isic:lesions=ham10000.zip:isic/held-out.csv --size 160 \
        --masking-model isic/rts.pt --interpreters GRAD CAM MASK RTS --out study-isic
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from lesions import CLASSES, Lesions, crop, generate, write_table
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models
from torchvision.transforms import v2
from tqdm import tqdm

from captum_adv2 import storage
from captum_adv2.interpreters import MaskingModel, train_masking_model

KIND = "skin-lesion classifier"
HELD_OUT = 0.1
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALVES = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
MODELS = {"mobilenet_v2": HALVES, "resnet18": IMAGENET, "resnet50": IMAGENET}
"""Networks of torchvision's, with the mean and standard deviation of images that each takes."""


def lesions(transform: v2.Transform, files: str) -> Lesions:
    """Return the pictures of ``DATA:TABLE.csv``, for a study."""
    data, _, table = files.rpartition(":")
    return Lesions(data, transform, table)


def classifier(file: str | Path) -> nn.Sequential:
    """Return the classifier of a file, for a study."""
    record = storage.load(file, KIND)
    model = build(record["settings"]["model"])
    model.load_state_dict(record["model"])
    return model.eval()


def build(model: str, weights: str | Path = "none") -> nn.Sequential:
    """Return a network of torchvision's for images in [0, 1], with a new last layer.

    Args:
        model: One of `MODELS`.
        weights: ``imagenet`` for torchvision's, ``none``, or a file of the network's state.
    """
    net = models.get_model(model, weights="DEFAULT" if weights == "imagenet" else None)
    if weights not in ("imagenet", "none"):
        held, own = torch.load(weights, weights_only=True), net.state_dict()
        net.load_state_dict({name: value.to(own[name]) for name, value in held.items()})
    last = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)][-1]
    parent, _, name = last.rpartition(".")
    head = nn.Linear(net.get_submodule(last).in_features, len(CLASSES))
    setattr(net.get_submodule(parent), name, head)
    return nn.Sequential(v2.Normalize(*MODELS[model]), net)


# Training


def frozen(model: nn.Module, count: int) -> list[nn.Module]:
    """Return the first blocks of a network that `build` made, which keep their weights.

    ImageNet's edges and colours serve here, too, and most of a step's time is theirs.
    """
    return list(getattr(model[1], "features", model[1]).children())[:count]


def split(labels: Sequence[int], lesions: Sequence[str], seed: int) -> tuple[list[int], list[int]]:
    """Return positions to train on and to hold out: a share of each class, lesions kept whole."""
    generator = torch.Generator().manual_seed(seed)
    held_out: list[int] = []
    for _, group in pd.DataFrame({"label": labels, "lesion": lesions}).groupby("label"):
        names = group.lesion.unique()
        order = torch.randperm(len(names), generator=generator)
        chosen = names[order[: max(1, round(HELD_OUT * len(names)))].numpy()]
        held_out += group.index[group.lesion.isin(chosen)].tolist()
    mixed = torch.randperm(len(held_out), generator=generator).tolist()
    return sorted(set(range(len(labels))) - set(held_out)), [held_out[place] for place in mixed]


def pictures(source: Lesions, order: Sequence[int], quiet: bool = False) -> Tensor:
    """Return pictures of a source ``(N, 3, H, W)`` as uint8; all of them fit into memory."""
    read = tqdm(order, desc="reading", disable=quiet)
    return torch.stack([(source[index].image * 255).round().byte() for index in read])


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip and turn each image by itself; no diagnosis depends on orientation."""
    ways = torch.randint(8, (len(images),), generator=generator).tolist()
    flipped = [
        image.flip(-1) if way % 2 else image for image, way in zip(images, ways, strict=True)
    ]
    turned = zip(flipped, ways, strict=True)
    return torch.stack([torch.rot90(image, way // 2, (-2, -1)) for image, way in turned])


def class_weights(labels: Tensor) -> Tensor:
    """Return weights inverse to how often each class occurs, one on average over images.

    Without them nevi, two thirds of the images, are most of the loss.
    """
    counts = torch.bincount(labels, minlength=len(CLASSES))
    return len(labels) / (counts.count_nonzero() * counts.clamp(min=1))


@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor) -> None:
    """Give each batch norm the statistics of images, and keep what the model computes.

    Weights of a quantised network have theirs folded into the convolutions; such a network would
    be another one in training mode.
    """

    def measure(norm: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        var, mean = torch.var_mean(inputs[0], dim=(0, 2, 3))
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        norm.bias += scale * (mean - norm.running_mean)
        norm.weight.copy_(scale * (var + norm.eps).sqrt())
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
    model.eval()(images)
    for hook in hooks:
        hook.remove()


def train(images: Tensor, labels: Tensor, args: argparse.Namespace) -> nn.Sequential:
    """Train a classifier; write it after each epoch, with what the next epoch needs.

    Half of a class's weight (as a factor) is how often its images are drawn, half that in the loss.
    """
    names = ("model", "frozen", "epochs", "batch", "lr", "seed", "size")
    settings = {name: getattr(args, name) for name in names}
    file = args.out / "classifier.pt"
    state = storage.load(file, KIND) if args.resume and file.exists() else None
    if state and state["settings"] != settings:
        raise SystemExit(f"expected {settings} to resume {file}, got {state['settings']}")
    torch.manual_seed(args.seed)
    model = build(args.model, "none" if state else args.weights)
    model.to(args.device, memory_format=torch.channels_last)
    if not state:
        calibrate(model, images[:: len(images) // 200 + 1].to(args.device) / 255)
    kept = frozen(model, args.frozen)
    for block in kept:
        block.requires_grad_(False)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr)
    length = -(-len(labels) // args.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=args.lr, total_steps=args.epochs * length, pct_start=0.1
    )
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    for name, part in parts.items():
        if state and name in state:
            part.load_state_dict(state[name])
    weight = class_weights(labels).sqrt()
    for epoch in range(state["epoch"] if state else 0, args.epochs):
        model.train()
        for block in kept:
            block.eval()
        generator = torch.Generator().manual_seed(args.seed * args.epochs + epoch)
        drawn = torch.multinomial(weight[labels], len(labels), True, generator=generator)
        title = f"epoch {epoch + 1} of {args.epochs}"
        bar = tqdm(drawn.split(args.batch), desc=title, disable=args.quiet)
        for batch in bar:
            logits = model(augment(images[batch], generator).to(args.device) / 255)
            wanted, weights = labels[batch].to(args.device), weight.to(args.device)
            loss = F.cross_entropy(logits, wanted, weight=weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if epoch + 1 == args.epochs:  # what is left is a third as large
            del parts["optimizer"], parts["schedule"]
        record = {name: part.state_dict() for name, part in parts.items()}
        storage.save({"settings": settings, "epoch": epoch + 1, **record}, file, KIND)
    return model.eval().requires_grad_(False)


def train_rts(
    model: nn.Module, images: Tensor, labels: Tensor, args: argparse.Namespace
) -> MaskingModel:
    """Train a masking model for RTS on images of each class equally often."""
    weight = class_weights(labels)[labels]
    generator = torch.Generator().manual_seed(args.seed)
    drawn = torch.multinomial(weight, args.rts_images, True, generator=generator)
    data = TensorDataset(images[drawn] / 255, labels[drawn])
    loader = DataLoader(data, args.batch, shuffle=True, drop_last=True)
    torch.manual_seed(args.seed)
    masking_model = MaskingModel(model, image_shape=images.shape[1:])
    checkpoint = args.out / "rts.training" if args.resume else None
    settings = {"epochs": args.rts_epochs, "seed": args.seed, "verbose": not args.quiet}
    train_masking_model(model, loader, masking_model, checkpoint=checkpoint, **settings)
    masking_model.save(args.out / "rts.pt")
    return masking_model


# Evaluation


@torch.no_grad()
def confusion(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return how many images of each diagnosis (row) get each diagnosis (column)."""
    device = next(model.parameters(), images).device
    parts = [model(part.to(device) / 255).argmax(dim=1).cpu() for part in images.split(50)]
    found = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.long)
    return found.index_put_((labels, torch.cat(parts)), torch.tensor(1), accumulate=True)


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
        f"{table}\nbalanced accuracy {recall.nanmean():.2%}, accuracy {accuracy:.2%}, "
        f"on {matrix.sum()} images held out"
    )


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, metavar="PATH", help="folder or zip file of the pictures")
    add("--out", type=Path, default=Path("isic"), metavar="FOLDER")
    add("--model", choices=MODELS, default="mobilenet_v2")
    add("--weights", default="imagenet", help="imagenet (downloads), none, or a file (imagenet)")
    add("--frozen", type=int, default=7, help="blocks that keep their weights (7)")
    add("--epochs", type=int, default=6, help="as many draws as there are images, each (6)")
    add("--batch", type=int, default=32)
    add("--lr", type=float, default=1e-3)
    add("--size", type=int, default=160, help="side of the images, in pixels (160)")
    add("--rts-epochs", type=int, default=4, help="of the masking model; 0 trains none (4)")
    add("--rts-images", type=int, default=2100, help="images an epoch of it draws (2100)")
    add("--seed", type=int, default=0, help="of split, weights and batches")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--resume", action="store_true", help="continue in --out, if something is there")
    add("--generate", type=Path, metavar="FOLDER", help="draw images; no training")
    add("--quiet", action="store_true", help="no progress bars")
    add("--smoke", action="store_true", help="28 drawn images, one epoch: seconds")
    args = parser.parse_args()
    if args.smoke:
        folder = Path(tempfile.mkdtemp(prefix="isic-"))
        args.data = generate(folder / "lesions", 28, size=(60, 80))
        if args.out == parser.get_default("out"):
            args.out = folder / args.out
        args.weights, args.epochs, args.batch, args.size = "none", 1, 8, 64
        args.rts_epochs, args.rts_images = 1, 8
    elif not args.generate and not args.data:
        parser.error("expected --data PATH; --generate FOLDER draws some")
    return args


def main() -> None:
    """Train, test and write classifier and masking model."""
    args = parse()
    if args.generate:
        print(f"--data {generate(args.generate)}")
        return
    source = Lesions(args.data, crop(args.size))
    order, held_out = split(source.labels, source.groups(), args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    labels = torch.tensor(source.labels)
    names = [source.names[index] for index in held_out]
    write_table(args.out / "held-out.csv", names, labels[held_out].tolist())
    images = pictures(source, order, args.quiet)
    model = train(images, labels[order], args)
    matrix = confusion(model, pictures(source, held_out, args.quiet), labels[held_out])
    draw(matrix, args.out / "confusion.png")
    print(report(matrix), flush=True)
    if args.rts_epochs:
        train_rts(model, images, labels[order], args)
    print(f"classifier, held-out table, confusion matrix and masking model in {args.out}")


if __name__ == "__main__":
    main()

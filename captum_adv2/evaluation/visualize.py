# SPDX-License-Identifier: MIT
"""Pictures of attacks, as in Figure 4: images beside their attribution maps.

Matplotlib is imported when something is drawn; figures are not registered with pyplot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_adv2.attacks.loop import Progress
from captum_adv2.spec import Images, Maps, Positive, Unit, checked, expect_shape

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:
    Figure = Any  # `checked` reads the annotations

Shown: TypeAlias = Mapping[str, tuple[Tensor, Tensor]]
Notes: TypeAlias = Mapping[str, Mapping[str, Sequence[str]]]


@checked
def overlay(images: Images, maps: Maps, alpha: Unit = 0.5) -> Tensor:
    """Return maps as heat (jet: red is important) over grey images, ``(B, 3, H, W)`` on the CPU.

    Args:
        images: ``(B, C, H, W)`` in [0, 1].
        maps: ``(B, 1, h, w)`` in [0, 1], resized to the images (bilinear).
        alpha: Share of the heat, in [0, 1].

    >>> overlay(torch.rand(2, 3, 8, 8), torch.rand(2, 1, 4, 4)).shape
    torch.Size([2, 3, 8, 8])
    """
    from matplotlib import colormaps

    expect_shape(maps, (len(images), 1, *maps.shape[2:]), "maps")
    grey = _plain(images).mean(dim=1, keepdim=True)
    sized = F.interpolate(_plain(maps), images.shape[-2:], mode="bilinear")
    colours = colormaps["jet"](sized[:, 0].numpy())[..., :3]  # (B, H, W, 3)
    heat = torch.from_numpy(colours).float().permute(0, 3, 1, 2)
    return ((1 - alpha) * grey + alpha * heat).clamp(0, 1)


def _plain(x: Tensor) -> Tensor:
    return x.detach().float().cpu()


@checked
def grid(
    rows: Mapping[str, Shown],
    notes: Notes | None = None,
    size: Positive = 1.3,
    bar: bool = False,
) -> Figure:
    """Draw Figure 4: for every kind of input a row of images, each before its overlays.

    Args:
        rows: Name of the input ("benign", "PGD", "ADV2") to, by the interpreter's name, images
            ``(B, C, H, W)`` and their maps ``(B, 1, h, w)``. Images of the first interpreter are
            drawn.
        notes: Name of the input to, by "image" or the interpreter's name, a text under each image
            or overlay, such as the class or the map's distance.
        size: Width of a picture, in inches.
        bar: Add a bar of the heat's colours.

    >>> shown = {"CAM": (torch.rand(2, 3, 8, 8), torch.rand(2, 1, 4, 4))}
    >>> len(grid({"benign": shown, "ADV2": shown}).axes)
    8
    """
    from matplotlib.figure import Figure

    cells = _cells(rows, notes)
    wide = len(next(iter(cells.values())))
    tall = 1.12 if notes else 1.15
    figure = Figure(figsize=(size * wide + 0.6 * bar, size * tall * len(rows)))
    figure.set_layout_engine("constrained", w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)
    axes = figure.subplots(len(rows), wide, squeeze=False)
    for number, (name, line) in enumerate(cells.items()):
        for axis, cell in zip(axes[number], line, strict=True):
            _draw(axis, cell if number == 0 else cell._replace(title=""), 7)
        axes[number, 0].set_ylabel(name, fontsize=9)
    if bar:
        _bar(figure, axes)
    return figure


def _bar(figure: Figure, axes: Any) -> None:
    """Draw the colours of heat beside the pictures."""
    from matplotlib import cm, colors

    heat = cm.ScalarMappable(colors.Normalize(0, 1), "jet")
    figure.colorbar(heat, ax=axes, fraction=0.02, pad=0.01, shrink=0.6, label="importance")


@checked
def bands(inputs: Mapping[str, Shown], notes: Notes | None = None, size: Positive = 1.5) -> Figure:
    """Draw a band for every image: for each kind of input a block of the image and its overlays.

    Args:
        inputs: As the ``rows`` of `grid`.
        notes: As those of `grid`.
        size: Width of a picture, in inches.

    >>> shown = {"CAM": (torch.rand(2, 3, 8, 8), torch.rand(2, 1, 4, 4))}
    >>> notes = {"ADV2": {"CAM": ["L1 0.1", "L1 0.2"]}}
    >>> len(bands({"benign": shown, "ADV2": shown}, notes).subfigs)
    4
    """
    from matplotlib.figure import Figure

    cells = _cells(inputs, notes)
    each = 1 + len(next(iter(inputs.values())))  # pictures in a block: an image and its overlays
    high = 1 if each <= 2 else 2
    wide = -(-each // high)
    count = len(next(iter(cells.values()))) // each
    height = 1.22 * size * high * count + 0.3
    figure = Figure((size * wide * len(inputs), height), layout="constrained")
    parts = figure.subfigures(count, len(inputs), squeeze=False, wspace=0.03)
    for column, (name, line) in zip(parts.T, cells.items(), strict=True):
        column[0].suptitle(name, fontsize=12, fontweight="bold")
        for band, part in enumerate(column):
            axes = part.subplots(high, wide, squeeze=False).ravel()
            for axis, cell in zip(axes, line[band * each :][:each], strict=False):
                _draw(axis, cell, 9)
            for axis in axes[each:]:
                axis.set_axis_off()
    return figure


class _Cell(NamedTuple):
    """A picture with a title above it and a note below."""

    title: str
    picture: Tensor  # (3, H, W)
    note: str


def _draw(axis: Any, cell: _Cell, fontsize: float) -> None:
    axis.imshow(cell.picture.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.set_title(cell.title, fontsize=fontsize, pad=3)
    axis.set_xlabel(cell.note, fontsize=fontsize, labelpad=2)


def _cells(inputs: Mapping[str, Shown], notes: Notes | None) -> dict[str, list[_Cell]]:
    """Return the pictures of each input: each image, then its overlays."""
    if not (inputs and all(inputs.values())):
        raise ValueError("expected at least one input, and a picture of each, got none")
    found: dict[str, list[_Cell]] = {}
    for name, shown in inputs.items():
        images = _plain(next(iter(shown.values()))[0])
        coloured = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]
        columns = [("image", coloured), *((title, overlay(*shown[title])) for title in shown)]
        below = {title: dict(enumerate(n)) for title, n in (notes or {}).get(name, {}).items()}
        found[name] = [
            _Cell(title, pictures[number], below.get(title, {}).get(number, ""))
            for number in range(len(images))
            for title, pictures in columns
        ]
    sizes = {name: len(line) for name, line in found.items()}
    if len({*sizes.values()}) > 1:
        raise ValueError(f"expected as many pictures of every input, got {sizes}")
    return found


@checked
def curves(records: Sequence[Progress], size: tuple[Positive, Positive] = (7.0, 2.6)) -> Figure:
    """Draw confidence and map distance, step by step: mean and range over the images.

    Records are those of a callback, ``ADV2(..., callback=records.append)``; a finished image counts
    on with its last values. The size is in inches.
    """
    from matplotlib.figure import Figure

    if not records:
        raise ValueError("expected at least one record, got none; pass callback=records.append")
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, 2)
    steps = [record.step for record in records]
    for axis, name in zip(axes, ("confidence", "distance"), strict=True):
        values = _tracks(records, name)
        axis.plot(steps, values.mean(dim=1).numpy())
        low, high = values.amin(dim=1).numpy(), values.amax(dim=1).numpy()
        axis.fill_between(steps, low, high, alpha=0.2)
        axis.set(xlabel="gradient evaluation", ylabel=name)
    return figure


def _tracks(records: Sequence[Progress], name: str) -> Tensor:
    """Return a number of each image of the first record, ``(steps, B)``: the last one known."""
    first = records[0].rows.cpu()
    held = torch.empty(1 + int(max(record.rows.max() for record in records)))
    lines = []
    for record in records:
        held[record.rows.cpu()] = getattr(record, name).float().cpu()
        lines.append(held[first])
    return torch.stack(lines)

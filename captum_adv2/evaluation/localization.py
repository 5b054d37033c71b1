# SPDX-License-Identifier: MIT
"""Weakly supervised localisation (Table 2): boxes from attribution maps, and their errors.

A threshold suits one interpreter and not another. Fong & Vedaldi 2017 choose it for each on
held-out images, of three kinds: a value; a multiple of the map's mean; and the one above which the
pixels hold a share of the map's sum, its energy. `errors` tries `THRESHOLDS` of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from captum_adv2.spec import Count, Maps, Range, Unit, checked, expect_dense, expect_shape

Kind: TypeAlias = Literal["value", "mean", "energy"]
Threshold: TypeAlias = Annotated[float, Range(0, 1000)]

THRESHOLDS: tuple[tuple[Kind, float], ...] = (
    *(("value", step / 20) for step in range(1, 20)),
    *(("mean", step / 2) for step in range(1, 11)),
    *(("energy", step / 20) for step in range(1, 20)),
)
"""Kinds of thresholds, and how much of each."""


@checked
def boxes(
    maps: Maps, size: tuple[Count, Count], threshold: Threshold = 0.5, kind: Kind = "value"
) -> Tensor:
    """Return the box of each map ``(B, 1, h, w)``: x0, y0, x1, y1 in pixels, long ``(B, 4)``.

    The map is resized (bilinear) to ``size``, the height and width of the images. The box is the
    tightest around the largest connected component of the pixels above the threshold, x1 and y1
    exclusive; zeros where there are none. With the kind ``"mean"``, ``threshold`` is a multiple of
    the map's mean; with ``"energy"``, the share of the map's sum that its largest pixels hold.

    >>> maps = torch.zeros(1, 1, 4, 4)
    >>> maps[0, 0, 1:3, 2] = 1
    >>> boxes(maps, (4, 4)).tolist()
    [[2, 1, 3, 3]]
    """
    expect_shape(maps, (len(maps), 1, *maps.shape[2:]), "maps")
    large = F.interpolate(maps.detach(), size, mode="bilinear")
    found = [_box(above[0].numpy()) for above in _above(large, threshold, kind).cpu()]
    return torch.tensor(found, device=maps.device)


def _above(maps: Tensor, threshold: float, kind: Kind) -> Tensor:
    """Return which pixels are above a threshold, bool."""
    if kind == "value":
        return maps > threshold
    if kind == "mean":
        return maps > threshold * maps.mean(dim=(1, 2, 3), keepdim=True)
    ordered = maps.flatten(1).sort(dim=1, descending=True).values
    shares = ordered.cumsum(dim=1) / ordered.sum(dim=1, keepdim=True).clamp(min=1e-12)
    last = (shares < threshold).sum(dim=1, keepdim=True).clamp(max=ordered.shape[1] - 1)
    return (maps >= ordered.gather(1, last)[..., None, None]) & (maps > 0)


@checked
def errors(
    maps: Maps, size: tuple[Count, Count], truth: Tensor | Sequence[Tensor], iou: Unit = 0.5
) -> Tensor:
    """Return whether each map's box is wrong by each of `THRESHOLDS`, bool ``(B, K)``.

    >>> maps, truth = torch.ones(2, 1, 4, 4), torch.tensor([[0, 0, 4, 4]] * 2)
    >>> errors(maps, (4, 4), truth).shape
    torch.Size([2, 48])
    """
    every = [wrong(boxes(maps, size, amount, kind), truth, iou) for kind, amount in THRESHOLDS]
    return torch.stack(every, dim=1)


def _box(above: npt.NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Return the box of the largest component, of pixels that share an edge or a corner."""
    from scipy import ndimage  # late: it takes long to import

    labels, count = ndimage.label(above, structure=np.ones((3, 3)))
    if not count:
        return 0, 0, 0, 0
    sizes = np.bincount(labels.ravel())[1:]
    rows, columns = ndimage.find_objects(labels)[sizes.argmax()]
    return columns.start, rows.start, columns.stop, rows.stop


def _expect_boxes(value: Tensor, name: str) -> None:
    expect_dense(value, name)
    expect_shape(value, (len(value) if value.ndim else 1, 4), name)


@checked
def wrong(found: Tensor, truth: Tensor | Sequence[Tensor], iou: Unit = 0.5) -> Tensor:
    """Return whether each box ``(B, 4)`` misses every true one of its image, bool ``(B,)``.

    Args:
        found: See `boxes`.
        truth: One box an image, ``(B, 4)``; or for each image its boxes ``(K, 4)``, one or more.
        iou: Intersection over union that a box must have with a true one.

    >>> wrong(torch.tensor([[0, 0, 2, 2]]), torch.tensor([[0, 0, 2, 3]])).tolist()
    [False]
    """
    from torchvision.ops import box_iou

    _expect_boxes(found, "found")
    if isinstance(truth, Tensor):
        expect_dense(truth, "truth")
        truth = truth[None] if not truth.ndim else truth
    true = list(truth.unsqueeze(1) if isinstance(truth, Tensor) and truth.ndim == 2 else truth)
    if len(true) != len(found):
        raise ValueError(f"expected true boxes of {len(found)} images, got those of {len(true)}")
    for each in true:
        _expect_boxes(each, "truth")
    if not all(len(each) for each in true):
        raise ValueError("expected a true box for every image, got none; leave such images out")
    overlaps = [
        float(box_iou(box[None].float(), each.float().to(box.device)).nan_to_num().amax())
        for box, each in zip(found, true, strict=True)
    ]
    return torch.tensor(overlaps, device=found.device) < iou

# SPDX-License-Identifier: MIT
"""Weakly supervised localisation: from attribution maps to boxes, and how often these are wrong.

The protocol of Fong & Vedaldi 2017 and Table 2: a map is resized to the image, binarised, and the
tightest box around its largest connected component is the object's. It is wrong where its
intersection over union with the true box, or with each of several, is below one half.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from captum_adv2.checks import expect_maps, expect_number, expect_size

__all__ = ["boxes", "wrong"]


def boxes(maps: Tensor, size: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """Return the tightest box around the largest connected component of each map.

    Args:
        maps: ``(B, 1, h, w)`` in [0, 1].
        size: Height and width of the images, to which maps are resized (bilinear).
        threshold: Value in [0, 1] that a pixel must exceed.

    Returns:
        ``(B, 4)`` long: x0, y0, x1, y1 in pixels, x1 and y1 exclusive; zeros where no pixel does.

    Raises:
        TypeError: Maps, size or threshold of a wrong type.
        ValueError: Maps of a wrong shape or range, or a size or threshold out of range.

    >>> maps = torch.zeros(1, 1, 4, 4)
    >>> maps[0, 0, 1:3, 2] = 1
    >>> boxes(maps, (4, 4)).tolist()
    [[2, 1, 3, 3]]
    """
    native = expect_maps(maps, None, "an interpreter", "maps").shape
    expect_maps(maps, (native[0], 1, *native[2:]), "an interpreter", "maps")
    expect_number(threshold, "threshold", low=0.0, high=1.0)
    size = expect_size(size, "size")
    large = F.interpolate(maps.detach(), size, mode="bilinear", align_corners=False)
    found = [_box(above[0].numpy()) for above in (large > threshold).cpu()]
    return torch.tensor(found, device=maps.device)


def _box(above: npt.NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Return the box of the largest of the components, whose pixels share an edge or a corner."""
    from scipy import ndimage  # here, for it takes long to import

    labels, count = ndimage.label(above, structure=np.ones((3, 3)))
    if not count:
        return 0, 0, 0, 0
    sizes = np.bincount(labels.ravel())[1:]
    rows, columns = ndimage.find_objects(labels)[sizes.argmax()]
    return columns.start, rows.start, columns.stop, rows.stop


def wrong(found: Tensor, truth: Tensor | Sequence[Tensor], iou: float = 0.5) -> Tensor:
    """Return whether each box misses every true one of its image, bool ``(B,)``.

    Args:
        found: ``(B, 4)``, see `boxes`.
        truth: ``(B, 4)``, likewise; or for each image its ``(K, 4)``, one or more.
        iou: Intersection over union that a box must have with a true one, in [0, 1].

    Raises:
        TypeError: Boxes that are no tensors, or ``iou`` no number.
        ValueError: Shapes that do not match, an image without a true box, or ``iou`` out of range.

    >>> wrong(torch.tensor([[0, 0, 2, 2]]), torch.tensor([[0, 0, 2, 3]])).tolist()
    [False]
    """
    from torchvision.ops import box_iou

    expect_number(iou, "iou", low=0.0, high=1.0)
    true = list(truth.unsqueeze(1) if isinstance(truth, Tensor) and truth.ndim == 2 else truth)
    for each in (found, *true):
        if not isinstance(each, Tensor):
            raise TypeError(f"expected boxes to be a torch.Tensor, got {type(each).__name__}")
    shapes = {tuple(each.shape) for each in true}
    if (
        found.ndim != 2
        or len(true) != len(found)
        or any(len(shape) != 2 or shape[1] != 4 for shape in (tuple(found.shape), *shapes))
    ):
        raise ValueError(
            f"expected boxes (B, 4) and as many true ones, or (K, 4) for each, got "
            f"{tuple(found.shape)} and {len(true)} of shapes {sorted(shapes)}"
        )
    if (0, 4) in shapes:
        raise ValueError("expected a true box for every image, got none; leave such images out")
    overlaps = [
        float(box_iou(box[None].float(), each.float().to(box.device)).nan_to_num().amax())
        for box, each in zip(found, true, strict=True)
    ]
    return torch.tensor(overlaps, device=found.device) < iou

# SPDX-License-Identifier: MIT
"""What a study knows, image by image: columns of equal length, and pictures of the first images.

Two kinds of rows. A *map* row says what one interpreter shows of one image after one attack, and
what the classifier says of it; a *score* row, how far a squeezer moves the classifier's prediction.

=============== ==================================================================================
column          meaning
=============== ==================================================================================
model           name of the classifier
seed            seed of target classes and target maps
image           number of the image in its source, from 0
name            the source's name for it, for example its file
label, target   its class, which the classifier gets right; the attacker's class
attack          what was done to it, see `ATTACKS`
aimed           interpreter that the attack knew of; empty for none
interpreter     (map) interpreter that explains it
success         (map) whether it is classified as the target class
confidence      (map) probability of the target class
l1, l2, iou     (map) to the map of the clean image for its own class
target_l1,      (map) to the map that the attack aimed at; to the clean image's own map for attacks
target_iou      that aimed at none
missed          (map) 1 where the map's box misses the object's, 0 where it does not; NaN where the
                object's box is not known, and for attacked images
squeezer        (score) name of the squeezer
score           (score) L1 distance of the predictions before and after it, in [0, 2]
=============== ==================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

__all__ = ["ATTACKS", "IMAGE", "MAP", "SCORE", "Frame", "Pictures"]

ATTACKS: Mapping[str, str] = {
    "benign": "nothing",
    "PGD": "PGD, which knows of no interpreter",
    "ADV2": "ADV2 on pixels, towards the image's own map",
    "stAdv": "stAdv, which moves pixels and knows of no interpreter",
    "StADV2": "ADV2 on stAdv, towards the image's own map",
    "patch": "ADV2 on pixels, towards a patch",
    "class": "ADV2 on pixels, towards the map of an image of another class",
    "adaptive": "ADV2 on pixels that knows a squeezer, named after a colon: adaptive:3x3",
    "noise": "noise that makes the classifier err: noise:normal:0.03 (kind, share of errors)",
}
"""Names in the column ``attack``, and what they mean; what follows a colon is a parameter."""

IMAGE = ("model", "seed", "image", "name", "label", "target", "attack", "aimed")
"""Columns of both kinds of rows."""

MAP = (
    *IMAGE,
    "interpreter",
    "success",
    "confidence",
    "l1",
    "l2",
    "iou",
    "target_l1",
    "target_iou",
    "missed",
)
"""Columns of a map row."""

SCORE = (*IMAGE, "squeezer", "score")
"""Columns of a score row. Benign rows whose target is -1 are of held-out images (calibration)."""


@dataclass(frozen=True)
class Frame:
    """Columns of equal length, by name.

    >>> frame = Frame({"attack": np.array(["PGD", "ADV2"]), "l1": np.array([0.2, 0.01])})
    >>> frame.where(attack="ADV2")["l1"].tolist(), len(frame), frame.values("attack")
    ([0.01], 2, ['PGD', 'ADV2'])
    """

    columns: Mapping[str, npt.NDArray[Any]]

    @classmethod
    def of(cls, rows: Sequence[Sequence[Any]], names: Sequence[str]) -> Frame:
        """Return the frame of some rows.

        Raises:
            TypeError: Rows that are no list of them.
            ValueError: Rows of different lengths, or not a name for each column.
        """
        if not isinstance(rows, Sequence):
            raise TypeError(f"expected rows to be a list, got {type(rows).__name__}")
        values = zip(*rows, strict=True) if rows else ([] for _ in names)
        return cls({name: np.array(value) for name, value in zip(names, values, strict=True)})

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        return self.columns[name]

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return zip(*(column.tolist() for column in self.columns.values()), strict=True)

    def where(self, **wanted: Any) -> Frame:
        """Return the rows whose columns have these values; a tuple means any of its values.

        Raises:
            ValueError: No such column.
        """
        chosen = np.ones(len(self), dtype=bool)
        for name, value in wanted.items():
            options = value if isinstance(value, tuple) else (value,)
            chosen &= np.isin(self._column(name), options)
        return Frame({name: column[chosen] for name, column in self.columns.items()})

    def values(self, name: str) -> list[Any]:
        """Return a column's different values, in the order in which they first appear.

        Raises:
            ValueError: No such column.
        """
        return list(dict.fromkeys(self._column(name).tolist()))

    def _column(self, name: str) -> npt.NDArray[Any]:
        if name not in self.columns:
            raise ValueError(f"expected a column from {', '.join(self.columns)}, got {name!r}")
        return self.columns[name]


@dataclass(frozen=True)
class Pictures:
    """The first images of a model after one attack, and what the interpreters show of them.

    Attributes:
        model: Name of the classifier.
        attack: See `ATTACKS`.
        aimed: Interpreter that the attack knew of; empty for none.
        images: ``(k, C, H, W)`` in [0, 1].
        maps: By interpreter, ``(k, 1, h, w)`` in [0, 1].
        aim: What the attack aimed at, ``(k, 1, h, w)``; ``None`` for attacks that aimed at none,
            and where it is the benign map.
    """

    model: str
    attack: str
    aimed: str
    images: Tensor
    maps: Mapping[str, Tensor]
    aim: Tensor | None = None

# SPDX-License-Identifier: MIT
"""The results of a study, as `captum_adv2.study.run` returns them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from captum_adv2.study.selection import Selection

if TYPE_CHECKING:  # an extra
    import pandas as pd


class Pictures(NamedTuple):
    """The first images of a model after one attack, and the interpreters' maps of them."""

    model: str
    attack: str
    aimed: str
    images: Tensor  # (k, C, H, W) in [0, 1]
    maps: Mapping[str, Tensor]  # by interpreter, (k, 1, h, w)
    aim: Tensor | None = None  # the maps aimed at, (k, 1, h, w), if not the benign ones
    titles: Sequence[str] = ()  # of the images: the class explained, and its probability
    l1: Mapping[str, Sequence[float]] = MappingProxyType({})  # to the benign map, by interpreter


class Found(NamedTuple):
    """The results of a study; `captum_adv2.study.frame` explains the columns."""

    maps: pd.DataFrame  # map rows
    scores: pd.DataFrame  # score rows
    boxes: pd.DataFrame  # box rows
    pictures: Sequence[Pictures]  # the first images of every model after every attack
    selections: Mapping[str, Selection]  # by model
    redone: Sequence[str]  # shards that could not be read, and were computed again
    left_out: Sequence[str]  # interpreters that a model does not have, and why
    missing: int = 0  # shards that are not there yet

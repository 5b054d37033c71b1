# SPDX-License-Identifier: MIT
"""Rows of an invented study, in which the paper's observations hold unless changed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch

from captum_adv2.study import Settings
from captum_adv2.study.frame import BOX, CUTS, MAP, SCORE, Results
from captum_adv2.study.results import Pictures

NAMES = ("GRAD", "CAM", "RTS")
SQUEEZERS = ("2 bits", "3x3")
NOISES = ("noise:normal:0.03", "noise:uniform:0.3")
COUNT = 40
SETTINGS = Settings(models=("embedded:resnet",), count=COUNT)

Row = dict[str, Any]
Change = Callable[[Row], Row | None]


def setting(change: Row, **wanted: Any) -> Change:
    """Return a change of columns where others have some values."""
    return lambda row: {**row, **change} if wanted.items() <= row.items() else row


def without(**wanted: Any) -> Change:
    """Return a change that drops rows where columns have some values."""
    return lambda row: None if wanted.items() <= row.items() else row


EVERY = (*NAMES, "RTS-A")
ATTACKS = [  # with the interpreters that an attack knows, and those that explain it
    ("benign", "", EVERY),
    ("PGD", "", EVERY),
    *(("ADV2", name, EVERY) for name in NAMES),
    ("ADV2", "RTS-A", ("RTS-A",)),
    *((attack, name, (name,)) for attack in ("patch", "class") for name in NAMES),
    *((f"adaptive:{known}", "RTS", ("RTS",)) for known in SQUEEZERS),
    ("stAdv", "", NAMES),
    *(("StADV2", name, (name,)) for name in NAMES),
    ("Square", "", NAMES),
    *(("QueryADV2", name, (name,)) for name in NAMES),
    *((noise, "", ("RTS", "RTS-A")) for noise in NOISES),
    *(("curve", name, (name,)) for name in EVERY),
]
LEAST = {"GRAD": (1, 2, 4, 8), "CAM": (0.25, 0.5), "RTS": (2,), "RTS-A": (np.inf, 16)}  # times 255


def _distance(attack: str, aimed: str, name: str) -> float:
    if name == "RTS-A" and attack != "benign":
        return 0.3
    levels = {"benign": 0.0, "PGD": 0.25, "patch": 0.4, "class": 0.4, "stAdv": 0.2, "StADV2": 0.05}
    levels |= {"Square": 0.25, "QueryADV2": 0.1}
    if attack.startswith("noise"):
        return 0.05
    if attack == "ADV2" and aimed != name:
        return 0.22
    return levels.get(attack, 0.03 + 0.02 * NAMES.index(name) if name in NAMES else 0.3)


@functools.cache
def _rows(model: str, seed: int) -> tuple[list[Row], list[Row]]:
    random = np.random.default_rng(seed)
    maps, scores = [], []
    for attack, aimed, everyone in ATTACKS:
        for image in range(COUNT):
            target = (image if attack == "benign" else image + 1) % 10
            place = (model, seed, image, f"{image}.png", image % 10, target, attack, aimed)
            for name in everyone:
                l1 = _distance(attack, aimed, name) * random.uniform(0.9, 1.1)
                near = (0.1, 0.8) if attack in ("patch", "class") else (l1, 1 - 2 * l1)
                missed = float(image % 4 == 0) if attack == "benign" else np.nan
                won, sure = float(attack != "benign"), random.uniform(0.97, 1)
                drift = 0.02 if (attack, name) == ("benign", "RTS-A") else np.nan
                iou = 1 - 2 * l1
                measures = (won, sure, l1, 1.5 * l1, iou, iou, *near, missed, drift, np.nan)
                if attack == "curve":
                    least = LEAST[name][image % len(LEAST[name])] / 255
                    measures = (*[np.nan] * 10, least)
                maps.append((*place, name, *measures))
            for squeezer in SQUEEZERS if attack != "curve" else ():
                low = attack in ("benign", f"adaptive:{squeezer}") or attack.startswith("noise")
                score = random.uniform(0, 0.1) if low else random.uniform(1, 2)
                scores.append((*place, squeezer, score))
    for image in range(COUNT, 2 * COUNT):
        for squeezer in SQUEEZERS:
            place = (model, seed, image, "", -1, -1, "benign", "")
            scores.append((*place, squeezer, random.uniform(0, 0.1)))
    return (
        [dict(zip(MAP, row, strict=True)) for row in maps],
        [dict(zip(SCORE, row, strict=True)) for row in scores],
    )


def _boxes(model: str) -> list[Row]:
    """Return that the best threshold is twice the mean; 0.5 is the next."""
    rows = []
    for image in range(2 * COUNT):
        own = dict.fromkeys(CUTS, 1.0)
        own |= {"value 0.5": float(image % 4 == 0), "mean 2": float(image % 8 == 0)}
        place = {"model": model, "image": image, "held_out": float(image >= COUNT)}
        rows += [{**place, "interpreter": name, **own} for name in EVERY]
    return rows


def study(
    *changes: Change, models: tuple[str, ...] = ("resnet",), seeds: tuple[int, ...] = (0,)
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Return map rows and score rows, changed, and box rows."""
    frames = []
    for part, names in enumerate((MAP, SCORE)):
        rows = [row for m in models for s in seeds for row in _rows(m, s)[part]]
        for change in changes:
            rows = [found for row in rows if (found := change(row)) is not None]
        frames.append(pd.DataFrame(rows, columns=names))
    boxes = [row for model in models for row in _boxes(model)]
    return frames[0], frames[1], pd.DataFrame(boxes, columns=BOX)


def results(*changes: Change, **how: Any) -> Results:
    return Results(*study(*changes, **how))


def pictures(models: tuple[str, ...] = ("resnet",), count: int = 3) -> list[Pictures]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(count, *shape, generator=generator)

    return [
        Pictures(
            model,
            attack,
            aimed,
            random(3, 16, 16),
            {name: random(1, 8, 8) for name in everyone},
            random(1, 8, 8) if attack in ("patch", "class") else None,
            [f"cat {number}.00" for number in range(count)],
            {name: [0.125] * count for name in everyone},
        )
        for model in models
        for attack, aimed, everyone in ATTACKS
        if attack != "curve"
    ]

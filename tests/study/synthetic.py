# SPDX-License-Identifier: MIT
"""Records of a study that never was, in which the paper's observations hold unless changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from captum_adv2.study.records import MAP, SCORE, Frame, Pictures
from captum_adv2.study.settings import Settings

NAMES = ("GRAD", "CAM", "RTS")
SQUEEZERS = ("2 bits", "3x3")
NOISES = ("noise:normal:0.03", "noise:uniform:0.3")
COUNT = 20
SETTINGS = Settings(models=("embedded:resnet",), count=COUNT)

Row = dict[str, Any]
Change = Callable[[Row], Row | None]


def only(**wanted: Any) -> Callable[[Row], bool]:
    return lambda row: all(row.get(name) == value for name, value in wanted.items())


def setting(change: Row, **wanted: Any) -> Change:
    """Return a change of columns where others have some values."""
    return lambda row: {**row, **change} if only(**wanted)(row) else row


def without(**wanted: Any) -> Change:
    """Return a change that drops rows where columns have some values."""
    return lambda row: None if only(**wanted)(row) else row


def attacks() -> list[tuple[str, str, tuple[str, ...]]]:
    """Return every attack, what it is aimed at, and who explains it."""
    everyone = (*NAMES, "RTS-A")
    return [
        ("benign", "", everyone),
        ("PGD", "", everyone),
        *(("ADV2", name, everyone) for name in NAMES),
        ("ADV2", "RTS-A", ("RTS-A",)),
        *((attack, name, (name,)) for attack in ("patch", "class") for name in NAMES),
        *((f"adaptive:{known}", "RTS", ("RTS",)) for known in SQUEEZERS),
        ("stAdv", "", NAMES),
        *(("StADV2", name, (name,)) for name in NAMES),
        *((noise, "", ("RTS", "RTS-A")) for noise in NOISES),
    ]


def distance(attack: str, aimed: str, name: str) -> float:
    if name == "RTS-A" and attack != "benign":
        return 0.3
    levels = {"benign": 0.0, "PGD": 0.25, "patch": 0.4, "class": 0.4, "stAdv": 0.2, "StADV2": 0.05}
    if attack.startswith("noise"):
        return 0.05
    if attack == "ADV2" and aimed != name:
        return 0.22
    return levels.get(attack, 0.03 + 0.02 * NAMES.index(name) if name in NAMES else 0.3)


def rows_of(model: str, seed: int, count: int) -> tuple[list[Row], list[Row]]:
    random = np.random.default_rng(seed)
    maps, scores = [], []
    for attack, aimed, everyone in attacks():
        for image in range(count):
            common = {
                "model": model,
                "seed": seed,
                "image": image,
                "name": f"{image}.png",
                "label": image % 10,
                "target": (image if attack == "benign" else image + 1) % 10,
                "attack": attack,
                "aimed": aimed,
            }
            for name in everyone:
                l1 = distance(attack, aimed, name) * random.uniform(0.9, 1.1)
                aims = attack in ("patch", "class")
                maps.append(
                    {
                        **common,
                        "interpreter": name,
                        "success": float(attack != "benign"),
                        "confidence": random.uniform(0.9, 1),
                        "l1": l1,
                        "l2": 1.5 * l1,
                        "iou": 1 - 2 * l1,
                        "target_l1": 0.1 if aims else l1,
                        "target_iou": 0.8 if aims else 1 - 2 * l1,
                        "missed": float(image % 4 == 0) if attack == "benign" else np.nan,
                    }
                )
            for squeezer in SQUEEZERS:
                low = attack in ("benign", f"adaptive:{squeezer}") or attack.startswith("noise")
                score = random.uniform(0, 0.1) if low else random.uniform(1, 2)
                scores.append({**common, "squeezer": squeezer, "score": score})
    for image in range(count, 2 * count):
        for squeezer in SQUEEZERS:
            held = {**common, "image": image, "target": -1, "attack": "benign", "aimed": ""}
            scores.append({**held, "squeezer": squeezer, "score": random.uniform(0, 0.1)})
    return maps, scores


def study(
    *changes: Change,
    models: tuple[str, ...] = ("resnet",),
    seeds: tuple[int, ...] = (0,),
    count: int = COUNT,
) -> tuple[Frame, Frame]:
    """Return map rows and score rows, changed."""
    frames = []
    for part, names in enumerate((MAP, SCORE)):
        rows = [r for m in models for s in seeds for r in rows_of(m, s, count)[part]]
        for change in changes:
            rows = [found for row in rows for found in [change(row)] if found is not None]
        frames.append(Frame.of([[row[name] for name in names] for row in rows], names))
    return frames[0], frames[1]


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
        )
        for model in models
        for attack, aimed, everyone in attacks()
    ]

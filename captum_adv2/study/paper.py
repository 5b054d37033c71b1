# SPDX-License-Identifier: MIT
"""The numbers that the paper prints, and the rules of `claims` applied to them.

``paper.csv`` has them as they are printed. A rate is of 1,000 images, and has Wilson's interval. Of
a mean nothing is known but its two digits: its interval is all that they may stand for. So the
answer "too few images" means that the paper prints too few digits.
"""

from __future__ import annotations

import math
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from captum_adv2.evaluation.metrics import wilson
from captum_adv2.study.estimates import JOINT, Cell, Estimate, Evidence, Function

_IMAGES = 1000


class Paper(Evidence):
    """The paper's tables; its figures have no numbers."""

    models = ("ResNet", "DenseNet", "skin cancer")
    interpreters = ["GRAD", "CAM", "MASK", "RTS"]
    squeezers = ("2 bits", "3 bits", "3x3", "11-3-4")
    complete = False

    @cached_property
    def printed(self) -> dict[tuple[str, ...], str]:
        """The numbers by classifier, attack, the interpreter it knew, the other, and measure."""
        rows = pd.read_csv(Path(__file__).with_name("paper.csv"), dtype=str, keep_default_na=False)
        *keys, value = (rows[name] for name in rows.columns[1:])
        return dict(zip(zip(*keys, strict=True), value, strict=True))

    def text(self, title: str, model: str, *place: str) -> str:
        """Return a number as it is printed; nothing where there is none."""
        attack, name, *rest = place
        if attack.startswith("adaptive:") and not title.startswith("detected"):
            attack = "adaptive"  # printed for all squeezers together
        knows = attack not in ("benign", "PGD", "stAdv")
        aimed = rest[0] if rest else name if knows else ""
        return self.printed.get((model, attack, aimed, name, title), "")

    def estimate(self, title: str, model: str, *place: str) -> Estimate:
        """See `Evidence`."""
        text = self.text(title, model, *place)
        if not text:
            return _nothing(percent=title == "ASR" or title.startswith("detected"))
        number, percent, _ = text.partition(" %")
        if percent:
            rate = float(number) / 100
            return Estimate(rate, *wilson(round(rate * _IMAGES), _IMAGES), _IMAGES, percent=True)
        value = float(number)
        return Estimate(value, max(0.0, value - 0.005), min(1.0, value + 0.005), _IMAGES)

    def contrast(
        self, function: Function, model: str, *cells: Cell, level: float = 0.95
    ) -> Estimate:
        """See `Evidence`; the interval holds all that the digits allow."""
        parts = [self.estimate(title, model, *place) for title, *place in cells]
        if not all(part.size for part in parts):
            return _nothing()
        corners = [function(*ends) for ends in product(*((part.low, part.high) for part in parts))]
        middle = function(*(part.mean for part in parts))
        return Estimate(middle, min(corners), max(corners), _IMAGES)

    def detection(self, model: str, attack: str, aimed: str, squeezer: str = JOINT) -> Estimate:
        """See `Evidence`; there is no joint score."""
        return self.estimate(f"detected by {squeezer}", model, attack, aimed, aimed)

    def having(self, attack: str) -> list[str]:
        """See `Evidence`."""
        places = {key[1:4] for key in self.printed}
        return [name for name in self.interpreters if (attack, name, name) in places]

    def named(self, attack: str) -> list[str]:
        """See `Evidence`."""
        every = [f"adaptive:{name}" for name in self.squeezers]
        return every if attack == "adaptive:" else [] if attack.endswith(":") else [attack]


def _nothing(percent: bool = False) -> Estimate:
    return Estimate(math.nan, math.nan, math.nan, 0, percent)


PAPER = Paper()
"""The paper's numbers."""


def counterpart(model: str, skin: bool = False) -> str:
    """Return the paper's classifier that stands beside one of a study.

    >>> counterpart("embedded:densenet"), counterpart("resnet56")
    ('DenseNet', 'ResNet')
    """
    if skin:
        return "skin cancer"
    return "DenseNet" if "densenet" in model.lower() else "ResNet"


def beside(title: str, model: str, *place: Any) -> str:
    """Return the paper's number as it is printed, or a dash."""
    return PAPER.text(title, model, *place) or "–"

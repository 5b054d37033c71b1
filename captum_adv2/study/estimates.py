# SPDX-License-Identifier: MIT
"""Means with their intervals, from the rows of a study: what tables, figures, verdicts agree on.

Map distances are taken over successful attacks, rates over all images, and detection rates over
successful attacks too, for an attack that failed leaves nothing to detect. Values come by image, so
that what two attacks do to the same image can be subtracted. Several seeds are pooled; models are
kept apart. Intervals are percentile bootstraps at 95 %.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from captum_adv2.defenses.detection import threshold_at
from captum_adv2.evaluation.metrics import interval
from captum_adv2.study.records import MAP, Frame

__all__ = [
    "DISTILLED",
    "FALSE_POSITIVES",
    "JOINT",
    "MEASURES",
    "Estimate",
    "Measure",
    "Results",
    "Values",
    "difference",
    "estimate",
    "knows",
    "percentage",
]

DISTILLED = "RTS-A"
"""The interpreter trained against ADV2; it is compared with RTS, and not explained by itself."""

JOINT = "joint"
"""All squeezers together: the largest score, with a threshold of its own."""

FALSE_POSITIVES = 0.05
"""Share of held-out benign images that a threshold flags at most."""

Values = Mapping[tuple[Any, ...], float]
"""A value for each image, by seed and number."""

_UNAWARE = ("benign", "PGD", "stAdv")  # and noise: they know of no interpreter
_EMPTY = Frame({name: np.empty(0) for name in MAP})


class Estimate(NamedTuple):
    """A mean, its 95 % interval, and how many values; NaN where there are none."""

    mean: float
    low: float
    high: float
    size: int

    def text(self, percent: bool = False) -> str:
        """Return it for people.

        >>> Estimate(0.5, 0.25, 0.75, 9).text(), Estimate(0.5, 0.25, 0.75, 9).text(percent=True)
        ('0.500 [0.250, 0.750]', '50 % [25, 75]')
        """
        if not self.size:
            return "–"
        if percent:
            mean, low, high = (percentage(value) for value in self[:3])
            return f"{mean} [{low[:-2]}, {high[:-2]}]"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def percentage(share: float) -> str:
    """Return a share for people.

    >>> percentage(0.5), percentage(0.0254)
    ('50 %', '2.5 %')
    """
    return f"{round(100 * share, 1):g} %"


def estimate(values: Values | npt.NDArray[Any]) -> Estimate:
    """Return the mean of some values and its interval."""
    found = np.array([*values.values()] if isinstance(values, Mapping) else values, dtype=float)
    mean = float(found.mean()) if len(found) else np.nan
    return Estimate(mean, *interval(found), len(found))


def difference(first: Values, second: Values) -> Values:
    """Return first less second, on the images that have both."""
    return {key: value - second[key] for key, value in first.items() if key in second}


def knows(attack: str) -> bool:
    """Return whether an attack knows of an interpreter."""
    return attack not in _UNAWARE and not attack.startswith("noise:")


class Measure(NamedTuple):
    """A column of map rows to take the mean of.

    Attributes:
        title: Its name for people.
        column: Its name in the records.
        successes: Whether only successful attacks count.
        percent: Whether it is a share.
    """

    title: str
    column: str
    successes: bool = True
    percent: bool = False

    def values(self, rows: Frame) -> Values:
        """Return the values that count, without NaN, by image."""
        numbers = np.asarray(rows[self.column], dtype=float)
        counts = ~np.isnan(numbers)
        if self.successes:
            counts &= _succeeded(rows)
        return dict(zip(_keys(rows, counts), numbers[counts].tolist(), strict=True))

    def of(self, rows: Frame) -> Estimate:
        """Return the mean of some rows and its interval."""
        return estimate(self.values(rows))


MEASURES: Mapping[str, Measure] = {
    measure.title: measure
    for measure in (
        Measure("ASR", "success", successes=False, percent=True),
        Measure("MC", "confidence", successes=False),
        Measure("L1", "l1"),
        Measure("L2", "l2"),
        Measure("IoU", "iou"),
        Measure("L1 to target", "target_l1"),
        Measure("IoU to target", "target_iou"),
        Measure("localisation error", "missed", successes=False, percent=True),
    )
}
"""What is taken the mean of, by title."""


def _succeeded(rows: Frame) -> npt.NDArray[np.bool_]:
    return np.asarray(rows["success"], dtype=float) > 0.5


def _keys(rows: Frame, chosen: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    pairs = (rows[name][chosen].tolist() for name in ("seed", "image"))
    return list(zip(*pairs, strict=True))


class Results:
    """A study's rows, found by what they are of.

    Args:
        maps: Map rows.
        scores: Score rows.

    Attributes:
        models: Names of the classifiers, in the order of the records.
        interpreters: Names of the interpreters but `DISTILLED`.
        attacks: Names of the attacks.
        squeezers: Names of the squeezers.
        thresholds: Of each model's squeezers and of them together (`JOINT`); none where no
            held-out scores are known.
    """

    def __init__(self, maps: Frame, scores: Frame) -> None:
        self.models = list(dict.fromkeys([*_names(maps, "model"), *_names(scores, "model")]))
        self.everyone = _names(maps, "interpreter")
        self.interpreters = [name for name in self.everyone if name != DISTILLED]
        self.attacks = _names(maps, "attack")
        self.squeezers = _names(scores, "squeezer")
        self._maps = _split(maps, ("model", "attack", "aimed", "interpreter"))
        held_out = np.asarray(scores["target"]) == -1 if len(scores) else np.empty(0, dtype=bool)
        self._held_out = self._by_squeezer(_chosen(scores, held_out), ("model",))
        self._scores = self._by_squeezer(_chosen(scores, ~held_out), ("model", "attack", "aimed"))
        self.thresholds: dict[str, dict[str, float]] = {}
        for (model,), columns in self._held_out.items():
            self.thresholds[model] = {
                name: threshold_at(torch.tensor([*values.values()]).double(), FALSE_POSITIVES)
                for name, values in columns.items()
                if values
            }

    def rows(self, model: str, attack: str, interpreter: str, aimed: str | None = None) -> Frame:
        """Return what an interpreter shows of the images after an attack; maybe no row.

        Args:
            model: Name of the classifier.
            attack: Name of the attack.
            interpreter: Name of the interpreter.
            aimed: Interpreter that the attack knew of; default: this one, if it knew of any.
        """
        if aimed is None:
            aimed = interpreter if knows(attack) else ""
        found = self._maps.get((model, attack, aimed, interpreter), _EMPTY)
        # Clean images are the same ones for every seed.
        first = found["seed"][:1].tolist()
        return found.where(seed=first[0]) if attack == "benign" and first else found

    def values(
        self, title: str, model: str, attack: str, interpreter: str, aimed: str | None = None
    ) -> Values:
        """Return a measure's values by image; see `MEASURES` and `rows`."""
        return MEASURES[title].values(self.rows(model, attack, interpreter, aimed))

    def estimate(
        self, title: str, model: str, attack: str, interpreter: str, aimed: str | None = None
    ) -> Estimate:
        """Return a measure's mean and interval; see `MEASURES` and `rows`."""
        return estimate(self.values(title, model, attack, interpreter, aimed))

    def scores(self, model: str, attack: str, aimed: str, squeezer: str = JOINT) -> Values:
        """Return detector scores by image, of successful attacks or of clean images."""
        found = self._scores.get((model, attack, aimed), {}).get(squeezer, {})
        if attack == "benign":
            found = found or self._held_out.get((model,), {}).get(squeezer, {})
            first = next(iter(found), (0, 0))[0]  # as in `rows`
            return {key: score for key, score in found.items() if key[0] == first}
        won: set[tuple[int, int]] = set()
        for name in self.everyone:
            rows = self._maps.get((model, attack, aimed, name), _EMPTY)
            won.update(_keys(rows, _succeeded(rows)))
        return {key: score for key, score in found.items() if key in won}

    def flagged(self, model: str, attack: str, aimed: str, squeezer: str = JOINT) -> Values:
        """Return which images a squeezer flags, or all together: 1 or 0; none without threshold."""
        threshold = self.thresholds.get(model, {}).get(squeezer)
        if threshold is None:
            return {}
        scores = self.scores(model, attack, aimed, squeezer)
        return {key: float(score > threshold) for key, score in scores.items()}

    def having(self, attack: str) -> list[str]:
        """Return the interpreters (but `DISTILLED`) with rows of their own after an attack."""
        return [
            name
            for name in self.interpreters
            if any(len(self.rows(model, attack, name)) for model in self.models)
        ]

    def parameters(self, attack: str) -> list[str]:
        """Return attacks that differ in what follows the colon: adaptive:3x3, adaptive:2 bits."""
        return [name for name in self.attacks if name.startswith(f"{attack}:")]

    def _by_squeezer(
        self, scores: Frame, names: Collection[str]
    ) -> dict[tuple[str, ...], dict[str, dict[tuple[int, int], float]]]:
        """Return scores by some columns' values, then by squeezer, then by image."""
        found: dict[tuple[str, ...], dict[str, dict[tuple[int, int], float]]] = {}
        for (*place, squeezer), rows in _split(scores, (*names, "squeezer")).items():
            keys = _keys(rows, np.ones(len(rows), dtype=bool))
            pairs = zip(keys, rows["score"].tolist(), strict=True)
            known = {key: score for key, score in pairs if np.isfinite(score)}
            found.setdefault(tuple(place), {})[squeezer] = known
        for columns in found.values():
            complete = set.intersection(*(set(columns.get(name, ())) for name in self.squeezers))
            columns[JOINT] = {
                key: max(columns[name][key] for name in self.squeezers) for key in sorted(complete)
            }
        return found


def _names(rows: Frame, column: str) -> list[str]:
    return rows.values(column) if len(rows) else []


def _chosen(rows: Frame, chosen: npt.NDArray[np.bool_]) -> Frame:
    return Frame({name: column[chosen] for name, column in rows.columns.items()})


def _split(rows: Frame, names: Collection[str]) -> dict[tuple[str, ...], Frame]:
    """Return the rows of each combination of some columns' values that occurs."""
    places: dict[tuple[str, ...], list[int]] = {}
    if len(rows):
        for number, place in enumerate(zip(*(rows[n].tolist() for n in names), strict=True)):
            places.setdefault(place, []).append(number)
    return {
        place: Frame({name: column[numbers] for name, column in rows.columns.items()})
        for place, numbers in places.items()
    }

# SPDX-License-Identifier: MIT
"""The results of a study as data frames, and means with intervals of them.

There are two kinds of rows. A *map* row tells what one interpreter shows of one image after one
attack, and what the classifier predicts; a *score* row, how far a squeezer moves the prediction.

=============== ==================================================================================
column          meaning
=============== ==================================================================================
model           name of the classifier
seed            seed of target classes and target maps
image           number of the image in its source, from 0
name            the source's name for it, for example its file
label, target   its class, which the classifier gets right; the attacker's class
attack          what was done to it: benign (nothing), PGD, ADV2 (towards its own map), stAdv,
                StADV2, Square and QueryADV2 (by queries), patch and class (ADV2 towards other
                maps), adaptive:SQUEEZER (ADV2 that knows a squeezer; its name may go on:
                ", Algorithm 2"), curve (ADV2 by bisection of eps), noise:KIND:SHARE (share of
                images on which the classifier errs)
aimed           interpreter that the attack knew of; empty for none
interpreter     (map) interpreter that explains it
success         (map) 1 where it is classified as the target class, 0 where not
confidence      (map) probability of the target class
l1, l2, iou     (map) to the map of the clean image for its own class
iou_mean        (map) iou of the pixels above their map's mean
target_l1,      (map) to the map that the attack aimed at; to the clean image's own map for attacks
target_iou      that aimed at none
missed          (map) 1 where the map's box misses the object's, 0 where it does not; NaN where the
                object's box is not known, and for attacked images
drift           (map) of RTS-A on clean images, L1 to the map of RTS; NaN elsewhere
least           (map) after curve, the least eps at which the attack succeeds; NaN elsewhere
squeezer        (score) name of the squeezer
score           (score) L1 distance of the predictions before and after it, in [0, 2]
=============== ==================================================================================

Map distances are means over successful attacks, rates over all images, and detection rates over
successful attacks too, since an attack that failed leaves nothing to detect. Values come by image,
so that the effects of two attacks on one image can be subtracted. Of several seeds an image counts
once, by its mean; models are kept apart. `estimates` says how intervals are computed.

A third kind of rows, *box* rows, is of clean images whose objects have boxes: a column for each
threshold of `localization.THRESHOLDS`, 1 where the map's box misses the object's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from captum_adv2.defenses.detection import threshold_at
from captum_adv2.evaluation import localization
from captum_adv2.evaluation.robustness import Robustness
from captum_adv2.study.cases import CURVE, DISTILLED, SQUEEZERS, Case
from captum_adv2.study.estimates import (
    JOINT,
    Cell,
    Estimate,
    Evidence,
    Function,
    apart,
    contrasted,
)
from captum_adv2.study.results import Pictures
from captum_adv2.study.settings import Settings

if TYPE_CHECKING:
    from captum_adv2.study.engine import Part

PLACE = ["model", "attack", "aimed"]
IMAGE = ["model", "seed", "image", "name", "label", "target", "attack", "aimed"]
MEASURED = [
    *("success", "confidence", "l1", "l2", "iou", "iou_mean"),
    *("target_l1", "target_iou", "missed", "drift", "least"),
]
MAP = [*IMAGE, "interpreter", *MEASURED]
CUTS = [f"{kind} {amount:g}" for kind, amount in localization.THRESHOLDS]
BOX = ["model", "image", "held_out", "interpreter", *CUTS]
SCORE = [*IMAGE, "squeezer", "score"]  # target -1: held-out images, which set the thresholds

FALSE_POSITIVES = 0.05
"""Share of held-out benign images that a threshold flags at most."""

Values: TypeAlias = "pd.Series[float]"  # by seed and image


class Gathered(NamedTuple):
    """The rows and pictures of a study."""

    maps: pd.DataFrame
    scores: pd.DataFrame
    boxes: pd.DataFrame
    pictures: list[Pictures]


def gather(parts: Iterable[Part], settings: Settings) -> Gathered:
    """Return the rows and pictures of all shards that are there."""
    maps, scores, boxes, pictures = [], [], [], []
    for part in parts:
        model = part.subject.name
        for task, case, found in part.shards():
            names, labels = zip(*map(part.known, task.images), strict=True)
            target = found.get("target", torch.full((len(names),), -1)).numpy()
            place = (model, task.seed, task.images, names, labels, target)
            images = dict(zip(IMAGE, (*place, case.attack, case.aimed), strict=True))
            for name, measures in found.get("measures", {}).items():
                maps.append(images | {"interpreter": name} | _numbers(measures))
            for name, score in zip(SQUEEZERS, found["scores"].unbind(dim=1), strict=False):
                scores.append(images | {"squeezer": name} | _numbers({"score": score}))
            if task.seed == settings.seeds[0]:
                own = {"model": model, "image": task.images, "held_out": float(task.held_out)}
                for name, tried in found.get("boxes", {}).items():
                    missed = dict(zip(CUTS, tried.unbind(dim=1), strict=True))
                    boxes.append(own | {"interpreter": name} | _numbers(missed))
            if task.number == 0 and task.seed == settings.seeds[0] and "images" in found:
                pictures.append(_shown(part, case, found, settings.shown))
    rows = _rows(maps, MAP).astype(dict.fromkeys(MEASURED, float))
    return Gathered(rows, _rows(scores, SCORE), _rows(boxes, BOX), pictures)


def _shown(part: Part, case: Case, found: Mapping[str, Any], count: int) -> Pictures:
    """Return the first images of a case, with their maps and what stands below them."""
    measures, aims = found["measures"], found["aim"]
    sure = next(iter(measures.values()))["confidence"][:count].tolist()
    return Pictures(
        part.subject.name,
        case.attack,
        case.aimed,
        found["images"][:count].float() / 255,
        {name: maps[:count] for name, maps in found["maps"].items()},
        aims[case.aimed][:count] if aims else None,
        [
            f"{part.class_name(c)} {p:.2f}"
            for c, p in zip(found["target"][:count].tolist(), sure, strict=True)
        ],
        {name: each["l1"][:count].tolist() for name, each in measures.items()},
    )


def _numbers(columns: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: column.double().numpy() for name, column in columns.items()}


def _rows(blocks: list[dict[str, Any]], names: list[str]) -> pd.DataFrame:
    frames = [pd.DataFrame(block, columns=names) for block in blocks]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=names)


class Measure(NamedTuple):
    """A column of map rows to take the mean of."""

    column: str
    successes: bool = True  # over successful attacks, or over all
    percent: bool = False


MEASURES: Mapping[str, Measure] = {
    "ASR": Measure("success", successes=False, percent=True),
    "MC": Measure("confidence", successes=False),
    "L1": Measure("l1"),
    "L2": Measure("l2"),
    "IoU": Measure("iou"),
    "IoU at the mean": Measure("iou_mean"),
    "L1 to target": Measure("target_l1"),
    "IoU to target": Measure("target_iou"),
    "localisation error": Measure("missed", successes=False, percent=True),
    "drift": Measure("drift", successes=False),
}
"""Measures by title."""


def knows(attack: str) -> bool:
    """Return whether an attack knows of an interpreter."""
    return attack not in ("benign", "PGD", "stAdv", "Square") and not attack.startswith("noise:")


def difference(first: Values, second: Values) -> Values:
    """Return first less second, on the images that have both."""
    return (first - second).dropna()


def by_image(values: Values) -> Values:
    """Return each image's mean: more seeds of an image are no more images."""
    return values.groupby(level="image").mean()


def _paired(first: Values, second: Values) -> Estimate:
    """Return the difference of two rates; images that both have are paired."""
    both = by_image(pd.concat([first, second], axis=1).dropna()).to_numpy()
    varied = len(both) and (both.std(axis=0) > 0).all()
    correlation = float(np.corrcoef(both.T)[0, 1]) if varied else 0.0
    ours, theirs = (Estimate.of(by_image(values), percent=True) for values in (first, second))
    return apart(ours, theirs, correlation)


class Results(Evidence):
    """A study's values by model, attack and interpreter, as series by seed and image.

    Args:
        maps: Map rows.
        scores: Score rows.
        boxes: Box rows.

    Attributes:
        models: Names of the classifiers, in the order of the rows.
        every: Names of the interpreters.
        interpreters: Names of the interpreters but `DISTILLED`.
        squeezers: Names of the squeezers.
        thresholds: By model, of each squeezer and of all (`JOINT`); none without held-out images.
    """

    def __init__(
        self, maps: pd.DataFrame, scores: pd.DataFrame, boxes: pd.DataFrame | None = None
    ) -> None:
        boxes = pd.DataFrame(columns=BOX) if boxes is None else boxes
        self._boxes = dict(iter(boxes.dropna().groupby(["model", "interpreter"])))
        self.models = [*maps.model.unique()]
        self.every = [*maps.interpreter.unique()]
        self.interpreters = [name for name in self.every if name != DISTILLED]
        self.squeezers = [*scores.squeezer.unique()]
        self._attacks = [*maps.attack.unique()]
        # Clean images are the same for every seed.
        first = maps.seed.iloc[0] if len(maps) else 0
        maps, scores = (
            rows[(rows.attack != "benign") | (rows.seed == first)] for rows in (maps, scores)
        )
        held_out = scores.target == -1
        self.thresholds = {
            model: {
                name: threshold_at(torch.tensor(values.dropna().to_numpy()), FALSE_POSITIVES)
                for name, values in columns.items()
            }
            for model, columns in self._wide(scores[held_out]).groupby(level="model")
        }
        maps = maps.set_index(["seed", "image"])
        self._none = maps.iloc[:0]
        self._maps = dict(iter(maps.groupby([*PLACE, "interpreter"])))
        won = maps[maps.success > 0.5].groupby([*PLACE, "seed", "image"]).size()
        wide = self._wide(scores[~held_out])
        counts = wide.index.isin(won.index) | (wide.index.get_level_values("attack") == "benign")
        self._scores = dict(iter(wide[counts].groupby(level=PLACE)))

    def _wide(self, scores: pd.DataFrame) -> pd.DataFrame:
        """Return a column of scores for each squeezer, and one for all."""
        index = [*PLACE, "seed", "image"]
        wide = scores.pivot(index=index, columns="squeezer", values="score")
        wide = wide.reindex(columns=self.squeezers)
        return wide.assign(**{JOINT: wide.max(axis=1, skipna=False)})

    def rows(
        self, model: str, attack: str, interpreter: str, aimed: str | None = None
    ) -> pd.DataFrame:
        """Return an interpreter's rows after an attack, by seed and image; maybe none.

        Args:
            model: Name of the classifier.
            attack: Name of the attack.
            interpreter: Name of the interpreter.
            aimed: Interpreter that the attack knew of; default: this one, if it knew of any.
        """
        if aimed is None:
            aimed = interpreter if knows(attack) else ""
        return self._maps.get((model, attack, aimed, interpreter), self._none)

    def values(self, title: str, model: str, attack: str, *place: str) -> Values:
        """Return the values of a measure that count; see `MEASURES` and `rows`.

        After ``noise``, the mean over all kinds of noise that make the classifier err on an image.
        """
        if attack == "noise":
            kinds = [self.values(title, model, each, *place) for each in self.named("noise:")]
            return pd.concat([self._none.l1, *kinds]).groupby(level=["seed", "image"]).mean()
        rows, measure = self.rows(model, attack, *place), MEASURES[title]
        counting = rows[rows.success > 0.5] if measure.successes else rows
        return counting[measure.column].dropna()

    def estimate(self, title: str, model: str, *place: str) -> Estimate:
        """Return a measure's mean and interval; see `values`."""
        values = self.values(title, model, *place)
        return Estimate.of(by_image(values), MEASURES[title].percent)

    def contrast(
        self, function: Function, model: str, *cells: Cell, level: float = 0.95
    ) -> Estimate:
        """See `Evidence`."""
        columns = [self.values(title, model, *place) for title, *place in cells]
        both = by_image(pd.concat(columns, axis=1).dropna())
        return contrasted(function, both.to_numpy(), level)

    def scores(self, model: str, attack: str, aimed: str, squeezer: str = JOINT) -> Values:
        """Return the scores of successful attacks, or of clean images."""
        found = self._scores.get((model, attack, aimed))
        return self._none.l1 if found is None else found[squeezer].droplevel(PLACE).dropna()

    def flagged(self, model: str, attack: str, aimed: str, squeezer: str = JOINT) -> Values:
        """Return 1 for images that a squeezer, or all together, flags, 0 for others."""
        threshold = self.thresholds.get(model, {}).get(squeezer)
        scores = self.scores(model, attack, aimed, squeezer)
        return scores.iloc[:0] if threshold is None else (scores > threshold).astype(float)

    def detection(self, model: str, attack: str, aimed: str, squeezer: str = JOINT) -> Estimate:
        """Return the share of images that are flagged."""
        return Estimate.of(by_image(self.flagged(model, attack, aimed, squeezer)), percent=True)

    def excess(
        self, model: str, first: tuple[str, str], second: tuple[str, str], squeezer: str
    ) -> Estimate:
        """See `Evidence`; images that both attacks changed are paired."""
        return _paired(*(self.flagged(model, *place, squeezer) for place in (first, second)))

    def gap(self, model: str, first: Cell, second: Cell) -> Estimate:
        """See `Evidence`; images that both have are paired."""
        return _paired(*(self.values(title, model, *place) for title, *place in (first, second)))

    def localisation(self, model: str, interpreter: str) -> tuple[str, Estimate, int]:
        """Return the threshold with the fewest wrong boxes on held-out images, and its error.

        The error is of the images that are studied; the number of held-out images comes last. Of
        equals, the first of `localization.THRESHOLDS` counts; without any it is empty.
        """
        rows = self._boxes.get((model, interpreter), pd.DataFrame(columns=BOX))
        held, own = (rows[rows.held_out == kind][CUTS].astype(float) for kind in (1.0, 0.0))
        if held.empty:
            return "", Estimate.of([], percent=True), 0
        best = str(held.mean().idxmin())
        return best, Estimate.of(own[best], percent=True), len(held)

    def trust(self, model: str, interpreter: str) -> Robustness | None:
        """Return the least eps of images, if that was found; of several seeds, by the first."""
        least = self.rows(model, CURVE, interpreter).least.dropna()
        least = least[~least.index.get_level_values("image").duplicated()]
        return Robustness(torch.tensor(least.to_numpy(dtype=float))) if len(least) else None

    def having(self, attack: str) -> list[str]:
        """Return the interpreters (but `DISTILLED`) with rows of their own after an attack."""
        names, models = self.interpreters, self.models
        return [name for name in names if any(len(self.rows(m, attack, name)) for m in models)]

    def named(self, attack: str) -> list[str]:
        """Return an attack; or all that begin so, if it ends with a colon: ``adaptive:``."""
        every = [name for name in self._attacks if name.startswith(attack)]
        return every if attack.endswith(":") else [attack]

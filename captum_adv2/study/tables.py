# SPDX-License-Identifier: MIT
"""The paper's tables, from the rows of a study; a table whose rows are absent is left out.

Tables have a line for each classifier, interpreter and attack, where the paper has columns for
some of them: they may be many, and screens are narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pandas as pd

from captum_adv2.study.cases import DISTILLED
from captum_adv2.study.frame import JOINT, MEASURES, Estimate, Results, difference
from captum_adv2.study.settings import Settings

_BASIC = ("PGD", "ADV2")

_Row = dict[str, str]


class Table(NamedTuple):
    """A table of texts.

    Attributes:
        number: The paper's, such as ``"Table 3"``; of a figure where the paper draws the numbers.
        title: Its subject.
        cells: Texts, by the titles of the columns.
        note: How they were measured.
        labels: Number of columns at the left that label a row.
    """

    number: str
    title: str
    cells: pd.DataFrame
    note: str
    labels: int

    def markdown(self) -> str:
        """Return it as a document in Markdown."""
        header = [*self.cells.columns]
        lines = [header, ["---"] * len(header), *self.cells.to_numpy().tolist()]
        body = ("| " + " | ".join(map(_cell, line)) + " |" for line in lines)
        return "\n".join([f"# {self.number}. {self.title}", "", *body, "", self.note, ""])


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


class _Spec(NamedTuple):
    """A table to build.

    Attributes:
        number: See `Table`.
        title: See `Table`.
        needs: What has to be measured.
        rows: Makes the rows of a classifier.
        labels: See `Table`.
        rule: How it is measured, besides the protocol.
        flow: Whether attacks move pixels.
    """

    number: str
    title: str
    needs: str
    rows: Callable[[Results, str], Iterator[_Row]]
    labels: int = 3
    rule: str = ""
    flow: bool = False


def build(results: Results, settings: Settings) -> tuple[list[Table], list[str]]:
    """Return the tables that a study's rows fill, in the paper's order, and why others are not."""
    tables, missing = [], []
    for spec in SPECS:
        if spec.number == ("Table 13" if on_skin(settings) else "Table 14"):
            continue
        rows = [row for model in results.models for row in spec.rows(results, model)]
        if rows:
            note = spec.rule + protocol(settings, spec.flow)
            tables.append(Table(spec.number, spec.title, pd.DataFrame(rows), note, spec.labels))
        else:
            missing.append(f"{spec.number}: needs {spec.needs}")
    return tables, missing


def on_skin(settings: Settings) -> bool:
    """Return whether a study is of skin lesions, which have tables and figures of their own."""
    return settings.images.startswith("isic:")


def protocol(settings: Settings, flow: bool) -> str:
    """Return how attacks and maps were made and measured."""
    if flow:
        attack = f"move pixels by at most {settings.bound:g} pixels along each axis"
    else:
        attack = f"change pixels by at most eps = {settings.eps * 255:g}/255"
    steps, seeds = settings.flow_steps if flow else settings.steps, len(settings.seeds)
    return (
        f"Attacks {attack}, in {steps} gradient evaluations; of ADV2's iterates the best one "
        "counts, judged on the interpreter's own map after rounding to 8 bits. All images are "
        "rounded to 8 bits before they are measured. A benign map explains the image's own class, "
        "an adversarial map the target class. IoU and boxes are of map pixels above "
        f"{settings.threshold:g}. Up to {settings.count} images a classifier"
        f"{f', {seeds} seeds pooled' if seeds > 1 else ''}. Success rates (ASR) and the confidence "
        "in the target class (MC) are over all images, distances of maps over successful attacks; "
        "[a, b] is a 95 % bootstrap interval of the mean, – is no image."
    )


class _Long:
    """Rows for each interpreter and attack: some measures, and the number of successes.

    Args:
        attacks: Names of attacks; one that ends with a colon names all those that begin so.
        *titles: Of `MEASURES`.
        only: The interpreters; by default all.
    """

    def __init__(
        self,
        attacks: tuple[str, ...],
        *titles: str,
        only: Callable[[Results], list[str]] = lambda results: results.interpreters,
    ) -> None:
        self._attacks, self._titles, self._only = attacks, titles, only

    def __call__(self, results: Results, model: str) -> Iterator[_Row]:
        attacks = [
            found
            for name in self._attacks
            for found in (results.parameters(name[:-1]) if name.endswith(":") else [name])
        ]
        for interpreter in self._only(results):
            for attack in attacks:
                place = model, attack, interpreter
                count = len(results.rows(*place))
                if count:
                    yield {
                        "model": model,
                        "interpreter": interpreter,
                        "attack": attack,
                        **{title: _text(results, title, *place) for title in self._titles},
                        "successes": f"{len(results.values('L1', *place))} of {count}",
                    }


def _text(results: Results, title: str, *place: str) -> str:
    return results.estimate(title, *place).text(MEASURES[title].percent)


def _adaptive(results: Results) -> list[str]:
    """Return the interpreters of adaptive attacks."""
    attacks = results.parameters("adaptive")
    return [
        name for name in results.interpreters if any(name in results.having(a) for a in attacks)
    ]


def _localisation(results: Results, model: str) -> Iterator[_Row]:
    for name in results.every:
        error = results.estimate("localisation error", model, "benign", name)
        if error.size:
            yield {
                "model": model,
                "interpreter": name,
                "wrong boxes": error.text(percent=True),
                "images with boxes": f"{error.size}",
            }


def _detection(results: Results, model: str) -> Iterator[_Row]:
    """Yield rates of detection by each squeezer, and by all together."""
    if not {"PGD", "ADV2"} & {*results.attacks}:
        return

    def rate(attack: str, name: str, squeezer: str) -> str:
        return Estimate.of(results.flagged(model, attack, name, squeezer)).text(percent=True)

    for squeezer, threshold in results.thresholds.get(model, {}).items():
        row = {"model": model, "squeezer": squeezer, "threshold": f"{threshold:.3f}"}
        row["benign"] = rate("benign", "", squeezer)
        row["PGD"] = rate("PGD", "", squeezer)
        for name in results.having("ADV2"):
            row[f"ADV2 on {name}"] = rate("ADV2", name, squeezer)
        for name in _adaptive(results):
            row[f"adaptive on {name}"] = rate(f"adaptive:{squeezer}", name, squeezer)
            row[f"joint, adaptive on {name}"] = rate(f"adaptive:{squeezer}", name, JOINT)
        yield row


def _transfer(results: Results, model: str) -> Iterator[_Row]:
    names = results.having("ADV2")
    for source in (*names, "PGD") if len(names) > 1 else ():
        place = ("PGD", "") if source == "PGD" else ("ADV2", source)
        found = {n: results.estimate("L1", model, place[0], n, place[1]) for n in names}
        if any(entry.size for entry in found.values()):
            cells = {f"on {name}": entry.text() for name, entry in found.items()}
            yield {"model": model, "source": source} | cells


def _distilled(results: Results, model: str) -> Iterator[_Row]:
    """Yield how far maps of RTS and of the interpreter trained against ADV2 move."""
    for attack in (*_BASIC, *results.parameters("noise")):
        rts, other = (results.values("L1", model, attack, name) for name in ("RTS", DISTILLED))
        if len(rts) and len(other):
            yield {
                "model": model,
                "attack": attack,
                "L1 on RTS": Estimate.of(rts).text(),
                f"L1 on {DISTILLED}": Estimate.of(other).text(),
                "difference": Estimate.of(difference(other, rts)).text(),
                "images": f"{len(rts)}, {len(other)}",
            }


SPECS = (
    _Spec(
        "Table 2",
        "Localisation by maps",
        "images whose objects have known boxes",
        _localisation,
        2,
        "A map of a clean image, for its own class, is resized to the image; the box around the "
        "largest component of pixels above the threshold is wrong if its intersection over union "
        "with every true box is below one half. Images without a known box are left out. ",
    ),
    _Spec(
        "Table 3",
        "Success of PGD and ADV2",
        "PGD or ADV2 towards benign maps",
        _Long(_BASIC, "ASR", "MC"),
    ),
    _Spec(
        "Table 4",
        "Detection by squeezing",
        "attacks on pixels, squeezers, and held-out images that set their thresholds",
        _detection,
        2,
        "Share of images whose score exceeds the threshold, the lowest that flags at most 5 % of "
        "the held-out benign images. The joint score is the largest of the squeezers', and has a "
        "threshold of its own. An adaptive attack knows the squeezer of its row, which judges it; "
        "beside it the joint score does. Rates are over successful attacks. ",
    ),
    _Spec(
        "Table 5",
        "Maps and success of PGD, basic and adaptive ADV2",
        "adaptive attacks",
        _Long((*_BASIC, "adaptive:"), "L1", "IoU", "ASR", "MC", only=_adaptive),
    ),
    _Spec(
        "Table 6",
        "Success of ADV2 towards patches",
        "ADV2 towards patches",
        _Long(("patch",), "ASR", "MC"),
    ),
    _Spec(
        "Table 7",
        "Distance of ADV2's maps to the patch (target) and to the benign map (L1)",
        "ADV2 towards patches",
        _Long(("patch",), "L1 to target", "L1"),
    ),
    _Spec(
        "Table 8",
        "ADV2 towards the map of an image of another class",
        "ADV2 towards maps of other classes",
        _Long(("class",), "ASR", "MC", "L1 to target", "IoU to target"),
    ),
    _Spec(
        "Table 9",
        "L1 between benign and adversarial maps, made against the row, tried on the column",
        "ADV2 towards benign maps, and at least two interpreters",
        _transfer,
        2,
        "The target class is the same in every cell. ",
    ),
    _Spec(
        "Table 10",
        "PGD and ADV2 on Grad-CAM",
        "the interpreter GradCAM",
        _Long(_BASIC, "ASR", "MC", "L1", "L2", only=lambda results: ["GradCAM"]),
    ),
    *(
        _Spec(
            number,
            "Distances of benign and adversarial maps",
            "PGD or ADV2 towards benign maps",
            _Long(_BASIC, "L1", "L2"),
        )
        for number in ("Table 13", "Table 14")  # of ImageNet, of skin lesions
    ),
    _Spec(
        "Figure 10",
        "stAdv, and ADV2 on it",
        "the framework stadv",
        _Long(("stAdv", "StADV2"), "ASR", "MC", "L1", "IoU"),
        flow=True,
    ),
    _Spec(
        "Figures 15 and 16",
        f"How far maps move on RTS and on {DISTILLED}",
        f"the interpreters RTS and {DISTILLED}",
        _distilled,
        2,
        "ADV2 knows the interpreter of its column; noise is named by its kind and the share of "
        "images on which it makes the classifier err. Maps after noise explain the class that the "
        "classifier then predicts, and only its errors count. The difference is over images on "
        "which both attacks succeed. ",
    ),
)
"""The tables in the paper's order."""

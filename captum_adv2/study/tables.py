# SPDX-License-Identifier: MIT
"""The paper's tables, from the rows of a study; a table whose rows are absent is left out.

Tables have a line for each classifier, interpreter and attack, where the paper has columns for
some of them: they may be many, and screens are narrow.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from captum_adv2.study.estimates import (
    DISTILLED,
    FALSE_POSITIVES,
    JOINT,
    MEASURES,
    Estimate,
    Results,
    difference,
    estimate,
    percentage,
)
from captum_adv2.study.records import Frame
from captum_adv2.study.settings import Settings

__all__ = ["NEEDS", "Table", "build", "left_out", "on_skin", "protocol"]

NEEDS: Mapping[str, str] = {
    "Table 2": "images whose objects have known boxes",
    "Table 3": "PGD or ADV2 towards benign maps",
    "Table 4": "attacks on pixels, squeezers, and held-out images that set their thresholds",
    "Table 5": "adaptive attacks",
    "Table 6": "ADV2 towards patches",
    "Table 7": "ADV2 towards patches",
    "Table 8": "ADV2 towards maps of other classes",
    "Table 9": "ADV2 towards benign maps, and at least two interpreters",
    "Table 10": "the interpreter GradCAM",
    "Table 13": "PGD or ADV2 towards benign maps, on images other than skin lesions",
    "Table 14": "PGD or ADV2 towards benign maps, on images of skin lesions",
    "Figure 10": "the framework stadv",
    "Figures 15 and 16": f"the interpreters RTS and {DISTILLED}",
}
"""What each table is made of."""

_BASIC = ("PGD", "ADV2")


class Table(NamedTuple):
    """A table of texts.

    Attributes:
        number: The paper's, such as ``"Table 3"``; of a figure where the paper draws the numbers.
        title: What it shows.
        header: Titles of the columns.
        rows: As many texts as columns, each.
        note: How it was measured.
        labels: How many columns at the left say what a row is of.
    """

    number: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str
    labels: int = 1

    def markdown(self) -> str:
        """Return it as a document in Markdown."""
        lines = [self.header, ("---",) * len(self.header), *self.rows]
        body = ("| " + " | ".join(map(_cell, line)) + " |" for line in lines)
        return "\n".join([f"# {self.number}. {self.title}", "", *body, "", self.note, ""])

    def csv(self) -> str:
        """Return header and rows as comma-separated values."""
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([self.header, *self.rows])
        return out.getvalue()


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def on_skin(settings: Settings) -> bool:
    """Return whether a study is of skin lesions, which have tables and figures of their own."""
    return settings.images.startswith("isic:")


def protocol(settings: Settings, flow: bool = False) -> str:
    """Return how attacks and maps were made and measured.

    Args:
        settings: The study's.
        flow: Whether attacks move pixels.
    """
    attack = (
        f"Attacks move pixels by at most {settings.bound:g} pixels along each axis, "
        f"in {settings.flow_steps} gradient evaluations"
        if flow
        else f"Attacks change pixels by at most eps = {settings.eps * 255:g}/255, in "
        f"{settings.steps} gradient evaluations"
    )
    seeds = len(settings.seeds)
    return (
        f"{attack}; of ADV2's iterates the best one counts, judged on the interpreter's own map "
        "after rounding to 8 bits. All images are rounded to 8 bits before they are measured. "
        "A benign map explains the image's own class, an adversarial map the target class. IoU "
        f"and boxes are of map pixels above {settings.threshold:g}. Up to {settings.count} images "
        f"a classifier{f', {seeds} seeds pooled' if seeds > 1 else ''}. Success rates (ASR) and "
        "the confidence in the target class (MC) are over all images, distances of maps over "
        "successful attacks; [a, b] is a 95 % bootstrap interval of the mean, – is no image."
    )


def build(maps: Frame, scores: Frame, settings: Settings) -> list[Table]:
    """Return the tables that a study's rows fill, in the paper's order.

    Args:
        maps: Map rows.
        scores: Score rows.
        settings: The study's.
    """
    results = Results(maps, scores)
    pixels = protocol(settings)
    found = (
        _localisation(results, settings),
        _long(results, "Table 3", "Success of PGD and ADV2", _BASIC, ("ASR", "MC"), pixels),
        _detection(results, pixels),
        _adaptive(results, pixels),
        _long(
            results, "Table 6", "Success of ADV2 towards patches", ["patch"], ("ASR", "MC"), pixels
        ),
        _long(
            results,
            "Table 7",
            "Distance of ADV2's maps to the patch (target) and to the benign map (L1)",
            ["patch"],
            ("L1 to target", "L1"),
            pixels,
        ),
        _long(
            results,
            "Table 8",
            "ADV2 towards the map of an image of another class",
            ["class"],
            ("ASR", "MC", "L1 to target", "IoU to target"),
            pixels,
        ),
        _transfer(results, pixels),
        _long(
            results,
            "Table 10",
            "PGD and ADV2 on Grad-CAM",
            _BASIC,
            ("ASR", "MC", "L1", "L2"),
            pixels,
            only=("GradCAM",),
        ),
        _long(
            results,
            "Table 14" if on_skin(settings) else "Table 13",
            "Distances of benign and adversarial maps",
            _BASIC,
            ("L1", "L2"),
            pixels,
        ),
        _long(
            results,
            "Figure 10",
            "stAdv, and ADV2 on it",
            ("stAdv", "StADV2"),
            ("ASR", "MC", "L1", "IoU"),
            protocol(settings, flow=True),
        ),
        _distilled(results, pixels),
    )
    return [table for table in found if table is not None]


def left_out(tables: Iterable[Table]) -> list[str]:
    """Return which tables are not there, each with what it is made of."""
    there = {table.number for table in tables}
    if there & {"Table 13", "Table 14"}:
        there |= {"Table 13", "Table 14"}  # a study has one of them
    return [f"{number}: needs {needs}" for number, needs in NEEDS.items() if number not in there]


def _long(
    results: Results,
    number: str,
    title: str,
    attacks: Collection[str],
    titles: Collection[str],
    note: str,
    only: Collection[str] | None = None,
) -> Table | None:
    """Return a table with a line for each model, interpreter and attack, if there is any."""
    measures = [MEASURES[name] for name in titles]
    lines = []
    for model in results.models:
        for interpreter in results.interpreters if only is None else only:
            for attack in attacks:
                rows = results.rows(model, attack, interpreter)
                if len(rows):
                    cells = (measure.of(rows).text(measure.percent) for measure in measures)
                    won = MEASURES["L1"].of(rows).size
                    lines.append((model, interpreter, attack, *cells, f"{won} of {len(rows)}"))
    header = ("model", "interpreter", "attack", *titles, "successes")
    return _table(number, title, header, lines, note, labels=3)


def _table(
    number: str,
    title: str,
    header: tuple[str, ...],
    lines: Collection[tuple[str, ...]],
    note: str,
    labels: int = 1,
) -> Table | None:
    return Table(number, title, header, tuple(lines), note, labels) if lines else None


def _localisation(results: Results, settings: Settings) -> Table | None:
    found = (
        (model, name, results.estimate("localisation error", model, "benign", name))
        for model in results.models
        for name in results.everyone
    )
    lines = [
        (m, name, error.text(percent=True), f"{error.size}")
        for m, name, error in found
        if error.size
    ]
    note = (
        "A map of a clean image, for its own class, is resized to the image; the box around the "
        f"largest component of pixels above {settings.threshold:g} is wrong if its intersection "
        "over union with every true box is below one half. Images without a known box are left "
        "out. [a, b] is a 95 % bootstrap interval of the mean."
    )
    header = ("model", "interpreter", "wrong boxes", "images with boxes")
    return _table("Table 2", "Localisation by maps", header, lines, note, labels=2)


def _detection(results: Results, note: str) -> Table | None:
    """Return rates of detection: a line for each model and squeezer, and for all together."""
    adaptive = results.parameters("adaptive")
    aimed = results.having("ADV2")
    knowing = [name for name in aimed if any(name in results.having(a) for a in adaptive)]
    header = (
        "model", "squeezer", "threshold", "benign", "PGD",
        *(f"ADV2 on {name}" for name in aimed),
        *(f"{text} {name}" for name in knowing for text in ("adaptive on", "joint, adaptive on")),
    )  # fmt: skip
    lines = []
    for model in results.models:

        def rate(attack: str, name: str, squeezer: str, model: str = model) -> str:
            return estimate(results.flagged(model, attack, name, squeezer)).text(percent=True)

        for squeezer, threshold in results.thresholds.get(model, {}).items():
            known = f"adaptive:{squeezer}"
            lines.append(
                (
                    model,
                    squeezer,
                    f"{threshold:.3f}",
                    rate("benign", "", squeezer),
                    rate("PGD", "", squeezer),
                    *(rate("ADV2", name, squeezer) for name in aimed),
                    *(rate(known, name, s) for name in knowing for s in (squeezer, JOINT)),
                )
            )
    if not (aimed or "PGD" in results.attacks):
        return None
    rule = (
        "Share of images whose score exceeds the threshold, the lowest that flags at most "
        f"{percentage(FALSE_POSITIVES)} of the held-out benign images. The joint score is the "
        "largest of the squeezers', and has a threshold of its own. An adaptive attack knows the "
        "squeezer of its row, which judges it; beside it the joint score does. Rates are over "
        "successful attacks. "
    )
    return _table("Table 4", "Detection by squeezing", header, lines, rule + note, labels=2)


def _adaptive(results: Results, note: str) -> Table | None:
    attacks = results.parameters("adaptive")
    only = [
        name for name in results.interpreters if any(name in results.having(a) for a in attacks)
    ]
    title = "Maps and success of PGD, basic and adaptive ADV2"
    measures = ("L1", "IoU", "ASR", "MC")
    return _long(results, "Table 5", title, (*_BASIC, *attacks), measures, note, only)


def _transfer(results: Results, note: str) -> Table | None:
    names = results.having("ADV2")
    lines = []
    for model in results.models:
        for source in (*names, "PGD"):
            attack, aimed = ("PGD", "") if source == "PGD" else ("ADV2", source)
            found = [results.estimate("L1", model, attack, name, aimed) for name in names]
            if any(entry.size for entry in found):
                lines.append((model, source, *(entry.text() for entry in found)))
    header = ("model", "source", *(f"on {name}" for name in names))
    title = "L1 between benign and adversarial maps, made against the row, tried on the column"
    rule = "The target class is the same in every cell. "
    return _table("Table 9", title, header, lines if len(names) > 1 else (), rule + note, labels=2)


def _distilled(results: Results, note: str) -> Table | None:
    """Return how far maps of RTS and of the interpreter trained against ADV2 move."""
    lines = []
    for model in results.models:
        for attack in (*_BASIC, *results.parameters("noise")):
            both = [results.values("L1", model, attack, name) for name in ("RTS", DISTILLED)]
            if all(both):
                found: list[Estimate] = [estimate(values) for values in both]
                more = estimate(difference(both[1], both[0]))
                counts = f"{found[0].size}, {found[1].size}"
                lines.append((model, attack, *(e.text() for e in (*found, more)), counts))
    header = ("model", "attack", "L1 on RTS", f"L1 on {DISTILLED}", "difference", "images")
    rule = (
        "ADV2 knows the interpreter of its column; noise is named by its kind and the share of "
        "images on which it makes the classifier err. Maps after noise explain the class that the "
        "classifier then says, and only its errors count. The difference is over images on which "
        "both attacks succeed. "
    )
    title = f"How far maps move on RTS and on {DISTILLED}"
    return _table("Figures 15 and 16", title, header, lines, rule + note, labels=2)

# SPDX-License-Identifier: MIT
"""The paper's tables over several studies, as Markdown: what ``docs/reproduction.md`` shows.

    python examples/benchmark/reproduction.py STUDY... --curves STUDY... --out FOLDER

Each argument is the folder of a study. Networks are columns; cells are means, or rates, and those
of the paper stand at the left: of its ResNet-50 or, where all studies are of skin lesions, of its
skin-cancer classifier. The curves of trust become a table, and ``study-curve.png``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pandas as pd

from captum_adv2.study import plots
from captum_adv2.study.claims import judge
from captum_adv2.study.engine import stored
from captum_adv2.study.estimates import Estimate, Evidence
from captum_adv2.study.frame import Results
from captum_adv2.study.paper import PAPER, counterpart
from captum_adv2.study.tables import on_skin
from captum_adv2.study.verdicts import summary

Cell = Callable[[Evidence, str, str], str]  # of a classifier and an interpreter
SHORT = {"does not hold": "no", "too few images": "few images", "not measured": "–"}
SHORT |= {"too few digits": "few digits", "no numbers printed": "–"}


def read(folder: Path) -> Results:
    """Return the results of a study's records."""
    tables = [
        pd.read_csv(folder / "records" / f"{name}.csv", keep_default_na=False, na_values="nan")
        for name in ("maps", "scores", "boxes")
    ]
    return Results(*tables)


def line(cells: Sequence[str]) -> str:
    """Return a row of a table."""
    return "|" + "|".join(cells) + "|"


def table(columns: Sequence[str], rows: Iterator[list[str]]) -> str:
    """Return a table; rows without a number are left out."""
    lines = [["", *columns], ["---"] * (len(columns) + 1), *rows]
    return "\n".join(line(row) for row in lines if any(cell != "–" for cell in row[1:]))


def number(evidence: Evidence, title: str, model: str, *place: str) -> str:
    """Return a mean to three digits, a rate as a percentage; a dash for none."""
    found = evidence.estimate(title, model, *place)
    if not found.size:
        return "–"
    return f"{100 * found.mean:.0f} %" if found.percent else f"{found.mean:.3f}"


def pair(*cells: tuple[str, str]) -> Cell:
    """Return what a cell shows: measures after attacks, as ``first (second), first (second)``."""

    def cell(evidence: Evidence, model: str, name: str) -> str:
        found = []
        for attack, titles in cells:
            values = [number(evidence, title, model, attack, name) for title in titles.split(", ")]
            if values[0] == "–":
                return "–"
            rest = "".join(f" ({value})" for value in values[1:] if value != "–")
            found.append(values[0] + rest)
        return ", ".join(found)

    return cell


def detection(attack: str, aimed: str) -> Cell:
    """Return a cell of detection rates after an attack, one for each squeezer."""

    def cell(evidence: Evidence, model: str, name: str) -> str:
        found = []
        for squeezer in evidence.squeezers:
            rate = evidence.detection(model, attack.replace("*", squeezer), aimed, squeezer)
            found.append(f"{100 * rate.mean:.0f}" if rate.size else "–")
        return "–" if {*found} <= {"–"} else ", ".join(found)

    return cell


TABLES: dict[str, Cell] = {
    "Tables 13, 14: L1 (IoU) to the benign map, PGD, ADV2": pair(
        ("PGD", "L1, IoU"), ("ADV2", "L1, IoU")
    ),
    "Tables 3, 14: success of ADV2 (confidence)": pair(("ADV2", "ASR, MC")),
    "Table 7: patch, L1 to it, and to the benign map": pair(
        ("patch", "L1 to target"), ("patch", "L1")
    ),
    "Table 8: class, L1 to the other map (IoU)": pair(("class", "L1 to target, IoU to target")),
    "Figure 10: L1 (IoU) of stAdv, ADV2 on stAdv": pair(
        ("stAdv", "L1, IoU"), ("StADV2", "L1, IoU")
    ),
    "Figure 10: success of ADV2 on stAdv": pair(("StADV2", "ASR")),
    "Table 2: wrong boxes at the threshold 0.5": pair(("benign", "localisation error")),
}


def names(studies: Sequence[tuple[Results, bool]]) -> list[str]:
    """Return the interpreters of all studies."""
    return list(dict.fromkeys(name for results, _ in studies for name in results.every))


def row(studies: Sequence[tuple[Results, bool]], cell: Cell, name: str) -> list[str]:
    """Return the paper's number for an interpreter, then each network's."""
    paper = cell(PAPER, counterpart("resnet", skin=all(skin for _, skin in studies)), name)
    return [paper, *(cell(results, m, name) for results, _ in studies for m in results.models)]


def rows(studies: Sequence[tuple[Results, bool]], cell: Cell) -> Iterator[list[str]]:
    """Yield a row for each interpreter."""
    for name in names(studies):
        yield [name, *row(studies, cell, name)]


def detections(studies: Sequence[tuple[Results, bool]]) -> Iterator[list[str]]:
    """Yield a row for PGD, and one for each attack on an interpreter."""
    yield ["PGD", *row(studies, detection("PGD", ""), "")]
    known = "adaptive:*"
    every = ("ADV2", "ADV2"), ("adaptive", known), ("Algorithm 2", f"{known}, Algorithm 2")
    for title, attack in every:
        for name in names(studies):
            yield [f"{title} on {name}", *row(studies, detection(attack, name), name)]


def shorter(text: str) -> str:
    """Return an answer in fewer words."""
    answer, without, rest = text.partition(", without ")
    return SHORT.get(answer, answer) + without + rest


def observations(studies: Sequence[tuple[Results, bool]]) -> Iterator[list[str]]:
    """Yield the answer of each of the nine rules, the paper's own tables' first."""
    answers = [summary(judge(results), skin)[0] for results, skin in studies]
    for place, first in answers[0].iterrows():
        cells = [text for each in answers for text in each.iloc[place, 1:-1]]
        cells = [shorter(cell) for cell in (first["the paper's tables"], *cells)]
        yield [first["observation"], *cells]


def unmet(studies: Sequence[tuple[Results, bool]]) -> Iterator[str]:
    """Yield the criteria that are not met, a line for each observation and network."""
    for results, skin in studies:
        found = summary(judge(results), skin)[1]
        for (observation, model), group in found.groupby(["observation", "classifier"]):
            texts = [f"{row.of}: {row.what} {row.here}" for row in group.itertuples()]
            yield f"- {observation}, {model}: {'; '.join(texts)}"


def trust(folders: Sequence[Path], out: Path) -> None:
    """Print the areas above the curves of trust, with 95 % intervals; draw the curves."""
    every = [read(folder) for folder in folders]
    panels = {
        model: {name: found for name in each.every if (found := each.trust(model, name))}
        for each in every
        for model in each.models
    }

    def rows() -> Iterator[list[str]]:
        for name in dict.fromkeys(name for each in every for name in each.every):
            found = [curves.get(name) for curves in panels.values()]
            areas = ["–" if one is None else str(Estimate.of(one.heights())) for one in found]
            yield [name, *areas]

    print("\n**Area above the curve of trust**\n")
    print(table([*panels], rows()))
    plots.trusted(panels).savefig(out / "study-curve.png", dpi=80)


def main() -> None:
    """Print the tables of the studies."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("studies", nargs="+", type=Path, help="folders of studies")
    parser.add_argument("--curves", nargs="+", type=Path, help="folders of studies with --curve")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the picture")
    args = parser.parse_args()
    folders = args.studies
    studies = [(read(folder), on_skin(stored(folder))) for folder in folders]
    columns = ["paper", *(model for results, _ in studies for model in results.models)]
    print(table(columns, observations(studies)))
    print("\nNot met, or too few images:\n", *unmet(studies), sep="\n")
    for title, cell in TABLES.items():
        print(f"\n**{title}**\n\n{table(columns, rows(studies, cell))}")
    print("\n**Table 4: detected by 2 bits, 3 bits, 3x3, 11-3-4, in percent**\n")
    print(table(columns, detections(studies)))
    if args.curves:
        trust(args.curves, args.out)


if __name__ == "__main__":
    main()

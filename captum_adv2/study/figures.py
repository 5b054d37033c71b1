# SPDX-License-Identifier: MIT
"""The paper's figures, from the rows and pictures of a study.

Numbers come as bars with their 95 % intervals, in colours that colour-blind people tell apart, and
hatches for print. Figures are not registered with pyplot.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from captum_adv2.defenses.detection import roc
from captum_adv2.evaluation import visualize
from captum_adv2.study.cases import DISTILLED
from captum_adv2.study.frame import Results, knows
from captum_adv2.study.results import Pictures
from captum_adv2.study.settings import Settings
from captum_adv2.study.tables import on_skin

DPI = 80
"""Dots per inch that the sizes are made for."""

_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#F0E442")
_HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
_LINES = ("-", "--", "-.", ":")
_RTS = ("RTS", DISTILLED)

Row: TypeAlias = Mapping[str, tuple[Tensor, Tensor]]  # by interpreter, images and maps


class Drawing(NamedTuple):
    """A figure and its text."""

    stem: str  # name for its file
    number: str  # the paper's, such as "Figure 5"
    title: str
    caption: str
    figure: Figure  # to be saved with `DPI`


class Gallery:
    """A model's pictures, as rows of a grid."""

    def __init__(self, model: str, pictures: Sequence[Pictures], results: Results) -> None:
        own = [p for p in pictures if p.model == model and len(p.images)]
        self.model, self.results = model, results
        self._found = {(picture.attack, picture.aimed): picture for picture in own}
        self._names = list(dict.fromkeys(name for picture in own for name in picture.maps))

    def row(self, attack: str, names: Collection[str], aimed: str | None = None) -> Row:
        """Return maps after an attack that knew each interpreter, or the one that is named."""
        found = {}
        for name in names:
            known = name if aimed is None else aimed
            picture = self._found.get((attack, known if knows(attack) else ""))
            if picture is not None and name in picture.maps:
                found[name] = (picture.images, picture.maps[name])
        return found

    def after(self, *attacks: str, only: Collection[str] = ()) -> dict[str, Row]:
        """Return a row an attack; none without all interpreters of ``only``."""
        names = only or [name for name in self._names if name != DISTILLED]
        rows = {attack: self.row(attack, names) for attack in attacks}
        return {} if any(len(row) < len(only) for row in rows.values()) else rows

    def towards(self, attack: str) -> dict[str, Row]:
        """Return rows of clean images, of the maps that an attack aims at, and of its maps."""
        benign, reached = self.row("benign", self._names), self.row(attack, self._names)
        aims = {name: self._found[attack, name].aim for name in reached}
        target = {n: (benign[n][0], aim) for n, aim in aims.items() if aim is not None}
        return {"benign": benign, "target": target, "ADV2": reached}

    def transferred(self) -> dict[str, Row]:
        """Return a row for each interpreter that ADV2 knew, and PGD's."""
        names = self.results.interpreters
        rows = {f"ADV2 on {name}": self.row("ADV2", names, aimed=name) for name in names}
        if len(names) < 2 or not any(rows.values()):
            return {}
        return {"benign": self.row("benign", names), **rows, "PGD": self.row("PGD", names)}


@dataclass(frozen=True)
class Grid:
    """Images and maps, a figure a model."""

    number: int  # the paper's
    title: str
    caption: str
    rows: Callable[[Gallery], Mapping[str, Row]]
    images: int = 3  # at most

    def __call__(self, results: Results, galleries: Sequence[Gallery]) -> Iterator[Drawing]:
        """Yield a figure for each model with at least two rows."""
        for gallery in galleries:
            block = _common(self.rows(gallery))
            if len(block) > 1:
                stem = f"figure-{self.number:02d}-{gallery.model}"
                title = f"{self.title}, {gallery.model}"
                figure = _stacked(block, self.images)
                yield Drawing(stem, f"Figure {self.number}", title, self.caption, figure)


@dataclass(frozen=True)
class Bars:
    """Means and intervals, a panel a model."""

    number: int  # the paper's
    title: str
    series: Mapping[str, tuple[str, str]]  # by name, attack (see `Results.named`) and measure
    names: Sequence[str] = ()  # interpreters; default: all but `DISTILLED`

    def __call__(self, results: Results, galleries: Sequence[Gallery]) -> Iterator[Drawing]:
        """Yield the figure, if there are values for it."""
        names, measure = self.names or results.interpreters, [*self.series.values()][0][1]
        series = {
            (name or attack.partition(":")[2]): (title, attack)
            for name, (begin, title) in self.series.items()
            for attack in results.named(begin)
        }
        panels = {}
        for model in results.models:
            found = {
                key: [results.estimate(title, model, attack, name) for name in names]
                for key, (title, attack) in series.items()
            }
            if found and all(any(entry.size for entry in row) for row in found.values()):
                panels[model] = found
        if panels and {*names} <= {*results.every}:
            stem = f"figure-{self.number:02d}-{measure.lower()}"
            caption = "Means over successful attacks, with 95 % bootstrap intervals."
            figure = _barred(panels, names, measure)
            yield Drawing(stem, f"Figure {self.number}", self.title, caption, figure)


def detection(results: Results, galleries: Sequence[Gallery]) -> Iterator[Drawing]:
    """Yield how well the joint score tells attacked images from clean ones, if there are scores."""
    sources = {"PGD": ("PGD", "")} | {f"ADV2 on {n}": ("ADV2", n) for n in results.interpreters}
    panels = {}
    for model in results.models:
        clean = results.scores(model, "benign", "")
        scores = {name: results.scores(model, *place) for name, place in sources.items()}
        found = {name: (clean, s) for name, s in scores.items() if len(clean) and len(s)}
        if found:
            panels[model] = found
    if panels:
        yield Drawing(
            "detector-roc",
            "Table 4",
            "Feature squeezing tells attacked images from clean ones",
            "Share of clean and of successfully attacked images whose joint score exceeds a "
            "threshold, over all thresholds. A diagonal is a guess, the upper left corner perfect.",
            _curves(panels),
        )


def build(results: Results, pictures: Sequence[Pictures], settings: Settings) -> list[Drawing]:
    """Return the figures that a study fills, in the paper's order."""
    models = dict.fromkeys(picture.model for picture in pictures if len(picture.images))
    galleries = [Gallery(model, pictures, results) for model in models]
    specs = (*(SKIN if on_skin(settings) else PHOTOGRAPHS), *SPECS)
    return [drawing for spec in specs for drawing in spec(results, galleries)]


def _common(rows: Mapping[str, Row]) -> dict[str, Row]:
    """Return the rows that have anything, with the interpreters that all of these have."""
    full = {name: row for name, row in rows.items() if row}
    shared = [n for n in next(iter(full.values()), ()) if all(n in row for row in full.values())]
    return {name: {n: row[n] for n in shared} for name, row in full.items()} if shared else {}


def _stacked(rows: Mapping[str, Row], most: int) -> Figure:
    """Draw the rows image by image, one below the other: narrow enough for any screen."""
    count = min(most, *(len(images) for row in rows.values() for images, _ in row.values()))
    return visualize.grid(
        {
            (f"{name}\nimage {i + 1}" if count > 1 else name): {
                key: (images[i : i + 1], maps[i : i + 1]) for key, (images, maps) in row.items()
            }
            for i in range(count)
            for name, row in rows.items()
        }
    )


def _barred(
    panels: Mapping[str, Mapping[str, list[Any]]], names: Sequence[str], label: str
) -> Figure:
    """Draw a group of bars an interpreter, a bar a series; a panel a model."""
    series = len(next(iter(panels.values())))
    each = max(2.5, 0.5 + 0.28 * len(names) * (1 + series))
    figure = Figure(figsize=(min(each * len(panels), 11) + 0.5, 3), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    width = 0.8 / series
    for axis, (model, found) in zip(axes, panels.items(), strict=True):
        for i, (key, row) in enumerate(found.items()):
            ends = [[e.mean - e.low for e in row], [e.high - e.mean for e in row]]
            axis.bar(
                np.arange(len(names)) + (i - (series - 1) / 2) * width,
                [entry.mean for entry in row],
                width,
                yerr=np.abs(ends),  # an end may pass the mean by rounding
                label=key,
                color=_COLOURS[i % len(_COLOURS)],
                hatch=_HATCHES[i % len(_HATCHES)],
                edgecolor="white",
                error_kw={"capsize": 2, "linewidth": 1},
            )
        axis.set_xticks(range(len(names)), names)
        axis.set_title(model, fontsize=10)
    axes[0].set_ylim(bottom=0)  # shared, and fixed from now on: after all bars
    axes[0].set_ylabel(label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _curves(panels: Mapping[str, Mapping[str, tuple[Any, Any]]]) -> Figure:
    """Draw ROC curves of benign and attacked scores, a panel a model."""
    figure = Figure(figsize=(3.6 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (model, curves) in zip(axes, panels.items(), strict=True):
        for i, (name, pair) in enumerate(curves.items()):
            curve = roc(*(torch.tensor(scores.to_numpy()) for scores in pair))
            axis.plot(
                curve.fpr,
                curve.tpr,
                color=_COLOURS[i % len(_COLOURS)],
                linestyle=_LINES[i % len(_LINES)],
                label=f"{name}, area {curve.auc:.3f}",
            )
        axis.set(xlabel="benign images flagged", ylabel="attacked images flagged")
        axis.set_title(model, fontsize=10)
        axis.legend(fontsize=8, loc="lower right")
    return figure


_KNOWS = "ADV2 knows the interpreter of its column."
_AIM = "The line named target shows, on the clean image, the map that ADV2 aims at."
_MAPS = "Maps of clean and attacked images"
_RED = f"{_KNOWS} Red is important. The picture in ADV2's line is for the first interpreter."
_L1, _IOU = ({a: (a, title) for a in ("PGD", "ADV2")} for title in ("L1", "IoU"))
_FLOW_L1, _FLOW_IOU = ({a: (a, title) for a in ("stAdv", "StADV2")} for title in ("L1", "IoU"))
_TARGET_L1, _TARGET_IOU = (
    {"to benign": ("class", title), "to target": ("class", f"{title} to target")}
    for title in ("L1", "IoU")
)


def _basic(gallery: Gallery) -> dict[str, Row]:
    return gallery.after("benign", "PGD", "ADV2")


PHOTOGRAPHS = (
    Grid(4, _MAPS, _RED, _basic),
    Bars(5, "L1 to the benign map", _L1),
    Bars(6, "IoU with the benign map", _IOU),
)
SKIN = (
    Grid(7, _MAPS, _RED, _basic),
    Bars(8, "L1 to the benign map", _L1),
    Bars(8, "IoU with the benign map", _IOU),
)
SPECS = (
    detection,
    Grid(9, "Maps of clean images and of such whose pixels were moved",
         "StADV2, ADV2 on stAdv, knows the interpreter of its column.",
         lambda gallery: gallery.after("benign", "stAdv", "StADV2")),
    Bars(10, "stAdv and ADV2 on it: L1 to benign maps", _FLOW_L1),
    Bars(10, "stAdv and ADV2 on it: IoU with benign maps", _FLOW_IOU),
    Grid(11, "ADV2 towards patches", _AIM, lambda gallery: gallery.towards("patch")),
    Grid(12, "ADV2 towards maps of other classes", _AIM, lambda gallery: gallery.towards("class")),
    Bars(13, "ADV2 towards maps of other classes: L1", _TARGET_L1),
    Bars(13, "ADV2 towards maps of other classes: IoU", _TARGET_IOU),
    Grid(14, "Maps of images made against another interpreter",
         "A line for each interpreter that ADV2 knew, a column for each that explains.",
         Gallery.transferred, images=1),
    Grid(15, f"Maps of RTS and {DISTILLED} under noise",
         "Noise by its kind, and the share of images on which it makes the classifier err. Maps "
         "explain the class that the classifier predicts.",
         lambda gallery: gallery.after("benign", *gallery.results.named("noise:"), only=_RTS),
         images=2),
    Bars(15, "L1 of clean to noisy maps, where noise makes the classifier err",
         {"": ("noise:", "L1")}, _RTS),
    Grid(16, f"Maps of RTS and {DISTILLED} under ADV2", _KNOWS,
         lambda gallery: gallery.after("benign", "PGD", "ADV2", only=_RTS)),
    Bars(16, "L1 to the benign map", _L1, _RTS),
)  # fmt: skip

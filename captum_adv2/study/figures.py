# SPDX-License-Identifier: MIT
"""The paper's figures, from the rows and pictures of a study.

Numbers come as bars with their 95 % intervals, colours that colour-blind people tell apart, and
hatches for those who print. Nothing of matplotlib's global state is touched; see `visualize`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from captum_adv2.defenses.detection import roc
from captum_adv2.evaluation import visualize
from captum_adv2.study.estimates import DISTILLED, Results, Values, knows
from captum_adv2.study.records import Frame, Pictures
from captum_adv2.study.settings import Settings
from captum_adv2.study.tables import on_skin

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DPI", "Drawing", "build"]

DPI = 80
"""Dots per inch that the sizes are made for."""

_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#F0E442")
_HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
_LINES = ("-", "--", "-.", ":")
_RTS = ("RTS", DISTILLED)

_Row = Mapping[str, tuple[Tensor, Tensor]]  # by interpreter, images and maps


class Drawing(NamedTuple):
    """A figure and what to say of it.

    Attributes:
        number: The paper's, such as ``"Figure 5"``.
        title: What it shows, in few words.
        caption: How to read it.
        figure: To be saved with `DPI`.
    """

    number: str
    title: str
    caption: str
    figure: Figure


def build(
    maps: Frame, scores: Frame, pictures: Sequence[Pictures], settings: Settings
) -> dict[str, Drawing]:
    """Return the figures that a study fills, by a name for their files, in the paper's order.

    Args:
        maps: Map rows.
        scores: Score rows.
        pictures: Pictures after every attack.
        settings: The study's.
    """
    results = Results(maps, scores)
    skin = on_skin(settings)
    shown = {
        model: _Gallery(model, pictures)
        for model in dict.fromkeys(picture.model for picture in pictures if len(picture.images))
    }
    found: dict[str, Drawing] = {}

    def grids(
        number: int,
        title: str,
        caption: str,
        rows: Callable[[_Gallery], Mapping[str, _Row]],
        images: int = 3,
    ) -> None:
        """Draw a grid a model, of as many images at most."""
        for stem, gallery in zip(
            _stems(f"figure-{number:02d}", shown), shown.values(), strict=True
        ):
            block = {name: row for name, row in rows(gallery).items() if row}
            if len(block) > 1:
                text = f"{title}, {gallery.model}"
                found[stem] = Drawing(f"Figure {number}", text, caption, _stacked(block, images))

    def bars(number: int, kind: str, title: str, series: _Series, names: Collection[str]) -> None:
        """Draw bars, a panel a model."""
        figure = _bars(results, series, names)
        if figure is not None:
            caption = "Means over successful attacks, with 95 % bootstrap intervals."
            stem = f"figure-{number:02d}-{kind}"
            found[stem] = Drawing(f"Figure {number}", title, caption, figure)

    names, basic = results.interpreters, ("PGD", "ADV2")
    grids(
        7 if skin else 4,
        "Maps of clean and attacked images",
        "ADV2 knows the interpreter of its column. Red is important. The picture at the left of "
        "ADV2's line is the one made against the first interpreter.",
        lambda gallery: gallery.after("benign", *basic),
    )
    bars(8 if skin else 5, "l1", "L1 to the benign map", {a: (a, "L1") for a in basic}, names)
    bars(8 if skin else 6, "iou", "IoU with the benign map", {a: (a, "IoU") for a in basic}, names)
    found |= _detection(results)
    flows = ("stAdv", "StADV2")
    grids(
        9,
        "Maps of clean images and of such whose pixels were moved",
        "StADV2, ADV2 on stAdv, knows the interpreter of its column.",
        lambda gallery: gallery.after("benign", *flows),
    )
    for title in ("L1", "IoU"):
        series = {attack: (attack, title) for attack in flows}
        bars(10, title.lower(), f"stAdv and ADV2 on it: {title} to benign maps", series, names)
    for number, attack, what in ((11, "patch", "patches"), (12, "class", "maps of other classes")):
        grids(
            number,
            f"ADV2 towards {what}",
            "The line named target shows, on the clean image, the map that ADV2 aims at.",
            partial(_Gallery.towards, attack=attack),
        )
    for title in ("L1", "IoU"):
        series = {"to benign": ("class", title), "to target": ("class", f"{title} to target")}
        bars(13, title.lower(), f"ADV2 towards maps of other classes: {title}", series, names)
    grids(
        14,
        "What each interpreter shows of images made against another",
        "A line for each interpreter that ADV2 knew, a column for each that explains.",
        lambda gallery: gallery.transferred(names),
        images=1,
    )
    noises = results.parameters("noise")
    grids(
        15,
        f"Maps of RTS and {DISTILLED} under noise",
        "Noise by its kind, and the share of images on which it makes the classifier err. Maps "
        "explain the class that the classifier says.",
        lambda gallery: gallery.after("benign", *noises, only=_RTS),
        images=2,
    )
    series = {attack.partition(":")[2]: (attack, "L1") for attack in noises}
    bars(15, "l1", "L1 of clean to noisy maps, where noise makes the classifier err", series, _RTS)
    grids(
        16,
        f"Maps of RTS and {DISTILLED} under ADV2",
        "ADV2 knows the interpreter of its column.",
        lambda gallery: gallery.after("benign", *basic, only=_RTS),
    )
    if DISTILLED in results.everyone:
        bars(16, "l1", "L1 to the benign map", {a: (a, "L1") for a in basic}, _RTS)
    return found


class _Gallery:
    """A model's pictures, as rows of a grid."""

    def __init__(self, model: str, pictures: Sequence[Pictures]) -> None:
        own = [p for p in pictures if p.model == model and len(p.images)]
        self.model = model
        self._found = {(picture.attack, picture.aimed): picture for picture in own}
        self._names = list(dict.fromkeys(name for picture in own for name in picture.maps))

    def row(self, attack: str, names: Collection[str]) -> _Row:
        """Return what interpreters show of an attack that knows them, if any of them."""
        found = {}
        for name in names:
            picture = self._found.get((attack, name if knows(attack) else ""))
            if picture is not None and name in picture.maps:
                found[name] = (picture.images, picture.maps[name])
        return found

    def after(self, *attacks: str, only: Collection[str] = ()) -> dict[str, _Row]:
        """Return a row an attack; but the benign one alone is none, nor is one without ``only``."""
        names = only or [name for name in self._names if name != DISTILLED]
        rows = {attack: self.row(attack, names) for attack in attacks}
        return {} if only and any(len(row) < len(only) for row in rows.values()) else _common(rows)

    def towards(self, attack: str) -> dict[str, _Row]:
        """Return rows of clean images, of what an attack aims at, and of what it reaches."""
        benign, reached = self.row("benign", self._names), self.row(attack, self._names)
        target = {}
        for name in benign:
            picture = self._found.get((attack, name))
            if picture is not None and picture.aim is not None:
                target[name] = (benign[name][0], picture.aim)
        return _common({"benign": benign, "target": target, "ADV2": reached})

    def transferred(self, names: Collection[str]) -> dict[str, _Row]:
        """Return a row for each interpreter that ADV2 knew, and PGD's."""
        if len(names) < 2:
            return {}
        rows = {"benign": self.row("benign", names)}
        for name in names:
            picture = self._found.get(("ADV2", name))
            if picture is not None:
                shown = {other: (picture.images, m) for other, m in picture.maps.items()}
                rows[f"ADV2 on {name}"] = {k: v for k, v in shown.items() if k in names}
        return _common({**rows, "PGD": self.row("PGD", names)}) if len(rows) > 1 else {}


def _common(rows: Mapping[str, _Row]) -> dict[str, _Row]:
    """Return the rows that have anything, with the interpreters that all of these have."""
    full = {name: row for name, row in rows.items() if row}
    shared = [
        name for name in next(iter(full.values()), ()) if all(name in r for r in full.values())
    ]
    return {name: {key: row[key] for key in shared} for name, row in full.items()} if shared else {}


def _stacked(rows: Mapping[str, _Row], most: int) -> Figure:
    """Draw the rows image by image, one below the other: narrow enough for any screen."""
    count = min(most, *(len(images) for row in rows.values() for images, _ in row.values()))
    single = {
        (f"{name}\nimage {i + 1}" if count > 1 else name): {
            key: (images[i : i + 1], maps[i : i + 1]) for key, (images, maps) in row.items()
        }
        for i in range(count)
        for name, row in rows.items()
    }
    return visualize.grid(single)


_Series = Mapping[str, tuple[str, str]]  # by a name in the legend, attack and measure


def _bars(results: Results, series: _Series, names: Collection[str]) -> Figure | None:
    """Draw a group of bars an interpreter, a bar a series; a panel a model."""
    from matplotlib.figure import Figure

    panels = {}
    for model in results.models:
        found = {
            key: [results.estimate(title, model, attack, name) for name in names]
            for key, (attack, title) in series.items()
        }
        if all(any(entry.size for entry in row) for row in found.values()) and found:
            panels[model] = found
    if not panels:
        return None
    each = max(2.5, 0.5 + 0.28 * len(names) * (1 + len(series)))
    figure = Figure(figsize=(min(each * len(panels), 11) + 0.5, 3), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    width = 0.8 / len(series)
    for axis, (model, found) in zip(axes, panels.items(), strict=True):
        for i, (key, row) in enumerate(found.items()):
            places = np.arange(len(names)) + (i - (len(series) - 1) / 2) * width
            ends = [[e.mean - e.low for e in row], [e.high - e.mean for e in row]]
            axis.bar(
                places,
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
    axes[0].set_ylabel(next(iter(series.values()))[1].split()[0])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _detection(results: Results) -> dict[str, Drawing]:
    """Draw how well the joint score tells attacked images from clean ones."""
    from matplotlib.figure import Figure

    panels: dict[str, dict[str, tuple[Values, Values]]] = {}
    for model in results.models:
        benign = results.scores(model, "benign", "")
        sources = {
            "PGD": ("PGD", ""),
            **{f"ADV2 on {n}": ("ADV2", n) for n in results.interpreters},
        }
        found = {name: results.scores(model, *source) for name, source in sources.items()}
        curves = {name: (benign, scores) for name, scores in found.items() if benign and scores}
        if curves:
            panels[model] = curves
    if not panels:
        return {}
    figure = Figure(figsize=(3.6 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (model, curves) in zip(axes, panels.items(), strict=True):
        for i, (name, pair) in enumerate(curves.items()):
            clean, attacked = (torch.tensor([*v.values()], dtype=torch.float64) for v in pair)
            curve = roc(clean, attacked)
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
    caption = (
        "Share of clean and of successfully attacked images whose joint score exceeds a "
        "threshold, over all thresholds. A diagonal is a guess, the upper left corner perfect."
    )
    title = "Feature squeezing tells attacked images from clean ones"
    return {"detector-roc": Drawing("Table 4", title, caption, figure)}


def _stems(stem: str, models: Collection[str]) -> list[str]:
    """Return a name for each model's file; names of models may hold anything."""
    if len(models) == 1:
        return [stem]
    plain = [re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") for name in models]
    alike = len(set(plain)) < len(plain)
    return [f"{stem}-{name}" + (f"-{i}" if alike else "") for i, name in enumerate(plain, 1)]

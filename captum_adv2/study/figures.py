# SPDX-License-Identifier: MIT
"""The paper's figures, from the rows and pictures of a study.

Figures are not registered with pyplot.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from matplotlib.figure import Figure
from torch import Tensor

from captum_adv2.evaluation import visualize
from captum_adv2.study import plots
from captum_adv2.study.cases import DISTILLED
from captum_adv2.study.estimates import Estimate
from captum_adv2.study.frame import Results, knows
from captum_adv2.study.paper import PAPER, counterpart
from captum_adv2.study.results import Pictures
from captum_adv2.study.settings import Settings
from captum_adv2.study.tables import brief, on_skin

DPI = 160
"""Dots per inch of a figure's file: twice what a page shows, for fine screens."""

_RTS = ("RTS", DISTILLED)
_LESIONS = 8  # the figure of skin lesions
_EMPTY = 0.05  # largest value of a map that shows nothing

Row: TypeAlias = Mapping[str, "Shown"]  # by interpreter


class Shown(NamedTuple):
    """Images, an interpreter's maps of them, and texts that stand below each."""

    images: Tensor
    maps: Tensor
    titles: Sequence[str] = ()  # of images
    notes: Sequence[str] = ()  # of maps


class Drawing(NamedTuple):
    """A figure, of one part or of several beside each other, and its text."""

    stem: str  # name for its files
    number: str  # the paper's, such as "Figure 5"
    title: str
    caption: str
    figures: Sequence[Figure]  # to be saved with `DPI`
    texts: Sequence[str]  # what each of them shows, for those who cannot see it
    model: str = ""  # whose pictures they are

    def files(self) -> list[str]:
        """Return the names of the files."""
        if len(self.figures) == 1:
            return [f"{self.stem}.png"]
        return [f"{self.stem}-{number}.png" for number in range(1, len(self.figures) + 1)]


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
                notes = [f"L1 {value:.3f}" for value in picture.l1.get(name, ())]
                if attack == "benign":
                    peaks = picture.maps[name].flatten(1).amax(dim=1)
                    notes = ["" if peak > _EMPTY else "empty map" for peak in peaks]
                found[name] = Shown(picture.images, picture.maps[name], picture.titles, notes)
        return found

    def after(self, *attacks: str, only: Collection[str] = ()) -> dict[str, Row]:
        """Return a row an attack; none without all interpreters of ``only``."""
        names = only or [name for name in self._names if name != DISTILLED]
        rows = {attack: self.row(attack, names) for attack in attacks}
        return {} if any(len(row) < len(only) for row in rows.values()) else rows

    def towards(self, attack: str) -> dict[str, Row]:
        """Return rows of clean images, of the maps that an attack aims at, and of its maps."""
        benign, reached = self.row("benign", self._names), self.row(attack, self._names)
        aims = {name: self._found[attack, name].aim for name in reached if name in benign}
        target = {n: Shown(benign[n].images, aim) for n, aim in aims.items() if aim is not None}
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
    flow: bool = False  # whether attacks move pixels

    def __call__(self, results: Results, galleries: Sequence[Gallery]) -> Iterator[Drawing]:
        """Yield a figure for each model with at least two rows, a part of it for each image."""
        for gallery in galleries:
            block = _common(self.rows(gallery))
            if len(block) > 1:
                counts = (len(each.images) for row in block.values() for each in row.values())
                parts = [_cut(block, number) for number in range(min(self.images, *counts))]
                yield Drawing(
                    f"figure-{self.number:02d}-{gallery.model}",
                    f"Figure {self.number}",
                    f"{self.title}, {gallery.model}",
                    self.caption,
                    [_drawn(part) for part in parts],
                    [_told(part) for part in parts],
                    gallery.model,
                )


@dataclass(frozen=True)
class Bars:
    """Means and intervals, a panel a model."""

    number: int  # the paper's
    title: str
    series: Mapping[str, tuple[str, str]]  # by name, attack (see `Results.named`) and measure
    names: Sequence[str] = ()  # interpreters; default: all but `DISTILLED`
    flow: bool = False  # whether attacks move pixels

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
            # Noise of some level may make the classifier err on no image.
            found = {key: row for key, row in found.items() if key in self.series or _filled(row)}
            if found and all(map(_filled, found.values())):
                panels[model] = found
        if panels and {*names} <= {*results.every}:
            stem = f"figure-{self.number:02d}-{measure.lower()}"
            paper = {model: counterpart(model, skin=self.number == _LESIONS) for model in panels}
            printed = {
                model: {
                    key: [PAPER.estimate(title, paper[model], a, n).mean for n in names]
                    for key, (title, a) in series.items()
                }
                for model in panels
            }
            caption = (
                "Means over successful attacks, with 95 % bootstrap intervals. Diamonds are the "
                "paper's numbers, where it prints them."
            )
            figure = plots.barred(panels, names, measure, printed)
            text = "; ".join(
                f"{model}, {key}: {', '.join(f'{n} {e}' for n, e in zip(names, row, strict=True))}"
                for model, found in panels.items()
                for key, row in found.items()
            )
            number = f"Figure {self.number}"
            yield Drawing(stem, number, self.title, caption, [figure], [f"{self.title}. {text}"])


def trust(results: Results, galleries: Sequence[Gallery]) -> Iterator[Drawing]:
    """Yield the curves of trust, if they were found."""
    panels = {
        model: {name: found for name in results.every if (found := results.trust(model, name))}
        for model in results.models
    }
    panels = {model: curves for model, curves in panels.items() if curves}
    if panels:
        texts = [
            f"{model}, {name}: area above {found.area:.3f}"
            for model, curves in panels.items()
            for name, found in curves.items()
        ]
        yield Drawing(
            "curve",
            "Curve",
            "How far explanations can be trusted",
            "Share of images whose class and map ADV2 fools together with changes of at most eps: "
            "the lower the curve, and the larger the area above it, the harder. Shaded: 95 % "
            "intervals of Wilson's.",
            [plots.trusted(panels)],
            ["; ".join(texts)],
        )


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
            [plots.curves(panels)],
            ["ROC curves of the joint score; the areas under them stand in the figure's legend"],
        )


def build(results: Results, pictures: Sequence[Pictures], settings: Settings) -> list[Drawing]:
    """Return the figures that a study fills, in the paper's order."""
    models = dict.fromkeys(picture.model for picture in pictures if len(picture.images))
    galleries = [Gallery(model, pictures, results) for model in models]
    specs = (*(SKIN if on_skin(settings) else PHOTOGRAPHS), *SPECS)
    found = []
    for spec in specs:
        moved = isinstance(spec, Grid | Bars) and spec.flow
        strength = brief(settings, "stadv" if moved else "pgd")
        if spec is trust:
            strength = f"{settings.steps} gradient evaluations at each eps."
        for drawing in spec(results, galleries):
            found.append(drawing._replace(caption=f"{drawing.caption} {strength}"))
    return found


def _filled(row: Sequence[Estimate]) -> bool:
    return any(entry.size for entry in row)


def _common(rows: Mapping[str, Row]) -> dict[str, Row]:
    """Return the rows that have anything, with the interpreters that all of these have."""
    full = {name: row for name, row in rows.items() if row}
    shared = [n for n in next(iter(full.values()), ()) if all(n in row for row in full.values())]
    return {name: {n: row[n] for n in shared} for name, row in full.items()} if shared else {}


def _cut(rows: Mapping[str, Row], number: int) -> dict[str, Row]:
    """Return one image of the rows."""
    one = slice(number, number + 1)
    return {
        title: {
            name: Shown(each.images[one], each.maps[one], each.titles[one], each.notes[one])
            for name, each in row.items()
        }
        for title, row in rows.items()
    }


def _drawn(rows: Mapping[str, Row]) -> Figure:
    """Draw an image: a row an attack, a column an interpreter."""
    notes = {title: {n: each.notes for n, each in row.items()} for title, row in rows.items()}
    for title, row in rows.items():
        notes[title]["image"] = next(iter(row.values())).titles
    pairs = {title: {n: each[:2] for n, each in row.items()} for title, row in rows.items()}
    return visualize.grid(pairs, notes, bar=True)


def _told(rows: Mapping[str, Row]) -> str:
    """Return what stands below the pictures, as a text."""
    lines = []
    for title, row in rows.items():
        classes = " ".join(next(iter(row.values())).titles)
        notes = ", ".join(f"{name} {' '.join(each.notes)}".strip() for name, each in row.items())
        lines.append(f"{title} ({classes}): {notes}" if classes else f"{title}: {notes}")
    return "; ".join(lines)


_KNOWS = "ADV2 knows the interpreter of its column."
_AIM = "The line named target shows, on the clean image, the map that ADV2 aims at."
_MAPS = "Maps of clean and attacked images"
_RED = (
    f"{_KNOWS} Below an image stand the class that is explained and its probability, below a map "
    "its L1 to the benign map. The picture in ADV2's line is for the first interpreter."
)
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
    Bars(_LESIONS, "L1 to the benign map", _L1),
    Bars(_LESIONS, "IoU with the benign map", _IOU),
)
SPECS = (
    trust,
    detection,
    Grid(9, "Maps of clean images and of such whose pixels were moved",
         "StADV2, ADV2 on stAdv, knows the interpreter of its column.",
         lambda gallery: gallery.after("benign", "stAdv", "StADV2"), flow=True),
    Bars(10, "stAdv and ADV2 on it: L1 to benign maps", _FLOW_L1, flow=True),
    Bars(10, "stAdv and ADV2 on it: IoU with benign maps", _FLOW_IOU, flow=True),
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

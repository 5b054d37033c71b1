# SPDX-License-Identifier: MIT
"""The paper's tables, from the rows of a study; a table whose rows are absent is left out.

Tables have a line for each classifier, interpreter and attack, where the paper has columns for
some of them: they may be many, and screens are narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple, TypeAlias

import pandas as pd

from captum_adv2.study.cases import DISTILLED, known
from captum_adv2.study.estimates import JOINT, Estimate
from captum_adv2.study.frame import Results, by_image, difference
from captum_adv2.study.paper import beside, counterpart
from captum_adv2.study.settings import Settings

Rows: TypeAlias = Iterator[dict[str, object]]  # by the titles of the columns


class Table(NamedTuple):
    """A table of texts."""

    number: str  # the paper's, such as "Table 3"; of a figure where the paper draws the numbers
    title: str
    cells: pd.DataFrame
    note: str  # how the numbers were measured
    labels: int  # number of columns at the left that label a row

    def markdown(self) -> str:
        """Return it as a document in Markdown."""
        heading = f"# {self.number}. {self.title}"
        return "\n".join([heading, "", *markdown(self.cells), "", self.note, ""])


def markdown(cells: pd.DataFrame) -> list[str]:
    """Return the lines of a table of texts in Markdown."""
    header = [*cells.columns]
    lines = [header, ["---"] * len(header), *cells.to_numpy().tolist()]
    return ["| " + " | ".join(map(_cell, line)) + " |" for line in lines]


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


class Spec(NamedTuple):
    """A table to build."""

    number: str
    title: str
    needs: str  # what has to be measured
    rows: Callable[[Results, str, str], Rows]  # of a classifier, and its counterpart in the paper
    labels: int = 3
    rule: str = ""  # how it is measured, besides the protocol
    framework: str = "pgd"  # of the attacks; see `Settings`


def build(results: Results, settings: Settings) -> tuple[list[Table], list[str]]:
    """Return the tables that a study's rows fill, and why the others are left out."""
    tables, missing = [], []
    for spec in SPECS:
        if spec.number == ("Table 13" if on_skin(settings) else "Table 14"):
            continue
        rows = [
            row
            for model in results.models
            for row in spec.rows(results, model, counterpart(model, on_skin(settings)))
        ]
        if rows:
            cells = pd.DataFrame(rows).fillna("–").map(str)
            if "paper" in cells and cells.paper.eq("–").all():
                cells = cells.drop(columns="paper")
            note = spec.rule + protocol(settings, spec.framework)
            tables.append(Table(spec.number, spec.title, cells, note, spec.labels))
        else:
            missing.append(f"{spec.number}: needs {spec.needs}")
    return tables, missing


def on_skin(settings: Settings) -> bool:
    """Return whether a study is of skin lesions, which have tables and figures of their own."""
    return settings.images.startswith("isic:")


def brief(settings: Settings, *frameworks: str) -> str:
    """Return the strength of attacks and the number of images, for a caption."""
    eps = f"ε = {settings.eps * 255:g}/255"
    strength = {
        "pgd": f"{eps}, {settings.steps} gradient evaluations",
        "query": f"{eps}, at most {settings.queries} queries of an image",
        "stadv": f"at most {settings.bound:g} pixels, {settings.flow_steps} gradient evaluations",
    }
    count = f"up to {settings.count} images a classifier."
    return "; ".join([*(strength[each] for each in frameworks), count])


def protocol(settings: Settings, framework: str) -> str:
    """Return how attacks and maps were made and measured."""
    seeds = len(settings.seeds)
    pixels = f"change pixels by at most eps = {settings.eps * 255:g}/255"
    attack = {
        "pgd": f"{pixels}, in {settings.steps} gradient evaluations",
        "curve": f"take {settings.steps} gradient evaluations at each eps",
        "query": f"{pixels}, in at most {settings.queries} queries of an image and no gradients",
        "stadv": f"move pixels by at most {settings.bound:g} pixels along each axis, in "
        f"{settings.flow_steps} gradient evaluations",
    }[framework]
    late = settings.keep if framework in ("pgd", "stadv") else 0
    among = f", up to {late} late ones among them," if late else ""
    return (
        f"Attacks {attack}; of ADV2's iterates{among} the best one "
        "counts, judged on the interpreter's own map after rounding to 8 bits. All images are "
        "rounded to 8 bits before they are measured. A benign map explains the image's own class, "
        "an adversarial map the target class. IoU and boxes are of map pixels above "
        f"{settings.threshold:g}. Up to {settings.count} images a classifier"
        f"{f', {seeds} seeds, of which each image has its mean' if seeds > 1 else ''}. Success "
        "rates (ASR) and the confidence in the target class (MC) are over all images, distances "
        "of maps over successful attacks; "
        "[a, b] is a 95 % interval: Wilson's of a rate, a bootstrap of a mean; – is no image. The "
        "column of the paper has its numbers, in the order of the columns before it."
    )


@dataclass(frozen=True)
class Long:
    """Rows for each interpreter and attack: some measures, and the number of successes."""

    attacks: tuple[str, ...]  # see `Results.named`
    titles: tuple[str, ...]  # of `MEASURES`
    names: Callable[[Results], list[str]] = lambda results: results.interpreters

    def __call__(self, results: Results, model: str, paper: str) -> Rows:
        """Yield the rows of a classifier."""
        attacks = [attack for name in self.attacks for attack in results.named(name)]
        for name, attack in product(self.names(results), attacks):
            place = model, attack, name
            count, won = len(results.rows(*place)), len(results.values("L1", *place))
            if count:
                yield {
                    **{"model": model, "interpreter": name, "attack": attack},
                    **{title: results.estimate(title, *place) for title in self.titles},
                    "paper": _printed(self.titles, paper, attack, name),
                    "successes": f"{won} of {count}",
                }


def _adaptive(results: Results) -> list[str]:
    """Return the interpreters of adaptive attacks."""
    found = {name for attack in results.named("adaptive:") for name in results.having(attack)}
    return [name for name in results.interpreters if name in found]


def _printed(titles: Iterable[str], paper: str, *place: str) -> str:
    """Return the paper's numbers, or one dash for none."""
    found = [beside(title, paper, *place) for title in titles]
    return ", ".join(found) if {*found} - {"–"} else "–"


def _localisation(results: Results, model: str, paper: str) -> Rows:
    for name in results.every:
        error = results.estimate("localisation error", model, "benign", name)
        if error.size:
            cut, tuned, held = results.localisation(model, name)
            yield {
                **{"model": model, "interpreter": name, "wrong boxes": error},
                **{"tuned threshold": cut or "–", "wrong boxes, tuned": tuned},
                "paper": beside("localisation error", paper, "benign", name),
                "images": f"{error.size}, tuned on {held} others",
            }


def _detection(results: Results, model: str, paper: str) -> Rows:
    """Yield rates of detection by each squeezer and by all together, a row an attack."""
    basic = [("benign", ""), ("PGD", ""), *(("ADV2", name) for name in results.having("ADV2"))]
    for squeezer, threshold in results.thresholds.get(model, {}).items():
        adaptive = [
            (attack, name)
            for attack in results.named("adaptive:")
            if known(attack) == squeezer
            for name in results.having(attack)
        ]
        for attack, aimed in [*basic, *adaptive] if len(basic) > 2 or results.having("PGD") else ():
            found, joint = (results.detection(model, attack, aimed, j) for j in (squeezer, JOINT))
            yield {
                **{"model": model, "squeezer": squeezer},
                "attack": f"{attack} on {aimed}" if aimed else attack,
                **{"detected by it": found, "by all jointly": joint},
                "paper": beside(f"detected by {squeezer}", paper, attack, aimed, aimed),
                "threshold": f"{threshold:.3f}",
            }


def _transfer(results: Results, model: str, paper: str) -> Rows:
    names = results.having("ADV2")
    sources = {**{name: ("ADV2", name) for name in names}, "PGD": ("PGD", "")}
    for source, (attack, aimed) in sources.items() if len(names) > 1 else ():
        found = {f"on {n}": results.estimate("L1", model, attack, n, aimed) for n in names}
        printed = [beside("L1", paper, attack, n, aimed) for n in names]
        if any(entry.size for entry in found.values()):
            yield {
                "model": model,
                "source": source,
                **found,
                "paper": ", ".join(printed) if {*printed} - {"–"} else "–",
            }


def _curve(results: Results, model: str, paper: str) -> Rows:
    """Yield the area above the curve of trust, and points of it."""
    for name in results.every:
        found = results.trust(model, name)
        if found is not None:
            shares, ends = found.shares(), found.intervals()
            near: dict[str, object] = {
                f"fooled up to {eps}/255": Estimate(
                    shares[place], *ends[place], len(found.least), percent=True
                )
                for eps, place in (("1", 4), ("2", 6), ("4", 8), ("8", 10), ("16", 12))
            }
            area = Estimate.of(found.heights().numpy())
            pgd = results.rows(model, "PGD", name)
            alike = by_image(((pgd.success > 0.5) & (pgd.iou > 0.5)).astype(float))
            near["by PGD, at its eps"] = Estimate.of(alike, percent=True)
            yield {"model": model, "interpreter": name, "area above": area, **near}


def _distilled(results: Results, model: str, paper: str) -> Rows:
    """Yield how far maps of RTS and of the interpreter trained against ADV2 move."""
    drift = results.estimate("drift", model, "benign", DISTILLED)
    for attack in ("PGD", "ADV2", *results.named("noise:")):
        rts, other = (results.values("L1", model, attack, name) for name in ("RTS", DISTILLED))
        before, after = (Estimate.of(by_image(values)) for values in (rts, other))
        if before.size and after.size:
            yield {
                "model": model,
                "attack": attack,
                "L1 on RTS": before,
                f"L1 on {DISTILLED}": after,
                "difference": Estimate.of(by_image(difference(other, rts))),
                f"IoU on {DISTILLED}": results.estimate("IoU", model, attack, DISTILLED),
                "images": f"{before.size}, {after.size}",
            }
    if drift.size:
        row: dict[str, object] = {"model": model, "attack": "none", "images": str(drift.size)}
        yield row | {f"L1 on {DISTILLED}": drift}


_BASIC = ("PGD", "ADV2")
_LOCALISATION = (
    "A map of a clean image, for its own class, is resized to the image; the box around the "
    "largest component of pixels above the threshold is wrong if its intersection over union with "
    "every true box is below one half. The tuned threshold, a value, a multiple of the map's mean "
    "or a share of its energy, has the fewest wrong boxes on other images (Fong & Vedaldi, 2017). "
    "Images without a known box are left out. "
)
_DETECTION = (
    "Share of images whose score exceeds the threshold, the lowest that flags at most 5 % of the "
    "held-out benign images. The joint score is the largest of the squeezers', and has a threshold "
    "of its own. An adaptive attack knows the squeezer of its row, by its gradient or, for bit "
    "depths, by Algorithm 2. Rates are over successful attacks. "
)
_NOISE = (
    "ADV2 knows the interpreter of its column; noise is named by its kind and the share of images "
    "on which it makes the classifier err. Maps after noise explain the class that the classifier "
    "then predicts, and only its errors count. The level of the noise is set on up to 200 images "
    "that the classifier gets right. The difference is over images on which both attacks succeed. "
    "The row of no attack is the L1 of the two interpreters' maps of clean images. "
)
_TRUST = (
    "For each image, the least of 13 values of eps from 0.25/255 to 16/255 at which ADV2, rounded "
    "to 8 bits, reaches its class and a map with more than half of its salient pixels in common "
    "with the benign one, found by bisection. The area above the curve, over the logarithm of eps, "
    "is 0 where all images are fooled by the least eps, and 1 where none is by the largest; of "
    "8-bit images, no change below 0.5/255 is left after rounding. Of several seeds the first "
    "counts. The last column is the share of PGD's images, at the study's eps, that pass "
    "the same test: their maps look alike without an attack on them. "
)

SPECS = (
    Spec("Table 2", "Localisation by maps", "images whose objects have known boxes",
         _localisation, 2, _LOCALISATION),
    Spec("Table 3", "Success of PGD and ADV2", "PGD or ADV2 towards benign maps",
         Long(_BASIC, ("ASR", "MC"))),
    Spec("Table 4", "Detection by squeezing",
         "attacks on pixels, squeezers, and held-out images that set their thresholds",
         _detection, 3, _DETECTION),
    Spec("Table 5", "Maps and success of PGD, basic and adaptive ADV2", "adaptive attacks",
         Long((*_BASIC, "adaptive:"), ("L1", "IoU", "ASR", "MC"), _adaptive)),
    Spec("Table 6", "Success of ADV2 towards patches", "ADV2 towards patches",
         Long(("patch",), ("ASR", "MC"))),
    Spec("Table 7", "Distance of ADV2's maps to the patch (target) and to the benign map (L1)",
         "ADV2 towards patches", Long(("patch",), ("L1 to target", "L1"))),
    Spec("Table 8", "ADV2 towards the map of an image of another class",
         "ADV2 towards maps of other classes",
         Long(("class",), ("ASR", "MC", "L1 to target", "IoU to target"))),
    Spec("Table 9", "L1 of benign to adversarial maps, made against the row, tried on the column",
         "ADV2 towards benign maps, and at least two interpreters",
         _transfer, 2, "The target class is the same in every cell. "),
    Spec("Table 10", "PGD and ADV2 on Grad-CAM", "the interpreter GradCAM",
         Long(_BASIC, ("ASR", "MC", "L1", "L2"), lambda results: ["GradCAM"])),
    Spec("Table 13", "Distances of benign and adversarial maps",
         "PGD or ADV2 towards benign maps", Long(_BASIC, ("L1", "L2"))),
    Spec("Table 14", "Distances of benign and adversarial maps of skin lesions",
         "PGD or ADV2 towards benign maps", Long(_BASIC, ("L1", "L2"))),
    Spec("Curve", "How far explanations can be trusted", "--curve", _curve, 2, _TRUST,
         "curve"),
    Spec("Figure 10", "stAdv, and ADV2 on it", "the framework stadv",
         Long(("stAdv", "StADV2"), ("ASR", "MC", "L1", "IoU")), framework="stadv"),
    Spec("Queries", "Square Attack, and ADV2, without gradients", "the framework query",
         Long(("Square", "QueryADV2"), ("ASR", "MC", "L1", "IoU")), framework="query"),
    Spec("Figures 15 and 16", f"How far maps move on RTS and on {DISTILLED}",
         f"the interpreters RTS and {DISTILLED}", _distilled, 2, _NOISE),
)  # fmt: skip
"""The tables in the paper's order."""

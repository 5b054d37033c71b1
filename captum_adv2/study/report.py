# SPDX-License-Identifier: MIT
"""A study as files to look at: records, tables, figures, and a page that shows them.

The page is one file of HTML beside its figures. It needs no server and loads nothing from
elsewhere; it reads on a phone, in the dark, on paper, and aloud. Its few lines of script sort
tables; without them all is there.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, Template
from torchvision.transforms.functional import to_pil_image

from captum_adv2 import storage
from captum_adv2.study import figures, tables
from captum_adv2.study.claims import Verdict, judge
from captum_adv2.study.figures import DPI
from captum_adv2.study.frame import Results
from captum_adv2.study.results import Found, Pictures
from captum_adv2.study.settings import Settings
from captum_adv2.study.verdicts import criteria, glance, paper_rows, shares, summary, word

_PACKAGES = ("captum_adv2", "torch", "torchvision", "captum", "torchattacks", "kornia", "numpy")

_ORDER = (
    *("Curve", "Table 2", "Table 3", "Figure 4", "Figure 5", "Figure 6", "Table 13", "Table 10"),
    *("Table 4", "Table 5", "Figure 7", "Figure 8", "Table 14", "Figure 9", "Figure 10", "Table 6"),
    *("Figure 11", "Table 7", "Table 8", "Figure 12", "Figure 13", "Table 9", "Figure 14"),
    *("Figure 15", "Figure 16", "Figures 15 and 16", "Queries"),
)
_BRIEF = ("Curve", "Table 2", "Table 7", "Table 8", "Table 13", "Table 14", "Figure 10", "Queries")


def write(folder: Path, found: Found, settings: Settings, command: str) -> None:
    """Write ``index.html``, the files that it shows or links to, and ``report.md``, each whole."""
    results = Results(found.maps, found.scores, found.boxes)
    built, missing = tables.build(results, settings)
    drawings = figures.build(results, found.pictures, settings)
    for kind in ("records", "tables", "figures", "pictures"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for name, rows in (("maps", found.maps), ("scores", found.scores), ("boxes", found.boxes)):
        shown = rows.assign(name=rows.name.map(_inert)) if "name" in rows else rows
        _text(folder / "records" / f"{name}.csv", shown.to_csv(index=False, na_rep="nan"))
    for table in built:
        file = folder / "tables" / slug(table.number)
        _text(file.with_suffix(".md"), table.markdown())
        _text(file.with_suffix(".csv"), table.cells.to_csv(index=False))
    for drawing in drawings:
        for name, figure in zip(drawing.files(), drawing.figures, strict=True):
            with storage.whole(folder / "figures" / name) as part:
                figure.savefig(part, format="png", dpi=DPI)
    verdicts, skin = judge(results), tables.on_skin(settings)
    _text(folder / "report.md", _brief(built, verdicts, settings, command))
    _text(
        folder / "index.html",
        _template().render(
            verdicts=[(each, criteria(each, skin)) for each in verdicts],
            glance=glance(verdicts),
            models=results.models,
            shares=shares(results, skin),
            rules=pd.DataFrame(paper_rows()),
            sections=_grouped([*built, *drawings]),
            pictures=_pictures(folder, found.pictures),
            settings=asdict(settings),
            command=command,
            versions=_versions(),
            found=found,
            corrupt=list(dict.fromkeys(e for s in found.selections.values() for e in s.corrupt)),
            missing=[*found.left_out, *missing],
            brief=tables.brief(settings, *settings.frameworks),
        ),
    )


def _brief(
    built: Sequence[tables.Table], verdicts: Sequence[Verdict], settings: Settings, command: str
) -> str:
    """Return the verdicts and the main tables as one document in Markdown, to be quoted."""
    answers, unmet = summary(verdicts, tables.on_skin(settings))
    shown = [
        [f"**{table.number}. {table.title}**", "", *tables.markdown(table.cells), ""]
        for table in built
        if table.number in _BRIEF
    ]
    parts = [
        ["```bash", command, "```", "", tables.brief(settings, *settings.frameworks), ""],
        [*tables.markdown(answers), ""],
        ["Criteria that are not met, or need more images:", "", *tables.markdown(unmet), ""]
        if len(unmet)
        else [],
        *shown,
    ]
    return "\n".join(line for part in parts for line in part)


def _grouped(parts: Sequence[Any]) -> dict[str, list[Any]]:
    """Return tables and figures in the paper's order, those of a number together."""
    every = sorted(parts, key=lambda each: _ORDER.index(each.number))
    return {number: list(group) for number, group in groupby(every, key=lambda each: each.number)}


def _pictures(folder: Path, pictures: Sequence[Pictures]) -> dict[str, dict[str, list[str]]]:
    """Write images as pictures; return their files by model and by what was done to them."""
    links: dict[str, dict[str, list[str]]] = {}
    for each in pictures:
        title = f"{each.attack} on {each.aimed}" if each.aimed else each.attack
        for number, image in enumerate((each.images * 255).round().byte(), 1):
            name = f"{each.model}-{re.sub(r'[^A-Za-z0-9.]+', '-', title)}-{number}.png"
            with storage.whole(folder / "pictures" / name) as part:
                to_pil_image(image).save(part, format="png")
            links.setdefault(each.model, {}).setdefault(title, []).append(f"pictures/{name}")
    return links


def _text(path: Path, text: str) -> None:
    with storage.whole(path) as part:
        # Names of files and folders need not be text.
        part.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def _inert(name: str) -> str:
    """Return a file's name in a form that no spreadsheet takes for a formula.

    >>> _inert("cat/1.png"), _inert("=1+1/1.png")
    ('cat/1.png', "'=1+1/1.png")
    """
    return f"'{name}" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else name


def slug(number: str) -> str:
    """Return a name for a table's file.

    >>> slug("Table 3"), slug("Figures 15 and 16")
    ('table-03', 'figures-15-and-16')
    """
    return "-".join(word.zfill(2) if word.isdigit() else word.lower() for word in number.split())


def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"slug": slug, "plain": _plain, "word": word}
    return environment.get_template("page.html")


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value) or "none"


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):  # this one, run from its source
            found[name] = version(name)
    return found

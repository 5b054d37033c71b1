# SPDX-License-Identifier: MIT
"""A study as files to look at: a page, its figures, and tables to work with elsewhere.

The page is one file of HTML beside its figures. It needs no server and loads nothing from
elsewhere; it reads on a phone, in the dark, on paper, and aloud.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from captum_adv2 import storage
from captum_adv2.study.figures import DPI, Drawing
from captum_adv2.study.settings import Settings
from captum_adv2.study.tables import Table, left_out
from captum_adv2.study.verdicts import Verdict

__all__ = ["Facts", "write"]

_ORDER = (
    *("Table 2", "Table 3", "Figure 4", "Figure 5", "Figure 6", "Table 4", "Table 5", "Figure 7"),
    *("Figure 8", "Figure 9", "Figure 10", "Table 6", "Figure 11", "Table 7", "Table 8"),
    *("Figure 12", "Figure 13", "Figure 14", "Table 9", "Figure 15", "Figure 16"),
    *("Figures 15 and 16", "Table 10", "Table 13", "Table 14"),
)

_WORDS = {True: "holds", False: "does not hold", None: "not measured"}
_CLASSES = {True: "yes", False: "no", None: "unknown"}


@dataclass(frozen=True)
class Facts:
    """What happened besides the results.

    Attributes:
        command: Repeats the study.
        versions: Of packages, by name.
        misclassified: Images passed over since the classifier gets them wrong, by classifier.
        corrupt: Names of images that could not be read.
        redone: Files of results that were damaged, and made again.
        left_out: What could not be studied and why, a line each.
    """

    command: str
    versions: Mapping[str, str] = field(default_factory=dict)
    misclassified: Mapping[str, int] = field(default_factory=dict)
    corrupt: Sequence[str] = ()
    redone: Sequence[str] = ()
    left_out: Sequence[str] = ()


def write(
    folder: str | Path,
    tables: Sequence[Table],
    figures: Mapping[str, Drawing],
    verdicts: Sequence[Verdict],
    settings: Settings,
    facts: Facts,
) -> Path:
    """Write ``index.html``, ``figures/*.png``, ``tables/*.md`` and ``tables/*.csv``, each whole.

    Args:
        folder: Where; made if need be.
        tables: See `tables.build`.
        figures: By a name for their files; see `figures.build`.
        verdicts: See `verdicts.judge`.
        settings: The study's.
        facts: What happened besides.

    Returns:
        The page.
    """
    root = Path(folder)
    for kind in ("tables", "figures"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    for table in tables:
        file = root / "tables" / _slug(table.number)
        _text(file.with_suffix(".md"), table.markdown())
        _text(file.with_suffix(".csv"), table.csv())
    for stem, drawing in figures.items():
        with storage.whole(root / "figures" / f"{stem}.png") as part:
            drawing.figure.savefig(part, format="png", dpi=DPI)
    page = root / "index.html"
    _text(page, "\n".join(_page(tables, figures, verdicts, settings, facts)) + "\n")
    return page


def _text(path: Path, text: str) -> None:
    with storage.whole(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


def _slug(number: str) -> str:
    """Return a name for a table's file.

    >>> _slug("Table 3"), _slug("Figures 15 and 16")
    ('table-03', 'figures-15-and-16')
    """
    return "-".join(word.zfill(2) if word.isdigit() else word.lower() for word in number.split())


def _page(
    tables: Sequence[Table],
    figures: Mapping[str, Drawing],
    verdicts: Sequence[Verdict],
    settings: Settings,
    facts: Facts,
) -> Iterator[str]:
    sections: list[tuple[str, Table | Drawing]] = [
        *((_slug(table.number), table) for table in tables),
        *figures.items(),
    ]
    sections.sort(key=lambda section: _rank(section[1].number))  # stable within a number
    title = "Interpretable deep learning under fire: a reproduction"
    yield '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<header>"
    yield f"<h1>{title}</h1>"
    yield (
        f"<p>Attacks on classifiers ({_listed(settings.models)}) and their interpreters "
        f"({_listed(settings.interpreters)}), on {settings.count} images a classifier from "
        f"{escape(settings.images)}.</p>"
    )
    yield "</header>\n<main>"
    yield '<section id="verdicts">\n<h2>The observations of the paper</h2>'
    for verdict in verdicts:
        yield from _verdict(verdict)
    yield "</section>"
    yield '<nav aria-label="On this page"><ul>'
    for stem, section in sections:
        yield f'<li><a href="#{_id(section, stem)}">{escape(_name(section))}</a></li>'
    yield '<li><a href="#study">The study</a></li></ul></nav>'
    for stem, section in sections:
        yield from _table(section, stem) if isinstance(section, Table) else _figure(section, stem)
    yield from _study(tables, settings, facts)
    yield "</main>\n</body>\n</html>"


def _rank(number: str) -> int:
    return _ORDER.index(number) if number in _ORDER else len(_ORDER)


def _id(section: Table | Drawing, stem: str) -> str:
    return stem if isinstance(section, Drawing) else f"{stem}-numbers"


def _name(section: Table | Drawing) -> str:
    return f"{section.number}. {section.title}"


def _listed(names: Iterable[str]) -> str:
    return escape(", ".join(names))


def _badge(holds: bool | None) -> str:
    return f'<strong class="badge {_CLASSES[holds]}">{_WORDS[holds]}</strong>'


def _verdict(verdict: Verdict) -> Iterator[str]:
    yield f'<article class="verdict {_CLASSES[verdict.holds]}">'
    yield f"<h3>{verdict.number}. {escape(verdict.claim)} {_badge(verdict.holds)}</h3>"
    yield f"<p>Rule: {escape(verdict.criterion)}</p>"
    if len(verdict.models) > 1:
        each = (f"{escape(model)} {_badge(holds)}" for model, holds in verdict.models)
        yield f"<p>By classifier: {', '.join(each)}</p>"
    lines = verdict.support.splitlines()
    if lines:
        opened = " open" if verdict.holds is not True else ""  # what is wrong shall be seen
        yield f"<details{opened}><summary>The numbers ({len(lines)})</summary>"
        yield _bullets(lines) + "</details>"
    yield "</article>"


def _table(table: Table, stem: str) -> Iterator[str]:
    key = _id(table, stem)
    yield f'<section id="{key}">\n<h2>{escape(_name(table))}</h2>'
    # A table wider than the screen scrolls inside its box, also by keyboard.
    yield f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{key}-caption">'
    yield f'<table><caption id="{key}-caption">{escape(_name(table))}</caption>\n<thead><tr>'
    yield "".join(f'<th scope="col">{escape(text)}</th>' for text in table.header)
    yield "</tr></thead>\n<tbody>"
    for row in table.rows:
        cells = [
            f'<th scope="row">{escape(text)}</th>'
            if i < table.labels
            else f"<td>{escape(text)}</td>"
            for i, text in enumerate(row)
        ]
        yield f"<tr>{''.join(cells)}</tr>"
    links = (f'<a href="tables/{stem}.{kind}">{kind}</a>' for kind in ("csv", "md"))
    yield f'</tbody></table></div>\n<p class="note">As a file: {", ".join(links)}.</p>'
    yield "<details><summary>How it was measured</summary>"
    yield f"<p>{escape(table.note)}</p></details>\n</section>"


def _figure(drawing: Drawing, stem: str) -> Iterator[str]:
    width, height = (round(inches * DPI) for inches in drawing.figure.get_size_inches())
    yield f'<section id="{_id(drawing, stem)}">\n<h2>{escape(_name(drawing))}</h2>\n<figure>'
    yield (
        f'<img src="figures/{escape(stem)}.png" alt="{escape(_name(drawing))}" width="{width}" '
        f'height="{height}" loading="lazy">'
    )
    yield f"<figcaption>{escape(drawing.caption)}</figcaption>\n</figure>\n</section>"


def _study(tables: Sequence[Table], settings: Settings, facts: Facts) -> Iterator[str]:
    yield '<section id="study">\n<h2>The study</h2>\n<h3>The command that repeats it</h3>'
    yield f'<pre class="scroll" tabindex="0"><code>{escape(facts.command)}</code></pre>'
    yield "<h3>Settings</h3>" + _definitions(settings.record())
    yield "<h3>Versions</h3>" + _definitions(facts.versions)
    yield "<h3>Images</h3>\n<ul>"
    if facts.misclassified:
        each = ", ".join(f"{model} {count}" for model, count in facts.misclassified.items())
        yield f"<li>Passed over, since the classifier gets them wrong: {escape(each)}.</li>"
    yield f"<li>Could not be read: {len(facts.corrupt)}.{_names(facts.corrupt)}</li>"
    yield f"<li>Damaged results, made again: {len(facts.redone)}.{_names(facts.redone)}</li></ul>"
    missing = [*facts.left_out, *left_out(tables)]
    if missing:
        yield f"<h3>Left out</h3>\n{_bullets(missing)}"
    yield "</section>"


def _names(names: Sequence[str]) -> str:
    return _bullets(names) if names else ""


def _bullets(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _definitions(values: Mapping[str, Any]) -> str:
    rows = (
        f"<dt>{escape(key)}</dt><dd>{escape(_plain(value))}</dd>" for key, value in values.items()
    )
    return f"<dl>{''.join(rows)}</dl>"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value) or "none"


_STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --back: #fff; --line: #c9c9c9; --soft: #f3f4f6;
  --link: #0b57a4; --yes: #0a6b45; --no: #a8321a; --unknown: #595959; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8e8; --back: #161719; --line: #4a4d52;
  --soft: #232529; --link: #8ab8f0; --yes: #5ecb9a; --no: #ff9d85; --unknown: #b5b5b5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; color: var(--text);
  background: var(--back); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
h3 { font-size: 1.05rem; } a { color: var(--link); }
nav { margin-top: 2rem; } nav ul { columns: 20rem; padding-left: 1.2rem; font-size: .9rem; }
.verdict { border-left: .4rem solid; padding: .1rem 0 .1rem .8rem; margin: 1rem 0; }
.verdict.yes { border-color: var(--yes); } .verdict.no { border-color: var(--no); }
.verdict.unknown { border-color: var(--unknown); border-left-style: dashed; }
.verdict p { margin: .3rem 0; }
.badge { display: inline-block; padding: 0 .5rem; border: .1rem solid; border-radius: .8rem;
  font-size: .85rem; white-space: nowrap; }
.badge.yes { color: var(--yes); } .badge.no { color: var(--no); }
.badge.unknown { color: var(--unknown); }
details, .note, figcaption { font-size: .9rem; } ul ul { font-size: .9rem; }
.scroll { overflow-x: auto; max-width: 100%; position: relative; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
caption { position: absolute; clip-path: inset(50%); } /* the heading says it to those who see */
th, td { border: 1px solid var(--line); padding: .25rem .6rem; text-align: left;
  white-space: nowrap; }
thead th { background: var(--soft); } tbody th { font-weight: 500; }
figure { margin: 0; } img { max-width: 100%; height: auto; background: #fff; }
pre { background: var(--soft); padding: .8rem; overflow-wrap: normal; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .2rem 1rem; }
dt { font-weight: 600; } dd { margin: 0; min-width: 0; }
@media print { body { max-width: none; font-size: 10pt; } nav { display: none; }
  .scroll { overflow: visible; } th, td { white-space: normal; }
  tr, figure, .verdict { break-inside: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; } }
"""

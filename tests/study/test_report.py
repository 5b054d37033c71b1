# SPDX-License-Identifier: MIT
"""The page: whole files, valid and escaped, whatever was measured."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
import reproduction
from synthetic import SETTINGS, pictures, setting, study, without

from captum_adv2.study import report
from captum_adv2.study.results import Found
from captum_adv2.study.selection import Selection

pytestmark = pytest.mark.usefixtures("undrawn")

EVIL = '<script>alert("x")</script>&.png'
COMMAND = "python -m study --images 'a & b' <folder>"


def write(folder: Path, *changes, shown=()) -> Path:
    chosen = Selection([1], ["a"], [0], [], ["ab12"], 7, [EVIL], [], 0, 1, "cd34")
    rows = study(*changes, models=("resnet", "densenet"))
    left_out = ["RTS on x needs a masking model"]
    chosen_of = {"resnet": chosen, "densenet": chosen}
    found = Found(*rows, shown, chosen_of, ["shard-1.pt"], left_out, missing=7)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text("{}")
    report.write(folder, found, SETTINGS, COMMAND)
    return folder / "index.html"


class Reader(HTMLParser):
    """Checks that elements nest; collects what tests ask for."""

    VOID = ("meta", "img", "br", "link", "input", "hr")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.found if name == tag]


@pytest.fixture(scope="module")
def written(tmp_path_factory, undrawn) -> Path:
    return write(tmp_path_factory.mktemp("page") / "new" / "folder", shown=pictures(count=1))


@pytest.fixture(scope="module")
def reader(written: Path) -> Reader:
    return Reader(written)


def test_files(written: Path) -> None:
    names = {str(p.relative_to(written.parent)) for p in written.parent.rglob("*") if p.is_file()}
    assert {"index.html", "records/maps.csv", "records/scores.csv"} <= names
    assert {"tables/table-03.md", "tables/table-03.csv", "tables/figures-15-and-16.md"} <= names
    assert {"figures/figure-04-resnet.png", "figures/figure-05-l1.png"} <= names
    assert {"records/boxes.csv", "pictures/resnet-ADV2-on-CAM-1.png"} <= names
    assert not any("part" in name for name in names)


def test_the_report_quotes_verdicts_and_tables(tmp_path: Path) -> None:
    far = setting({"l1": 0.2, "iou": 0.3}, model="resnet", attack="ADV2", interpreter="CAM")
    lines = (write(tmp_path, far).parent / "report.md").read_text(encoding="utf-8").splitlines()
    assert COMMAND in lines
    answers = [line for line in lines if line.startswith("| 2. ")]
    assert [line.split(" | ")[1:3] for line in answers] == [["does not hold", "holds"]]
    unmet = [line for line in lines if line.startswith("| resnet | CAM |")]
    assert any("does not hold" in line for line in unmet)
    assert "**Table 13. Distances of benign and adversarial maps**" in lines


def test_a_report_of_queries_quotes_their_table_and_budget(tmp_path: Path) -> None:
    maps, *others = study(models=("resnet",))
    maps = maps[maps.attack.isin(["Square", "QueryADV2"])]
    found = Found(maps, *(each.iloc[:0] for each in others), (), {}, (), ())
    settings = replace(SETTINGS, frameworks=("query",), queries=70)
    report.write(tmp_path, found, settings, COMMAND)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "at most 70 queries of an image" in text
    assert "gradient evaluations" not in text
    assert "**Queries. Square Attack, and ADV2, without gradients**" in text
    assert "Criteria that are not met" not in text


def test_records_are_written_as_they_are(written: Path) -> None:
    models = ("resnet", "densenet")
    for name, rows in zip(("maps", "scores", "boxes"), study(models=models), strict=True):
        file = written.parent / "records" / f"{name}.csv"
        found = pd.read_csv(file, keep_default_na=False, na_values=["nan"])
        pd.testing.assert_frame_equal(found, rows, check_dtype=False)


def test_every_link_and_picture_is_there_and_nothing_comes_from_elsewhere(
    written: Path, reader: Reader
) -> None:
    ids = [attrs["id"] for _, attrs in reader.found if "id" in attrs]
    assert len(ids) == len(set(ids))
    for attrs in reader.all("a"):
        kind, _, name = str(attrs["href"]).partition("#")
        assert name in ids if not kind else (written.parent / kind).is_file(), kind
    for attrs in reader.all("img"):
        assert (written.parent / str(attrs["src"])).is_file()
        assert attrs["alt"]
    assert reader.all("script") == [{}]  # its own
    assert not reader.all("link")
    assert "http" not in written.read_text(encoding="utf-8")


def test_valid_and_accessible(written: Path, reader: Reader) -> None:
    text = written.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>\n")
    assert reader.all("html") == [{"lang": "en"}]
    assert {"charset": "utf-8"} in reader.all("meta")
    assert any(attrs.get("name") == "viewport" for attrs in reader.all("meta"))
    assert all(attrs["scope"] in ("col", "row") for attrs in reader.all("th"))
    assert len(reader.all("caption")) == len(reader.all("table")) > 5
    assert len(reader.all("img")) >= len(reader.all("figcaption")) > 10
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    levels = [int(tag[1]) for tag, _ in reader.found if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))


def test_verdicts_come_first_then_the_papers_order(reader: Reader) -> None:
    sections = [attrs["id"] for attrs in reader.all("section")]
    assert sections[:2] == ["overview", "verdicts"]
    assert sections[-3:] == ["rules", "pictures", "study"]
    order = ["curve", "table-03", "figure-04", "figure-05", "table-13", "table-04", "figure-09"]
    assert [name for name in sections if name in order] == order


def test_texts_are_escaped(written: Path, reader: Reader) -> None:
    assert EVIL not in written.read_text(encoding="utf-8")
    assert EVIL in reader.text
    assert COMMAND in reader.text


def test_facts_and_settings(reader: Reader) -> None:
    text = re.sub(r"\s+", " ", reader.text)
    for words in (
        *("resnet gets them wrong: 7.", "shard-1.pt", "RTS on x needs a masking model"),
        *("Could not be read: 1.", "count40", "torch2", "Table 10: needs the interpreter GradCAM"),
    ):
        assert words in text


def test_verdicts_in_words(tmp_path: Path) -> None:
    changes = setting({"success": 0.0}, attack="ADV2"), without(attack="StADV2")
    text = write(tmp_path, *changes).read_text(encoding="utf-8")
    for words in ("holds", "does not hold", "not measured", "too few digits"):
        assert f">{words}</strong>" in text


def test_first_comes_an_overview_of_all_classifiers_and_of_the_paper(reader: Reader) -> None:
    text = re.sub(r"\s+", " ", reader.text)
    assert "Unfinished: 7 parts of the study are not there yet." in text
    first = text[: text.index("Rule: ")]
    for words in ("paper's tables", "too few digits", "paper, DenseNet", "0.04, 0.10 (40 %)"):
        assert words in first


@pytest.mark.parametrize("whole", [False, True])
def test_a_page_of_next_to_nothing(whole: bool, tmp_path: Path) -> None:
    held = (lambda row: row if row.get("target") == -1 else None) if whole else (lambda row: None)
    Reader(write(tmp_path, held))


def test_tables_over_several_studies(tmp_path: Path, capsys, monkeypatch) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        write(folder, without(attack="class"))
        (folder / "study.json").write_text(json.dumps(asdict(SETTINGS)))
    monkeypatch.setattr(sys, "argv", ["", *map(str, folders)])
    reproduction.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "||paper" + "|resnet|densenet" * 2 + "|"
    (first,) = (line for line in lines if line.startswith("|1. "))
    assert first.split("|")[2:] == ["holds"] * 5 + [""]
    title = lines.index("**Tables 13, 14: L1 (IoU) to the benign map, PGD, ADV2**")
    ours = lines[title + 4].split("|")
    assert ours[1:3] == ["GRAD", "0.100, 0.040"]
    assert ours[3] == ours[5] != "–"
    empty = lines.index("**Table 8: class, L1 to the other map (IoU)**")
    assert lines[empty + 4] == ""  # no row below the heading

# SPDX-License-Identifier: MIT
"""Tables hold the estimates of their rows, and leave out what was not measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from synthetic import NAMES, NOISES, SETTINGS, SQUEEZERS, results, setting, without

from captum_adv2.study.estimates import JOINT, Estimate
from captum_adv2.study.frame import difference
from captum_adv2.study.tables import SPECS, Table, build


def built(*changes, settings=SETTINGS, **how) -> dict[str, Table]:
    return {table.number: table for table in build(results(*changes, **how), settings)[0]}


@pytest.fixture(scope="module")
def whole() -> dict[str, Table]:
    return built()


def line(table: Table, *labels: str) -> pd.Series:
    """Return the one row with these labels."""
    cells = table.cells.set_index([*table.cells.columns[: table.labels]])
    assert cells.index.is_unique
    return cells.loc[labels]


def test_all_tables_in_the_papers_order(whole) -> None:
    paper = [*(f"Table {n}" for n in (2, 3, 4, 5, 6, 7, 8, 9, 13)), "Figure 10"]
    assert list(whole) == [*paper[:-1], "Curve", paper[-1], "Queries", "Figures 15 and 16"]


@pytest.mark.parametrize(
    ("number", "attacks", "titles"),
    [
        ("Table 3", ("PGD", "ADV2"), ("ASR", "MC")),
        ("Table 6", ("patch",), ("ASR", "MC")),
        ("Table 7", ("patch",), ("L1 to target", "L1")),
        ("Table 8", ("class",), ("ASR", "MC", "L1 to target", "IoU to target")),
        ("Table 13", ("PGD", "ADV2"), ("L1", "L2")),
        ("Figure 10", ("stAdv", "StADV2"), ("ASR", "MC", "L1", "IoU")),
        ("Queries", ("Square", "QueryADV2"), ("ASR", "MC", "L1", "IoU")),
    ],
)
def test_long_tables(number: str, attacks: tuple[str, ...], titles: tuple[str, ...], whole) -> None:
    found, table = results(), whole[number]
    assert len(table.cells) == len(NAMES) * len(attacks)
    for name in NAMES:
        for attack in attacks:
            row = line(table, "resnet", name, attack)
            for title in titles:
                assert row[title] == str(found.estimate(title, "resnet", attack, name))
            assert row["successes"] == "40 of 40"


def test_adaptive_attacks(whole) -> None:
    table = whole["Table 5"]
    attacks = ["PGD", "ADV2", "adaptive:2 bits", "adaptive:3x3"]
    assert table.cells.attack.tolist() == attacks
    assert set(table.cells.interpreter) == {"RTS"}


def test_detection(whole) -> None:
    found, table = results(), whole["Table 4"]
    assert list(dict.fromkeys(table.cells.squeezer)) == [*SQUEEZERS, JOINT]
    for attack, *place in (
        ("benign", "benign", ""),
        ("PGD", "PGD", ""),
        ("ADV2 on CAM", "ADV2", "CAM"),
        ("adaptive:3x3 on RTS", "adaptive:3x3", "RTS"),
    ):
        row = line(table, "resnet", "3x3", attack)
        assert row["threshold"] == f"{found.thresholds['resnet']['3x3']:.3f}"
        assert row["detected by it"] == str(found.detection("resnet", *place, "3x3"))
        assert row["by all jointly"] == str(found.detection("resnet", *place, JOINT))
    assert row["paper"] == "3.4 %"
    assert row["detected by it"] != row["by all jointly"] == "100 % [91.2, 100]"


def test_transfer(whole) -> None:
    found, table = results(), whole["Table 9"]
    assert list(table.cells) == ["model", "source", *(f"on {name}" for name in NAMES), "paper"]
    assert line(table, "resnet", "PGD")["paper"] == "0.10, 0.22, 0.22"
    for name in NAMES:
        row = line(table, "resnet", "PGD")
        assert row[f"on {name}"] == str(found.estimate("L1", "resnet", "PGD", name))
        for source in NAMES:
            cell = found.estimate("L1", "resnet", "ADV2", name, source)
            assert line(table, "resnet", source)[f"on {name}"] == str(cell)


def test_localisation_counts_clean_images_once_and_only_with_boxes() -> None:
    row = line(
        built(setting({"missed": np.nan}, image=0), seeds=(0, 1))["Table 2"], "resnet", "CAM"
    )
    assert row["images"] == "39, tuned on 40 others"
    assert row["wrong boxes"].startswith("23.1 % [")  # 9 of 39
    assert row["tuned threshold"] == "mean 2"
    assert row["wrong boxes, tuned"].startswith("12.5 % [")
    assert row["paper"] == "43.8 %"


def test_distilled(whole) -> None:
    found, table = results(), whole["Figures 15 and 16"]
    assert table.cells.attack.tolist() == ["PGD", "ADV2", *NOISES, "none"]
    assert line(table, "resnet", "none")["L1 on RTS-A"].startswith("0.020 [")
    rts, other = (found.values("L1", "resnet", "ADV2", name) for name in ("RTS", "RTS-A"))
    row = line(table, "resnet", "ADV2")
    assert row["L1 on RTS-A"] == str(Estimate.of(other))
    assert row["difference"] == str(Estimate.of(difference(other, rts)))


def test_images_are_compared_within_a_seed() -> None:
    failing = (("RTS", 0), ("RTS-A", 1))
    fails = [
        setting({"success": 0.0}, attack="ADV2", aimed=name, seed=seed) for name, seed in failing
    ]
    table = built(*fails, seeds=(0, 1))["Figures 15 and 16"]
    assert line(table, "resnet", "ADV2")["difference"] == "–"


def test_the_curve_stands_beside_pgd(whole: dict[str, Table]) -> None:
    rows = results().rows("resnet", "PGD", "RTS")
    alike = Estimate.of((rows.iou > 0.5).astype(float), percent=True)
    assert 0 < alike.mean < 1
    title = "by PGD, at its eps"
    assert line(whole["Curve"], "resnet", "RTS")[title] == str(alike)
    failed = built(setting({"success": 0.0}, attack="PGD"))["Curve"]
    assert line(failed, "resnet", "RTS")[title].startswith("0 % [")
    assert line(built(without(attack="PGD"))["Curve"], "resnet", "RTS")[title] == "–"


def test_grad_cam() -> None:
    def renamed(row):
        return {key: "GradCAM" if value == "CAM" else value for key, value in row.items()}

    cells = built(renamed)["Table 10"].cells
    assert (set(cells.interpreter), cells.attack.tolist()) == ({"GradCAM"}, ["PGD", "ADV2"])


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        ([], []),
        ([without(attack="patch")], ["Table 6", "Table 7"]),
        ([without(attack="stAdv"), without(attack="StADV2")], ["Figure 10"]),
        ([without(attack="Square"), without(attack="QueryADV2")], ["Queries"]),
        ([without(aimed="GRAD"), without(aimed="CAM")], ["Table 9"]),
        ([without(target=-1)], ["Table 4"]),
        ([lambda row: None if "squeezer" in row else row], ["Table 4"]),
        ([without(interpreter="RTS-A")], ["Figures 15 and 16"]),
        ([without(attack="curve")], ["Curve"]),
    ],
)
def test_missing_rows_leave_a_table_out_and_the_reason_is_given(changes, gone: list[str]) -> None:
    tables, missing = build(results(*changes), SETTINGS)
    numbers = [reason.partition(":")[0] for reason in missing]
    assert sorted(numbers) == sorted([*gone, "Table 10"])
    every = {spec.number for spec in SPECS} - {"Table 14"}
    assert {table.number for table in tables} == every - set(numbers)


def test_skin_lesions_have_a_table_of_their_own() -> None:
    every = built(settings=replace(SETTINGS, images="isic:lesions=/data"))
    assert "Table 14" in every
    assert "Table 13" not in every


def test_no_success_and_nan() -> None:
    every = built(setting({"success": 0.0}))
    row = line(every["Table 3"], "resnet", "CAM", "ADV2")
    assert (row["ASR"], row["successes"]) == ("0 % [0, 8.8]", "0 of 40")
    assert line(every["Table 13"], "resnet", "CAM", "ADV2")["L1"] == "–"
    assert line(every["Table 4"], "resnet", JOINT, "PGD")["detected by it"] == "–"
    every = built(setting({"l1": np.nan}, image=1), setting({"score": np.nan}, image=2))
    assert not any("nan" in cell for t in every.values() for cell in t.cells.to_numpy().flat)


def test_texts() -> None:
    cells = pd.DataFrame({"model": ["a|b\\", '"q"'], "x": ["1, 2", "–"]})
    table = Table("Table 3", "a | title", cells, "note", 1)
    lines = table.markdown().splitlines()
    assert lines[0] == "# Table 3. a | title"
    assert lines[2:5] == ["| model | x |", "| --- | --- |", "| a\\|b\\\\ | 1, 2 |"]
    assert lines[-1] == "note"


def test_notes_name_the_protocol() -> None:
    every = built(settings=replace(SETTINGS, seeds=(0, 1)))
    for words in ("8/255", "100 gradient", "8 bits", "95 %", "above 0.5", "2 seeds, "):
        assert words in every["Table 3"].note
    assert "2 pixels" in every["Figure 10"].note
    assert "200 gradient" in every["Figure 10"].note
    assert "at most 1000 queries" in every["Queries"].note
    assert "5 %" in every["Table 4"].note
    late = built(settings=replace(SETTINGS, keep=7))
    for name, told in (("Table 3", True), ("Figure 10", True), ("Queries", False)):
        assert ("up to 7 late ones" in late[name].note) == told
        assert "late ones" not in every[name].note

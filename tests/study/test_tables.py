# SPDX-License-Identifier: MIT
"""Tables say what NumPy says of the same rows, and leave out what was not measured."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import numpy as np
import pytest
from synthetic import COUNT, NAMES, SETTINGS, SQUEEZERS, setting, study, without

from captum_adv2.evaluation.metrics import interval
from captum_adv2.study import tables
from captum_adv2.study.estimates import Estimate, Results, difference, estimate
from captum_adv2.study.records import MAP, SCORE, Frame
from captum_adv2.study.tables import Table, build, left_out

EMPTY = Frame.of([], MAP), Frame.of([], SCORE)


def found(*changes, settings=SETTINGS, **how) -> dict[str, Table]:
    return {table.number: table for table in build(*study(*changes, **how), settings)}


def text(values: np.ndarray) -> str:
    low, high = interval(values)
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def line(table: Table, *labels: str) -> dict[str, str]:
    """Return the one row with these labels."""
    (row,) = [row for row in table.rows if row[: table.labels] == labels]
    return dict(zip(table.header, row, strict=True))


class TestNumbers:
    def test_all_tables_in_the_papers_order(self) -> None:
        assert list(found()) == [
            *(f"Table {n}" for n in (2, 3, 4, 5, 6, 7, 8, 9, 13)),
            "Figure 10",
            "Figures 15 and 16",
        ]

    def test_rates_are_over_all_images_and_distances_over_successes(self) -> None:
        fails = setting({"success": 0.0, "l1": 9.0}, attack="ADV2", aimed="CAM", image=3)
        maps, scores = study(fails)
        every = {table.number: table for table in build(maps, scores, SETTINGS)}
        rows = maps.where(attack="ADV2", aimed="CAM", interpreter="CAM")
        row = line(every["Table 3"], "resnet", "CAM", "ADV2")
        low, high = (round(100 * end, 1) for end in interval(rows["success"]))
        assert row["ASR"] == f"95 % [{low:g}, {high:g}]"
        assert row["MC"] == text(rows["confidence"])
        assert row["successes"] == "19 of 20"
        won = rows["l1"][rows["success"] == 1]
        assert len(won) == COUNT - 1
        assert line(every["Table 13"], "resnet", "CAM", "ADV2")["L1"] == text(won)

    @pytest.mark.parametrize("name", NAMES)
    def test_targets(self, name: str) -> None:
        maps, scores = study()
        every = {table.number: table for table in build(maps, scores, SETTINGS)}
        patch = maps.where(attack="patch", aimed=name)
        row = line(every["Table 7"], "resnet", name, "patch")
        assert row["L1"] == text(patch["l1"])
        assert row["L1 to target"] == text(patch["target_l1"]) == "0.100 [0.100, 0.100]"
        row = line(every["Table 8"], "resnet", name, "class")
        assert row["IoU to target"] == "0.800 [0.800, 0.800]"

    def test_transfer(self) -> None:
        maps, scores = study()
        table = {table.number: table for table in build(maps, scores, SETTINGS)}["Table 9"]
        assert table.header == ("model", "source", "on GRAD", "on CAM", "on RTS")
        for source in (*NAMES, "PGD"):
            for name in NAMES:
                attack = {"attack": "PGD"} if source == "PGD" else {"aimed": source}
                rows = maps.where(interpreter=name, **{"attack": "ADV2", **attack})
                assert line(table, "resnet", source)[f"on {name}"] == text(rows["l1"])

    def test_localisation_counts_clean_images_once_and_only_with_boxes(self) -> None:
        table = found(setting({"missed": np.nan}, image=0), seeds=(0, 1))["Table 2"]
        row = line(table, "resnet", "RTS-A")
        assert row["images with boxes"] == f"{COUNT - 1}"
        assert row["wrong boxes"].startswith("21.1 % [")  # 4 of 19

    def test_seeds_are_pooled_and_models_kept_apart(self) -> None:
        maps, scores = study(seeds=(0, 1), models=("a", "b"))
        table = build(maps, scores, replace(SETTINGS, seeds=(0, 1)))[1]
        row = line(table, "b", "GRAD", "ADV2")
        assert row["successes"] == f"{2 * COUNT} of {2 * COUNT}"
        rows = maps.where(model="b", attack="ADV2", aimed="GRAD", interpreter="GRAD")
        assert row["MC"] == text(rows["confidence"])
        assert "2 seeds pooled" in table.note

    def test_distilled(self) -> None:
        maps, scores = study()
        table = {table.number: table for table in build(maps, scores, SETTINGS)}[
            "Figures 15 and 16"
        ]
        row = line(table, "resnet", "ADV2")
        rts, other = (
            maps.where(attack="ADV2", aimed=name, interpreter=name)["l1"]
            for name in ("RTS", "RTS-A")
        )
        assert row["L1 on RTS"] == text(rts)
        assert row["L1 on RTS-A"] == text(other)
        assert row["difference"] == text(other - rts)
        assert [row[1] for row in table.rows[2:]] == ["noise:normal:0.03", "noise:uniform:0.3"]

    def test_grad_cam(self) -> None:
        def renamed(row):
            return {k: "GradCAM" if v == "CAM" else v for k, v in row.items()}

        table = found(renamed)["Table 10"]
        assert {row[1] for row in table.rows} == {"GradCAM"}
        assert [row[2] for row in table.rows] == ["PGD", "ADV2"]


class TestDetection:
    def test_thresholds_are_of_held_out_images(self) -> None:
        maps, scores = study()
        table = {table.number: table for table in build(maps, scores, SETTINGS)}["Table 4"]
        held = scores.where(attack="benign", target=-1)
        columns = [held.where(squeezer=name)["score"] for name in SQUEEZERS]
        for name, values in zip((*SQUEEZERS, "joint"), (*columns, np.max(columns, 0)), strict=True):
            limit = np.sort(values)[-2]  # of 20, one may exceed it
            row = line(table, "resnet", name)
            assert row["threshold"] == f"{limit:.3f}"
            assert row["PGD"] == row["ADV2 on CAM"] == "100 % [100, 100]"
        limit = np.sort(columns[1])[-2]
        values = scores.where(attack="adaptive:3x3", squeezer="3x3")["score"] > limit
        low, high = (round(100 * end, 1) for end in interval(values))
        rate = round(100 * values.mean(), 1)
        row = line(table, "resnet", "3x3")
        assert row["adaptive on RTS"] == f"{rate:g} % [{low:g}, {high:g}]"
        assert row["joint, adaptive on RTS"] == "100 % [100, 100]"  # the other squeezer sees it
        assert "5 %" in table.note

    def test_only_successes_can_be_detected(self) -> None:
        fails = setting({"success": 0.0}, attack="PGD", image=0)
        low = setting({"score": 0.0}, attack="PGD", image=0)
        table = found(fails, low)["Table 4"]
        assert line(table, "resnet", "joint")["PGD"] == "100 % [100, 100]"

    def test_no_held_out_images(self) -> None:
        assert "Table 4" not in found(without(target=-1))

    def test_no_squeezer(self) -> None:
        maps, _ = study()
        numbers = [table.number for table in build(maps, EMPTY[1], SETTINGS)]
        assert "Table 4" not in numbers
        assert "Table 5" in numbers


class TestMissingParts:
    def test_nothing_at_all(self) -> None:
        assert build(*EMPTY, SETTINGS) == []
        listed = left_out([])
        assert len(listed) == len(tables.NEEDS)
        assert any(entry.startswith("Table 6: needs ") for entry in listed)

    def test_left_out(self) -> None:
        every = found(without(attack="patch"))
        assert [entry.partition(":")[0] for entry in left_out(every.values())] == [
            "Table 6",
            "Table 7",
            "Table 10",
        ]

    def test_skin_lesions_have_a_table_of_their_own(self) -> None:
        every = found(settings=replace(SETTINGS, images="isic:/data"))
        assert "Table 14" in every
        assert "Table 13" not in every
        assert not [entry for entry in left_out(every.values()) if "Table 13" in entry]

    def test_one_interpreter_has_no_transfer(self) -> None:
        assert "Table 9" not in found(without(aimed="GRAD"), without(aimed="CAM"))

    def test_no_success_at_all(self) -> None:
        every = found(setting({"success": 0.0}))
        row = line(every["Table 3"], "resnet", "CAM", "ADV2")
        assert row["ASR"] == "0 % [0, 0]"
        assert row["successes"] == "0 of 20"
        assert line(every["Table 13"], "resnet", "CAM", "ADV2")["L1"] == "–"
        assert line(every["Table 4"], "resnet", "joint")["PGD"] == "–"
        assert "Table 9" not in every

    def test_nan(self) -> None:
        every = found(setting({"l1": np.nan}, image=1), setting({"score": np.nan}, image=2))
        assert all("nan" not in cell for table in every.values() for r in table.rows for cell in r)
        assert line(every["Table 3"], "resnet", "CAM", "PGD")["successes"] == "19 of 20"


class TestText:
    table = Table("Table 3", "a | title", ("model", "x"), (("a|b\\", "1, 2"), ('"q"', "–")), "note")

    def test_markdown(self) -> None:
        lines = self.table.markdown().splitlines()
        assert lines[0] == "# Table 3. a | title"
        assert lines[2:5] == ["| model | x |", "| --- | --- |", "| a\\|b\\\\ | 1, 2 |"]
        assert lines[-1] == "note"

    def test_csv(self) -> None:
        rows = list(csv.reader(io.StringIO(self.table.csv())))
        assert rows == [list(row) for row in (self.table.header, *self.table.rows)]

    def test_notes_name_the_protocol(self) -> None:
        every = found()
        for words in (
            "8/255",
            "100 gradient",
            "8 bits",
            "own class",
            "target class",
            "95 %",
            "0.5",
        ):
            assert words in every["Table 3"].note
        assert "2 pixels" in every["Figure 10"].note
        assert "200 gradient" in every["Figure 10"].note


class TestEstimates:
    def test_estimate(self) -> None:
        values = np.random.default_rng(0).uniform(size=9)
        assert estimate(values) == Estimate(values.mean(), *interval(values), 9)
        assert estimate({(0, i): v for i, v in enumerate(values)}) == estimate(values)
        assert estimate({}).text() == estimate(np.empty(0)).text(percent=True) == "–"

    def test_difference_is_on_common_images(self) -> None:
        assert difference({(0, 1): 3.0, (0, 2): 1.0}, {(0, 1): 1.0, (1, 2): 0.0}) == {(0, 1): 2.0}

    def test_a_squeezer_without_a_score_leaves_the_joint_score_out(self) -> None:
        results = Results(*study(setting({"score": np.nan}, squeezer="3x3", image=2)))
        assert len(results.scores("resnet", "PGD", "", "2 bits")) == COUNT
        assert (0, 2) not in results.scores("resnet", "PGD", "")

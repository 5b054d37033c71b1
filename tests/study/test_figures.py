# SPDX-License-Identifier: MIT
"""Figures show the numbers of the records, and only what was measured."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import cache

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from synthetic import NAMES, SETTINGS, pictures, setting, study, without

from captum_adv2.evaluation.metrics import interval
from captum_adv2.study.figures import DPI, Drawing, build
from captum_adv2.study.records import MAP, SCORE, Frame

STEMS = [
    *("figure-04", "figure-05-l1", "figure-06-iou", "detector-roc", "figure-09"),
    *("figure-10-l1", "figure-10-iou", "figure-11", "figure-12", "figure-13-l1", "figure-13-iou"),
    *("figure-14", "figure-15", "figure-15-l1", "figure-16", "figure-16-l1"),
]


def found(*changes, settings=SETTINGS, shown=None, **how) -> dict[str, Drawing]:
    return build(*study(*changes, **how), pictures() if shown is None else shown, settings)


@cache
def standard() -> dict[str, Drawing]:
    return found()


def heights(axis) -> list[list[float]]:
    return [
        [bar.get_height() for bar in group]
        for group in axis.containers
        if hasattr(group, "patches")
    ]


def test_all_figures_are_small_and_registered_nowhere() -> None:
    every = standard()
    assert list(every) == STEMS
    for drawing in every.values():
        file = io.BytesIO()
        drawing.figure.savefig(file, format="png", dpi=DPI)
        assert 1000 < len(file.getvalue()) < 300_000
        assert drawing.title
        assert drawing.caption
    assert plt.get_fignums() == []


def test_bars_are_means_and_intervals() -> None:
    maps, scores = study(setting({"success": 0.0, "l1": 9.0}, image=3))
    (axis,) = build(maps, scores, [], SETTINGS)["figure-05-l1"].figure.axes
    rows = {
        attack: [
            maps.where(attack=attack, aimed=aimed, interpreter=name, success=1.0)["l1"]
            for name in NAMES
            for aimed in ["" if attack == "PGD" else name]
        ]
        for attack in ("PGD", "ADV2")
    }
    means = [[values.mean() for values in group] for group in rows.values()]
    np.testing.assert_allclose(heights(axis), means)
    drawn = [
        bars.errorbar.lines[2][0].get_segments()
        for bars in axis.containers
        if hasattr(bars, "patches")
    ]
    for segments, group in zip(drawn, rows.values(), strict=True):
        ends = [segment[:, 1] for segment in segments]
        np.testing.assert_allclose(ends, [interval(values) for values in group], rtol=1e-6)
    assert [text.get_text() for text in axis.get_xticklabels()] == list(NAMES)


def test_a_panel_and_a_grid_for_each_model() -> None:
    models = ("a:b", "a b")  # names for files must not collide
    every = found(models=models, shown=pictures(models, count=1))
    assert len(every["figure-05-l1"].figure.axes) == 2
    assert {"figure-04-a-b-1", "figure-04-a-b-2"} <= set(every)


def test_no_bar_is_cut_off() -> None:
    every = found(setting({"l1": 0.9}, model="second", attack="PGD"), models=("first", "second"))
    for axis in every["figure-05-l1"].figure.axes:
        low, high = axis.get_ylim()
        assert low == 0
        assert high > max(max(group) for group in heights(every["figure-05-l1"].figure.axes[1]))


def test_a_grid_has_a_row_an_attack_and_a_column_an_interpreter() -> None:
    every = standard()
    axes = every["figure-04"].figure.axes
    assert len(axes) == 3 * 3 * (1 + len(NAMES))
    assert [axis.get_title() for axis in axes[:4]] == ["image", *NAMES]
    labels = [axis.get_ylabel() for axis in axes[::4]]
    assert labels[:4] == ["benign\nimage 1", "PGD\nimage 1", "ADV2\nimage 1", "benign\nimage 2"]
    labels = [axis.get_ylabel() for axis in every["figure-14"].figure.axes[::4]]
    assert labels == ["benign", *(f"ADV2 on {name}" for name in NAMES), "PGD"]
    labels = [axis.get_ylabel() for axis in every["figure-11"].figure.axes[::4]]
    assert labels[:3] == ["benign\nimage 1", "target\nimage 1", "ADV2\nimage 1"]


def test_skin_lesions_have_figures_of_their_own() -> None:
    every = found(settings=replace(SETTINGS, images="isic:/data"), shown=pictures(count=1))
    assert list(every)[:3] == ["figure-07", "figure-08-l1", "figure-08-iou"]
    assert every["figure-08-l1"].number == "Figure 8"


def test_roc() -> None:
    figure = found(shown=[])["detector-roc"].figure
    (axis,) = figure.axes
    assert [line.get_label() for line in axis.lines] == [
        "PGD, area 1.000",
        *(f"ADV2 on {name}, area 1.000" for name in NAMES),
    ]


@pytest.mark.parametrize(
    ("attack", "gone"),
    [
        ("patch", ["figure-11"]),
        ("class", ["figure-12", "figure-13-l1", "figure-13-iou"]),
        ("StADV2", ["figure-10-l1", "figure-10-iou"]),
    ],
)
def test_what_is_missing_is_left_out(attack: str, gone: list[str]) -> None:
    shown = [picture for picture in pictures(count=1) if picture.attack != attack]
    every = found(without(attack=attack), shown=shown)
    assert [stem for stem in STEMS if stem not in every] == gone


def test_nothing_at_all() -> None:
    assert build(Frame.of([], MAP), Frame.of([], SCORE), [], SETTINGS) == {}


def test_no_success_and_nan() -> None:
    assert found(setting({"success": 0.0}), shown=[]) == {}
    every = found(setting({"l1": np.nan}, interpreter="CAM"), shown=[])
    every["figure-05-l1"].figure.savefig(io.BytesIO(), format="png")


def test_one_picture_and_none() -> None:
    assert len(found(shown=pictures(count=1))["figure-04"].figure.axes) == 12
    assert "figure-04" not in found(shown=pictures(count=0))


def test_pictures_are_not_touched() -> None:
    shown = pictures(count=1)
    before = [picture.images.clone() for picture in shown]
    found(shown=shown)
    assert all(torch.equal(a, b.images) for a, b in zip(before, shown, strict=True))

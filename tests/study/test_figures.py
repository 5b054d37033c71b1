# SPDX-License-Identifier: MIT
"""Figures show the numbers of the records, and only what was measured."""

from __future__ import annotations

import io
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from synthetic import NAMES, SETTINGS, pictures, results, setting, without

from captum_adv2.study.figures import DPI, Drawing, build

STEMS = [
    *("figure-04", "figure-05-l1", "figure-06-iou", "detector-roc", "figure-09"),
    *("figure-10-l1", "figure-10-iou", "figure-11", "figure-12", "figure-13-l1", "figure-13-iou"),
    *("figure-14", "figure-15", "figure-15-l1", "figure-16", "figure-16-l1"),
]


def built(*changes, settings=SETTINGS, shown=(), **how) -> dict[str, Drawing]:
    found = build(results(*changes, **how), shown, settings)
    return {drawing.stem: drawing for drawing in found}


@pytest.fixture(scope="module")
def whole() -> dict[str, Drawing]:
    return built(shown=pictures())


def groups(axis) -> list:
    return [container for container in axis.containers if hasattr(container, "patches")]


def heights(axis) -> list[list[float]]:
    return [[bar.get_height() for bar in group] for group in groups(axis)]


def test_all_figures_are_small_and_registered_nowhere(whole) -> None:
    assert list(whole) == STEMS
    for drawing in whole.values():
        file = io.BytesIO()
        drawing.figure.savefig(file, format="png", dpi=DPI)
        assert 1000 < len(file.getvalue()) < 300_000
        assert drawing.title
        assert drawing.caption
    assert plt.get_fignums() == []


@pytest.mark.parametrize(
    ("stem", "series"),
    [
        ("figure-05-l1", {"PGD": ("L1", "PGD"), "ADV2": ("L1", "ADV2")}),
        ("figure-06-iou", {"PGD": ("IoU", "PGD"), "ADV2": ("IoU", "ADV2")}),
        ("figure-10-l1", {"stAdv": ("L1", "stAdv"), "StADV2": ("L1", "StADV2")}),
        (
            "figure-13-iou",
            {"to benign": ("IoU", "class"), "to target": ("IoU to target", "class")},
        ),
        (
            "figure-15-l1",
            {kind: ("L1", f"noise:{kind}") for kind in ("normal:0.03", "uniform:0.3")},
        ),
    ],
)
def test_bars_are_means_and_intervals(stem: str, series: dict[str, tuple[str, str]]) -> None:
    change = setting({"success": 0.0, "l1": 9.0}, image=3)
    (axis,) = built(change)[stem].figure.axes
    names = [text.get_text() for text in axis.get_xticklabels()]
    assert names == (["RTS", "RTS-A"] if "15" in stem else [*NAMES])
    rows = [
        [results(change).estimate(title, "resnet", attack, name) for name in names]
        for title, attack in series.values()
    ]
    np.testing.assert_allclose(heights(axis), [[each.mean for each in row] for row in rows])
    assert [group.get_label() for group in groups(axis)] == list(series)
    for group, row in zip(groups(axis), rows, strict=True):
        ends = [line[:, 1] for line in group.errorbar.lines[2][0].get_segments()]
        np.testing.assert_allclose(ends, [(each.low, each.high) for each in row], rtol=1e-6)


def test_a_panel_and_a_grid_for_each_model() -> None:
    models = ("a:b", "a b")  # names for files must not collide
    every = built(
        setting({"l1": 0.9}, model="a b", attack="PGD"),
        models=models,
        shown=pictures(models, count=1),
    )
    assert {"figure-04-a-b-1", "figure-04-a-b-2"} <= set(every)
    first, second = every["figure-05-l1"].figure.axes
    for axis in (first, second):  # no bar is cut off
        low, high = axis.get_ylim()
        assert low == 0
        assert high > max(max(group) for group in heights(second))


def test_a_grid_has_a_row_an_attack_and_a_column_an_interpreter(whole) -> None:
    def labels(stem: str) -> list[str]:
        axes = whole[stem].figure.axes
        assert [axis.get_title() for axis in axes[:4]] == ["image", *NAMES]
        return [axis.get_ylabel() for axis in axes[::4]]

    attacks = [f"{name}\nimage {i}" for i in (1, 2, 3) for name in ("benign", "PGD", "ADV2")]
    assert labels("figure-04") == attacks
    assert labels("figure-14") == ["benign", *(f"ADV2 on {name}" for name in NAMES), "PGD"]
    assert labels("figure-11")[:3] == ["benign\nimage 1", "target\nimage 1", "ADV2\nimage 1"]


def test_a_grid_shows_the_attack_on_the_interpreter_of_its_column() -> None:
    shown = pictures(count=1)
    images = {(p.attack, p.aimed): p.images for p in shown}
    drawn = built(shown=shown)["figure-14"].figure.axes
    for row, name in enumerate(NAMES, 1):
        picture = torch.from_numpy(np.asarray(drawn[4 * row].images[0].get_array()))
        expected = images["ADV2", name][0].permute(1, 2, 0)
        assert torch.allclose(picture.float(), expected.float(), atol=1e-6)


def test_skin_lesions_have_figures_of_their_own() -> None:
    skin = replace(SETTINGS, images="isic:lesions=/data")
    every = built(settings=skin, shown=pictures(count=1))
    assert list(every)[:3] == ["figure-07", "figure-08-l1", "figure-08-iou"]
    assert every["figure-08-l1"].number == "Figure 8"


def test_roc(whole) -> None:
    (axis,) = whole["detector-roc"].figure.axes
    names = ["PGD", *(f"ADV2 on {name}" for name in NAMES)]
    assert [line.get_label() for line in axis.lines] == [f"{name}, area 1.000" for name in names]


@pytest.mark.parametrize(
    ("attack", "gone"),
    [
        ("patch", ["figure-11"]),
        ("class", ["figure-12", "figure-13-l1", "figure-13-iou"]),
        ("StADV2", ["figure-10-l1", "figure-10-iou"]),
    ],
)
def test_missing_rows_leave_figures_out(attack: str, gone: list[str]) -> None:
    shown = [picture for picture in pictures(count=1) if picture.attack != attack]
    every = built(without(attack=attack), shown=shown)
    assert [stem for stem in STEMS if stem not in every] == gone


def test_without_success_or_pictures_there_is_nothing_to_draw() -> None:
    assert built(setting({"success": 0.0}), shown=pictures(count=0)) == {}
    one = built(without(interpreter="RTS-A"), shown=pictures(count=1))
    assert len(one["figure-04"].figure.axes) == 12
    assert "figure-16-l1" not in one

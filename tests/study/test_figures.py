# SPDX-License-Identifier: MIT
"""Figures show the numbers of the records, and only what was measured."""

from __future__ import annotations

import io
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection
from synthetic import NAMES, SETTINGS, pictures, results, setting, without

from captum_adv2.evaluation.robustness import Robustness
from captum_adv2.study import plots
from captum_adv2.study.figures import DPI, PHOTOGRAPHS, SPECS, Bars, Drawing, Gallery, build

GRIDS = [f"figure-{number:02d}-resnet" for number in (4, 9, 11, 12, 14, 15, 16)]
STEMS = [
    *(GRIDS[0], "figure-05-l1", "figure-06-iou", "curve", "detector-roc", GRIDS[1]),
    *("figure-10-l1", "figure-10-iou", *GRIDS[2:4], "figure-13-l1", "figure-13-iou"),
    *(*GRIDS[4:6], "figure-15-l1", GRIDS[6], "figure-16-l1"),
]


def built(*changes, settings=SETTINGS, shown=(), **how) -> dict[str, Drawing]:
    found = build(results(*changes, **how), shown, settings)
    return {drawing.stem: drawing for drawing in found}


@pytest.fixture(scope="module")
def whole() -> dict[str, Drawing]:
    return built(shown=pictures(count=1))


def groups(axis) -> list:
    return [container for container in axis.containers if hasattr(container, "patches")]


def heights(axis) -> list[list[float]]:
    return [[bar.get_height() for bar in group] for group in groups(axis)]


def labels(figure) -> list[str]:
    assert [axis.get_title() for axis in figure.axes[:4]] == ["image", *NAMES]
    return [axis.get_ylabel() for axis in figure.axes[:-1:4]]  # the last is a bar of colours


@pytest.mark.parametrize(("models", "rows"), [(1, 1), (3, 1), (4, 2), (6, 2)])
def test_curves_of_trust_are_three_in_a_row(models: int, rows: int) -> None:
    curve = Robustness(torch.tensor([0.01, 0.02, torch.inf]))
    figure = plots.trusted({f"model {n}": {"CAM": curve} for n in range(models)})
    grid = figure.axes[0].get_subplotspec().get_gridspec()
    assert (grid.nrows, grid.ncols) == (rows, min(3, models))
    shown = [axis.get_title() for axis in figure.axes if axis.axison]
    assert shown == [f"model {n}, 3 images" for n in range(models)]


def test_all_figures_are_small_and_registered_nowhere(whole) -> None:
    assert list(whole) == STEMS
    for drawing in whole.values():
        assert len(drawing.files()) == len(drawing.figures) == len(drawing.texts)
        for figure, text in zip(drawing.figures, drawing.texts, strict=True):
            file = io.BytesIO()
            figure.savefig(file, format="png", dpi=DPI)
            assert 1000 < len(file.getvalue()) < 600_000
            assert text
        assert drawing.title
        assert drawing.caption
    assert plt.get_fignums() == []


@pytest.mark.parametrize(
    ("stem", "series"),
    [
        ("figure-05-l1", {"PGD": ("L1", "PGD"), "ADV2": ("L1", "ADV2")}),
        ("figure-06-iou", {"PGD": ("IoU", "PGD"), "ADV2": ("IoU", "ADV2")}),
        ("figure-10-l1", {"stAdv": ("L1", "stAdv"), "StADV2": ("L1", "StADV2")}),
        ("figure-13-iou", {"to benign": ("IoU", "class"), "to target": ("IoU to target", "class")}),
        (
            "figure-15-l1",
            {kind: ("L1", f"noise:{kind}") for kind in ("normal:0.03", "uniform:0.3")},
        ),
    ],
)
def test_bars_are_means_and_intervals(whole, stem: str, series) -> None:
    (axis,) = whole[stem].figures[0].axes
    names = [text.get_text() for text in axis.get_xticklabels()]
    assert names == (["RTS", "RTS-A"] if "15" in stem else [*NAMES])
    rows = [
        [results().estimate(title, "resnet", attack, name) for name in names]
        for title, attack in series.values()
    ]
    np.testing.assert_allclose(heights(axis), [[each.mean for each in row] for row in rows])
    assert [group.get_label() for group in groups(axis)] == list(series)
    for group, row in zip(groups(axis), rows, strict=True):
        ends = [line[:, 1] for line in group.errorbar.lines[2][0].get_segments()]
        np.testing.assert_allclose(ends, [(each.low, each.high) for each in row], rtol=1e-6)


def test_a_panel_and_a_grid_for_each_model() -> None:
    models = ("one", "two")
    found = results(setting({"l1": 0.9}, model="two", attack="PGD"), models=models)
    galleries = [Gallery(model, pictures(models, count=2), found) for model in models]
    grids, (bars,) = ([*spec(found, galleries)] for spec in PHOTOGRAPHS[:2])
    assert [drawing.stem for drawing in grids] == ["figure-04-one", "figure-04-two"]
    assert grids[0].files() == ["figure-04-one-1.png", "figure-04-one-2.png"]
    for figure in grids[0].figures:
        assert labels(figure) == ["benign", "PGD", "ADV2"]
    first, second = bars.figures[0].axes
    for axis in (first, second):  # no bar is cut off
        low, high = axis.get_ylim()
        assert low == 0
        assert high > max(max(group) for group in heights(second))


def test_grids_show_the_attack_on_the_interpreter_of_a_row_or_column(whole) -> None:
    (figure,) = whole["figure-14-resnet"].figures
    assert labels(figure) == ["benign", *(f"ADV2 on {name}" for name in NAMES), "PGD"]
    assert labels(whole["figure-11-resnet"].figures[0]) == ["benign", "target", "ADV2"]
    images = {(p.attack, p.aimed): p.images for p in pictures(count=1)}
    for row, name in enumerate(NAMES, 1):
        picture = torch.from_numpy(np.asarray(figure.axes[4 * row].images[0].get_array()))
        expected = images["ADV2", name][0].permute(1, 2, 0)
        assert torch.allclose(picture.float(), expected.float(), atol=1e-6)


def test_class_confidence_and_l1_stand_below_the_pictures(whole) -> None:
    (figure,) = whole["figure-04-resnet"].figures
    below = [axis.get_xlabel() for axis in figure.axes[:12]]
    assert below == ["cat 0.00", *[""] * 3, *["cat 0.00", *["L1 0.125"] * 3] * 2]
    (text,) = whole["figure-04-resnet"].texts
    assert "ADV2 (cat 0.00): GRAD L1 0.125, CAM L1 0.125, RTS L1 0.125" in text
    assert "8/255, 100 gradient evaluations; up to 40 images" in whole["figure-04-resnet"].caption
    assert "200 gradient evaluations" in whole["figure-10-l1"].caption


def test_noise_that_makes_no_image_err_has_no_bar() -> None:
    models = ("one", "two")
    found = results(
        setting({"success": 0.0}, model="one", attack="noise:normal:0.03"), models=models
    )
    (spec,) = (spec for spec in SPECS if isinstance(spec, Bars) and spec.number == 15)
    (drawing,) = spec(found, [])
    shown = [[g.get_label() for g in groups(axis)] for axis in drawing.figures[0].axes]
    assert shown == [["uniform:0.3"], ["normal:0.03", "uniform:0.3"]]
    (legend,) = drawing.figures[0].legends
    assert sorted(text.get_text() for text in legend.get_texts()) == ["normal:0.03", "uniform:0.3"]


def test_the_papers_numbers_are_marked(whole) -> None:
    (axis,) = whole["figure-05-l1"].figures[0].axes
    dots = [each for each in axis.collections if isinstance(each, PathCollection)]
    assert [[*each.get_offsets()[:, 1]] for each in dots] == [
        [0.10, 0.22, 0.22],
        [0.04, 0.05, 0.01],
    ]


def test_curves_of_trust(whole) -> None:
    (axis,) = whole["curve"].figures[0].axes
    names = [line.get_label().partition(",")[0] for line in axis.lines]
    assert names == [*NAMES, "RTS-A"]
    for line, name in zip(axis.lines, names, strict=True):
        assert list(line.get_ydata()) == results().trust("resnet", name).shares()


def test_roc(whole) -> None:
    (axis,) = whole["detector-roc"].figures[0].axes
    names = ["PGD", *(f"ADV2 on {name}" for name in NAMES)]
    assert [line.get_label() for line in axis.lines] == [f"{name}, area 1.000" for name in names]


@pytest.mark.usefixtures("undrawn_here")
@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        ([without(attack="patch")], ["figure-11-resnet"]),
        ([without(attack="class")], ["figure-12-resnet", "figure-13-l1", "figure-13-iou"]),
        ([without(attack="StADV2")], ["figure-10-l1", "figure-10-iou"]),
        ([without(interpreter="RTS-A")], ["figure-15-l1", "figure-16-l1"]),
        ([setting({"success": 0.0})], [s for s in STEMS if s not in (*GRIDS, "curve")]),
        ([without(attack="curve")], ["curve"]),
    ],
)
def test_missing_rows_leave_figures_out(changes, gone: list[str]) -> None:
    shown = [p for p in pictures(count=1) if all(change(p._asdict()) for change in changes)]
    every = built(*changes, shown=shown)
    assert [stem for stem in STEMS if stem not in every] == gone
    assert built(*changes, shown=pictures(count=0)).keys() == every.keys() - {*GRIDS}


@pytest.mark.usefixtures("undrawn_here")
def test_skin_lesions_have_figures_of_their_own() -> None:
    skin = replace(SETTINGS, images="isic:lesions=/data")
    every = built(settings=skin, shown=pictures(count=1))
    assert list(every)[:3] == ["figure-07-resnet", "figure-08-l1", "figure-08-iou"]
    assert list(every)[3:] == STEMS[3:]
    assert every["figure-08-l1"].number == "Figure 8"
    assert len(SPECS) == len(STEMS) - 3

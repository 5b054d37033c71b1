# SPDX-License-Identifier: MIT
"""Pictures: made from tensors, of the right size and colours, without pyplot's global state."""

from __future__ import annotations

import io
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from captum_adv2.attacks.loop import Progress
from captum_adv2.evaluation.visualize import bands, curves, grid, overlay

RED, BLUE = (0.5, 0.0, 0.0), (0.0, 0.0, 0.5)  # the ends of jet


def shown(batch: int = 2, channels: int = 3) -> dict[str, tuple[Tensor, Tensor]]:
    images = torch.rand(batch, channels, 8, 8)
    return {
        "CAM": (images, torch.rand(batch, 1, 4, 4)),
        "GRAD": (images, torch.rand(batch, 1, 8, 8)),
    }


DRAWN, NOTHING, UNEQUAL = (grid, bands), ({}, {"a": {}}), {"a": shown(2), "b": shown(1)}


def is_drawn(figure: Figure) -> bool:
    """Draw a figure; return whether that gave a picture and left pyplot alone."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue().startswith(b"\x89PNG") and not plt.get_fignums()


@pytest.mark.parametrize(("channels", "size"), [(1, (1, 1)), (3, (8, 6)), (4, (20, 9))])
def test_overlays_have_the_images_size(channels: int, size: tuple[int, int]) -> None:
    heat = overlay(torch.rand(2, channels, 8, 6), torch.rand(2, 1, *size))
    assert heat.shape == (2, 3, 8, 6)
    assert ((heat >= 0) & (heat <= 1)).all()


@pytest.mark.parametrize(("value", "colour"), [(1.0, RED), (0.0, BLUE)])
def test_red_is_important(value: float, colour: tuple[float, ...]) -> None:
    heat = overlay(torch.rand(1, 3, 8, 8), torch.full((1, 1, 2, 2), value), alpha=1)
    np.testing.assert_allclose(heat[0, :, 3, 5].numpy(), colour, atol=0.01)


def test_overlays_are_a_blend_of_heat_and_grey() -> None:
    images, maps = torch.rand(1, 3, 4, 4), torch.rand(1, 1, 4, 4)
    heat, grey = overlay(images, maps, alpha=1), overlay(images, maps, alpha=0)
    torch.testing.assert_close(grey, images.mean(dim=1, keepdim=True).expand(1, 3, 4, 4))
    torch.testing.assert_close(overlay(images, maps, 0.25), 0.25 * heat + 0.75 * grey)
    torch.testing.assert_close(overlay(images, maps), 0.5 * heat + 0.5 * grey)


@pytest.mark.parametrize("shape", [(1, 1, 4, 4), (2, 3, 4, 4)])
def test_maps_that_do_not_fit_the_images_are_refused(shape: tuple[int, ...]) -> None:
    images, maps = torch.rand(2, 3, 8, 8), torch.rand(shape)
    with pytest.raises(ValueError, match=r"expected maps of shape \(2, 1, 4, 4\), got"):
        overlay(images, maps)
    with pytest.raises(ValueError, match=r"expected maps of shape \(2, 1, 4, 4\), got"):
        grid({"benign": {"CAM": (images, maps)}})


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_grids_have_a_row_for_each_input(batch: int, channels: int) -> None:
    rows = dict.fromkeys(("benign", "PGD", "ADV2"), shown(batch, channels))
    figure = grid(rows)
    assert len(figure.axes) == 3 * batch * 3
    assert grid(rows, size=2.6).get_size_inches() == pytest.approx(2 * figure.get_size_inches())
    assert is_drawn(figure)


def test_titles_captions_and_names() -> None:
    notes = {"ADV2": {"image": ["cat", "dog"], "GRAD": ["L1 0.1"]}}
    figure = grid({"benign": shown(), "ADV2": shown()}, notes)
    first, second = figure.axes[:6], figure.axes[6:]
    assert [axis.get_title() for axis in first] == ["image", "CAM", "GRAD"] * 2
    assert not any(axis.get_title() for axis in second)
    assert [axis.get_xlabel() for axis in second] == ["cat", "", "L1 0.1", "dog", "", ""]
    assert not any(axis.get_xlabel() for axis in first)
    assert [block[0].get_ylabel() for block in (first, second)] == ["benign", "ADV2"]


def test_pictures_are_the_images_and_their_overlays() -> None:
    blocks = shown()
    images, maps = blocks["GRAD"]
    axes = grid({"benign": blocks}).axes
    drawn = [np.asarray(axis.get_images()[0].get_array()) for axis in axes]
    for i in range(2):
        heat = overlay(images, maps)[i]
        np.testing.assert_allclose(drawn[3 * i], images[i].permute(1, 2, 0), atol=1e-6)
        np.testing.assert_allclose(drawn[3 * i + 2], heat.permute(1, 2, 0), atol=1e-6)


def test_curves_show_means_and_ranges() -> None:
    nan = torch.full((2,), torch.nan)  # the warm start looks at no map
    distances = (nan, torch.tensor([0.5, 0.3]), torch.tensor([0.2, 0.1]))
    records = [
        Progress(step, torch.tensor([0.1, 0.3]) * (step + 1), distance, torch.arange(2))
        for step, distance in enumerate(distances)
    ]
    figure = curves(records, size=(4, 3))
    assert is_drawn(figure)
    assert figure.get_size_inches().tolist() == [4, 3]
    confidence, distance = figure.axes
    assert [axis.get_ylabel() for axis in figure.axes] == ["confidence", "distance"]
    assert confidence.lines[0].get_xdata().tolist() == [0, 1, 2]
    np.testing.assert_allclose(confidence.lines[0].get_ydata(), [0.2, 0.4, 0.6], rtol=1e-5)
    np.testing.assert_allclose(distance.lines[0].get_ydata(), [np.nan, 0.4, 0.15], rtol=1e-5)
    (band,) = confidence.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (pytest.approx(0.1), pytest.approx(0.9))


def test_a_finished_image_keeps_its_last_values() -> None:
    rows, numbers = ([0, 1, 2], [1, 2], [2]), ([0.2, 0.4, 0.9], [0.5, 0.6], [0.3])
    records = [
        Progress(step, torch.tensor(n), torch.tensor(n) / 2, torch.tensor(r))
        for step, (r, n) in enumerate(zip(rows, numbers, strict=True))
    ]
    for axis, share in zip(curves(records).axes, (1, 2), strict=True):
        expected = np.array([0.2 + 0.4 + 0.9, 0.2 + 0.5 + 0.6, 0.2 + 0.5 + 0.3]) / 3 / share
        np.testing.assert_allclose(axis.lines[0].get_ydata(), expected, rtol=1e-5)
    # Images finished before the first record are unknown.
    confidence, _distance = curves(records[1:]).axes
    np.testing.assert_allclose(confidence.lines[0].get_ydata(), [0.55, 0.4], rtol=1e-5)


@pytest.mark.parametrize(
    ("draw", "given", "message"),
    [
        *[(draw, none, "one input, and a picture of each") for draw in DRAWN for none in NOTHING],
        *[(draw, UNEQUAL, r"of every input, got \{'a': 6, 'b': 3\}") for draw in DRAWN],
        (curves, [], "at least one record, got none; pass callback=records"),
    ],
)
def test_nothing_to_draw_is_refused(draw: Any, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(given)


@pytest.mark.parametrize(("maps", "axes"), [(1, 2), (2, 4), (4, 6)])
def test_bands_have_a_block_for_each_image_and_input(maps: int, axes: int) -> None:
    images = torch.rand(2, 3, 8, 8)
    block = {f"map {number}": (images, torch.rand(2, 1, 4, 4)) for number in range(maps)}
    notes = {"ADV2": {"image": ["a", "b"], "map 0": ["1", "2"]}}
    figure = bands({"benign": block, "ADV2": block}, notes)
    assert is_drawn(figure)
    assert len(figure.subfigs) == 4
    for number, part in enumerate(figure.subfigs):
        image, first, *_ = part.axes
        assert len(part.axes) == axes
        assert np.allclose(image.images[0].get_array(), images[number // 2].permute(1, 2, 0))
        assert [axis.get_title() for axis in part.axes][: maps + 1] == ["image", *block]
        texts = [image.get_xlabel(), first.get_xlabel()]
        assert texts == (["ab"[number // 2], "12"[number // 2]] if number % 2 else ["", ""])

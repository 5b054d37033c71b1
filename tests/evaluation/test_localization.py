# SPDX-License-Identifier: MIT
"""Boxes equal OpenCV's, map by map; misses equal exact arithmetic."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from captum_adv2.evaluation.localization import THRESHOLDS, boxes, errors, wrong
from captum_adv2.study.embedded.shapes import make_shapes

Box = tuple[int, int, int, int]

seeds = st.integers(0, 2**31)
sizes = st.tuples(st.integers(1, 7), st.integers(1, 7))
thresholds = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])


def drawn(seed: int, size: tuple[int, int], batch: int = 1) -> Tensor:
    """Return maps whose values are quarters, so that some of them equal a threshold."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 5, (batch, 1, *size), generator=generator) / 4


def size_of(maps: Tensor) -> tuple[int, int]:
    return maps.shape[2], maps.shape[3]


def box_of(maps: Tensor, **settings: Any) -> list[int]:
    """Return the box of one map at its own size."""
    (found,) = boxes(maps, size_of(maps), **settings).tolist()
    return found


def largest(maps: Tensor, threshold: float) -> list[list[int]]:
    """Return OpenCV's boxes of the largest components of one map: more than one where they tie."""
    above = (maps[0, 0] > threshold).numpy().astype(np.uint8)
    _, _, (_, *components), _ = cv2.connectedComponentsWithStats(above, connectivity=8)
    most = max((area for *_, area in components), default=0)
    found = [[x, y, x + w, y + h] for x, y, w, h, area in components if area == most]
    return found or [[0, 0, 0, 0]]


# Boxes


@given(seeds, sizes, thresholds)
def test_boxes_are_opencvs(seed: int, size: tuple[int, int], threshold: float) -> None:
    maps = drawn(seed, size)
    assert box_of(maps, threshold=threshold) in largest(maps, threshold)


# Each map, and its box.
CASES = {
    "diagonal neighbours are one component": (["...#", ".##.", "#..."], [0, 0, 4, 3]),
    "pixels two apart are two": (["#.##"], [2, 0, 4, 1]),
    "pixels count, not the area of the box": (
        ["#....###", ".#...###", "..#.....", "...#...."],
        [5, 0, 8, 2],
    ),
    "nothing": (["...", "..."], [0, 0, 0, 0]),
    "everything": (["###", "###"], [0, 0, 3, 2]),
}


@pytest.mark.parametrize(("picture", "box"), CASES.values(), ids=CASES)
def test_boxes_by_hand(picture: list[str], box: list[int]) -> None:
    maps = torch.tensor([[float(letter == "#") for letter in line] for line in picture])
    assert box_of(maps[None, None]) == box


def test_a_pixel_must_exceed_the_threshold_of_one_half() -> None:
    maps = torch.tensor([[0.5, 0.51, 0.75, 0.49]])[None, None]
    assert box_of(maps) == [1, 0, 3, 1]
    assert box_of(maps, threshold=0.49) == [0, 0, 3, 1]
    assert box_of(maps, threshold=0.75) == [0, 0, 0, 0]


@given(seeds, sizes)
def test_a_batch_gives_the_boxes_of_its_maps(seed: int, size: tuple[int, int]) -> None:
    maps = drawn(seed, size, batch=3)
    found = boxes(maps, size)
    assert (found.shape, found.dtype) == ((3, 4), torch.int64)
    assert found.tolist() == [box_of(each) for each in maps.split(1)]


def test_maps_are_resized_before_they_are_cut() -> None:
    # A whole number of times as large, an edge stays where it was: half way between two pixels.
    block = torch.zeros(1, 1, 6, 5)
    block[..., 1:4, 2:5] = 1
    assert boxes(block, (18, 10)).tolist() == [[4, 3, 10, 12]]
    maps = torch.tensor([[0.0, 1.0, 0.0, 0.0]])[None, None]
    # Twice as wide: 0, 1/4, 3/4, 3/4, 1/4, 0, 0, 0.
    assert boxes(maps, (1, 8), threshold=0.2).tolist() == [[1, 0, 5, 1]]
    assert boxes(maps, (1, 8), threshold=0.8).tolist() == [[0, 0, 0, 0]]
    # Half as wide: the means of neighbours.
    assert boxes(maps, (1, 2), threshold=0.4).tolist() == [[0, 0, 1, 1]]


def test_the_box_of_an_objects_mask_is_the_objects() -> None:
    shapes = make_shapes(20, seed=5)
    found = boxes(shapes.masks.float(), size_of(shapes.masks))
    assert torch.equal(found, shapes.boxes)
    assert not wrong(found, shapes.boxes).any()


def test_maps_of_two_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected maps of shape \(1, 1, 4, 4\), got \(1, 2, "):
        boxes(torch.zeros(1, 2, 4, 4), (4, 4))


# Misses


def misses(found: Box, truth: Box, **settings: Any) -> bool:
    (answer,) = wrong(torch.tensor([found]), torch.tensor([truth]), **settings).tolist()
    return answer


def test_no_box_is_a_miss() -> None:
    assert misses((0, 0, 0, 0), (0, 0, 4, 4))
    assert misses((0, 0, 0, 0), (0, 0, 0, 0))


def area(box: Box) -> int:
    x0, y0, x1, y1 = box
    return max(0, x1 - x0) * max(0, y1 - y0)


corners = st.tuples(*[st.integers(0, 12)] * 2, *[st.integers(1, 12)] * 2).map(
    lambda c: (c[0], c[1], c[0] + c[2], c[1] + c[3])
)


@given(corners, corners, st.integers(0, 8), st.integers(0, 30), st.integers(1, 5))
@example((0, 0, 2, 1), (0, 0, 2, 2), 4, 0, 1)
@example((0, 0, 2, 2), (0, 0, 2, 2), 8, 0, 1)
def test_misses_equal_exact_arithmetic(
    found: Box, truth: Box, eighths: int, shift: int, scale: int
) -> None:
    lows = [max(pair) for pair in zip(found[:2], truth[:2], strict=True)]
    highs = [min(pair) for pair in zip(found[2:], truth[2:], strict=True)]
    both = area((lows[0], lows[1], highs[0], highs[1]))
    expected = 8 * both < eighths * (area(found) + area(truth) - both)
    assert misses(found, truth, iou=eighths / 8) == expected
    assert misses(truth, found, iou=eighths / 8) == expected
    moved = [torch.tensor([box]) * scale + shift for box in (found, truth)]
    assert wrong(*moved, iou=eighths / 8).tolist() == [expected]
    assert misses(found, truth) == misses(found, truth, iou=0.5)


def test_each_box_meets_its_own_truth() -> None:
    truth = torch.tensor([[0, 0, 4, 4], [10, 10, 14, 14], [0, 0, 4, 4]])
    answer = wrong(truth.roll(1, dims=0), truth)
    assert answer.dtype == torch.bool
    assert answer.tolist() == [False, True, True]


@given(st.lists(st.tuples(corners, st.lists(corners, min_size=1, max_size=4)), max_size=3))
def test_a_box_may_meet_any_true_one_of_its_image(images: list[tuple[Box, list[Box]]]) -> None:
    found = torch.tensor([box for box, _ in images]).view(-1, 4)
    truth = [torch.tensor(boxes) for _, boxes in images]
    expected = [all(misses(box, true) for true in boxes) for box, boxes in images]
    assert wrong(found, truth).tolist() == expected
    assert wrong(found, [boxes.flip(0) for boxes in truth]).tolist() == expected


@pytest.mark.parametrize(
    ("counts", "message"),
    [([1, 0], "a true box for every image"), ([1], "of 2 images, got those of 1")],
)
def test_images_without_a_true_box_are_refused(counts: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong(torch.zeros(2, 4), [torch.ones(count, 4) for count in counts])


# Kinds of thresholds

LEVELS = torch.tensor([[[[0.0, 0.1, 0.2, 0.3, 0.4]]]])  # of mean 0.2 and sum 1


@pytest.mark.parametrize(
    ("kind", "amount", "first"),
    [
        ("value", 0.25, 3),
        ("mean", 0.75, 2),
        ("mean", 1.0, 3),
        ("mean", 2.0, None),
        ("energy", 0.39, 4),
        ("energy", 0.5, 3),
        ("energy", 0.9, 2),
        ("energy", 1.0, 1),
    ],
)
def test_kinds_of_thresholds(kind: str, amount: float, first: int | None) -> None:
    expected = [0, 0, 0, 0] if first is None else [first, 0, 5, 1]
    assert box_of(LEVELS.double(), threshold=amount, kind=kind) == expected


@pytest.mark.parametrize("kind", ["mean", "energy"])
def test_mean_and_energy_do_not_depend_on_scale(kind: str) -> None:
    maps = torch.rand(1, 1, 9, 9, dtype=torch.float64)
    assert box_of(maps, threshold=0.7, kind=kind) == box_of(maps / 4, threshold=0.7, kind=kind)
    assert box_of(torch.zeros(1, 1, 3, 3), threshold=0.5, kind=kind) == [0, 0, 0, 0]


def test_errors_are_those_of_each_threshold() -> None:
    maps, truth = torch.rand(3, 1, 8, 8), torch.tensor([[0, 0, 8, 8], [2, 2, 5, 5], [1, 0, 4, 8]])
    found = errors(maps, (8, 8), truth)
    assert found.shape == (3, len(THRESHOLDS))
    for column, (kind, amount) in zip(found.T, THRESHOLDS, strict=True):
        assert column.equal(wrong(boxes(maps, (8, 8), amount, kind), truth))

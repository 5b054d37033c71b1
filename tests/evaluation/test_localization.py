# SPDX-License-Identifier: MIT
"""Boxes equal those of a flood fill, map by map, and move with the map; misses by hand."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from captum_adv2.evaluation.localization import boxes, wrong
from captum_adv2.study.embedded.shapes import make_shapes

Box = tuple[int, int, int, int]

seeds = st.integers(0, 2**31)
sizes = st.tuples(st.integers(1, 7), st.integers(1, 7))
thresholds = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])


def drawn(seed: int, size: tuple[int, int], batch: int = 1) -> Tensor:
    """Return maps whose values are quarters, so that some of them equal a threshold."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 5, (batch, 1, *size), generator=generator) / 4


def rectangle(size: tuple[int, int], box: Box, value: float = 1.0) -> Tensor:
    """Return a map that is zero but for a box."""
    x0, y0, x1, y1 = box
    maps = torch.zeros(1, 1, *size)
    maps[..., y0:y1, x0:x1] = value
    return maps


def size_of(maps: Tensor) -> tuple[int, int]:
    return maps.shape[2], maps.shape[3]


def box_of(maps: Tensor, **settings: Any) -> list[int]:
    """Return the box of one map at its own size."""
    (found,) = boxes(maps, size_of(maps), **settings).tolist()
    return found


def filled(maps: Tensor, threshold: float) -> list[list[int]]:
    """Return the boxes of the largest components of one map: more than one where they tie."""
    above = {
        (y, x)
        for y, x in product(*map(range, size_of(maps)))
        if float(maps[0, 0, y, x]) > threshold
    }
    found: list[tuple[int, list[int]]] = []
    while above:
        grown, edge = set(), [above.pop()]
        while edge:
            y, x = edge.pop()
            grown.add((y, x))
            near = set(product((y - 1, y, y + 1), (x - 1, x, x + 1))) & above
            above -= near
            edge += near
        ys, xs = zip(*grown, strict=True)
        found.append((len(grown), [min(xs), min(ys), max(xs) + 1, max(ys) + 1]))
    largest = max((size for size, _ in found), default=0)
    return [box for size, box in found if size == largest] or [[0, 0, 0, 0]]


def unique(maps: Tensor, threshold: float = 0.5) -> list[int]:
    """Return the box of one map with one largest component; leave others out."""
    candidates = filled(maps, threshold)
    assume(len(candidates) == 1)
    return candidates[0]


@st.composite
def placed(draw: Any, least: int = 1, sides: int = 7) -> tuple[tuple[int, int], Box]:
    """Draw a size and a box in it, of a least width and height."""
    spans = []
    for _ in range(2):
        side = draw(st.integers(least, sides))
        low = draw(st.integers(0, side - least))
        spans.append((side, low, draw(st.integers(low + least, side))))
    (height, y0, y1), (width, x0, x1) = spans
    return (height, width), (x0, y0, x1, y1)


# Boxes


@given(seeds, sizes, thresholds)
def test_boxes_are_those_of_a_flood_fill(
    seed: int, size: tuple[int, int], threshold: float
) -> None:
    maps = drawn(seed, size)
    assert box_of(maps, threshold=threshold) in filled(maps, threshold)


@given(placed(), st.sampled_from([0.25, 0.5, 1.0]))
def test_a_rectangle_is_its_own_box(where: tuple[tuple[int, int], Box], value: float) -> None:
    size, box = where
    assert box_of(rectangle(size, box, value), threshold=0.0) == list(box)


def test_the_larger_of_two_components_counts() -> None:
    small, large = rectangle((6, 9), (0, 0, 2, 2)), rectangle((6, 9), (5, 3, 8, 5))
    assert box_of(small + large) == [5, 3, 8, 5]
    assert box_of(small + large.flip(3) * 0.4) == [0, 0, 2, 2]  # not above the threshold


def test_pixels_count_not_the_area_of_the_box() -> None:
    maps = torch.zeros(1, 1, 5, 8)
    maps[0, 0, range(4), range(4)] = 1  # four pixels, a box of sixteen
    maps[0, 0, 0:2, 5:8] = 1  # six pixels, a box of six
    assert box_of(maps) == [5, 0, 8, 2]


def test_diagonal_neighbours_are_one_component() -> None:
    maps = torch.eye(4).flip(1)[None, None]
    maps[0, 0, 0, 3] = 0
    assert box_of(maps) == [0, 1, 3, 4]


def test_pixels_two_apart_are_two_components() -> None:
    maps = torch.tensor([[1.0, 0.0, 1.0, 1.0]])[None, None]
    assert box_of(maps) == [2, 0, 4, 1]


@pytest.mark.parametrize(("value", "threshold"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_a_pixel_must_exceed_the_threshold(value: float, threshold: float) -> None:
    maps = torch.full((1, 1, 2, 3), value)
    assert box_of(maps, threshold=threshold) == [0, 0, 0, 0]
    if value:
        assert box_of(maps, threshold=threshold - 1e-6) == [0, 0, 3, 2]


def test_the_threshold_is_one_half_by_default() -> None:
    maps = torch.tensor([[0.5, 0.51, 0.75, 0.49]])[None, None]
    assert box_of(maps) == [1, 0, 3, 1]


@given(seeds, sizes)
def test_a_batch_gives_the_boxes_of_its_maps(seed: int, size: tuple[int, int]) -> None:
    maps = drawn(seed, size, batch=3)
    found = boxes(maps, size)
    assert (found.shape, found.dtype) == ((3, 4), torch.int64)
    assert found.tolist() == [box_of(each) for each in maps.split(1)]


@given(seeds, sizes, sizes, sizes)
def test_boxes_move_with_the_map(
    seed: int, size: tuple[int, int], before: tuple[int, int], after: tuple[int, int]
) -> None:
    maps = drawn(seed, size)
    x0, y0, x1, y1 = unique(maps)
    assume(x1 > 0)
    (up, left), (down, right) = before, after
    moved = torch.nn.functional.pad(maps, (left, right, up, down))
    assert box_of(moved) == [x0 + left, y0 + up, x1 + left, y1 + up]


@given(seeds, sizes)
def test_boxes_are_flipped_and_transposed_with_the_map(seed: int, size: tuple[int, int]) -> None:
    maps = drawn(seed, size)
    x0, y0, x1, y1 = unique(maps)
    assume(x1 > 0)
    height, width = size
    assert box_of(maps.flip(3)) == [width - x1, y0, width - x0, y1]
    assert box_of(maps.flip(2)) == [x0, height - y1, x1, height - y0]
    assert box_of(maps.transpose(2, 3)) == [y0, x0, y1, x1]


@given(placed(least=2, sides=5), st.integers(1, 4), st.integers(1, 4))
def test_boxes_grow_with_the_image(
    where: tuple[tuple[int, int], Box], down: int, across: int
) -> None:
    # Half way from a pixel to the next, bilinear values cross one half: at the box's own edge.
    (height, width), (x0, y0, x1, y1) = where
    found = boxes(rectangle(*where), (height * down, width * across))
    assert found.tolist() == [[x0 * across, y0 * down, x1 * across, y1 * down]]


def test_maps_are_resized_before_they_are_cut() -> None:
    maps = torch.tensor([[0.0, 1.0, 0.0, 0.0]])[None, None]
    # Twice as wide: 0, 1/4, 3/4, 3/4, 1/4, 0, 0, 0.
    assert boxes(maps, (1, 8), threshold=0.2).tolist() == [[1, 0, 5, 1]]
    assert boxes(maps, (1, 8), threshold=0.8).tolist() == [[0, 0, 0, 0]]
    # Half as wide: the means of neighbours.
    assert boxes(maps, (1, 2), threshold=0.4).tolist() == [[0, 0, 1, 1]]


def test_boxes_leave_maps_and_their_graph_alone() -> None:
    maps = drawn(0, (4, 4)).requires_grad_()
    before = maps.detach().clone()
    assert not boxes(maps, (4, 4)).requires_grad
    assert torch.equal(maps, before)
    assert maps.grad is None


def test_the_box_of_an_objects_mask_is_the_objects() -> None:
    shapes = make_shapes(20, seed=5)
    found = boxes(shapes.masks.float(), size_of(shapes.masks))
    assert torch.equal(found, shapes.boxes)
    assert not wrong(found, shapes.boxes).any()


@pytest.mark.parametrize(
    ("maps", "error", "match"),
    [
        (torch.zeros(1, 4, 4), ValueError, "4 dimensions"),
        (torch.zeros(0, 1, 4, 4), ValueError, "at least one entry"),
        (torch.full((1, 1, 4, 4), 1.1), ValueError, r"in \[0, 1\]"),
        (torch.full((1, 1, 4, 4), -0.1), ValueError, r"in \[0, 1\]"),
        (torch.full((1, 1, 4, 4), torch.nan), ValueError, "finite"),
        (torch.zeros(1, 1, 4, 4, dtype=torch.int64), TypeError, "floating dtype"),
        ([[0.0]], TypeError, "torch.Tensor"),
    ],
)
def test_bad_maps(maps: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        boxes(maps, (4, 4))
    assert "maps" in str(caught.value)


@pytest.mark.parametrize(
    ("threshold", "error"),
    [(-0.1, ValueError), (1.1, ValueError), (float("nan"), ValueError), ("half", TypeError)],
)
def test_bad_thresholds(threshold: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="expected threshold"):
        boxes(torch.zeros(1, 1, 4, 4), (4, 4), threshold)


# Misses


def misses(found: Box, truth: Box, **settings: Any) -> bool:
    (answer,) = wrong(torch.tensor([found]), torch.tensor([truth]), **settings).tolist()
    return answer


@pytest.mark.parametrize(
    ("found", "iou"),
    [
        ((0, 0, 4, 4), 1.0),
        ((0, 0, 4, 2), 8 / 16),
        ((0, 0, 4, 8), 16 / 32),
        ((1, 1, 5, 5), 9 / 23),
        ((1, 1, 3, 3), 4 / 16),
        ((0, 2, 4, 5), 8 / 20),
        ((4, 0, 8, 4), 0.0),
        ((5, 6, 7, 8), 0.0),
    ],
)
def test_misses_by_hand(found: Box, iou: float) -> None:
    truth = (0, 0, 4, 4)
    assert misses(found, truth) == misses(truth, found) == (iou < 0.5)
    assert not misses(found, truth, iou=max(0.0, iou - 1e-3))
    assert iou == 1.0 or misses(found, truth, iou=iou + 1e-3)


def test_an_overlap_of_one_half_is_enough() -> None:
    assert not misses((0, 0, 4, 2), (0, 0, 4, 4))
    assert misses((0, 0, 40, 19), (0, 0, 40, 40))


def test_no_box_is_a_miss() -> None:
    assert misses((0, 0, 0, 0), (0, 0, 4, 4))
    assert misses((0, 0, 0, 0), (0, 0, 0, 0))


def area(box: Box) -> int:
    x0, y0, x1, y1 = box
    return max(0, x1 - x0) * max(0, y1 - y0)


corners = st.tuples(*[st.integers(0, 12)] * 2, *[st.integers(1, 12)] * 2).map(
    lambda c: (c[0], c[1], c[0] + c[2], c[1] + c[3])
)


@given(corners, corners, st.integers(0, 30), st.integers(1, 5))
@example((0, 0, 2, 1), (0, 0, 2, 2), 0, 1)
def test_misses_equal_exact_arithmetic(found: Box, truth: Box, shift: int, scale: int) -> None:
    lows = [max(pair) for pair in zip(found[:2], truth[:2], strict=True)]
    highs = [min(pair) for pair in zip(found[2:], truth[2:], strict=True)]
    both = area((lows[0], lows[1], highs[0], highs[1]))
    expected = 2 * both < area(found) + area(truth) - both
    assert misses(found, truth) == misses(truth, found) == expected
    moved = [torch.tensor([box]) * scale + shift for box in (found, truth)]
    assert wrong(*moved).tolist() == [expected]


def test_each_box_meets_its_own_truth() -> None:
    truth = torch.tensor([[0, 0, 4, 4], [10, 10, 14, 14], [0, 0, 4, 4]])
    answer = wrong(truth.roll(1, dims=0), truth)
    assert answer.dtype == torch.bool
    assert answer.tolist() == [False, True, True]
    assert wrong(truth, truth).tolist() == [False] * 3


@given(st.lists(st.tuples(corners, st.lists(corners, min_size=1, max_size=4)), max_size=3))
def test_a_box_may_meet_any_true_one_of_its_image(images: list[tuple[Box, list[Box]]]) -> None:
    found = torch.tensor([box for box, _ in images]).view(-1, 4)
    truth = [torch.tensor(boxes) for _, boxes in images]
    expected = [all(misses(box, true) for true in boxes) for box, boxes in images]
    assert wrong(found, truth).tolist() == expected
    assert wrong(found, [boxes.flip(0) for boxes in truth]).tolist() == expected


def test_the_second_true_box_counts() -> None:
    truth = torch.tensor([[0, 0, 4, 4], [10, 10, 14, 14]])
    assert wrong(truth[1:], [truth]).tolist() == [False]
    assert wrong(truth[1:], [truth[:1]]).tolist() == [True]
    # A half of one and a half of another is neither.
    assert wrong(torch.tensor([[2, 0, 6, 4]]), torch.tensor([[[0, 0, 4, 4], [4, 0, 8, 4]]])).all()


def test_an_image_without_a_true_box_is_refused() -> None:
    with pytest.raises(ValueError, match="a true box for every image"):
        wrong(torch.zeros(2, 4), [torch.ones(1, 4), torch.zeros(0, 4)])


@pytest.mark.parametrize("truth", [[(1, 4)], [(1, 4), (2, 3)], [(1, 4), (4,)], [(1, 4)] * 3])
def test_true_boxes_that_do_not_match_are_refused(truth) -> None:
    with pytest.raises(ValueError, match="as many true ones"):
        wrong(torch.zeros(2, 4), [torch.ones(shape) for shape in truth])


@pytest.mark.parametrize(
    ("found", "truth"),
    [((2, 4), (3, 4)), ((2, 3), (2, 3)), ((4,), (4,))],
)
def test_boxes_that_do_not_match_are_refused(found, truth) -> None:
    with pytest.raises(ValueError, match="as many true ones"):
        wrong(torch.zeros(found), torch.zeros(truth))


@pytest.mark.parametrize("iou", [-0.1, 1.5, 50])
def test_iou_out_of_range_is_refused(iou) -> None:
    with pytest.raises(ValueError, match="expected iou"):
        wrong(torch.zeros(1, 4), torch.zeros(1, 4), iou)


def test_maps_of_two_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        boxes(torch.zeros(1, 2, 4, 4), (4, 4))

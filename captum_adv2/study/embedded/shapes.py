# SPDX-License-Identifier: MIT
"""Coloured, textured objects on cluttered backgrounds, with exact object masks and boxes.

Every picture shows one object. Its outline is its class; its colour, texture and orientation, and
everything behind it, are drawn independently of the class. (So is its area, except that the largest
slim outlines are shrunk to fit the picture.) An attribution map that explains the class must
therefore light up on the object, and the mask says where that is.

The contrast is low on purpose, as in fog. A change of 8/255 in every pixel easily fools networks
trained on photographs, but networks trained on these pictures at full contrast resist it: there an
outline is too strong a signal. So every picture is drawn at full contrast, then shrunk to about a
quarter of it. Objects differ from what is behind them by some 0.1 in their clearest colour channel,
which a person still sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["CLASSES", "Shapes", "make_shapes"]

_Floats = npt.NDArray[np.float32]
_Bools = npt.NDArray[np.bool_]

# Pictures are drawn in blocks with one generator each: memory stays bounded, and a picture depends
# only on the seed and on its position. The number is a multiple of the number of classes.
_BLOCK = 50
_REFERENCE_SIZE = 64
_SMALLEST_SIZE = 16
_LARGEST_SEED = 2**63 - 1
_AREA_RANGE = (0.08, 0.30)
# A slim outline with a large area would not fit the picture; its radius stops here instead.
_LARGEST_RADIUS = 0.47
_CLUTTER_PIECES = 14
# No piece of clutter extends farther from its centre, in pixels of the reference size.
_CLUTTER_REACH = 10.5
# Chosen such that attacks of 8/255 do as well here as on networks trained on photographs.
_CONTRAST_RANGE = (0.20, 0.30)
_NOISE = 0.005
# Four samples per pixel give edges that are smooth enough without slowing the drawing much.
_SUBPIXELS = (-0.25, 0.25)


class Shapes(NamedTuple):
    """Pictures with the ground truth that attribution maps are compared with.

    Attributes:
        images: (N, 3, H, W) float32 in [0, 1], each value a multiple of 1/255.
        labels: (N,) int64, positions in `CLASSES`.
        masks: (N, 1, H, W) bool, true on the object.
        boxes: (N, 4) int64, the masks' bounding boxes (x0, y0, x1, y1), x1 and y1 exclusive.
    """

    images: torch.Tensor
    labels: torch.Tensor
    masks: torch.Tensor
    boxes: torch.Tensor


# Outlines: each function says which points (x, y) belong to the object. All of them lie in the
# unit disc and equal their own mirror images, so flips and turns never change a class.


def _disc(x: _Floats, y: _Floats) -> _Bools:
    return x**2 + y**2 <= 1.0


def _ring(x: _Floats, y: _Floats) -> _Bools:
    radius = x**2 + y**2
    return (radius >= 0.3) & (radius <= 1.0)


def _square(x: _Floats, y: _Floats) -> _Bools:
    return np.maximum(np.abs(x), np.abs(y)) <= math.sqrt(0.5)


def _triangle(x: _Floats, y: _Floats) -> _Bools:
    return np.maximum(-y, math.sqrt(0.75) * np.abs(x) + 0.5 * y) <= 0.5


def _star(x: _Floats, y: _Floats) -> _Bools:
    # Folding the ten half-sectors onto one leaves a single straight edge to test.
    step = 2.0 * math.pi / 5.0
    angle = np.abs(np.mod(np.arctan2(x, y) + step / 2.0, step) - step / 2.0)
    radius = np.hypot(x, y)
    inner_x, inner_y = 0.42 * math.cos(step / 2.0), 0.42 * math.sin(step / 2.0)
    along, across = radius * np.cos(angle), radius * np.sin(angle)
    return (inner_x - 1.0) * across - inner_y * (along - 1.0) >= 0.0


def _cross(x: _Floats, y: _Floats) -> _Bools:
    x, y = np.abs(x), np.abs(y)
    return (np.minimum(x, y) <= 0.32) & (np.maximum(x, y) <= 0.94)


def _crescent(x: _Floats, y: _Floats) -> _Bools:
    return (x**2 + y**2 <= 1.0) & ((x - 0.45) ** 2 + y**2 >= 0.64)


def _heart(x: _Floats, y: _Floats) -> _Bools:
    # The sextic heart curve, shrunk and shifted into the unit disc.
    x, y = 1.3 * x, 1.3 * y + 0.18
    return (x**2 + y**2 - 1.0) ** 3 <= x**2 * y**3


def _arrow(x: _Floats, y: _Floats) -> _Bools:
    x = np.abs(x)
    head = (y >= 0.05) & (x <= 0.8 * (1.0 - y))
    shaft = (y >= -0.95) & (y <= 0.05) & (x <= 0.25)
    return head | shaft


def _hourglass(x: _Floats, y: _Floats) -> _Bools:
    y = np.abs(y)
    return (y <= 0.8) & (np.abs(x) <= 0.1 + 0.625 * y)


_OUTLINES: dict[str, Callable[[_Floats, _Floats], _Bools]] = {
    "disc": _disc,
    "ring": _ring,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "crescent": _crescent,
    "heart": _heart,
    "arrow": _arrow,
    "hourglass": _hourglass,
}

CLASSES: tuple[str, ...] = tuple(_OUTLINES)
"""The ten class names, in label order."""


# Textures: each function maps points, in units of the texture's period, to a weight in [0, 1]
# between the object's two colours.


def _stripes(u: _Floats, v: _Floats, rng: np.random.Generator) -> _Floats:
    return (np.mod(u, 1.0) < 0.5).astype(np.float32)


def _checker(u: _Floats, v: _Floats, rng: np.random.Generator) -> _Floats:
    return ((np.mod(u, 1.0) < 0.5) ^ (np.mod(v, 1.0) < 0.5)).astype(np.float32)


def _dots(u: _Floats, v: _Floats, rng: np.random.Generator) -> _Floats:
    distance = np.hypot(np.mod(u, 1.0) - 0.5, np.mod(v, 1.0) - 0.5)
    return (distance < 0.3).astype(np.float32)


def _noise(u: _Floats, v: _Floats, rng: np.random.Generator) -> _Floats:
    return rng.random(u.shape, dtype=np.float32)


def _gradient(u: _Floats, v: _Floats, rng: np.random.Generator) -> _Floats:
    weights: _Floats = np.clip(0.5 + 0.12 * u, 0.0, 1.0)
    return weights


_TEXTURES = (_stripes, _checker, _dots, _noise, _gradient)


def _uniform(rng: np.random.Generator, low: float, high: float, *shape: int) -> _Floats:
    """Return float32 values between `low` and `high`."""
    return low + (high - low) * rng.random(shape, dtype=np.float32)


def _per_picture(values: _Floats) -> _Floats:
    """Give one value per picture, (n,), the shape (n, 1, 1) that broadcasts over pixels."""
    return values[:, None, None]


@cache
def _unit_area(name: str) -> float:
    """Measure the area of an outline at scale one."""
    line = np.linspace(-1.0, 1.0, 401, dtype=np.float32)
    x, y = np.meshgrid(line, line)
    return 4.0 * float(_OUTLINES[name](x, y).mean())


def _frame(
    size: int, centre: _Floats, angle: _Floats, offset: tuple[float, float] = (0.0, 0.0)
) -> tuple[_Floats, _Floats]:
    """Return pixel coordinates, in pixels, as seen from moved and turned objects.

    Args:
        size: side of the picture.
        centre: (n, 2), x and y of the objects in pixels.
        angle: (n,), their orientation in radians.
        offset: position of the sample inside its pixel, as seen from the pixel's middle.

    Returns:
        x and y, (n, size, size) each.
    """
    line = np.arange(size, dtype=np.float32) + 0.5
    x = (line + offset[0])[None, None, :] - _per_picture(centre[:, 0])
    y = (line + offset[1])[None, :, None] - _per_picture(centre[:, 1])
    cosine, sine = _per_picture(np.cos(angle)), _per_picture(np.sin(angle))
    return cosine * x + sine * y, cosine * y - sine * x


def _smooth_noise(rng: np.random.Generator, count: int, size: int, cells: int) -> _Floats:
    """Return (count, 3, size, size) values in [0, 1], interpolated from a coarse random grid."""
    position = np.linspace(0.0, cells - 1.0, size, dtype=np.float32)
    nodes = np.arange(cells, dtype=np.float32)
    weights = np.maximum(0.0, 1.0 - np.abs(position[:, None] - nodes[None, :]))
    grid = rng.random((count, 3, cells, cells), dtype=np.float32)
    smooth: _Floats = weights @ grid @ weights.T
    return smooth


def _paint(images: _Floats, coverage: _Floats, colours: _Floats) -> None:
    """Blend colours into pictures in place.

    Args:
        images: (n, 3, size, size), changed.
        coverage: (n, size, size) in [0, 1].
        colours: (n, 3, size, size), or anything that broadcasts to it, in [0, 1].
    """
    images += coverage[:, None] * (colours - images)


def _clutter_shapes(
    rng: np.random.Generator, count: int
) -> tuple[_Bools, _Floats, _Floats, _Floats]:
    """Draw the proportions of blobs, lines and patches, which are all rounded boxes.

    Returns:
        Whether each piece is a patch, its half width, its half height and the radius by which the
        box is grown, (count,) each, in pixels of a picture of the reference size.
    """
    kind = rng.integers(3, size=count)
    length, thin = _uniform(rng, 3, 9, count), _uniform(rng, 0.5, 1.0, count)
    width, height = _uniform(rng, 2, 5, count), _uniform(rng, 2, 5, count)
    stretch, round_radius = _uniform(rng, 0, 1, count), _uniform(rng, 1.5, 4.0, count)
    nothing = np.zeros_like(length)
    half_x = np.choose(kind, (stretch, length, width))
    half_y = np.choose(kind, (nothing, nothing, height))
    return kind == 2, half_x, half_y, np.choose(kind, (round_radius, thin, nothing))


def _paint_clutter(images: _Floats, rng: np.random.Generator) -> None:
    """Paint one piece of clutter on every picture, in place: a blob, a line or a striped patch."""
    count, _, size, _ = images.shape
    unit = np.float32(size / _REFERENCE_SIZE)
    patch, half_x, half_y, radius = _clutter_shapes(rng, count)
    centre = _uniform(rng, 0, size, count, 2)
    # Only a small window around each piece is drawn, which is several times faster.
    window = 2 * math.ceil(_CLUTTER_REACH * unit) + 1
    corner = np.clip(np.rint(centre).astype(np.int64) - window // 2, 0, size - window)
    x, y = _frame(window, centre - corner.astype(np.float32), _uniform(rng, 0, math.pi, count))

    out_x = np.abs(x) - _per_picture(half_x * unit)
    out_y = np.abs(y) - _per_picture(half_y * unit)
    outside = np.hypot(np.maximum(out_x, 0.0), np.maximum(out_y, 0.0))
    distance = outside + np.minimum(np.maximum(out_x, out_y), 0.0)
    coverage = np.clip(0.5 - distance + _per_picture(radius * unit), 0.0, 1.0).astype(np.float32)

    period = _per_picture(_uniform(rng, 3, 6, count) * unit)
    striped = patch[:, None, None] & (np.mod(x / period, 1.0) < 0.5)
    colours = rng.random((2, count, 3, 1, 1), dtype=np.float32)
    rows = corner[:, 1, None, None] + np.arange(window)[:, None]
    columns = corner[:, 0, None, None] + np.arange(window)
    place = (np.arange(count)[:, None, None, None], np.arange(3)[:, None, None])
    region = (*place, rows[:, None], columns[:, None])
    pieces = images[region]
    _paint(pieces, coverage, np.where(striped[:, None], colours[0], colours[1]))
    images[region] = pieces


def _background(rng: np.random.Generator, count: int, size: int) -> _Floats:
    """Return (count, 3, size, size) cluttered backgrounds in [0, 1]."""
    images = 0.8 * _smooth_noise(rng, count, size, 5) + 0.2 * _smooth_noise(rng, count, size, 17)
    for _ in range(_CLUTTER_PIECES):
        _paint_clutter(images, rng)
    return images


def _soften(images: _Floats, rng: np.random.Generator) -> _Floats:
    """Return pictures (n, 3, size, size) at low contrast around mid-grey."""
    contrast = _uniform(rng, *_CONTRAST_RANGE, len(images), 1, 1, 1)
    softened: _Floats = np.float32(0.5) + contrast * (images - np.float32(0.5))
    return softened


def _coverage(
    labels: npt.NDArray[np.int64], centre: _Floats, angle: _Floats, radius: _Floats, size: int
) -> _Floats:
    """Return how much of each pixel the objects cover: (n, size, size) in [0, 1]."""
    total = np.zeros((len(labels), size, size), dtype=np.float32)
    for label, outline in enumerate(_OUTLINES.values()):
        chosen = np.flatnonzero(labels == label)
        scale = _per_picture(1.0 / radius[chosen])
        for dx in _SUBPIXELS:
            for dy in _SUBPIXELS:
                x, y = _frame(size, centre[chosen], angle[chosen], (dx, dy))
                total[chosen] += outline(x * scale, y * scale)
    return total / np.float32(len(_SUBPIXELS) ** 2)


def _texture(rng: np.random.Generator, centre: _Floats, size: int) -> _Floats:
    """Return random texture weights, (n, 1, size, size) in [0, 1]."""
    count = len(centre)
    unit = size / _REFERENCE_SIZE
    x, y = _frame(size, centre, _uniform(rng, 0, 2.0 * math.pi, count))
    period = _per_picture(_uniform(rng, 4, 8, count)) * np.float32(unit)
    kinds = rng.integers(len(_TEXTURES), size=count)
    weights = np.empty((count, 1, size, size), dtype=np.float32)
    for kind, texture in enumerate(_TEXTURES):
        chosen = np.flatnonzero(kinds == kind)
        u, v = x[chosen] / period[chosen], y[chosen] / period[chosen]
        weights[chosen, 0] = texture(u, v, rng)
    return weights


def _colours(rng: np.random.Generator, background: _Floats) -> tuple[_Floats, _Floats]:
    """Return two object colours, (n, 3, 1, 1) each, the first unlike the background's mean."""
    count = len(background)
    candidates = rng.random((3, count, 3), dtype=np.float32)
    contrast = np.abs(candidates - background.mean(axis=(2, 3))).sum(axis=2)
    first = candidates[contrast.argmax(axis=0), np.arange(count)]
    # The second colour leans towards the first, or the texture would hide the outline.
    lean = _uniform(rng, 0.3, 0.7, count, 1)
    second = first + lean * (rng.random((count, 3), dtype=np.float32) - first)
    return first[:, :, None, None], second[:, :, None, None]


def _radius(rng: np.random.Generator, labels: npt.NDArray[np.int64], size: int) -> _Floats:
    """Draw the objects' radii, (n,) in pixels, such that their areas are spread evenly."""
    unit_areas = np.array([_unit_area(name) for name in CLASSES], dtype=np.float32)
    areas = _uniform(rng, *_AREA_RANGE, len(labels)) * size**2
    radius: _Floats = np.minimum(np.sqrt(areas / unit_areas[labels]), _LARGEST_RADIUS * size)
    return radius


def _bounding_boxes(masks: _Bools) -> npt.NDArray[np.int64]:
    """Return the (n, 4) boxes of (n, size, size) masks that each hold a true pixel."""
    size = masks.shape[-1]
    columns, rows = np.any(masks, axis=1), np.any(masks, axis=2)
    first_x, first_y = columns.argmax(axis=1), rows.argmax(axis=1)
    last_x, last_y = columns[:, ::-1].argmax(axis=1), rows[:, ::-1].argmax(axis=1)
    return np.stack([first_x, first_y, size - last_x, size - last_y], axis=1).astype(np.int64)


def _draw_block(seed: int, block: int, size: int) -> Shapes:
    """Draw the `_BLOCK` pictures of one block."""
    rng = np.random.default_rng([seed, block])
    # Shuffling ten at a time keeps the classes balanced wherever the data set ends.
    rounds = np.tile(np.arange(len(CLASSES)), (_BLOCK // len(CLASSES), 1))
    labels = rng.permuted(rounds, axis=1).reshape(-1).astype(np.int64)

    images = _background(rng, _BLOCK, size)
    radius = _radius(rng, labels, size)
    centre = radius[:, None] + _uniform(rng, 0, 1, _BLOCK, 2) * (size - 2.0 * radius[:, None])
    coverage = _coverage(labels, centre, _uniform(rng, 0, 2.0 * math.pi, _BLOCK), radius, size)
    first, second = _colours(rng, images)
    _paint(images, coverage, first + _texture(rng, centre, size) * (second - first))

    images = _soften(images, rng)
    images += rng.normal(0.0, _NOISE, images.shape).astype(np.float32)
    images = np.rint(np.clip(images, 0.0, 1.0) * 255.0).astype(np.float32) / np.float32(255.0)
    masks = coverage >= 0.5
    boxes = _bounding_boxes(masks)
    parts = (images, labels, masks[:, None], boxes)
    return Shapes(*(torch.from_numpy(part) for part in parts))


def make_shapes(count: int, *, seed: int = 0, size: int = 64) -> Shapes:
    """Generate pictures of ten classes of objects, with masks and boxes.

    The classes are balanced and shuffled. The same arguments give the same pictures, and a smaller
    `count` gives the first pictures of a larger one. No global random state is read or changed.

    Args:
        count: number of pictures N, at least 1.
        seed: any integer from 0 to 2**63 - 1; different seeds give unrelated pictures.
        size: side of the square pictures, at least 16. The embedded networks expect 64.

    Returns:
        The pictures (N, 3, size, size) in [0, 1], labels, masks and boxes.

    Raises:
        ValueError: if an argument is outside its range.
    """
    if count < 1:
        raise ValueError(f"expected count >= 1, got {count}; ask for at least one picture")
    if not 0 <= seed <= _LARGEST_SEED:
        raise ValueError(f"expected seed in [0, 2**63 - 1], got {seed}; use a small whole number")
    if size < _SMALLEST_SIZE:
        raise ValueError(
            f"expected size >= {_SMALLEST_SIZE}, got {size}; outlines blur in smaller pictures"
        )
    blocks = [_draw_block(seed, block, size) for block in range(math.ceil(count / _BLOCK))]
    return Shapes(*(torch.cat(parts)[:count] for parts in zip(*blocks, strict=True)))

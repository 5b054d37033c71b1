# SPDX-License-Identifier: MIT
"""Coloured, textured objects on cluttered backgrounds, with exact object masks and boxes.

Every picture shows one object. Its outline is its class; its colour, texture and orientation, and
everything behind it, are drawn independently of the class. (So is its area, except that the largest
slim outlines are shrunk to fit the picture.) An attribution map that explains the class must
therefore light up on the object, and the mask says where that is.

The contrast is low on purpose. A change of 8/255 in every pixel easily fools networks trained on
photographs, but networks trained on these pictures at full contrast resist it: there an outline is
too strong a signal. So every picture is drawn at full contrast, then shrunk to about a quarter of
it. Objects differ from what is behind them by some 0.1 in their clearest colour channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torchvision.ops import masks_to_boxes

from captum_adv2.spec import Count, Index, Range, checked

Floats: TypeAlias = npt.NDArray[np.float32]
Bools: TypeAlias = npt.NDArray[np.bool_]
Side: TypeAlias = Annotated[int, Range(16, integer=True)]

_BLOCK = 50  # pictures drawn by one generator; a multiple of the number of classes
_REFERENCE_SIZE = 64  # side of the picture that lengths in pixels are meant for
_AREA_RANGE = (0.08, 0.30)  # of the object, as a share of the picture
_LARGEST_RADIUS = 0.47  # a slim outline with a large area would not fit the picture
_CLUTTER_PIECES = 14
_CLUTTER_REACH = 10.5  # no piece of clutter extends farther from its centre
_CONTRAST_RANGE = (0.20, 0.30)  # attacks of 8/255 then do as well as on photographs
_NOISE = 0.005
_SUBPIXELS = (-0.25, 0.25)  # four samples a pixel give smooth edges


class Shapes(NamedTuple):
    """Pictures with the ground truth that attribution maps are compared with.

    Attributes:
        images: ``(N, 3, H, W)`` float32 in [0, 1], each value a multiple of 1/255.
        labels: ``(N,)`` int64, positions in `CLASSES`.
        masks: ``(N, 1, H, W)`` bool, true on the object.
        boxes: ``(N, 4)`` int64, the masks' bounding boxes (x0, y0, x1, y1), x1 and y1 exclusive.
    """

    images: torch.Tensor
    labels: torch.Tensor
    masks: torch.Tensor
    boxes: torch.Tensor


# Outlines: which points (x, y) belong to the object. All of them lie in the unit disc and equal
# their own mirror images, so flips and turns never change a class.


def _star(x: Floats, y: Floats) -> Bools:
    # Folding the ten half-sectors onto one leaves a single straight edge to test.
    step = 2.0 * math.pi / 5.0
    angle = np.abs(np.mod(np.arctan2(x, y) + step / 2.0, step) - step / 2.0)
    radius = np.hypot(x, y)
    inner_x, inner_y = 0.42 * math.cos(step / 2.0), 0.42 * math.sin(step / 2.0)
    along, across = radius * np.cos(angle), radius * np.sin(angle)
    return (inner_x - 1.0) * across - inner_y * (along - 1.0) >= 0.0


def _heart(x: Floats, y: Floats) -> Bools:
    # The sextic heart curve, shrunk and shifted into the unit disc.
    x, y = 1.3 * x, 1.3 * y + 0.18
    return (x**2 + y**2 - 1.0) ** 3 <= x**2 * y**3


_OUTLINES: dict[str, Callable[[Floats, Floats], Bools]] = {
    "disc": lambda x, y: x**2 + y**2 <= 1.0,
    "ring": lambda x, y: (x**2 + y**2 >= 0.3) & (x**2 + y**2 <= 1.0),
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) <= math.sqrt(0.5),
    "triangle": lambda x, y: np.maximum(-y, math.sqrt(0.75) * np.abs(x) + 0.5 * y) <= 0.5,
    "star": _star,
    "cross": lambda x, y: (
        (np.minimum(np.abs(x), np.abs(y)) <= 0.32) & (np.maximum(np.abs(x), np.abs(y)) <= 0.94)
    ),
    "crescent": lambda x, y: (x**2 + y**2 <= 1.0) & ((x - 0.45) ** 2 + y**2 >= 0.64),
    "heart": _heart,
    "arrow": lambda x, y: (  # head, shaft
        ((y >= 0.05) & (np.abs(x) <= 0.8 * (1.0 - y)))
        | ((y >= -0.95) & (y <= 0.05) & (np.abs(x) <= 0.25))
    ),
    "hourglass": lambda x, y: (np.abs(y) <= 0.8) & (np.abs(x) <= 0.1 + 0.625 * np.abs(y)),
}

CLASSES: tuple[str, ...] = tuple(_OUTLINES)
"""The ten class names, in label order."""

# Textures: points, in units of the texture's period, to a weight between the object's two colours.
_TEXTURES: tuple[Callable[[Floats, Floats, np.random.Generator], npt.NDArray[Any]], ...] = (
    lambda u, v, rng: np.mod(u, 1.0) < 0.5,  # stripes
    lambda u, v, rng: (np.mod(u, 1.0) < 0.5) ^ (np.mod(v, 1.0) < 0.5),  # checks
    lambda u, v, rng: np.hypot(np.mod(u, 1.0) - 0.5, np.mod(v, 1.0) - 0.5) < 0.3,  # dots
    lambda u, v, rng: rng.random(u.shape, dtype=np.float32),  # noise
    lambda u, v, rng: np.clip(0.5 + 0.12 * u, 0.0, 1.0),  # gradient
)


def _uniform(rng: np.random.Generator, low: float, high: float, *shape: int) -> Floats:
    """Return float32 values between ``low`` and ``high``."""
    return low + (high - low) * rng.random(shape, dtype=np.float32)


def _over_pixels(values: Floats) -> Floats:
    """Give one value a picture, ``(n,)``, the shape ``(n, 1, 1)``."""
    return values[:, None, None]


def _frame(
    size: int, centre: Floats, angle: Floats, offset: tuple[float, float] = (0.0, 0.0)
) -> tuple[Floats, Floats]:
    """Return pixel coordinates x and y ``(n, size, size)`` as seen from moved and turned objects.

    Centres ``(n, 2)`` are in pixels, angles ``(n,)`` in radians, offsets from a pixel's middle.
    """
    line = np.arange(size, dtype=np.float32) + 0.5
    x = (line + offset[0])[None, None, :] - _over_pixels(centre[:, 0])
    y = (line + offset[1])[None, :, None] - _over_pixels(centre[:, 1])
    cosine, sine = _over_pixels(np.cos(angle)), _over_pixels(np.sin(angle))
    return cosine * x + sine * y, cosine * y - sine * x


def _smooth_noise(rng: np.random.Generator, count: int, size: int, cells: int) -> Floats:
    """Return ``(count, 3, size, size)`` in [0, 1], interpolated from a coarse random grid."""
    position = np.linspace(0.0, cells - 1.0, size, dtype=np.float32)
    nodes = np.arange(cells, dtype=np.float32)
    weights = np.maximum(0.0, 1.0 - np.abs(position[:, None] - nodes[None, :]))
    grid = rng.random((count, 3, cells, cells), dtype=np.float32)
    return np.asarray(weights @ grid @ weights.T)


def _paint(images: Floats, coverage: Floats, colours: Floats) -> None:
    """Blend colours into pictures, in place, by how much of each pixel ``(n, h, w)`` is covered."""
    images += coverage[:, None] * (colours - images)


def _clutter_shapes(rng: np.random.Generator, count: int) -> tuple[Bools, Floats, Floats, Floats]:
    """Draw the proportions of blobs, lines and patches, which are all rounded boxes.

    Returns whether each piece is a patch, its half width, its half height and the radius by which
    the box is grown, ``(count,)`` each, in pixels of the reference size.
    """
    kind = rng.integers(3, size=count)
    length, thin = _uniform(rng, 3, 9, count), _uniform(rng, 0.5, 1.0, count)
    width, height = _uniform(rng, 2, 5, count), _uniform(rng, 2, 5, count)
    stretch, round_radius = _uniform(rng, 0, 1, count), _uniform(rng, 1.5, 4.0, count)
    nothing = np.zeros_like(length)
    half_x = np.choose(kind, (stretch, length, width))
    half_y = np.choose(kind, (nothing, nothing, height))
    return kind == 2, half_x, half_y, np.choose(kind, (round_radius, thin, nothing))


def _paint_clutter(images: Floats, rng: np.random.Generator) -> None:
    """Paint one piece of clutter on every picture, in place: a blob, a line or a striped patch."""
    count, _, size, _ = images.shape
    unit = np.float32(size / _REFERENCE_SIZE)
    patch, half_x, half_y, radius = _clutter_shapes(rng, count)
    centre = _uniform(rng, 0, size, count, 2)
    # Only a small window around each piece is drawn, which is several times faster.
    window = 2 * math.ceil(_CLUTTER_REACH * unit) + 1
    corner = np.clip(np.rint(centre).astype(np.int64) - window // 2, 0, size - window)
    x, y = _frame(window, centre - corner.astype(np.float32), _uniform(rng, 0, math.pi, count))

    out_x = np.abs(x) - _over_pixels(half_x * unit)
    out_y = np.abs(y) - _over_pixels(half_y * unit)
    outside = np.hypot(np.maximum(out_x, 0.0), np.maximum(out_y, 0.0))
    distance = outside + np.minimum(np.maximum(out_x, out_y), 0.0)
    coverage = np.clip(0.5 - distance + _over_pixels(radius * unit), 0.0, 1.0).astype(np.float32)

    period = _over_pixels(_uniform(rng, 3, 6, count) * unit)
    striped = patch[:, None, None] & (np.mod(x / period, 1.0) < 0.5)
    colours = rng.random((2, count, 3, 1, 1), dtype=np.float32)
    for image, covered, stripes, (left, top), *pair in zip(
        images, coverage, striped, corner, *colours, strict=True
    ):
        region = image[None, :, top : top + window, left : left + window]
        _paint(region, covered[None], np.where(stripes, *pair))


def _coverage(
    labels: npt.NDArray[np.int64], centre: Floats, angle: Floats, radius: Floats, size: int
) -> Floats:
    """Return how much of each pixel the objects cover: ``(n, size, size)`` in [0, 1]."""
    total = np.zeros((len(labels), size, size), dtype=np.float32)
    for label, outline in enumerate(_OUTLINES.values()):
        chosen = np.flatnonzero(labels == label)
        scale = _over_pixels(1.0 / radius[chosen])
        for dx in _SUBPIXELS:
            for dy in _SUBPIXELS:
                x, y = _frame(size, centre[chosen], angle[chosen], (dx, dy))
                total[chosen] += outline(x * scale, y * scale)
    return total / np.float32(len(_SUBPIXELS) ** 2)


def _texture(rng: np.random.Generator, centre: Floats, size: int) -> Floats:
    """Return random texture weights ``(n, 1, size, size)`` in [0, 1]."""
    count = len(centre)
    x, y = _frame(size, centre, _uniform(rng, 0, 2.0 * math.pi, count))
    period = _over_pixels(_uniform(rng, 4, 8, count)) * np.float32(size / _REFERENCE_SIZE)
    kinds = rng.integers(len(_TEXTURES), size=count)
    weights = np.empty((count, 1, size, size), dtype=np.float32)
    for kind, texture in enumerate(_TEXTURES):
        chosen = np.flatnonzero(kinds == kind)
        weights[chosen, 0] = texture(x[chosen] / period[chosen], y[chosen] / period[chosen], rng)
    return weights


def _colours(rng: np.random.Generator, background: Floats) -> tuple[Floats, Floats]:
    """Return two object colours ``(n, 3, 1, 1)``, the first unlike the background's mean."""
    count = len(background)
    candidates = rng.random((3, count, 3), dtype=np.float32)
    contrast = np.abs(candidates - background.mean(axis=(2, 3))).sum(axis=2)
    first = candidates[contrast.argmax(axis=0), np.arange(count)]
    # The second colour leans towards the first, or the texture would hide the outline.
    lean = _uniform(rng, 0.3, 0.7, count, 1)
    second = first + lean * (rng.random((count, 3), dtype=np.float32) - first)
    return first[:, :, None, None], second[:, :, None, None]


@cache
def _unit_areas() -> Floats:
    """Measure the areas of the outlines at scale one."""
    points = np.meshgrid(*[np.linspace(-1.0, 1.0, 401, dtype=np.float32)] * 2)
    areas = [4.0 * float(outline(*points).mean()) for outline in _OUTLINES.values()]
    return np.array(areas, dtype=np.float32)


def _radius(rng: np.random.Generator, labels: npt.NDArray[np.int64], size: int) -> Floats:
    """Draw the objects' radii, ``(n,)`` in pixels, such that their areas are spread evenly."""
    areas = _uniform(rng, *_AREA_RANGE, len(labels)) * size**2
    return np.asarray(np.minimum(np.sqrt(areas / _unit_areas()[labels]), _LARGEST_RADIUS * size))


def _draw_block(seed: int, block: int, size: int) -> Shapes:
    """Draw the pictures of one block."""
    rng = np.random.default_rng([seed, block])
    # Shuffling ten at a time keeps the classes balanced wherever the data set ends.
    rounds = np.tile(np.arange(len(CLASSES)), (_BLOCK // len(CLASSES), 1))
    labels = rng.permuted(rounds, axis=1).reshape(-1).astype(np.int64)

    noise = [_smooth_noise(rng, _BLOCK, size, cells) for cells in (5, 17)]
    images = 0.8 * noise[0] + 0.2 * noise[1]
    for _ in range(_CLUTTER_PIECES):
        _paint_clutter(images, rng)
    radius = _radius(rng, labels, size)
    centre = radius[:, None] + _uniform(rng, 0, 1, _BLOCK, 2) * (size - 2.0 * radius[:, None])
    coverage = _coverage(labels, centre, _uniform(rng, 0, 2.0 * math.pi, _BLOCK), radius, size)
    first, second = _colours(rng, images)
    _paint(images, coverage, first + _texture(rng, centre, size) * (second - first))

    contrast = _uniform(rng, *_CONTRAST_RANGE, _BLOCK, 1, 1, 1)
    images = np.float32(0.5) + contrast * (images - np.float32(0.5))
    images += rng.normal(0.0, _NOISE, images.shape).astype(np.float32)
    images = np.rint(np.clip(images, 0.0, 1.0) * 255.0).astype(np.float32) / np.float32(255.0)
    masks = torch.from_numpy(coverage >= 0.5)
    boxes = masks_to_boxes(masks).long() + torch.tensor([0, 0, 1, 1])
    return Shapes(torch.from_numpy(images), torch.from_numpy(labels), masks[:, None], boxes)


@checked
def make_shapes(count: Count, *, seed: Index = 0, size: Side = 64) -> Shapes:
    """Generate pictures of ten classes of objects, with masks and boxes.

    The classes are balanced and shuffled. The same arguments give the same pictures, and a smaller
    ``count`` gives the first pictures of a larger one.

    Args:
        count: Number of pictures N.
        seed: Different seeds give unrelated pictures.
        size: Side of the square pictures, at least 16. The embedded networks expect 64.

    >>> shapes = make_shapes(3)
    >>> shapes.images.shape, shapes.boxes.shape
    (torch.Size([3, 3, 64, 64]), torch.Size([3, 4]))
    """
    blocks = [_draw_block(seed, block, size) for block in range(math.ceil(count / _BLOCK))]
    return Shapes(*(torch.cat(parts)[:count] for parts in zip(*blocks, strict=True)))

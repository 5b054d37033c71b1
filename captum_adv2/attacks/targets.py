# SPDX-License-Identifier: MIT
"""Target maps: the attribution maps that an attacker wants the interpreter to show.

The image's own map hides the attack (§3.1). A random patch, or the map of an image of another
class, shows that an attacker can choose any map (§5 Q1). For other maps, pass a function as
``target_map``, or the maps of a batch as ``attack(images, labels, target_maps=maps)``.

Random maps are drawn per image, from a seed and the image itself (rounded to 8 bits): an image gets
the same map at every call, on any device, and in any part of a batch (``MultiAttack`` passes
parts). With a ``torch.Generator`` instead, maps are drawn in the order of the batch, and differ
from call to call.

Differs from the official code: there a patch is drawn at 224 pixels and resized, may be cut off by
the border, and is assigned to the image whose own map is far from it; and the other image is of the
target class itself.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from captum_adv2.interpreters.base import Interpreter, eval_mode
from captum_adv2.spec import Classes, Images, Index, NonNegative, Range, checked

Share: TypeAlias = Annotated[float, Range(0, 1, above=True)]

Pair: TypeAlias = tuple[float, float]
"""Lengths or places along rows and along columns, in pixels or as shares."""

_SOFT = 0.1  # width of the official code's ranges of values, [0, 0.1] and [0.9, 1]


class TargetMap(Protocol):
    """Chooses the target maps of an attack."""

    def __call__(
        self, interpreter: Interpreter, images: Tensor, labels: Tensor, target: Tensor, /
    ) -> Tensor:
        """Return maps ``(B, 1, h, w)`` for clean images, their own and their target classes."""


@dataclass(frozen=True)
class Benign:
    """The clean image's own map, for its own class: no trace of the attack (§3.1)."""

    def __call__(
        self, interpreter: Interpreter, images: Tensor, labels: Tensor, target: Tensor
    ) -> Tensor:
        """Return the interpreter's maps of ``images`` for ``labels``; see `TargetMap`."""
        with torch.no_grad():
            return interpreter.explain(images, labels).maps


@checked
@dataclass(frozen=True)
class RandomPatch:
    """A patch of random shape, size, angle and place: 1 inside, 0 outside (§5 Q1).

    Convention:
        A patch is drawn at the interpreter's native resolution and lies inside the map; a rectangle
        that does not fit is shrunk. A pixel belongs to the patch if its centre does; so does the
        pixel that holds the patch's centre, so that no patch is empty. An image gets the same patch
        at every resolution.

    The paper does not state sizes and angles; the defaults are the official code's.

    Args:
        shape: ``"rectangle"``, ``"circle"``, or ``"any"``: one of the two, with equal chances.
        size: Least and largest diameter of a circle or side of a rectangle (height and width are
            drawn independently), as shares of the map's shorter side.
        angle: Largest rotation of a rectangle, either way, in degrees.
        soft: The official code's values: uniform in [0.9, 1] inside and in [0, 0.1] outside.
        seed: Seed of the draws; apart from it, a draw depends on the image only.
        generator: Source of the draws in place of the seed.

    >>> from captum_adv2.interpreters import Gradient
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> images, labels = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    >>> maps = RandomPatch(seed=7)(Gradient(model), images, labels, 1 - labels)
    >>> maps.shape, maps.unique().tolist()
    (torch.Size([2, 1, 4, 4]), [0.0, 1.0])
    """

    shape: Literal["rectangle", "circle", "any"] = "any"
    size: tuple[Share, Share] = (60 / 224, 120 / 224)
    angle: NonNegative = 30.0
    soft: bool = False
    seed: Index = 0
    generator: torch.Generator | None = field(default=None, repr=False)

    def __call__(
        self, interpreter: Interpreter, images: Tensor, labels: Tensor, target: Tensor
    ) -> Tensor:
        """Return patches ``(B, 1, h, w)``, one an image; see `TargetMap`."""
        size = _native_size(interpreter, images, target)
        sources = _sources(images, self.seed, self.generator)
        return torch.stack([self._draw(size, source) for source in sources]).to(images)

    def _draw(self, size: tuple[int, int], source: torch.Generator) -> Tensor:
        """Return one patch ``(1, h, w)``."""
        # Six numbers, whatever the shape: patches of one seed differ in nothing else.
        kind, first, second, turn, row, column = _uniform((6,), source).tolist()
        least, largest = (min(size) * share / 2 for share in self.size)
        half = (least + (largest - least) * first, least + (largest - least) * second)
        if self.shape == "circle" or (self.shape == "any" and kind < 0.5):
            centre = _place(size, (half[0], half[0]), (row, column))
            inside = disc(size, centre, half[0])
        else:
            angle = math.radians(self.angle * (2 * turn - 1))
            half, reach = _fit(size, half, angle)
            centre = _place(size, reach, (row, column))
            inside = rectangle(size, centre, half, angle)
        height, width = size
        inside[min(int(centre[0]), height - 1), min(int(centre[1]), width - 1)] = True
        noise = _SOFT * _uniform(size, source) if self.soft else 0.0
        return torch.where(inside, 1 - noise, noise)[None]


def _fit(size: tuple[int, int], half: Pair, angle: float) -> tuple[Pair, Pair]:
    """Return half the sides of a rectangle that fits a map, and its reach along rows and columns.

    The reach is the distance from the centre to the border of the rectangle's bounding box.
    """
    cos, sin = abs(math.cos(angle)), abs(math.sin(angle))
    reach = (half[0] * cos + half[1] * sin, half[1] * cos + half[0] * sin)
    scale = min(1.0, *(side / 2 / far for side, far in zip(size, reach, strict=True)))
    return (scale * half[0], scale * half[1]), (scale * reach[0], scale * reach[1])


def _place(size: tuple[int, int], reach: Pair, draw: Pair) -> Pair:
    """Return the centre, in pixels, of a shape of some reach: anywhere that keeps it inside."""
    row, column = (
        far + share * (side - 2 * far) for side, far, share in zip(size, reach, draw, strict=True)
    )
    return row, column


@checked
@dataclass(frozen=True, eq=False)
class RandomClass:
    """The map of another image, drawn from a pool, of another class than the target (§5 Q1).

    The interpreter under attack explains the drawn image for its own class: the adversarial image
    is classified as one class and explained like another. As in the paper, images of the target
    class are excluded, those of the attacked image's class are not.

    Args:
        pool: Images to draw from ``(N, C, H, W)`` in [0, 1], of the attacked images' shape.
        labels: The classes of the pool ``(N,)``, for which its images are explained.
        seed: Seed of the draws; apart from it, a draw depends on image and target class only.
        generator: Source of the draws in place of the seed.

    >>> from captum_adv2.interpreters import Gradient
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> images, labels = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    >>> target_map = RandomClass(torch.rand(5, 1, 8, 8), torch.tensor([0, 1, 2, 1, 0]))
    >>> target_map(Gradient(model), images, labels, 1 - labels).shape
    torch.Size([2, 1, 4, 4])
    """

    pool: Images = field(repr=False)
    labels: Classes = field(repr=False)
    seed: Index = 0
    generator: torch.Generator | None = field(default=None, repr=False)

    def __call__(
        self, interpreter: Interpreter, images: Tensor, labels: Tensor, target: Tensor
    ) -> Tensor:
        """Return the maps ``(B, 1, h, w)`` of the drawn images; see `TargetMap`."""
        if len(self.labels) != len(self.pool):
            raise ValueError(
                f"expected labels of shape ({len(self.pool)},), one class an image of the pool, "
                f"got {tuple(self.labels.shape)}"
            )
        if self.pool.shape[1:] != images.shape[1:]:
            raise ValueError(
                f"expected images of shape {tuple(self.pool.shape[1:])}, the pool's, got "
                f"{tuple(images.shape[1:])}; resize the pool"
            )
        drawn = self._draw(images, target.tolist())
        distinct = sorted(set(drawn))  # each is explained once: a map may take hundreds of passes
        pool = self.pool[distinct].to(images)
        classes = self.labels[distinct].to(images.device).long()
        with eval_mode(interpreter.model), torch.no_grad():
            maps = interpreter.explain(pool, classes).maps
        return maps[[distinct.index(number) for number in drawn]]

    def _draw(self, images: Tensor, target: list[int]) -> list[int]:
        """Return an index into the pool for each image."""
        candidates = {wanted: self._candidates(wanted) for wanted in set(target)}
        draws = [float(_uniform((), s)) for s in _sources(images, self.seed, self.generator)]
        return [
            candidates[wanted][int(draw * len(candidates[wanted]))]
            for wanted, draw in zip(target, draws, strict=True)
        ]

    def _candidates(self, target: int) -> list[int]:
        """Return the indices of the pool's images that are not of the target class."""
        found: list[int] = (self.labels.long() != target).nonzero()[:, 0].tolist()
        if not found:
            raise ValueError(
                f"expected a pool with a class other than the target {target}, got "
                f"{len(self.pool)} images of class {target}; add images of another class"
            )
        return found


def disc(size: tuple[int, int], centre: tuple[float, float], radius: float) -> Tensor:
    """Return which pixels have their centre in a disc, bool ``(h, w)``.

    Args:
        size: Height and width of the map.
        centre: Row and column, in pixels; the first pixel's centre is at (0.5, 0.5).
        radius: In pixels.

    >>> disc((3, 3), (1.5, 1.5), 1.0).int().tolist()
    [[0, 1, 0], [1, 1, 1], [0, 1, 0]]
    """
    rows, columns = _offsets(size, centre)
    return rows.square() + columns.square() <= radius**2


def rectangle(
    size: tuple[int, int], centre: tuple[float, float], half: tuple[float, float], angle: float
) -> Tensor:
    """Return which pixels have their centre in a rotated rectangle, bool ``(h, w)``.

    Args:
        size: Height and width of the map.
        centre: Row and column, in pixels; the first pixel's centre is at (0.5, 0.5).
        half: Half of the rectangle's height and width, in pixels, before the rotation.
        angle: Rotation about the centre, in radians; clockwise, as rows go down.

    >>> rectangle((3, 3), (1.5, 1.5), (0.5, 1.5), 0.0).int().tolist()
    [[0, 0, 0], [1, 1, 1], [0, 0, 0]]
    """
    rows, columns = _offsets(size, centre)
    cos, sin = math.cos(angle), math.sin(angle)
    across, along = rows * cos - columns * sin, rows * sin + columns * cos
    return (across.abs() <= half[0]) & (along.abs() <= half[1])


def _offsets(size: tuple[int, int], centre: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Return the offsets of pixel centres from a point: rows ``(h, 1)``, columns ``(1, w)``."""
    rows, columns = (
        torch.arange(side, dtype=torch.float64) + 0.5 - middle
        for side, middle in zip(size, centre, strict=True)
    )
    return rows[:, None], columns[None]


def _native_size(interpreter: Interpreter, images: Tensor, target: Tensor) -> tuple[int, int]:
    """Return height and width of an interpreter's maps.

    Taken from the surrogate's map of one image: for MASK it takes two passes, the reported map
    several hundred.
    """
    image, wanted = images[:1].detach(), target[:1]
    with eval_mode(interpreter.model), torch.no_grad():
        state = interpreter.surrogate.init(interpreter, image, wanted)
        height, width = interpreter.surrogate(interpreter, image, state, 0.0).maps.shape[-2:]
    return height, width


def _sources(
    images: Tensor, seed: int, generator: torch.Generator | None
) -> Iterator[torch.Generator]:
    """Yield the random generator of each image."""
    # Rounded to 8 bits: dtype, and a normalisation and its inverse, do not change the draw.
    for image in (images.detach() * 255).round().byte().cpu():
        if generator is not None:
            yield generator
            continue
        key = f"{seed}:{tuple(image.shape)}:".encode() + image.numpy().tobytes()
        digest = hashlib.blake2b(key, digest_size=8).digest()
        yield torch.Generator().manual_seed(int.from_bytes(digest, "big", signed=True))


def _uniform(size: tuple[int, ...], source: torch.Generator) -> Tensor:
    """Return numbers in [0, 1), float64, on the CPU."""
    drawn = torch.rand(size, generator=source, device=source.device, dtype=torch.float64)
    return drawn.cpu()

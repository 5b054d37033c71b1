# SPDX-License-Identifier: MIT
"""Target maps: what the attacker wants the interpreter to show.

The image's own map hides the attack (§3.1); a random patch, or the map of an image of another
class, shows that the map can be anything (§5 Q1). For a map of your own pass a function of your
own, or ``attack(images, labels, target_maps=maps)``.

What is random is drawn for each image from a seed and the image itself, rounded to 8 bits: an image
gets the same map in any batch or part of a batch (``MultiAttack`` passes parts), on any device, at
every call. Another seed gives others. From a ``torch.Generator``, maps are drawn image by image in
the order of the batch, and anew at each call.

Differs from the official code: there the patch is drawn at 224 pixels and resized, may be cut off
by the border, and was paired with images by how far their own map is from it; and the other image
is of the target class itself.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from captum_adv2.interpreters.base import Interpreter, eval_mode
from captum_adv2.spec import Classes, Images, Index, Real, Unit, checked

_SOFT = 0.1  # range of the official code's values, from 0 up and from 1 down


class TargetMap(Protocol):
    """Chooses the maps an attack aims at."""

    def __call__(
        self, interpreter: Interpreter, images: Tensor, labels: Tensor, target: Tensor, /
    ) -> Tensor:
        """Return maps ``(B, 1, h, w)`` for clean images, their own classes and the target's."""


@dataclass(frozen=True)
class Benign:
    """The clean image's own map, for its own class: the map shows no trace of the attack (§3.1)."""

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
        Drawn at the interpreter's native resolution: a pixel belongs to the patch if its centre
        does, and so does the pixel under the patch's centre, so that no patch is empty. A patch
        lies wholly inside the map; one that would not fit is shrunk. An image gets the same patch
        at every resolution.

    The paper leaves sizes and angles open; the defaults are the official code's.

    Args:
        shape: ``"rectangle"``, ``"circle"``, or ``"any"``: either, with equal chances.
        size: Least and largest diameter of a circle, and side of a rectangle (each of the two is
            drawn), as shares of the map's shorter side, above 0 and at most 1.
        angle: Largest rotation of a rectangle, either way, in degrees.
        soft: Values from the official code: uniform in [0.9, 1] inside, in [0, 0.1] outside.
        seed: Seed of the draws, which depend on the image and on nothing else.
        generator: Source of the draws in place of the seed, image by image.

    >>> from captum_adv2.interpreters import Gradient
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> images, labels = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    >>> maps = RandomPatch(seed=7)(Gradient(model), images, labels, 1 - labels)
    >>> maps.shape, maps.unique().tolist()
    (torch.Size([2, 1, 4, 4]), [0.0, 1.0])
    """

    shape: Literal["rectangle", "circle", "any"] = "any"
    size: tuple[Unit, Unit] = (60 / 224, 120 / 224)
    angle: Real = 30.0
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
        # As many numbers for every shape and resolution.
        kind, first, second, turn, row, column = _uniform((6,), source).tolist()
        circle = self.shape == "circle" or (self.shape == "any" and kind < 0.5)
        least, largest = (min(size) * share / 2 for share in self.size)
        half = [least + (largest - least) * draw for draw in (first, second)]
        angle = math.radians(self.angle * (2 * turn - 1))
        if circle:
            reach = [half[0], half[0]]
        else:
            cos, sin = abs(math.cos(angle)), abs(math.sin(angle))
            reach = [half[0] * cos + half[1] * sin, half[1] * cos + half[0] * sin]
            fit = min(1.0, *(side / 2 / far for side, far in zip(size, reach, strict=True)))
            half, reach = [fit * h for h in half], [fit * far for far in reach]
        height, width = size
        centre = (
            reach[0] + row * (height - 2 * reach[0]),
            reach[1] + column * (width - 2 * reach[1]),
        )
        if circle:
            inside = disc(size, centre, half[0])
        else:
            inside = rectangle(size, centre, (half[0], half[1]), angle)
        inside[min(int(centre[0]), height - 1), min(int(centre[1]), width - 1)] = True
        noise = _SOFT * _uniform(size, source) if self.soft else 0.0
        return torch.where(inside, 1 - noise, noise)[None]


@checked
@dataclass(frozen=True, eq=False)
class RandomClass:
    """The map of another image, drawn from a pool, of another class than the target (§5 Q1).

    The image drawn shows its own class, as the interpreter under attack explains it: the attack is
    classified as one class and explained like another. As in the paper, only the target class is
    left out, not the attacked image's own.

    Args:
        pool: Images to draw from ``(N, C, H, W)`` in [0, 1], of the shape of those attacked.
        labels: Their classes ``(N,)``, which their maps explain.
        seed: Seed of the draws, which depend on image and target class, and on nothing else.
        generator: Source of the draws in place of the seed, image by image.

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
        """Return the maps ``(B, 1, h, w)`` of the images drawn; see `TargetMap`."""
        if self.pool.shape[1:] != images.shape[1:]:
            raise ValueError(
                f"expected images of shape {tuple(self.pool.shape[1:])}, the pool's, got "
                f"{tuple(images.shape[1:])}; resize the pool"
            )
        drawn = self._draw(images, target.tolist())
        once = sorted(set(drawn))  # a map may be dear, and a pool small
        pool = self.pool[once].to(images)
        classes = self.labels[once].to(images.device).long()
        with eval_mode(interpreter.model), torch.no_grad():
            maps = interpreter.explain(pool, classes).maps
        return maps[[once.index(number) for number in drawn]]

    def _draw(self, images: Tensor, target: list[int]) -> list[int]:
        """Return the number of an image of the pool for each image."""
        known = self.labels.tolist()
        others = {c: [i for i, own in enumerate(known) if own != c] for c in set(target)}
        for wanted, candidates in others.items():
            if not candidates:
                raise ValueError(
                    f"expected a pool with a class other than the target {wanted}, got "
                    f"{len(known)} images of class {wanted}; add images of another class"
                )
        draws = [float(_uniform((), s)) for s in _sources(images, self.seed, self.generator)]
        return [
            others[wanted][int(draw * len(others[wanted]))]
            for wanted, draw in zip(target, draws, strict=True)
        ]


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
        angle: Rotation about its centre, in radians; clockwise, as rows go down.

    >>> rectangle((3, 3), (1.5, 1.5), (0.5, 1.5), 0.0).int().tolist()
    [[0, 0, 0], [1, 1, 1], [0, 0, 0]]
    """
    rows, columns = _offsets(size, centre)
    cos, sin = math.cos(angle), math.sin(angle)
    across, along = rows * cos - columns * sin, rows * sin + columns * cos
    return (across.abs() <= half[0]) & (along.abs() <= half[1])


def _offsets(size: tuple[int, int], centre: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Return how far pixels are from a point: rows ``(h, 1)`` and columns ``(1, w)``."""
    rows, columns = (
        torch.arange(side, dtype=torch.float64) + 0.5 - middle
        for side, middle in zip(size, centre, strict=True)
    )
    return rows[:, None], columns[None]


def _native_size(interpreter: Interpreter, images: Tensor, target: Tensor) -> tuple[int, int]:
    """Return height and width of an interpreter's maps.

    From the surrogate, on one image: MASK's costs two passes, its map several hundred.
    """
    image, wanted = images[:1].detach(), target[:1]
    with eval_mode(interpreter.model), torch.no_grad():
        state = interpreter.surrogate.init(interpreter, image, wanted)
        height, width = interpreter.surrogate(interpreter, image, state, 0.0).maps.shape[-2:]
    return height, width


def _sources(
    images: Tensor, seed: int, generator: torch.Generator | None
) -> Iterator[torch.Generator]:
    """Yield, for each image, what its map is drawn from."""
    # Eight bits, so that neither dtype nor a normalisation and its inverse make another image.
    for image in (images.detach() * 255).round().byte().cpu():
        if generator is not None:
            yield generator
            continue
        key = f"{seed}:{tuple(image.shape)}:".encode() + image.numpy().tobytes()
        own = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big", signed=True)
        yield torch.Generator().manual_seed(own)


def _uniform(size: tuple[int, ...], source: torch.Generator) -> Tensor:
    """Return numbers in [0, 1), float64, on the CPU."""
    drawn = torch.rand(size, generator=source, device=source.device, dtype=torch.float64)
    return drawn.cpu()

# SPDX-License-Identifier: MIT
"""Target maps: the attribution maps that an attacker wants the interpreter to show.

The image's own map hides the attack (§3.1). A random patch, or the map of an image of another
class, shows that an attacker can choose any map (§5 Q1). For other maps, pass a function as
``target_map``, or the maps of a batch as ``attack(images, labels, target_maps=maps)``.

Random maps are drawn per image, from a seed and the image itself (rounded to 8 bits): an image gets
the same map in any part of a batch (``MultiAttack`` passes parts). A ``torch.Generator`` instead
draws in the order of the batch, anew at every call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal, Protocol, TypeAlias

import torch
from torch import Generator, Tensor

from captum_adv2.interpreters.base import Interpreter, eval_mode
from captum_adv2.seeds import mixed
from captum_adv2.spec import Classes, Images, Index, NonNegative, Range, checked, expect_shape

Share: TypeAlias = Annotated[float, Range(0, 1, above=True)]


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
    generator: Generator | None = field(default=None, repr=False)

    def __call__(
        self, interpreter: Interpreter, images: Tensor, labels: Tensor, target: Tensor
    ) -> Tensor:
        """Return patches ``(B, 1, h, w)``, one an image; see `TargetMap`."""
        # The size is that of the surrogate's map: for MASK, the reported one takes many passes.
        surrogate = interpreter.surrogate
        with eval_mode(interpreter.model), torch.no_grad():
            state = surrogate.init(interpreter, images.detach(), target)
            size = surrogate(interpreter, images.detach(), state, 0.0).maps.shape[-2:]
        sources = _sources(images, self.seed, self.generator)
        return torch.stack([self._draw(size, source) for source in sources]).to(images)

    def _draw(self, size: torch.Size, source: Generator) -> Tensor:
        """Return one patch ``(1, h, w)``; pairs of numbers are along rows and along columns."""
        # Six numbers, whatever the shape: patches of one seed differ in nothing else.
        numbers = _uniform((6,), source)
        kind, turn = numbers[0].item(), numbers[3].item()
        circle = self.shape == "circle" or (self.shape == "any" and kind < 0.5)
        sides = torch.tensor(size, dtype=torch.float64)
        least, largest = (min(size) * share / 2 for share in self.size)
        half = least + (largest - least) * numbers[1:3]  # the radius, or half of each side
        angle = math.radians(self.angle * (2 * turn - 1))
        cos, sin = math.cos(angle), math.sin(angle)
        # From the centre to the border of the bounding box.
        reach = half[[0, 0]] if circle else half * abs(cos) + half.flip(0) * abs(sin)
        scale = (sides / 2 / reach).min().clamp(max=1)
        half, reach = scale * half, scale * reach
        centre = reach + numbers[4:] * (sides - 2 * reach)
        rows, columns = (
            torch.arange(side, dtype=torch.float64) + 0.5 - middle
            for side, middle in zip(size, centre, strict=True)
        )
        rows = rows[:, None]
        if circle:
            inside = rows.square() + columns.square() <= half[0].square()
        else:
            across, along = rows * cos - columns * sin, rows * sin + columns * cos
            inside = (across.abs() <= half[0]) & (along.abs() <= half[1])
        row, column = torch.minimum(centre, sides - 1).long()
        inside[row, column] = True
        noise = 0.1 * _uniform(size, source) if self.soft else 0.0
        return torch.where(inside, 1 - noise, noise)[None]


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
    generator: Generator | None = field(default=None, repr=False)

    def __call__(
        self, interpreter: Interpreter, images: Tensor, labels: Tensor, target: Tensor
    ) -> Tensor:
        """Return the maps ``(B, 1, h, w)`` of the drawn images; see `TargetMap`."""
        expect_shape(self.labels, self.pool.shape[:1], "labels")
        if self.pool.shape[1:] != images.shape[1:]:
            raise ValueError(
                f"expected images of shape {tuple(self.pool.shape[1:])}, the pool's, got "
                f"{tuple(images.shape[1:])}; resize the pool"
            )
        sources = _sources(images, self.seed, self.generator)
        drawn = [self._draw(*each) for each in zip(target.tolist(), sources, strict=True)]
        distinct = sorted(set(drawn))  # each is explained once: a map may take hundreds of passes
        pool = self.pool[distinct].to(images)
        classes = self.labels[distinct].to(images.device).long()
        with eval_mode(interpreter.model), torch.no_grad():
            maps = interpreter.explain(pool, classes).maps
        return maps[[distinct.index(number) for number in drawn]]

    def _draw(self, target: int, source: Generator) -> int:
        """Return the index of an image of the pool that is not of the target class."""
        others = (self.labels.long() != target).nonzero()[:, 0]
        if not len(others):
            raise ValueError(
                f"expected a pool with a class other than the target {target}, got "
                f"{len(self.pool)} images of class {target}; add images of another class"
            )
        return int(others[int(_uniform((), source) * len(others))])


def _sources(images: Tensor, seed: int, generator: Generator | None) -> Iterator[Generator]:
    """Yield the random generator of each image."""
    # Rounded to 8 bits: dtype, and a normalisation and its inverse, do not change the draw.
    for image in (images.detach() * 255).round().byte().cpu():
        if generator is not None:
            yield generator
            continue
        key = mixed(seed, tuple(image.shape), image.numpy().tobytes())
        yield Generator().manual_seed(key)


def _uniform(size: tuple[int, ...], source: Generator) -> Tensor:
    """Return numbers in [0, 1), float64, on the CPU."""
    drawn = torch.rand(size, generator=source, device=source.device, dtype=torch.float64)
    return drawn.cpu()

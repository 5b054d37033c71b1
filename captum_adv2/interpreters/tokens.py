# SPDX-License-Identifier: MIT
"""How tokens lie on a grid of places, by the graph and the shapes of a pass.

A vision transformer turns an image into N tokens: those of h x w patches, row by row, and others,
such as a class token, before or after them. Which are which is read off the concatenation that
joined them. Height and width are those of a convolution's output with as many places, such as the
patch embedding's; where there is none, the grid of the images' proportions with as many.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from torch import Tensor

Evidence: TypeAlias = Literal["joined", "convolution", "proportions"]
"""That numbers are tokens on a grid: a concatenation; a convolution; the images' proportions."""

EVIDENCE: tuple[Evidence, ...] = get_args(Evidence)

_ATTENTION = ("Bmm", "Attention")  # the products of queries with keys


class Layout(NamedTuple):
    """How a tensor is read as maps ``(B, K, h, w)``.

    Attributes:
        channels: The dimension of channels.
        first: Of tokens, the number of those before the grid's.
        grid: Of tokens, height and width of their grid; of four dimensions, ``None``.
    """

    channels: int
    first: int = 0
    grid: tuple[int, int] | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return a tensor as maps ``(B, K, h, w)``."""
        maps = tensor.movedim(self.channels, 1)
        if self.grid is None:
            return maps
        height, width = self.grid
        return maps.narrow(2, self.first, height * width).reshape(*maps.shape[:2], height, width)


class Grids:
    """The grids on which tokens of a pass may lie.

    Args:
        nodes: The operations of the pass that depend on the images, the last one first.
        images: Shape of the images ``(B, C, H, W)``.
    """

    def __init__(self, nodes: Iterable[Any], images: tuple[int, ...]) -> None:
        self._images = images
        self._nodes = list(nodes)
        shapes = [shape(node, 0) for node in self._nodes if "Conv" in node.name()]
        self._planes = [(each[2], each[3]) for each in shapes if len(each) == 4]
        # Numbers of queries that are learned, as of latent tokens: these have no places.
        known = set(self._nodes)
        products = (node for node in self._nodes if any(w in node.name() for w in _ATTENTION))
        learned = (node for node in products if node.next_functions[0][0] not in known)
        self._learned = {sizes[-2] for sizes in (shape(node, 0) for node in learned) if sizes[1:]}

    def sequence(self, count: int) -> bool:
        """Return whether the pass has ``count`` tokens: a tensor ``(B, count, K)``."""
        wanted = (self._images[0], count)
        return any(len(s) == 3 and s[:2] == wanted for s in (shape(n, 0) for n in self._nodes))

    def layout(
        self, count: int, channels: int, evidence: Evidence = "proportions"
    ) -> Layout | None:
        """Return how ``count`` tokens lie on a grid, if it is known by such evidence or better."""
        joined = self._joined(count)
        if joined is None and (evidence == "joined" or count in self._learned):
            return None
        first, places = joined or (0, count)
        grids = [grid for grid in self._planes if grid[0] * grid[1] == places > 1][:1]
        if joined or evidence == "proportions":
            grids = grids or self._proportional(places)
        return Layout(channels, first, grids[0]) if len(grids) == 1 else None

    def _joined(self, count: int) -> tuple[int, int] | None:
        """Return how many of ``count`` tokens are before the patches', and how many these are."""
        for node in self._nodes:
            whole = shape(node, 0)
            if "Cat" not in node.name() or len(whole) != 3 or whole[1] != count:
                continue
            # Of weights without gradients, shapes are not in the graph.
            parts = [() if p is None else shape(p, number) for p, number in node.next_functions]
            sizes = [part[1] if len(part) == 3 else None for part in parts]
            patches = max(filter(None, sizes), default=0)
            at = sizes.index(patches) if patches else 0
            before, after = sizes[:at], sizes[at + 1 :]
            if patches and None not in after:
                return count - patches - sum(filter(None, after)), patches
            if patches and None not in before:
                return sum(filter(None, before)), patches
        return None

    def _proportional(self, places: int) -> list[tuple[int, int]]:
        """Return the grids of so many places that have the images' proportions."""
        height, width = self._images[2:]
        pairs = ((h, places // h) for h in range(2, places // 2 + 1) if places % h == 0)
        return [(h, w) for h, w in pairs if abs(h * width - w * height) < max(height, width)]


def shape(node: Any, number: int) -> tuple[int, ...]:
    """Return the shape of an output of an operation."""
    return tuple(node._input_metadata[number].shape)

# SPDX-License-Identifier: MIT
"""Where the last feature maps of a forward pass are, read off its autograd graph.

The graph has every operation between images and logits, however it is written. A tensor that all
paths pass is a *cut*. The feature maps are the last cut that has places, and two facts are proven
of it: its layout, and that nothing mixes its places again before they are pooled or flattened.
Either the gradient of the logits is the same at all places, so that these are averaged, over the
two dimensions along which it is; or the maps come from a convolution or a pooling, whose layout is
known, and no product further on has places. Pooled maps are the input of the pooling.

Tokens of a transformer, where they lie on a grid (see `tokens`), are features where the logits
depend on each of them: attention may still mix them, into a class token.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from captum_adv2.interpreters.tap import Mode
from captum_adv2.interpreters.tokens import EVIDENCE, Grids, Layout, shape

_PRODUCTS = ("Conv", "mm", "Mm", "Mv", "Linear", "Attention")
_PLANAR = ("Conv", "Pool", "Upsample")  # of four dimensions, the last two are height and width


class Made(NamedTuple):
    """An output of an operation: which operation and output, the tensor, what it was made from."""

    place: tuple[int, int]
    tensor: Tensor
    inputs: tuple[Any, ...]


class Pass(Mode):
    """A forward pass, whose operations are counted: one output is kept, or each with its edge."""

    def __init__(self, place: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.count = 0
        self.place = place
        self.kept: Tensor | None = None
        self.made: dict[Any, Made] = {}

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """See `Mode`."""
        out = func(*args, **kwargs)
        self.count += 1
        inputs = (*args, *kwargs.values())
        # Inputs, at negative numbers, may come from a function that this mode does not see.
        values = [*inputs, *(out if isinstance(out, tuple | list) else (out,))]
        if self.place is None:
            self._note(values, inputs)
        elif self.count == self.place[0]:
            self.kept = values[self.place[1] + len(inputs)]
        return out

    def _note(self, values: list[Any], inputs: tuple[Any, ...]) -> None:
        for number, tensor in enumerate(values, -len(inputs)):
            if not isinstance(tensor, Tensor) or tensor.grad_fn is None:
                continue
            product = _is_product(tensor.grad_fn)
            if product or tensor.ndim in (3, 4):
                made = Made((self.count, number), tensor, inputs if product else ())
                self.made.setdefault((tensor.grad_fn, tensor.output_nr), made)


class Found(NamedTuple):
    """Feature maps: where they are in the pass, themselves, and how they are read as maps."""

    place: tuple[int, int]
    maps: Tensor
    layout: Layout | None  # None where the caller has one of its own


class Graph:
    """The graph between images and logits of a recorded pass.

    Attributes:
        weights: What the last product multiplies, as of the linear layer at the end; or ``None``.
        mixed: Maps near the end whose places are mixed once more, as by attention pooling, where
            there are no features.
    """

    def __init__(self, run: Pass, images: Tensor, logits: Tensor) -> None:
        self._made = run.made
        self._logits = logits
        self._batch, self._images = len(images), images.shape
        self._root = _edge(images)[0]
        self._end: Any = _edge(logits) if logits.requires_grad else (None, 0)
        self._dependent = self._of_images()
        if self._end[0] not in self._dependent:
            raise ValueError(
                "expected logits that depend differentiably on the images, got logits without a "
                "gradient; see whether the model detaches or rounds"
            )
        self.mixed: Tensor | None = None
        later_first = sorted(self._dependent, key=lambda node: -node._sequence_nr())
        self.grids = Grids(later_first, images.shape)
        self.weights = self._last_weights()

    def features(self) -> Found | None:
        """Return the last feature maps, or ``None`` where none are proven to be."""
        cuts, tokens = list(self._cuts()), None
        total = sum(_is_product(node) for node in self._dependent)
        for number, (edge, above) in enumerate(cuts):
            made = self._made.get(edge)
            products = [node for node in above if _is_product(node)]
            # Without products, these are scores of the classes already.
            if made is None or not self._has_places(made.tensor) or not products:
                continue
            if made.tensor.ndim == 3:
                if len(products) < total:  # pixels are no tokens
                    tokens = tokens or self._as_tokens(made)
                if tokens is not None and self._averaged(tokens):
                    return tokens
                continue
            planar = is_planar(made.tensor)
            # The head itself may be a convolution that is pooled.
            mixing = [node for node in above if node is not products[0] and self._mixes(node)]
            channels = 1 if planar and not mixing else self.pooled(made.tensor)
            if channels is not None:
                while "Pool" in edge[0].name():
                    number += 1
                    edge = cuts[number][0]
                made = self._made.get(edge)
                return made and Found(made.place, made.tensor, Layout(channels))
            if planar:  # named only where most of the network is before them
                if 5 * len(mixing) >= total:
                    return tokens
                self.mixed = made.tensor
                return None
        return tokens

    def layout(self, maps: Tensor) -> Layout | None:
        """Return how features are read as maps, or ``None`` where that cannot be known."""
        if maps.ndim == 3:
            return self.tokens(maps)
        channels = 1 if is_planar(maps) else self.pooled(maps) or by_proportions(maps, self._images)
        return None if channels is None else Layout(channels)

    def tokens(self, tokens: Tensor) -> Layout | None:
        """Return how tokens lie on a grid, if the logits depend on each of its places."""
        slope = self._slope(tokens)
        if slope is None:
            return None
        for evidence in EVIDENCE:  # the best that there is, so that channels are no places
            counts = ((channels, tokens.shape[3 - channels]) for channels in (2, 1))
            found = [self.grids.layout(count, channels, evidence) for channels, count in counts]
            layouts = [layout for layout in found if layout is not None]
            # Channels may be as many as places are: as the last dimension, places are averaged.
            fitting = [
                each
                for each in layouts
                if bool(_largest(each(slope)).all()) and (each.channels == 2 or _flat(each(slope)))
            ]
            if len(fitting) > 1:
                fitting = [each for each in fitting if _flat(each(slope))]
            if layouts:
                return fitting[0] if len(fitting) == 1 else None
        return None

    def expect_slope(self, images: Tensor) -> None:
        """Raise where the logits have a gradient of zero: then nothing says what they depend on."""
        slope = self._slope(images)
        if slope is None or not bool(slope.any()):
            raise ValueError(
                "expected logits that depend on the images, got a gradient of zero; load or train "
                "weights (the head of torchvision's ViT starts at zero), or pass another image"
            )

    def _as_tokens(self, made: Made) -> Found | None:
        layout = self.tokens(made.tensor)
        return layout and Found(made.place, made.tensor, layout)

    def _averaged(self, found: Found) -> bool:
        slope = self._slope(found.maps)
        return slope is not None and found.layout is not None and _flat(found.layout(slope))

    def pooled(self, maps: Tensor) -> int | None:
        """Return which dimension is channels, if the logits average the other two of maps."""
        slope = self._slope(maps)
        if slope is None:
            return None
        flat = [channels for channels, places in ((1, (2, 3)), (3, (1, 2))) if _flat(slope, places)]
        return flat[0] if len(flat) == 1 else None  # a gradient of zero says nothing

    def _slope(self, tensor: Tensor) -> Tensor | None:
        """Return the gradient of a mixture of the logits."""
        count = self._logits.shape[1]
        mixture = torch.arange(1, count + 1, device=tensor.device, dtype=self._logits.dtype).cos()
        score = (self._logits * mixture).sum()
        (slope,) = torch.autograd.grad(score, tensor, retain_graph=True, allow_unused=True)
        return slope

    def _of_images(self) -> set[Any]:
        """Return the nodes whose output depends on the images."""
        nodes, stack = {self._root}, [self._end[0]]
        while stack:
            node = stack.pop()
            if node is not None and node not in nodes:
                nodes.add(node)
                stack += [parent for parent, _ in node.next_functions]
        dependent = {self._root}
        for node in sorted(nodes, key=lambda node: node._sequence_nr()):  # as they were made
            if any(parent in dependent for parent, _ in node.next_functions):
                dependent.add(node)
        return dependent

    def _parents(self, node: Any) -> list[Any]:
        return [edge for edge in node.next_functions if edge[0] in self._dependent]

    def _cuts(self) -> Iterator[tuple[Any, list[Any]]]:
        """Yield, from the logits on, each edge that all paths pass, and the nodes after it."""
        above: list[Any] = []
        waiting: list[tuple[float, int, Any]] = [(0, 0, self._end)]
        known = {self._end}
        while waiting:
            edge = heapq.heappop(waiting)[2]
            if edge[0] is self._root:
                return
            if not waiting:
                yield edge, list(above)
            above.append(edge[0])
            for parent in set(self._parents(edge[0])) - known:
                known.add(parent)
                order = math.inf if parent[0] is self._root else -parent[0]._sequence_nr()
                heapq.heappush(waiting, (order, len(known), parent))

    def _has_places(self, maps: Tensor) -> bool:
        batch, *sizes = maps.shape
        places = sum(size > 1 for size in sizes) > 1
        return maps.ndim in (3, 4) and batch == self._batch and places

    def _mixes(self, node: Any) -> bool:
        """Return whether a node is a product with places, or one that cannot be looked into."""
        sizes = shape(node, 0)
        if _is_product(node):
            return math.prod(sizes) > self._batch * sizes[1 if "Conv" in node.name() else -1]
        opaque = "jit" in node.name() or isinstance(node, torch.autograd.function.BackwardCFunction)
        return opaque and any(shape(*parent) != sizes for parent in self._parents(node))

    def _last_weights(self) -> Tensor | None:
        for edge, _ in self._cuts():
            if _is_product(edge[0]):
                inputs = self._made[edge].inputs if edge in self._made else ()
                for given in inputs:
                    if isinstance(given, Tensor) and given.ndim in (2, 4):
                        node = given.grad_fn
                        if node not in self._dependent and given.shape[0] == self._logits.shape[1]:
                            return given.detach()
                return None
        return None


def is_planar(maps: Tensor) -> bool:
    """Return whether maps come from a convolution or a pooling, and keep its layout."""
    stack, seen = [_edge(maps)] if maps.requires_grad else [], set()
    while stack:
        edge = stack.pop()
        node, sizes = edge[0], shape(*edge)
        if edge in seen or len(sizes) != 4:
            continue
        seen.add(edge)
        if any(word in node.name() for word in _PLANAR):
            return True
        if any(word in node.name() for word in ("Permute", "Transpose")):
            continue
        for parent in node.next_functions:
            own = shape(*parent) if parent[0] is not None else ()
            # Concatenation and slices change one size.
            if len(own) == 4 and sum(a != b for a, b in zip(own, sizes, strict=True)) <= 1:
                stack.append(parent)
    return False


def by_proportions(maps: Tensor, images: torch.Size) -> int | None:
    """Return the dimension of channels where only the other two have the images' proportions."""
    height, width = images[2:]
    fitting = [
        channels
        for channels, (h, w) in ((1, maps.shape[2:]), (3, maps.shape[1:3]))
        if abs(h * width - w * height) < max(height, width)
    ]
    return fitting[0] if len(fitting) == 1 else None


def _flat(slope: Tensor, places: tuple[int, int] = (2, 3)) -> bool:
    """Return whether a gradient is the same at all places; averaging rounds nothing."""
    return torch.equal(slope.amax(places), slope.amin(places))


def _largest(maps: Tensor) -> Tensor:
    """Return the largest size at each place of maps ``(B, K, h, w)``."""
    return maps.abs().amax(dim=(0, 1))


def _edge(tensor: Tensor) -> tuple[Any, int]:
    node, number, *_ = get_gradient_edge(tensor)
    return node, number


def _is_product(node: Any) -> bool:
    return any(word in node.name() for word in _PRODUCTS)

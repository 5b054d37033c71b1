# SPDX-License-Identifier: MIT
"""What is drawn: small networks, images and classes. Each is made by a call, and prints as code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from captum_adv2.spec import Count, Index, checked

Body: TypeAlias = Literal["plain", "residual", "dense"]
Activation: TypeAlias = Literal["ReLU", "SiLU", "GELU"]

# Ordinary images, and what makes degenerate ones of them.
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda images: images,
    "black": torch.zeros_like,
    "white": torch.ones_like,
    "constant": lambda images: images[:, :1, :1, :1].expand_as(images).clone(),
    "saturated": torch.round,
    "nearly constant": lambda images: 0.5 + 1e-6 * (images - 0.5),
    "nearly equal": lambda images: (images[:1] + 1e-6 * (images - 0.5)).clamp(0, 1),
}
CLASSES = 4
_SEEDS = st.integers(0, 2**16 - 1)


@checked
def image_batch(
    shape: tuple[Count, Count, Count, Count] = (1, 3, 8, 8),
    seed: Index = 0,
    dtype: torch.dtype = torch.float32,
    kind: str = "random",
) -> Tensor:
    """Return random images in [0, 1] of a shape ``(B, C, H, W)``, of one of `KINDS`."""
    generator = torch.Generator().manual_seed(seed)
    return KINDS[kind](torch.rand(shape, generator=generator, dtype=dtype))


def images(
    shape: tuple[int, int, int] | None = None,
    *,
    batch: tuple[int, int] = (1, 3),
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64),
    kinds: Sequence[str] = tuple(KINDS),
) -> st.SearchStrategy[Tensor]:
    """Draw batches of images in [0, 1], ordinary and degenerate ones; see `KINDS`.

    ``shape`` is ``(C, H, W)``, by default three channels with sides from 6 to 10; ``batch`` is the
    least and the largest number of images; ``dtypes`` and ``kinds`` are chosen from.
    """
    sides = st.integers(6, 10)
    each = (st.just(3), sides, sides) if shape is None else map(st.just, shape)
    shapes = st.tuples(st.integers(*batch), *each)
    return st.builds(image_batch, shapes, _SEEDS, st.sampled_from(dtypes), st.sampled_from(kinds))


def classes(batch: int = 3, count: int = CLASSES) -> st.SearchStrategy[Tensor]:
    """Draw classes ``(batch,)``, out of ``count``."""
    return st.lists(st.integers(0, count - 1), min_size=batch, max_size=batch).map(torch.tensor)


class Network(nn.Module):
    """A small random classifier in eval mode: ``stem``, ``body``, average pooling, ``fc``.

    Layers of the body follow each other, or are added to their input, or concatenated with it. ReLU
    works in place. The statistics of batch norm are as if trained.
    """

    @checked
    def __init__(
        self,
        body: Body = "plain",
        activation: Activation = "ReLU",
        norm: bool = False,
        seed: Index = 0,
        channels: Count = 3,
        classes: Count = CLASSES,
    ) -> None:
        super().__init__()
        more = 6 if body == "dense" else 0

        def layer(inputs: int) -> nn.Sequential:
            conv = nn.Conv2d(inputs, 6, 3, padding=1)
            nn.init.kaiming_normal_(conv.weight)  # signals neither vanish nor explode
            act = nn.ReLU(inplace=True) if activation == "ReLU" else getattr(nn, activation)()
            if not norm:
                return nn.Sequential(conv, act)
            scale = nn.BatchNorm2d(6)
            scale.get_buffer("running_mean").normal_(0, 0.1)
            scale.get_buffer("running_var").uniform_(0.5, 1.5)
            return nn.Sequential(conv, scale, act)

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.stem = nn.Sequential(layer(channels), nn.AvgPool2d(2))
            self.body = nn.Sequential(_Block(body, layer(6)), _Block(body, layer(6 + more)))
            self.fc = nn.Linear(6 + 2 * more, classes)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(B, classes)`` of images ``(B, channels, H, W)``."""
        logits: Tensor = self.fc(self.body(self.stem(x)).mean(dim=(2, 3)))
        return logits


class _Block(nn.Module):
    """A layer of a network's body, joined with its input."""

    def __init__(self, body: Body, layer: nn.Module) -> None:
        super().__init__()
        self.body, self.layer = body, layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        if self.body == "dense":
            return torch.cat([x, out], dim=1)
        return x + out if self.body == "residual" else out


def networks(
    *,
    activations: Sequence[Activation] = get_args(Activation),
    channels: int = 3,
    classes: int = CLASSES,
) -> st.SearchStrategy[Network]:
    """Draw small random classifiers; see `Network`."""
    body, activation = st.sampled_from(get_args(Body)), st.sampled_from(activations)
    size = st.just(channels), st.just(classes)
    return st.builds(Network, body, activation, st.booleans(), _SEEDS, *size)

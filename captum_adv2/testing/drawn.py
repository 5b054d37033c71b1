# SPDX-License-Identifier: MIT
"""What is drawn: small networks, images and classes. Each is made by a call, and prints as code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
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
    """Return random images in [0, 1] of a shape ``(B, C, H, W)``, of one of `KINDS`.

    >>> image_batch(kind="saturated").unique().tolist()
    [0.0, 1.0]
    """
    generator = torch.Generator().manual_seed(seed)
    return KINDS[kind](torch.rand(shape, generator=generator, dtype=dtype))


def images(
    shape: tuple[int, int, int] | None = None,
    *,
    batch: tuple[int, int] = (1, 3),
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64),
    kinds: Sequence[str] = tuple(KINDS),
) -> SearchStrategy[Tensor]:
    """Draw batches of images in [0, 1], ordinary and degenerate ones.

    Args:
        shape: ``(C, H, W)``; default: three channels, sides from 6 to 10.
        batch: Least and largest number of images.
        dtypes: Dtypes to choose from.
        kinds: Names out of `KINDS` to choose from.
    """
    sides = st.integers(6, 10)
    each = (st.just(3), sides, sides) if shape is None else map(st.just, shape)
    return st.builds(
        image_batch,
        shape=st.tuples(st.integers(*batch), *each),
        seed=_SEEDS,
        dtype=st.sampled_from(dtypes),
        kind=st.sampled_from(kinds),
    )


def classes(batch: int = 3, count: int = CLASSES) -> SearchStrategy[Tensor]:
    """Draw classes ``(batch,)``, out of ``count``."""
    each = st.integers(0, count - 1)
    return st.builds(torch.tensor, st.lists(each, min_size=batch, max_size=batch))


class Network(nn.Module):
    """A small random classifier in eval mode: ``stem``, ``body``, average pooling, ``fc``.

    Layers of the body follow each other, or are added to their input, or concatenated with it. ReLU
    works in place. The statistics of batch norm are as if trained.

    >>> Network("dense", "SiLU", seed=3)(image_batch()).shape
    torch.Size([1, 4])
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
        self._name = f"Network({body!r}, {activation!r}, {norm}, {seed}, {channels}, {classes})"
        widths = (6, 12, 18) if body == "dense" else (6, 6, 6)

        def layer(inputs: int) -> nn.Sequential:
            between = nn.BatchNorm2d(6) if norm else nn.Identity()
            act = nn.ReLU(inplace=True) if activation == "ReLU" else getattr(nn, activation)()
            return nn.Sequential(nn.Conv2d(inputs, 6, 3, padding=1), between, act)

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.stem = nn.Sequential(layer(channels), nn.AvgPool2d(2))
            self.body = nn.Sequential(*(_Block(body, layer(width)) for width in widths[:2]))
            self.fc = nn.Linear(widths[2], classes)
            self.apply(_randomise)
        self.eval()

    def __repr__(self) -> str:
        return self._name

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


@torch.no_grad()
def _randomise(module: nn.Module) -> None:
    """Draw weights at which signals neither vanish nor explode, and statistics as if trained."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight)
    elif isinstance(module, nn.BatchNorm2d):
        module.get_buffer("running_mean").normal_(0, 0.1)
        module.get_buffer("running_var").uniform_(0.5, 1.5)


def networks(
    *,
    activations: Sequence[Activation] = get_args(Activation),
    channels: int = 3,
    classes: int = CLASSES,
) -> SearchStrategy[Network]:
    """Draw small random classifiers; see `Network`."""
    return st.builds(
        Network,
        body=st.sampled_from(get_args(Body)),
        activation=st.sampled_from(activations),
        norm=st.booleans(),
        seed=_SEEDS,
        channels=st.just(channels),
        classes=st.just(classes),
    )

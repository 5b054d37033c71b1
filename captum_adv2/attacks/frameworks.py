# SPDX-License-Identifier: MIT
r"""Attack frameworks: what an attacker may change, and by how much.

A framework defines the *variable* that an attack optimises, turns it into an image, and keeps it
within bounds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from captum_adv2.optim import safe_sqrt
from captum_adv2.spec import NonNegative, Positive, checked


class Framework(ABC):
    """What an attack optimises, and which values of it are allowed."""

    @abstractmethod
    def init(self, clean: Tensor) -> Tensor:
        """Return the variable to start from, for clean images ``(B, C, H, W)``."""

    @abstractmethod
    def image(self, variable: Tensor, clean: Tensor) -> Tensor:
        """Return the images ``(B, C, H, W)`` in [0, 1] of a variable; differentiable."""

    @abstractmethod
    def move(self, variable: Tensor, direction: Tensor, clean: Tensor) -> Tensor:
        """Return the allowed variable nearest to ``variable + direction``, without a graph."""

    def penalty(self, variable: Tensor) -> Tensor:
        """Return what is added to the loss ``(B,)`` for a variable; by default zeros."""
        return variable.new_zeros(len(variable))


@final
@checked
@dataclass(frozen=True)
class LinfBall(Framework):
    """Pixel perturbation of at most ``eps`` in every pixel (Eq. 1, 4).

    The variable is the image itself; a move is projected onto the ball and [0, 1] (Π of Eq. 1).

    Args:
        eps: Largest change of a pixel, in units of the image's range [0, 1].
        random_start: Start at a uniformly random point of the ball, not at the clean image.
        generator: Source of the random start; default: a fixed seed.

    >>> ball, clean = LinfBall(eps=0.1), torch.full((1, 1, 1, 2), 0.95)
    >>> ball.move(clean, torch.tensor([[[[0.3, -0.3]]]]), clean).flatten().tolist()
    [1.0, 0.8499999642372131]
    """

    eps: NonNegative
    random_start: bool = False
    generator: torch.Generator | None = None

    def init(self, clean: Tensor) -> Tensor:
        """Return the clean images, or a random point around them."""
        if not self.random_start:
            return clean.detach()
        generator = self.generator or torch.Generator().manual_seed(0)
        unit = torch.rand(clean.shape, generator=generator, device=generator.device)
        return self.move(clean, (2 * unit.to(clean) - 1) * self.eps, clean)

    def image(self, variable: Tensor, clean: Tensor) -> Tensor:
        """Return the variable itself."""
        return variable

    def move(self, variable: Tensor, direction: Tensor, clean: Tensor) -> Tensor:
        """Add a direction and project onto the ball and onto [0, 1]."""
        moved = variable.detach() + direction  # a new tensor: the rest works in place
        return moved.sub_(clean).clamp_(-self.eps, self.eps).add_(clean).clamp_(0, 1)


@final
@checked
@dataclass(frozen=True)
class Flow(Framework):
    """Spatial transformation: each pixel takes its value from a nearby position (§A4).

    The variable is the flow ``(B, 2, H, W)`` in pixels, along x and y; the image is sampled
    bilinearly. Positions outside the image have the value of its border.

    Args:
        weight: Weight of the flow loss, tau of Eq. 21.
        bound: Largest displacement along either axis, in pixels; default: none.

    Reference: Xiao et al., Spatially Transformed Adversarial Examples, ICLR 2018.
    """

    weight: NonNegative
    bound: Positive | None = None

    def init(self, clean: Tensor) -> Tensor:
        """Return a flow of zeros: the clean images."""
        return torch.zeros_like(clean[:, :1]).repeat(1, 2, 1, 1)

    def image(self, variable: Tensor, clean: Tensor) -> Tensor:
        """Return the images sampled at each pixel's position plus its flow."""
        from kornia.geometry.transform import remap  # here: importing kornia takes seconds

        wide = torch.promote_types(clean.dtype, torch.float32)  # half precision is too coarse
        height, width = clean.shape[-2:]
        rows = torch.arange(height, dtype=wide, device=clean.device)[:, None]
        columns = torch.arange(width, dtype=wide, device=clean.device)
        # PyTorch's backward pass may crash at positions that are NaN: such pixels do not move.
        across, down = variable.to(wide).nan_to_num().unbind(dim=1)
        moved: Tensor = remap(
            clean.to(wide), columns + across, rows + down, padding_mode="border", align_corners=True
        )
        return moved.clamp(0, 1).to(clean.dtype)  # interpolation may round past 1

    def move(self, variable: Tensor, direction: Tensor, clean: Tensor) -> Tensor:
        """Add a direction; clamp to the bound."""
        moved = variable.detach() + direction
        return moved if self.bound is None else moved.clamp_(-self.bound, self.bound)

    def penalty(self, variable: Tensor) -> Tensor:
        """Return the flow loss, weighted."""
        return self.weight * flow_loss(variable)


def flow_loss(flow: Tensor) -> Tensor:
    """Return l_flow of Eq. 21 ``(B,)``, for flows ``(B, 2, H, W)``.

    The sum over pixels, and over the four neighbours of each, of the L2 norm of the difference of
    their flows.

    >>> flow_loss(torch.tensor([[[[0.0, 3.0]], [[0.0, 4.0]]]])).tolist()
    [10.0]
    """
    down, across = (safe_sqrt(flow.diff(dim=dim).square().sum(dim=1)) for dim in (2, 3))
    # Each pair counts for both of its pixels.
    return 2 * (down.sum(dim=(1, 2)) + across.sum(dim=(1, 2)))


def quantize(images: Tensor, bits: int = 8) -> Tensor:
    """Return images rounded to a bit depth, as multiples of 1 / (2**bits - 1).

    >>> quantize(torch.tensor([0.2, 0.6]), bits=1).tolist()
    [0.0, 1.0]
    """
    levels: int = 2**bits - 1
    return (images * levels).round() / levels

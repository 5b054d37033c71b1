# SPDX-License-Identifier: MIT
r"""Adaptive ADV2: attacks that know of a detector and evade it (§4 Q3, Algorithm 2).

Feature squeezing compares what a classifier says of an image and of the image squeezed. Against
smoothing squeezers the attack gets another term, `Squeezing`; any squeezer with a gradient will do,
and several at once. Bit depth reduction has none, and the paper attacks it in two stages:
`BitDepthADV2`.

Differs from the paper: stage 1 goes by one level, as in the official code; by 1 / 2**bits, which is
half a level at one bit, no pixel would ever rise. Differs from the official code: every squeezer is
met with its own gradient, the 2x2 median too (there the detector's and the attack's medians
differ).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_adv2.attacks.adv2 import ADV2
from captum_adv2.attacks.base import CarefulAttack
from captum_adv2.attacks.frameworks import quantize
from captum_adv2.attacks.run import Batch, Best, Regular
from captum_adv2.checks import (
    expect_floats,
    expect_function,
    expect_integer,
    expect_logits,
    expect_model,
    expect_number,
)
from captum_adv2.types import Candidate

__all__ = ["BitDepthADV2", "Matching", "Squeezing"]

Squeezer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Squeezing:
    """A term that makes a classifier say of an image, squeezed, what it says of it unsqueezed.

    The cross entropy of the two predictions (l_sqz), summed over squeezers; or, with thresholds,
    the official code's hinge: by how much the L1 distance of their probabilities exceeds a share of
    the detector's threshold. All squeezed copies go through the model in one forward pass.

    Args:
        model: The classifier; takes images in [0, 1].
        squeezers: Functions of images ``(B, C, H, W)``, with a gradient.
        weight: Weight of the term.
        thresholds: The detector's, one for each squeezer, for the hinge.
        share: Share of the thresholds to stay below, in [0, 1].

    Raises:
        TypeError: Something of a wrong type.
        ValueError: A number out of range, no squeezer, or not a threshold for each.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    >>> term = Squeezing(model, (lambda images: images / 2,))
    >>> x, maps, target = torch.rand(2, 1, 4, 4), torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    >>> term(Candidate(x, model(x), maps, target, maps, 0.0)).shape
    torch.Size([2])
    """

    model: nn.Module
    squeezers: tuple[Squeezer, ...]
    weight: float = 1.0
    thresholds: tuple[float, ...] | None = None
    share: float = 0.75

    def __post_init__(self) -> None:
        """Check types and ranges."""
        expect_model(self.model)
        if not isinstance(self.squeezers, tuple | list):
            raise TypeError(f"expected a tuple of functions of images, got {self.squeezers!r}")
        for squeezer in self.squeezers:
            expect_function(squeezer, "each of squeezers")
        if not self.squeezers:
            raise ValueError("expected at least one squeezer, got none")
        expect_number(self.weight, "weight", low=0.0)
        expect_number(self.share, "share", low=0.0, high=1.0)
        if self.thresholds is None:
            return
        if not isinstance(self.thresholds, tuple | list):
            raise TypeError(f"expected a tuple of thresholds, got {self.thresholds!r}")
        if len(self.thresholds) != len(self.squeezers):
            raise ValueError(
                f"expected a threshold for each of {len(self.squeezers)} squeezers, got "
                f"{len(self.thresholds)}"
            )
        for threshold in self.thresholds:
            expect_number(threshold, "thresholds", low=0.0, high=2.0)

    def __call__(self, candidate: Candidate) -> Tensor:
        """Return the loss ``(B,)``."""
        copies = torch.cat([squeeze(candidate.images) for squeeze in self.squeezers])
        logits = expect_logits(self.model(copies), len(copies))
        squeezed = logits.reshape(len(self.squeezers), -1, logits.shape[1])  # (n, B, classes)
        ours = candidate.logits.softmax(dim=1)
        if self.thresholds is None:
            losses = -(ours * squeezed.log_softmax(dim=2)).sum(dim=2)  # (n, B)
        else:
            limits = self.share * torch.tensor(self.thresholds).to(squeezed)[:, None]
            losses = ((ours - squeezed.softmax(dim=2)).abs().sum(dim=2) - limits).relu()
        total: Tensor = self.weight * losses.sum(dim=0)
        return total


@dataclass(frozen=True)
class Matching:
    """A term that makes a classifier say what it says of another image (Algorithm 2, stage 2).

    Args:
        probabilities: What it says of the other images ``(B, classes)``, one for each image of the
            attacked batch, in its order.
        weight: Weight of the term.
        slack: L1 distance of probabilities, in [0, 2], that costs nothing.

    Raises:
        TypeError: Something of a wrong type.
        ValueError: A number out of range, or probabilities without two dimensions; at a call:
            probabilities of other images, or other classes.

    >>> said = torch.tensor([[0.5, 0.5]])
    >>> maps, target = torch.rand(1, 1, 2, 2), torch.tensor([1])
    >>> Matching(said)(Candidate(maps, torch.zeros(1, 2), maps, target, maps, 0.0)).item()
    0.0
    """

    probabilities: Tensor
    weight: float = 1.0
    slack: float = 0.0

    def __post_init__(self) -> None:
        """Check types and ranges."""
        expect_floats(self.probabilities, "probabilities", 2)
        expect_number(self.weight, "weight", low=0.0)
        expect_number(self.slack, "slack", low=0.0, high=2.0)

    def __call__(self, candidate: Candidate) -> Tensor:
        """Return the loss ``(B,)``."""
        rows, known = candidate.rows, self.probabilities
        try:
            wanted = (known if rows is None else known[rows]).expand_as(candidate.logits)
        except (IndexError, RuntimeError):
            raise ValueError(
                f"expected probabilities for each image of the batch, logits of shape "
                f"{tuple(candidate.logits.shape)}, got shape {tuple(known.shape)}"
            ) from None
        apart = (candidate.logits.softmax(dim=1) - wanted).abs().sum(dim=1)
        return self.weight * (apart - self.slack).relu()


@final
class BitDepthADV2(CarefulAttack):
    r"""ADV2 that evades bit depth reduction, in two stages (Algorithm 2).

    Stage 1 looks among *squeezed* images for one of the target class near the clean image: sign
    steps of one level between the squeezed ends of the attack's ball. Stage 2 is the attack, with a
    further term: the classifier shall say of its image what it says of the other.

    Args:
        attack: Stage 2, and the ball of stage 1.
        bits: Bit depth of the detector, 1 to 8.
        steps: Steps of stage 1.
        weight: Weight of the further term.
        slack: L1 distance of probabilities that costs nothing; the official code's is 0.75 times
            the detector's threshold.

    Raises:
        TypeError: ``attack`` is not an `ADV2`, or a number of a wrong type.
        ValueError: A number out of range.

    Shape:
        As `ADV2`, in all its modes.

    >>> from captum_adv2.interpreters import CAM
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ...                       nn.Linear(4, 3))
    >>> attack = BitDepthADV2(ADV2(model, CAM(model), steps=4), bits=3, steps=4)
    >>> attack.set_mode_targeted_random(quiet=True)
    >>> attack(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        attack: ADV2,
        bits: int,
        *,
        steps: int = 100,
        weight: float = 1.0,
        slack: float = 0.0,
    ) -> None:
        if not isinstance(attack, ADV2):
            raise TypeError(f"expected attack to be an ADV2, got {type(attack).__name__}")
        super().__init__("BitDepthADV2", attack.model)
        # As the attack was set up; from now on setters reach both.
        setup = ("device", "attack_mode", "targeted", "normalization_used")
        self.__dict__.update({name: getattr(attack, name) for name in setup})
        self._normalization_applied = attack._normalization_applied
        self.second = attack
        self.bits = bits
        self.steps = steps
        self.weight = weight
        self.slack = slack
        self.supported_mode = ["default", "targeted"]
        self._check()

    def forward(
        self, images: Tensor, labels: Tensor | None = None, *, target_maps: Tensor | None = None
    ) -> Tensor:
        """Run both stages on images in [0, 1]; called by ``__call__``."""
        self._check()
        second = copy.copy(self.second)
        with torch.enable_grad():
            interpreter, batch, target_maps = second._prepare(images, labels, target_maps)
            squeezed = self._first(batch)
            target = self._landed(squeezed, batch.labels) if batch.target is None else batch.target
            said = self._said(squeezed, target)
            second.terms = (*second.terms, Matching(said, self.weight, self.slack))
            return second._attack(interpreter, batch._replace(target=target), target_maps).detach()

    @torch.no_grad()
    def _said(self, squeezed: Tensor, target: Tensor) -> Tensor:
        """Return the probabilities to match ``(B, classes)``: what the model says of stage 1.

        Where that missed the target class they would pull away from it; there, it is to be sure.
        """
        logits: Tensor = self.get_logits(squeezed)
        sure = F.one_hot(target, logits.shape[1]).to(logits)
        reached = logits.argmax(dim=1) == target
        return torch.where(reached[:, None], logits.softmax(dim=1), sure)

    def _first(self, batch: Batch) -> Tensor:
        """Return squeezed images, adversarial as far as they can be."""
        clean, eps = batch.clean, self.second.eps
        loss, best = Regular(self.get_logits, batch), Best()
        low, high = (quantize((clean + e).clamp(0, 1), self.bits) for e in (-eps, eps))
        x = quantize(clean, self.bits)
        hidden = not self.second.verbose
        with tqdm(range(self.steps), "squeezed", unit="step", disable=hidden) as numbers:
            for _ in numbers:
                leaf = x.detach().requires_grad_()
                losses = loss.prediction(leaf, 0.0)
                best.offer(x, losses.detach(), loss.rows)
                (gradient,) = torch.autograd.grad(losses.sum(), leaf)
                moved = quantize(x - gradient.sign() / (2**self.bits - 1), self.bits)
                x = torch.minimum(torch.maximum(moved, low), high)
        with torch.no_grad():
            return best.better(x, lambda images: loss.prediction(images, 1.0))

    def _check(self) -> None:
        expect_integer(self.bits, "bits", low=1, high=8)
        expect_integer(self.steps, "steps", low=1)
        expect_number(self.weight, "weight", low=0.0)
        expect_number(self.slack, "slack", low=0.0, high=2.0)

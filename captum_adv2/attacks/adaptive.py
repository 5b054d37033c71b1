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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_adv2.attacks.adv2 import ADV2
from captum_adv2.attacks.base import CarefulAttack, Request
from captum_adv2.attacks.frameworks import quantize
from captum_adv2.attacks.terms import Candidate
from captum_adv2.spec import Bits, Count, NonNegative, Unit, checked, expect, expect_logits

Squeezer = Callable[[Tensor], Tensor]


@checked
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

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    >>> term = Squeezing(model, (lambda images: images / 2,))
    >>> x, maps, target = torch.rand(2, 1, 4, 4), torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    >>> term(Candidate(x, model(x), maps, target, maps, 0.0)).shape
    torch.Size([2])
    """

    model: nn.Module
    squeezers: Sequence[Squeezer]
    weight: NonNegative = 1.0
    thresholds: Sequence[NonNegative] | None = None
    share: Unit = 0.75

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


@checked
@dataclass(frozen=True)
class Matching:
    """A term that makes a classifier say what it says of another image (Algorithm 2, stage 2).

    Args:
        probabilities: What it says of the other images ``(B, classes)``, one for each image of the
            attacked batch, in its order.
        weight: Weight of the term.
        slack: L1 distance of probabilities, in [0, 2], that costs nothing.

    >>> said = torch.tensor([[0.5, 0.5]])
    >>> maps, target = torch.rand(1, 1, 2, 2), torch.tensor([1])
    >>> Matching(said)(Candidate(maps, torch.zeros(1, 2), maps, target, maps, 0.0)).item()
    0.0
    """

    probabilities: Tensor
    weight: NonNegative = 1.0
    slack: NonNegative = 0.0

    def __call__(self, candidate: Candidate) -> Tensor:
        """Return the loss ``(B,)``."""
        rows, known = candidate.rows, self.probabilities
        wanted = known if rows is None else known[rows]
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

    second: ADV2
    bits: Bits
    steps: Count
    weight: NonNegative
    slack: NonNegative

    def __init__(
        self,
        attack: ADV2,
        bits: int,
        *,
        steps: int = 100,
        weight: float = 1.0,
        slack: float = 0.0,
    ) -> None:
        expect(attack, ADV2, "attack")
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

    def forward(
        self, images: Tensor, labels: Tensor | None = None, *, target_maps: Tensor | None = None
    ) -> Tensor:
        """Run both stages on images in [0, 1]; called by ``__call__``."""
        second = copy.copy(self.second)
        request = second._request(images, labels)
        with torch.enable_grad():
            squeezed = self._first(request)
            target = request.target
            if target is None:
                target = second._landed(squeezed, request.labels)
            term = Matching(self._said(squeezed, target), self.weight, self.slack)
            second.terms = (*second.terms, term)
            return second._attack(request._replace(target=target), target_maps).detach()

    @torch.no_grad()
    def _said(self, squeezed: Tensor, target: Tensor) -> Tensor:
        """Return the probabilities to match ``(B, classes)``: what the model says of stage 1.

        Where that missed the target class they would pull away from it; there, it is to be sure.
        """
        logits: Tensor = self.get_logits(squeezed)
        sure = F.one_hot(target, logits.shape[1]).to(logits)
        reached = logits.argmax(dim=1) == target
        return torch.where(reached[:, None], logits.softmax(dim=1), sure)

    def _first(self, request: Request) -> Tensor:
        """Return squeezed images, adversarial as far as they can be."""
        clean, eps = request.clean, self.second.eps
        label, sign = (request.labels, -1) if request.target is None else (request.target, 1)
        low, high = (quantize((clean + e).clamp(0, 1), self.bits) for e in (-eps, eps))
        x = best = quantize(clean, self.bits)
        least = torch.full_like(clean[:, 0, 0, 0], torch.inf)
        hidden = not self.second.verbose
        for number in tqdm(range(self.steps + 1), "squeezed", unit="step", disable=hidden):
            leaf = x.detach().requires_grad_()
            losses = sign * F.cross_entropy(self.get_logits(leaf), label, reduction="none")
            lower = losses.detach() < least
            best = torch.where(lower.view(-1, 1, 1, 1), x, best)
            least = torch.where(lower, losses.detach(), least)
            if number < self.steps:
                (gradient,) = torch.autograd.grad(losses.sum(), leaf)
                moved = quantize(x - gradient.sign() / (2**self.bits - 1), self.bits)
                x = torch.minimum(torch.maximum(moved, low), high)
        return best

# SPDX-License-Identifier: MIT
r"""Adaptive ADV2: attacks that know of a detector and evade it (§4 Q3, Algorithm 2).

Feature squeezing compares the classifier's predictions for an image and for a squeezed copy of it.
Against squeezers that have a gradient, such as smoothing, the attack gets another term of its loss,
`Squeezing`, for one squeezer or for several at once. Bit depth reduction has no gradient, and the
paper attacks it in two stages: `BitDepthADV2`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_adv2.attacks.adv2 import ADV2
from captum_adv2.attacks.base import CarefulAttack
from captum_adv2.attacks.dual import Request
from captum_adv2.attacks.frameworks import quantize
from captum_adv2.attacks.loop import classified
from captum_adv2.attacks.terms import Candidate
from captum_adv2.progress import progress_bar
from captum_adv2.spec import Bits, Count, NonNegative, Unit, checked, expect_logits

Squeezer = Callable[[Tensor], Tensor]


@checked
@dataclass(frozen=True)
class Squeezing:
    """A term that makes the predictions for an image and for its squeezed copies agree.

    The cross entropy of the two predictions (l_sqz), summed over squeezers. With thresholds, the
    official code's hinge instead: the excess of the L1 distance of the two predictions over a share
    of the detector's threshold. All squeezed copies take one forward pass together.

    Args:
        model: The classifier; takes images in [0, 1].
        squeezers: Functions of images ``(B, C, H, W)``, with a gradient.
        weight: Weight of the term.
        thresholds: The detector's, one for each squeezer, for the hinge.
        share: Share of the thresholds to stay below.

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
            limits = self.share * torch.tensor(self.thresholds).to(squeezed)
            distances = (ours - squeezed.softmax(dim=2)).abs().sum(dim=2)
            losses = (distances - limits.view(len(self.squeezers), 1)).relu()
        return self.weight * losses.sum(dim=0)


@checked
@dataclass(frozen=True)
class Matching:
    """A term that makes the prediction for an image equal to a given one (Algorithm 2, stage 2).

    Args:
        probabilities: The predictions to match ``(B, classes)``, one for each attacked image.
        weight: Weight of the term.
        slack: L1 distance of probabilities, in [0, 2], that costs nothing.

    >>> wanted = torch.tensor([[0.5, 0.5]])
    >>> maps, target = torch.rand(1, 1, 2, 2), torch.tensor([1])
    >>> Matching(wanted)(Candidate(maps, torch.zeros(1, 2), maps, target, maps, 0.0)).item()
    0.0
    """

    probabilities: Tensor
    weight: NonNegative = 1.0
    slack: NonNegative = 0.0

    def __call__(self, candidate: Candidate) -> Tensor:
        """Return the loss ``(B,)``."""
        rows = slice(None) if candidate.rows is None else candidate.rows
        distance = (candidate.logits.softmax(dim=1) - self.probabilities[rows]).abs().sum(dim=1)
        return self.weight * (distance - self.slack).relu()


@final
class BitDepthADV2(CarefulAttack):
    r"""ADV2 that evades bit depth reduction, in two stages (Algorithm 2).

    Stage 1 searches the *squeezed* images of the attack's ball for one of the target class, by sign
    steps of one level. Stage 2 is the attack itself, with a further term: the classifier's
    prediction has to match that for the image of stage 1. Shapes and modes are those of `ADV2`.

    Args:
        attack: The attack of stage 2; its ball is that of stage 1 too.
        bits: Bit depth of the detector.
        steps: Steps of stage 1.
        weight: Weight of the further term.
        slack: L1 distance of probabilities that costs nothing; in the official code 0.75 times the
            detector's threshold.

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

    @checked
    def __init__(
        self,
        attack: ADV2,
        bits: Bits,
        *,
        steps: Count = 100,
        weight: NonNegative = 1.0,
        slack: NonNegative = 0.0,
    ) -> None:
        super().__init__("BitDepthADV2", attack.model)
        # Set up as the attack is; from now on torchattacks' setters reach both.
        inherited = vars(self).keys() - {"attack", "_attacks"}
        self.__dict__.update({name: getattr(attack, name) for name in inherited})
        self.second = attack
        self.bits, self.steps, self.weight, self.slack = bits, steps, weight, slack
        self._close()

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
            term = Matching(self._to_match(squeezed, target), self.weight, self.slack)
            second.terms = (*second.terms, term)
            return second._attack(request._replace(target=target), target_maps).detach()

    def _first(self, request: Request) -> Tensor:
        """Return the squeezed images that are nearest to the target, or farthest from the label."""
        classes, sign = (request.labels, -1) if request.target is None else (request.target, 1)
        clean, eps = request.clean, self.second.eps
        low = quantize((clean - eps).clamp(0, 1), self.bits)
        high = quantize((clean + eps).clamp(0, 1), self.bits)
        images = best = quantize(clean, self.bits)
        least = torch.full_like(clean[:, 0, 0, 0], torch.inf)
        shown, steps = self.second.verbose, range(self.steps + 1)
        for number in progress_bar(steps, desc="squeezed", unit="step", shown=shown):
            leaf = images.detach().requires_grad_()
            losses = sign * F.cross_entropy(self.get_logits(leaf), classes, reduction="none")
            lower = losses.detach() < least
            best = torch.where(lower.view(-1, 1, 1, 1), images, best)
            least = torch.where(lower, losses.detach(), least)
            if number < self.steps:
                (gradient,) = torch.autograd.grad(losses.sum(), leaf)
                moved = quantize(images - gradient.sign() / (2**self.bits - 1), self.bits)
                images = torch.minimum(torch.maximum(moved, low), high)
        return best

    @torch.no_grad()
    def _to_match(self, squeezed: Tensor, target: Tensor) -> Tensor:
        """Return the predictions to match ``(B, classes)``: those for the images of stage 1.

        Where stage 1 missed the target class, it is certainty of that class instead.
        """
        logits: Tensor = self.get_logits(squeezed)
        certain = F.one_hot(target, logits.shape[1]).to(logits)
        reached = classified(logits, target)
        return torch.where(reached[:, None], logits.softmax(dim=1), certain)

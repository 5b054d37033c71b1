# SPDX-License-Identifier: MIT
"""The one loop: a run of steps on a variable, the losses of its two phases, the best iterate.

`Run` moves a framework's variable by a step rule. It is given `Regular`, the warm start's loss, and
then `Dual`, the attacker's loss (Eq. 3), which also notes the best iterate of each image. Neither
knows what kind of interpreter, framework or step rule it works with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_adv2.attacks.frameworks import Framework, quantize
from captum_adv2.attacks.steps import Problem, Step
from captum_adv2.interpreters.base import Surrogate
from captum_adv2.interpreters.gradient import probability
from captum_adv2.types import Candidate, Term

__all__ = ["Batch", "Best", "Callback", "Dual", "Progress", "Regular", "Run"]

Callback: TypeAlias = Callable[["Progress"], None]


class Progress(NamedTuple):
    """What a callback is told at each gradient evaluation; ``callback=records.append`` keeps all.

    Attributes:
        step: Number of the evaluation, from 0.
        confidence: Probability of the target class ``(B,)``; of any other class than the label in
            the warm start of an untargeted attack.
        distance: L1 distance of the surrogate's map to the target map, in [0, 1], ``(B,)``; NaN in
            the warm start, which looks at no map.
    """

    step: int
    confidence: Tensor
    distance: Tensor


class Batch(NamedTuple):
    """A batch under attack, and what the attacker wants of it.

    Attributes:
        clean: Clean images ``(B, C, H, W)``.
        own: Each image's class, as the model sees it ``(B,)``.
        labels: The classes to leave in an untargeted attack ``(B,)``.
        target: The attacker's class ``(B,)``; ``None`` while an untargeted attack has none.
        map_size: Height and width of the interpreter's maps.
    """

    clean: Tensor
    own: Tensor
    labels: Tensor
    target: Tensor | None
    map_size: tuple[int, int]


class Best:
    """Each image's best iterate so far, by the least score."""

    def __init__(self) -> None:
        self.images: Tensor | None = None
        self._score = torch.empty(0)

    def offer(self, images: Tensor, score: Tensor) -> None:
        """Take over the images whose score ``(B,)`` is lower."""
        if self.images is None:
            self.images, self._score = images, score
            return
        self.images, self._score = _lower(images, score, self.images, self._score)

    def better(self, final: Tensor, judge: Callable[[Tensor], Tensor]) -> Tensor:
        """Return, per image, the best or the final iterate, whichever a judge scores lower."""
        if self.images is None:
            return final
        return _lower(final, judge(final), self.images, judge(self.images))[0]


def _lower(
    images: Tensor, score: Tensor, others: Tensor, other_score: Tensor
) -> tuple[Tensor, Tensor]:
    lower = score < other_score
    return (
        torch.where(lower.view(-1, 1, 1, 1), images, others),
        torch.where(lower, score, other_score),
    )


def _total(terms: tuple[Term, ...], candidate: Candidate) -> Tensor:
    """Return the sum ``(B,)`` of terms; check that each is a loss an image."""
    batch = len(candidate.images)
    total = torch.zeros_like(candidate.images[:, 0, 0, 0])
    for term in terms:
        losses: object = term(candidate)
        if not isinstance(losses, Tensor) or losses.shape != (batch,):
            found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"expected a loss an image, shape ({batch},), from term {term!r}, got {found}; "
                "do not reduce over the batch"
            )
        total = total + losses
    return total


class Regular:
    """The loss of the warm start: cross entropy alone, towards the target or away from a label."""

    def __init__(self, logits: Callable[[Tensor], Tensor], batch: Batch) -> None:
        self._logits = logits
        self._targeted = batch.target is not None
        self._label = batch.labels if batch.target is None else batch.target
        self.confidence = self.distance = torch.full_like(batch.clean[:, 0, 0, 0], torch.nan)

    def advance(self, images: Tensor) -> None:
        """Do nothing: nobody follows."""

    def __call__(self, images: Tensor, progress: float) -> Tensor:
        """Return the loss ``(B,)``."""
        return self.prediction(images, progress)

    def interpretation(self, images: Tensor, progress: float) -> Tensor:
        """Return zeros: the warm start looks at no map."""
        return 0 * images.sum(dim=(1, 2, 3))

    @torch.no_grad()
    def reached(self, images: Tensor) -> Tensor:
        """Return the probability ``(B,)`` of the target, or of any class but the label."""
        p = probability(self._logits(images), self._label)
        return p if self._targeted else 1 - p

    def prediction(self, images: Tensor, progress: float) -> Tensor:
        """Return the loss ``(B,)``."""
        logits = self._logits(images)
        p = probability(logits.detach(), self._label)
        self.confidence = p if self._targeted else 1 - p
        loss = F.cross_entropy(logits, self._label, reduction="none")
        return loss if self._targeted else -loss


class Dual:
    """The attacker's loss (Eq. 3), as a function of images; notes the best iterate on the way.

    The terms are prediction, interpretation, and further ones.
    """

    def __init__(
        self,
        logits: Callable[[Tensor], Tensor],
        follower: Surrogate,
        target: Tensor,
        target_maps: Tensor,
        terms: tuple[Term, ...],
        floor: float,
    ) -> None:
        self._logits = logits
        self._follower = follower
        self._target = target
        self._target_maps = target_maps
        self._terms = terms
        self._floor = floor
        self.best = Best()
        self.confidence = self.distance = torch.empty(0)

    def advance(self, images: Tensor) -> None:
        """Let the follower answer the iterate."""
        self._follower.advance(images)

    def __call__(self, images: Tensor, progress: float) -> Tensor:
        """Return the loss ``(B,)``; offer the iterate to the best ones."""
        return self._explained(images, progress, self._terms[:2])

    def interpretation(self, images: Tensor, progress: float) -> Tensor:
        """Return the loss but for its first term ``(B,)``; offer the iterate to the best ones."""
        return self._explained(images, progress, self._terms[1:2])

    def prediction(self, images: Tensor, progress: float) -> Tensor:
        """Return the first term ``(B,)``; it sees the target maps, for none are computed."""
        logits = self._logits(images)
        self.confidence = probability(logits.detach(), self._target)
        candidate = Candidate(
            images, logits, self._target_maps, self._target, self._target_maps, progress
        )
        return _total(self._terms[:1], candidate)

    @torch.no_grad()
    def reached(self, images: Tensor) -> Tensor:
        """Return the probability of the target class ``(B,)``."""
        return probability(self._logits(images), self._target)

    def _explained(self, images: Tensor, progress: float, terms: tuple[Term, ...]) -> Tensor:
        candidate, penalty = self._candidate(self._follower, images, progress)
        further = _total(self._terms[2:], candidate)
        self.best.offer(images.detach(), self._score(candidate, further))
        total = _total(terms, candidate) + further
        return total if penalty is None else total + penalty

    @torch.no_grad()
    def judge(self, reported: Surrogate, images: Tensor) -> Tensor:
        """Return the score ``(B,)`` that users will see: of the reported map, after rounding."""
        candidate, _penalty = self._candidate(reported, quantize(images), 1.0)
        return self._score(candidate, _total(self._terms[2:], candidate))

    def _candidate(
        self, surrogate: Surrogate, images: Tensor, progress: float
    ) -> tuple[Candidate, Tensor | None]:
        maps, logits, penalty = surrogate(images)
        logits = self._logits(images) if logits is None else logits
        target = self._target
        return Candidate(images, logits, maps, target, self._target_maps, progress), penalty

    @torch.no_grad()
    def _score(self, candidate: Candidate, further: Tensor) -> Tensor:
        """Return how good an iterate is ``(B,)``, less being better.

        Where the class is reached: the map distance and the further terms, squashed to (-1, 1) that
        none outweighs the class (a term that is infinite or NaN is at 1). Where it is not: more.
        """
        self.confidence = probability(candidate.logits, self._target)
        self.distance = (candidate.maps - self._target_maps).abs().mean(dim=(1, 2, 3))
        reached = candidate.logits.argmax(dim=1) == self._target
        short = 3 - self.confidence + (~reached).to(self.confidence)  # a distance is at most 1
        good = self.distance + (further / (1 + further.abs())).nan_to_num(nan=1.0)
        return torch.where(reached & (self.confidence >= self._floor), good, short)


class Run:
    """The state of one attack: the variable, moved by step rules, phase by phase.

    Args:
        framework: What is optimised.
        clean: Clean images ``(B, C, H, W)``.
        alpha: Step size.
        callback: Told after each gradient evaluation, if any.
        bar: Progress bar of tqdm.
    """

    def __init__(
        self,
        framework: Framework,
        clean: Tensor,
        alpha: float,
        callback: Callback | None,
        bar: Any,
    ) -> None:
        self._framework = framework
        self._clean = clean
        self._alpha = alpha
        self._callback = callback
        self._bar = bar
        self._variable = framework.init(clean)

    @property
    def images(self) -> Tensor:
        """The current iterate ``(B, C, H, W)``."""
        return self._framework.image(self._variable, self._clean)

    def descend(self, loss: Regular | Dual, step: Step, numbers: range) -> None:
        """Take the steps of one phase."""
        problem = Problem(self._framework, self._clean, self._alpha, len(numbers), loss)
        memory = None
        for number in numbers:
            problem.progress = (number - numbers.start) / len(numbers)
            loss.advance(self.images)
            self._variable, memory = step(problem, self._variable, memory)
            if self._callback is not None:
                self._callback(Progress(number, loss.confidence, loss.distance))
            self._tell(loss)

    def _tell(self, loss: Regular | Dual) -> None:
        self._bar.update()
        if not self._bar.disable:  # reading numbers off a GPU waits for it
            self._bar.set_postfix(
                confidence=f"{loss.confidence.mean().item():.3f}",
                distance=f"{loss.distance.mean().item():.4f}",
            )

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
        rows: Which images of the batch these are ``(B,)``: all of them, in order, until some have
            left, being finished.
    """

    step: int
    confidence: Tensor
    distance: Tensor
    rows: Tensor


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


class Goal(NamedTuple):
    """Which images of a batch are under way ``(B,)``, and the classes and maps to reach."""

    rows: Tensor
    target: Tensor
    target_maps: Tensor


class Best:
    """Each image's best iterate so far, by the least score."""

    def __init__(self) -> None:
        self.images: Tensor | None = None
        self._score = torch.empty(0)

    def offer(self, images: Tensor, score: Tensor, rows: Tensor) -> None:
        """Take over the images whose score ``(B,)`` is lower; the first offer is of all of them.

        Args:
            images: Iterates ``(B, C, H, W)``.
            score: Their scores.
            rows: Which images of the batch they are ``(B,)``.
        """
        if self.images is None:
            self.images, self._score = images, score
            return
        images, score = _lower(images, score, self.images[rows], self._score[rows])
        self.images, self._score = _put(self.images, rows, images), _put(self._score, rows, score)

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


def _put(whole: Tensor, rows: Tensor, part: Tensor) -> Tensor:
    """Return a batch with some of its rows replaced; not `index_copy`: that forgets the format."""
    return whole.index_put((rows,), part)


def _take(state: Any, index: Tensor) -> Any:
    """Return a state of some images: of tensors with the batch first, numbers, tuples of these."""
    if isinstance(state, Tensor):
        return state[index] if state.ndim else state
    if isinstance(state, tuple):
        parts = [_take(part, index) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    if state is None or isinstance(state, int | float | str):
        return state
    raise TypeError(
        "expected a step rule's memory of tensors, numbers and tuples of these, which a finished "
        f"image can leave, got {type(state).__name__}; return such a memory, or attack with "
        "stop=None"
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
        self.rows = torch.arange(len(self._label), device=self._label.device)

    def advance(self, images: Tensor) -> None:
        """Do nothing: nobody follows."""

    def leave(self) -> None:
        """Let nobody leave: no map has been looked at."""

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

    Args:
        logits: The model.
        follower: What is differentiated in the interpreter's place.
        target: The attacker's class ``(B,)``.
        target_maps: Maps to reach ``(B, 1, h, w)``.
        terms: The summands of the loss.
        floor: Probability of the target class that is enough.
        stop: Map distance at which an image, being of that class, is finished; default: none is.
    """

    def __init__(
        self,
        logits: Callable[[Tensor], Tensor],
        follower: Surrogate,
        target: Tensor,
        target_maps: Tensor,
        terms: tuple[Term, ...],
        floor: float,
        stop: float | None = None,
    ) -> None:
        self._logits = logits
        self._follower = follower
        rows = torch.arange(len(target), device=target.device)
        self._whole = self._goal = Goal(rows, target, target_maps)
        self._terms = terms
        self._floor = floor
        self._stop = stop
        self._images: Tensor | None = None
        self.best = Best()
        self.confidence = self.distance = torch.empty(0)
        self._enough = torch.empty(0, dtype=torch.bool)

    @property
    def rows(self) -> Tensor:
        """Which images of the batch are under way ``(B,)``."""
        return self._goal.rows

    def advance(self, images: Tensor) -> None:
        """Let the follower answer the iterate."""
        self._follower.advance(images)

    def leave(self) -> tuple[Tensor, Tensor] | None:
        """Let finished images leave; say so if there are any.

        Returns:
            The iterates that were last explained, of those that leave too, and the positions among
            them of the images that stay.
        """
        if self._stop is None or self._images is None:
            return None
        going = ~(self._enough & (self.distance <= self._stop))
        if bool(going.all()):
            return None
        seen, stay = self._images, going.nonzero()[:, 0]
        if len(stay):
            self._follower.take(stay)
        self._goal, self._images, self._enough, self.confidence, self.distance = _take(
            (self._goal, self._images, self._enough, self.confidence, self.distance), stay
        )
        return seen, stay

    def __call__(self, images: Tensor, progress: float) -> Tensor:
        """Return the loss ``(B,)``; offer the iterate to the best ones."""
        return self._explained(images, progress, self._terms[:2])

    def interpretation(self, images: Tensor, progress: float) -> Tensor:
        """Return the loss but for its first term ``(B,)``; offer the iterate to the best ones."""
        return self._explained(images, progress, self._terms[1:2])

    def prediction(self, images: Tensor, progress: float) -> Tensor:
        """Return the first term ``(B,)``; it sees the target maps, for none are computed."""
        logits = self._logits(images)
        rows, target, target_maps = self._goal
        self.confidence = probability(logits.detach(), target)
        candidate = Candidate(images, logits, target_maps, target, target_maps, progress, rows)
        return _total(self._terms[:1], candidate)

    @torch.no_grad()
    def reached(self, images: Tensor) -> Tensor:
        """Return the probability of the target class ``(B,)``."""
        return probability(self._logits(images), self._goal.target)

    def _explained(self, images: Tensor, progress: float, terms: tuple[Term, ...]) -> Tensor:
        candidate, penalty = self._candidate(self._follower, images, progress, self._goal)
        further = _total(self._terms[2:], candidate)
        self._images = images.detach()
        self.best.offer(self._images, self._score(candidate, further), self.rows)
        total = _total(terms, candidate) + further
        return total if penalty is None else total + penalty

    @torch.no_grad()
    def judge(self, reported: Surrogate, images: Tensor) -> Tensor:
        """Return the score ``(B,)`` that users will see: of the reported map, after rounding."""
        candidate, _penalty = self._candidate(reported, quantize(images), 1.0, self._whole)
        return self._score(candidate, _total(self._terms[2:], candidate))

    def _candidate(
        self, surrogate: Surrogate, images: Tensor, progress: float, goal: Goal
    ) -> tuple[Candidate, Tensor | None]:
        maps, logits, penalty = surrogate(images)
        logits = self._logits(images) if logits is None else logits
        rows, target, target_maps = goal
        return Candidate(images, logits, maps, target, target_maps, progress, rows), penalty

    @torch.no_grad()
    def _score(self, candidate: Candidate, further: Tensor) -> Tensor:
        """Return how good an iterate is ``(B,)``, less being better.

        Where the class is reached: the map distance and the further terms, squashed to (-1, 1) that
        none outweighs the class (a term that is infinite or NaN is at 1). Where it is not: more.
        """
        self.confidence = probability(candidate.logits, candidate.target)
        self.distance = (candidate.maps - candidate.target_maps).abs().mean(dim=(1, 2, 3))
        reached = candidate.logits.argmax(dim=1) == candidate.target
        self._enough = reached & (self.confidence >= self._floor)
        short = 3 - self.confidence + (~reached).to(self.confidence)  # a distance is at most 1
        good = self.distance + (further / (1 + further.abs())).nan_to_num(nan=1.0)
        return torch.where(self._enough, good, short)


class Run:
    """The state of one attack: the variable, moved by step rules, phase by phase.

    Images that a loss is finished with leave the batch.

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

    def descend(self, loss: Regular | Dual, step: Step, numbers: range) -> Tensor:
        """Take the steps of one phase; return the images ``(B, C, H, W)`` where it ends.

        A finished image ends where it was last explained. Only a last phase may finish any.
        """
        problem = Problem(self._framework, self._clean, self._alpha, len(numbers), loss)
        ended, memory = self._clean, None
        for number in numbers:
            problem.progress = (number - numbers.start) / len(numbers)
            loss.advance(self._framework.image(self._variable, problem.clean))
            self._variable, memory = step(problem, self._variable, memory)
            rows = loss.rows
            if self._callback is not None:
                self._callback(Progress(number, loss.confidence, loss.distance, rows))
            self._tell(loss)
            left = loss.leave()
            if left is None:
                continue
            seen, stay = left
            ended = _put(ended, rows, seen)  # those that stay are put again
            if not len(stay):
                self._bar.total = self._bar.n  # complete, if short
                self._bar.refresh()
                return ended
            self._variable, problem.clean, memory = _take(
                (self._variable, problem.clean, memory), stay
            )
        return _put(ended, loss.rows, self._framework.image(self._variable, problem.clean))

    def _tell(self, loss: Regular | Dual) -> None:
        self._bar.update()
        if not self._bar.disable:  # reading numbers off a GPU waits for it
            self._bar.set_postfix(
                confidence=f"{loss.confidence.mean().item():.3f}",
                distance=f"{loss.distance.mean().item():.4f}",
            )

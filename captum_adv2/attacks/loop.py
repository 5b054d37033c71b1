# SPDX-License-Identifier: MIT
"""The one loop of every attack (§3.1, 3.6): steps on a problem, keeping each image's best iterate.

A `Problem` is the attacker's loss on a batch of images, as a function of what a framework lets the
attacker change. The warm start is a problem on the prediction alone, the rest of the attack one on
prediction and map (Eq. 3). Nothing here depends on the interpreter, framework or step rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from captum_adv2.attacks.frameworks import Framework, quantize
from captum_adv2.attacks.terms import Candidate, Term
from captum_adv2.interpreters.base import Interpreter, Surrogate
from captum_adv2.interpreters.gradient import probability

Part: TypeAlias = Literal["all", "prediction", "interpretation"]


class Progress(NamedTuple):
    """What a callback is told at each gradient evaluation; ``callback=records.append`` keeps all.

    Attributes:
        step: Number of the evaluation, from 0.
        confidence: Probability of the target class ``(B,)``; in an untargeted warm start, of any
            class but the label.
        distance: L1 distance of the surrogate's map to the target map ``(B,)``; NaN in the warm
            start.
        rows: Which images of the batch these are ``(B,)``: those that are not finished.
    """

    step: int
    confidence: Tensor
    distance: Tensor
    rows: Tensor


Callback: TypeAlias = Callable[[Progress], object]


class Batch(NamedTuple):
    """Images under attack, and what the attacker wants of them.

    Attributes:
        clean: Clean images ``(B, C, H, W)``.
        target: The target classes ``(B,)``; in an untargeted warm start, the labels to leave.
        target_maps: Maps to reach ``(B, 1, h, w)``; in the warm start, of no meaning.
        rows: Which images of the whole batch these are ``(B,)``.
    """

    clean: Tensor
    target: Tensor
    target_maps: Tensor
    rows: Tensor


class Best(NamedTuple):
    """Each image's best iterate ``(B, C, H, W)``, and its score ``(B,)``, less being better."""

    images: Tensor
    score: Tensor


class Step(Protocol):
    """A step rule: takes a variable to the next one.

    ``memory`` is the rule's own, ``None`` at the start: a tensor with the batch first, a number, or
    a tuple of these, so that finished images can be taken out of it.
    """

    def __call__(self, problem: Problem, variable: Tensor, memory: Any, /) -> tuple[Tensor, Any]:
        """Return the next variable, and the memory for the next call."""


@dataclass
class Problem:
    """One phase of an attack, as a step rule sees it: gradients, confidence and legal moves.

    Attributes:
        logits: The model, on images in [0, 1].
        framework: What is optimised.
        alpha: Step size.
        steps: Number of steps of this phase.
        interpreter: The interpreter under attack.
        batch: The images that are not finished.
        terms: Prediction loss, interpretation loss, further ones.
        surrogate: What is differentiated in place of the interpreter; ``None`` in the warm start,
            whose loss is the prediction loss alone.
        state: The surrogate's state.
        untargeted: Whether to leave ``batch.target`` instead of reaching it.
        floor: Probability of the target class that is enough.
        stop: Map distance at which an image is finished; ``None``: no image ever is.
        progress: Share of the phase that is done, in [0, 1).
        confidence: See `Progress`; at the latest gradient evaluation. So is ``distance``.
        distance: See `Progress`.
        enough: Whether each image was of the target class with enough confidence ``(B,)``.
        seen: The images of the latest gradient evaluation of the map ``(B, C, H, W)``.
        best: The best iterates of the whole batch.
    """

    logits: Callable[[Tensor], Tensor]
    framework: Framework
    alpha: float
    steps: int
    interpreter: Interpreter
    batch: Batch
    terms: tuple[Term, ...]
    surrogate: Surrogate | None = None
    state: Any = None
    untargeted: bool = False
    floor: float = 0.0
    stop: float | None = None
    progress: float = field(default=0.0, init=False)
    confidence: Tensor = field(init=False)
    distance: Tensor = field(init=False)
    enough: Tensor | None = field(default=None, init=False)
    seen: Tensor = field(init=False)
    best: Best | None = field(default=None, init=False)
    _advanced: bool = field(default=False, init=False)

    def begin(self, progress: float) -> None:
        """Begin a step."""
        self.progress = progress
        self._advanced = False

    def gradient(self, variable: Tensor, part: Part = "all") -> Tensor:
        """Return the gradient of each image's loss at its variable: one gradient evaluation."""
        leaf = variable.detach().requires_grad_()
        images = self.framework.image(leaf, self.batch.clean)
        if self.surrogate is not None and not self._advanced:
            self._advanced = True  # once a step, also where a step rule takes two gradients
            self.state = self.surrogate.advance(
                self.interpreter, images.detach(), self.state, self.progress
            )
        losses = self._losses(images, part) + self.framework.penalty(leaf)
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        return gradient

    @torch.no_grad()
    def reached(self, variable: Tensor) -> Tensor:
        """Return the probability of the target class ``(B,)``."""
        logits = self.logits(self.framework.image(variable, self.batch.clean))
        return probability(logits, self.batch.target)

    def move(self, variable: Tensor, direction: Tensor) -> Tensor:
        """Return the allowed variable nearest to ``variable + direction``."""
        return self.framework.move(variable, direction, self.batch.clean)

    @torch.no_grad()
    def better(self, final: Tensor, whole: Batch) -> Tensor:
        """Return, per image, the last or the best iterate, judged as users see them (8 bits)."""
        if self.best is None:
            return final
        scores = []
        for images in (final, self.best.images):
            rounded = quantize(images)
            maps, logits, _ = self.interpreter.explain(rounded, whole.target)
            logits = self.logits(rounded) if logits is None else logits
            candidate = Candidate(
                rounded, logits, maps, whole.target, whole.target_maps, 1.0, whole.rows
            )
            scores.append(self._score(candidate, _total(self.terms[2:], candidate)))
        return _choose(scores[0] < scores[1], final, self.best.images)

    def take_finished(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Take finished images out of the batch.

        Returns:
            ``None`` where there are none; else the rows of the batch before, the images they ended
            at, and the indices of those that stay.
        """
        if self.stop is None or self.enough is None:
            return None
        unfinished = ~(self.enough & (self.distance <= self.stop))
        if bool(unfinished.all()):
            return None
        rows, seen, stay = self.batch.rows, self.seen, unfinished.nonzero()[:, 0]
        self.batch, self.state, self.enough, self.confidence, self.distance, self.seen = take(
            (self.batch, self.state, self.enough, self.confidence, self.distance, seen), stay
        )
        return rows, seen, stay

    def _losses(self, images: Tensor, part: Part) -> Tensor:
        """Return the loss ``(B,)`` of images; where maps are looked at, note the best of them."""
        if self.surrogate is None or part == "prediction":
            return self._prediction(images)
        maps, logits, penalty = self.surrogate(self.interpreter, images, self.state, self.progress)
        logits = self.logits(images) if logits is None else logits
        candidate = self._candidate(images, logits, maps)
        further = _total(self.terms[2:], candidate)
        self._note(candidate, further)
        first = 1 if part == "interpretation" else 0
        losses = _total(self.terms[first:2], candidate) + further
        return losses if penalty is None else losses + penalty

    def _prediction(self, images: Tensor) -> Tensor:
        """Return the prediction loss ``(B,)``."""
        logits = self.logits(images)
        confidence = probability(logits.detach(), self.batch.target)
        self.confidence = 1 - confidence if self.untargeted else confidence
        self.distance = torch.full_like(confidence, torch.nan)
        losses = _total(self.terms[:1], self._candidate(images, logits, self.batch.target_maps))
        return -losses if self.untargeted else losses

    def _candidate(self, images: Tensor, logits: Tensor, maps: Tensor) -> Candidate:
        clean, target, target_maps, rows = self.batch
        return Candidate(images, logits, maps, target, target_maps, self.progress, rows)

    @torch.no_grad()
    def _note(self, candidate: Candidate, further: Tensor) -> None:
        """Keep the iterates that score lower than each image's best."""
        rows, self.seen = self.batch.rows, candidate.images.detach()
        score = self._score(candidate, further)
        if self.best is None:  # no image is finished yet
            self.best = Best(self.seen, score)
            return
        images, least = self.best.images[rows], self.best.score[rows]
        lower = score < least
        self.best = Best(
            _put(self.best.images, rows, _choose(lower, self.seen, images)),
            _put(self.best.score, rows, torch.where(lower, score, least)),
        )

    def _score(self, candidate: Candidate, further: Tensor) -> Tensor:
        """Return how good an iterate is ``(B,)``, less being better.

        With enough confidence in the target class: the map distance plus the further terms, which
        are squashed to (-1, 1), so that none outweighs the class. Without: above 2.
        """
        self.confidence = probability(candidate.logits, candidate.target)
        self.distance = (candidate.maps - candidate.target_maps).abs().mean(dim=(1, 2, 3))
        reached = candidate.logits.argmax(dim=1) == candidate.target
        self.enough = reached & (self.confidence >= self.floor)
        short = 3 - self.confidence + (~reached).to(self.confidence)  # a distance is at most 1
        good = self.distance + (further / (1 + further.abs())).nan_to_num(nan=1.0)
        return torch.where(self.enough, good, short)


def descend(
    problem: Problem,
    variable: Tensor,
    step: Step,
    numbers: range,
    tell: Callable[[Progress], None],
) -> tuple[Tensor, Tensor]:
    """Take the steps of one phase; return the variable and the images ``(B, C, H, W)`` at its end.

    A finished image ends where its map was last looked at.
    """
    ended, memory = problem.batch.clean, None
    for number in numbers:
        problem.begin((number - numbers.start) / len(numbers))
        variable, memory = step(problem, variable, memory)
        tell(Progress(number, problem.confidence, problem.distance, problem.batch.rows))
        finished = problem.take_finished()
        if finished is None:
            continue
        rows, images, stay = finished
        ended = _put(ended, rows, images)  # those that stay are put again at their end
        if not len(stay):
            return variable, ended
        variable, memory = take((variable, memory), stay)
    images = problem.framework.image(variable, problem.batch.clean)
    return variable, _put(ended, problem.batch.rows, images)


def take(state: Any, index: Tensor) -> Any:
    """Return the state of some images: tensors with the batch first, numbers, tuples of these."""
    if isinstance(state, Tensor):
        return state[index] if state.ndim else state
    if isinstance(state, tuple):
        parts = [take(part, index) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return state


def _total(terms: tuple[Term, ...], candidate: Candidate) -> Tensor:
    """Return the sum ``(B,)`` of terms; check that each is one loss an image."""
    total = torch.zeros_like(candidate.images[:, 0, 0, 0])
    for term in terms:
        losses = term(candidate)
        if losses.shape != total.shape:
            raise ValueError(
                f"expected one loss an image, shape {tuple(total.shape)}, from {term!r}, got "
                f"{tuple(losses.shape)}; do not reduce over the batch"
            )
        total = total + losses
    return total


def _choose(first: Tensor, images: Tensor, others: Tensor) -> Tensor:
    """Return the images where ``first (B,)`` holds, the others elsewhere."""
    return torch.where(first.view(-1, 1, 1, 1), images, others)


def _put(whole: Tensor, rows: Tensor, part: Tensor) -> Tensor:
    """Return a batch with some rows replaced."""
    return whole.index_put((rows,), part)  # `index_copy` would forget the memory format

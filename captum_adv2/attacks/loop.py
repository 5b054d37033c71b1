# SPDX-License-Identifier: MIT
"""The loop of every attack (§3.1, 3.6): steps on a problem, and the best iterate of each image.

A `Problem` is the attacker's loss on a batch of images, as a function of what a framework lets the
attacker change. The warm start is a problem on the prediction alone, the rest of the attack one on
prediction and map (Eq. 3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from captum_adv2.attacks.frameworks import Framework, quantize
from captum_adv2.attacks.terms import Candidate, Term, total
from captum_adv2.interpreters.base import Interpreter, Surrogate
from captum_adv2.interpreters.gradient import log_odds, probability

Part: TypeAlias = Literal["all", "prediction", "interpretation"]


class Progress(NamedTuple):
    """One step of an attack, for callbacks; ``callback=records.append`` keeps all.

    ``confidence (B,)`` is the probability of the target class; in an untargeted warm start, of any
    class but the label. ``distance (B,)`` is the L1 distance of the surrogate's map to the target
    map; NaN in the warm start. Both are those of the iterate at which the step's last gradient was
    taken, before the step moved it.
    """

    step: int  # from 0
    confidence: Tensor
    distance: Tensor
    rows: Tensor  # indices (B,) in the attacked batch of the images that are not finished


Callback: TypeAlias = Callable[[Progress], object]


class Batch(NamedTuple):
    """Images under attack, and the classes and maps to reach."""

    clean: Tensor  # (B, C, H, W)
    target: Tensor  # classes (B,); in an untargeted warm start, the labels to avoid
    target_maps: Tensor  # (B, 1, h, w); not used in the warm start
    rows: Tensor  # indices (B,) of these images in the attacked batch


class Step(Protocol):
    """A step rule: takes a variable to the next one.

    The memory belongs to the rule and is ``None`` at the start. It is made of tensors with the
    batch first, of numbers, and of tuples of these, so that finished images can be removed from it.
    """

    def __call__(self, problem: Problem, variable: Tensor, memory: Any, /) -> tuple[Tensor, Any]:
        """Return the next variable, and the memory for the next call."""


@dataclass
class Problem:
    """One phase of an attack, as a step rule sees it: gradients, confidence and legal moves.

    Its ``batch`` has the images that are not finished. ``confidence`` and ``distance`` are those of
    `Progress`, at the latest gradient evaluation; NaN where it computed none.
    """

    logits: Callable[[Tensor], Tensor]  # images in [0, 1] to the model's output
    framework: Framework
    alpha: float  # step size
    steps: int
    interpreter: Interpreter
    batch: Batch
    terms: tuple[Term, ...]  # prediction loss, interpretation loss, further terms
    surrogate: Surrogate | None = None  # None in the warm start: the prediction loss alone
    state: Any = None  # the surrogate's
    untargeted: bool = False  # whether to move away from the batch's target
    floor: float = 0.0  # confidence that is enough
    stop: float | None = None  # map distance at which an image is finished
    late: int = 0  # iterates near the end that `better` judges, too
    progress: float = field(default=0.0, init=False)  # share of the phase that is done
    confidence: Tensor = field(init=False)
    distance: Tensor = field(init=False)
    # Of the latest gradient evaluation that computed a map: whether images were of the target class
    # with enough confidence (B,), and these images. And the best iterate of the whole batch so far.
    enough: Tensor = field(init=False)
    seen: Tensor = field(init=False)
    best: Tensor | None = field(default=None, init=False)
    _score: Tensor = field(init=False)  # of the best iterates (B, 2); see `_judge`
    _late: dict[int, Tensor] = field(default_factory=dict, init=False)  # by step
    _advanced: float | None = field(default=None, init=False)  # progress of the surrogate's state

    def __post_init__(self) -> None:
        self.seen = self.batch.clean
        self.confidence = self.distance = torch.full_like(self.seen[:, 0, 0, 0], torch.nan)
        self.enough = torch.zeros_like(self.confidence, dtype=torch.bool)

    def gradient(self, variable: Tensor, part: Part = "all") -> Tensor:
        """Return the gradient of each image's loss, or of a part of it: one gradient evaluation."""
        leaf = variable.detach().requires_grad_()
        images = self.framework.image(leaf, self.batch.clean)
        if self.surrogate is not None and self._advanced != self.progress:
            self._advanced = self.progress  # once a step, even if its rule takes two gradients
            self.state = self.surrogate.advance(
                self.interpreter, images.detach(), self.state, self.progress
            )
        losses = self._losses(images, part) + self.framework.penalty(leaf)
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        return gradient

    @torch.no_grad()
    def reached(self, variable: Tensor) -> Tensor:
        """Return the confidence ``(B,)`` at a variable; see `Progress`."""
        return self._confidence(self.logits(self.framework.image(variable, self.batch.clean)))

    def move(self, variable: Tensor, direction: Tensor) -> Tensor:
        """Return the allowed variable nearest to ``variable + direction``."""
        return self.framework.move(variable, direction, self.batch.clean)

    @torch.no_grad()
    def better(self, final: Tensor, whole: Batch) -> Tensor:
        """Return each image's last, best or a late iterate, by its reported map after rounding."""
        if self.best is None:
            return final
        chosen, least = self.best, self._reported(self.best, whole)
        for images in (*self._late.values(), final):
            score = self._reported(images, whole)
            lower = before(score, least)[:, None]
            chosen = torch.where(lower[..., None, None], images, chosen)
            least = torch.where(lower, score, least)
        return chosen

    def _reported(self, images: Tensor, whole: Batch) -> Tensor:
        """Return the scores of images that are rounded to 8 bits, by their reported maps."""
        rounded, (_, target, target_maps, rows) = quantize(images), whole
        maps, logits, _ = self.interpreter.explain(rounded, target)
        logits = self.logits(rounded) if logits is None else logits
        candidate = Candidate(rounded, logits, maps, target, target_maps, 1.0, rows)
        return self._judge(candidate, total(self.terms[2:], candidate))[-1]

    def take_finished(self, last: Tensor) -> Tensor | None:
        """Remove finished images from the batch; put those whose maps were judged into ``last``.

        Return the indices of the images that remain; ``None`` where no image is finished.
        """
        if self.stop is None:
            return None
        unfinished = ~(self.enough & (self.distance <= self.stop))
        if bool(unfinished.all()):
            return None
        last[self.batch.rows] = self.seen  # those that remain are replaced when they end
        remaining = unfinished.nonzero()[:, 0]
        self.batch, self.state, self.enough, self.confidence, self.distance, self.seen = take(
            (self.batch, self.state, self.enough, self.confidence, self.distance, self.seen),
            remaining,
        )
        return remaining

    def _losses(self, images: Tensor, part: Part) -> Tensor:
        """Return the loss ``(B,)``; where maps are computed, keep the best iterates."""
        if self.surrogate is None or part == "prediction":
            return self._prediction(images)
        maps, logits, penalty = self.surrogate(self.interpreter, images, self.state, self.progress)
        logits = self.logits(images) if logits is None else logits
        candidate = self._candidate(images, logits, maps)
        further = total(self.terms[2:], candidate)
        self._keep_best(candidate, further)
        first = 1 if part == "interpretation" else 0
        losses = total(self.terms[first:2], candidate) + further
        return losses if penalty is None else losses + penalty

    def _prediction(self, images: Tensor) -> Tensor:
        logits = self.logits(images)
        self.confidence = self._confidence(logits.detach())
        self.distance = torch.full_like(self.confidence, torch.nan)
        losses = total(self.terms[:1], self._candidate(images, logits, self.batch.target_maps))
        return -losses if self.untargeted else losses

    def _confidence(self, logits: Tensor) -> Tensor:
        confidence = probability(logits, self.batch.target)
        return 1 - confidence if self.untargeted else confidence

    def _candidate(self, images: Tensor, logits: Tensor, maps: Tensor) -> Candidate:
        clean, target, target_maps, rows = self.batch
        return Candidate(images, logits, maps, target, target_maps, self.progress, rows)

    @torch.no_grad()
    def _keep_best(self, candidate: Candidate, further: Tensor) -> None:
        """Judge an iterate; keep it where it scores lower than the image's best, or it is due."""
        rows, self.seen = self.batch.rows, candidate.images.detach()
        self.confidence, self.distance, self.enough, score = self._judge(candidate, further)
        if self.best is None:  # the first iterate: no image is finished yet
            self.best, self._score = self.seen.clone(), score
            return
        best, least = self.best[rows], self._score[rows]
        lower = before(score, least)
        self.best[rows] = torch.where(lower.view(-1, 1, 1, 1), self.seen, best)
        self._score[rows] = torch.where(lower[:, None], score, least)
        step = round(self.progress * self.steps)
        if step in self._due():
            self._late[step] = self.best.index_copy(0, rows, self.seen)

    def _due(self) -> set[int]:
        """Return the steps whose iterates are late ones: in the last two fifths, evenly spaced."""
        return {round(self.steps * (1 - 0.4 * (n + 1) / self.late)) for n in range(self.late)}

    @torch.no_grad()
    def _judge(self, candidate: Candidate, further: Tensor) -> tuple[Tensor, ...]:
        """Return an iterate's confidence, distance and whether it is enough, ``(B,)``, and score.

        Scores are ``(B, 2)``; low is good, and the first entry comes first. It is 0 with enough
        confidence in the target class, 1 with the class alone, else 2. The second is the map
        distance plus the further terms, squashed to (-1, 1), where it is enough; else minus the
        log-odds, which grow where a float32 probability does not. What is NaN comes last.
        """
        logits, target = candidate.logits, candidate.target
        confidence, right = probability(logits, target), classified(logits, target)
        distance = (candidate.maps - candidate.target_maps).abs().mean(dim=(1, 2, 3))
        enough = right & (confidence >= self.floor)
        good = distance + (further / (1 + further.abs())).nan_to_num(nan=1.0)
        value = torch.where(enough, good, -log_odds(logits, target))
        rank = 2 - right.to(value) - enough.to(value)
        value = value.masked_fill(value.isnan(), torch.inf)
        return confidence, distance, enough, torch.stack([rank, value], dim=1)


def classified(logits: Tensor, target: Tensor) -> Tensor:
    """Return whether images are of their target classes, bool ``(B,)``; NaN is of none."""
    return (logits.argmax(dim=1) == target) & (logits < torch.inf).all(dim=1)


def before(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return which scores ``(B, 2)`` come before others, by the first entry, then the second."""
    (rank, value), (their_rank, their_value) = ours.unbind(dim=1), theirs.unbind(dim=1)
    return (rank < their_rank) | ((rank == their_rank) & (value < their_value))


def descend(
    problem: Problem,
    variable: Tensor,
    step: Step,
    numbers: range,
    report: Callable[[Progress], None],
) -> tuple[Tensor, Tensor]:
    """Take the steps of one phase; return its last variable and images ``(B, C, H, W)``.

    The last image of one that is finished early is the one whose map was judged.
    """
    last, memory = problem.batch.clean.clone(), None
    for number in numbers:
        problem.progress = (number - numbers.start) / len(numbers)
        variable, memory = step(problem, variable, memory)
        report(Progress(number, problem.confidence, problem.distance, problem.batch.rows))
        remaining = problem.take_finished(last)
        if remaining is None:
            continue
        if not len(remaining):
            return variable, last
        variable, memory = take((variable, memory), remaining)
    last[problem.batch.rows] = problem.framework.image(variable, problem.batch.clean)
    return variable, last


def take(state: Any, index: Tensor) -> Any:
    """Return the part of a state that belongs to some images, by their indices ``(N,)``.

    >>> take((torch.tensor([1.0, 2.0, 3.0]), 7), torch.tensor([0, 2]))
    (tensor([1., 3.]), 7)
    """
    if isinstance(state, Tensor):
        return state[index] if state.ndim else state
    if isinstance(state, tuple):
        parts = [take(part, index) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    if state is None or isinstance(state, int | float | str):
        return state
    raise TypeError(
        "expected a state of tensors, numbers and tuples of these, from which finished images can "
        f"be removed, got {type(state).__name__}; return such a state, or attack with stop=None"
    )

# SPDX-License-Identifier: MIT
"""What an attack without gradients has: a system's answers, and searches that need no more.

An `Oracle` is a deployed system as its users see it: a query is an image, an answer its scores and
its map. A `QueryProblem` is an attacker's loss that is known by answers alone. `Squares` tries
random changes and keeps those that are better; a step rule for gradients, such as `SignDescent`,
gets gradients that are estimated from pairs of queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_adv2.attacks.frameworks import LinfBall
from captum_adv2.attacks.loop import Part, Problem, Progress, before, take
from captum_adv2.attacks.terms import Candidate, total
from captum_adv2.interpreters.base import Exact, Explanation, Interpreter, at_once, eval_mode
from captum_adv2.interpreters.gradient import log_odds
from captum_adv2.seeds import mixed
from captum_adv2.spec import Count, Unit, checked, expect_logits

# Shares of the budget after which a square's area is halved (Square Attack, section 5).
_HALVED = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


class BudgetSpent(Exception):  # noqa: N818  # the regular end of an attack
    """The next query would exceed the budget."""


@final
class Oracle(Interpreter):
    """A deployed system as its users see it: it answers queries, counts them, has no gradients.

    With the system's own interpreter, a query shows an adversary *scores and map*. With
    ``substitute``, the interpreter of another model, it shows *scores only*, and the substitute's
    maps, which are computed without a query, stand for the system's.

    Args:
        scores: The classifier: images ``(B, C, H, W)`` in [0, 1] to logits ``(B, classes)``.
        interpreter: The interpreter whose maps are seen.
        budget: Queries of each image; one more raises `BudgetSpent`.
        substitute: Whether the interpreter is that of another model.

    Attributes:
        spent: Queries so far of each image that is still under attack.
        broken: Whether a score was NaN so far, a bool or a tensor.

    >>> from captum_adv2.interpreters import Gradient
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    >>> oracle, images = Oracle(model, Gradient(model), budget=9), torch.rand(2, 1, 4, 4)
    >>> answer = oracle.explain(images.requires_grad_(), torch.tensor([0, 1]))
    >>> answer.logits.requires_grad, answer.maps.requires_grad, oracle.left
    (False, False, 8)
    """

    surrogate = Exact()

    @checked
    def __init__(
        self,
        scores: Callable[[Tensor], Tensor],
        interpreter: Interpreter,
        budget: Count,
        *,
        substitute: bool = False,
    ) -> None:
        super().__init__(None)
        self.scaled = interpreter.scaled  # type: ignore[misc]  # of this object
        self.interpreter = interpreter
        self.budget = budget
        self.substitute = substitute
        self.spent = 0
        self.broken: bool | Tensor = False
        self._scores = scores

    @property
    def left(self) -> int:
        """Queries that are left of each image."""
        return self.budget - self.spent

    def logits(self, images: Tensor) -> Tensor:
        """Return scores ``(B, classes)`` alone: one query of each image."""
        self._spend(1)
        with torch.no_grad():
            return self._run(images.detach())

    def explain(self, images: Tensor, target: Tensor) -> Explanation:
        """Return maps and scores: one query of each image."""
        logits, maps = self.query(images, target)
        return Explanation(maps, logits)

    def query(self, images: Tensor, target: Tensor, each: int = 1) -> tuple[Tensor, Tensor]:
        """Return scores and maps of images, of which each attacked image has ``each``."""
        self._spend(each)
        size = at_once(images[0], len(images) // each)
        parts = zip(torch.split(images.detach(), size), torch.split(target, size), strict=True)
        with torch.no_grad(), eval_mode(self.interpreter.model if self.substitute else None):
            logits, maps = zip(*(self._answer(*part) for part in parts), strict=True)
        self.broken = self.broken | torch.cat(logits).isnan().any()
        return torch.cat(logits).detach(), torch.cat(maps).detach()

    def _spend(self, queries: int) -> None:
        if queries > self.left:
            raise BudgetSpent(f"expected at most {self.budget} queries of an image, got one more")
        self.spent += queries

    def _answer(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        maps, logits, _ = self.interpreter.explain(images, target)
        return self._run(images) if logits is None or self.substitute else logits, maps

    def _run(self, images: Tensor) -> Tensor:
        return expect_logits(self._scores(images), len(images))


class Best(NamedTuple):
    """More of each image's best iterate: whether it has a class to reach, and its score."""

    landed: Tensor  # (B,)
    score: Tensor  # (B, 2)


@dataclass
class QueryProblem(Problem):
    """An attacker's loss, known by answers alone; it keeps the best image that was asked about.

    ``seen``, ``confidence``, ``distance`` and ``enough`` are those of each image's best iterate. An
    untargeted attack first leaves the labels, the batch's ``target``; the class on which an image
    lands with enough confidence is its target from then on.
    """

    framework: LinfBall
    interpreter: Oracle
    pairs: int = 5  # of queries for a gradient
    sigma: float = 0.02  # their distance from the iterate, in standard deviations
    tile: int = 4  # side of the squares of one value that an estimate's changes are made of
    seed: int = 0
    state: Best = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = torch.full_like(self.confidence, torch.inf)
        landed = torch.full_like(self.enough, not self.untargeted)
        self.state = Best(landed, torch.stack([unknown, unknown], dim=1))

    def generator(self) -> torch.Generator:
        """Return the source of the next draws, which are the same for all images."""
        return torch.Generator().manual_seed(mixed(self.seed, self.interpreter.spent))

    def ask(self, images: Tensor) -> None:
        """Query an iterate ``(B, C, H, W)``; keep it where it is better than the best one."""
        candidate, (landed, best) = self._answered(images[None]), self.state
        further = total(self.terms[2:], candidate)
        confidence, distance, enough, score = self._judge(candidate, further)
        # The map of an image that only now leaves its label is that of another class.
        odds = log_odds(candidate.logits, candidate.target).nan_to_num(nan=-torch.inf)
        leaving = torch.stack([2 - enough.to(odds), -odds], dim=1)
        score = torch.where(landed[:, None], score, leaving)
        distance = distance.masked_fill(~landed, torch.nan)
        better = before(score, best)
        self.seen = torch.where(better.view(-1, 1, 1, 1), images, self.seen)
        self.confidence = torch.where(better, confidence, self.confidence)
        self.distance = torch.where(better, distance, self.distance)
        self.enough = torch.where(better, enough & landed, self.enough)
        target = torch.where(better & enough, candidate.target, self.batch.target)
        self.batch = self.batch._replace(target=target)
        score = torch.where(better[:, None], score, best)
        self.state = Best(landed | (better & enough), score)

    def gradient(self, variable: Tensor, part: Part = "all") -> Tensor:
        """Query an iterate and pairs of images around it; return the estimate of the gradient.

        The loss is the prediction's alone until an image is of its class with enough confidence.
        """
        self.ask(variable)
        pairs = min(self.pairs, self.interpreter.left // 2)
        if not pairs:
            raise BudgetSpent
        channels, *sides = variable.shape[1:]
        tiles = [-(-side // self.tile) for side in sides]
        noise = torch.randn((pairs, channels, *tiles), generator=self.generator()).to(variable)
        noise = F.interpolate(noise, sides)[:, None]  # (pairs, 1, C, H, W)
        probes = torch.cat([variable + self.sigma * noise, variable - self.sigma * noise])
        candidate = self._answered(probes.clamp(0, 1))
        ahead, behind = self._loss(candidate, part).view(2, pairs, -1, 1, 1, 1)
        estimate: Tensor = ((ahead - behind) * noise).mean(dim=0) / (2 * self.sigma)
        return estimate

    def _answered(self, images: Tensor) -> Candidate:
        """Query ``(k, B, C, H, W)``; return the k B iterates."""
        each = len(images)
        _, aim, target_maps, rows, landed = (
            part.repeat(each, *(1,) * (part.ndim - 1)) for part in (*self.batch, self.state.landed)
        )
        flat = images.flatten(0, 1)
        logits, maps = self.interpreter.query(flat, aim, each)
        others = logits.scatter(1, aim[:, None], -torch.inf).argmax(dim=1)
        target = torch.where(landed, aim, others)
        return Candidate(flat, logits, maps, target, target_maps, self.progress, rows)

    def _loss(self, candidate: Candidate, part: Part) -> Tensor:
        """Return the loss of k iterates of each image ``(k B,)``, or a part of it."""
        each = len(candidate.images) // len(self.seen)
        aim, landed, enough = (
            of.repeat(each) for of in (self.batch.target, self.state.landed, self.enough)
        )
        prediction = total(self.terms[:1], candidate._replace(target=aim))
        prediction = torch.where(landed, prediction, -prediction)
        if part == "prediction":
            return prediction
        maps = total(self.terms[1:], candidate)
        both = maps if part == "interpretation" else prediction + maps
        return torch.where(enough, both, prediction)


@checked
@dataclass(frozen=True)
class Squares:
    """Random search: a square of one colour at a random place is kept where it is better.

    Better is, first, of the target class with enough confidence, then, a map nearer to its target.
    Until an image has its class, what counts are the log-odds of the class. A step is one query.

    Args:
        share: Share of the image that the first squares cover; it is halved nine times.

    Reference: Andriushchenko et al., Square Attack: a query-efficient black-box adversarial attack
    via random search, ECCV 2020; its square sizes, changes and first image.
    """

    share: Unit = 0.8

    def __call__(
        self, problem: QueryProblem, variable: Tensor, memory: None
    ) -> tuple[Tensor, None]:
        """Return the best images, and no memory."""
        height, width = variable.shape[-2:]
        generator = problem.generator()
        share = self.share * 0.5 ** sum(problem.progress > end for end in _HALVED)
        side = max(round(math.sqrt(share * height * width)), 1)
        down, across = min(side, height), min(side, width)
        top = int(torch.randint(height - down + 1, (), generator=generator))
        left = int(torch.randint(width - across + 1, (), generator=generator))
        change = torch.zeros_like(problem.seen)
        colour = 2 * problem.framework.eps * signs((variable.shape[1], 1, 1), generator)
        change[:, :, top : top + down, left : left + across] = colour.to(change)
        problem.ask(problem.move(problem.seen, change))
        return problem.seen, None


def signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return numbers that are -1 or 1, with equal chances."""
    return 2.0 * torch.randint(2, shape, generator=generator) - 1


def search(
    problem: QueryProblem, variable: Tensor, step: Any, report: Callable[[Progress], None]
) -> Tensor:
    """Take steps until queries or unfinished images run out; return the best images."""
    last, memory, oracle = problem.seen.clone(), None, problem.interpreter
    over = False
    while not over and oracle.left and len(problem.seen):
        problem.progress = oracle.spent / oracle.budget
        try:
            variable, memory = step(problem, variable, memory)
        except BudgetSpent:  # what it has asked before counts
            over = True
        rows = problem.batch.rows
        report(Progress(oracle.spent, problem.confidence, problem.distance, rows))
        remaining = problem.take_finished(last)
        if remaining is not None:
            variable, memory = take((variable, memory), remaining)
    last[problem.batch.rows] = problem.seen
    return last

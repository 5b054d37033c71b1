# SPDX-License-Identifier: MIT
"""ADV2 without gradients: an adversary who sees what users see, or only a model of their own.

==================  ==========================================  ==================================
threat model        what the adversary has                      attack
==================  ==========================================  ==================================
scores and map      answers of the system: logits and map       ``QueryADV2(model, interpreter)``
scores only         logits; maps of a model of their own        ``QueryADV2(..., substitute=...)``
surrogate only      models of their own, and no answers         `TransferADV2`
==================  ==========================================  ==================================

The system answers through an `Oracle`, which counts queries and gives no gradients.
``QueryADV2(..., start=TransferADV2(...))`` transfers first and then refines.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any, TypeAlias

import torch
from torch import Tensor
from torchattacks.attack import Attack

from captum_adv2.attacks.base import lent
from captum_adv2.attacks.dual import CoupledAttack, Request
from captum_adv2.attacks.frameworks import LinfBall, quantize
from captum_adv2.attacks.loop import Batch, Step
from captum_adv2.attacks.queries import Oracle, QueryProblem, Squares, search, signs
from captum_adv2.attacks.terms import MapDistance
from captum_adv2.interpreters.base import Interpreter, eval_mode
from captum_adv2.interpreters.boundary import failures_explained
from captum_adv2.spec import (
    Change,
    Count,
    Index,
    Positive,
    Range,
    Unit,
    doubt,
    expect_logits,
    warn_of_logits,
)

_CLEAN = 4  # most queries of a clean image: class, random target class, map's size, target map
Queries: TypeAlias = Annotated[int, Range(_CLEAN + 2, integer=True)]


@dataclass(eq=False, repr=False)
class QueryADV2(CoupledAttack):
    r"""ADV2 by queries: fool a classifier and its interpreter by what they answer alone.

    [https://www.usenix.org/conference/usenixsecurity20/presentation/zhang-xinyang]

    Distance Measure : Linf

    No gradient of model or interpreter is taken, so that any interpreter can be attacked: one that
    is not differentiable, draws at random, or is a function of the user's (`Opaque`). The
    prediction comes first: the log-odds of the target class until it has enough confidence, and
    then the map, while the class is kept. In torchattacks' default mode the first class but the
    label that has enough confidence is the target class from then on; ``target_map`` is called with
    the labels in its place.

    Args:
        model, interpreter, target_map, terms, confidence, stop: See `ADV2`.
        eps: Maximum perturbation, in units of the images' range [0, 1].
        queries: Budget of each image: no image is sent more often, in itself or changed. Of these,
            the clean image takes up to 4: its class, a random target class, its map, a target map.
        start: An attack whose images to start from, such as `TransferADV2` on a surrogate; it runs
            on its own model, with its own normalisation, towards the same classes. Default:
            stripes, as in Square Attack.
        substitute: An interpreter of another model of images in [0, 1]: the system then shows its
            scores only, and the attack pursues the substitute's map in place of the system's.
        step: How to search: `Squares`, or a step rule of `ADV2`, such as ``SignDescent()``, whose
            gradients are estimated (of ``prediction``, ``interpretation`` and ``terms``).
        alpha: Step size of such a rule.
        pairs: Antithetic pairs of queries for an estimate.
        sigma: Standard deviation of an estimate's changes of a pixel.
        tile: Side of the squares of one colour that these changes are made of; 1 is noise, larger
            ones need fewer pairs.
        seed: Seed of the draws. They do not depend on the image or the batch.
        prediction, interpretation: See `ADV2`; used where gradients are estimated.
        generator: Source of random target classes; default: torch's global one.
        callback: Called with a `Progress` after each step: ``step`` is the number of queries so far
            of each image in ``rows``, and the measures are those of its best iterate.
        verbose: Show a progress bar.

    Shape:
        - images: ``(N, C, H, W)``, floating, in [0, 1].
        - labels: ``(N,)``, integer; default: the model's predictions.
        - target_maps (keyword of the call): ``(N, 1, h, w)`` in [0, 1]; default: ``target_map``'s.
        - output: ``(N, C, H, W)``.

    >>> from torch import nn
    >>> from captum_adv2.interpreters import CAM
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ...                       nn.Linear(4, 3))
    >>> attack = QueryADV2(model, CAM(model), eps=8/255, queries=20)
    >>> attack.set_mode_targeted_random(quiet=True)
    >>> attack(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
    torch.Size([2, 1, 8, 8])

    References: Andriushchenko et al., Square Attack, ECCV 2020; Ilyas et al., Black-box Adversarial
    Attacks with Limited Queries and Information, ICML 2018 (gradients from antithetic pairs).
    """

    eps: Change = 8 / 255
    queries: Queries = 5000
    _: KW_ONLY
    start: Attack | None = None
    substitute: Interpreter | None = None
    step: Squares | Step = Squares()
    alpha: Change = 2 / 255
    pairs: Count = 5
    sigma: Positive = 0.02
    tile: Count = 4
    seed: Index = 0
    confidence: Unit = 0.5

    _distance = MapDistance()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; torchattacks' setters are of the system, and do not reach ``start``."""
        super().__setattr__(name, value)
        if name == "start" and "_attacks" in vars(self):
            self._attacks.clear()

    @torch.no_grad()
    def forward(
        self, images: Tensor, labels: Tensor | None = None, *, target_maps: Tensor | None = None
    ) -> Tensor:
        """Run the attack on images in [0, 1]; called by ``__call__``."""
        request = self._request(images, labels)
        problem = self._problem(request, target_maps)
        problem.ask(request.clean)
        first = self._first(request, problem)
        problem.ask(first)
        with self._reporting(self.queries, "query") as report:
            found = search(problem, first, self.step, report).detach()
        if bool(problem.interpreter.broken):
            doubt("some of the model's answers were NaN: these images counted as no better")
        return found

    def _problem(self, request: Request, target_maps: Tensor | None) -> QueryProblem:
        """Return the problem whose answers the attack may ask for."""
        interpreter, clean, own, labels, target = request
        seen = self.substitute or interpreter
        oracle = Oracle(self.get_logits, seen, self.queries, substitute=self.substitute is not None)
        oracle.spent = 2  # by `_request`
        size = oracle.explain(clean, own).maps.shape[-2:]
        aim = labels if target is None else target
        maps = self._target_maps(request._replace(interpreter=oracle), target_maps, size, aim)
        distance = self._map_distance(seen, target_maps)
        return QueryProblem(
            oracle.logits,
            LinfBall(self.eps),
            self.alpha,
            self.queries,
            oracle,
            Batch(clean, aim, maps, torch.arange(len(clean), device=clean.device)),
            terms=(self.prediction, self.interpretation or distance, *self.terms),
            untargeted=target is None,
            floor=self.confidence,
            stop=self.stop,
            pairs=self.pairs,
            sigma=self.sigma,
            tile=self.tile,
            seed=self.seed,
        )

    def _first(self, request: Request, problem: QueryProblem) -> Tensor:
        """Return the images to start from: those of another attack, or stripes."""
        _, clean, _, labels, target = request
        if self.start is None:
            shape = (clean.shape[1], 1, clean.shape[3])
            stripes = self.eps * signs(shape, problem.generator()).to(clean)
            return problem.move(clean, stripes.expand_as(clean))
        with torch.enable_grad(), lent(self.start, targeted=target is not None):
            found = self.start(clean, labels if target is None else target)
        return problem.move(clean, quantize(found.detach()) - clean)

    def _expect_surrogate(self, classes: int, image: Tensor) -> None:
        """Raise unless the adversary's own models have the system's number of classes."""
        own = []
        if self.start is not None:
            own.append(self.start.get_output_with_eval_nograd(image))
        if self.substitute is not None and self.substitute.model is not None:
            with eval_mode(self.substitute.model):
                own.append(self.substitute.logits(image))
        for logits in own:
            if logits.shape[1] != classes:
                wanted = f"expected a surrogate of {classes} classes, the model's"
                raise ValueError(f"{wanted}, got one of {logits.shape[1]}")

    def _classified(self, clean: Tensor) -> Tensor:
        """See `CoupledAttack`."""
        with torch.no_grad(), failures_explained(self.model, self.get_logits, clean):
            logits = expect_logits(self.get_logits(clean), len(clean))
            self._expect_surrogate(logits.shape[1], clean[:1])
        warn_of_logits(logits)
        return logits

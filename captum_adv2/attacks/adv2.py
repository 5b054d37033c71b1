# SPDX-License-Identifier: MIT
r"""ADV2: one image that fools a classifier and the interpreter coupled to it (§3).

.. math:: \min_x \; \ell_{prd}(f(x), c_t) + \lambda \, \ell_{int}(g(x; f), m_t)
          \quad \text{s.t.} \; \|x - x_0\|_\infty \le \epsilon \qquad (3)

The attack is a `torchattacks.attack.Attack`: it has torchattacks' modes, normalisation, ``save``,
and works inside ``MultiAttack``. One loop serves every interpreter, framework and step rule::

    warm start   regular attack steps, prediction loss only (§3.6)
    follower     what to differentiate in place of the interpreter
    repeat       the follower moves; step on prediction and map; keep the best iterate per image

Differs from the official code: every quantity is per image, so a batch equals its images; the step
decays and has momentum; the iterate returned is each image's best, judged on the reported map of
its 8-bit rounding. ``ADV2.from_preset`` gives the paper's and the official settings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from captum_adv2.attacks.base import DualAttack
from captum_adv2.attacks.frameworks import Framework, LinfBall
from captum_adv2.attacks.objectives import CrossEntropy
from captum_adv2.attacks.presets import Preset
from captum_adv2.attacks.run import Callback, Progress
from captum_adv2.attacks.steps import SignDescent, Step
from captum_adv2.attacks.targets import Benign
from captum_adv2.checks import expect_number
from captum_adv2.interpreters.base import Interpreter
from captum_adv2.types import SurrogateFactory, TargetMap, Term

__all__ = ["ADV2", "Progress"]


class ADV2(DualAttack):
    r"""ADV2 on pixels: fools the classifier and its interpreter within an L-infinity ball.

    [https://www.usenix.org/conference/usenixsecurity20/presentation/zhang-xinyang]

    Distance Measure : Linf

    In torchattacks' targeted modes the class is the target; in its default mode the warm start runs
    untargeted and the class it lands on becomes the target of the rest. By default the map aimed at
    is the clean image's own.

    Args:
        model: Model to attack; images in [0, 1] to logits (or see ``set_normalization_used``).
        interpreter: Interpreter to fool, built on ``model``; or what builds one from a model, such
            as the class ``CAM``, which then follows ``set_model``. Default: ``Gradient(model)``.
        eps: Maximum perturbation.
        alpha: Step size.
        steps: Number of gradient evaluations, the warm start's included.
        warmup: Regular attack steps at the start, with plain constant sign steps of ``alpha``
            whatever ``step`` is; default: a twentieth of ``steps``.
        target_map: What the map should look like; see `TargetMap`.
        prediction: Prediction loss; the default smooths labels by rho from 0.05 to 0.01.
        interpretation: Interpretation loss, with its weight; default: `MapDistance`, without its
            ``shape`` part where maps are not min-max scaled.
        terms: Further terms of the loss, each a function of a `Candidate` returning ``(B,)``.
            They count for the best iterate too.
        step: Step rule.
        surrogate: What to differentiate in place of the interpreter, a function of interpreter,
            images and target that returns a `Surrogate`; default: ``interpreter.surrogate``.
        keep: ``"best"`` returns each image's best iterate: least distance of the surrogate's map
            among iterates of the target class with enough confidence, or the last iterate, where
            that is better on the reported map after 8-bit rounding. ``"final"`` returns the last.
        confidence: Probability of the target class that is enough, in [0, 1]. An image that never
            gets there is returned all the same, at its most confident.
        stop: Map distance (L1 of the surrogate's map to the target map), in [0, 1], at which an
            image is finished: once it is of the target class with enough confidence and its
            distance is at most this, it leaves the batch after that step, and the others run on as
            if it had not. Further terms have no say in this. It returns as ``keep`` says, its last
            iterate being the one at which it was finished. Default: all images take all steps.
        random_start: Start at a random point of the ball.
        generator: Source of the random start, and of random targets; default: a fixed seed for the
            former, torchattacks' own (global) one for the latter.
        callback: Called with a `Progress` at each gradient evaluation.
        verbose: Show a progress bar.

    Raises:
        TypeError: A model, interpreter or number of a wrong type.
        ValueError: A number out of range, or an interpreter built on another model.

    Shape:
        - images: ``(N, C, H, W)``, floating, in [0, 1].
        - labels: ``(N,)``, integer; ``None`` means the model's own predictions.
        - target_maps (keyword of the call): ``(N, 1, h, w)`` in [0, 1], for this batch.
        - output: ``(N, C, H, W)``.

    >>> from captum_adv2.interpreters import CAM
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ...                       nn.Linear(4, 3))
    >>> attack = ADV2(model, CAM(model), eps=8/255, alpha=2/255, steps=10)
    >>> attack.set_mode_targeted_random(quiet=True)
    >>> attack(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
    torch.Size([2, 1, 8, 8])
    """

    _preset = Preset

    def __init__(
        self,
        model: nn.Module,
        interpreter: Interpreter | Callable[[nn.Module], Interpreter] | None = None,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 100,
        *,
        warmup: int | None = None,
        target_map: TargetMap = Benign(),  # noqa: B008  (immutable)
        prediction: Term = CrossEntropy(),  # noqa: B008
        interpretation: Term | None = None,
        terms: tuple[Term, ...] = (),
        step: Step = SignDescent(),  # noqa: B008
        surrogate: SurrogateFactory | None = None,
        keep: Literal["best", "final"] = "best",
        confidence: float = 0.9,
        stop: float | None = None,
        random_start: bool = False,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
        verbose: bool = False,
    ) -> None:
        super().__init__(
            model,
            interpreter,
            steps,
            warmup=warmup,
            target_map=target_map,
            prediction=prediction,
            interpretation=interpretation,
            terms=terms,
            step=step,
            surrogate=surrogate,
            keep=keep,
            confidence=confidence,
            stop=stop,
            generator=generator,
            callback=callback,
            verbose=verbose,
        )
        self.eps = eps
        self.alpha = alpha
        self.random_start = random_start
        self._check()

    def _framework(self) -> Framework:
        return LinfBall(self.eps, self.random_start, self._generator)

    def _regular(self) -> Step:
        return SignDescent(momentum=0.0, final=1.0)

    def _check(self) -> None:
        self._framework()
        expect_number(self.alpha, "alpha", low=0.0)
        super()._check()

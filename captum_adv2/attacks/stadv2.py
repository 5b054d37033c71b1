# SPDX-License-Identifier: MIT
r"""StADV2: ADV2 that moves pixels instead of changing them (§A4).

.. math:: \min_r \; \ell_{prd}(f(x + r), c_t) + \lambda \, \ell_{int}(g(x + r; f), m_t)
          + \tau \, \ell_{flow}(r) \qquad (21)

where x + r is the image sampled at places displaced by the flow r. With ``warmup=steps`` there is
no map term, and what remains is stAdv, the regular attack of Xiao et al.

Differs from the official code: the four nearest neighbours in the flow loss, as in the original
stAdv (there the four diagonal ones); the flow starts at zero; the learning rate decays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from captum_adv2.attacks.base import DualAttack
from captum_adv2.attacks.frameworks import Flow, Framework
from captum_adv2.attacks.objectives import CrossEntropy, Linear
from captum_adv2.attacks.presets import FlowPreset
from captum_adv2.attacks.run import Callback
from captum_adv2.attacks.steps import AdamDescent, Step
from captum_adv2.attacks.targets import Benign
from captum_adv2.checks import expect_number
from captum_adv2.interpreters.base import Interpreter
from captum_adv2.types import Schedule, SurrogateFactory, TargetMap, Term

__all__ = ["StADV2"]


class StADV2(DualAttack):
    r"""ADV2 by spatial transformation: pixels are displaced, smoothly, by fractions of a pixel.

    [https://www.usenix.org/conference/usenixsecurity20/presentation/zhang-xinyang]

    Distance Measure : total variation of the flow

    Args:
        model: Model to attack; see `ADV2`.
        interpreter: Interpreter to fool; see `ADV2`.
        flow_weight: tau of Eq. 21: weight of the flow loss, a sum over pixels.
        steps: Number of gradient evaluations, the warm start's included.
        alpha: Learning rate of Adam, in pixels.
        bound: Largest displacement along either axis, in pixels; default: none.
        warmup: Regular attack steps at the start; default: a twentieth of ``steps``.
        target_map: See `ADV2`, as for all that follow.
        prediction: Prediction loss.
        interpretation: Interpretation loss; default: `ADV2`'s, of a weight rising from 30 to 150.
        terms: Further terms of the loss.
        step: Step rule.
        surrogate: What to differentiate in place of the interpreter.
        keep: Which iterate is returned.
        confidence: Probability of the target class that is enough.
        stop: Map distance at which an image is finished and leaves the batch.
        generator: Source of random targets.
        callback: Called with a `Progress` at each gradient evaluation.
        verbose: Show a progress bar.

    Raises:
        TypeError: A model, interpreter or number of a wrong type.
        ValueError: A number out of range, or an interpreter built on another model.

    Shape:
        As `ADV2`.

    >>> from captum_adv2.interpreters import CAM
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ...                       nn.Linear(4, 3))
    >>> attack = StADV2(model, CAM(model), steps=5, bound=1.0)
    >>> attack.set_mode_targeted_random(quiet=True)
    >>> attack(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
    torch.Size([2, 1, 8, 8])

    Reference: Xiao et al., Spatially Transformed Adversarial Examples, ICLR 2018.
    """

    _preset = FlowPreset

    def __init__(
        self,
        model: nn.Module,
        interpreter: Interpreter | Callable[[nn.Module], Interpreter] | None = None,
        flow_weight: float = 5e-4,
        steps: int = 200,
        *,
        alpha: float = 0.1,
        bound: float | None = None,
        warmup: int | None = None,
        target_map: TargetMap = Benign(),  # noqa: B008  (immutable)
        prediction: Term = CrossEntropy(),  # noqa: B008
        interpretation: Term | None = None,
        terms: tuple[Term, ...] = (),
        step: Step = AdamDescent(),  # noqa: B008
        surrogate: SurrogateFactory | None = None,
        keep: Literal["best", "final"] = "best",
        confidence: float = 0.9,
        stop: float | None = None,
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
        self.flow_weight = flow_weight
        self.alpha = alpha
        self.bound = bound
        self._check()

    def _framework(self) -> Framework:
        return Flow(self.flow_weight, self.bound)

    def _regular(self) -> Step:
        return AdamDescent(final=1.0)

    def _weight(self) -> float | Schedule:
        # Moving pixels reaches the class later than changing them does, and the map has to wait.
        return Linear(30.0, 150.0)

    def _check(self) -> None:
        expect_number(self.flow_weight, "flow_weight", low=0.0)
        self._framework()
        expect_number(self.alpha, "alpha", low=0.0, above=True)
        super()._check()

# SPDX-License-Identifier: MIT
"""The paper's and the official code's settings, as a table (Table 11; ``ADV2.from_preset``).

``PAPER`` has the numbers that the paper prints: eps 0.031, a constant sign step of 1/255, a warm
start of 400 steps (§3.6), n_total and lambda of Table 11, and for GRAD label smoothing with
uniform draws, rho 0.05 to 0.01. Where it says nothing (which iterate counts), the last one.

``OFFICIAL`` has what its published code does: for CAM and RTS a weight on the mean that doubles
along the way, for GRAD four stages of a weight on the sum, and the best iterate with probability
above 0.8.

For RTS both add the cross entropy of the encoder's own output, with weight 0.1: what Table 11 calls
the coefficient of l_prd, lambda_2. (For ISIC it has none: ``surrogate=EncoderGuided(0)``.)

For MASK both are the bilevel attack of Algorithm 1 with the two-phase step of §3.6: n_step 4,
n_reset 50, n_bs 12, alpha_max 0.08. The floor kappa is printed nowhere; the code's is a margin of
10 between logits. Its last hundred iterations, with half of alpha_max, are not told apart here.

``PAPER_STADV`` has those of Table 12 for `StADV2`: Adam at a constant 0.01 (§B2). For MASK the map
term has a weight there, and both losses make one step.

The sums of squares belong to a map size, which each preset names; at another size the balance of
the two losses is another, and a `SoundnessWarning` says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from captum_adv2.attacks.objectives import CrossEntropy, Linear, MapDistance, Margin, Stages
from captum_adv2.attacks.steps import AdamDescent, SignDescent, Step, TwoPhase
from captum_adv2.interpreters.bilevel import Unrolled
from captum_adv2.interpreters.rts import EncoderGuided
from captum_adv2.types import Schedule, SurrogateFactory, Term

__all__ = ["OFFICIAL", "PAPER", "PAPER_STADV", "FlowPreset", "Preset", "Settings"]


@dataclass(frozen=True)
class Settings:
    """What the settings of both attacks have in common.

    Attributes:
        steps: Gradient evaluations in all, the warm start's included.
        warmup: Regular attack steps at the start.
        interpretation: Weight of the map term, and the map size it belongs to.
        prediction: Prediction loss.
        step: Step rule of the dual phase.
        surrogate: What is differentiated in place of the interpreter; ``None``: its own choice.
        keep: Which iterate is returned.
        confidence: Least probability of the target class for an iterate to count as best.
    """

    steps: int
    warmup: int
    interpretation: MapDistance
    prediction: Term
    step: Step = SignDescent(momentum=0.0, final=1.0)
    surrogate: SurrogateFactory | None = None
    keep: Literal["best", "final"] = "final"
    confidence: float = 0.0

    def settings(self) -> dict[str, Any]:
        """Return the keyword arguments for the attack."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True)
class Preset(Settings):
    """Settings of `ADV2` on one interpreter.

    Attributes:
        eps: Largest change of a pixel.
        alpha: Step size.
    """

    eps: float = 0.031
    alpha: float = 1 / 255


@dataclass(frozen=True)
class FlowPreset(Settings):
    """Settings of `StADV2` on one interpreter.

    Attributes:
        flow_weight: Weight of the flow loss, tau.
        alpha: Learning rate, in pixels.
    """

    step: Step = AdamDescent(final=1.0)
    flow_weight: float = 0.0005
    alpha: float = 0.01


def _summed(weight: float | Schedule, map_size: tuple[int, int]) -> MapDistance:
    return MapDistance(weight, reduction="sum", l1=0.0, shape=0.0, map_size=map_size)


_PLAIN = CrossEntropy(rho=0.0)
_SMOOTHED = CrossEntropy(Linear(0.05, 0.01), seed=0)
_ENCODER = EncoderGuided(weight=0.1)

PAPER: dict[str, Preset] = {
    "GRAD": Preset(800, 400, _summed(0.007, (56, 56)), _SMOOTHED),
    "CAM": Preset(1200, 400, _summed(0.204, (7, 7)), _PLAIN),
    "RTS": Preset(1200, 400, _summed(0.002, (56, 56)), _PLAIN, surrogate=_ENCODER),
    "MASK": Preset(
        1000, 400, _summed(1.0, (28, 28)), _PLAIN, step=TwoPhase(), surrogate=Unrolled()
    ),
}
"""Settings of the paper (Table 11), by its names of the interpreters."""

PAPER_STADV: dict[str, FlowPreset] = {
    "GRAD": FlowPreset(800, 400, _summed(0.023, (56, 56)), _SMOOTHED),
    "CAM": FlowPreset(600, 400, _summed(0.653, (7, 7)), _PLAIN),
    "RTS": FlowPreset(600, 400, _summed(0.0408, (56, 56)), _PLAIN, surrogate=_ENCODER),
    "MASK": FlowPreset(
        1000, 400, _summed(500.0, (28, 28)), _PLAIN, surrogate=Unrolled(), flow_weight=0.004
    ),
}
"""Settings of the paper for the spatial attack (Table 12), by its names of the interpreters."""

OFFICIAL: dict[str, Preset] = {
    "GRAD": Preset(
        1004,
        300,
        _summed(Stages((0.001, 0.004, 0.01, 0.05), (301, 201, 101, 101)), (56, 56)),
        _PLAIN,
        keep="best",
        confidence=0.8,
    ),
    "CAM": Preset(1600, 400, MapDistance(Linear(5.0, 10.0), l1=0.0, shape=0.0), _PLAIN),
    "RTS": Preset(
        1300,
        300,
        MapDistance(Linear(5.0, 10.0), l1=0.0, shape=0.0),
        _PLAIN,
        surrogate=_ENCODER,
    ),
    "MASK": Preset(
        1400,
        400,
        _summed(1.0, (28, 28)),
        Margin(),
        step=TwoPhase(kappa=1 / (1 + math.exp(-10)), searches=10),
        surrogate=Unrolled(solved=False),
        keep="best",
        confidence=0.5,
    ),
}
"""Settings of the published code; see ``docs/differences.md`` for what it does beyond these."""

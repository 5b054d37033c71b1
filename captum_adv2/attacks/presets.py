# SPDX-License-Identifier: MIT
"""The paper's and the official code's settings, as tables (Tables 11, 12; ``ADV2.from_preset``).

``PAPER`` has the numbers that the paper prints (the warm start of 400 steps is from §3.6), and
returns the last iterate, as the paper does not say which. ``OFFICIAL`` has those of the published
code. ``docs/differences.md`` lists what they do not reproduce.

For RTS both add the cross entropy of the encoder's own output, with weight 0.1: the coefficient of
l_prd, lambda_2, of Table 11. (For ISIC there is none: ``surrogate=EncoderGuided(0)``.) For MASK
both are the bilevel attack of Algorithm 1 with the two-phase step of §3.6, whose floor kappa the
paper does not give; the code's is a margin of 10 between logits.

``PAPER_STADV`` is for `StADV2`, with Adam at a constant 0.01 (§B2). For MASK the map term has a
weight there, and both losses make one step.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

from captum_adv2.attacks.steps import AdamDescent, SignDescent, TwoPhase
from captum_adv2.attacks.terms import CrossEntropy, Linear, MapDistance, Margin, Schedule, Stages
from captum_adv2.interpreters.bilevel import Unrolled
from captum_adv2.interpreters.rts import EncoderGuided

Preset: TypeAlias = dict[str, Any]  # keyword arguments of `ADV2`, or of `StADV2`

_COMMON: Preset = {"prediction": CrossEntropy(rho=0.0), "keep": "final", "confidence": 0.0}
_PGD: Preset = _COMMON | {
    "eps": 0.031,
    "alpha": 1 / 255,
    "step": SignDescent(momentum=0.0, final=1.0),
}
_FLOW: Preset = _COMMON | {"flow_weight": 5e-4, "alpha": 0.01, "step": AdamDescent(final=1.0)}
_SMOOTHED = {"prediction": CrossEntropy(Linear(0.05, 0.01), seed=0)}
_ENCODER = {"surrogate": EncoderGuided(weight=0.1)}


def _table(common: Preset, **rows: Preset) -> dict[str, Preset]:
    return {name: common | row for name, row in rows.items()}


def _row(steps: int, warmup: int, distance: MapDistance, **more: Any) -> Preset:
    return {"steps": steps, "warmup": warmup, "interpretation": distance} | more


def _sum(weight: float | Schedule, side: int) -> MapDistance:
    return MapDistance(weight, reduction="sum", l1=0.0, shape=0.0, map_size=(side, side))


def _mean(first: float, last: float) -> MapDistance:
    return MapDistance(Linear(first, last), l1=0.0, shape=0.0)


PAPER = _table(
    _PGD,
    GRAD=_row(800, 400, _sum(0.007, 56), **_SMOOTHED),
    CAM=_row(1200, 400, _sum(0.204, 7)),
    RTS=_row(1200, 400, _sum(0.002, 56), **_ENCODER),
    MASK=_row(1000, 400, _sum(1.0, 28), step=TwoPhase(), surrogate=Unrolled()),
)
"""Settings of the paper (Table 11), by its names of the interpreters."""

PAPER_STADV = _table(
    _FLOW,
    GRAD=_row(800, 400, _sum(0.023, 56), **_SMOOTHED),
    CAM=_row(600, 400, _sum(0.653, 7)),
    RTS=_row(600, 400, _sum(0.0408, 56), **_ENCODER),
    MASK=_row(1000, 400, _sum(500.0, 28), surrogate=Unrolled(), flow_weight=0.004),
)
"""Settings of the paper for the spatial attack (Table 12), by its names of the interpreters."""

PAPER_DENSENET = PAPER | {"RTS": PAPER["RTS"] | {"interpretation": _sum(0.008, 56)}}
"""As ``PAPER``, for DenseNet."""

PAPER_STADV_DENSENET = PAPER_STADV | {
    "RTS": PAPER_STADV["RTS"] | {"interpretation": _sum(0.0612, 56)},
    "MASK": PAPER_STADV["MASK"] | {"flow_weight": 0.005},
}
"""As ``PAPER_STADV``, for DenseNet."""

OFFICIAL = _table(
    _PGD,
    GRAD=_row(
        1004, 300, _sum(Stages((0.001, 0.004, 0.01, 0.05), (301, 201, 101, 101)), 56),
        keep="best", confidence=0.8,
    ),
    CAM=_row(1600, 400, _mean(5.0, 10.0)),
    RTS=_row(1300, 300, _mean(5.0, 10.0), **_ENCODER),
    MASK=_row(
        1400, 400, _sum(1.0, 28), prediction=Margin(), keep="best", confidence=0.5,
        step=TwoPhase(kappa=1 / (1 + math.exp(-10)), searches=10),
        surrogate=Unrolled(solved=False),
    ),
)  # fmt: skip
"""Settings of the published code, by the paper's names of the interpreters."""

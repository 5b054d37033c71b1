# SPDX-License-Identifier: MIT
"""From channels to a map: four names, or a function. `CaptumInterpreter`'s tests have the rest."""

from __future__ import annotations

import pytest
import torch

from captum_adv2.interpreters.reduction import expect_reduction, reduced


@pytest.mark.parametrize(
    ("reduce", "expected"),
    [("abs-max", 3.0), ("abs-sum", 6.0), ("max", 2.0), ("sum", -2.0), (lambda a: a[:, :1], 1.0)],
)
def test_by_name_and_by_function(reduce, expected: float) -> None:
    attributions = torch.tensor([1.0, -3.0, -2.0, 2.0]).view(1, 4, 1, 1)[:, [0, 1, 3]]
    if reduce == "sum":
        attributions = torch.tensor([1.0, -3.0]).view(1, 2, 1, 1)
    assert reduced(attributions, expect_reduction(reduce)).tolist() == [[[[expected]]]]


@pytest.mark.parametrize("reduce", ["mean", None])
def test_unknown(reduce) -> None:
    with pytest.raises(ValueError, match="expected reduce to be one of"):
        expect_reduction(reduce)

# SPDX-License-Identifier: MIT
"""From attributions of each channel to a map of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

from torch import Tensor

from captum_adv2.checks import expect_function

__all__ = ["Reduction", "expect_reduction", "reduced"]

Reduction: TypeAlias = Literal["abs-max", "abs-sum", "max", "sum"] | Callable[[Tensor], Tensor]
"""How channels become one: by name, or a function ``(B, C, h, w) -> (B, 1, h, w)``."""

_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "abs-max": lambda a: a.abs().amax(dim=1, keepdim=True),
    "abs-sum": lambda a: a.abs().sum(dim=1, keepdim=True),
    "max": lambda a: a.amax(dim=1, keepdim=True),
    "sum": lambda a: a.sum(dim=1, keepdim=True),
}


def expect_reduction(reduce: Reduction) -> Reduction:
    """Return ``reduce`` if it is a function or the name of one.

    Raises:
        TypeError: A class.
        ValueError: Neither a function nor a name of one.
    """
    if callable(reduce):
        expect_function(reduce, "reduce")
    elif not isinstance(reduce, str) or reduce not in _REDUCTIONS:
        raise ValueError(
            f"expected reduce to be one of {sorted(_REDUCTIONS)} or a function, got {reduce!r}"
        )
    return reduce


def reduced(attributions: Tensor, reduce: Reduction) -> Tensor:
    """Return attributions ``(B, C, h, w)`` with their channels made one, ``(B, 1, h, w)``.

    >>> import torch
    >>> reduced(torch.tensor([-3.0, 2.0]).view(1, 2, 1, 1), "abs-max").item()
    3.0
    """
    return (reduce if callable(reduce) else _REDUCTIONS[reduce])(attributions)

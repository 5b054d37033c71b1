# SPDX-License-Identifier: MIT
"""Target maps: what the attacker wants the interpreter to show."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from captum_adv2.interpreters.base import Interpreter

__all__ = ["Benign"]


@dataclass(frozen=True)
class Benign:
    """The clean image's own map, for its own class: the map shows no trace of the attack (§3.1)."""

    def __call__(
        self, interpreter: Interpreter, images: Tensor, labels: Tensor, target: Tensor
    ) -> Tensor:
        """Return the interpreter's maps of ``images`` for ``labels``; see `TargetMap`."""
        with torch.no_grad():
            return interpreter.explain(images, labels).maps

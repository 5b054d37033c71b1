# SPDX-License-Identifier: MIT
"""A model and an interpreter whose results are known by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from captum_adv2.interpreters import Explanation, Interpreter


class Brightness(nn.Module):
    """Class 1 where the image is brighter than a threshold."""

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        score = 100 * (x.mean(dim=(1, 2, 3)) - self.threshold)
        return torch.stack([-score, score], dim=1)


class Echo(Interpreter):
    """A share of the image's first channel, plus a tenth of the class; notes the classes."""

    def __init__(self, model: nn.Module, share: float = 0.5) -> None:
        super().__init__(model)
        self.share = share
        self.asked: list[list[int]] = []

    def explain(self, images: Tensor, target: Tensor) -> Explanation:
        self.asked.append(target.tolist())
        return Explanation(self.share * images[:, :1] + 0.1 * target.view(-1, 1, 1, 1), None)


def flat(*values: float) -> Tensor:
    """Return a constant image of 2x2 pixels for each value."""
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()

# SPDX-License-Identifier: MIT
"""Ensemble interpretation as a detector: do several interpreters agree on an image (§5 Q3)?

An attack on one interpreter leaves traces in the maps of others (Table 9). But benign maps differ
too, and the attack may bring its map nearer to the others': look at `Detector.roc` before you rely
on this detector, which detects regular attacks better than ADV2's.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from captum_adv2.defenses.detection import Detector
from captum_adv2.interpreters.base import eval_mode
from captum_adv2.interpreters.ensemble import Ensemble
from captum_adv2.spec import checked


@final
class EnsembleDetector(Detector):
    """Flags images on which an ensemble's members disagree (§5 Q3, Defense 1).

    The score, in [0, 1], is `Ensemble.disagreement` on the class that the model predicts, the only
    one a defender knows.

    >>> from torch import nn
    >>> from captum_adv2.interpreters import CAM, Gradient
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ...                       nn.Linear(4, 3))
    >>> detector = EnsembleDetector(Ensemble([CAM(model), Gradient(model)]))
    >>> benign = torch.rand(20, 1, 8, 8)
    >>> int(detector.fit(benign, rate=0.05).detect(benign).sum())
    1
    """

    @checked
    def __init__(self, ensemble: Ensemble) -> None:
        super().__init__()
        if ensemble.model is None:
            raise TypeError(
                "expected an ensemble with a model, got one of interpreters of functions; build at "
                "least one member on the model itself"
            )
        self.ensemble = ensemble

    def __repr__(self) -> str:
        return f"EnsembleDetector({self.ensemble})"

    @torch.no_grad()
    def scores(self, images: Tensor) -> Tensor:
        """Return the members' disagreement on images ``(B, C, H, W)``, ``(B, 1)``."""
        with eval_mode(self.ensemble.model):
            predicted = self.ensemble.logits(images).argmax(dim=1)
        return self.ensemble.disagreement(images, predicted)[:, None]

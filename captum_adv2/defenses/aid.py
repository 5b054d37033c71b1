# SPDX-License-Identifier: MIT
r"""AID: adversarial interpretation distillation, RTS trained to betray an attack (§5 Q3, §A5).

ADV2 lives on a gap: what the classifier sees and what the interpreter shows can be moved apart. AID
trains the masking model, batch by batch, on two losses in turn: its own (Eq. 22), and

.. math:: \ell_{aid}(\theta) = -\|g(x; \theta) - g(A(x); \theta)\|_1 \qquad (23)

where A is ADV2 on the interpreter as it is at that moment. An image that the attack has changed
shall have a map that gives it away.

Differs from the paper: Eq. 23 alone moves the maps of clean images as gladly as those of attacked
ones. So a third term, the *anchor*, holds the former at what they were before (a distillation in
the usual sense): :math:`\|g(x; \theta) - g(x; \theta_0)\|_1`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_adv2.attacks.adv2 import ADV2
from captum_adv2.checks import expect_function, expect_model, expect_number
from captum_adv2.interpreters.rts import RTS, MaskingModel, expect_masking_model
from captum_adv2.interpreters.training import MaskingLoss, fit, random_others

__all__ = ["Distillation", "distill"]


@dataclass(frozen=True)
class Distillation:
    """The adversarial distillation loss (Eq. 23) and the anchor, an `Objective`.

    Args:
        attack: Makes adversarial images from images and target classes.
        teacher: What says how the maps of clean images should look.
        weight: Of Eq. 23.
        anchor: Of the L1 distance of clean images' maps to the teacher's.

    Raises:
        TypeError: Something of a wrong type.
        ValueError: A number out of range.
    """

    attack: ADV2
    teacher: MaskingModel
    weight: float = 20.0
    anchor: float = 20.0

    def __post_init__(self) -> None:
        """Check types and ranges."""
        expect_function(self.attack, "attack")
        expect_masking_model(self.teacher)
        expect_number(self.weight, "weight", low=0.0)
        expect_number(self.anchor, "anchor", low=0.0)

    def __call__(
        self, masking_model: MaskingModel, images: Tensor, labels: Tensor, generator: Any
    ) -> dict[str, Tensor]:
        """Return both terms ``(B,)``; see `Objective`."""
        target = random_others(labels, masking_model.classes, generator)
        adversarial = self.attack(images, target)
        with torch.no_grad():
            encoded = masking_model.encode(torch.cat([images, adversarial]))
            before = self.teacher(images, labels)
        clean, fooled = masking_model.decode(encoded, torch.cat([labels, target])).chunk(2)
        return {
            "aid": -self.weight * _l1(clean, fooled),
            "anchor": self.anchor * _l1(clean, before),
        }


def _l1(maps: Tensor, others: Tensor) -> Tensor:
    return (maps - others).abs().mean(dim=(1, 2, 3))


def distill(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    masking_model: MaskingModel,
    *,
    eps: float = 8 / 255,
    alpha: float = 2 / 255,
    steps: int = 10,
    weight: float = 20.0,
    anchor: float = 20.0,
    loss: MaskingLoss | None = None,
    epochs: int = 4,
    lr: float = 3e-3,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    verbose: bool = True,
) -> MaskingModel:
    """Return a masking model that goes on from a trained one and learns to resist ADV2.

    Args:
        model: Classifier, images in [0, 1] to logits; stays as it is.
        loader: Batches ``(images, labels)``: a ``DataLoader``, or a list; has a length.
        masking_model: Where to start; stays as it is.
        eps: Largest change of a pixel by the attack inside the training.
        alpha: Its step size.
        steps: Its number of steps, each about three times the cost of a forward pass.
        weight: Of the distillation loss (Eq. 23).
        anchor: Of the L1 distance of clean images' maps to those before; 0 is the paper's AID.
        loss: The other loss; default: ``MaskingLoss(model)``.
        epochs: Passes over the loader.
        lr: Learning rate of Adam at the start; falls to 0 along a cosine.
        seed: Of all that is random.
        checkpoint: File to write the state of the training to, every hundred steps and at the end.
            Where it exists, training goes on from it.
        verbose: Show a progress bar with each term of both losses.

    Raises:
        TypeError: Something of a wrong type.
        ValueError: A number out of range, images outside [0, 1], a checkpoint of another run.

    >>> from captum_adv2.interpreters import MaskingModel
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1),
    ...                       nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    >>> batches = [(torch.rand(4, 1, 16, 16), torch.tensor([0, 1, 2, 0]))]
    >>> before = MaskingModel(model, image_shape=(1, 16, 16))
    >>> after = distill(model, batches, before, steps=2, epochs=1, verbose=False)
    >>> torch.equal(after.selector.weight, before.selector.weight)
    False
    """
    # The encoder is not copied: it may be the classifier, and is not trained.
    encoder = expect_masking_model(masking_model).encoder
    student = copy.deepcopy(masking_model, {id(encoder): encoder})
    attack = ADV2(expect_model(model), RTS(model, student), eps, alpha, steps, keep="final")
    attack.set_mode_targeted_by_label(quiet=True)
    fit(
        student,
        loader,
        [
            MaskingLoss(model) if loss is None else loss,
            Distillation(attack, masking_model, weight, anchor),
        ],
        frozen=model,
        epochs=epochs,
        lr=lr,
        seed=seed,
        checkpoint=checkpoint,
        verbose=verbose,
        title="AID",
    )
    return student

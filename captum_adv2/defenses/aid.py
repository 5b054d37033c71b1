# SPDX-License-Identifier: MIT
r"""AID: adversarial interpretation distillation, RTS trained to reveal an attack (§5 Q3, §A5).

ADV2 exploits a gap between a classifier and its interpreter: one can be changed without the other.
AID trains the masking model, batch by batch, on two losses in turn: its own (Eq. 22), and

.. math:: \ell_{aid}(\theta) = -\|g(x; \theta) - g(A(x); \theta)\|_1 \qquad (23)

where A is ADV2 on the interpreter in its current state. The maps of an image and of the image after
the attack are to differ.

Eq. 23 alone moves the maps of clean images as much as those of attacked ones. A third term, the
*anchor* :math:`\|g(x; \theta) - g(x; \theta_0)\|_1`, keeps the former near the maps before.

The encoder of RTS is as easy to fool as the classifier: an attacked image shows it features of the
target class. ``distill(encoder="own")`` trains a copy of it, too. With ``goal="absent"`` this is
adversarial training (Madry et al. 2018): an attacked image is to show as little of the target class
as the clean image does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_adv2.attacks.adv2 import ADV2
from captum_adv2.interpreters import training
from captum_adv2.interpreters.rts import RTS, MaskingModel
from captum_adv2.spec import Change, Count, Index, NonNegative, Positive, checked


@checked
@dataclass(frozen=True)
class Distillation:
    """The adversarial distillation loss (Eq. 23) and the anchor, an `Objective`.

    Args:
        attack: Returns adversarial images for images and target classes.
        teacher: Gives the maps that clean images should keep.
        weight: Weight of the loss on the maps of adversarial images.
        anchor: Weight of the L1 distance of clean images' maps to the teacher's.
        select: Weight of the selector's logistic loss: the class of the clean image is present, the
            target class of the adversarial one is not.
        goal: Which maps adversarial images should have: any that are ``"far"`` from the clean
            image's (Eq. 23); or ``"absent"``, those of the teacher for the clean image and the
            target class, which it does not show.
    """

    attack: Callable[[Tensor, Tensor], Tensor]
    teacher: MaskingModel
    weight: NonNegative = 20.0
    anchor: NonNegative = 20.0
    select: NonNegative = 0.0
    goal: Literal["far", "absent"] = "far"

    def __call__(
        self,
        masking_model: MaskingModel,
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Return the terms ``(B,)``."""
        target = training.random_others(labels, masking_model.classes, generator)
        adversarial = self.attack(images, target)
        asked = torch.cat([labels, target])
        with torch.no_grad():
            encoded = self.teacher.encode(images)
            before, absent = (self.teacher.decode(encoded, c) for c in (labels, target))
        with torch.set_grad_enabled(masking_model.own_encoder):
            encoded = masking_model.encode(torch.cat([images, adversarial]))
        clean, fooled = masking_model.decode(encoded, asked).chunk(2)
        shown, claimed = masking_model.presence(encoded, asked).chunk(2)
        aid = -_l1(clean, fooled) if self.goal == "far" else _l1(fooled, absent)
        return {
            "aid": self.weight * aid,
            "anchor": self.anchor * _l1(clean, before),
            "select": self.select * (F.softplus(-shown) + F.softplus(claimed)) / 2,
        }


def _l1(maps: Tensor, others: Tensor) -> Tensor:
    return (maps - others).abs().mean(dim=(1, 2, 3))


@checked
def distill(
    model: nn.Module,
    loader: training.Loader,
    masking_model: MaskingModel,
    *,
    eps: Change = 8 / 255,
    alpha: Change = 2 / 255,
    steps: Count = 10,
    weight: NonNegative = 20.0,
    anchor: NonNegative = 20.0,
    select: NonNegative = 0.0,
    goal: Literal["far", "absent"] = "far",
    encoder: Literal["frozen", "own"] = "frozen",
    loss: training.Objective | None = None,
    epochs: Count = 4,
    lr: Positive = 3e-3,
    seed: Index = 0,
    checkpoint: str | Path | None = None,
    verbose: bool = True,
) -> MaskingModel:
    """Return a copy of a trained masking model, trained further to resist ADV2.

    Args:
        model: Classifier, images in [0, 1] to logits; left as it was.
        loader: Batches ``(images, labels)``; see `train_masking_model`.
        masking_model: The trained masking model; left as it was.
        eps: Maximum perturbation of the attack during the training.
        alpha: Step size of the attack.
        steps: Number of steps of the attack, each about three times the cost of a forward pass.
        weight: Weight of the distillation loss (Eq. 23).
        anchor: Weight of the L1 distance of clean images' maps to those before; 0 is the paper's.
        select: Weight of the selector's loss on clean and adversarial images; see `Distillation`.
        goal: Which maps adversarial images should have; see `Distillation`.
        encoder: Train selector and decoder alone, or a copy of the encoder with them, which the
            returned model then has as its own.
        loss: The masking model's own loss; default: ``MaskingLoss(model)``.
        epochs: As of `train_masking_model`, like those that follow.
        lr: Initial learning rate.
        seed: Seed of everything random.
        checkpoint: File for the state of the training.
        verbose: Show a progress bar.

    >>> from captum_adv2.interpreters import MaskingModel
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1),
    ...                       nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    >>> batches = [(torch.rand(4, 1, 16, 16), torch.tensor([0, 1, 2, 0]))]
    >>> before = MaskingModel(model, image_shape=(1, 16, 16))
    >>> after = distill(model, batches, before, steps=2, epochs=1, verbose=False)
    >>> torch.equal(after.selector.weight, before.selector.weight)
    False
    """
    if encoder == "own" or masking_model.own_encoder:
        student = masking_model.with_own_encoder()
    else:  # not copied: it may be the classifier
        shared = masking_model.encoder
        student = copy.deepcopy(masking_model, {id(shared): shared})
    attack = ADV2(model, RTS(model, student), eps, alpha, steps, keep="final")
    attack.set_mode_targeted_by_label(quiet=True)
    distillation = Distillation(attack, masking_model, weight, anchor, select, goal)
    return training.train_masking_model(
        model,
        loader,
        student,
        loss=[loss or training.MaskingLoss(model), distillation],
        epochs=epochs,
        lr=lr,
        seed=seed,
        checkpoint=checkpoint,
        verbose=verbose,
    )

# SPDX-License-Identifier: MIT
"""From images and adversarial images to the paper's numbers (§4 Q1, Q2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from captum_adv2 import spec
from captum_adv2.attacks import frameworks
from captum_adv2.evaluation import metrics
from captum_adv2.interpreters.base import Interpreter, eval_mode
from captum_adv2.interpreters.boundary import expect_explains, outputs_checked
from captum_adv2.spec import Classes, Images, Maps, checked


class Report(NamedTuple):
    """The result of an attack, image by image; tensors are ``(B,)`` unless stated otherwise.

    Attributes:
        success: Whether the image is classified as its target; never where logits are NaN.
        confidence: Probability of the target class.
        l1: L1 distance of adversarial and benign map, in [0, 1]; as the next two, NaN of NaN.
        l2: L2 distance, in [0, 1].
        iou: Intersection over union, in [0, 1].
        linf: Largest change of a pixel, before rounding.
        benign_maps: ``(B, 1, h, w)``, for the class of the clean image.
        adversarial_maps: ``(B, 1, h, w)``, for the target class.
    """

    success: Tensor
    confidence: Tensor
    l1: Tensor
    l2: Tensor
    iou: Tensor
    linf: Tensor
    benign_maps: Tensor
    adversarial_maps: Tensor

    def summary(self) -> dict[str, float]:
        """Return means: ``asr`` and ``confidence`` over all images, distances over successes.

        ``images`` and ``successes`` count the images; a mean over none is NaN. ``linf`` is the
        largest of all images.
        """
        means = {"asr": self.success, "confidence": self.confidence}
        means |= {name: getattr(self, name)[self.success] for name in ("l1", "l2", "iou")}
        return {
            "images": len(self.success),
            "successes": int(self.success.sum()),
            **{name: values.double().mean().item() for name, values in means.items()},
            "linf": self.linf.max().item(),
        }

    def __str__(self) -> str:
        text = (
            "ASR {asr:.1%}, confidence {confidence:.3f} ({images} images); "
            "L1 {l1:.4f}, L2 {l2:.4f}, IoU {iou:.3f} ({successes} successes)"
        )
        return text.format(**self.summary())


@checked
@torch.no_grad()
def evaluate(
    model: nn.Module,
    interpreter: Interpreter,
    images: Images,
    adversarial: Images,
    target: Classes,
    labels: Classes | None = None,
    quantize: bool = True,
    *,
    benign_maps: Maps | None = None,
) -> Report:
    """Measure an attack on prediction and interpretation; ``print`` the report for the means.

    The benign map explains the clean image for its own class, the adversarial map the adversarial
    image for the target class.

    Args:
        model: The classifier.
        interpreter: The interpreter, built on ``model``; not necessarily the one attacked.
        images: Clean images ``(B, C, H, W)`` in [0, 1].
        adversarial: Adversarial images, of the same shape.
        target: The attacker's class ``(B,)``.
        labels: Class of the benign map ``(B,)``; default: the model's prediction on ``images``.
        quantize: Round adversarial images to 8 bits before anything but ``linf`` is measured.
        benign_maps: Those of an earlier report on the same images and labels; default: computed.

    >>> from captum_adv2.interpreters import Gradient
    >>> model, images = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), torch.rand(2, 1, 4, 4)
    >>> report = evaluate(model, Gradient(model), images, images, torch.tensor([0, 1]))
    >>> report.l1.shape, sorted(report.summary())[:3]
    (torch.Size([2]), ['asr', 'confidence', 'images'])
    """
    hint = "build it on the object that is evaluated"
    expect_explains(interpreter, model, "the evaluated", hint)
    spec.expect_shape(adversarial, images.shape, "adversarial")
    judged = (frameworks.quantize(adversarial) if quantize else adversarial).clamp(0, 1)
    logits = _logits(model, judged)
    own = _logits(model, images).argmax(dim=1) if labels is None else labels
    success, confidence = metrics.success(logits, target), metrics.confidence(logits, target)
    spec.expect_classes(own, logits, "labels")
    benign = interpreter(images, own) if benign_maps is None else benign_maps
    shown = interpreter(judged, target)
    spec.expect_shape(benign, shown.shape, "benign_maps")
    broken = (shown + benign).isnan().flatten(1).any(dim=1)  # where logits are NaN
    l1, l2, iou = (
        values.masked_fill(broken, torch.nan)
        for values in metrics.distances(shown.nan_to_num(), benign.nan_to_num())
    )
    return Report(
        success,
        confidence,
        l1,
        l2,
        iou,
        linf=(adversarial - images).abs().amax(dim=(1, 2, 3)),
        benign_maps=benign,
        adversarial_maps=shown,
    )


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    with eval_mode(model), outputs_checked(model, model, images):
        logits: Tensor = model(images)
    return logits

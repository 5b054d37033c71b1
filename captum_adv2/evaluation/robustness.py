# SPDX-License-Identifier: MIT
"""How far the explanations of a model can be trusted: the least change that fools both.

For every image, the least eps at which an attack reaches its target class *and* a map that looks
benign. The share of images that are fooled up to an eps is the *curve of trust*; the area above it,
over the logarithm of eps, is one number by which interpreters can be ranked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from captum_adv2 import spec
from captum_adv2.attacks.adv2 import ADV2
from captum_adv2.evaluation import metrics
from captum_adv2.evaluation.evaluate import evaluate
from captum_adv2.evaluation.metrics import interval, wilson
from captum_adv2.interpreters.base import Interpreter, eval_mode
from captum_adv2.spec import Classes, Count, Fraction, Images, Positive, checked, doubt

LEVELS = tuple(2 ** (step / 2) / 4 / 255 for step in range(13))
"""From 0.25/255 to 16/255, two an octave."""


class Robustness(NamedTuple):
    """The least eps of each image.

    Attributes:
        least: The least of ``levels`` at which the attack succeeds ``(B,)``; infinity where it
            succeeds at none.
        levels: Values of eps, in units of the images' range [0, 1], rising.
    """

    least: Tensor
    levels: tuple[float, ...] = LEVELS

    def shares(self) -> list[float]:
        """Return the share of images that are fooled up to each level: the curve."""
        return [count / len(self.least) for count in self._counts()]

    def intervals(self) -> list[tuple[float, float]]:
        """Return the 95 % intervals of `shares`."""
        return [wilson(count, len(self.least)) for count in self._counts()]

    def _counts(self) -> list[int]:
        return [int((self.least <= level * (1 + 1e-6)).sum()) for level in self.levels]

    def heights(self) -> Tensor:
        """Return each image's part of `area` ``(B,)``: 0 at the first level, 1 at the last.

        >>> Robustness(torch.tensor([0.01, 0.02, torch.inf]), (0.01, 0.02, 0.04)).heights().tolist()
        [0.0, 0.5, 1.0]
        """
        first, last = self.levels[0], self.levels[-1]
        return (self.least.clamp(first, last) / first).log2() / math.log2(last / first)

    @property
    def area(self) -> float:
        """Area above the curve: 0 if all are fooled at the first level, 1 if none before the last.

        An eps below half of 1/255 changes no image of 8 bits: at the default levels the area is at
        least 1/6.
        """
        return float(self.heights().double().mean())

    def __str__(self) -> str:
        low, high = interval(self.heights())
        parts = zip(self.levels, self.shares(), strict=True)
        curve = ", ".join(f"{255 * level:.3g}: {share:.0%}" for level, share in parts)
        return f"area {self.area:.3f} [{low:.3f}, {high:.3f}]; fooled up to eps * 255 of {curve}"


@checked
def robustness(
    model: nn.Module,
    interpreter: Interpreter,
    images: Images,
    target: Classes | None = None,
    labels: Classes | None = None,
    *,
    steps: Count = 100,
    levels: Sequence[Positive] = LEVELS,
    iou: Fraction = 0.5,
    threshold: Fraction = 0.5,
    attack: Callable[[float], Any] | None = None,
) -> Robustness:
    """Find, by bisection, the least eps at which each image's class and map are both fooled.

    They are where the image, rounded to 8 bits, is of the target class, and its map has more than
    ``iou`` in common with the benign one. Bisection takes success to grow with eps; of 13 levels,
    an image is attacked at four. Rounding may add up to half of 1/255 to eps, or undo the attack:
    of 8-bit images, no change below half of 1/255 is left.

    Args:
        model: The classifier.
        interpreter: The interpreter, built on ``model``, which the attack knows.
        images: Clean images ``(B, C, H, W)`` in [0, 1].
        target: The attacker's classes ``(B,)``, none an image's own; default: another class for
            each image, at random from a fixed seed.
        labels: Classes of the benign maps ``(B,)``; default: the model's predictions.
        steps: Gradient evaluations of each attack.
        levels: Values of eps to choose from, rising.
        iou: Intersection over union of two maps that look alike.
        threshold: Value that a pixel of a map must exceed to count for ``iou``.
        attack: Makes an attack of an eps, within which its images stay; default: `ADV2` on the
            interpreter, in steps of a quarter of eps.

    >>> from captum_adv2.interpreters import Gradient
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    >>> found = robustness(model, Gradient(model, smoothing=None), torch.rand(2, 1, 4, 4), steps=2)
    >>> found.least.shape, len(found.shares())
    (torch.Size([2]), 13)
    """
    if list(levels) != sorted(set(levels)) or len(levels) < 2 or levels[-1] > 1:
        wanted = "expected at least two levels in (0, 1], rising, such as 1/255 and 8/255"
        raise ValueError(f"{wanted}, got {list(levels)}")
    if isinstance(attack, Attack):
        raise TypeError(f"expected a function that makes an attack of an eps, got {attack!r}")
    own, target = _classes(model, images, target, labels)
    benign = interpreter(images, own).detach()
    empty = int((benign.flatten(1).amax(dim=1) <= threshold).sum())
    if empty:
        doubt(
            f"{empty} of {len(benign)} benign maps have no pixel above {threshold:g}, "
            "the threshold: maps without any look like these"
        )

    def fooled(rows: Tensor, eps: float) -> Tensor:
        made = attack(eps) if attack else ADV2(model, interpreter, eps, eps / 4, steps)
        if not hasattr(made, "set_mode_targeted_by_label"):
            raise TypeError(f"expected attack(eps) to be a torchattacks attack, got {made!r}")
        made.set_mode_targeted_by_label(quiet=True)
        clean, wanted, maps = images[rows], target[rows], benign[rows]
        adversarial = made(clean, wanted)
        _expect_within(eps, adversarial - clean)
        report = evaluate(model, interpreter, clean, adversarial, wanted, benign_maps=maps)
        return report.success & (metrics.iou(report.adversarial_maps, maps, threshold) > iou)

    # The attack is known to fail at the level `below`, and to succeed at `least`, or at none.
    below = torch.full_like(own, -1)
    least = torch.full_like(own, len(levels))
    while bool((least - below > 1).any()):
        middle = (below + least) // 2
        for number in sorted(set(middle[least - below > 1].tolist())):
            rows = ((middle == number) & (least - below > 1)).nonzero()[:, 0]
            won = fooled(rows, levels[number])
            least[rows[won]], below[rows[~won]] = number, number
    ends = torch.tensor([*levels, math.inf], dtype=torch.float64, device=images.device)
    return Robustness(ends[least], tuple(levels))


def _classes(
    model: nn.Module, images: Tensor, target: Tensor | None, labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the images' own classes and the attacker's, other ones, each ``(B,)``."""
    with torch.no_grad(), eval_mode(model):
        logits = model(images)
    own = logits.argmax(dim=1) if labels is None else labels
    spec.expect_classes(own, logits, "labels")
    own = own.long()
    if target is None:
        generator = torch.Generator().manual_seed(0)
        shift = torch.randint(1, logits.shape[1], (len(images),), generator=generator)
        target = (own + shift.to(own)) % logits.shape[1]
    spec.expect_classes(target, logits, "target")
    target = target.long()
    same = int((target == own).sum())
    if same:
        raise ValueError(
            f"expected target classes other than the images' own, got the own class of {same} of "
            f"{len(own)} images; leave these out, and pass true classes as labels=..."
        )
    return own, target


def _expect_within(eps: float, change: Tensor) -> None:
    largest = float(change.abs().max())
    if largest > eps + 0.5 / 255 + torch.finfo(change.dtype).eps:  # some attacks round
        raise ValueError(
            f"expected attack({eps:.4g}) to change pixels by at most that, got {largest:.4g}; "
            "eps is in units of the images' range [0, 1]"
        )

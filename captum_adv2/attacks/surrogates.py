# SPDX-License-Identifier: MIT
"""ADV2 on surrogates: images that are made on an adversary's own models, for a system unseen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, Self, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_adv2.attacks.adv2 import ADV2
from captum_adv2.attacks.frameworks import Framework, LinfBall
from captum_adv2.attacks.terms import Margin, Term
from captum_adv2.interpreters.base import Explanation, Interpreter, Surrogate
from captum_adv2.interpreters.ensemble import Together, resized
from captum_adv2.seeds import mixed
from captum_adv2.spec import Count, Unit, expect


class Models(nn.Module):
    """Several models of the same classes as one: the mean of their logits."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(models)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, classes)``."""
        logits = [member(images) for member in self.members]
        classes = [found.shape[1] for found in logits]
        if len(set(classes)) > 1:
            raise ValueError(f"expected surrogates of the same classes, got {classes}")
        return torch.stack(logits).mean(dim=0)


@final
class Joint(Interpreter):
    """The interpreters of several models: each model's own map, side by side."""

    surrogate = Together()

    def __init__(self, model: nn.Module, interpreters: Sequence[Interpreter]) -> None:
        super().__init__(model)
        self.interpreters = tuple(interpreters)
        self.scaled = all(g.scaled for g in self.interpreters)  # type: ignore[misc]  # of this object

    def explain(self, images: Tensor, target: Tensor) -> Explanation:
        """Return the mean of the members' maps; see `Interpreter`."""
        joined = self.join([member.explain(images, target) for member in self.interpreters])
        return joined._replace(maps=joined.maps.mean(dim=1, keepdim=True))

    def join(self, parts: Sequence[Explanation]) -> Explanation:
        """Return the members' maps ``(B, J, h, w)`` at one size; an attack pursues each."""
        maps, logits, _ = zip(*parts, strict=True)
        known = all(found is not None for found in logits)
        mean = torch.stack(logits).mean(dim=0) if known else None
        return Explanation(torch.cat(resized(maps), dim=1), mean)

    def after(self, preprocess: Callable[[Tensor], Tensor]) -> Self:
        """See `Interpreter`."""
        clone = super().after(preprocess)
        clone.interpreters = tuple(member.after(preprocess) for member in self.interpreters)
        return clone


@final
@dataclass(frozen=True)
class Diverse(Surrogate):
    """Another surrogate at images that are shrunk and shifted at random, anew at each step (DI).

    The draws depend on the progress of the attack alone.
    """

    of: Surrogate
    chance: float
    least: float

    def init(self, interpreter: Any, images: Tensor, target: Tensor) -> Any:
        """See `Surrogate`."""
        return self.of.init(interpreter, images, target)

    def advance(self, interpreter: Any, images: Tensor, state: Any, progress: float) -> Any:
        """See `Surrogate`."""
        return self.of.advance(interpreter, images, state, progress)

    def __call__(
        self, interpreter: Any, images: Tensor, state: Any, progress: float
    ) -> Explanation:
        """See `Surrogate`."""
        return self.of(interpreter, self._changed(images, progress), state, progress)

    def _changed(self, images: Tensor, progress: float) -> Tensor:
        generator = torch.Generator().manual_seed(mixed("diverse", progress))
        chance, scale, down, across = torch.rand(4, generator=generator).tolist()
        if chance >= self.chance:
            return images
        height, width = images.shape[-2:]
        share = self.least + (1 - self.least) * scale
        rows, columns = (max(1, round(share * side)) for side in (height, width))
        small = F.interpolate(images, (rows, columns), mode="bilinear", antialias=False)
        top, left = round(down * (height - rows)), round(across * (width - columns))
        return F.pad(small, (left, width - columns - left, top, height - rows - top))


@final
@dataclass(frozen=True)
class Invariant(Framework):
    """Pixel changes whose gradient is smoothed by a Gaussian window (TI)."""

    ball: LinfBall
    window: int

    def init(self, clean: Tensor) -> Tensor:
        """See `Framework`."""
        return self.ball.init(clean)

    def image(self, variable: Tensor, clean: Tensor) -> Tensor:
        """Return the variable, whose gradient is smoothed on its way back."""
        if not variable.requires_grad:
            return variable
        images = variable.view_as(variable)
        images.register_hook(self._smoothed)  # type: ignore[no-untyped-call]
        return images

    def move(self, variable: Tensor, direction: Tensor, clean: Tensor) -> Tensor:
        """See `Framework`."""
        return self.ball.move(variable, direction, clean)

    def _smoothed(self, gradient: Tensor) -> Tensor:
        half = self.window // 2
        places = torch.arange(-half, half + 1).to(gradient)
        weights = (-0.5 * (places * 3 / max(half, 1)).square()).exp()
        kernel = (weights[:, None] * weights) / weights.sum().square()
        channels = gradient.shape[1]
        kernel = kernel.expand(channels, 1, -1, -1)
        smooth = F.conv2d(gradient, kernel, padding=half, groups=channels)
        return smooth.to(gradient.dtype)  # under autocast, it is of another


@dataclass(eq=False, repr=False)
class TransferADV2(ADV2):
    r"""ADV2 on surrogates, to be judged on a system that the adversary cannot query.

    [https://www.usenix.org/conference/usenixsecurity20/presentation/zhang-xinyang]

    Distance Measure : Linf

    The surrogates and their maps take the place of the system's. To transfer, gradients are taken
    at images that are shrunk and shifted at random (DI), are smoothed (TI), and have momentum (MI,
    as in `ADV2`); the prediction's margin grows throughout, and the last iterate is returned. With
    several surrogates, the mean of their logits and each one's map are attacked. In torchattacks'
    terms, the surrogate is the attack's model: ``system(attack(images, labels))``.

    Args:
        model: The surrogate, or several of the same classes.
        interpreter: An interpreter of the surrogate; or a class or function that builds one for
            each surrogate, such as ``CAM``. Default: ``Gradient``.
        eps, alpha, steps: See `ADV2`.
        diversity: Probability that a gradient is taken at changed images.
        least: Smallest side of a shrunk image, as a share.
        window: Side of the Gaussian window that smooths gradients, odd; 1 smooths nothing.
        prediction: Prediction loss; the default keeps growing once the class is reached.
        **options: See `ADV2`.

    >>> from captum_adv2.interpreters import CAM
    >>> def model():
    ...     return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
    ...                          nn.Flatten(), nn.Linear(4, 3))
    >>> attack = TransferADV2([model(), model()], CAM, steps=4)
    >>> attack.set_mode_targeted_random(quiet=True)
    >>> attack(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
    torch.Size([2, 1, 8, 8])

    References: Dong et al., Boosting Adversarial Attacks with Momentum, CVPR 2018; Xie et al.,
    Improving Transferability of Adversarial Examples with Input Diversity, CVPR 2019; Dong et al.,
    Evading Defenses to Transferable Adversarial Examples by Translation-Invariant Attacks, CVPR
    2019.
    """

    model: nn.Module | Sequence[nn.Module]  # type: ignore[assignment]
    _: KW_ONLY
    diversity: Unit = 0.7
    least: Unit = 0.8
    window: Count = 3
    prediction: Term = Margin()
    keep: Literal["best", "final"] = "final"

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; make one model of several, and refuse an even window."""
        if name == "model" and isinstance(value, list | tuple | nn.ModuleList):
            models = list(value)
            expect(models, Sequence[nn.Module], name)
            if not models:
                raise ValueError("expected at least one surrogate, got none")
            value = Models(models)
        super().__setattr__(name, value)
        if name == "window" and value % 2 == 0:
            raise ValueError(f"expected window to be odd, got {value}")

    def _built(self, build: Callable[[nn.Module], Interpreter]) -> Interpreter:
        """Return the interpreter of the surrogate, or one of several."""
        if not isinstance(self.model, Models):
            return super()._built(build)
        members = [build(member) for member in self.model.members]
        expect(members, Sequence[Interpreter], "interpreter")
        return Joint(self.model, members)

    def _framework(self) -> Framework:
        return Invariant(LinfBall(self.eps, self.random_start, self.generator), self.window)

    def _differentiated(self, interpreter: Interpreter) -> Surrogate:
        """See `DualAttack`."""
        return Diverse(super()._differentiated(interpreter), self.diversity, self.least)

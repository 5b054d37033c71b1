# SPDX-License-Identifier: MIT
r"""What an attacker differentiates in MASK's place: a bilevel problem with MASK as the follower.

MASK's map is the end of a gradient descent and has no derivative to speak of, so an attack on it is
a bilevel problem (Eq. 10): the attacker leads, a `Follower` moves in answer. Two surrogates:

- `Unrolled`, the paper's (Alg. 1, §3.6): look a few Adam steps ahead and differentiate them.
- `FiniteDifference`, the default: first order, no unrolling. By Prop. 2 the map moves along
  :math:`-\nabla_{xm} \ell_{map} H^{-1} (m - m_t)`. The mixed derivative is a difference of two
  first-order gradients, at masks moved either way, and Adam's second moment stands in for H.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from captum_adv2.checks import expect_flag, expect_integer, expect_number, expect_pair
from captum_adv2.interpreters.base import Surrogate
from captum_adv2.interpreters.gradient import log_odds
from captum_adv2.optim import AdamState, safe_sqrt
from captum_adv2.types import Explanation

if TYPE_CHECKING:
    from captum_adv2.interpreters.mask import MASK

__all__ = ["FiniteDifference", "Follower", "Scene", "Unrolled"]


class Scene(NamedTuple):
    """What one solution looks at: images and what replaces them, ``(B, C, H, W)``; the class."""

    images: Tensor
    deleted: Tensor
    target: Tensor


class Follower(NamedTuple):
    """The state of a solution: mask ``(B, 1, h, w)``, 1 = kept; Adam's; steps since the start."""

    kept: Tensor
    moments: AdamState
    step: int

    def take(self, index: Tensor) -> Follower:
        """Return the state of some images."""
        first, second, count = self.moments
        return Follower(self.kept[index], AdamState(first[index], second[index], count), self.step)

    def put(self, index: Tensor, part: Follower) -> Follower:
        """Return the state with that of some images replaced; counts are the part's."""
        (first, second, _), (first_, second_, count) = self.moments, part.moments
        moments = AdamState(
            first.index_copy(0, index, first_), second.index_copy(0, index, second_), count
        )
        return Follower(self.kept.index_copy(0, index, part.kept), moments, part.step)


@dataclass(frozen=True)
class FiniteDifference:
    r"""The attack's default view of MASK: first order, and along the way MASK takes from scratch.

    The follower restarts every ``cycle`` iterations, as MASK itself starts, and takes ``n_step``
    steps of Adam an iteration. It thus passes again and again by the masks through which MASK will
    come, instead of settling far from them. A loss on the map with gradient g pulls the image along

    .. math:: -\nabla_x \, [\ell_{map}(m + s d; x) - \ell_{map}(m - s d; x)],
              \qquad d = -g / \sqrt{v}

    a finite difference of the mixed derivative of Prop. 2, where Adam's second moment v stands for
    the Hessian. Its length is set to ``gain`` times that of g (L1) times that of the gradient of
    the class's log-odds (L1), so that map and prediction keep their balance on any model.

    Each iteration costs 2 n_step + 6.4 F: the follower, two masked images, the prediction, and
    the gradient of the log-odds every fifth time.

    Args:
        n_step: Steps of the follower an iteration.
        cycle: Iterations after which the follower restarts.
        pace: Factor on the follower's learning rate: a cycle passes by
            ``n_step * cycle * pace`` of MASK's steps.
        reach: Largest change of the mask in the difference, in (0, 1]; with 1 it is about the
            difference between MASK's objective here and at the target map (the value gap).
        damping: Added to the root of v, above 0; a large one makes d plain, -g.
        gain: How far the map term weighs, at given weight.

    Raises:
        TypeError: A number of a wrong type.
        ValueError: A number out of range.

    Reference: for first-order bilevel optimisation, Liu et al., BOME, NeurIPS 2022.
    """

    n_step: int = 4
    cycle: int = 50
    pace: float = 3.0
    reach: float = 1.0
    damping: float = 1e-6
    gain: float = 0.01

    def __post_init__(self) -> None:
        """Check the ranges."""
        expect_integer(self.n_step, "n_step", low=1)
        expect_integer(self.cycle, "cycle", low=1)
        expect_number(self.pace, "pace", low=0.0, above=True)
        expect_number(self.reach, "reach", low=0.0, high=1.0, above=True)
        expect_number(self.damping, "damping", low=0.0, above=True)
        expect_number(self.gain, "gain", low=0.0)

    def __call__(self, interpreter: MASK, images: Tensor, target: Tensor) -> Surrogate:
        """Return the surrogate of a batch."""
        return _Cycling(interpreter, images, target, self)


class _Following(Surrogate):
    """What the surrogates share: a follower that takes some steps an iteration, after a reset."""

    def __init__(
        self, interpreter: MASK, images: Tensor, target: Tensor, n_step: int, pace: float = 1.0
    ) -> None:
        from captum_adv2.interpreters.mask import MASK  # here, for that imports this

        if not isinstance(interpreter, MASK):
            raise TypeError(
                f"expected interpreter to be a MASK, got {type(interpreter).__name__}; others "
                "have surrogates of their own"
            )
        self._interpreter = interpreter
        self._target = expect_pair(images, target)
        self._n_step = n_step
        self._pace = pace
        self._follower = interpreter.begin(images.detach())
        self._turn = 0

    def take(self, index: Tensor) -> None:
        self._target = self._target[index]
        self._follower = self._follower.take(index)

    @abstractmethod
    def _reset(self, images: Tensor) -> None:
        """Set the follower back, on the turns for that; called at each."""

    def advance(self, images: Tensor) -> None:
        self._reset(images.detach())
        self._turn += 1
        scene = self._interpreter.scene(images.detach(), self._target)
        for _ in range(self._n_step):
            self._follower, _loss = self._interpreter.descend(scene, self._follower, self._pace)


@final
class _Cycling(_Following):
    _slope: Tensor

    def __init__(
        self, interpreter: MASK, images: Tensor, target: Tensor, settings: FiniteDifference
    ) -> None:
        super().__init__(interpreter, images, target, settings.n_step, settings.pace)
        self._settings = settings
        self._measure(images)

    def take(self, index: Tensor) -> None:
        super().take(index)
        self._slope = self._slope[index]

    def _reset(self, images: Tensor) -> None:
        if self._turn % 5 == 0:
            self._measure(images)
        if self._turn % self._settings.cycle == 0:
            self._follower = self._interpreter.begin(images)

    def __call__(self, images: Tensor) -> Explanation:
        logits = self._interpreter.logits(images, self._target)
        maps = 1 - self._follower.kept
        return Explanation(_Pull.apply(images, maps, self._pull, self._slope), logits)

    def _measure(self, images: Tensor) -> None:
        """Note the length of the gradient of the class's log-odds, ``(B, 1, 1, 1)``."""
        with torch.enable_grad():
            leaf = images.detach().requires_grad_()
            odds = log_odds(self._interpreter.logits(leaf, self._target), self._target)
            self._slope = _l1(torch.autograd.grad(odds.sum(), leaf)[0])

    def _pull(self, images: Tensor, gradient: Tensor, slope: Tensor) -> Tensor:
        """Return the images' gradient ``(B, C, H, W)`` for a gradient of the maps."""
        kept, (_, second, _), step = self._follower
        direction = gradient / (safe_sqrt(second) + self._settings.damping)
        largest = direction.abs().amax(dim=(1, 2, 3), keepdim=True)
        change = self._settings.reach * _ratio(direction, largest)
        masks = torch.cat([kept + change, kept - change]).clamp(0, 1)
        with torch.enable_grad():
            leaf = images.detach().requires_grad_()
            scene = self._interpreter.scene(leaf, self._target)
            both = Scene(*(torch.cat([part, part]) for part in scene))
            ahead, back = self._interpreter.objective(both, masks, step).chunk(2)
            (pull,) = torch.autograd.grad((ahead - back).sum(), leaf)
        scale = self._settings.gain * _l1(gradient) * slope
        return scale * _ratio(pull, _l1(pull))


class _Pull(torch.autograd.Function):
    """Passes maps through; going back, asks a function for the images' gradient."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, maps: Tensor, pull: Any, slope: Tensor) -> Tensor:
        ctx.save_for_backward(images, slope)
        ctx.pull = pull
        return maps.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        images, slope = ctx.saved_tensors
        return ctx.pull(images, grads[0], slope), None, None, None


@dataclass(frozen=True)
class Unrolled:
    """The paper's view of MASK (Alg. 1, §3.6): differentiate some Adam steps ahead.

    Each iteration the follower takes ``n_step`` steps and looks as many ahead; its maps there are
    what the loss sees (the sum of §3.6), with a graph through Adam. Every ``n_reset`` iterations
    the follower is replaced by MASK's own solution, and Adam set back: not to zero moments, from
    which a step is a sign without a derivative, but to smaller ones.

    Args:
        n_step: Steps taken, and steps looked ahead, an iteration.
        n_reset: Iterations between resets.
        solved: Begin at MASK's solution (Alg. 1), or, as the official code does, where it starts.
        shrink: Factor on the gradients in Adam's moments at a reset, above 0.
        count: Adam's step count after a reset.

    Raises:
        TypeError: A number of a wrong type.
        ValueError: A number out of range.
    """

    n_step: int = 4
    n_reset: int = 50
    solved: bool = True
    shrink: float = 0.5
    count: int = 100

    def __post_init__(self) -> None:
        """Check the ranges."""
        expect_integer(self.n_step, "n_step", low=1)
        expect_integer(self.n_reset, "n_reset", low=1)
        expect_flag(self.solved, "solved")
        expect_number(self.shrink, "shrink", low=0.0, above=True)
        expect_integer(self.count, "count", low=0)

    def __call__(self, interpreter: MASK, images: Tensor, target: Tensor) -> Surrogate:
        """Return the surrogate of a batch."""
        return _LookAhead(interpreter, images, target, self)


@final
class _LookAhead(_Following):
    def __init__(
        self, interpreter: MASK, images: Tensor, target: Tensor, settings: Unrolled
    ) -> None:
        super().__init__(interpreter, images, target, settings.n_step)
        self._settings = settings

    def _reset(self, images: Tensor) -> None:
        settings = self._settings
        if self._turn % settings.n_reset or not (self._turn or settings.solved):
            return
        solved = self._interpreter.solve(images, self._target)
        moments = self._follower.moments if self._turn else solved.moments
        moments = self._interpreter.adam.rescale(moments, settings.shrink, settings.count)
        self._follower = Follower(solved.kept, moments, solved.step)

    def __call__(self, images: Tensor) -> Explanation:
        logits = self._interpreter.logits(images, self._target)
        follower, maps = self._follower, []
        with torch.enable_grad():
            scene = self._interpreter.scene(images, self._target)
            for _ in range(self._n_step):
                kept = follower.kept
                leaf = kept if kept.requires_grad else kept.detach().requires_grad_()
                losses = self._interpreter.objective(scene, leaf, follower.step)
                (gradient,) = torch.autograd.grad(losses.sum(), leaf, create_graph=True)
                follower = self._interpreter.move(follower._replace(kept=leaf), gradient)
                maps.append(1 - follower.kept)
        return Explanation(torch.cat(maps, dim=1), logits)  # (B, n_step, h, w)


def _l1(values: Tensor) -> Tensor:
    return values.abs().sum(dim=(1, 2, 3), keepdim=True)


def _ratio(values: Tensor, size: Tensor) -> Tensor:
    """Divide, where the divisor is not 0."""
    return values / torch.where(size > 0, size, 1.0)

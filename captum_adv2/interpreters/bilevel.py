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

from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from captum_adv2.interpreters.base import Explanation, Surrogate
from captum_adv2.interpreters.gradient import log_odds
from captum_adv2.optim import AdamState, safe_sqrt
from captum_adv2.spec import Count, Index, NonNegative, Positive, Unit, checked


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


class Chase(NamedTuple):
    """The state of a surrogate: the follower, the classes, the turn, a slope ``(B, 1, 1, 1)``."""

    follower: Follower
    target: Tensor
    turn: int
    slope: Tensor


@final
@checked
@dataclass(frozen=True)
class FiniteDifference(Surrogate):
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

    Reference: for first-order bilevel optimisation, Liu et al., BOME, NeurIPS 2022.
    """

    n_step: Count = 4
    cycle: Count = 50
    pace: Positive = 3.0
    reach: Unit = 1.0
    damping: Positive = 1e-6
    gain: NonNegative = 0.01

    def init(self, mask: Any, images: Tensor, target: Tensor) -> Chase:
        """Begin where MASK itself begins."""
        return Chase(mask.begin(images.detach()), target, 0, _slope(mask, images, target))

    def advance(self, mask: Any, images: Tensor, state: Chase, progress: float) -> Chase:
        """Restart at the end of a cycle; take some steps."""
        follower, target, turn, slope = state
        if turn % 5 == 0:
            slope = _slope(mask, images, target)
        if turn % self.cycle == 0:
            follower = mask.begin(images)
        follower = _followed(mask, images, follower, target, self.n_step, self.pace)
        return Chase(follower, target, turn + 1, slope)

    def __call__(self, mask: Any, images: Tensor, state: Chase, progress: float) -> Explanation:
        """Return the follower's maps, with a gradient made by finite differences."""
        maps = 1 - state.follower.kept
        slope = state.slope

        def pull(images: Tensor, gradient: Tensor) -> Tensor:
            return self._pull(mask, images, gradient, slope, state)

        return Explanation(_Pull.apply(images, maps, pull), mask.logits(images))

    def _pull(
        self, mask: Any, images: Tensor, gradient: Tensor, slope: Tensor, state: Chase
    ) -> Tensor:
        """Return the images' gradient ``(B, C, H, W)`` for a gradient of the maps."""
        kept, (_, second, _), step = state.follower
        direction = gradient / (safe_sqrt(second) + self.damping)
        largest = direction.abs().amax(dim=(1, 2, 3), keepdim=True)
        change = self.reach * _ratio(direction, largest)
        masks = torch.cat([kept + change, kept - change]).clamp(0, 1)
        with torch.enable_grad():
            leaf = images.detach().requires_grad_()
            scene = mask.scene(leaf, state.target)
            both = Scene(*(torch.cat([part, part]) for part in scene))
            ahead, back = mask.objective(both, masks, step).chunk(2)
            (pull,) = torch.autograd.grad((ahead - back).sum(), leaf)
        scale = self.gain * _l1(gradient) * slope
        return scale * _ratio(pull, _l1(pull))


@final
@checked
@dataclass(frozen=True)
class Unrolled(Surrogate):
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
    """

    n_step: Count = 4
    n_reset: Count = 50
    solved: bool = True
    shrink: Positive = 0.5
    count: Index = 100

    def init(self, mask: Any, images: Tensor, target: Tensor) -> Chase:
        """Begin where MASK itself begins."""
        return Chase(mask.begin(images.detach()), target, 0, images.new_zeros(len(images)))

    def advance(self, mask: Any, images: Tensor, state: Chase, progress: float) -> Chase:
        """Replace the follower by MASK's solution, on the turns for that; take some steps."""
        follower, target, turn, slope = state
        if turn % self.n_reset == 0 and (turn or self.solved):
            solution = mask.solve(images, target)
            moments = follower.moments if turn else solution.moments
            moments = mask.adam.rescale(moments, self.shrink, self.count)
            follower = Follower(solution.kept, moments, solution.step)
        follower = _followed(mask, images, follower, target, self.n_step)
        return Chase(follower, target, turn + 1, slope)

    def __call__(self, mask: Any, images: Tensor, state: Chase, progress: float) -> Explanation:
        """Return the maps of the next steps ``(B, n_step, h, w)``, with a graph through Adam."""
        logits = mask.logits(images)
        follower, maps = state.follower, []
        with torch.enable_grad():
            scene = mask.scene(images, state.target)
            for _ in range(self.n_step):
                kept = follower.kept
                leaf = kept if kept.requires_grad else kept.detach().requires_grad_()
                losses = mask.objective(scene, leaf, follower.step)
                (gradient,) = torch.autograd.grad(losses.sum(), leaf, create_graph=True)
                follower = mask.move(follower._replace(kept=leaf), gradient)
                maps.append(1 - follower.kept)
        return Explanation(torch.cat(maps, dim=1), logits)


class _Pull(torch.autograd.Function):
    """Passes maps through; going back, asks a function for the images' gradient."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, maps: Tensor, pull: Any) -> Tensor:
        ctx.save_for_backward(images)
        ctx.pull = pull
        return maps.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (images,) = ctx.saved_tensors
        return ctx.pull(images, grads[0]), None, None


def _followed(
    mask: Any, images: Tensor, follower: Follower, target: Tensor, steps: int, pace: float = 1.0
) -> Follower:
    """Return a follower after some steps of MASK's descent on images."""
    scene = mask.scene(images.detach(), target)
    for _ in range(steps):
        follower, _losses = mask.descend(scene, follower, pace)
    return follower


def _slope(mask: Any, images: Tensor, target: Tensor) -> Tensor:
    """Return the length of the gradient of the class's log-odds, ``(B, 1, 1, 1)``."""
    with torch.enable_grad():
        leaf = images.detach().requires_grad_()
        odds = log_odds(mask.logits(leaf), target)
        return _l1(torch.autograd.grad(odds.sum(), leaf)[0])


def _l1(values: Tensor) -> Tensor:
    return values.abs().sum(dim=(1, 2, 3), keepdim=True)


def _ratio(values: Tensor, size: Tensor) -> Tensor:
    """Divide, where the divisor is not 0."""
    return values / torch.where(size > 0, size, 1.0)

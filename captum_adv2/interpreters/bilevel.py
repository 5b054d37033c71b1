# SPDX-License-Identifier: MIT
r"""The surrogates of MASK: a bilevel problem with the attacker as leader and MASK as follower.

MASK's map is the result of gradient descent and has no usable derivative, so an attack on it is a
bilevel problem (Eq. 10): the attacker changes the image, and a `Follower`, a solution of MASK that
is kept along the attack, adapts to it. Two surrogates differentiate the follower: `Unrolled`, the
paper's, and `FiniteDifference`, the default.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from captum_adv2.interpreters.base import Explanation, Surrogate
from captum_adv2.interpreters.gradient import log_odds
from captum_adv2.optim import AdamState, safe_sqrt
from captum_adv2.spec import Count, Index, NonNegative, Positive, Unit, checked


class Scene(NamedTuple):
    """The data of one solution: images and their replacement ``(B, C, H, W)``, classes ``(B,)``."""

    images: Tensor
    deleted: Tensor
    target: Tensor


class Follower(NamedTuple):
    """The state of a solution: mask ``(B, 1, h, w)``, 1 = kept; Adam's state; steps taken."""

    kept: Tensor
    moments: AdamState
    step: int


class Pursuit(NamedTuple):
    """Followers along an attack, the classes ``(B,)`` they explain, and the iterations so far.

    ``slope`` is the L1 norm of the gradient of their log-odds, where a surrogate needs it.
    """

    followers: tuple[Follower, ...]
    target: Tensor
    iteration: int = 0
    slope: Tensor | float = 1.0

    @property
    def follower(self) -> Follower:
        """The first follower."""
        return self.followers[0]


@final
@checked
@dataclass(frozen=True)
class FiniteDifference(Surrogate):
    r"""The default surrogate of MASK: first order, with a follower that restarts like MASK.

    By its restarts the follower passes repeatedly through the masks that MASK itself will pass
    through, instead of converging to others. By Prop. 2 the map moves along
    :math:`-\nabla_{xm} \ell_{map} H^{-1} (m - m_t)`. A finite difference stands for the mixed
    derivative: for a loss with gradient g on the map 1 - m, the gradient on the image is

    .. math:: \nabla_x \, [\ell_{map}(m + s d; x) - \ell_{map}(m - s d; x)],
              \qquad d = g / (\sqrt{v} + \text{damping})

    with Adam's second moment v in place of H, and s such that ``reach`` is the mask's largest
    change. Its L1 norm is set to ``gain`` times that of g, times that of the gradient of the
    class's log-odds, so that map and prediction keep their balance on any model; and it grows
    linearly within a cycle, from nearly 0 to twice this, for the late masks are those reported.

    An iteration costs 2.4 F, for the prediction and, every fifth time, the gradient of the
    log-odds; and for each follower 2 n_step + 4 F, for its steps and two masked images. Several
    followers are at different places of the cycle, so that masks of every age pull at once.

    Args:
        n_step: Steps of the follower an iteration.
        cycle: Iterations after which the follower restarts from MASK's initial mask.
        pace: Factor on the follower's learning rate: a cycle covers ``n_step * cycle * pace`` of
            MASK's steps.
        reach: Largest change of the mask in the difference; 1 comes close to the value gap, the
            difference of MASK's objective at the mask and at the target map.
        damping: Added to the root of v; a large one makes d proportional to g.
        gain: Weight of the map against the prediction, at a given weight of the map loss.
        followers: Number of followers; with five, maps come nearer, and a step costs four times as
            much. An attack then judges its iterates by the mean over masks of all ages.

    Reference: for first-order bilevel optimisation, Liu et al., BOME, NeurIPS 2022.
    """

    needs = "descend"

    n_step: Count = 4
    cycle: Count = 25
    pace: Positive = 3.0
    reach: Unit = 1.0
    damping: Positive = 1e-6
    gain: NonNegative = 0.01
    followers: Count = 1

    def init(self, mask: Any, images: Tensor, target: Tensor) -> Pursuit:
        """Return MASK's initial mask, for each follower, and the slope of the log-odds."""
        slope = _slope(mask, images, target)
        return Pursuit((mask.begin(images.detach()),) * self.followers, target, slope=slope)

    def advance(self, mask: Any, images: Tensor, state: Pursuit, progress: float) -> Pursuit:
        """Restart each follower at the end of its cycle; take its steps."""
        followers, target, iteration, slope = state
        if iteration % 5 == 0:
            slope = _slope(mask, images, target)
        moved = []
        for follower, age in zip(followers, self._ages(iteration), strict=True):
            start = mask.begin(images) if age == 0 else follower
            moved.append(_followed(mask, images, start, target, self.n_step, self.pace))
        return Pursuit(tuple(moved), target, iteration + 1, slope)

    def _ages(self, iteration: int) -> list[int]:
        """Return each follower's place in its cycle, from 0; all but one begin with a short one."""
        apart = [number * self.cycle // self.followers for number in range(self.followers)]
        return [(iteration + offset) % self.cycle for offset in apart]

    def __call__(self, mask: Any, images: Tensor, state: Pursuit, progress: float) -> Explanation:
        """Return the followers' maps ``(B, followers, h, w)``; their gradient is a difference."""
        pull = partial(self._pull, mask, state)
        maps = torch.cat([1 - follower.kept for follower in state.followers], dim=1)
        return Explanation(_Pull.apply(images, maps, pull), mask.logits(images))

    def _pull(self, mask: Any, state: Pursuit, images: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient on the images ``(B, C, H, W)`` for a gradient on the maps."""
        found, ages = torch.zeros_like(images), self._ages(state.iteration - 1)
        parts = zip(state.followers, gradient.chunk(len(ages), dim=1), ages, strict=True)
        for follower, part, age in parts:
            pull = self._difference(mask, follower, state.target, images, part)
            late = 2 * (age + 1) / self.cycle
            found += late * _l1(part) * _ratio(pull, _l1(pull))
        return self.gain * state.slope * found / self.followers

    def _difference(
        self, mask: Any, follower: Follower, target: Tensor, images: Tensor, gradient: Tensor
    ) -> Tensor:
        """Return how the difference of the objective at two masks changes with the images."""
        kept, (_, second, _), step = follower
        direction = gradient / (safe_sqrt(second) + self.damping)
        largest = direction.abs().amax(dim=(1, 2, 3), keepdim=True)
        change = self.reach * _ratio(direction, largest)
        masks = torch.cat([kept + change, kept - change]).clamp(0, 1).to(kept)
        with torch.enable_grad():
            leaf = images.detach().requires_grad_()
            scene = mask.scene(leaf, target)
            both = Scene(*(torch.cat([part, part]) for part in scene))
            ahead, back = mask.objective(both, masks, step).chunk(2)
            (pull,) = torch.autograd.grad((ahead - back).sum(), leaf)
        return pull


@final
@checked
@dataclass(frozen=True)
class Unrolled(Surrogate):
    """The paper's surrogate of MASK (Alg. 1, §3.6): differentiate a few Adam steps.

    Each iteration the follower takes some steps and looks as many ahead; the loss is summed over
    its maps there (§3.6), which carry a graph through Adam. At a reset MASK's own solution replaces
    the follower, and Adam's moments are made smaller. They are not set to zero, because a step from
    zero moments is a sign, which has no derivative.

    Args:
        n_step: Steps taken, and steps looked ahead, an iteration.
        n_reset: Iterations between resets.
        solved: Begin at MASK's solution (Alg. 1), not at its initial mask (the official code).
        shrink: Factor on the gradients in Adam's moments at a reset.
        count: Adam's step count after a reset.
    """

    needs = "descend"

    n_step: Count = 4
    n_reset: Count = 50
    solved: bool = True
    shrink: Positive = 0.5
    count: Index = 100

    def init(self, mask: Any, images: Tensor, target: Tensor) -> Pursuit:
        """Return MASK's initial mask."""
        return Pursuit((mask.begin(images.detach()),), target)

    def advance(self, mask: Any, images: Tensor, state: Pursuit, progress: float) -> Pursuit:
        """Replace the follower by MASK's solution where a reset is due; take its steps."""
        (follower,), target, iteration, _ = state
        if iteration % self.n_reset == 0 and (iteration or self.solved):
            solution = mask.solve(images, target)
            moments = follower.moments if iteration else solution.moments
            moments = mask.adam.rescale(moments, self.shrink, self.count)
            follower = solution._replace(moments=moments)
        follower = _followed(mask, images, follower, target, self.n_step)
        return Pursuit((follower,), target, iteration + 1)

    def __call__(self, mask: Any, images: Tensor, state: Pursuit, progress: float) -> Explanation:
        """Return the maps of the next steps ``(B, n_step, h, w)``, with a graph through Adam."""
        logits = mask.logits(images)
        follower, maps = state.follower, []
        with torch.enable_grad():
            scene = mask.scene(images, state.target)
            for _ in range(self.n_step):
                follower = mask.descend(scene, follower, graph=True)
                maps.append(1 - follower.kept)
        return Explanation(torch.cat(maps, dim=1), logits)


class _Pull(torch.autograd.Function):
    """Passes maps through; in the backward pass, a function gives the images' gradient."""

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
    scene = mask.scene(images.detach(), target)
    for _ in range(steps):
        follower = mask.descend(scene, follower, pace)
    return follower


def _slope(mask: Any, images: Tensor, target: Tensor) -> Tensor:
    """Return the L1 norm of the gradient of the class's log-odds, ``(B, 1, 1, 1)``."""
    with torch.enable_grad():
        leaf = images.detach().requires_grad_()
        odds = log_odds(mask.logits(leaf), target)
        return _l1(torch.autograd.grad(odds.sum(), leaf)[0])


def _l1(values: Tensor) -> Tensor:
    return values.abs().sum(dim=(1, 2, 3), keepdim=True)


def _ratio(values: Tensor, size: Tensor) -> Tensor:
    return values / torch.where(size > 0, size, 1.0)

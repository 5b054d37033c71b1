# SPDX-License-Identifier: MIT
"""Helpers of the attack tests: a target for every image, and problems for step rules."""

import pytest
import torch

from captum_adv2.attacks.frameworks import LinfBall
from captum_adv2.attacks.loop import Batch, Problem
from captum_adv2.interpreters import MASK
from captum_adv2.interpreters.mask import Blur

FLAT_MAPS = "ignore::captum_adv2.SoundnessWarning"  # where a map happens to be constant


def shifted(images, labels):
    return (labels + 1) % 4


def targeted(attack):
    attack.set_mode_targeted_by_function(shifted, quiet=True)
    return attack


MODES = pytest.mark.parametrize("mode", [targeted, lambda attack: attack], ids=["target", "any"])


def confidence_of(candidate):
    p = candidate.logits.detach().softmax(dim=1)
    return p.gather(1, candidate.target[:, None])[:, 0]


def distance_of(candidate):
    return (candidate.maps - candidate.target_maps).detach().abs().mean(dim=(1, 2, 3))


def noting(seen):
    """Return a term of zeros that appends each candidate to a list."""

    def note(candidate):
        seen.append(candidate)
        return 0 * candidate.images.sum(dim=(1, 2, 3))

    return note


def small_mask(model):
    return MASK(model, size=4, iterations=4, jitter=1, perturb=Blur(4.0))


def problem_of(
    clean, logits, terms, surrogate=None, *, framework=None, alpha=0.01, steps=10, **more
):
    """Return a problem whose target is the first class and a black map."""
    rows = torch.arange(len(clean))
    batch = Batch(clean, 0 * rows, 0 * clean[:, :1], rows)
    framework, state = framework or LinfBall(1.0), batch.target
    if surrogate is not None:
        state = surrogate.init(None, clean, batch.target)
    return Problem(logits, framework, alpha, steps, None, batch, terms, surrogate, state, **more)

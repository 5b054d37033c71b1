# SPDX-License-Identifier: MIT
"""Helpers of the attack tests: a target for every image, and a term that notes what it sees."""

import torch

from captum_adv2.interpreters import MASK
from captum_adv2.interpreters.mask import Blur

FLAT_MAPS = "ignore::captum_adv2.SoundnessWarning"  # where a map happens to be constant


def shifted(images, labels):
    return (labels + 1) % 4


def targeted(attack):
    attack.set_mode_targeted_by_function(shifted, quiet=True)
    return attack


def predictions(model, images):
    with torch.no_grad():
        return model(images).argmax(dim=1)


def confidence_of(candidate):
    p = candidate.logits.detach().softmax(dim=1)
    return p.gather(1, candidate.target[:, None])[:, 0]


def noting(seen):
    """Return a term of zeros that appends each candidate to a list."""

    def note(candidate):
        seen.append(candidate)
        return 0 * candidate.images.sum(dim=(1, 2, 3))

    return note


def small_mask(model):
    return MASK(model, size=4, iterations=6, jitter=1, perturb=Blur(4.0))

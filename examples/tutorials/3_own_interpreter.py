"""Test your own interpreter
=========================

An interpreter is one method: from images and classes to maps ``(B, 1, h, w)`` in [0, 1], which can
be differentiated. Much can go wrong without an error: a factor that was detached, a map that
depends on the rest of its batch, noise drawn anew at each call. An attack on such maps fails, and
they seem robust. ``check_interpreter`` finds these faults, on networks, images and classes that
hypothesis draws.

This interpreter covers one of sixteen cells of the image at a time, and measures how much the
class's logit loses:
"""

import torch
import torch.nn.functional as F

from captum_adv2 import ADV2, evaluate, testing
from captum_adv2.evaluation import visualize
from captum_adv2.interpreters import Explanation, Interpreter
from captum_adv2.interpreters.base import min_max
from captum_adv2.study.embedded import load_resnet, make_shapes


def losses(interpreter: Interpreter, images: torch.Tensor, target: torch.Tensor) -> Explanation:
    """Return what covering each cell takes from the class's logit, and the logits."""
    logits = interpreter.logits(images)
    cells = F.interpolate(torch.eye(16).view(16, 1, 4, 4), images.shape[-2:]).to(images)
    covered = [interpreter.logits(images * (1 - cell)) for cell in cells]
    lost = torch.stack([logits - each for each in covered], dim=1)  # (B, 16, classes)
    maps = lost[torch.arange(len(images)), :, target].view(-1, 1, 4, 4)
    return Explanation(maps, logits)


class Cover(Interpreter):
    """Where the cover costs most."""

    def explain(self, images: torch.Tensor, target: torch.Tensor) -> Explanation:
        """Return maps, and the logits of the images."""
        maps, logits, _ = losses(self, images, target)
        return Explanation(maps / maps.amax(), logits)


# %%
# The class is given; the checks build it on small networks, some examples each (10 by default).

try:
    testing.check_interpreter(Cover, max_examples=3)
except AssertionError as error:
    print(error)

# %%
# ``Cover`` divides by a largest value, which is 0 where nothing matters, and is that of the whole
# batch. ``min_max`` scales each map by its own extremes, and makes a constant one zero.


class Mended(Interpreter):
    """Where the cover costs most, scaled image by image."""

    def explain(self, images: torch.Tensor, target: torch.Tensor) -> Explanation:
        """Return maps, and the logits of the images."""
        maps, logits, _ = losses(self, images, target)
        return Explanation(min_max(maps), logits)


print(testing.check_interpreter(Mended, max_examples=3))

# %%
# A test file needs that one line. An interpreter that passes can be attacked:

model = load_resnet()
images, labels, *_ = make_shapes(3, seed=7)
interpreter, target = Mended(model), (labels + 3) % 10
attack = ADV2(model, interpreter, steps=30)
attack.set_mode_targeted_by_label(quiet=True)
adversarial = attack(images, target)
report = evaluate(model, interpreter, images, adversarial, target)
print(report)
clean, fooled = (images, report.benign_maps), (adversarial, report.adversarial_maps)
visualize.grid({"clean": {"map": clean}, "ADV2": {"map": fooled}})

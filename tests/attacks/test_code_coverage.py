# SPDX-License-Identifier: MIT
"""torchattacks' own test procedure (its ``code_coverage/test_atks.py``), offline and on a tiny net.

There every name of ``torchattacks.__all__`` is built from the model alone and run on five images,
in default mode and with random targets, and robust accuracy may not exceed clean accuracy. Here the
attacks are stronger, so that accuracy falls below a half; PGD is the control.
"""

import pytest
import torch
import torchattacks

from captum_adv2 import ADV2


@pytest.mark.parametrize("attack_class", [torchattacks.PGD, ADV2])
def test_attacks_on_five_images(model, data, attack_class):
    images, labels = (tensor[:5] for tensor in data)
    assert torch.equal(model(images).argmax(dim=1), labels)
    attack = attack_class(model, eps=0.2, alpha=0.02, steps=20)
    assert "targeted" in attack.supported_mode
    for mode in ("default", "targeted(random)"):
        if mode != "default":
            attack.set_mode_targeted_random(quiet=True)
        assert attack.attack_mode == mode
        adversarial = attack(images, labels)
        assert adversarial.shape == images.shape
        assert (model(adversarial).argmax(dim=1) == labels).double().mean() < 0.5

# SPDX-License-Identifier: MIT
"""torchattacks' own test procedure (its ``code_coverage/test_atks.py``), offline and on a tiny net.

There every name of ``torchattacks.__all__`` is built from the model alone and run on five images,
in default mode and with random targets; robust accuracy may not exceed clean accuracy. Here ADV2 is
registered beside torchattacks' names; PGD and FGSM are the control.
"""

import pytest
import torch
import torchattacks

from captum_adv2 import ADV2


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(torchattacks, "ADV2", ADV2, raising=False)
    monkeypatch.setattr(torchattacks, "__all__", [*torchattacks.__all__, "ADV2"])


def clean_accuracy(model, images, labels):
    return (model(images).argmax(dim=1) == labels).double().mean().item()


@torch.no_grad()
@pytest.mark.parametrize("name", ["PGD", "FGSM", "ADV2"])
def test_attacks_on_five_images(model, data, name):
    assert name in torchattacks.__all__
    images, labels = (tensor[:5] for tensor in data)
    clean = clean_accuracy(model, images, labels)
    assert clean == 1.0  # or the comparison below says little

    attack = getattr(torchattacks, name)(model)
    with torch.enable_grad():
        adversarial = attack(images, labels)
    assert adversarial.shape == images.shape
    assert clean_accuracy(model, adversarial, labels) <= clean

    assert "targeted" in attack.supported_mode
    attack.set_mode_targeted_random(quiet=True)
    with torch.enable_grad():
        adversarial = attack(images, labels)
    assert clean_accuracy(model, adversarial, labels) <= clean
    assert not torch.equal(adversarial, images)


@torch.no_grad()
def test_default_attack_is_an_attack(model, data):
    images, labels = data
    strong = torchattacks.ADV2(model, eps=0.2)
    assert clean_accuracy(model, strong(images, labels), labels) == 0

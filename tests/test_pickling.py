# SPDX-License-Identifier: MIT
"""Copies by copy, pickle and torch.save: they do the same, on a model of their own."""

import copy
import io
import pickle

import pytest
import torch
import torchattacks
from conftest import ATTACKS

from captum_adv2 import evaluate
from captum_adv2.interpreters import CAM

pytestmark = pytest.mark.filterwarnings("ignore::captum_adv2.SoundnessWarning")


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "torch.save": saved,
}


def shifted(images, labels):
    return (labels + 1) % 4


MODES = {
    "default": lambda attack: None,
    "label": lambda attack: attack.set_mode_targeted_by_label(quiet=True),
    "least likely": lambda attack: attack.set_mode_targeted_least_likely(2, quiet=True),
    "random": lambda attack: attack.set_mode_targeted_random(quiet=True),
    "function": lambda attack: attack.set_mode_targeted_by_function(shifted, quiet=True),
}


def called(attack, data):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return attack(data[0][:2], data[1][:2])


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_attacks(attacked, trained, data, how):
    # What a table builds by lambdas cannot be pickled, nor can those lambdas.
    attack = attacked.build(copy.deepcopy(trained))
    for part in (attack, *attack._attacks.values()):
        if hasattr(part, "_factory"):
            part._factory = None
    modes = list(MODES)
    mode = modes[[a.name for a in ATTACKS].index(attacked.name) % len(modes)]
    MODES[mode](attack)
    expected = called(attack, data)
    twin = COPIES[how](attack)
    for part in (twin, *twin._attacks.values()):
        assert part.model is twin.model
    assert getattr(twin, "second", twin).interpreter.model is twin.model
    assert torch.equal(called(twin, data), expected)
    for parameter in twin.model.parameters():
        parameter.data.neg_()
    assert not torch.equal(called(twin, data), expected)
    assert torch.equal(called(attack, data), expected)


@pytest.mark.parametrize("how", COPIES)
def test_copies_inside_multiattack(trained, data, how):
    attacks = [torchattacks.PGD(trained, steps=1, eps=0.01, random_start=False)]
    attacks += [a.build(trained) for a in ATTACKS if a.name == "ADV2 CAM"]
    multi = torchattacks.MultiAttack(attacks)
    twin = COPIES[how](multi)
    assert all(attack.model is twin.model for attack in twin.attacks)
    assert torch.equal(twin(*data), multi(*data))


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_reports(trained, data, how):
    report = evaluate(trained, CAM(trained), data[0], data[0].flip(-1), data[1])
    twin = COPIES[how](report)
    assert type(twin) is type(report)
    assert all(map(torch.equal, twin, report))
    assert str(twin) == str(report)

# SPDX-License-Identifier: MIT
"""AID: the distillation loss by hand, and a student that leaves its teacher unchanged."""

import copy
from inspect import signature

import pytest
import torch
from conftest import TinyNet, blobs, untrained

from captum_adv2 import ADV2
from captum_adv2.defenses.aid import Distillation, distill
from captum_adv2.interpreters import RTS, train_masking_model
from captum_adv2.interpreters.training import MaskingLoss, random_others
from captum_adv2.spec import SoundnessWarning
from captum_adv2.testing import unchanged

QUICK = {"epochs": 2, "lr": 0.01, "steps": 2, "verbose": False}


# The loss


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("goal", ["far", "absent"])
@pytest.mark.parametrize("weights", [(0.0, 3.0, 0.0), (2.5, 0.0, 2.0), (2.5, 3.0, 2.0)])
def test_the_terms_are_distances_of_maps_and_a_logistic_loss(model, weights, goal, own):
    (images, labels), student, teacher = (
        blobs(5, seed=3),
        untrained(model),
        untrained(model, seed=1),
    )
    student = student.with_own_encoder() if own else student
    attack = ADV2(model, RTS(model, student), eps=0.1, alpha=0.03, steps=4)
    attack.set_mode_targeted_by_label(quiet=True)
    generator = torch.Generator().manual_seed(4)
    target = random_others(labels, 4, torch.Generator().manual_seed(4))
    with unchanged(model):
        distillation = Distillation(attack, teacher, *weights, goal=goal)
        found = distillation(student, images, labels, generator)
    (aid, anchor, select), adversarial = weights, attack(images, target)
    clean, fooled = student(images, labels), student(adversarial, target)
    wanted = teacher(images, target) if goal == "absent" else clean
    present = student.presence(student.encode(images), labels)
    absent = student.presence(student.encode(adversarial), target)
    expected = {
        "aid": (aid if goal == "absent" else -aid) * (fooled - wanted).abs().mean(dim=(1, 2, 3)),
        "anchor": anchor * (clean - teacher(images, labels)).abs().mean(dim=(1, 2, 3)),
        "select": -select * (present.sigmoid().log() + (-absent).sigmoid().log()) / 2,
    }
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    reached = [
        p for p in student.trainable() if not any(p is q for q in student.encoder.fc.parameters())
    ]
    gradients = torch.autograd.grad(sum(found.values()).sum(), reached, allow_unused=True)
    assert sum(g is not None and bool(g.any()) for g in gradients) == len(reached)


# Training


@pytest.mark.parametrize("shared", [True, False])
def test_teacher_classifier_and_encoder_stay_as_they_are(trained, shared):
    model = copy.deepcopy(trained).train()
    encoder = model if shared else TinyNet().train()
    teacher = untrained(encoder).train()
    with unchanged(model), unchanged(encoder), unchanged(teacher):
        student = distill(model, [blobs(4)] * 2, teacher, **QUICK)
    assert student.encoder is encoder
    assert not student.training
    assert not any(torch.equal(student.trained()[n], v) for n, v in teacher.trained().items())


@pytest.mark.parametrize("shared", [True, False])
def test_an_own_encoder_is_trained_and_the_others_are_not(trained, shared):
    model = copy.deepcopy(trained).train()
    teacher = untrained(model if shared else TinyNet().train())
    teacher = teacher.with_own_encoder() if not shared else teacher
    with unchanged(model), unchanged(teacher):
        student = distill(model, [blobs(4)] * 2, teacher, **QUICK, encoder="own", select=1.0)
    assert student.encoder is not teacher.encoder
    before, after = (dict(each.encoder.named_parameters()) for each in (teacher, student))
    assert not torch.equal(before["stem.0.weight"], after["stem.0.weight"])
    assert torch.equal(teacher.encoder.norm.running_mean, student.encoder.norm.running_mean)
    assert RTS(model, student)(*blobs(2)).shape == (2, 1, 8, 8)


def test_both_losses_are_taken_in_turn_and_the_attack_is_on_the_student(model, monkeypatch):
    seen, teacher = [], untrained(model)
    for kind in (MaskingLoss, Distillation):

        def spy(self, masking_model, *args, real=kind.__call__):
            seen.append((self, masking_model, masking_model.selector.weight.detach().clone()))
            return real(self, masking_model, *args)

        monkeypatch.setattr(kind, "__call__", spy)
    settings = QUICK | {"steps": 3, "eps": 0.05, "alpha": 0.02}
    student = distill(model, [blobs(4)] * 2, teacher, **settings)
    objectives, models, values = zip(*seen, strict=True)
    assert [type(each) for each in objectives] == [MaskingLoss, Distillation] * 4
    assert all(each is student for each in models)
    assert torch.equal(values[0], teacher.selector.weight)
    assert not any(map(torch.equal, values[1:], values[:-1]))
    attack = objectives[1].attack
    assert attack.interpreter.masking_model is student
    assert (attack.eps, attack.alpha, attack.steps) == (0.05, 0.02, 3)


def test_a_checkpoint_of_the_training_before_is_of_another_run(model, tmp_path):
    path, teacher, loader = tmp_path / "file", untrained(model), [blobs(4)]
    train_masking_model(model, loader, teacher, epochs=2, lr=0.01, verbose=False, checkpoint=path)
    with pytest.raises(ValueError, match="expected a checkpoint of this training"):
        distill(model, loader, teacher, **QUICK, checkpoint=path)


def test_a_checkpoint_of_another_distillation_is_refused(model, tmp_path):
    path, teacher, loader = tmp_path / "file", untrained(model), [blobs(4)]
    expected = distill(model, loader, teacher, **QUICK, checkpoint=path).trained()
    again = distill(model, loader, teacher, **QUICK, checkpoint=path).trained()
    assert all(torch.equal(again[name], value) for name, value in expected.items())
    others = [(teacher, {"eps": 0.1}), (teacher, {"anchor": 3.0}), (untrained(model, seed=2), {})]
    for other, settings in others:
        with pytest.raises(ValueError, match="expected a checkpoint of this training"):
            distill(model, loader, other, **QUICK, checkpoint=path, **settings)


def test_eps_in_levels_is_noticed(model):
    with pytest.warns(SoundnessWarning, match="^eps is 8, more than the whole range"):
        distill(model, [blobs(4)], untrained(model), **QUICK, eps=8)


def test_all_arguments_are_in_the_signature():
    ours, theirs = (signature(each).parameters for each in (distill, train_masking_model))
    assert {name: each.default for name, each in theirs.items() if name != "masking_model"} == {
        name: each.default for name, each in ours.items() if name in {*theirs} - {"masking_model"}
    }


def test_seed_loss_and_anchor_decide(model):
    def run(**settings):
        student = distill(model, [blobs(4)] * 2, untrained(model), **QUICK, **settings)
        return student.selector.weight

    first = run()
    assert torch.equal(run(loss=MaskingLoss(model)), first)
    for settings in ({"seed": 1}, {"loss": MaskingLoss(model, area=50.0)}, {"anchor": 0.0}):
        assert not torch.equal(run(**settings), first)

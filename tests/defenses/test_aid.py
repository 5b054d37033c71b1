# SPDX-License-Identifier: MIT
"""AID: the distillation loss by hand, and a student that leaves its teacher alone."""

import copy
import math

import pytest
import torch
from conftest import TinyNet, blobs
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from captum_adv2 import ADV2, storage
from captum_adv2.defenses import Distillation, distill
from captum_adv2.interpreters import RTS, MaskingLoss, MaskingModel, train_masking_model, training
from captum_adv2.interpreters.training import random_others

# Spelled out: what is tested is not the defaults.
WEIGHTS = {
    "smooth": 10.0,
    "area": 1.0,
    "destroy": 5.0,
    "power": 0.3,
    "preserve": 1.0,
    "absent": 0.3,
}
ATTACK = {"eps": 0.1, "alpha": 0.03, "steps": 4}
QUICK = {"epochs": 2, "lr": 0.01, "steps": 2, "verbose": False}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def masking(encoder, seed=0, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        settings = {"layers": ("body", "stem"), "width": 4, "image_shape": (3, 16, 16)} | settings
        return MaskingModel(encoder, **settings)


def weights(masking_model):
    return {name: value.clone() for name, value in masking_model.trained().items()}


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def adv2(model, masking_model, **settings):
    attack = ADV2(model, RTS(model, masking_model), **(ATTACK | settings))
    attack.set_mode_targeted_by_label(quiet=True)
    return attack


@pytest.fixture(scope="module")
def taught(trained):
    batches = [blobs(16, seed) for seed in range(20)]
    loss, settings = MaskingLoss(trained, **WEIGHTS), {"lr": 0.01, "epochs": 2, "verbose": False}
    return train_masking_model(trained, batches, masking(trained), loss=loss, **settings)


# The loss


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("anchor", [0.0, 3.0])
def test_both_terms_are_l1_distances_of_maps(model, taught, weight, anchor):
    images, labels = blobs(5, seed=3)
    attack, teacher = adv2(model, taught), masking(model, seed=1)
    found = Distillation(attack, teacher, weight, anchor)(taught, images, labels, seeded(4))
    target = random_others(labels, 4, seeded(4))
    adversarial = attack(images, target)
    clean, fooled, wanted = (
        own(x, y).detach().numpy()
        for own, x, y in (
            (taught, images, labels),
            (taught, adversarial, target),
            (teacher, images, labels),
        )
    )
    expected = {
        "aid": -weight * abs(clean - fooled).mean((1, 2, 3)),
        "anchor": anchor * abs(clean - wanted).mean((1, 2, 3)),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name].detach(), torch.tensor(value), rtol=1e-4, atol=1e-5, check_dtype=False
        )
    assert ((found["aid"] <= 0) & (found["aid"] >= -weight)).all()
    assert found["aid"].any() == (weight > 0)


def test_the_anchor_of_the_teacher_itself_is_zero(model, taught):
    terms = Distillation(adv2(model, taught), taught)(taught, *blobs(5), seeded(0))
    torch.testing.assert_close(terms["anchor"], torch.zeros(5), rtol=0, atol=1e-5)


def test_the_loss_pulls_on_the_masking_model_alone(model, taught):
    parameters = [*taught.selector.parameters(), *taught.decoder.parameters()]
    before = {name: p.clone() for name, p in model.state_dict().items()}
    terms = Distillation(adv2(model, taught), masking(model, 1))(taught, *blobs(5), seeded(0))
    loss = sum(terms.values())
    assert all(g.any() for g in torch.autograd.grad(loss.sum(), parameters, retain_graph=True))
    (none,) = torch.autograd.grad(loss.sum(), [model.stem[0].weight], allow_unused=True)
    assert none is None
    assert all(p.grad is None for p in (*parameters, *model.parameters()))
    assert same(before, model.state_dict())


@pytest.mark.parametrize("name", ["weight", "anchor"])
@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_weights_out_of_range(model, taught, name, value):
    with pytest.raises(ValueError, match=f"expected {name} at least 0"):
        Distillation(adv2(model, taught), taught, **{name: value})
    with pytest.raises(TypeError, match=f"expected {name} to be a number"):
        Distillation(adv2(model, taught), taught, **{name: str(value)})


# Training


def test_the_students_map_betrays_the_attack(model, taught):
    batches = [blobs(16, seed) for seed in range(8)]
    settings = {"eps": 0.1, "alpha": 0.02, "steps": 8, "weight": 20.0, "anchor": 10.0}
    settings |= {"loss": MaskingLoss(model, **WEIGHTS), "epochs": 2, "lr": 0.01, "verbose": False}
    student = distill(model, batches, taught, **settings)
    images, labels = blobs(32, seed=777)
    target = (labels + 1) % 4
    distances = []
    for masking_model in (taught, student):
        attack, rts = adv2(model, masking_model, steps=20, alpha=0.01), RTS(model, masking_model)
        adversarial = attack(images, target)
        distances.append((rts(adversarial, target) - rts(images, labels)).abs().mean())
    assert distances[1] > 1.3 * distances[0]


def test_the_anchor_keeps_the_maps_of_clean_images(model, taught):
    images, labels = blobs(32, seed=777)
    moved = []
    for anchor in (0.0, 50.0):
        settings = QUICK | {"epochs": 1, "weight": 20.0, "anchor": anchor}
        student = distill(model, [blobs(16)] * 6, taught, **settings)
        moved.append((student(images, labels) - taught(images, labels)).abs().mean())
    assert moved[1] < 0.7 * moved[0]


@pytest.mark.parametrize("shared", [True, False])
def test_teacher_classifier_and_encoder_stay_as_they_are(model, shared):
    classifier = copy.deepcopy(model).train()
    encoder = classifier if shared else TinyNet().train()
    teacher = masking(encoder).train()
    kept = [copy.deepcopy(module.state_dict()) for module in (teacher, classifier)]
    noise = torch.get_rng_state()
    student = distill(classifier, [blobs(4)] * 2, teacher, **QUICK)
    assert torch.equal(torch.get_rng_state(), noise)
    for module, before in zip((teacher, classifier), kept, strict=True):
        assert same(before, module.state_dict())
        assert all(part.training for part in module.modules())
        assert all(p.grad is None and p.requires_grad for p in module.parameters())
        assert not any(part._forward_hooks for part in module.modules())
    assert student is not teacher
    assert student.encoder is encoder
    assert not student.training
    assert not any(torch.equal(student.trained()[n], v) for n, v in teacher.trained().items())
    assert repr(student) == repr(teacher)


def test_both_losses_are_taken_in_turn(model, taught, monkeypatch):
    seen = []
    for name, kind in (("own", MaskingLoss), ("aid", Distillation)):

        def spy(self, masking_model, *args, real=kind.__call__, name=name):
            seen.append((name, masking_model.selector.weight.detach().clone(), args[1]))
            return real(self, masking_model, *args)

        monkeypatch.setattr(kind, "__call__", spy)
    distill(model, [blobs(4)] * 2, taught, **QUICK)
    names, values, labels = zip(*seen, strict=True)
    assert names == ("own", "aid") * 4
    assert torch.equal(values[0], taught.selector.weight)
    assert not any(map(torch.equal, values[1:], values[:-1]))
    assert all(torch.equal(given, blobs(4)[1]) for given in labels)


def test_the_attack_is_on_the_student_as_it_is(model, taught, monkeypatch):
    attacks, real = [], Distillation.__call__

    def spy(self, masking_model, *args):
        attacks.append((self.attack, masking_model))
        return real(self, masking_model, *args)

    monkeypatch.setattr(Distillation, "__call__", spy)
    student = distill(model, [blobs(4)], taught, **(QUICK | {"steps": 3}), eps=0.05, alpha=0.02)
    for attack, masking_model in attacks:
        assert attack.interpreter.masking_model is masking_model is student
        assert (attack.eps, attack.alpha, attack.steps) == (0.05, 0.02, 3)


@pytest.mark.parametrize("kind", ["list", "shuffled"])
@pytest.mark.parametrize("killed", [1, 2, 3, 5])
def test_a_killed_run_goes_on_to_the_same_weights(
    model, taught, tmp_path, monkeypatch, kind, killed
):
    monkeypatch.setattr(training, "_EVERY", 2)
    loader = [blobs(4, seed) for seed in range(3)]
    if kind == "shuffled":
        loader = DataLoader(TensorDataset(*blobs(12)), batch_size=4, shuffle=True)
    before, path, runs = weights(taught), tmp_path / "file", []
    expected = weights(distill(model, loader, taught, **QUICK))
    real = Distillation.__call__

    def dies(self, *args):
        runs.append(1)
        if len(runs) > killed:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(Distillation, "__call__", dies)
    with pytest.raises(KeyboardInterrupt):
        distill(model, loader, taught, **QUICK, checkpoint=path)
    monkeypatch.setattr(Distillation, "__call__", real)
    assert path.exists() == (killed >= 2)
    torch.manual_seed(99)
    assert same(weights(distill(model, loader, taught, **QUICK, checkpoint=path)), expected)
    assert storage.load(path, "training")["done"] == 6
    # A finished run is read back, and trains nothing more.
    monkeypatch.setattr(Distillation, "__call__", None)
    assert same(weights(distill(model, loader, taught, **QUICK, checkpoint=path)), expected)
    assert same(weights(taught), before)


def test_a_checkpoint_of_the_training_before_is_another(model, tmp_path):
    path, teacher, loader = tmp_path / "file", masking(model), [blobs(4)]
    train_masking_model(model, loader, teacher, epochs=2, lr=0.01, verbose=False, checkpoint=path)
    with pytest.raises(ValueError, match="expected a checkpoint of this training"):
        distill(model, loader, teacher, **QUICK, checkpoint=path)


def test_the_seed_decides(model, taught):
    first, again, other = (
        weights(distill(model, [blobs(4)] * 2, taught, **QUICK, seed=seed)) for seed in (0, 0, 1)
    )
    assert same(first, again)
    assert not same(first, other)


def test_a_loss_of_ones_own(model, taught):
    plain, other = (
        weights(distill(model, [blobs(4)], taught, **QUICK, loss=loss))
        for loss in (None, MaskingLoss(model, area=50.0))
    )
    assert not same(plain, other)
    assert same(
        plain, weights(distill(model, [blobs(4)], taught, **QUICK, loss=MaskingLoss(model)))
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"eps": -0.1}, ValueError, "expected eps at least 0"),
        ({"alpha": -0.1}, ValueError, "expected alpha at least 0"),
        ({"steps": 0}, ValueError, "expected steps at least 1"),
        ({"weight": -1.0}, ValueError, "expected weight at least 0"),
        ({"anchor": -1.0}, ValueError, "expected anchor at least 0"),
        ({"epochs": 0}, ValueError, "expected epochs at least 1"),
        ({"lr": 0.0}, ValueError, "expected lr above 0"),
        ({"seed": -1}, ValueError, "expected seed at least 0"),
        ({"steps": 1.5}, TypeError, "expected steps to be an integer"),
    ],
)
def test_arguments_out_of_range(model, taught, arguments, error, message):
    with pytest.raises(error, match=message):
        distill(model, [blobs(4)], taught, **(QUICK | arguments))


def test_models_of_another_type_and_a_loader_without_a_length(model, taught):
    with pytest.raises(TypeError, match="expected masking_model to be a MaskingModel, got TinyNet"):
        distill(model, [blobs(4)], model)
    with pytest.raises(TypeError, match=r"expected model to be a torch\.nn\.Module"):
        distill(lambda x: x, [blobs(4)], taught)
    with pytest.raises(TypeError, match="expected a loader with a length"):
        distill(model, iter([blobs(4)]), taught)
    with pytest.raises(ValueError, match="classifier's 3 classes, got one for 4"):
        distill(TinyNet(classes=3), [(blobs(2)[0], torch.tensor([0, 1]))], masking(model))


def test_the_bar_shows_both_losses_or_nothing(model, taught, capsys):
    distill(model, [blobs(4)], taught, **QUICK)
    assert capsys.readouterr() == ("", "")
    distill(model, [blobs(4)], taught, **(QUICK | {"verbose": True}))
    _, err = capsys.readouterr()
    assert all(f"{name}=" in err for name in ("aid", "anchor", "area", "preserve"))


def test_an_encoder_of_its_own_is_fine(model):
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1))
    teacher = masking(encoder, classes=4, layers=("2", "1"))
    student = distill(model, [blobs(4)] * 2, teacher, **QUICK)
    assert not same(weights(student), weights(teacher))

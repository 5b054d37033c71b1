# SPDX-License-Identifier: MIT
"""torchattacks' contract: the attacks drop into code written for its own."""

import copy

import pytest
import torch
import torchattacks
from attack_helpers import FLAT_MAPS, MODES, noting, shifted, targeted
from conftest import TinyNet, inner, mixed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchattacks.attack import Attack

from captum_adv2 import ADV2
from captum_adv2.interpreters import CAM, Gradient

pytestmark = [
    pytest.mark.filterwarnings(FLAT_MAPS),
    pytest.mark.filterwarnings("ignore:.*weights_only:FutureWarning"),  # torchattacks' `load`
]

CLASSES = 4
MEAN, STD = [0.25] * 3, [0.5] * 3  # exact in every dtype


@pytest.fixture
def net(trained):
    """A copy of the trained net, for tests that change it."""
    return copy.deepcopy(trained)


class Recorder:
    """A target map that records the classes it is called with."""

    def __init__(self):
        self.labels, self.targets = [], []

    def __call__(self, interpreter, images, labels, target):
        self.labels.append(labels.clone())
        self.targets.append(target.clone())
        return interpreter.explain(images, labels).maps.detach()


# Construction


def test_it_is_an_attack_of_torchattacks(attacked, model):
    attack = attacked.build(model)
    assert isinstance(attack, Attack)
    assert attack.attack == attacked.name.split()[0]
    assert attack.supported_mode == ["default", "targeted"]
    assert attack.get_mode() == "default"
    assert attack.model is model


def test_construction_does_not_run_the_model(build, net):
    net.train()
    runs = []
    net.register_forward_hook(lambda *_: runs.append(1))
    build(net, CAM)
    assert runs == []
    assert all(module.training for module in net.modules())


def test_the_model_alone_is_enough(data, capsys):
    net = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.SiLU())  # without parameters
    attack = ADV2(net)
    assert "set_device" in capsys.readouterr().out  # torchattacks' own words
    assert attack.device is None
    assert isinstance(attack.interpreter, Gradient)
    assert attack.interpreter.model is net
    attack.steps = 2
    assert attack(*data).device == data[0].device


# Modes


@pytest.fixture
def recorded(model, build):
    """An attack, and the recorder of its classes."""
    attack, recorder = build(model, CAM), Recorder()
    inner(attack).target_map = recorder
    return attack, recorder


@pytest.mark.parametrize("with_labels", [True, False])
def test_default_mode_leaves_the_labels(recorded, data, with_labels):
    attack, recorder = recorded
    adversarial = attack(*data) if with_labels else attack(data[0])
    assert adversarial.shape == data[0].shape
    assert (recorder.targets[0] != data[1]).all()  # the net is right on all, so labels or none
    assert torch.equal(recorder.labels[0], data[1])


@pytest.mark.parametrize("with_labels", [True, False])
def test_random_targets(recorded, data, with_labels):
    attack, recorder = recorded
    attack.set_mode_targeted_random(quiet=True)
    assert attack.get_mode() == inner(attack).get_mode() == "targeted(random)"
    arguments = data if with_labels else data[:1]
    with torch.random.fork_rng():
        attack(*arguments)
        drawn = [inner(attack).get_random_target_label(*arguments) for _ in range(60)]
    targets = torch.stack([*recorder.targets, *drawn])
    assert (targets != data[1]).all()
    assert all(len(column.unique()) == CLASSES - 1 for column in targets.T)


@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("kth_min", [1, 2])
def test_least_likely_targets(recorded, model, data, with_labels, kth_min):
    attack, recorder = recorded
    attack.set_mode_targeted_least_likely(kth_min, quiet=True)
    attack(*data) if with_labels else attack(data[0])
    with torch.no_grad():
        logits = model(data[0]).scatter(1, data[1][:, None], torch.inf)
    assert torch.equal(recorder.targets[0], logits.argsort(dim=1)[:, kth_min - 1])


def test_targets_by_label(recorded, data):
    attack, recorder = recorded
    attack.set_mode_targeted_by_label(quiet=True)
    attack(data[0], shifted(*data))
    assert torch.equal(recorder.targets[0], shifted(*data))
    assert torch.equal(recorder.labels[0], data[1])  # the benign map explains the image's own class


def test_targets_by_function(recorded, data):
    attack, recorder = recorded
    received = []

    def function(images, labels):
        received.append((images, labels))
        return shifted(images, data[1])

    attack.set_mode_targeted_by_function(function, quiet=True)
    attack(*data)
    attack(data[0])
    assert torch.equal(received[0][0], data[0])
    assert torch.equal(received[0][1], data[1])
    assert received[1][1] is None
    for targets in recorder.targets:
        assert torch.equal(targets, shifted(*data))


def test_modes_can_be_changed_back(attacked, model, data, capsys):
    attack = attacked.build(model)
    before = attack(*data)
    attack.set_mode_targeted_by_function(shifted)
    other = attack(*data)
    attack.set_mode_default()
    assert "targeted(custom)" in capsys.readouterr().out
    assert torch.equal(attack(*data), before)
    assert not torch.equal(other, before)


@MODES
def test_a_batch_is_attacked_like_its_images(attacked, trained_smooth, data, mode):
    images, labels = data[0][:3].double(), data[1][:3]
    attack = mode(attacked.build(trained_smooth))
    together = attack(images, labels)
    alone = [attack(images[i : i + 1], labels[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-6)


# Normalisation


class Normalised(TinyNet):
    def forward(self, x):
        return super().forward((x - MEAN[0]) / STD[0])


def normalised(net):
    """Return a copy of a net that normalises its images itself."""
    clone = copy.deepcopy(net)
    clone.__class__ = Normalised
    return clone


@MODES
def test_normalised_images_give_the_attack_on_the_normalised_model(
    attacked, trained_smooth, data, mode
):
    images, labels = data[0].double(), data[1]
    outside, inside = (
        mode(attacked.build(net)) for net in (trained_smooth, normalised(trained_smooth))
    )
    outside.set_normalization_used(MEAN, STD)
    if getattr(outside, "start", None) is not None:  # an attack with a normalisation of its own
        outside.start.set_normalization_used(MEAN, STD)
    given = outside.normalize(images)
    adversarial = outside.inverse_normalize(outside(given, labels))
    expected = inside(images, labels)
    torch.testing.assert_close(adversarial, expected, rtol=0, atol=1e-6)
    assert not torch.equal(expected, images)
    assert outside._normalization_applied is inner(outside)._normalization_applied is True


class RobModel(nn.Module):
    """torchattacks knows this class name (of MAIR) and reads mean and std from it."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.mean, self.std = torch.tensor(MEAN), torch.tensor(STD)

    def forward(self, x):
        return self.net(x)


def test_robmodel_switches_normalisation_on(build, net, data):
    attack = build(RobModel(net), CAM)
    assert attack._normalization_applied is True
    adversarial = attack.inverse_normalize(attack(attack.normalize(data[0]), data[1]))
    assert ((adversarial >= -1e-6) & (adversarial <= 1 + 1e-6)).all()
    assert not torch.equal(adversarial, data[0])


# save and load


def test_save_and_load(model, data, tmp_path, capsys):
    images, labels = data
    attack = ADV2(model, CAM, eps=0.2, steps=4)
    path = tmp_path / "adversarial.pt"
    loader = DataLoader(TensorDataset(images, labels), batch_size=4)
    accuracy, _, _ = attack.save(
        loader, path, True, return_verbose=True, save_predictions=True, save_clean_inputs=True
    )
    assert "Robust accuracy" in capsys.readouterr().out
    loaded = ADV2.load(path, batch_size=6, load_predictions=True, load_clean_inputs=True)
    (batch,) = loaded
    adversarial = torch.cat([attack(images[:4], labels[:4]), attack(images[4:], labels[4:])])
    assert torch.equal(batch[0], adversarial)
    assert torch.equal(batch[1], labels)
    assert torch.equal(batch[2], model(adversarial).argmax(dim=1))
    assert torch.equal(batch[3], images)
    assert accuracy == pytest.approx(100 * (batch[2] == labels).double().mean().item())


def test_save_as_integers_restores_the_model(attacked, trained, data, tmp_path):
    net = mixed(trained)
    modes = [module.training for module in net.modules()]
    attack = attacked.build(net)
    attack.save(DataLoader(TensorDataset(*data), 6), tmp_path / "a.pt", True, save_type="int")
    assert [module.training for module in net.modules()] == modes
    (batch,) = attack.load(tmp_path / "a.pt")
    torch.testing.assert_close(batch[0], attack(*data), rtol=0, atol=1 / 255 + 1e-6)


# MultiAttack


class Half(Attack):
    """Replaces the first three images of a batch by one of another class."""

    def __init__(self, model):
        super().__init__("Half", model)
        self.supported_mode = ["default"]

    def forward(self, images, labels):
        images = images.clone()
        for i in range(3):
            images[i] = images[labels != labels[i]][-1]
        return images


def test_multiattack_hands_over_the_images_that_are_left(attacked, model, data):
    images, labels = data
    sizes = []

    def target_map(interpreter, subset, own, target):
        sizes.append(len(subset))
        return interpreter.explain(subset, own).maps.detach()

    half, ours = Half(model), attacked.build(model)
    inner(ours).target_map = target_map
    adversarial = torchattacks.MultiAttack([half, ours])(images, labels)
    assert sizes == [3]
    changed = ours(images[3:], labels[3:])
    fooled = model(changed).argmax(dim=1) != labels[3:]  # the others stay clean
    assert torch.equal(adversarial[:3], half(images, labels)[:3])
    assert torch.equal(adversarial[3:][fooled], changed[fooled])
    assert torch.equal(adversarial[3:][~fooled], images[3:][~fooled])


def test_multiattack_passes_normalisation_on(net, data):
    attacks = [torchattacks.PGD(net, eps=0.0, steps=1), ADV2(net, CAM, eps=0.1, steps=4)]
    multi = torchattacks.MultiAttack(attacks)
    multi.set_normalization_used(MEAN, STD)
    given = multi.normalize((data[0] * 255).round() / 256)
    adversarial = multi.inverse_normalize(multi(given, data[1]))
    assert adversarial.min() >= -1e-6
    assert (adversarial - multi.inverse_normalize(given)).abs().max() <= 0.1 + 1e-5
    assert attacks[1]._normalization_applied is True


# Model, device, modes of modules


def test_set_model_rebuilds_an_interpreter_given_as_a_class(model, net, data, build):
    with torch.no_grad():
        net.fc.weight.copy_(net.fc.weight.roll(1, dims=0))
    attack = build(model, CAM)
    attack.set_model(net)
    assert attack.model is inner(attack).model is inner(attack).interpreter.model is net
    assert torch.equal(attack(*data), build(net, CAM)(*data))


def test_set_model_keeps_an_interpreter_of_another_model(model, net, data, build):
    attack = build(model, CAM(model))
    attack.set_model(net)
    with pytest.raises(ValueError, match=r"built on the attack's model.*ADV2\(model, CAM\)"):
        attack(*data)
    inner(attack).interpreter = CAM(net)
    attack(*data)


def test_the_device_that_is_set_is_used(model, data, build):
    attack = build(model, CAM)
    assert attack.device == torch.device("cpu")
    attack.set_device(torch.device("meta"))
    with pytest.raises(TypeError, match="model's dtype and device, .* on cpu, got .* on meta"):
        attack(*data)


@pytest.mark.parametrize(
    ("asked", "used"),
    [
        ({}, (False, False, False)),
        ({"model_training": True}, (True, False, False)),
        ({"model_training": True, "dropout_training": True}, (True, False, True)),
        ({"model_training": True, "batchnorm_training": True}, (True, True, False)),
    ],
)
def test_set_model_training_mode(net, data, build, asked, used):
    net.norm.eval()
    attack = targeted(build(net, Gradient))
    attack.set_model_training_mode(**asked)
    modes, seen = [module.training for module in net.modules()], set()
    handle = net.register_forward_pre_hook(
        lambda module, _: seen.add((module.training, module.norm.training, module.dropout.training))
    )
    with torch.random.fork_rng():
        attack(*data)
    handle.remove()
    assert seen == {used}
    assert [module.training for module in net.modules()] == modes


# Settings


def test_repr_is_one_line_with_the_settings(attacked, model):
    attack, twin = attacked.build(model), attacked.build(model)
    inner(attack).callback, inner(attack).generator = [].append, torch.Generator()
    assert repr(attack) == repr(twin)
    assert repr(attack).startswith(f"{attack.attack}(")
    count = "queries" if attack.attack == "QueryADV2" else "steps"
    for part in ("alpha=", f"{count}={getattr(inner(attack), count)}"):
        assert part in repr(attack)
    assert f"interpreter={inner(attack).interpreter!r}" in repr(attack)
    assert "attack_mode=default" in repr(attack)
    assert not any(part in repr(attack) for part in ("\n", " at 0x", "tensor("))


def test_attributes_can_be_reassigned(model, data):
    attack = ADV2(model, CAM)
    attack.eps, attack.alpha, attack.steps, attack.keep = 0.1, 0.02, 5, "final"
    expected = ADV2(model, CAM, eps=0.1, alpha=0.02, steps=5, keep="final")(*data)
    assert torch.equal(attack(*data), expected)
    records = []
    attack.terms, attack.callback = [noting([]), noting([])], records.append
    assert torch.equal(attack(*data), expected)
    assert [record.step for record in records] == [0, 1, 2, 3, 4]

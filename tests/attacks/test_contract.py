# SPDX-License-Identifier: MIT
"""torchattacks' contract: the attacks drop into code written for its own. And wrong arguments."""

import copy

import pytest
import torch
import torchattacks
from captum.attr import Saliency
from conftest import TinyNet, mixed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchattacks.attack import Attack

from captum_adv2 import ADV2, BitDepthADV2, SoundnessWarning, StADV2
from captum_adv2.attacks import Margin, RandomPatch, SignDescent, presets
from captum_adv2.interpreters import CAM, Explanation, Gradient, Interpreter, Unrolled

# MASK's map of an image is constant after few iterations, and a random net's maps may be.
pytestmark = pytest.mark.filterwarnings("ignore::captum_adv2.SoundnessWarning")

CLASSES = 4
MEAN, STD = [0.25] * 3, [0.5] * 3  # exact in every dtype
# Each class of attacks, around an interpreter or its class.
BUILD = {
    "ADV2": lambda model, interpreter: ADV2(model, interpreter, steps=4),
    "StADV2": lambda model, interpreter: StADV2(model, interpreter, steps=4),
    "BitDepthADV2": lambda model, interpreter: BitDepthADV2(
        ADV2(model, interpreter, eps=0.2, steps=4), bits=3, steps=3
    ),
}


@pytest.fixture(params=BUILD)
def build(request):
    return BUILD[request.param]


@pytest.fixture
def net(trained):
    """A copy of the trained net, for tests that change it."""
    return copy.deepcopy(trained)


def shifted(images, labels):
    return (labels + 1) % CLASSES


def targeted(attack):
    attack.set_mode_targeted_by_function(shifted, quiet=True)
    return attack


def inner(attack):
    """Return the attack that optimises the image: of two stages, the second."""
    return getattr(attack, "second", attack)


def predictions(model, images):
    with torch.no_grad():
        return model(images).argmax(dim=1)


def mirrored(interpreter, images, labels, target):
    """A target map that fits any batch."""
    with torch.no_grad():
        return interpreter.explain(images, labels).maps.flip(-1)


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
@pytest.mark.parametrize("seed", [None, 7])
def test_random_targets(recorded, data, with_labels, seed):
    attack, recorder = recorded
    inner(attack).generator = seed if seed is None else torch.Generator().manual_seed(seed)
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


@pytest.mark.parametrize("mode", ["default", "targeted"])
def test_a_batch_is_attacked_like_its_images(attacked, trained_smooth, data, mode):
    images, labels = data[0][:3].double(), data[1][:3]
    attack = attacked.build(trained_smooth)
    if mode == "targeted":
        targeted(attack)
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


@pytest.mark.parametrize("mode", ["default", "targeted"])
def test_normalised_images_give_the_attack_on_the_normalised_model(
    attacked, trained_smooth, data, mode
):
    images, labels = data[0].double(), data[1]
    outside, inside = attacked.build(trained_smooth), attacked.build(normalised(trained_smooth))
    outside.set_normalization_used(MEAN, STD)
    if mode == "targeted":
        targeted(outside), targeted(inside)
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
    assert torch.equal(batch[2], predictions(model, adversarial))
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
        return mirrored(interpreter, subset, own, target)

    half, ours = Half(model), attacked.build(model)
    inner(ours).target_map = target_map
    adversarial = torchattacks.MultiAttack([half, ours])(images, labels)
    assert sizes == [3]
    changed = ours(images[3:], labels[3:])
    fooled = predictions(model, changed) != labels[3:]  # the others stay clean
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
    with pytest.raises(RuntimeError, match="meta"):
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
    for part in ("alpha=", "steps=2" if "stop" not in attacked.name else "steps=3"):
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
    attack.terms = [lambda candidate: 0 * candidate.images.sum(dim=(1, 2, 3))] * 2
    attack.callback = records.append
    assert torch.equal(attack(*data), expected)
    assert [record.step for record in records] == [0, 1, 2, 3, 4]


# Wrong arguments

NOT_ITS = (
    r"built on the attack's model, got one built on another TinyNet; pass its class.*\(model, CAM\)"
)
MISTAKES = [
    (lambda m: ADV2(m, CAM, steps=5, warmup=6), ValueError, "warmup at most 5, the steps, got 6"),
    (lambda m: ADV2(m, CAM(TinyNet())), ValueError, NOT_ITS),
    (lambda m: StADV2(m, lambda net: CAM(TinyNet())), ValueError, NOT_ITS),
    (lambda m: ADV2(m, Saliency(m)), TypeError, "an Interpreter, got Saliency; wrap a Captum"),
    (lambda m: ADV2(m, Saliency), TypeError, "an Interpreter, got the class Saliency; wrap a"),
    (
        lambda m: StADV2(m, lambda net: "CAM"),
        TypeError,
        "to be an Interpreter, got str",
    ),
    (lambda m: ADV2(m, target_map=RandomPatch), TypeError, r"target_map .*; pass RandomPatch\(\)"),
    (lambda m: ADV2(m, step=SignDescent), TypeError, r"step .*; pass SignDescent\(\)"),
    (lambda m: ADV2(m, prediction=Margin), TypeError, r"prediction .*; pass Margin\(\)"),
    (lambda m: ADV2(m, terms=[Margin]), TypeError, r"terms\[0\] .*; pass Margin\(\)"),
    (lambda m: ADV2(m, surrogate=Unrolled), TypeError, r"surrogate .*; pass Unrolled\(\.\.\.\)"),
    (
        lambda m: ADV2(m, generator=3),
        TypeError,
        "a torch.Generator, got int; torch.Gen",
    ),
    (lambda m: BitDepthADV2(StADV2(m), 3), TypeError, "attack to be an ADV2, got StADV2"),
    (lambda m: BitDepthADV2(ADV2(m), 9), ValueError, r"bits in \[1, 8\], got 9"),
    (lambda m: StADV2.from_preset(m, CAM, presets.PAPER["CAM"]), TypeError, "StADV2.*'eps'"),
    (
        lambda m: ADV2.from_preset(m, CAM, presets.PAPER_STADV["CAM"]),
        TypeError,
        "ADV2.*'flow_weight'",
    ),
]


@pytest.mark.parametrize(("construct", "error", "message"), MISTAKES)
def test_mistakes_at_construction(model, construct, error, message):
    with pytest.raises(error, match=message):
        construct(model)


def test_settings_that_stop_fitting(model, data):
    attack = ADV2(model, CAM, steps=6, warmup=6)
    attack.steps = 5
    with pytest.raises(ValueError, match="expected warmup at most 5, the steps, got 6"):
        attack(*data)


@pytest.mark.parametrize("mode", ["default", "label", "function"])
@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (
            lambda y: torch.full_like(y, 7),
            ValueError,
            r"labels in \[0, 3\], got values in \[7, 7\]",
        ),
        (lambda y: y - 4, ValueError, r"labels in \[0, 3\], got values in \[-4"),
        (lambda y: y[:-1], ValueError, r"labels of shape \(6,\), one class an image, got \(5,\)"),
        (lambda y: y.float(), TypeError, "labels of an integer dtype, got torch.float32"),
        (lambda y: y.tolist(), TypeError, "labels to be a torch.Tensor, got list"),
    ],
)
def test_labels_that_are_not_classes_of_the_images(model, data, build, mode, spoil, error, message):
    attack, labels = build(model, CAM), spoil(data[1])
    if mode == "label":
        attack.set_mode_targeted_by_label(quiet=True)
    elif mode == "function":
        attack.set_mode_targeted_by_function(lambda *_: spoil(data[1]), quiet=True)
        labels, message = data[1], f"target {message}"
    with pytest.raises(error, match=message):
        attack(data[0], labels)


def test_targets_that_do_not_exist(model, data, build):
    attack = build(model, CAM)
    attack.set_mode_targeted_by_label(quiet=True)
    with pytest.raises(ValueError, match="expected labels, the target classes in this mode"):
        attack(data[0])
    attack.set_mode_targeted_least_likely(CLASSES, quiet=True)  # one of them is the label
    with pytest.raises(RuntimeError, match="out of range"):
        attack(*data)


MAP = torch.linspace(0, 1, 64).view(1, 1, 8, 8).repeat(6, 1, 1, 1)  # the tiny net's CAM is 8x8


@pytest.mark.parametrize("passed", [True, False])
@pytest.mark.parametrize(
    ("maps", "error", "message"),
    [
        (MAP[..., :7], ValueError, r"\(6, 1, 8, 8\) from CAM, got \(6, 1, 8, 7\).*native"),
        (MAP[:5], ValueError, r"\(6, 1, 8, 8\) from CAM, got \(5, 1, 8, 8\)"),
        (
            2 * MAP,
            ValueError,
            r"target_maps in \[0, 1\], got values in \[0, 2\]; 1 means important",
        ),
        (MAP.tolist(), TypeError, "target_maps to be a torch.Tensor, got list"),
    ],
)
def test_target_maps_that_do_not_fit(model, data, build, passed, maps, error, message):
    attack, records = build(model, CAM), []
    inner(attack).callback = records.append
    if not passed:
        targeted(attack)
        inner(attack).target_map = lambda *_: maps
    with pytest.raises(error, match=message):
        attack(*data, **({"target_maps": maps} if passed else {}))
    assert records == []  # before any step


def test_constant_target_maps_warn(model, data, build):
    with pytest.warns(SoundnessWarning, match="at least one target map is constant"):
        build(model, CAM)(*data, target_maps=torch.zeros_like(MAP))


class Detached(Interpreter):
    def explain(self, images, target):
        return Explanation(images.detach().mean(dim=1, keepdim=True), None)


class Deaf(Interpreter):
    """A map that is not constant and has a graph, which does not lead to the image."""

    def explain(self, images, target):
        weight = next(self.model.parameters()).sum()
        return Explanation(MAP[: len(images)] + 0 * weight, self.logits(images))


def test_an_interpreter_without_a_graph(model, data, build):
    attack, records = build(model, Detached), []
    inner(attack).callback = records.append
    with pytest.raises(ValueError, match="expected a differentiable interpreter, got Detached"):
        attack(*data)
    assert records == []


def test_a_map_without_a_gradient_warns(model, data, build):
    with pytest.warns(SoundnessWarning, match="the gradient of Deaf's map is zero"):
        build(model, Deaf)(*data)


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (nn.RNN(4, 4), TypeError, "return logits of shape .*, got tuple; wrap"),
        (nn.Unflatten(1, (4, 1)), ValueError, "at least two classes, got"),
        (nn.Linear(4, 1), ValueError, "at least two classes, got"),
    ],
)
def test_a_model_that_does_not_return_logits(model, data, build, layer, error, message):
    with pytest.raises(error, match=message):
        build(nn.Sequential(model, layer), Gradient)(*data)

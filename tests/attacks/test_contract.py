# SPDX-License-Identifier: MIT
"""What torchattacks' users rely on: our attacks drop into code written for its own."""

import copy
import inspect
import pickle
import random

import captum.attr
import numpy as np
import pytest
import torch
import torchattacks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchattacks.attack import Attack

from captum_adv2 import ADV2, BitDepthADV2, StADV2
from captum_adv2.interpreters import CAM, CaptumInterpreter, GradCAM, Gradient

CLASSES = 4


# How each attack is built, with settings of the dual loop that all three have.
FAMILY = {
    "ADV2": lambda model, g, **s: ADV2(model, g, eps=0.1, **s),
    "StADV2": lambda model, g, **s: StADV2(model, g, alpha=0.2, **s),
    "BitDepthADV2": lambda model, g, **s: BitDepthADV2(
        ADV2(model, g, eps=0.2, **s), bits=3, steps=3
    ),
}


@pytest.fixture(params=FAMILY)
def family(request):
    return FAMILY[request.param]


@pytest.fixture(params=list(FAMILY)[1:])
def others(request):
    """All but ADV2, which has a test of its own."""
    return FAMILY[request.param]


def shifted(images, labels):
    return (labels + 1) % CLASSES


def mirrored(interpreter, images, labels, target):
    """A target map that is a function: it pickles, and it fits any batch."""
    with torch.no_grad():
        return interpreter.explain(images, labels).maps.flip(-1)


class Recorder:
    """A target map that notes what it was asked for: in order, the classes an attack aims at."""

    def __init__(self):
        self.labels, self.targets = [], []

    def __call__(self, interpreter, images, labels, target):
        self.labels.append(labels.clone())
        self.targets.append(target.clone())
        return interpreter.explain(images, labels).maps.detach()


@pytest.fixture
def net(trained):
    """A copy of the trained net, for tests that change it."""
    return copy.deepcopy(trained)


def predictions(model, images):
    with torch.no_grad():
        return model(images).argmax(dim=1)


# Construction


def test_it_is_a_torchattacks_attack(model):
    attack = ADV2(model)
    assert isinstance(attack, Attack)
    assert attack.attack == "ADV2"
    assert attack.supported_mode == ["default", "targeted"]
    assert attack.get_mode() == "default"
    assert attack.model is model


def test_the_model_alone_is_enough(model, data):
    attack = ADV2(model)
    assert isinstance(attack.interpreter, Gradient)
    assert attack.interpreter.model is model
    attack.steps = 2
    assert attack(*data).shape == data[0].shape


def test_arguments_go_by_torchattacks_names_and_have_defaults():
    parameters = inspect.signature(ADV2).parameters
    assert list(parameters)[:5] == ["model", "interpreter", "eps", "alpha", "steps"]
    assert {"random_start", "verbose"} <= set(parameters)
    required = [p.name for p in parameters.values() if p.default is inspect.Parameter.empty]
    assert required == ["model"]
    assert parameters["eps"].default == torchattacks.PGD(nn.Linear(1, 1)).eps == 8 / 255
    assert parameters["alpha"].default == torchattacks.PGD(nn.Linear(1, 1)).alpha == 2 / 255


def test_construction_runs_nothing_and_leaves_the_model(net):
    net.train()
    runs = []
    net.register_forward_hook(lambda *_: runs.append(1))
    ADV2(net, CAM)
    assert runs == []
    assert all(module.training for module in net.modules())


class Parameterless(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(CLASSES, 12, generator=generator))

    def forward(self, x):
        return (
            nn.functional.silu(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)) @ self.weight.T
        )


def test_model_without_parameters(data, capsys):
    attack = ADV2(Parameterless().eval(), steps=2)
    assert "set_device" in capsys.readouterr().out  # torchattacks' own words
    assert attack.device is None
    assert attack(*data).device == data[0].device


# Modes


@pytest.fixture
def recorded(model, family):
    """An attack, and the recorder of what it aims at."""
    recorder = Recorder()
    return family(model, CAM, steps=2, target_map=recorder), recorder


@pytest.mark.parametrize("with_labels", [True, False])
def test_default_mode_leaves_the_labels(recorded, data, with_labels):
    attack, recorder = recorded
    images, labels = data
    adversarial = attack(images, labels) if with_labels else attack(images)
    assert adversarial.shape == images.shape
    assert (recorder.targets[0] != labels).all()  # the net is right on all, so labels or none


def test_no_labels_are_the_models_predictions(model, data):
    images, labels = data
    assert torch.equal(predictions(model, images), labels)
    attack = ADV2(model, CAM, eps=0.1, steps=4)
    assert torch.equal(attack(images), attack(images, labels))


@pytest.mark.parametrize("with_labels", [True, False])
def test_random_targets(recorded, data, with_labels):
    attack, recorder = recorded
    attack.set_mode_targeted_random(quiet=True)
    assert attack.get_mode() == "targeted(random)"
    images, labels = data
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for _ in range(12):
            attack(images, labels) if with_labels else attack(images)
    targets = torch.stack(recorder.targets)
    assert (targets != labels).all()
    assert all(len(column.unique()) == CLASSES - 1 for column in targets.T)


@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("kth_min", [1, 2])
def test_least_likely_targets(recorded, model, data, with_labels, kth_min):
    attack, recorder = recorded
    attack.set_mode_targeted_least_likely(kth_min, quiet=True)
    images, labels = data
    attack(images, labels) if with_labels else attack(images)
    with torch.no_grad():
        logits = model(images).scatter(1, labels[:, None], torch.inf)
    assert torch.equal(recorder.targets[0], logits.argsort(dim=1)[:, kth_min - 1])


def test_targets_by_label(recorded, data):
    attack, recorder = recorded
    attack.set_mode_targeted_by_label(quiet=True)
    images, labels = data
    attack(images, shifted(images, labels))
    assert torch.equal(recorder.targets[0], shifted(images, labels))
    assert torch.equal(recorder.labels[0], labels)  # the benign map explains the image's own class
    with pytest.raises(ValueError, match="expected labels, the target classes"):
        attack(images)


def test_targets_by_function(recorded, data):
    attack, recorder = recorded
    given = []

    def function(images, labels):
        given.append((images, labels))
        return shifted(images, data[1])

    attack.set_mode_targeted_by_function(function, quiet=True)
    attack(*data)
    attack(data[0])
    assert torch.equal(given[0][0], data[0])
    assert torch.equal(given[0][1], data[1])
    assert given[1][1] is None
    for targets in recorder.targets:
        assert torch.equal(targets, shifted(*data))


def test_modes_can_be_changed_back(recorded, data, capsys):
    attack, _ = recorded
    before = attack(*data)
    attack.set_mode_targeted_by_function(shifted)
    targeted = attack(*data)
    attack.set_mode_default()
    assert "targeted(custom)" in capsys.readouterr().out
    assert torch.equal(attack(*data), before)
    assert not torch.equal(targeted, before)


def test_integer_labels_of_any_width(recorded, data):
    attack, _ = recorded
    images, labels = data
    assert torch.equal(attack(images, labels.int()), attack(images, labels))


# Normalisation


class Normalize(nn.Module):
    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x):
        return (x - self.mean) / self.std


def saliency(model):
    return CaptumInterpreter(captum.attr.Saliency(model))


@pytest.mark.parametrize("interpreter", [CAM, GradCAM, Gradient, saliency])
@pytest.mark.parametrize("targeted", [True, False])
def test_normalised_input_gives_the_attack_on_the_normalised_model(
    net, data, interpreter, targeted
):
    # Multiples of 1/256, a mean of 1/2 and powers of two are exact: no rounding turns a sign.
    mean, std = [0.25, 0.25, 0.25], [0.5, 0.5, 0.5]
    images, labels = (data[0] * 255).round() / 256, data[1]
    outside = ADV2(net, interpreter, eps=0.1, steps=6)
    outside.set_normalization_used(mean, std)
    inside = ADV2(nn.Sequential(Normalize(mean, std), net), interpreter, eps=0.1, steps=6)
    if targeted:
        outside.set_mode_targeted_by_function(shifted, quiet=True)
        inside.set_mode_targeted_by_function(shifted, quiet=True)

    given = outside.normalize(images)
    assert not torch.equal(given, images)
    adversarial = outside.inverse_normalize(outside(given, labels))
    expected = inside(images, labels)
    torch.testing.assert_close(adversarial, expected, rtol=0, atol=1e-5)
    assert not torch.equal(expected, images)
    assert outside._normalization_applied is True
    assert outside.normalization_used is not None


def test_imagenets_normalisation_in_double_precision(smooth, data):
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    images = data[0].double()
    outside = ADV2(smooth, CAM, eps=0.1, steps=6)
    outside.set_normalization_used(mean, std)
    inside = ADV2(nn.Sequential(Normalize(mean, std), smooth).double(), CAM, eps=0.1, steps=6)
    adversarial = outside.inverse_normalize(outside(outside.normalize(images), data[1]))
    torch.testing.assert_close(adversarial, inside(images, data[1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("targeted", [True, False])
def test_normalised_input_is_the_same_to_the_whole_family(trained_smooth, data, others, targeted):
    mean, std = [0.25, 0.25, 0.25], [0.5, 0.5, 0.5]
    images = (data[0].double() * 255).round() / 256
    outside = others(trained_smooth, CAM, steps=6)
    outside.set_normalization_used(mean, std)
    inside = others(nn.Sequential(Normalize(mean, std).double(), trained_smooth), CAM, steps=6)
    if targeted:
        for attack in (outside, inside):
            attack.set_mode_targeted_by_function(shifted, quiet=True)
    adversarial = outside.inverse_normalize(outside(outside.normalize(images), data[1]))
    expected = inside(images, data[1])
    torch.testing.assert_close(adversarial, expected, rtol=0, atol=1e-6)
    assert (expected - images).abs().amax() > 0.01


def test_interpreter_itself_is_left_without_normalisation(net, data):
    cam = CAM(net)
    before = cam(*data)
    attack = ADV2(net, cam, steps=2)
    attack.set_normalization_used([0.25] * 3, [0.5] * 3)
    attack(attack.normalize(data[0]), data[1])
    assert attack.interpreter is cam
    assert torch.equal(cam(*data), before)


class RobModel(nn.Module):
    """torchattacks knows this class name (of MAIR) and reads mean and std from it."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.mean, self.std = torch.tensor([0.25] * 3), torch.tensor([0.5] * 3)

    def forward(self, x):
        return self.net(x)


def test_robmodel_switches_normalisation_on(net, data):
    attack = ADV2(RobModel(net), CAM, steps=2)
    assert attack._normalization_applied is True
    adversarial = attack.inverse_normalize(attack(attack.normalize(data[0]), data[1]))
    assert (adversarial - data[0]).abs().max() <= attack.eps + 1e-5


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


def test_save_as_integers(model, data, tmp_path, family):
    attack = family(model, CAM, steps=2)
    attack.save(DataLoader(TensorDataset(*data), 6), tmp_path / "a.pt", False, save_type="int")
    (batch,) = attack.load(tmp_path / "a.pt")
    torch.testing.assert_close(batch[0], attack(*data), rtol=0, atol=1 / 255 + 1e-6)


def test_save_leaves_each_modules_mode(net, data):
    net.train()
    net.norm.eval()
    modes = [module.training for module in net.modules()]
    ADV2(net, CAM, steps=2).save(DataLoader(TensorDataset(*data), 3), verbose=True)
    assert [module.training for module in net.modules()] == modes


# MultiAttack


def test_multiattack_hands_over_what_the_first_attack_left(model, data):
    images, labels = data
    sizes = []

    def target_map(interpreter, subset, own, target):
        sizes.append(len(subset))
        return mirrored(interpreter, subset, own, target)

    ours = ADV2(model, CAM, eps=0.2, alpha=0.02, steps=10, target_map=target_map)
    for eps in torch.linspace(0.005, 0.1, 39).tolist():
        weak = torchattacks.PGD(model, eps=eps, alpha=eps / 2, steps=4, random_start=False)
        first = weak(images, labels)
        left = predictions(model, first) == labels
        if 0 < left.sum() < len(images):  # a subset, or the test says little
            break
    assert 0 < left.sum() < len(images)

    adversarial = torchattacks.MultiAttack([weak, ours])(images, labels)
    assert sizes == [left.sum()]
    assert torch.equal(adversarial[~left], first[~left])
    assert torch.equal(adversarial[left], ours(images[left], labels[left]))
    assert (predictions(model, adversarial) != labels).all()


def test_multiattack_passes_normalisation_on(net, data):
    attacks = [torchattacks.PGD(net, eps=0.0, steps=1), ADV2(net, CAM, eps=0.1, steps=4)]
    multi = torchattacks.MultiAttack(attacks)
    multi.set_normalization_used([0.25] * 3, [0.5] * 3)
    given = multi.normalize((data[0] * 255).round() / 256)
    adversarial = multi.inverse_normalize(multi(given, data[1]))
    assert adversarial.min() >= -1e-6
    assert (adversarial - multi.inverse_normalize(given)).abs().max() <= 0.1 + 1e-5
    assert attacks[1]._normalization_applied is True


def test_the_family_in_multiattack(model, data, others):
    images, labels = data
    sizes = []

    def target_map(interpreter, subset, own, target):
        sizes.append(len(subset))
        return mirrored(interpreter, subset, own, target)

    ours = others(model, CAM, steps=30, target_map=target_map)
    adversarial = torchattacks.MultiAttack([Half(model), ours])(images, labels)
    assert sizes == [3]
    assert torch.equal(adversarial[:3], Half(model)(images, labels)[:3])
    assert torch.equal(adversarial[3:], ours(images[3:], labels[3:]))
    assert (predictions(model, adversarial) != labels).all()


class Half(Attack):
    """Replaces the first three images of a batch by one of another class."""

    def __init__(self, model):
        super().__init__("Half", model)

    def forward(self, images, labels):
        images = images.clone()
        for i in range(3):
            images[i] = images[labels != labels[i]][-1]
        return images


def test_two_adv2_attacks_of_one_model(model, data):
    multi = torchattacks.MultiAttack(
        [ADV2(model, CAM, steps=2), ADV2(model, Gradient, eps=0.2, steps=4)]
    )
    assert multi(*data).shape == data[0].shape


# Another model, copies


def test_set_model_rebuilds_an_interpreter_given_as_a_class(model, net, data, family):
    with torch.no_grad():
        net.fc.weight.copy_(net.fc.weight.roll(1, dims=0))
    attack = family(model, CAM, steps=4)
    attack.set_model(net)
    assert attack.model is net
    assert getattr(attack, "second", attack).interpreter.model is net
    assert torch.equal(attack(*data), family(net, CAM, steps=4)(*data))


def test_set_model_with_an_interpreter_of_the_old_model_is_told_at_the_next_call(model, net, data):
    attack = ADV2(model, CAM(model), steps=2)
    attack.set_model(net)
    with pytest.raises(ValueError, match=r"built on the attack's model.*ADV2\(model, CAM\)"):
        attack(*data)
    attack.interpreter = CAM(net)
    attack(*data)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda attack: pickle.loads(pickle.dumps(attack))}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("interpreter", [CAM, Gradient, lambda m: GradCAM(m, layer="body")])
def test_copies_do_the_same(model, data, how, interpreter):
    attack = ADV2(model, interpreter(model), eps=0.1, steps=4, target_map=mirrored)
    attack.set_mode_targeted_by_function(shifted, quiet=True)
    twin = COPIES[how](attack)
    assert twin.model is not attack.model
    assert twin.interpreter.model is twin.model
    assert torch.equal(twin(*data), attack(*data))
    assert repr(twin) == repr(attack)


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_continues_its_own_generator(model, data, how):
    generator = torch.Generator().manual_seed(5)
    attack = ADV2(model, CAM, eps=0.1, steps=2, random_start=True, generator=generator)
    attack.set_mode_targeted_random(quiet=True)
    twin = COPIES[how](attack)
    assert torch.equal(twin(*data), attack(*data))


# repr, attributes


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_the_family_do_the_same(model, data, how, others):
    generator = torch.Generator().manual_seed(5)
    attack = others(model, CAM, steps=4, target_map=mirrored, generator=generator)
    attack.set_mode_targeted_random(quiet=True)
    twin = COPIES[how](attack)
    assert twin.model is not attack.model
    for part in (twin, *twin._attacks.values()):
        assert part.model is twin.model
    assert torch.equal(twin(*data), attack(*data))
    assert repr(twin) == repr(attack)


def test_repr_of_the_family(model):
    moved = repr(StADV2(model, CAM, flow_weight=0.25, alpha=0.125, bound=2.0))
    assert moved.startswith("StADV2(")
    for part in ("flow_weight=0.25", "alpha=0.125", "bound=2.0", "interpreter=CAM"):
        assert part in moved
    inner = ADV2(model, CAM)
    squeezed = repr(BitDepthADV2(inner, bits=3, weight=2.0, slack=0.5))
    assert squeezed.startswith("BitDepthADV2(")
    for part in (f"second={inner!r}", "bits=3", "weight=2.0", "slack=0.5"):
        assert part in squeezed
    for text in (moved, squeezed):
        assert "\n" not in text
        assert " at 0x" not in text
        assert "tensor(" not in text


@pytest.mark.parametrize("interpreter", [CAM, Gradient, saliency])
def test_repr_is_one_line_with_the_settings(model, interpreter):
    attack = ADV2(model, interpreter, eps=0.125, alpha=0.0625, steps=17)
    text = repr(attack)
    assert text.startswith("ADV2(")
    for part in ("eps=0.125", "alpha=0.0625", "steps=17", f"interpreter={attack.interpreter!r}"):
        assert part in text
    assert "attack_mode=default" in text
    assert "\n" not in text
    assert " at 0x" not in text
    assert "tensor(" not in text


def test_attributes_can_be_reassigned(model, data):
    attack = ADV2(model, CAM)
    attack.eps, attack.alpha, attack.steps, attack.keep = 0.1, 0.02, 5, "final"
    expected = ADV2(model, CAM, eps=0.1, alpha=0.02, steps=5, keep="final")(*data)
    assert torch.equal(attack(*data), expected)
    told = []
    attack.terms = [lambda candidate: 0 * candidate.images.sum(dim=(1, 2, 3))] * 2
    attack._callback = told.append
    assert torch.equal(attack(*data), expected)
    assert len(told) == 5


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("eps", -1.0, ValueError, "expected eps"),
        ("alpha", "2/255", TypeError, "expected alpha"),
        ("steps", 0, ValueError, "expected steps"),
        ("warmup", 1000, ValueError, "expected warmup"),
        ("confidence", 2.0, ValueError, "expected confidence"),
        ("keep", "first", ValueError, "expected keep"),
        ("interpreter", "CAM", TypeError, "expected an Interpreter, got str"),
    ],
)
def test_bad_reassignments_are_told_at_the_call(model, data, name, value, error, message):
    attack = ADV2(model, CAM, steps=2)
    setattr(attack, name, value)
    with pytest.raises(error, match=message):
        attack(*data)


def test_terms_may_be_a_list(model):
    def one(candidate):
        return candidate.images.sum(dim=(1, 2, 3))

    assert ADV2(model, CAM, terms=[one, one]).terms == (one, one)


def test_an_attack_holds_no_other_attacks(model):
    assert not ADV2(model, CAM)._attacks


# What a call leaves behind


def state(attack):
    """All that a call could leave changed."""
    net = attack.model
    return {
        "modes": {name: module.training for name, module in net.named_modules()},
        "hooks": {
            (name, kind): len(hooks)
            for name, module in net.named_modules()
            for kind, hooks in vars(module).items()
            if kind.endswith("hooks")
        },
        "attributes": {name: set(vars(module)) for name, module in net.named_modules()},
        "gradients": {name: p.grad for name, p in net.named_parameters()},
        "requires": {name: p.requires_grad for name, p in net.named_parameters()},
        "values": {name: value.tolist() for name, value in net.state_dict().items()},
        "rng": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002  (the global one is the point)
        "settings": [
            {name: value for name, value in vars(part).items() if name not in ("model", "_attacks")}
            for part in (attack, *attack._attacks.values())
        ],
        "grad": torch.is_grad_enabled(),
        "functions": torch._C._len_torch_function_stack(),
    }


def mixed(net):
    """Put a net into a mix of modes that no train() or eval() call gives back."""
    net.train()
    net.norm.eval()
    net.fc.weight.requires_grad_(False)
    return net


# Captum's InternalInfluence is piecewise constant on a ReLU network, and the attack says so.
@pytest.mark.filterwarnings("ignore::captum_adv2.SoundnessWarning")
def test_a_call_changes_nothing(row, net, data):
    attack = ADV2(mixed(net), row.build, eps=0.1, steps=4, random_start=True)
    attack.set_mode_targeted_by_function(shifted, quiet=True)
    images, labels = data[0].clone(), data[1].clone()
    before = state(attack)
    adversarial = attack(images, labels)
    assert state(attack) == before
    assert torch.equal(images, data[0])
    assert torch.equal(labels, data[1])
    assert not images.requires_grad
    assert not adversarial.requires_grad
    assert adversarial.grad_fn is None
    assert adversarial.data_ptr() != images.data_ptr()
    assert torch.equal(attack(images, labels), adversarial)


@pytest.mark.parametrize("mode", ["default", "by_label", "by_function"])
@pytest.mark.filterwarnings("ignore::captum_adv2.SoundnessWarning")
def test_a_call_of_the_family_changes_nothing(net, data, others, mode):
    attack = others(mixed(net), GradCAM, steps=4)
    if mode != "default":
        argument = (shifted,) if mode == "by_function" else ()
        getattr(attack, f"set_mode_targeted_{mode}")(*argument, quiet=True)
    images, labels = data[0].clone(), data[1].clone()
    before = state(attack)
    adversarial = attack(images, labels)
    assert state(attack) == before
    assert torch.equal(images, data[0])
    assert torch.equal(labels, data[1])
    assert not adversarial.requires_grad
    assert adversarial.data_ptr() != images.data_ptr()
    assert torch.equal(attack(images, labels), adversarial)


def test_a_model_in_train_mode_is_attacked_in_eval_mode(net, data, family):
    attack = family(net, CAM, steps=4)
    expected = attack(*data)
    mixed(net)
    assert torch.equal(attack(*data), expected)


def test_images_that_require_grad(model, data, family):
    images = data[0].clone().requires_grad_()
    adversarial = family(model, CAM, steps=2)(images, data[1])
    assert images.requires_grad
    assert images.grad is None
    assert not adversarial.requires_grad


def test_pending_graphs_of_the_model_stay_usable(net, data):
    loss = net(data[0]).sum()
    ADV2(net, Gradient, steps=2)(*data)
    loss.backward()
    assert net.fc.weight.grad is not None


class Trip(nn.Module):
    """An identity that raises once, at its n-th run."""

    def __init__(self, error):
        super().__init__()
        self.error, self.runs, self.armed = error, 0, None

    def forward(self, x):
        self.runs += 1
        if self.runs == self.armed:
            self.armed = None
            raise self.error("tripped")
        return x


# Captum's InternalInfluence is piecewise constant on a ReLU network, and the attack says so.
@pytest.mark.filterwarnings("ignore::captum_adv2.SoundnessWarning")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_inside_the_model_changes_nothing(row, net, data, error):
    trip = Trip(error)
    net.dropout = nn.Sequential(trip, net.dropout)  # after the features: hooks are in place by now
    attack = ADV2(mixed(net), row.build, eps=0.1, steps=4)
    attack.set_normalization_used([0.0] * 3, [0.5] * 3)
    attack.set_mode_targeted_by_function(shifted, quiet=True)
    images = attack.normalize(data[0])
    trip.runs = 0  # building may have run the network
    expected = attack(images, data[1])
    last, before = trip.runs, state(attack)
    for number in sorted({1, 2, 3, 4, last // 2, last}):
        trip.runs, trip.armed = 0, number
        with pytest.raises(error, match="tripped"):
            attack(images, data[1])
        assert state(attack) == before, number
    assert torch.equal(attack(images, data[1]), expected)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_inside_the_model_changes_nothing_for_the_family(net, data, others, error):
    trip = Trip(error)
    net.dropout = nn.Sequential(trip, net.dropout)
    attack = others(mixed(net), GradCAM, steps=4)
    attack.set_normalization_used([0.0] * 3, [0.5] * 3)
    attack.set_mode_targeted_by_function(shifted, quiet=True)
    images = attack.normalize(data[0])
    trip.runs = 0
    expected = attack(images, data[1])
    before = state(attack)
    for number in range(1, trip.runs + 1):
        trip.runs, trip.armed = 0, number
        with pytest.raises(error, match="tripped"):
            attack(images, data[1])
        assert state(attack) == before, number
    assert torch.equal(attack(images, data[1]), expected)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("when", [0, 3])
def test_an_exception_in_a_callback_changes_nothing(net, data, error, when, capsys):
    armed = [True]

    def callback(progress):
        if armed and progress.step == when:
            armed.clear()
            raise error("enough")

    attack = ADV2(mixed(net), CAM, steps=4, warmup=2, callback=callback, verbose=True)
    before = state(attack)
    with pytest.raises(error, match="enough"):
        attack(*data)
    assert state(attack) == before
    assert torch.equal(attack(*data), ADV2(net, CAM, steps=4, warmup=2)(*data))


def test_an_exception_in_a_target_function_changes_nothing(net, data, family):
    def function(images, labels):
        raise LookupError("no such class")

    attack = family(mixed(net), CAM, steps=2)
    attack.set_mode_targeted_by_function(function, quiet=True)
    before = state(attack)
    with pytest.raises(LookupError, match="no such class"):
        attack(*data)
    assert state(attack) == before


@pytest.mark.parametrize("mode", ["random", "least_likely"])
def test_targets_are_chosen_without_touching_modes(net, data, mode, family):
    attack = family(mixed(net), CAM, steps=2)
    getattr(attack, f"set_mode_targeted_{mode}")(quiet=True)
    modes = state(attack)["modes"]
    with torch.random.fork_rng():
        attack(*data)
    attack.get_output_with_eval_nograd(data[0])
    assert state(attack)["modes"] == modes


# Gradients, device, training mode


# Captum's InternalInfluence is piecewise constant on a ReLU network, and the attack says so.
@pytest.mark.filterwarnings("ignore::captum_adv2.SoundnessWarning")
def test_no_grad_around_a_call(row, model, data):
    attack = ADV2(model, row.build, eps=0.1, steps=3)
    expected = attack(*data)
    with torch.no_grad():
        assert torch.equal(attack(*data), expected)
        assert not torch.is_grad_enabled()


def test_no_grad_around_a_call_of_the_family(model, data, others):
    attack = others(model, CAM, steps=3)
    expected = attack(*data)
    with torch.no_grad():
        assert torch.equal(attack(*data), expected)


def test_inference_mode_around_a_call_is_refused(model, data, family):
    attack = family(model, CAM, steps=2)
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match=r"inference_mode\(\); use no_grad"),
    ):
        attack(*data)
    attack(*data)


def test_images_made_in_inference_mode(model, data, family):
    with torch.inference_mode():
        images = data[0] * 1
    attack = family(model, CAM, steps=3)
    assert torch.equal(attack(images, data[1]), attack(*data))


def test_a_frozen_model(net, data):
    expected = ADV2(net, Gradient, eps=0.1, steps=4)(*data)
    net.requires_grad_(False)
    assert torch.equal(ADV2(net, Gradient, eps=0.1, steps=4)(*data), expected)


def test_set_device(model, data, family):
    attack = family(model, CAM, steps=2)
    assert attack.device == torch.device("cpu")
    expected = attack(*data)
    attack.set_device("cpu")
    assert attack.device == "cpu"
    assert torch.equal(attack(*data), expected)
    attack.set_device(torch.device("meta"))
    with pytest.raises(RuntimeError, match="meta"):
        attack(*data)  # so the device asked for is the one used


def during(net, attack, data):
    """Return the modes that BatchNorm, dropout and the rest had in the model's forward passes."""
    seen = set()

    def look(module, args):
        seen.add((module.training, module.norm.training, module.dropout.training))

    handle = net.register_forward_pre_hook(look)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            attack(*data)
    finally:
        handle.remove()
    return seen


def test_set_model_training_mode_of_the_family(net, data, others):
    attack = others(net, Gradient, steps=3)
    attack.set_model_training_mode(model_training=True, dropout_training=True)
    attack.set_mode_targeted_by_function(shifted, quiet=True)
    modes = state(attack)["modes"]
    assert during(net, attack, data) == {(True, False, True)}
    assert state(attack)["modes"] == modes


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("asked", "used"),
    [
        ({}, (False, False, False)),
        ({"model_training": True}, (True, False, False)),
        ({"model_training": True, "dropout_training": True}, (True, False, True)),
        ({"model_training": True, "batchnorm_training": True}, (True, True, False)),
    ],
)
def test_set_model_training_mode(net, data, training, asked, used):
    net.train(training)
    net.norm.eval()
    # Not Grad-CAM: dropout may leave it a map of zeros, which warns.
    attack = ADV2(net, Gradient, eps=0.1, steps=3)
    attack.set_model_training_mode(**asked)
    attack.set_mode_targeted_by_function(shifted, quiet=True)
    before = state(attack)["modes"]
    assert during(net, attack, data) == {used}
    assert state(attack)["modes"] == before

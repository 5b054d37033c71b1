# SPDX-License-Identifier: MIT
"""Mistakes of meaning, which types do not show: each has an error that names what to do."""

import inspect

import pytest
import torch
from attack_helpers import targeted
from captum.attr import Saliency
from conftest import TinyNet, inner
from torch import nn

from captum_adv2 import ADV2, BitDepthADV2, SoundnessWarning, StADV2
from captum_adv2.attacks import RandomPatch, SignDescent, presets
from captum_adv2.attacks.terms import Margin
from captum_adv2.interpreters import CAM, Explanation, GradCAM, Gradient, Interpreter, Unrolled

NOT_ITS = (
    r"built on the attack's model, got one built on another TinyNet; pass its class.*\(model, CAM\)"
)
MISTAKES = [
    (lambda m: ADV2(m, CAM, steps=5, warmup=6), ValueError, "warmup at most 5, the steps, got 6"),
    (lambda m: ADV2(m, CAM(TinyNet())), ValueError, NOT_ITS),
    (lambda m: StADV2(m, lambda net: CAM(TinyNet())), ValueError, NOT_ITS),
    (lambda m: ADV2(nn.Sequential(m), CAM(m)), ValueError, "got one built on a part of it, a Tiny"),
    (lambda m: ADV2(m, CAM(nn.Sequential(m))), ValueError, "built on a Sequential around it; pass"),
    (lambda m: ADV2(m, Saliency(m)), TypeError, "an Interpreter, got Saliency; wrap a Captum"),
    (lambda m: ADV2(m, Saliency), TypeError, "an Interpreter, got the class Saliency; wrap a"),
    (lambda m: StADV2(m, lambda net: "CAM"), TypeError, "to be an Interpreter, got str"),
    (lambda m: ADV2(m, target_map=RandomPatch), TypeError, r"target_map .*; pass RandomPatch\(\)"),
    (lambda m: ADV2(m, step=SignDescent), TypeError, r"step .*; pass SignDescent\(\)"),
    (lambda m: ADV2(m, prediction=Margin), TypeError, r"prediction .*; pass Margin\(\)"),
    (lambda m: ADV2(m, terms=[Margin]), TypeError, r"terms\[0\] .*; pass Margin\(\)"),
    (lambda m: ADV2(m, CAM(m), surrogate=Unrolled()), TypeError, "a surrogate for CAM, got Unroll"),
    (lambda m: ADV2(m, surrogate=Unrolled), TypeError, r"surrogate .*; pass Unrolled\(\.\.\.\)"),
    (lambda m: ADV2(m, generator=3), TypeError, "a torch.Generator, got int; torch.Gen"),
    (lambda m: BitDepthADV2(StADV2(m), 3), TypeError, "attack to be an ADV2, got StADV2"),
    (lambda m: BitDepthADV2(ADV2(m), 9), ValueError, r"bits in \[1, 8\], got 9"),
    (lambda m: StADV2.from_preset(m, CAM, presets.PAPER["CAM"]), TypeError, "StADV2.*'eps'"),
    (
        lambda m: ADV2.from_preset(m, CAM, presets.PAPER["CAM"], steps=2),
        ValueError,
        "warmup at most 2, the steps, got 400; pass a shorter warmup, too",
    ),
    (lambda m: ADV2(m, lambda net: CAM), TypeError, r"an Interpreter, .* class CAM; pass CAM\("),
    (lambda m: ADV2.from_preset(m, CAM, presets.PAPER_STADV["CAM"]), TypeError, "'flow_weight'"),
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


def test_a_setting_that_does_not_exist(model, build):
    attack = build(model, CAM)
    for part, name in ((attack, "step_"), (inner(attack), "epsilon")):
        with pytest.raises(TypeError, match=f"expected a setting of .*ADV2, got {name}"):
            setattr(part, name, 5)
        assert not hasattr(part, name)
    with pytest.raises(TypeError, match=r"got warm_up; did you mean warmup"):
        inner(attack).warm_up = 5


def test_a_subclass_has_attributes_of_its_own(model, data):
    class Noted(ADV2):
        def __init__(self, model):
            super().__init__(model, CAM, steps=2)
            self.note = "first"

    attack = Noted(model)
    attack.other_note = "second"
    attack(*data)


@pytest.mark.parametrize("given", [GradCAM, lambda net: GradCAM(net), None])
def test_an_interpreter_that_is_assigned_later(model, data, given):
    attack, net = ADV2(model, CAM(model), steps=4), TinyNet()
    attack.interpreter = given
    kind = Gradient if given is None else GradCAM
    assert type(attack.interpreter) is kind
    assert torch.equal(attack(*data), ADV2(model, kind, steps=4)(*data))
    attack.model = net  # built again, as by set_model
    assert attack.interpreter.model is net


@pytest.mark.parametrize("name", ["eps", "alpha"])
def test_levels_where_shares_are_meant_warn(model, name):
    attack = ADV2(model, CAM)
    attack.eps = attack.alpha = 1
    with pytest.warns(SoundnessWarning, match=rf"{name} is 8, more than .* are n / 255"):
        setattr(attack, name, 8)
    with pytest.warns(SoundnessWarning, match=f"{name} is 8"):
        ADV2(model, CAM, **{name: 8})


def test_help_is_of_the_attack_itself():
    for kind in (ADV2, StADV2, BitDepthADV2):
        assert "Initializes internal attack state" not in inspect.getdoc(kind.__init__)
        assert "its class, which describes them" in inspect.getdoc(kind.__init__)


@pytest.mark.parametrize("mode", ["default", "label", "function"])
@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda y: y + 7, ValueError, r"labels in \[0, 3\], got values in \[7, 10\]"),
        (lambda y: y - 4, ValueError, r"labels in \[0, 3\], got values in \[-4"),
        (lambda y: y[:-1], ValueError, r"labels of shape \(6,\), got \(5,\)"),
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
    attack.set_mode_targeted_least_likely(4, quiet=True)  # of four classes one is the label
    with pytest.raises(RuntimeError, match="out of range"):
        attack(*data)


MAP = torch.linspace(0, 1, 64).view(1, 1, 8, 8).repeat(6, 1, 1, 1)  # the tiny net's CAM is 8x8


@pytest.mark.parametrize("passed", [True, False])
@pytest.mark.parametrize(
    ("maps", "error", "message"),
    [
        (
            MAP[..., :7],
            ValueError,
            r"\(6, 1, 8, 8\), the interpreter.s own, got \(6, 1, 8, 7\); resize",
        ),
        (MAP[:5], ValueError, r"\(6, 1, 8, 8\), the interpreter.s own, got \(5, 1, 8, 8\)"),
        (2 * MAP, ValueError, r"in \[0, 1\], got values in \[0, 2\]; 1 means important"),
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
    with pytest.warns(SoundnessWarning, match="of . target maps are constant"):
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

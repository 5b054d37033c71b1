# SPDX-License-Identifier: MIT
"""What users get wrong: each mistake has its error, and no work is done before it."""

import math

import captum.attr
import pytest
import torch
from torch import nn

from captum_adv2 import ADV2, BitDepthADV2, SoundnessWarning, StADV2
from captum_adv2.attacks import CrossEntropy, MapDistance, presets
from captum_adv2.interpreters import CAM, CaptumInterpreter, GradCAM, Gradient, Interpreter
from captum_adv2.types import Explanation

# How each attack is built, with its own settings.
FAMILY = {
    "ADV2": lambda model, **s: ADV2(model, CAM, **{"steps": 2} | s),
    "StADV2": lambda model, **s: StADV2(model, CAM, **{"steps": 2} | s),
    "BitDepthADV2": lambda model, **s: BitDepthADV2(
        ADV2(model, CAM, steps=2), **{"bits": 3, "steps": 2} | s
    ),
}


def shifted(images, labels):
    return (labels + 1) % 4


@pytest.fixture
def runs(model):
    """Batch sizes of the model's forward passes so far."""
    sizes = []
    handle = model.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    yield sizes
    handle.remove()


@pytest.fixture(params=FAMILY)
def attack(model, request):
    return FAMILY[request.param](model)


def changed(images, value):
    images = images.clone()
    images[0, 0, 0, 0] = value
    return images


BAD_IMAGES = {
    "above 1": (lambda x: 255 * x, ValueError, r"images in \[0, 1\], got values in .*normalis"),
    "below 0": (lambda x: x - 0.5, ValueError, r"images in \[0, 1\], got values in \[-0\."),
    "one pixel": (lambda x: changed(x, 1.01), ValueError, r"images in \[0, 1\], .*1\.01\]"),
    "NaN": (lambda x: changed(x, math.nan), ValueError, "finite images, got NaN"),
    "infinite": (lambda x: changed(x, math.inf), ValueError, "finite images"),
    "uint8": (lambda x: (255 * x).byte(), TypeError, r"floating dtype, got torch\.uint8.*255"),
    "integers": (lambda x: x.long(), TypeError, r"floating dtype, got torch\.int64"),
    "one image": (lambda x: x[0], ValueError, r"4 dimensions, got shape .*batch dimension"),
    "five axes": (lambda x: x[None], ValueError, "4 dimensions"),
    "empty": (lambda x: x[:0], ValueError, "at least one entry in images"),
    "NumPy": (lambda x: x.numpy(), TypeError, r"images to be a torch\.Tensor, got ndarray"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_images(attack, data, runs, name):
    spoil, error, message = BAD_IMAGES[name]
    with pytest.raises(error, match=message):
        attack(spoil(data[0]), data[1])
    assert runs == []


BAD_LABELS = {
    "float": (lambda y: y.float(), TypeError, r"labels of an integer dtype, got torch\.float32"),
    "bool": (lambda y: y > 1, TypeError, r"labels of an integer dtype, got torch\.bool"),
    "list": (lambda y: y.tolist(), TypeError, r"labels to be a torch\.Tensor, got list"),
    "too few": (lambda y: y[:-1], ValueError, r"labels of shape \(6,\).*got \(5,\)"),
    "one-hot": (lambda y: nn.functional.one_hot(y), ValueError, r"labels of shape \(6,\)"),
    "scalar": (lambda y: y[0], ValueError, r"labels of shape \(6,\).*got \(\)"),
    "negative": (lambda y: y - 4, ValueError, r"labels in .*, got values in \[-4"),
}


@pytest.mark.parametrize("mode", ["default", "label"])
@pytest.mark.parametrize("name", BAD_LABELS)
def test_labels(attack, data, runs, name, mode):
    if mode == "label":
        attack.set_mode_targeted_by_label(quiet=True)
    spoil, error, message = BAD_LABELS[name]
    with pytest.raises(error, match=message):
        attack(data[0], spoil(data[1]))
    assert runs == []


def test_labels_beyond_the_classes(attack, data, runs):
    with pytest.raises(ValueError, match=r"labels in \[0, 3\], got values in \[\d, 7\]"):
        attack(data[0], torch.full_like(data[1], 7))
    assert len(runs) <= 1  # one pass tells how many classes there are


def test_no_labels_where_they_are_the_targets(attack, data, runs):
    attack.set_mode_targeted_by_label(quiet=True)
    with pytest.raises(ValueError, match="expected labels, the target classes in this mode"):
        attack(data[0])
    assert runs == []


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (lambda x, y: y + 4, ValueError, r"target labels in \[0, 3\]"),
        (lambda x, y: y[:2], ValueError, r"target labels of shape \(6,\)"),
        (lambda x, y: y.float(), TypeError, "target labels of an integer dtype"),
        (lambda x, y: 2, TypeError, r"target labels to be a torch\.Tensor, got int"),
    ],
)
def test_targets_from_a_function(attack, data, targets, error, message):
    attack.set_mode_targeted_by_function(targets, quiet=True)
    with pytest.raises(error, match=message):
        attack(*data)


MAP = torch.linspace(0, 1, 64).view(1, 1, 8, 8).repeat(6, 1, 1, 1)  # the tiny net's CAM is 8x8
BAD_MAPS = {
    "resolution": (MAP[..., :7], ValueError, r"\(6, 1, 8, 8\) from CAM.*native resolution"),
    "image size": (MAP.repeat(1, 1, 2, 2), ValueError, r"\(6, 1, 8, 8\) from CAM"),
    "batch": (MAP[:5], ValueError, r"\(6, 1, 8, 8\) from CAM, got \(5, 1, 8, 8\)"),
    "rank": (MAP[:, 0], ValueError, "4 dimensions"),
    "range": (2 * MAP, ValueError, r"in \[0, 1\], got values in \[0, 2\]; 1 means important"),
    "NaN": (changed(MAP, math.nan), ValueError, "finite .*NaN"),
    "type": (MAP.bool(), TypeError, r"floating dtype, got torch\.bool"),
    "list": (MAP.tolist(), TypeError, r"torch\.Tensor, got list"),
}


@pytest.mark.parametrize("name", BAD_MAPS)
def test_target_maps_of_a_call(attack, data, name):
    maps, error, message = BAD_MAPS[name]
    with pytest.raises(error, match=f"target_maps.*{message}|{message}"):
        attack(*data, target_maps=maps)


@pytest.mark.parametrize("name", BAD_MAPS)
def test_target_maps_of_the_attack(model, data, name):
    maps, error, message = BAD_MAPS[name]
    attack = ADV2(model, CAM, steps=2, target_map=lambda *_: maps)
    with pytest.raises(error, match=message):
        attack(*data)


def test_bad_target_maps_are_found_before_the_steps(model, data):
    told = []
    attack = ADV2(model, CAM, steps=4, callback=told.append)
    with pytest.raises(ValueError, match="native resolution"):
        attack(*data, target_maps=MAP[..., :7])
    assert told == []


def test_unknown_keyword_of_a_call(attack, data):
    with pytest.raises(TypeError, match="target_map"):
        attack(*data, target_map=MAP)


DUAL = [
    ({"eps": -0.1}, ValueError, "expected eps at least 0, got -0.1"),
    ({"eps": math.nan}, ValueError, "expected eps at least 0, got nan"),
    ({"eps": "8/255"}, TypeError, "expected eps to be a number, got str"),
    ({"alpha": -0.1}, ValueError, "expected alpha at least 0, got -0.1"),
    ({"alpha": None}, TypeError, "expected alpha to be a number, got NoneType"),
    ({"steps": 0}, ValueError, "expected steps at least 1, got 0"),
    ({"steps": 2.5}, TypeError, "expected steps to be an integer, got float"),
    ({"steps": True}, TypeError, "expected steps to be an integer, got bool"),
    ({"warmup": -1}, ValueError, "expected warmup at least 0"),
    ({"steps": 5, "warmup": 6}, ValueError, "expected warmup at least 0 and at most 5, got 6"),
    ({"confidence": 1.5}, ValueError, "expected confidence at least 0 and at most 1"),
    ({"stop": -0.1}, ValueError, "expected stop at least 0 and at most 1, got -0.1"),
    ({"stop": 1.1}, ValueError, "expected stop at least 0 and at most 1, got 1.1"),
    ({"stop": math.nan}, ValueError, "expected stop at least 0 and at most 1, got nan"),
    ({"stop": "0.1"}, TypeError, "expected stop to be a number, got str"),
    ({"stop": True}, TypeError, "expected stop to be a number, got bool"),
    ({"keep": "last"}, ValueError, "expected keep to be 'best' or 'final', got 'last'"),
]
MOVING = [
    ({"flow_weight": -0.1}, ValueError, "expected flow_weight at least 0, got -0.1"),
    ({"flow_weight": "5e-4"}, TypeError, "expected flow_weight to be a number, got str"),
    ({"flow_weight": math.nan}, ValueError, "expected flow_weight at least 0, got nan"),
    ({"bound": 0.0}, ValueError, "expected bound above 0, got 0.0"),
    ({"bound": -1}, ValueError, "expected bound above 0, got -1"),
    ({"bound": True}, TypeError, "expected bound to be a number, got bool"),
    ({"alpha": 0.0}, ValueError, "expected alpha above 0, got 0.0"),
    ({"alpha": -0.1}, ValueError, "expected alpha above 0, got -0.1"),
]
TWO_STAGES = [
    ({"bits": 0}, ValueError, "expected bits at least 1 and at most 8, got 0"),
    ({"bits": 9}, ValueError, "expected bits at least 1 and at most 8, got 9"),
    ({"bits": 2.5}, TypeError, "expected bits to be an integer, got float"),
    ({"steps": 0}, ValueError, "expected steps at least 1, got 0"),
    ({"steps": 2.5}, TypeError, "expected steps to be an integer, got float"),
    ({"weight": -1.0}, ValueError, "expected weight at least 0, got -1.0"),
    ({"weight": None}, TypeError, "expected weight to be a number, got NoneType"),
    ({"slack": -0.1}, ValueError, "expected slack at least 0 and at most 2, got -0.1"),
    ({"slack": 2.1}, ValueError, "expected slack at least 0 and at most 2, got 2.1"),
]
BAD_SETTINGS = [
    *(("ADV2", *row) for row in DUAL),
    *(("StADV2", *row) for row in [*MOVING, *DUAL] if not {"eps", "alpha"} & set(row[0])),
    *(("StADV2", *row) for row in MOVING if "alpha" in row[0]),
    *(("BitDepthADV2", *row) for row in TWO_STAGES),
]


@pytest.mark.parametrize(("kind", "settings", "error", "message"), BAD_SETTINGS)
def test_settings(model, runs, kind, settings, error, message):
    with pytest.raises(error, match=message):
        FAMILY[kind](model, **settings)
    assert runs == []


@pytest.mark.parametrize(("kind", "settings", "error", "message"), BAD_SETTINGS)
def test_settings_assigned_later(model, data, runs, kind, settings, error, message):
    attack = FAMILY[kind](model)
    for name, value in settings.items():
        setattr(attack, name, value)
    with pytest.raises(error, match=message):
        attack(*data)
    assert runs == []


@pytest.mark.parametrize("thing", [None, nn.Flatten(), "ADV2", StADV2])
def test_two_stages_around_something_else(model, thing):
    thing = StADV2(model, CAM) if thing is StADV2 else thing
    with pytest.raises(TypeError, match="expected attack to be an ADV2, got"):
        BitDepthADV2(thing, bits=3)


def test_settings_of_the_inner_attack_are_checked_before_the_first_stage(model, data, runs):
    attack = FAMILY["BitDepthADV2"](model)
    attack.second.eps = -1.0
    with pytest.raises(ValueError, match="expected eps at least 0"):
        attack(*data)
    assert runs == []


def test_settings_of_the_default_objectives():
    with pytest.raises(ValueError, match="rho"):
        CrossEntropy(2.0)
    with pytest.raises(ValueError, match="weight"):
        MapDistance(-1.0)


def test_model_that_is_not_a_module():
    with pytest.raises(TypeError, match=r"expected model to be a torch\.nn\.Module, got function"):
        ADV2(shifted)


class Tuples(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x), x


class Wide(Tuples):
    def forward(self, x):
        return self.net(x)[:, :, None]


class OneLogit(Tuples):
    def forward(self, x):
        return self.net(x)[:, :1]


@pytest.mark.parametrize("interpreter", [Gradient, CAM, GradCAM])
def test_model_that_returns_tuples(model, data, interpreter):
    attack = ADV2(Tuples(model), interpreter, steps=2)
    with pytest.raises(TypeError, match="return logits of shape .*, got tuple; wrap it"):
        attack(*data)


@pytest.mark.parametrize("wrapper", [Wide, OneLogit])
def test_model_that_returns_no_logits(model, data, wrapper):
    with pytest.raises(ValueError, match="at least two classes, got"):
        ADV2(wrapper(model), steps=2)(*data)


def test_layer_that_does_not_exist(model):
    with pytest.raises(ValueError, match=r"got 'bodi'; near names: .*body"):
        ADV2(model, CAM(model, layer="bodi"))
    with pytest.raises(ValueError, match="expected layer to be a module of the model, got another"):
        ADV2(model, GradCAM(model, layer=nn.Conv2d(3, 3, 1)))


def test_model_without_the_head_that_cam_needs():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten())
    with pytest.raises(ValueError, match=r"linear layer or a 1x1 convolution .*use GradCAM"):
        ADV2(net, CAM)


def test_model_whose_head_is_not_on_pooled_features(data):
    net = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4)),
    ).eval()
    with pytest.raises(ValueError, match=r"average pooling and one linear layer.*use GradCAM"):
        ADV2(net, CAM, steps=2)(*data)


def test_interpreter_built_on_another_model(model, smooth, runs):
    with pytest.raises(ValueError, match=r"built on the attack's model.* ADV2\(model, CAM\)"):
        ADV2(model, CAM(smooth))
    with pytest.raises(ValueError, match=r"built on the attack's model.* StADV2\(model, CAM\)"):
        StADV2(model, CAM(smooth))
    with pytest.raises(ValueError, match="built on the attack's model"):
        ADV2(model, lambda net: Gradient(smooth))
    assert runs == []


@pytest.mark.parametrize(
    "thing", [object(), "CAM", 7, captum.attr.Saliency(nn.Flatten()), lambda model: "CAM"]
)
@pytest.mark.parametrize("kind", [ADV2, StADV2])
def test_interpreter_that_is_none(model, thing, kind):
    with pytest.raises(TypeError, match="expected an Interpreter"):
        kind(model, thing)


def test_captum_method_that_cannot_be_attacked(model):
    with pytest.raises(TypeError, match="expected a differentiable Captum method .*no_grad"):
        ADV2(model, CaptumInterpreter(captum.attr.LayerFeatureAblation(model, model.stem)))


class Detached(Interpreter):
    def explain(self, images, target):
        return Explanation(images.detach().mean(dim=1, keepdim=True), None)


class Constant(Interpreter):
    """A map that has a graph, and always looks the same."""

    def explain(self, images, target):
        return Explanation((0 * images).mean(dim=1, keepdim=True) + 0.5, None)


class Deaf(Interpreter):
    """A map that is not constant, but does not hear the image: its graph leads to the model."""

    def explain(self, images, target):
        ramp = torch.linspace(0, 1, 64).view(1, 1, 8, 8).repeat(len(images), 1, 1, 1)
        weight = next(self.model.parameters()).sum()
        return Explanation(ramp + 0 * weight, self.logits(images))


def test_interpreter_without_a_graph(model, data):
    told = []
    attack = ADV2(model, Detached(model), steps=2, callback=told.append)
    with pytest.raises(ValueError, match="expected a differentiable interpreter, got Detached"):
        attack(*data)
    assert told == []


def test_constant_map_is_unsound(model, data):
    attack = ADV2(model, Constant(model), steps=2)
    with pytest.warns(SoundnessWarning) as caught:
        attack(*data)
    told = " ".join(str(warning.message) for warning in caught)
    assert "the gradient of Constant's map is zero" in told
    assert "is constant" in told


def test_constant_target_map_is_unsound(attack, data):
    with pytest.warns(SoundnessWarning, match="target_maps is constant"):
        attack(*data, target_maps=torch.zeros_like(MAP))


@pytest.mark.parametrize(
    "build",
    [Deaf, lambda model: CaptumInterpreter(captum.attr.Saliency(model), smoothing=None)],
    ids=["deaf", "Saliency without smoothing"],
)
def test_map_without_a_gradient_is_unsound(model, data, build):
    with pytest.warns(SoundnessWarning, match="map is zero: the attack will not see"):
        ADV2(model, build(model), steps=2)(*data)


def test_another_map_size_is_unsound(model, data):
    attack = ADV2(model, CAM, steps=2, interpretation=MapDistance(0.2, "sum", map_size=(7, 7)))
    with pytest.warns(SoundnessWarning, match=r"size \(7, 7\), these are \(8, 8\)"):
        attack(*data)


def test_unknown_override_of_a_preset(model, runs):
    with pytest.raises(TypeError, match="momentum"):
        ADV2.from_preset(model, CAM, presets.PAPER["CAM"], momentum=0.9)
    assert runs == []


def test_a_preset_of_the_other_attack_is_refused(model):
    with pytest.raises(TypeError, match="expected a FlowPreset for StADV2, got Preset"):
        StADV2.from_preset(model, CAM, presets.PAPER["CAM"])
    with pytest.raises(TypeError, match="expected a Preset for ADV2, got FlowPreset"):
        ADV2.from_preset(model, CAM, presets.PAPER_STADV["CAM"])


def test_good_input_raises_nothing(attack, data, runs):
    """The control: the fixtures above are fine as long as nobody spoils them."""
    attack.set_mode_targeted_by_function(shifted, quiet=True)
    attack(*data, target_maps=MAP)
    assert runs

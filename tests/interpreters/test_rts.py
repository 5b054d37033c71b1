# SPDX-License-Identifier: MIT
"""RTS, its masking model, and its surrogate."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import TinyNet, blobs, untrained
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from captum_adv2 import ADV2, storage
from captum_adv2.interpreters import RTS, EncoderGuided, MaskingModel
from captum_adv2.study.embedded import load_resnet, load_rts, make_shapes
from captum_adv2.testing import unchanged

LAYERS = ("body", "stem")


def masking(encoder, classes=4, seed=0, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        settings = {"layers": LAYERS, "image_shape": (3, 16, 16)} | settings
        return MaskingModel(encoder, classes, **settings)


def pyramid():
    """Return a network whose stages each halve the image."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        widths = [(3, 4), (4, 6), (6, 8)]
        stages = [nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.ReLU()) for i, o in widths]
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        return nn.Sequential(*stages, head).eval()


@pytest.fixture
def encoder():
    """A network of its own, in train mode, with running statistics and dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return TinyNet().train()


def passes_of(module):
    passes = []
    module.register_forward_hook(lambda module, args, out: passes.append(len(args[0])))
    return passes


# The masking model


@given(seed=st.integers(0, 99), confidence=st.floats(-2, 2))
def test_the_map_is_the_decoder_on_gated_features(trained_smooth, seed, confidence):
    net, (images, target) = trained_smooth, blobs(3, seed)
    own, images = masking(net, seed=seed, confidence=confidence), images.double()
    fine = net.stem(images)
    coarse = net.body(net.norm(fine))
    encoded = own.encode(images)
    torch.testing.assert_close(tuple(encoded), ((coarse, fine), net(images)))

    agreement = torch.einsum("bchw,bc->bhw", coarse, own.selector.weight[target])
    torch.testing.assert_close(own.presence(encoded, target), agreement.mean(dim=(1, 2)))
    gated = coarse * (agreement - confidence).sigmoid()[:, None]
    (stage,) = own.decoder.stages
    up = F.interpolate(stage.reduce(gated), fine.shape[2:], mode="bilinear", align_corners=False)
    joined = F.conv2d(torch.cat([up, fine], dim=1), stage.join.weight, padding=1)
    a, b = own.decoder.final(F.group_norm(joined, 1).relu()).abs().chunk(2, dim=1)
    torch.testing.assert_close(own(images, target), a / (a + b + 1e-6))


@given(power=st.integers(-40, 6) | st.none(), seed=st.integers(0, 9))
def test_the_map_is_finite_and_in_the_unit_range_for_any_decoder(trained, power, seed):
    own = masking(trained, seed=seed)
    with torch.no_grad():
        for parameter in own.decoder.parameters():
            parameter.mul_(0 if power is None else 10.0**power if parameter.ndim == 4 else 1)
    x, target = blobs(2, seed)[0].requires_grad_(), torch.tensor([1, 2])
    maps = own(x, target)
    assert ((maps >= 0) & (maps <= 1)).all()
    if power is None:  # a decoder that is silent
        for gradient in torch.autograd.grad(maps.sum(), [x, *own.decoder.parameters()]):
            assert gradient.isfinite().all()


def test_a_masking_model_has_its_own_mode_and_its_encoders_type(trained_smooth, encoder):
    own = masking(encoder)
    for mode in (False, True):
        own.train(mode)
        assert own.training is own.decoder.training is own.selector.training is mode
        assert all(module.training for module in encoder.modules())
    assert {p.dtype for p in masking(trained_smooth).parameters()} == {torch.float64}


# Layers


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_0", "mobilenet_v2"])
def test_scales_are_found(name):
    net = torchvision.models.get_model(name, weights=None, num_classes=7)
    own, x = MaskingModel(net, image_shape=(3, 64, 64)), torch.rand(1, 3, 64, 64)
    assert all(module.training and not module._forward_hooks for module in net.modules())
    with torch.no_grad():
        features, output = own.encode(x)
        maps = own(x, torch.tensor([3]))
    assert output.shape == (1, own.classes) == (1, 7)
    sizes = [f.shape[-1] for f in features]
    assert len(sizes) == len(own.layers) == 4
    assert 1 < sizes[0] < sizes[1] < sizes[2] < sizes[3] < 64
    assert maps.shape[-2:] == features[-1].shape[-2:]
    if name == "resnet18":
        assert own.layers == ("layer4", "layer3", "layer2", "layer1")


def test_a_module_that_runs_at_two_scales_counts_where_it_runs_last(data):
    net, relu = pyramid(), nn.ReLU()
    for stage in net[:3]:
        stage[1] = relu
    own = masking(net, layers=None)
    assert own.layers == ("2", "1", "0")  # the whole stages, which end in it
    flat = nn.Sequential(*(layer for stage in net[:3] for layer in stage), net[3])
    own = masking(flat, layers=None)
    assert own.layers == ("1", "2", "0")  # the coarsest, and the convolutions before
    assert torch.equal(own.encode(data[0]).features[0], net[:3](data[0]))


def test_modules_that_work_in_place_do_not_change_features(data):
    net, plain = pyramid(), pyramid()
    for stage in net[:3]:
        stage[1].inplace = True
    layers = ("2.0", "1.0", "0.0")
    found, expected = (masking(each, layers=layers).encode(data[0]) for each in (net, plain))
    assert any((f < 0).any() for f in found.features)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: masking(TinyNet(), layers=("body", "nothing")), "got 'nothing'"),
        (lambda: masking(TinyNet(), layers=("body",)), "at two scales or more"),
        (lambda: masking(TinyNet(), layers=("fc", "body")), "expected layers with feature maps"),
        (lambda: masking(nn.Conv2d(3, 4, 3), layers=None), "pass layers= or image_shape="),
        (lambda: masking(nn.Sequential(*pyramid()[:3]), None, layers=None), "expected classes"),
    ],
)
def test_layers_and_classes_that_do_not_fit_the_encoder(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# Files


@pytest.mark.parametrize("settings", [{}, {"width": 5, "confidence": 1.5}])
def test_a_file_gives_the_same_maps(tmp_path, model, data, settings):
    own, path = masking(model, **settings), tmp_path / "file"
    own.save(path)
    with unchanged(model):
        again = MaskingModel.load(str(path), model)
    assert torch.equal(again(*data), own(*data))
    assert repr(again) == repr(own)
    assert again.encoder is model
    assert not again.training
    saved = storage.load(path, "masking model")["trained"]
    parameters = [*own.selector.parameters(), *own.decoder.parameters()]
    assert sum(v.numel() for v in saved.values()) == sum(p.numel() for p in parameters)


@pytest.mark.parametrize("spoil", ["more", "less", "shape"])
def test_a_mismatch_restores_nothing(model, spoil):
    own, record = masking(model), masking(model, seed=1).trained()
    before, name = copy.deepcopy(own.trained()), "selector.weight"
    if spoil == "more":
        record["decoder.extra"] = torch.ones(2)
    else:
        weight = record.pop(name)
        record |= {name: weight[:2]} if spoil == "shape" else {}
    with pytest.raises(ValueError, match="expected a checkpoint of this architecture"):
        own.restore(record)
    assert all(torch.equal(value, before[key]) for key, value in own.trained().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"classes": 10**9}}, "got classes 1000000000"),
        ({"settings": {"width": 10**9}}, "got width 1000000000"),
        ({"settings": {"layers": ("body", "attic")}}, "attic"),
        ({"settings": {"colour": 3}}, "colour"),
        ({"trained": {"selector.weight": torch.ones(())}}, "got classes 4"),
        ({"trained": {"decoder.extra": torch.ones(2)}}, "of this architecture"),
        ({"encoder": "0"}, "for other weights"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_named(tmp_path, model, change, message):
    path = tmp_path / "file"
    masking(model).save(path)
    record = storage.load(path, "masking model")
    for name, value in change.items():
        record[name] = record[name] | value if isinstance(value, dict) else value
    storage.save(record, path, "masking model")
    with pytest.raises(ValueError, match=f"masking model for this encoder in .*file, .*{message}"):
        MaskingModel.load(path, model)


def test_a_file_is_for_the_encoder_that_it_was_trained_on(tmp_path, model):
    masking(model).save(tmp_path / "file")
    other = copy.deepcopy(model)
    other.fc.bias.data += 1e-3
    with pytest.raises(ValueError, match="for other weights"):
        MaskingModel.load(tmp_path / "file", other)


def test_an_own_encoder_is_a_copy_and_in_the_file(tmp_path, model, data):
    model = copy.deepcopy(model).requires_grad_(False)
    other = TinyNet().eval()
    with unchanged(model), unchanged(other):
        own = masking(model, own_encoder=True)
        assert torch.equal(own(*data), masking(model)(*data))
        assert {id(p) for p in own.trainable()} == {id(p) for p in own.parameters()}
        assert all(parameter.requires_grad for parameter in own.trainable())
        own.encoder.stem[0].weight.data += 0.1
        own.save(tmp_path / "file")
        again = MaskingModel.load(tmp_path / "file", other)
        assert torch.equal(again(*data), own(*data))
        assert not torch.equal(own(*data), masking(model)(*data))
    with pytest.raises(ValueError, match="masking model for this encoder"):
        MaskingModel.load(tmp_path / "file", TinyNet(width=4))


# The interpreter


@pytest.mark.parametrize("shared", [True, False])
def test_one_forward_pass_gives_map_and_logits_if_the_encoder_is_the_classifier(
    trained, encoder, data, shared
):
    model = copy.deepcopy(trained)
    rts = RTS(model, untrained(model if shared else encoder))
    passes, own = passes_of(model), passes_of(encoder)
    for explain in (rts.explain, lambda x, y: rts.surrogate(rts, x, y, 0.0)):
        maps, logits, _ = explain(*data)
        assert torch.equal(maps, rts.masking_model(*data))
        if shared:
            torch.testing.assert_close(logits, trained(data[0]))
        else:
            assert logits is None
    # An encoder of its own: the classifier runs once, on one image, to compare the classes.
    assert (passes, own) == (([6] * 4, []) if shared else ([1], [6] * 4))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("classes", [3, 6])
def test_another_number_of_classes_than_the_classifier_has(model, encoder, data, shared, classes):
    rts = RTS(model, masking(model if shared else encoder, classes))
    for _ in range(2):
        with pytest.raises(ValueError, match=f"classifier's 4 classes, got one for {classes}"):
            rts(data[0], data[1] * 0)


@pytest.mark.parametrize("shared", [True, False])
def test_classes_out_of_range_are_refused_at_every_call(model, encoder, data, shared):
    rts = RTS(model, masking(model if shared else encoder))
    for wrong in (4, -1, 4):
        with pytest.raises(ValueError, match=r"expected target in \[0, 3\]"):
            rts(data[0], data[1] * 0 + wrong)
    rts(*data)


def test_an_encoder_runs_in_eval_mode_after_the_preprocessing_and_is_left_as_it_was(
    model, encoder, data
):
    def shift(x):
        return (x - 0.45) / 0.25

    expected = masking(copy.deepcopy(encoder).eval())(shift(data[0]), data[1])
    rts = RTS(model, masking(encoder)).after(shift)
    x = data[0].clone().requires_grad_()
    with unchanged(encoder, x), unchanged(model), unchanged(rts.masking_model):
        assert torch.equal(rts(x, data[1]), expected)
        torch.autograd.grad(rts.surrogate(rts, x, data[1], 0.0).penalty.sum(), x)
    encoder.body.register_forward_hook(lambda *_: 1 / 0)
    with unchanged(encoder, x), pytest.raises(ZeroDivisionError):
        rts(x, data[1])


def test_gradcheck_of_map_logits_and_penalty(smooth):
    rts, target = RTS(smooth, masking(smooth)), torch.tensor([1, 3])
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(2, 3, 8, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: tuple(rts.surrogate(rts, x, target, 0.0)), (x,), fast_mode=True
    )


@pytest.mark.parametrize("shared", [True, False])
def test_copies_share_what_the_original_shares(model, encoder, data, shared):
    rts = RTS(model, untrained(model if shared else encoder))
    expected = rts(*data)
    for clone in (copy.deepcopy(rts), pickle.loads(pickle.dumps(rts))):
        assert (clone.masking_model.encoder is clone.model) == shared
        assert (clone.explain(*data).logits is not None) == shared
        assert torch.equal(clone(*data), expected)


# The surrogate


@given(weight=st.floats(1e-3, 10), seed=st.integers(0, 99))
def test_the_penalty_is_the_encoders_cross_entropy(trained, weight, seed):
    images, target = blobs(3, seed)
    own = untrained(TinyNet(), seed=seed)
    found = EncoderGuided(weight)(RTS(trained, own), images, target, 0.0).penalty
    odds = own.encoder.eval()(images).double().softmax(dim=1)
    expected = -weight * odds[range(3), target].log()
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)


class Features(TinyNet):
    def forward(self, x):
        logits = super().forward(x)
        return logits[:, :3] if len(x) == 1 else (logits, x)


def test_an_encoder_that_returns_no_logits_of_the_classes_has_no_penalty(model, data):
    images, target = data
    rts = RTS(model, untrained(Features()))
    for count in (1, 6):
        found = rts.surrogate(rts, images[:count], target[:count], 0.0)
        assert found.penalty is None
        assert torch.equal(found.maps, rts(images[:count], target[:count]))


def test_the_attackers_gradient_has_the_penalty_once(model, encoder, data):
    images, target = data[0], (data[1] + 1) % 4
    rts, gradients, weight = RTS(model, untrained(encoder)), [], 50.0

    def spy(problem, variable, memory):
        gradients.append(problem.gradient(variable))
        return variable, memory

    for own in (0.0, weight):
        attack = ADV2(model, rts, steps=1, warmup=0, step=spy, surrogate=EncoderGuided(own))
        attack.set_mode_targeted_by_label(quiet=True)
        attack(images, target)
    x = images.clone().requires_grad_()
    loss = weight * F.cross_entropy(rts.masking_model.encode(x).output, target, reduction="sum")
    (expected,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(gradients[1] - gradients[0], expected, rtol=1e-3, atol=1e-5)


def test_adv2_brings_the_map_near_its_target():
    shapes, model = make_shapes(4, seed=99), load_resnet()
    rts, target = RTS(model, load_rts(model)), (shapes.labels + 1) % 10
    distances = []
    for warmup in (None, 20):  # the latter is an attack on the prediction alone
        attack = ADV2(model, rts, steps=20, warmup=warmup)
        attack.set_mode_targeted_by_label(quiet=True)
        adversarial = attack(shapes.images, target)
        apart = rts(adversarial, target) - rts(shapes.images, shapes.labels)
        distances.append(apart.abs().mean())
    assert distances[0] < 0.5 * distances[1]

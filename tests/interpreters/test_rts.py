# SPDX-License-Identifier: MIT
"""RTS, its masking model, and what an attack on it sees."""

import copy
import math
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
import torchattacks
import torchvision
from captum_adv2.attacks.run import Dual
from conftest import TinyNet, blobs, untrained
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conformance import Shifted, TwoOutputs, mixed, nothing_left_behind
from torch import nn

from captum_adv2 import ADV2, storage
from captum_adv2.interpreters import (
    RTS,
    EncoderGuided,
    MaskingLoss,
    MaskingModel,
    train_masking_model,
)
from captum_adv2.interpreters.tap import tapped

SHAPE = (3, 16, 16)
LAYERS = ("body", "stem")


def masking(encoder, classes=4, seed=0, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        settings = {"layers": LAYERS, "image_shape": SHAPE} | settings
        return MaskingModel(encoder, classes, **settings)


def pyramid(seed=0):
    """Return a network whose stages each halve the image."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
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


@pytest.fixture(scope="module")
def taught(trained):
    batches = [blobs(16, seed) for seed in range(40)]
    loss = MaskingLoss(trained, smooth=10.0, area=1.0, destroy=5.0, power=0.3, absent=0.3)
    settings = {"loss": loss, "lr": 0.01, "epochs": 2, "verbose": False}
    return train_masking_model(trained, batches, masking(trained), **settings)


def passes_of(module):
    passes = []
    module.register_forward_hook(lambda module, args, out: passes.append(len(args[0])))
    return passes


# One forward pass


def test_the_classifier_as_encoder_runs_once_for_map_and_logits(model, data):
    clone = copy.deepcopy(model)
    rts, passes = RTS(clone, untrained(clone)), passes_of(clone)
    rts(*data)
    assert passes == [6]
    x = data[0].clone().requires_grad_()
    for number, explain in enumerate((rts.explain, lambda x, y: rts.surrogate(x, y)(x)), 2):
        explanation = explain(x, data[1])
        torch.autograd.grad(explanation.maps.sum(), x)
        assert passes == [6] * number
        assert torch.equal(explanation.logits, model(data[0]))


def test_an_encoder_of_its_own_gives_no_logits(model, encoder, data):
    clone = copy.deepcopy(model)
    rts = RTS(clone, untrained(encoder))
    theirs, own = passes_of(clone), passes_of(encoder)
    for _ in range(3):
        explanation = rts.explain(*data)
        assert explanation.logits is None
    assert own == [6, 6, 6]
    assert sum(theirs) <= 1  # one image, once, to learn the number of classes
    assert torch.equal(explanation.maps, rts.masking_model(*data))


def test_the_encoder_sees_what_the_classifier_sees(model, encoder, data):
    rts = RTS(model, untrained(encoder))
    after = rts.after(Shifted())
    assert torch.equal(after(*data), rts.masking_model(Shifted()(data[0]), data[1]))


def test_an_encoder_in_train_mode_runs_in_eval_mode(model, encoder, data):
    maps = RTS(model, untrained(copy.deepcopy(encoder).eval()))(*data)
    rts = RTS(model, untrained(encoder))
    first, second = (rts.masking_model.encode(data[0]).output for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(rts(*data), maps)
    assert torch.equal(rts.surrogate(*data)(data[0]).maps, maps)


def test_nothing_is_left_behind_on_an_encoder(model, encoder, data):
    images, labels = data
    encoder.stem.requires_grad_(False)
    encoder.fc.bias.grad = torch.ones_like(encoder.fc.bias)
    rts = RTS(model, untrained(encoder))
    rts(images, labels)
    x = images.clone().requires_grad_()
    for call in (rts, lambda x, y: rts.surrogate(x, y)(x).penalty):
        with (
            nothing_left_behind(encoder, x),
            nothing_left_behind(model),
            nothing_left_behind(rts.masking_model),
        ):
            torch.autograd.grad(call(x, labels).sum(), x)
    assert torch.equal(encoder.fc.bias.grad, torch.ones_like(encoder.fc.bias))


@pytest.mark.parametrize("where", ["stem", "body", "fc"])
def test_nothing_is_left_behind_after_an_exception_in_the_encoder(model, encoder, data, where):
    rts = RTS(model, untrained(encoder))

    def fail(*_):
        raise KeyError("inside the encoder")

    handle = encoder.get_submodule(where).register_forward_hook(fail)
    for call in (rts, lambda x, y: rts.surrogate(x, y)(x)):
        expected = pytest.raises(KeyError, match="inside")
        with nothing_left_behind(encoder, data[0]), nothing_left_behind(model), expected:
            call(*data)
    handle.remove()
    assert torch.equal(rts(*data), RTS(model, untrained(encoder))(*data))


def test_the_classifier_is_left_in_train_mode_while_classes_are_counted(model, encoder, data):
    clone = mixed(model)
    rts = RTS(clone, untrained(encoder))
    with nothing_left_behind(clone), nothing_left_behind(encoder):
        rts.explain(*data)


# The map


def test_a_batch_is_explained_like_its_images(trained_smooth):
    rts = RTS(trained_smooth, masking(trained_smooth))
    x, labels = blobs(4)[0].double(), torch.tensor([2, 0, 3, 1])
    singles = [rts(x[i : i + 1], labels[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(rts(x, labels), torch.cat(singles), rtol=0, atol=1e-12)


def test_gradcheck_of_map_logits_and_penalty(smooth):
    rts, target = RTS(smooth, masking(smooth)), torch.tensor([1, 3])
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(2, 3, 8, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    surrogate = rts.surrogate(x, target)
    assert torch.autograd.gradcheck(lambda x: tuple(surrogate(x)), (x,), fast_mode=True)


@given(power=st.integers(-40, 6), seed=st.integers(0, 99))
def test_the_map_is_in_the_unit_range_whatever_the_decoder_says(trained, power, seed):
    own = masking(trained, seed=seed)
    with torch.no_grad():
        for parameter in own.decoder.parameters():
            parameter.mul_(10.0**power if parameter.ndim == 4 else 1)
    x, target = blobs(2, seed)[0].requires_grad_(), torch.tensor([1, 2])
    maps = own(x, target)
    assert ((maps >= 0) & (maps <= 1)).all()


def test_a_silent_decoder_gives_no_nan(model):
    own = masking(model)
    with torch.no_grad():
        for parameter in own.decoder.parameters():
            parameter.zero_()
    x = blobs(2)[0].requires_grad_()
    maps = RTS(model, own)(x, torch.tensor([1, 2]))
    assert ((maps >= 0) & (maps <= 1)).all()
    parameters = [*own.selector.parameters(), *own.decoder.parameters()]
    for gradient in torch.autograd.grad(maps.sum(), [x, *parameters]):
        assert gradient.isfinite().all()


def test_the_map_has_the_size_of_the_finest_layer(data):
    net = pyramid()
    for layers in (("2", "0"), ("2", "1"), ("2", "1", "0")):
        own = masking(net, layers=layers)
        images = torch.cat([data[0], data[0]], dim=3)
        finest = net[: int(layers[-1]) + 1](images).shape[-2:]
        assert own(images, data[1]).shape == (6, 1, *finest)


# The class selector


def louder(module):
    """Let a module say something else."""
    return module.register_forward_hook(lambda module, args, out: 3 * out + 1)


def test_a_closed_gate_hides_the_coarsest_features(model, data):
    images, labels = data
    for confidence, shut in ((0.0, False), (1e4, True)):
        clone = copy.deepcopy(model)
        own = masking(clone, confidence=confidence)
        before = own(images, labels)
        handle = louder(clone.body)
        assert torch.equal(own(images, labels), before) == shut
        handle.remove()
        assert torch.equal(own(images, (labels + 1) % 4), before) == shut
        louder(clone.stem)
        assert not torch.equal(own(images, labels), before)


def test_each_class_has_a_vector_of_its_own(model, data):
    own, closed = masking(model), masking(model, confidence=1e4)
    before = [own(data[0], torch.full((6,), label)) for label in range(4)]
    with torch.no_grad():
        own.selector.weight[2] = -1e6  # the features are not negative
    for label in range(4):
        target = torch.full((6,), label)
        maps = own(data[0], target)
        assert torch.equal(maps, before[label]) == (label != 2)
        assert torch.equal(maps, closed(data[0], target)) == (label == 2)


def test_presence_is_the_mean_agreement_with_the_coarsest_features(model, data):
    images, labels = data
    own = masking(model)
    encoded = own.encode(images)
    features = model.body(model.norm(model.stem(images)))
    torch.testing.assert_close(encoded.features[0], features)
    expected = (features.mean(dim=(2, 3)) * own.selector.weight[labels]).sum(dim=1)
    torch.testing.assert_close(own.presence(encoded, labels), expected)


# What features are looked at


@pytest.mark.parametrize(
    "name", ["resnet18", "squeezenet1_0", "densenet121", "mobilenet_v2", "vgg11"]
)
def test_scales_are_found(name):
    net = torchvision.models.get_model(name, weights=None, num_classes=7)
    own = MaskingModel(net, image_shape=(3, 64, 64))
    assert own.classes == 7
    assert all(module.training for module in net.modules())
    assert not any(module._forward_hooks for module in net.modules())
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        features, output = own.encode(x)
        maps = own(x, torch.tensor([3]))
    assert output.shape == (1, 7)
    sizes = [f.shape[-1] for f in features]
    assert sizes == sorted(set(sizes))
    assert 1 < sizes[0] < sizes[-1] < 64
    assert len(sizes) == len(own.layers) == 4
    assert maps.shape[-2:] == features[-1].shape[-2:]
    assert own.stride == math.ceil(64 / sizes[0])
    if name == "resnet18":
        assert own.layers == ("layer4", "layer3", "layer2", "layer1")


def test_a_module_that_runs_at_two_scales_counts_where_it_runs_last(data):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.fine, self.coarse = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)
            self.relu = nn.ReLU()

        def forward(self, x):
            return self.relu(self.coarse(self.relu(self.fine(x)))).mean(dim=(2, 3))

    net = Shared()
    own = masking(net, layers=None)
    assert own.layers == ("relu", "fine")
    features = own.encode(data[0]).features
    assert torch.equal(features[0].mean(dim=(2, 3)), net(data[0]))


def test_layers_by_name_or_by_module(model, data):
    by_name, by_module = masking(model), masking(model, layers=(model.body, model.stem))
    assert by_module.layers == by_name.layers == LAYERS
    assert torch.equal(by_module(*data), by_name(*data))
    assert not torch.equal(masking(model, layers=("body", "stem.0"))(*data), by_name(*data))


def test_in_place_modules_after_a_layer_do_not_reach_its_features(data):
    net, tidy = (pyramid() for _ in range(2))
    for stage in net[:3]:
        stage[1].inplace = True
    layers = ("2.0", "1.0", "0.0")
    theirs = masking(tidy, layers=layers).encode(data[0])
    ours = masking(net, layers=layers).encode(data[0])
    assert all(map(torch.equal, ours.features, theirs.features))
    assert any((f < 0).any() for f in ours.features)
    assert torch.equal(ours.output, theirs.output)


def test_building_leaves_a_failing_encoder_as_it_was(model):
    clone = mixed(model)
    expected = pytest.raises(ValueError, match=r"expected an encoder for images of shape \(1, 16")
    with nothing_left_behind(clone), expected:
        MaskingModel(clone, image_shape=(1, 16, 16))


def test_dtype_follows_the_encoder(trained_smooth):
    own = masking(trained_smooth)
    assert {p.dtype for p in own.parameters()} == {torch.float64}
    assert own(blobs(2)[0].double(), torch.tensor([0, 1])).dtype == torch.float64


def test_the_mode_of_a_masking_model_is_not_its_encoders(encoder):
    own = masking(encoder)
    for mode in (False, True):
        own.train(mode)
        assert own.training is own.decoder.training is own.selector.training is mode
        assert all(module.training for module in encoder.modules())
    encoder.eval()
    assert not any(module.training for module in masking(encoder).encoder.modules())


# Files


@pytest.mark.parametrize("settings", [{}, {"width": 5, "confidence": 1.5}, {"layers": ("fc",)}])
def test_a_file_gives_the_same_maps(tmp_path, model, data, settings):
    net = pyramid() if settings.get("layers") else model
    own = masking(net, **settings | ({"layers": ("2", "0")} if net is not model else {}))
    own.save(tmp_path / "file")
    with torch.random.fork_rng():
        torch.manual_seed(99)
        again = MaskingModel.load(str(tmp_path / "file"), net)
    assert torch.equal(again(*data), own(*data))
    assert repr(again) == repr(own)
    assert again.encoder is net
    assert not again.training


def test_a_file_has_no_weights_of_the_encoder(tmp_path, model):
    own, path = masking(model), tmp_path / "file"
    own.save(path)
    kept = storage.load(path, "masking model")["trained"]
    ours = [*own.selector.parameters(), *own.decoder.parameters()]
    assert sum(v.numel() for v in kept.values()) == sum(p.numel() for p in ours)
    assert not any("encoder" in name for name in kept)


def test_loading_leaves_the_encoder_as_it_is(tmp_path, model):
    masking(model).save(tmp_path / "file")
    clone = mixed(model)
    with nothing_left_behind(clone), torch.random.fork_rng():
        MaskingModel.load(tmp_path / "file", clone)


def grey(model):
    """Return a model for images of one channel."""
    model.stem[0] = nn.Conv2d(1, 8, 3, padding=1)
    return model


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (lambda: TinyNet(width=5), r"expected a checkpoint of this architecture, decoder\."),
        (pyramid, "expected layer to name a module of the model, got 'body'"),
        (lambda: grey(TinyNet()), r"expected an encoder for images of shape"),
    ],
)
def test_a_file_for_another_encoder(tmp_path, model, encoder, message):
    masking(model).save(tmp_path / "file")
    with pytest.raises(ValueError, match=message):
        MaskingModel.load(tmp_path / "file", encoder())


def test_files_that_are_none(tmp_path, model):
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError):
        MaskingModel.load(path, model)
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match="expected the file of a masking model"):
        MaskingModel.load(path, model)
    storage.save({"trained": {}}, path, "training")
    with pytest.raises(ValueError, match="expected the file of a masking model, .* of a training"):
        MaskingModel.load(path, model)


@pytest.mark.parametrize("spoil", ["more", "less", "shape", "other"])
def test_restoring_all_or_nothing(model, spoil):
    own, other = masking(model), masking(model, seed=1)
    before, record = copy.deepcopy(own.state_dict()), other.trained()
    name = "selector.weight"
    if spoil == "more":
        record["decoder.extra"] = torch.ones(2)
    elif spoil == "less":
        del record[name]
    elif spoil == "shape":
        record[name] = record[name][:2]
    else:
        record = {}
    with pytest.raises(ValueError, match="expected a checkpoint of this architecture"):
        own.restore(record)
    assert all(torch.equal(value, before[key]) for key, value in own.state_dict().items())
    own.restore(other.trained())
    assert all(torch.equal(value, own.trained()[key]) for key, value in other.trained().items())


# Objects


@pytest.mark.parametrize("shared", [True, False])
def test_copies_share_what_the_original_shares(model, encoder, data, shared):
    rts = RTS(model, untrained(model if shared else encoder))
    expected = rts(*data)
    for clone in (copy.deepcopy(rts), pickle.loads(pickle.dumps(rts))):
        assert (clone.masking_model.encoder is clone.model) == shared
        assert (clone.explain(*data).logits is not None) == shared
        assert torch.equal(clone(*data), expected)
    own = pickle.loads(pickle.dumps(rts.masking_model))
    assert torch.equal(own(*data), expected)


def test_repr(model):
    own = untrained(model)
    assert "classes=4" in repr(own)
    assert "('body', 'stem')" in repr(own)


# Arguments


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("classes", [3, 6])
def test_another_number_of_classes_than_the_classifier_has(model, encoder, data, shared, classes):
    own = masking(model if shared else encoder, classes)
    rts = RTS(model, own)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"classifier's 4 classes, got one for {classes}"):
            rts(data[0], data[1] * 0)


def test_classes_default_to_the_encoders_outputs(model):
    assert masking(model, None).classes == 4
    with pytest.raises(TypeError, match="expected classes to be an integer, got NoneType"):
        masking(TwoOutputs().eval(), None)


def test_a_class_out_of_range(model, data):
    own = masking(model)
    for call in (own, RTS(model, own).explain):
        for target in (torch.full((6,), 4), torch.full((6,), -1)):
            with pytest.raises(ValueError, match=r"expected target in \[0, 3\]"):
                call(data[0], target)


def test_images_smaller_than_the_stride():
    net = pyramid()
    own = masking(net, layers=("2", "1", "0"))
    assert own.stride == 8
    assert own(torch.rand(1, 3, 8, 9), torch.tensor([0])).isfinite().all()
    for shape in ((1, 3, 7, 16), (1, 3, 16, 7)):
        with pytest.raises(ValueError, match=r"at least 8 x 8 pixels.*got \(1, 3"):
            RTS(net, own)(torch.rand(shape), torch.tensor([0]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"classes": 1}, ValueError, "expected classes at least 2"),
        ({"classes": 2.5}, TypeError, "expected classes to be an integer"),
        ({"width": 0}, ValueError, "expected width at least 1"),
        ({"width": "8"}, TypeError, "expected width to be an integer"),
        ({"confidence": math.nan}, ValueError, "expected confidence at least"),
        ({"confidence": "high"}, TypeError, "expected confidence to be a number"),
        ({"image_shape": (3, 0, 16)}, ValueError, "expected image_shape at least 1"),
        ({"image_shape": (3, 16.0, 16)}, TypeError, "expected image_shape to be an integer"),
        ({"layers": ("body", "nothing")}, ValueError, "got 'nothing'"),
        ({"layers": ("body",)}, ValueError, "feature maps at two scales or more"),
        ({"layers": ()}, ValueError, "feature maps at two scales or more"),
        ({"layers": ("fc", "body")}, ValueError, r"feature maps at two scales.*got \['body'\]"),
        ({"layers": (3, "body")}, TypeError, "expected layer to be a module or its name, got int"),
        ({"layers": (nn.ReLU(), "body")}, ValueError, "got another ReLU"),
    ],
)
def test_arguments_out_of_range_and_of_another_type(model, arguments, error, message):
    with pytest.raises(error, match=message):
        masking(model, **arguments)


def test_no_two_scales_to_be_found():
    flat = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match=r"pass layers=, coarse to fine, or image_shape="):
        masking(flat, layers=None)


def test_models_of_another_type(model):
    with pytest.raises(TypeError, match=r"expected masking_model to be a MaskingModel, got TinyN"):
        RTS(model, model)
    with pytest.raises(TypeError, match=r"expected model to be a torch\.nn\.Module"):
        RTS(lambda x: x, masking(model))
    with pytest.raises(TypeError, match=r"expected model to be a torch\.nn\.Module"):
        MaskingModel(lambda x: x)


# The attack's view


@given(weight=st.floats(1e-3, 10), seed=st.integers(0, 99))
@settings(max_examples=10)
def test_the_penalty_is_the_encoders_cross_entropy(trained, weight, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        own = untrained(TinyNet())
    images, target = blobs(3, seed)
    rts = RTS(trained, own)
    found = EncoderGuided(weight)(rts, images, target)(images)
    odds = own.encode(images).output.double().softmax(dim=1)
    expected = -weight * odds[range(3), target].log()
    torch.testing.assert_close(found.penalty.double(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(found.maps, rts(images, target))


class Features(TinyNet):
    """Gives no classes, but what it is told to."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output(x, super().forward(x))


@pytest.mark.parametrize(
    "output",
    [
        lambda x, logits: logits[:, :3],
        lambda x, logits: logits[:, 0],
        lambda x, logits: (logits, x),
        lambda x, logits: {"logits": logits},
        lambda x, logits: x,
    ],
    ids=["fewer", "one", "tuple", "dict", "maps"],
)
def test_an_encoder_whose_outputs_are_no_classes_has_no_penalty(model, data, output):
    rts = RTS(model, untrained(Features(output)))
    found = rts.surrogate(*data)(data[0])
    assert found.penalty is None
    assert torch.equal(found.maps, rts(*data))


def test_no_weight_no_penalty(model, data):
    rts = RTS(model, untrained(model))
    assert EncoderGuided(0)(rts, *data)(data[0]).penalty is None
    assert rts.explain(*data).penalty is None
    assert rts.surrogate(*data)(data[0]).penalty.shape == (6,)


@pytest.mark.parametrize("weight", [-0.1, math.inf, math.nan])
def test_a_weight_out_of_range(weight):
    with pytest.raises(ValueError, match="expected weight at least 0"):
        EncoderGuided(weight)
    with pytest.raises(TypeError, match="expected weight to be a number"):
        EncoderGuided(str(weight))


def test_the_attackers_loss_has_the_penalty_once(model, encoder, data):
    images, target = data[0].clone().requires_grad_(), (data[1] + 1) % 4
    rts = RTS(model, untrained(encoder))
    goal = torch.rand(6, 1, 8, 8)
    terms = (
        lambda c: F.cross_entropy(c.logits, c.target, reduction="none"),
        lambda c: (c.maps - c.target_maps).abs().mean(dim=(1, 2, 3)),
    )

    def gradient(losses):
        return torch.autograd.grad(losses.sum(), images)[0]

    def dual(weight):
        follower = EncoderGuided(weight)(rts, images, target)
        return Dual(model, follower, target, goal, terms, 0.9)

    with_it, without = dual(2.0), dual(0)
    output = rts.masking_model.encode(images).output
    penalty = gradient(2.0 * F.cross_entropy(output, target, reduction="none"))
    assert penalty.abs().max() > 1e-4
    parts = (lambda d: d(images, 0.5), lambda d: d.interpretation(images, 0.5))
    for part in parts:
        ours, plain = (gradient(part(d)) for d in (with_it, without))
        torch.testing.assert_close(ours - plain, penalty, rtol=1e-3, atol=1e-6)
    predictions = [gradient(d.prediction(images, 0.5)) for d in (with_it, without)]
    assert torch.equal(*predictions)
    # Not the score by which the best iterate is chosen.
    assert torch.equal(with_it.distance, without.distance)


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_adv2_steps_along_the_penalty(model, encoder, data, weight):
    images, target = data[0], (data[1] + 1) % 4
    rts, seen = RTS(model, untrained(encoder)), []

    def spy(problem, variable, memory):
        seen.append((variable.detach(), problem.gradient(variable)))
        return problem.move(variable, -0.01 * seen[-1][1].sign()), None

    attack = ADV2(
        model,
        rts,
        steps=3,
        warmup=0,
        step=spy,
        prediction=lambda c: F.cross_entropy(c.logits, c.target, reduction="none"),
        interpretation=lambda c: (c.maps - c.target_maps).square().mean(dim=(1, 2, 3)),
        surrogate=EncoderGuided(weight),
        keep="final",
    )
    attack.set_mode_targeted_by_label(quiet=True)
    attack(images, target)
    goal = rts(images, data[1]).detach()
    assert len(seen) == 3
    for variable, found in seen:
        x = variable.clone().requires_grad_()
        loss = F.cross_entropy(model(x), target, reduction="sum")
        loss = loss + (rts(x, target) - goal).square().mean(dim=(1, 2, 3)).sum()
        output = rts.masking_model.encode(x).output
        loss = loss + weight * F.cross_entropy(output, target, reduction="sum")
        torch.testing.assert_close(found, torch.autograd.grad(loss, x)[0], rtol=1e-3, atol=1e-6)


def test_adv2_fools_classifier_and_rts(model, taught):
    images, labels = blobs(16, seed=777)
    target, rts = (labels + 1) % 4, RTS(model, taught)
    settings = {"eps": 0.1, "alpha": 0.01, "steps": 40}
    ours = ADV2(model, rts, **settings)
    theirs = torchattacks.PGD(model, **settings, random_start=False)
    distances = []
    for attack in (ours, theirs):
        attack.set_mode_targeted_by_label(quiet=True)
        adversarial = attack(images, target)
        assert (model(adversarial).argmax(dim=1) == target).all()
        distances.append((rts(adversarial, target) - rts(images, labels)).abs().mean())
    assert distances[0] < 0.8 * distances[1]


# The tap


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_tap_keeps_one_side_of_a_module(model, data, side):
    with nothing_left_behind(model), tapped(model.body, side) as tap:
        expected = model(data[0])
    before = model.norm(model.stem(data[0]))
    assert torch.equal(tap.features, before if side == "input" else model.body(before))
    assert torch.equal(model(data[0]), expected)


def test_a_tap_is_gone_after_an_exception(model):
    hook = tapped(model.body, "output")
    with nothing_left_behind(model), pytest.raises(KeyError), hook as tap:
        raise KeyError
    assert tap.features is None


def test_a_tap_hears_its_own_thread_only(model, data):
    with tapped(model.body, "output") as tap:
        other = threading.Thread(target=model, args=(data[0],))
        other.start()
        other.join()
        assert tap.features is None
        model(data[0][:2])
    assert len(tap.features) == 2


def test_a_tap_ignores_what_is_no_tensor(data):
    net = TwoOutputs().eval()
    with tapped(net, "output") as tap:
        assert isinstance(net(data[0]), tuple)
    assert tap.features is None

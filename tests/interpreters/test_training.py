# SPDX-License-Identifier: MIT
"""Training a masking model: the loss by hand, and runs that are interrupted and resumed."""

import copy
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TinyNet, blobs, mixed, untrained
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset

from captum_adv2 import storage
from captum_adv2.interpreters import train_masking_model, training
from captum_adv2.interpreters.mask import Blur
from captum_adv2.interpreters.training import Blend, MaskingLoss, random_others
from captum_adv2.testing import unchanged

SEEDS = st.integers(0, 2**32 - 1)
QUICK = {"epochs": 2, "lr": 0.01, "verbose": False}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def weights(masking_model):
    return {name: value.clone() for name, value in masking_model.trained().items()}


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


# Blending


@given(
    seed=SEEDS,
    scales=st.tuples(*[st.floats(0, 3)] * 3),
    sigma=st.none() | st.floats(0.1, 30),
    blurred=st.floats(0, 1),
)
@example(seed=0, scales=(0.0, 2.0, 0.0), sigma=0.25, blurred=1.0)  # its blur rounds above 1
def test_blending_stays_in_range_and_depends_on_the_generator_alone(seed, scales, sigma, blurred):
    blend, images = Blend(*scales, sigma, blurred), blobs(3, seed)[0].double()
    first, again = (blend(images, seeded(seed)) for _ in range(2))
    for value, other in zip(first, again, strict=True):
        assert value.shape == images.shape
        assert ((value >= 0) & (value <= 1)).all()
        assert torch.equal(value, other)


def test_replacements_are_plain_colours_and_blurs():
    images = blobs(64)[0]
    whole, plain = Blend(colour=0.2, noise=0.0, grain=0.0, blurred=0.0)(images, seeded(0))
    assert torch.equal(whole, images)
    assert torch.equal(plain, plain[..., :1, :1].expand_as(plain))
    distance = (plain[..., 0, 0] - 0.5).abs().amax(dim=0)
    assert ((distance <= 0.2) & (distance > 0.15)).all()  # of 64 uniform draws
    _, blur = Blend(noise=0.0, sigma=2.0, blurred=1.0)(images, seeded(0))
    torch.testing.assert_close(blur, Blur(2.0)(images))


def test_the_share_of_blurred_images_and_the_spread_of_noise():
    images = torch.full((400, 1, 8, 8), 0.4)
    blend = Blend(colour=0.0, noise=0.0, grain=0.02, blurred=0.25)
    whole, replaced = blend(images, seeded(0))
    assert (whole - images).std().item() == pytest.approx(0.02, rel=0.05)
    grey = (replaced - 0.5).abs().amax(dim=(1, 2, 3)) < 1e-6
    assert (~grey).float().mean().item() == pytest.approx(0.25, abs=0.1)
    torch.testing.assert_close(replaced[~grey], images[~grey])


# The loss


class Fixed:
    """A masking model with given maps and log-odds."""

    classes = 4
    own_encoder = False

    def __init__(self, maps, odds):
        self.maps, self.odds, self.asked = maps, odds, []

    def encode(self, images):
        return images

    def expect_logits(self, output, batch):
        return output

    def presence(self, encoded, target):
        return self.odds

    def decode(self, encoded, target):
        self.asked.append(target)
        return self.maps


class Linear(nn.Module):
    """Logits that are a linear function of pixels."""

    def __init__(self):
        super().__init__()
        self.weights = torch.randn(768, 4, generator=seeded(3), dtype=torch.float64) / 8

    def forward(self, x):
        return x.flatten(1) @ self.weights


def halved(images, generator):
    """A blend without anything random."""
    return images / 2, 0.5 - images / 4


@given(
    seed=SEEDS,
    form=st.sampled_from(["log", "hinge"]),
    absent=st.booleans(),
    factors=st.fixed_dictionaries(
        {name: st.floats(0, 5) for name in ("preserve", "destroy", "area", "power", "smooth")}
    ),
)
def test_the_loss_is_equation_8(seed, form, absent, factors):
    (images, labels), model = blobs(5, seed), Linear()
    maps = torch.rand(5, 1, 4, 4, generator=seeded(seed), dtype=torch.float64)
    odds = torch.linspace(-2, 2, 5, dtype=torch.float64)
    masking_model = Fixed(maps, odds)
    loss = MaskingLoss(model, form, absent=float(absent), blend=halved, **factors)
    found = loss(masking_model, images.double(), labels, seeded(0))
    (asked,) = masking_model.asked
    assert ((asked == labels) != absent).all()

    m, probability = maps.numpy(), 1 / (1 + np.exp(-odds.numpy()))
    large = F.interpolate(maps, (16, 16), mode="bilinear", align_corners=False).numpy()
    large = 1 - large if absent else large
    whole, replaced = (part.numpy() for part in halved(images.double(), None))
    values = []
    for mask in (large, 1 - large):
        z = (mask * whole + (1 - mask) * replaced).reshape(5, -1) @ model.weights.numpy()
        own = z[range(5), labels]
        if form == "log":
            values.append(np.exp(own) / np.exp(z).sum(axis=1))
        else:
            values.append(own - [np.delete(row, y).max() for row, y in zip(z, labels, strict=True)])
    kept, rest = values
    log = form == "log"
    rough = (np.diff(m, axis=2) ** 2).mean((1, 2, 3)) + (np.diff(m, axis=3) ** 2).mean((1, 2, 3))
    expected = {
        "preserve": factors["preserve"] * (-np.log(kept) if log else np.maximum(0, 1 - kept)),
        "destroy": factors["destroy"]
        * (rest ** factors["power"] if log else np.maximum(0, rest + 5)),
        "area": factors["area"] * m.mean((1, 2, 3)),
        "smooth": factors["smooth"] * rough,
        "select": -np.log(1 - probability if absent else probability),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].numpy(), value, rtol=1e-8, atol=1e-8, err_msg=name)


def test_random_others_are_equally_likely():
    others = random_others(torch.full((4000,), 2), 5, seeded(0))
    shares = (others.bincount(minlength=5) / 4000).tolist()
    assert shares == pytest.approx([0.25, 0.25, 0, 0.25, 0.25], abs=0.04)
    assert random_others(torch.tensor([0, 1]), 2, seeded(0)).tolist() == [1, 0]


@pytest.mark.parametrize("form", ["log", "hinge"])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_gradients_are_finite_and_for_the_masking_model_alone(trained, form, scale):
    extreme = copy.deepcopy(trained)
    extreme.fc.weight.data.mul_(scale)
    masking_model = untrained(extreme)
    parameters = [*masking_model.selector.parameters(), *masking_model.decoder.parameters()]
    with unchanged(extreme):
        terms = MaskingLoss(extreme, form)(masking_model, *blobs(6), seeded(0))
        assert all(term.shape == (6,) and term.isfinite().all() for term in terms.values())
        for gradient in torch.autograd.grad(sum(terms.values()).sum(), parameters):
            assert gradient.isfinite().all()
            assert gradient.any()


# Training


class Points(Dataset):
    """Blobs one by one, some flipped at random."""

    def __init__(self):
        self.images, self.labels = blobs(24)

    def __len__(self):
        return 24

    def __getitem__(self, index):
        image = self.images[index]
        return (image.flip(-1) if torch.rand(()) < 0.5 else image), self.labels[index]


class Failing:
    """A loader that raises after some batches, counted over all epochs."""

    def __init__(self, loader, batches):
        self.loader, self.left = loader, batches
        self.generator = getattr(loader, "generator", None)

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for batch in self.loader:
            if not self.left:
                raise ZeroDivisionError
            self.left -= 1
            yield batch


def loader_of(kind):
    """Return a loader of six batches."""
    if kind == "list":
        return [blobs(4, seed) for seed in range(6)]
    generator = seeded(11) if kind == "generator" else None
    return DataLoader(Points(), batch_size=4, shuffle=True, generator=generator)


every_kind = pytest.mark.parametrize("kind", ["list", "shuffled", "generator"])


def learn(model, loader, masking_model=None, **settings):
    masking_model = masking_model or untrained(model)
    return train_masking_model(model, loader, masking_model, **(QUICK | settings))


def test_training_is_torchs_adam_on_each_objective_with_a_cosine_rate(model):
    def first(masking_model, images, labels, generator):
        wanted = torch.randn((), generator=generator)
        return {"a": (masking_model.selector(labels) - wanted).square().sum(dim=1)}

    def second(masking_model, images, labels, generator):
        total = masking_model.selector(labels).sum(dim=1)
        return {"b": total, "c": torch.rand((), generator=generator) * total}

    batches, found, expected = (
        [blobs(4, seed) for seed in range(3)],
        untrained(model),
        untrained(model),
    )
    settings = {"epochs": 2, "lr": 0.1, "seed": 5, "verbose": False}
    train_masking_model(model, batches, found, loss=[first, second], **settings)
    optimizer = torch.optim.Adam(expected.selector.parameters())
    for step, (images, labels) in enumerate(batches * 2):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / 6))
        generator = seeded(training.mixed(5, step, "step"))
        for objective in (first, second):
            optimizer.zero_grad()
            sum(objective(expected, images, labels, generator).values()).mean().backward()
            optimizer.step()
    for name, value in expected.trained().items():
        torch.testing.assert_close(found.trained()[name], value)


@every_kind
@pytest.mark.parametrize("batches", [0, 4, 6])
def test_nothing_is_left_behind(trained, kind, batches):
    model, encoder, loader = mixed(trained), TinyNet(), Failing(loader_of(kind), batches)
    model.fc.bias.grad = torch.ones_like(model.fc.bias)
    state = loader.generator and loader.generator.get_state()
    masking_model, fails = untrained(encoder).train(), pytest.raises(ZeroDivisionError)
    with unchanged(model), unchanged(encoder), fails if batches < 6 else nullcontext():
        learn(model, loader, masking_model, epochs=1)
    assert state is None or torch.equal(loader.generator.get_state(), state)
    assert not masking_model.training
    assert all(p.grad is None for p in masking_model.parameters())


@every_kind
def test_the_seed_decides(trained, kind):
    model = copy.deepcopy(trained)
    model.body.append(nn.AvgPool2d(2))  # two resolutions to find

    def run(seed, noise):
        torch.manual_seed(noise)
        settings = {"epochs": 1, "seed": seed, "verbose": False}
        return weights(train_masking_model(model, loader_of(kind), **settings))

    first = run(0, 0)
    assert same(run(0, 5), first)
    assert not same(run(1, 0), first)


@pytest.mark.parametrize("how", ["gradients", "no_grad", "train mode"])
def test_the_surroundings_do_not_matter(trained, how):
    batches, classifier = [blobs(4)] * 2, copy.deepcopy(trained)
    expected, masking_model = weights(learn(trained, batches)), untrained(classifier)
    if how == "gradients":
        for parameter in masking_model.decoder.parameters():
            parameter.grad = torch.full_like(parameter, 1e3)
    classifier.train(how == "train mode")
    with torch.set_grad_enabled(how != "no_grad"), unchanged(classifier):
        learn(classifier, batches, masking_model)
    assert same(weights(masking_model), expected)


# Checkpoints


@every_kind
@pytest.mark.parametrize("killed", [2, 7])
def test_a_killed_run_resumes_to_the_same_weights(model, tmp_path, monkeypatch, kind, killed):
    monkeypatch.setattr(training, "_EVERY", 3)
    loader, whole, part = loader_of(kind), tmp_path / "whole", tmp_path / "part"
    expected = weights(learn(model, loader, checkpoint=whole))
    with pytest.raises(ZeroDivisionError):
        learn(model, Failing(loader, 1 + killed), checkpoint=part)  # one to tell the data by
    assert part.exists() == (killed >= 3)
    torch.manual_seed(99)
    again = untrained(model, seed=5 if killed >= 3 else 0)  # its weights come from the checkpoint
    assert same(weights(learn(model, loader, again, checkpoint=part)), expected)
    first, second = (storage.load(path, "training")["optimizer"]["state"] for path in (part, whole))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_finished_run_takes_no_more_steps(model, tmp_path, monkeypatch):
    path, settings = tmp_path / "file", {"epochs": np.int64(1), "lr": np.float32(0.5)}
    expected = weights(learn(model, [blobs(2)], checkpoint=path, **settings))
    monkeypatch.setattr(torch.optim.Adam, "step", None)
    again = learn(model, [blobs(2)], untrained(model, seed=4), checkpoint=path, **settings)
    assert same(weights(again), expected)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"epochs": 3}, "expected a checkpoint of this training"),
        ({"lr": 0.02}, "expected a checkpoint of this training"),
        ({"seed": 1}, "expected a checkpoint of this training"),
        ({"loader": [blobs(2)] * 2}, "expected a checkpoint of this training"),
        ({"loader": [blobs(2, seed=7)]}, "its first batch is"),
        ({"loss": "area"}, "its loss's settings is"),
        ({"loss": "blend"}, "its loss's settings is"),
        ({"model": True}, "its networks is"),
        ({"other encoder": True}, "its networks is"),
    ],
)
def test_a_checkpoint_of_another_run_changes_nothing(model, tmp_path, other, message):
    path = tmp_path / "file"
    learn(model, [blobs(2)], checkpoint=path)
    encoder = TinyNet(width=5) if "other encoder" in other else model
    losses = {"area": MaskingLoss(model, area=100.0), "blend": MaskingLoss(model, blend=halved)}
    settings = {name: other[name] for name in ("epochs", "lr", "seed") if name in other}
    settings["loss"] = losses.get(other.get("loss"))
    classifier = TinyNet().eval() if "model" in other else model
    content, masking_model = path.read_bytes(), untrained(encoder)
    before = weights(masking_model)
    loader = other.get("loader", [blobs(2)])
    with pytest.raises(ValueError, match=message):
        learn(classifier, loader, masking_model, checkpoint=path, **settings)
    assert same(weights(masking_model), before)
    assert path.read_bytes() == content


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("wrong", ["loss", "gradient", "term without a gradient"])
def test_a_loss_that_is_not_finite_ends_the_training_before_the_file(
    model, tmp_path, monkeypatch, start, wrong
):
    monkeypatch.setattr(training, "_EVERY", 1)

    def loss(masking_model, images, labels, generator):
        weight, step = masking_model.selector(labels).sum(dim=1), int(images[0, 0, 0, 0])
        far = weight * (math.nan if step and wrong == "loss" else 1)
        steep = (weight * 0).sqrt() if step and wrong == "gradient" else weight
        apart = weight.detach() * (math.inf if step and wrong.startswith("term") else 1)
        return {"far": far, "steep": steep, "apart": apart}

    path, masking_model = tmp_path / "file", untrained(model)
    batches = [(torch.full((2, 3, 16, 16), float(n >= start)), torch.arange(2)) for n in range(3)]
    with pytest.raises(ValueError, match="expected a finite loss and gradient, got far "):
        learn(model, batches, masking_model, loss=loss, checkpoint=path)
    assert all(value.isfinite().all() for value in masking_model.trained().values())
    assert all(p.grad is None for p in masking_model.parameters())
    assert path.exists() == (start == 1)
    if start:
        saved = storage.load(path, "training")
        assert saved["done"] == 1
        assert same(saved["trained"], masking_model.trained())


def test_a_place_for_no_file_is_found_before_the_training(model, tmp_path):
    def fails(*_):
        raise AssertionError("it began")

    with pytest.raises(FileNotFoundError, match="expected to write a file"):
        learn(model, [blobs(2)], loss=fails, checkpoint=tmp_path / "no" / "file")


# Arguments


@pytest.mark.parametrize(
    ("loader", "classes", "error", "message"),
    [
        ([(torch.full((2, 3, 16, 16), 2.0), torch.arange(2))], 4, ValueError, r"in \[0, 1\]"),
        ([(torch.ones(2, 3, 16, 16), torch.rand(2))], 4, TypeError, "integer dtype"),
        ([(torch.ones(2, 3, 16, 16), torch.tensor([0, 4]))], 4, ValueError, r"labels in \[0, 3\]"),
        ([], 4, ValueError, "with at least one batch"),
        (iter([blobs(2)]), 4, ValueError, "and a length"),
        ([blobs(2)], 6, ValueError, "classifier's 4 classes, got one for 6"),
    ],
)
def test_loaders_batches_and_classes_that_do_not_fit(model, loader, classes, error, message):
    masking_model = untrained(model, classes=classes)
    before = weights(masking_model)
    with unchanged(model), pytest.raises(error, match=message):
        learn(model, loader, masking_model)
    assert same(weights(masking_model), before)


def test_the_bar_shows_every_term_or_nothing(model, capsys):
    learn(model, [blobs(2)])
    assert capsys.readouterr() == ("", "")
    learn(model, [blobs(2)], verbose=True)
    shown = capsys.readouterr().err
    assert all(f"{name}=" in shown for name in ("preserve", "destroy", "area", "smooth", "select"))
    assert "2/2" in shown

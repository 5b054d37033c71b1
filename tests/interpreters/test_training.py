# SPDX-License-Identifier: MIT
"""Training a masking model: the loss by hand, and runs that are killed and go on."""

import copy
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TinyNet, blobs
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conformance import mixed, nothing_left_behind
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from captum_adv2 import storage
from captum_adv2.interpreters import (
    Blend,
    MaskingLoss,
    MaskingModel,
    fit,
    train_masking_model,
    training,
)
from captum_adv2.interpreters.mask import Blur
from captum_adv2.interpreters.training import random_others

SEEDS = st.integers(0, 2**32 - 1)
FLAT = Blend(colour=0.0, noise=0.0, grain=0.0, blurred=0.0)  # grey, and nothing random
TERMS = {"preserve", "destroy", "area", "smooth", "select"}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def masking(model, seed=0, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        settings = {"layers": ("body", "stem"), "width": 4, "image_shape": (3, 16, 16)} | settings
        return MaskingModel(model, **settings)


# Blending


@given(
    seed=SEEDS,
    colour=st.floats(0, 3),
    noise=st.floats(0, 3),
    grain=st.floats(0, 3),
    blurred=st.floats(0, 1),
    sigma=st.none() | st.floats(0.1, 30),
)
def test_blending_stays_in_range_and_says_the_same_again(
    seed, colour, noise, grain, blurred, sigma
):
    blend = Blend(colour, noise, grain, sigma, blurred)
    images = torch.rand(3, 2, 9, 7, generator=seeded(seed), dtype=torch.float64)
    kept = images.clone()
    first, again = (blend(images, seeded(seed)) for _ in range(2))
    for value, same in zip(first, again, strict=True):
        assert value.shape == images.shape
        assert value.dtype == images.dtype
        assert ((value >= 0) & (value <= 1)).all()
        assert torch.equal(value, same)
    assert torch.equal(images, kept)


def test_other_seeds_blend_otherwise():
    images = blobs(4)[0]
    first, other = (Blend()(images, seeded(seed)) for seed in (1, 2))
    assert not any(map(torch.equal, first, other))


def test_blending_without_noise():
    images = blobs(64)[0]
    whole, plain = Blend(colour=0.2, noise=0.0, grain=0.0, blurred=0.0)(images, seeded(0))
    assert torch.equal(whole, images)
    assert torch.equal(plain, plain[..., :1, :1].expand_as(plain))
    colours = plain[..., 0, 0]
    assert ((colours - 0.5).abs() <= 0.2).all()
    assert ((colours - 0.5).abs().amax(dim=0) > 0.18).all()
    _, blur = Blend(noise=0.0, sigma=2.0, blurred=1.0)(images, seeded(0))
    assert torch.equal(blur, Blur(2.0)(images))


def test_the_share_of_blurred_images_and_the_spread_of_noise():
    images = torch.full((400, 1, 8, 8), 0.4)
    blend = Blend(colour=0.0, noise=0.0, grain=0.02, blurred=0.25)
    whole, replaced = blend(images, seeded(0))
    assert (whole - images).std().item() == pytest.approx(0.02, rel=0.05)
    blurred = (replaced - 0.4).abs().amax(dim=(1, 2, 3)) < 1e-6
    assert blurred.float().mean().item() == pytest.approx(0.25, abs=0.08)
    assert torch.equal(replaced[~blurred], torch.full_like(replaced[~blurred], 0.5))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("colour", (-0.1, math.inf)),
        ("noise", (-0.1, math.nan)),
        ("grain", (-0.1, math.inf)),
        ("sigma", (0.0, -1.0)),
        ("blurred", (-0.1, 1.1)),
    ],
)
def test_blends_arguments(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"expected {name} (at least|above)"):
            Blend(**{name: value})
    with pytest.raises(TypeError, match=f"expected {name} to be a number"):
        Blend(**{name: "1"})


# The loss


class Fixed:
    """A masking model that gives the maps and log-odds it is told to."""

    classes = 4

    def __init__(self, maps, odds):
        self.maps, self.odds, self.asked = maps, odds, []

    def encode(self, images):
        return images

    def expect_own(self, logits):
        return logits

    def presence(self, encoded, target):
        self.asked.append(target)
        return self.odds

    def decode(self, encoded, target):
        return self.maps


class Linear(nn.Module):
    """Logits that are a linear function of pixels; notes what it is shown."""

    def __init__(self):
        super().__init__()
        weights = torch.randn(3 * 16 * 16, 4, generator=seeded(3), dtype=torch.float64)
        self.weights, self.seen = weights / 8, []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return x.flatten(1) @ self.weights


def by_hand(form, model, images, labels, m, absent, weights):
    """Return the terms of Eq. 8 in plain numpy; m is one number an image."""
    x, m = images.numpy(), m.numpy()[:, None, None, None]
    shown = 1 - m if absent else m
    values = []
    for mask in (shown, 1 - shown):
        z = (mask * x + (1 - mask) * 0.5).reshape(len(x), -1) @ model.weights.numpy()
        own = z[range(len(x)), labels]
        if form == "log":
            values.append(np.exp(own) / np.exp(z).sum(axis=1))
        else:
            rest = [max(np.delete(row, y)) for row, y in zip(z, labels, strict=True)]
            values.append(own - np.array(rest))
    if form == "log":
        preserve, destroy = -np.log(values[0]), values[1] ** weights["power"]
    else:
        preserve, destroy = np.maximum(0, 1 - values[0]), np.maximum(0, values[1] + 5)
    return {
        "preserve": weights["preserve"] * preserve,
        "destroy": weights["destroy"] * destroy,
        "area": weights["area"] * m[:, 0, 0, 0],
        "smooth": 0 * preserve,
    }


@given(
    seed=SEEDS,
    form=st.sampled_from(["log", "hinge"]),
    absent=st.booleans(),
    weights=st.fixed_dictionaries(
        {name: st.floats(0, 5) for name in ("preserve", "destroy", "area", "power")}
    ),
)
def test_the_loss_is_equation_8(seed, form, absent, weights):
    images, labels = blobs(5, seed)
    images, model = images.double(), Linear()
    m, odds = torch.rand(2, 5, generator=seeded(seed), dtype=torch.float64)
    maps, odds = m.view(5, 1, 1, 1).expand(5, 1, 4, 4), 4 * odds - 2
    loss = MaskingLoss(model, form, absent=float(absent), blend=FLAT, **weights)
    masking_model = Fixed(maps, odds)
    terms = loss(masking_model, images, labels, seeded(0))
    expected = by_hand(form, model, images, labels, m, absent, weights)
    (asked,) = masking_model.asked
    assert ((asked == labels) != absent).all()
    p = 1 / (1 + np.exp(-odds.numpy()))
    expected["select"] = -np.log(1 - p if absent else p)
    assert terms.keys() == expected.keys() == TERMS
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name].numpy(), value, rtol=1e-9, atol=1e-9, err_msg=name)


@given(seed=SEEDS, height=st.integers(2, 6), width=st.integers(2, 6), smooth=st.floats(0, 9))
def test_total_variation_by_hand(seed, height, width, smooth):
    maps = torch.rand(3, 1, height, width, generator=seeded(seed), dtype=torch.float64)
    images, labels = blobs(3, seed)
    loss = MaskingLoss(Linear(), smooth=smooth, blend=FLAT)
    terms = loss(Fixed(maps, torch.zeros(3).double()), images.double(), labels, seeded(0))
    m = maps.numpy()
    rough = (np.diff(m, axis=2) ** 2).mean((1, 2, 3)) + (np.diff(m, axis=3) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(terms["smooth"].numpy(), smooth * rough, rtol=1e-12)
    np.testing.assert_allclose(terms["area"].numpy(), loss.area * m.mean((1, 2, 3)), rtol=1e-12)


@pytest.mark.parametrize("form", ["log", "hinge"])
def test_a_map_of_ones_preserves_and_one_of_zeros_destroys(trained_smooth, form):
    images, labels = blobs(8)
    images, odds = images.double(), torch.zeros(8).double()
    loss = MaskingLoss(trained_smooth, form, absent=0.0, power=1.0, blend=FLAT)
    full, empty = (
        loss(Fixed(torch.full((8, 1, 8, 8), v).double(), odds), images, labels, seeded(0))
        for v in (1.0, 0.0)
    )
    if form == "log":
        expected = loss.preserve * F.cross_entropy(trained_smooth(images), labels, reduction="none")
        torch.testing.assert_close(full["preserve"], expected)
    assert full["preserve"].mean() < 0.1 * empty["preserve"].mean()
    assert full["destroy"].mean() < 0.5 * empty["destroy"].mean()


def test_both_images_shown_add_up(model):
    images, labels = blobs(4)
    images, classifier = images.double(), Linear()
    maps = torch.rand(4, 1, 8, 8, generator=seeded(1), dtype=torch.float64)
    blend = Blend()
    loss = MaskingLoss(classifier, absent=0.0, blend=lambda x, generator: blend(x, seeded(5)))
    loss(Fixed(maps, torch.zeros(4).double()), images, labels, seeded(0))
    kept, rest = classifier.seen[0].chunk(2)
    whole, replaced = blend(images, seeded(5))
    large = F.interpolate(maps, (16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(kept, large * whole + (1 - large) * replaced)
    torch.testing.assert_close(rest, (1 - large) * whole + large * replaced)


def test_the_share_of_absent_classes(model):
    images, labels = blobs(400)
    masking_model = Fixed(torch.ones(400, 1, 2, 2), torch.zeros(400))
    MaskingLoss(model, absent=0.3)(masking_model, images, labels, seeded(0))
    share = (masking_model.asked[0] != labels).float().mean().item()
    assert share == pytest.approx(0.3, abs=0.07)


@given(seed=SEEDS, labels=st.lists(st.integers(0, 4), min_size=1, max_size=20))
def test_random_others_are_others(seed, labels):
    labels = torch.tensor(labels)
    others = random_others(labels, 5, seeded(seed))
    assert others.shape == labels.shape
    assert ((others >= 0) & (others < 5) & (others != labels)).all()
    assert torch.equal(random_others(labels, 5, seeded(seed)), others)


def test_random_others_are_equally_likely():
    others = random_others(torch.full((4000,), 2), 5, seeded(0))
    assert (others.bincount(minlength=5) / 4000).tolist() == pytest.approx(
        [0.25, 0.25, 0, 0.25, 0.25], abs=0.03
    )
    assert random_others(torch.tensor([0, 1]), 2, seeded(0)).tolist() == [1, 0]


@pytest.mark.parametrize("form", ["log", "hinge"])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("power", [0.0, 0.3])
def test_terms_and_gradients_are_finite_for_any_classifier(trained, form, scale, power):
    extreme = copy.deepcopy(trained)
    extreme.fc.weight.data.mul_(scale)
    masking_model = masking(trained)
    parameters = [*masking_model.selector.parameters(), *masking_model.decoder.parameters()]
    terms = MaskingLoss(extreme, form, power=power)(masking_model, *blobs(6), seeded(0))
    assert terms.keys() == TERMS
    for name, term in terms.items():
        assert term.shape == (6,), name
        assert term.isfinite().all(), name
        gradients = torch.autograd.grad(
            term.sum(), parameters, retain_graph=True, allow_unused=True
        )
        assert all(g is None or g.isfinite().all() for g in gradients), name


def test_selector_and_decoder_learn_and_the_classifier_does_not(model):
    masking_model = masking(model)
    with nothing_left_behind(model):
        terms = MaskingLoss(model)(masking_model, *blobs(6), seeded(0))
        parameters = [*masking_model.selector.parameters(), *masking_model.decoder.parameters()]
        for gradient in torch.autograd.grad(sum(terms.values()).sum(), parameters):
            assert gradient.any()


@pytest.mark.parametrize(
    ("name", "values"),
    [(n, (-0.1, math.inf)) for n in ("smooth", "area", "destroy", "power", "preserve")]
    + [("absent", (-0.1, 1.1))],
)
def test_the_losss_arguments(model, name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"expected {name} at least"):
            MaskingLoss(model, **{name: value})
    with pytest.raises(TypeError, match=f"expected {name} to be a number"):
        MaskingLoss(model, **{name: "1"})


def test_an_unknown_form_and_another_model(model):
    with pytest.raises(ValueError, match="expected form 'log' or 'hinge', got 'cubic'"):
        MaskingLoss(model, "cubic")
    with pytest.raises(TypeError, match=r"expected model to be a torch\.nn\.Module"):
        MaskingLoss(lambda x: x)


# Training


class Points(torch.utils.data.Dataset):
    """Blobs one by one, with flips drawn from torch's generator; may raise at the n-th look."""

    def __init__(self, count=24, fuse=None):
        self.images, self.labels = blobs(count)
        self.fuse = fuse

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        burn(self)
        image = self.images[index]
        return (image.flip(-1) if torch.rand(()) < 0.5 else image), self.labels[index]


class Batches(list):
    """A list of batches; may raise at the n-th batch."""

    fuse = None

    def __iter__(self):
        for batch in super().__iter__():
            burn(self)
            yield batch


class Burned(Exception):
    pass


def burn(holder):
    if holder.fuse is not None:
        holder.fuse -= 1
        if holder.fuse < 0:
            raise Burned


def loaders(kind):
    """Return a loader of six batches, and what holds its fuse."""
    if kind == "list":
        batches = Batches(blobs(4, seed) for seed in range(6))
        return batches, batches
    points = Points()
    generator = seeded(11) if kind == "generator" else None
    return DataLoader(points, batch_size=4, shuffle=True, generator=generator), points


def stepped():
    """Return an untrained network with two resolutions to be found."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = TinyNet()
        net.body.append(nn.AvgPool2d(2))
    return net.eval()


KINDS = ["list", "shuffled", "generator"]


def learn(model, loader, masking_model=None, **settings):
    settings = {"epochs": 2, "lr": 0.01, "verbose": False} | settings
    masking_model = masking(model) if masking_model is None else masking_model
    return train_masking_model(model, loader, masking_model, **settings)


def weights(masking_model):
    return {name: value.clone() for name, value in masking_model.trained().items()}


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_training_lowers_the_loss(model):
    images, labels = blobs(64, seed=5000)
    loss = MaskingLoss(model, smooth=10.0, area=1.0, destroy=5.0, power=0.3, absent=0.3)
    before = masking(model)

    @torch.no_grad()
    def judge(masking_model):
        return sum(loss(masking_model, images, labels, seeded(0)).values()).mean()

    batches = [blobs(16, seed) for seed in range(20)]
    after = learn(model, batches, copy.deepcopy(before, {id(model): model}), loss=loss)
    assert judge(after) < 0.75 * judge(before)
    encoded = after.encode(images)
    own, other = (after.presence(encoded, target) for target in (labels, (labels + 1) % 4))
    assert (own > other).float().mean() > 0.9


def test_it_is_trained_in_place_and_left_in_eval_mode(model):
    masking_model = masking(model).train()
    before = weights(masking_model)
    assert learn(model, [blobs(4)], masking_model, epochs=1) is masking_model
    assert not masking_model.training
    assert not any(module.training for module in masking_model.decoder.modules())
    after = weights(masking_model)
    assert not any(torch.equal(after[name], before[name]) for name in before)
    assert all(p.grad is None for p in masking_model.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fuse", [None, 0, 15])
@pytest.mark.parametrize("new", [True, False])
def test_nothing_is_left_behind(kind, fuse, new):
    model = mixed(stepped())
    model.fc.bias.grad = torch.ones_like(model.fc.bias)
    loader, holder = loaders(kind)
    holder.fuse = fuse if kind != "list" or not fuse else 4
    masking_model = None if new else masking(model)
    generator = getattr(loader, "generator", None)
    state = generator and generator.get_state()
    with nothing_left_behind(model):
        try:
            train_masking_model(model, loader, masking_model, epochs=1, verbose=False)
        except Burned:
            assert fuse is not None
        else:
            assert fuse is None
    assert torch.equal(model.fc.bias.grad, torch.ones_like(model.fc.bias))
    assert generator is None or torch.equal(generator.get_state(), state)


def test_an_encoder_of_its_own_is_left_alone_and_runs_in_eval_mode(model):
    encoders = [TinyNet(), None]
    encoders[1] = copy.deepcopy(encoders[0]).eval()
    results = []
    for encoder in encoders:
        with nothing_left_behind(encoder), nothing_left_behind(model):
            results.append(weights(learn(model, [blobs(4)] * 2, masking(encoder))))
    assert same(*results)


def test_a_classifier_in_train_mode_runs_in_eval_mode(model):
    classifier = copy.deepcopy(model).train()
    with nothing_left_behind(classifier):
        ours = weights(learn(classifier, [blobs(4)] * 2))
    assert same(ours, weights(learn(model, [blobs(4)] * 2)))


def test_an_exception_in_the_classifier_leaves_it_as_it_was(trained):
    model, runs = mixed(trained), []

    def fail(*_):
        runs.append(1)
        if len(runs) == 6:
            raise KeyError("inside the model")

    masking_model = masking(model)
    model.fc.register_forward_hook(fail)
    with nothing_left_behind(model), pytest.raises(KeyError, match="inside"):
        learn(model, [blobs(4)] * 6, masking_model)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides(kind):
    model = stepped()

    def run(seed, noise):
        torch.manual_seed(noise)
        loader, _ = loaders(kind)
        if noise:
            next(iter(loader))
        made = train_masking_model(model, loader, epochs=1, seed=seed, verbose=False)
        return weights(made)

    first = run(0, 0)
    assert same(run(0, 5), first)
    assert not same(run(1, 0), first)


def test_leftover_gradients_do_not_count(model):
    masking_model = masking(model)
    for parameter in masking_model.decoder.parameters():
        parameter.grad = torch.full_like(parameter, 1e3)
    ours = weights(learn(model, [blobs(4)], masking_model))
    assert same(ours, weights(learn(model, [blobs(4)])))


def test_under_no_grad(model):
    with torch.no_grad():
        ours = weights(learn(model, [blobs(4)] * 2))
        assert not torch.is_grad_enabled()
    assert same(ours, weights(learn(model, [blobs(4)] * 2)))


def test_every_objective_gets_a_step_of_its_own(model):
    seen = []

    def first(masking_model, images, labels, generator):
        seen.append(("first", masking_model.selector.weight.detach().clone()))
        return {"up": -masking_model.selector(labels).sum(dim=1)}

    def second(masking_model, images, labels, generator):
        seen.append(("second", masking_model.selector.weight.detach().clone()))
        return {"down": masking_model.selector(labels).sum(dim=1), "none": 0.0 * labels}

    masking_model = masking(model)
    start = masking_model.selector.weight.detach().clone()
    images, labels = blobs(64)
    fit(
        masking_model,
        [(images, labels)] * 2,
        [first, second],
        frozen=model,
        epochs=1,
        lr=0.1,
        seed=0,
        checkpoint=None,
        verbose=False,
        title="two",
    )
    names, values = zip(*seen, strict=True)
    assert names == ("first", "second") * 2
    assert torch.equal(values[0], start)
    torch.testing.assert_close(values[1], start + 0.1)
    assert not torch.equal(values[2], values[1])


# Checkpoints


@pytest.fixture
def every(monkeypatch):
    monkeypatch.setattr(training, "_EVERY", 3)


def count_steps(monkeypatch):
    """Return a list that grows with every step of the optimiser."""
    steps, real = [], torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam,
        "step",
        lambda self: (steps.append(self.param_groups[0]["lr"]), real(self)),
    )
    return steps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("killed", [0, 1, 2, 3, 5, 6, 7, 8, 9, 11])
def test_a_killed_run_goes_on_to_the_same_weights(
    model, tmp_path, every, monkeypatch, kind, killed
):
    loader, holder = loaders(kind)
    whole, path = tmp_path / "whole", tmp_path / "part"
    expected = weights(learn(model, loader, checkpoint=whole))
    holder.fuse = killed if kind == "list" else 4 * killed + 1
    with pytest.raises(Burned):
        learn(model, loader, checkpoint=path)
    assert path.exists() == (killed >= 3)
    holder.fuse = None
    torch.manual_seed(99)
    steps = count_steps(monkeypatch)
    assert same(
        weights(learn(model, loader, masking(model, seed=5 * (killed >= 3)), checkpoint=path)),
        expected,
    )
    assert len(steps) == 12 - killed // 3 * 3
    ours, theirs = (storage.load(p, "training") for p in (path, whole))
    assert ours["run"] == theirs["run"]
    assert ours["done"] == theirs["done"] == 12
    for state, other in zip(
        ours["optimizer"]["state"].values(), theirs["optimizer"]["state"].values(), strict=True
    ):
        assert same(state, other)


@given(kills=st.lists(st.integers(1, 12), max_size=4))
@settings(max_examples=8)
def test_killed_again_and_again(trained, tmp_path_factory, kills):
    folder = tmp_path_factory.mktemp("kills")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(training, "_EVERY", 2)
        loader, holder = loaders("shuffled")
        expected = weights(learn(trained, loader))
        for kill in kills:
            holder.fuse = 4 * kill + 2
            try:
                learn(trained, loader, checkpoint=folder / "part")
            except Burned:
                continue
        holder.fuse = None
        assert same(weights(learn(trained, loader, checkpoint=folder / "part")), expected)


def test_a_finished_run_trains_nothing_more(model, tmp_path, monkeypatch):
    loader, path = loaders("list")[0], tmp_path / "file"
    expected = weights(learn(model, loader, checkpoint=path))
    steps, content = count_steps(monkeypatch), path.read_bytes()
    assert same(weights(learn(model, loader, masking(model, seed=4), checkpoint=path)), expected)
    assert not steps
    assert path.read_bytes() == content


def test_the_rate_falls_along_a_cosine(model, monkeypatch):
    steps = count_steps(monkeypatch)
    learn(model, [blobs(2)] * 4, lr=0.02)
    expected = [0.01 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert steps == pytest.approx(expected)


@pytest.mark.parametrize(
    "other", [{"epochs": 3}, {"epochs": 1, "twice": True}, {"lr": 0.02}, {"seed": 1}]
)
def test_a_checkpoint_of_another_run(model, tmp_path, other):
    path, masking_model = tmp_path / "file", masking(model)
    learn(model, [blobs(2)], checkpoint=path)
    before, content = weights(masking_model), path.read_bytes()
    loader = [blobs(2)] * (2 if other.pop("twice", False) else 1)
    with pytest.raises(ValueError, match="expected a checkpoint of this training"):
        learn(model, loader, masking_model, checkpoint=path, **other)
    assert same(weights(masking_model), before)
    assert path.read_bytes() == content


@pytest.mark.parametrize("spoil", ["width", "kind", "garbage"])
def test_a_checkpoint_that_does_not_fit(model, tmp_path, spoil):
    path, masking_model = tmp_path / "file", masking(model)
    if spoil == "width":
        learn(model, [blobs(2)], masking(model, width=5), checkpoint=path)
    elif spoil == "kind":
        masking_model.save(path)
    else:
        path.write_bytes(b"garbage")
    before = weights(masking_model)
    messages = {"width": "of this architecture", "kind": "of a masking model", "garbage": "ours"}
    with nothing_left_behind(model), pytest.raises(ValueError, match=messages[spoil]):
        learn(model, [blobs(2)], masking_model, checkpoint=path)
    assert same(weights(masking_model), before)


def test_numbers_of_numpy_in_a_checkpoint(model, tmp_path):
    settings = {"epochs": np.int64(1), "lr": np.float32(0.5), "seed": np.int32(3)}
    for _ in range(2):
        learn(model, [blobs(2)], checkpoint=tmp_path / "file", **settings)


def untrained_run(path, fuse=None):
    """Train on an untrained network, the same in every process; kill the process at a batch."""
    loader, _ = loaders("shuffled")
    training._EVERY = 3
    if fuse is not None:

        class Doomed(Points):
            def __getitem__(self, index):
                try:
                    return super().__getitem__(index)
                except Burned:
                    os.kill(os.getpid(), signal.SIGKILL)

        loader = DataLoader(Doomed(fuse=fuse), batch_size=4, shuffle=True)
    return weights(train_masking_model(stepped(), loader, epochs=2, checkpoint=path, verbose=False))


def test_a_process_that_is_killed(tmp_path, every):
    path, here = tmp_path / "file", Path(__file__).parent
    code = "import sys; from test_training import untrained_run; untrained_run(sys.argv[1], 4 * 8)"
    paths = [here, here.parent, ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert storage.load(path, "training")["done"] == 6
    assert same(untrained_run(path), untrained_run(None))


# Arguments


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ((torch.full((2, 3, 16, 16), 2.0), torch.tensor([0, 1])), ValueError, r"in \[0, 1\]"),
        ((torch.full((2, 3, 16, 16), torch.nan), torch.tensor([0, 1])), ValueError, "finite"),
        ((torch.ones(2, 3, 16, 16).byte(), torch.tensor([0, 1])), TypeError, "floating dtype"),
        ((torch.ones(3, 16, 16), torch.tensor([0])), ValueError, "4 dimensions"),
        ((torch.ones(2, 3, 16, 16), torch.tensor([0, 4])), ValueError, r"labels in \[0, 3\]"),
        ((torch.ones(2, 3, 16, 16), torch.tensor([0, -1])), ValueError, r"labels in \[0, 3\]"),
        ((torch.ones(2, 3, 16, 16), torch.tensor([0])), ValueError, r"labels of shape \(2,\)"),
        ((torch.ones(2, 3, 16, 16), torch.rand(2)), TypeError, "integer dtype"),
    ],
)
def test_bad_batches(model, batch, error, message):
    masking_model = masking(model)
    before = weights(masking_model)
    with nothing_left_behind(model), pytest.raises(error, match=message):
        learn(model, [batch], masking_model)
    assert same(weights(masking_model), before)


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield from zip(*blobs(4), strict=True)


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("loader", [lambda: iter([blobs(2)]), lambda: DataLoader(Endless(), 4)])
def test_a_loader_without_a_length(model, new, loader):
    with nothing_left_behind(model), pytest.raises(TypeError, match="with a length|has no len"):
        train_masking_model(model, loader(), None if new else masking(model), verbose=False)


@pytest.mark.parametrize("new", [True, False])
def test_an_empty_loader(model, new):
    with pytest.raises(ValueError, match="length at least 1, got 0"):
        train_masking_model(model, [], None if new else masking(model), verbose=False)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "expected epochs at least 1"),
        ({"epochs": 1.5}, TypeError, "expected epochs to be an integer"),
        ({"lr": 0.0}, ValueError, "expected lr above 0"),
        ({"lr": "fast"}, TypeError, "expected lr to be a number"),
        ({"seed": -1}, ValueError, "expected seed at least 0"),
        ({"seed": None}, TypeError, "expected seed to be an integer"),
    ],
)
def test_arguments_out_of_range_and_of_another_type(model, arguments, error, message):
    with pytest.raises(error, match=message):
        learn(model, [blobs(2)], **arguments)


def test_models_of_another_type_or_with_other_classes(model):
    with pytest.raises(TypeError, match="expected masking_model to be a MaskingModel, got TinyNet"):
        learn(model, [blobs(2)], model)
    with pytest.raises(TypeError, match=r"expected model to be a torch\.nn\.Module"):
        train_masking_model(lambda x: x, [blobs(2)], masking(model))
    for classes in (3, 6):
        masking_model = masking(model, classes=classes)
        before = weights(masking_model)
        with pytest.raises(ValueError, match=f"classifier's 4 classes, got one for {classes}"):
            learn(model, [(blobs(2)[0], torch.tensor([0, 1]))], masking_model)
        assert same(weights(masking_model), before)


def test_the_bar_shows_every_term_or_nothing(model, capsys):
    learn(model, [blobs(2)])
    assert capsys.readouterr() == ("", "")
    learn(model, [blobs(2)], verbose=True)
    out, err = capsys.readouterr()
    assert not out
    assert all(f"{name}=" in err for name in TERMS)
    assert "2/2" in err

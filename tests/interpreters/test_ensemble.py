# SPDX-License-Identifier: MIT
"""The ensemble: a mean of maps at one resolution, the members' surrogates as one, disagreement."""

from __future__ import annotations

import copy
from itertools import combinations

import captum.attr
import pytest
import torch
import torch.nn.functional as F
from conftest import TinyNet, blobs, untrained
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conformance import Shifted, images64, nothing_left_behind

from captum_adv2 import ADV2, evaluate
from captum_adv2.interpreters import (
    CAM,
    MASK,
    RTS,
    CaptumInterpreter,
    EncoderGuided,
    Ensemble,
    GradCAM,
    Gradient,
    Interpreter,
    Surrogate,
    min_max,
)
from captum_adv2.types import Explanation


class Given(Interpreter):
    """Gives the maps it was made with, for the first images of any batch."""

    def __init__(self, maps):
        super().__init__(None)
        self.shown = maps

    def explain(self, images, target):
        return Explanation(self.shown[: len(images)].to(images), None)


class Walking(Surrogate):
    """Looks ahead some steps; counts what it is told."""

    def __init__(self, maps):
        self.maps, self.told = maps, []

    def advance(self, images):
        self.told.append(images)

    def __call__(self, images):
        return Explanation(self.maps + 0 * images.sum(), None)


def given_maps(*sizes, count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(count, 1, *size, generator=generator) for size in sizes]


def ask(count=2):
    return torch.rand(count, 3, 8, 8), torch.zeros(count, dtype=torch.long)


sides = st.tuples(st.integers(1, 12), st.integers(1, 12))
lists = st.lists(sides, min_size=2, max_size=4)


# The map


@given(sizes=lists, seed=st.integers(0, 99), data=st.data())
def test_the_map_is_the_weighted_mean_at_the_finest_resolution(sizes, seed, data):
    maps = given_maps(*sizes, seed=seed)
    weights = [data.draw(st.floats(0.1, 10)) for _ in sizes]
    found = Ensemble([Given(m) for m in maps], weights)(*ask())
    finest = tuple(max(side) for side in zip(*sizes, strict=True))
    resized = [F.interpolate(m, finest, mode="bilinear", align_corners=False) for m in maps]
    total = sum(weights)
    expected = sum(w / total * m for w, m in zip(weights, resized, strict=True))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert found.min() >= 0
    assert found.max() <= 1 + 1e-6


@given(sizes=lists, order=st.randoms(use_true_random=False), factor=st.floats(0.01, 100))
def test_neither_order_nor_unit_of_the_weights_matters(sizes, order, factor):
    members = [Given(m) for m in given_maps(*sizes)]
    weights = [1.0 + i for i in range(len(members))]
    first = Ensemble(members, weights)(*ask())
    torch.testing.assert_close(Ensemble(members, [factor * w for w in weights])(*ask()), first)
    both = list(zip(members, weights, strict=True))
    order.shuffle(both)
    again = Ensemble(*zip(*both, strict=True))(*ask())
    torch.testing.assert_close(again, first)


def test_one_member_twice_is_the_member(model, data):
    cam = CAM(model)
    assert torch.equal(Ensemble([cam, cam])(*data), cam(*data))
    torch.testing.assert_close(Ensemble([cam] * 3, [1, 2, 3])(*data), cam(*data))
    assert not Ensemble([cam, cam]).disagreement(*data).any()


def test_a_weight_of_zero_leaves_a_member_out_of_the_map_not_of_the_disagreement(model, data):
    members = [CAM(model), GradCAM(model), Gradient(model)]
    found = Ensemble(members, [0, 0, 3])
    torch.testing.assert_close(found(*data), Gradient(model)(*data))
    assert torch.equal(found.disagreement(*data), Ensemble(members).disagreement(*data))


def test_raw_members_stay_raw(model, data):
    rts, cam = RTS(model, untrained(model)), CAM(model)
    found = Ensemble([rts, cam])(*data)
    torch.testing.assert_close(found, (rts(*data) + cam(*data)) / 2)
    assert not Ensemble([cam, cam]).scaled


@pytest.mark.parametrize("size", [3, (3, 3), (5, 9), 16, [4, 4]])
def test_a_size_given(model, data, size):
    ensemble = Ensemble([CAM(model), Gradient(model, pool=1)], size=size)
    expected = (size, size) if isinstance(size, int) else tuple(size)
    assert ensemble(*data).shape == (6, 1, *expected)
    assert ensemble.surrogate(*data)(data[0]).maps.shape == (6, 1, *expected)
    assert ensemble.disagreement(*data).shape == (6,)


def test_no_pixel_is_lost_on_the_way_down():
    # A single pixel that lies between the points a plain interpolation looks at.
    for row in range(12):
        maps = torch.zeros(1, 1, 12, 12)
        maps[0, 0, row, 5] = 1
        found = Ensemble([Given(maps), Given(maps)], size=3)(*ask(1))
        assert found.sum() == pytest.approx(1 / 16, abs=0.02)


def test_resizing_keeps_constants():
    for size in (2, 5, 9):
        members = [Given(torch.full((2, 1, *s), 0.3)) for s in ((4, 4), (7, 3))]
        found = Ensemble(members, size=size)(*ask())
        torch.testing.assert_close(found, torch.full((2, 1, size, size), 0.3))


@pytest.mark.parametrize("size", [None, 5])
def test_gradcheck(smooth, size):
    members = [CAM(smooth), Gradient(smooth, pool=1), RTS(smooth, untrained(smooth).double())]
    ensemble, label = Ensemble(members, [1, 2, 3], size), torch.tensor([0, 2])
    x = images64(2).requires_grad_()
    for maps in (
        lambda x: ensemble.explain(x, label).maps,
        lambda x: ensemble.surrogate(x, label)(x).maps,
        lambda x: ensemble.disagreement(x.clamp(0, 1), label),
    ):
        assert torch.autograd.gradcheck(maps, (x,), check_undefined_grad=False, fast_mode=True)


def test_half_precision_of_autocast(model, data):
    ensemble = Ensemble([CAM(model), Gradient(model)], size=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = ensemble(*data)
        apart = ensemble.disagreement(*data)
    assert (maps.float() - ensemble(*data)).abs().mean() < 0.1
    assert (apart.float() - ensemble.disagreement(*data)).abs().mean() < 0.1


# Logits, and how often the model runs


def passes(model, call):
    count = []
    handle = model.register_forward_hook(lambda *_: count.append(1))
    call()
    handle.remove()
    return len(count)


def test_logits_are_the_first_members_that_has_some(model, data):
    mask = MASK(model, size=4, iterations=2, jitter=0)  # its explanation has none
    x = data[0].clone().requires_grad_()
    for ensemble in (Ensemble([mask, CAM(model)]), Ensemble([CAM(model), Gradient(model), mask])):
        logits = ensemble.explain(x, data[1]).logits
        assert torch.equal(logits, model(data[0]))
        assert logits.requires_grad
    assert Ensemble([mask, mask]).explain(*data).logits is None


def test_the_model_runs_as_often_as_the_members_run_it(trained, data):
    model = copy.deepcopy(trained)
    members = [CAM(model), Gradient(model), MASK(model, size=4, iterations=3, jitter=0)]
    ensemble = Ensemble(members)
    for g in (*members, ensemble):
        g(*data)  # the first call of some checks more
    expected = sum(passes(model, lambda g=g: g(*data)) for g in members)
    assert passes(model, lambda: ensemble(*data)) == expected
    assert passes(model, lambda: ensemble.disagreement(*data)) == expected
    assert passes(model, lambda: ensemble.maps(*data)) == expected


# The attacker's view


def test_the_surrogate_is_the_members_advanced_together():
    maps = given_maps((4, 4), (4, 4))
    parts = [Walking(m) for m in maps]

    class Led(Interpreter):
        def __init__(self, part):
            super().__init__(None)
            self.part = part

        def explain(self, images, target):
            raise AssertionError

        def surrogate(self, images, target):
            assert torch.equal(target, torch.tensor([2, 1]))
            return self.part

    images = torch.rand(2, 3, 8, 8)
    follower = Ensemble([Led(part) for part in parts]).surrogate(images, torch.tensor([2, 1]))
    for turn in range(3):
        follower.advance(images + turn)
    for part in parts:
        assert len(part.told) == 3
        assert all(torch.equal(x, images + turn) for turn, x in enumerate(part.told))
    torch.testing.assert_close(follower(images).maps, (maps[0] + maps[1]) / 2)


def test_members_that_look_ahead():
    first, second, third = torch.rand(2, 1, 4, 4), torch.rand(2, 3, 8, 8), torch.rand(2, 2, 8, 8)
    parts = [Walking(maps) for maps in (first, second, third)]
    found = Ensemble([Given(first)] * 3).join([part(torch.rand(2, 3, 8, 8)) for part in parts]).maps
    up = F.interpolate(first, (8, 8), mode="bilinear", align_corners=False)
    assert found.shape == (2, 3, 8, 8)
    for step in range(3):
        expected = (up[:, 0] + second[:, step] + third[:, min(step, 1)]) / 3
        torch.testing.assert_close(found[:, step], expected)


def test_penalties_add_up(model):
    images, target = blobs(3)
    masking = [untrained(TinyNet(), seed=seed) for seed in (1, 2)]
    members = [RTS(model, own) for own in masking]
    ensemble = Ensemble([*members, CAM(model)])
    found = ensemble.surrogate(images, target)(images).penalty
    expected = sum(EncoderGuided()(rts, images, target)(images).penalty for rts in members)
    torch.testing.assert_close(found, expected)
    assert ensemble.explain(images, target).penalty is None
    assert Ensemble([CAM(model), Gradient(model)]).surrogate(images, target)(images).penalty is None


def test_the_surrogates_gradient_is_the_mean_of_the_members(model, data):
    images, target = data
    x = images.clone().requires_grad_()
    members = [CAM(model), Gradient(model), MASK(model, size=8, iterations=3, jitter=0)]

    def gradient(interpreter):
        follower = interpreter.surrogate(images, target)
        follower.advance(images)
        maps = follower(x).maps
        weights = torch.linspace(-1, 1, maps.numel()).view_as(maps)
        return torch.autograd.grad((weights * maps).sum(), x)[0]

    expected = sum(map(gradient, members)) / 3
    found = gradient(Ensemble(members))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("raw", [False, True])
def test_adv2_fools_an_ensemble(model, raw):
    images, labels = blobs(8, seed=42)
    target = (labels + 1) % 4
    last = RTS(model, untrained(model)) if raw else Gradient(model)
    ensemble = Ensemble([CAM(model), last])
    reports = []
    for g in (ensemble, CAM(model)):
        attack = ADV2(model, g, eps=0.2, alpha=0.02, steps=40)
        attack.set_mode_targeted_by_label(quiet=True)
        reports.append(evaluate(model, ensemble, images, attack(images, target), target))
    ours, other = reports
    assert ours.success.all()
    # Nearer to the ensemble's benign map than an attack on one of its members.
    assert ours.l1.mean() < other.l1.mean()


def test_an_attack_under_torchattacks_normalisation(model, data):
    images, labels = data
    ensemble = Ensemble([CAM(model), Gradient(model)])
    after = ensemble.after(Shifted())
    x = images.clone()
    expected = (
        CAM(model).after(Shifted())(x, labels) + Gradient(model).after(Shifted())(x, labels)
    ) / 2
    torch.testing.assert_close(after(images, labels), expected)
    assert torch.equal(after.logits(images), model(Shifted()(images)))
    twice = Ensemble([after, after])  # ensembles of ensembles
    torch.testing.assert_close(twice(images, labels), expected)
    assert torch.equal(ensemble(images, labels), Ensemble([CAM(model), Gradient(model)])(*data))


# Disagreement


@given(sizes=lists, seed=st.integers(0, 99))
def test_disagreement_is_the_mean_distance_of_the_pairs(sizes, seed):
    maps = given_maps(*sizes, seed=seed)
    found = Ensemble([Given(m) for m in maps]).disagreement(*ask())
    finest = tuple(max(side) for side in zip(*sizes, strict=True))
    scaled = [F.interpolate(min_max(m), finest, mode="bilinear", align_corners=False) for m in maps]
    pairs = [(a - b).abs().flatten(1).mean(dim=1) for a, b in combinations(scaled, 2)]
    assert len(pairs) == len(sizes) * (len(sizes) - 1) // 2
    torch.testing.assert_close(found, sum(pairs) / len(pairs), rtol=0, atol=1e-5)
    assert (found >= 0).all()
    assert (found <= 1).all()


@settings(max_examples=10)
@given(scale=st.floats(0.1, 1), shift=st.floats(0, 0.5), seed=st.integers(0, 99))
def test_disagreement_looks_past_scale_and_shift(scale, shift, seed):
    first, second = given_maps((5, 5), (5, 5), seed=seed)
    plain = Ensemble([Given(first), Given(second)]).disagreement(*ask())
    moved = Given(scale * second / 2 + shift)
    found = Ensemble([Given(first), moved]).disagreement(*ask())
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_members_without_an_opinion_agree(value):
    members = [Given(torch.full((2, 1, *size), value)) for size in ((1, 1), (7, 3), (10, 9))]
    assert not Ensemble(members).disagreement(*ask()).any()


def test_opposite_maps_disagree_wholly():
    maps = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    found = Ensemble([Given(maps), Given(1 - maps)]).disagreement(*ask(1))
    assert found.tolist() == [1.0]


def test_disagreement_and_maps_of_a_batch_are_those_of_its_images(model, data):
    images, labels = data
    ensemble = Ensemble([CAM(model), Gradient(model), RTS(model, untrained(model))])
    singles = [ensemble.disagreement(images[i : i + 1], labels[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(
        ensemble.disagreement(images, labels), torch.cat(singles), rtol=0, atol=1e-5
    )
    shown = ensemble.maps(images, labels)
    assert len(shown) == 3
    for maps, member in zip(shown, ensemble.interpreters, strict=True):
        assert torch.equal(maps, member(images, labels))


def test_disagreement_leaves_nothing_behind(trained, data):
    images, labels = data
    model = copy.deepcopy(trained).train()
    model.norm.eval()
    expected = Ensemble([CAM(trained), Gradient(trained)]).disagreement(images, labels)
    ensemble = Ensemble([CAM(model), Gradient(model)])
    with nothing_left_behind(model, images):
        found = ensemble.disagreement(images, labels)
    assert torch.equal(found, expected)
    handle = model.fc.register_forward_hook(lambda *_: 1 / 0)
    for call in (ensemble.disagreement, ensemble.maps, ensemble):
        with nothing_left_behind(model, images), pytest.raises(ZeroDivisionError):
            call(images, labels)
    handle.remove()


def test_a_term_of_the_attackers_loss_makes_members_agree(model):
    images, labels = blobs(6, seed=42)
    target = (labels + 1) % 4
    ensemble = Ensemble([CAM(model), Gradient(model)])

    def agreement(candidate):
        return 100 * ensemble.disagreement(candidate.images.clamp(0, 1), candidate.target)

    found = []
    for terms in ((), (agreement,)):
        attack = ADV2(model, ensemble, eps=0.2, alpha=0.02, steps=30, terms=terms, keep="final")
        attack.set_mode_targeted_by_label(quiet=True)
        adversarial = attack(images, target)
        assert (model(adversarial).argmax(dim=1) == target).all()
        found.append(ensemble.disagreement(adversarial, target).mean())
    assert found[1] < 0.8 * found[0]


# Bad input


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda m: Ensemble([]), ValueError, "expected two interpreters or more, got 0"),
        (lambda m: Ensemble([CAM(m)]), ValueError, "expected two interpreters or more, got 1"),
        (lambda m: Ensemble(CAM(m)), TypeError, "expected a sequence of interpreters, got CAM"),
        (lambda m: Ensemble([CAM, CAM]), TypeError, r"got ABCMeta; build each member on the model"),
        (lambda m: Ensemble([CAM(m), m]), TypeError, "expected interpreters in an ensemble, got T"),
        (
            lambda m: Ensemble([CAM(m), CAM(copy.deepcopy(m))]),
            ValueError,
            "of the same model, got ones built on a TinyNet and on another TinyNet; build all on",
        ),
        (lambda m: Ensemble([CAM(m)] * 2, [1]), ValueError, "expected 2 weights, one a member"),
        (lambda m: Ensemble([CAM(m)] * 2, [0, 0]), ValueError, "with a positive sum, got zeros"),
        (lambda m: Ensemble([CAM(m)] * 2, [1, -1]), ValueError, "expected weights at least 0"),
        (lambda m: Ensemble([CAM(m)] * 2, ["a", 1]), TypeError, "expected weights to be a number"),
        (lambda m: Ensemble([CAM(m)] * 2, size=0), ValueError, "expected size at least 1, got 0"),
        (lambda m: Ensemble([CAM(m)] * 2, size=(3, 0)), ValueError, "expected size at least 1"),
        (lambda m: Ensemble([CAM(m)] * 2, size=(3,)), TypeError, "expected size to be an integer"),
        (lambda m: Ensemble([CAM(m)] * 2, size=2.5), TypeError, "expected size to be an integer"),
        (lambda m: Ensemble([CAM(m)] * 2, size=True), TypeError, "expected size to be an integer"),
    ],
)
def test_arguments(model, build, error, message):
    with nothing_left_behind(model), pytest.raises(error, match=message):
        build(model)


@pytest.mark.parametrize("method", ["maps", "disagreement"])
def test_images_and_classes(model, data, method):
    images, labels = data
    call = getattr(Ensemble([CAM(model), Gradient(model)]), method)
    with pytest.raises(ValueError, match=r"expected images in \[0, 1\]"):
        call(images * 255, labels)
    with pytest.raises(ValueError, match=r"expected target of shape \(6,\)"):
        call(images, labels[:2])


def test_an_interpreter_of_a_function_goes_with_any_model(model, data):
    saliency = CaptumInterpreter(captum.attr.Saliency(lambda x: model(x)))
    assert saliency.model is None
    ensemble = Ensemble([saliency, CAM(model)])
    assert ensemble.model is model
    assert ensemble(*data).shape == (6, 1, 16, 16)
    assert Ensemble([saliency, saliency]).model is None


def test_text(model):
    assert repr(Ensemble([CAM(model), Gradient(model)])) == (
        "Ensemble(CAM(TinyNet), Gradient(TinyNet))"
    )

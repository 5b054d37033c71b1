# SPDX-License-Identifier: MIT
"""The ensemble: a mean of maps at one resolution, its members' surrogates, their disagreement."""

import copy
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from conftest import TinyNet, blobs, untrained
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_adv2 import ADV2
from captum_adv2.interpreters import (
    CAM,
    MASK,
    RTS,
    EncoderGuided,
    Ensemble,
    Explanation,
    Gradient,
    Interpreter,
    Surrogate,
)
from captum_adv2.interpreters.base import min_max


class Given(Interpreter):
    """Returns the maps it was made with, for the first images of any batch."""

    def __init__(self, maps):
        super().__init__(None)
        self.shown = maps

    def explain(self, images, target):
        return Explanation(self.shown[: len(images)].to(images), None)


def given_maps(*sizes, count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(count, 1, *size, generator=generator) for size in sizes]


def batch(count=2):
    return torch.rand(count, 3, 8, 8), torch.zeros(count, dtype=torch.long)


def bilinear(maps, size):
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


sides = st.tuples(st.integers(1, 12), st.integers(1, 12))
lists = st.lists(sides, min_size=2, max_size=4)


# The map


@given(sizes=lists, factor=st.floats(0.01, 100), seed=st.integers(0, 99), data=st.data())
def test_the_map_is_the_weighted_mean_at_the_finest_resolution(sizes, factor, seed, data):
    maps = given_maps(*sizes, seed=seed)
    weights = [data.draw(st.floats(0, 10)) for _ in sizes]
    weights[-1] += 0.1
    found = Ensemble([Given(m) for m in maps], [factor * w for w in weights])(*batch())
    finest = tuple(max(side) for side in zip(*sizes, strict=True))
    total = sum(weights)
    expected = sum(w / total * bilinear(m, finest) for w, m in zip(weights, maps, strict=True))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert found.min() >= 0
    assert found.max() <= 1 + 1e-6


@given(size=st.integers(1, 9) | sides, sizes=lists)
def test_resizing_to_a_given_size_keeps_constants(size, sizes):
    members = [Given(torch.full((2, 1, *s), 0.3)) for s in sizes]
    found = Ensemble(members, size=size)(*batch())
    expected = torch.full((2, 1, *((size, size) if isinstance(size, int) else size)), 0.3)
    torch.testing.assert_close(found, expected)
    assert not Ensemble(members).disagreement(*batch()).any()


def test_a_smaller_size_averages_over_all_pixels():
    for row in range(12):
        maps = torch.zeros(1, 1, 12, 12)
        maps[0, 0, row, 5] = 1
        found = Ensemble([Given(maps), Given(maps)], size=3)(*batch(1))
        torch.testing.assert_close(found, F.avg_pool2d(maps, 4))


@pytest.mark.parametrize("size", [None, 5])
def test_gradcheck(smooth, size):
    members = [CAM(smooth), Gradient(smooth, pool=1), RTS(smooth, untrained(smooth).double())]
    ensemble, label = Ensemble(members, [1, 2, 3], size), torch.tensor([0, 2])
    generator = torch.Generator().manual_seed(7)
    x = torch.rand(2, 3, 6, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    for maps in (
        lambda x: ensemble.surrogate(ensemble, x, (label,) * 3, 0.0).maps,
        lambda x: ensemble.disagreement(x.clamp(0, 1), label),
    ):
        assert torch.autograd.gradcheck(maps, (x,), check_undefined_grad=False, fast_mode=True)


# Logits, and how often the model runs


def test_logits_are_those_of_the_first_member_that_has_some(model, data):
    mask = MASK(model, size=4, iterations=2, jitter=0)  # its explanation has none
    x = data[0].clone().requires_grad_()
    for members in ([mask, CAM(model)], [CAM(model), Gradient(model), mask]):
        logits = Ensemble(members).explain(x, data[1]).logits
        torch.testing.assert_close(logits, model(data[0]))
        assert logits.requires_grad
    assert Ensemble([mask, mask]).explain(*data).logits is None


def test_the_model_runs_only_as_often_as_the_members_run_it(trained, data):
    model, passes = copy.deepcopy(trained), []
    model.register_forward_hook(lambda *_: passes.append(1))
    members = [CAM(model), Gradient(model), MASK(model, size=4, iterations=3, jitter=0)]
    ensemble = Ensemble(members)

    def count(call):
        passes.clear()
        call(*data)
        return len(passes)

    expected = sum(map(count, members))
    assert count(ensemble) == count(ensemble.disagreement) == count(ensemble.maps) == expected


# The surrogate


class Walking(Surrogate):
    """Looks ahead some steps; its state is the classes, and the images and progress so far."""

    def __init__(self, maps):
        self.maps = maps

    def init(self, interpreter, images, target):
        return target, ()

    def advance(self, interpreter, images, state, progress):
        return state[0], (*state[1], (images, progress))

    def __call__(self, interpreter, images, state, progress):
        return Explanation(self.maps + 0 * images.sum(), None)


def test_the_surrogate_advances_every_member_and_joins_their_maps():
    shapes = ((2, 1, 4, 4), (2, 3, 8, 8), (2, 2, 8, 8))
    parts = [torch.rand(shape) for shape in shapes]
    members = [Given(part) for part in parts]
    for member, part in zip(members, parts, strict=True):
        member.surrogate = Walking(part)
    ensemble, (images, target) = Ensemble(members), batch()
    surrogate = ensemble.surrogate
    state = surrogate.init(ensemble, images, target)
    for turn in range(3):
        state = surrogate.advance(ensemble, images + turn, state, turn / 3)
    for classes, seen in state:
        assert torch.equal(classes, target)
        assert [progress for _, progress in seen] == [0, 1 / 3, 2 / 3]
        assert all(torch.equal(x, images + turn) for turn, (x, _) in enumerate(seen))
    maps = surrogate(ensemble, images, state, 0.0).maps
    first, second, third = (bilinear(part, (8, 8)) for part in parts)
    assert maps.shape == (2, 3, 8, 8)
    for step in range(3):  # members that look less far ahead keep their last map
        expected = (first[:, 0] + second[:, step] + third[:, min(step, 1)]) / 3
        torch.testing.assert_close(maps[:, step], expected)


def test_penalties_add_up(model):
    images, target = blobs(3)
    guided = [RTS(model, untrained(TinyNet(), seed=seed)) for seed in (1, 2)]
    expected = sum(EncoderGuided()(rts, images, target, 0.0).penalty for rts in guided)
    for members, penalty in (([*guided, CAM(model)], expected), ([CAM(model)] * 2, None)):
        ensemble = Ensemble(members)
        state = ensemble.surrogate.init(ensemble, images, target)
        found = ensemble.surrogate(ensemble, images, state, 0.0).penalty
        torch.testing.assert_close(found, penalty)


def test_the_surrogates_gradient_is_the_mean_of_the_members(smooth):
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    members = [CAM(smooth), Gradient(smooth), MASK(smooth, size=4, iterations=3, jitter=0)]

    def gradient(interpreter):
        surrogate, leaf = interpreter.surrogate, images.clone().requires_grad_()
        state = surrogate.init(interpreter, images, torch.tensor([2, 1]))
        state = surrogate.advance(interpreter, images, state, 0.0)
        maps = surrogate(interpreter, leaf, state, 0.0).maps
        maps = bilinear(maps, (8, 8))
        weights = torch.linspace(-1, 1, maps.numel()).view_as(maps)
        return torch.autograd.grad((weights * maps).sum(), leaf)[0]

    # MASK's gradient is scaled by the norm of the gradient on its map: linear in that, too.
    expected = sum(map(gradient, members)) / 3
    torch.testing.assert_close(gradient(Ensemble(members, size=8)), expected)


def test_adv2_brings_the_map_near_its_target(model):
    images, labels = blobs(8, seed=42)
    target, ensemble = (labels + 1) % 4, Ensemble([CAM(model), Gradient(model)])
    distances = []
    for warmup in (0, 40):  # the latter is an attack on the prediction alone
        attack = ADV2(model, ensemble, eps=0.2, alpha=0.02, steps=40, warmup=warmup)
        attack.set_mode_targeted_by_label(quiet=True)
        adversarial = attack(images, target)
        assert (model(adversarial).argmax(dim=1) == target).all()
        apart = ensemble(adversarial, target) - ensemble(images, labels)
        distances.append(apart.abs().mean())
    assert distances[0] < 0.6 * distances[1]


# Disagreement


@given(sizes=lists, seed=st.integers(0, 99))
def test_disagreement_is_the_mean_distance_of_the_pairs(sizes, seed):
    maps = given_maps(*sizes, seed=seed)
    found = Ensemble([Given(m) for m in maps]).disagreement(*batch())
    finest = tuple(max(side) for side in zip(*sizes, strict=True))
    scaled = [bilinear(min_max(m), finest) for m in maps]
    pairs = [(a - b).abs().flatten(1).mean(dim=1) for a, b in combinations(scaled, 2)]
    torch.testing.assert_close(found, sum(pairs) / len(pairs), rtol=0, atol=1e-5)
    assert ((found >= 0) & (found <= 1)).all()


@settings(max_examples=10)
@given(scale=st.floats(0.1, 1), shift=st.floats(0, 0.5), seed=st.integers(0, 99))
def test_disagreement_is_invariant_to_scale_and_shift(scale, shift, seed):
    first, second = given_maps((5, 5), (5, 5), seed=seed)
    plain = Ensemble([Given(first), Given(second)]).disagreement(*batch())
    found = Ensemble([Given(first), Given(scale * second / 2 + shift)]).disagreement(*batch())
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-4)


# Arguments


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda m: Ensemble([]), "expected two interpreters or more, got 0"),
        (lambda m: Ensemble([CAM(m)]), "expected two interpreters or more, got 1"),
        (lambda m: Ensemble([CAM(m), CAM(TinyNet())]), "of the same model, got a TinyNet and an"),
        (lambda m: Ensemble([CAM(m)] * 2, [1]), "expected 2 weights, one an interpreter"),
        (lambda m: Ensemble([CAM(m)] * 2, [0, 0]), "with a positive sum"),
    ],
)
def test_members_and_weights_that_do_not_go_together(model, build, message):
    with pytest.raises(ValueError, match=message):
        build(model)


def test_members_of_an_unknown_model_fit_any(model):
    other = Given(torch.rand(2, 1, 4, 4))
    assert Ensemble([other, CAM(model)]).model is model
    assert Ensemble([other, other]).model is None

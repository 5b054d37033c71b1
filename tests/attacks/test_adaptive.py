# SPDX-License-Identifier: MIT
"""Adaptive attacks: their terms in closed form, and the two stages of Algorithm 2 one by one."""

import numpy as np
import pytest
import torch
from attack_helpers import noting, shifted, targeted
from conftest import TinyNet
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from captum_adv2 import ADV2, BitDepthADV2
from captum_adv2.attacks import Candidate, Squeezing
from captum_adv2.attacks.adaptive import Matching
from captum_adv2.defenses import BitDepth, MedianSmoothing, NonLocalMeans
from captum_adv2.interpreters import CAM, Gradient

CLASSES = 4
SEEDS = st.integers(0, 2**32 - 1)


def probabilities(model, images):
    with torch.no_grad():
        return model(images).softmax(dim=1)


def softmax(model, images):
    """Return probabilities by NumPy."""
    logits = model(images).detach().numpy()
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def candidate(logits, images=None):
    maps, target = torch.zeros(len(logits), 1, 2, 2).to(logits), logits.argmin(dim=1)
    images, rows = maps if images is None else images, torch.arange(len(logits))
    return Candidate(images, logits, maps, target, maps, 0.5, rows)


def darker(images):
    return 0.5 * images


def blurred(images):
    return nn.functional.avg_pool2d(images, 3, 1, 1)


# Squeezing

WEIGHTS = st.sampled_from([0.0, 0.5, 3.0])


def noise(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(6, 3, 16, 16, generator=generator, dtype=torch.float64)


@given(seed=SEEDS, weight=WEIGHTS, count=st.integers(1, 3))
def test_cross_entropies_add_up(trained_smooth, seed, weight, count):
    x, squeezers = noise(seed), (darker, blurred, torch.square)[:count]
    found = Squeezing(trained_smooth, squeezers, weight)(candidate(trained_smooth(x), x))
    ours = softmax(trained_smooth, x)
    theirs = [softmax(trained_smooth, squeeze(x)) for squeeze in squeezers]
    expected = weight * sum(-(ours * np.log(each)).sum(axis=1) for each in theirs)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-9, atol=1e-12)


@given(
    seed=SEEDS,
    weight=WEIGHTS,
    thresholds=st.tuples(*[st.floats(0.0, 2.0)] * 2),
    share=st.floats(0.0, 1.0),
)
def test_hinges_add_up(trained_smooth, seed, weight, thresholds, share):
    x, squeezers = noise(seed), (darker, blurred)
    term = Squeezing(trained_smooth, squeezers, weight, thresholds, share)
    ours, expected = softmax(trained_smooth, x), np.zeros(len(x))
    for squeeze, threshold in zip(squeezers, thresholds, strict=True):
        distance = np.abs(ours - softmax(trained_smooth, squeeze(x))).sum(axis=1)
        expected += weight * np.maximum(0, distance - share * threshold)
    found = term(candidate(trained_smooth(x), x))
    # Thresholds are in float32.
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=1e-6)


def test_each_squeezer_has_a_threshold(model, data):
    term = Squeezing(model, (darker, blurred), thresholds=(0.1,))
    with pytest.raises(RuntimeError, match="invalid for input of size 1"):
        term(candidate(model(data[0]), data[0]))


def test_all_copies_take_one_forward_pass(model, data):
    images, sizes = candidate(model(data[0]), data[0]), []
    handle = model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    try:
        Squeezing(model, [darker, blurred, torch.square])(images)
    finally:
        handle.remove()
    assert sizes == [3 * 6]


SQUEEZERS = [
    BitDepth(3, straight_through=True),
    MedianSmoothing(2),
    MedianSmoothing(3),
    NonLocalMeans(3, 3, 4.0),
]


@pytest.mark.parametrize("thresholds", [None, (0.0,)])
@pytest.mark.parametrize("squeezer", [*SQUEEZERS, BitDepth(3)], ids=repr)
def test_the_gradient_goes_through_the_squeezer(trained_smooth, data, squeezer, thresholds):
    x = data[0].double().requires_grad_()
    term = Squeezing(trained_smooth, (squeezer,), thresholds=thresholds)
    losses = term(candidate(trained_smooth(x.detach()), x))  # the path of the copy alone
    gradient = None
    if losses.requires_grad:
        (gradient,) = torch.autograd.grad(losses.sum(), x, allow_unused=True)
    if squeezer == BitDepth(3):  # rounding has no derivative
        assert gradient is None or not gradient.any()
    else:
        assert gradient.isfinite().all()
        assert gradient.flatten(1).any(dim=1).all()


@pytest.mark.parametrize("thresholds", [None, (0.001,)])
def test_the_gradient_is_of_both_predictions(thresholds):
    net = TinyNet(nn.SiLU, width=2).double().eval()
    x = torch.rand(1, 3, 4, 4).double().requires_grad_()
    term = Squeezing(net, (torch.square,), thresholds=thresholds)
    assert torch.autograd.gradcheck(lambda x: term(candidate(net(x), x)), (x,))


@pytest.mark.parametrize("squeezer", SQUEEZERS, ids=repr)
def test_an_attack_makes_the_predictions_agree(trained_smooth, data, squeezer):
    images = data[0].double()
    between = (images + images.roll(1, dims=0)) / 2  # where the model is not sure
    term = Squeezing(trained_smooth, (squeezer,))

    def nothing(candidate):
        return 0 * candidate.logits.sum(dim=1)

    settings = {"prediction": nothing, "interpretation": nothing, "warmup": 0, "keep": "final"}
    attack = ADV2(trained_smooth, CAM, eps=0.1, alpha=0.01, steps=20, terms=(term,), **settings)
    before, after = (
        term(candidate(trained_smooth(x), x)).detach() for x in (between, attack(between))
    )
    assert (after < 0.5 * before).all()  # they are a tenth and less


# Matching


@pytest.mark.parametrize(
    ("weight", "slack", "expected"),
    [
        (1.0, 0.0, [0.0, 2.0, 0.5]),
        (3.0, 0.0, [0.0, 6.0, 1.5]),
        (2.0, 0.25, [0.0, 3.5, 0.5]),
        (2.0, 0.5, [0.0, 3.0, 0.0]),
        (1.0, 2.0, [0.0, 0.0, 0.0]),
    ],
)
def test_matching_by_hand(weight, slack, expected):
    logits = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, np.log(3.0)]]).double()
    wanted = torch.tensor([[0.5, 0.5], [0.0, 1.0], [0.5, 0.5]]).double()
    whole, term = candidate(logits), Matching(wanted, weight, slack)
    torch.testing.assert_close(term(whole), torch.tensor(expected).double())
    # Of the images that are not finished, by their rows; without rows, of all.
    part = whole._replace(logits=logits[1:], rows=torch.tensor([1, 2]))
    torch.testing.assert_close(term(part), torch.tensor(expected[1:]).double())
    torch.testing.assert_close(term(whole._replace(rows=None)), term(whole))


# Stage 1


def first_stage(attack, images, labels):
    """Return the images that stage 1 finds, and those it shows the model."""
    request, shown = attack.second._request(images, labels), []
    handle = attack.model.register_forward_pre_hook(lambda module, args: shown.append(args[0]))
    try:
        return attack._first(request), [images.detach() for images in shown]
    finally:
        handle.remove()


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("eps", [0.0, 0.03, 0.2, 1.0])
def test_the_first_stage_stays_on_the_grid_between_the_squeezed_ends(model, data, bits, eps):
    images, levels = data[0], 2**bits - 1
    attack = targeted(BitDepthADV2(ADV2(model, CAM, eps=eps, steps=2), bits, steps=4))
    found, shown = first_stage(attack, *data)
    assert torch.equal(shown[0], (images * levels).round() / levels)
    low, high = (((images + e).clamp(0, 1) * levels).round() for e in (-eps, eps))
    for seen in (*shown, found):
        level = (seen * levels).round()
        torch.testing.assert_close(seen * levels, level, rtol=0, atol=1e-4)
        assert ((level >= low) & (level <= high)).all()
    # Stage 2 is in the ball around the clean images, not around the squeezed ones.
    adversarial = attack(*data)
    assert (adversarial - images).abs().max() <= eps + 2e-7
    assert ((adversarial >= 0) & (adversarial <= 1)).all()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("eps", "steps"), [(1.0, 1), (0.1, 100), (0.25, 100)])
def test_the_first_stage_takes_levels_up_to_the_squeezed_ends(bits, eps, steps):
    weight = torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]])
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    net[1].weight.data = weight
    attack = BitDepthADV2(ADV2(net, Gradient, eps=eps, steps=1), bits, steps=steps)
    attack.set_mode_targeted_by_label(quiet=True)
    found, _ = first_stage(attack, torch.full((1, 1, 2, 2), 0.5), torch.tensor([0]))
    levels, signs = 2**bits - 1, weight[0] - weight[1]
    if steps == 1:  # one level either way
        wanted = (round(0.5 * levels) + signs).clamp(0, levels)
    else:
        low, high = (round((0.5 + e) * levels) for e in (-eps, eps))
        wanted = torch.where(signs > 0, high, low).float()
    torch.testing.assert_close(found.flatten() * levels, wanted)


@pytest.mark.parametrize("mode", ["default", "targeted"])
def test_the_first_stage_returns_the_best_of_what_it_shows(model, data, mode):
    attack = BitDepthADV2(ADV2(model, CAM, eps=0.2, steps=1), 3, steps=12)
    classes, sign = data[1], -1
    if mode == "targeted":
        targeted(attack)
        classes, sign = shifted(*data), 1
    found, shown = first_stage(attack, *data)
    assert len(shown) == 12 + 1
    losses = [
        sign * nn.functional.cross_entropy(model(images), classes, reduction="none").detach()
        for images in (found, *shown)
    ]
    torch.testing.assert_close(losses[0], torch.stack(losses).amin(dim=0))


# Stage 2


@pytest.mark.parametrize("mode", ["default", "targeted"])
def test_the_second_stage_is_the_attack_with_a_term(model, data, mode):
    own = Squeezing(model, (MedianSmoothing(2),))
    settings = {"eps": 0.2, "alpha": 0.02, "steps": 8}
    attack = BitDepthADV2(
        ADV2(model, CAM, **settings, terms=(own,)), 3, steps=5, weight=2.0, slack=0.1
    )
    if mode == "targeted":
        targeted(attack)
    found, _ = first_stage(attack, *data)
    target = shifted(*data)
    if mode == "default":  # the class that stage 1 landed on
        logits = model(found).detach()
        target = logits.scatter(1, data[1][:, None], -torch.inf).argmax(dim=1)
    wanted = Matching(attack._to_match(found, target), 2.0, 0.1)
    plain = ADV2(model, CAM, **settings, terms=(own, wanted))
    plain.set_mode_targeted_by_function(lambda *_: target, quiet=True)
    assert torch.equal(attack(*data), plain(*data))
    if mode == "targeted":
        attack.weight = 0.0
        weightless = targeted(ADV2(model, CAM, **settings, terms=(own,)))
        assert torch.equal(attack(*data), weightless(*data))


def test_predictions_to_match(model, data):
    images, labels = data
    target = torch.where(torch.arange(6) % 2 == 0, labels, shifted(*data))  # reached by every other
    wanted = BitDepthADV2(ADV2(model, CAM), 3)._to_match(images, target)
    torch.testing.assert_close(wanted[::2], probabilities(model, images)[::2])
    assert torch.equal(wanted[1::2], nn.functional.one_hot(target, CLASSES)[1::2].float())


def test_target_maps_are_those_of_the_second_stage(model, data):
    seen = []
    wanted = CAM(model)(*data).detach().flip(-1)
    inner = ADV2(model, CAM, eps=0.1, steps=3, warmup=0, terms=(noting(seen),))
    BitDepthADV2(inner, 3, steps=2)(*data, target_maps=wanted)
    assert len(seen) == 3 + 2  # steps, and the choice of the best iterate
    assert all(torch.equal(candidate.target_maps, wanted) for candidate in seen)


# Both stages


def normalised(attack):
    attack.set_normalization_used([0.25] * 3, [0.5] * 3)


SETUPS = {
    "random": lambda attack: attack.set_mode_targeted_random(quiet=True),
    "least likely": lambda attack: attack.set_mode_targeted_least_likely(2, quiet=True),
    "label": lambda attack: attack.set_mode_targeted_by_label(quiet=True),
    "function": targeted,
    "normalisation": normalised,
    "training": lambda attack: attack.set_model_training_mode(model_training=True),
    "device": lambda attack: attack.set_device("cpu"),
}


@pytest.mark.parametrize("name", SETUPS)
def test_both_are_set_up_alike_before_and_after(model, data, name):
    def inner():
        generator = torch.Generator().manual_seed(3)
        return ADV2(model, CAM, eps=0.2, steps=4, generator=generator)

    first, second = inner(), BitDepthADV2(inner(), 3, steps=3)
    SETUPS[name](first)
    first = BitDepthADV2(first, 3, steps=3)
    SETUPS[name](second)
    assert first.get_mode() == first.second.get_mode() == second.get_mode()
    images = first.normalize(data[0]) if name == "normalisation" else data[0]
    assert torch.equal(first(images, data[1]), second(images, data[1]))
    first.set_mode_default()
    assert first.second.get_mode() == first.get_mode() == "default"

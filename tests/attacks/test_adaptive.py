# SPDX-License-Identifier: MIT
"""Adaptive attacks: their terms by hand, the two stages one by one, and what detectors see."""

import copy

import numpy as np
import pytest
import torch
from captum_adv2.attacks.run import Dual
from conftest import TinyNet
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from captum_adv2 import ADV2, BitDepthADV2, SoundnessWarning
from captum_adv2.attacks import CrossEntropy, MapDistance, Matching, Squeezing
from captum_adv2.defenses import BitDepth, MedianSmoothing, NonLocalMeans
from captum_adv2.interpreters import CAM, GradCAM, Gradient
from captum_adv2.interpreters.base import Direct
from captum_adv2.types import Candidate

CLASSES = 4
SEEDS = st.integers(0, 2**32 - 1)


def shifted(images, labels):
    return (labels + 1) % CLASSES


def targeted(attack):
    attack.set_mode_targeted_by_function(shifted, quiet=True)
    return attack


def predictions(model, images):
    with torch.no_grad():
        return model(images).argmax(dim=1)


def softmax(logits):
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def probabilities(model, images):
    with torch.no_grad():
        return model(images).softmax(dim=1)


def candidate_of(logits, images=None, target=None, progress=0.5):
    maps = torch.zeros(len(logits), 1, 2, 2).to(logits)
    target = torch.zeros(len(logits), dtype=torch.long) if target is None else target
    images, rows = maps if images is None else images, torch.arange(len(logits))
    return Candidate(images, logits, maps, target, maps, progress, rows)


def darker(images):
    return 0.5 * images


def blurred(images):
    return nn.functional.avg_pool2d(images, 3, 1, 1)


# Squeezing


@given(seed=SEEDS, weight=st.sampled_from([0.0, 0.5, 3.0]), count=st.integers(1, 3))
def test_cross_entropies_add_up(trained_smooth, data, seed, weight, count):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(data[0].shape, generator=generator, dtype=torch.float64)
    squeezers = (darker, blurred, torch.square)[:count]
    found = Squeezing(trained_smooth, squeezers, weight)(candidate_of(trained_smooth(x), x))
    with torch.no_grad():
        ours = softmax(trained_smooth(x).numpy())
        theirs = [softmax(trained_smooth(squeeze(x)).numpy()) for squeeze in squeezers]
    expected = weight * sum(-(ours * np.log(p)).sum(axis=1) for p in theirs)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-9, atol=1e-12)


@given(
    seed=SEEDS,
    thresholds=st.tuples(*[st.floats(0.0, 2.0)] * 2),
    share=st.floats(0.0, 1.0),
    weight=st.sampled_from([0.0, 0.5, 3.0]),
)
def test_hinges_add_up(trained_smooth, data, seed, thresholds, share, weight):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(data[0].shape, generator=generator, dtype=torch.float64)
    squeezers = (darker, blurred)
    term = Squeezing(trained_smooth, squeezers, weight, thresholds, share)
    found = term(candidate_of(trained_smooth(x), x))
    ours, expected = probabilities(trained_smooth, x).numpy(), np.zeros(len(x))
    for squeeze, threshold in zip(squeezers, thresholds, strict=True):
        theirs = probabilities(trained_smooth, squeeze(x)).numpy()
        apart = np.abs(ours - theirs).sum(axis=1)
        expected += weight * np.maximum(0, apart - share * threshold)
    # Thresholds are in float32.
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=1e-6)


def test_the_least_of_the_cross_entropy_is_agreement():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
    x = torch.rand(5, 1, 2, 2).double()
    said = model(x).softmax(dim=1)
    entropy = -(said * said.log()).sum(dim=1)
    same = Squeezing(model, (lambda images: images,))(candidate_of(model(x), x))
    torch.testing.assert_close(same, entropy)
    assert (Squeezing(model, (darker,))(candidate_of(model(x), x)) >= entropy).all()


def test_all_copies_go_through_the_model_at_once(model, data):
    candidate, sizes = candidate_of(model(data[0]), data[0]), []
    handle = model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    try:
        Squeezing(model, [darker, blurred, torch.square])(candidate)
    finally:
        handle.remove()
    assert sizes == [3 * 6]


@pytest.mark.parametrize("thresholds", [None, (0.01, 0.01)])
def test_a_term_of_a_batch_is_that_of_its_images(trained_smooth, data, thresholds):
    x = data[0].double()
    term = Squeezing(trained_smooth, (darker, MedianSmoothing(3)), 2.0, thresholds)
    logits = trained_smooth(x)
    together = term(candidate_of(logits, x))
    alone = [term(candidate_of(logits[i : i + 1], x[i : i + 1])) for i in range(6)]
    assert together.shape == (6,)
    torch.testing.assert_close(together, torch.cat(alone))


SQUEEZERS = {
    "bit depth, straight through": (BitDepth(3, straight_through=True), True),
    "bit depth": (BitDepth(3), False),
    "median 2": (MedianSmoothing(2), True),
    "median 3": (MedianSmoothing(3), True),
    "non-local means": (NonLocalMeans(3, 3, 4.0), True),
}


@pytest.mark.parametrize("name", SQUEEZERS)
@pytest.mark.parametrize("thresholds", [None, (0.0,)])
def test_the_gradient_goes_through_the_squeezer(trained_smooth, data, name, thresholds):
    squeezer, passes = SQUEEZERS[name]
    x = data[0].double().requires_grad_()
    term = Squeezing(trained_smooth, (squeezer,), thresholds=thresholds)
    losses = term(candidate_of(trained_smooth(x.detach()), x))  # the squeezed copy's path alone
    if not passes and not losses.requires_grad:
        return
    (gradient,) = torch.autograd.grad(losses.sum(), x, allow_unused=True)
    if not passes:
        assert gradient is None or not gradient.any()
        return
    assert gradient.isfinite().all()
    assert gradient.flatten(1).any(dim=1).all()


def test_the_gradient_is_of_both_predictions():
    net = TinyNet(nn.SiLU, width=2).double().eval()
    x = torch.rand(1, 3, 4, 4).double().requires_grad_()
    for thresholds in (None, (0.001,)):
        term = Squeezing(net, (torch.square,), thresholds=thresholds)
        assert torch.autograd.gradcheck(lambda x, t=term: t(candidate_of(net(x), x)), (x,))


@pytest.mark.parametrize(
    "squeezer", [MedianSmoothing(2), BitDepth(3, straight_through=True), NonLocalMeans(3, 3, 8.0)]
)
def test_an_attack_that_knows_the_squeezer_changes_less_by_it(model, data, squeezer):
    settings = {"eps": 0.2, "alpha": 0.02, "steps": 30}
    target, moved = shifted(*data), []
    for terms in ((), (Squeezing(model, (squeezer,), weight=3.0),)):
        adversarial = targeted(ADV2(model, CAM, **settings, terms=terms))(*data)
        assert torch.equal(predictions(model, adversarial), target)
        apart = probabilities(model, adversarial) - probabilities(model, squeezer(adversarial))
        moved.append(apart.abs().sum(dim=1).mean())
    assert moved[1] < 0.7 * moved[0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": torch.square}, TypeError, r"expected model to be a torch\.nn\.Module"),
        ({"squeezers": darker}, TypeError, "expected a tuple of functions of images, got"),
        ({"squeezers": (darker, 3)}, TypeError, "expected each of squeezers to be a function"),
        ({"squeezers": "median"}, TypeError, "expected a tuple of functions of images, got"),
        ({"squeezers": ()}, ValueError, "expected at least one squeezer, got none"),
        ({"weight": -1.0}, ValueError, "expected weight at least 0, got -1.0"),
        ({"weight": "1"}, TypeError, "expected weight to be a number, got str"),
        ({"share": 1.5}, ValueError, "expected share at least 0 and at most 1, got 1.5"),
        ({"share": None}, TypeError, "expected share to be a number, got NoneType"),
        ({"thresholds": (1.0, 1.0)}, ValueError, "a threshold for each of 1 squeezers, got 2"),
        ({"thresholds": 1.0}, TypeError, "expected a tuple of thresholds, got 1.0"),
        ({"thresholds": (-1.0,)}, ValueError, "expected thresholds at least 0 and at most 2"),
        ({"thresholds": ("1",)}, TypeError, "expected thresholds to be a number, got str"),
    ],
)
def test_bad_squeezing(model, arguments, error, message):
    with pytest.raises(error, match=message):
        Squeezing(**{"model": model, "squeezers": (darker,)} | arguments)


# Matching


def test_matching_by_hand():
    logits = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, np.log(3.0)]]).double()
    said = torch.tensor([[0.5, 0.5], [0.0, 1.0], [0.5, 0.5]]).double()
    candidate = candidate_of(logits)
    for weight, slack, expected in [
        (1.0, 0.0, [0.0, 2.0, 0.5]),
        (3.0, 0.0, [0.0, 6.0, 1.5]),
        (2.0, 0.25, [0.0, 3.5, 0.5]),
        (2.0, 0.5, [0.0, 3.0, 0.0]),
        (1.0, 2.0, [0.0, 0.0, 0.0]),
    ]:
        losses = Matching(said, weight, slack)(candidate)
        torch.testing.assert_close(losses, torch.tensor(expected).double())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": -1.0}, ValueError, "expected weight at least 0"),
        ({"slack": 2.5}, ValueError, "expected slack at least 0 and at most 2"),
        ({"slack": "0"}, TypeError, "expected slack to be a number"),
    ],
)
def test_bad_matching(arguments, error, message):
    with pytest.raises(error, match=message):
        Matching(torch.ones(1, 2) / 2, **arguments)


# Two stages


class Spy:
    """Notes what stage 1 is given, what it shows the model, and what it finds."""

    def __init__(self, monkeypatch):
        self.batches, self.shown, self.found = [], [], []
        stage = BitDepthADV2._first

        def first(attack, batch):
            hook = attack.model.register_forward_pre_hook(lambda _, args: self.shown.append(*args))
            try:
                found = stage(attack, batch)
            finally:
                hook.remove()
            self.batches.append(batch)
            self.found.append(found)
            return found

        monkeypatch.setattr(BitDepthADV2, "_first", first)


@pytest.fixture
def spy(monkeypatch):
    return Spy(monkeypatch)


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("eps", [0.0, 0.03, 0.2, 1.0])
@pytest.mark.parametrize("mode", ["default", "targeted"])
def test_the_first_stage_stays_on_the_grid_between_the_squeezed_ends(
    model, data, spy, bits, eps, mode
):
    images, labels = data
    attack = BitDepthADV2(ADV2(model, CAM, eps=eps, steps=2), bits, steps=4)
    if mode == "targeted":
        targeted(attack)
    adversarial = attack(images, labels)
    levels = 2**bits - 1
    low, high = (((images + e).clamp(0, 1) * levels).round() for e in (-eps, eps))
    (found,) = spy.found
    assert len(spy.shown) == 4 + 2  # a step each, and the best against the last
    for seen in (*spy.shown, found):
        level = seen * levels
        torch.testing.assert_close(level, level.round(), rtol=0, atol=1e-4)
        assert (level.round() >= low).all()
        assert (level.round() <= high).all()
    assert torch.equal(spy.shown[0], (images * levels).round() / levels)
    # The second stage is in the ball around the clean images, not around the squeezed ones.
    assert (adversarial - images).abs().max() <= eps + 2e-7
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1


SIGNS = torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]])  # of two classes' logits


def first_stage(spy, bits, eps, steps):
    """Return what stage 1 finds for class 0 of a linear model, near grey."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    net[1].weight.data = SIGNS
    attack = BitDepthADV2(ADV2(net, Gradient, eps=eps, steps=1), bits, steps=steps)
    attack.set_mode_targeted_by_label(quiet=True)
    with pytest.warns(SoundnessWarning):  # a linear model's map is constant
        attack(torch.full((1, 1, 2, 2), 0.5), torch.tensor([0]))
    return spy.found[-1].flatten()


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_step_of_the_first_stage_is_one_level_either_way(spy, bits):
    levels = 2**bits - 1
    start = round(0.5 * levels)
    wanted = (start + SIGNS[0] - SIGNS[1]).clamp(0, levels)
    torch.testing.assert_close(first_stage(spy, bits, 1.0, 1) * levels, wanted)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("eps", [0.1, 0.25])
def test_the_first_stage_reaches_the_squeezed_ends(spy, bits, eps):
    levels = 2**bits - 1
    low, high = (round((0.5 + e) * levels) for e in (-eps, eps))
    wanted = torch.where(SIGNS[0] - SIGNS[1] > 0, high, low).float()
    torch.testing.assert_close(first_stage(spy, bits, eps, 100) * levels, wanted)


@pytest.mark.parametrize("mode", ["default", "targeted"])
def test_the_first_stage_finds_its_best(model, data, spy, mode):
    images, labels = data
    attack = BitDepthADV2(ADV2(model, CAM, eps=0.2, steps=1), 3, steps=12)
    if mode == "targeted":
        targeted(attack)
    attack(images, labels)
    wanted = shifted(images, labels) if mode == "targeted" else labels
    losses = torch.stack(
        [
            torch.nn.functional.cross_entropy(model(seen), wanted, reduction="none").detach()
            for seen in (*spy.shown, spy.found[0])
        ]
    )
    losses = losses if mode == "targeted" else -losses
    torch.testing.assert_close(losses[-1], losses.amin(dim=0))
    landed = predictions(model, spy.found[0])
    assert torch.equal(landed, wanted) if mode == "targeted" else (landed != labels).all()


class Aim:
    """A target map that notes the classes it is told, and answers with the benign map."""

    def __init__(self):
        self.targets = []

    def __call__(self, interpreter, images, labels, target):
        self.targets.append(target)
        return interpreter.explain(images, labels).maps.detach()


def test_untargeted_it_reaches_the_class_where_the_first_stage_landed(model, data, spy):
    images, labels = data
    aim = Aim()
    inner = ADV2(model, CAM, eps=0.2, alpha=0.02, steps=20, target_map=aim)
    adversarial = BitDepthADV2(inner, 3, steps=10)(images, labels)
    with torch.no_grad():
        logits = model(spy.found[0])
    landed = logits.scatter(1, labels[:, None], -torch.inf).argmax(dim=1)
    assert torch.equal(aim.targets[0], landed)
    assert torch.equal(predictions(model, adversarial), landed)


MODES = {
    "random": ("targeted_random", ()),
    "least likely": ("targeted_least_likely", ()),
    "by label": ("targeted_by_label", ()),
    "by function": ("targeted_by_function", (shifted,)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("inner_first", [True, False])
def test_both_stages_have_one_target(model, data, spy, mode, inner_first):
    images, labels = data
    setter, arguments = MODES[mode]
    if mode == "by label":
        labels = shifted(images, labels)

    def attack_of(seed):
        aim = Aim()
        generator = torch.Generator().manual_seed(seed)
        inner = ADV2(model, CAM, eps=0.3, steps=20, target_map=aim, generator=generator)
        return inner, aim

    inner, aim = attack_of(3)
    if inner_first:
        getattr(inner, f"set_mode_{setter}")(*arguments, quiet=True)
    attack = BitDepthADV2(inner, 3, steps=10)
    if not inner_first:
        getattr(attack, f"set_mode_{setter}")(*arguments, quiet=True)
    assert attack.get_mode() == inner.get_mode() != "default"
    assert attack.targeted
    results = [attack(images, labels) for _ in range(2)]

    plain, expected = attack_of(3)
    getattr(plain, f"set_mode_{setter}")(*arguments, quiet=True)
    for _ in range(2):  # the generator went on by one draw a call
        plain(images, labels)
    assert torch.equal(torch.stack(aim.targets), torch.stack(expected.targets))
    for batch, target, adversarial in zip(spy.batches, aim.targets, results, strict=True):
        assert torch.equal(batch.target, target)
        assert torch.equal(predictions(model, adversarial), target)


def test_modes_of_the_outer_attack_reach_the_inner_one(model):
    inner = targeted(ADV2(model, CAM))
    attack = BitDepthADV2(inner, 3)
    attack.set_mode_default()
    assert inner.get_mode() == attack.get_mode() == "default"
    assert not inner.targeted


def test_a_normalisation_of_the_inner_attack_is_that_of_both(trained_smooth, data):
    images, labels = data[0].double(), data[1]

    def inner():
        return ADV2(trained_smooth, CAM, eps=0.2, steps=4)

    before = inner()
    before.set_normalization_used([0.25] * 3, [0.5] * 3)
    before = BitDepthADV2(before, 3, steps=3)
    after = BitDepthADV2(inner(), 3, steps=3)
    after.set_normalization_used([0.25] * 3, [0.5] * 3)
    given_ = after.normalize(images)
    expected = after(given_, labels)
    assert torch.equal(before(given_, labels), expected)
    assert before._normalization_applied is before.second._normalization_applied is True
    assert not torch.equal(expected, given_)


def test_target_maps_are_those_of_the_second_stage(model, data):
    seen = []

    def term(candidate):
        seen.append(candidate.target_maps)
        return 0 * candidate.images.sum(dim=(1, 2, 3))

    wanted = CAM(model)(*data).detach().flip(-1)
    inner = ADV2(model, CAM, eps=0.1, steps=3, warmup=0, terms=(term,))
    BitDepthADV2(inner, 3, steps=2)(*data, target_maps=wanted)
    assert len(seen) == 3 + 2
    assert all(torch.equal(maps, wanted) for maps in seen)


def test_the_second_stage_is_the_attack_with_a_term(model, data, spy):
    images, labels = data
    own = Squeezing(model, (MedianSmoothing(2),))
    settings = {"eps": 0.2, "alpha": 0.02, "steps": 8}
    inner = ADV2(model, CAM, **settings, terms=(own,))
    adversarial = targeted(BitDepthADV2(inner, 3, steps=5, weight=2.0, slack=0.1))(images, labels)
    said = probabilities(model, spy.found[0])
    plain = ADV2(model, CAM, **settings, terms=(own, Matching(said, 2.0, 0.1)))
    assert torch.equal(adversarial, targeted(plain)(images, labels))
    weightless = targeted(BitDepthADV2(inner, 3, steps=5, weight=0.0))(images, labels)
    assert torch.equal(weightless, targeted(ADV2(model, CAM, **settings, terms=(own,)))(*data))


@pytest.mark.parametrize("fails", [False, True])
def test_the_inner_attack_is_left_as_it_was(model, data, fails):
    inner = ADV2(model, CAM, eps=0.1, steps=4, terms=(Squeezing(model, (darker,)),))
    attack = targeted(BitDepthADV2(inner, 3, steps=2))
    before, alone = dict(vars(inner)), inner(*data)

    def callback(progress):
        if fails and progress.step == 2:
            raise LookupError("enough")

    inner._callback = before["_callback"] = callback
    if fails:
        with pytest.raises(LookupError, match="enough"):
            attack(*data)
    else:
        attack(*data)
    assert vars(inner) == before
    inner._callback = None
    assert torch.equal(inner(*data), alone)


@pytest.mark.parametrize("interpreter", [CAM, GradCAM])
@pytest.mark.parametrize("mode", ["default", "targeted"])
def test_a_batch_is_attacked_like_its_images(trained, data, interpreter, mode):
    model = copy.deepcopy(trained).double()
    images, labels = data[0].double(), data[1]
    inner = ADV2(model, interpreter, eps=0.2, alpha=0.02, steps=8)
    attack = BitDepthADV2(inner, 3, steps=5)
    if mode == "targeted":
        targeted(attack)
    together = attack(images, labels)
    alone = [attack(images[i : i + 1], labels[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-6)


def test_it_says_what_the_model_says_of_the_squeezed_image(model, data, spy):
    inner, apart = ADV2(model, CAM, eps=0.2, alpha=0.02, steps=30), []
    for weight in (0.0, 5.0):
        adversarial = targeted(BitDepthADV2(inner, 3, steps=20, weight=weight))(*data)
        assert torch.equal(predictions(model, adversarial), shifted(*data))
        other = probabilities(model, spy.found[-1])
        apart.append((probabilities(model, adversarial) - other).abs().sum(dim=1).mean())
    assert apart[1] < 0.5 * apart[0]


def test_where_the_first_stage_misses_its_class_the_second_one_is_to_be_sure_of_it(
    model, data, monkeypatch
):
    images, target = data[0], shifted(*data)
    missed = torch.arange(len(images)) % 2 == 0
    reached = targeted(ADV2(model, CAM, eps=0.5, alpha=0.05, steps=40, keep="final"))(*data)
    assert torch.equal(predictions(model, reached), target)
    found = torch.where(missed.view(-1, 1, 1, 1), images, reached)
    monkeypatch.setattr(BitDepthADV2, "_first", lambda attack, batch: found)
    inner = ADV2(model, CAM, eps=0.2, alpha=0.02, steps=6)
    adversarial = targeted(BitDepthADV2(inner, 3, weight=3.0))(*data)
    sure = nn.functional.one_hot(target, CLASSES).to(images)
    said = torch.where(missed[:, None], sure, probabilities(model, found))
    plain = ADV2(model, CAM, eps=0.2, alpha=0.02, steps=6, terms=(Matching(said, 3.0),))
    assert torch.equal(adversarial, targeted(plain)(*data))


def test_a_progress_bar_of_both_stages_only_if_asked_for(model, data, capsys):
    for verbose in (False, True):
        inner = ADV2(model, CAM, steps=4, verbose=verbose)
        BitDepthADV2(inner, 3, steps=3)(*data)
        told = capsys.readouterr().err
        assert bool(told) is verbose
    assert "3/3" in told
    assert "4/4" in told


# What is best, with further terms


def reported_score(g, images, target, benign, further):
    """Return the score of 8-bit images by hand: distance, and the squashed further terms."""
    eight = (images * 255).round() / 255
    distance = (g(eight, target) - benign).abs().mean(dim=(1, 2, 3))
    more = further(eight)
    return (distance + more / (1 + more.abs())).detach()


@pytest.mark.parametrize("interpreter", [CAM, GradCAM])
@pytest.mark.parametrize("weight", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("eps", [0.1, 0.2])
@pytest.mark.filterwarnings("ignore::captum_adv2.SoundnessWarning")
def test_best_is_never_worse_than_final_with_further_terms(model, data, interpreter, weight, eps):
    images, labels = data
    target, g = shifted(images, labels), interpreter(model)
    benign = g(images, labels).detach()
    term = Squeezing(model, (MedianSmoothing(2), blurred), weight)

    def further(x):
        return term(candidate_of(model(x), x))

    results = {}
    for keep in ("best", "final"):
        attack = ADV2(model, g, eps=eps, alpha=eps / 6, steps=14, terms=(term,), keep=keep)
        results[keep] = targeted(attack)(images, labels)
    score = {
        keep: reported_score(g, adversarial, target, benign, further)
        for keep, adversarial in results.items()
    }
    sure = probabilities(model, (results["final"] * 255).round() / 255)
    enough = sure.gather(1, target[:, None])[:, 0] >= 0.9
    assert (score["best"] <= score["final"] + 1e-5)[enough].all()


@given(seed=SEEDS, size=st.sampled_from([0.1, 1.0, 100.0, 1e4]), floor=st.floats(0.0, 1.0))
def test_the_score_of_an_iterate(trained_smooth, data, seed, size, floor):
    generator = torch.Generator().manual_seed(seed)
    images = data[0].double()
    target = torch.randint(0, CLASSES, (6,), generator=generator)
    wanted = torch.rand(6, 1, 8, 8, generator=generator, dtype=torch.float64)
    more = size * torch.randn(6, generator=generator, dtype=torch.float64)
    g = CAM(trained_smooth)
    terms = (CrossEntropy(), MapDistance(), lambda candidate: more)
    dual = Dual(trained_smooth, g.surrogate(images, target), target, wanted, terms, floor)
    score = dual.judge(Direct(g.explain, target), images)

    eight = (images * 255).round() / 255
    said = probabilities(trained_smooth, eight)
    p = said.gather(1, target[:, None])[:, 0]
    reached = said.argmax(dim=1) == target
    good = reached & (p >= floor)
    expected = reported_score(g, images, target, wanted, lambda x: more)
    torch.testing.assert_close(score[good], expected[good])
    assert (score[good] < 2).all()
    assert ((score[~good] >= 2) & (score[~good] <= 4)).all()
    assert (score[~reached] >= 3).all()
    for some in (reached, ~reached):  # nearer the class is better, whatever the terms say
        order = p[some & ~good].argsort()
        assert (score[some & ~good][order].diff() <= 0).all()


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_term_without_a_number_is_worse_than_any_with_one(trained_smooth, data, bad):
    images, labels = data[0].double(), data[1]
    g = CAM(trained_smooth)
    benign = g(images, labels).detach()

    def score(value):
        terms = (CrossEntropy(), MapDistance(), lambda candidate: torch.full((6,), value).double())
        dual = Dual(trained_smooth, g.surrogate(images, labels), labels, benign, terms, 0.0)
        return dual.judge(Direct(g.explain, labels), images)

    assert (score(1e6) < score(bad)).all()
    assert (score(bad) < 2.1).all()  # and better than an image that misses the class

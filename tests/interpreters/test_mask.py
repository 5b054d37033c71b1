# SPDX-License-Identifier: MIT
"""MASK against plain recomputations, and its two surrogates against exact derivatives."""

import copy
import random
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import blobs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from captum_adv2.interpreters import MASK
from captum_adv2.interpreters.bilevel import FiniteDifference, Follower, Unrolled
from captum_adv2.interpreters.gradient import log_odds
from captum_adv2.interpreters.mask import Blur, Noise
from captum_adv2.optim import Adam

SEEDS = st.integers(0, 2**32 - 1)
SETTINGS = {"size": 4, "iterations": 5, "perturb": Blur(4.0)}
SURROGATES = [FiniteDifference(n_step=2, cycle=3), Unrolled(n_step=2, n_reset=2)]
TARGET = torch.tensor([2, 0, 1])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def images64(count=3, seed=7):
    """Pictures of the classes in TARGET, in double precision."""
    images, labels = blobs(60, seed)
    chosen = [int((labels == label).nonzero()[0]) for label in TARGET[:count]]
    return images[chosen].double()


def masks64(count=3, size=4, seed=0, low=0.0, high=1.0):
    unit = torch.rand(count, 1, size, size, generator=seeded(seed), dtype=torch.float64)
    return low + (high - low) * unit


def assert_same(ours, theirs, **tolerance):
    """Compare two followers."""
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    assert (ours.step, ours.moments.steps) == (theirs.step, theirs.moments.steps)
    for a, b in zip(
        (ours.kept, *ours.moments[:2]), (theirs.kept, *theirs.moments[:2]), strict=True
    ):
        torch.testing.assert_close(a, b, **tolerance)


def one(follower, i):
    return follower.take(torch.tensor([i]))


@pytest.fixture(scope="session")
def net(trained_smooth):
    return trained_smooth


class Record(nn.Module):
    """Notes what it is shown, and has an opinion on the mean colour of each column."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return x.mean(dim=(1, 2))[:, :4]


# The objective


@given(
    seed=SEEDS,
    tv=st.floats(0, 1),
    sparsity=st.floats(0, 1),
    beta=st.sampled_from([1.0, 2.0, 2.5, 3.0]),
    size=st.sampled_from([1, 3, 4]),
)
def test_the_objective_is_equation_16(net, seed, tv, sparsity, beta, size):
    x, kept = images64(seed=seed), masks64(size=size, seed=seed)
    interpreter = MASK(net, size, tv=tv, sparsity=sparsity, beta=beta, jitter=0)
    ours = interpreter.objective(interpreter.scene(x, TARGET), kept, 0)

    m = F.interpolate(kept, (16, 16), mode="bilinear", align_corners=False)
    with torch.no_grad():
        p = net(m * x + (1 - m) * Blur()(x)).softmax(dim=1)[range(3), TARGET].numpy()
    k = kept.numpy()
    dx, dy = abs(k[..., :, 1:] - k[..., :, :-1]), abs(k[..., 1:, :] - k[..., :-1, :])
    rough = (dx**beta).sum((1, 2, 3)) + (dy**beta).sum((1, 2, 3))
    expected = p + tv * rough + sparsity * (1 - k).sum((1, 2, 3))
    np.testing.assert_allclose(ours.detach().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_all_kept_shows_the_image_none_kept_what_replaces_it(kept):
    model, x = Record(), images64()
    interpreter = MASK(model, 4, jitter=0, perturb=lambda x: 1 - x)
    interpreter.objective(interpreter.scene(x, TARGET), torch.full((3, 1, 4, 4), kept).double(), 0)
    torch.testing.assert_close(model.seen[0], x if kept else 1 - x, rtol=0, atol=1e-15)


@given(jitter=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=10)
def test_jitter_shows_every_image_the_same_crop_inside_a_larger_image(jitter, seed):
    model, x = Record(), images64(2)
    x[1] = x[0]
    interpreter = MASK(model, 4, jitter=jitter, seed=seed)
    scene, kept = interpreter.scene(x, TARGET[:2]), masks64(2) * 0 + 1
    assert scene.images.shape == scene.deleted.shape == (2, 3, 16 + jitter, 16 + jitter)
    crops = scene.images.unfold(2, 16, 1).unfold(3, 16, 1)[0]  # (C, top, left, 16, 16)
    offsets = []
    for step in range(20):
        interpreter.objective(scene, kept, step)
        seen = model.seen[-1]
        assert torch.equal(seen[0], seen[1])
        (where,) = (crops == seen[0][:, None, None]).all(dim=(0, 3, 4)).nonzero().tolist()
        offsets.append(tuple(where))
    assert len(set(offsets)) > 1
    for other, same in ((seed, True), (seed + 100, False)):
        again, model.seen = MASK(model, 4, jitter=jitter, seed=other), []
        for step in range(20):
            again.objective(scene, kept, step)
        replay = [crops[:, top, left] for top, left in offsets]
        assert all(torch.equal(s[0], r) for s, r in zip(model.seen, replay, strict=True)) is same


def test_jitter_zero_leaves_images_as_they_are(net):
    x = images64()
    scene = MASK(net, 4, jitter=0).scene(x, TARGET)
    assert torch.equal(scene.images, x)
    assert torch.equal(scene.deleted, Blur()(x))


# What replaces what is deleted


@pytest.mark.parametrize("sigma", [None, 0.3, 2.0, 50.0])
@pytest.mark.parametrize("shape", [(8, 8), (5, 11), (1, 4), (2, 2)])
def test_blur_keeps_constants_range_and_shape(sigma, shape):
    flat = torch.full((2, 3, *shape), 0.3, dtype=torch.float64)
    torch.testing.assert_close(Blur(sigma)(flat), flat)
    x = torch.rand(2, 3, *shape, dtype=torch.float64)
    blurred = Blur(sigma)(x)
    assert blurred.shape == x.shape
    assert (blurred.amin(dim=(2, 3)) >= x.amin(dim=(2, 3)) - 1e-12).all()
    assert (blurred.amax(dim=(2, 3)) <= x.amax(dim=(2, 3)) + 1e-12).all()


def test_blur_smooths_and_its_default_is_a_32nd_of_the_longer_side():
    x = torch.rand(1, 3, 32, 32, generator=seeded(0), dtype=torch.float64)
    assert Blur(2.0)(x).std() < 0.5 * Blur(0.5)(x).std() < 0.5 * x.std()
    assert torch.equal(Blur()(x[..., :16]), Blur(1.0)(x[..., :16]))
    assert torch.equal(Blur()(x[..., :16, :]), Blur(1.0)(x[..., :16, :]))


def test_blur_is_a_gaussian():
    dot = torch.zeros(1, 1, 21, 21, dtype=torch.float64)
    dot[..., 10, 10] = 1
    line = torch.exp(-0.5 * (torch.arange(-6, 7).double() / 2) ** 2)
    line = F.pad(line / line.sum(), (4, 4))
    torch.testing.assert_close(Blur(2.0)(dot)[0, 0], line[:, None] * line)


@given(seed=st.integers(0, 99), std=st.sampled_from([0.0, 0.5, 1.0, 20.0]))
def test_noise(seed, std):
    x = images64(seed=seed)
    noise = Noise(std, seed)(x)
    assert noise.dtype == x.dtype
    assert ((noise >= 0) & (noise <= 1)).all()
    assert torch.equal(Noise(std, seed)(x), noise)
    torch.testing.assert_close(Noise(std, seed)(x[1:2]), noise[1:2])
    if std == 0:
        torch.testing.assert_close(noise, x.mean(dim=(2, 3), keepdim=True).expand_as(x))
        return
    assert not torch.equal(Noise(std, seed + 1)(x), noise)
    twice = Noise(std, seed)(x[:1].repeat(2, 1, 1, 1))
    assert torch.equal(twice[0], twice[1])


def test_noise_is_around_the_mean_colour_with_the_images_spread():
    x = 0.5 + 0.05 * torch.randn(1, 3, 64, 64, generator=seeded(0), dtype=torch.float64)
    noise = Noise()(x)
    torch.testing.assert_close(noise.mean(dim=(2, 3)), x.mean(dim=(2, 3)), rtol=0, atol=3e-3)
    assert noise.std().item() == pytest.approx(x.std().item(), rel=0.05)
    assert abs(((noise - noise.mean()) * (x - x.mean())).mean()) < 0.1 * x.var()


# The solution


@pytest.mark.parametrize("jitter", [0, 2])
@pytest.mark.parametrize("perturb", [Blur(4.0), Noise()])
def test_solving_is_torchs_adam_and_a_clamp(net, jitter, perturb):
    x = images64()
    interpreter = MASK(net, 4, 25, jitter=jitter, perturb=perturb, tv=0.1, sparsity=0.002)
    scene = interpreter.scene(x, TARGET)
    kept = torch.full((3, 1, 4, 4), 0.5, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([kept], lr=0.1)
    for step in range(25):
        adam.zero_grad()
        interpreter.objective(scene, kept, step).sum().backward(inputs=[kept])
        adam.step()
        with torch.no_grad():
            kept.clamp_(0, 1)
    ours = interpreter.solve(x, TARGET)
    torch.testing.assert_close(ours.kept, kept.detach(), rtol=0, atol=1e-8)
    assert (ours.step, ours.moments.steps) == (25, 25)
    assert ((kept == 0) | (kept == 1)).any()  # the clamp was put to use
    assert kept.unique().numel() > 10
    torch.testing.assert_close(interpreter(x, TARGET), 1 - kept.detach(), rtol=0, atol=1e-8)


def test_solving_lowers_the_objective(model, data):
    interpreter = MASK(model, 4, 60, jitter=0)
    scene = interpreter.scene(*data)
    with torch.no_grad():
        first, last = (
            interpreter.objective(scene, follower.kept, 0)
            for follower in (interpreter.begin(data[0]), interpreter.solve(*data))
        )
    assert (last < first).all()


@pytest.mark.parametrize("size", [1, 3, 9])
def test_the_map_is_what_is_not_kept(net, size):
    x = images64()
    interpreter = MASK(net, size, 4)
    maps, logits, _penalty = interpreter.explain(x, TARGET)
    assert logits is None
    assert maps.shape == (3, 1, size, size)
    assert ((maps >= 0) & (maps <= 1)).all()
    assert torch.equal(maps, 1 - interpreter.solve(x, TARGET).kept)
    assert torch.equal(maps, interpreter(x, TARGET))


@pytest.mark.parametrize("start", [0.0, 0.25, 1.0])
def test_it_begins_at_start(net, start):
    follower = MASK(net, 4, start=start).begin(images64())
    assert (follower.kept == start).all()
    assert not any(part.any() for part in follower.moments[:2])
    assert (follower.step, follower.moments.steps) == (0, 0)
    assert follower.kept.dtype == torch.float64


@pytest.mark.parametrize("patience", [None, 2])
@pytest.mark.parametrize("perturb", [Blur(4.0), Noise()])
def test_a_batch_is_solved_like_its_images(net, patience, perturb):
    x = images64()
    interpreter = MASK(net, 4, 20, patience=patience, perturb=perturb, jitter=2)
    together = interpreter.solve(x, TARGET)
    for i in range(3):
        alone = interpreter.solve(x[i : i + 1], TARGET[i : i + 1])
        torch.testing.assert_close(one(together, i).kept, alone.kept, rtol=0, atol=1e-9)


def test_the_same_bytes_every_time_and_others_from_another_seed(net):
    x = images64()
    first = MASK(net, **SETTINGS).solve(x, TARGET)
    torch.manual_seed(5)
    random.seed(5)
    assert_same(MASK(net, **SETTINGS).solve(x, TARGET), first)
    assert not torch.equal(MASK(net, **SETTINGS, seed=1).solve(x, TARGET).kept, first.kept)


@given(first=st.integers(0, 4), second=st.integers(0, 4))
@settings(max_examples=8)
def test_going_on_is_solving_for_longer(net, first, second):
    x, interpreter = images64(), MASK(net, **SETTINGS, jitter=2)
    part = interpreter.solve(x, TARGET, iterations=first)
    assert part.step == first
    whole = interpreter.solve(x, TARGET, iterations=first + second)
    assert_same(interpreter.solve(x, TARGET, part, second), whole)


def test_a_follower_passed_in_is_not_changed(net):
    x, interpreter = images64(), MASK(net, **SETTINGS, patience=1)
    follower = interpreter.solve(x, TARGET)
    kept = copy.deepcopy(follower)
    interpreter.solve(x, TARGET, follower)
    assert_same(follower, kept)


# Patience


def test_images_that_settle_stay_and_the_others_go_on(net):
    x, target = torch.cat([images64(seed=seed) for seed in range(3)]), TARGET.repeat(3)
    interpreter = MASK(net, 4, patience=3, jitter=0, lr=0.3, perturb=Blur(4.0))
    path = [interpreter.solve(x, target, iterations=n).kept for n in range(41)]
    changes = torch.stack([(a != b).flatten(1).any(dim=1) for a, b in pairwise(path)])
    last = [int(column.nonzero().max()) for column in changes.T]
    assert len(set(last)) > 3, "the images should settle at different times"
    assert max(last) < len(changes) - 1
    for i, end in enumerate(last):
        assert not changes[end + 1 :, i].any()
        alone = interpreter.solve(x[i : i + 1], target[i : i + 1], iterations=40).kept
        torch.testing.assert_close(alone, path[-1][i : i + 1], rtol=0, atol=1e-9)


def test_an_image_settles_so_many_iterations_after_its_best(net):
    x, patience = images64(1), 3
    interpreter = MASK(net, 4, jitter=0, lr=0.3, perturb=Blur(4.0))
    scene, follower, losses = interpreter.scene(x, TARGET[:1]), interpreter.begin(x), []
    for _ in range(40):
        follower, loss = interpreter.descend(scene, follower)
        losses.append(loss.item())
        if len(losses) - 1 - int(np.argmin(losses)) >= patience:
            break
    assert len(losses) < 40
    impatient = MASK(net, 4, 40, jitter=0, lr=0.3, patience=patience, perturb=Blur(4.0))
    torch.testing.assert_close(impatient.solve(x, TARGET[:1]).kept, follower.kept)


def test_huge_patience_is_no_patience(net):
    x = images64()
    plain, patient = (MASK(net, 4, 20, lr=0.3, patience=p).solve(x, TARGET) for p in (None, 10**6))
    assert_same(patient, plain)


# Arguments


def test_small_settings_and_overrides(net):
    interpreter = MASK.small(net, iterations=7, jitter=0, size=5)
    assert isinstance(interpreter, MASK)
    assert interpreter.model is net
    assert (interpreter.iterations, interpreter.jitter, interpreter.size) == (7, 0, 5)
    assert MASK.small(net).size == 16
    assert MASK.small(net, perturb=Noise()).perturb == Noise()
    assert MASK.small(net, size=4, iterations=3)(images64(), TARGET).shape == (3, 1, 4, 4)


def test_the_defaults_are_fong_and_vedaldis():
    interpreter = MASK(nn.Identity())
    found = (interpreter.size, interpreter.iterations, interpreter.tv, interpreter.sparsity)
    assert found == (28, 300, 1e-2, 1e-4)
    assert (interpreter.beta, interpreter.jitter, interpreter.adam) == (3.0, 4, Adam(0.1))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("size", (0, -1)),
        ("iterations", (0,)),
        ("tv", (-1.0, float("nan"))),
        ("sparsity", (-1e-9, float("inf"))),
        ("beta", (0.0, -1.0)),
        ("jitter", (-1,)),
        ("lr", (0.0, -0.1)),
        ("start", (-0.1, 1.1)),
        ("patience", (0,)),
        ("seed", (-1,)),
    ],
)
def test_numbers_out_of_range_and_of_another_type(net, name, values):
    for value in values:
        with pytest.raises(
            ValueError, match=f"expected {name} at least|expected {name} (above|more)"
        ):
            MASK(net, **{name: value})
    with pytest.raises(TypeError, match=f"expected {name} to be"):
        MASK(net, **{name: "2"})
    if isinstance(values[0], int):
        with pytest.raises(TypeError, match=f"expected {name} to be"):
            MASK(net, **{name: 2.5})


@pytest.mark.parametrize(
    ("factory", "name", "values"),
    [
        (FiniteDifference, "n_step", (0, -1)),
        (FiniteDifference, "cycle", (0, -1)),
        (FiniteDifference, "pace", (0.0, float("inf"))),
        (FiniteDifference, "reach", (0.0, 1.1)),
        (FiniteDifference, "damping", (0.0, float("nan"))),
        (FiniteDifference, "gain", (-1e-9, float("inf"))),
        (Unrolled, "n_step", (0, -1)),
        (Unrolled, "n_reset", (0, -1)),
        (Unrolled, "shrink", (0.0, -0.5)),
        (Unrolled, "count", (-1,)),
    ],
)
def test_a_surrogates_numbers_out_of_range_and_of_another_type(factory, name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"expected {name} (at least|above)"):
            factory(**{name: value})
    others = ("2", 2.5, True) if isinstance(values[0], int) else ("2", None, True)
    for other in others:
        with pytest.raises(TypeError, match=f"expected {name} to be"):
            factory(**{name: other})


def test_a_surrogates_smallest_numbers(net):
    x, interpreter = images64(), MASK(net, **SETTINGS)
    for factory in (
        FiniteDifference(n_step=1, cycle=1, pace=1e-3, reach=1.0, gain=0),
        Unrolled(n_step=1, n_reset=1, count=0),
    ):
        surrogate = moved(factory, interpreter, x, TARGET)
        assert pulled(surrogate, x, masks64() - 0.5)[0].isfinite().all()


def test_a_model_of_another_type():
    with pytest.raises(TypeError, match="expected"):
        MASK(lambda x: x)


# Graphs, modes, and what is left behind


def test_the_map_has_no_graph_whatever_the_images_require(net):
    x, interpreter = images64(), MASK(net, **SETTINGS)
    expected, leaf = interpreter(x, TARGET), images64().requires_grad_()
    assert not expected.requires_grad
    for given_ in (leaf, leaf * 1):
        maps = interpreter(given_, TARGET)
        assert not maps.requires_grad
        assert torch.equal(maps, expected)
        with torch.no_grad():
            assert torch.equal(interpreter(given_, TARGET), expected)
    assert leaf.grad is None


def test_inference_mode_is_refused(net):
    x, interpreter = images64(), MASK(net, **SETTINGS)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="use torch.no_grad"):
        interpreter.explain(x, TARGET)


@pytest.mark.parametrize("factory", [*SURROGATES, None], ids=["difference", "unrolled", "solve"])
def test_nothing_is_left_behind(net, factory):
    model = copy.deepcopy(net)
    model.stem[0].weight.requires_grad_(False)
    model.fc.bias.grad = torch.ones_like(model.fc.bias)
    calls = []
    model.body.register_forward_hook(lambda *_: calls.append(1))
    x, interpreter = images64().requires_grad_(), MASK(model, **SETTINGS | {"perturb": Noise()})

    def state():
        weights = [(p.grad is None, p.requires_grad, p._version) for p in model.parameters()]
        hooks = [(len(m._forward_hooks), len(m._backward_hooks)) for m in model.modules()]
        modes = [m.training for m in model.modules()]
        return weights, hooks, modes, torch.get_rng_state().tolist(), random.getstate()

    before = state()
    if factory is None:
        interpreter.solve(x, TARGET)
    else:
        surrogate = factory(interpreter, x, TARGET)
        for _ in range(2):
            surrogate.advance(x)
            torch.autograd.grad(surrogate(x).maps.sum(), x)
    assert state() == before
    assert torch.equal(model.fc.bias.grad, torch.ones_like(model.fc.bias))
    assert x.grad is None
    assert x._version == images64()._version
    assert calls


# Both surrogates


def moved(factory, interpreter, x, target, turns=3):
    """Let a surrogate answer some iterates; return it."""
    surrogate = factory(interpreter, x, target)
    for turn in range(turns):
        surrogate.advance((x + 0.01 * turn).clamp(0, 1))
    return surrogate


def pulled(surrogate, x, weights):
    """Return the images' gradient of a weighted sum of maps, and what is explained."""
    leaf = x.clone().requires_grad_()
    explanation = surrogate(leaf)
    (gradient,) = torch.autograd.grad((explanation.maps * weights).sum(), leaf)
    return gradient, explanation


@pytest.mark.parametrize("factory", SURROGATES, ids=["difference", "unrolled"])
def test_a_surrogate_of_a_batch_is_that_of_its_images(net, factory):
    x, weights = images64(), masks64(seed=3) - 0.5
    interpreter = MASK(net, **SETTINGS, jitter=2)
    together, explained = pulled(moved(factory, interpreter, x, TARGET), x, weights)
    assert (together.abs().amax(dim=(1, 2, 3)) > 0).all()
    for i in range(3):
        part = slice(i, i + 1)
        surrogate = moved(factory, interpreter, x[part], TARGET[part])
        alone, single = pulled(surrogate, x[part], weights[part])
        torch.testing.assert_close(single.maps, explained.maps[part], rtol=0, atol=1e-9)
        torch.testing.assert_close(alone, together[part], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("factory", SURROGATES, ids=["difference", "unrolled"])
def test_a_surrogate_passes_the_models_logits_and_their_gradient(net, factory):
    x = images64().requires_grad_()
    logits = moved(factory, MASK(net, **SETTINGS), x.detach(), TARGET)(x).logits
    expected = net(x)
    torch.testing.assert_close(logits, expected)
    ours, theirs = (torch.autograd.grad(v[:, 1].sum(), x)[0] for v in (logits, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("factory", SURROGATES, ids=["difference", "unrolled"])
def test_calling_a_surrogate_does_not_move_it(net, factory):
    x = images64().requires_grad_()
    surrogate = moved(factory, MASK(net, **SETTINGS), x.detach(), TARGET)
    first = surrogate(x)
    torch.autograd.grad(first.maps.sum(), x)
    assert torch.equal(surrogate(x).maps, first.maps)


@pytest.mark.parametrize("factory", SURROGATES, ids=["difference", "unrolled"])
def test_a_surrogate_works_under_no_grad(net, factory):
    x = images64().requires_grad_()
    ours, theirs = (moved(factory, MASK(net, **SETTINGS), x.detach(), TARGET, 1) for _ in range(2))
    with torch.no_grad():
        for given_ in (x, x.detach()):
            maps, logits, _penalty = ours(given_)
            torch.testing.assert_close(maps, theirs(x.detach()).maps)
            assert not logits.requires_grad


@pytest.mark.parametrize("factory", SURROGATES, ids=["difference", "unrolled"])
@pytest.mark.parametrize("turns", [1, 2])
def test_looking_at_other_images_changes_nothing(net, factory, turns):
    x, weights, interpreter = images64(), masks64(seed=3) - 0.5, MASK(net, **SETTINGS)
    ours, theirs = (moved(factory, interpreter, x, TARGET, turns) for _ in range(2))
    pulled(ours, 1 - x, weights)
    assert torch.equal(pulled(ours, x, weights)[0], pulled(theirs, x, weights)[0])


def test_the_default_surrogate_is_the_finite_difference(net):
    x, weights, interpreter = images64(), masks64(seed=3), MASK(net, **SETTINGS)
    ours, theirs = interpreter.surrogate(x, TARGET), FiniteDifference()(interpreter, x, TARGET)
    for surrogate in (ours, theirs):
        surrogate.advance(x)
    assert torch.equal(pulled(ours, x, weights)[0], pulled(theirs, x, weights)[0])


# FiniteDifference


class Pull(NamedTuple):
    interpreter: MASK
    follower: Follower
    images: torch.Tensor
    weights: torch.Tensor
    gradient: torch.Tensor


def pull_of(net, seed=0, gain=0.005, reach=1e-3, jitter=2):
    x, weights = images64(seed=seed), masks64(seed=seed) - 0.5
    interpreter = MASK(net, 4, jitter=jitter, lr=0.02, perturb=Blur(4.0))
    surrogate = FiniteDifference(n_step=3, reach=reach, gain=gain)(interpreter, x, TARGET)
    for _ in range(2):
        surrogate.advance(x)
    gradient, explained = pulled(surrogate, x, weights)
    follower = surrogate._follower
    assert torch.equal(explained.maps, 1 - follower.kept)
    return Pull(interpreter, follower, x, weights, gradient)


@given(seed=SEEDS, jitter=st.sampled_from([0, 2]))
@settings(max_examples=8)
def test_the_difference_is_the_mixed_derivative(net, seed, jitter):
    pull = pull_of(net, seed, jitter=jitter)
    # Where the loss wants the mask: its gradient is weights on the map, -weights on what is kept.
    wanted = pull.weights / pull.follower.moments.second.sqrt()
    leaf, kept = pull.images.clone().requires_grad_(), pull.follower.kept.requires_grad_()
    losses = pull.interpreter.objective(
        pull.interpreter.scene(leaf, TARGET), kept, pull.follower.step
    )
    (slope,) = torch.autograd.grad(losses.sum(), kept, create_graph=True)
    (mixed,) = torch.autograd.grad((slope * wanted).sum(), leaf)
    cosine = F.cosine_similarity(mixed.flatten(1), pull.gradient.flatten(1))
    assert (cosine > 0.99).all()


def test_following_the_pull_makes_the_wanted_mask_the_better_one(net):
    pull = pull_of(net, reach=0.2)
    wanted = pull.weights / pull.follower.moments.second.sqrt()
    change = 0.2 * wanted / wanted.abs().amax(dim=(1, 2, 3), keepdim=True)
    moved = pull.images - 0.01 * pull.gradient.sign()

    def preference(images):
        """How much better the wanted mask does than its opposite."""
        scene = pull.interpreter.scene(images, TARGET)
        there, back = (
            pull.interpreter.objective(scene, pull.follower.kept + s * change, pull.follower.step)
            for s in (1, -1)
        )
        return (back - there).detach()

    assert (preference(moved) > preference(pull.images)).all()


@pytest.mark.parametrize("gain", [0.005, 2.0])
@pytest.mark.parametrize("reach", [0.01, 1.0])
def test_the_length_of_the_pull(net, gain, reach):
    pull = pull_of(net, gain=gain, reach=reach)
    leaf = pull.images.clone().requires_grad_()
    (slope,) = torch.autograd.grad(log_odds(net(leaf), TARGET).sum(), leaf)

    def l1(values):
        return values.abs().sum(dim=(1, 2, 3))

    torch.testing.assert_close(l1(pull.gradient), gain * l1(pull.weights) * l1(slope))


def test_no_wish_no_pull(net):
    x, weights = images64(), masks64() - 0.5
    weights[1] = 0
    surrogate = moved(SURROGATES[0], MASK(net, **SETTINGS), x, TARGET)
    gradient, _ = pulled(surrogate, x, weights)
    assert gradient.isfinite().all()
    assert gradient.flatten(1).any(dim=1).tolist() == [True, False, True]


@pytest.mark.parametrize("cycle", [1, 3])
def test_the_follower_restarts_every_cycle(net, cycle):
    x, interpreter = images64(), MASK(net, **SETTINGS, jitter=2)
    factory = FiniteDifference(n_step=2, cycle=cycle)
    ours, fresh = (factory(interpreter, x, TARGET) for _ in range(2))
    fresh.advance(x)
    for turn in range(2 * cycle + 1):
        ours.advance(x)
        assert ours._follower.step == 2 * (turn % cycle + 1)
    assert_same(ours._follower, fresh._follower)


def test_a_pace_of_one_takes_masks_own_steps(net):
    x, interpreter = images64(), MASK(net, **SETTINGS, jitter=2)
    surrogate = FiniteDifference(n_step=2, pace=1.0)(interpreter, x, TARGET)
    for _ in range(3):
        surrogate.advance(x)
    assert_same(surrogate._follower, interpreter.solve(x, TARGET, iterations=6))


def test_first_order_cost(net):
    passes, x = [], images64()
    interpreter = MASK(net, **SETTINGS)
    handle = net.register_forward_hook(lambda module, args, out: passes.append(len(out)))
    surrogate = FiniteDifference(n_step=3)(interpreter, x, TARGET)
    surrogate.advance(x)
    pulled(surrogate, x, masks64())
    handle.remove()
    # The log-odds' slope at first and every fifth time, the follower's steps, the prediction, two
    # masks each.
    assert passes == [3, 3, 3, 3, 3, 3, 6]


# Unrolled


@pytest.mark.parametrize("n_step", [1, 3])
def test_unrolled_maps_are_masks_next_ones(net, n_step):
    x, interpreter = images64(), MASK(net, **SETTINGS, jitter=2)
    surrogate = moved(Unrolled(n_step=n_step), interpreter, x, TARGET)
    maps = surrogate(x).maps
    assert maps.shape == (3, n_step, 4, 4)
    for ahead in range(n_step):
        follower = interpreter.solve(x, TARGET, surrogate._follower, ahead + 1)
        torch.testing.assert_close(maps[:, ahead : ahead + 1].detach(), 1 - follower.kept)


@pytest.mark.parametrize("solved", [True, False])
@pytest.mark.parametrize("jitter", [0, 2])
def test_the_unrolled_gradient_is_that_of_finite_differences(net, solved, jitter):
    x, target = images64(2), TARGET[:2]
    interpreter = MASK(net, 4, 8, jitter=jitter, lr=0.01, tv=0.1, perturb=Blur(4.0))
    surrogate = moved(Unrolled(n_step=3, solved=solved), interpreter, x, target)
    weights = torch.rand(2, 3, 4, 4, generator=seeded(1), dtype=torch.float64) - 0.5
    gradient, _ = pulled(surrogate, x, weights)
    assert gradient.abs().max() > 1e-6
    for seed in range(4):
        along = torch.randn(x.shape, generator=seeded(seed), dtype=torch.float64)
        high, low = ((surrogate(x + s * 1e-6 * along).maps * weights).sum() for s in (1, -1))
        expected = ((high - low) / 2e-6).item()
        assert (gradient * along).sum().item() == pytest.approx(expected, rel=1e-4, abs=1e-8)


def test_every_reset_takes_masks_solution_and_smaller_moments(net):
    x, interpreter = images64(), MASK(net, **SETTINGS, jitter=2)
    surrogate = Unrolled(n_step=2, n_reset=3, shrink=0.25, count=50)(interpreter, x, TARGET)
    solved = interpreter.solve(x, TARGET)
    moments = solved.moments
    for turn in range(7):
        before = surrogate._follower
        surrogate.advance(x)
        if turn % 3 == 0:
            if turn:
                moments = before.moments
            first, second = 0.25 * moments.first, 0.0625 * moments.second
            before = Follower(
                solved.kept, moments._replace(first=first, second=second, steps=50), 5
            )
        expected = interpreter.solve(x, TARGET, before, 2)
        assert_same(surrogate._follower, expected, rtol=1e-10, atol=1e-14)
    assert surrogate._follower.moments.steps == 52


def test_unsolved_it_begins_where_mask_does(net):
    x, interpreter = images64(), MASK(net, **SETTINGS)
    surrogate = Unrolled(n_step=2, n_reset=3, solved=False)(interpreter, x, TARGET)
    surrogate.advance(x)
    assert_same(surrogate._follower, interpreter.solve(x, TARGET, iterations=2))
    for _ in range(3):
        surrogate.advance(x)
    assert surrogate._follower.moments.steps == 102


# Proposition 2: on a quadratic l(m; x) = (m - A x)' H (m - A x) / 2, where g(x) = A x


class Quadratic(NamedTuple):
    a: torch.Tensor
    h: torch.Tensor
    x: torch.Tensor
    goal: torch.Tensor

    def slope(self, m, x):
        """Return the gradient with respect to m."""
        return self.h @ (m - self.a @ x)

    def equation_17(self, m):
        """Return -l_xm H^-1 (m - goal), each derivative taken by autograd."""

        def loss(x, m):
            return 0.5 * (m - self.a @ x) @ self.h @ (m - self.a @ x)

        (_, x_m), (_, m_m) = torch.autograd.functional.hessian(loss, (self.x, m))
        return -x_m @ torch.linalg.solve(m_m, m - self.goal)

    def through(self, step):
        """Return the images' gradient of half the squared distance of a map to the goal."""
        x = self.x.clone().requires_grad_()
        return torch.autograd.grad(0.5 * (step(x) - self.goal).square().sum(), x)[0]


def quadratic(seed, inner=5, outer=7, a=None, diagonal=False):
    generator = seeded(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    root = normal(inner, inner)
    h = torch.eye(inner, dtype=torch.float64) + root @ root.T
    a = normal(inner, outer) if a is None else a(normal)
    return Quadratic(a, torch.diag(h.diag()) if diagonal else h, normal(outer), normal(inner))


@given(seed=SEEDS)
def test_proposition_2(seed):
    q = quadratic(seed)
    torch.testing.assert_close(q.through(lambda x: q.a @ x), q.equation_17(q.a @ q.x))


@given(seed=SEEDS, away=st.floats(0, 10))
def test_a_newton_step_unrolled_has_the_gradient_of_proposition_2(seed, away):
    q = quadratic(seed)
    exact = q.a @ q.x
    m = exact + away * torch.randn(5, generator=seeded(seed), dtype=torch.float64)
    ours = q.through(lambda x: m - torch.linalg.solve(q.h, q.slope(m, x)))
    torch.testing.assert_close(ours, q.equation_17(exact), rtol=1e-7, atol=1e-9)


@given(seed=SEEDS, orthogonal=st.booleans(), steps=st.integers(1, 20))
def test_an_adam_step_unrolled_agrees_with_it_in_sign(seed, orthogonal, steps):
    def a(normal):
        square = normal(5, 5)
        return torch.linalg.qr(square)[0] if orthogonal else torch.diag(square.diag())

    q, adam = quadratic(seed, 5, 5, a, diagonal=True), Adam(lr=0.01)
    m = q.a @ q.x
    q = q._replace(goal=m + q.goal.sign() * (q.goal.abs() + 0.1))  # more than a step away
    state = adam.init(m)
    for number in range(steps):  # warmed on the way to the solution, then set back
        _, state = adam.update(q.slope(m + 0.5**number * q.goal, q.x), state)
    state = adam.rescale(state, 0.5, 100)
    ours = q.through(lambda x: m - adam.update(q.slope(m, x), state)[0])
    theirs = q.equation_17(m)
    assert ours @ theirs > 0
    if not orthogonal:
        assert torch.equal(ours.sign(), theirs.sign())

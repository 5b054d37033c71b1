# SPDX-License-Identifier: MIT
"""MASK's surrogates against exact derivatives, and Proposition 2 on quadratics."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mask import TARGET, images64, seeded
from torch import Tensor, nn

from captum_adv2 import ADV2
from captum_adv2.attacks.loop import take
from captum_adv2.evaluation import metrics
from captum_adv2.interpreters import MASK, FiniteDifference, Unrolled
from captum_adv2.interpreters.bilevel import Follower
from captum_adv2.interpreters.gradient import log_odds
from captum_adv2.interpreters.mask import Blur
from captum_adv2.optim import Adam
from captum_adv2.testing import unchanged

SEEDS = st.integers(0, 2**32 - 1)
SETTINGS = {"size": 4, "iterations": 5, "perturb": Blur(4.0)}
SURROGATES = [
    FiniteDifference(n_step=2, cycle=3),
    FiniteDifference(n_step=1, cycle=3, followers=2),
    Unrolled(n_step=2, n_reset=2),
]
NAMES = ["difference", "two followers", "unrolled"]
both_surrogates = pytest.mark.parametrize("surrogate", SURROGATES, ids=NAMES)


def weights64(seed=3, steps=1):
    unit = torch.rand(3, steps, 4, 4, generator=seeded(seed), dtype=torch.float64)
    return unit - 0.5


def moved(surrogate, mask, x, target=TARGET, turns=3):
    """Return the state after some iterates."""
    state = surrogate.init(mask, x, target)
    for turn in range(turns):
        state = surrogate.advance(mask, (x + 0.01 * turn).clamp(0, 1), state, 0.0)
    return state


def pulled(surrogate, mask, state, x, weights):
    """Return the images' gradient of a weighted sum of the maps, and the explanation."""
    leaf = x.clone().requires_grad_()
    explanation = surrogate(mask, leaf, state, 0.0)
    (gradient,) = torch.autograd.grad((explanation.maps * weights).sum(), leaf)
    return gradient, explanation


def stepped(mask, x, follower, steps, pace=1.0):
    """Return a follower after some of MASK's own steps."""
    for _ in range(steps):
        follower = mask.descend(mask.scene(x, TARGET), follower, pace)
    return follower


def assert_same(found, expected):
    assert (found.step, found.moments.steps) == (expected.step, expected.moments.steps)
    for a, b in zip(
        (found.kept, *found.moments[:2]), (expected.kept, *expected.moments[:2]), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def net(trained_smooth):
    return trained_smooth


# Both surrogates


@both_surrogates
def test_a_batch_is_its_images_and_finished_images_can_be_taken_out(net, surrogate):
    x, weights, mask = images64(), weights64(), MASK(net, **SETTINGS, jitter=2)
    state = moved(surrogate, mask, x)
    together, explained = pulled(surrogate, mask, state, x, weights)
    assert (together.abs().amax(dim=(1, 2, 3)) > 0).all()
    for i in range(3):
        image, target = x[i : i + 1], TARGET[i : i + 1]
        for own in (moved(surrogate, mask, image, target), take(state, torch.tensor([i]))):
            alone, single = pulled(surrogate, mask, own, image, weights[i : i + 1])
            torch.testing.assert_close(single.maps[0], explained.maps[i], rtol=0, atol=1e-9)
            torch.testing.assert_close(alone[0], together[i], rtol=1e-6, atol=1e-9)


@both_surrogates
def test_a_surrogate_leaves_state_model_and_images_unchanged(net, surrogate):
    mask, x, weights = MASK(net, **SETTINGS), images64(), weights64()
    state = moved(surrogate, mask, x)
    first, explained = pulled(surrogate, mask, state, x, weights)
    with unchanged(net, x):
        pulled(surrogate, mask, state, 1 - x, weights)
        surrogate.advance(mask, 1 - x, state, 0.5)
        with torch.no_grad():
            maps, logits, _ = surrogate(mask, x, state, 0.0)
    again, _ = pulled(surrogate, mask, state, x, weights)
    torch.testing.assert_close(again, first, rtol=0, atol=1e-12)
    torch.testing.assert_close(maps, explained.maps)
    torch.testing.assert_close(logits, net(x))


# FiniteDifference


def test_followers_are_at_different_places_of_the_cycle(net):
    x, mask = images64(), MASK(net, **SETTINGS)
    one, two = (FiniteDifference(n_step=1, cycle=4, followers=n) for n in (1, 2))
    for turns in range(1, 6):
        alone, both = moved(one, mask, x, turns=turns), moved(two, mask, x, turns=turns)
        assert_same(both.followers[0], alone.followers[0])
        # The second one is half a cycle ahead, and restarts then.
        assert both.followers[1].step == (turns if turns < 3 else turns - 2)


def test_several_followers_pull_as_the_mean_of_each(net):
    x, mask, weights = images64(), MASK(net, **SETTINGS), weights64()
    surrogate = FiniteDifference(n_step=2, cycle=4, followers=2)
    state = moved(surrogate, mask, x)
    together, explained = pulled(surrogate, mask, state, x, weights)
    assert explained.maps.shape == (3, 2, 4, 4)
    single = FiniteDifference(n_step=2, cycle=4)
    iterations = (3, 1)  # the second one restarted half a cycle later
    alone = [
        pulled(single, mask, state._replace(followers=(each,), iteration=at), x, weights)[0]
        for each, at in zip(state.followers, iterations, strict=True)
    ]
    torch.testing.assert_close(together, sum(alone) / 2)


class Pull(NamedTuple):
    mask: MASK
    follower: Follower
    images: torch.Tensor
    wanted: torch.Tensor  # the direction of the mask that lowers the loss, up to Adam's moment
    gradient: torch.Tensor


def pull_of(net, weights, seed=0, jitter=2, **changes):
    x, mask = images64(seed=seed), MASK(net, 4, jitter=jitter, lr=0.02, perturb=Blur(4.0))
    surrogate = FiniteDifference(n_step=3, **changes)
    state = moved(surrogate, mask, x, turns=2)
    gradient, explained = pulled(surrogate, mask, state, x, weights)
    follower = state.follower
    assert torch.equal(explained.maps, 1 - follower.kept)
    return Pull(mask, follower, x, weights / follower.moments.second.sqrt(), gradient)


@given(seed=SEEDS, jitter=st.sampled_from([0, 2]))
@settings(max_examples=8)
def test_the_difference_is_the_mixed_derivative(net, seed, jitter):
    mask, follower, images, wanted, gradient = pull_of(
        net, weights64(seed), seed, jitter, reach=1e-4
    )
    leaf, kept = images.clone().requires_grad_(), follower.kept.requires_grad_()
    losses = mask.objective(mask.scene(leaf, TARGET), kept, follower.step)
    (slope,) = torch.autograd.grad(losses.sum(), kept, create_graph=True)
    (mixed,) = torch.autograd.grad((slope * wanted).sum(), leaf)
    cosine = F.cosine_similarity(mixed.flatten(1), gradient.flatten(1))
    assert (cosine > 0.99).all()


@pytest.mark.parametrize("gain", [0.005, 2.0])
@pytest.mark.parametrize("reach", [0.01, 1.0])
@pytest.mark.parametrize(("cycle", "late"), [(2, 2.0), (8, 0.5)])
def test_the_length_of_the_gradient(net, gain, reach, cycle, late):
    weights = weights64(0)
    _, _, images, _, gradient = pull_of(net, weights, gain=gain, reach=reach, cycle=cycle)
    leaf = images.clone().requires_grad_()
    (slope,) = torch.autograd.grad(log_odds(net(leaf), TARGET).sum(), leaf)
    found, wanted, odds = (v.abs().sum(dim=(1, 2, 3)) for v in (gradient, weights, slope))
    torch.testing.assert_close(found, late * gain * wanted * odds)  # after two iterations


def test_no_gradient_on_a_map_gives_none_on_its_image(net):
    x, weights, mask = images64(), weights64(), MASK(net, **SETTINGS)
    weights[1] = 0
    gradient, _ = pulled(SURROGATES[0], mask, moved(SURROGATES[0], mask, x), x, weights)
    assert gradient.isfinite().all()
    assert gradient.flatten(1).any(dim=1).tolist() == [True, False, True]


@pytest.mark.parametrize("cycle", [1, 3])
def test_the_follower_restarts_every_cycle_at_its_pace(net, cycle):
    x, mask = images64(), MASK(net, **SETTINGS, jitter=2)
    surrogate = FiniteDifference(n_step=2, cycle=cycle, pace=2.0)
    state = surrogate.init(mask, x, TARGET)
    for turn in range(2 * cycle + 1):
        state = surrogate.advance(mask, x, state, 0.0)
        expected = stepped(mask, x, mask.begin(x), 2 * (turn % cycle + 1), pace=2.0)
        assert_same(state.follower, expected)


def test_first_order_cost(net):
    passes, x, mask = [], images64(), MASK(net, **SETTINGS)
    surrogate = FiniteDifference(n_step=3)
    handle = net.register_forward_hook(lambda module, args, out: passes.append(len(out)))
    pulled(surrogate, mask, moved(surrogate, mask, x, turns=1), x, weights64())
    handle.remove()
    # The log-odds at the start and every fifth time, the follower's steps, the prediction, and two
    # masks an image.
    assert passes == [3, 3, 3, 3, 3, 3, 6]


# Unrolled


@pytest.mark.parametrize("n_step", [1, 3])
def test_unrolled_maps_are_masks_next_ones(net, n_step):
    x, mask, surrogate = images64(), MASK(net, **SETTINGS, jitter=2), Unrolled(n_step=n_step)
    state = moved(surrogate, mask, x)
    maps = surrogate(mask, x, state, 0.0).maps.detach()
    expected = [1 - stepped(mask, x, state.follower, ahead + 1).kept for ahead in range(n_step)]
    torch.testing.assert_close(maps, torch.cat(expected, dim=1))


@pytest.mark.parametrize("solved", [True, False])
@pytest.mark.parametrize("jitter", [0, 2])
def test_the_unrolled_gradient_is_that_of_finite_differences(net, solved, jitter):
    x, mask = images64(), MASK(net, 4, 8, jitter=jitter, lr=0.01, tv=0.1, perturb=Blur(4.0))
    surrogate, weights = Unrolled(n_step=3, solved=solved), weights64(1, steps=3)
    state = moved(surrogate, mask, x)
    gradient, _ = pulled(surrogate, mask, state, x, weights)
    assert gradient.abs().max() > 1e-6
    for seed in range(4):
        along = torch.randn(x.shape, generator=seeded(seed), dtype=torch.float64)
        high, low = (
            (surrogate(mask, x + s * 1e-6 * along, state, 0.0).maps * weights).sum()
            for s in (1, -1)
        )
        slope = ((high - low) / 2e-6).item()
        assert (gradient * along).sum().item() == pytest.approx(slope, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("solved", [True, False])
def test_a_reset_takes_masks_solution_and_smaller_moments(net, solved):
    x, mask = images64(), MASK(net, **SETTINGS, jitter=2)
    surrogate = Unrolled(n_step=2, n_reset=3, solved=solved, shrink=0.25, count=50)
    state, solution = surrogate.init(mask, x, TARGET), mask.solve(x, TARGET)
    for turn in range(5):
        follower = state.follower
        if turn == 3 or (solved and turn == 0):
            first, second, _ = follower.moments if turn else solution.moments
            moments = follower.moments._replace(first=0.25 * first, second=second / 16, steps=50)
            follower = Follower(solution.kept, moments, solution.step)
        state = surrogate.advance(mask, x, state, 0.0)
        assert_same(state.follower, stepped(mask, x, follower, 2))


# Proposition 2: l(m; x) = (m - A x)' H (m - A x) / 2 is least at the map A x, so the gradient of a
# loss |m - goal|^2 / 2 of the map is A' (m - goal)


@given(seed=SEEDS, steps=st.integers(1, 20))
def test_an_adam_step_unrolled_agrees_in_sign_with_proposition_2(seed, steps):
    generator, adam = seeded(seed), Adam(lr=0.01)
    a, x, goal = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    h = 1 + torch.rand(5, generator=generator, dtype=torch.float64)  # A and H are diagonal
    m = a * x
    goal = m + goal.sign() * (goal.abs() + 0.1)  # more than a step away
    state = adam.init(m)
    for number in range(steps):  # moments of the way to the solution, then rescaled
        _, state = adam.update(h * 0.5**number * goal, state)
    state, leaf = adam.rescale(state, 0.5, 100), x.clone().requires_grad_()
    step, _ = adam.update(h * (m - a * leaf), state)
    (found,) = torch.autograd.grad((m - step - goal).square().sum() / 2, leaf)
    assert torch.equal(found.sign(), (a * (m - goal)).sign())


class EitherHalf(nn.Module):
    """Class 1 where the left half of the image is bright, or the right one."""

    def __init__(self) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(60.0))

    def forward(self, x: Tensor) -> Tensor:
        halves = torch.stack([x[..., :8].mean(dim=(1, 2, 3)), x[..., 8:].mean(dim=(1, 2, 3))])
        odds = (self.sharpness * (halves - 0.5)).logsumexp(dim=0)
        return torch.stack([torch.zeros_like(odds), odds], dim=1)


@pytest.mark.parametrize("surrogate", [None, Unrolled()])
def test_mask_shows_the_half_that_it_is_to_show(surrogate: Unrolled | None) -> None:
    # Both halves take the image to its class: which of them MASK shows is up to the attack.
    model = EitherHalf()
    images = 0.4 + 0.05 * torch.rand(4, 1, 16, 16)
    target = torch.ones(4, dtype=torch.long)
    mask = MASK(model, 4, 60, perturb=torch.zeros_like, jitter=0, tv=0.0, sparsity=0.05)
    attack = ADV2(model, mask, eps=0.2, alpha=0.02, steps=40, surrogate=surrogate)
    attack.set_mode_targeted_by_label(quiet=True)
    left = torch.zeros(4, 1, 4, 4)
    left[..., :2] = 1
    for wanted in (left, 1 - left):
        adversarial = attack(images, target, target_maps=wanted)
        assert torch.equal(model(adversarial).argmax(dim=1), target)
        shown = mask(adversarial, target)
        near, far = metrics.l1(shown, wanted), metrics.l1(shown, 1 - wanted)
        assert (near < 0.75 * far).all()

# SPDX-License-Identifier: MIT
"""The L-infinity ball: its projection, and where a random start begins."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from captum_adv2.attacks import Framework, LinfBall

ULP = 2.0**-23  # of float32 at 1: what adding and subtracting the clean image may round away
EPS = st.one_of(st.sampled_from([0.0, 1 / 255, 8 / 255, 1.0]), st.floats(0.0, 2.0, width=32))
SEEDS = st.integers(0, 2**32 - 1)


def images(seed, shape=(2, 3, 4, 4)):
    """Images that often lie on the border of [0, 1], where two constraints meet."""
    wide = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 1.5 - 0.25
    return wide.clamp(0, 1)


@given(eps=EPS, seed=SEEDS, scale=st.sampled_from([0.0, 1e-3, 0.1, 10.0]))
def test_a_move_ends_in_ball_and_range(eps, seed, scale):
    clean = images(seed)
    direction = scale * (2 * images(seed + 1) - 1)
    moved = LinfBall(eps).move(clean, direction, clean)
    assert moved.shape == clean.shape
    assert moved.dtype == clean.dtype
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert (moved - clean).abs().max() <= eps + ULP


@given(eps=EPS, seed=SEEDS)
def test_projection_is_idempotent(eps, seed):
    clean, variable = images(seed), images(seed + 1)
    ball, nowhere = LinfBall(eps), torch.zeros_like(clean)
    once = ball.move(variable, nowhere, clean)
    torch.testing.assert_close(ball.move(once, nowhere, clean), once, rtol=0, atol=ULP)


@given(eps=EPS, seed=SEEDS)
def test_projection_is_the_nearest_legal_image(eps, seed):
    clean, variable = images(seed), 3 * images(seed + 1) - 1
    low, high = (clean - eps).clamp(min=0), (clean + eps).clamp(max=1)
    moved = LinfBall(eps).move(variable, torch.zeros_like(clean), clean)
    torch.testing.assert_close(moved, variable.clamp(low, high), rtol=0, atol=2 * ULP)


def test_a_move_inside_the_ball_is_the_move_itself():
    clean = torch.full((1, 1, 1, 2), 0.5)
    direction = torch.tensor([[[[0.125, -0.0625]]]])
    moved = LinfBall(0.25).move(clean, direction, clean)
    assert moved.flatten().tolist() == [0.625, 0.4375]


def test_a_move_carries_no_graph():
    clean = torch.rand(1, 1, 2, 2)
    leaf = clean.clone().requires_grad_()
    assert not LinfBall(0.1).move(leaf, torch.zeros_like(clean), clean).requires_grad


def test_without_random_start_it_begins_at_the_clean_images():
    clean = images(0)
    assert torch.equal(LinfBall(0.1).init(clean), clean)


@given(eps=EPS, seed=SEEDS)
def test_random_start_is_in_ball_and_range(eps, seed):
    clean = images(seed)
    start = LinfBall(eps, True, torch.Generator().manual_seed(seed)).init(clean)
    assert start.min() >= 0
    assert start.max() <= 1
    assert (start - clean).abs().max() <= eps + ULP


def test_random_start_fills_the_ball_on_both_sides():
    clean = torch.full((4, 3, 16, 16), 0.5)
    change = LinfBall(0.1, True).init(clean) - clean
    assert change.min() < -0.09
    assert change.max() > 0.09
    assert change.mean().abs() < 0.01


def test_random_start_is_repeatable_and_leaves_the_global_generator_alone():
    clean, state = images(0), torch.get_rng_state()
    by_default = [LinfBall(0.1, True).init(clean) for _ in range(2)]
    seeded = [
        LinfBall(0.1, True, torch.Generator().manual_seed(seed)).init(clean) for seed in (3, 3, 4)
    ]
    assert torch.equal(*by_default)
    assert torch.equal(seeded[0], seeded[1])
    assert not torch.equal(seeded[0], seeded[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_generator_goes_on_from_where_it_was():
    clean, ball = images(0), LinfBall(0.1, True, torch.Generator().manual_seed(3))
    assert not torch.equal(ball.init(clean), ball.init(clean))


def test_the_variable_is_the_image_and_costs_nothing():
    clean, variable = images(0), images(1)
    ball = LinfBall(0.1)
    assert ball.image(variable, clean) is variable
    assert torch.equal(ball.penalty(variable), torch.zeros(2))


def test_framework_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Framework()

# SPDX-License-Identifier: MIT
"""Adam as a pure function: against torch's, its derivatives, and what rescaling means."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from captum_adv2.optim import Adam, AdamState, safe_sqrt

SEEDS = st.integers(0, 2**32 - 1)
BETAS = st.tuples(st.floats(0.0, 0.99), st.floats(0.0, 0.9999))


def drawn(seed, count, spread=1.0):
    """Gradients of widely different sizes, one of them always zero."""
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    gradients *= 10 ** (spread * torch.randn(5, generator=generator, dtype=torch.float64))
    gradients[:, 0] = 0
    return gradients


def run(adam, gradients):
    parameters = torch.zeros_like(gradients[0])
    state = adam.init(parameters)
    for gradient in gradients:
        step, state = adam.update(gradient, state)
        parameters = parameters - step
    return parameters, state


@given(seed=SEEDS, lr=st.floats(1e-4, 10.0), betas=BETAS, count=st.integers(1, 7))
def test_steps_are_torchs(seed, lr, betas, count):
    gradients = drawn(seed, count)
    ours, state = run(Adam(lr, betas), gradients)
    leaf = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    theirs = torch.optim.Adam([leaf], lr=lr, betas=betas)
    for gradient in gradients:
        leaf.grad = gradient.clone()
        theirs.step()
    torch.testing.assert_close(ours, leaf.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(state.first, theirs.state[leaf]["exp_avg"])
    torch.testing.assert_close(state.second, theirs.state[leaf]["exp_avg_sq"])
    assert state.steps == count


@given(seed=SEEDS, betas=BETAS, steps=st.integers(0, 30))
def test_gradcheck(seed, betas, steps):
    gradient, first = drawn(seed, 2, spread=0.0)
    gradient, first = (0.5 * v.sign() + v for v in (gradient, first))  # away from the root's kink
    gradient[0] = first[0] = 0.3
    second = first.square() + 0.5
    inputs = tuple(v.clone().requires_grad_() for v in (gradient, first, second))

    def update(gradient, first, second):
        step, state = Adam(0.3, betas).update(gradient, AdamState(first, second, steps))
        return step, state.first, state.second

    assert torch.autograd.gradcheck(update, inputs)


def test_derivatives_are_finite_where_nothing_has_moved():
    leaf = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    state, total = Adam().init(leaf), 0
    for _ in range(3):  # through the moments too
        step, state = Adam().update(leaf, state)
        total = total + step
    for part in (total, state.first, state.second):
        (slope,) = torch.autograd.grad(part.sum(), leaf, retain_graph=True)
        assert slope.isfinite().all()
    assert not total.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_the_steps_of_single(dtype):
    gradients = torch.tensor([[0.0, 1e-6, -1e-4, 0.3, -200.0], [0.0, 2e-6, 0.0, -0.1, 100.0]])
    adam, short = Adam(lr=0.1), gradients.to(dtype)
    state, expected = adam.init(short[0]), adam.init(gradients[0])
    for half, single in zip(short, short.float(), strict=True):
        step, state = adam.update(half, state)
        exact, expected = adam.update(single, expected)
        assert step.dtype == dtype
        assert torch.equal(step, exact.to(dtype))


def test_a_moment_that_forgets_nothing_is_refused():
    for betas, name in (((1.0, 0.9), 0), ((0.9, 1.0), 1)):  # its correction would be 0 / 0
        with pytest.raises(ValueError, match=rf"betas\[{name}\] in \[0, 1\), got 1.0"):
            Adam(betas=betas)


def test_safe_sqrt():
    values = torch.tensor([0.0, 1e-30, 4.0], dtype=torch.float64, requires_grad=True)
    roots = safe_sqrt(values)
    assert torch.equal(roots, values.sqrt())
    (slope,) = torch.autograd.grad(roots.sum(), values, create_graph=True)
    torch.testing.assert_close(slope, torch.tensor([0.0, 0.5e15, 0.25], dtype=torch.float64))
    (curvature,) = torch.autograd.grad(slope.sum(), values)
    assert curvature.isfinite().all()
    assert curvature[0] == 0


@given(seed=SEEDS, betas=BETAS, factor=st.floats(0.01, 100.0), steps=st.integers(1, 200))
def test_rescaled_moments_are_those_of_scaled_gradients(seed, betas, factor, steps):
    gradients, adam = drawn(seed, 5), Adam(0.1, betas)
    ours = adam.rescale(run(adam, gradients)[1], factor, steps)
    scaled = run(adam, factor * gradients)[1]
    torch.testing.assert_close(ours.first, scaled.first, rtol=1e-9, atol=1e-30)
    torch.testing.assert_close(ours.second, scaled.second, rtol=1e-9, atol=1e-30)
    assert ours.steps == steps

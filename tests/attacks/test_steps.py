# SPDX-License-Identifier: MIT
"""The step rule: zero gradients, momentum against NumPy, the decay, and independence of images."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from captum_adv2.attacks import Framework, LinfBall, Problem, SignDescent

ALPHA = 0.01


def random_images(seed=0, batch=3):
    return torch.rand(batch, 2, 3, 3, generator=torch.Generator().manual_seed(seed)).double()


def quadratic(goal, weight=1.0):
    """A loss per image with a gradient, weight * (x - goal), that changes along the way."""
    return lambda images, progress: 0.5 * weight * (images - goal).square().sum(dim=(1, 2, 3))


def problem_of(clean, loss, framework=None, alpha=ALPHA, steps=10):
    return Problem(framework or LinfBall(1.0), clean, alpha=alpha, steps=steps, loss=loss)


def run(step, problem, steps):
    """Take steps from the clean images; return all iterates."""
    variable, memory, path = problem.clean, None, []
    for number in range(steps):
        problem.progress = number / steps
        variable, memory = step(problem, variable, memory)
        path.append(variable)
    return path


@pytest.mark.parametrize("step", [SignDescent(), SignDescent(0.0, 1.0)])
def test_a_zero_gradient_does_not_move_and_gives_no_nan(step):
    clean = random_images()
    still = problem_of(clean, lambda x, progress: 0 * x.sum(dim=(1, 2, 3)))
    for variable in run(step, still, 3):
        assert torch.equal(variable, clean)


def test_a_zero_gradient_of_one_image_stops_only_that_image():
    clean = random_images()
    active = torch.tensor([1.0, 0.0, 1.0]).double()
    problem = problem_of(clean, lambda x, _: active * x.sum(dim=(1, 2, 3)))
    moved = (run(SignDescent(), problem, 2)[-1] != clean).flatten(1).any(dim=1)
    assert moved.tolist() == [True, False, True]


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("final", [0.0, 0.025, 1.0])
def test_momentum_and_decay_are_what_numpy_computes(momentum, final):
    clean, goal, steps, eps = random_images(), random_images(1), 12, 0.05
    weight = 1 + random_images(2)

    def loss(x, progress):
        return (weight * (x - goal) ** 2).sum(dim=(1, 2, 3)) / 2

    problem = problem_of(clean, loss, LinfBall(eps), steps=steps)
    ours = run(SignDescent(momentum, final), problem, steps)

    x0, g, w = clean.numpy(), goal.numpy(), weight.numpy()
    x, velocity = x0, np.zeros_like(x0)
    for number, variable in enumerate(ours):
        gradient = w * (x - g)
        velocity = momentum * velocity + gradient / np.abs(gradient).mean(
            axis=(1, 2, 3), keepdims=True
        )
        decay = final + (1 - final) * (1 + np.cos(np.pi * number / steps)) / 2
        x = np.clip(x0 + np.clip(x - ALPHA * decay * np.sign(velocity) - x0, -eps, eps), 0, 1)
        np.testing.assert_allclose(variable.numpy(), x, rtol=0, atol=1e-12)


def test_momentum_remembers_where_plain_descent_does_not():
    clean = torch.full((1, 1, 1, 1), 0.5)
    signs = iter((1.0, -0.5))  # the second gradient is opposite; L1-normalised, as large
    problem = problem_of(clean, lambda x, _: next(signs) * x.sum(dim=(1, 2, 3)))
    first, velocity = SignDescent(0.9, 1.0)(problem, clean, None)
    assert first.item() == pytest.approx(0.5 - ALPHA)
    assert velocity.item() == 1.0
    second, velocity = SignDescent(0.9, 1.0)(problem, first, velocity)
    assert velocity.item() == pytest.approx(-0.1)
    assert second.item() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("progress", "share"), [(0.0, 1.0), (0.5, (1 + 0.2) / 2), (1.0, 0.2), (1 / 3, 0.2 + 0.8 * 0.75)]
)
def test_the_decay_goes_from_alpha_to_its_final_share(progress, share):
    clean = torch.full((1, 1, 1, 1), 0.5).double()
    problem = problem_of(clean, lambda x, _: x.sum(dim=(1, 2, 3)))
    problem.progress = progress
    moved, _ = SignDescent(0.0, final=0.2)(problem, clean, None)
    assert (clean - moved).item() == pytest.approx(ALPHA * share, rel=1e-9)


def test_a_final_share_of_one_is_a_constant_step_to_the_last_bit():
    clean = torch.zeros(1, 1, 1, 1)
    problem = problem_of(clean, lambda x, _: -x.sum(dim=(1, 2, 3)), alpha=2 / 255)
    for progress in (0.0, 0.3, 0.7, 0.99):
        problem.progress = progress
        moved, _ = SignDescent(0.0, 1.0)(problem, clean, None)
        assert moved.item() == torch.tensor(2 / 255).item()


@given(power=st.integers(-60, 60))
def test_the_scale_of_the_loss_does_not_matter(power):
    clean, goal = random_images(), random_images(1)
    plain = run(SignDescent(), problem_of(clean, quadratic(goal)), 4)[-1]
    scaled = problem_of(clean, quadratic(goal, 2.0**power))
    assert torch.equal(run(SignDescent(), scaled, 4)[-1], plain)


def test_a_batch_moves_like_its_images():
    clean, goal = random_images(), random_images(1)
    together = run(SignDescent(), problem_of(clean, quadratic(goal), LinfBall(0.1)), 5)[-1]
    for i in range(len(clean)):
        alone = problem_of(clean[i : i + 1], quadratic(goal[i : i + 1]), LinfBall(0.1))
        assert torch.equal(run(SignDescent(), alone, 5)[-1], together[i : i + 1])


def test_a_share_of_one_is_allowed():
    assert SignDescent(momentum=1.0, final=1.0) == SignDescent(1.0, 1.0)


def test_descent_descends():
    clean, goal = random_images(), random_images(1)
    loss = quadratic(goal)
    last = run(SignDescent(), problem_of(clean, loss, alpha=0.05, steps=60), 60)[-1]
    assert (loss(last, 0.0) < 0.05 * loss(clean, 0.0)).all()


class Priced(Framework):
    """The variable is the image's logit, and has a price."""

    def init(self, clean):
        return clean.logit()

    def image(self, variable, clean):
        return variable.sigmoid()

    def move(self, variable, direction, clean):
        return variable.detach() + direction

    def penalty(self, variable):
        return 3 * variable.sum(dim=(1, 2, 3))


def test_the_gradient_is_of_the_loss_through_the_framework_and_of_its_price():
    clean = random_images()
    seen = []

    def loss(images, progress):
        seen.append(progress)
        return images.square().sum(dim=(1, 2, 3))

    problem = problem_of(clean, loss, Priced())
    problem.progress = 0.25
    variable = clean.logit()
    s = variable.sigmoid()
    torch.testing.assert_close(problem.gradient(variable), 2 * s * s * (1 - s) + 3)
    assert seen == [0.25]
    assert not variable.requires_grad


@pytest.mark.parametrize("name", ["momentum", "final"])
@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
def test_numbers_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"expected {name} at least 0 and at most 1, got"):
        SignDescent(**{name: value})


@pytest.mark.parametrize("name", ["momentum", "final"])
@pytest.mark.parametrize("value", ["0.5", [0.5], True])
def test_numbers_of_another_type(name, value):
    with pytest.raises(TypeError, match=f"expected {name} to be a number, got"):
        SignDescent(**{name: value})

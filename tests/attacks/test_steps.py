# SPDX-License-Identifier: MIT
"""The step rules: against NumPy and torch.optim, image by image, and the floor of two phases."""

import math

import attack_helpers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from captum_adv2.attacks import AdamDescent, CrossEntropy, SignDescent, TwoPhase
from captum_adv2.attacks.frameworks import LinfBall
from captum_adv2.interpreters.base import Explanation, Surrogate

ALPHA = 0.01


def random_images(seed=0):
    return torch.rand(3, 2, 3, 3, generator=torch.Generator().manual_seed(seed)).double()


def problem_of(clean, loss, framework=None, **settings):
    """Return a problem with one loss ``(B,)``, a function of images."""

    def logits(images):
        return images.new_zeros(len(images), 2)

    terms = (lambda candidate: loss(candidate.images),)
    settings = {"alpha": ALPHA, "framework": framework} | settings
    return attack_helpers.problem_of(clean, logits, terms, **settings)


def quadratic(goal, weight=1.0):
    """Return a loss whose gradient, weight * (x - goal), changes along the way."""
    return lambda images: 0.5 * (weight * (images - goal).square()).sum(dim=(1, 2, 3))


def run(step, problem, steps):
    """Take steps from the clean images; return all iterates."""
    variable, memory, path = problem.batch.clean, None, []
    for number in range(steps):
        problem.progress = number / steps
        variable, memory = step(problem, variable, memory)
        path.append(variable)
    return path


# Both rules of descent

RULES = [SignDescent(), SignDescent(0.0, 1.0), AdamDescent()]


@pytest.mark.parametrize("step", RULES)
def test_a_batch_moves_like_its_images_one_without_a_gradient_too(step):
    clean, goal = random_images(), random_images(1)
    active = torch.tensor([1.0, 0.0, 1.0]).double().view(-1, 1, 1, 1)

    def moved(part):
        loss = quadratic(goal[part], active[part])
        return run(step, problem_of(clean[part], loss, LinfBall(0.05), alpha=0.03), 5)[-1]

    together = moved(slice(None))
    changes = (together - clean).abs().amax(dim=(1, 2, 3))
    assert changes.tolist() == pytest.approx([0.05, 0, 0.05])
    for i in range(3):
        assert torch.equal(moved(slice(i, i + 1)), together[i : i + 1])


# Signs


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("final", [0.0, 0.025, 1.0])
def test_momentum_and_decay_are_what_numpy_computes(momentum, final):
    clean, goal, steps, eps = random_images(), random_images(1), 12, 0.05
    weight = 1 + random_images(2)
    problem = problem_of(clean, quadratic(goal, weight), LinfBall(eps), steps=steps)
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


@pytest.mark.parametrize(
    ("steps", "momentum", "final"),
    [(1, 0.0, 0.8), (10, 0.5, 0.08), (50, 0.9, 0.016), (100, 0.9, 0.01)],
)
def test_the_defaults_suit_the_number_of_steps_and_any_scale_of_the_loss(steps, momentum, final):
    clean, goal = random_images(), random_images(1)
    plain = run(SignDescent(momentum, final), problem_of(clean, quadratic(goal), steps=steps), 4)
    for scale in (2.0**-60, 1.0, 2.0**60):
        problem = problem_of(clean, quadratic(goal, scale), steps=steps)
        torch.testing.assert_close(run(SignDescent(), problem, 4), plain, rtol=0, atol=1e-12)


# Adam


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5), (0.5, 0.9)])
@pytest.mark.parametrize("final", [1.0, 0.1])
def test_adam_is_torchs_with_a_cosine_schedule(betas, final):
    clean = 0.4 + 0.2 * random_images()  # far from the ball's border
    loss = quadratic(random_images(1), 1 + random_images(2))
    ours = run(AdamDescent(betas, final), problem_of(clean, loss), 20)
    theirs = clean.clone().requires_grad_()
    optimizer = torch.optim.Adam([theirs], ALPHA, betas)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20, ALPHA * final)
    for variable in ours:
        optimizer.zero_grad()
        loss(theirs).sum().backward()
        optimizer.step()
        schedule.step()
        torch.testing.assert_close(variable, theirs.detach(), rtol=0, atol=1e-7)


# Two phases


class Fake(Surrogate):
    """A class whose probability falls as an image's mean rises, and a map that wants it to rise."""

    def __init__(self, pull=0.0, map_pull=-1.0):
        self.pulls, self.passes = (pull, map_pull), []

    def logits(self, images):
        self.passes.append("logits")
        p = (1 - images.mean(dim=(1, 2, 3))).clamp(1e-9, 1 - 1e-9)
        return torch.stack([p.log(), (1 - p).log()], dim=1)

    def __call__(self, interpreter, images, state, progress):
        self.passes.append("map")
        return Explanation(images[:, :1], None)

    def problem(self, clean):
        terms = tuple(
            lambda candidate, pull=pull: pull * candidate.images.sum(dim=(1, 2, 3))
            for pull in self.pulls
        )
        return attack_helpers.problem_of(clean, self.logits, terms, self)


@given(
    seed=st.integers(0, 2**32 - 1),
    kappa=st.floats(0.0, 1.0),
    stride=st.floats(0.0, 1.0),
    longest=st.floats(0.0, 3.0),
    searches=st.integers(1, 8),
    eps=st.sampled_from([0.03, 0.3, 1.0]),
)
def test_a_confidence_once_above_kappa_stays_there(
    trained_smooth, data, seed, kappa, stride, longest, searches, eps
):
    clean, generator = data[0].double(), torch.Generator().manual_seed(seed)
    wanted, noise = torch.randn(2, *clean.shape, generator=generator, dtype=torch.float64)
    terms = (CrossEntropy(0.0), lambda candidate: (wanted * candidate.images).sum(dim=(1, 2, 3)))
    ball = LinfBall(eps)
    problem = attack_helpers.problem_of(clean, trained_smooth, terms, Fake(), framework=ball)
    variable = problem.move(clean, 0.1 * noise)
    before = problem.reached(variable)
    for _ in range(3):
        variable, memory = TwoPhase(kappa, stride, longest, searches)(problem, variable, None)
        after = problem.reached(variable)
        assert (after >= kappa - 1e-12)[before >= kappa].all()
        assert memory is None
        assert (variable - clean).abs().max() <= eps + 1e-12
        before = after


@given(kappa=st.floats(0.0, 1.0), longest=st.floats(1e-3, 3.0), searches=st.integers(1, 14))
def test_the_map_step_is_the_longest_that_is_safe(kappa, longest, searches):
    clean = 0.4 * random_images()  # confidence 0.8 or so: safe or not, by kappa
    problem = Fake().problem(clean)
    held = problem.reached(clean) >= kappa
    moved, _ = TwoPhase(kappa, 0.0, longest, searches)(problem, clean, None)
    wanted = torch.full_like(clean, 1 / math.sqrt(18))  # unit direction
    length = ((moved - clean) * wanted).sum(dim=(1, 2, 3))
    grain = longest / 2**searches
    assert torch.equal(moved[~held], clean[~held])
    assert (problem.reached(moved) >= kappa - 1e-9)[held].all()
    for i in range(3):
        if not held[i] or moved[i].max() == 1:  # clipped: no longer linear
            continue
        assert -1e-12 <= length[i] <= longest - grain + 1e-9
        steps = (length[i] / grain).item()
        assert abs(steps - round(steps)) < 1e-6 * 2**searches  # a bisection's grid
        if length[i] < longest - 1.5 * grain:
            further = problem.move(clean, (length[i] + grain) * wanted)
            assert problem.reached(further)[i] < kappa + 1e-9


@pytest.mark.parametrize(
    ("pull", "kappa", "ends"),
    [
        pytest.param(-1.0, 0.2, 0.55, id="away from the class, still above the floor"),
        pytest.param(-1.0, 0.5, 0.45, id="lost by the step"),
        pytest.param(-1.0, 0.9, 0.45, id="never there, and falling"),
        pytest.param(2.0, 0.2, 0.35, id="towards the class"),
        pytest.param(2.0, 0.99, 0.35, id="towards the class, below the floor"),
        pytest.param(0.0, 0.2, 0.45, id="without a gradient"),
    ],
)
@pytest.mark.parametrize("searches", [1, 5])
def test_a_prediction_step_is_taken_unless_it_loses_the_class(pull, kappa, ends, searches):
    clean, fake = torch.full((1, 3, 2, 2), 0.45).double(), Fake(pull, map_pull=0.0)
    step = TwoPhase(kappa, stride=0.1 * math.sqrt(12), searches=searches)  # confidence 0.55
    moved, _ = step(fake.problem(clean), clean, None)
    torch.testing.assert_close(moved, torch.full_like(clean, ends))
    assert fake.passes == ["logits", "logits", "map", "logits", *["logits"] * searches]

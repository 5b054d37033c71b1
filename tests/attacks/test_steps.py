# SPDX-License-Identifier: MIT
"""The step rules: against NumPy and torch.optim, image by image, and the floor of two phases."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from targeting import shifted

from captum_adv2.attacks import AdamDescent, CrossEntropy, MapDistance, SignDescent, TwoPhase
from captum_adv2.attacks.frameworks import Framework, LinfBall
from captum_adv2.attacks.loop import Batch, Problem
from captum_adv2.interpreters import CAM
from captum_adv2.interpreters.base import Exact, Explanation, Surrogate

ALPHA = 0.01


def random_images(seed=0, batch=3):
    return torch.rand(batch, 2, 3, 3, generator=torch.Generator().manual_seed(seed)).double()


def batch_of(clean):
    count = len(clean)
    return Batch(clean, torch.zeros(count).long(), 0 * clean[:, :1], torch.arange(count))


def problem_of(clean, loss, framework=None, alpha=ALPHA, steps=10):
    """Return a problem with one loss ``(B,)``, a function of images."""

    def logits(images):
        return images.new_zeros(len(images), 2)

    terms = (lambda candidate: loss(candidate.images),)
    return Problem(logits, framework or LinfBall(1.0), alpha, steps, None, batch_of(clean), terms)


def quadratic(goal, weight=1.0):
    """Return a loss whose gradient, weight * (x - goal), changes along the way."""
    return lambda images: 0.5 * (weight * (images - goal).square()).sum(dim=(1, 2, 3))


def run(step, problem, steps):
    """Take steps from the clean images; return all iterates."""
    variable, memory, path = problem.batch.clean, None, []
    for number in range(steps):
        problem.begin(number / steps)
        variable, memory = step(problem, variable, memory)
        path.append(variable)
    return path


class Free(Framework):
    """The variable is the image; nothing is forbidden."""

    def init(self, clean):
        return clean

    def image(self, variable, clean):
        return variable

    def move(self, variable, direction, clean):
        return variable.detach() + direction


# Both rules of descent

RULES = [SignDescent(), SignDescent(0.0, 1.0), AdamDescent()]


@pytest.mark.parametrize("step", RULES)
def test_a_zero_gradient_of_an_image_moves_no_other_and_gives_no_nan(step):
    clean, active = random_images(), torch.tensor([1.0, 0.0, 1.0]).double()
    problem = problem_of(clean, lambda images: active * images.sum(dim=(1, 2, 3)))
    for variable in run(step, problem, 3):
        moved = (variable != clean).flatten(1).any(dim=1)
        assert moved.tolist() == [True, False, True]
        assert variable.isfinite().all()


@pytest.mark.parametrize("step", RULES)
def test_a_batch_moves_like_its_images_and_stays_in_the_ball(step):
    clean, goal = random_images(), random_images(1)
    together = run(step, problem_of(clean, quadratic(goal), LinfBall(0.05), alpha=0.03), 5)[-1]
    assert (together - clean).abs().max() == pytest.approx(0.05)
    for i in range(len(clean)):
        loss = quadratic(goal[i : i + 1])
        alone = run(step, problem_of(clean[i : i + 1], loss, LinfBall(0.05), alpha=0.03), 5)[-1]
        assert torch.equal(alone, together[i : i + 1])


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
def test_the_defaults_suit_the_number_of_steps(steps, momentum, final):
    clean, goal = random_images(), random_images(1)
    paths = [
        run(rule, problem_of(clean, quadratic(goal), steps=steps), 4)
        for rule in (SignDescent(), SignDescent(momentum, final))
    ]
    torch.testing.assert_close(*paths, rtol=0, atol=1e-12)


@given(power=st.integers(-60, 60))
def test_the_scale_of_the_loss_does_not_matter(power):
    clean, goal = random_images(), random_images(1)
    plain = run(SignDescent(), problem_of(clean, quadratic(goal)), 4)[-1]
    scaled = problem_of(clean, quadratic(goal, 2.0**power))
    assert torch.equal(run(SignDescent(), scaled, 4)[-1], plain)


# Adam


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5), (0.5, 0.0)])
@pytest.mark.parametrize("final", [1.0, 0.1])
def test_adam_is_torchs_with_a_cosine_schedule(betas, final):
    clean, weight, steps = random_images(), 1 + random_images(2), 20
    loss = quadratic(random_images(1), weight)
    ours = run(AdamDescent(betas, final), problem_of(clean, loss, Free(), 0.3), steps)
    theirs = clean.clone().requires_grad_()
    optimizer = torch.optim.Adam([theirs], 0.3, betas)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 0.3 * final)
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
        self.pull, self.map_pull, self.passes = pull, map_pull, []

    def confidence(self, images):
        return (1 - images.mean(dim=(1, 2, 3))).clamp(1e-9, 1 - 1e-9)

    def logits(self, images):
        self.passes.append("logits")
        p = self.confidence(images)
        return torch.stack([p.log(), (1 - p).log()], dim=1)

    def __call__(self, interpreter, images, state, progress):
        self.passes.append("map")
        return Explanation(images[:, :1], None)

    def problem(self, clean):
        terms = [
            lambda candidate, pull=pull: pull * candidate.images.sum(dim=(1, 2, 3))
            for pull in (self.pull, self.map_pull)
        ]
        ball, batch = LinfBall(1.0), batch_of(clean)
        return Problem(self.logits, ball, ALPHA, 10, None, batch, tuple(terms), self)


def cam_problem(net, images, labels, maps, framework):
    """Return the problem of an attack on CAM."""
    batch = Batch(images, shifted(images, labels), maps, torch.arange(len(images)))
    terms = (CrossEntropy(rho=0.0), MapDistance(1000.0))
    return Problem(net, framework, ALPHA, 10, CAM(net), batch, terms, Exact(), batch.target)


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
    generator = torch.Generator().manual_seed(seed)
    clean, labels = data[0].double(), torch.randint(0, 4, data[1].shape, generator=generator)
    maps = torch.rand(len(clean), 1, 8, 8, generator=generator, dtype=torch.float64)
    problem = cam_problem(trained_smooth, clean, labels, maps, LinfBall(eps))
    noise = 0.1 * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    variable = problem.move(clean, noise)
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
    wanted = torch.full_like(clean, 1 / math.sqrt(18))  # unit direction; clipped at 1 is not linear
    length = ((moved - clean) * wanted).sum(dim=(1, 2, 3))
    interior = (moved < 1).flatten(1).all(dim=1)
    grain = longest / 2**searches
    for i in range(3):
        if not held[i]:
            assert torch.equal(moved[i], clean[i])
            continue
        assert problem.reached(moved)[i] >= kappa - 1e-9
        if not interior[i]:
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
        pytest.param(1.0, 0.2, 0.35, id="towards the class"),
        pytest.param(1.0, 0.99, 0.35, id="towards the class, below the floor"),
    ],
)
def test_a_prediction_step_is_taken_unless_it_loses_the_class(pull, kappa, ends):
    clean = torch.full((1, 1, 1, 1), 0.45).double()  # confidence 0.55
    moved, _ = TwoPhase(kappa, stride=0.1, longest=0.0)(Fake(pull).problem(clean), clean, None)
    assert moved.item() == pytest.approx(ends)


@pytest.mark.parametrize("searches", [1, 5])
def test_the_cost_of_a_step(searches):
    fake, clean = Fake(), random_images()
    TwoPhase(searches=searches)(fake.problem(clean), clean, None)
    assert fake.passes == ["logits", "logits", "map", "logits", *["logits"] * searches]


def test_two_phases_move_a_batch_like_its_images(trained_smooth, data):
    clean, labels = data[0].double(), data[1]
    maps = CAM(trained_smooth)(clean, labels).detach()
    step = TwoPhase(kappa=0.3, stride=0.5, longest=1.0, searches=9)

    def attacked(part):
        problem = cam_problem(trained_smooth, clean[part], labels[part], maps[part], LinfBall(0.2))
        return run(step, problem, 4)[-1]

    together = attacked(slice(None))
    for i in range(len(clean)):
        alone = attacked(slice(i, i + 1))
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=1e-7)


@pytest.mark.parametrize("kappa", [0.0, 1.0])
def test_two_phases_without_a_gradient_of_the_map(kappa):
    clean = 0.5 + 0.1 * random_images()
    for pull, moved in ((0.0, clean), (2.0, clean - 0.05 / math.sqrt(18))):  # along 18 pixels
        problem = Fake(pull, map_pull=0.0).problem(clean)
        torch.testing.assert_close(run(TwoPhase(kappa), problem, 1)[-1], moved)

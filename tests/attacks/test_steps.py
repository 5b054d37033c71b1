# SPDX-License-Identifier: MIT
"""The step rules: against NumPy, image by image, and the confidence that two phases keep."""

import math

import numpy as np
import pytest
import torch
from captum_adv2.attacks.run import Batch, Dual, Regular
from hypothesis import given
from hypothesis import strategies as st

from captum_adv2.attacks import (
    AdamDescent,
    CrossEntropy,
    Framework,
    LinfBall,
    MapDistance,
    Problem,
    SignDescent,
    TwoPhase,
)
from captum_adv2.interpreters import CAM

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


@pytest.mark.parametrize("step", [SignDescent(), SignDescent(0.0, 1.0), AdamDescent()])
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


# Adam


class Free(Framework):
    """The variable is the image; nothing is forbidden."""

    def init(self, clean):
        return clean

    def image(self, variable, clean):
        return variable

    def move(self, variable, direction, clean):
        return variable.detach() + direction


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5), (0.5, 0.0)])
@pytest.mark.parametrize("alpha", [0.01, 0.3])
def test_adam_at_a_constant_rate_is_torchs(betas, alpha):
    clean, goal, weight = random_images(), random_images(1), 1 + random_images(2)

    def loss(x, progress=None):
        return (weight * (x - goal) ** 2).sum(dim=(1, 2, 3)) / 2

    problem = problem_of(clean, loss, Free(), alpha)
    ours = run(AdamDescent(betas, final=1.0), problem, 20)
    theirs = clean.clone().requires_grad_()
    optimizer = torch.optim.Adam([theirs], alpha, betas)
    for variable in ours:
        optimizer.zero_grad()
        loss(theirs).sum().backward()
        optimizer.step()
        torch.testing.assert_close(variable, theirs.detach(), rtol=0, atol=1e-7)


def test_adam_moves_a_batch_like_its_images():
    clean, goal = random_images(), random_images(1)
    together = run(AdamDescent(), problem_of(clean, quadratic(goal), LinfBall(0.1)), 5)[-1]
    for i in range(len(clean)):
        alone = problem_of(clean[i : i + 1], quadratic(goal[i : i + 1]), LinfBall(0.1))
        assert torch.equal(run(AdamDescent(), alone, 5)[-1], together[i : i + 1])


@given(progress=st.floats(0.0, 1.0), final=st.floats(0.0, 1.0))
def test_the_rate_of_adam_decays_along_a_cosine(progress, final):
    clean = torch.zeros(1, 1, 1, 1).double()
    problem = problem_of(clean, lambda x, _: -3 * x.sum(dim=(1, 2, 3)), Free())
    problem.progress = progress
    moved, memory = AdamDescent(final=final)(problem, clean, None)  # the first step is a sign
    share = final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
    assert moved.item() == pytest.approx(ALPHA * share, rel=1e-6, abs=1e-15)
    assert memory.steps == 1


def test_adam_keeps_its_state_while_the_rate_decays():
    clean = torch.zeros(1, 1, 1, 1).double()
    slopes = (1.0, -2.0, 0.5)
    left = iter(slopes)
    problem = problem_of(clean, lambda x, _: next(left) * x.sum(dim=(1, 2, 3)), Free(), steps=3)
    path = run(AdamDescent((0.9, 0.99), final=0.0), problem, 3)
    x = first = second = 0.0
    for count, (slope, variable) in enumerate(zip(slopes, path, strict=True), start=1):
        first, second = 0.9 * first + 0.1 * slope, 0.99 * second + 0.01 * slope**2
        rate = ALPHA * (1 + math.cos(math.pi * (count - 1) / 3)) / 2
        x -= rate * first / (1 - 0.9**count) / math.sqrt(second / (1 - 0.99**count))
        assert variable.item() == pytest.approx(x, rel=1e-6)


def test_adam_stays_in_the_framework_and_no_step_is_no_step():
    clean, goal = random_images(), random_images(1)
    last = run(AdamDescent(), problem_of(clean, quadratic(goal), LinfBall(0.05), 0.3), 5)[-1]
    assert (last - clean).abs().max() <= 0.05 + 1e-12
    still = problem_of(clean, quadratic(goal), LinfBall(0.1), alpha=0.0)
    torch.testing.assert_close(run(AdamDescent(), still, 2)[-1], clean, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"final": -0.1}, ValueError, "expected final at least 0 and at most 1"),
        ({"final": "1"}, TypeError, "expected final to be a number"),
        ({"betas": (0.9, 1.0)}, ValueError, "expected betas below 1"),
        ({"betas": (-0.1, 0.9)}, ValueError, "expected betas at least 0"),
        ({"betas": 0.9}, TypeError, "expected betas to be a pair"),
    ],
)
def test_bad_settings_of_adam(settings, error, message):
    with pytest.raises(error, match=message):
        AdamDescent(**settings)


# Two phases


class Fake:
    """A loss whose confidence falls as an image's mean rises, and whose map wants it to rise."""

    def __init__(self, prediction=0.0, slope=1.0, offset=1.0):
        self.pull, self.slope, self.offset = prediction, slope, offset
        self.confidence, self.passes = torch.empty(0), []

    def reached(self, images):
        self.passes.append("reached")
        return (self.offset - self.slope * images.mean(dim=(1, 2, 3))).clamp(0, 1)

    def prediction(self, images, progress):
        self.passes.append("prediction")
        self.confidence = (self.offset - self.slope * images.detach().mean(dim=(1, 2, 3))).clamp(
            0, 1
        )
        return self.pull * images.sum(dim=(1, 2, 3))

    def interpretation(self, images, progress):
        self.passes.append("interpretation")
        return -images.sum(dim=(1, 2, 3))

    def __call__(self, images, progress):
        return self.prediction(images, progress) + self.interpretation(images, progress)


def dual_of(net, images, target, maps, floor=0.0):
    terms = (CrossEntropy(rho=0.0), MapDistance(1000.0))
    return Dual(net, CAM(net).surrogate(images, target), target, maps, terms, floor)


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
    clean = data[0].double()
    target = torch.randint(0, 4, (len(clean),), generator=generator)
    maps = torch.rand(len(clean), 1, 8, 8, generator=generator, dtype=torch.float64)
    problem = problem_of(clean, dual_of(trained_smooth, clean, target, maps), LinfBall(eps))
    variable = problem.framework.move(clean, torch.randn_like(clean) * 0.1, clean)
    before = problem.confidence(variable)
    for _ in range(3):
        variable, memory = TwoPhase(kappa, stride, longest, searches)(problem, variable, None)
        after = problem.confidence(variable)
        assert (after >= kappa - 1e-12)[before >= kappa].all()
        assert memory is None
        assert (variable - clean).abs().max() <= eps + 1e-12
        before = after


@given(kappa=st.floats(0.0, 1.0), longest=st.floats(1e-3, 3.0), searches=st.integers(1, 14))
def test_the_map_step_is_the_longest_that_is_safe(kappa, longest, searches):
    clean = 0.4 * random_images()  # confidence 0.8 or so: safe or not, by kappa
    fake = Fake()
    problem = problem_of(clean, fake)
    held = problem.confidence(clean) >= kappa
    moved, _ = TwoPhase(kappa, 0.0, longest, searches)(problem, clean, None)
    root = math.sqrt(clean[0].numel())
    wanted = torch.full_like(clean, 1 / root)  # unit direction; clipped at 1 is not linear
    length = ((moved - clean) * wanted).sum(dim=(1, 2, 3))
    interior = (moved < 1).flatten(1).all(dim=1)
    grain = longest / 2**searches
    for i in range(3):
        if not held[i]:
            assert torch.equal(moved[i], clean[i])
            continue
        assert problem.confidence(moved)[i] >= kappa - 1e-12
        if not interior[i]:
            continue
        assert -1e-12 <= length[i] <= longest - grain + 1e-9
        steps = (length[i] / grain).item()
        assert abs(steps - round(steps)) < 1e-6 * 2**searches  # a bisection's grid
        if length[i] < longest - 1.5 * grain:
            further = problem.move(clean, (length[i] + grain) * wanted)
            assert problem.confidence(further)[i] < kappa + 1e-12


def test_the_prediction_step_has_its_length_and_direction():
    clean = 0.5 + 0.1 * random_images()
    fake = Fake(prediction=2.0)
    moved, _ = TwoPhase(0.0, stride=0.07, longest=0.0)(problem_of(clean, fake), clean, None)
    torch.testing.assert_close(moved, clean - 0.07 / math.sqrt(18))


@pytest.mark.parametrize(
    ("kappa", "moves"),
    [
        pytest.param(0.2, True, id="still above the floor"),
        pytest.param(0.5, False, id="lost by the step"),
        pytest.param(0.9, False, id="never there, and falling"),
    ],
)
def test_a_prediction_step_that_loses_the_class_is_not_taken(kappa, moves):
    clean = torch.full((1, 1, 1, 1), 0.45).double()  # confidence 0.55; the step raises the image
    fake = Fake(prediction=-1.0)
    moved, _ = TwoPhase(kappa, stride=0.1, longest=0.0)(problem_of(clean, fake), clean, None)
    assert moved.item() == pytest.approx(0.55 if moves else 0.45)


def test_a_prediction_step_towards_the_class_is_taken_below_the_floor_too():
    clean = torch.full((1, 1, 1, 1), 0.45).double()
    fake = Fake(prediction=1.0)
    moved, _ = TwoPhase(0.99, stride=0.1, longest=0.5)(problem_of(clean, fake), clean, None)
    assert moved.item() == pytest.approx(0.35)  # and no map step: nothing there is safe


@pytest.mark.parametrize("searches", [1, 5, 12])
def test_what_a_step_costs(searches):
    fake = Fake()
    TwoPhase(searches=searches)(problem_of(random_images(), fake), random_images(), None)
    assert fake.passes == [
        "prediction",
        "reached",
        "interpretation",
        *["reached"] * searches,
    ]


def test_two_phases_move_a_batch_like_its_images(trained_smooth, data):
    clean, target = data[0].double(), (data[1] + 1) % 4
    maps = CAM(trained_smooth)(clean, data[1]).detach()
    step = TwoPhase(kappa=0.3, stride=0.5, longest=1.0, searches=9)

    def attacked(part):
        loss = dual_of(trained_smooth, clean[part], target[part], maps[part])
        problem = problem_of(clean[part], loss, LinfBall(0.2))
        variable = run(step, problem, 6)[-1]
        return variable, problem.confidence(variable)

    together, confidence = attacked(slice(None))
    assert (confidence >= 0.3).any()
    for i in range(len(clean)):
        alone, _ = attacked(slice(i, i + 1))
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=1e-7)


def test_a_zero_gradient_in_two_phases_does_not_move_and_gives_no_nan():
    class Flat(Fake):
        def interpretation(self, images, progress):
            return 0 * images.sum(dim=(1, 2, 3))

    clean = random_images()
    for kappa in (0.0, 1.0):
        for variable in run(TwoPhase(kappa), problem_of(clean, Flat()), 2):
            torch.testing.assert_close(variable, clean)


@pytest.mark.parametrize(
    ("name", "values"),
    [("kappa", (-0.1, 1.1, math.nan)), ("stride", (-1.0, math.inf)), ("longest", (-1.0, math.nan))],
)
def test_numbers_of_two_phases_out_of_range(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"expected {name} at least 0"):
            TwoPhase(**{name: value})
    for value in ("0.5", True, None):
        with pytest.raises(TypeError, match=f"expected {name} to be a number"):
            TwoPhase(**{name: value})


def test_searches_are_counted():
    with pytest.raises(ValueError, match="expected searches at least 1"):
        TwoPhase(searches=0)
    with pytest.raises(TypeError, match="expected searches to be"):
        TwoPhase(searches=1.5)


# What a problem and a loss tell of their parts


def test_the_gradient_of_a_part():
    clean = random_images()
    fake = Fake(prediction=2.0)
    problem = problem_of(clean, fake, Priced())
    variable = clean.logit()
    s = variable.sigmoid()
    for part, pull in ((fake.prediction, 2.0), (fake.interpretation, -1.0), (None, 1.0)):
        torch.testing.assert_close(problem.gradient(variable, part), pull * s * (1 - s) + 3)
    torch.testing.assert_close(problem.confidence(variable), fake.reached(s))


def test_the_parts_of_the_dual_loss_add_up(trained_smooth, data):
    images, target = data[0].double(), (data[1] + 1) % 4
    maps = CAM(trained_smooth)(images, data[1]).detach()
    loss = dual_of(trained_smooth, images, target, maps)
    with torch.no_grad():
        p = trained_smooth(images).softmax(dim=1).gather(1, target[:, None])[:, 0]
    first = loss.prediction(images, 0.5)
    torch.testing.assert_close(loss.confidence, p)
    torch.testing.assert_close(loss.reached(images), p)
    assert not loss.reached(images.requires_grad_()).requires_grad
    both = loss(images, 0.5)
    torch.testing.assert_close(loss.confidence, p)
    torch.testing.assert_close(both, first + loss.interpretation(images, 0.5))
    torch.testing.assert_close(first, -p.log())


@pytest.mark.parametrize("targeted", [True, False])
def test_the_parts_of_the_warm_starts_loss(trained_smooth, data, targeted):
    images, labels = data[0].double(), data[1]
    target = (labels + 1) % 4 if targeted else None
    loss = Regular(trained_smooth, Batch(images, labels, labels, target, (8, 8)))
    images = images.requires_grad_()
    both = loss(images, 0.5)
    assert not loss.interpretation(images, 0.5).any()
    torch.testing.assert_close(both, loss.prediction(images, 0.5))
    with torch.no_grad():
        p = trained_smooth(images).softmax(dim=1)
        p = p.gather(1, (labels if target is None else target)[:, None])[:, 0]
    torch.testing.assert_close(both, -p.log() if targeted else p.log())
    for told in (loss.reached(images), loss.confidence):
        torch.testing.assert_close(told, p if targeted else 1 - p)
        assert not told.requires_grad

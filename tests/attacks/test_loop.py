# SPDX-License-Identifier: MIT
"""The loop and its problem: on made-up images, maps and losses of which everything is known."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from captum_adv2.attacks import TwoPhase
from captum_adv2.attacks.frameworks import Framework, LinfBall
from captum_adv2.attacks.loop import Batch, Problem, descend, take
from captum_adv2.attacks.steps import SignDescent
from captum_adv2.interpreters.base import Explanation, Surrogate
from captum_adv2.optim import AdamState

SEEDS = st.integers(0, 2**32 - 1)


@dataclasses.dataclass
class Spy(Surrogate):
    """Shows the first colour of images, and notes each call. The state counts the steps."""

    calls: list = dataclasses.field(default_factory=list)

    def init(self, interpreter, images, target):
        return target, 0

    def advance(self, interpreter, images, state, progress):
        self.calls.append(("advance", images, state, progress))
        return state[0], state[1] + 1

    def __call__(self, interpreter, images, state, progress):
        self.calls.append(("call", images, state, progress))
        return Explanation(images[:, :1], None)


def logits_of(images):
    """Return logits of two classes: the first is the likelier, the brighter the image."""
    brightness = images.mean(dim=(1, 2, 3))
    return torch.stack([brightness, 1 - brightness], dim=1)


def cross_entropy(candidate):
    return -candidate.logits.log_softmax(dim=1).gather(1, candidate.target[:, None])[:, 0]


def squares(candidate):
    return (candidate.maps - candidate.target_maps).square().sum(dim=(1, 2, 3))


def further(candidate):
    return candidate.images.pow(3).sum(dim=(1, 2, 3))


def problem_of(clean, *, surrogate=None, framework=None, alpha=0.1, steps=5, **settings):
    count = len(clean)
    target = torch.zeros(count, dtype=torch.long)
    batch = Batch(clean, target, torch.zeros_like(clean[:, :1]), torch.arange(count))
    terms = (cross_entropy, squares, further)
    state = None if surrogate is None else surrogate.init(None, clean, target)
    return Problem(
        logits_of,
        framework or LinfBall(1.0),
        alpha,
        steps,
        None,
        batch,
        terms,
        surrogate,
        state,
        **settings,
    )


def grey(*levels):
    """Return a grey image of 2x2 pixels for each level."""
    return torch.tensor(levels, dtype=torch.float64).view(-1, 1, 1, 1).repeat(1, 3, 2, 2)


# States


@given(
    seed=SEEDS, kept=st.lists(st.integers(0, 4), max_size=5), count=st.integers(0, 9) | st.none()
)
def test_a_part_of_a_state_has_the_rows_of_its_tensors(seed, kept, count):
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.rand(2, 5, 1, 3, generator=generator)
    scalar, index = torch.tensor(3.0), torch.tensor(kept, dtype=torch.long)
    state = (AdamState(first, second, 7), (first > 0.5, count), "name", scalar, ())
    part = take(state, index)
    assert isinstance(part[0], AdamState)
    assert torch.equal(part[0].first, first[index])
    assert torch.equal(part[0].second, second[index])
    assert torch.equal(part[1][0], first[index] > 0.5)
    assert (part[0].steps, part[1][1], part[2:]) == (7, count, ("name", scalar, ()))
    assert torch.equal(state[0].first, first)


@pytest.mark.parametrize("state", [{}, [torch.zeros(2)], (1, object())])
def test_a_state_of_another_kind_is_refused(state):
    with pytest.raises(TypeError, match=r"expected a state of tensors, .*; return .* stop=None"):
        take(state, torch.tensor([0]))


# Gradients


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


@pytest.mark.parametrize("part", ["all", "prediction", "interpretation"])
def test_the_gradient_is_of_a_part_of_the_loss_and_of_the_price(part):
    clean = 0.1 + 0.8 * torch.rand(4, 3, 2, 2, dtype=torch.float64)
    leaf = clean.logit().requires_grad_()
    images = leaf.sigmoid()
    prediction = -logits_of(images).log_softmax(dim=1)[:, 0].sum()
    interpretation = images[:, 0].square().sum() + images.pow(3).sum()

    def expect(gradient, loss):
        (expected,) = torch.autograd.grad(loss + 3 * leaf.sum(), leaf, retain_graph=True)
        torch.testing.assert_close(gradient, expected)

    dual = problem_of(clean, surrogate=Spy(), framework=Priced())
    shares = {"all": (1, 1), "prediction": (1, 0), "interpretation": (0, 1)}[part]
    expect(dual.gradient(leaf, part), shares[0] * prediction + shares[1] * interpretation)
    for untargeted in (False, True):  # a warm start has no map
        warm = problem_of(clean, framework=Priced(), untargeted=untargeted)
        expect(warm.gradient(leaf, part), -prediction if untargeted else prediction)


@pytest.mark.parametrize("untargeted", [True, False])
def test_confidence_and_distance_are_of_the_latest_evaluation(untargeted):
    clean = grey(0.2, 0.9)
    surrogate = None if untargeted else Spy()
    problem = problem_of(clean, surrogate=surrogate, untargeted=untargeted)
    assert problem.confidence.isnan().all()
    p = logits_of(clean).softmax(dim=1)[:, 0]
    expected = 1 - p if untargeted else p
    problem.gradient(clean, "prediction")
    torch.testing.assert_close(problem.confidence, expected)
    assert problem.distance.isnan().all()
    reached = problem.reached(clean.requires_grad_())
    torch.testing.assert_close(reached, expected)
    assert not reached.requires_grad
    if surrogate is not None:
        problem.gradient(clean)
        assert problem.distance.tolist() == pytest.approx([0.2, 0.9])
    for measure in (problem.confidence, problem.distance):
        assert not measure.requires_grad


# What a surrogate sees


@pytest.mark.parametrize("step", [SignDescent(), TwoPhase(searches=3)])
def test_a_surrogate_advances_once_a_step_and_sees_the_progress(step):
    spy = Spy()
    problem = problem_of(grey(0.3, 0.6), surrogate=spy)
    descend(problem, problem.batch.clean, step, range(2, 7), lambda progress: None)
    advanced = [call for call in spy.calls if call[0] == "advance"]
    called = [call for call in spy.calls if call[0] == "call"]
    progress = [call[3] for call in advanced]
    assert progress == [0.0, 0.2, 0.4, 0.6, 0.8]
    assert [call[3] for call in called] == progress
    assert [call[2][1] for call in advanced] == [0, 1, 2, 3, 4]
    assert [call[2][1] for call in called] == [1, 2, 3, 4, 5]
    for before, after in zip(advanced, called, strict=True):
        assert not before[1].requires_grad
        assert after[1].requires_grad
        assert isinstance(step, TwoPhase) or torch.equal(before[1], after[1])


def test_without_a_gradient_no_surrogate_advances():
    spy, reports = Spy(), []
    problem = problem_of(grey(0.3), surrogate=spy, stop=1.0)

    def still(problem, variable, memory):
        return problem.move(variable, 0 * variable), None

    variable, last = descend(problem, problem.batch.clean, still, range(3), reports.append)
    assert spy.calls == []
    assert torch.equal(last, variable)
    assert [report.step for report in reports] == [0, 1, 2]
    assert all(report.confidence.isnan() and report.distance.isnan() for report in reports)


# Finished images


@pytest.mark.parametrize("stop", [None, 0.5])
def test_finished_images_are_taken_out_of_everything(stop):
    # Distances 0.4, 0.8, 0.45, 0.1; the last image is dark, and so not of the first class.
    clean = grey(0.4, 0.8, 0.45, 0.1)
    clean[:3, 1:] = 0.9
    problem = problem_of(clean, surrogate=Spy(), stop=stop)
    assert problem.take_finished() is None  # no map has been computed
    problem.gradient(clean, "prediction")
    assert problem.take_finished() is None
    problem.gradient(clean)
    finished = problem.take_finished()
    if stop is None:
        assert finished is None
        assert len(problem.batch.rows) == 4
        return
    rows, images, remaining = finished
    assert rows.tolist() == [0, 1, 2, 3]
    assert torch.equal(images, clean)
    assert remaining.tolist() == problem.batch.rows.tolist() == [1, 3]
    assert torch.equal(problem.batch.clean, clean[remaining])
    assert torch.equal(problem.seen, clean[remaining])
    assert problem.distance.tolist() == pytest.approx([0.8, 0.1])
    assert problem.enough.tolist() == [True, False]
    state, _ = problem.state
    for part in (problem.batch.target, problem.batch.target_maps, problem.confidence, state):
        assert len(part) == 2
    assert len(problem.best.images) == 4
    assert problem.take_finished() is None
    assert len(problem.gradient(clean[remaining])) == 2


# The best iterate


def best_of(floor, further, *iterates):
    """Return the brightness of the best of some grey iterates, of one image."""
    problem = problem_of(grey(iterates[0]), surrogate=Spy(), floor=floor)
    problem.terms = (cross_entropy, squares, further)
    for level in iterates:
        problem.gradient(grey(level))
    return problem.best.images.mean().item()


@pytest.mark.parametrize("term", [0.0, 1e30, -1e30, torch.nan, torch.inf])
def test_a_class_that_is_reached_counts_more_than_any_term(term):
    def dark(candidate):  # the target map is black: 0.6 is the nearest of the right class
        return term * (candidate.images.mean(dim=(1, 2, 3)) < 0.5)

    assert best_of(0.0, dark, 0.9, 0.1, 0.6, 0.4) == pytest.approx(0.6)


def test_a_further_term_may_outweigh_the_distance():
    def bright(candidate):
        return -9 * (candidate.images.mean(dim=(1, 2, 3)) > 0.8)

    assert best_of(0.0, bright, 0.6, 0.9, 0.7) == pytest.approx(0.9)


@pytest.mark.parametrize("levels", [(0.7, 0.9, 0.8), (0.1, 0.9, 0.2), (0.2, 0.3, 0.1)])
def test_where_nothing_is_enough_the_surest_is_best(levels):
    assert best_of(1.0, further, *levels) == pytest.approx(max(levels))


# Phases


def test_a_phase_without_steps_is_where_it_starts():
    problem = problem_of(grey(0.3))
    variable, last = descend(problem, problem.batch.clean, None, range(2, 2), None)
    assert torch.equal(variable, grey(0.3))
    assert torch.equal(last, grey(0.3))


def test_a_step_rule_gets_its_memory_and_the_progress_back():
    seen = []

    def step(problem, variable, memory):
        seen.append((memory, problem.progress))
        return variable + 0.1, len(seen)

    problem = problem_of(grey(0.2))
    variable, last = descend(problem, problem.batch.clean, step, range(4, 8), lambda _: None)
    assert seen == [(None, 0.0), (1, 0.25), (2, 0.5), (3, 0.75)]
    torch.testing.assert_close(last, grey(0.6))
    assert torch.equal(variable, last)

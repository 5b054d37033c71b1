# SPDX-License-Identifier: MIT
"""The loop and its problem: on made-up images, maps and losses of which everything is known."""

import copy
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import attack_helpers
import pytest
import torch
from attack_helpers import FLAT_MAPS, targeted
from conftest import INTERPRETERS
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import captum_adv2
from captum_adv2 import ADV2
from captum_adv2.attacks import SignDescent, TwoPhase
from captum_adv2.attacks.frameworks import Flow
from captum_adv2.attacks.loop import descend, take
from captum_adv2.interpreters import CAM
from captum_adv2.interpreters.base import Explanation, Surrogate
from captum_adv2.optim import AdamState


class Spy(Surrogate):
    """Shows the first colour of images, and notes its calls; the state has the steps so far."""

    def __init__(self):
        self.calls = []

    def init(self, interpreter, images, target):
        return target, 0

    def advance(self, interpreter, images, state, progress):
        self.calls.append(("advance", progress, state[1], images))
        return state[0], state[1] + 1

    def __call__(self, interpreter, images, state, progress):
        self.calls.append(("call", progress, state[1], images))
        return Explanation(images[:, :1], None, penalty=images.pow(3).sum(dim=(1, 2, 3)))


def logits(images):
    """Return logits of two classes: the first is the likelier, the brighter the image."""
    brightness = images.mean(dim=(1, 2, 3))
    return torch.stack([brightness, 1 - brightness], dim=1)


def cross_entropy(candidate):
    return -candidate.logits.log_softmax(dim=1).gather(1, candidate.target[:, None])[:, 0]


def squares(candidate):
    return (candidate.maps - candidate.target_maps).square().sum(dim=(1, 2, 3))


def roots(candidate):
    return candidate.images.sqrt().sum(dim=(1, 2, 3))


def problem_of(clean, surrogate=None, further=roots, **settings):
    terms = (cross_entropy, squares, further)
    return attack_helpers.problem_of(clean, logits, terms, surrogate, **settings)


def grey(*levels):
    """Return a grey image of 2x2 pixels for each level."""
    return torch.tensor(levels, dtype=torch.float64).view(-1, 1, 1, 1).repeat(1, 3, 2, 2)


# States


@given(
    kept=st.lists(st.integers(0, 4), max_size=5),
    other=st.integers(0, 9) | st.none() | st.floats(0, 1) | st.text(max_size=3),
)
def test_a_part_of_a_state_has_the_rows_of_its_tensors(kept, other):
    first, second, scalar = torch.rand(5, 1, 3), torch.rand(5), torch.tensor(3.0)
    index = torch.tensor(kept, dtype=torch.long)
    moments, pair, *others = take(
        (AdamState(first, second, 7), (first > 0.5, other), scalar), index
    )
    assert isinstance(moments, AdamState)
    assert torch.equal(moments.first, first[index])
    assert torch.equal(moments.second, second[index])
    assert torch.equal(pair[0], first[index] > 0.5)
    assert (moments.steps, pair[1], others) == (7, other, [scalar])


@pytest.mark.parametrize("state", [{}, [torch.zeros(2)], (1, object())])
def test_a_state_of_another_kind_is_refused(state):
    with pytest.raises(TypeError, match=r"expected a state of tensors, .*; return .* stop=None"):
        take(state, torch.tensor([0]))


# Gradients


@pytest.mark.parametrize(
    ("part", "shares"), [("all", (1, 1)), ("prediction", (1, 0)), ("interpretation", (0, 1))]
)
def test_the_gradient_is_of_a_part_of_the_loss_and_of_the_price(part, shares):
    clean, framework = 0.1 + 0.8 * torch.rand(4, 3, 5, 5).double(), Flow(0.3)
    flow = torch.randn(4, 2, 5, 5).double().requires_grad_()
    images = framework.image(flow, clean)
    prediction = -logits(images).log_softmax(dim=1)[:, 0].sum()
    rest = images[:, 0].square().sum() + images.sqrt().sum() + images.pow(3).sum()

    def check(problem, loss):
        loss = loss + framework.penalty(flow).sum()
        (expected,) = torch.autograd.grad(loss, flow, retain_graph=True)
        torch.testing.assert_close(problem.gradient(flow, part), expected)

    make = partial(problem_of, clean, framework=framework)
    check(make(Spy()), shares[0] * prediction + shares[1] * rest)
    check(make(), prediction)  # a warm start has no map
    check(make(untargeted=True), -prediction)


@pytest.mark.parametrize("step", [SignDescent(), TwoPhase(searches=3)])
def test_a_surrogate_advances_once_a_step_and_sees_the_progress(step):
    spy = Spy()
    problem = problem_of(grey(0.3, 0.6), spy)
    descend(problem, problem.batch.clean, step, range(2, 7), lambda progress: None)
    names, progress, counts, images = zip(*spy.calls, strict=True)
    assert names == ("advance", "call") * 5
    assert progress == (0.0, 0.0, 0.2, 0.2, 0.4, 0.4, 0.6, 0.6, 0.8, 0.8)
    assert counts == (0, 1, 1, 2, 2, 3, 3, 4, 4, 5)
    assert [each.requires_grad for each in images] == [False, True] * 5


# Steps


def test_a_step_rule_gets_its_memory_and_the_progress_and_need_not_take_a_gradient():
    seen, reports, spy = [], [], Spy()

    def step(problem, variable, memory):
        seen.append((memory, problem.progress))
        return problem.move(variable, torch.tensor(0.1)), len(seen)

    problem = problem_of(grey(0.2), spy, stop=1.0)
    variable, last = descend(problem, grey(0.2), step, range(4, 8), reports.append)
    assert seen == [(None, 0.0), (1, 0.25), (2, 0.5), (3, 0.75)]
    torch.testing.assert_close(last, grey(0.6))
    assert torch.equal(variable, last)
    assert [report.step for report in reports] == [4, 5, 6, 7]
    assert all(report.confidence.isnan() and report.distance.isnan() for report in reports)
    assert spy.calls == []
    unmoved = descend(problem_of(grey(0.2)), grey(0.2), step, range(3, 3), reports.append)
    assert all(torch.equal(images, grey(0.2)) for images in unmoved)


@pytest.mark.parametrize("stop", [None, 0.5])
def test_finished_images_are_taken_out_of_everything(stop):
    # Distances 0.4, 0.8, 0.45, 0.1; the last image is dark, and so not of the first class.
    clean = grey(0.4, 0.8, 0.45, 0.1)
    clean[:3, 1:] = 0.9
    problem = problem_of(clean, Spy(), stop=stop)
    last = torch.zeros_like(clean)
    assert problem.take_finished(last) is None
    for part in ("all", "prediction"):
        problem.gradient(clean, part)
    assert problem.take_finished(last) is None  # the latest evaluation computed no map
    problem.gradient(clean)
    remaining = problem.take_finished(last)
    if stop is None:
        assert remaining is None
        assert not last.any()
        return
    assert torch.equal(last, clean)
    assert remaining.tolist() == problem.batch.rows.tolist() == [1, 3]
    for part in (problem.batch.clean, problem.seen):
        assert torch.equal(part, clean[[1, 3]])
    assert problem.distance.tolist() == pytest.approx([0.8, 0.1])
    assert problem.enough.tolist() == [True, False]
    assert len(problem.batch.target) == len(problem.confidence) == len(problem.state[0]) == 2
    assert problem.take_finished(last) is None
    assert len(problem.best) == 4


@pytest.mark.parametrize(
    ("value", "floor", "best"),
    [
        pytest.param(0.0, 0.0, 0.6, id="the nearest of the right class"),
        pytest.param(-1e30, 0.0, 0.6, id="no term outweighs the class"),
        *(pytest.param(worst, 0.0, 0.9, id=f"{worst}") for worst in (1e30, torch.inf, torch.nan)),
        pytest.param(0.0, 1.0, 0.9, id="the surest where nothing is enough"),
    ],
)
def test_the_best_iterate(value, floor, best):
    def further(candidate):  # of the right class, the first, are the bright images
        return torch.where(candidate.images.mean(dim=(1, 2, 3)) < 0.7, value, 0.0)

    problem = problem_of(grey(best), Spy(), further, floor=floor)
    for level in (0.1, 0.9, 0.6, 0.4):
        problem.gradient(grey(level))
    assert torch.equal(problem.best, grey(best))


def test_gains_below_the_resolution_of_a_probability_count():
    """Of two images neither of which comes near its target, each returns at its most confident."""
    clean = torch.full((2, 3, 2, 2), 0.5)

    def unsure(images):  # the second class is sure by 40 and by 200 in log-odds
        gain = images.mean(dim=(1, 2, 3)) - torch.tensor([40.0, 200.0])[: len(images)]
        return torch.stack([gain, 0 * gain], dim=1)

    terms = (cross_entropy, squares, roots)
    problem = attack_helpers.problem_of(clean, unsure, terms, Spy(), floor=0.9)
    levels = torch.tensor([0.5, 0.7, 0.9, 0.8])
    for level in levels:
        problem.gradient(torch.full_like(clean, level))
    assert unsure(clean).softmax(dim=1)[:, 0].max() < 1e-17  # 3 minus it is 3
    assert torch.equal(problem.best, torch.full_like(clean, 0.9))
    final = torch.full_like(clean, 244 / 255)
    problem.interpreter = Shown()
    assert torch.equal(problem.better(final, problem.batch), final)


class Shown:
    def explain(self, images, target):
        return Explanation(images[:, :1], None)


@pytest.mark.parametrize("what", ["logits", "maps"])
@pytest.mark.parametrize("first", [0.1, 0.6])
def test_an_iterate_that_is_not_a_number_does_not_stay_the_best(what, first):
    def broken(images):
        bad = (images.mean(dim=(1, 2, 3)) - first).abs() < 1e-6
        return torch.where(bad, torch.nan, 1.0)

    class Broken(Spy):
        def __call__(self, interpreter, images, state, progress):
            explanation = super().__call__(interpreter, images, state, progress)
            factor = broken(images).view(-1, 1, 1, 1) if what == "maps" else 1.0
            return explanation._replace(maps=explanation.maps * factor)

    def run(images):
        return logits(images) * (broken(images)[:, None] if what == "logits" else 1.0)

    terms = (cross_entropy, squares, lambda candidate: 0 * roots(candidate))
    problem = attack_helpers.problem_of(grey(first), run, terms, Broken())
    for level in (first, 0.9, 0.7):
        problem.gradient(grey(level))
        assert not problem.enough.any() or what == "maps" or level != first
    assert torch.equal(problem.best, grey(0.7))


# The cost of an attack


def test_a_step_is_one_backward_pass(monkeypatch, model, data):
    calls, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or grad(*a, **k))
    ADV2(model, CAM, steps=7, warmup=3)(*data)
    assert len(calls) == 7 + 2  # two more, to see that prediction and map can be attacked


LOOKS = ("item", "tolist", "cpu", "numpy", "nonzero", "__int__", "__bool__", "__float__")


@pytest.mark.parametrize("name", ["CAM", "Gradient", "RTS", "MASK"])
@pytest.mark.filterwarnings(FLAT_MAPS)
def test_no_step_looks_at_the_values_of_tensors(monkeypatch, model, data, name):
    """A look waits for a GPU. Those around the steps are as many, however many steps there are."""
    package, found = str(Path(captum_adv2.__file__).parent), Counter()
    build = {row.name: row.build for row in INTERPRETERS}[name]

    def watched(look):
        function = getattr(torch.Tensor, look)

        def watching(*args, **kwargs):
            found[look] += sys._getframe(1).f_code.co_filename.startswith(package)
            return function(*args, **kwargs)

        return watching

    def looks(steps, stop=None):
        found.clear()
        targeted(ADV2(model, build, steps=steps, warmup=2, stop=stop))(*data)
        return found.copy()

    for look in LOOKS:
        monkeypatch.setattr(torch.Tensor, look, watched(look))
    assert looks(4) == looks(10)
    assert looks(10, stop=0.0)["__bool__"] == looks(4, stop=0.0)["__bool__"] + 6


# No deterministic form on CUDA, by the notes of `torch.use_deterministic_algorithms`; the last has
# one by another way, which `torch.nn.functional.interpolate` takes in that mode.
UNREPEATABLE = {
    "adaptive_max_pool2d_backward", "reflection_pad1d_backward", "reflection_pad2d_backward",
    "grid_sampler_2d_backward", "nll_loss2d_forward", "put_", "histc", "bincount", "kthvalue",
    "replication_pad2d_backward", "upsample_bicubic2d_backward", "upsample_bilinear2d_backward",
}  # fmt: skip


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["CAM", "GradCAM", "Gradient", "SmoothGrad", "RTS", "MASK"])
@pytest.mark.filterwarnings(FLAT_MAPS)
def test_operations_have_deterministic_forms_on_cuda(model, data, name):
    build = {row.name: row.build for row in INTERPRETERS}[name]
    with Operations() as seen:
        targeted(ADV2(model, build, steps=3))(*data)
    assert seen.names & UNREPEATABLE <= {"upsample_bilinear2d_backward"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["CAM", "GradCAM", "Gradient", "SmoothGrad", "RTS", "MASK"])
@pytest.mark.filterwarnings(FLAT_MAPS)
def test_attacks_repeat_on_cuda_in_deterministic_mode(monkeypatch, model, data, name):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    build = {row.name: row.build for row in INTERPRETERS}[name]
    attack = targeted(ADV2(copy.deepcopy(model).cuda(), build, steps=20))
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(attack(*data), attack(*data))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("stop", [None, 1.0])
def test_a_progress_bar_completes_if_asked_for(model, data, capsys, stop):
    for verbose in (False, True):
        reports = []
        attack = ADV2(model, CAM, 0.2, steps=40, verbose=verbose, stop=stop, confidence=0.0)
        attack.callback = reports.append
        attack(*data)
        shown = capsys.readouterr().err
        assert bool(shown) is verbose
    assert (len(reports) < 40) is (stop is not None)
    assert f"{len(reports)}/{len(reports)}" in shown
    assert "confidence" in shown

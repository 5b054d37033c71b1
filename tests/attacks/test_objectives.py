# SPDX-License-Identifier: MIT
"""Loss terms and schedules: against torch's own cross entropy, and against NumPy."""

import dataclasses
import math
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum_adv2.attacks.objectives import at
from hypothesis import example, given
from hypothesis import strategies as st

from captum_adv2 import SoundnessWarning
from captum_adv2.attacks import CrossEntropy, Linear, MapDistance, Margin, Stages
from captum_adv2.types import Candidate

SEEDS = st.integers(0, 2**32 - 1)
# Whatever the distance has beyond Eq. 3 is a number, and 0 is without it.
EQUATION_3 = {
    field.name: 0.0
    for field in dataclasses.fields(MapDistance)
    if field.name not in ("weight", "reduction", "map_size")
}


def candidate(seed=0, progress=0.5, batch=3, classes=5, channels=1, size=(4, 6), scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(batch, classes, generator=generator, dtype=torch.float64)
    target = torch.randint(0, classes, (batch,), generator=generator)
    maps = torch.rand(batch, channels, *size, generator=generator, dtype=torch.float64)
    goal = torch.rand(batch, 1, *size, generator=generator, dtype=torch.float64)
    images = torch.rand(batch, 3, 8, 8, generator=generator)
    return Candidate(images, logits, maps, target, goal, progress, torch.arange(batch))


@given(seed=SEEDS, scale=st.sampled_from([0.0, 1.0, 100.0]))
def test_rho_zero_is_cross_entropy_exactly(seed, scale):
    given_ = candidate(seed, scale=scale)
    plain = F.cross_entropy(given_.logits, given_.target, reduction="none")
    assert torch.equal(CrossEntropy(rho=0.0)(given_), plain)
    assert torch.equal(CrossEntropy(rho=0.0, seed=7)(given_), plain)


@given(seed=SEEDS, rho=st.floats(1e-3, 1.0), classes=st.integers(2, 9))
@example(seed=0, rho=1.0, classes=3)
def test_smoothing_is_torchs_label_smoothing_in_other_units(seed, rho, classes):
    # torch gives every class s / K and the target 1 - s on top of it; here the others get
    # rho / 2 in all, each rho / (2 (K - 1)): s = rho K / (2 (K - 1)).
    given_ = candidate(seed, classes=classes)
    smoothing = rho * classes / (2 * (classes - 1))
    expected = F.cross_entropy(
        given_.logits, given_.target, reduction="none", label_smoothing=min(smoothing, 1.0)
    )
    torch.testing.assert_close(CrossEntropy(rho)(given_), expected)


def test_rho_follows_its_schedule():
    schedule = CrossEntropy(Linear(0.4, 0.2))
    for progress in (0.0, 0.5, 1.0):
        given_ = candidate(progress=progress)
        fixed = CrossEntropy(0.4 - 0.2 * progress)
        torch.testing.assert_close(schedule(given_), fixed(given_))


def drawn(loss, given_):
    """Recover how much probability the target class lost, per image, from the loss."""
    log_p = given_.logits.log_softmax(dim=1)
    own = -log_p.gather(1, given_.target[:, None])[:, 0]
    others = (-log_p.sum(dim=1) - own) / (log_p.shape[1] - 1)
    return (loss(given_) - own) / (others - own)


def test_draws_are_uniform_below_rho_one_an_iteration_shared_by_the_batch():
    loss = CrossEntropy(0.5, seed=3)
    draws = []
    for number in range(400):
        lost = drawn(loss, candidate(progress=number / 400))
        torch.testing.assert_close(lost, lost[:1].expand_as(lost))
        draws.append(lost[0].item())
    draws = np.array(draws)
    assert draws.min() >= 0
    assert draws.max() <= 0.5
    assert len(np.unique(draws.round(9))) > 390
    # Mean and spread of a uniform draw on (0, 0.5), to four standard errors of 400 draws.
    assert abs(draws.mean() - 0.25) < 4 * 0.5 / math.sqrt(12 * 400)
    assert abs(draws.std() - 0.5 / math.sqrt(12)) < 0.02


def test_draws_are_reproducible_and_touch_no_global_generator():
    state, python = torch.get_rng_state(), random.getstate()
    first, again, other = (CrossEntropy(0.5, seed=s)(candidate()) for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python


def test_smoothing_keeps_a_gradient_at_any_confidence():
    logits = torch.tensor([[90.0, 0.0, -5.0]], requires_grad=True)
    given_ = candidate()._replace(logits=logits, target=torch.tensor([0]))
    (gradient,) = torch.autograd.grad(CrossEntropy(0.1)(given_).sum(), logits)
    assert gradient[0, 0] == pytest.approx(0.05, rel=1e-4)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("rho", [-0.1, 1.1, math.nan, Linear(0.5, -0.1), Linear(1.5, 0.5)])
def test_rho_out_of_range(rho):
    with pytest.raises(ValueError, match="expected rho at least 0 and at most 1"):
        CrossEntropy(rho)


@pytest.mark.parametrize("term", [CrossEntropy, MapDistance])
@pytest.mark.parametrize("schedule", [Linear(0.0, 1.0), Linear(1.0, 0.0)])
def test_a_schedule_may_end_at_either_bound(term, schedule):
    assert term(schedule) == term(schedule)


def test_rho_of_another_type():
    with pytest.raises(TypeError, match="expected rho to be a number, got str"):
        CrossEntropy("0.1")


@given(seed=SEEDS, classes=st.integers(2, 9), scale=st.sampled_from([0.0, 1.0, 1e4]))
def test_the_margin_is_what_numpy_computes(seed, classes, scale):
    given_ = candidate(seed, classes=classes, scale=scale)
    expected = [
        np.delete(row, y).max() - row[y]
        for row, y in zip(given_.logits.numpy(), given_.target.numpy(), strict=True)
    ]
    np.testing.assert_array_equal(Margin()(given_).numpy(), expected)


def test_the_margin_is_negative_where_the_class_is_reached():
    given_ = candidate(batch=50)
    reached = given_.logits.argmax(dim=1) == given_.target
    assert 0 < reached.sum() < 50
    assert torch.equal(Margin()(given_) < 0, reached)


def test_the_margin_pulls_on_two_logits():
    logits = torch.tensor([[1.0, 4.0, 2.0]], requires_grad=True)
    given_ = candidate()._replace(logits=logits, target=torch.tensor([0]))
    (gradient,) = torch.autograd.grad(Margin()(given_).sum(), logits)
    assert gradient.tolist() == [[-1.0, 1.0, 0.0]]


@given(
    seed=SEEDS,
    weight=st.floats(0.0, 1e4),
    l1=st.sampled_from([0.0, 0.1, 2.0]),
    size=st.sampled_from([(1, 1), (4, 6), (7, 7)]),
)
def test_map_distance_is_what_numpy_computes(seed, weight, l1, size):
    given_ = candidate(seed, size=size)
    change = given_.maps.numpy() - given_.target_maps.numpy()
    summed = (change**2 + l1 * abs(change)).sum((1, 2, 3))
    for reduction, expected in (("mean", summed / math.prod(size)), ("sum", summed)):
        ours = MapDistance(weight, reduction=reduction, **{**EQUATION_3, "l1": l1})(given_)
        assert ours.shape == (3,)
        np.testing.assert_allclose(ours.numpy(), weight * expected, rtol=1e-12, atol=1e-15)


def test_without_additions_it_is_the_squared_distance_of_equation_3():
    given_ = candidate()
    square = (given_.maps - given_.target_maps).square().sum(dim=(1, 2, 3))
    term = MapDistance(0.204, reduction="sum", **EQUATION_3)
    torch.testing.assert_close(term(given_), 0.204 * square)


def beyond_affine(ours, theirs):
    """Return what the best affine function of a map leaves of another, by least squares."""
    columns = np.stack([ours.flatten(), np.ones(ours.size)], axis=1)
    best, *_ = np.linalg.lstsq(columns, theirs.flatten(), rcond=None)
    return (theirs.flatten() - columns @ best).reshape(theirs.shape)


@given(
    seed=SEEDS,
    share=st.floats(0.0, 1.0),
    l1=st.sampled_from([0.0, 0.1, 2.0]),
    spread=st.sampled_from([1.0, 0.01, 0.0]),
)
@example(seed=0, share=1.0, l1=0.1, spread=0.0)
def test_shape_is_the_share_of_what_no_affine_function_explains(seed, share, l1, spread):
    given_ = candidate(seed)
    # Maps of any spread, down to constant ones; target maps of another mean.
    given_ = given_._replace(maps=spread * given_.maps + 0.1)
    expected = []
    for ours, theirs in zip(given_.maps.numpy(), given_.target_maps.numpy(), strict=True):
        raw, left = ours - theirs, beyond_affine(ours, theirs)
        parts = [(change**2 + l1 * abs(change)).mean() for change in (raw, left)]
        expected.append((1 - share) * parts[0] + share * parts[1])
    np.testing.assert_allclose(
        MapDistance(3.0, l1=l1, shape=share)(given_), np.multiply(3, expected)
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_look_ahead_maps_add_up(reduction):
    given_ = candidate(channels=4)
    term = MapDistance(2.0, reduction=reduction)
    one_by_one = [term(given_._replace(maps=given_.maps[:, j : j + 1])) for j in range(4)]
    torch.testing.assert_close(term(given_), torch.stack(one_by_one).sum(dim=0))


def test_the_weight_follows_its_schedule():
    term, unit = MapDistance(Linear(5.0, 10.0)), MapDistance(1.0)
    for progress, weight in ((0.0, 5.0), (0.2, 6.0), (1.0, 10.0)):
        given_ = candidate(progress=progress)
        torch.testing.assert_close(term(given_), weight * unit(given_))


@pytest.mark.parametrize(
    "term", [CrossEntropy(0.1), CrossEntropy(0.1, seed=1), MapDistance(), Margin()]
)
def test_losses_are_per_image(term):
    given_ = candidate()
    losses = term(given_)
    assert losses.shape == (3,)
    for i in range(3):
        one = [v[i : i + 1] if isinstance(v, torch.Tensor) else v for v in given_]
        alone = Candidate(*one)
        torch.testing.assert_close(term(alone), losses[i : i + 1], rtol=1e-12, atol=0)


def test_another_map_size_is_told_once_at_the_start():
    term = MapDistance(0.2, reduction="sum", map_size=(7, 7))
    with pytest.warns(SoundnessWarning, match=r"size \(7, 7\), these are \(4, 6\)"):
        term(candidate(progress=0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        term(candidate(progress=0.5))
        term(candidate(progress=0.0, size=(7, 7)))


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, Linear(1.0, -1.0), Linear(-1.0, 1.0)])
def test_weight_out_of_range(weight):
    with pytest.raises(ValueError, match="expected weight at least 0"):
        MapDistance(weight)


@pytest.mark.parametrize("l1", [-1.0, math.nan])
def test_l1_out_of_range(l1):
    with pytest.raises(ValueError, match="expected l1 at least 0"):
        MapDistance(l1=l1)


@pytest.mark.parametrize("shape", [-0.1, 1.1, math.nan])
def test_shape_out_of_range(shape):
    with pytest.raises(ValueError, match="^expected shape at least 0 and at most 1, got"):
        MapDistance(shape=shape)


def test_unknown_reduction():
    with pytest.raises(ValueError, match="^expected reduction 'mean' or 'sum', got 'max'$"):
        MapDistance(reduction="max")


def test_a_number_is_a_constant_schedule():
    assert at(3.0, 0.7) == 3.0
    assert at(lambda progress: 2 * progress, 0.7) == 1.4


@given(st.floats(-10, 10), st.floats(-10, 10), st.floats(0, 1))
def test_linear(first, last, progress):
    line = Linear(first, last)
    assert line(0.0) == first
    assert line(1.0) == pytest.approx(last, abs=1e-12)
    assert min(first, last) - 1e-9 <= line(progress) <= max(first, last) + 1e-9
    assert line(0.5) == pytest.approx((first + last) / 2, abs=1e-12)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=12))
def test_stages_hold_each_value_exactly_as_long_as_they_say(lengths):
    total = sum(lengths)
    stages = Stages(tuple(float(i) for i in range(len(lengths))), tuple(lengths))
    values = [stages(number / total) for number in range(total)]
    assert values == [float(i) for i, length in enumerate(lengths) for _ in range(length)]


def test_stages_end_with_the_last_value():
    assert Stages((1.0, 2.0), (3, 1))(1.0) == 2.0
    assert Stages((1.0, 2.0, 3.0), (3, 1, 1))(1.0) == 3.0
    assert Stages((1.0, 2.0), (3, 1))(0.0) == 1.0


def test_stages_of_unequal_numbers_are_refused_as_a_weight():
    with pytest.raises(
        ValueError, match="expected a length for each value, at least one, got 1 for 2"
    ):
        MapDistance(Stages((1.0, 2.0), (1,)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Linear("0", 1.0), TypeError, "expected first to be a number, got str"),
        (lambda: Linear(0.0, math.nan), ValueError, "expected last at least -inf, got nan"),
        (lambda: Stages(1.0, (1,)), TypeError, "expected values to be a tuple, got float"),
        (lambda: Stages((1.0,), 1), TypeError, "expected lengths to be a tuple, got int"),
        (lambda: Stages(("1",), (1,)), TypeError, "expected values to be a number, got str"),
        (lambda: Stages((math.inf,), (1,)), ValueError, "expected values above -inf, got inf"),
        (lambda: Stages((1.0,), (0,)), ValueError, "expected lengths above 0, got 0"),
        (
            lambda: Stages((1.0,), (1, 1)),
            ValueError,
            "expected a length for each value, .* 2 for 1",
        ),
        (lambda: Stages((), ()), ValueError, "expected a length for each value, .* got 0 for 0"),
        (lambda: CrossEntropy(seed=-1), ValueError, "expected seed at least 0, got -1"),
    ],
)
def test_bad_schedules_and_seeds(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()


def test_schedules_may_have_values_of_any_sign_and_short_stages():
    assert Linear(-5.0, 5.0)(0.25) == -2.5
    assert Stages([-1.0, 2.0], [0.5, 0.5])(0.75) == 2.0
    assert CrossEntropy(seed=0).seed == 0

# SPDX-License-Identifier: MIT
"""Loss terms and schedules: against torch's own cross entropy, and against NumPy."""

import math
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from captum_adv2 import SoundnessWarning
from captum_adv2.attacks import Candidate, CrossEntropy, MapDistance
from captum_adv2.attacks.terms import Linear, Margin, Stages, at, total

SEEDS = st.integers(0, 2**32 - 1)


def candidate(seed=0, progress=0.5, batch=3, classes=5, channels=1, size=(4, 6), scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(batch, classes, generator=generator, dtype=torch.float64)
    target = torch.randint(0, classes, (batch,), generator=generator)
    maps = torch.rand(batch, channels, *size, generator=generator, dtype=torch.float64)
    goal = torch.rand(batch, 1, *size, generator=generator, dtype=torch.float64)
    images = torch.rand(batch, 3, 8, 8, generator=generator, dtype=torch.float64)
    return Candidate(images, logits, maps, target, goal, progress, torch.arange(batch))


# Any term


@pytest.mark.parametrize(
    "term",
    [CrossEntropy(), CrossEntropy(0.1, seed=1), MapDistance(), MapDistance(shape=1.0), Margin()],
)
def test_a_term_is_a_loss_of_each_image_with_its_derivative(term):
    given_ = candidate()
    losses = term(given_)
    assert losses.shape == (3,)
    for i in range(3):
        one = Candidate(*(v[i : i + 1] if isinstance(v, torch.Tensor) else v for v in given_))
        torch.testing.assert_close(term(one), losses[i : i + 1], rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(
        lambda logits, maps: term(given_._replace(logits=logits, maps=maps)),
        (given_.logits.requires_grad_(), given_.maps.requires_grad_()),
    )


def test_terms_add_up_and_one_that_reduces_over_the_batch_is_refused():
    given_, terms = candidate(), (Margin(), MapDistance(), Margin())
    torch.testing.assert_close(total(terms, given_), sum(term(given_) for term in terms))
    assert torch.equal(total((), given_), torch.zeros(3).double())
    with pytest.raises(
        ValueError, match=r"expected one loss for each image, shape \(3,\), from .*"
    ):
        total((Margin(), lambda candidate: candidate.images.mean()), given_)


# Cross entropy


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
    # Its schedule is asked at the progress of the candidate, 0.5.
    torch.testing.assert_close(CrossEntropy(Linear(rho + 0.2, rho - 0.2))(given_), expected)


def drawn(loss, given_):
    """Recover how much probability the target class lost, per image, from the loss."""
    log_p = given_.logits.log_softmax(dim=1)
    own = -log_p.gather(1, given_.target[:, None])[:, 0]
    others = (-log_p.sum(dim=1) - own) / (log_p.shape[1] - 1)
    return (loss(given_) - own) / (others - own)


def test_draws_are_uniform_below_rho_one_a_step_shared_by_the_batch():
    loss, draws, state = CrossEntropy(0.5, seed=3), [], (torch.get_rng_state(), random.getstate())
    for number in range(400):
        lost = drawn(loss, candidate(progress=number / 400))
        torch.testing.assert_close(lost, lost[:1].expand_as(lost))
        draws.append(lost[0].item())
    # Mean and spread of a uniform draw on (0, 0.5), to four standard errors of 400 draws.
    assert 0 <= min(draws) < max(draws) <= 0.5
    assert abs(np.mean(draws) - 0.25) < 4 * 0.5 / math.sqrt(12 * 400)
    assert abs(np.std(draws) - 0.5 / math.sqrt(12)) < 0.02
    first, again, other = (CrossEntropy(0.5, seed=seed)(candidate()) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]


# The margin


@given(seed=SEEDS, classes=st.integers(2, 9), scale=st.sampled_from([0.0, 1.0, 1e4]))
def test_the_margin_is_what_numpy_computes(seed, classes, scale):
    given_ = candidate(seed, classes=classes, scale=scale)
    expected = [
        np.delete(row, y).max() - row[y]
        for row, y in zip(given_.logits.numpy(), given_.target.numpy(), strict=True)
    ]
    np.testing.assert_array_equal(Margin()(given_).numpy(), expected)


# The distance of maps


def beyond_affine(ours, theirs):
    """Return what the best affine function of a map leaves of another, by least squares."""
    columns = np.stack([ours.flatten(), np.ones(ours.size)], axis=1)
    best, *_ = np.linalg.lstsq(columns, theirs.flatten(), rcond=None)
    return (theirs.flatten() - columns @ best).reshape(theirs.shape)


@given(
    seed=SEEDS,
    weight=st.floats(0.0, 1e4),
    share=st.floats(0.0, 1.0),
    l1=st.sampled_from([0.0, 0.1, 2.0]),
    size=st.sampled_from([(2, 2), (4, 6), (7, 7)]),
    channels=st.sampled_from([1, 3]),  # look-ahead maps add up
    spread=st.sampled_from([1.0, 0.01, 0.0]),
)
@example(seed=0, weight=3.0, share=1.0, l1=0.1, size=(4, 6), channels=1, spread=0.0)
@example(seed=0, weight=0.204, share=0.0, l1=0.0, size=(7, 7), channels=1, spread=1.0)  # Eq. 3
def test_the_distance_is_what_numpy_computes(seed, weight, share, l1, size, channels, spread):
    given_ = candidate(seed, channels=channels, size=size)
    # Maps of any spread, down to constant ones; target maps of another mean.
    given_ = given_._replace(maps=spread * given_.maps + 0.1)
    summed = np.zeros(3)
    for i, j in np.ndindex(3, channels):
        ours, theirs = given_.maps[i, j].numpy(), given_.target_maps[i, 0].numpy()
        changes = (ours - theirs, beyond_affine(ours, theirs))
        raw, shape = ((change**2 + l1 * abs(change)).sum() for change in changes)
        summed[i] += (1 - share) * raw + share * shape
    for reduction, count in (("sum", 1), ("mean", math.prod(size))):
        expected = weight * summed / count
        for lam in (weight, Linear(2 * weight, 0.0)):  # the progress of the candidate is 0.5
            ours = MapDistance(lam, reduction=reduction, l1=l1, shape=share)(given_)
            np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9)


@given(seed=SEEDS, gate=st.floats(0.1, 50.0))
def test_a_gate_multiplies_by_a_power_of_the_probability(seed, gate):
    given_ = candidate(seed)
    logits = given_.logits.requires_grad_()
    gated = MapDistance(gate=gate)(given_)
    reached = logits.softmax(dim=1).gather(1, given_.target[:, None])[:, 0]
    torch.testing.assert_close(gated, MapDistance()(given_) * reached.detach() ** gate)
    assert not gated.requires_grad  # the class does not fall to bring the map's loss down


def test_maps_of_another_size_give_a_warning_at_the_start():
    term = MapDistance(0.2, reduction="sum", map_size=(7, 7))
    with pytest.warns(SoundnessWarning, match=r"maps of size \(7, 7\), got \(4, 6\)"):
        term(candidate(progress=0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        term(candidate(progress=0.5))
        term(candidate(progress=0.0, size=(7, 7)))


# Schedules


@given(st.floats(-10, 10), st.floats(-10, 10), st.floats(0, 1))
def test_linear(first, last, progress):
    line = Linear(first, last)
    assert line(0.0) == at(first, progress) == first
    assert line(1.0) == pytest.approx(last, abs=1e-12)
    expected = (1 - progress) * first + progress * last
    assert line(progress) == at(line, progress) == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=12))
def test_stages_hold_each_value_exactly_as_long_as_they_say(lengths):
    values = tuple(float(number) for number in range(len(lengths)))
    whole, stages = sum(lengths), Stages(values, tuple(lengths))
    expected = [value for value, length in zip(values, lengths, strict=True) for _ in range(length)]
    assert [stages(number / whole) for number in range(whole)] == expected
    assert stages(1.0) == values[-1]


def test_stages_need_a_length_for_each_value():
    for lengths in ((1.0,), (1.0, 1.0, 1.0)):
        with pytest.raises(ValueError, match="argument 2 is"):
            Stages((1.0, 2.0), lengths)(0.0)

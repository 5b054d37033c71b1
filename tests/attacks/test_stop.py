# SPDX-License-Identifier: MIT
"""Finished images are taken out of the batch, and nothing changes for the others.

An attack without a stop is followed once, by a term that notes every iterate. From these, where an
attack with a stop ends, and which iterate is the best, is reckoned a second time.
"""

from functools import partial
from typing import NamedTuple

import pytest
import torch
from attack_helpers import (
    FLAT_MAPS,
    MODES,
    confidence_of,
    distance_of,
    noting,
    small_mask,
    targeted,
)
from torch import Tensor

from captum_adv2 import ADV2, StADV2
from captum_adv2.attacks import AdamDescent, SignDescent, TwoPhase
from captum_adv2.attacks.frameworks import quantize
from captum_adv2.interpreters import CAM, Ensemble, Gradient, Unrolled

FLOOR = 0.5
CLOSE = {"rtol": 0, "atol": 1e-6}
settings = {"steps": 16, "warmup": 2, "confidence": FLOOR}
pixels = partial(ADV2, eps=0.2, alpha=0.02, **settings)
flows = partial(StADV2, alpha=0.2, **settings)

SURROGATES = {
    "exact": {"interpreter": CAM},
    "smoothed": {"interpreter": Gradient},
    "finite difference": {"interpreter": small_mask},
    "unrolled": {"interpreter": small_mask, "surrogate": Unrolled(n_step=2, n_reset=3)},
    "together": {"interpreter": lambda model: Ensemble([CAM(model), small_mask(model)])},
}
STEPS = {
    "signs": {"step": SignDescent()},
    "Adam": {"step": AdamDescent(), "alpha": 0.01},
    "two phases": {"step": TwoPhase(kappa=0.6, stride=0.2, longest=0.3, searches=4)},
}
CASES = {
    **{
        f"{surrogate}, {step}": partial(pixels, **SURROGATES[surrogate], **STEPS[step])
        for surrogate in SURROGATES
        for step in STEPS
    },
    "flow": partial(flows, **SURROGATES["exact"]),
    "flow, finite difference": partial(flows, **SURROGATES["finite difference"]),
}


def dark(candidate):
    """Prefer a dark corner; without a gradient, so that the iterates are the same."""
    corner = candidate.images.detach()[..., :2, :2].mean(dim=(1, 2, 3))
    return 20 * (corner - 0.4) + 0 * candidate.images.sum(dim=(1, 2, 3))


def score_of(candidate, floor):
    """Return how good an iterate is, less being better, and whether it is good enough."""
    p, further = confidence_of(candidate), dark(candidate).detach()
    reached = candidate.logits.argmax(dim=1) == candidate.target
    good = distance_of(candidate) + further / (1 + further.abs())
    enough = reached & (p >= floor)
    return torch.where(enough, good, 9 + ~reached - p), enough


class Path(NamedTuple):
    """A run without a stop; all but the final images are ``(steps, B, ...)``."""

    iterates: Tensor
    distance: Tensor
    score: Tensor
    enough: Tensor
    final: Tensor

    def stop(self):
        """Return a distance that some images reach and others do not, by the widest margin."""
        least = self.distance.masked_fill(~self.enough, 1.0).amin(dim=0).sort().values
        gap = least.diff().argmax()
        return (least[gap] + least[gap + 1]).item() / 2

    def finished(self, stop):
        """Return the step at which each image is finished; the number of steps if it never is."""
        done = self.enough & (self.distance <= stop)
        return torch.where(done.any(dim=0), done.long().argmax(dim=0), len(done))

    def ended(self, finished):
        """Return the iterates at which images are finished; the last ones of those that are not."""
        every = torch.cat([self.iterates, self.final[None]])
        return every[finished, torch.arange(len(finished))]

    def best(self, finished):
        """Return the iterates of the least score so far."""
        late = torch.arange(len(self.score))[:, None] > finished
        index = self.score.masked_fill(late, torch.inf).argmin(dim=0)
        return self.iterates[index, torch.arange(len(finished))]


def followed(make, run, floor=FLOOR):
    """Run an attack without a stop; return its path."""
    seen = []
    final = run(make(keep="final", confidence=floor, terms=(dark, noting(seen))))
    scores, enough = zip(*(score_of(candidate, floor) for candidate in seen), strict=True)
    return Path(
        torch.stack([candidate.images.detach() for candidate in seen]),
        torch.stack([distance_of(candidate) for candidate in seen]),
        torch.stack(scores),
        torch.stack(enough),
        final,
    )


@pytest.fixture
def batch(data):
    return data[0][1:5].double(), data[1][1:5]


@pytest.fixture
def cam(trained_smooth):
    return partial(CASES["exact, signs"], trained_smooth)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings(FLAT_MAPS)
def test_an_image_that_is_finished_changes_nothing_for_the_others(trained_smooth, batch, case):
    make, reports = partial(CASES[case], trained_smooth), []

    def run(attack):
        """Aim at other classes and at the images' own, which are reached in any case."""
        images, labels = batch
        attack.set_mode_targeted_by_label(quiet=True)
        maps = attack.interpreter(images, labels).detach().roll(1, dims=0)
        return attack(images, (labels + torch.tensor([0, 1, 0, 1])) % 4, target_maps=maps)

    path = followed(make, run)
    finished = path.finished(path.stop())
    assert 0 < (finished < len(path.iterates)).sum() < len(finished)
    last = run(make(keep="final", stop=path.stop(), callback=reports.append))
    torch.testing.assert_close(last, path.ended(finished), **CLOSE)
    warmup = reports[-1].step + 1 - len(path.iterates)
    for number, report in enumerate(reports, start=-warmup):
        assert report.rows.tolist() == (finished >= number).nonzero()[:, 0].tolist()
        assert report.confidence.shape == report.distance.shape == report.rows.shape
        if number >= 0:
            torch.testing.assert_close(report.distance, path.distance[number, report.rows], **CLOSE)


@MODES
@pytest.mark.parametrize("floor", [0.0, FLOOR, 0.99])
@pytest.mark.parametrize("stopped", [True, False])
def test_the_best_iterate_is_the_one_of_least_score(cam, batch, mode, floor, stopped):
    """It is never worse than the last one, on the reported map and after rounding to 8 bits."""
    make = partial(cam, steps=24, warmup=8, alpha=0.03, step=SignDescent(0.0, 1.0))
    path, seen = followed(make, lambda attack: mode(attack)(*batch), floor), []
    stop = path.stop() if stopped else None
    adversarial = mode(make(stop=stop, confidence=floor, terms=(dark, noting(seen))))(*batch)
    finished = path.finished(stop if stopped else -1.0)
    ended, best = path.ended(finished), path.best(finished)
    scores = []
    for judged, images in zip(seen[-2:], (best, ended), strict=True):
        torch.testing.assert_close(judged.images, quantize(images), **CLOSE)
        assert judged.rows.tolist() == [0, 1, 2, 3]
        scores.append(score_of(judged, floor)[0])
    better = (scores[1] < scores[0]).view(-1, 1, 1, 1)
    torch.testing.assert_close(adversarial, torch.where(better, ended, best), **CLOSE)
    for candidate in seen[:-2]:
        rows = candidate.rows
        assert (candidate.images - batch[0][rows]).abs().max() <= 0.2 + 1e-9
        assert len(candidate.target_maps) == len(candidate.maps) == len(rows)
        assert torch.equal(candidate.target, seen[-1].target[rows])


def test_no_image_is_finished_at_a_distance_of_zero_nor_in_the_warm_start(cam, batch):
    for settings in ({"stop": 0.0}, {"warmup": 16, "stop": 1.0, "confidence": 0.0}):
        reports, free = [], cam(warmup=settings.get("warmup", 2))
        stopped = targeted(cam(**settings, callback=reports.append))(*batch)
        assert torch.equal(stopped, targeted(free)(*batch))
        assert [len(report.rows) for report in reports] == [4] * 16


def test_the_first_look_may_be_enough(cam, batch):
    """The image's own class is reached, and the map is the benign one."""
    reports = []
    attack = cam(warmup=0, stop=1e-6, confidence=0.0, callback=reports.append)
    attack.set_mode_targeted_by_label(quiet=True)
    assert torch.equal(attack(*batch), batch[0])
    assert len(reports) == 1


@pytest.mark.parametrize("parts", [("prediction",), ("prediction", "all")])
def test_a_step_rule_need_not_look_at_the_map(cam, batch, parts):
    """Only a look at the map finishes an image."""

    def step(problem, variable, memory):
        count = memory or 0
        gradient = problem.gradient(variable, parts[count % len(parts)])
        assert len(problem.confidence) == len(variable)
        return problem.move(variable, -problem.alpha * gradient.sign()), count + 1

    reports = []
    attack = targeted(cam(step=step, keep="final", stop=1.0, callback=reports.append))
    together = attack(*batch)
    assert (sum(len(report.rows) for report in reports) < 4 * 16) is ("all" in parts)
    alone = [attack(batch[0][i : i + 1], batch[1][i : i + 1]) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), **CLOSE)

# SPDX-License-Identifier: MIT
"""Finished images are taken out of the batch, and nothing changes for the others."""

from functools import partial
from typing import NamedTuple

import pytest
import torch
from targeting import FLAT_MAPS, confidence_of, noting, shifted, small_mask, targeted
from torch import Tensor

from captum_adv2 import ADV2, StADV2
from captum_adv2.attacks import AdamDescent, SignDescent, TwoPhase
from captum_adv2.attacks.frameworks import quantize
from captum_adv2.interpreters import CAM, Ensemble, Gradient, Unrolled

FLOOR = 0.5
CLOSE = {"rtol": 0, "atol": 1e-6}
pixels = partial(ADV2, eps=0.2, alpha=0.02, steps=16, warmup=2, confidence=FLOOR)
flows = partial(StADV2, alpha=0.15, steps=24, warmup=4, confidence=FLOOR)

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


class Path(NamedTuple):
    """A run without a stop: its iterates, and whether they would do, ``(steps, B, ...)``."""

    iterates: Tensor
    distance: Tensor
    enough: Tensor
    final: Tensor

    def finished(self, stop):
        """Return the step at which each image is finished; the number of steps if it never is."""
        done = self.enough & (self.distance <= stop)
        return torch.where(done.any(dim=0), done.long().argmax(dim=0), len(done))

    def some(self):
        """Return a distance that some images reach and others do not, by the widest margin."""
        least = self.distance.masked_fill(~self.enough, 1.0).amin(dim=0).sort().values
        gap = least.diff().argmax()
        return (least[gap] + least[gap + 1]).item() / 2

    def ended(self, finished):
        """Return the iterates at which images are finished; the last ones of those that are not."""
        every = torch.cat([self.iterates, self.final[None]])
        return every[finished, torch.arange(len(finished))]


def followed(make, batch, mode=targeted):
    """Run an attack without a stop; return its path."""
    seen = []
    final = mode(make(keep="final", terms=(noting(seen),)))(*batch)
    reached = [candidate.logits.argmax(dim=1) == candidate.target for candidate in seen]
    enough = [confidence_of(candidate) >= FLOOR for candidate in seen]
    return Path(
        torch.stack([candidate.images.detach() for candidate in seen]),
        torch.stack([(c.maps - c.target_maps).abs().mean(dim=(1, 2, 3)) for c in seen]).detach(),
        torch.stack(reached) & torch.stack(enough),
        final,
    )


@pytest.fixture
def batch(data):
    return data[0][1:5].double(), data[1][1:5]


@pytest.fixture
def cam(trained_smooth):
    return partial(CASES["exact, signs"], trained_smooth)


def check(make, batch, mode=targeted):
    """Hold an attack with a stop against its path without; return path, stop, last step."""
    path, reports = followed(make, batch, mode), []
    stop = path.some()
    finished = path.finished(stop)
    assert 0 < (finished < len(path.iterates)).sum() < len(finished)
    last = mode(make(keep="final", stop=stop, callback=reports.append))(*batch)
    torch.testing.assert_close(last, path.ended(finished), **CLOSE)
    warmup = reports[-1].step + 1 - len(path.iterates)
    for number, report in enumerate(reports, start=-warmup):
        assert report.rows.tolist() == (finished >= number).nonzero()[:, 0].tolist()
        assert report.confidence.shape == report.distance.shape == report.rows.shape
        if number >= 0:
            torch.testing.assert_close(report.distance, path.distance[number, report.rows], **CLOSE)
    return path, stop, finished


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings(FLAT_MAPS)
def test_an_image_that_is_finished_changes_nothing_for_the_others(trained_smooth, batch, case):
    check(partial(CASES[case], trained_smooth), batch)


def every_other(problem, variable, memory):
    """Look at the map at every other step only."""
    gradient = problem.gradient(variable, "all" if memory else "prediction")
    assert len(problem.confidence) == len(variable)
    return problem.move(variable, -problem.alpha * gradient.sign()), not memory


def blind(problem, variable, memory):
    gradient = problem.gradient(variable, "prediction")
    return problem.move(variable, -problem.alpha * gradient.sign()), None


def test_only_a_look_at_the_map_finishes_an_image(cam, batch):
    reports = []
    stop = {"stop": 1.0, "confidence": 0.0, "callback": reports.append}
    for settings in ({"step": blind}, {"warmup": 16}):
        adversarial = targeted(cam(**settings, **stop))(*batch)
        assert torch.equal(adversarial, targeted(cam(**settings))(*batch))
    assert [len(report.rows) for report in reports] == [4] * 32
    attack = targeted(cam(step=every_other, keep="final", stop=0.3, callback=reports.append))
    together = attack(*batch)
    alone = [attack(batch[0][i : i + 1], batch[1][i : i + 1]) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), **CLOSE)


def test_an_untargeted_attack(cam, batch):
    check(partial(cam, steps=24, warmup=8), batch, mode=lambda attack: attack)


def dark(images):
    return 20 * (images.detach()[..., :2, :2].mean(dim=(-3, -2, -1)) - 0.4)


def test_the_best_iterate_of_a_finished_image(cam, batch):
    """It is its last, unless a further term prefers an earlier one; the others' is as it was."""
    path, stop, finished = check(cam, batch)
    early, ended = finished < len(path.iterates), path.ended(finished)
    best, free = (targeted(cam(stop=s))(*batch) for s in (stop, None))
    torch.testing.assert_close(best[early], ended[early], **CLOSE)
    torch.testing.assert_close(best[~early], free[~early], **CLOSE)

    def corner(candidate):  # without a gradient: the iterates are the same
        return 0 * candidate.images.sum(dim=(1, 2, 3)) + dark(candidate.images)

    seen, further = [], dark(path.iterates)
    targeted(cam(stop=stop, terms=(corner, noting(seen))))(*batch)
    score = path.distance + further / (1 + further.abs())
    late = torch.arange(len(score))[:, None] > finished
    index = score.masked_fill(late | ~path.enough, torch.inf).argmin(dim=0)
    chosen = path.iterates[index, torch.arange(4)]
    judged = seen[-1].images  # after rounding to 8 bits
    torch.testing.assert_close(judged[early], quantize(chosen)[early], **CLOSE)


def test_no_image_is_finished_at_a_distance_of_zero(cam, batch):
    reports = []
    stopped = targeted(cam(stop=0.0, callback=reports.append))(*batch)
    assert torch.equal(stopped, targeted(cam())(*batch))
    assert [len(report.rows) for report in reports] == [4] * 16


def test_the_first_look_may_be_enough(cam, batch):
    """The image's own class is reached, and the map is the benign one."""
    reports = []
    attack = cam(warmup=0, stop=1e-6, confidence=0.0, callback=reports.append)
    attack.set_mode_targeted_by_label(quiet=True)
    assert torch.equal(attack(*batch), batch[0])
    assert len(reports) == 1


def test_a_finished_image_costs_nothing(trained_smooth, cam, batch):
    path, sizes, counts = followed(cam, batch), [], []
    handle = trained_smooth.register_forward_hook(lambda m, args, out: sizes.append(len(args[0])))
    for stop in (path.some(), None):
        sizes.clear()
        targeted(cam(stop=stop))(*batch)
        counts.append(sum(sizes))
    handle.remove()
    spared = (len(path.iterates) - 1 - path.finished(path.some())).clamp(min=0).sum()
    assert counts[1] - counts[0] == spared > 0


def test_terms_see_which_images_they_get(cam, batch):
    images, labels = batch
    seen, path = [], followed(cam, batch)
    targeted(cam(stop=path.some(), terms=(noting(seen),)))(*batch)
    assert len({len(candidate.rows) for candidate in seen}) > 1
    for candidate in seen:
        assert (candidate.images - images[candidate.rows]).abs().max() <= 0.2 + 1e-9
        assert torch.equal(candidate.target, shifted(*batch)[candidate.rows])
        assert len(candidate.target_maps) == len(candidate.maps) == len(candidate.rows)
    for judged in seen[-2:]:
        assert judged.rows.tolist() == list(range(4))


def test_normalisation_and_memory_format(cam, batch):
    mean, std = [0.4, 0.5, 0.3], [0.2, 0.3, 0.25]
    normal = (batch[0] - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    normal = normal.contiguous(memory_format=torch.channels_last)
    stop = followed(cam, batch).some()
    attack = targeted(cam(stop=stop, keep="final"))
    attack.set_normalization_used(mean=mean, std=std)
    together = attack(normal, batch[1])
    assert together.stride() == normal.stride()
    alone = [attack(normal[i : i + 1], batch[1][i : i + 1]) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), **CLOSE)

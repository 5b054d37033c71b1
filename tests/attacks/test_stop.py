# SPDX-License-Identifier: MIT
"""Finished images leave the batch: held against runs that nobody leaves, and image by image."""

import copy
import re
from functools import partial
from typing import NamedTuple

import pytest
import torch
from captum_adv2.attacks.run import Dual
from conftest import INTERPRETERS
from torch import Tensor

from captum_adv2 import ADV2, BitDepthADV2, StADV2
from captum_adv2.attacks import (
    AdamDescent,
    CrossEntropy,
    MapDistance,
    Matching,
    SignDescent,
    Squeezing,
    TwoPhase,
)
from captum_adv2.evaluation import visualize
from captum_adv2.interpreters import CAM, MASK, Ensemble, Interpreter, Surrogate, Unrolled
from captum_adv2.types import Candidate, Explanation

CLASSES = 4
FLOOR = 0.5
BUILD = {row.name: row.build for row in INTERPRETERS}
FLAT_MAPS = "ignore::captum_adv2.SoundnessWarning"  # where a map happens to be constant
CLOSE = {"rtol": 0, "atol": 1e-6}


def shifted(images, labels):
    return (labels + 1) % CLASSES


def targeted(attack):
    attack.set_mode_targeted_by_function(shifted, quiet=True)
    return attack


def small_mask(model):
    return MASK(model, size=4, iterations=6, jitter=1)


def with_mask(model):
    return Ensemble([CAM(model), small_mask(model)])


pixels = partial(ADV2, eps=0.2, alpha=0.02, steps=16, confidence=FLOOR)
flows = partial(StADV2, alpha=0.15, steps=24, confidence=FLOOR)
unrolled = Unrolled(n_step=2, n_reset=3)
# What is attacked, and how: an attack on a model, the interpreter's name, settings.
CASES = {
    **{name: partial(pixels, interpreter=BUILD[name]) for name in BUILD},
    "MASK, unrolled": partial(pixels, interpreter=small_mask, surrogate=unrolled),
    "CAM and MASK": partial(pixels, interpreter=with_mask),
    "Adam": partial(pixels, interpreter=CAM, step=AdamDescent(), alpha=0.01),
    "two phases": partial(pixels, interpreter=CAM, step=TwoPhase(kappa=0.6, searches=4)),
    "two phases, MASK": partial(
        pixels, interpreter=small_mask, surrogate=unrolled, step=TwoPhase(kappa=0.6, searches=4)
    ),
    "flow": partial(flows, interpreter=CAM),
    "flow, MASK": partial(flows, interpreter=small_mask),
    "flow, sign": partial(flows, interpreter=CAM, step=SignDescent(), alpha=0.15),
    "seeded": partial(pixels, interpreter=CAM, prediction=CrossEntropy(seed=3)),
}


class Path(NamedTuple):
    """A run that nobody leaves: its iterates, and whether they would do, ``(steps, B, ...)``."""

    iterates: Tensor
    distance: Tensor
    enough: Tensor
    final: Tensor

    def finished(self, stop):
        """Return the step at which each image is finished; the number of steps if it never is."""
        done = self.enough & (self.distance <= stop)
        return torch.where(done.any(dim=0), done.long().argmax(dim=0), len(done))

    def some(self, count):
        """Return a distance that so many images reach."""
        least = self.distance.masked_fill(~self.enough, torch.inf).amin(dim=0).sort().values
        assert least[count - 1] < least[count], "the images have to differ"
        return (least[count - 1] + least[count].clamp(max=1)).item() / 2

    def left(self, finished):
        """Return the iterates at which images are finished; the last ones of those that are not."""
        every = torch.cat([self.iterates, self.final[None]])
        return every[finished, torch.arange(len(finished))]


def followed(make, images, labels, floor=FLOOR, aim=targeted):
    """Run an attack without a stop; return where it came by."""
    seen = []

    def note(candidate):
        seen.append(candidate)
        return 0 * candidate.images.sum(dim=(1, 2, 3))

    final = aim(make(keep="final", terms=(note,)))(images, labels)
    confidence = [c.logits.softmax(dim=1).gather(1, c.target[:, None])[:, 0] for c in seen]
    reached = [c.logits.argmax(dim=1) == c.target for c in seen]
    return Path(
        torch.stack([c.images.detach() for c in seen]),
        torch.stack([(c.maps - c.target_maps).abs().mean(dim=(1, 2, 3)) for c in seen]).detach(),
        torch.stack(reached) & (torch.stack(confidence) >= floor),
        final,
    )


@pytest.fixture
def batch(data):
    return data[0].double(), data[1]


@pytest.fixture(params=CASES)
def make(request, trained_smooth):
    return partial(CASES[request.param], trained_smooth)


@pytest.fixture
def cam(trained_smooth):
    return partial(CASES["CAM"], trained_smooth)


@pytest.fixture
def runs(trained_smooth):
    """Batch sizes of the model's forward passes so far."""
    sizes = []
    handle = trained_smooth.register_forward_hook(lambda m, args, out: sizes.append(len(args[0])))
    yield sizes
    handle.remove()


# The law: those that run on do not notice


@pytest.mark.filterwarnings(FLAT_MAPS)
def test_images_leave_where_they_are_finished_and_the_others_run_on(make, batch):
    path = followed(make, *batch)
    stop = path.some(2)
    finished, told = path.finished(stop), []
    last = targeted(make(keep="final", stop=stop, callback=told.append))(*batch)
    assert (finished < len(path.iterates)).sum() == 2
    torch.testing.assert_close(last, path.left(finished), **CLOSE)

    warmup = told[-1].step + 1 - len(path.iterates)
    for record in told[:warmup]:
        assert record.rows.tolist() == list(range(6))
    for number, record in enumerate(told[warmup:]):
        assert record.rows.tolist() == (finished >= number).nonzero()[:, 0].tolist()
        torch.testing.assert_close(record.distance, path.distance[number, record.rows], **CLOSE)
        assert record.confidence.shape == record.rows.shape

    # Of its iterates, a finished image's last is the best; the others' is what it was.
    best, free = (targeted(make(stop=s))(*batch) for s in (stop, None))
    expected = torch.where(
        (finished < len(path.iterates)).view(-1, 1, 1, 1), path.left(finished), free
    )
    torch.testing.assert_close(best, expected, **CLOSE)


@pytest.mark.filterwarnings(FLAT_MAPS)
def test_a_batch_is_attacked_like_its_images(make, batch):
    images, labels = batch
    stop = followed(make, *batch).some(3)
    attack = targeted(make(stop=stop))
    together = attack(*batch)
    alone = [attack(images[i : i + 1], labels[i : i + 1]) for i in range(len(images))]
    torch.testing.assert_close(together, torch.cat(alone), **CLOSE)


@pytest.mark.parametrize("keep", ["best", "final"])
@pytest.mark.filterwarnings(FLAT_MAPS)
def test_nobody_is_finished_at_a_distance_of_nought(make, batch, keep):
    told = []
    wanted = (1 + torch.rand_like(make().interpreter(*batch))) / 3  # a mask may be 0, or 1
    stopped = targeted(make(stop=0.0, keep=keep, callback=told.append))
    adversarial = stopped(*batch, target_maps=wanted)
    assert torch.equal(adversarial, targeted(make(keep=keep))(*batch, target_maps=wanted))
    assert {len(record.rows) for record in told} == {6}
    assert len(told) == stopped.steps


@pytest.mark.parametrize("keep", ["best", "final"])
def test_untargeted(cam, batch, keep):
    def aim(attack):
        return attack

    make = partial(cam, steps=20, warmup=5)
    path = followed(make, *batch, aim=aim)
    stop = path.some(3)
    finished = path.finished(stop)
    adversarial = make(stop=stop, keep=keep)(*batch)
    left = finished < len(path.iterates)
    torch.testing.assert_close(adversarial[left], path.left(finished)[left], **CLOSE)
    free = make(keep=keep)(*batch)
    torch.testing.assert_close(adversarial[~left], free[~left], **CLOSE)


def test_target_maps_of_a_call(cam, batch, trained_smooth):
    images, labels = batch
    wanted = CAM(trained_smooth)(images, labels).detach().roll(1, dims=0)
    attack = targeted(cam(stop=0.2))
    told = []
    targeted(cam(stop=0.2, callback=told.append))(images, labels, target_maps=wanted)
    assert 0 < len(told[-1].rows) < 6  # or the test says little
    together = attack(images, labels, target_maps=wanted)
    order = torch.tensor([3, 0, 5])
    some = attack(images[order], labels[order], target_maps=wanted[order])
    torch.testing.assert_close(some, together[order], **CLOSE)


def test_the_confidence_that_is_enough(cam, batch):
    """Of the wrong class, or not sure enough, an image is not finished, however near its map."""
    told = []
    targeted(cam(stop=1.0, confidence=0.9, callback=told.append))(*batch)
    path = followed(cam, *batch, floor=0.9)
    finished = path.finished(1.0)
    assert 0 < finished.min() < finished.max()
    assert [len(record.rows) for record in told] == [
        int((finished >= number).sum()) for number in range(len(told))
    ]


def test_the_first_look_may_be_enough(trained_smooth, batch):
    """The image's own class is reached, and the map is the benign one: nothing is to be done."""
    images, labels = batch
    told = []
    attack = ADV2(trained_smooth, CAM, steps=9, warmup=0, stop=1e-6, callback=told.append)
    attack.confidence = 0.0
    attack.set_mode_targeted_by_label(quiet=True)
    assert torch.equal(attack(images, labels), images)
    assert len(told) == 1


def test_the_warm_start_finishes_nobody(cam, batch):
    told = []
    attack = targeted(cam(warmup=16, stop=1.0, confidence=0.0, callback=told.append))
    assert torch.equal(attack(*batch), targeted(cam(warmup=16))(*batch))
    assert [len(record.rows) for record in told] == [6] * 16


# What it costs


def test_who_has_left_costs_nothing(cam, batch, runs):
    path = followed(cam, *batch)
    stop, steps = path.some(4), len(path.iterates)
    finished = path.finished(stop)
    counts = []
    for attack in (cam(stop=stop), cam()):
        runs.clear()
        targeted(attack)(*batch)
        counts.append(sum(runs))
    spared = (steps - 1 - finished).clamp(min=0).sum()
    assert counts[1] - counts[0] == spared > 0


@pytest.mark.parametrize("keep", ["best", "final"])
@pytest.mark.parametrize("step", [SignDescent(), AdamDescent(), TwoPhase(searches=2)])
def test_it_ends_when_nobody_is_left(cam, batch, keep, step):
    told = []
    attack = cam(steps=200, stop=0.3, step=step, keep=keep, callback=told.append)
    adversarial = targeted(attack)(*batch)
    assert len(told) < 100
    assert len(told[-1].rows) > 0
    assert (told[-1].distance <= 0.3).all()
    assert adversarial.shape == batch[0].shape
    assert not torch.equal(adversarial, batch[0])


@pytest.mark.parametrize("stop", [0.3, None])
def test_the_bar_completes(cam, batch, capsys, stop):
    told = []
    targeted(cam(steps=60, stop=stop, verbose=True, callback=told.append))(*batch)
    *_, last = re.findall(r"(\d+)/(\d+)", capsys.readouterr().err)
    assert last == (str(len(told)), str(len(told)))
    assert (len(told) < 60) is (stop is not None)


# Terms


def test_terms_are_told_which_images_they_see(cam, batch):
    images, labels = batch
    path, seen = followed(cam, images, labels), []

    def note(candidate):
        seen.append(candidate)
        return 0 * candidate.images.sum(dim=(1, 2, 3))

    targeted(cam(stop=path.some(3), terms=(note,)))(images, labels)
    assert {len(candidate.rows) for candidate in seen} >= {6, 3}
    for candidate in seen:
        assert (candidate.images - images[candidate.rows]).abs().max() <= 0.2 + 1e-9
        assert torch.equal(candidate.target, shifted(images, labels)[candidate.rows])
        assert len(candidate.target_maps) == len(candidate.maps) == len(candidate.rows)
    for judged in seen[-2:]:
        assert judged.rows.tolist() == list(range(6))


def darker(images):
    return 0.5 * images


def test_a_further_term_counts_for_the_best_iterate_of_a_finished_image(cam, batch):
    """Not the iterate at which it was finished, if the term likes an earlier one better."""

    def dark(images):
        return 20 * (images.detach()[..., :2, :2].mean(dim=(-3, -2, -1)) - 0.4)

    def corner(candidate):  # no gradient: the iterates are the same with and without it
        return 0 * candidate.images.sum(dim=(1, 2, 3)) + dark(candidate.images)

    path = followed(cam, *batch)
    stop = path.some(5)
    finished, further = path.finished(stop), dark(path.iterates)
    score = path.distance + further / (1 + further.abs())
    late = torch.arange(len(score))[:, None] > finished
    best = score.masked_fill(late | ~path.enough, torch.inf).argmin(dim=0)
    left = path.left(finished)
    darkest = path.iterates[best, torch.arange(6)]
    adversarial = targeted(cam(stop=stop, terms=(corner,)))(*batch)
    found = []
    for i in (finished < len(score)).nonzero()[:, 0]:
        found += [int(torch.allclose(adversarial[i], left[i], **CLOSE))]
        assert found[-1] or torch.allclose(adversarial[i], darkest[i], **CLOSE)
    assert 0 in found


@pytest.mark.parametrize("keep", ["best", "final"])
def test_squeezing(trained_smooth, cam, batch, keep):
    images, labels = batch
    term = Squeezing(trained_smooth, (darker, torch.square), 0.5)
    make = partial(cam, terms=(term,), keep=keep)
    told = []
    stop = 0.08
    together = targeted(make(stop=stop, callback=told.append))(images, labels)
    assert 0 < len(told[-1].rows) < 6 or len({len(r.rows) for r in told}) > 2
    attack = targeted(make(stop=stop))
    alone = [attack(images[i : i + 1], labels[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(together, torch.cat(alone), **CLOSE)


@pytest.mark.parametrize("mode", ["default", "targeted"])
def test_two_stages(trained_smooth, cam, batch, mode):
    images, labels = batch
    told = []
    attack = BitDepthADV2(
        cam(stop=0.1, warmup=2, callback=told.append), bits=3, steps=6, weight=0.5
    )
    if mode == "targeted":
        targeted(attack)
    together = attack(images, labels)
    assert len({len(record.rows) for record in told}) > 2  # or the test says little
    alone = [attack(images[i : i + 1], labels[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(together, torch.cat(alone), **CLOSE)


def test_matching_looks_its_probabilities_up():
    said, logits = torch.eye(3), torch.zeros(2, 3)
    logits[0, 2] = logits[1, 0] = 100.0
    maps, target = torch.zeros(2, 1, 2, 2), torch.tensor([0, 1])
    candidate = Candidate(maps, logits, maps, target, maps, 0.0, torch.tensor([2, 0]))
    assert Matching(said)(candidate).tolist() == pytest.approx([0, 0])
    turned = candidate._replace(rows=torch.tensor([0, 1]))
    assert Matching(said)(turned).tolist() == pytest.approx([2, 2])


# Step rules


def test_memory_of_any_make(cam, batch):
    """Tensors lose those who left, numbers stay."""
    path, memories = followed(cam, *batch), []

    def step(problem, variable, memory):
        velocity = memory and memory[0][0]
        variable, velocity = SignDescent()(problem, variable, velocity)
        memories.append(((velocity, torch.tensor(3.0)), None, "name", 1 + len(memories)))
        if memory is not None:
            assert memory[0][1] == 3.0
            assert memory[1:] == memories[-2][1:]
        return variable, memories[-1]

    settings = {"stop": path.some(3), "keep": "final"}
    found = targeted(cam(step=step, **settings))(*batch)
    assert torch.equal(found, targeted(cam(**settings))(*batch))


def test_memory_that_images_cannot_leave(cam, batch):
    def step(problem, variable, memory):
        return SignDescent()(problem, variable, None)[0], {}

    stop = followed(partial(cam, step=step), *batch).some(3)
    targeted(cam(step=step))(*batch)
    with pytest.raises(TypeError, match=r"memory of tensors, numbers and tuples .*got dict"):
        targeted(cam(step=step, stop=stop))(*batch)


def test_a_rule_that_looks_at_no_map_finishes_nobody(cam, batch):
    def blind(problem, variable, memory):
        gradient = problem.gradient(variable, problem.loss.prediction)
        return problem.move(variable, -problem.alpha * gradient.sign()), None

    told = []
    attack = targeted(cam(step=blind, stop=1.0, confidence=0.0, callback=told.append))
    assert torch.equal(attack(*batch), targeted(cam(step=blind))(*batch))
    assert len(told) == 16


def test_a_rule_that_looks_at_every_other_step(cam, batch):
    def every_other(problem, variable, memory):
        part = None if memory else problem.loss.prediction
        gradient = problem.gradient(variable, part)
        assert len(problem.loss.confidence) == len(variable) == len(problem.clean)
        return problem.move(variable, -problem.alpha * gradient.sign()), not memory

    images, labels = batch
    told, make = [], partial(cam, step=every_other, keep="final", stop=0.25)
    together = targeted(make(callback=told.append))(images, labels)
    assert len({len(record.rows) for record in told}) > 2
    for record in told:
        assert len(record.confidence) == len(record.rows)
    alone = [targeted(make())(images[i : i + 1], labels[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(together, torch.cat(alone), **CLOSE)


# Surrogates of others


class Echo(Surrogate):
    """Shows the first colour of 8x8 images."""

    def __init__(self, interpreter, images, target):
        self.interpreter, self.target = interpreter, target

    def __call__(self, images):
        assert len(images) == len(self.target)
        logits = self.interpreter.logits(images, self.target)
        return Explanation(torch.nn.functional.avg_pool2d(images[:, :1], 2), logits)


class Leavable(Echo):
    def take(self, index):
        self.target = self.target[index]


def test_a_surrogate_that_images_cannot_leave_is_refused_before_any_step(cam, batch):
    told = []
    message = r"expected a surrogate with a method take\(index\), got Echo; .*stop=None"
    with pytest.raises(TypeError, match=message):
        cam(surrogate=Echo, stop=0.1, callback=told.append)(*batch)
    assert told == []
    cam(surrogate=Echo)(*batch)  # without a stop nobody asks for it


def test_a_member_of_an_ensemble_that_images_cannot_leave(trained_smooth, batch):
    class Odd(Interpreter):
        def explain(self, images, target):
            return CAM(self.model).explain(images, target)

        def surrogate(self, images, target):
            return Echo(self, images, target)

    g = Ensemble([CAM(trained_smooth), Odd(trained_smooth)])
    with pytest.raises(TypeError, match="got Echo"):
        ADV2(trained_smooth, g, steps=2, stop=0.1)(*batch)


def test_a_surrogate_that_they_can_leave(cam, batch):
    make = partial(cam, surrogate=Leavable)
    path = followed(make, *batch)
    stop = path.some(3)
    last = targeted(make(stop=stop, keep="final"))(*batch)
    torch.testing.assert_close(last, path.left(path.finished(stop)), **CLOSE)


# The rest stays as it is


def test_normalisation(trained_smooth, cam, batch):
    mean, std = [0.4, 0.5, 0.3], [0.2, 0.3, 0.25]
    told, results = [], []
    for stop in (0.35, None):
        attack = targeted(cam(stop=stop, keep="final", callback=told.append))
        attack.set_normalization_used(mean=mean, std=std)
        normal = (batch[0] - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        results.append(attack(normal.double(), batch[1]))
    sizes = [len(record.rows) for record in told]
    assert min(sizes) < 6
    torch.testing.assert_close(*(r[told[15].rows] for r in results), **CLOSE)


def test_the_model_and_the_form_of_the_images(trained, data):
    model = copy.deepcopy(trained).train()
    images = data[0].contiguous(memory_format=torch.channels_last)
    told = []
    attack = ADV2(
        *(model, CAM, 0.2, 0.02, 30), stop=0.2, confidence=0.5, callback=told.append, warmup=2
    )
    for keep in ("best", "final"):
        attack.keep = keep
        adversarial = targeted(attack)(images, data[1])
        assert adversarial.stride() == images.stride()
        assert not adversarial.requires_grad
        assert (adversarial - images).abs().max() <= 0.2 + 1e-6
        assert torch.equal(attack(images, data[1]), adversarial)
    assert len({len(record.rows) for record in told}) > 2
    assert all(module.training for module in model.modules())
    assert not model._forward_hooks


def test_a_stop_assigned_later(cam, batch):
    attack = targeted(cam())
    attack.stop = 0.2
    assert torch.equal(attack(*batch), targeted(cam(stop=0.2))(*batch))


def test_curves_of_a_shrinking_batch(cam, batch):
    told = []
    targeted(cam(stop=0.2, callback=told.append))(*batch)
    assert len({len(record.rows) for record in told}) > 2
    confidence, _distance = visualize.curves(told).axes
    assert len(confidence.lines[0].get_xdata()) == len(told)


def test_the_loss_without_a_stop_lets_nobody_leave(trained_smooth, batch):
    images, labels = batch
    g = CAM(trained_smooth)
    maps = g(images, labels).detach()
    terms = (CrossEntropy(), MapDistance())
    for stop, left in ((None, False), (1.0, True)):
        dual = Dual(trained_smooth, g.surrogate(images, labels), labels, maps, terms, 0.0, stop)
        assert dual.leave() is None  # nothing has been looked at
        dual(images, 0.0)
        assert (dual.leave() is not None) is left

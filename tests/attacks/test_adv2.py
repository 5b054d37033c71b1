# SPDX-License-Identifier: MIT
"""What the attack does: against torchattacks' PGD, image by image, and setting by setting."""

import copy

import captum.attr
import pytest
import torch
import torchattacks
from hypothesis import given
from hypothesis import strategies as st

from captum_adv2 import ADV2, evaluate
from captum_adv2.attacks import CrossEntropy, Linear, MapDistance, Progress, SignDescent, presets
from captum_adv2.evaluation import metrics
from captum_adv2.interpreters import (
    CAM,
    MASK,
    CaptumInterpreter,
    GradCAM,
    Gradient,
    Surrogate,
)
from captum_adv2.interpreters.bilevel import FiniteDifference, Unrolled
from captum_adv2.interpreters.mask import Blur
from captum_adv2.types import Candidate, Explanation

CLASSES = 4
PLAIN = SignDescent(momentum=0.0, final=1.0)  # Eq. 4, the step of PGD
FLAT_MAPS = "ignore::captum_adv2.SoundnessWarning"  # where a map happens to be constant


def shifted(images, labels):
    return (labels + 1) % CLASSES


def targeted(attack):
    attack.set_mode_targeted_by_function(shifted, quiet=True)
    return attack


def predictions(model, images):
    with torch.no_grad():
        return model(images).argmax(dim=1)


def eight_bits(images):
    return (images * 255).round() / 255


def benign_maps(interpreter, images, labels):
    return interpreter(images, labels).detach()


@pytest.fixture
def four(data):
    """Four images: torchattacks takes the mean loss, and a quarter of a number is exact."""
    return data[0][:4], data[1][:4]


# Against torchattacks


@pytest.mark.parametrize("interpreter", [CAM, GradCAM])
@pytest.mark.parametrize("mode", ["by_label", "random", "least_likely"])
def test_without_map_term_and_warm_start_it_is_pgd(model, four, interpreter, mode):
    images, labels = four
    if mode == "by_label":
        labels = shifted(images, labels)
    settings = {"eps": 0.1, "alpha": 0.01, "steps": 7}
    pgd = torchattacks.PGD(model, **settings, random_start=False)
    ours = ADV2(
        model,
        interpreter,
        **settings,
        warmup=0,
        interpretation=MapDistance(0.0),
        prediction=CrossEntropy(rho=0.0),
        step=PLAIN,
        keep="final",
    )
    results = []
    for attack in (pgd, ours):
        getattr(attack, f"set_mode_targeted_{mode}")(quiet=True)
        with torch.random.fork_rng():
            torch.manual_seed(7)  # random targets come from the global generator
            results.append(attack(images, labels))
    assert torch.equal(*results)
    assert not torch.equal(results[0], images)


@pytest.mark.parametrize("keep", ["best", "final"])
@pytest.mark.parametrize("interpreter", [CAM, GradCAM, Gradient])
def test_warm_start_alone_is_untargeted_pgd(model, four, interpreter, keep):
    settings = {"eps": 0.1, "alpha": 0.01, "steps": 7}
    pgd = torchattacks.PGD(model, **settings, random_start=False)
    ours = ADV2(model, interpreter, **settings, warmup=7, keep=keep)
    assert torch.equal(ours(*four), pgd(*four))


def test_warm_start_alone_is_targeted_pgd(model, four):
    pgd = targeted(torchattacks.PGD(model, eps=0.1, alpha=0.01, steps=7, random_start=False))
    ours = targeted(ADV2(model, CAM, eps=0.1, alpha=0.01, steps=7, warmup=7))
    assert torch.equal(ours(*four), pgd(*four))


@pytest.mark.parametrize("interpreter", [CAM, GradCAM, Gradient])
def test_it_fools_the_interpreter_where_pgd_does_not(model, data, interpreter):
    images, labels = data
    target = shifted(images, labels)
    settings = {"eps": 0.2, "alpha": 0.02, "steps": 60}
    ours = targeted(ADV2(model, interpreter, **settings))
    pgd = targeted(torchattacks.PGD(model, **settings, random_start=False))
    g = interpreter(model)
    fooled = evaluate(model, g, images, ours(images, labels), target)
    visible = evaluate(model, g, images, pgd(images, labels), target)
    assert visible.success.all()
    assert fooled.success.all()
    assert (fooled.confidence >= 0.9).all()
    assert fooled.l1.mean() < 0.6 * visible.l1.mean()
    assert fooled.iou.mean() > visible.iou.mean()


# Images are independent


@pytest.mark.parametrize("interpreter", [CAM, GradCAM, Gradient])
@pytest.mark.parametrize("keep", ["best", "final"])
@pytest.mark.filterwarnings(FLAT_MAPS)
def test_a_batch_is_attacked_like_its_images(trained, data, interpreter, keep):
    # In double precision: a convolution may add up in another order for another batch size, and in
    # float32 that can turn the sign of a gradient near zero, so a pixel goes the other way.
    model = copy.deepcopy(trained).double()
    images, labels = data[0].double(), data[1]
    attack = targeted(ADV2(model, interpreter, eps=0.1, alpha=0.02, steps=12, keep=keep))
    together = attack(images, labels)
    alone = [attack(images[i : i + 1], labels[i : i + 1]) for i in range(len(images))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-6)


def test_the_order_of_a_batch_does_not_matter(trained, data):
    model = copy.deepcopy(trained).double()
    images, labels = data[0].double(), data[1]
    attack = ADV2(model, CAM, eps=0.1, alpha=0.02, steps=12)
    turned = attack(images.flip(0), labels.flip(0)).flip(0)
    torch.testing.assert_close(turned, attack(images, labels), rtol=0, atol=1e-6)


# The best iterate


@pytest.mark.parametrize("interpreter", [CAM, GradCAM, Gradient])
@pytest.mark.parametrize("eps", [0.03, 0.1, 0.2])
@pytest.mark.parametrize("step", [SignDescent(), PLAIN], ids=["default", "constant"])
@pytest.mark.filterwarnings(FLAT_MAPS)
def test_best_is_never_worse_than_final(model, data, interpreter, eps, step):
    images, labels = data
    target = shifted(images, labels)
    results = {}
    for keep in ("best", "final"):
        attack = ADV2(model, interpreter, eps=eps, alpha=eps / 6, steps=14, step=step, keep=keep)
        adversarial = targeted(attack)(images, labels)
        results[keep] = evaluate(model, interpreter(model), images, adversarial, target, labels)
    best, final = results["best"], results["final"]
    enough = final.success & (final.confidence >= 0.9)
    assert (best.success | ~enough).all()
    assert (best.l1 <= final.l1 + 1e-6)[enough].all()
    # Where the last iterate is not good enough, the best one is not less sure of the class.
    assert (best.success | ~final.success).all()
    assert (best.confidence >= final.confidence.clamp(max=0.9) - 1e-6).all()


def test_best_is_better_where_the_step_overshoots(model, data):
    """Or the test above could compare an iterate with itself."""
    images, labels = data
    g, benign, distance = CAM(model), benign_maps(CAM(model), images, labels), {}
    for keep in ("best", "final"):
        attack = targeted(ADV2(model, g, eps=0.2, alpha=0.05, steps=20, step=PLAIN, keep=keep))
        shown = g(eight_bits(attack(images, labels)), shifted(images, labels))
        distance[keep] = metrics.l1(shown, benign)
    assert (distance["best"] < 0.9 * distance["final"]).any()


def test_the_least_confidence_that_counts(model, data):
    images, labels = data
    target = shifted(images, labels)
    growing = CrossEntropy(Linear(0.0, 0.8))  # late iterates, with the best maps, are less sure

    def run(confidence):
        records = []
        attack = ADV2(
            model,
            CAM,
            eps=0.2,
            steps=30,
            confidence=confidence,
            prediction=growing,
            callback=records.append,
        )
        adversarial = targeted(attack)(images, labels)
        return evaluate(model, CAM(model), images, adversarial, target), records[1:]

    # No iterate is sure enough: the surest. Every one is: the one with the nearest map.
    report, records = run(1.0)
    surest = torch.stack([record.confidence for record in records]).amax(dim=0)
    assert (report.confidence > surest - 0.02).all()
    report, records = run(0.0)
    nearest = torch.stack([record.distance for record in records]).amin(dim=0)
    assert report.success.all()
    assert (report.l1 < nearest + 0.02).all()


# Seeds


@pytest.mark.parametrize("mode", ["default", "random"])
def test_the_same_seed_gives_the_same_bytes(model, data, mode):
    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        attack = ADV2(model, CAM, eps=0.1, steps=3, random_start=True, generator=generator)
        if mode == "random":
            attack.set_mode_targeted_random(quiet=True)
        return attack(*data)

    state = torch.get_rng_state()
    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))
    assert torch.equal(torch.get_rng_state(), state)


def test_random_targets_come_from_the_generator(model, data):
    images, labels = data

    def targets(seed, count=20):
        told = []
        attack = ADV2(
            model,
            CAM,
            eps=0.1,
            steps=1,
            generator=torch.Generator().manual_seed(seed),
            target_map=lambda g, x, own, target: told.append(target) or g(x, own).detach(),
        )
        attack.set_mode_targeted_random(quiet=True)
        for _ in range(count):
            attack(images, labels)
        return torch.stack(told)

    drawn = targets(1)
    assert torch.equal(drawn, targets(1))
    assert not torch.equal(drawn, targets(2))
    assert (drawn != labels).all()
    assert all(len(column.unique()) == CLASSES - 1 for column in drawn.T)


def test_random_start_without_a_generator_is_repeatable(model, data):
    attack = ADV2(model, CAM, eps=0.1, steps=3, random_start=True)
    plain = ADV2(model, CAM, eps=0.1, steps=3)
    assert torch.equal(attack(*data), attack(*data))
    assert not torch.equal(attack(*data), plain(*data))


# Untargeted mode


class Aim:
    """A target map that notes its arguments, and answers with the benign map."""

    def __init__(self):
        self.calls = []

    def __call__(self, interpreter, images, labels, target):
        self.calls.append((interpreter, images, labels, target))
        return interpreter.explain(images, labels).maps.detach()


def test_untargeted_success_is_another_class(model, data):
    images, labels = data
    adversarial = ADV2(model, CAM, eps=0.2, alpha=0.02, steps=20)(images, labels)
    assert (predictions(model, adversarial) != labels).all()


@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_the_target_is_where_the_warm_start_lands(model, four, warmup):
    images, labels = four
    aim, seen = Aim(), []

    def term(candidate):
        seen.append(candidate.target)
        return 0 * candidate.images.sum(dim=(1, 2, 3))

    settings = {"eps": 0.1, "alpha": 0.02}
    attack = ADV2(
        model, CAM, **settings, steps=warmup + 10, warmup=warmup, target_map=aim, terms=(term,)
    )
    adversarial = attack(images, labels)

    pgd = torchattacks.PGD(model, **settings, steps=warmup, random_start=False)
    started = pgd(images, labels)
    with torch.no_grad():
        logits = model(started)
    landed = logits.scatter(1, labels[:, None], -torch.inf).argmax(dim=1)
    if warmup == 5:
        assert torch.equal(landed, logits.argmax(dim=1))  # the warm start has left the labels
    assert len(seen) == 10 + 2  # the best and the last iterate are judged once more
    assert all(torch.equal(target, landed) for target in seen)
    assert torch.equal(aim.calls[0][3], landed)
    assert torch.equal(predictions(model, adversarial), landed)


def test_untargeted_mode_leaves_the_labels_even_where_the_model_does_not_see_them(model, data):
    images, labels = data
    wrong = shifted(images, labels)
    aim = Aim()
    ADV2(model, CAM, eps=0.1, alpha=0.01, steps=1, warmup=0, target_map=aim)(images, wrong)
    assert torch.equal(aim.calls[0][3], labels)  # likeliest class but the label
    assert torch.equal(aim.calls[0][2], labels)  # own class: as the model sees it


# Target maps


def test_target_maps_of_a_call_are_aimed_at(model, data):
    images, labels = data
    g = CAM(model)
    benign = benign_maps(g, images, labels)
    wanted = benign.flip(-1, -2)
    apart = metrics.l1(wanted, benign)
    assert apart.mean() > 0.1  # or the test says little
    attack = targeted(ADV2(model, g, eps=0.3, alpha=0.03, steps=60))
    shown = g(attack(images, labels, target_maps=wanted), shifted(images, labels))
    assert metrics.l1(shown, wanted).mean() < 0.5 * metrics.l1(shown, benign).mean()
    assert metrics.l1(shown, wanted).mean() < 0.5 * apart.mean()


def test_target_maps_stay_with_their_images(trained, data):
    model = copy.deepcopy(trained).double()
    images, labels = data[0].double(), data[1]
    wanted = benign_maps(CAM(model), images, labels).roll(1, dims=0)
    attack = targeted(ADV2(model, CAM, eps=0.2, alpha=0.02, steps=12))
    together = attack(images, labels, target_maps=wanted)
    order = torch.tensor([3, 0, 5])
    some = attack(images[order], labels[order], target_maps=wanted[order])
    torch.testing.assert_close(some, together[order], rtol=0, atol=1e-6)
    swapped = attack(images, labels, target_maps=wanted.flip(0))
    assert not torch.allclose(swapped, together, atol=1e-3)


def test_target_maps_of_a_call_win_and_are_not_kept(model, data):
    aim = Aim()
    attack = targeted(ADV2(model, CAM, eps=0.1, steps=4, target_map=aim))
    plain = attack(*data)
    assert len(aim.calls) == 1
    maps = benign_maps(CAM(model), *data).flip(-1)
    given_ = attack(*data, target_maps=maps)
    assert len(aim.calls) == 1
    assert not torch.equal(given_, plain)
    assert torch.equal(attack(*data), plain)


@pytest.mark.parametrize("by_label", [True, False])
def test_a_target_map_is_told_interpreter_images_labels_and_target(model, data, by_label):
    images, labels = data
    aim, g = Aim(), CAM(model)
    attack = ADV2(model, g, eps=0.1, steps=4, target_map=aim)
    if by_label:
        attack.set_mode_targeted_by_label(quiet=True)
        attack(images, shifted(images, labels))
    else:
        targeted(attack)(images, labels)
    ((interpreter, seen, own, target),) = aim.calls
    assert interpreter is g
    assert torch.equal(seen, images)
    assert torch.equal(own, labels)
    assert torch.equal(target, shifted(images, labels))


def test_maps_the_loss_compares_are_the_ones_asked_for(model, data):
    wanted = benign_maps(CAM(model), *data).flip(-1)
    seen = []

    def term(candidate):
        seen.append(candidate.target_maps)
        return 0 * candidate.images.sum(dim=(1, 2, 3))

    targeted(ADV2(model, CAM, steps=3, warmup=1, terms=(term,)))(*data, target_maps=wanted)
    assert len(seen) == 2 + 2  # the best and the last iterate are judged once more
    assert all(torch.equal(maps, wanted) for maps in seen)


# Terms and step rules


def test_a_further_term_gets_a_candidate(model, data):
    images, labels = data
    seen = []

    def term(candidate):
        seen.append(candidate)
        return 0 * candidate.images.sum(dim=(1, 2, 3))

    settings = {"eps": 0.1, "alpha": 0.02, "steps": 8, "warmup": 3}
    with_term = targeted(ADV2(model, CAM, **settings, terms=(term,)))(images, labels)
    assert torch.equal(with_term, targeted(ADV2(model, CAM, **settings))(images, labels))
    *seen, final, best = seen
    assert final.progress == best.progress == 1.0  # judged, after rounding to 8 bits
    assert torch.equal((final.images * 255).round() / 255, final.images)
    assert [candidate.progress for candidate in seen] == [i / 5 for i in range(5)]
    for candidate in seen:
        assert isinstance(candidate, Candidate)
        assert candidate.images.shape == images.shape
        assert candidate.images.requires_grad
        assert candidate.maps.shape == (6, 1, 8, 8)
        assert candidate.target_maps.shape == (6, 1, 8, 8)
        assert torch.equal(candidate.target, shifted(images, labels))
        torch.testing.assert_close(candidate.logits, model(candidate.images))


def test_further_terms_decide_which_iterate_is_best(model, data):
    images, labels = data

    def corner(candidate):  # no gradient: the iterates are the same with and without it
        return 0 * candidate.images.sum(dim=(1, 2, 3)) + dark(candidate.images)

    def dark(adversarial):
        return 20 * (adversarial.detach()[:, :, :2, :2].mean(dim=(1, 2, 3)) - 0.4)

    settings = {"eps": 0.1, "alpha": 0.02, "steps": 12, "confidence": 0.0}
    darkest = targeted(ADV2(model, CAM, **settings, terms=(corner,)))(images, labels)
    plain = targeted(ADV2(model, CAM, **settings))(images, labels)
    assert torch.equal(predictions(model, darkest), shifted(images, labels))
    assert (dark(darkest) <= dark(plain)).all()
    assert (dark(darkest) < dark(plain)).any()


def test_further_terms_count(model, data):
    def bright(candidate):
        return -1e4 * candidate.images.mean(dim=(1, 2, 3))

    def dark(candidate):
        return 1e4 * candidate.images.mean(dim=(1, 2, 3))

    settings = {"eps": 0.1, "alpha": 0.02, "steps": 6, "warmup": 0, "keep": "final"}
    up = ADV2(model, CAM, **settings, terms=(bright,))(*data)
    down = ADV2(model, CAM, **settings, terms=(dark,))(*data)
    both = ADV2(model, CAM, **settings, terms=(bright, dark))(*data)
    assert (up - data[0]).mean() > 0.03
    assert (down - data[0]).mean() < -0.03
    assert (both - data[0]).mean().abs() < 0.03


def test_any_function_may_be_the_step_rule(model, data):
    progress = []

    def lazy(problem, variable, memory):
        progress.append((problem.progress, memory))
        return problem.move(variable, 0 * variable), "memory"

    attack = ADV2(model, CAM, steps=6, warmup=2, step=lazy, keep="final")
    warm = ADV2(model, CAM, steps=2, warmup=2)
    assert torch.equal(attack(*data), warm(*data))
    assert progress == [(0.0, None), (0.25, "memory"), (0.5, "memory"), (0.75, "memory")]


# What it tells, and what it costs


@pytest.mark.parametrize("mode", ["default", "targeted"])
def test_the_callback_is_told_of_each_gradient_evaluation(model, data, mode):
    images, labels = data
    told = []
    attack = ADV2(model, CAM, eps=0.1, steps=9, warmup=4, callback=told.append)
    if mode == "targeted":
        targeted(attack)
    attack(images, labels)
    assert all(isinstance(progress, Progress) for progress in told)
    assert [progress.step for progress in told] == list(range(9))
    for progress in told:
        assert progress.confidence.shape == progress.distance.shape == (6,)
        assert not progress.confidence.requires_grad
        assert not progress.distance.requires_grad
        assert (progress.confidence >= 0).all()
        assert (progress.confidence <= 1).all()
    assert all(progress.distance.isnan().all() for progress in told[:4])
    for progress in told[4:]:
        assert (progress.distance >= 0).all()
        assert (progress.distance <= 1).all()

    with torch.no_grad():
        probabilities = model(images).softmax(dim=1)
    first = labels if mode == "default" else shifted(images, labels)
    first = probabilities.gather(1, first[:, None])[:, 0]
    expected = 1 - first if mode == "default" else first
    torch.testing.assert_close(told[0].confidence, expected, rtol=1e-4, atol=1e-6)


def test_the_first_distance_after_no_warm_start_is_between_two_classes_maps(model, data):
    images, labels = data
    told, g = [], CAM(model)
    targeted(ADV2(model, g, steps=2, warmup=0, callback=told.append))(images, labels)
    expected = metrics.l1(g(images, shifted(images, labels)), g(images, labels))
    torch.testing.assert_close(told[0].distance, expected.detach())


def captum_gradcam(model):
    return CaptumInterpreter(captum.attr.LayerGradCam(model, model.body))


@pytest.mark.parametrize("interpreter", [CAM, GradCAM, Gradient, captum_gradcam])
@pytest.mark.parametrize("keep", ["best", "final"])
@pytest.mark.parametrize("mode", ["default", "targeted"])
@pytest.mark.parametrize(("steps", "warmup"), [(5, 0), (9, 4)])
@pytest.mark.filterwarnings(FLAT_MAPS)
def test_forward_passes(trained, data, interpreter, keep, mode, steps, warmup):
    """One pass a step, map and prediction together, and a handful around them.

    Around them: one for the images' own classes, one for the benign map; untargeted, one where the
    warm start has landed; for the best iterate, two that judge it and the last one.
    """
    model = copy.deepcopy(trained)
    attack = ADV2(model, interpreter, steps=steps, warmup=warmup, keep=keep)
    if mode == "targeted":
        targeted(attack)
    sizes = []
    model.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    attack(*data)
    around = 2 + (mode == "default") + 2 * (keep == "best")
    assert sizes.count(6) == steps + around
    assert sizes.count(1) == 1  # one image, to see that the map can be attacked
    assert set(sizes) == {1, 6}


def test_backward_passes(model, data, monkeypatch):
    counted = []
    grad = torch.autograd.grad

    def counting(*args, **kwargs):
        counted.append(1)
        return grad(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counting)
    attack = targeted(ADV2(model, CAM, steps=7, warmup=3))
    attack(*data)
    assert len(counted) == 7 + 1  # one more on one image, to see that the map can be attacked


@pytest.mark.parametrize("verbose", [True, False])
def test_a_progress_bar_only_if_asked_for(model, data, capsys, verbose):
    ADV2(model, CAM, steps=4, warmup=2, verbose=verbose)(*data)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("4/4" in captured.err and "confidence" in captured.err) is verbose
    assert bool(captured.err) is verbose


# Bounds and formats


@given(
    eps=st.one_of(st.sampled_from([0.0, 1 / 255, 8 / 255, 1.0, 3.0]), st.floats(0.0, 1.0)),
    alpha=st.sampled_from([0.0, 1e-3, 0.1, 2.0]),
    warmup=st.integers(0, 3),
    keep=st.sampled_from(["best", "final"]),
    random_start=st.booleans(),
    last=st.booleans(),
)
def test_bounds_dtype_shape_and_memory_format(
    trained, data, eps, alpha, warmup, keep, random_start, last
):
    form = torch.channels_last if last else torch.contiguous_format
    images = data[0].contiguous(memory_format=form)
    attack = ADV2(
        *(trained, CAM, eps, alpha, 3), warmup=warmup, keep=keep, random_start=random_start
    )
    adversarial = attack(images, data[1])
    assert adversarial.shape == images.shape
    assert adversarial.dtype == images.dtype
    assert adversarial.is_contiguous(memory_format=form)
    assert adversarial.stride() == images.stride()
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert (adversarial - images).abs().max() <= eps + 2e-7
    if eps == 0:
        torch.testing.assert_close(adversarial, images, rtol=0, atol=2e-7)


def test_the_ball_is_used_to_its_border(model, data):
    adversarial = ADV2(model, CAM, eps=0.05, alpha=0.02, steps=10)(*data)
    assert (adversarial - data[0]).abs().max() == pytest.approx(0.05, abs=1e-6)


@pytest.mark.parametrize("keep", ["best", "final"])
def test_double_precision(smooth, data, keep):
    images = data[0].double()
    adversarial = ADV2(smooth, Gradient, eps=0.1, steps=6, keep=keep)(images, data[1])
    assert adversarial.dtype == torch.float64
    assert (adversarial - images).abs().max() <= 0.1 + 1e-12
    assert not torch.equal(adversarial, images)


def test_bfloat16(trained, data):
    model = copy.deepcopy(trained).bfloat16()
    images = data[0].bfloat16()
    adversarial = ADV2(model, CAM, eps=0.125, alpha=0.03125, steps=6)(images, data[1])
    assert adversarial.dtype == torch.bfloat16
    assert (adversarial - images).abs().max() <= 0.125 + 2**-7
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1


def test_images_a_rounding_error_outside_the_range(model, data):
    images = data[0].clone()
    images[0, 0, 0, 0], images[0, 0, 0, 1] = -1e-6, 1 + 1e-6  # back from (x - mean) / std
    adversarial = ADV2(model, CAM, steps=2)(images, data[1])
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1


def test_one_image(model, data):
    adversarial = ADV2(model, CAM, eps=0.2, steps=10)(data[0][:1], data[1][:1])
    assert adversarial.shape == (1, 3, 16, 16)
    assert predictions(model, adversarial) != data[1][:1]


# What is differentiated in place of the interpreter


class Echo(Surrogate):
    """Shows the first colour of 8x8 images, and notes what it is asked."""

    def __init__(self, interpreter, images, target):
        self.interpreter, self.target, self.first = interpreter, target, images
        self.advanced, self.called = [], []

    def advance(self, images):
        self.advanced.append(images)

    def __call__(self, images):
        self.called.append(images)
        logits = self.interpreter.logits(images)
        return Explanation(torch.nn.functional.avg_pool2d(images[:, :1], 2), logits)


def test_a_surrogate_takes_the_interpreters_place(model, data):
    images, labels = data
    made, seen, cam = [], [], CAM(model)

    def surrogate(interpreter, images, target):
        made.append(Echo(interpreter, images, target))
        return made[-1]

    def term(candidate):
        seen.append(candidate.maps)
        return 0 * candidate.images.sum(dim=(1, 2, 3))

    attack = targeted(
        ADV2(model, cam, eps=0.1, steps=6, warmup=2, surrogate=surrogate, terms=(term,))
    )
    adversarial = attack(images, labels)
    check, echo = made
    assert check.interpreter is echo.interpreter is cam
    assert len(check.first) == len(check.called) == 1  # the check at the start, on one image
    warm = targeted(ADV2(model, cam, eps=0.1, steps=2, warmup=2))(images, labels)
    assert torch.equal(echo.first, warm)  # made where the warm start ends
    assert torch.equal(echo.target, shifted(images, labels))
    assert len(echo.advanced) == len(echo.called) == 4
    for moved, looked in zip(echo.advanced, echo.called, strict=True):
        assert torch.equal(moved, looked)
    for maps, looked in zip(seen[:4], echo.called, strict=True):
        assert torch.equal(maps, torch.nn.functional.avg_pool2d(looked[:, :1], 2))
    assert not torch.equal(adversarial, targeted(ADV2(model, cam, eps=0.1, steps=6))(*data))


def test_the_interpreters_own_surrogate_passed_in_changes_nothing(model, data):
    def own(interpreter, images, target):
        return interpreter.surrogate(images, target)

    settings = {"eps": 0.1, "steps": 5}
    ours = ADV2(model, Gradient, **settings, surrogate=own)
    assert torch.equal(ours(*data), ADV2(model, Gradient, **settings)(*data))


@pytest.mark.parametrize("surrogate", [None, FiniteDifference(), Unrolled()])
def test_the_check_at_the_start_looks_at_the_surrogate(model, data, surrogate):
    attack = ADV2(model, small_mask, eps=0.1, steps=1, warmup=0, surrogate=surrogate)
    assert not attack.interpreter(*data).requires_grad
    attack(*data)


def test_a_surrogate_without_a_graph_is_refused(model, data):
    class Dead(Echo):
        def __call__(self, images):
            return Explanation(super().__call__(images).maps.detach(), None)

    with pytest.raises(ValueError, match="expected a differentiable interpreter, got CAM"):
        ADV2(model, CAM, steps=2, surrogate=Dead)(*data)


# MASK


def small_mask(model):
    return MASK(model, size=4, iterations=6, jitter=1, perturb=Blur(4.0))


def mask_attack(model, kind, **settings):
    if kind == "default":
        return targeted(ADV2(model, small_mask, eps=0.1, alpha=0.02, **settings))
    preset, surrogate = getattr(presets, kind)["MASK"], Unrolled(n_step=2, n_reset=3)
    interpretation = MapDistance(1.0, reduction="sum", l1=0.0, shape=0.0)
    return targeted(
        ADV2.from_preset(
            *(model, small_mask, preset),
            **{"surrogate": surrogate, "interpretation": interpretation} | settings,
        )
    )


@pytest.mark.parametrize("kind", ["default", "PAPER", "OFFICIAL"])
def test_mask_is_attacked_within_the_ball(model, data, kind):
    told = []
    attack = mask_attack(model, kind, steps=8, warmup=3, callback=told.append)
    adversarial = attack(*data)
    assert adversarial.shape == data[0].shape
    assert 0 < (adversarial - data[0]).abs().max() <= attack.eps + 1e-6
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert not adversarial.requires_grad
    assert torch.equal(attack(*data), adversarial)
    for progress in told[3:8]:
        assert ((progress.distance >= 0) & (progress.distance <= 1)).all()
        assert ((progress.confidence >= 0) & (progress.confidence <= 1)).all()
    assert [progress.step for progress in told[:8]] == list(range(8))


@pytest.mark.parametrize("kind", ["default", "PAPER", "OFFICIAL"])
def test_a_batch_on_mask_is_attacked_like_its_images(trained_smooth, data, kind):
    images, labels = data[0][:3].double(), data[1][:3]
    attack = mask_attack(trained_smooth, kind, steps=10, warmup=4)
    together = attack(images, labels)
    alone = [attack(images[i : i + 1], labels[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-6)


def test_mask_is_fooled_where_pgd_does_not_fool_it(model, data):
    images, labels = data
    target = shifted(images, labels)
    g = MASK.small(model, iterations=100, perturb=Blur(4.0))
    settings = {"eps": 0.2, "alpha": 0.02, "steps": 60}
    ours = targeted(ADV2(model, g, **settings))
    pgd = targeted(torchattacks.PGD(model, **settings, random_start=False))
    fooled = evaluate(model, g, images, ours(images, labels), target)
    visible = evaluate(model, g, images, pgd(images, labels), target)
    assert fooled.success.all()
    assert fooled.l1.mean() < visible.l1.mean()

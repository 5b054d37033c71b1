# SPDX-License-Identifier: MIT
"""What ADV2 does: against torchattacks' PGD, image by image, and setting by setting."""

import copy
import inspect
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchattacks
from attack_helpers import (
    FLAT_MAPS,
    MODES,
    confidence_of,
    distance_of,
    noting,
    shifted,
    small_mask,
    targeted,
)
from hypothesis import given
from hypothesis import strategies as st

from captum_adv2 import ADV2, StADV2, evaluate
from captum_adv2.attacks import CrossEntropy, MapDistance, SignDescent, presets
from captum_adv2.interpreters import CAM, GradCAM, Gradient, Unrolled
from captum_adv2.interpreters.base import Explanation, Surrogate

PLAIN = SignDescent(momentum=0.0, final=1.0)  # Eq. 4, the step of PGD
EQ_3 = {"prediction": CrossEntropy(rho=0.0), "step": PLAIN, "keep": "final", "warmup": 0}
SUM = partial(MapDistance, reduction="sum", l1=0.0, shape=0.0)


@pytest.fixture
def four(data):
    """Four images: torchattacks takes the mean loss, and a quarter of a number is exact."""
    return data[0][:4], data[1][:4]


@pytest.fixture
def double(data):
    # A convolution may add up in another order for another batch size, and in float32 that can
    # turn the sign of a gradient near zero, so that a pixel goes the other way.
    return data[0].double(), data[1]


# Arguments

COMMON = (
    "target_map=Benign(), "
    "prediction=CrossEntropy(rho=Linear(first=0.05, last=0.01), seed=None), interpretation=None, "
    "terms=(), confidence=0.9, stop=None, generator=None, callback=None, verbose=False, "
    "warmup=None, surrogate=None, keep='best'"
)
SIGNATURES = {
    ADV2: f"(model, interpreter=None, eps={8 / 255}, alpha={2 / 255}, steps=100, *, {COMMON}, "
    "random_start=False, step=SignDescent(momentum=None, final=None))",
    StADV2: f"(model, interpreter=None, flow_weight=0.0005, steps=200, *, {COMMON}, "
    "alpha=0.1, bound=None, step=AdamDescent(betas=(0.9, 0.999), final=0.01))",
}


@pytest.mark.parametrize("kind", SIGNATURES)
def test_the_signature_shows_every_argument_with_its_default(kind):
    parameters = inspect.signature(kind).parameters.values()
    bare = inspect.Signature([p.replace(annotation=p.empty) for p in parameters])
    assert str(bare) == SIGNATURES[kind]


BAD = {"steps": 0, "eps": -0.1, "confidence": 1.1, "keep": "first", "stop": 2.0, "alpha": -1.0}


@pytest.mark.parametrize("name", BAD)
def test_a_setting_is_checked_when_it_is_assigned(model, name):
    attack = ADV2(model, CAM)
    before = getattr(attack, name)
    with pytest.raises(ValueError, match=f"^expected {name} "):
        setattr(attack, name, BAD[name])
    assert getattr(attack, name) == before
    with pytest.raises(ValueError, match=f"^expected {name} "):
        ADV2(model, CAM, **{name: BAD[name]})


# Against torchattacks, and against the loop written out


@pytest.mark.parametrize("interpreter", [CAM, GradCAM])
@pytest.mark.parametrize("mode", ["by_label", "random", "least_likely"])
def test_without_map_term_and_warm_start_it_is_pgd(model, four, interpreter, mode):
    images, labels = four
    settings = {"eps": 0.1, "alpha": 0.01, "steps": 7}
    pgd = torchattacks.PGD(model, **settings, random_start=False)
    ours = ADV2(model, interpreter, **settings, **EQ_3, interpretation=MapDistance(0.0))
    results = []
    for attack in (pgd, ours):
        getattr(attack, f"set_mode_targeted_{mode}")(quiet=True)
        with torch.random.fork_rng():
            torch.manual_seed(7)  # random targets come from the global generator
            results.append(attack(images, shifted(*four) if mode == "by_label" else labels))
    assert torch.equal(*results)
    assert not torch.equal(results[0], images)


@MODES
@pytest.mark.parametrize("interpreter", [CAM, Gradient])
def test_the_warm_start_alone_is_pgd(model, four, mode, interpreter):
    settings = {"eps": 0.1, "alpha": 0.01, "steps": 7}
    pgd = mode(torchattacks.PGD(model, **settings, random_start=False))
    ours = mode(ADV2(model, interpreter, **settings, warmup=7))
    assert torch.equal(ours(*four), pgd(*four))


def test_it_is_equations_3_and_4(trained_smooth, double):
    images, labels = double
    cam, target = CAM(trained_smooth), shifted(*double)
    x, wanted = images, cam(images, labels).detach()
    for _ in range(10):
        x = x.detach().requires_grad_()
        apart = (cam(x, target) - wanted).square().sum()
        loss = F.cross_entropy(trained_smooth(x), target, reduction="sum") + 0.204 * apart
        x = x - 0.02 * torch.autograd.grad(loss, x)[0].sign()
        x = (images + (x - images).clamp(-0.1, 0.1)).clamp(0, 1)
    ours = ADV2(trained_smooth, cam, 0.1, 0.02, 10, **EQ_3, interpretation=SUM(0.204))
    torch.testing.assert_close(targeted(ours)(*double), x.detach(), rtol=0, atol=1e-9)


# Over several trainings of the network the ratios were at most 0.03, 0.03 and 0.48.
@pytest.mark.parametrize(("interpreter", "share"), [(CAM, 0.3), (GradCAM, 0.3), (Gradient, 0.9)])
def test_it_fools_the_interpreter_where_pgd_does_not(model, data, interpreter, share):
    settings = {"eps": 0.2, "alpha": 0.02, "steps": 60}
    attacks = (ADV2(model, interpreter, **settings), torchattacks.PGD(model, **settings))
    ours, regular = (
        evaluate(model, interpreter(model), data[0], targeted(attack)(*data), shifted(*data))
        for attack in attacks
    )
    assert ours.success.all()
    assert regular.success.all()
    assert ours.l1.mean() < share * regular.l1.mean()


# Images are independent: further kinds of attacks are in `test_contract`

unrolled = partial(
    ADV2.from_preset,
    interpreter=small_mask,
    surrogate=Unrolled(n_step=2, n_reset=3),
    interpretation=SUM(1.0),
)
KINDS = {
    "GRAD": partial(ADV2, interpreter=Gradient),
    "PAPER MASK": partial(unrolled, preset=presets.PAPER["MASK"]),
    "OFFICIAL MASK": partial(unrolled, preset=presets.OFFICIAL["MASK"]),
    "StADV2 MASK": partial(StADV2, interpreter=small_mask),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings(FLAT_MAPS)
def test_a_batch_is_attacked_like_its_images(trained_smooth, double, kind):
    images, labels = double
    attack = targeted(KINDS[kind](trained_smooth, steps=8, warmup=2))
    together = attack(images, labels)
    assert not torch.equal(together, images)
    alone = [attack(images[i : i + 1], labels[i : i + 1]) for i in (0, 5)]
    torch.testing.assert_close(together[[0, 5]], torch.cat(alone), rtol=0, atol=1e-6)


# Seeds


@pytest.mark.parametrize("mode", ["default", "random"])
def test_the_same_seed_gives_the_same_bytes(model, data, mode):
    def run(seed):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        attack = ADV2(model, CAM, 0.1, steps=3, random_start=True, generator=generator)
        if mode == "random" and seed is not None:  # without a seed, the targets are torchattacks'
            attack.set_mode_targeted_random(quiet=True)
        return attack(*data)

    state = torch.get_rng_state()
    for seed in (3, None):
        assert torch.equal(run(seed), run(seed))
    assert not torch.equal(run(3), run(4))
    assert not torch.equal(run(None), ADV2(model, CAM, 0.1, steps=3)(*data))
    assert torch.equal(torch.get_rng_state(), state)


def test_random_targets_come_from_the_generator(model, data):
    def targets(seed):
        attack = ADV2(model, CAM, generator=torch.Generator().manual_seed(seed))
        return torch.stack([attack.get_random_target_label(*data) for _ in range(40)])

    drawn = targets(1)
    assert torch.equal(drawn, targets(1))
    assert not torch.equal(drawn, targets(2))
    assert (drawn != data[1]).all()
    assert all(len(column.unique()) == 3 for column in drawn.T)


# Targets


class Aim:
    """A target map that notes its arguments, and answers with the benign map."""

    def __init__(self):
        self.calls = []

    def __call__(self, interpreter, images, labels, target):
        self.calls.append((interpreter, images, labels, target))
        return interpreter.explain(images, labels).maps.detach()


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("right", [True, False])
def test_an_untargeted_attack_aims_where_the_warm_start_lands(model, four, warmup, right):
    avoided = four[1] if right else shifted(*four)
    aim, seen = Aim(), []
    attack = ADV2(model, CAM, 0.1, 0.02, warmup + 4, warmup=warmup, terms=(noting(seen),))
    attack.target_map = aim
    attack(four[0], avoided)
    pgd = torchattacks.PGD(model, 0.1, 0.02, warmup, random_start=False)
    logits = model(pgd(four[0], avoided)).detach()
    landed = logits.scatter(1, avoided[:, None], -torch.inf).argmax(dim=1)
    assert all(torch.equal(candidate.target, landed) for candidate in seen)
    ((interpreter, images, own, target),) = aim.calls
    assert interpreter is attack.interpreter
    assert torch.equal(images, four[0])
    assert torch.equal(own, four[1])  # as the model sees them
    assert torch.equal(target, landed)


def test_target_maps_of_a_call_win_stay_with_their_images_and_are_not_kept(trained_smooth, double):
    images, labels = double
    wanted = CAM(trained_smooth)(images, labels).detach().roll(1, dims=0)
    aim = Aim()
    attack = targeted(ADV2(trained_smooth, CAM, 0.2, 0.02, 8, target_map=aim))
    plain = attack(images, labels)
    together = attack(images, labels, target_maps=wanted)
    assert len(aim.calls) == 1
    assert not torch.equal(together, plain)
    order = torch.tensor([3, 0, 5])
    some = attack(images[order], labels[order], target_maps=wanted[order])
    torch.testing.assert_close(some, together[order], rtol=0, atol=1e-6)
    assert torch.equal(attack(images, labels), plain)


# What callbacks, terms and surrogates see


@MODES
@pytest.mark.parametrize(("keep", "judged"), [("best", 2), ("final", 0), (2, 4)])
@pytest.mark.parametrize("interpreter", [CAM, GradCAM, Gradient])
@pytest.mark.filterwarnings(FLAT_MAPS)
def test_a_step_is_one_pass_one_report_and_one_candidate(
    trained, data, mode, keep, judged, interpreter
):
    """Map and prediction share one forward pass, GRAD's gradient takes one more; a few are around.

    Around them: one for the images' own classes, one to see that the map can be attacked, one for
    the benign map; untargeted, one where the
    warm start has landed; for the best iterate, two that judge it and the last one, and one for
    each late iterate.
    """
    model, sizes, seen, reports = copy.deepcopy(trained), [], [], []
    model.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    attack = mode(ADV2(model, interpreter, steps=9, warmup=4, keep=keep, terms=(noting(seen),)))
    attack.callback = reports.append
    attack(*data)
    passes = 2 if interpreter is Gradient else 1
    assert len(sizes) == 4 + 5 * passes + 2 + passes + (not attack.targeted) + judged
    assert set(sizes) == {6}  # a model may accept no other number of images
    assert [report.step for report in reports] == list(range(9))
    assert all(report.rows.tolist() == list(range(6)) for report in reports)
    assert all(report.distance.isnan().all() for report in reports[:4])
    progress = [0.0, 0.2, 0.4, 0.6, 0.8] + [1.0] * judged
    assert [candidate.progress for candidate in seen] == progress
    for report, candidate in zip(reports[4:], seen[:5], strict=True):
        torch.testing.assert_close(report.distance, distance_of(candidate))
        torch.testing.assert_close(report.confidence, confidence_of(candidate), rtol=0, atol=1e-5)
        torch.testing.assert_close(candidate.logits, model(candidate.images))
        assert candidate.images.requires_grad
    classes = shifted(*data) if attack.targeted else data[1]
    p = model(data[0]).detach().softmax(dim=1)[range(6), classes]
    first = p if attack.targeted else 1 - p  # to be of any class but the label
    torch.testing.assert_close(reports[0].confidence, first, rtol=0, atol=1e-5)


def test_a_far_target_map_counts_once_the_class_is_reached(trained, data):
    maps = torch.rand(6, 1, *CAM(trained)(*data).shape[-2:], generator=torch.manual_seed(0))
    attack = partial(ADV2, trained, CAM(trained), steps=3, keep="final")
    for chosen, gate in (({}, 0.0), ({"target_map": lambda *given: maps}, 30.0)):
        given_ = attack(interpretation=MapDistance(gate=gate), **chosen)
        assert torch.equal(targeted(attack(**chosen))(*data), targeted(given_)(*data))
    passed = targeted(attack())(*data, target_maps=maps)
    assert torch.equal(passed, targeted(attack(target_map=lambda *given: maps))(*data))


class Red(Surrogate):
    """Shows the first colour of images; notes where it starts."""

    def __init__(self, graph=True):
        self.graph, self.started = graph, []

    def init(self, interpreter, images, target):
        self.started.append((images, target))
        return target

    def __call__(self, interpreter, images, state, progress):
        images = images if self.graph else images.detach()
        return Explanation(F.avg_pool2d(images[:, :1], 2), None)


def test_a_surrogate_takes_the_interpreters_place(model, data):
    seen, red = [], Red()
    attack = partial(ADV2, model, CAM, eps=0.1, alpha=0.02, warmup=2)
    targeted(attack(steps=6, surrogate=red, terms=(noting(seen),)))(*data)
    (probe, _), (start, target) = red.started
    assert torch.equal(probe, data[0])  # the check at the start
    assert torch.equal(start, targeted(attack(steps=2))(*data))  # where the warm start ends
    assert torch.equal(target, shifted(*data))
    for candidate in seen[:4]:
        assert torch.equal(candidate.maps, F.avg_pool2d(candidate.images[:, :1], 2))
    with pytest.raises(ValueError, match="expected a differentiable interpreter, got CAM"):
        attack(steps=3, surrogate=Red(graph=False))(*data)


def test_late_iterates_are_judged_by_the_reported_map(trained, data):
    attack = partial(ADV2, trained, CAM(trained), eps=0.1, steps=20, confidence=0.0)
    reports = [
        evaluate(trained, CAM(trained), data[0], made, shifted(*data))
        for keep in ("best", np.int64(8))
        for made in [targeted(attack(surrogate=Red(), keep=keep))(*data)]
    ]
    best, late = reports
    assert (late.success >= best.success).all()
    both = best.success & late.success
    assert (late.l1[both] <= best.l1[both] + 1e-6).all()
    assert (late.l1[both] < best.l1[both] - 1e-6).any()  # red is another map


# Bounds and formats


@given(
    eps=st.sampled_from([0.0, 1 / 255, 8 / 255, 1.0]) | st.floats(0.0, 1.0),
    alpha=st.sampled_from([0.0, 1e-3, 0.1, 1.0]),
    warmup=st.integers(0, 3),
    keep=st.sampled_from(["best", "final"]),
    random_start=st.booleans(),
    form=st.sampled_from([torch.channels_last, torch.contiguous_format]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_bounds_dtype_and_memory_format(
    trained, data, eps, alpha, warmup, keep, random_start, form, dtype
):
    net, images = copy.deepcopy(trained).to(dtype), data[0].to(dtype, memory_format=form)
    settings = {"warmup": warmup, "keep": keep, "random_start": random_start}
    adversarial = ADV2(net, CAM, eps, alpha, 3, **settings)(images, data[1])
    assert adversarial.dtype == dtype
    assert adversarial.stride() == images.stride()
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    rounding = 2**-7 if dtype == torch.bfloat16 else 2e-7
    assert (adversarial - images).abs().max() <= eps + rounding

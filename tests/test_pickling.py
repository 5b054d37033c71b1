# SPDX-License-Identifier: MIT
"""Copies by copy, pickle and torch.save: they do the same, on a model of their own."""

import copy
import inspect
import io
import pickle

import pytest
import torch
import torchattacks
from conftest import ATTACKS, untrained

import captum_adv2
from captum_adv2 import ADV2, StADV2, attacks, defenses, evaluate, interpreters
from captum_adv2.attacks import (
    AdamDescent,
    CrossEntropy,
    Flow,
    Linear,
    LinfBall,
    MapDistance,
    Margin,
    Matching,
    RandomClass,
    RandomPatch,
    SignDescent,
    Squeezing,
    Stages,
    TwoPhase,
    presets,
)
from captum_adv2.defenses import (
    BitDepth,
    Distillation,
    FeatureSqueezing,
    MedianSmoothing,
    NonLocalMeans,
    roc,
)
from captum_adv2.interpreters import (
    CAM,
    MASK,
    Blend,
    Blur,
    EncoderGuided,
    FiniteDifference,
    MaskingLoss,
    Noise,
    Unrolled,
)
from captum_adv2.types import Candidate

pytestmark = pytest.mark.filterwarnings("ignore::captum_adv2.SoundnessWarning")


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "torch.save": saved,
}


def shifted(images, labels):
    return (labels + 1) % 4


MODES = {
    "default": lambda attack: None,
    "label": lambda attack: attack.set_mode_targeted_by_label(quiet=True),
    "least likely": lambda attack: attack.set_mode_targeted_least_likely(2, quiet=True),
    "random": lambda attack: attack.set_mode_targeted_random(quiet=True),
    "function": lambda attack: attack.set_mode_targeted_by_function(shifted, quiet=True),
}


def called(attack, data):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return attack(data[0][:2], data[1][:2])


# torch.save pickles too, and only stores tensors another way: below, once, is enough.
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_attacks(attacked, trained, data, how):
    # What a table builds by lambdas cannot be pickled, nor can those lambdas.
    attack = attacked.build(copy.deepcopy(trained))
    for part in (attack, *attack._attacks.values()):
        if hasattr(part, "_factory"):
            part._factory = None
    modes = list(MODES)
    mode = modes[[a.name for a in ATTACKS].index(attacked.name) % len(modes)]
    MODES[mode](attack)
    expected = called(attack, data)
    twin = COPIES[how](attack)
    for part in (twin, *twin._attacks.values()):
        assert part.model is twin.model
    assert getattr(twin, "second", twin).interpreter.model is twin.model
    assert torch.equal(called(twin, data), expected)
    for parameter in twin.model.parameters():
        parameter.data.neg_()
    assert not torch.equal(called(twin, data), expected)
    assert torch.equal(called(attack, data), expected)


@pytest.mark.parametrize("how", COPIES)
def test_copies_inside_multiattack(trained, data, how):
    attacks = [torchattacks.PGD(trained, steps=1, eps=0.01, random_start=False)]
    attacks += [a.build(trained) for a in ATTACKS if a.name == "ADV2 CAM"]
    multi = torchattacks.MultiAttack(attacks)
    twin = COPIES[how](multi)
    assert all(attack.model is twin.model for attack in twin.attacks)
    assert torch.equal(twin(*data), multi(*data))


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_reports(trained, data, how):
    report = evaluate(trained, CAM(trained), data[0], data[0].flip(-1), data[1])
    twin = COPIES[how](report)
    assert type(twin) is type(report)
    assert all(map(torch.equal, twin, report))
    assert str(twin) == str(report)


# The parts that attacks, interpreters and defences are made of: how to build, and to use, each.


def judged(term, images, model):
    logits, maps = model(images), images.mean(dim=1, keepdim=True)
    return term(Candidate(images, logits, maps, torch.tensor([1, 2]), maps.flip(-1), 0.3))


def scheduled(schedule, images, model):
    return torch.tensor([schedule(progress) for progress in (0.0, 0.3, 1.0)])


def moved(framework, images, model):
    variable = framework.init(images)
    variable = framework.move(variable, variable + 0.01, images)
    return torch.cat([framework.image(variable, images).flatten(1), variable.flatten(1)], dim=1)


def stepped(step, images, model):
    return ADV2(model, CAM, steps=3, warmup=1, step=step)(images, torch.tensor([0, 1]))


def preset(settings, images, model):
    kind = StADV2 if isinstance(settings, presets.FlowPreset) else ADV2
    attack = kind.from_preset(model, CAM, settings, steps=2, warmup=1)
    return attack(images, torch.tensor([0, 1]))


def applied(function, images, model):
    return function(images)


def detected(detector, images, model):
    scores = detector.scores(images.roll(3, dims=-1))
    return torch.cat([scores, detector.detect_each(images).to(scores)], dim=1)


def followed(surrogate, images, model):
    mask = MASK(model, size=4, iterations=6, jitter=1)
    made = surrogate(mask, images, torch.tensor([0, 1]))
    made.advance(images)
    return made(images).maps


def guided(surrogate, images, model):
    rts = interpreters.RTS(model, untrained(model))
    return surrogate(rts, images, torch.tensor([0, 1]))(images).maps


def explained(surrogate, images, model):
    return surrogate(images).maps


def blended(blend, images, model):
    return torch.cat(blend(images, torch.Generator().manual_seed(1)))


def trained_by(loss, images, model):
    generator = torch.Generator().manual_seed(1)
    terms = loss(untrained(model), images, torch.tensor([0, 1]), generator)
    return torch.stack([term.sum() for term in terms.values()])


def curve(found, images, model):
    return torch.cat([part.flatten().double() for part in found if torch.is_tensor(part)])


def aimed(target_map, images, model):
    return target_map(CAM(model), images, torch.tensor([0, 1]), torch.tensor([1, 2]))


def moving():
    """Return a generator that has moved on from its seed."""
    generator = torch.Generator().manual_seed(3)
    torch.rand(5, generator=generator)
    return generator


PARTS = {
    "CrossEntropy": (lambda model, x: CrossEntropy(Linear(0.3, 0.1), seed=4), judged),
    "Margin": (lambda model, x: Margin(), judged),
    "MapDistance": (
        lambda model, x: MapDistance(Stages((0.2, 0.9), (1, 2)), l1=0.3, shape=0.1),
        judged,
    ),
    "Squeezing": (
        lambda model, x: Squeezing(model, (BitDepth(2), MedianSmoothing(3)), thresholds=(0.1, 0.2)),
        judged,
    ),
    "Matching": (lambda model, x: Matching(model(x).softmax(dim=1).detach().flip(0)), judged),
    "Linear": (lambda model, x: Linear(0.2, 0.7), scheduled),
    "Stages": (lambda model, x: Stages((0.2, 0.7), (1, 3)), scheduled),
    "LinfBall": (lambda model, x: LinfBall(0.1), moved),
    "LinfBall with a generator": (
        lambda model, x: LinfBall(0.1, True, moving()),
        moved,
    ),
    "RandomPatch with a generator": (lambda model, x: RandomPatch(generator=moving()), aimed),
    "RandomClass with a generator": (
        lambda model, x: RandomClass(x.roll(2, -1), torch.tensor([1, 2]), generator=moving()),
        aimed,
    ),
    "Flow": (lambda model, x: Flow(0.1, bound=0.5), moved),
    "SignDescent": (lambda model, x: SignDescent(momentum=0.3, final=0.5), stepped),
    "AdamDescent": (lambda model, x: AdamDescent((0.3, 0.7)), stepped),
    "TwoPhase": (lambda model, x: TwoPhase(kappa=0.2, searches=2), stepped),
    "Preset": (lambda model, x: presets.PAPER["CAM"], preset),
    "FlowPreset": (lambda model, x: presets.PAPER_STADV["CAM"], preset),
    "FiniteDifference": (lambda model, x: FiniteDifference(1, pace=0.5), followed),
    "Unrolled": (lambda model, x: Unrolled(1, n_reset=2), followed),
    "EncoderGuided": (lambda model, x: EncoderGuided(0.3), guided),
    "Direct": (lambda model, x: CAM(model).surrogate(x, torch.tensor([2, 3])), explained),
    "Blur": (lambda model, x: Blur(1.5), applied),
    "Noise": (lambda model, x: Noise(0.3, seed=2), applied),
    "Blend": (lambda model, x: Blend(), blended),
    "MaskingLoss": (lambda model, x: MaskingLoss(model, area=3.0), trained_by),
    "Distillation": (
        lambda model, x: Distillation(
            ADV2(model, interpreters.RTS(model, untrained(model)), steps=1), untrained(model)
        ),
        trained_by,
    ),
    "BitDepth": (lambda model, x: BitDepth(3), applied),
    "MedianSmoothing": (lambda model, x: MedianSmoothing(3), applied),
    "NonLocalMeans": (lambda model, x: NonLocalMeans(5, 3, 6.0), applied),
    "FeatureSqueezing": (
        lambda model, x: FeatureSqueezing(model, [BitDepth(2), MedianSmoothing(3)]).fit(x, 0.4),
        detected,
    ),
    "Roc": (lambda model, x: roc(torch.linspace(0, 1, 5), torch.linspace(0.3, 2, 7)), curve),
}
# Tested where their other promises are.
ELSEWHERE = {
    **dict.fromkeys(("ADV2", "StADV2", "BitDepthADV2", "Report"), "above"),
    "Benign": "tests/attacks/test_targets.py, and the other target maps by their seed",
    "EnsembleDetector": "tests/defenses/test_ensemble_detector.py",
    "MaskingModel": "tests/interpreters/test_rts.py",
    "Follower": "tests/interpreters/test_mask.py: a copy starts the rest of a run",
    "Progress": "a tuple of tensors, told to a callback",
    "Problem": "lives within a step of an attack",
    "Settings": "what presets have in common, of which there are none",
}


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", PARTS)
def test_copies_of_parts(trained, data, name, how):
    build, use = PARTS[name]
    part = build(trained, data[0][:2])
    twin = COPIES[how](part)
    assert type(twin) is type(part)
    found = use(twin, data[0][:2], trained)
    assert torch.equal(found, use(part, data[0][:2], trained))
    assert found.isfinite().any()


def test_no_part_is_forgotten(trained, data):
    known = {type(build(trained, data[0][:2])).__name__ for build, _ in PARTS.values()}
    for package in (captum_adv2, attacks, defenses, interpreters, presets):
        for name in package.__all__:
            value = getattr(package, name)
            if not inspect.isclass(value) or issubclass(value, Warning):
                continue
            if inspect.isabstract(value) or getattr(value, "_is_protocol", False):
                continue
            # Those are in the table of the conformance tests, or modes of torch.
            if issubclass(value, interpreters.Interpreter | torch.overrides.TorchFunctionMode):
                continue
            assert name in known | ELSEWHERE.keys(), name

# SPDX-License-Identifier: MIT
"""Attacks without gradients: what they may ask, what they keep, and what needs no gradient."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchattacks
from attack_helpers import FLAT_MAPS, MODES, noting, shifted, targeted
from captum.attr import Saliency
from conftest import TinyNet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from captum_adv2 import ADV2, QueryADV2, TransferADV2, evaluate
from captum_adv2.attacks import CrossEntropy, Oracle, RandomPatch, SignDescent, TwoPhase
from captum_adv2.attacks.frameworks import LinfBall
from captum_adv2.attacks.loop import Batch
from captum_adv2.attacks.queries import BudgetSpent, QueryProblem, Squares
from captum_adv2.attacks.surrogates import Invariant, Models
from captum_adv2.attacks.terms import MapDistance
from captum_adv2.interpreters import CAM, CaptumInterpreter, Interpreter, Opaque
from captum_adv2.spec import SoundnessWarning

pytestmark = pytest.mark.filterwarnings(FLAT_MAPS)

EPS = 0.2
STEPS = {
    "squares": {"step": Squares()},
    "estimates": {"step": SignDescent(), "pairs": 3},
    "two phases": {"step": TwoPhase(searches=2), "pairs": 2},
}


class Raising(torch.autograd.Function):
    """The identity, without a backward pass."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise AssertionError("a gradient was asked of the system")


class Deployed(nn.Module):
    """A network that answers and has no gradient; it counts the images that it is asked about."""

    def __init__(self, net):
        super().__init__()
        self.net, self.asked, self.calls = net, 0, []

    def forward(self, images):
        self.asked += len(images)
        self.calls.append(images.detach().clone())
        return Raising.apply(self.net(Raising.apply(images)))


def dark(images, target):
    """Return attributions that have no gradient: where an image is dark, coarsely."""
    return (1 - images.mean(dim=1, keepdim=True)).mul(8).round()


@pytest.fixture
def deployed(trained):
    return Deployed(trained)


# What is asked


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    queries=st.integers(6, 40),
    step=st.sampled_from([*STEPS]),
    images=st.integers(1, 3),
    stop=st.sampled_from([None, 0.1]),
    mode=st.sampled_from(["default", "random", "function"]),
)
def test_no_image_is_sent_more_often_than_the_budget(
    trained, data, queries, step, images, stop, mode
):
    system, reports = Deployed(trained), []
    attack = QueryADV2(
        system,
        Opaque(system, dark),
        EPS,
        queries,
        stop=stop,
        callback=reports.append,
        **STEPS[step],
    )
    if mode == "random":
        attack.set_mode_targeted_random(quiet=True)
    elif mode == "function":
        targeted(attack)
    clean, labels = data[0][:images], data[1][:images]
    with torch.random.fork_rng():
        adversarial = attack(clean, labels)
    assert system.asked <= queries * images
    assert all(report.step <= queries for report in reports)
    if stop is None:  # all of it but what is too little for another step
        assert system.asked >= (queries - 8) * images - 2 * images
    assert (adversarial - clean).abs().max() <= EPS + 1e-6
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1


@pytest.mark.parametrize("step", STEPS)
@MODES
def test_no_gradient_is_asked_of_the_system(deployed, data, mode, step):
    attack = mode(QueryADV2(deployed, Opaque(deployed, dark), EPS, 30, **STEPS[step]))
    deployed.register_forward_hook(lambda *call: grads.append(torch.is_grad_enabled()))
    grads = []
    attack(data[0].clone().requires_grad_(), data[1])
    assert grads
    assert not any(grads)


def test_scores_only_never_ask_for_a_map(deployed, model, data):
    class Hidden(Interpreter):
        def explain(self, images, target):
            raise AssertionError("a map was asked of the system")

    surrogate = copy.deepcopy(model).train()
    attack = QueryADV2(deployed, Hidden(deployed), EPS, 30, substitute=CAM(surrogate))
    targeted(attack)(*data)
    assert all(module.training for module in surrogate.modules())
    assert deployed.asked == 6 * (30 - 1)  # one query is set aside for random target classes


def test_an_oracle_counts_and_answers_without_a_graph(deployed, data):
    images, labels = data
    oracle = Oracle(deployed, Opaque(deployed, dark), 5)
    leaf = images.clone().requires_grad_()
    answer = oracle.explain(leaf, labels)
    assert not answer.maps.requires_grad
    assert not answer.logits.requires_grad
    logits, maps = oracle.query(images.repeat(3, 1, 1, 1), labels.repeat(3), each=3)
    assert logits.shape == (18, 4)
    assert maps.shape == (18, 1, 16, 16)
    assert (oracle.spent, oracle.left) == (4, 1)
    with pytest.raises(BudgetSpent):
        oracle.query(images.repeat(2, 1, 1, 1), labels.repeat(2), each=2)
    oracle.logits(images)
    with pytest.raises(BudgetSpent):
        oracle.logits(images)
    assert deployed.asked == 6 * 5


# What is kept


@pytest.mark.parametrize("step", ["squares", "estimates"])
@MODES
def test_the_class_comes_first_and_is_kept(model, data, mode, step):
    reports = []
    attack = QueryADV2(
        model, CAM(model), EPS, 150, confidence=0.6, callback=reports.append, **STEPS[step]
    )
    adversarial = mode(attack)(*data)
    for before, after in zip(reports, reports[1:], strict=False):
        had = before.confidence >= 0.6
        assert (after.confidence[had] >= 0.6).all()
        known = had & before.distance.isfinite()
        assert (after.distance[known] <= before.distance[known]).all()
    last = reports[-1]
    logits = model(adversarial)
    target = shifted(*data)
    if attack.targeted is False:
        target = logits.scatter(1, data[1][:, None], -torch.inf).argmax(dim=1)
    found = evaluate(model, CAM(model), data[0], adversarial, target, quantize=False)
    torch.testing.assert_close(found.confidence, last.confidence, rtol=0, atol=1e-4)
    assert found.success.any()
    known = last.distance.isfinite()
    torch.testing.assert_close(found.l1[known], last.distance[known], rtol=0, atol=1e-3)


def test_what_is_returned_is_the_best_image_that_was_asked_about(model, data):
    seen = []
    attack = QueryADV2(model, CAM(model), EPS, 80, confidence=0.5, terms=[noting(seen)])
    adversarial = targeted(attack)(*data)
    target, maps = shifted(*data), CAM(model)(*data).detach()
    for number, image in enumerate(adversarial):
        sure = torch.stack([c.logits.softmax(dim=1)[number, target[number]] for c in seen])
        far = torch.stack([(c.maps[number] - maps[number]).abs().mean() for c in seen])
        enough = sure >= 0.5
        score = torch.where(enough, far, 9 - sure)
        assert torch.equal(image, seen[int(score.argmin())].images[number])


def test_clean_images_of_the_target_class_are_returned(model, data):
    attack = QueryADV2(model, CAM(model), EPS, 30)
    attack.set_mode_targeted_by_label(quiet=True)
    assert torch.equal(attack(*data), data[0])


def test_finished_images_leave(model, data):
    reports = []
    attack = QueryADV2(model, CAM(model), EPS, 200, stop=0.25, callback=reports.append)
    together = targeted(attack)(*data)
    free = targeted(QueryADV2(model, CAM(model), EPS, 200, stop=1e-9))(*data)
    left = [len(report.rows) for report in reports]
    assert left == sorted(left, reverse=True)
    assert left[-1] < left[0]
    never = reports[-1].rows[reports[-1].distance > 0.25]
    torch.testing.assert_close(together[never], free[never])


def test_draws_follow_the_seed(model, data):
    state = torch.get_rng_state()
    first, again, other = (
        targeted(QueryADV2(model, CAM(model), EPS, 30, seed=seed))(*data) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


# What may be attacked


def test_any_function_is_an_interpreter(model, data):
    generator = torch.Generator().manual_seed(0)

    def drawn(images, target):
        return dark(images, target) + torch.rand(images[:, :1].shape, generator=generator)

    for function in (dark, drawn):
        interpreter = Opaque(model, function)
        adversarial = targeted(QueryADV2(model, interpreter, EPS, 150))(*data)
        found = evaluate(model, interpreter, data[0], adversarial, shifted(*data))
        assert found.success.float().mean() > 0.5
    with pytest.raises(ValueError, match="differentiable interpreter, got Opaque"):
        targeted(ADV2(model, Opaque(model, dark), steps=2))(*data)


def test_a_method_may_take_gradients_of_its_own(model, data):
    """They are the system's, and not the adversary's."""
    method = Opaque(model, Saliency(model).attribute, abs=True)
    adversarial = targeted(QueryADV2(model, method, EPS, 20))(*data)
    assert not adversarial.requires_grad
    maps = CaptumInterpreter(Saliency(model))(*data)
    torch.testing.assert_close(method(*data), maps.detach())


def test_an_opaque_interpreter_scales_or_keeps_maps(model, data):
    images, labels = data
    assert Opaque(model, dark)(images, labels).amax(dim=(1, 2, 3)).eq(1).all()
    raw = Opaque(model, lambda images, target, gain: images[:, :1] * gain, reduce=None, gain=0.5)
    assert torch.equal(raw(images, labels), images[:, :1] / 2)
    assert not raw.scaled
    for function, got in (
        (lambda images, target: images[0], r"\(3, 16, 16\)"),
        (lambda images, target: images[:1], r"\(1, 3, 16, 16\)"),
        (lambda images, target: images.detach().numpy(), "ndarray"),
    ):
        with pytest.raises(ValueError, match=rf"a tensor \(6, C, h, w\), got {got}"):
            Opaque(model, function)(images, labels)
    with pytest.raises(ValueError, match=r"maps in \[0, 1\]"):
        Opaque(model, lambda images, target: images - 5, reduce=None)(images, labels)


def test_a_function_may_work_in_place(model, data):
    images, before = data[0], data[0].clone()
    negative = Opaque(model, lambda images, target: images.detach().mul_(-1), "max")
    assert torch.equal(negative(*data), Opaque(model, lambda x, target: -x, "max")(*data))
    adversarial = targeted(QueryADV2(model, negative, EPS, 10))(*data)
    assert torch.equal(images, before)
    assert (adversarial - images).abs().max() <= EPS + 1e-6


def test_maps_that_are_not_finite_are_named(model, data):
    with pytest.warns(SoundnessWarning, match="attributions of 1 of 1 images are not finite"):
        maps = Opaque(model, lambda images, target: images / 0)(data[0][:1], data[1][:1])
    assert maps.isnan().all()


def test_answers_that_become_nan_are_named(model, data, monkeypatch):
    images, labels = data[0][:2], data[1][:2]
    answer = model.forward
    calls = iter(range(100))
    late = lambda x: answer(x) * (float("nan") if next(calls) > 6 else 1)  # noqa: E731
    monkeypatch.setattr(model, "forward", late)
    attack = targeted(QueryADV2(model, CAM, queries=20))
    with pytest.warns(SoundnessWarning, match="the model's answers were NaN"):
        adversarial = attack(images, labels)
    assert (adversarial - images).abs().amax() <= attack.eps + 1e-6


def test_a_chosen_map_is_pursued(model, data):
    attack = QueryADV2(model, CAM(model), EPS, 300, target_map=RandomPatch(), confidence=0.3)
    maps = RandomPatch()(CAM(model), *data, data[1])
    before = (CAM(model)(data[0], shifted(*data)) - maps).abs().mean()
    adversarial = targeted(attack)(*data)
    assert (CAM(model)(adversarial, shifted(*data)) - maps).abs().mean() < before


@pytest.mark.parametrize("with_target", [True, False])
def test_another_attack_to_start_from(model, data, with_target):
    calls = []

    class Start(ADV2):
        def forward(self, images, labels=None):
            calls.append((self.attack_mode, labels))
            return images + 0.5

    start = Start(model, CAM)
    attack, seen = QueryADV2(model, CAM(model), EPS, 7, start=start), []
    attack.terms = [noting(seen)]
    attack = targeted(attack) if with_target else attack
    attack(*data)
    mode, labels = calls[0]
    assert mode == ("targeted(label)" if with_target else "default")
    assert torch.equal(labels, shifted(*data) if with_target else data[1])
    torch.testing.assert_close(seen[1].images, (data[0] + EPS).clamp(max=1))
    assert start.attack_mode != "targeted(label)"


@pytest.mark.parametrize("with_target", [True, False])
def test_the_attack_to_start_from_is_left_as_it_was(model, data, with_target, capsys):
    net = nn.Sequential(nn.AvgPool2d(1), model).eval()
    start = TransferADV2(net, CAM, eps=EPS, steps=4)
    start.set_normalization_used([0.0] * 3, [1.0] * 3)
    start.set_mode_targeted_random(quiet=True)
    seen = []
    net[0].register_forward_hook(lambda *call: seen.append(call[1][0]))
    attack = QueryADV2(model, CAM(model), EPS, 7, start=start)
    before = dict(vars(start))
    attack = targeted(attack) if with_target else attack
    attack.start = start  # set again
    attack(*data)
    attack.set_model(copy.deepcopy(model))
    attack.set_normalization_used([0.5] * 3, [0.5] * 3)
    assert start.model is net
    assert vars(start) == before
    assert min(images.min() for images in seen) >= 0
    assert capsys.readouterr().out == ""


def test_attacks_within_the_attack_to_start_from(model, data):
    parts = [torchattacks.PGD(model, steps=1), torchattacks.FGSM(model)]
    parts[0].set_mode_targeted_random(quiet=True)
    multi = torchattacks.MultiAttack(parts)
    attack = QueryADV2(model, CAM(model), EPS, 7, start=multi)
    attack(*data)
    assert parts[0].attack_mode == "targeted(random)"
    with pytest.raises(ValueError, match="an attack that can be targeted, got MultiAttack"):
        targeted(attack)(*data)


def test_the_estimate_is_the_gradient(smooth, data):
    """Of the prediction alone until an image is of its class, and then of the map, too."""
    images, labels = data[0][:2, :, :6, :6].double(), data[1][:2]
    cam = CAM(smooth)
    oracle = Oracle(smooth, cam, 4000)
    maps = torch.rand_like(cam(images, labels).detach())
    problem = QueryProblem(
        oracle.logits, LinfBall(0.1), 0.1, 10, oracle,
        Batch(images, labels, maps, torch.arange(2)),
        terms=(CrossEntropy(rho=0.0), MapDistance(l1=0.0, shape=0.0)),
        pairs=1900, sigma=1e-3, tile=1,
    )  # fmt: skip
    problem.enough = torch.tensor([True, False])
    problem.state = problem.state._replace(score=torch.full((2, 2), -9.0).double())  # stays so
    estimate = problem.gradient(images)
    leaf = images.clone().requires_grad_()
    answer = cam.explain(leaf, labels)
    far = 150 * (answer.maps - maps).square().mean(dim=(1, 2, 3))
    (exact,) = torch.autograd.grad(far[0] + F.cross_entropy(answer.logits, labels) * 2, leaf)
    cosine = F.cosine_similarity(estimate.flatten(1), exact.flatten(1))
    assert (cosine > 0.9).all()
    scale = estimate.flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    torch.testing.assert_close(scale, torch.ones_like(scale), rtol=0.2, atol=0)
    assert oracle.spent == 1 + 2 * 1900


# Surrogates


def test_without_its_aids_it_is_adv2(model, data):
    plain = {"steps": 6, "eps": EPS}
    ours = TransferADV2(
        model, CAM, diversity=0.0, window=1, prediction=CrossEntropy(), keep="best", **plain
    )
    assert torch.equal(targeted(ours)(*data), targeted(ADV2(model, CAM, **plain))(*data))


def test_several_surrogates_are_fooled_together(model, data):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.fc.weight.mul_(1.3)
    attack = targeted(TransferADV2([model, other], CAM, eps=EPS, steps=40))
    assert isinstance(attack.model, Models)
    adversarial = attack(*data)
    for net in (model, other):
        report = evaluate(net, CAM(net), data[0], adversarial, shifted(*data))
        assert report.success.float().mean() > 0.5
    attack.set_model([other, model])
    assert attack.interpreter.model is attack.model
    attack.set_normalization_used([0.25] * 3, [0.5] * 3)
    attack(attack.normalize(data[0]), data[1])


def test_surrogates_may_have_maps_of_different_sizes(model, data):
    coarse = nn.Sequential(nn.AvgPool2d(2), model).eval()
    attack = TransferADV2(nn.ModuleList([coarse, model]), CAM, eps=EPS, steps=2)
    assert attack.interpreter(*data).shape == CAM(model)(*data).shape
    assert targeted(attack)(*data).shape == data[0].shape


def test_the_window_smooths_the_gradient():
    images = torch.rand(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    framework = Invariant(LinfBall(0.1), 3)
    weights = torch.zeros_like(images)
    weights[:, :, 2, 2] = 1
    (gradient,) = torch.autograd.grad((framework.image(images, images) * weights).sum(), images)
    torch.testing.assert_close(gradient.sum(dim=(2, 3)), weights.sum(dim=(2, 3)))
    torch.testing.assert_close(gradient, gradient.flip(2).transpose(2, 3))
    assert (gradient[:, :, 1:4, 1:4] > 0).all()
    assert not gradient[:, :, 0].any()


# Bad input

BAD = [
    (lambda m: QueryADV2(m, CAM, queries=0), ValueError, "expected queries at least 6, got 0"),
    (lambda m: QueryADV2(m, CAM, start=m), TypeError, "expected start to be an Attack, got Tiny"),
    (lambda m: QueryADV2(m, CAM, substitute=CAM), TypeError, "substitute .*; pass CAM"),
    (lambda m: QueryADV2(m, CAM(TinyNet())), ValueError, "built on the attack's model"),
    (lambda m: TransferADV2([], CAM), ValueError, "expected at least one surrogate, got none"),
    (
        lambda m: TransferADV2([m, 3], CAM),
        TypeError,
        r"model\[1\] to be a torch.nn.Mod",
    ),
    (lambda m: TransferADV2(m, CAM, window=2), ValueError, "expected window to be odd, got 2"),
    (lambda m: TransferADV2([m, m], lambda net: 3), TypeError, r"interpreter\[0\] .*, got int"),
    (lambda m: Oracle(m, CAM(m), 0), ValueError, "expected budget at least 1, got 0"),
]


@pytest.mark.parametrize(("construct", "error", "message"), BAD)
def test_mistakes_at_construction(model, construct, error, message):
    with pytest.raises(error, match=message):
        construct(model)


def test_surrogates_of_other_classes(model, data):
    other = TinyNet(classes=7).eval()
    message = "expected a surrogate of 4 classes, the model's, got one of 7"
    for options in ({"start": TransferADV2(other, CAM)}, {"substitute": CAM(other)}):
        with pytest.raises(ValueError, match=message):
            QueryADV2(model, CAM, **options)(*data)
    with pytest.raises(ValueError, match=r"surrogates of the same classes, got \[4, 7\]"):
        TransferADV2([model, other], CAM)(*data)


def test_a_system_that_returns_labels_only(model, data):
    class Labels(TinyNet):
        def forward(self, x):
            return super().forward(x).argmax(dim=1)

    system = Labels().eval()
    with pytest.raises(TypeError, match=r"to return logits of shape \(6, classes\), floating, got"):
        QueryADV2(system, Opaque(system, dark))(*data)


def test_images_of_another_dtype(model, data):
    with pytest.raises(TypeError, match=r"model's dtype and device, torch.float32"):
        QueryADV2(model, CAM)(data[0].double(), data[1])


def test_an_explanation_of_another_size(model, data):
    with pytest.raises(ValueError, match=r"target_maps of shape \(6, 1, 8, 8\)"):
        QueryADV2(model, CAM)(*data, target_maps=torch.rand(6, 1, 4, 4))

# SPDX-License-Identifier: MIT
"""Images, models and callers of every kind; what a call, an error and a copy leave as it was."""

import copy
import pickle
import warnings

import pytest
import torch
import torchattacks
from attack_helpers import FLAT_MAPS
from conftest import inner, mixed
from torch import nn

from captum_adv2 import ADV2, StADV2
from captum_adv2.attacks import (
    AdamDescent,
    Benign,
    CrossEntropy,
    MapDistance,
    RandomPatch,
    SignDescent,
    TwoPhase,
    presets,
)
from captum_adv2.attacks.frameworks import Flow, LinfBall
from captum_adv2.attacks.terms import Linear, Margin
from captum_adv2.defenses import BitDepth, MedianSmoothing, NonLocalMeans
from captum_adv2.interpreters import CAM, EncoderGuided, FiniteDifference, Unrolled
from captum_adv2.testing import unchanged
from captum_adv2.testing.drawn import Network, image_batch

pytestmark = pytest.mark.filterwarnings(FLAT_MAPS)

# The distance of neighbouring numbers near 1, and a little more: rounding may leave the ball.
ROUNDING = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-9}
EPS = {"ADV2": 0.1, "StADV2": 1.0, "BitDepthADV2": 0.2, "QueryADV2": 0.2, "TransferADV2": 0.2}
GRADIENTLESS = "QueryADV2 CAM with a stop"


def targeted(attack):
    attack.set_mode_targeted_by_label(quiet=True)
    return attack


def check_valid(adversarial, images, attack):
    """Check that the result is images near the clean ones, of their shape and dtype."""
    assert adversarial.dtype == images.dtype
    assert adversarial.shape == images.shape
    assert ((adversarial >= 0) & (adversarial <= 1)).all()
    change = (adversarial.double() - images.double()).abs().max()
    assert change <= EPS[attack.attack] + ROUNDING[images.dtype]


def confidence(model, images, target):
    """Return the mean probability of the target class, in single precision."""
    with torch.no_grad():
        return model(images.float()).softmax(dim=1).gather(1, target[:, None]).mean().item()


# Images


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)],
)
def test_half_precision(attacked, model, data, dtype, autocast):
    if dtype == torch.float16 and "DeepLift" in attacked.name:
        pytest.skip("its quotients overflow, and the attack says that the map is not finite")
    images, target = data[0][:3], (data[1][:3] + 1) % 4
    net = model if autocast else copy.deepcopy(model).to(dtype)
    given = images if autocast else images.to(dtype)
    attack = targeted(attacked.build(net))
    with unchanged(net, given), torch.autocast("cpu", dtype=dtype, enabled=autocast):
        adversarial = attack(given, target)
    check_valid(adversarial, given, attack)
    if dtype == torch.bfloat16:  # in float16 second derivatives may underflow
        assert confidence(model, adversarial, target) > confidence(model, images, target)


def test_double_precision_agrees_with_single(attacked, trained_smooth, data):
    images, target = data[0][:3], (data[1][:3] + 1) % 4
    attack = targeted(attacked.build(trained_smooth))
    double = attack(images.double(), target)
    check_valid(double, images.double(), attack)
    single = targeted(attacked.build(copy.deepcopy(trained_smooth).float()))(images, target)
    assert not torch.equal(double, images.double())
    # Where a gradient is nearly zero, its sign may differ: in few pixels.
    assert ((double - single).abs() > 1e-3).double().mean() < 0.1


LAYOUTS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "offset": lambda x: nn.functional.pad(x, (1, 2, 1, 0), value=9.0)[..., 1:, 1:-2],
    "expanded": lambda x: x[:1].expand(len(x), -1, -1, -1),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(attacked, trained_smooth, data, layout):
    images, target = data[0][:2].double(), (data[1][:2] + 1) % 4
    view = LAYOUTS[layout](images)
    assert not view.is_contiguous()
    net = copy.deepcopy(trained_smooth)
    if layout == "channels last":
        net = net.to(memory_format=torch.channels_last)
    with unchanged(net, view):
        adversarial = targeted(attacked.build(net))(view, target)
    expected = targeted(attacked.build(trained_smooth))(view.clone().contiguous(), target)
    # Layouts choose kernels, which add the same numbers in another order.
    torch.testing.assert_close(adversarial, expected, rtol=0, atol=1e-6)
    if layout == "channels last":
        assert adversarial.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(1, 7, 9), (3, 13, 5), (4, 6, 11)])
def test_odd_sizes_and_channels(attacked, shape):
    net = Network("plain", "ReLU", True, seed=3, channels=shape[0])  # its ReLUs work in place
    images, target = image_batch((2, *shape), seed=5), torch.tensor([0, 3])
    attack = targeted(attacked.build(net))
    with unchanged(net, images):
        check_valid(attack(images, target), images, attack)


def in_inference_mode(tensor):
    with torch.inference_mode():
        return tensor * 1


CALLS = {
    "no_grad": lambda x, y: (x, y),
    "leaf": lambda x, y: (x.clone().requires_grad_(), y),
    "graph": lambda x, y: (x.clone().requires_grad_() * 1, y),
    "made in inference mode": lambda x, y: (in_inference_mode(x), in_inference_mode(y)),
    "int32": lambda x, y: (x, y.int()),
    "uint8": lambda x, y: (x, y.to(torch.uint8)),
}


@pytest.mark.parametrize("call", CALLS)
def test_callers(attacked, model, data, call):
    attack = attacked.build(model)
    expected = attack(data[0][:2], data[1][:2])
    images, labels = CALLS[call](data[0][:2], data[1][:2])
    watched = () if images.is_inference() else (images,)  # those have no version
    with torch.set_grad_enabled(call != "no_grad"), unchanged(model, *watched):
        adversarial = attack(images, labels)
    assert torch.equal(adversarial, expected)
    assert not adversarial.requires_grad
    assert not adversarial.is_inference()
    assert adversarial.data_ptr() != images.data_ptr()


def test_inference_mode_is_refused(attacked, model, data):
    if attacked.name == GRADIENTLESS:
        pytest.skip("it takes no gradient")
    refused = pytest.raises(RuntimeError, match=r"inference_mode\(\); use torch.no_grad")
    with unchanged(model, *data), torch.inference_mode(), refused:
        attacked.build(model)(*data)


# Models and devices


def frozen(net):
    return copy.deepcopy(net).requires_grad_(False)


def in_place(net):
    clone = copy.deepcopy(net)
    for module in clone.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True
    return clone


@pytest.mark.parametrize("change", [mixed, frozen, in_place])
def test_models(attacked, model, data, change):
    """A model in train mode, or with other flags, is attacked like the model in eval mode."""
    net = change(model)
    with unchanged(net, *data):
        adversarial = targeted(attacked.build(net))(data[0][:2], data[1][2:4])
    assert torch.equal(adversarial, targeted(attacked.build(model))(data[0][:2], data[1][2:4]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_images_go_to_the_models_device(attacked, model, data):
    target = (data[1] + 1) % 4
    attack = targeted(attacked.build(copy.deepcopy(model).cuda()))
    adversarial = attack(data[0], target)
    assert adversarial.device.type == "cuda"
    check_valid(adversarial.cpu(), data[0], attack)
    # Not that both devices find the same image: rounding leads them to different ones.
    assert confidence(model, adversarial.cpu(), target) > confidence(model, data[0], target)


# Exceptions


class Trip:
    """Counts its calls, and raises an error at one of them."""

    def __init__(self):
        self.calls, self.at, self.error = 0, None, RuntimeError

    def __call__(self, *_):
        self.calls += 1
        if self.calls == self.at:
            raise self.error("tripped")


def trip_in_forward(attack, trip):
    # After the convolutions, where the hooks of interpreters are in place.
    attack.model.dropout.register_forward_hook(trip)


def trip_in_backward(attack, trip):
    def watch(module, inputs, output):
        if output.requires_grad:
            output.register_hook(trip)

    attack.model.dropout.register_forward_hook(watch)


def trip_in_term(attack, trip):
    def term(candidate):
        trip()
        return 0 * candidate.images.sum(dim=(1, 2, 3))

    inner(attack).terms = (term,)


def trip_in_callback(attack, trip):
    inner(attack).callback, inner(attack).verbose = trip, True


def trip_in_target_map(attack, trip):
    def target_map(*arguments):
        trip()
        return Benign()(*arguments)

    inner(attack).target_map = target_map


def state(attack):
    """Return what an attack and the process hold, beside what `unchanged` looks at."""
    parts = (attack, *attack._attacks.values(), inner(attack).interpreter)
    settings = [{k: v for k, v in vars(part).items() if k != "model"} for part in parts]
    return settings, list(warnings.filters), torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    "place", [trip_in_forward, trip_in_backward, trip_in_term, trip_in_callback, trip_in_target_map]
)
def test_an_exception_changes_nothing(attacked, trained, data, place):
    attack, trip = attacked.build(mixed(trained)), Trip()
    attack.set_normalization_used([0.25] * 3, [0.5] * 3)
    place(attack, trip)
    images, labels = attack.normalize(data[0][:2]), data[1][:2]
    trip.calls = 0  # building may have run the network
    with unchanged(attack.model, images, labels):
        expected = attack(images, labels)
    last, before = trip.calls, state(attack)
    assert last or (attacked.name == GRADIENTLESS and place is trip_in_backward)
    for turn, number in enumerate(sorted({1, 2, last // 3, last // 2, last} - {0})):
        if number > last:
            continue
        trip.calls, trip.at = 0, number
        trip.error = (RuntimeError, KeyboardInterrupt)[turn % 2]
        with unchanged(attack.model, images, labels):
            with pytest.raises(trip.error, match="tripped"):
                attack(images, labels)
            assert state(attack) == before
    trip.at = None
    assert torch.equal(attack(images, labels), expected)


# Copies


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_attacks(attacked, trained, data, how):
    attack, data = attacked.build(trained), (data[0][:2], data[1][:2])
    inner(attack).generator = torch.Generator().manual_seed(5)
    attack.set_mode_targeted_random(quiet=True)
    attack(*data)  # the generator has moved on
    twin = COPIES[how](attack)
    assert twin.model is not attack.model
    for part in (twin, *twin._attacks.values(), inner(twin).interpreter):
        assert part.model is twin.model
    assert repr(twin) == repr(attack)
    expected = attack(*data)
    assert torch.equal(twin(*data), expected)
    for parameter in twin.model.parameters():
        parameter.data.neg_()
    attack.set_mode_targeted_by_label(quiet=True)
    twin.set_mode_targeted_by_label(quiet=True)
    wrong = data[0], (data[1] + 1) % 4
    assert not torch.equal(twin(*wrong), attack(*wrong))


@pytest.mark.parametrize("how", COPIES)
def test_copies_inside_multiattack(trained, data, how):
    weak = torchattacks.PGD(trained, steps=1, eps=0.01, random_start=False)
    multi = torchattacks.MultiAttack([weak, ADV2(trained, CAM, steps=2), StADV2(trained, steps=2)])
    twin = COPIES[how](multi)
    assert all(attack.model is twin.model for attack in twin.attacks)
    assert torch.equal(twin(*data), multi(*data))


PARTS = [
    *(CrossEntropy(Linear(0.3, 0.1), seed=4), Margin(), MapDistance(Linear(1.0, 2.0), shape=0.1)),
    *(LinfBall(0.1), Flow(0.1, bound=0.5), RandomPatch(seed=3), Benign()),
    *(SignDescent(momentum=0.3), AdamDescent((0.3, 0.7)), TwoPhase(kappa=0.2, searches=2)),
    *(FiniteDifference(1, pace=0.5), Unrolled(1, n_reset=2), EncoderGuided(0.3)),
    *(BitDepth(3), MedianSmoothing(3), NonLocalMeans(5, 3, 6.0), presets.OFFICIAL["MASK"]),
]


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("part", PARTS, ids=lambda part: type(part).__name__)
def test_copies_of_parts(part, how):
    twin = COPIES[how](part)
    assert type(twin) is type(part)
    assert twin == part

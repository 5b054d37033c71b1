# SPDX-License-Identifier: MIT
"""Images and models of every kind that users have: types, memory, sizes, devices, callers."""

import copy

import pytest
import torch
from conftest import ATTACKS

from captum_adv2 import ADV2, StADV2
from captum_adv2.interpreters import CAM, MASK, Gradient, Unrolled
from captum_adv2.testing import Network, image_batch, unchanged

pytestmark = pytest.mark.filterwarnings("ignore::captum_adv2.SoundnessWarning")

HALF = (torch.bfloat16, torch.float16)
# The least distance of numbers near 1: by that much rounding may leave the ball.
UNIT = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-9}
EPS = {"ADV2": 0.1, "StADV2": 1.0, "BitDepthADV2": 0.2}


def targeted(attacked, model):
    """Return an attack at the next class."""
    attack = attacked.build(model)
    attack.set_mode_targeted_by_label(quiet=True)
    return attack


def hold_valid(adversarial, images, attacked):
    """Hold that images are images, near the clean ones, of their type."""
    assert adversarial.dtype == images.dtype
    assert adversarial.shape == images.shape
    assert adversarial.isfinite().all()
    assert ((adversarial >= 0) & (adversarial <= 1)).all()
    eps = EPS[attacked.name.split()[0]]
    assert (adversarial.double() - images.double()).abs().max() <= eps + UNIT[images.dtype]
    assert not torch.equal(adversarial, images)


def confidence(model, images, target):
    """Return the mean probability of the target class, in single precision."""
    with torch.no_grad():
        return model(images.float()).softmax(dim=1).gather(1, target[:, None]).mean().item()


class TestPrecision:
    @pytest.mark.parametrize("dtype", HALF)
    def test_autocast_around_the_call(self, attacked, model, data, dtype):
        if dtype == torch.float16 and "DeepLift" in attacked.name:
            pytest.skip("its quotients leave float16; the attack says that the map is not finite")
        images, target = data[0][:3], (data[1][:3] + 1) % 4
        attack = targeted(attacked, model)
        exact = attack(images, target)
        with unchanged(model, images), torch.autocast("cpu", dtype=dtype):
            adversarial = attack(images, target)
        hold_valid(adversarial, images, attacked)
        if dtype == torch.float16:
            return  # a second derivative leaves its range: the image is legal, if little is won
        reached, wanted = (confidence(model, x, target) for x in (adversarial, exact))
        clean = confidence(model, images, target)
        assert reached - clean > 0.5 * (wanted - clean)
        assert torch.equal(attack(images, target), exact)

    @pytest.mark.parametrize("dtype", HALF)
    def test_half_precision(self, attacked, model, data, dtype):
        if dtype == torch.float16 and "DeepLift" in attacked.name:
            pytest.skip("its quotients leave float16; the attack says that the map is not finite")
        images, target = data[0][:3].to(dtype), (data[1][:3] + 1) % 4
        short = copy.deepcopy(model).to(dtype)
        adversarial = targeted(attacked, short)(images, target)
        hold_valid(adversarial, images, attacked)
        if dtype == torch.float16:
            return  # as under autocast
        clean = confidence(model, images, target)
        exact = confidence(model, targeted(attacked, model)(images.float(), target), target)
        assert confidence(model, adversarial, target) - clean > 0.5 * (exact - clean)

    def test_double_precision_agrees_with_single(self, attacked, trained_smooth, data):
        images, target = data[0][:3], (data[1][:3] + 1) % 4
        wide = targeted(attacked, trained_smooth)(images.double(), target)
        hold_valid(wide, images.double(), attacked)
        short = targeted(attacked, copy.deepcopy(trained_smooth).float())(images, target)
        # A gradient near zero may turn its sign: in few pixels.
        assert ((wide - short).abs() > 1e-3).double().mean() < 0.05

    def test_a_type_that_is_not_the_models_is_told(self, attacked, model, data):
        with pytest.raises((TypeError, RuntimeError), match=r"(?i)dtype|type|float"):
            attacked.build(model)(data[0].double(), data[1])


# Of an operator's kernels, memory chooses one: sums are the same numbers in another order.
SAME = {"rtol": 0.0, "atol": 1e-6}


class TestMemory:
    @pytest.mark.parametrize("which", ["model", "both"])
    def test_channels_last(self, attacked, trained_smooth, data, which):
        images, target = data[0][:2].double(), (data[1][:2] + 1) % 4
        expected = targeted(attacked, trained_smooth)(images, target)
        net = copy.deepcopy(trained_smooth).to(memory_format=torch.channels_last)
        if which != "model":
            images = images.contiguous(memory_format=torch.channels_last)
        adversarial = targeted(attacked, net)(images, target)
        torch.testing.assert_close(adversarial, expected, **SAME)
        if which != "model":
            assert adversarial.is_contiguous(memory_format=torch.channels_last)

    @pytest.mark.parametrize("how", ["offset", "expanded", "transposed"])
    def test_views(self, attacked, trained_smooth, data, how):
        images, target = data[0][:2].double(), (data[1][:2] + 1) % 4
        match how:
            case "offset":
                view = torch.nn.functional.pad(images, (1, 2, 1, 0), value=9.0)[..., 1:, 1:-2]
            case "expanded":
                images, target = images[:1].repeat(2, 1, 1, 1), target[:1].repeat(2)
                view = images[:1].expand(2, -1, -1, -1)
            case "transposed":
                view = images.transpose(2, 3).contiguous().transpose(2, 3)
        assert not view.is_contiguous()
        kept = view.clone()
        attack = targeted(attacked, trained_smooth)
        adversarial, expected = attack(view, target), attack(images, target)
        torch.testing.assert_close(adversarial, expected, **SAME)
        if how != "transposed":  # the rest is made dense before anything is computed
            assert torch.equal(adversarial, expected)
        assert torch.equal(view, kept)

    def test_one_image_is_attacked_as_in_a_batch(self, attacked, trained_smooth, data):
        images, target = data[0][:3].double(), (data[1][:3] + 1) % 4
        attack = targeted(attacked, trained_smooth)
        # A random start is a draw for the batch, of which a single image gets the first.
        number = 0 if getattr(attack, "random_start", False) else 2
        alone = attack(images[number : number + 1], target[number : number + 1])
        together = attack(images, target)[number : number + 1]
        torch.testing.assert_close(alone, together, **SAME)


class TestSizes:
    @pytest.mark.parametrize("shape", [(1, 7, 9), (3, 13, 5), (4, 6, 11)])
    def test_odd_sizes_and_channels(self, attacked, shape):
        model = Network("plain", "ReLU", True, seed=3, channels=shape[0])
        images, target = image_batch((2, *shape), seed=5), torch.tensor([0, 3])
        with unchanged(model, images):
            hold_valid(targeted(attacked, model)(images, target), images, attacked)


class TestCallers:
    def test_images_and_labels_that_were_made_in_inference_mode(self, attacked, model, data):
        with torch.inference_mode():
            images, labels = data[0][:2] * 1, data[1][:2] * 1
        attack = attacked.build(model)
        adversarial = attack(images, labels)
        assert torch.equal(adversarial, attack(data[0][:2], data[1][:2]))
        assert not adversarial.is_inference()

    def test_images_with_a_graph(self, attacked, model, data):
        leaf = data[0][:2].clone().requires_grad_()
        attack = attacked.build(model)
        with unchanged(model, leaf):
            adversarial = attack(leaf * 1, data[1][:2])
        assert torch.equal(adversarial, attack(data[0][:2], data[1][:2]))
        assert not adversarial.requires_grad
        assert leaf.grad is None

    def test_inference_mode_is_refused_and_leaves_nothing(self, attacked, model, data):
        attack = attacked.build(model)
        expected = attack(*data)
        with (
            unchanged(model, *data),
            torch.inference_mode(),
            pytest.raises(RuntimeError, match=r"inference_mode\(\); use no_grad"),
        ):
            attack(*data)
        assert torch.equal(attack(*data), expected)

    @pytest.mark.parametrize("caller", ["inference", "autocast"])
    def test_what_is_kept_for_the_next_call_does_not_remember_the_caller(self, model, data, caller):
        # A size of its own: what is kept, is kept by size.
        mask = MASK(copy.deepcopy(model).bfloat16(), size=3, iterations=2, jitter=0)
        images, labels = data[0][:1, :, :11, :13].bfloat16(), data[1][:1]
        if caller == "inference":
            surrogate = Unrolled(n_step=1, solved=False)(mask, images, labels)
            with torch.inference_mode(), pytest.raises(RuntimeError):
                surrogate(images)
        else:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                mask(images, labels)
        assert mask(images, labels).dtype == torch.bfloat16


def devices():
    """Return the devices there are, but the CPU, on which everything else runs."""
    found = [
        name
        for name, there in (
            ("cuda", torch.cuda.is_available()),
            ("mps", torch.backends.mps.is_available()),
            ("xpu", hasattr(torch, "xpu") and torch.xpu.is_available()),
        )
        if there
    ]
    return found or [pytest.param("none", marks=pytest.mark.skip(reason="no accelerator"))]


class TestDevices:
    @pytest.mark.parametrize("device", devices())
    def test_images_go_to_the_models_device(self, attacked, model, data, device):
        net = copy.deepcopy(model).to(device)
        target = (data[1] + 1) % 4
        adversarial = targeted(attacked, net)(data[0], target)
        assert adversarial.device.type == device
        hold_valid(adversarial.cpu(), data[0], attacked)
        exact = confidence(model, targeted(attacked, model)(data[0], target), target)
        assert abs(confidence(model, adversarial.cpu(), target) - exact) < 0.1

    @pytest.mark.parametrize("device", devices())
    def test_an_interpreter_tells_of_another_device(self, row, model, data, device):
        with pytest.raises(ValueError, match="device|type"):
            row.build(model)(data[0].to(device), data[1])

    @pytest.mark.parametrize("kind", [ADV2, StADV2])
    def test_a_model_without_values(self, model, data, kind):
        empty = copy.deepcopy(model).to("meta")
        with pytest.raises(ValueError, match="expected .* with values, got .* meta"):
            kind(empty, Gradient)(*data)

    @pytest.mark.parametrize("kind", [ADV2, StADV2])
    def test_images_without_values(self, model, data, kind):
        with pytest.raises(ValueError, match="expected .* with values, got .* meta"):
            kind(model, CAM)(data[0].to("meta"), data[1])
        with pytest.raises(ValueError, match="expected .* with values, got .* meta"):
            kind(model, CAM)(data[0], data[1].to("meta"))
        with pytest.raises(ValueError, match="expected .* with values, got .* meta"):
            CAM(model)(data[0].to("meta"), data[1])


def test_the_table_has_every_kind_of_attack():
    assert {attacked.name.split()[0] for attacked in ATTACKS} == set(EPS)

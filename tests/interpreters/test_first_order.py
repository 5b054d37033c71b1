# SPDX-License-Identifier: MIT
"""First-order passes: equal to a double backward, on every kind of network, at two passes each."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import captum.attr as ca
import pytest
import torch
import torch.nn.functional as F
from conftest import TinyNet, TinyViT, torchvision_net
from families import FAMILIES
from kinds import Around, Run, parallel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from captum_adv2 import ADV2
from captum_adv2.interpreters import (
    CaptumInterpreter,
    Gradient,
    IntegratedGradients,
    Interpreter,
    SmoothGrad,
    base,
)
from captum_adv2.interpreters.base import Smoothed
from captum_adv2.interpreters.relu import Auto, as_slope, sigma, step
from captum_adv2.spec import SoundnessWarning
from captum_adv2.testing import unchanged
from captum_adv2.testing.drawn import image_batch

LABELS = torch.tensor([0, 1, 4])


def layer(run: Run) -> nn.Module:
    """Return a function as a module, with a convolution that it may use."""
    return Around(nn.Conv2d(6, 6, 3, padding=1), run)


def network(*layers: nn.Module, act: type[nn.Module] = nn.ReLU, seed: int = 0) -> nn.Module:
    """Return a network of five classes around some layers of six channels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body = (nn.Conv2d(6, 6, 3), act(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(54, 5))
        return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), *layers, *body).eval()


def images(dtype: torch.dtype = torch.float64, side: int = 12) -> Tensor:
    return image_batch((3, 3, side, side), seed=3, dtype=torch.float64).to(dtype)


def attacked(
    interpreter: Interpreter,
    x: Tensor,
    labels: Tensor = LABELS,
    surrogate: Any = None,
    at: float = 0,
) -> Tensor:
    """Return the gradient of a loss on map and prediction, as an attack takes it."""
    x = x.clone().requires_grad_()
    found = (surrogate or interpreter.surrogate)(interpreter, x, labels[: len(x)], at)
    weights = torch.linspace(1, 2, found.maps[0].numel()).to(found.maps)
    loss = (found.maps.flatten(1) @ weights).sum()
    if found.logits is not None:
        loss = loss + 0.1 * F.cross_entropy(found.logits, labels[: len(x)], reduction="sum")
    return torch.autograd.grad(loss, x)[0]


def apart(got: Tensor, expected: Tensor) -> float:
    assert expected.any()
    return ((got - expected).norm() / expected.norm()).item()


def cosine(one: Tensor, two: Tensor) -> float:
    return F.cosine_similarity(one.flatten().double(), two.flatten().double(), dim=0).item()


def missed(
    interpreter: Interpreter,
    x: Tensor,
    smoothing: Any = "auto",
    at: float = 0.0,
    labels: Tensor = LABELS,
) -> float:
    """Return the relative error of a surrogate's gradient; the oracle is a double backward."""
    oracle, found = Smoothed(as_slope(smoothing)), []
    for surrogate in (None, oracle):
        torch.manual_seed(1)
        found.append(attacked(interpreter, x, labels, surrogate, at))
    return apart(*found)


def residual(conv: nn.Module, x: Tensor, in_place: bool = False) -> Tensor:
    y = F.relu(conv(x), inplace=in_place)
    y += x
    return F.relu(y, inplace=in_place)


def in_part(conv: nn.Module, x: Tensor) -> Tensor:
    z = conv(x)
    z[:, :3].relu_()
    return z


def scaled(conv: nn.Module, x: Tensor) -> Tensor:
    """Divide by a size that is held constant."""
    z = F.relu(conv(x))
    return z / z.detach().square().mean(dim=(1, 2, 3), keepdim=True).add(0.1).sqrt()


def unused(conv: nn.Module, x: Tensor) -> Tensor:
    """Compute what no logit depends on, and clamp a parameter."""
    F.relu(2 * conv(x) - 1)
    return F.relu(x) * conv.bias[0].clamp(min=0.2)


def branching(conv: nn.Module, x: Tensor) -> Tensor:
    """Choose a branch by the values of the image."""
    z = conv(x)
    return F.relu(z) if z[:, 0].mean() > z[:, 1].mean().item() else F.leaky_relu(z, 0.3)


def refilled(conv: nn.Module, x: Tensor) -> Tensor:
    """Write to a fresh tensor, and to a mask."""
    mask = x > 0
    mask.logical_not_()
    y = x.new_zeros(x.shape)
    y += conv(x).relu() * mask
    return y + torch.zeros_like(x).add_(x.relu())


RELU = {
    "relu": nn.ReLU(),
    "inplace": nn.ReLU(inplace=True),
    "relu6": layer(lambda conv, x: F.relu6(9 * x)),
    "leaky": nn.LeakyReLU(0.2),
    "prelu": nn.PReLU(6),
    "hardtanh": nn.Hardtanh(-0.3, 0.3),
    "hardsigmoid": layer(lambda conv, x: F.hardsigmoid(9 * x)),
    "maximum": layer(lambda conv, x: torch.maximum(torch.zeros(()).to(x), x)),
    "max-pooling": nn.Sequential(nn.ReLU(), nn.MaxPool2d(2, padding=1)),
    "adaptive max-pooling": nn.Sequential(nn.ReLU(), nn.AdaptiveMaxPool2d(5)),
    "depthwise": nn.Sequential(nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU6(inplace=True)),
    "residual": layer(residual),
    "residual in place": layer(partial(residual, in_place=True)),
    "concatenation": layer(
        lambda conv, x: torch.cat([F.relu(x), F.relu_(conv(x))[:, :3]], 1)[:, 3:]
    ),
    "in part": layer(in_part),
    "twice the same": nn.Sequential(*[nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU())] * 1, nn.ReLU()),
    "a mask": layer(lambda conv, x: conv(F.relu(x)) * (x > 0)),
    "where": layer(lambda conv, x: torch.where(x > 0, conv(F.relu(x)), 0.1 * x)),
    "held constant": layer(scaled),
    "unused": layer(unused),
    "branching": layer(branching),
    "refilled": layer(refilled),
    "dropout": nn.Sequential(nn.ReLU(), nn.Dropout(0.3).train()),
}
SHAP = {"baselines": image_batch((2, 3, 12, 12), seed=9, dtype=torch.float64), "n_samples": 3}
METHODS: dict[str, Callable[[nn.Module], Interpreter]] = {
    "Gradient": Gradient,
    "SmoothGrad": partial(SmoothGrad, samples=3),
    "IntegratedGradients": partial(IntegratedGradients, steps=3),
    "Saliency": lambda net: CaptumInterpreter(ca.Saliency(net)),
    "InputXGradient": lambda net: CaptumInterpreter(ca.InputXGradient(net)),
    "Captum's IG": lambda net: CaptumInterpreter(ca.IntegratedGradients(net), n_steps=3),
    "GradientShap": lambda net: CaptumInterpreter(ca.GradientShap(net), **SHAP),
    "NoiseTunnel": lambda net: CaptumInterpreter(
        ca.NoiseTunnel(ca.Saliency(net)), stdevs=0.1, nt_samples=3
    ),
}


SMOOTH = {kind.name: kind for kind in FAMILIES}


def relu_network(name: str) -> nn.Module:
    body = copy.deepcopy(RELU[name])
    net = network(body).double()
    for module in body.modules():
        module.training = isinstance(module, nn.Dropout)
    return net


class TestEqualsADoubleBackward:
    @pytest.mark.parametrize("build", [Gradient, METHODS["Saliency"]], ids=["odds", "logit"])
    @pytest.mark.parametrize("name", RELU)
    def test_on_networks_of_relus(self, name: str, build: Any) -> None:
        assert missed(build(relu_network(name)), images()) < 1e-8

    @pytest.mark.parametrize("at", [0.0, 0.9])
    @pytest.mark.parametrize("name", METHODS)
    def test_by_each_method(self, name: str, at: float) -> None:
        net = network(nn.ReLU(), nn.MaxPool2d(2), layer(residual)).double()
        assert missed(METHODS[name](net), images(), at=at) < 1e-8

    @pytest.mark.parametrize(
        "act", [nn.SiLU(True), nn.GELU(), nn.Hardswish(), nn.ELU(True), nn.Softplus(), nn.Sigmoid()]
    )
    def test_on_activations_with_a_derivative_of_their_own(self, act: nn.Module) -> None:
        net = network(act, layer(lambda conv, x: act(conv(x)))).double()
        net[4] = act  # no ReLU
        assert missed(Gradient(net), images()) < 1e-7

    # A step has no second derivative: the logits and the score's curvature remain.
    @pytest.mark.parametrize("smoothing", [0.1, sigma, torch.ones_like, step])
    def test_with_any_derivative(self, smoothing: Any) -> None:
        net = network(nn.ReLU()).double()
        assert missed(Gradient(net, smoothing=smoothing), images(), smoothing) < 1e-7

    @pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "squeezenet1_1", "densenet121"])
    def test_in_single_precision(self, name: str) -> None:
        x = image_batch((2, 3, 64, 64), seed=3)
        assert missed(Gradient(torchvision_net(name)), x) < 5e-3

    @pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenet_v3_small", "vit", "convnext"])
    def test_on_smooth_networks(self, name: str) -> None:
        """SiLU and Hardswish with squeeze-excitation; GELU, layer normalisation and attention."""
        net, plain, x, target = SMOOTH[name].case()
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            assert missed(Gradient(net), x, labels=target) < 1e-4
            assert missed(Gradient(plain.float()), x.float(), labels=target) < 0.1

    def test_batch_statistics_couple_the_images(self) -> None:
        net = network(nn.BatchNorm2d(6, momentum=0.0), nn.ReLU()).double()
        net[1].train()
        assert missed(Gradient(net), images()) < 1e-4


class TestPrecision:
    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU])
    def test_bfloat16_points_the_same_way(self, seed: int, act: type[nn.Module]) -> None:
        net = network(act(), act=act, seed=seed)
        x = images(torch.float32, 16)
        expected = attacked(Gradient(copy.deepcopy(net).double()), x.double())
        assert apart(attacked(Gradient(net), x), expected) < 0.03
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = attacked(Gradient(net), x)
            widened = nn.Sequential(net, layer(lambda conv, logits: logits.float()))
            assert cosine(attacked(Gradient(widened), x), expected) > 0.5
        assert cosine(cast, expected) > 0.5
        half = attacked(Gradient(copy.deepcopy(net).bfloat16()), x.bfloat16())
        assert half.dtype == torch.bfloat16
        assert cosine(half, expected) > 0.5

    def test_the_second_pass_has_the_first_ones_autocast(self) -> None:
        interpreter, x = Gradient(network(nn.ReLU())), images(torch.float32).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = interpreter.surrogate(interpreter, x, LABELS, 0.0).maps.sum()
            (inside,) = torch.autograd.grad(loss, x, retain_graph=True)
        (outside,) = torch.autograd.grad(loss, x)
        assert torch.equal(inside, outside)

    @pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6])
    def test_a_loss_of_any_size(self, scale: float) -> None:
        interpreter, x = Gradient(network(nn.ReLU())), images(torch.float32).requires_grad_()
        found = interpreter.surrogate(interpreter, x, LABELS, 0.0)
        loss = found.maps[:, 0, 0].sum()
        (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
        (gradient,) = torch.autograd.grad(scale * loss, x)
        assert apart(gradient.double() / scale, expected.double()) < 0.01

    def test_the_prediction_alone(self) -> None:
        """Where the map has no gradient, be it in one image, that of the logits is exact."""
        interpreter, x = Gradient(network(nn.ReLU()).double()), images().requires_grad_()
        found = []
        for surrogate in (interpreter.surrogate, Smoothed(Auto())):
            maps, logits, _ = surrogate(interpreter, x, LABELS, 0.0)
            loss = maps[:1].sum() + 1e-12 * logits.square().sum()
            found.append(torch.autograd.grad(loss, x)[0])
        for ours, expected in zip(*found, strict=True):
            assert apart(ours, expected) < 1e-7

    def test_a_nan_stays_in_its_image(self) -> None:
        interpreter, x = Gradient(network(nn.ReLU())), images(torch.float32).requires_grad_()
        maps = interpreter.surrogate(interpreter, x, LABELS, 0.0).maps
        weights = torch.tensor([1.0, torch.nan, 1.0]).view(3, 1, 1, 1)
        (gradient,) = torch.autograd.grad((weights * maps).sum(), x)
        assert gradient.flatten(1).isfinite().all(dim=1).tolist() == [True, False, True]


class TestBatches:
    @pytest.mark.parametrize("name", ["SmoothGrad", "IntegratedGradients", "Captum's IG"])
    def test_parts_equal_the_whole(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        interpreter = METHODS[name](network(nn.ReLU(), nn.Dropout(0.3).train()).double())
        interpreter.model[2].p = 0.0
        whole = attacked(interpreter, images())
        monkeypatch.setattr(base, "_NUMBERS", 1)
        assert apart(attacked(interpreter, images()), whole) < 1e-8
        with torch.no_grad():
            maps = interpreter(images(), LABELS)
        monkeypatch.undo()
        torch.testing.assert_close(maps, interpreter(images(), LABELS).detach())

    def test_parts_draw_numbers_of_their_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        net = network(nn.ReLU(), nn.Dropout(0.5)).double()
        net[2].train()
        interpreter = IntegratedGradients(net, steps=3)
        monkeypatch.setattr(base, "_NUMBERS", 1)
        found = []
        for _ in range(2):
            torch.manual_seed(1)
            found.append(attacked(interpreter, images()))
        assert torch.equal(*found)


def checkpointed(net: Any, x: Tensor, reentrant: bool = False) -> Tensor:
    return net[3:](checkpoint(net[:3], x, use_reentrant=reentrant))


class TestModels:
    def test_activation_checkpointing(self) -> None:
        net = network(nn.ReLU(inplace=True), layer(residual))
        x = images(torch.float32)
        expected = attacked(Gradient(net), x)
        interpreter = Gradient(Around(net, checkpointed))
        torch.testing.assert_close(attacked(interpreter, x), expected)
        with pytest.raises(ValueError, match="without activation checkpointing"):
            attacked(interpreter, x, surrogate=Smoothed(Auto()))
        with pytest.raises(RuntimeError, match="(?i)reentrant"):
            attacked(Gradient(Around(net, partial(checkpointed, reentrant=True))), x)
        with torch.autograd.graph.save_on_cpu():
            torch.testing.assert_close(attacked(Gradient(net), x), expected)

    def test_activation_checkpointing_of_timm(self) -> None:
        timm = pytest.importorskip("timm")
        torch.manual_seed(0)
        net = timm.create_model("resnet10t", num_classes=10).eval()
        x = image_batch((2, 3, 64, 64), seed=3)
        expected = attacked(Gradient(net), x)
        net.set_grad_checkpointing()
        torch.testing.assert_close(attacked(Gradient(net), x), expected)

    @pytest.mark.parametrize("act", [F.relu, F.silu, F.max_pool2d])
    def test_a_pre_activation_changed_in_place(self, act: Callable[..., Tensor]) -> None:
        def changed(conv: nn.Module, x: Tensor, copied: bool) -> Tensor:
            z, pool = conv(x), (1,) * (act is F.max_pool2d)
            y, mask = act(z, *pool), z > 0
            z = z.clone() if copied else z
            z.mul_(0.5)
            return y * mask.logical_not_() + z

        body = layer(partial(changed, copied=False))
        one, two = network(body).double(), network(copy.deepcopy(body)).double()
        two[1].run = partial(changed, copied=True)
        assert torch.equal(one(images()), two(images()))
        assert apart(attacked(Gradient(one), images()), attacked(Gradient(two), images())) < 1e-8

    @pytest.mark.parametrize("name", ["vit", "mobilenet_v3_small"])
    def test_fused_attention_and_hardsigmoid(self, name: str) -> None:
        net, _, x, target = SMOOTH[name].case()
        attack = ADV2(net, Gradient(net), steps=2, warmup=1)
        assert (attack(x, target) - x).abs().max() > 0

    def test_another_sequence_of_operations_is_refused(self) -> None:
        calls: list[int] = []

        def alternating(conv: nn.Module, x: Tensor) -> Tensor:
            calls.append(0)
            return F.relu(conv(F.relu(x))) if len(calls) % 2 else F.relu(x)

        def aliased(conv: nn.Module, x: Tensor) -> Tensor:
            z = conv(x)
            constant = z.detach()
            z.mul_(0.5)
            return F.relu(z) * constant

        for function in (alternating, aliased):
            interpreter = Gradient(network(layer(function)))
            for _ in range(2):
                with pytest.raises(ValueError, match="does the same at nearby images"):
                    attacked(interpreter, images(torch.float32))

    @pytest.mark.parametrize(
        "build",
        [
            parallel,
            pytest.param(
                partial(torch.compile, backend="eager"),
                marks=pytest.mark.skipif(
                    not hasattr(torch.compiler, "set_stance"), reason="PyTorch 2.6 runs it eagerly"
                ),
            ),
        ],
    )
    def test_wrapped(self, build: Any) -> None:
        net, x = network(nn.ReLU()), images(torch.float32)
        expected = attacked(Gradient(net), x)
        torch.testing.assert_close(attacked(Gradient(build(net)), x), expected)

    def test_frozen_weights_and_no_grad(self) -> None:
        net, x = network(nn.ReLU(), nn.PReLU(6)), images(torch.float32)
        interpreter = Gradient(net)
        expected = attacked(interpreter, x)
        with torch.no_grad():
            maps = interpreter.surrogate(interpreter, x, LABELS, 0.0).maps
        assert not maps.requires_grad
        net.requires_grad_(False)
        torch.testing.assert_close(attacked(interpreter, x), expected)
        assert not interpreter.surrogate(interpreter, x, LABELS, 0.0).maps.requires_grad


class TestTheNode:
    def test_is_used_twice_and_not_differentiated_twice(self) -> None:
        interpreter, x = Gradient(network(nn.ReLU())), images(torch.float32).requires_grad_()
        maps = interpreter.surrogate(interpreter, x, LABELS, 0.0).maps
        loss = maps.square().sum()
        (first,) = torch.autograd.grad(loss, x, retain_graph=True)
        (second,) = torch.autograd.grad(loss, x, retain_graph=True)
        assert torch.equal(first, second)
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()

    def test_runs_the_model_twice_each_way(self) -> None:
        net, calls = network(nn.ReLU()), []
        net[0].register_forward_hook(lambda *_: calls.append("forward"))
        net[-1].register_full_backward_hook(lambda *_: calls.append("backward"))
        attacked(Gradient(net), images(torch.float32))
        assert calls == ["forward", "backward"] * 2

    def test_leaves_the_model_as_it_was(self) -> None:
        net = network(nn.ReLU(), nn.Dropout(0.3), layer(residual))
        net[2].train()
        interpreter, x = Gradient(net), images(torch.float32)
        state = torch.get_rng_state()
        net(x)
        once = torch.get_rng_state()
        torch.set_rng_state(state)
        attacked(interpreter, x)
        assert torch.equal(torch.get_rng_state(), once)  # the first pass alone draws
        net.eval()
        calls: list[int] = []

        def fails(*_: Any) -> None:
            calls.append(0)
            if len(calls) == 2:  # in the second pass
                raise KeyError

        with net[3].register_forward_hook(fails), unchanged(net, x), pytest.raises(KeyError):
            attacked(interpreter, x)
        z = torch.tensor([-1.0, 2.0], requires_grad=True)
        assert torch.autograd.grad(F.relu(z).sum(), z)[0].tolist() == [0, 1]

    def test_keeps_no_memory(self) -> None:
        net, seen = network(nn.ReLU(), layer(residual)), []

        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            seen.append(weakref.ref(output))

        net[3].register_forward_hook(keep)
        gc.collect()
        gc.disable()
        try:
            saliency = CaptumInterpreter(ca.Saliency(net))
            for interpreter in (Gradient(net), SmoothGrad(net, samples=2), saliency):
                attacked(interpreter, images(torch.float32))
                assert seen
                assert not [each for each in seen if each() is not None]
        finally:
            gc.enable()


class Swish(torch.autograd.Function):
    """SiLU that keeps only its input, as some EfficientNets have it."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z * z.sigmoid()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (z,) = ctx.saved_tensors
        return grads[0] * z.sigmoid() * (1 + z * (1 - z.sigmoid()))


class TestWarnings:
    def test_nothing_to_smooth(self) -> None:
        net = nn.Sequential(nn.Flatten(), nn.Linear(432, 5))
        with pytest.warns(SoundnessWarning, match="no ReLU was found to smooth"):
            attacked(Gradient(net), images(torch.float32))

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit")
    def test_torchscript(self) -> None:
        net, x = network(nn.ReLU()), images(torch.float32)
        whole = torch.jit.trace(net, x)
        with pytest.warns(SoundnessWarning, match="no ReLU was found to smooth"):
            attacked(Gradient(whole), x)
        half = nn.Sequential(torch.jit.trace(net[:2], x), *net[2:])
        for surrogate in (Gradient(half).surrogate, Smoothed(Auto())):
            with pytest.warns(SoundnessWarning, match="inside TorchScript cannot be smoothed"):
                surrogate.init(Gradient(half), x, LABELS)
        smooth = Gradient(torch.jit.trace(network(nn.SiLU(), act=nn.SiLU), x))
        smooth.surrogate.init(smooth, x, LABELS)
        attacked(smooth, x)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(
        "kink",
        [
            lambda _, h: h.unflatten(3, (2, -1)).amax(3),
            lambda _, h: h.topk(3, dim=3)[0],
            lambda _, h: h.abs(),
            lambda _, h: Swish.apply(h),
        ],
        ids=["amax", "topk", "abs", "Function"],
    )
    def test_what_is_not_followed(self, kink: Any, dtype: torch.dtype) -> None:
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), layer(kink), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
        )
        net = nn.Sequential(net, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).to(dtype)
        with pytest.warns(SoundnessWarning, match="do not follow an operation"):
            attacked(Gradient(net.eval()), images(dtype))

    def test_curvature_is_followed(self) -> None:
        """In single precision, attention curves within the step between the passes."""
        x, labels = image_batch((2, 3, 16, 16), seed=3), torch.tensor([1, 2])
        for seed in range(3):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                net = TinyViT().eval()
            for block in net.body[1:]:
                block.qkv.weight.data *= 2
            for interpreter in (Gradient(net), METHODS["Captum's IG"](net)):
                with sdpa_kernel(SDPBackend.MATH):
                    expected = attacked(interpreter, x, labels, Smoothed(Auto()))
                assert cosine(attacked(interpreter, x, labels), expected) > 0.9

    def test_not_on_smooth_networks(self) -> None:
        attacked(Gradient(network(nn.GELU(), act=nn.SiLU)), images(torch.float32))
        attacked(Gradient(TinyNet(nn.Hardswish).eval()), images(torch.float32), LABELS % 4)

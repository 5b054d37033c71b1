# SPDX-License-Identifier: MIT
"""Smooth ReLUs: exact values, the chosen derivative, and no change of anything else."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import torchvision_net
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import handle_torch_function
from torch.utils.checkpoint import checkpoint

from captum_adv2 import ADV2
from captum_adv2.interpreters import Gradient
from captum_adv2.interpreters.relu import Auto, as_slope, h, sigma, smooth_relu, step
from captum_adv2.testing import unchanged
from captum_adv2.testing.drawn import image_batch

Z = torch.tensor([-40.0, -7.0, -2.5, -1e-2, -1e-4, 1e-4, 1e-2, 2.5, 5.99, 6.01, 7.0, 40.0])
INF = math.inf

ZEROS = torch.zeros(len(Z), dtype=torch.float64)

# Every way of writing a ReLU: the function, and the bounds that it clamps to.
WAYS: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {
    "nn.ReLU": (nn.ReLU(), 0, INF),
    "nn.ReLU inplace": (nn.ReLU(inplace=True), 0, INF),
    "F.relu": (F.relu, 0, INF),
    "F.relu inplace": (lambda z: F.relu(z, inplace=True), 0, INF),
    "F.relu inplace by position": (lambda z: F.relu(z, True), 0, INF),
    "F.relu by name": (lambda z: F.relu(input=z), 0, INF),
    "F.relu_": (F.relu_, 0, INF),
    "torch.relu": (torch.relu, 0, INF),
    "torch.relu by name": (lambda z: torch.relu(input=z), 0, INF),
    "torch.relu_": (torch.relu_, 0, INF),
    "Tensor.relu": (lambda z: z.relu(), 0, INF),
    "Tensor.relu_": (lambda z: z.relu_(), 0, INF),
    "nn.ReLU6": (nn.ReLU6(), 0, 6),
    "nn.ReLU6 inplace": (nn.ReLU6(inplace=True), 0, 6),
    "F.relu6": (F.relu6, 0, 6),
    "nn.Hardtanh": (nn.Hardtanh(), -1, 1),
    "nn.Hardtanh(0, 6) inplace": (nn.Hardtanh(0, 6, inplace=True), 0, 6),
    "F.hardtanh": (F.hardtanh, -1, 1),
    "F.hardtanh by position": (lambda z: F.hardtanh(z, -2.0, 3.0), -2, 3),
    "F.hardtanh by name": (lambda z: F.hardtanh(z, max_val=3.0, min_val=-2.0), -2, 3),
    "F.hardtanh_": (F.hardtanh_, -1, 1),
    "F.hardtanh_ by position": (lambda z: F.hardtanh_(z, -2.0, 3.0), -2, 3),
    "Tensor.clamp(min)": (lambda z: z.clamp(min=0), 0, INF),
    "Tensor.clamp by position": (lambda z: z.clamp(0), 0, INF),
    "torch.clamp(min)": (lambda z: torch.clamp(z, min=0.0), 0, INF),
    "Tensor.clamp(0, 6)": (lambda z: z.clamp(0, 6), 0, 6),
    "Tensor.clamp(0, 1)": (lambda z: z.clamp(0, 1), 0, 1),
    "Tensor.clamp(0, max=6)": (lambda z: z.clamp(0, max=6), 0, 6),
    "Tensor.clamp_(min, max)": (lambda z: z.clamp_(min=0, max=6), 0, 6),
    "Tensor.clamp_min": (lambda z: z.clamp_min(0), 0, INF),
    "Tensor.clamp_min_": (lambda z: z.clamp_min_(0.0), 0, INF),
    "torch.clamp_min": (lambda z: torch.clamp_min(z, 0), 0, INF),
    "torch.clip": (lambda z: torch.clip(z, 0, 6), 0, 6),
    "Tensor.clamp(1)": (lambda z: z.clamp(min=1.0), 1, INF),
    "Tensor.clamp(tensor)": (lambda z: z.clamp(min=ZEROS), 0, INF),
    "Tensor.clamp(tensors)": (lambda z: z.clamp(ZEROS, ZEROS[:1] + 6), 0, 6),
    "torch.maximum": (lambda z: torch.maximum(z, ZEROS), 0, INF),
    "torch.maximum, zero first": (lambda z: torch.maximum(ZEROS[0], z), 0, INF),
    "torch.max": (lambda z: torch.max(z, ZEROS), 0, INF),
    "Tensor.max of zero": (lambda z: ZEROS.max(z), 0, INF),
    "nn.Threshold": (nn.Threshold(0.5, 0.5), 0.5, INF),
    "F.threshold_": (lambda z: F.threshold_(z, 0.0, 0.0), 0, INF),
}
# Those with other slopes: the function, where it bends, and the slopes below and above.
LEAKY: dict[str, tuple[Callable[[Tensor], Tensor], list[float], list[float]]] = {
    "nn.LeakyReLU": (nn.LeakyReLU(0.2), [0.0], [0.2, 1.0]),
    "nn.LeakyReLU inplace": (nn.LeakyReLU(0.2, inplace=True), [0.0], [0.2, 1.0]),
    "F.leaky_relu": (F.leaky_relu, [0.0], [0.01, 1.0]),
    "F.leaky_relu_": (lambda z: F.leaky_relu_(z, negative_slope=0.3), [0.0], [0.3, 1.0]),
    "nn.PReLU": (nn.PReLU(init=0.25).double(), [0.0], [0.25, 1.0]),
    "F.rrelu": (lambda z: F.rrelu(z, 0.1, 0.3), [0.0], [0.2, 1.0]),
    "nn.Hardsigmoid": (nn.Hardsigmoid(), [-3.0, 3.0], [0.0, 1 / 6, 0.0]),
}
ways = pytest.mark.parametrize(("function", "low", "high"), WAYS.values(), ids=WAYS)


def leaf() -> Tensor:
    return Z.double().requires_grad_()


def slope(out: Tensor, z: Tensor) -> Tensor:
    return torch.autograd.grad(out.sum(), z)[0]


class TestDerivatives:
    @given(st.floats(-100, 100), st.floats(1e-8, 10))
    def test_h_is_the_formula(self, z: float, tau: float) -> None:
        value = h(torch.tensor([z], dtype=torch.float64), tau).item()
        expected = z / math.sqrt(z * z + tau) + (1 if z < 0 else 0)
        assert value == pytest.approx(expected, abs=1e-12)
        assert 0 <= value <= 1

    @given(st.floats(1e-3, 100), st.booleans())
    def test_h_tends_to_the_step(self, size: float, negative: bool) -> None:
        z = torch.tensor([-size if negative else size], dtype=torch.float64)
        gaps = [(h(z, tau) - step(z)).abs().item() for tau in (1e-2, 1e-4, 1e-6, 1e-10, 1e-14)]
        assert all(later <= earlier for earlier, later in zip(gaps, gaps[1:], strict=False))
        assert gaps[-1] < 1e-7

    @given(st.floats(-20, 20).filter(bool), st.floats(1e-6, 1))
    def test_derivative_of_h(self, z: float, tau: float) -> None:
        point = torch.tensor([z], dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(h(point, tau).sum(), point)
        assert slope.item() == pytest.approx(tau / (z * z + tau) ** 1.5, rel=1e-6, abs=1e-14)
        assert slope.item() > 0

    def test_h_at_zero_and_far_away(self) -> None:
        z = torch.tensor([-1e18, -1e-9, 0, 1e18], requires_grad=True)
        assert h(z).tolist() == pytest.approx([0, 1, 0, 1], abs=1e-6)  # as printed in the paper
        assert torch.equal(h(z), h(z, 1e-4))
        assert torch.autograd.grad(h(z).sum(), z)[0].isfinite().all()

    def test_step_and_sigma(self) -> None:
        assert step(torch.tensor([-1.0, -0.0, 0.0, 1e-30])).tolist() == [0, 0, 0, 1]
        assert torch.allclose(sigma(Z.double()), 1 / (1 + torch.exp(-Z.double())))


def test_a_smoothing_is_a_derivative_or_the_tau_of_h() -> None:
    assert isinstance(as_slope("auto"), Auto)
    for smoothing, expected in ((None, step(Z)), (sigma, sigma(Z)), (1, h(Z, 1)), (0.1, h(Z, 0.1))):
        slope = as_slope(smoothing)
        for clone in (slope, copy.deepcopy(slope)):
            assert torch.equal(clone(Z, 0.5)(Z), expected)
    clone = pickle.loads(pickle.dumps(as_slope(0.1)))
    assert torch.equal(clone(Z, 0.5)(Z), h(Z, 0.1))


@pytest.mark.parametrize(
    ("smoothing", "message"),
    [
        (0, "^expected smoothing above 0, got 0"),
        ("atuo", r"^expected smoothing to be one of \['auto'\], got 'atuo'"),
        (lambda z: 1.0, r"at each z, of shape \(6, 16, 8, 8\), got float; write it elementwise"),
        (lambda z: z.mean(), r"at each z, of shape .*, got \(\); write it elementwise"),
    ],
)
def test_what_is_no_smoothing(smoothing: Any, message: str, model: nn.Module, data: Any) -> None:
    def attacked() -> None:
        attack = ADV2(model, Gradient(model, smoothing=smoothing), steps=1)
        attack(*data)

    with pytest.raises(ValueError, match=message):
        attacked()


class TestAuto:
    @given(st.sampled_from([(3,), (3, 5), (3, 4, 2, 2)]), st.floats(0, 1), st.integers(-20, 20))
    def test_knows_no_scale_and_no_other_image(
        self, shape: tuple[int, ...], progress: float, power: int
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(shape, generator=generator)
        scale = 2.0 ** (power * torch.arange(3).view(-1, *[1] * (len(shape) - 1)))
        expected = Auto()(z, progress)(z)
        torch.testing.assert_close(Auto()(scale * z, progress)(scale * z), expected)
        torch.testing.assert_close(Auto()(z[1:2], progress)(z[1:2]), expected[1:2])

    def test_narrows(self) -> None:
        z = torch.linspace(-3, 3, 1000, dtype=torch.float64)[None]
        gaps = [(Auto()(z, progress)(z) - step(z)).abs().sum() for progress in (0, 0.3, 0.6, 0.9)]
        assert gaps[-1] < 0.5 * gaps[0]
        assert all(later < earlier for earlier, later in zip(gaps, gaps[1:], strict=False))
        width = 0.3 * z.square().mean().sqrt()
        torch.testing.assert_close(Auto()(z, 0.0)(z), sigma(z, width))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_empty_and_large_layers(self, dtype: torch.dtype) -> None:
        z = torch.zeros(2, 10_000, dtype=dtype)
        z[1] = torch.linspace(-3000, 3000, 10_000)  # float16 cannot hold the sum of squares
        for each in (z, z[0, 0]):  # a number, such as a clamped parameter
            x = each.clone().requires_grad_()
            derivative = Auto()(x, 0.0)(x)
            assert derivative.dtype == dtype
            assert slope(derivative, x).isfinite().all()
        derivative = Auto()(z, 0.0)(z)
        assert (derivative[0] == 0.5).all()
        assert derivative[1, 0] < 0.05 < 0.95 < derivative[1, -1]


class TestContext:
    @ways
    @pytest.mark.parametrize("derivative", [h, functools.partial(h, tau=0.01), sigma, step])
    def test_values_are_exact_and_derivatives_as_given(
        self,
        function: Callable[[Tensor], Tensor],
        low: float,
        high: float,
        derivative: Callable[[Tensor], Tensor],
    ) -> None:
        z, at, weights = leaf(), leaf(), torch.linspace(1, 2, len(Z), dtype=torch.float64)
        with smooth_relu(derivative):
            out = function(z * 1)
        assert torch.equal(out, Z.double().clamp(low, high))
        (first,) = torch.autograd.grad((weights * out).sum(), z, create_graph=True)
        expected = derivative(at - low) - (derivative(at - high) if high < INF else 0)
        torch.testing.assert_close(first, weights * expected, rtol=1e-12, atol=1e-12)
        if derivative is step:
            assert torch.equal(first, weights * slope(function(at * 1), at))  # ReLU's own
        else:
            second = torch.autograd.grad(first.sum(), z)[0]
            torch.testing.assert_close(second, slope(weights * expected, at), rtol=1e-7, atol=1e-12)

    @pytest.mark.parametrize(("function", "bends", "slopes"), LEAKY.values(), ids=LEAKY)
    def test_other_slopes(
        self, function: Callable[[Tensor], Tensor], bends: list[float], slopes: list[float]
    ) -> None:
        z, at = leaf(), Z.double()
        with smooth_relu(sigma):
            out = function(z * 1)
        torch.testing.assert_close(out, function(at.clone()), rtol=1e-15, atol=0)
        steps = zip(bends, slopes, slopes[1:], strict=False)
        expected = slopes[0] + sum((above - below) * sigma(at - b) for b, below, above in steps)
        torch.testing.assert_close(slope(out, z), expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 4, 4)])
    def test_a_slope_for_each_channel(self, shape: tuple[int, ...]) -> None:
        prelu, z = nn.PReLU(3), torch.randn(shape).requires_grad_()
        prelu.weight.data = torch.tensor([0.1, 0.2, 0.4])
        with smooth_relu(step):
            out = prelu(z)
        assert torch.equal(slope(out, z), slope(prelu(z), z))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_default_is_h(self, dtype: torch.dtype) -> None:
        z = Z.to(dtype).requires_grad_()
        with smooth_relu():
            out = torch.relu(z)
        assert torch.equal(out, Z.to(dtype).relu())
        assert torch.equal(slope(out, z), h(z.detach()))

    def test_is_left_also_after_an_exception(self) -> None:
        z = leaf()
        with suppress(KeyError), smooth_relu(sigma):
            inside = torch.relu(z)
            raise KeyError
        assert torch.equal(slope(inside, z), sigma(z.detach()))
        assert torch.equal(slope(torch.relu(z), z), step(z.detach()))

    def test_nested_the_inner_one_rules(self) -> None:
        z = leaf()
        with smooth_relu(h):
            with smooth_relu(sigma):
                inner = torch.relu(z)
            outer = torch.relu(z)
        assert torch.equal(slope(inner, z), sigma(z.detach()))
        assert torch.equal(slope(outer, z), h(z.detach()))

    @pytest.mark.parametrize(
        "function",
        [F.relu_, torch.relu_, lambda z: z.clamp_(min=0), lambda z: F.relu(z, inplace=True)],
    )
    def test_in_place_changes_the_tensor_and_its_aliases(
        self, function: Callable[[Tensor], Tensor]
    ) -> None:
        z = leaf()
        pre = z * 1
        alias, view = pre, pre[:4]
        with smooth_relu():
            out = function(pre)
        assert out.data_ptr() == pre.data_ptr()
        assert torch.equal(alias, Z.double().relu())
        assert torch.equal(view, torch.zeros(4, dtype=torch.float64))
        assert torch.equal(slope(alias, z), h(z.detach()))

    def test_out_of_place_leaves_the_tensor(self) -> None:
        z = leaf()
        with smooth_relu():
            F.relu(z)
            F.relu(z, inplace=False)
            z.clamp(0, 6)
            z.clamp(0, 1)  # 1 is no flag
            torch.clip(z, 1)
        assert torch.equal(z.detach(), Z.double())

    @pytest.mark.parametrize(
        "function",
        [
            lambda z: z.clamp(max=1.0),
            lambda z: z.clamp(None, 1.0),
            lambda z: torch.clamp_max(z, 1.0),
            lambda z: torch.maximum(z, 0.5 * z),
            lambda z: torch.maximum(z, ZEROS[:, None]),  # of a larger shape
            lambda z: z.clamp(min=z.sum()),
            lambda z: F.threshold(z, 0.0, -1.0),  # it jumps
            lambda z: z.max(dim=0).values,
            F.gelu,
            F.silu,
            F.softplus,
            F.hardswish,
        ],
    )
    def test_what_is_no_relu_keeps_its_derivative(
        self, function: Callable[[Tensor], Tensor]
    ) -> None:
        z = leaf()
        expected = function(z)
        with smooth_relu(sigma):
            out = function(z)
        assert torch.equal(out, expected)
        assert torch.equal(slope(out, z), slope(expected, z))

    def test_a_function_without_a_name_keeps_its_derivative(self) -> None:
        z, nameless = leaf(), functools.partial(torch.relu)
        with smooth_relu(sigma):
            out = handle_torch_function(nameless, (z,), z)
        assert torch.equal(slope(out, z), step(z.detach()))

    def test_integers_are_left_alone(self) -> None:
        z = torch.tensor([-2, 0, 9])
        with smooth_relu():
            assert torch.relu(z).tolist() == [0, 0, 9]
            assert z.clamp(0, 6).tolist() == [0, 0, 6]
            assert z.clamp(min=0).dtype == torch.int64

    def test_what_would_run_again_outside_is_refused(self) -> None:
        net = nn.Sequential(nn.Linear(3, 8), nn.ReLU())
        x = torch.rand(2, 3, requires_grad=True)
        with pytest.raises(ValueError, match="without activation checkpointing"), smooth_relu():
            checkpoint(net, x, use_reentrant=False)
        checkpoint(net, x, use_reentrant=False)

    def test_backward_after_the_context_is_left(self) -> None:
        net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(inplace=True), nn.Linear(8, 2)).double()
        x = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
        with smooth_relu():
            out = net(x)
            (inside,) = torch.autograd.grad(out[:, 0].sum(), x, create_graph=True)
        (after,) = torch.autograd.grad(out[:, 0].sum(), x, create_graph=True)
        assert torch.equal(inside, after)
        (second,) = torch.autograd.grad(after.square().sum(), x)
        assert second.abs().max() > 0


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v2"])
def test_networks_keep_their_logits_and_get_a_second_derivative(name: str) -> None:
    net, x = torchvision_net(name), image_batch((1, 3, 64, 64)).requires_grad_()
    expected = net(x)

    def second(derivative: Callable[[Tensor], Tensor]) -> Tensor | None:
        with smooth_relu(derivative):
            logits = net(x)
        assert torch.equal(logits, expected)
        (first,) = torch.autograd.grad(logits[0, 3], x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x, allow_unused=True)[0]

    with unchanged(net, x):
        smooth, plain = second(h), second(step)
    assert expected.std() > 0
    assert smooth.isfinite().all()
    assert smooth.any()
    if name == "resnet18":  # piecewise linear
        assert plain is None or not plain.any()


def test_the_surrogate_of_grad_uses_its_smoothing(model: nn.Module, data: Any) -> None:
    def seen(smoothing: Any) -> Tensor:
        interpreter = Gradient(model, smoothing=smoothing)
        return interpreter.surrogate(interpreter, *data, 0.0).maps

    plain = Gradient(model).explain(*data).maps
    assert torch.equal(plain, seen(None))
    for smoothing, slope in (("auto", Auto()), (Auto(), Auto()), (1e-4, h), (sigma, sigma)):
        with smooth_relu(slope):
            assert torch.equal(seen(smoothing), Gradient(model).explain(*data).maps)
        assert not torch.equal(seen(smoothing), plain)

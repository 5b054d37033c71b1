# SPDX-License-Identifier: MIT
"""The base of all interpreters: modes, checks of input and output, min-max scaling, graphs."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from conftest import TinyNet, mixed
from hypothesis import given
from torch import Tensor, nn

from captum_adv2 import testing
from captum_adv2.interpreters import CAM, Ensemble, GradCAM, Gradient, Interpreter, SmoothGrad
from captum_adv2.interpreters.base import (
    Exact,
    Explanation,
    Smoothed,
    background,
    detached,
    differentiable_input,
    eval_mode,
    min_max,
)  # fmt: skip
from captum_adv2.interpreters.relu import sigma, smooth_relu


class Brightness(Interpreter):
    """Needs no model to explain; runs it by keyword, if there is one."""

    def explain(self, images: Tensor, target: Tensor) -> Explanation:
        logits = None if self.model is None else self.model(x=images)
        return Explanation(images.mean(dim=1, keepdim=True), logits)


class TestCall:
    def test_an_interpreter_of_ones_own(self, model: nn.Module, data: Any) -> None:
        for interpreter in (Brightness(model), Brightness(None)):
            maps = interpreter(*data)
            assert torch.equal(maps, data[0].mean(dim=1, keepdim=True))
            surrogate = interpreter.surrogate
            assert surrogate == Exact()
            state = surrogate.init(interpreter, *data)
            assert surrogate.advance(interpreter, data[0], state, 0.5) is state
            assert torch.equal(surrogate(interpreter, data[0], state, 0.5).maps, maps)
        with pytest.raises(TypeError, match="abstract"):
            Interpreter(model)

    def test_a_smoothed_surrogate(self, model: nn.Module, data: Any) -> None:
        interpreter = Gradient(model)
        maps = Smoothed(sigma)(interpreter, *data, 0.0).maps
        with smooth_relu(sigma):
            assert torch.equal(maps, interpreter.explain(*data).maps)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.uint16])
    def test_classes_of_any_integer_type(
        self, model: nn.Module, data: Any, dtype: torch.dtype
    ) -> None:
        images, labels = data
        assert torch.equal(CAM(model)(images, labels.to(dtype)), CAM(model)(images, labels))

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda x, y: (x * 255, y), r"expected images in \[0, 1\]"),
            (lambda x, y: (x[0], y), "expected images with 4 dimensions"),
            (lambda x, y: (x, y[:1]), r"expected target of shape \(6,\), got \(1,\)"),
            (lambda x, y: (x, y.float()), "expected target of an integer dtype"),
        ],
    )
    def test_checks_its_input(self, model: nn.Module, data: Any, spoil: Any, message: str) -> None:
        with (
            testing.unchanged(model),
            pytest.raises((TypeError, ValueError), match=message),
        ):
            Gradient(model)(*spoil(*data))

    @pytest.mark.parametrize(
        "build",
        [
            CAM,
            SmoothGrad,  # the model sees a batch of noisy copies
            lambda model: Ensemble([CAM(model), Gradient(model)]),
            Brightness,
        ],
    )
    def test_checks_the_models_output(self, build: Any, data: Any) -> None:
        images, labels = data
        net = mixed(TinyNet())
        interpreter = build(net)
        for target in (labels + 1, labels - 1):
            message = r"expected target in \[0, 3\], the model's classes, got values in"
            with testing.unchanged(net), pytest.raises(ValueError, match=message):
                interpreter(images, target)
        with testing.unchanged(net):
            interpreter(images, labels)
        net.fc = nn.Linear(16, 16)
        net.fc.register_forward_hook(lambda *_: None)  # hooks of the user stay
        with testing.unchanged(net):
            interpreter(images, labels)  # 16 logits now

    def test_checks_where_the_model_is_called_alone(self, model: nn.Module, data: Any) -> None:
        with pytest.raises(ValueError, match=r"expected target in \[0, 3\]"):
            CAM(model)(data[0], data[1] + 9)
        assert not model._forward_hooks
        model(data[0])

    def test_after(self, model: nn.Module, data: Any) -> None:
        interpreter = GradCAM(model)
        after = interpreter.after(lambda images: images / 2)
        assert torch.equal(after.logits(data[0]), model(data[0] / 2))
        assert torch.equal(interpreter.prepare(data[0]), data[0])
        assert type(after) is GradCAM


class TestModes:
    def test_each_module_is_put_back(self, model: nn.Module) -> None:
        net = mixed(model)
        with testing.unchanged(net):
            with eval_mode(net):
                assert not any(module.training for module in net.modules())
            with suppress(KeyError), eval_mode(net, switch=False):
                assert net.dropout.training
                net.norm.train()
                raise KeyError
        with eval_mode(None):
            pass

    def test_differentiable_input(self) -> None:
        x = torch.rand(1, 3, 4, 4, requires_grad=True)
        with differentiable_input(x) as (same, create_graph):
            assert same is x
            assert create_graph
        for given_images, grad in ((x, False), (x.detach(), True)):
            with (
                torch.set_grad_enabled(grad),
                differentiable_input(given_images) as (leaf, create_graph),
            ):
                assert leaf.is_leaf
                assert leaf.requires_grad
                assert torch.is_grad_enabled()
                assert not create_graph
        with (
            torch.inference_mode(),
            pytest.raises(RuntimeError, match="inference_mode"),
            differentiable_input(x.detach()),
        ):
            pass


class TestMaps:
    @given(testing.images((1, 3, 4)))
    def test_min_max(self, maps: Tensor) -> None:
        scaled = min_max(maps)
        for each, its in zip(maps, scaled, strict=True):
            spread = each.max() - each.min()
            if spread == 0:
                assert not its.any()
            else:
                torch.testing.assert_close(its, (each - each.min()) / spread)
                assert its.min() == 0
                assert its.max() == 1

    def test_min_max_of_next_to_nothing_has_a_finite_gradient(self) -> None:
        maps = (torch.rand(2, 1, 3, 3) * torch.tensor([1e-20, 1e-12]).view(2, 1, 1, 1)).clone()
        maps.requires_grad_()
        scaled = min_max(maps)
        assert not scaled[0].any()
        assert scaled[1].max() == 1
        assert torch.autograd.grad(scaled.sum(), maps)[0].isfinite().all()

    def test_detached(self) -> None:
        maps, penalty = (torch.rand(2, requires_grad=True) * 1 for _ in range(2))
        plain = detached(Explanation(maps, None, penalty))
        assert plain.logits is None
        assert not plain.maps.requires_grad
        assert not plain.penalty.requires_grad

    @pytest.mark.parametrize("baseline", [0.25, torch.rand(3, 4, 4), torch.rand(1, 3, 4, 4)])
    def test_background(self, baseline: Any) -> None:
        images = torch.rand(2, 3, 4, 4, dtype=torch.float64)
        found = background(baseline, images)
        assert found.shape == images.shape
        assert found.dtype == images.dtype
        torch.testing.assert_close(
            found[1].float(), torch.as_tensor(baseline).expand(1, 3, 4, 4)[0]
        )

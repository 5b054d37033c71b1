# SPDX-License-Identifier: MIT
"""Every helper accepts what is right, unchanged, and says "expected ..., got ..." otherwise."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from captum_adv2 import SoundnessWarning, checks

IMAGES = torch.full((2, 3, 4, 4), 0.5)


class TestModel:
    def test_returns_it(self) -> None:
        net = nn.Linear(1, 1)
        assert checks.expect_model(net) is net

    @pytest.mark.parametrize(
        "model", [None, lambda x: x, nn.Linear], ids=["None", "function", "class"]
    )
    def test_refuses(self, model: Any) -> None:
        with pytest.raises(
            TypeError, match=r"expected model to be a torch\.nn\.Module, got .*; wrap"
        ):
            checks.expect_model(model)


class TestImages:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_returns_them(self, dtype: torch.dtype) -> None:
        images = IMAGES.to(dtype)
        assert checks.expect_images(images) is images

    @pytest.mark.parametrize("value", [0.0, 1.0, -9e-6, 1 + 9e-6])
    def test_rounding_errors_pass(self, value: float) -> None:
        checks.expect_images(torch.full((1, 1, 1, 1), value))

    def test_images_under_attack_pass(self) -> None:
        checks.expect_images(IMAGES.clone().requires_grad_())

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (IMAGES.numpy(), r"expected images to be a torch\.Tensor, got ndarray"),
            ([[1.0]], r"expected images to be a torch\.Tensor, got list"),
            (
                IMAGES.to(torch.uint8),
                r"floating dtype, got torch\.uint8; use images\.float\(\) / 255",
            ),
            (IMAGES.long(), r"floating dtype, got torch\.int64"),
            (IMAGES > 0, r"floating dtype, got torch\.bool"),
            (IMAGES.cfloat(), r"floating dtype, got torch\.complex64"),
        ],
    )
    def test_wrong_type(self, images: Any, message: str) -> None:
        with pytest.raises(TypeError, match=message):
            checks.expect_images(images)

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (IMAGES[0], r"with 4 dimensions, got shape \(3, 4, 4\); add a batch dimension"),
            (IMAGES[None], r"with 4 dimensions, got shape \(1, 2, 3, 4, 4\)$"),
            (IMAGES[0, 0], r"with 4 dimensions, got shape \(4, 4\)$"),
            (IMAGES[:0], r"expected at least one entry in images, got shape \(0, 3, 4, 4\)"),
            (IMAGES * 2.5, r"in \[0, 1\], got values in \[1\.25, 1\.25\]; normalise inside"),
            (IMAGES - 0.6, r"in \[0, 1\], got values in \[-0\.1, -0\.1\]"),
            (torch.full((1, 1, 1, 1), 1 + 1e-4), r"in \[0, 1\]"),
            (torch.full((1, 1, 1, 1), -1e-4), r"in \[0, 1\]"),
        ],
    )
    def test_wrong_value(self, images: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            checks.expect_images(images)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("where", [0, 5, -1])
    def test_one_bad_pixel(self, value: float, where: int) -> None:
        images = IMAGES.clone()
        images.view(-1)[where] = value
        with pytest.raises(ValueError, match="expected finite images, got NaN or infinite"):
            checks.expect_images(images)

    def test_name_in_the_message(self) -> None:
        with pytest.raises(ValueError, match="expected adversarial with 4 dimensions"):
            checks.expect_images(IMAGES[0], "adversarial")
        with pytest.raises(TypeError, match=r"use adversarial\.float"):
            checks.expect_images(IMAGES.long(), "adversarial")


class TestLabels:
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
    def test_returns_long(self, dtype: torch.dtype) -> None:
        labels = checks.expect_labels(torch.tensor([0, 2], dtype=dtype), 2, 3)
        assert labels.dtype == torch.int64
        assert labels.tolist() == [0, 2]

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            ([0, 1], r"expected labels to be a torch\.Tensor, got list"),
            (0, r"expected labels to be a torch\.Tensor, got int"),
            (torch.tensor([0.0, 1.0]), r"integer dtype, got torch\.float32; use \.long\(\)"),
            (torch.tensor([True, False]), r"integer dtype, got torch\.bool"),
            (torch.tensor([1j, 0]), r"integer dtype, got torch\.complex64"),
        ],
    )
    def test_wrong_type(self, labels: Any, message: str) -> None:
        with pytest.raises(TypeError, match=message):
            checks.expect_labels(labels, 2)

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (torch.tensor([0]), r"shape \(2,\), one class an image, got \(1,\)"),
            (torch.tensor([[0], [1]]), r"shape \(2,\), one class an image, got \(2, 1\)"),
            (torch.tensor(0), r"shape \(2,\), one class an image, got \(\)"),
            (torch.tensor([-1, 0]), r"in \[0, 2\], got values in \[-1, 0\]"),
            (torch.tensor([3, 0]), r"in \[0, 2\], got values in \[0, 3\]"),
        ],
    )
    def test_wrong_value(self, labels: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            checks.expect_labels(labels, 2, 3)

    def test_classes_unknown(self) -> None:
        assert checks.expect_labels(torch.tensor([10**6]), 1).item() == 10**6
        with pytest.raises(ValueError, match=r"expected target in 0 and above, got .*\[-1, 4\]"):
            checks.expect_labels(torch.tensor([-1, 4]), 2, name="target")


class TestMaps:
    MAPS = torch.full((2, 1, 3, 3), 0.25)

    def expect(self, maps: Any) -> torch.Tensor:
        return checks.expect_maps(maps, (2, 1, 3, 3), "CAM", "target_maps")

    def test_returns_them(self) -> None:
        assert self.expect(self.MAPS) is self.MAPS

    @pytest.mark.parametrize(
        ("maps", "message"),
        [
            (None, r"expected target_maps to be a torch\.Tensor, got NoneType"),
            (MAPS.long(), r"expected target_maps of a floating dtype, got torch\.int64"),
        ],
    )
    def test_wrong_type(self, maps: Any, message: str) -> None:
        with pytest.raises(TypeError, match=message):
            self.expect(maps)

    @pytest.mark.parametrize(
        ("maps", "message"),
        [
            (MAPS[:, 0], r"expected target_maps with 4 dimensions, got shape \(2, 3, 3\); add"),
            (
                MAPS[:1],
                r"shape \(2, 1, 3, 3\) from CAM, got \(1, 1, 3, 3\); .*native resolution",
            ),
            (MAPS[..., :2], r"shape \(2, 1, 3, 3\) from CAM, got \(2, 1, 3, 2\)"),
            (MAPS * 5, r"target_maps in \[0, 1\], got values in \[1\.25, 1\.25\]; 1 means imp"),
            (MAPS * math.nan, "expected finite target_maps"),
        ],
    )
    def test_wrong_value(self, maps: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.expect(maps)


class TestLogits:
    def test_returns_them(self) -> None:
        logits = torch.zeros(3, 2)
        assert checks.expect_logits(logits, 3) is logits

    @pytest.mark.parametrize("output", [(torch.zeros(3, 2),), {"out": 1}, None])
    def test_wrong_type(self, output: Any) -> None:
        name = type(output).__name__
        with pytest.raises(
            TypeError, match=rf"logits of shape \(3, classes\), got {name}; wrap it"
        ):
            checks.expect_logits(output, 3)

    @pytest.mark.parametrize("shape", [(3, 1), (2, 2), (3,), (3, 2, 1), (3, 0)])
    def test_wrong_shape(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(
            ValueError, match=r"logits of shape \(3, classes\) with at least two"
        ) as e:
            checks.expect_logits(torch.zeros(shape), 3)
        assert str(e.value).endswith(f"got {shape}")


class TestNumbers:
    @pytest.mark.parametrize("value", [1, 0.5, Fraction(1, 2), np.float32(0.5), np.int64(1)])
    def test_any_real_number(self, value: Any) -> None:
        number = checks.expect_number(value, "eps", low=0.0)
        assert type(number) is float
        assert number == float(value)

    @pytest.mark.parametrize("value", [True, "1", None, 1j, torch.tensor(1.0), [1]])
    def test_wrong_type(self, value: Any) -> None:
        name = type(value).__name__
        with pytest.raises(TypeError, match=f"expected eps to be a number, got {name}"):
            checks.expect_number(value, "eps", low=0.0)

    @pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf, -math.inf])
    def test_below(self, value: float) -> None:
        with pytest.raises(ValueError, match=f"expected eps at least 0, got {value}"):
            checks.expect_number(value, "eps", low=0.0)

    def test_bounds_belong_unless_above(self) -> None:
        assert checks.expect_number(0, "eps", low=0.0, high=1.0) == 0
        assert checks.expect_number(1, "eps", low=0.0, high=1.0) == 1
        with pytest.raises(ValueError, match="expected eps above 0, got 0"):
            checks.expect_number(0, "eps", low=0.0, above=True)
        with pytest.raises(ValueError, match=r"expected eps at least 0 and at most 1, got 1\.5"):
            checks.expect_number(1.5, "eps", low=0.0, high=1.0)

    @given(st.floats(), st.floats(-10, 10), st.floats(-10, 10), st.booleans())
    def test_accepts_exactly_the_interval(
        self, value: float, low: float, high: float, above: bool
    ) -> None:
        inside = low <= value <= high and not (above and value == low)
        if inside:
            assert checks.expect_number(value, "x", low=low, high=high, above=above) == value
        else:
            with pytest.raises(ValueError, match="expected x"):
                checks.expect_number(value, "x", low=low, high=high, above=above)

    @pytest.mark.parametrize("value", [3, np.int32(3), np.uint8(3)])
    def test_integers(self, value: Any) -> None:
        number = checks.expect_integer(value, "steps", low=1)
        assert type(number) is int
        assert number == 3

    @pytest.mark.parametrize("value", [True, 3.0, "3", None, np.float64(3)])
    def test_not_an_integer(self, value: Any) -> None:
        with pytest.raises(TypeError, match="expected steps to be an integer, got"):
            checks.expect_integer(value, "steps", low=1)

    def test_integer_bounds(self) -> None:
        assert checks.expect_integer(1, "steps", low=1, high=2) == 1
        with pytest.raises(ValueError, match="expected steps at least 1, got 0"):
            checks.expect_integer(0, "steps", low=1)
        with pytest.raises(ValueError, match="at least 1 and at most 2, got 3"):
            checks.expect_integer(3, "steps", low=1, high=2)


class TestFindModule:
    @pytest.fixture
    def net(self) -> nn.Module:
        block = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU())
        return nn.ModuleDict({"layer1": block, "layer2": nn.ReLU(), "head": nn.Linear(1, 1)})

    @pytest.mark.parametrize("name", ["layer1", "layer1.0", "head"])
    def test_by_name_and_module(self, net: nn.Module, name: str) -> None:
        module = net.get_submodule(name)
        assert checks.find_module(net, name) is module
        assert checks.find_module(net, module) is module

    def test_near_names(self, net: nn.Module) -> None:
        message = r"got 'layer4'; near names: (layer1|layer2), (layer1|layer2)"
        with pytest.raises(ValueError, match=message):
            checks.find_module(net, "layer4")
        with pytest.raises(ValueError, match=r"got 'heads'; near names: head$"):
            checks.find_module(net, "heads")

    @pytest.mark.parametrize("name", ["zzz", ""])
    def test_nothing_near(self, net: nn.Module, name: str) -> None:
        with pytest.raises(ValueError, match=r"see model\.named_modules\(\)"):
            checks.find_module(net, name)

    def test_module_of_another_model(self, net: nn.Module) -> None:
        with pytest.raises(ValueError, match="got another Linear; pass its dotted name"):
            checks.find_module(net, nn.Linear(1, 1))

    @pytest.mark.parametrize("layer", [0, None, nn.ReLU])
    def test_wrong_type(self, net: nn.Module, layer: Any) -> None:
        with pytest.raises(TypeError, match="expected layer to be a module or its name, got"):
            checks.find_module(net, layer)


def test_soundness_warning_is_a_user_warning() -> None:
    assert issubclass(SoundnessWarning, UserWarning)

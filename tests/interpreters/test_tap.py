# SPDX-License-Identifier: MIT
"""Taps read one side of a module and are gone afterwards; modules are found by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kinds import Around
from torch import nn

from captum_adv2.interpreters.tap import find_module, tapped
from captum_adv2.testing import unchanged


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_tap_keeps_one_side(model: nn.Module, data: Any, side: Any) -> None:
    with unchanged(model), tapped(model.body, side) as tap:
        logits = model(data[0])
    before = model.norm(model.stem(data[0]))
    assert torch.equal(tap.features, before if side == "input" else model.body(before))
    assert torch.equal(model(data[0]), logits)


def test_a_tap_is_gone_after_an_exception(model: nn.Module) -> None:
    with unchanged(model), pytest.raises(KeyError), tapped(model.body, "output") as tap:
        raise KeyError
    assert tap.features is None


def test_a_tap_keeps_tensors_only() -> None:
    net = Around(None, lambda _, x: (x, x))
    with tapped(net, "output") as tap:
        assert isinstance(net(torch.ones(1)), tuple)
    assert tap.features is None


def test_find_module() -> None:
    block = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU())
    net = nn.ModuleDict({"layer1": block, "layer2": nn.ReLU(), "head": nn.Linear(1, 1)})
    for name in ("layer1", "layer1.0", "head"):
        module = net.get_submodule(name)
        assert find_module(net, name) is find_module(net, module) is module
    with pytest.raises(ValueError, match=r"got 'layer4'; near names: layer\d, layer\d"):
        find_module(net, "layer4")
    with pytest.raises(ValueError, match=r"got 'zzz'; see model\.named_modules\(\)"):
        find_module(net, "zzz")
    with pytest.raises(ValueError, match="to be a module of the model"):
        find_module(net, nn.Linear(1, 1))

# SPDX-License-Identifier: MIT
"""Other people's models: each map and attack is right, warned of, or refused in words.

What is right is computed without the library, in ``examples/benchmark/oracles.py``; the outcome is
that of ``docs/models.md``.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from kinds import Around
from models import FAMILIES, FEW, MARKS, ROWS, SPELLINGS, Kind, attacked, cell, explained
from torch import nn

from captum_adv2 import ADV2, SoundnessWarning
from captum_adv2.interpreters import CAM, RTS, CaptumInterpreter, GradCAM, Gradient, MaskingModel

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
KINDS = {kind.name: kind for kind in (*SPELLINGS, *FAMILIES)}
# Compiled models have hooks from this version on.
RECENT = hasattr(torch.compiler, "set_stance")


def page() -> dict[str, dict[str, str]]:
    """Return the marks of the page, by kind and interpreter."""
    marks: dict[str, dict[str, str]] = {}
    head: list[str] = []
    for text in PAGE.read_text(encoding="utf-8").splitlines():
        name, *cells = text.strip("|").split("|")
        if not text.startswith("|"):
            head = []
        elif not head:
            head = cells
        elif "---" not in name:
            marks[name] = dict(zip(head, cells, strict=True))
    return marks


def judged(kind: Kind, rows: list) -> dict[str, str]:
    pytest.importorskip("timm" if "timm" in kind.name else "torchvision")
    return {row.name: cell(row, kind) for row in rows}


def test_the_page_has_all_kinds() -> None:
    marks = page()
    assert list(marks) == list(KINDS)
    for name, cells in marks.items():
        rows = FEW if KINDS[name] in FAMILIES else ROWS
        assert list(cells) == [row.name for row in rows]
        assert all(re.fullmatch(f"[{''.join(MARKS.values())}]{{1,2}}", c) for c in cells.values())


@pytest.mark.parametrize("name", [kind.name for kind in SPELLINGS])
def test_spellings(name: str) -> None:
    rows = [row for row in FEW if row.name not in ("`RTS`", "`GuidedBackprop`")]
    found, told = judged(KINDS[name], rows), page()[name]
    if RECENT or "compile" not in name:
        assert found == {row: told[row] for row in found}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_all(name: str) -> None:
    found = judged(KINDS[name], FEW if KINDS[name] in FAMILIES else ROWS)
    if RECENT or "compile" not in name:
        assert found == page()[name]


# The oracles notice what is wrong


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_another_model_is_noticed(row) -> None:
    def other(plain: nn.Module) -> nn.Module:
        for weight in plain.parameters():
            if weight.ndim > 1:
                weight.data.mul_(1 + 0.2 * torch.rand_like(weight))
        return plain

    kind = Kind("another", KINDS["plain"].plain, other)
    assert explained(row, kind).startswith("wrong by")
    assert attacked(row, kind).startswith("wrong by")


# What the sweep found, in words


def net() -> nn.Module:
    return KINDS["float32"].case()[0]


IMAGES, TARGET = KINDS["float32"].case()[2], torch.tensor([1, 0])


def test_a_script_takes_no_hooks() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.script(net())
    message = r"takes hooks, got RecursiveScriptModule; wrap it: nn.Sequential\(model\)"
    for call in (Gradient(script), ADV2(script, Gradient)):
        with pytest.raises(TypeError, match=message):
            call(IMAGES, TARGET)


def test_a_fixed_batch_size_is_told() -> None:
    from captum.attr import DeepLift

    model = Around(net(), lambda net, x: net(x.view(IMAGES.shape)))
    message = r"takes any number of images, .* fails on 4 \(shape"
    with pytest.raises(ValueError, match=message):
        CaptumInterpreter(DeepLift(model))(IMAGES, TARGET)
    with pytest.raises(ValueError, match=r"an encoder of one image of shape \(3, 16, 16\)"):
        MaskingModel(model, image_shape=(3, 16, 16))


def test_parametrised_weights_are_no_features() -> None:
    model = net()
    expected = MaskingModel(model, image_shape=(3, 16, 16), width=4).layers
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d):
            nn.utils.parametrizations.weight_norm(module)
    masking_model = MaskingModel(model, image_shape=(3, 16, 16), width=4)
    assert masking_model.layers == expected
    assert RTS(model, masking_model)(IMAGES, TARGET).shape == (2, 1, 8, 8)


def test_numbers_that_are_none_are_told_by_a_map() -> None:
    model = Around(net(), lambda net, x: net(x) * torch.tensor([[torch.nan], [1.0]]))
    with pytest.warns(SoundnessWarning, match="NaN or infinite for 1 of 2 images, .* a map of"):
        Gradient(model)(IMAGES, TARGET)


def test_a_map_of_zeros_may_be_that_of_a_model_that_rounds() -> None:
    rounding = Around(net(), lambda net, x: net((x * 255).round() / 255))
    with pytest.raises(ValueError, match="got a gradient of zero; run the model without"):
        Gradient(rounding)(IMAGES, TARGET)
    flat = Around(net(), lambda net, x: 0 * net(x))
    assert not Gradient(flat)(IMAGES, TARGET).any()  # it is constant, which is legal


@pytest.mark.parametrize("kind", [CAM, GradCAM])
def test_features_of_an_autograd_function(kind) -> None:
    given, plain, images, _ = KINDS["`autograd.Function` as ReLU"].case()
    interpreter = kind(given)
    for _ in range(2):  # found, and read again
        torch.testing.assert_close(interpreter(images, TARGET), kind(plain)(images, TARGET))

# SPDX-License-Identifier: MIT
"""The transfer matrix: every entry is `evaluate`'s, and clean images are explained once."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import TinyNet
from torch import Tensor, nn
from toys import Brightness, Echo, flat

from captum_adv2 import Report, evaluate
from captum_adv2.evaluation import transfer
from captum_adv2.interpreters import CAM, Gradient

MEASURES = ("success", "confidence", "l1", "l2", "iou", "linf")
MEANS = ("asr", *MEASURES[1:])


def assert_entries_are(found: transfer.Matrix, expected: list[list[Report]]) -> None:
    """Compare every report, measure and mean, to rounding."""
    for row, reports in enumerate(expected):
        for column, report in enumerate(reports):
            torch.testing.assert_close(tuple(found.reports[row][column]), tuple(report))
            for name in MEASURES:
                torch.testing.assert_close(found.each(name)[row, column], getattr(report, name))
            for name in MEANS:
                mean = found.mean(name)[row, column].item()
                assert mean == pytest.approx(report.summary()[name], rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("labelled", [True, False])
def test_every_entry_is_evaluates(
    model: nn.Module, data: tuple[Tensor, Tensor], quantize: bool, labelled: bool
) -> None:
    images, labels = data
    target = (labels + 1) % 4
    noise = torch.rand(3, *images.shape) - 0.5
    sources = {f"noise {i}": (images + 0.3 * n).clamp(0, 1) for i, n in enumerate(noise)}
    interpreters = {"CAM": CAM(model), "GRAD": Gradient(model)}
    own = (labels + 2) % 4 if labelled else None
    found = transfer.matrix(model, interpreters, images, sources, target, own, quantize)
    assert found.sources == ("noise 0", "noise 1", "noise 2")
    assert found.targets == ("CAM", "GRAD")
    assert found.each("l1").shape == (3, 2, 6)
    assert found.mean().shape == (3, 2)
    expected = [
        [evaluate(model, g, images, given, target, own, quantize) for g in interpreters.values()]
        for given in sources.values()
    ]
    assert_entries_are(found, expected)


def test_across_classifiers_each_has_its_own_interpreter(
    model: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    images, labels = data
    target = (labels + 1) % 4
    models = {"trained": model, "untrained": TinyNet().eval()}
    sources = {"noise": (images + 0.3 * torch.rand(images.shape)).clamp(0, 1)}
    found = transfer.across(models, CAM, images, sources, target)
    assert (found.sources, found.targets) == (("noise",), ("trained", "untrained"))
    nets = models.values()
    row = [evaluate(net, CAM(net), images, sources["noise"], target) for net in nets]
    assert_entries_are(found, [row])
    # Each benign map explains the model's own prediction.
    assert not torch.equal(*(net(images).argmax(dim=1) for net in nets))


@pytest.mark.parametrize("quantize", [True, False])
def test_clean_images_are_explained_once_a_column(quantize: bool) -> None:
    model, clean, target = Brightness(), flat(0.2, 0.3), torch.tensor([1, 1])
    interpreters = {"a": Echo(model), "b": Echo(model)}
    # The clean images themselves are a source like any other.
    sources = {"x": flat(0.8, 0.9), "none": clean, "y": flat(0.7, 0.6)}
    found = transfer.matrix(model, interpreters, clean, sources, target, quantize=quantize)
    for g in interpreters.values():
        assert g.asked == [[0, 0], [1, 1], [1, 1], [1, 1]]
    # Half the change of the image, and a tenth for the class.
    expected = torch.tensor([0.4, 0.1, 0.35])
    torch.testing.assert_close(found.each("l1")[:, 1, 0], expected, atol=2e-3, rtol=0)


def test_table() -> None:
    model = Brightness()
    sources = {"ours": flat(0.8, 0.2), "none": flat(0.2, 0.2)}
    interpreters = {"first": Echo(model), "one with a long name": Echo(model, 0.25)}
    target = torch.tensor([1, 1])
    found = transfer.matrix(model, interpreters, flat(0.2, 0.2), sources, target)
    assert str(found).splitlines() == [
        "L1 over successes (ASR); row: source, column: target",
        "                     first  one with a long name",
        "ours          0.4000 (50%)          0.2500 (50%)",
        "none              nan (0%)              nan (0%)",
    ]
    assert math.isnan(found.mean()[1, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"interpreters": {}}, "expected at least one source and one target"),
        ({"adversarial": {}}, "expected at least one source and one target"),
        ({"adversarial": {"a": flat(0.5), "b": flat(2.0)}}, r"adversarial\['b'\] in \[0, 1\]"),
        (
            {"adversarial": {"a": flat(0.5), "b": flat(0.5)[..., :1]}},
            r"expected adversarial\['b'\] of shape \(1, 1, 2, 2\), got \(1, 1, 2, 1\)",
        ),
        ({"target": torch.tensor([2])}, r"expected target in \[0, 1\], got"),
        ({"labels": torch.tensor([2])}, r"expected labels in \[0, 1\], got"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_any_map(
    change: dict[str, Any], message: str
) -> None:
    model = Brightness()
    g = Echo(model)
    arguments: dict[str, Any] = {
        "model": model,
        "interpreters": {"echo": g},
        "images": flat(0.2),
        "adversarial": {"a": flat(0.8)},
        "target": torch.tensor([1]),
    }
    with pytest.raises(ValueError, match=message):
        transfer.matrix(**(arguments | change))
    assert not g.asked

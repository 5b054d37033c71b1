# SPDX-License-Identifier: MIT
"""`evaluate`: what is measured on which images, and how it is summed up."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import mixed
from torch import Tensor, nn
from toys import Brightness, Echo, flat

from captum_adv2 import Report, SoundnessWarning, evaluate
from captum_adv2.evaluation import metrics
from captum_adv2.interpreters import CAM, Gradient

TWO = torch.tensor([1, 1])


@pytest.fixture
def report() -> Report:
    zeros = torch.zeros(3, 1, 2, 2)
    return Report(
        success=torch.tensor([True, False, True]),
        confidence=torch.tensor([0.9, 0.0, 0.6]),
        l1=torch.tensor([0.1, 0.8, 0.3]),
        l2=torch.tensor([0.2, 0.8, 0.4]),
        iou=torch.tensor([1.0, 0.0, 0.5]),
        linf=torch.tensor([0.01, 0.05, 0.02]),
        benign_maps=zeros,
        adversarial_maps=zeros,
    )


def test_summary(report: Report) -> None:
    expected = {
        "images": 3,
        "successes": 2,
        "asr": 2 / 3,
        "confidence": 0.5,  # over all images
        "l1": 0.2,  # over the successful ones
        "l2": 0.3,
        "iou": 0.75,
        "linf": 0.05,  # the largest of all
    }
    assert report.summary() == pytest.approx(expected)
    assert list(report.summary()) == list(expected)
    assert str(report) == (
        "ASR 66.7%, confidence 0.500 (3 images); L1 0.2000, L2 0.3000, IoU 0.750 (2 successes)"
    )


def test_summary_without_success(report: Report) -> None:
    failed = report._replace(success=torch.zeros(3, dtype=torch.bool))
    numbers = failed.summary()
    assert (numbers["asr"], numbers["successes"]) == (0, 0)
    assert all(math.isnan(numbers[name]) for name in ("l1", "l2", "iou"))
    assert numbers["confidence"] == pytest.approx(0.5)
    assert "nan (0 successes)" in str(failed)


def test_measures_are_of_the_rounded_images(model: nn.Module, data: Any) -> None:
    images, labels = data
    target = (labels + 1) % 4
    adversarial = (images + 0.2 * (torch.rand(images.shape) - 0.5)).clamp(0, 1)
    report = evaluate(model, CAM(model), images, adversarial, target)
    judged = (adversarial * 255).round() / 255
    cam, logits = CAM(model), model(judged)
    benign, shown = cam(images, model(images).argmax(dim=1)), cam(judged, target)
    assert benign.shape == (6, 1, 8, 8)
    p = logits.softmax(dim=1)[torch.arange(6), target]
    expected = Report(
        success=logits.argmax(dim=1) == target,
        confidence=p,
        l1=(shown - benign).abs().mean(dim=(1, 2, 3)),
        l2=(shown - benign).square().mean(dim=(1, 2, 3)).sqrt(),
        iou=metrics.iou(shown, benign),
        linf=(adversarial - images).abs().amax(dim=(1, 2, 3)),  # before rounding
        benign_maps=benign,
        adversarial_maps=shown,
    )
    torch.testing.assert_close(tuple(report), tuple(expected))
    assert not any(value.requires_grad for value in report)


@pytest.mark.parametrize(("quantize", "value"), [(True, 128 / 255), (False, 0.501)])
def test_rounding_decides(quantize: bool, value: float) -> None:
    model = Brightness(0.5015)  # between 0.501 and 128 / 255, to which it is rounded
    clean, adversarial, target = flat(0.4567), flat(0.501), torch.tensor([1])
    report = evaluate(model, Echo(model), clean, adversarial, target, quantize=quantize)
    assert report.success.item() is quantize
    assert report.adversarial_maps[0, 0, 0, 0].item() == pytest.approx(0.5 * value + 0.1)
    # Clean images are not rounded.
    assert report.benign_maps[0, 0, 0, 0].item() == pytest.approx(0.5 * 0.4567)


@pytest.mark.parametrize(("labels", "asked"), [(None, [0, 1]), (torch.tensor([1, 1]), [1, 1])])
def test_benign_maps_are_for_the_labels_by_default_the_prediction(
    labels: Tensor | None, asked: list[int]
) -> None:
    model = Brightness()
    g, clean, target = Echo(model), flat(0.2, 0.8), torch.tensor([1, 0])
    report = evaluate(model, g, clean, flat(0.8, 0.2), target, labels)
    assert report.success.all()
    assert g.asked == [asked, [1, 0]]


@pytest.mark.filterwarnings("ignore:the model's logits are NaN")
def test_logits_that_are_not_numbers_are_no_success() -> None:
    class Broken(Brightness):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.where(x > 0.7, torch.nan, 1.0).mean(dim=(2, 3))

    model = Broken()
    report = evaluate(model, Echo(model), flat(0.1, 0.1), flat(0.2, 0.8), torch.tensor([0, 0]))
    assert report.success.tolist() == [True, False]
    grad = evaluate(model, Gradient(model, pool=1), flat(0.1, 0.1), flat(0.2, 0.8), 0 * TWO)
    for values in (grad.l1, grad.l2, grad.iou, grad.confidence):  # its map is NaN, too
        assert values.isnan().tolist() == [False, True]
    assert not any(math.isnan(value) for name, value in grad.summary().items() if len(name) < 4)


@pytest.mark.parametrize("wrap", [lambda net: net, nn.Sequential])
def test_an_interpreter_of_another_model_is_refused(wrap: Any) -> None:
    model, other = wrap(Brightness()), Brightness()
    for theirs in (other, *model.children()):
        got = "a part of it, a" if theirs is not other else "another"
        g = Echo(theirs)
        with pytest.raises(ValueError, match=f"built on the evaluated model, got .* {got} Bright"):
            evaluate(model, g, flat(0.1), flat(0.2), torch.tensor([0]))
        assert not g.asked


def test_probabilities_are_no_logits() -> None:
    model = nn.Sequential(Brightness(), nn.Softmax(dim=1))
    with pytest.warns(SoundnessWarning, match="expected logits, got .*: probabilities"):
        evaluate(model, Echo(model), flat(0.1, 0.2), flat(0.2, 0.8), 0 * TWO)


def test_benign_maps_of_another_shape_are_refused() -> None:
    model = Brightness()
    maps = torch.zeros(1, 1, 2, 1)
    with pytest.raises(ValueError, match=r"benign_maps of shape \(1, 1, 2, 2\), got"):
        evaluate(model, Echo(model), flat(0.1), flat(0.2), TWO[:1], benign_maps=maps)


def test_model_is_in_eval_mode_and_left_as_it_was(model: nn.Module, data: Any) -> None:
    images, labels = data
    clone = mixed(model)
    modes = [module.training for module in clone.modules()]
    ours = evaluate(clone, CAM(clone), images, images, labels)
    theirs = evaluate(model, CAM(model), images, images, labels)
    torch.testing.assert_close(tuple(ours), tuple(theirs))
    assert [module.training for module in clone.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(clone.buffers(), model.buffers(), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"adversarial": flat(0.5)[..., :1]},
            r"expected adversarial of shape \(1, 1, 2, 2\), got \(1, 1, 2, 1\)",
        ),
        ({"target": torch.tensor([2])}, r"expected target in \[0, 1\], got"),
        ({"target": torch.tensor([0, 1])}, r"expected target of shape \(1,\)"),
        ({"labels": torch.tensor([-1])}, r"expected labels in \[0, 1\]"),
        ({"labels": torch.tensor([0, 0])}, r"expected labels of shape \(1,\)"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_any_map(
    change: dict[str, Any], message: str
) -> None:
    model = Brightness()
    g = Echo(model)
    arguments: dict[str, Any] = {
        "model": model,
        "interpreter": g,
        "images": flat(0.2),
        "adversarial": flat(0.8),
        "target": torch.tensor([1]),
    }
    with pytest.raises(ValueError, match=message):
        evaluate(**(arguments | change))
    assert not g.asked

# SPDX-License-Identifier: MIT
"""`evaluate`: what is measured on which images, and how it is summed up."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_adv2 import Report, evaluate
from captum_adv2.evaluation import metrics
from captum_adv2.interpreters import CAM, Gradient, Interpreter
from captum_adv2.types import Explanation


class Brightness(nn.Module):
    """Class 1 where the image is brighter than a threshold."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        score = 100 * (x.mean(dim=(1, 2, 3)) - self.threshold)
        return torch.stack([-score, score], dim=1)


class Echo(Interpreter):
    """The image's first channel, plus a tenth of the class: shows what it was asked."""

    def explain(self, images: Tensor, target: Tensor) -> Explanation:
        return Explanation(0.5 * images[:, :1] + 0.1 * target.view(-1, 1, 1, 1), None)


def flat(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()


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


class TestSummary:
    def test_protocol(self, report: Report) -> None:
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

    def test_no_success(self, report: Report) -> None:
        numbers = report._replace(success=torch.zeros(3, dtype=torch.bool)).summary()
        assert numbers["asr"] == 0
        assert numbers["successes"] == 0
        assert all(math.isnan(numbers[name]) for name in ("l1", "l2", "iou"))
        assert numbers["confidence"] == pytest.approx(0.5)

    def test_text(self, report: Report) -> None:
        assert str(report) == (
            "ASR 66.7%, confidence 0.500 (3 images); L1 0.2000, L2 0.3000, IoU 0.750 (2 successes)"
        )
        assert "nan (0 successes)" in str(report._replace(success=report.success & False))


class TestEvaluate:
    def test_shapes_and_measures(self, model: nn.Module, data: Any) -> None:
        images, labels = data
        target = (labels + 1) % 4
        noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) - 0.5
        adversarial = (images + 0.2 * noise).clamp(0, 1)
        report = evaluate(model, CAM(model), images, adversarial, target)
        for name in ("success", "confidence", "l1", "l2", "iou", "linf"):
            assert getattr(report, name).shape == (6,)
        assert report.benign_maps.shape == report.adversarial_maps.shape == (6, 1, 8, 8)
        judged = (adversarial * 255).round() / 255
        cam, logits = CAM(model), model(judged)
        benign, shown = cam(images, model(images).argmax(dim=1)), cam(judged, target)
        assert torch.equal(report.benign_maps, benign)
        assert torch.equal(report.adversarial_maps, shown)
        assert torch.equal(report.success, logits.argmax(dim=1) == target)
        torch.testing.assert_close(
            report.confidence, logits.softmax(dim=1)[torch.arange(6), target], atol=1e-6, rtol=0
        )
        for name in ("l1", "l2", "iou"):
            measure = getattr(metrics, name)
            torch.testing.assert_close(getattr(report, name), measure(shown, benign))
        expected = (adversarial - images).abs().flatten(1).max(dim=1).values
        assert torch.equal(report.linf, expected)  # before rounding
        assert not any(value.requires_grad for value in report)

    def test_nothing_changed(self, model: nn.Module, data: Any) -> None:
        images, labels = data
        report = evaluate(model, Gradient(model), images, images, labels)
        assert not report.l1.any()
        assert not report.linf.any()
        assert (report.iou == 1).all()
        assert report.summary()["asr"] == 1  # the network is trained, the targets are its classes

    def test_rounding_decides(self) -> None:
        # 0.501 rounds to 128/255 = 0.50196: beyond the threshold only after rounding.
        model = Brightness(0.5015)
        clean, adversarial, target = flat(0.4), flat(0.501), torch.tensor([1])
        assert evaluate(model, Echo(model), clean, adversarial, target).success.item()
        raw = evaluate(model, Echo(model), clean, adversarial, target, quantize=False)
        assert not raw.success.item()
        assert raw.adversarial_maps[0, 0, 0, 0].item() == pytest.approx(0.5 * 0.501 + 0.1)
        rounded = evaluate(model, Echo(model), clean, adversarial, target).adversarial_maps
        assert rounded[0, 0, 0, 0].item() == pytest.approx(0.5 * 128 / 255 + 0.1)

    def test_clean_images_are_not_rounded(self) -> None:
        model = Brightness(0.5)
        report = evaluate(model, Echo(model), flat(0.4567), flat(0.4567), torch.tensor([0]))
        assert report.benign_maps[0, 0, 0, 0].item() == pytest.approx(0.5 * 0.4567)

    def test_labels_default_to_the_models_prediction_on_the_clean_images(self) -> None:
        model = Brightness(0.5)
        clean, adversarial = flat(0.2, 0.8), flat(0.8, 0.2)
        report = evaluate(model, Echo(model), clean, adversarial, torch.tensor([1, 0]))
        assert report.success.all()
        expected = torch.tensor([0.1 + 0.0, 0.4 + 0.1]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
        torch.testing.assert_close(report.benign_maps, expected)

    def test_labels_given(self) -> None:
        model = Brightness(0.5)
        labels = torch.tensor([1])
        report = evaluate(model, Echo(model), flat(0.2), flat(0.8), torch.tensor([1]), labels)
        assert report.benign_maps[0, 0, 0, 0].item() == pytest.approx(0.1 + 0.1)
        assert report.adversarial_maps[0, 0, 0, 0].item() == pytest.approx(0.4 + 0.1, abs=1e-3)

    def test_success_is_reaching_the_target_not_leaving_the_label(self) -> None:
        model = Brightness(0.5)
        report = evaluate(model, Echo(model), flat(0.2, 0.2), flat(0.8, 0.8), torch.tensor([0, 1]))
        assert report.success.tolist() == [False, True]

    def test_model_in_train_mode(self, model: nn.Module, data: Any) -> None:
        images, labels = data
        clone = copy.deepcopy(model).train()
        clone.norm.eval()
        ours = evaluate(clone, CAM(clone), images, images, labels)
        theirs = evaluate(model, CAM(model), images, images, labels)
        assert torch.equal(ours.confidence, theirs.confidence)
        assert torch.equal(ours.benign_maps, theirs.benign_maps)
        assert clone.training
        assert clone.dropout.training
        assert not clone.norm.training
        assert all(torch.equal(a, b) for a, b in zip(clone.buffers(), model.buffers(), strict=True))


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"model": None}, TypeError, "expected model to be a torch"),
            ({"images": flat(2.0)}, ValueError, r"expected images in \[0, 1\]"),
            ({"adversarial": flat(2.0)}, ValueError, r"expected adversarial in \[0, 1\]"),
            ({"adversarial": flat(0.5).byte()}, TypeError, "expected adversarial of a floating"),
            (
                {"adversarial": flat(0.5)[..., :1]},
                ValueError,
                r"expected adversarial of shape \(1, 1, 2, 2\), got \(1, 1, 2, 1\)",
            ),
            ({"target": torch.tensor([2])}, ValueError, r"expected target in \[0, 1\], got"),
            ({"target": torch.tensor([0, 1])}, ValueError, r"expected target of shape \(1,\)"),
            ({"target": torch.tensor([0.0])}, TypeError, "expected target of an integer dtype"),
            ({"labels": torch.tensor([0.0])}, TypeError, "of an integer dtype"),
            ({"labels": torch.tensor([0, 0])}, ValueError, r"of shape \(1,\)"),
            ({"labels": torch.tensor([-1])}, ValueError, "got values in"),
        ],
    )
    def test_is_named(self, change: dict[str, Any], error: type[Exception], message: str) -> None:
        model = Brightness(0.5)
        arguments: dict[str, Any] = {
            "model": model,
            "interpreter": Echo(model),
            "images": flat(0.2),
            "adversarial": flat(0.8),
            "target": torch.tensor([1]),
        }
        with pytest.raises(error, match=message):
            evaluate(**(arguments | change))

# SPDX-License-Identifier: MIT
"""The transfer matrix: every cell is `evaluate`'s, and clean images are explained once."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torchattacks
from conftest import TinyNet, blobs, train
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from captum_adv2 import ADV2, evaluate
from captum_adv2.evaluation import metrics, transfer
from captum_adv2.interpreters import CAM, MASK, Gradient, Interpreter
from captum_adv2.types import Explanation


class Echo(Interpreter):
    """The image's first channel, plus a tenth of the class; notes what it explains."""

    def __init__(self, model, gain=0.5):
        super().__init__(model)
        self.gain, self.seen = gain, []

    def explain(self, images, target):
        self.seen.append((images, target))
        return Explanation(self.gain * images[:, :1] + 0.1 * target.view(-1, 1, 1, 1), None)


class Brightness(nn.Module):
    """Class 1 where the image is brighter than a threshold."""

    def __init__(self, threshold=0.5):
        super().__init__()
        self.threshold = threshold

    def forward(self, x):
        score = 100 * (x.mean(dim=(1, 2, 3)) - self.threshold)
        return torch.stack([-score, score], dim=1)


def flat(*values):
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()


@pytest.fixture(scope="module")
def other():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return train(TinyNet(width=6))


MEASURES = ("success", "confidence", "l1", "l2", "iou", "linf")


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("labelled", [True, False])
def test_every_cell_is_evaluates(model, data, quantize, labelled):
    images, labels = data
    target = (labels + 1) % 4
    noise = torch.rand(3, *images.shape) - 0.5
    adversarial = {f"noise {i}": (images + 0.3 * n).clamp(0, 1) for i, n in enumerate(noise)}
    interpreters = {"CAM": CAM(model), "GRAD": Gradient(model)}
    own = (labels + 2) % 4 if labelled else None
    found = transfer.matrix(model, interpreters, images, adversarial, target, own, quantize)
    assert found.sources == ("noise 0", "noise 1", "noise 2")
    assert found.targets == ("CAM", "GRAD")
    assert found.l1.shape == found.success.shape == (3, 2, 6)
    for row, given_ in enumerate(adversarial.values()):
        for column, g in enumerate(interpreters.values()):
            expected = evaluate(model, g, images, given_, target, own, quantize)
            report = found.reports[row][column]
            for name in report._fields:
                assert torch.equal(getattr(report, name), getattr(expected, name))
            for name in MEASURES:
                assert torch.equal(found.each(name)[row, column], getattr(expected, name))
            for name in ("asr", "confidence", "l1", "l2", "iou", "linf"):
                mean, summary = found.mean(name)[row, column].item(), expected.summary()[name]
                assert mean == summary or (math.isnan(mean) and math.isnan(summary))
    assert torch.equal(found.l1, found.each("l1"))
    assert torch.equal(found.success, found.each("success"))
    assert not found.l1.requires_grad


@given(rows=st.integers(1, 3), columns=st.integers(1, 3), seed=st.integers(0, 99))
def test_distances_against_arithmetic(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    model = Brightness(0.4993)  # no mean of four 8-bit pixels
    clean = torch.rand(4, 1, 2, 2, generator=generator)
    sources = {str(i): torch.rand(4, 1, 2, 2, generator=generator) for i in range(rows)}
    gains = [0.2 + 0.2 * i for i in range(columns)]
    target = torch.ones(4, dtype=torch.long)
    interpreters = {str(gain): Echo(model, gain) for gain in gains}
    found = transfer.matrix(model, interpreters, clean, sources, target)
    own = (clean.mean(dim=(1, 2, 3)) > 0.4993).double().view(-1, 1, 1, 1)
    for row, source in enumerate(sources.values()):
        judged = (source * 255).round().double() / 255
        fooled = judged.mean(dim=(1, 2, 3)) > 0.4993
        for column, gain in enumerate(gains):
            expected = (gain * (judged - clean) + 0.1 * (1 - own)).abs().mean(dim=(1, 2, 3))
            torch.testing.assert_close(found.l1[row, column].double(), expected, atol=1e-6, rtol=0)
            assert torch.equal(found.success[row, column], fooled)
            mean = found.mean()[row, column].item()
            if fooled.any():
                assert mean == pytest.approx(expected[fooled].mean().item(), abs=1e-6)
            else:
                assert math.isnan(mean)
            assert found.mean("asr")[row, column] == fooled.double().mean()


def test_clean_images_are_explained_once_a_column():
    model, clean = Brightness(), flat(0.2, 0.3)
    interpreters = {"a": Echo(model), "b": Echo(model)}
    # A source of the clean images themselves is a source as any other.
    sources = {"x": flat(0.8, 0.9), "none": clean, "y": flat(0.7, 0.6)}
    for quantize in (True, False):
        for g in interpreters.values():
            g.seen.clear()
        target = torch.tensor([1, 1])
        found = transfer.matrix(model, interpreters, clean, sources, target, quantize=quantize)
        for g in interpreters.values():
            assert [target.tolist() for _, target in g.seen].count([0, 0]) == 1
            assert len(g.seen) == 1 + len(sources)
        expected = torch.tensor([0.4, 0.1, 0.35])
        torch.testing.assert_close(found.l1[:, 1, 0], expected, atol=2e-3, rtol=0)


def test_passes_of_mask(trained, data):
    model, count = copy.deepcopy(trained), []
    images, labels = data
    model.register_forward_hook(lambda *_: count.append(1))
    sources = dict.fromkeys("abcd", images)
    mask = {"MASK": MASK(model, size=4, iterations=50, jitter=0)}
    transfer.matrix(model, mask, images, sources, labels)
    assert len(count) <= 5 * 50 + 3 * len(sources)


def test_table():
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


def test_adversarial_images_are_best_where_they_were_made(model):
    images, labels = blobs(8, seed=42)
    target = (labels + 1) % 4
    interpreters = {"CAM": CAM(model), "GRAD": Gradient(model)}
    arguments = {"eps": 0.2, "alpha": 0.02, "steps": 40}

    def craft(attack):
        attack.set_mode_targeted_by_label(quiet=True)
        return attack(images, target)

    sources = {name: craft(ADV2(model, g, **arguments)) for name, g in interpreters.items()}
    sources["PGD"] = craft(torchattacks.PGD(model, **arguments, random_start=False))
    found = transfer.matrix(model, interpreters, images, sources, target)
    assert (found.mean("asr") == 1).all()
    means = found.mean()
    for column in range(2):
        assert means[:, column].argmin() == column
        assert means[column, column] < 0.5 * means[2, column]  # PGD's


def test_across_classifiers(model, other):
    images, labels = blobs(8, seed=42)
    target = (labels + 1) % 4
    attack = ADV2(model, CAM, eps=0.2, alpha=0.02, steps=30)
    attack.set_mode_targeted_by_label(quiet=True)
    adversarial = attack(images, target)
    models = {"own": model, "other": other}
    found = transfer.across(models, CAM, images, {"CAM": adversarial}, target)
    assert found.sources == ("CAM",)
    assert found.targets == ("own", "other")
    for column, net in enumerate(models.values()):
        expected = evaluate(net, CAM(net), images, adversarial, target)
        assert torch.equal(found.l1[0, column], expected.l1)
        assert torch.equal(found.success[0, column], expected.success)
    assert found.mean("asr")[0, 0] == 1
    assert found.mean("confidence")[0, 1] < found.mean("confidence")[0, 0]
    # Each model's benign map explains what it says itself.
    wrong = TinyNet().eval()
    (report,) = transfer.across({"": wrong}, CAM, images, {"": adversarial}, target).reports[0]
    assert torch.equal(report.benign_maps, CAM(wrong)(images, wrong(images).argmax(dim=1)))
    assert torch.equal(report.l1, metrics.l1(report.adversarial_maps, report.benign_maps))


def test_models_are_left_as_they_were(trained, data):
    images, labels = data
    model = copy.deepcopy(trained).train()
    model.norm.eval()
    modes = [module.training for module in model.modules()]
    found = transfer.matrix(model, {"": CAM(model)}, images, {"": images}, labels)
    again = transfer.across({"": model}, CAM, images, {"": images}, labels)
    assert torch.equal(found.l1, again.l1)
    assert not found.l1.any()
    handle = model.fc.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        transfer.matrix(model, {"": CAM(model)}, images, {"": images}, labels)
    handle.remove()
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), trained.buffers(), strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": None}, TypeError, "expected model to be a torch"),
        ({"interpreters": {}}, ValueError, "expected at least one entry in interpreters, got none"),
        ({"interpreters": [1]}, TypeError, "expected interpreters to be a mapping, got list; pass"),
        (
            {"interpreters": {"CAM": CAM}},
            TypeError,
            r"expected interpreters\['CAM'\] to be an Interpreter, got ABCMeta; build it on the m",
        ),
        ({"images": flat(2.0)}, ValueError, r"expected images in \[0, 1\]"),
        ({"adversarial": {}}, ValueError, "expected at least one entry in adversarial, got none"),
        ({"adversarial": flat(0.5)}, TypeError, "expected adversarial to be a mapping, got Tensor"),
        (
            {"adversarial": {"a": flat(0.5), "b": flat(2.0)}},
            ValueError,
            r"expected adversarial\['b'\] in \[0, 1\]",
        ),
        (
            {"adversarial": {"a": flat(0.5), "b": flat(0.5)[..., :1]}},
            ValueError,
            r"expected adversarial\['b'\] of shape \(1, 1, 2, 2\), got \(1, 1, 2, 1\)",
        ),
        ({"adversarial": {"a": None}}, TypeError, r"adversarial\['a'\] to be a torch.Tensor"),
        ({"target": torch.tensor([2])}, ValueError, r"expected target in \[0, 1\], got"),
        ({"target": torch.tensor([0, 1])}, ValueError, r"expected target of shape \(1,\)"),
        ({"labels": torch.tensor([0.0])}, TypeError, "of an integer dtype"),
    ],
)
def test_bad_input_is_told_before_any_map(change, error, message):
    model = Brightness()
    g = Echo(model)
    arguments = {
        "model": model,
        "interpreters": {"echo": g},
        "images": flat(0.2),
        "adversarial": {"a": flat(0.8)},
        "target": torch.tensor([1]),
    }
    with pytest.raises(error, match=message):
        transfer.matrix(**(arguments | change))
    assert not g.seen


@pytest.mark.parametrize(
    ("models", "build", "error", "message"),
    [
        ({}, Echo, ValueError, "expected at least one entry in models, got none"),
        ([Brightness()], Echo, TypeError, "expected models to be a mapping, got list"),
        ({"a": 1}, Echo, TypeError, "expected model to be a torch"),
        (
            {"a": Brightness()},
            lambda model: 1,
            TypeError,
            "what build returns to be an Interpreter",
        ),
    ],
)
def test_bad_input_across_classifiers(models, build, error, message):
    with pytest.raises(error, match=message):
        transfer.across(models, build, flat(0.2), {"a": flat(0.8)}, torch.tensor([1]))

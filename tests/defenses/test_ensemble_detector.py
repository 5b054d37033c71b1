# SPDX-License-Identifier: MIT
"""The detector by disagreement: scores for the predicted class, thresholds from benign images."""

from __future__ import annotations

import copy
import pickle

import captum.attr
import pytest
import torch
import torchattacks
from conftest import blobs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from captum_adv2.defenses import Detector, EnsembleDetector
from captum_adv2.interpreters import CAM, Ensemble, Gradient, Interpreter
from captum_adv2.study.embedded.models import load_resnet
from captum_adv2.study.embedded.shapes import make_shapes
from captum_adv2.types import Explanation


@pytest.fixture
def detector(model):
    return EnsembleDetector(Ensemble([CAM(model), Gradient(model)]))


class Brightness(nn.Module):
    """Class 1 where the image is bright."""

    def forward(self, x):
        score = x.mean(dim=(1, 2, 3)) - 0.5
        return torch.stack([-score, score], dim=1)


class Ramp(Interpreter):
    """A ramp to the right; to the left for class 1 if ``turns``. Notes the classes asked for."""

    def __init__(self, model, turns):
        super().__init__(model)
        self.turns, self.asked = turns, []

    def explain(self, images, target):
        self.asked.append(target.tolist())
        maps = torch.linspace(0, 1, 5).expand(len(images), 1, 5, 5)
        turned = (target == 1).view(-1, 1, 1, 1) & self.turns
        return Explanation(torch.where(turned, 1 - maps, maps), None)


@given(bright=st.lists(st.booleans(), min_size=1, max_size=6))
def test_scores_are_the_disagreement_on_the_predicted_class(bright):
    model = Brightness()
    members = [Ramp(model, turns=False), Ramp(model, turns=True)]
    ensemble = Ensemble(members)
    images = torch.tensor([0.9 if b else 0.1 for b in bright]).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    scores = EnsembleDetector(ensemble).scores(images)
    assert scores.shape == (len(bright), 1)
    # |r - (1 - r)| on the ramp 0, 1/4, ..., 1 is 1, 1/2, 0, 1/2, 1.
    torch.testing.assert_close(scores[:, 0], torch.tensor([0.6 if b else 0.0 for b in bright]))
    assert members[0].asked == members[1].asked == [[int(b) for b in bright]]


def test_scores_are_the_ensembles(detector, model, data):
    images, _ = data
    expected = detector.ensemble.disagreement(images, model(images).argmax(dim=1))
    assert torch.equal(detector.score(images), expected)
    assert torch.equal(detector.scores(images), expected[:, None])
    assert not detector.score(images.clone().requires_grad_()).requires_grad
    assert ((expected >= 0) & (expected <= 1)).all()
    assert isinstance(detector, Detector)


@settings(max_examples=10)
@given(rate=st.sampled_from([0.0, 0.05, 0.1, 0.5]), seed=st.integers(0, 99))
def test_the_threshold_keeps_the_false_positive_rate(trained, rate, seed):
    detector = EnsembleDetector(Ensemble([CAM(trained), Gradient(trained)]))
    benign = blobs(40, seed)[0]
    assert detector.fit(benign, rate=rate, batch=40) is detector
    flagged = detector.detect(benign)
    assert flagged.sum() <= rate * 40
    assert torch.equal(flagged, detector.score(benign) > detector.threshold)
    # In the same batch, or rounding decides at the threshold itself.
    assert flagged.sum() >= rate * 40 - 1


def test_an_image_by_itself_has_the_score_it_has_in_a_batch(detector, data):
    images, _ = data
    singles = torch.cat([detector.score(image[None]) for image in images])
    torch.testing.assert_close(detector.score(images), singles, rtol=0, atol=1e-5)


def test_a_regular_attack_makes_interpreters_disagree():
    # Not on every network: on the tiny one of the other tests they agree more than before.
    model = load_resnet()
    benign, images = make_shapes(32, seed=1)[0], make_shapes(32, seed=2)
    attack = torchattacks.PGD(model, steps=20, random_start=False)
    attack.set_mode_targeted_by_label(quiet=True)
    adversarial = attack(images[0], (images[1] + 1) % 10)
    detector = EnsembleDetector(Ensemble([CAM(model), Gradient(model)]))
    assert detector.roc(benign, adversarial).auc > 0.7
    assert detector.roc(benign, images[0]).auc == pytest.approx(0.5, abs=0.15)
    assert detector.fit(benign).detect(adversarial).double().mean() > 0.1


def test_the_model_is_left_as_it_was(trained, data):
    images, _ = data
    model = copy.deepcopy(trained).train()
    model.norm.eval()
    modes = [module.training for module in model.modules()]
    detector = EnsembleDetector(Ensemble([CAM(model), Gradient(model)]))
    expected = EnsembleDetector(Ensemble([CAM(trained), Gradient(trained)])).score(images)
    assert torch.equal(detector.score(images), expected)
    assert [module.training for module in model.modules()] == modes
    model.fc.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        detector.score(images)
    assert [module.training for module in model.modules()] == modes


def test_under_normalisation_it_asks_what_the_model_sees(model, data):
    images, _ = data
    ensemble = Ensemble([CAM(model), Gradient(model)])
    seen = EnsembleDetector(ensemble.after(lambda x: 1 - x)).score(images)
    torch.testing.assert_close(seen, EnsembleDetector(ensemble).score(1 - images))


def test_copies_and_text(detector, data):
    assert repr(detector) == "EnsembleDetector(Ensemble(CAM(TinyNet), Gradient(TinyNet)))"
    detector.fit(data[0])
    for twin in (copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))):
        assert twin.threshold == detector.threshold
        assert torch.equal(twin.score(data[0]), detector.score(data[0]))


def test_bad_input(detector, model, data):
    with pytest.raises(TypeError, match=r"expected an Ensemble, got CAM; build one: Ensemble\("):
        EnsembleDetector(CAM(model))
    saliency = CaptumInterpreter(captum.attr.Saliency(lambda x: model(x)))
    with pytest.raises(TypeError, match="expected an ensemble with a model, got one of interpret"):
        EnsembleDetector(Ensemble([saliency, saliency]))
    with pytest.raises(ValueError, match=r"expected images in \[0, 1\]"):
        detector.score(data[0] * 255)
    with pytest.raises(ValueError, match="expected a fitted EnsembleDetector"):
        detector.detect(data[0])

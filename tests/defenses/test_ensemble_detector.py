# SPDX-License-Identifier: MIT
"""The detector by disagreement: scores for the predicted class, thresholds from benign images."""

from __future__ import annotations

import pytest
import torch
import torchattacks
from conftest import mixed
from hypothesis import given
from hypothesis import strategies as st
from kinds import Around
from torch import Tensor, nn

from captum_adv2.defenses import EnsembleDetector
from captum_adv2.interpreters import CAM, Ensemble, Explanation, Gradient, Interpreter
from captum_adv2.study.embedded import load_resnet, make_shapes


def build(model: nn.Module) -> EnsembleDetector:
    return EnsembleDetector(Ensemble([CAM(model), Gradient(model)]))


def brightness(net: None, x: Tensor) -> Tensor:
    """Return logits of class 1 where the image is bright."""
    score = x.mean(dim=(1, 2, 3)) - 0.5
    return torch.stack([-score, score], dim=1)


class Ramp(Interpreter):
    """A ramp to the right; to the left for class 1 if ``turns``."""

    def __init__(self, model: nn.Module | None, turns: bool) -> None:
        super().__init__(model)
        self.turns = turns

    def explain(self, images: Tensor, target: Tensor) -> Explanation:
        maps = torch.linspace(0, 1, 5).expand(len(images), 1, 5, 5)
        turned = (target == 1).view(-1, 1, 1, 1) & self.turns
        return Explanation(torch.where(turned, 1 - maps, maps), None)


@given(bright=st.lists(st.booleans(), min_size=1, max_size=6))
def test_scores_are_the_disagreement_on_the_predicted_class(bright: list[bool]) -> None:
    model = Around(None, brightness)
    ensemble = Ensemble([Ramp(model, turns=False), Ramp(model, turns=True)])
    images = torch.tensor([0.9 if b else 0.1 for b in bright]).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    scores = EnsembleDetector(ensemble).scores(images)
    assert scores.shape == (len(bright), 1)
    # |r - (1 - r)| on the ramp 0, 1/4, ..., 1 is 1, 1/2, 0, 1/2, 1.
    torch.testing.assert_close(scores[:, 0], torch.tensor([0.6 if b else 0.0 for b in bright]))


def test_scores_are_the_ensembles(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    images, detector = data[0], build(model)
    expected = detector.ensemble.disagreement(images, model(images).argmax(dim=1))
    torch.testing.assert_close(detector.score(images), expected)
    singles = torch.cat([detector.score(image[None]) for image in images])
    torch.testing.assert_close(singles, expected, rtol=0, atol=1e-5)
    assert not detector.score(images.clone().requires_grad_()).requires_grad


def test_a_regular_attack_makes_interpreters_disagree() -> None:
    # Not on every network: on the tiny one of the other tests they agree more than before.
    model = load_resnet()
    images, labels = make_shapes(32, seed=2)[:2]
    attack = torchattacks.PGD(model, steps=10, random_start=False)
    attack.set_mode_targeted_by_label(quiet=True)
    curve = build(model).roc(images, attack(images, (labels + 1) % 10))
    assert curve.auc > 0.6


def test_the_model_is_in_eval_mode_and_left_as_it_was(
    trained: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    model = mixed(trained)
    modes = [module.training for module in model.modules()]
    torch.testing.assert_close(build(model).score(data[0]), build(trained).score(data[0]))
    assert [module.training for module in model.modules()] == modes


def test_under_normalisation_the_model_sees_the_same(
    model: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    detector = build(model)
    seen = EnsembleDetector(detector.ensemble.after(lambda x: 1 - x)).score(data[0])
    torch.testing.assert_close(seen, detector.score(1 - data[0]))


def test_an_ensemble_must_know_its_model(model: nn.Module) -> None:
    ramp = Ramp(None, turns=False)
    with pytest.raises(TypeError, match="expected an ensemble with a model, got one of interpret"):
        EnsembleDetector(Ensemble([ramp, ramp]))
    assert repr(build(model)) == "EnsembleDetector(Ensemble(CAM(TinyNet), Gradient(TinyNet)))"

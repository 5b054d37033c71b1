# SPDX-License-Identifier: MIT
"""The attack on real networks and pictures: SqueezeNet on ImageNet, ResNet-20 on CIFAR-10."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from benchmark.real import Case, load_case
from torch import nn
from torchattacks import PGD

from captum_adv2 import ADV2, Report, evaluate
from captum_adv2.evaluation import metrics
from captum_adv2.interpreters import (
    CAM,
    MASK,
    RTS,
    GradCAM,
    Gradient,
    Interpreter,
    MaskingModel,
)

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.real


def attacked(case: Case, attack: PGD | ADV2, interpreter: Interpreter) -> Report:
    attack.set_mode_targeted_by_label(quiet=True)
    adversarial = attack(case.images, case.targets)
    return evaluate(case.model, interpreter, case.images, adversarial, case.targets)


# Bounds are about twice what the benchmark reaches with more pictures and steps.
@pytest.mark.parametrize(
    ("name", "build", "count", "steps", "share", "iou"),
    [
        ("resnet20", CAM, 8, 60, 0.10, 0.9),
        ("resnet20", GradCAM, 8, 60, 0.10, 0.9),
        ("resnet20", Gradient, 8, 60, 0.40, 0.3),
        pytest.param("resnet20", MASK.small, 4, 100, 0.90, 0.2, marks=pytest.mark.slow),
        ("squeezenet", CAM, 1, 30, 0.20, 0.6),
        ("squeezenet", Gradient, 1, 40, 0.70, 0.0),
    ],
)
def test_it_fools_real_networks_and_their_maps(
    name: str,
    build: Callable[[nn.Module], Interpreter],
    count: int,
    steps: int,
    share: float,
    iou: float,
) -> None:
    case = load_case(name, count)
    interpreter = build(case.model)
    pgd = attacked(case, PGD(case.model, steps=steps, random_start=False), interpreter).summary()
    adv2 = attacked(case, ADV2(case.model, interpreter, steps=steps), interpreter).summary()
    assert adv2["asr"] == 1
    assert adv2["confidence"] > 0.9
    assert adv2["l1"] < share * pgd["l1"]
    assert adv2["iou"] > max(iou, pgd["iou"])
    assert adv2["linf"] <= 8 / 255 + 1e-6


@pytest.fixture(scope="module")
def masking_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train RTS and RTS^A for ResNet-20 from real pictures: 14 minutes of one core."""
    out = tmp_path_factory.mktemp("models")
    command = [sys.executable, str(ROOT / "examples" / "train_rts.py"), "cifar10", "--quiet"]
    subprocess.run(
        [*command, "--out", str(out)], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    return out


@pytest.mark.slow
def test_rts_and_its_hardened_twin_on_photographs(masking_models: Path) -> None:
    case = load_case("resnet20", 100)
    plain, hardened = (
        MaskingModel.load(masking_models / f"rts-cifar10{kind}.pt", case.model)
        for kind in ("", "-aid")
    )
    reports = [
        attacked(case, ADV2(case.model, rts), rts).summary()
        for rts in (RTS(case.model, plain), RTS(case.model, hardened))
    ]
    assert all(report["asr"] >= 0.99 for report in reports)
    assert reports[0]["l1"] <= 0.02
    assert reports[0]["iou"] >= 0.9
    assert reports[1]["l1"] > reports[0]["l1"]
    maps = [masking_model(case.images, case.labels) for masking_model in (plain, hardened)]
    assert metrics.l1(*maps).mean() <= 0.05


def test_the_pictures_are_what_their_notes_say() -> None:
    case = load_case("squeezenet", 3)
    assert case.images.shape == (3, 3, 224, 224)
    assert CAM(case.model)(case.images, case.labels).shape == (3, 1, 13, 13)
    assert Gradient(case.model)(case.images[:1], case.labels[:1]).shape == (1, 1, 56, 56)
    with torch.no_grad():
        assert torch.equal(case.model(case.images).argmax(dim=1), case.labels)

# SPDX-License-Identifier: MIT
"""Every script of examples/ runs, in its smallest form, on a machine without internet."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from embedded.models import load_densenet, load_resnet
from embedded.shapes import CLASSES, make_shapes

ROOT = Path(__file__).parents[1]


def run(script: str, *args: str, cwd: Path) -> str:
    paths = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *args],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_quickstart(tmp_path: Path) -> None:
    table = run("quickstart.py", "--smoke", "--quiet", cwd=tmp_path)
    for word in ("small ResNet", "small DenseNet", "CAM", "GradCAM", "GRAD", "MASK", "PGD", "ADV2"):
        assert word in table
    assert (tmp_path / "quickstart.png").read_bytes().startswith(b"\x89PNG")


def test_quickstart_on_a_folder_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="expected pictures"):
        run("quickstart.py", "--weights", "imagenet", "--images", ".", cwd=tmp_path)
    with pytest.raises(AssertionError, match="needs --images FOLDER"):
        run("quickstart.py", "--weights", "imagenet", cwd=tmp_path)


def test_manual(tmp_path: Path) -> None:
    assert "L1" in run("cam_manual.py", "--smoke", cwd=tmp_path)


def test_training(tmp_path: Path) -> None:
    run("embedded/train.py", "--smoke", cwd=tmp_path)


@pytest.mark.real
def test_figures(tmp_path: Path) -> None:
    table = run("benchmark/figures.py", "--smoke", "short", "cost", cwd=tmp_path)
    assert "ADV2 on CAM" in table
    assert "forwards" in table


def test_mask_figures(tmp_path: Path) -> None:
    cases = ("embedded", "paper", "variants", "quality", "settings")
    table = run("benchmark/mask.py", "--smoke", *cases, cwd=tmp_path)
    for word in (
        "ADV2 on MASK",
        "paper's, 100 steps",
        "value gap",
        "mass inside the object",
        "a change by 1/255",
    ):
        assert word in table
    for picture in ("mask-embedded.png", "mask-variants.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("load", [load_resnet, load_densenet])
def test_embedded_models_know_the_shapes(load) -> None:
    pictures = make_shapes(200, seed=123_456)
    model = load()
    assert not model.training
    with torch.no_grad():
        right = model(pictures.images).argmax(dim=1) == pictures.labels
    assert right.float().mean() > 0.93


def test_embedded_pictures() -> None:
    first, again = make_shapes(20, seed=3), make_shapes(20, seed=3)
    assert torch.equal(first.images, again.images)
    assert first.images.shape == (20, 3, 64, 64)
    assert torch.equal((first.images * 255).round() / 255, first.images)
    assert sorted(first.labels.tolist()) == sorted([*range(len(CLASSES))] * 2)
    for mask, (left, top, right, bottom) in zip(first.masks[:, 0], first.boxes, strict=True):
        rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
        assert (columns.min(), columns.max() + 1) == (left, right)
        assert (rows.min(), rows.max() + 1) == (top, bottom)

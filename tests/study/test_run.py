# SPDX-License-Identifier: MIT
"""A study as a whole: same records however it is cut, stopped or shared; clear errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import weakref
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from captum_adv2 import storage
from captum_adv2.study import Settings, run
from captum_adv2.study.sources import Sample
from captum_adv2.study.work import Found, work
from captum_adv2.study.world import World

ROOT = Path(__file__).parents[3]
SMALL = Settings(
    models=("embedded:resnet",),
    interpreters=("CAM", "RTS"),
    frameworks=("pgd",),
    targets=("benign", "class"),
    adaptive=(),
    count=5,
    held_out=8,
    steps=2,
    flow_steps=2,
    chunk=2,
    shown=1,
)


def records(folder: Path) -> tuple[bytes, bytes]:
    found = (folder / "records" / f"{name}.csv" for name in ("maps", "scores"))
    maps, scores = (file.read_bytes() for file in found)
    return maps, scores


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "whole"
    run(SMALL, folder, verbose=False)
    return folder


def quiet_work(settings: Settings, folder: Path, world: World | None = None) -> Found:
    found = work(settings, folder, world or World(), verbose=False)
    assert found is not None
    return found


def test_everything_is_there(whole: Path) -> None:
    for name in ("index.html", "study.json", "tables", "figures", "records"):
        assert (whole / name).exists(), name
    assert not list(whole.rglob("*.part"))


def test_an_image_has_the_rows_of_every_case(whole: Path) -> None:
    found = quiet_work(SMALL, whole)
    assert len(found.maps.values("image")) == 5
    named = (found.maps[name].tolist() for name in ("attack", "aimed", "interpreter"))
    cases = set(zip(*named, strict=True))
    assert {("benign", "", "CAM"), ("PGD", "", "RTS"), ("ADV2", "CAM", "RTS")} <= cases
    assert ("class", "RTS", "RTS") in cases
    assert ("class", "RTS", "CAM") not in cases
    assert len(found.maps) == 5 * len(cases)
    assert (found.maps["label"] != found.maps["target"])[found.maps["attack"] != "benign"].all()
    held_out = found.scores.where(target=-1)
    assert len(held_out) == 8 * 4
    assert not set(held_out["image"].tolist()) & set(found.maps["image"].tolist())


def test_measures_are_those_of_evaluate(whole: Path) -> None:
    from captum_adv2 import evaluate
    from captum_adv2.interpreters import CAM
    from captum_adv2.study.embedded.models import load_resnet

    found = quiet_work(SMALL, whole)
    shard = storage.load(next(whole.rglob("seed-0/00000/ADV2-CAM.pt")), "shard of a study")
    rows = found.maps.where(attack="ADV2", aimed="CAM", interpreter="CAM")
    model, source = load_resnet(), first_images(found)
    report = evaluate(model, CAM(model), source, shard["images"].float() / 255, shard["target"])
    for name in ("success", "confidence", "l1", "l2", "iou"):
        np.testing.assert_allclose(rows[name][:2], getattr(report, name).numpy(), atol=1e-6)


def first_images(found: Found) -> Tensor:
    """Return the first two images of a study on the embedded data."""
    from captum_adv2.study.sources import Embedded

    numbers = found.maps.values("image")[:2]
    return torch.stack([Embedded()[number].image for number in numbers])


def test_a_study_that_is_interrupted_anywhere_ends_with_the_same_records(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = storage.save, [0]

    def failing(*args: Any, **kwargs: Any) -> None:
        calls[0] += 1
        if calls[0] % 7 == 0:
            raise KeyboardInterrupt
        save(*args, **kwargs)

    monkeypatch.setattr(storage, "save", failing)
    for _ in range(100):
        try:
            run(SMALL, tmp_path / "x", resume=True, verbose=False)
        except KeyboardInterrupt:
            continue
        break
    assert calls[0] > 14, "it was not interrupted"
    assert records(tmp_path / "x") == records(whole)


def test_nothing_that_is_done_is_done_again(whole: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in whole.rglob("*.pt")}
    run(SMALL, whole, resume=True, verbose=False)
    assert {file: file.stat().st_mtime_ns for file in whole.rglob("*.pt")} == before


def test_a_broken_shard_is_named_and_made_again(whole: Path, tmp_path: Path) -> None:
    first = records(whole)
    shard = sorted(whole.rglob("seed-0/*/PGD.pt"))[1]
    shard.write_bytes(shard.read_bytes()[:100])
    found = run(SMALL, whole, resume=True, verbose=False)
    assert found is not None
    assert found.redone == (str(shard.relative_to(whole)),)
    assert str(shard.relative_to(whole)) in (whole / "index.html").read_text(encoding="utf-8")
    assert records(whole) == first


def test_chunks_do_not_matter(tmp_path: Path) -> None:
    settings = replace(SMALL, detectors=(), targets=("benign", "patch"))
    one = quiet_work(settings, tmp_path / "a")
    other = quiet_work(replace(settings, chunk=5), tmp_path / "b")
    key = ("image", "attack", "aimed", "interpreter")
    for first, second in ((one, other),):
        rows = [
            sorted(zip(*(f.maps[n].tolist() for n in (*key, "target", "confidence")), strict=True))
            for f in (first, second)
        ]
        assert [row[:-1] for row in rows[0]] == [row[:-1] for row in rows[1]]
        # Sums over a batch of another size round differently, and an attack goes another way.
        gaps = [abs(a[-1] - b[-1]) for a, b in zip(*rows, strict=True)]
        assert float(np.median(gaps)) < 1e-4


def start(folder: Path, processes: int, *options: str) -> subprocess.Popen[bytes]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    given = (
        "--models embedded:resnet --interpreters CAM RTS --frameworks pgd --targets benign class "
        "--adaptive --count 5 --held-out 8 --steps 30 --chunk 2 --flow-steps 2 --shown 1 --quiet"
    )
    return subprocess.Popen(
        [
            sys.executable,
            *(launcher if processes > 1 else ()),
            *("-m", "captum_adv2", "study", "--out", str(folder), *given.split(), *options),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    )


def kill_all(folder: Path) -> None:
    """Kill the processes whose command line names a folder: a launcher and all that it started."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it may have ended by itself
            if str(folder).encode() in file.read_bytes():
                os.kill(int(file.parent.name), signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds processes in /proc")
def test_processes_share_the_work_and_may_be_killed(whole: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run(replace(SMALL, steps=30), tmp_path / "one", verbose=False)
    finally:
        torch.set_num_threads(threads)
    folder = tmp_path / "two"
    process = start(folder, 2)
    while process.poll() is None and len(list(folder.rglob("*.pt"))) < 6:
        time.sleep(0.05)
    kill_all(folder)
    process.communicate()
    assert not (folder / "index.html").exists(), "killed too late to show anything"
    process = start(folder, 2, "--resume")
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    assert records(folder) == records(tmp_path / "one")


def test_memory_holds_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from captum_adv2.study.sources import Embedded

    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = [0]
    read = Embedded.__getitem__

    def counted(self: Embedded, index: int) -> Sample:
        sample = read(self, index)
        alive.add(sample.image)
        most[0] = max(most[0], len(alive))
        return sample

    monkeypatch.setattr(Embedded, "__getitem__", counted)
    settings = replace(SMALL, count=12, held_out=0, detectors=(), targets=("benign",), chunk=2)
    quiet_work(settings, tmp_path)  # choosing images holds 50 at a time, whatever the count
    most[0] = 0
    for file in tmp_path.rglob("shards/**/*.pt"):
        file.unlink()
    quiet_work(settings, tmp_path)
    assert 0 < most[0] <= 2 * 2


def test_images_that_cannot_be_read_are_skipped_and_named(tmp_path: Path) -> None:
    from torchvision.utils import save_image

    from captum_adv2.study.embedded.shapes import CLASSES, make_shapes

    shapes = make_shapes(20, seed=3)
    for number, (image, label) in enumerate(zip(shapes.images, shapes.labels, strict=True)):
        folder = tmp_path / "pictures" / f"{int(label):02d}-{CLASSES[int(label)]}"
        folder.mkdir(parents=True, exist_ok=True)
        save_image(image, folder / f"{number}.png")
    for label, name in enumerate(CLASSES):
        (tmp_path / "pictures" / f"{label:02d}-{name}").mkdir(exist_ok=True)
    broken = next((tmp_path / "pictures").rglob("*.png"))
    broken.write_bytes(b"not a picture")
    settings = replace(SMALL, images=str(tmp_path / "pictures"), size=64, resize=64, count=20)
    found = run(settings, tmp_path / "out", verbose=False)
    assert found is not None
    (selection,) = found.selections.values()
    assert len(selection.corrupt) == 1
    assert broken.name in selection.corrupt[0]
    assert broken.name in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert not any(broken.name in name for name in selection.names)


def test_a_study_that_wants_other_settings_is_refused(whole: Path) -> None:
    with pytest.raises(ValueError, match="steps was 2, is 3"):
        run(replace(SMALL, steps=3), whole, resume=True, verbose=False)


def test_a_folder_with_something_in_it_is_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="--resume"):
        run(SMALL, whole, verbose=False)
    (tmp_path / "letter.txt").write_text("dear")
    for resume in (False, True):
        with pytest.raises(FileExistsError, match="other things"):
            run(SMALL, tmp_path, resume=resume, verbose=False)
    assert (tmp_path / "letter.txt").read_text() == "dear"
    with pytest.raises(OSError, match="letter"):
        run(SMALL, tmp_path / "letter.txt" / "out", verbose=False)


class Five(nn.Module):
    """A classifier of five classes."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(1, 2, 3))[:, None].expand(-1, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": (f"{__name__}:five",)}, "images of 5 classes"),
        ({"models": ("embedded:resnet", "my:resnet")}, "models of different names"),
        ({"interpreters": ("CAM", "my:CAM")}, "interpreters of different names"),
        ({"models": ("no_such_net",)}, "expected a classifier of torchvision"),
        ({"models": ("no_such_module:net",)}, "package.module:function"),
        ({"models": ("embedded:vgg",)}, "embedded:resnet or embedded:densenet"),
        ({"interpreters": ("LIME",)}, "expected an interpreter from GRAD"),
        ({"interpreters": ("RTS-A",), "models": ("embedded:densenet",)}, "--distilled-model FILE"),
        ({"images": "/no/such/folder"}, "no such path"),
    ],
)
def test_what_does_not_exist_or_fit_is_said(
    change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(replace(SMALL, **change), tmp_path / "out", verbose=False)


def five() -> nn.Module:
    return Five()

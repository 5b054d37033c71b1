# SPDX-License-Identifier: MIT
"""A study as a whole: the same records however it is cut, stopped or shared; clear errors."""

from __future__ import annotations

import itertools
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
import pandas as pd
import pytest
import torch
from torch import Tensor

from captum_adv2 import SoundnessWarning, evaluate, storage
from captum_adv2.interpreters import CAM
from captum_adv2.study import Settings, engine, page, run
from captum_adv2.study.data import Embedded, Sample
from captum_adv2.study.embedded import load_resnet, make_shapes
from captum_adv2.study.engine import World
from captum_adv2.study.results import Found

pytestmark = pytest.mark.usefixtures("undrawn")

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "tiny.csv"
SMALL = Settings(
    models=("embedded:resnet",),
    interpreters=("CAM", "RTS"),
    frameworks=("pgd",),
    targets=("benign", "class"),
    adaptive=(),
    count=5,
    held_out=8,
    tuned=2,
    steps=2,
    flow_steps=2,
    chunk=2,
    shown=1,
)
KEYS = ["image", "attack", "aimed", "interpreter"]


def records(folder: Path) -> list[bytes]:
    names = ("maps", "scores", "boxes")
    return [(folder / "records" / f"{name}.csv").read_bytes() for name in names]


def quiet(settings: Settings, folder: Path, **how: Any) -> Found:
    found = run(settings, folder, verbose=False, **how)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, undrawn: None) -> Path:
    folder = tmp_path_factory.mktemp("study") / "whole"
    run(SMALL, folder, verbose=False)
    return folder


@pytest.fixture(scope="module")
def found(whole: Path) -> Found:
    return quiet(SMALL, whole, resume=True)


def test_records_are_as_they_were(found: Found) -> None:
    golden = pd.read_csv(GOLDEN, keep_default_na=False, na_values=["nan"])
    exact = ["model", "seed", "image", "name", "label", "target", "attack", "aimed", "interpreter"]
    pd.testing.assert_frame_equal(found.maps[exact], golden[exact], check_dtype=False)
    for name in {*golden.columns} - {*exact}:
        # Another processor rounds differently, and a step of an attack may go another way.
        near = np.isclose(found.maps[name], golden[name], atol=0.02, equal_nan=True)
        assert near.mean() > 0.9, name


def test_an_image_has_the_rows_of_every_case(found: Found) -> None:
    cases = {*found.maps[KEYS[1:]].itertuples(index=False, name=None)}
    assert {("benign", "", "CAM"), ("PGD", "", "RTS"), ("ADV2", "CAM", "RTS")} <= cases
    assert ("class", "RTS", "RTS") in cases
    assert ("class", "RTS", "CAM") not in cases
    assert len(found.maps) == 5 * len(cases) == len(found.maps[KEYS].drop_duplicates())
    attacked = found.maps[found.maps.attack != "benign"]
    assert (attacked.label != attacked.target).all()
    held_out = found.scores[found.scores.target == -1]
    assert len(held_out) == 8 * 4
    assert not {*held_out.image} & {*found.maps.image}


def test_measures_are_those_of_evaluate(whole: Path, found: Found) -> None:
    shard = storage.load(next(whole.rglob("seed-0/00000/ADV2-CAM.pt")), "shard of a study")
    rows = found.maps.query("attack == 'ADV2' and aimed == 'CAM' and interpreter == 'CAM'")[:2]
    model, clean = load_resnet(), torch.stack([Embedded()[n].image for n in rows.image])
    report = evaluate(model, CAM(model), clean, shard["images"].float() / 255, shard["target"])
    for name in ("success", "confidence", "l1", "l2", "iou"):
        np.testing.assert_allclose(rows[name], getattr(report, name).numpy(), atol=1e-6)


def test_an_interrupted_study_ends_with_the_same_records(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = storage.save, [0]

    def failing(*args: Any, **kwargs: Any) -> None:
        calls[0] += 1
        if calls[0] % 11 == 0:
            raise KeyboardInterrupt
        save(*args, **kwargs)

    monkeypatch.setattr(storage, "save", failing)
    for _ in range(100):
        try:
            run(SMALL, tmp_path / "x", resume=True, verbose=False)
        except KeyboardInterrupt:
            continue
        break
    assert calls[0] > 22, "it was not interrupted"
    assert records(tmp_path / "x") == records(whole)


def test_finished_work_is_not_repeated_but_a_broken_shard_is(whole: Path) -> None:
    def times() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in whole.rglob("*.pt")}

    first, before = records(whole), times()
    shard = sorted(whole.rglob("seed-0/*/PGD.pt"))[1]
    shard.write_bytes(shard.read_bytes()[:100])
    name = str(shard.relative_to(whole))
    assert quiet(SMALL, whole, resume=True).redone == [name]
    assert name in (whole / "index.html").read_text(encoding="utf-8")
    assert {file for file, when in times().items() if when != before[file]} == {shard}
    assert records(whole) == first


def test_a_flipped_bit_is_found_and_the_selection_is_made_again(whole: Path) -> None:
    first = records(whole)
    files = [next(whole.rglob("seed-0/00001/ADV2-CAM.pt")), whole / "selection" / "resnet.pt"]
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    redone = quiet(SMALL, whole, resume=True).redone
    assert {*redone} == {str(file.relative_to(whole)) for file in files}
    assert records(whole) == first


def test_a_widened_study_ends_with_the_records_of_a_wide_one(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    narrow = replace(SMALL, count=3)
    quiet(narrow, folder)
    full = {file: file.stat().st_mtime_ns for file in folder.rglob("0000?/*.pt")}
    assert full
    quiet(SMALL, folder, resume=True)
    assert records(folder) == records(whole)
    assert {file: file.stat().st_mtime_ns for file in full} == full
    with pytest.raises(ValueError, match="count was 5, is 3"):
        run(narrow, folder, resume=True, verbose=False)


def test_a_study_may_get_more_seeds_and_the_curve(tmp_path: Path) -> None:
    tiny = replace(SMALL, interpreters=("CAM",), targets=(), detectors=(), tuned=0, count=2)
    quiet(tiny, tmp_path / "x")
    wider = quiet(replace(tiny, seeds=(0, 1), curve=True), tmp_path / "x", resume=True)
    least = wider.maps[wider.maps.attack == "curve"].least
    assert len(least) == 2 * 2
    assert (least > 0).all()
    with pytest.raises(ValueError, match="curve was True, is False"):
        run(replace(tiny, seeds=(0, 1)), tmp_path / "x", resume=True, verbose=False)


def test_as_many_images_set_a_threshold_as_it_says(tmp_path: Path) -> None:
    tiny = replace(SMALL, interpreters=("CAM",), frameworks=(), detectors=(), tuned=3, count=2)
    rows = quiet(tiny, tmp_path / "x").boxes.dropna()
    assert rows.held_out.value_counts().to_dict() == {1.0: 3, 0.0: 2}


def test_a_page_of_what_is_there_so_far(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    with pytest.raises(FileNotFoundError, match="expected a study in"):
        page(folder)
    found = quiet(SMALL, folder)
    assert found.missing == 0
    gone = [*folder.rglob("ADV2-RTS.pt"), *folder.rglob("00002-of-1/PGD.pt")]
    assert len(gone) == 4
    for file in gone:
        file.unlink()
    part = page(folder)
    assert part.missing == 4
    assert not any(file.exists() for file in gone)
    assert len(part.maps) == len(found.maps) - 5 * 2 - 1 * 2
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert "4 parts of the study are not there yet" in text
    assert "--count 5 --held-out 8" in text  # the command that repeats it
    damaged = [folder.rglob(f"seed-0/00000/{name}.pt") for name in ("benign", "PGD")]
    for file in itertools.chain(*damaged):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(SoundnessWarning, match=r"\.pt, unreadable: .* --resume computes it again"):
        part = page(folder)
    assert part.missing == 4 + 2


def test_chunks_do_not_matter(tmp_path: Path, found: Found) -> None:
    other = quiet(replace(SMALL, detectors=(), chunk=5), tmp_path / "b")
    one, two = (each.maps.sort_values(KEYS, ignore_index=True) for each in (found, other))
    pd.testing.assert_frame_equal(one[[*KEYS, "target"]], two[[*KEYS, "target"]])
    # Sums over a batch of another size round differently, and an attack goes another way.
    assert (one.confidence - two.confidence).abs().median() < 1e-4


def test_processes_share_the_tasks(tmp_path: Path) -> None:
    class Second(World):
        """The second process of two, which gets the list of tasks from the first."""

        def share(self, value: Any) -> Any:
            return [(0, task) for task in parts[0].tasks()]

    settings = replace(SMALL, targets=(), detectors=(), tuned=0)
    (tmp_path / "x").mkdir()
    parts = engine.prepared(settings, tmp_path / "x", World(), resume=False)
    engine.work(parts, Second(1, 2), verbose=False)
    done = {file.parent.name for file in (tmp_path / "x").rglob("shards/**/*.pt")}
    assert done == {"00001"}  # of three


OPTIONS = (
    "--models embedded:resnet --interpreters CAM RTS --frameworks pgd --targets benign class "
    "--adaptive --count 5 --held-out 8 --steps 30 --chunk 2 --flow-steps 2 --shown 1 --quiet"
)


def start(folder: Path, processes: int, *options: str) -> subprocess.Popen[bytes]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else ()), "-m", "captum_adv2", "study"]
    return subprocess.Popen(
        [*command, "--out", str(folder), *OPTIONS.split(), *options],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    )


def kill_all(folder: Path) -> None:
    """Kill the processes whose command line names a folder: a launcher and all that it started."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it may have ended by itself
            if str(folder).encode() in file.read_bytes():
                os.kill(int(file.parent.name), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds processes in /proc")
def test_processes_share_the_work_and_may_be_killed(tmp_path: Path) -> None:
    folder = tmp_path / "two"
    process = start(folder, 2)
    while process.poll() is None and len(list(folder.rglob("*.pt"))) < 6:
        time.sleep(0.05)
    kill_all(folder)
    process.communicate()
    assert not (folder / "index.html").exists(), "killed too late to show anything"
    for process in (start(folder, 2, "--resume"), start(tmp_path / "one", 1)):
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()
    assert records(folder) == records(tmp_path / "one")


def test_memory_holds_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = [0]
    read = Embedded.__getitem__

    def counted(self: Embedded, index: int) -> Sample:
        sample = read(self, index)
        alive.add(sample.image)
        most[0] = max(most[0], len(alive))
        return sample

    monkeypatch.setattr(Embedded, "__getitem__", counted)
    settings = replace(SMALL, count=12, held_out=0, detectors=(), targets=(), chunk=2)
    parts = engine.prepared(settings, tmp_path, World(), resume=True)  # holds 50 at a time
    most[0] = 0
    engine.work(parts, World(), verbose=False)
    assert 0 < most[0] <= 2 * 2


def test_images_that_cannot_be_read_are_skipped_and_named(tmp_path: Path) -> None:
    shapes = make_shapes(20, seed=3)
    shapes.images[4, 0, 0, 0] = 2
    torch.save({"images": shapes.images, "labels": shapes.labels}, tmp_path / "shapes.pt")
    settings = replace(SMALL, images=str(tmp_path / "shapes.pt"), count=20, held_out=0)
    selection = quiet(settings, tmp_path / "out").selections["resnet"]
    (reason,) = selection.corrupt
    assert "shapes.pt[4] in [0, 1], got values in" in reason
    assert reason in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "shapes.pt[4]" not in selection.names
    assert len(selection.names) > 10


def test_a_folder_of_something_else_is_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="steps was 2, is 3"):
        run(replace(SMALL, steps=3), whole, resume=True, verbose=False)
    with pytest.raises(FileExistsError, match="--resume"):
        run(SMALL, whole, verbose=False)
    (tmp_path / "letter.txt").write_text("dear")
    for resume in (False, True):
        with pytest.raises(FileExistsError, match="other things"):
            run(SMALL, tmp_path, resume=resume, verbose=False)
    assert (tmp_path / "letter.txt").read_text() == "dear"
    with pytest.raises(OSError, match="letter"):
        run(SMALL, tmp_path / "letter.txt" / "out", verbose=False)
    (tmp_path / "study.json").write_text("{half")
    with pytest.raises(ValueError, match=r"settings of a study in .*study\.json"):
        run(SMALL, tmp_path, resume=True, verbose=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": ("no_such_net",)}, "expected a classifier of torchvision"),
        ({"interpreters": ("LIME",)}, "expected an interpreter from GRAD"),
        ({"images": "/no/such/folder"}, "no such path"),
        ({"images": "builtins:id"}, "expected builtins:id to return a Source"),
    ],
)
def test_settings_that_do_not_fit_leave_no_folder(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        run(replace(SMALL, **change), tmp_path / "out", verbose=False)
    assert not (tmp_path / "out").exists()

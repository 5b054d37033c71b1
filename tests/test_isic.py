# SPDX-License-Identifier: MIT
"""The skin-cancer application: data, split, weights, confusion and maps by hand, and a stop."""

from __future__ import annotations

import argparse
import shutil
from collections import Counter
from pathlib import Path

import isic
import isic_patient
import lesions
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kinds import Around
from torch import Tensor, nn

from captum_adv2 import study
from captum_adv2.study.data import CorruptImage

diagnoses = st.lists(st.integers(0, 6), min_size=1, max_size=60)


@given(diagnoses, st.integers(1, 5), st.integers(0, 9))
def test_lesions_are_held_out_whole_and_every_class_is_there(
    classes: list[int], views: int, seed: int
) -> None:
    # A lesion per entry, seen several times.
    labels = [label for label in classes for _ in range(views)]
    seen = [f"HAM_{number}" for number in range(len(classes)) for _ in range(views)]
    train, held_out = isic.split(labels, seen, seed)
    assert sorted(train + held_out) == list(range(len(labels)))
    assert not {seen[index] for index in train} & {seen[index] for index in held_out}
    counts = Counter(labels[index] for index in held_out)
    for label, lesions_of in Counter(classes).items():
        assert counts[label] == views * max(1, round(0.1 * lesions_of))
    assert isic.split(labels, seen, seed) == (train, held_out)


@given(diagnoses)
def test_every_class_weighs_the_same(labels: list[int]) -> None:
    weights = isic.class_weights(torch.tensor(labels))[labels].double()
    totals = torch.zeros(7, dtype=torch.double).index_add_(0, torch.tensor(labels), weights)
    torch.testing.assert_close(totals[totals > 0], totals.max().expand(len(set(labels))))
    assert weights.mean().item() == pytest.approx(1)


def test_images_are_turned_and_flipped_each_by_itself() -> None:
    images = torch.rand(1, 3, 4, 4).expand(400, 3, 4, 4)
    turned = isic.augment(images, torch.Generator().manual_seed(0))
    flips = (images[0], images[0].flip(2))
    ways = [torch.rot90(flipped, turn, (1, 2)) for flipped in flips for turn in range(4)]
    found = [[torch.equal(image, way) for way in ways] for image in turned]
    assert all(sum(row) == 1 for row in found)
    assert min(torch.tensor(found).sum(dim=0)) > 25  # 50 are expected


def test_recall_by_hand() -> None:
    matrix = torch.diag(torch.tensor([3, 8, 0, 1, 5, 2, 4]))
    matrix[0, 1], matrix[4, 0] = 1, 5
    text = isic.report(matrix)
    assert "balanced accuracy 87.50%, accuracy 79.31%, on 29 images" in text
    assert "75.0%" in text


def test_the_share_of_a_map_inside_a_lesion_by_hand() -> None:
    maps = torch.tensor([[[[0.6, 0.2], [0.2, 0.0]]], [[[0.0, 0.0], [0.0, 0.0]]]])
    masks = torch.tensor([[[[True, False], [True, False]]], [[[False, True], [True, True]]]])
    share, largest = isic_patient.inside(maps, masks)
    torch.testing.assert_close(share, torch.tensor([0.8, 0.0]))
    assert largest.tolist() == [True, False]


def test_calibration_keeps_the_function_and_makes_training_mode_agree() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU6(), nn.Conv2d(5, 4, 3)),
        *(nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2)),
    )
    for norm in (net[1], net[4]):  # as folded ones are: the statistics say nothing
        nn.init.normal_(norm.bias)
    images = 3 * torch.rand(64, 3, 8, 8)
    net.eval()
    before = net(images)
    isic.calibrate(net, images)
    torch.testing.assert_close(net.eval()(images), before)
    torch.testing.assert_close(net.train()(images), before, rtol=1e-3, atol=1e-2)
    assert all(not module._forward_pre_hooks for module in net.modules())


class Colours(nn.Module):
    """A network that sees nine mean colours; its last layer is replaced, as the ResNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(27, 7)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(nn.functional.adaptive_avg_pool2d(images, 3).flatten(1))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("isic")
    return lesions.generate(folder / "lesions", 28, size=(24, 32))


@pytest.fixture
def source(data: Path) -> lesions.Lesions:
    return lesions.Lesions(data, lesions.crop(16))


@pytest.fixture
def args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    monkeypatch.setattr(isic.models, "get_model", lambda name, weights: Colours())
    run = {"out": tmp_path, "device": "cpu", "resume": True, "quiet": True}
    how = {
        "model": "resnet18",
        "weights": "none",
        "frozen": 0,
        "epochs": 3,
        "batch": 8,
        "lr": 1e-2,
        "size": 16,
    }
    return argparse.Namespace(**run, **how, seed=0)


def everything(source: lesions.Lesions) -> tuple[Tensor, Tensor]:
    return isic.pictures(source, range(len(source)), quiet=True), torch.tensor(source.labels)


def test_lesions_of_a_folder_and_of_its_zip_file(
    data: Path, source: lesions.Lesions, tmp_path: Path
) -> None:
    assert Counter(source.labels) == dict.fromkeys(range(7), 4)
    assert Counter(Counter(source.groups()).values()) == {2: 14}
    table = (data / lesions.TABLE).read_text()
    name, *cells = table.splitlines()[3].split(",")
    assert source[2].name == f"{name}.jpg"
    assert float(cells[source[2].label]) == 1
    held_out = tmp_path / "held-out.csv"
    held_out.write_text("\n".join(table.splitlines()[i] for i in (0, 3, 5)))
    file = shutil.make_archive(str(tmp_path / "lesions"), "zip", data)
    part = isic.lesions(lesions.crop(16), f"{file}:{held_out}")
    assert (len(part), part.groups()) == (2, [source.groups()[index] for index in (2, 4)])
    assert all(torch.equal(*pair) for pair in zip(part[1][::3], source[4][::3], strict=True))


def test_the_box_is_that_of_the_mask(source: lesions.Lesions) -> None:
    for index in range(len(source)):
        image, mask = source.masked(index)
        assert (image.shape, mask.shape) == ((3, 16, 16), (1, 16, 16))
        rows, columns = mask[0].any(dim=1).nonzero(), mask[0].any(dim=0).nonzero()
        corners = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert source[index].boxes.tolist() == [[int(corner) for corner in corners]]


def test_lesions_without_masks_and_damaged_ones(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(data, folder, ignore=shutil.ignore_patterns("masks", "lesions.csv"))
    source = lesions.Lesions(folder, lesions.crop(16))
    assert source[0].boxes.shape == (0, 4)
    assert source.groups() == source.names
    (folder / lesions.PICTURES / source[0].name).write_bytes(b"no picture")
    with pytest.raises(CorruptImage, match=source.names[0]):
        source[0]
    table = folder / lesions.TABLE
    table.write_text(table.read_text().replace("1.0", "0.5"))
    with pytest.raises(ValueError, match=r"one 1\.0 and six 0\.0"):
        lesions.Lesions(folder, lesions.crop(16))


def test_confusion_counts_every_image(source: lesions.Lesions) -> None:
    always = Around(None, lambda _, images: torch.eye(7)[4].expand(len(images), 7))
    expected = torch.zeros(7, 7, dtype=torch.long)
    expected[:, 4] = 4
    assert torch.equal(isic.confusion(always, *everything(source)), expected)


@pytest.mark.parametrize("after", [1, 2])
def test_a_killed_run_is_continued(
    after: int, source: lesions.Lesions, args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = everything(source)
    whole = isic.train(images, labels, args).state_dict()
    (args.out / "classifier.pt").unlink()
    save, saved = isic.storage.save, []

    def killed(record: dict[str, object], *rest: object) -> None:
        save(record, *rest)
        saved.append(record["epoch"])
        if len(saved) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(isic.storage, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        isic.train(images, labels, args)
    half = isic.classifier(args.out / "classifier.pt").state_dict()
    torch.manual_seed(99)
    again = isic.train(images, labels, args).state_dict()
    assert saved == [1, 2, 3]
    assert all(torch.equal(value, whole[name]) for name, value in again.items())
    assert not torch.equal(half["1.fc.weight"], whole["1.fc.weight"])
    # A trained classifier is not trained again, nor with other settings.
    isic.train(images, labels, args)
    assert saved == [1, 2, 3]
    args.lr = 1.0
    with pytest.raises(SystemExit, match="to resume"):
        isic.train(images, labels, args)


@pytest.mark.filterwarnings("ignore::captum_adv2.SoundnessWarning")  # Colours is linear
def test_a_study_of_lesions(data: Path, args: argparse.Namespace, tmp_path: Path) -> None:
    source, args.epochs, args.lr = lesions.Lesions(data, lesions.crop(16)), 60, 0.1
    images, labels = everything(source)
    model = isic.train(images, labels, args)
    assert isic.confusion(model, images, labels).diagonal().sum() > 17  # of 28: it learns colours
    settings = study.Settings(
        models=(f"isic:classifier={tmp_path / 'classifier.pt'}",),
        images=f"isic:lesions={data}:{data / lesions.TABLE}",
        size=16,
        interpreters=("GRAD",),
        frameworks=("pgd",),
        targets=("benign",),
        detectors=(),
        count=5,
        held_out=0,
        eps=0.5,
        steps=20,
        chunk=3,
    )
    found = study.run(settings, tmp_path / "study", verbose=False)
    assert found is not None
    assert (found.maps.attack == "ADV2").sum() == 5
    page = (tmp_path / "study" / "index.html").read_text(encoding="utf-8")
    assert "Table 14" in page
    assert "Localisation by maps" in page  # of boxes from masks
    assert "Table 13" not in page
    assert (tmp_path / "study" / "figures" / "figure-08-l1.png").exists()

# SPDX-License-Identifier: MIT
"""The skin-cancer application: split, weights, turns and confusion by hand, and a stop."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import isic
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kinds import Around
from torch import Tensor, nn
from torchvision.transforms import v2

from captum_adv2 import study

CROP = v2.Compose([v2.Resize(18), v2.CenterCrop(16)])
diagnoses = st.lists(st.integers(0, 6), min_size=1, max_size=60)


@given(diagnoses, st.integers(1, 5), st.integers(0, 9))
def test_lesions_are_held_out_whole_and_every_class_is_there(
    classes: list[int], views: int, seed: int
) -> None:
    # A lesion per entry, seen several times.
    labels = [label for label in classes for _ in range(views)]
    lesions = [f"HAM_{number}" for number in range(len(classes)) for _ in range(views)]
    train, held_out = isic.split(labels, lesions, seed)
    assert sorted(train + held_out) == list(range(len(labels)))
    assert not {lesions[index] for index in train} & {lesions[index] for index in held_out}
    counts = Counter(labels[index] for index in held_out)
    for label, lesions_of in Counter(classes).items():
        assert counts[label] == views * max(1, round(0.1 * lesions_of))
    assert isic.split(labels, lesions, seed) == (train, held_out)


@given(diagnoses)
def test_every_class_weighs_the_same(labels: list[int]) -> None:
    weights = isic.class_weights(labels)[labels].double()
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
    assert "weighted multi-class accuracy 87.50%, accuracy 79.31%, on 29 images" in text
    assert "75.0%" in text


class Colours(nn.Module):
    """A network that sees nine mean colours; its last layer is replaced, as the ResNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(27, 7)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(nn.functional.adaptive_avg_pool2d(images, 3).flatten(1))


@pytest.fixture
def source(tmp_path: Path) -> isic.Lesions:
    return isic.Lesions(*isic.generate(tmp_path, 28, size=(24, 32)), CROP)


@pytest.fixture
def args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    monkeypatch.setattr(isic.models, "get_model", lambda name, weights: Colours())
    run = {"out": tmp_path / "isic.pt", "device": "cpu", "workers": 0, "resume": True}
    how = {"model": "resnet18", "weights": "none", "epochs": 3, "batch": 8, "lr": 1e-2, "size": 16}
    return argparse.Namespace(**run, **how, seed=0, quiet=True)


def test_lesions_have_the_diagnoses_of_the_table(source: isic.Lesions, tmp_path: Path) -> None:
    assert Counter(source.labels) == dict.fromkeys(range(7), 4)
    assert (len(source), source[0].image.shape) == (28, (3, 16, 16))
    table = tmp_path / "ground-truth.csv"
    name, *cells = table.read_text().splitlines()[3].split(",")
    assert source[2].name == f"images/{name}.jpg"
    assert float(cells[source[2].label]) == 1
    part = isic.lesions(CROP, f"{tmp_path / 'images'}:{table}")
    assert torch.equal(part[2].image, source[2].image)
    table.write_text(table.read_text().replace("1.0", "0.5"))
    with pytest.raises(ValueError, match=r"one 1\.0 and six 0\.0"):
        isic.Lesions(tmp_path / "images", table, CROP)


def test_confusion_counts_every_image(source: isic.Lesions, args: argparse.Namespace) -> None:
    always = Around(None, lambda _, images: torch.eye(7)[4].expand(len(images), 7))
    found = isic.confusion(always, source, list(range(28)), args)
    expected = torch.zeros(7, 7, dtype=torch.long)
    expected[:, 4] = 4
    assert torch.equal(found, expected)


@pytest.mark.parametrize("after", [1, 2])
def test_a_killed_run_is_continued(
    after: int, source: isic.Lesions, args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = list(range(20))
    args.out = args.out.with_name("whole.pt")
    whole = isic.train(source, order, args).state_dict()
    args.out = args.out.with_name("parts.pt")
    save, saved = isic.storage.save, []

    def killed(record: dict[str, object], *rest: object) -> None:
        save(record, *rest)
        saved.append(record["epoch"])
        if len(saved) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(isic.storage, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        isic.train(source, order, args)
    half = isic.classifier(args.out).state_dict()
    torch.manual_seed(99)
    again = isic.train(source, order, args).state_dict()
    assert saved == [1, 2, 3]
    assert all(torch.equal(value, whole[name]) for name, value in again.items())
    assert not torch.equal(half["1.fc.weight"], whole["1.fc.weight"])
    # A trained classifier is not trained again, nor with other settings.
    isic.train(source, order, args)
    assert saved == [1, 2, 3]
    args.lr = 1.0
    with pytest.raises(SystemExit, match="to resume"):
        isic.train(source, order, args)


@pytest.mark.filterwarnings("ignore::captum_adv2.SoundnessWarning")  # Colours is linear
def test_a_study_of_lesions(args: argparse.Namespace, tmp_path: Path) -> None:
    files = isic.generate(tmp_path / "lesions", 28, size=(24, 32))
    source, args.epochs, args.lr = isic.Lesions(*files, CROP), 60, 0.1
    model = isic.train(source, list(range(28)), args)
    matrix = isic.confusion(model, source, list(range(28)), args)
    assert matrix.diagonal().sum() > 17  # of 28: it learns the colours
    settings = study.Settings(
        models=(f"isic:classifier={args.out}",),
        images=f"isic:lesions={files[0]}:{files[1]}",
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
    assert "Table 13" not in page
    assert (tmp_path / "study" / "figures" / "figure-08-l1.png").exists()

# SPDX-License-Identifier: MIT
"""The skin-cancer application: split, weights, turns and confusion by hand, and a stop."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import isic
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from captum_adv2.evaluation import study
from captum_adv2.study.sources import ISIC2018

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


def test_another_seed_holds_out_others() -> None:
    labels, lesions = [index % 7 for index in range(700)], [str(index) for index in range(700)]
    assert isic.split(labels, lesions, 0).held_out != isic.split(labels, lesions, 1).held_out


def test_lesions_are_read_by_the_names_of_images(tmp_path: Path) -> None:
    table = tmp_path / "groups.csv"
    table.write_text(
        "image,lesion_id,diagnosis_confirm_type\nISIC_2,HAM_7,histopathology\nISIC_1,HAM_9,other\n"
    )
    assert isic.read_lesions(table, ["ISIC_1", "ISIC_2"]) == ["HAM_9", "HAM_7"]
    assert isic.read_lesions(None, ["ISIC_1", "ISIC_2"]) == ["ISIC_1", "ISIC_2"]


@given(diagnoses)
def test_every_class_weighs_the_same(labels: list[int]) -> None:
    weights = isic.class_weights(labels)[labels].double()
    totals = torch.zeros(7, dtype=torch.double).index_add_(0, torch.tensor(labels), weights)
    torch.testing.assert_close(totals[totals > 0], totals.max().expand(len(set(labels))))
    assert weights.mean().item() == pytest.approx(1)


def test_images_are_turned_and_flipped_each_by_itself() -> None:
    images = torch.rand(1, 3, 4, 4).expand(400, 3, 4, 4)
    turned = isic.augment(images, torch.Generator().manual_seed(0))
    ways = [
        torch.rot90(flipped, turn, (1, 2))
        for flipped in (images[0], images[0].flip(2))
        for turn in range(4)
    ]
    found = [[torch.equal(image, way) for way in ways] for image in turned]
    assert all(sum(row) == 1 for row in found)
    assert min(torch.tensor(found).sum(dim=0)) > 25  # 50 are expected


def test_recall_by_hand() -> None:
    matrix = torch.diag(torch.tensor([3, 8, 0, 1, 5, 2, 4]))
    matrix[0, 1], matrix[4, 0] = 1, 5
    recall = isic.recall(matrix)
    torch.testing.assert_close(
        recall, torch.tensor([0.75, 1, torch.nan, 1, 0.5, 1, 1]), equal_nan=True
    )
    text = isic.report(matrix)
    assert "weighted multi-class accuracy 87.50%, accuracy 79.31%, on 29 images" in text


class Colours(nn.Module):
    """A network that sees nine mean colours; its last layer is replaced, as the ResNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(27, 7)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(nn.functional.adaptive_avg_pool2d(images, 3).flatten(1))


@pytest.fixture
def source(tmp_path: Path) -> ISIC2018:
    return ISIC2018(*isic.generate(tmp_path, 28, size=(24, 32)), size=16)


@pytest.fixture
def args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    monkeypatch.setattr(isic.models, "get_model", lambda name, weights: Colours())
    return argparse.Namespace(
        out=tmp_path / "isic.pt",
        model="resnet18",
        weights="none",
        epochs=3,
        batch=8,
        lr=1e-2,
        size=16,
        seed=0,
        device="cpu",
        workers=0,
        resume=True,
        quiet=True,
    )


def test_confusion_counts_every_image(source: ISIC2018, args: argparse.Namespace) -> None:
    class Always(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.eye(7)[4].expand(len(images), 7)

    found = isic.confusion(Always(), source, list(range(28)), args)
    expected = torch.zeros(7, 7, dtype=torch.long)
    expected[:, 4] = 4
    assert torch.equal(found, expected)
    assert torch.equal(
        isic.confusion(Always(), source, [3], args).nonzero()[0, 0], torch.tensor(source.labels[3])
    )


@pytest.mark.parametrize("after", [1, 2])
def test_a_killed_run_goes_on_where_it_was(
    after: int, source: ISIC2018, args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
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
    half = isic.load(args.out).state_dict()
    torch.manual_seed(99)
    again = isic.train(source, order, args).state_dict()
    assert saved == [1, 2, 3]
    for name, value in again.items():
        assert torch.equal(value, whole[name])
    assert not torch.equal(half["1.fc.weight"], whole["1.fc.weight"])
    # And what is trained is neither trained again nor trained on with other settings.
    isic.train(source, order, args)
    assert saved == [1, 2, 3]
    args.lr = 1.0
    with pytest.raises(SystemExit, match="to resume"):
        isic.train(source, order, args)


def test_every_epoch_has_an_order_of_its_own(
    source: ISIC2018, args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, orders = isic.batches, []

    def recorded(source: ISIC2018, order: list[int], *rest: object) -> object:
        orders.append(tuple(order))
        return batches(source, order, *rest)

    monkeypatch.setattr(isic, "batches", recorded)
    isic.train(source, [*range(3, 23)], args)
    assert len(set(orders)) == args.epochs
    assert all(sorted(order) == [*range(3, 23)] for order in orders)


def test_training_learns_the_colours(source: ISIC2018, args: argparse.Namespace) -> None:
    args.epochs, args.lr, order = 60, 0.1, list(range(28))
    model = isic.train(source, order, args)
    assert isic.recall(isic.confusion(model, source, order, args)).mean() > 0.6


def test_a_study_gets_the_classifier(
    source: ISIC2018, args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = isic.train(source, [0, 1, 2], args)
    images = source[0].image[None]
    monkeypatch.setenv("ISIC_CHECKPOINT", str(args.out))
    assert not isic.classifier().training
    assert torch.equal(isic.classifier()(images), trained(images))
    monkeypatch.delenv("ISIC_CHECKPOINT")
    monkeypatch.chdir(args.out.parent)
    assert torch.equal(isic.classifier()(images), trained(images))
    args.out.unlink()
    with pytest.raises(FileNotFoundError, match="isic.pt"):
        isic.classifier()


@pytest.mark.filterwarnings("ignore::captum_adv2.SoundnessWarning")  # Colours is linear
def test_a_study_of_lesions(
    args: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, table = isic.generate(tmp_path / "lesions", 28, size=(24, 32))
    args.epochs, args.lr = 60, 0.1
    isic.train(ISIC2018(images, table, size=16), list(range(28)), args)
    monkeypatch.setenv("ISIC_CHECKPOINT", str(args.out))
    settings = study.Settings(
        models=("isic:classifier",),
        images=f"isic:{images}:{table}",
        size=16,
        interpreters=("GRAD",),
        frameworks=("pgd",),
        targets=("benign",),
        detectors=(),
        count=5,
        held_out=0,
        eps=0.5,
        steps=60,
        chunk=3,
    )
    found = study.run(settings, tmp_path / "study", verbose=False)
    assert found is not None
    assert len(found.maps.where(attack="ADV2")) == 5
    page = (tmp_path / "study" / "index.html").read_text(encoding="utf-8")
    assert "Table 14" in page
    assert "Table 13" not in page
    assert (tmp_path / "study" / "figures" / "figure-08-l1.png").exists()


def test_drawn_lesions_are_the_same_for_a_seed(tmp_path: Path) -> None:
    folders = [
        isic.generate(tmp_path / name, 7, seed, (24, 32))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    first, again, other = (ISIC2018(*folder, size=16)[2].image for folder in folders)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_lesions_are_drawn_on_demand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["isic.py", "--generate", str(tmp_path / "drawn")])
    isic.main()
    images, table = tmp_path / "drawn" / "images", tmp_path / "drawn" / "ground-truth.csv"
    assert capsys.readouterr().out.split() == [
        "--images",
        str(images),
        "--ground-truth",
        str(table),
    ]
    assert Counter(ISIC2018(images, table).labels) == dict.fromkeys(range(7), 20)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ([], "expected --images FOLDER and --ground-truth CSV"),
        (["--images", "."], "expected --images FOLDER and --ground-truth CSV"),
        (["--images", ".", "--ground-truth", "a.csv", "--epochs", "0"], "expected --epochs >= 1"),
    ],
)
def test_options_that_do_not_fit(
    options: list[str],
    match: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["isic.py", *options])
    with pytest.raises(SystemExit):
        isic.parse()
    assert match in capsys.readouterr().err

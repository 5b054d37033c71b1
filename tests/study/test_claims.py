# SPDX-License-Identifier: MIT
"""Every observation holds, is violated, and is not measured, on rows made for it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import results, setting, without

from captum_adv2.study.claims import CLAIMS, Verdict, judge


def verdicts(*changes, **how) -> dict[int, Verdict]:
    return {verdict.number: verdict for verdict in judge(results(*changes, **how))}


def changed(change, images=range(20), **wanted):
    """Return a change of columns on some images, where other columns have some values."""
    return lambda row: (
        {**row, **change}
        if row["image"] in images and wanted.items() <= row.items() and change.keys() <= row.keys()
        else row
    )


def fails(*images: int, **wanted):
    """Return a change by which an attack fails on some images."""
    return changed({"success": 0.0}, images, **wanted)


def transferring(row):
    """Let half the pairs of interpreters transfer."""
    pairs = (("GRAD", "CAM"), ("CAM", "GRAD"), ("RTS", "CAM"))
    near = row["attack"] == "ADV2" and (row["aimed"], row.get("interpreter")) in pairs
    return {**row, "l1": 0.05} if near else row


def alike(row):
    """Let ADV2 reach the same on every interpreter."""
    if row["attack"] == "ADV2" and row["aimed"] == row.get("interpreter"):
        return {**row, "l1": 0.05, "iou": 0.9}
    return row


def test_all_hold() -> None:
    found = verdicts()
    assert list(found) == list(range(1, 10))
    for verdict in found.values():
        assert verdict.holds is True, verdict
        assert verdict.models == {"resnet": True}
        assert verdict.support
        assert all(line.endswith("(holds)") for line in verdict.support)


CAM = {"attack": "ADV2", "aimed": "CAM"}
PATCH = {"attack": "patch", "aimed": "CAM"}
RTS, RTS_A = ({"attack": "ADV2", "aimed": name, "interpreter": name} for name in ("RTS", "RTS-A"))
KNOWN = {"attack": "adaptive:3x3", "squeezer": "3x3"}
NOISES = [setting({"l1": 0.01}, attack=f"noise:{kind}") for kind in ("normal:0.03", "uniform:0.3")]
VIOLATIONS = {
    "1: two of twenty fail": ([fails(0, 1, **CAM)], "CAM: success of ADV2 90 %"),
    "2: L1": ([setting({"l1": 0.11}, attack="ADV2", interpreter="CAM")], "of ADV2 0.110"),
    "2: IoU": ([setting({"iou": 0.5}, **RTS)], "IoU of ADV2 0.500"),
    "3: unseen": ([setting({"score": 0.0}, **CAM)], "CAM: ADV2 detected 0 %"),
    "4: seen": ([setting({"score": 1.0}, **KNOWN)], "adaptive:3x3 on RTS: detected 100 %"),
    "4: seen less often than basic": (  # but by 40 %
        [changed({"score": 1.0}, range(8), **KNOWN)],
        "adaptive:3x3 on RTS: detected 45 %",
    ),
    "4: basic is as evasive": (
        [
            changed({"score": score}, images, attack=attack, squeezer="3x3")
            for attack in ("ADV2", "adaptive:3x3")
            for score, images in ((1.0, range(2)), (0.0, range(2, 20)))
        ],
        "adaptive:3x3 on RTS: detected 10 %",
    ),
    "4: fails": ([fails(0, 1, attack="adaptive:2 bits")], "success 90 %"),
    "4: maps": ([setting({"l1": 0.1}, attack="adaptive:2 bits")], "L1 0.100"),
    "5: fails": ([fails(0, 1, attack="StADV2", aimed="RTS")], "ADV2 on stAdv 90 %"),
    "5: never succeeds": ([setting({"success": 0.0}, attack="StADV2")], "ADV2 on stAdv 0 %"),
    "6: never succeeds": (
        [setting({"success": 0.0}, attack=attack) for attack in ("patch", "class")],
        "patch on GRAD: success 0 %",
    ),
    "5: L1": ([setting({"l1": 0.12}, attack="StADV2", aimed="RTS")], "L1 0.120"),
    "6: fails": ([fails(0, 1, attack="class", aimed="GRAD")], "class on GRAD: success 90 %"),
    "6: nearer to benign": (
        [setting({"target_l1": 0.5}, **PATCH)],
        "patch on CAM: success 100 % [100, 100], L1 to target 0.500",
    ),
    "6: nearer to the target by chance": (  # on average by 0.008, because of one image
        [
            changed({"l1": 0.4, "target_l1": 0.41}, **PATCH),
            changed({"l1": 0.8, "target_l1": 0.45}, [7], **PATCH),
        ],
        "paired difference 0.008 [-0.010",
    ),
    "7: half": ([transferring], "3 of 6 pairs"),
    "8: transfer": ([transferring], "transfer is not low"),
    "8: alike": ([alike], "transfer is low"),
    "8: alike but for chance": (  # means of 0.05 to 0.06, because of one image
        [alike, changed({"l1": 0.25}, [7], **RTS)],
        "to RTS 0.060 [0.050,",
    ),
    "9: ADV2": ([setting({"l1": 0.01}, **RTS_A)], "ADV2 that knows each: L1 on RTS-A 0.010"),
    "9: ADV2 by chance": (  # on average by 0.01, because of one image
        [
            changed({"l1": 0.1}, **RTS),
            changed({"l1": 0.09}, **RTS_A),
            changed({"l1": 0.49}, [7], **RTS_A),
        ],
        "paired difference 0.010 [-0.010",
    ),
    "9: noise": (NOISES, "noise: L1 on RTS-A 0.010"),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_violated(name: str) -> None:
    changes, numbers = VIOLATIONS[name]
    verdict = verdicts(*changes)[int(name[0])]
    assert verdict.holds is False
    assert verdict.support[0].endswith("(violated)")
    assert numbers in verdict.support[0]


@pytest.mark.parametrize(
    ("number", "attacks"),
    [
        (1, ["PGD"]),
        (2, ["ADV2"]),
        (3, ["PGD"]),
        (4, ["adaptive:3x3", "adaptive:2 bits"]),
        (5, ["StADV2"]),
        (6, ["patch", "class"]),
        (7, ["ADV2"]),
        (8, ["PGD"]),
        (9, ["noise:normal:0.03", "noise:uniform:0.3", "ADV2"]),
    ],
)
def test_not_measured(number: int, attacks: list[str]) -> None:
    verdict = verdicts(*(without(attack=attack) for attack in attacks))[number]
    assert verdict.holds is None
    assert verdict.support[0] == f"needs {CLAIMS[number - 1].needs}"


def test_without_success_there_is_no_map_to_compare() -> None:
    found = verdicts(setting({"success": 0.0}))
    # Where a rule asks for a rate of success, it is violated all the same.
    wanted = {number: False if number in (1, 4, 5, 6) else None for number in range(1, 10)}
    assert {number: verdict.holds for number, verdict in found.items()} == wanted


def test_a_little_less_than_pgd_holds() -> None:
    verdict = verdicts(fails(0, attack="ADV2", aimed="CAM"))[1]
    assert verdict.holds is True
    assert any("95 %" in line for line in verdict.support)


def test_rates_that_differ_by_chance_are_alike() -> None:
    # Of 20 images, 5 are detected after PGD alone and 2 after ADV2 alone: the interval holds zero.
    one = changed({"score": 0.0}, range(5), attack="ADV2", aimed="CAM")
    two = changed({"score": 0.0}, (5, 6), attack="PGD")
    verdict = verdicts(one, two)[3]
    assert verdict.holds is True
    assert any("CAM: ADV2 detected 75 % [" in line for line in verdict.support)


def test_models_are_judged_apart() -> None:
    change = fails(*range(20), model="b", attack="ADV2")
    dropped = without(model="b", interpreter="RTS-A")
    found = verdicts(change, dropped, models=("a", "b"))
    assert found[1].holds is False
    assert found[1].models == {"a": True, "b": False}
    assert found[1].support[0].startswith("b: ")
    # A model that lacks rows decides nothing.
    assert found[9].holds is True
    assert found[9].models == {"a": True, "b": None}
    assert found[9].support[-1].endswith("(not measured)")


def test_noise_counts_only_errors() -> None:
    # Where the classifier is right, maps of RTS-A stay.
    right = setting({"success": 0.0, "l1": 0.0}, attack="noise:normal:0.03", interpreter="RTS-A")
    assert verdicts(right)[9].holds is True


@settings(max_examples=10)
@given(st.floats(0.0, 0.5), st.floats(0.0, 0.5))
def test_second_observation_is_its_rule(ours: float, theirs: float) -> None:
    mean = np.full(20, ours).mean(), np.full(20, theirs).mean()
    found = verdicts(
        setting({"l1": ours, "iou": 0.9}, attack="ADV2"), setting({"l1": theirs}, attack="PGD")
    )
    assert found[2].holds is bool(mean[0] <= 0.4 * mean[1])


def test_rules_are_docstrings_on_one_line() -> None:
    assert len(CLAIMS) == 9
    for claim in CLAIMS:
        assert claim.rule.endswith(".")
        assert "\n" not in claim.rule
        assert "  " not in claim.rule

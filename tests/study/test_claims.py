# SPDX-License-Identifier: MIT
"""Every observation holds, is violated, is undecided, and is not measured, on rows made for it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import COUNT, NAMES, results, setting, without

from captum_adv2.study.claims import CLAIMS, Check, Verdict, judge


class Verdicts(dict[int, Verdict]):
    """The verdicts on changed rows, each judged when it is asked for."""

    def __init__(self, *changes, **how) -> None:
        self.evidence = results(*changes, **how)

    def __missing__(self, number: int) -> Verdict:
        (found,) = judge(self.evidence, [number])
        return found


verdicts = Verdicts


def changed(change, images=range(COUNT), **wanted):
    """Return a change of columns on some images, where other columns have some values."""
    return lambda row: (
        {**row, **change}
        if row["image"] in images and wanted.items() <= row.items() and change.keys() <= row.keys()
        else row
    )


def fails(count: int, **wanted):
    """Return a change by which an attack fails on the first images."""
    return changed({"success": 0.0}, range(count), **wanted)


def first(count: int) -> range:
    return range(count)


def transferring(*pairs: tuple[str, str], l1: float = 0.05):
    """Let images against the first of a pair look benign to the second."""

    def change(row):
        near = row["attack"] == "ADV2" and (row["aimed"], row.get("interpreter")) in pairs
        return {**row, "l1": l1} if near else row

    return change


def alike(row):
    """Let ADV2 reach the same on every interpreter."""
    if row["attack"] == "ADV2" and row["aimed"] == row.get("interpreter"):
        return {**row, "l1": 0.05, "iou": 0.9}
    return row


def test_all_hold() -> None:
    found = judge(results())
    assert [verdict.number for verdict in found] == list(range(1, 10))
    for verdict in found:
        assert verdict.answer == "holds", verdict
        assert verdict.models == {"resnet": "holds"}
        assert all(check.answer == "holds" for check in verdict.checks["resnet"])


HALF = [("GRAD", "CAM"), ("CAM", "GRAD"), ("RTS", "CAM")]
CAM = {"attack": "ADV2", "aimed": "CAM"}
RTS, RTS_A = ({"attack": "ADV2", "aimed": name, "interpreter": name} for name in ("RTS", "RTS-A"))
KNOWN = {"attack": "adaptive:3x3", "squeezer": "3x3"}
LED = [setting({"target_l1": 0.3}, attack="patch", aimed=name) for name in ("GRAD", "CAM")]
# Changes, and the subject and the quantity of the criterion that decides.
VIOLATIONS = {
    "1: success": ([fails(16, **CAM)], "CAM", "success, PGD's less"),
    "1: confidence": ([setting({"confidence": 0.9}, **CAM)], "CAM", "confidence"),
    "2: L1": ([setting({"l1": 0.11}, attack="ADV2", interpreter="CAM")], "CAM", "L1, share"),
    "2: IoU": ([setting({"iou": 0.4}, **RTS)], "RTS", "IoU"),
    "3: by a squeezer": (
        [changed({"score": 0.0}, squeezer="3x3", **CAM)],
        "3x3, ADV2 on CAM",
        "detected",
    ),
    "3: detected more": (
        [changed({"score": 0.0}, squeezer="2 bits", attack="PGD")],
        "2 bits, ADV2 on GRAD",
        "detected",
    ),
    "4: seen": ([setting({"score": 1.0}, **KNOWN)], "adaptive:3x3 on RTS", "detected"),
    "4: no rarer than basic": (
        [
            changed({"score": score}, images, attack=attack, squeezer="3x3")
            for attack in ("ADV2", "adaptive:3x3")
            for score, images in ((0.0, range(COUNT)), (1.0, first(14)))
        ]
        + [changed({"score": 1.0}, first(28), **KNOWN)],
        "adaptive:3x3 on RTS",
        "detected, less basic",
    ),
    "4: fails": ([fails(12, attack="adaptive:2 bits")], "adaptive:2 bits on RTS", "success"),
    "4: maps": ([setting({"l1": 0.1}, attack="adaptive:2 bits")], "adaptive:2 bits on RTS", "L1"),
    "5: fails": ([fails(12, attack="StADV2", aimed="RTS")], "RTS", "success of StADV2"),
    "5: never succeeds": ([setting({"success": 0.0}, attack="StADV2")], "GRAD", "success"),
    "5: above stAdv": ([setting({"l1": 0.3}, attack="StADV2", aimed="RTS")], "RTS", "L1, share"),
    "5: not half of it": (
        [setting({"l1": 0.15}, attack="StADV2", aimed=name) for name in ("RTS", "CAM")],
        "all",
        "interpreters with at most half",
    ),
    "6: not led": (LED, "patch", "interpreters that are led"),
    "6: never succeeds": ([setting({"success": 0.0}, attack="class")], "class", "interpreters"),
    "7: half": ([transferring(*HALF)], "all", "pairs nearer"),
    "8: transfer": ([transferring(*HALF)], "all", "pairs nearer"),
    "8: alike": ([alike], "over", "share of PGD's L1"),
    "9: fooled": ([setting({"l1": 0.01, "iou": 0.9}, **RTS_A)], "ADV2", "L1, share"),
    "9: drift": (
        [setting({"drift": 0.08}, attack="benign", interpreter="RTS-A")],
        "clean images",
        "L1 to the map of RTS",
    ),
    "9: noise": (
        [setting({"l1": 0.05}, attack=f"noise:{k}") for k in ("normal:0.03", "uniform:0.3")],
        "noise",
        "L1 over that of RTS",
    ),
}
UNDECIDED = {
    "1: success": ([fails(3, **CAM)], "CAM", "success, PGD's less"),
    "1: a few images": ([without(image=n) for n in range(8, COUNT)], "CAM", "success, PGD's less"),
    "1: confidence": (
        [changed({"confidence": 0.4}, first(3), **CAM)],
        "CAM",
        "confidence",
    ),
    "2: L1": (
        [changed({"l1": 0.7}, first(3), attack="ADV2", interpreter="CAM")],
        "CAM",
        "L1, share",
    ),
    "2: IoU": ([changed({"iou": 0.02}, first(18), **RTS)], "RTS", "IoU"),
    "3: twelve points": (
        [changed({"score": 0.0}, first(5), squeezer="3x3", **CAM)],
        "3x3, ADV2 on CAM",
        "detected",
    ),
    "4: half are seen": (
        [changed({"score": 1.0}, first(20), **KNOWN)],
        "adaptive:3x3 on RTS",
        "detected",
    ),
    "5: half of stAdv's": (
        [changed({"l1": 0.15}, first(20), attack="StADV2", aimed=name) for name in ("RTS", "CAM")],
        "all",
        "interpreters with at most half",
    ),
    "6: of two, half are led": (
        [
            LED[0],
            changed({"target_l1": 0.3}, first(20), attack="patch", aimed="CAM"),
        ],
        "patch",
        "interpreters that are led",
    ),
    "7: in the middle": (
        [
            changed({"l1": 0.18}, interpreter="CAM", attack="ADV2", aimed="GRAD"),
            changed({"l1": 0.12}, first(20), interpreter="CAM", attack="ADV2", aimed="GRAD"),
            transferring(*HALF[1:]),
        ],
        "all",
        "pairs nearer",
    ),
    "8: nearly twice": (
        [alike, changed({"l1": 0.3}, first(8), **RTS)],
        "over",
        "share of PGD's L1",
    ),
    "9: half are fooled": (
        [
            setting({"l1": 0.01, "iou": 0.9}, **RTS_A),
            changed({"iou": 0.1}, first(20), **RTS_A),
        ],
        "ADV2",
        "IoU",
    ),
    "9: noise": (
        [
            changed({"l1": level}, range(start, COUNT, 2), attack=f"noise:{kind}", interpreter=name)
            for kind in ("normal:0.03", "uniform:0.3")
            for name, start, level in (("RTS-A", 0, 0.09), ("RTS-A", 1, 0.02), ("RTS", 0, 0.05))
        ],
        "noise",
        "L1 over that of RTS",
    ),
}
CASES = [
    *(pytest.param(*case, "does not hold", id=name) for name, case in VIOLATIONS.items()),
    *(pytest.param(*case, "too few images", id=f"{n}, undecided") for n, case in UNDECIDED.items()),
]


@pytest.mark.parametrize(("changes", "subject", "quantity", "answer"), CASES)
def test_answers(
    changes, subject: str, quantity: str, answer: str, request: pytest.FixtureRequest
) -> None:
    number = int(request.node.callspec.id[0])
    verdict = verdicts(*changes)[number]
    assert verdict.answer == answer
    deciding = {
        (check.subject, check.quantity)
        for check in verdict.checks["resnet"]
        if check.answer == answer
    }
    assert any(subject in one and each.startswith(quantity) for one, each in deciding)


@pytest.mark.parametrize(
    ("number", "attacks"),
    [
        (1, ["ADV2"]),
        (2, ["PGD"]),
        (3, ["PGD"]),
        (4, ["adaptive:3x3", "adaptive:2 bits"]),
        (5, ["StADV2"]),
        (6, ["patch", "class"]),
        (7, ["PGD"]),
        (8, ["ADV2"]),
        (9, ["noise:normal:0.03", "noise:uniform:0.3", "ADV2", "benign"]),
    ],
)
def test_not_measured(number: int, attacks: list[str]) -> None:
    verdict = verdicts(*(without(attack=attack) for attack in attacks))[number]
    assert verdict.answer is None
    assert CLAIMS[number - 1].needs


def test_without_success_there_is_no_map_to_compare() -> None:
    found = verdicts(setting({"success": 0.0}))
    # A rule that asks for a rate of success is violated; the first compares it with PGD's.
    wanted = {n: "does not hold" if n in (4, 5, 6) else None for n in (1, 2, 4, 5, 6, 7)}
    assert {number: found[number].answer for number in wanted} == wanted


def test_an_attack_is_as_reliable_as_one_that_fails_on_the_same_images() -> None:
    weak = [fails(8, attack=attack) for attack in ("PGD", "ADV2")]
    assert verdicts(*weak)[1].answer == "holds"
    assert verdicts(weak[1])[1].answer != "holds"


def test_an_answer_names_what_it_is_without() -> None:
    found = verdicts(without(attack="ADV2", aimed="RTS"))
    assert [found[number].without("resnet") for number in (1, 2, 3)] == [["RTS"], ["RTS"], []]
    assert found[2].models == {"resnet": "holds"}
    assert verdicts(without(attack="class"))[6].without("resnet") == ["class"]
    assert verdicts(without(attack="adaptive:3x3"))[4].without("resnet") == ["3x3"]
    assert verdicts(without(attack="PGD"))[2].without("resnet") == []  # there is no answer


def test_half_of_a_rule_decides_nothing() -> None:
    found = verdicts(without(attack="PGD"))[2]
    assert {check.answer for check in found.checks["resnet"]} == {None, "holds"}
    assert found.answer is None


def test_models_are_judged_apart() -> None:
    change = fails(COUNT, model="b", attack="ADV2")
    dropped = without(model="b", interpreter="RTS-A")
    found = verdicts(change, dropped, models=("a", "b"))
    assert found[1].answer == "does not hold"
    assert found[1].models == {"a": "holds", "b": "does not hold"}
    # A model that lacks rows decides nothing.
    assert found[9].answer == "holds"
    assert found[9].models == {"a": "holds", "b": None}


def test_of_attacks_that_know_a_squeezer_the_best_counts() -> None:
    def both(row):
        """Name half of the rows after Algorithm 2, and let the others fail."""
        if row["attack"] != "adaptive:2 bits":
            return row
        return {**row, "attack": "adaptive:2 bits, Algorithm 2"} if row["image"] < 100 else row

    failing = setting({"score": 1.0}, attack="adaptive:2 bits", squeezer="2 bits")
    assert verdicts(failing)[4].answer == "does not hold"
    evidence = results(both)
    assert evidence.named("adaptive:") == ["adaptive:2 bits, Algorithm 2", "adaptive:3x3"]
    (verdict,) = judge(evidence, [4])
    assert verdict.answer == "holds"


def test_pairs_count_where_the_attack_works_and_twins_once() -> None:
    weak = changed({"l1": 0.2}, **RTS)
    rows = {check.subject: check for check in verdicts(weak)[7].checks["resnet"]}
    assert rows["RTS"].answer == "does not hold"
    assert not rows["RTS"].decides
    assert str(rows["all"].found) == "4 of 4"
    none = verdicts(changed({"l1": 0.2}, attack="ADV2"))
    assert none[7].answer is none[8].answer is None

    def twin(row):
        return {key: "GradCAM" if value == "RTS" else value for key, value in row.items()}

    checks = verdicts(twin)[7].checks["resnet"]
    assert {check.subject for check in checks} == {"GRAD", "CAM", "all"}


def test_noise_of_an_image_is_averaged_and_counts_only_errors() -> None:
    # Where the classifier is right, maps of RTS-A stay.
    right = setting({"success": 0.0, "l1": 0.0}, attack="noise:normal:0.03", interpreter="RTS-A")
    (noise,) = [c for c in verdicts(right)[9].checks["resnet"] if c.subject == "noise"]
    assert noise.answer == "holds"
    assert noise.found.size == COUNT


@settings(max_examples=5)
@given(st.floats(0.01, 0.5), st.floats(0.01, 0.5))
def test_second_observation_is_its_rule(ours: float, theirs: float) -> None:
    found = verdicts(
        setting({"l1": ours, "iou": 0.9}, attack="ADV2"), setting({"l1": theirs}, attack="PGD")
    )
    ratio: Check = found[2].checks["resnet"][0]
    assert ratio.found.mean == pytest.approx(ours / theirs)
    assert found[2].answer == ("holds" if ours / theirs <= 0.4 + 1e-9 else "does not hold")


def test_rules_are_docstrings_on_one_line() -> None:
    assert len(CLAIMS) == 9
    for claim in CLAIMS:
        assert claim.rule.endswith(".")
        assert "\n" not in claim.rule
        assert "  " not in claim.rule


def test_interpreters_are_the_ones_of_the_rows() -> None:
    assert results().interpreters == [*NAMES]

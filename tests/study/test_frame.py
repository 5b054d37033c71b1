# SPDX-License-Identifier: MIT
"""Values are those that count; means, thresholds and flags are NumPy's of the same rows."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from synthetic import COUNT, NAMES, SQUEEZERS, results, setting, study, without

from captum_adv2.evaluation.metrics import interval, wilson
from captum_adv2.study.estimates import Estimate, apart, contrasted
from captum_adv2.study.frame import difference


def test_an_estimate_is_the_mean_and_its_bootstrap_interval() -> None:
    values = np.random.default_rng(0).uniform(size=9)
    assert Estimate.of(pd.Series(values))[:4] == (values.mean(), *interval(values), 9)
    assert str(Estimate.of(pd.Series(dtype=float), percent=True)) == "–"
    rate = Estimate.of([1.0, 1.0, 0.0], percent=True)
    assert rate[:4] == (2 / 3, *wilson(2, 3), 3)


def test_a_few_values_have_no_interval() -> None:
    few = Estimate.of([0.25, 0.75])
    assert (few.mean, few.low, few.high) == (0.5, -np.inf, np.inf)
    assert str(few) == "0.500 (2 images)"


def test_a_contrast_is_bootstrapped_on_the_images_of_all_its_cells() -> None:
    fails = setting({"success": 0.0}, attack="PGD", interpreter="CAM", image=3)
    found = results(fails)
    ours, theirs = (found.values("L1", "resnet", attack, "CAM") for attack in ("ADV2", "PGD"))
    both = pd.concat([ours, theirs], axis=1).dropna().to_numpy()
    ratio = found.contrast(
        lambda a, b: a / b, "resnet", ("L1", "ADV2", "CAM"), ("L1", "PGD", "CAM")
    )
    assert ratio == contrasted(lambda a, b: a / b, both)
    assert ratio.size == COUNT - 1
    assert ratio.mean == pytest.approx(both[:, 0].mean() / both[:, 1].mean())
    assert ratio.low < ratio.mean < ratio.high
    # Paired, values that rise together have a ratio that is known exactly.
    exact = contrasted(lambda a, b: a / b, np.arange(1.0, 9.0)[:, None] * [1.0, 2.0])
    assert exact[:3] == (0.5, 0.5, 0.5)


def test_differences_of_rates_are_newcombes() -> None:
    # Newcombe 1998, Statistics in Medicine 17, 873: 56 of 70 less 48 of 80.
    one, other = (
        Estimate.of([1.0] * k + [0.0] * (n - k), percent=True) for k, n in ((56, 70), (48, 80))
    )
    assert [round(x, 4) for x in apart(one, other)[:3]] == [0.2, 0.0524, 0.3339]
    # Correlated rates differ with more certainty.
    assert apart(one, other, 0.5).low > apart(one, other).low


def test_pairs_of_flags_that_agree_are_correlated() -> None:
    flags = [
        setting({"score": 0.0}, attack=attack, image=image) for attack in ("ADV2", "PGD")
        for image in range(COUNT // 2)
    ]  # fmt: skip
    found = results(*flags)
    paired = found.excess("resnet", ("ADV2", "CAM"), ("PGD", ""), "3x3")
    alone = apart(*(found.detection("resnet", *p, "3x3") for p in (("ADV2", "CAM"), ("PGD", ""))))
    assert paired.mean == alone.mean == 0
    assert 0 < paired.high < alone.high / 5


def test_a_difference_is_on_common_images() -> None:
    first = pd.Series({(0, 1): 3.0, (0, 2): 1.0})
    assert difference(first, pd.Series({(0, 1): 1.0, (1, 2): 0.0})).to_dict() == {(0, 1): 2.0}


def test_rates_are_over_all_images_and_distances_over_successes() -> None:
    fails = setting({"success": 0.0, "l1": 9.0}, attack="ADV2", aimed="CAM", image=3)
    maps, *_ = study(fails)
    rows = maps[(maps.attack == "ADV2") & (maps.aimed == "CAM") & (maps.interpreter == "CAM")]
    found, place = results(fails), ("resnet", "ADV2", "CAM")
    assert found.estimate("ASR", *place).mean == pytest.approx(1 - 1 / COUNT)
    assert found.values("MC", *place).tolist() == rows.confidence.tolist()
    won = rows[rows.image != 3]
    assert found.values("L1", *place).tolist() == won.l1.tolist()


def test_an_attack_without_interpreter_is_explained_by_all_and_others_by_their_own() -> None:
    found = results()
    for name in NAMES:
        assert len(found.rows("resnet", "PGD", name)) == COUNT
        own, other = (found.values("L1", "resnet", "ADV2", name, *a) for a in ((), ("GRAD",)))
        assert own.equals(other) is (name == "GRAD")
    assert found.named("adaptive:") == [f"adaptive:{name}" for name in SQUEEZERS]
    assert found.named("PGD") == ["PGD"]
    assert found.having("adaptive:3x3") == ["RTS"]
    assert (found.interpreters, found.every) == ([*NAMES], [*NAMES, "RTS-A"])


def test_rows_are_of_all_seeds_but_for_clean_images_and_models_kept_apart() -> None:
    found = results(seeds=(0, 1), models=("a", "b"))
    assert found.models == ["a", "b"]
    assert len(found.values("L1", "b", "PGD", "CAM")) == 2 * COUNT
    assert len(found.rows("b", "benign", "CAM")) == COUNT
    assert len(found.scores("a", "benign", "")) == COUNT


def test_more_seeds_of_an_image_are_no_more_images() -> None:
    others = [without(image=number) for number in range(1, COUNT)]
    found = results(*others, seeds=tuple(range(8)))
    rate, mean = (found.estimate(title, "resnet", "ADV2", "CAM") for title in ("ASR", "L1"))
    share = found.contrast(lambda a: a, "resnet", ("L1", "ADV2", "CAM"))
    flagged = found.detection("resnet", "PGD", "")
    excess = found.excess("resnet", ("PGD", ""), ("ADV2", "CAM"), "3x3")
    assert {each.size for each in (rate, mean, share, flagged, excess)} == {1}
    assert rate.low < 0.3
    trust = found.trust("resnet", "CAM")
    assert trust is not None
    assert len(trust.least) == 1
    later = results(setting({"least": np.inf}, seed=1, attack="curve"), seeds=(0, 1))
    assert later.trust("resnet", "CAM").area == results().trust("resnet", "CAM").area


def test_of_several_seeds_an_image_has_its_mean() -> None:
    failed = setting({"success": 0.0}, attack="PGD", seed=1)
    found = results(failed, seeds=(0, 1))
    rate = found.estimate("ASR", "resnet", "PGD", "CAM")
    assert (rate.mean, rate.size) == (0.5, COUNT)
    own = results().estimate("L1", "resnet", "PGD", "CAM")
    assert found.estimate("L1", "resnet", "PGD", "CAM") == own  # over successful attacks


def test_thresholds_flag_one_of_twenty_held_out_images() -> None:
    _, scores, _ = study()
    held = scores[scores.target == -1].pivot(index="image", columns="squeezer", values="score")
    held["joint"] = held.max(axis=1)
    found = results().thresholds["resnet"]
    assert list(found) == [*SQUEEZERS, "joint"]
    for name, threshold in found.items():
        assert threshold == np.sort(held[name])[-3]


def test_flags_are_of_successful_attacks() -> None:
    fails = setting({"success": 0.0}, attack="PGD", image=0)
    low = setting({"score": 0.0}, attack="PGD", image=0)
    found = results(fails, low)
    flagged = found.flagged("resnet", "PGD", "")
    assert len(flagged) == COUNT - 1
    assert flagged.eq(1).all()
    assert found.detection("resnet", "PGD", "", "3x3").percent
    assert found.flagged("resnet", "adaptive:3x3", "RTS", "3x3").mean() < 0.5
    assert found.flagged("resnet", "adaptive:3x3", "RTS").eq(1).all()  # the other squeezer


def test_a_squeezer_without_a_score_leaves_the_joint_score_out() -> None:
    found = results(setting({"score": np.nan}, squeezer="3x3", image=2))
    assert len(found.scores("resnet", "PGD", "", "2 bits")) == COUNT
    assert (0, 2) not in found.scores("resnet", "PGD", "")


def test_without_squeezers_nothing_is_flagged() -> None:
    found = results(lambda row: None if "squeezer" in row else row)
    assert (found.squeezers, found.thresholds) == ([], {})
    assert found.flagged("resnet", "PGD", "").empty
    assert found.detection("resnet", "PGD", "").size == 0


def test_boxes_are_tuned_on_other_images() -> None:
    best, error, held = results().localisation("resnet", "CAM")
    assert (best, held) == ("mean 2", COUNT)
    assert (error.mean, error.size) == (1 / 8, COUNT)
    assert results().localisation("resnet", "LIME")[0] == ""


def test_trust_is_of_the_least_eps() -> None:
    found = results().trust("resnet", "GRAD")
    assert found is not None
    assert found.shares()[::2] == [0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert (
        results(lambda row: None if row["attack"] == "curve" else row).trust("resnet", "CAM")
        is None
    )

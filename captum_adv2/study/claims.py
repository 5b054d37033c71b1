# SPDX-License-Identifier: MIT
"""Whether the paper's nine observations hold in a study, each by a rule that decides on numbers.

An observation is checked for every classifier by itself, and there for every interpreter (or pair,
or squeezer) that was measured. It holds if every check does. A check that lacks its rows, or whose
attacks never succeeded so that there is no map to compare, is not measured and decides nothing; an
observation without any measured check is not measured. `DISTILLED` is no interpreter of
observations 1 to 8: it was trained to break the second.

The docstring of a check is its rule, word by word as the page prints it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import pandas as pd

from captum_adv2.study.cases import DISTILLED
from captum_adv2.study.frame import FALSE_POSITIVES, JOINT, Estimate, Results, difference

_SUCCESS = 0.95  # least success rate of an attack that works


class Check(NamedTuple):
    """The numbers of a classifier and, say, an interpreter; ``holds`` is None if not measured."""

    text: str
    holds: bool | None


class Claim(NamedTuple):
    """An observation and how it is judged.

    Attributes:
        text: The observation, in our words.
        rule: What has to hold.
        needs: What has to be measured.
        checks: Checks a classifier.
    """

    text: str
    rule: str
    needs: str
    checks: Callable[[Results, str], Iterator[Check]]


class Verdict(NamedTuple):
    """Whether an observation holds.

    Attributes:
        number: The paper's, 1 to 9.
        claim: The observation.
        holds: ``None`` if it was not measured.
        support: The numbers that decide, a line a check; violations of the rule come first.
        models: Classifier by classifier.
    """

    number: int
    claim: Claim
    holds: bool | None
    support: list[str]
    models: dict[str, bool | None]


CLAIMS: list[Claim] = []
"""The observations in the paper's order."""


def _claim(text: str, needs: str) -> Callable[[_Checks], _Checks]:
    """Make a claim of a function whose docstring is the rule."""

    def register(checks: _Checks) -> _Checks:
        rule = (inspect.getdoc(checks) or "").replace("\n", " ")
        CLAIMS.append(Claim(text, rule, needs, checks))
        return checks

    return register


_Checks = Callable[[Results, str], Iterator[Check]]


def judge(results: Results) -> list[Verdict]:
    """Return what becomes of the nine observations."""
    return [_verdict(number, claim, results) for number, claim in enumerate(CLAIMS, 1)]


def _verdict(number: int, claim: Claim, results: Results) -> Verdict:
    found = {model: [*claim.checks(results, model)] for model in results.models}
    models = {model: _all(check.holds for check in checks) for model, checks in found.items()}
    holds = _all(models.values())
    support = [] if holds is not None else [f"needs {claim.needs}"]
    for value, word in ((False, "violated"), (True, "holds"), (None, "not measured")):
        for model, checks in found.items():
            support += [f"{model}: {text} ({word})" for text, each in checks if each is value]
    return Verdict(number, claim, holds, support, models)


def _all(found: Iterable[bool | None]) -> bool | None:
    """Return whether all that was measured holds; ``None`` if nothing was."""
    measured = [holds for holds in found if holds is not None]
    return all(measured) if measured else None


def _check(text: str, holds: bool, *estimates: Estimate) -> Check:
    """Return a check, which is not measured where an estimate lacks values."""
    return Check(text, bool(holds) if all(entry.size for entry in estimates) else None)


@_claim(
    "With two goals at once, ADV2 fools the classifier as reliably as an attack with one.",
    "PGD, and ADV2 towards benign maps",
)
def _prediction(results: Results, model: str) -> Iterator[Check]:
    """For every interpreter, ADV2 succeeds on at least 95 % of the images, and at most 5 % of them
    less often than PGD.
    """
    for name in results.interpreters:
        ours, theirs = (results.estimate("ASR", model, a, name) for a in ("ADV2", "PGD"))
        text = f"{name}: success of ADV2 {ours.text(True)}, of PGD {theirs.text(True)}"
        holds = ours.mean >= _SUCCESS and ours.mean >= theirs.mean - 0.05
        yield _check(text, holds, ours, theirs)


@_claim(
    "Maps of images attacked by ADV2 look like those of the clean images.",
    "PGD, and ADV2 towards benign maps",
)
def _maps(results: Results, model: str) -> Iterator[Check]:
    """For every interpreter, ADV2's mean L1 to the benign map is at most 40 % of PGD's (60 % less),
    and its mean IoU with it is above 0.5.
    """
    for name in results.interpreters:
        ours, theirs = (results.estimate("L1", model, a, name) for a in ("ADV2", "PGD"))
        overlap = results.estimate("IoU", model, "ADV2", name)
        text = (
            f"{name}: L1 of ADV2 {ours.text()}, of PGD {theirs.text()}{_less(ours, theirs)}; IoU "
            f"of ADV2 {overlap.text()}"
        )
        holds = ours.mean <= 0.4 * theirs.mean and overlap.mean > 0.5
        yield _check(text, holds, ours, theirs, overlap)


@_claim(
    "Feature squeezing detects ADV2 about as often as PGD.",
    "PGD and ADV2, scores of squeezers, and held-out images that set their thresholds",
)
def _detection(results: Results, model: str) -> Iterator[Check]:
    """For ADV2 on every interpreter, the joint detection rate differs from PGD's by at most 10
    points, or the 95 % interval of the paired difference holds zero.
    """
    theirs = results.flagged(model, "PGD", "")
    for name in results.having("ADV2"):
        ours = results.flagged(model, "ADV2", name)
        first, second = Estimate.of(ours), Estimate.of(theirs)
        paired = Estimate.of(difference(ours, theirs))
        text = (
            f"ADV2 on {name} detected {first.text(True)}, PGD {second.text(True)}, paired "
            f"difference {paired.text(True)}"
        )
        near = round(abs(first.mean - second.mean), 9) <= 0.1  # 0.4 - 0.3 is above 0.1
        yield _check(text, near or paired.low <= 0 <= paired.high, first, second)


@_claim(
    "ADV2 that knows the detector evades it, and its maps stay as they are.",
    "adaptive and basic ADV2, scores of squeezers, and held-out images",
)
def _evasion(results: Results, model: str) -> Iterator[Check]:
    """For every interpreter and squeezer, the attack that knows the squeezer is detected by it at
    most 30 % of the time, and less often than basic ADV2 is or no more often than 5 % (the false
    positives); it succeeds on at least 95 %; and its mean L1 is at most 0.02 above basic ADV2's.
    """
    for attack in results.parameters("adaptive"):
        known = attack.partition(":")[2]
        squeezer = known if known in results.squeezers else JOINT
        for name in results.having(attack):
            found, basic = (
                Estimate.of(results.flagged(model, a, name, squeezer)) for a in (attack, "ADV2")
            )
            rate = results.estimate("ASR", model, attack, name)
            ours, theirs = (results.estimate("L1", model, a, name) for a in (attack, "ADV2"))
            text = (
                f"{attack} on {name}: detected {found.text(True)}, basic ADV2 {basic.text(True)}; "
                f"success {rate.text(True)}; L1 {ours.text()}, basic {theirs.text()}"
            )
            rarely = found.mean <= 0.3 and (
                found.mean < basic.mean or found.mean <= FALSE_POSITIVES
            )
            holds = rarely and rate.mean >= _SUCCESS and ours.mean <= theirs.mean + 0.02
            yield _check(text, holds, found, basic, rate, ours, theirs)


@_claim(
    "ADV2 can be built on an attack of another kind, one that moves pixels.",
    "the framework stadv",
)
def _flows(results: Results, model: str) -> Iterator[Check]:
    """For every interpreter, ADV2 on stAdv succeeds on at least 95 % of the images, and its mean L1
    is at most 50 % of stAdv's.
    """
    for name in results.interpreters:
        rate = results.estimate("ASR", model, "StADV2", name)
        ours, theirs = (results.estimate("L1", model, a, name) for a in ("StADV2", "stAdv"))
        text = (
            f"{name}: success of ADV2 on stAdv {rate.text(True)}; L1 {ours.text()}, of stAdv "
            f"{theirs.text()}{_less(ours, theirs)}"
        )
        holds = rate.mean >= _SUCCESS and ours.mean <= 0.5 * theirs.mean
        yield _check(text, holds, rate, ours, theirs)


@_claim(
    "Class and map can be led to two unrelated places: the two are only loosely tied.",
    "ADV2 towards patches or maps of other classes",
)
def _targets(results: Results, model: str) -> Iterator[Check]:
    """For patches and for maps of other classes, on every interpreter, the attack succeeds on at
    least 95 % of the images, and its maps are nearer to the target map than to the benign one: the
    95 % interval of the paired difference in L1 is above zero.
    """
    for attack in ("patch", "class"):
        for name in results.having(attack):
            rate = results.estimate("ASR", model, attack, name)
            benign, aimed = (
                results.values(title, model, attack, name) for title in ("L1", "L1 to target")
            )
            gap = Estimate.of(difference(benign, aimed))
            text = (
                f"{attack} on {name}: success {rate.text(True)}; L1 to target "
                f"{Estimate.of(aimed).text()}, to benign {Estimate.of(benign).text()}, paired "
                f"difference {gap.text()}"
            )
            yield _check(text, rate.mean >= _SUCCESS and gap.low > 0, rate, gap)


@_claim(
    "An attack on one interpreter seldom fools another.",
    "PGD, and ADV2 towards benign maps of at least two interpreters",
)
def _transfer(results: Results, model: str) -> Iterator[Check]:
    """For more than half of the ordered pairs of interpreters, the mean L1 on the second of images
    made against the first is nearer to PGD's there than to that of ADV2 made against the second.
    """
    names = results.having("ADV2")
    near, measured = [], 0
    for column in names:
        own = results.estimate("L1", model, "ADV2", column).mean
        pgd = results.estimate("L1", model, "PGD", column).mean
        for source in names:
            cell = results.estimate("L1", model, "ADV2", column, source).mean
            if source == column or pd.isna([own, pgd, cell]).any():
                continue
            measured += 1
            if abs(cell - pgd) >= abs(cell - own):
                near.append(f"{source} on {column} {cell:.3f} (own {own:.3f}, PGD {pgd:.3f})")
    far = measured - len(near)
    text = f"{far} of {measured} pairs are nearer to PGD"
    if near:
        text += f"; transferred: {', '.join(near)}"
    yield Check(text, 2 * far > measured if measured else None)


@_claim(
    "Interpreters look at different sides of a classifier, which leaves the gap open.",
    "PGD, and ADV2 towards benign maps of at least two interpreters",
)
def _aspects(results: Results, model: str) -> Iterator[Check]:
    """Observation 7 holds, and interpreters differ in robustness: of the largest and smallest mean
    L1 under ADV2, or of the largest and smallest mean IoU, the 95 % intervals are disjoint.
    """
    low = _all(check.holds for check in _transfer(results, model))
    texts = [{True: "transfer is low", False: "transfer is not low"}.get(low, "transfer unknown")]
    disjoint = []
    for title in ("L1", "IoU"):
        every = [
            (results.estimate(title, model, "ADV2", name), name) for name in results.having("ADV2")
        ]
        found = [pair for pair in every if pair[0].size]
        if len(found) > 1:
            (least, first), (most, last) = min(found), max(found)
            texts.append(f"{title} from {first} {least.text()} to {last} {most.text()}")
            disjoint.append(least.high < most.low)
    known = low is not None and bool(disjoint)
    yield Check("; ".join(texts), bool(low) and any(disjoint) if known else None)


@_claim(
    "Training an interpreter against ADV2 narrows the gap.",
    f"the interpreters RTS and {DISTILLED} under ADV2 or noise",
)
def _distilled(results: Results, model: str) -> Iterator[Check]:
    """Maps of RTS-A move more than those of RTS, under ADV2 that knows each, and on images that
    noise makes the classifier err on (all kinds of noise together): the 95 % intervals of the
    paired differences in L1 are above zero.
    """
    attacks = {"ADV2 that knows each": ["ADV2"], "noise": results.parameters("noise")}
    for title, names in attacks.items():
        rts, other = (
            pd.concat([results.values("L1", model, attack, name) for attack in names], keys=names)
            if names
            else pd.Series(dtype=float)
            for name in ("RTS", DISTILLED)
        )
        gap = Estimate.of(difference(other, rts))
        text = (
            f"{title}: L1 on {DISTILLED} {Estimate.of(other).text()}, on RTS "
            f"{Estimate.of(rts).text()}, paired difference {gap.text()}"
        )
        yield _check(text, gap.low > 0, gap)


def _less(ours: Estimate, theirs: Estimate) -> str:
    """Return by how much a mean is below another."""
    if not ours.size or not theirs.mean > 0:
        return ""
    return f" ({round(100 * (1 - ours.mean / theirs.mean), 1):g} % less)"

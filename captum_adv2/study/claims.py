# SPDX-License-Identifier: MIT
"""Whether the paper's nine observations hold in a study, each by a rule that decides on numbers.

An observation is checked for every classifier by itself, and there for every interpreter (or pair,
or squeezer) that was measured. It holds if every measured check does. A check whose rule asks for a
rate of success is violated by a lower one. Any other check that lacks its rows, or whose attacks
never succeeded so that there is no map to compare, is not measured and decides nothing; an
observation without any measured check is not measured. `DISTILLED` is no interpreter of
observations 1 to 8: it was trained to break the second.

The docstring of a check is its rule, word by word as the page prints it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, TypeAlias

import pandas as pd

from captum_adv2.study.cases import DISTILLED
from captum_adv2.study.frame import FALSE_POSITIVES, JOINT, Estimate, Results, difference


class Check(NamedTuple):
    """The numbers of a classifier and, say, an interpreter."""

    text: str
    holds: bool | None  # None: not measured


Checks: TypeAlias = Callable[[Results, str], Iterator[Check]]  # of a classifier


class Claim(NamedTuple):
    """An observation and how it is judged."""

    text: str
    rule: str
    needs: str  # what has to be measured
    checks: Checks


class Verdict(NamedTuple):
    """Whether an observation holds."""

    number: int
    claim: Claim
    holds: bool | None
    support: list[str]  # the numbers, a line a check; violations of the rule come first
    models: Mapping[str, bool | None]  # classifier by classifier


_BASIC = "PGD, and ADV2 towards benign maps"
_PAIRS = f"{_BASIC} of at least two interpreters"

CLAIMS: list[Claim] = []
"""The observations in the paper's order."""


def _claim(text: str, needs: str) -> Callable[[Checks], Checks]:
    """Make a claim of a function whose docstring is the rule."""

    def register(checks: Checks) -> Checks:
        rule = (inspect.getdoc(checks) or "").replace("\n", " ")
        CLAIMS.append(Claim(text, rule, needs, checks))
        return checks

    return register


def judge(results: Results) -> list[Verdict]:
    """Return what becomes of the nine observations."""
    return [_verdict(number, claim, results) for number, claim in enumerate(CLAIMS, 1)]


def _verdict(number: int, claim: Claim, results: Results) -> Verdict:
    found = {model: [*claim.checks(results, model)] for model in results.models}
    models = {model: _all(check.holds for check in checks) for model, checks in found.items()}
    holds = _all(models.values())
    support = [f"needs {claim.needs}"] if holds is None else []
    for value, word in ((False, "violated"), (True, "holds"), (None, "not measured")):
        for model, checks in found.items():
            support += [f"{model}: {text} ({word})" for text, each in checks if each is value]
    return Verdict(number, claim, holds, support, models)


def _all(found: Iterable[bool | None]) -> bool | None:
    """Return whether all that was measured holds; ``None`` if nothing was."""
    measured = [holds for holds in found if holds is not None]
    return all(measured) if measured else None


def _check(
    subject: str,
    holds: bool,
    numbers: Mapping[str, Estimate],
    note: str = "",
    succeeds: bool = True,
) -> Check:
    """Return a check: violated if it does not succeed, not measured if an estimate lacks values."""
    text = f"{subject}: {', '.join(f'{name} {found}' for name, found in numbers.items())}{note}"
    if not succeeds:
        return Check(text, False)
    known = all(estimate.size for estimate in numbers.values())
    return Check(text, bool(holds) if known else None)


def _often(rate: Estimate) -> bool:
    """Return whether attacks succeed as often as the rules ask for, as far as it is known."""
    return not rate.mean < 0.95


def _less(ours: Estimate, theirs: Estimate) -> str:
    """Return by how much a mean is below another."""
    if not ours.size or not theirs.mean > 0:
        return ""
    return f" ({100 * (1 - ours.mean / theirs.mean):.1f} % less)"


@_claim(
    "With two goals at once, ADV2 fools the classifier as reliably as an attack with one.", _BASIC
)
def _prediction(results: Results, model: str) -> Iterator[Check]:
    """For every interpreter, ADV2 succeeds on at least 95 % of the images, and at most 5 % of them
    less often than PGD.
    """
    for name in results.interpreters:
        ours, theirs = (results.estimate("ASR", model, a, name) for a in ("ADV2", "PGD"))
        numbers = {"success of ADV2": ours, "of PGD": theirs}
        yield _check(name, ours.mean >= theirs.mean - 0.05, numbers, succeeds=_often(ours))


@_claim("Maps of images attacked by ADV2 look like those of the clean images.", _BASIC)
def _maps(results: Results, model: str) -> Iterator[Check]:
    """For every interpreter, ADV2's mean L1 to the benign map is at most 40 % of PGD's (60 % less),
    and its mean IoU with it is above 0.5.
    """
    for name in results.interpreters:
        ours, theirs = (results.estimate("L1", model, a, name) for a in ("ADV2", "PGD"))
        overlap = results.estimate("IoU", model, "ADV2", name)
        holds = ours.mean <= 0.4 * theirs.mean and overlap.mean > 0.5
        numbers = {"IoU of ADV2": overlap, "L1 of ADV2": ours, "of PGD": theirs}
        yield _check(name, holds, numbers, _less(ours, theirs))


@_claim(
    "Feature squeezing detects ADV2 about as often as PGD.",
    "PGD and ADV2, scores of squeezers, and held-out images that set their thresholds",
)
def _detection(results: Results, model: str) -> Iterator[Check]:
    """For ADV2 on every interpreter, the joint detection rate differs from PGD's by at most 10
    points, or the 95 % interval of the paired difference holds zero.
    """
    theirs = results.detection(model, "PGD", "")
    for name in results.having("ADV2"):
        ours = results.detection(model, "ADV2", name)
        flags = (results.flagged(model, *place) for place in (("ADV2", name), ("PGD", "")))
        paired = Estimate.of(difference(*flags), percent=True)
        near = round(abs(ours.mean - theirs.mean), 9) <= 0.1  # 0.4 - 0.3 is above 0.1
        holds = near or paired.low <= 0 <= paired.high
        numbers = {"ADV2 detected": ours, "PGD": theirs}
        yield _check(name, holds, numbers, f", paired difference {paired}")


@_claim(
    "ADV2 that knows the detector evades it, and its maps stay as they are.",
    "adaptive and basic ADV2, scores of squeezers, and held-out images",
)
def _evasion(results: Results, model: str) -> Iterator[Check]:
    """For every interpreter and squeezer, the attack that knows the squeezer is detected by it at
    most 30 % of the time, and less often than basic ADV2 is or no more often than 5 % (the false
    positives); it succeeds on at least 95 %; and its mean L1 is at most 0.02 above basic ADV2's.
    """
    for attack in results.named("adaptive:"):
        known = attack.partition(":")[2]
        squeezer = known if known in results.squeezers else JOINT
        for name in results.having(attack):
            found, basic = (results.detection(model, a, name, squeezer) for a in (attack, "ADV2"))
            rate = results.estimate("ASR", model, attack, name)
            ours, theirs = (results.estimate("L1", model, a, name) for a in (attack, "ADV2"))
            rarely = found.mean < basic.mean or found.mean <= FALSE_POSITIVES
            holds = found.mean <= 0.3 and rarely and ours.mean <= theirs.mean + 0.02
            numbers = {"detected": found, "basic ADV2": basic, "success": rate, "L1": ours}
            numbers["basic"] = theirs
            yield _check(f"{attack} on {name}", holds, numbers, succeeds=_often(rate))


@_claim(
    "ADV2 can be built on an attack of another kind, one that moves pixels.", "the framework stadv"
)
def _flows(results: Results, model: str) -> Iterator[Check]:
    """For every interpreter, ADV2 on stAdv succeeds on at least 95 % of the images, and its mean L1
    is at most 50 % of stAdv's.
    """
    for name in results.interpreters:
        rate = results.estimate("ASR", model, "StADV2", name)
        ours, theirs = (results.estimate("L1", model, a, name) for a in ("StADV2", "stAdv"))
        numbers = {"success of ADV2 on stAdv": rate, "L1": ours, "of stAdv": theirs}
        holds = ours.mean <= 0.5 * theirs.mean
        yield _check(name, holds, numbers, _less(ours, theirs), _often(rate))


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
            place = model, attack, name
            rate, to_benign, to_target = (
                results.estimate(title, *place) for title in ("ASR", "L1", "L1 to target")
            )
            gap = Estimate.of(
                difference(results.values("L1", *place), results.values("L1 to target", *place))
            )
            numbers = {"success": rate, "L1 to target": to_target, "to benign": to_benign}
            numbers["paired difference"] = gap
            yield _check(f"{attack} on {name}", gap.low > 0, numbers, succeeds=_often(rate))


@_claim("An attack on one interpreter seldom fools another.", _PAIRS)
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
    text = f"{far} of {measured} pairs are nearer to PGD; transferred: {', '.join(near) or 'none'}"
    yield Check(text, 2 * far > measured if measured else None)


@_claim("Interpreters look at different sides of a classifier, which leaves the gap open.", _PAIRS)
def _aspects(results: Results, model: str) -> Iterator[Check]:
    """Observation 7 holds, and interpreters differ in robustness: of the largest and smallest mean
    L1 under ADV2, or of the largest and smallest mean IoU, the 95 % intervals are disjoint.
    """
    low = _all(check.holds for check in _transfer(results, model))
    texts = ["transfer unknown" if low is None else f"transfer is {'' if low else 'not '}low"]
    disjoint = []
    for title in ("L1", "IoU"):
        names = results.having("ADV2")
        every = [(results.estimate(title, model, "ADV2", name), name) for name in names]
        found = [pair for pair in every if pair[0].size]
        if len(found) > 1:
            (least, first), (most, last) = min(found), max(found)
            texts.append(f"{title} from {first} {least} to {last} {most}")
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
    noises = results.named("noise:")
    for title, attacks in {"ADV2 that knows each": ["ADV2"], "noise": noises or ["noise:"]}.items():
        rts, other = (
            pd.concat({attack: results.values("L1", model, attack, name) for attack in attacks})
            for name in ("RTS", DISTILLED)
        )
        gap = Estimate.of(difference(other, rts))
        numbers = {f"L1 on {DISTILLED}": Estimate.of(other), "on RTS": Estimate.of(rts)}
        yield _check(title, gap.low > 0, {**numbers, "paired difference": gap})

# SPDX-License-Identifier: MIT
"""Whether the paper's nine observations hold in a study, each by a rule that decides on numbers.

An observation is checked for every classifier by itself, and there for every interpreter (or pair,
or squeezer) that was measured. It holds if every check does. A check that lacks its rows, or whose
attacks never succeeded so that there is no map to compare, is not measured and decides nothing; an
observation without any measured check is not measured. `DISTILLED` is no interpreter of
observations 1 to 8: it was trained to break the second.

The rules are in `RULES`, word by word as the page prints them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from captum_adv2.study.estimates import (
    DISTILLED,
    FALSE_POSITIVES,
    JOINT,
    Estimate,
    Results,
    Values,
    difference,
    estimate,
    percentage,
)
from captum_adv2.study.records import Frame
from captum_adv2.study.settings import Settings

__all__ = ["RULES", "Check", "Rule", "Verdict", "judge"]

_SUCCESS = 0.95  # least success rate of an attack that works
_BEHIND = 0.05  # how far ADV2's may fall behind PGD's
_CLOSER = 0.4  # largest share of PGD's L1 that ADV2 keeps
_PLAUSIBLE = 0.5  # IoU that a plausible map exceeds
_ALIKE = 0.10  # largest difference of detection rates that are alike
_EVASIVE = 0.30  # largest detection rate of an evasive attack
_DEARER = 0.02  # largest L1 that evading may cost
_FLOW = 0.5  # largest share of stAdv's L1 that StADV2 keeps


class Check(NamedTuple):
    """What was found for a classifier and, say, an interpreter.

    Attributes:
        model: Name of the classifier.
        text: What it is of, and the numbers.
        holds: ``None`` if it was not measured.
    """

    model: str
    text: str
    holds: bool | None


class Verdict(NamedTuple):
    """Whether an observation holds.

    Attributes:
        number: The paper's, 1 to 9.
        claim: The observation, in our words.
        holds: ``None`` if it was not measured.
        support: The numbers that decide, a line a check; what violates the rule comes first.
        criterion: The rule.
        models: Classifier by classifier.
    """

    number: int
    claim: str
    holds: bool | None
    support: str
    criterion: str
    models: tuple[tuple[str, bool | None], ...] = ()


class Rule(NamedTuple):
    """An observation and how it is judged.

    Attributes:
        claim: The observation, in our words.
        criterion: The rule.
        needs: What has to be measured.
        checks: Checks a classifier.
    """

    claim: str
    criterion: str
    needs: str
    checks: Callable[[Results, str], Iterator[Check]]


def judge(maps: Frame, scores: Frame, settings: Settings) -> list[Verdict]:
    """Return what becomes of the nine observations.

    Args:
        maps: Map rows.
        scores: Score rows.
        settings: The study's.
    """
    results = Results(maps, scores)
    return [_verdict(number, rule, results) for number, rule in RULES.items()]


def _verdict(number: int, rule: Rule, results: Results) -> Verdict:
    checks = [check for model in results.models for check in rule.checks(results, model)]
    lines = [
        f"{check.model}: {check.text} ({word})"
        for holds, word in ((False, "violated"), (True, "holds"), (None, "not measured"))
        for check in checks
        if check.holds is holds
    ]
    models = tuple(
        (model, _all(check.holds for check in checks if check.model == model))
        for model in results.models
    )
    holds = _all(check.holds for check in checks)
    if holds is None:
        lines.insert(0, f"needs {rule.needs}")
    return Verdict(number, rule.claim, holds, "\n".join(lines), rule.criterion, models)


def _all(found: Iterator[bool | None]) -> bool | None:
    """Return whether all that was measured holds; ``None`` if nothing was."""
    measured = [holds for holds in found if holds is not None]
    return all(measured) if measured else None


def _if(known: bool, holds: bool) -> bool | None:
    return holds if known else None


def _prediction(results: Results, model: str) -> Iterator[Check]:
    for name in results.interpreters:
        ours, theirs = (results.estimate("ASR", model, a, name) for a in ("ADV2", "PGD"))
        holds = ours.mean >= _SUCCESS and ours.mean >= theirs.mean - _BEHIND
        text = f"{name}: success of ADV2 {ours.text(True)}, of PGD {theirs.text(True)}"
        yield Check(model, text, _if(_known(ours, theirs), holds))


def _maps(results: Results, model: str) -> Iterator[Check]:
    for name in results.interpreters:
        ours, theirs = (results.estimate("L1", model, a, name) for a in ("ADV2", "PGD"))
        overlap = results.estimate("IoU", model, "ADV2", name)
        holds = ours.mean <= _CLOSER * theirs.mean and overlap.mean > _PLAUSIBLE
        text = (
            f"{name}: L1 of ADV2 {ours.text()}, of PGD {theirs.text()}{_less(ours, theirs)}; IoU "
            f"of ADV2 {overlap.text()}"
        )
        yield Check(model, text, _if(_known(ours, theirs, overlap), holds))


def _detection(results: Results, model: str) -> Iterator[Check]:
    theirs = results.flagged(model, "PGD", "")
    for name in results.having("ADV2"):
        ours = results.flagged(model, "ADV2", name)
        first, second = estimate(ours), estimate(theirs)
        paired = estimate(difference(ours, theirs))
        near = round(abs(first.mean - second.mean), 9) <= _ALIKE  # 0.4 - 0.3 is above 0.1
        text = (
            f"ADV2 on {name} detected {first.text(True)}, PGD {second.text(True)}, paired "
            f"difference {paired.text(True)}"
        )
        yield Check(model, text, _if(_known(first, second), near or paired.low <= 0 <= paired.high))


def _evasion(results: Results, model: str) -> Iterator[Check]:
    for attack in results.parameters("adaptive"):
        known = attack.partition(":")[2]
        squeezer = known if known in results.squeezers else JOINT
        for name in results.having(attack):
            found, basic = (
                estimate(results.flagged(model, a, name, squeezer)) for a in (attack, "ADV2")
            )
            rate = results.estimate("ASR", model, attack, name)
            ours, theirs = (results.estimate("L1", model, a, name) for a in (attack, "ADV2"))
            evades = found.mean <= _EVASIVE and (
                found.mean < basic.mean or found.mean <= FALSE_POSITIVES
            )
            holds = evades and rate.mean >= _SUCCESS and ours.mean <= theirs.mean + _DEARER
            text = (
                f"{attack} on {name}: detected {found.text(True)}, basic ADV2 {basic.text(True)}; "
                f"success {rate.text(True)}; L1 {ours.text()}, basic {theirs.text()}"
            )
            yield Check(model, text, _if(_known(found, basic, rate, ours, theirs), holds))


def _flows(results: Results, model: str) -> Iterator[Check]:
    for name in results.interpreters:
        rate = results.estimate("ASR", model, "StADV2", name)
        ours, theirs = (results.estimate("L1", model, a, name) for a in ("StADV2", "stAdv"))
        holds = rate.mean >= _SUCCESS and ours.mean <= _FLOW * theirs.mean
        text = (
            f"{name}: success of ADV2 on stAdv {rate.text(True)}; L1 {ours.text()}, of stAdv "
            f"{theirs.text()}{_less(ours, theirs)}"
        )
        yield Check(model, text, _if(_known(rate, ours, theirs), holds))


def _targets(results: Results, model: str) -> Iterator[Check]:
    for attack in ("patch", "class"):
        for name in results.having(attack):
            rate = results.estimate("ASR", model, attack, name)
            benign, aimed = (
                results.values(title, model, attack, name) for title in ("L1", "L1 to target")
            )
            gap = estimate(difference(benign, aimed))
            text = (
                f"{attack} on {name}: success {rate.text(True)}; L1 to target "
                f"{estimate(aimed).text()}, to benign {estimate(benign).text()}, paired "
                f"difference {gap.text()}"
            )
            yield Check(model, text, _if(_known(rate, gap), rate.mean >= _SUCCESS and gap.low > 0))


def _transfer(results: Results, model: str) -> Iterator[Check]:
    names = results.having("ADV2")
    near, measured = [], 0
    for column in names:
        own = results.estimate("L1", model, "ADV2", column)
        pgd = results.estimate("L1", model, "PGD", column)
        for source in names:
            cell = results.estimate("L1", model, "ADV2", column, source)
            if source != column and _known(own, pgd, cell):
                measured += 1
                if abs(cell.mean - pgd.mean) >= abs(cell.mean - own.mean):
                    near.append(
                        f"{source} on {column} {cell.mean:.3f} (own {own.mean:.3f}, "
                        f"PGD {pgd.mean:.3f})"
                    )
    far = measured - len(near)
    text = f"{far} of {measured} pairs are nearer to PGD" + (
        f"; transferred: {', '.join(near)}" if near else ""
    )
    yield Check(model, text, _if(measured > 0, 2 * far > measured))


def _aspects(results: Results, model: str) -> Iterator[Check]:
    low = _all(check.holds for check in _transfer(results, model))
    gaps = []
    for title in ("L1", "IoU"):
        found = [
            (entry, name)
            for name in results.having("ADV2")
            for entry in [results.estimate(title, model, "ADV2", name)]
            if entry.size
        ]
        if len(found) > 1:
            (least, first), (most, last) = min(found), max(found)
            text = f"{title} from {first} {least.text()} to {last} {most.text()}"
            gaps.append((least.high < most.low, text))
    differ = any(disjoint for disjoint, _ in gaps)
    words = {True: "transfer is low", False: "transfer is not low", None: "transfer unknown"}
    text = "; ".join([words[low], *(text for _, text in gaps)])
    yield Check(model, text, _if(low is not None and bool(gaps), bool(low) and differ))


def _distilled(results: Results, model: str) -> Iterator[Check]:
    attacks = {"ADV2 that knows each": ["ADV2"], "noise": results.parameters("noise")}
    for title, names in attacks.items():
        both: list[dict[tuple[Any, ...], float]] = []
        for interpreter in ("RTS", DISTILLED):
            pooled: dict[tuple[Any, ...], float] = {}
            for attack in names:
                values: Values = results.values("L1", model, attack, interpreter)
                pooled |= {(attack, *key): value for key, value in values.items()}
            both.append(pooled)
        gap = estimate(difference(both[1], both[0]))
        text = (
            f"{title}: L1 on {DISTILLED} {estimate(both[1]).text()}, on RTS "
            f"{estimate(both[0]).text()}, paired difference {gap.text()}"
        )
        yield Check(model, text, _if(gap.size > 0, gap.low > 0))


def _known(*estimates: Estimate) -> bool:
    return all(entry.size for entry in estimates)


def _less(ours: Estimate, theirs: Estimate) -> str:
    return (
        f" ({percentage(1 - ours.mean / theirs.mean)} less)"
        if ours.size and theirs.mean > 0
        else ""
    )


RULES: Mapping[int, Rule] = {
    1: Rule(
        "With two goals at once, ADV2 fools the classifier as reliably as an attack with one.",
        f"For every interpreter, ADV2 succeeds on at least {percentage(_SUCCESS)} of the images, "
        f"and at most {percentage(_BEHIND)} of them less often than PGD.",
        "PGD, and ADV2 towards benign maps",
        _prediction,
    ),
    2: Rule(
        "Maps of images attacked by ADV2 look like those of the clean images.",
        f"For every interpreter, ADV2's mean L1 to the benign map is at most {percentage(_CLOSER)} "
        f"of PGD's ({percentage(1 - _CLOSER)} less), and its mean IoU with it is above "
        f"{_PLAUSIBLE:g}.",
        "PGD, and ADV2 towards benign maps",
        _maps,
    ),
    3: Rule(
        "Feature squeezing detects ADV2 about as often as PGD.",
        "For ADV2 on every interpreter, the joint detection rate differs from PGD's by at most "
        f"{_ALIKE * 100:g} points, or the 95 % interval of the paired difference holds zero.",
        "PGD and ADV2, scores of squeezers, and held-out images that set their thresholds",
        _detection,
    ),
    4: Rule(
        "ADV2 that knows the detector evades it, and its maps stay as they are.",
        "For every interpreter and squeezer, the attack that knows the squeezer is detected by it "
        f"at most {percentage(_EVASIVE)} of the time, and less often than basic ADV2 is or no more "
        f"often than {percentage(FALSE_POSITIVES)} (the false positives); it succeeds on at least "
        f"{percentage(_SUCCESS)}; and its mean L1 is at most {_DEARER:g} above basic ADV2's.",
        "adaptive and basic ADV2, scores of squeezers, and held-out images",
        _evasion,
    ),
    5: Rule(
        "ADV2 can be built on an attack of another kind, one that moves pixels.",
        f"For every interpreter, ADV2 on stAdv succeeds on at least {percentage(_SUCCESS)} of the "
        f"images, and its mean L1 is at most {percentage(_FLOW)} of stAdv's.",
        "the framework stadv",
        _flows,
    ),
    6: Rule(
        "Class and map can be led to two unrelated places: the two are only loosely tied.",
        "For patches and for maps of other classes, on every interpreter, the attack succeeds on "
        f"at least {percentage(_SUCCESS)} of the images, and its maps are nearer to the target map "
        "than to the benign one: the 95 % interval of the paired difference in L1 is above zero.",
        "ADV2 towards patches or maps of other classes",
        _targets,
    ),
    7: Rule(
        "What fools one interpreter seldom fools another.",
        "For more than half of the ordered pairs of interpreters, the mean L1 on the second of "
        "images made against the first is nearer to PGD's there than to what ADV2 made against "
        "the second reaches.",
        "PGD, and ADV2 towards benign maps of at least two interpreters",
        _transfer,
    ),
    8: Rule(
        "Interpreters look at different sides of a classifier, which leaves the gap open.",
        "Observation 7 holds, and interpreters differ in robustness: of the largest and smallest "
        "mean L1 under ADV2, or of the largest and smallest mean IoU, the 95 % intervals are "
        "disjoint.",
        "PGD, and ADV2 towards benign maps of at least two interpreters",
        _aspects,
    ),
    9: Rule(
        "Training an interpreter against ADV2 narrows the gap.",
        f"Maps of {DISTILLED} move more than those of RTS, under ADV2 that knows each, and on "
        "images that noise makes the classifier err on (all kinds of noise together): the 95 % "
        "intervals of the paired differences in L1 are above zero.",
        f"the interpreters RTS and {DISTILLED} under ADV2 or noise",
        _distilled,
    ),
}
"""The observations by number."""

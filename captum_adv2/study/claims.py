# SPDX-License-Identifier: MIT
"""Whether the paper's nine observations hold, each by a rule that decides on intervals.

A rule has criteria, each a number with a 95 % interval and a limit. A criterion *holds* where the
whole interval meets the limit, *does not hold* where none of it does, and else there are *too few
images* to tell. An observation does not hold if one of its criteria does not; it holds if all do.
What was not measured, or has no successful attack whose map could be compared, decides nothing; an
answer names the interpreters (1, 2, 5), squeezers (4) or kinds of target map (6) that it is
without. Classifiers are judged apart. `DISTILLED` is no interpreter of observations 1 to 8: it was
trained to break the second.

The docstring of a rule is what the page prints.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import sub, truediv
from typing import Any, Literal, NamedTuple, TypeAlias

from captum_adv2.study.cases import DISTILLED, known
from captum_adv2.study.estimates import JOINT, Cell, Estimate, Evidence

Answer: TypeAlias = Literal["holds", "does not hold", "too few images"]
_ORDER: tuple[Answer, ...] = ("does not hold", "too few images", "holds")
_EXACT = 1e-9  # 0.4 - 0.3 is above 0.1


class Check(NamedTuple):
    """A criterion, and what became of it."""

    subject: str  # such as an interpreter
    quantity: str
    found: Estimate | str
    wanted: str
    answer: Answer | None  # None: not measured
    decides: bool = True  # by itself, or as one of several that are counted


Checks: TypeAlias = Callable[[Evidence, str], Iterator[Check]]  # of a classifier


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
    answer: Answer | None
    models: Mapping[str, Answer | None]  # classifier by classifier
    checks: Mapping[str, Sequence[Check]]  # likewise

    def without(self, model: str) -> list[str]:
        """Return what was not measured of a classifier, though it has an answer."""
        subjects = _subjects(self.checks[model]) if self.models[model] else {}
        return [subject for subject, answers in subjects.items() if _joint(answers) is None]


_BASIC = "PGD, and ADV2 towards benign maps"
_PAIRS = f"{_BASIC} of at least two interpreters"
_TWINS = {"GradCAM": "CAM"}  # on average pooling and a linear layer, the one's map is the other's

CLAIMS: list[Claim] = []
"""The observations in the paper's order."""


def _claim(text: str, needs: str) -> Callable[[Checks], Checks]:
    """Make a claim of a function whose docstring is the rule."""

    def register(checks: Checks) -> Checks:
        rule = (inspect.getdoc(checks) or "").replace("\n", " ")
        CLAIMS.append(Claim(text, rule, needs, checks))
        return checks

    return register


def judge(evidence: Evidence, numbers: Iterable[int] = range(1, 10)) -> list[Verdict]:
    """Return what becomes of the nine observations, or of some."""
    return [_verdict(number, CLAIMS[number - 1], evidence) for number in numbers]


def _verdict(number: int, claim: Claim, evidence: Evidence) -> Verdict:
    found = {model: [*claim.checks(evidence, model)] for model in evidence.models}
    models = {model: _of(checks, evidence.complete) for model, checks in found.items()}
    return Verdict(number, claim, _worst(models.values()), models, found)


def _of(checks: Iterable[Check], complete: bool) -> Answer | None:
    """Return the answer of criteria; those of one subject are needed together."""
    answers = _subjects(checks).values()
    return _worst(_joint(each) if complete else _worst(each) for each in answers)


def _subjects(checks: Iterable[Check]) -> dict[str, list[Answer | None]]:
    """Return the answers of the criteria that decide, by subject."""
    subjects: dict[str, list[Answer | None]] = {}
    for check in checks:
        if check.decides:
            subjects.setdefault(check.subject, []).append(check.answer)
    return subjects


def _joint(answers: Sequence[Answer | None]) -> Answer | None:
    """Return the answer of criteria that are needed together: not measured if one is not."""
    worst = _worst(answers)
    return worst if worst == "does not hold" or None not in answers else None


def _worst(answers: Iterable[Answer | None]) -> Answer | None:
    """Return the answer of several together; ``None`` if nothing was measured."""
    return min((a for a in answers if a is not None), key=_ORDER.index, default=None)


def _check(
    subject: str, quantity: str, found: Estimate, limit: float, *, least: bool, decides: bool = True
) -> Check:
    """Compare an interval with a limit."""
    shown = f"{100 * limit:g} %" if found.percent else f"{limit:g}"
    wanted = f"at {'least' if least else 'most'} {shown}"
    low, high, end = (-found.high, -found.low, -limit) if least else (*found[1:3], limit)
    answer: Answer | None = "too few images"
    if not found.size or found.mean != found.mean:  # no value, or NaN
        answer = None
    elif high <= end + _EXACT:
        answer = "holds"
    elif low > end + _EXACT:
        answer = "does not hold"
    return Check(subject, quantity, found, wanted, answer, decides)


def _at_most(subject: str, quantity: str, found: Estimate, limit: float, **how: Any) -> Check:
    return _check(subject, quantity, found, limit, least=False, **how)


def _at_least(subject: str, quantity: str, found: Estimate, limit: float, **how: Any) -> Check:
    return _check(subject, quantity, found, limit, least=True, **how)


def _often(
    evidence: Evidence, model: str, attack: str, name: str, subject: str = "", **how: Any
) -> Check:
    """Return whether an attack succeeds as often as the rules ask for."""
    rate = evidence.estimate("ASR", model, attack, name)
    return _at_least(subject or name, f"success of {attack}", rate, 0.9, **how)


def _either(*checks: Check) -> Check:
    """Return the criterion that is met best; one is enough."""
    return max(checks, key=lambda each: -1 if each.answer is None else _ORDER.index(each.answer))


def _most(subject: str, quantity: str, answers: Mapping[str, Answer | None]) -> Check:
    """Return whether more than half of the subjects that were measured hold."""
    known = {name: answer for name, answer in answers.items() if answer is not None}
    groups = {answer: [n for n, a in known.items() if a == answer] for answer in _ORDER}
    sure, open_ = len(groups["holds"]), len(groups["too few images"])
    answer: Answer | None = None
    if known:
        answer = "holds" if 2 * sure > len(known) else "too few images"
        answer = "does not hold" if 2 * (sure + open_) <= len(known) else answer
    texts = [f"{sure} of {len(known)}"]
    texts += [f"undecided: {', '.join(groups['too few images'])}"] if open_ else []
    texts += [f"not: {', '.join(groups['does not hold'])}"] if groups["does not hold"] else []
    return Check(subject, quantity, "; ".join(texts), "more than half", answer)


def _share(
    evidence: Evidence, model: str, name: str, ours: str = "ADV2", theirs: str = "PGD", **how: Any
) -> Estimate:
    """Return the L1 of an attack as a share of another's."""
    return evidence.contrast(truediv, model, ("L1", ours, name), ("L1", theirs, name), **how)


@_claim(
    "With two goals at once, ADV2 fools the classifier as reliably as an attack with one.", _BASIC
)
def _prediction(evidence: Evidence, model: str) -> Iterator[Check]:
    """For every interpreter, ADV2's success rate is at most 10 points below PGD's, and its mean
    confidence in the target class at most 0.05. PGD that fails on most images decides nothing.
    """
    for name in evidence.interpreters:
        regular = evidence.estimate("ASR", model, "PGD", name)
        if regular.high < 0.5:
            yield Check(name, "success of PGD", regular, "at least 50 %", None)
            continue
        gap = evidence.gap(model, ("ASR", "PGD", name), ("ASR", "ADV2", name))
        yield _at_most(name, "success, PGD's less ADV2's", gap, 0.1)
        gap = evidence.contrast(sub, model, ("MC", "PGD", name), ("MC", "ADV2", name))
        yield _at_most(name, "confidence, PGD's less ADV2's", gap, 0.05)


@_claim("Maps of images attacked by ADV2 look like those of the clean images.", _BASIC)
def _maps(evidence: Evidence, model: str) -> Iterator[Check]:
    """For every interpreter, ADV2's mean L1 to the benign map is at most 0.4 of PGD's (60 % less),
    and its mean IoU with it, of pixels above 0.5, is at least 0.5. The IoU of pixels above their
    map's mean stands beside it and does not decide.
    """
    for name in evidence.interpreters:
        yield _at_most(name, "L1, share of PGD's", _share(evidence, model, name), 0.4)
        overlap, other = (
            evidence.estimate(title, model, "ADV2", name) for title in ("IoU", "IoU at the mean")
        )
        yield _at_least(name, "IoU", overlap, 0.5)
        if other.size:
            yield _at_least(name, "IoU at the mean", other, 0.5, decides=False)


@_claim(
    "Feature squeezing detects ADV2 about as often as PGD.",
    "PGD and ADV2, scores of squeezers, and held-out images that set their thresholds",
)
def _detection(evidence: Evidence, model: str) -> Iterator[Check]:
    """For ADV2 on every interpreter, the detection rates of every squeezer, and of all together,
    differ from PGD's by at most 10 points, and the 95 % interval of the difference lies within 20;
    it does not hold where the interval lies beyond 10.
    """
    for name in evidence.having("ADV2"):
        for squeezer in [*evidence.squeezers, JOINT]:
            found = evidence.excess(model, ("ADV2", name), ("PGD", ""), squeezer)
            answer: Answer | None = "too few images"
            if not found.size:
                answer = None
            elif abs(found.mean) <= 0.1 + _EXACT and -0.2 <= found.low <= found.high <= 0.2:
                answer = "holds"
            elif found.low > 0.1 or found.high < -0.1:
                answer = "does not hold"
            subject = f"{squeezer}, ADV2 on {name}"
            yield Check(subject, "detected, less PGD's rate", found, "within 10 %", answer)


@_claim(
    "ADV2 that knows the detector evades it, and its maps stay as they are.",
    "adaptive and basic ADV2, scores of squeezers, and held-out images",
)
def _evasion(evidence: Evidence, model: str) -> Iterator[Check]:
    """For every squeezer, and every interpreter of attacks that know one, an attack that knows the
    squeezer is detected by it at most half of the time, and less often than basic ADV2 is, or at
    most 20 % of the time; it succeeds on at least 90 %; and its mean L1 is at most 0.02 above basic
    ADV2's. Of attacks that know a squeezer in several ways, such as by Algorithm 2, the best one
    counts.
    """
    attacks = evidence.named("adaptive:")
    for squeezer in dict.fromkeys((*map(known, attacks), *evidence.squeezers)):
        for name in evidence.interpreters:
            tries = [
                [*_tried(evidence, model, attack, name, squeezer)]
                for attack in attacks
                if known(attack) == squeezer and name in evidence.having(attack)
            ]
            if tries:
                answers = [_of(checks, evidence.complete) for checks in tries]
                places = [-1 if a is None else _ORDER.index(a) for a in answers]
                yield from tries[places.index(max(places))]
            elif any(name in evidence.having(attack) for attack in attacks):
                yield Check(squeezer, "detected", "–", "at most 50 %", None)


def _tried(
    evidence: Evidence, model: str, attack: str, name: str, squeezer: str
) -> Iterator[Check]:
    subject = f"{attack} on {name}"
    judged = squeezer if squeezer in evidence.squeezers else JOINT
    found = evidence.detection(model, attack, name, judged)
    fewer = evidence.excess(model, (attack, name), ("ADV2", name), judged)
    yield _at_most(subject, "detected", found, 0.5)
    yield _either(
        _at_most(subject, "detected, less basic ADV2's rate", fewer, 0.0),
        _at_most(subject, "detected", found, 0.2),
    )
    rate = _often(evidence, model, attack, name, subject)
    yield rate._replace(quantity="success")
    gap = evidence.contrast(sub, model, ("L1", attack, name), ("L1", "ADV2", name))
    yield _at_most(subject, "L1, less basic ADV2's", gap, 0.02)


@_claim(
    "ADV2 can be built on an attack of another kind, one that moves pixels.", "the framework stadv"
)
def _flows(evidence: Evidence, model: str) -> Iterator[Check]:
    """For every interpreter, ADV2 on stAdv succeeds on at least 90 % of the images, and its mean L1
    is below stAdv's; for more than half of them it is at most half of stAdv's.
    """
    half: dict[str, Answer | None] = {}
    for name in evidence.interpreters:
        share = _share(evidence, model, name, "StADV2", "stAdv")
        yield _often(evidence, model, "StADV2", name)
        yield _at_most(name, "L1, share of stAdv's", share, 1.0)
        half[name] = _at_most(name, "", share, 0.5).answer
    yield _most("all", "interpreters with at most half of stAdv's L1", half)


@_claim(
    "Class and map can be led to two unrelated places: the two are only loosely tied.",
    "ADV2 towards patches or maps of other classes",
)
def _targets(evidence: Evidence, model: str) -> Iterator[Check]:
    """For patches and for maps of other classes, on more than half of the interpreters, the attack
    succeeds on at least 90 % of the images, and the mean L1 of its maps to the target map is at
    most half of that to the benign map.
    """
    for attack in ("patch", "class"):
        led: dict[str, Answer | None] = {}
        for name in evidence.having(attack):
            cells: list[Cell] = [(title, attack, name) for title in ("L1 to target", "L1")]
            share = evidence.contrast(truediv, model, *cells)
            subject = f"{attack} on {name}"
            checks = [
                _often(evidence, model, attack, name, subject, decides=False),
                _at_most(subject, "L1 to target, share of to benign", share, 0.5, decides=False),
            ]
            yield from checks
            led[name] = _joint([check.answer for check in checks])
        yield _most(attack, "interpreters that are led", led)


@_claim("An attack on one interpreter seldom fools another.", _PAIRS)
def _transfer(evidence: Evidence, model: str) -> Iterator[Check]:
    """For more than half of the ordered pairs of interpreters, the mean L1 on the second of images
    made against the first is nearer to PGD's there than to that of ADV2 made against the second.
    Pairs count whose second interpreter ADV2 fools: its own L1 there is at most half of PGD's. Of
    CAM and GradCAM, one counts.
    """
    names = [n for n in evidence.having("ADV2") if _TWINS.get(n) not in evidence.interpreters]
    far: dict[str, Answer | None] = {}
    for column in names:
        share = _share(evidence, model, column)
        fooled = _at_most(column, "own L1, share of PGD's", share, 0.5, decides=False)
        yield fooled
        for source in names if fooled.answer == "holds" else ():
            if source != column:
                cells: list[Cell] = [
                    *(("L1", "ADV2", column, aimed) for aimed in (source, column)),
                    ("L1", "PGD", column),
                ]
                gap = evidence.contrast(_beyond, model, *cells)
                far[f"{source} on {column}"] = _at_least(column, "", gap, 0.0).answer
    if len(names) > 1:
        yield _most("all", "pairs nearer to PGD's L1", far)


def _beyond(cell: Any, own: Any, pgd: Any) -> Any:
    """Return how far a value is on the second's side of the middle of two others."""
    return cell - (own + pgd) / 2


@_claim("Interpreters look at different sides of a classifier, which leaves the gap open.", _PAIRS)
def _aspects(evidence: Evidence, model: str) -> Iterator[Check]:
    """Observation 7 holds, and interpreters differ in robustness: of ADV2's mean L1 as a share of
    PGD's, the largest among them is at least twice the smallest, by intervals at 95 % for all of
    them together.
    """
    seventh = [check for check in _transfer(evidence, model) if check.decides]
    yield from seventh
    if evidence.complete and not any(check.answer for check in seventh):
        return  # not measured
    names = evidence.having("ADV2")
    level = 1 - 0.05 / max(1, len(names))
    every = [(_share(evidence, model, name, level=level), name) for name in names]
    found = [pair for pair in every if pair[0].size and pair[0].mean == pair[0].mean]
    if len(found) > 1:
        (least, first), (most, last) = min(found), max(found)
        low, high = min(each.low for each, _ in found), max(each.high for each, _ in found)
        between = max(least.high, _EXACT), max(low, _EXACT)
        spread = Estimate(
            most.mean / max(least.mean, _EXACT), most.low / between[0], high / between[1], most.size
        )
        yield _at_least(f"{last} over {first}", "share of PGD's L1, largest by least", spread, 2.0)


@_claim(
    "Training an interpreter against ADV2 narrows the gap.",
    f"the interpreters RTS and {DISTILLED} under PGD, ADV2 and noise",
)
def _distilled(evidence: Evidence, model: str) -> Iterator[Check]:
    """ADV2 that knows RTS-A does not fool it: its mean L1 is at least half of PGD's, or its mean
    IoU at most 0.5. On clean images RTS-A shows what RTS does: their mean L1 is at most 0.05. On
    images that noise makes the classifier err on, its maps move at least 1.1 times as far as those
    of RTS; of an image under several kinds of noise, the mean counts.
    """
    yield _either(
        _at_least("ADV2", "L1, share of PGD's", _share(evidence, model, DISTILLED), 0.5),
        _at_most("ADV2", "IoU", evidence.estimate("IoU", model, "ADV2", DISTILLED), 0.5),
    )
    drift = evidence.estimate("drift", model, "benign", DISTILLED)
    yield _at_most("clean images", "L1 to the map of RTS", drift, 0.05)
    cells: list[Cell] = [("L1", "noise", name) for name in (DISTILLED, "RTS")]
    yield _at_least("noise", "L1 over that of RTS", evidence.contrast(truediv, model, *cells), 1.1)
